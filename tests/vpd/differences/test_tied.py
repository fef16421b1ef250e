"""Clusters against a linkage in loops; tied attacks against gradients by differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from difference_problems import Toy, importances_of, toy
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.differences.tied import (
    Clusters,
    climb_tied,
    cluster,
    cluster_table,
    firing_sets,
    tied_row,
    tied_table,
)
from mi_weightspace.vpd.ladder import climb, first_sources, importances

pytestmark = pytest.mark.quick


def joined(on: Tensor, cut: float) -> set[frozenset[int]]:
    """Average linkage, one merge after another."""
    sets = [set(on[:, c].nonzero().flatten().tolist()) for c in range(on.shape[1])]
    groups = [frozenset([c]) for c in range(on.shape[1]) if sets[c]]

    def distance(a: frozenset[int], b: frozenset[int]) -> float:
        pairs = [1 - len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i in a for j in b]
        return sum(pairs) / len(pairs)

    while len(groups) > 1:
        pairs = [(distance(a, b), a, b) for a in groups for b in groups if a is not b]
        nearest = min(pairs, key=lambda p: p[0])
        if nearest[0] > cut:
            break
        groups = [g for g in groups if g not in nearest[1:]] + [nearest[1] | nearest[2]]
    return {*groups, *(frozenset([c]) for c in range(on.shape[1]) if not sets[c])}


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_average_linkage(seed: int) -> None:
    draw = generator(seed, "firings")
    causes = torch.rand(60, 4, generator=draw) < 0.3
    own = torch.randint(4, (14,), generator=draw)
    on = causes[:, own] ^ (torch.rand(60, 14, generator=draw) < 0.12)
    on[:, [3, 9]] = False
    found = cluster(on)
    groups = {frozenset((found.index == k).nonzero().flatten().tolist()) for k in range(found.n)}
    assert groups == joined(on, 0.5)
    assert 4 <= found.n < 14
    assert found.index[0] == 0 and found.firings[3] == 0


def test_firing_sets_are_importances_above_a_hundredth() -> None:
    problem = toy()
    x = problem.inputs(7)
    found = firing_sets(problem.objective, [x[:4], x[4:]])
    expected = torch.cat(list(importances_of(problem, x).values()), dim=1) > 0.01
    assert torch.equal(found, expected) and 0 < expected.double().mean() < 1


def test_the_table_names_members() -> None:
    problem = toy(("sft",))
    on = torch.zeros(10, 4, dtype=torch.bool)
    on[:5, 0] = on[:5, 2] = True
    on[5:, 1] = True
    table = cluster_table(problem.objective, cluster(on))
    assert table["site"].tolist() == ["inner@sft", "outer@sft", "inner@sft"]
    assert table["component"].tolist() == [0, 0, 1]
    assert table["size"].tolist() == [2, 2, 1] and table["frequency"].tolist() == [0.5] * 3
    assert table["cluster"].tolist() == [0, 0, 1]


def tied_naive(problem: Toy, x: Tensor, index: list[int], budget: int) -> float:
    """Sign steps of 0.1 on one number a cluster and one a remainder, from the ladder's start."""
    g = importances_of(problem, x)
    names = list(g)
    r_all, d = first_sources(problem.objective, 0, 0, 0)
    r = torch.stack([r_all[index.index(k)] for k in range(max(index) + 1)])
    d = d.clone()

    def error() -> float:
        full = torch.stack([r[k] for k in index]).split(2)
        m = {n: g[n] + (1 - g[n]) * full[at] for at, n in enumerate(names)}
        delta = {n: d[at].repeat(len(x)) for at, n in enumerate(names)}
        return float(problem.masked_error(x, m, delta).mean())

    for _ in range(budget):
        moves = []
        for leaf in (r, d):
            for i in range(len(leaf)):
                leaf[i] += 1e-6
                up = error()
                leaf[i] -= 2e-6
                down = error()
                leaf[i] += 1e-6
                moves.append((leaf, i, 0.1 if up > down else -0.1))
        for leaf, i, step in moves:
            leaf[i] = float((leaf[i] + step).clamp(0, 1))
    return error()


def test_tied_sources_climb_as_written_out() -> None:
    problem = toy()
    x = problem.inputs(5)
    index = [0, 1, 0, 2, 1, 0, 3, 3]
    clusters = Clusters(torch.tensor(index), torch.ones(8, dtype=torch.long), 5)
    found = tied_row(problem.objective, [x], clusters, budget=3)
    assert found["median"] == pytest.approx(tied_naive(problem, x, index, 3), rel=1e-6)
    assert found["n_sources"] == 4 and found["n"] == 5


def test_untied_sources_are_the_ladder_s() -> None:
    problem = toy()
    x = problem.inputs(5)
    start = first_sources(problem.objective, 0, 0, 0)
    clean = problem.objective.factors.host.clean(x)
    low = importances(problem.objective, clean)
    expected = climb(problem.objective, clean, low, start, budgets=(4,))[4]
    found = climb_tied(problem.objective, x, torch.arange(8), start, 4)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_compensating_pair_resists_tied_sources_alone() -> None:
    """inner ← 2·inner, outer ← outer/2 and all importances low: reverting one is harmful, both
    together far less."""
    base = toy(("sft",), linear=True)
    inner, outer = base.matrices[0]
    problem = toy(("sft",), linear=True, matrices=[(inner, outer), (2 * inner, outer / 2)])
    factors = problem.objective.factors
    for name in factors.layout.names:  # all of every update is in its components
        u, s, vh = torch.linalg.svd(factors.weights[name], full_matrices=False)
        factors.reads[name], factors.writes[name] = vh[:4], (u[:, :4] * s[:4]).T
    whole = type(factors)(factors.host, factors.reads, factors.writes)
    problem.objective.factors = whole
    problem.objective.sizes = whole.layout.total, 2
    problem.objective.importance = lambda clean, _: clean.batch.new_full(
        (len(clean.batch), whole.layout.total), 0.02
    )  # pyright: ignore
    x = problem.inputs(20)
    together = cluster(firing_sets(problem.objective, [x]))
    assert together.n == 1
    alone = Clusters(torch.arange(whole.layout.total), together.firings, 20)
    tied, untied = (
        tied_row(problem.objective, [x], c, budget=20)["median"] for c in (together, alone)
    )
    assert tied < 0.5 * untied


def test_the_table_sets_both_attacks_side_by_side() -> None:
    row = {"budget": 2, "low": 1.0, "high": 3.0, "n_batches": 1, "n": 4}
    tied = {
        s: {"sources": "tied", "n_sources": 3, "median": v, **row}
        for s, v in zip("ab", (2.0, 1.0), strict=True)
    }
    untied = {s: {"median": 4.0, "extra": 1, **row} for s in "ab"}
    table = tied_table(tied, untied, {"a": 8.0, "b": 2.0}, 9)
    assert table["sources"].tolist() == ["untied", "tied"] * 2
    np.testing.assert_allclose(table["of_behaviour"], [0.5, 0.25, 0.5, 0.125])
    np.testing.assert_allclose(table["of_own"], [0.5, 0.25, 2.0, 0.5])
    assert table["n_sources"].tolist() == [9, 3, 9, 3] and "extra" not in table
