"""Splits and permuted labels of a labelled set. Neither ever parts the rows of a cluster.

A split is drawn over clusters and only then expanded to rows, so no row can be on both sides.
Splits come as repeated grouped folds: every repetition tests every row once. Clusters are dealt
out by what they hold (label 0 only, label 1 only, both), so that folds are balanced where the
clusters allow it.

Permuted labels follow how the design gave the labels out:

- ``pairs``: clusters hold both labels; a permutation swaps the two classes of whole clusters.
- ``factorial``: clusters are the cells of crossed attributes whose single levels say nothing about
  the label (an exclusive-or, say); a permutation renames the levels of each attribute. Held-out
  cells of such a design have a null below 0.5, which free permutation of clusters would miss: it
  unbalances the levels.
- ``clusters``: otherwise; labels move among clusters of equal size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.seeds import generator

Scheme = Literal["pairs", "factorial", "clusters"]
N_SPLITS, N_FOLDS, N_INNER = 8, 4, 3


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers of one training and one test part, each sorted."""

    train: Int[Tensor, " n_train"]
    test: Int[Tensor, " n_test"]


def holders(labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"]) -> tuple[int, int]:
    """How many clusters hold a row of label 0, and how many of label 1."""
    return len(clusters[labels == 0].unique()), len(clusters[labels == 1].unique())


def grouped_splits(
    labels: Int[Tensor, " n"],
    clusters: Int[Tensor, " n"],
    *,
    n_splits: int = N_SPLITS,
    n_folds: int = N_FOLDS,
    seed: int,
    name: str = "splits",
) -> tuple[Split, ...]:
    """At least `n_splits` splits: whole repetitions of grouped folds, shuffled each time.

    Args:
        n_folds: taken down to the number of clusters that hold the rarer label.

    Raises:
        PromptError: a label that fewer than two clusters hold: nothing is left to train or test on.
    """
    fewest = min(holders(labels, clusters))
    if fewest < 2:
        raise PromptError(
            "splits of a labelled set",
            given=f"a label that {fewest} cluster holds",
            expected="at least two clusters with rows of each label",
            remedy="Add clusters; one cluster cannot be both trained and tested on.",
        )
    folds = max(2, min(n_folds, fewest))
    found: list[Split] = []
    repetition = 0
    while len(found) < n_splits:
        fold = fold_numbers(labels, clusters, folds, seed=seed, name=f"{name}/{repetition}")
        for i in range(folds):
            inside = fold == i
            found.append(Split((~inside).nonzero().flatten(), inside.nonzero().flatten()))
        repetition += 1
    return tuple(found)


def fold_numbers(
    labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"], n_folds: int, *, seed: int, name: str
) -> Int[Tensor, " n"]:
    """The fold of every row: one number a cluster, looked up by the rows.

    Within each kind of cluster the largest go first, each to the fold with the fewest rows of that
    kind so far (then of any kind); equals in random order.
    """
    names, index = torch.unique(clusters, return_inverse=True)
    k = len(names)
    size = torch.bincount(index, minlength=k)
    ones = torch.bincount(index, weights=labels.double(), minlength=k)
    kind = torch.where(ones == 0, 0, torch.where(ones == size, 1, 2))
    order = torch.randperm(k, generator=generator(seed, name, k))
    order = order[torch.argsort(size[order], descending=True, stable=True)]
    chosen = torch.zeros(k, dtype=torch.long)
    filled = [[0] * n_folds for _ in range(3)]
    total = [0] * n_folds
    kinds, sizes = kind.tolist(), size.tolist()
    for c in order.tolist():
        own = filled[kinds[c]]
        fold = min(range(n_folds), key=lambda f: (own[f], total[f], f))
        chosen[c] = fold
        own[fold] += sizes[c]
        total[fold] += sizes[c]
    return chosen[index]


# ---- permuted labels -----------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Labelings:
    """``signs`` (b, n), +1 for label 1: what the labels might have been under the design."""

    signs: Float[Tensor, "b n"]
    scheme: Scheme


def labelings(labelled: LabelledSet, n_draws: int, *, seed: int) -> Labelings:
    """`n_draws` permutations of the labels, by the scheme the set's design allows."""
    labels, clusters = labelled.labels, labelled.cluster_index
    levels = crossed_levels(labelled)
    if levels is not None:
        signs = _renamed(labels, levels, n_draws, seed=seed)
        if len(torch.unique(signs, dim=0)) >= min(n_draws, 50) / 2:
            return Labelings(signs, "factorial")
    if mixed_clusters(labels, clusters):
        return Labelings(swapped(labels, clusters, n_draws, seed=seed), "pairs")
    return Labelings(_shuffled(labels, clusters, n_draws, seed=seed), "clusters")


def mixed_clusters(labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"]) -> bool:
    """Whether any cluster holds both labels."""
    k = int(clusters.max()) + 1
    ones = torch.bincount(clusters, weights=labels.double(), minlength=k)
    size = torch.bincount(clusters, minlength=k)
    return bool(((ones > 0) & (ones < size)).any())


def swapped(
    labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"], n_draws: int, *, seed: int
) -> Float[Tensor, "b n"]:
    """The two classes change places in a random half of the clusters."""
    k = int(clusters.max()) + 1
    drawn = torch.randint(0, 2, (n_draws, k), generator=generator(seed, "label swaps", k))
    return (drawn.double() * 2 - 1)[:, clusters] * (labels.double() * 2 - 1)


def _shuffled(
    labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"], n_draws: int, *, seed: int
) -> Float[Tensor, "b n"]:
    """Labels of whole clusters change places among clusters of equal size.

    Where sizes are so uneven that this leaves most clusters alone, among all of them.
    """
    k = int(clusters.max()) + 1
    size = torch.bincount(clusters, minlength=k)
    own = torch.zeros(k, dtype=torch.long).scatter_(0, clusters, labels)
    groups = [(size == s).nonzero().flatten() for s in size.unique()]
    if sum(len(g) for g in groups if len(own[g].unique()) > 1) < k / 2:
        groups = [torch.arange(k)]
    draw = generator(seed, "label shuffles", k)
    drawn = own.repeat(n_draws, 1)
    for group in groups:
        order = torch.rand(n_draws, len(group), generator=draw).argsort(dim=1)
        drawn[:, group] = own[group][order]
    return (drawn.double() * 2 - 1)[:, clusters]


def crossed_levels(labelled: LabelledSet) -> Int[Tensor, "n factors"] | None:
    """Level numbers of the attributes whose crossing the clusters are, or None.

    Two or more attributes, constant within clusters, every combination exactly one cluster of one
    label, and each label as frequent at every level of every attribute.
    """
    labels, clusters = labelled.labels, labelled.cluster_index
    if mixed_clusters(labels, clusters):
        return None
    columns = [
        column
        for name in sorted(set.intersection(*(set(row.attributes) for row in labelled)))
        if (column := _level_numbers([row.attributes[name] for row in labelled], clusters))
        is not None
    ]
    balanced = [c for c in columns if _even(c, labels, clusters)]
    for size in range(2, len(balanced) + 1):
        for chosen in combinations(balanced, size):
            levels = torch.stack(chosen, dim=1)
            full = prod(int(c.max()) + 1 for c in chosen)
            cells = len(torch.unique(levels, dim=0))
            if cells == full == len(clusters.unique()):
                return levels
    return None


def _level_numbers(values: Sequence[str], clusters: Int[Tensor, " n"]) -> Int[Tensor, " n"] | None:
    """Levels as numbers; None where one cluster has two levels, or all have one."""
    names: Mapping[str, int] = {v: i for i, v in enumerate(sorted(set(values)))}
    column = torch.tensor([names[v] for v in values])
    seen = torch.unique(torch.stack([clusters, column], 1), dim=0)
    return None if len(names) < 2 or len(seen) != len(clusters.unique()) else column


def _even(
    column: Int[Tensor, " n"], labels: Int[Tensor, " n"], clusters: Int[Tensor, " n"]
) -> bool:
    """Whether every level of an attribute has the same share of clusters of label 1."""
    first = torch.unique(torch.stack([clusters, column, labels], 1), dim=0)
    levels = int(column.max()) + 1
    ones = torch.bincount(first[:, 1], weights=first[:, 2].double(), minlength=levels)
    share = ones / torch.bincount(first[:, 1], minlength=levels)
    return bool((share - share[0]).abs().max() < 1e-9)


def _renamed(
    labels: Int[Tensor, " n"], levels: Int[Tensor, "n factors"], n_draws: int, *, seed: int
) -> Float[Tensor, "b n"]:
    """The label a row would have had were the levels of each attribute renamed at random."""
    draw = generator(seed, "level names", levels.shape[1])
    sizes = [int(levels[:, f].max()) + 1 for f in range(levels.shape[1])]
    table = torch.zeros(sizes, dtype=torch.long)
    table[tuple(levels.T)] = labels
    signs = torch.empty(n_draws, len(labels), dtype=torch.float64)
    for b in range(n_draws):
        renamed = tuple(
            torch.randperm(size, generator=draw)[levels[:, f]] for f, size in enumerate(sizes)
        )
        signs[b] = table[renamed].double() * 2 - 1
    return signs
