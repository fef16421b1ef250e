"""The detectors that are compared: one interface, one tuning budget.

A detector scores test rows after training on labelled rows. Its scorer takes many labellings of
the same training rows at once, so that a permutation null costs little more than a fit, and all
its configurations (at most `BUDGET`) at once. Every detector standardises and selects features
inside the training rows it is given; nothing else is seen.

Linear ones are here; the non-linear are in `probes.detectors_nonlinear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.shifts import SHRINKAGE
from probes.logistic import C_GRID
from probes.solvers import Rotated, Standardised, logistic_each, logistic_shared, working
from probes.splits import N_INNER, fold_numbers, holders

Family = Literal[
    "text", "norm", "linear", "sae", "null sae", "sae parts", "non-linear", "handed in"
]
Configuration: TypeAlias = tuple[float, ...]
Scorer: TypeAlias = Callable[
    [
        Float[Tensor, "n d"],
        Float[Tensor, "b n"],
        Float[Tensor, "m d"],
        Sequence[Configuration],
        int,
    ],
    Float[Tensor, "c b m"],
]
BUDGET = len(C_GRID)
"""Configurations a detector may choose among."""
PENALTIES: tuple[Configuration, ...] = tuple((c,) for c in C_GRID)
FIXED_K = 10
WIDTHS: tuple[Configuration, ...] = (
    (1, 1.0),
    (4, 1.0),
    (16, 0.1),
    (16, 10.0),
    (64, 0.01),
    (64, 1.0),
    (128, 0.01),
    (128, 1.0),
)
"""(k, C): the benchmark's numbers of features (arXiv 2502.16681); more features, more penalties."""
TEN: tuple[Configuration, ...] = tuple((FIXED_K, c) for c in C_GRID)


@dataclass(frozen=True)
class Detector:
    """One row of the comparison.

    Attributes:
        part: which part of the readings it reads (`StageReadings.parts`; also ``text`` and
            ``error``, the activations less their reconstruction).
        configurations: it chooses one by cross-validation inside its training rows.
        n_permutations: at most this many draws of its null: costly ones take fewer.
        retuned: the configuration is chosen anew under every permutation, else (where that costs
            too much) the null keeps the one tuned on the labels as given.
    """

    name: str
    family: Family
    part: str
    scorer: Scorer
    configurations: tuple[Configuration, ...] = ((),)
    n_permutations: int = 399
    retuned: bool = False

    def __post_init__(self) -> None:
        assert 1 <= len(self.configurations) <= BUDGET, self.configurations

    def fit(
        self,
        rows: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        clusters: Int[Tensor, " n"],
        seed: int,
    ) -> Callable[[Float[Tensor, "m d"]], Float[Tensor, " m"]]:
        """Tune and train; the result scores test rows, high for label 1."""
        chosen = self.tune(rows, labels, clusters, seed)
        signs = labels.to(rows.dtype)[None] * 2 - 1
        return lambda test: self.scorer(rows, signs, test, [chosen], seed)[0, 0]

    def tune(
        self,
        rows: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        clusters: Int[Tensor, " n"],
        seed: int,
    ) -> Configuration:
        """The configuration of highest mean AUROC over inner folds of whole clusters.

        Among equals the first, which is the most regularised. Without two clusters of each label
        the middle one.
        """
        if len(self.configurations) == 1:
            return self.configurations[0]
        fewest = min(holders(labels, clusters))
        if fewest < 2:
            return self.configurations[len(self.configurations) // 2]
        n_folds = min(N_INNER, fewest)
        fold = fold_numbers(labels, clusters, n_folds, seed=seed, name="inner folds")
        signs = labels.to(rows.dtype)[None] * 2 - 1
        return self.configurations[int(self.choices(rows, signs, fold, seed)[0])]

    def choices(
        self,
        rows: Float[Tensor, "n d"],
        signs: Float[Tensor, "b n"],
        fold: Int[Tensor, " n"],
        seed: int,
    ) -> Int[Tensor, " b"]:
        """Number of the configuration of highest mean AUROC over the folds, for every labelling."""
        total = torch.zeros(len(self.configurations), len(signs), dtype=torch.float64)
        for i in range(int(fold.max()) + 1):
            train, test = fold != i, fold == i
            scores = self.scorer(
                rows[train], signs[:, train], rows[test], self.configurations, seed
            )
            held = (signs[:, test] > 0).long().expand(len(self.configurations), -1, -1)
            total += aurocs(scores, held).nan_to_num(0.5)
        return total.round(decimals=9).argmax(0)

    def permuted(
        self,
        train: Float[Tensor, "n d"],
        signs: Float[Tensor, "b n"],
        test: Float[Tensor, "m d"],
        clusters: Int[Tensor, " n"],
        chosen: Configuration,
        seed: int,
    ) -> Float[Tensor, "b m"]:
        """Scores under permuted labels of the training rows, with `chosen` unless `retuned`."""
        if not self.retuned:
            return self.scorer(train, signs, test, [chosen], seed)[0]
        # folds by cluster alone: a permutation has its own balance of labels
        even = torch.zeros(len(train), dtype=torch.long)
        n_folds = min(N_INNER, len(clusters.unique()))
        fold = fold_numbers(even, clusters, n_folds, seed=seed, name="inner folds")
        every = self.scorer(train, signs, test, self.configurations, seed)
        return every[self.choices(train, signs, fold, seed), torch.arange(len(signs))]


def aurocs(scores: Float[Tensor, "*b m"], labels: Int[Tensor, "*b m"]) -> Float[Tensor, "*b"]:
    """Mann-Whitney AUROC of each row by mid-ranks; NaN where a row holds one label only."""
    values = scores.contiguous()
    ordered = values.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, values)
    at_most = torch.searchsorted(ordered, values, right=True)
    rank = (below + at_most + 1).double() / 2
    positive = (labels > 0).double()
    n_one = positive.sum(-1)
    n_zero = labels.shape[-1] - n_one
    won = (rank * positive).sum(-1) - n_one * (n_one + 1) / 2
    return won / (n_one * n_zero)


