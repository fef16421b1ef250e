"""Scores against a known answer: loops in float64, brute-force matching, planted answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd import truth
from mi_weightspace.vpd.truth import (
    Dense,
    Identity,
    Parts,
    alive,
    alive_counts,
    feature_splitting,
    match_columns,
    ml2r,
    mmcs,
    one_hot_probe,
    seed_consistency,
    target_ci_error,
)

pytestmark = pytest.mark.quick


def draw(seed: int, *shape: int, law=torch.randn) -> Tensor:
    return law(*shape, generator=torch.Generator().manual_seed(seed))


def permuted_identity(n: int, c: int, seed: int) -> tuple[Tensor, list[int]]:
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed)).tolist()
    ci = torch.zeros(n, c)
    for row in range(n):
        ci[row, order[row]] = 1.0
    return ci, order


def naive_identity_errors(ci: Tensor, tolerance: float) -> set[int]:
    """Errors of every one of the best permutations, by trying them all."""
    n, c = ci.shape
    ways = list(itertools.permutations(range(c), n))
    sums = [math.fsum(float(ci[i, w[i]]) for i in range(n)) for w in ways]
    found = set()
    for way, total in zip(ways, sums, strict=True):
        if total > max(sums) - 1e-9:
            errors = 0
            for i in range(n):
                for j in range(c):
                    if way[i] == j:
                        errors += float(ci[i, j]) < 1 - tolerance
                    else:
                        errors += float(ci[i, j]) > tolerance
            found.add(errors)
    return found


def test_planted_identity_has_no_error_and_every_change_counts_once() -> None:
    ci, order = permuted_identity(6, 15, 0)
    found = target_ci_error(ci, Identity())
    assert found.errors == 0
    assert list(found.order[:6]) == order[:6]
    assert sorted(found.order) == list(range(15))
    ci[2, order[2]] = 0.85
    ci[3, order[9]] = 0.11
    ci[4, order[4]] = 0.91  # within tolerance
    ci[5, order[10]] = 0.09
    worse = target_ci_error(ci, Identity())
    assert (worse.missing, worse.spurious, worse.errors) == (1, 1, 2)
    assert target_ci_error(ci, Identity(), tolerance=0.2).errors == 0


@pytest.mark.parametrize("seed", range(6))
def test_identity_agrees_with_every_permutation(seed: int) -> None:
    ci = draw(seed, 3, 6, law=torch.rand) ** 2
    ci[0, 1] = ci[2, 4] = 1.0
    for tolerance in (0.1, 0.2, 0.4):
        errors = target_ci_error(ci, Identity(), tolerance).errors
        assert {errors} == naive_identity_errors(ci, tolerance)


def test_missing_structure_is_counted_whole() -> None:
    assert target_ci_error(torch.zeros(5, 20), Identity()).missing == 5
    everything = target_ci_error(torch.ones(5, 20), Identity())
    assert (everything.missing, everything.spurious) == (0, 5 * 19)
    few = target_ci_error(torch.eye(5)[:, :3], Identity())  # two features have no component
    assert (few.missing, few.spurious) == (2, 0)


def test_idle_features_must_have_no_component() -> None:
    ci, order = permuted_identity(6, 10, 3)
    ci[4] = ci[5] = 0
    assert target_ci_error(ci, Identity(idle=(4, 5))).errors == 0
    assert target_ci_error(ci, Identity()).missing == 2
    ci[5, order[0]] = 1
    assert target_ci_error(ci, Identity(idle=(4, 5))).spurious == 1
    with pytest.raises(ConfigError, match=r"\[6\]"):
        target_ci_error(ci, Identity(idle=(6,)))


def test_greedy_matching_above_five_hundred_components() -> None:
    ci, order = permuted_identity(40, 501, 1)
    found = target_ci_error(ci, Identity())
    assert found.errors == 0
    assert list(found.order[:40]) == order[:40]
    # greedy takes the largest entry first, where the assignment would not
    values = np.zeros((2, 501))
    values[0, :2], values[1, :2] = (1.0, 0.9), (0.95, 0.0)
    assert match_columns(values) == {0: 0, 1: 1}
    assert match_columns(values[:, :500]) == {0: 1, 1: 0}


def test_dense_pattern() -> None:
    ci = torch.zeros(10, 8)
    ci[:, 3] = ci[:, 6] = 1.0
    assert target_ci_error(ci, Dense(2)).errors == 0
    assert target_ci_error(ci, Dense(2)).order[:2] == (3, 6)
    assert target_ci_error(ci, Dense(3)).missing == 1
    assert target_ci_error(ci, Dense(1)).spurious == 1
    ci[0, 1], ci[5, 1] = 0.2, 0.3  # one more column, whatever the number of its entries
    assert target_ci_error(ci, Dense(2)).spurious == 1
    ci[:7, 6] = 0.5
    assert target_ci_error(ci, Dense(2)).errors == 1
    assert target_ci_error(ci, Dense(2, min_entries=5)).missing == 2
    with pytest.raises(ConfigError, match="k=9"):
        target_ci_error(ci, Dense(9))


def naive_mmcs(read: np.ndarray, write: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    cosines, ratios = [], []
    for j in range(read.shape[1]):
        column = [float(v) for v in weight[:, j]]
        best = (-2.0, 0.0)
        for c in range(len(read)):
            part = [float(read[c, j]) * float(v) for v in write[c]]
            norm = math.sqrt(math.fsum(v * v for v in part))
            size = math.sqrt(math.fsum(v * v for v in column))
            inner = math.fsum(a * b for a, b in zip(part, column, strict=True))
            best = max(best, (inner / norm / size, norm / size))
        cosines.append(best[0])
        ratios.append(best[1])
    return sum(cosines) / len(cosines), sum(ratios) / len(ratios)


def test_mmcs_and_ml2r_are_the_written_out_loops() -> None:
    read, write, weight = draw(0, 7, 5), draw(1, 7, 4), draw(2, 4, 5)
    expected = naive_mmcs(*(t.double().numpy() for t in (read, write, weight)))
    found = mmcs(read, write, weight)
    assert found.mmcs == pytest.approx(expected[0], rel=1e-9)
    assert found.ml2r == pytest.approx(expected[1], rel=1e-9)
    assert ml2r(read, write, weight) == found.ml2r


def test_planted_columns_give_one_and_shrinkage_shows_in_the_norm_alone() -> None:
    weight = draw(3, 2, 5)
    order = [3, 0, 4, 1, 2]
    sign = torch.tensor([1.0, -1, 1, -1, -1])
    read = torch.zeros(9, 5)
    write = torch.zeros(9, 2)
    for c, j in enumerate(order):  # a flipped sign of both factors is the same component
        read[c, j] = 2 * sign[j]
        write[c] = weight[:, j] * sign[j] / 2
    found = mmcs(read, write, weight)
    assert found.mmcs == pytest.approx(1, abs=1e-6)
    assert found.ml2r == pytest.approx(1, abs=1e-6)
    assert [found.best[j] for j in order] == [0, 1, 2, 3, 4]
    shrunk = mmcs(read, 0.8 * write, weight)
    assert shrunk.mmcs == pytest.approx(1, abs=1e-6)
    assert shrunk.ml2r == pytest.approx(0.8, abs=1e-6)
    assert mmcs(read, -write, weight).mmcs <= 0  # the opposite matrix is not the matrix


def test_dead_components_are_a_cosine_of_zero() -> None:
    assert mmcs(torch.zeros(3, 5), torch.zeros(3, 2), draw(0, 2, 5)).mmcs == 0


def test_seed_consistency_of_the_same_parts_is_one_whatever_order_sign_and_scale() -> None:
    parts = Parts(draw(0, 12, 20), draw(1, 12, 16))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    flip = torch.tensor([1.0, -1] * 6)[:, None]
    other = Parts(3 * flip * parts.read[order], flip * parts.write[order] / 5)
    same = seed_consistency(parts, other)
    assert [same.runs.write, same.runs.read, same.runs.rank_one] == pytest.approx([1, 1, 1])
    assert same.at_init.write < 0.7
    # a flipped write alone is another matrix: vectors agree, parts do not
    opposite = seed_consistency(parts, Parts(other.read, -other.write))
    assert opposite.runs.write == pytest.approx(1)
    assert opposite.runs.rank_one < 0.5


def test_seed_consistency_agrees_with_loops_and_does_not_depend_on_the_order() -> None:
    a, b = Parts(draw(0, 3, 6), draw(1, 3, 5)), Parts(draw(2, 5, 6), draw(3, 5, 5))

    def cosine(x: Tensor, y: Tensor) -> float:
        return float(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))

    def one_way(x: Parts, y: Parts) -> float:
        return sum(
            max(
                cosine(x.read[i], y.read[j]) * cosine(x.write[i], y.write[j])
                for j in range(len(y.read))
            )
            for i in range(len(x.read))
        ) / len(x.read)

    found = seed_consistency(a, b, at_init=(a, a))
    assert found.runs.rank_one == pytest.approx((one_way(a, b) + one_way(b, a)) / 2, rel=1e-5)
    turned = seed_consistency(b, a).runs
    for name in ("write", "read", "rank_one"):
        assert getattr(turned, name) == pytest.approx(getattr(found.runs, name), rel=1e-12)
    assert found.at_init.rank_one == pytest.approx(1)


def test_unrelated_runs_stay_at_the_baseline() -> None:
    a, b = (Parts(draw(10 * s, 40, 64), draw(10 * s + 1, 40, 64)) for s in (1, 2))
    found = seed_consistency(a, b)
    for name in ("write", "read", "rank_one"):
        assert abs(getattr(found.runs, name) - getattr(found.at_init, name)) < 0.03
    assert seed_consistency(a, b).at_init == found.at_init
    assert seed_consistency(a, b, seed=1).at_init != found.at_init


def test_feature_splitting_counts_matches() -> None:
    source = torch.eye(6)[:4]
    larger = torch.stack([source[0], -source[1] + 0.1 * source[2], source[1] + source[2]])
    # unit 0: one match; 1: two (one by its sign alone); 2: one (|cos| .707); 3: none
    found = feature_splitting(source, larger)
    assert (found.unmatched, found.single, found.split) == (0.25, 0.5, 0.25)
    assert feature_splitting(source, larger, threshold=0.8).split == 0
    assert feature_splitting(source, source).single == 1


def test_alive_under_both_definitions() -> None:
    g = torch.zeros(1000, 4)
    g[0, 1] = 5e-4  # mean 5e-7, fired once
    g[:, 2] = 0.5
    g[3, 3] = 2e-3  # mean 2e-6
    found = alive_counts(g)
    assert found.by_mean.tolist() == [False, False, True, True]
    assert found.by_firing.tolist() == [False, True, True, True]
    assert found.counts == (2, 3)
    # three firings in four million are below one per million
    rare = alive(torch.tensor([1e-9, 1e-9]), torch.tensor([3, 4]), 4_000_000)
    assert rare.by_firing.tolist() == [False, True]


def test_probe_has_the_published_magnitude() -> None:
    assert torch.equal(one_hot_probe(3), 0.75 * torch.eye(3))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: target_ci_error(torch.ones(3), Identity()), "ci"),
        (lambda: target_ci_error(torch.full((2, 2), torch.nan), Identity()), "non-finite"),
        (lambda: target_ci_error(torch.ones(2, 2), Identity(), tolerance=1.0), "tolerance"),
        (lambda: target_ci_error(torch.ones(2, 0), Identity()), "ci"),
        (lambda: mmcs(draw(0, 3, 5), draw(1, 3, 2), draw(2, 5, 2)), r"\(d_out, d_in\)"),
        (lambda: mmcs(draw(0, 3, 5), draw(1, 3, 2), torch.zeros(2, 5)), "zero columns"),
        (lambda: feature_splitting(draw(0, 3, 5), draw(1, 3, 4)), "widths 5 and 4"),
        (lambda: feature_splitting(torch.zeros(3, 5), draw(1, 3, 5)), "zero vectors"),
        (lambda: feature_splitting(torch.zeros(0, 5), draw(1, 3, 5)), "write"),
        (lambda: alive(torch.ones(2), torch.ones(3), 5), "2 means, 3 counts"),
        (lambda: alive(torch.ones(2), torch.tensor([1, 9]), 5), "5 positions"),
        (lambda: alive_counts(torch.full((2, 2), torch.inf)), "non-finite"),
    ],
)
def test_bad_input_is_refused(call, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        call()


def test_constants_are_the_published_ones() -> None:
    assert (truth.PROBE, truth.HUNGARIAN_UP_TO) == (0.75, 500)
    assert (truth.MEAN_ALIVE, truth.FIRES_PER_POSITION) == (1e-6, 1e-6)
