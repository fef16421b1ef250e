"""Held-out scores, their intervals, nulls and differences: oracles, planted truth and absence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from detection_cases import factorial, pairs, prompt_activations
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.stats import perfect_score_bound
from probes.detection import (
    Design,
    Found,
    differences,
    joint_p,
    measure,
    measure_norm,
    score_found,
    weighted_aurocs,
)
from probes.detector_list import DETECTORS

BY_NAME = {d.name: d for d in DETECTORS}
SMALL = {"n_permutations": 99, "n_bootstrap": 200}


def code(labels: torch.Tensor, rows: torch.Tensor, size: float) -> torch.Tensor:
    shifted = rows.clone()
    shifted[:, 0] += size * labels
    return shifted


@pytest.mark.quick
def test_weighted_auroc_equals_scikit_learn() -> None:
    draw = generator(0, "weighted")
    labels = torch.tensor([0, 1] * 15)
    scores = torch.randint(0, 9, (3, 30), generator=draw).double()
    scores[0, :10] = torch.nan
    weights = torch.randint(0, 4, (6, 30), generator=draw).double()
    own = weighted_aurocs(scores, labels, weights)
    for i, row in enumerate(scores):
        seen = ~row.isnan()
        for b, w in enumerate(weights):
            kept = w[seen].numpy()
            oracle = roc_auc_score(labels[seen], row[seen], sample_weight=kept)
            assert float(own[b, i]) == pytest.approx(oracle, abs=1e-12)


@pytest.mark.quick
def test_a_planted_shift_is_found_and_its_absence_is_not() -> None:
    labelled = pairs(40)
    design = Design.of(labelled, **SMALL)
    nothing = prompt_activations(labelled, seed=3)
    shifted = code(labelled.labels, nothing, 2.5)
    for name in ("dm", "lda", "lr"):
        there = measure(BY_NAME[name], design, shifted)
        absent = measure(BY_NAME[name], design, nothing)
        assert there.above()
        assert there.low > 0.55
        assert not absent.above()
        assert absent.null_interval[0] <= absent.value <= absent.null_interval[1]
    assert measure_norm(design, shifted).above()
    assert not measure_norm(design, nothing).above()


@pytest.mark.quick
def test_a_crossed_design_has_its_null_below_one_half() -> None:
    """A clean stage scores far below 0.5, as its own null does: it is not 'anti-detected'."""
    labelled = factorial()
    design = Design.of(labelled, **SMALL)
    rows = prompt_activations(labelled, seed=0)
    found = measure(BY_NAME["dm"], design, rows)
    assert found.value < 0.42
    assert found.null_mean < 0.42
    assert found.p > 0.05
    shown = measure(BY_NAME["lda"], design, code(labelled.labels, rows, 2.0))
    assert shown.above()


@pytest.mark.quick
def test_p_values_of_nothing_are_uniform() -> None:
    labelled = pairs(20)
    found = []
    for seed in range(60):
        design = Design.of(labelled, n_splits=2, n_folds=2, seed=seed, **SMALL)
        draw = generator(seed, "nothing")
        rows = torch.randn(40, 6, generator=draw, dtype=torch.float64)
        rows += torch.randn(20, 6, generator=draw, dtype=torch.float64).repeat_interleave(2, 0)
        found.append([measure(BY_NAME["dm"], design, rows).p, measure_norm(design, rows).p])
    both = np.array(found)
    assert kstest(both[:, 0], "uniform").pvalue > 0.005
    assert kstest(both[:, 1], "uniform").pvalue > 0.005


@pytest.mark.quick
def test_rank_and_t_agree_on_a_normal_null() -> None:
    null = torch.randn(999, generator=generator(0, "null"), dtype=torch.float64) * 0.05 + 0.47
    empty = torch.zeros(0, dtype=torch.float64)
    full = Found(0.58, 0.5, 0.6, empty, null, empty)
    few = replace(full, null=null[:60])
    assert (full.p_method, few.p_method) == ("rank", "t")
    assert few.p == pytest.approx(full.p, abs=0.04)
    below = replace(full, value=0.47 - 0.11)
    assert below.p == pytest.approx(full.p, abs=0.02), "two-sided around the null's mean"
    assert not below.above()
    assert replace(full, null=empty).p_method == "none"


@pytest.mark.quick
def test_a_perfect_score_has_the_exact_bound() -> None:
    labelled = factorial(4, 4)
    design = Design.of(labelled, **SMALL)
    scores = torch.full((8, 32), torch.nan, dtype=torch.float64)
    for i, split in enumerate(design.splits):
        scores[i, split.test] = labelled.labels[split.test].double()
    perfect = score_found(scores, design)
    assert (perfect.value, perfect.low) == (1.0, perfect_score_bound(8))
    wrong = score_found(-scores, design)
    assert (wrong.value, wrong.high) == (0.0, 1 - perfect_score_bound(8))


@pytest.mark.quick
def test_the_interval_resamples_clusters_and_not_rows() -> None:
    """Copies of every row in its cluster change nothing."""
    small, copied = pairs(30), pairs(30)
    copied = copied.take([i for i in range(60) for _ in range(1)])
    design = Design.of(small, **SMALL)
    draw = generator(1, "scores")
    own = torch.randn(8, 60, generator=draw, dtype=torch.float64) + 0.8 * small.labels
    once = score_found(own, design)
    twice = score_found(
        torch.cat([own, own], 1),
        replace(
            design,
            labels=design.labels.repeat(2),
            clusters=design.clusters.repeat(2),
            weights=design.weights.repeat(1, 2),
        ),
    )
    torch.testing.assert_close(once.draws, twice.draws)
    assert copied.n_clusters == 30
    assert once.low < once.value < once.high


@pytest.mark.quick
def test_differences_are_paired_and_adjusted() -> None:
    labelled = pairs(60)
    design = Design.of(labelled, **SMALL)
    draw = generator(2, "scores")
    base = torch.randn(8, 120, generator=draw, dtype=torch.float64)
    strong = score_found(base + 1.5 * labelled.labels, design)
    rivals = {
        "itself": strong,
        "weak": score_found(base + 0.2 * labelled.labels, design),
        "weaker": score_found(base, design),
    }
    found = differences(strong, rivals)
    assert (found["itself"].value, found["itself"].p, found["itself"].better()) == (0, 1, False)
    assert found["weak"].better()
    assert found["weak"].low > 0
    assert found["weaker"].value > found["weak"].value
    assert all(d.p_holm >= d.p for d in found.values())
    back = differences(rivals["weak"], {"strong": strong})["strong"]
    assert back.value == -found["weak"].value
    assert not back.better()


@pytest.mark.quick
def test_the_joint_p_is_that_of_the_best_row_times_their_number() -> None:
    from scipy.stats import t

    draw = generator(0, "joint")
    null = torch.randn(3, 199, generator=draw, dtype=torch.float64)
    empty = torch.zeros(0, dtype=torch.float64)

    def rows(*values: float) -> list[Found]:
        return [Found(v, 0, 1, empty, n, empty) for v, n in zip(values, null, strict=True)]

    p, best = joint_p(rows(0.0, 4.0, 0.0))
    own = null[1].numpy()
    gap = (4.0 - own.mean()) / (own.std(ddof=1) * (1 + 1 / 199) ** 0.5)
    assert best == 1 and p == pytest.approx(3 * 2 * t.sf(gap, 198))
    assert joint_p(rows(0.0, 0.5, 0.0))[0] > 0.5
    assert joint_p(rows(-6.0, -6.0, -6.0))[0] == 1.0, "one-sided: below the null is no detection"
    single = [Found(2.1, 0, 1, empty, null[0], empty)]
    assert joint_p(single)[0] < joint_p([*single, *rows(0.0, 0.0, 0.0)[1:]])[0]


@pytest.mark.quick
def test_transfer_and_unrelated_rows_are_scored_by_the_same_fit() -> None:
    labelled = pairs(40)
    design = Design.of(labelled, **SMALL)
    rows = code(labelled.labels, prompt_activations(labelled, seed=0), 2.5)
    far = prompt_activations(labelled, seed=9)
    found = measure(
        BY_NAME["dm"],
        design,
        rows,
        n_permutations=0,
        others={"same": rows, "absent": far},
        unrelated=rows[labelled.labels == 0],
    )
    assert len(found.null) == 0
    assert torch.equal(found.others["same"].draws, found.draws)
    assert abs(found.others["absent"].value - 0.5) < 0.2
    assert 0.0 < found.recall < 0.9
    everything = measure(BY_NAME["dm"], design, rows, n_permutations=0, unrelated=far - 100 * rows)
    assert everything.recall in (0.0, 1.0)


@pytest.mark.quick
def test_the_norm_equals_its_definition() -> None:
    labelled = pairs(25)
    design = Design.of(labelled, **SMALL)
    rows = code(labelled.labels, prompt_activations(labelled, seed=5), 1.0)
    y = labelled.labels.numpy()
    x = rows.numpy()
    shift = x[y == 1].mean(0) - x[y == 0].mean(0)
    found = measure_norm(design, rows)
    assert found.value == pytest.approx(np.linalg.norm(shift) / np.linalg.norm(x, axis=1).mean())
    for b in range(3):
        z = design.signs[b].numpy() > 0
        flipped = x[z].mean(0) - x[~z].mean(0)
        oracle = np.linalg.norm(flipped) / np.linalg.norm(x, axis=1).mean()
        assert float(found.null[b]) == pytest.approx(oracle)
    assert found.low <= found.value <= found.high
    square = found.draws.sign() * found.draws.square()
    assert float(square.mean()) == pytest.approx(found.value**2, rel=0.1), "centred on the value"


@pytest.mark.quick
def test_between_stages_keeps_a_prompt_on_one_side() -> None:
    labelled = factorial(4, 4)
    design = Design.of(labelled, **SMALL).between_stages()
    assert len(design) == 2 * len(labelled)
    assert torch.equal(design.clusters[: len(labelled)], design.clusters[len(labelled) :])
    assert len(design.clusters.unique()) == labelled.n_clusters
    assert torch.equal(design.weights[:, : len(labelled)], design.weights[:, len(labelled) :])
    for split in design.splits:
        n = len(labelled)
        assert not set((split.train % n).tolist()) & set((split.test % n).tolist())
    rows = prompt_activations(labelled, seed=0)
    both = torch.cat([rows + 1, rows])
    assert measure(BY_NAME["dm"], design, both, n_permutations=0).value > 0.9