# ---- closed forms --------------------------------------------------------------------------
def class_weights(signs: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Rows that take the mean of one class less the mean of the other."""
    ones = (signs > 0).to(signs.dtype)
    zeros = 1 - ones
    return ones / ones.sum(1, keepdim=True).clamp(min=1) - zeros / zeros.sum(1, keepdim=True).clamp(
        min=1
    )


def mean_difference(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``dm``: projection on Δμ, raw units."""
    del configurations, seed
    shift = class_weights(signs.to(train.dtype)) @ train
    return (shift @ (test - train.mean(0)).T)[None]


def shrunk_discriminant(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``lda``: ``(S + κI)⁻¹ Δμ`` with the total covariance S and κ = γ/(1-γ) · tr S / d.

    The total covariance gives the same direction as the within-class one (Sherman and Morrison),
    and one factorisation then serves every labelling.
    """
    del configurations, seed
    centre = train.mean(0)
    rows = train - centre
    covariance = rows.T @ rows / len(rows)
    size = covariance.diagonal().mean().clamp(min=1e-30)
    system = covariance + SHRINKAGE / (1 - SHRINKAGE) * size * torch.eye(
        train.shape[1], dtype=train.dtype
    )
    shift = class_weights(signs.to(train.dtype)) @ train
    return (shift @ torch.linalg.solve(system, (test - centre).T))[None]


# ---- logistic regressions ------------------------------------------------------------------
def logistic(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``lr``: standardised rows; configurations are (C,)."""
    del seed
    scale = Standardised.of(train)
    rotated = Rotated.of(scale(train))
    features = working(rotated.features, len(signs) * len(configurations))
    penalties = features.new_tensor([c for (c,) in configurations])
    weight, bias = logistic_shared(features, rotated.energy, signs, penalties)
    return weight @ (scale(test) @ rotated.axes).T.to(weight) + bias[..., None]


def principal_logistic(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``lr`` on the k largest principal components of the centred rows; (k, C)."""
    del seed
    centre = train.mean(0)
    rotated = Rotated.of(train - centre)
    spread = (rotated.energy / len(train)).sqrt()
    own = working(rotated.features / spread, len(signs) * len(configurations))
    other = ((test - centre) @ rotated.axes / spread).to(own)
    found = []
    for k, c in configurations:
        kept = min(int(k), own.shape[1])
        energy = own.new_full((kept,), float(len(train)))
        weight, bias = logistic_shared(own[:, :kept], energy, signs, own.new_tensor([c]))
        found.append(weight[0] @ other[:, :kept].T + bias[0][:, None])
    return torch.stack(found)


def selected_logistic(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``lr`` on the k coordinates of largest standardised mean difference; (k, C).

    Every labelling selects its own coordinates, on the training rows alone.
    """
    del seed
    scale = Standardised.of(train)
    own = working(scale(train), len(signs) * len(configurations))
    other = scale(test).to(own)
    effect = (class_weights(signs.to(own.dtype)) @ own).abs()
    order = effect.argsort(dim=1, descending=True, stable=True)
    widths = list(dict.fromkeys(int(k) for k, _ in configurations))
    found: dict[Configuration, Tensor] = {}
    for width in widths:  # all penalties of one width in one call
        kept = order[:, : min(width, own.shape[1])]
        penalties = [c for k, c in configurations if int(k) == width]
        features, held = (rows.T[kept].mT for rows in (own, other))  # (b, n, k)
        weight, bias = logistic_each(
            features.repeat(len(penalties), 1, 1),
            signs.repeat(len(penalties), 1),
            own.new_tensor(penalties).repeat_interleave(len(signs)),
        )
        weight, bias = (x.reshape(len(penalties), len(signs), -1) for x in (weight, bias))
        scores = torch.einsum("bmk,cbk->cbm", held, weight) + bias
        found |= {(width, c): row for c, row in zip(penalties, scores, strict=True)}
    return torch.stack([found[int(k), c] for k, c in configurations])


def selected(rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """The k columns of largest standardised mean difference, largest first."""
    shown = Standardised.of(rows)(rows)
    effect = (class_weights(labels.to(rows.dtype)[None] * 2 - 1) @ shown)[0].abs()
    return effect.argsort(descending=True, stable=True)[:k]
