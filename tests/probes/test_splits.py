"""Splits that never part a cluster, and permutations that keep the design."""

from __future__ import annotations

import pytest
import torch
from detection_cases import factorial, pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from probes.splits import crossed_levels, fold_numbers, grouped_splits, holders, labelings

pytestmark = pytest.mark.quick


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 1)), min_size=4, max_size=70),
    n_folds=st.integers(2, 9),
    n_splits=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_no_design_splits_a_cluster(
    rows: list[tuple[int, int]], n_folds: int, n_splits: int, seed: int
) -> None:
    """Uneven, mixed, interleaved clusters with gaps in their numbers."""
    clusters = torch.tensor([7 * c + 3 for c, _ in rows])
    labels = torch.tensor([y for _, y in rows])
    if min(holders(labels, clusters)) < 2:
        with pytest.raises(PromptError, match="two clusters"):
            grouped_splits(labels, clusters, n_splits=n_splits, n_folds=n_folds, seed=seed)
        return
    splits = grouped_splits(labels, clusters, n_splits=n_splits, n_folds=n_folds, seed=seed)
    assert len(splits) >= n_splits
    tested = torch.zeros(len(rows))
    for split in splits:
        train, test = set(clusters[split.train].tolist()), set(clusters[split.test].tolist())
        assert not train & test
        assert len(train) >= 1
        assert len(test) >= 1
        assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(len(rows)))
        tested[split.test] += 1
    assert len(tested.unique()) == 1, "every repetition tests every row once"


def test_eight_splits_are_balanced_and_drawn_anew() -> None:
    labelled = factorial()
    splits = grouped_splits(labelled.labels, labelled.cluster_index, seed=0)
    assert len(splits) == 8
    for split in splits:
        assert float(labelled.labels[split.test].double().mean()) == 0.5
        assert float(labelled.labels[split.train].double().mean()) == 0.5
    tests = {tuple(s.test.tolist()) for s in splits}
    assert len(tests) == 8
    again = grouped_splits(labelled.labels, labelled.cluster_index, seed=0)
    other = grouped_splits(labelled.labels, labelled.cluster_index, seed=1)
    assert all(torch.equal(a.test, b.test) for a, b in zip(splits, again, strict=True))
    assert not all(torch.equal(a.test, b.test) for a, b in zip(splits, other, strict=True))


def test_uneven_clusters_are_dealt_to_even_folds() -> None:
    sizes = [9, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    clusters = torch.cat([torch.full((s,), i) for i, s in enumerate(sizes)])
    fold = fold_numbers(torch.zeros(18).long(), clusters, 2, seed=0, name="x")
    assert torch.bincount(fold).tolist() == [9, 9]


def test_pairs_are_swapped_whole() -> None:
    labelled = pairs(12)
    drawn = labelings(labelled, 200, seed=0)
    assert drawn.scheme == "pairs"
    two = drawn.signs.reshape(200, 12, 2)
    assert torch.equal(two.sum(-1), torch.zeros(200, 12))
    share = (two[..., 0] > 0).double().mean()
    assert 0.45 < float(share) < 0.55


def single_clusters(sizes: list[int]) -> LabelledSet:
    return LabelledSet(
        tuple(
            LabelledPrompt(f"c{c} r{i}", c % 2, f"c{c}", f"c{c}r{i}")
            for c, size in enumerate(sizes)
            for i in range(size)
        ),
        "single",
    )


@pytest.mark.parametrize("sizes", [[2] * 12, [1, 1, 1, 1, 3, 3, 3, 3], [1, 2, 3, 4, 5, 6]])
def test_labels_move_between_whole_clusters(sizes: list[int]) -> None:
    labelled = single_clusters(sizes)
    drawn = labelings(labelled, 100, seed=0)
    assert drawn.scheme == "clusters"
    first = torch.tensor([sum(sizes[:c]) for c in range(len(sizes))])
    own = drawn.signs[:, first]
    assert torch.equal(drawn.signs, own[:, labelled.cluster_index])
    assert set((own > 0).sum(1).tolist()) == {len(sizes) // 2}
    if len(set(sizes)) < 3:
        assert set((drawn.signs > 0).sum(1).tolist()) == {int(labelled.labels.sum())}
    assert len(torch.unique(own, dim=0)) > 10


def test_levels_of_a_crossed_design_are_renamed() -> None:
    labelled = factorial(8, 6, 2)
    levels = crossed_levels(labelled)
    assert levels is not None
    assert levels.shape == (len(labelled), 2)
    drawn = labelings(labelled, 100, seed=0)
    assert drawn.scheme == "factorial"
    tables = drawn.signs.reshape(100, 8, 6, 2)
    assert torch.equal(tables[..., 0], tables[..., 1]), "copies of a cell go together"
    table = tables[..., 0]
    assert torch.equal(table.sum(1), torch.zeros(100, 6)), "no level says anything"
    assert torch.equal(table.sum(2), torch.zeros(100, 8))
    assert set(torch.linalg.matrix_rank(table).tolist()) == {1}, "still an exclusive-or"
    assert len(torch.unique(table.reshape(100, -1), dim=0)) > 50


def test_a_design_with_a_speaking_level_is_not_taken_for_crossed() -> None:
    rows = [
        LabelledPrompt(
            f"{k} {s}", int(k >= 2), f"{k}/{s}", f"{k}/{s}", attributes={"k": str(k), "s": str(s)}
        )
        for k in range(4)
        for s in range(4)
    ]
    assert crossed_levels(LabelledSet(tuple(rows), "main effect")) is None
    assert crossed_levels(pairs(6)) is None
    assert labelings(LabelledSet(tuple(rows), "main effect"), 9, seed=0).scheme == "clusters"


def test_an_incomplete_crossing_falls_back_to_clusters() -> None:
    labelled = factorial(4, 4, 1)
    assert crossed_levels(labelled.take(range(len(labelled) - 1))) is None
