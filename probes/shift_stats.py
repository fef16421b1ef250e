"""Sizes of one contrast's mean shift at all points, with nulls and bootstrap draws.

One pass over the activations of a point leaves the Gram matrix of its 2n rows; every size of
the shift, under every denominator, and all draws are quadratic forms of it. Memory does not grow
with the number of points times the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.shifts import (
    DEAD_SHIFT,
    SHRINKAGE,
    cluster_index,
    cluster_signs,
    norm_sq,
    recentred_norm_sq,
    sampling_variance,
    sign_flip_norms,
    signed_sqrt,
    studentised_max_p,
)
from mi_weightspace.core.stats import cluster_weights

DENOMINATORS = ("rel_norm", "rel_spread", "mahal")
N_ROGUE = 3


@dataclass(frozen=True, eq=False)
class Geometry:
    """Inner products of one contrast's rows at every point, float64.

    Attributes:
        rows: (L, 2n, 2n) Gram matrix of the rows, centred over all rows; positives first.
        size: (L, n) mean activation norm of the two sides of each pair.
        rogue: (L,) share of the mean squared norm held by the three largest coordinates.
        width: d.
    """

    rows: Float[Tensor, "points rows rows"]
    size: Float[Tensor, "points n"]
    rogue: Float[Tensor, " points"]
    width: int

    @property
    def n_pairs(self) -> int:
        return int(self.size.shape[1])

    def pairs(self) -> Float[Tensor, "points n n"]:
        """Gram matrix of the paired differences."""
        side = self._against_differences(self.rows)
        n = self.n_pairs
        return side[:, :n] - side[:, n:]

    def _against_differences(
        self, rows: Float[Tensor, "points rows rows"]
    ) -> Float[Tensor, "points rows n"]:
        return rows[..., : self.n_pairs] - rows[..., self.n_pairs :]

    def within(self) -> Float[Tensor, "points rows rows"]:
        """Gram matrix of the rows centred within their class."""
        return _centre_classes(_centre_classes(self.rows).mT).mT

    def spread_sq(self) -> Float[Tensor, " points"]:
        """Mean of the traces of the two classes' covariances."""
        within = self.within().diagonal(dim1=-2, dim2=-1).sum(-1)
        return within / (2 * (self.n_pairs - 1))

    def whitened_pairs(self) -> Float[Tensor, "points n n"]:
        """``D S_λ⁻¹ Dᵀ`` as `core.shifts.whitened_gram`, from inner products alone."""
        freedom = 2 * self.n_pairs - 2
        within = self.within()
        ridge = SHRINKAGE * within.diagonal(dim1=-2, dim2=-1).sum(-1) / (freedom * self.width)
        ridge = ridge.clamp(min=1e-300)[:, None, None]
        eye = torch.eye(within.shape[-1], dtype=torch.float64)
        system = within + (freedom * ridge / (1 - SHRINKAGE)) * eye
        cross = self._against_differences(_centre_classes(self.rows))
        return (self.pairs() - cross.mT @ torch.linalg.solve(system, cross)) / ridge


def _centre_classes(
    rows: Float[Tensor, "points rows columns"],
) -> Float[Tensor, "points rows columns"]:
    """Take each class's mean row off its rows (axis 1, positives first)."""
    n = rows.shape[1] // 2
    first, second = rows[:, :n], rows[:, n:]
    return torch.cat(
        [first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True)], dim=1
    )


def geometry(
    values: Sequence[Float[Tensor, "n 2 d"]],
    dropped: Sequence[Int[Tensor, " k"]] | None = None,
) -> Geometry:
    """One pass over the points; `dropped` coordinates count as zero."""
    grams, sizes, rogues = [], [], []
    for i, value in enumerate(values):
        wide = value.double()
        if dropped is not None:
            wide = wide.index_fill(-1, dropped[i], 0.0)
        sizes.append(wide.norm(dim=-1).mean(-1))
        rows = torch.cat([wide[:, 0], wide[:, 1]])
        energy = rows.square().mean(0)
        top = energy.topk(min(N_ROGUE, len(energy))).values.sum()
        rogues.append(top / energy.sum().clamp(min=1e-300))
        centred = rows - rows.mean(0)
        grams.append(centred @ centred.T)
    return Geometry(
        torch.stack(grams), torch.stack(sizes), torch.stack(rogues), values[0].shape[-1]
    )


@dataclass(frozen=True, eq=False)
class Shift:
    """One contrast at one stage, all points. Lengths are raw residual units.

    Attributes:
        raw, raw_debiased, snr, mean_norm, rogue: (L,).
        dead: points where the two sides carry the same vector (`DEAD_SHIFT`).
        value: denominator -> (L,) relative size of the shift.
        draws: denominator -> (B, L) bootstrap draws of it, centred on the observed square.
        p, p_adjusted: (L,) sign-flip p, and by the maximum over points.
    """

    n: int
    n_clusters: int
    raw: Float[Tensor, " points"]
    raw_debiased: Float[Tensor, " points"]
    snr: Float[Tensor, " points"]
    mean_norm: Float[Tensor, " points"]
    rogue: Float[Tensor, " points"]
    dead: Bool[Tensor, " points"]
    value: Mapping[str, Float[Tensor, " points"]]
    draws: Mapping[str, Float[Tensor, "b points"]]
    p: Float[Tensor, " points"]
    p_adjusted: Float[Tensor, " points"]


def measure(
    found: Geometry,
    clusters: Sequence[str],
    *,
    n_flips: int,
    n_bootstrap: int,
    denominators: Sequence[str] = DENOMINATORS,
    seed: int,
) -> Shift:
    """Everything about one contrast's shift from its inner products.

    Signs and weights depend on the seed and the clusters only: contrasts on the same items, and
    stages, share them, so that their draws are joint.

    Raises:
        PromptError: fewer than two clusters.
    """
    index = cluster_index(clusters)
    gram_, mean_norm = found.pairs(), found.size.mean(1)
    dead = norm_sq(gram_).sqrt() <= DEAD_SHIFT * mean_norm
    gram_ = torch.where(dead[:, None, None], 0.0, gram_)
    raw = norm_sq(gram_).sqrt()
    noise = sampling_variance(gram_, index)
    null = sign_flip_norms(gram_, cluster_signs(index, n_flips, seed=seed))
    p, p_adjusted = studentised_max_p(raw, null)
    weights = cluster_weights(list(clusters), n_bootstrap, seed=seed)
    length = recentred_norm_sq(gram_, weights, index).clamp(min=0).sqrt()
    value, draws = {}, {}
    if "rel_norm" in denominators:
        value["rel_norm"] = raw / mean_norm.clamp(min=1e-300)
        resampled = weights @ found.size.T / weights.sum(1, keepdim=True)
        draws["rel_norm"] = length / resampled.clamp(min=1e-300)
    if "rel_spread" in denominators:
        spread = found.spread_sq().sqrt()
        spread = torch.where(dead, 1.0, spread.clamp(min=1e-300))
        value["rel_spread"], draws["rel_spread"] = raw / spread, length / spread
    if "mahal" in denominators:
        white = torch.where(dead[:, None, None], 0.0, found.whitened_pairs())
        value["mahal"] = norm_sq(white).sqrt()
        draws["mahal"] = recentred_norm_sq(white, weights, index).clamp(min=0).sqrt()
    return Shift(
        n=len(clusters),
        n_clusters=int(index.max()) + 1,
        raw=raw,
        raw_debiased=signed_sqrt(raw.square() - noise),
        snr=raw / torch.where(noise > 0, noise, torch.inf).sqrt(),
        mean_norm=mean_norm,
        rogue=found.rogue,
        dead=dead,
        value=value,
        draws=draws,
        p=p,
        p_adjusted=p_adjusted,
    )


@dataclass(frozen=True, eq=False)
class Change:
    """Difference in differences of one contrast between two stages, all points.

    Attributes:
        vector: (L, d) ``mean_i (D_i^after − D_i^before)``.
        norm, low, high: (L,) its length and 95 % interval; `relative` over ``‖Δμ_before‖``, NaN
            where there was no shift before.
        p, p_adjusted: sign-flip p, and by the maximum over points.
    """

    vector: Float[Tensor, "points d"]
    norm: Float[Tensor, " points"]
    low: Float[Tensor, " points"]
    high: Float[Tensor, " points"]
    relative: Float[Tensor, " points"]
    p: Float[Tensor, " points"]
    p_adjusted: Float[Tensor, " points"]


def measure_change(
    before: Sequence[Float[Tensor, "n 2 d"]],
    after: Sequence[Float[Tensor, "n 2 d"]],
    clusters: Sequence[str],
    *,
    n_flips: int,
    n_bootstrap: int,
    seed: int,
    dropped: Sequence[Int[Tensor, " k"]] | None = None,
) -> Change:
    """The null flips the signs of the per-pair differences of differences."""
    grams, vectors, shifts, scales = [], [], [], []
    for i, (early, late) in enumerate(zip(before, after, strict=True)):
        first = early[:, 0].double() - early[:, 1].double()
        step = late[:, 0].double() - late[:, 1].double() - first
        if dropped is not None:
            first, step = (x.index_fill(-1, dropped[i], 0.0) for x in (first, step))
        grams.append(step @ step.T)
        vectors.append(step.mean(0))
        shifts.append(first.mean(0).norm())
        scales.append(early.double().norm(dim=-1).mean())
    index, scale = cluster_index(clusters), torch.stack(scales)
    gram_ = torch.stack(grams)
    still = norm_sq(gram_).sqrt() <= DEAD_SHIFT * scale
    gram_ = torch.where(still[:, None, None], 0.0, gram_)
    norm = norm_sq(gram_).sqrt()
    null = sign_flip_norms(gram_, cluster_signs(index, n_flips, seed=seed))
    p, p_adjusted = studentised_max_p(norm, null)
    weights = cluster_weights(list(clusters), n_bootstrap, seed=seed)
    draws = recentred_norm_sq(gram_, weights, index).clamp(min=0).sqrt()
    low, high = interval(draws)
    shift = torch.stack(shifts)
    relative = torch.where(shift <= DEAD_SHIFT * scale, torch.nan, norm / shift.clamp(min=1e-300))
    return Change(torch.stack(vectors), norm, low, high, relative, p, p_adjusted)


def interval(draws: Float[Tensor, "b points"]) -> tuple[Tensor, Tensor]:
    """95 % percentile interval over axis 0 (numpy: torch's quantile has a size limit)."""
    import numpy as np

    low, high = np.quantile(draws.numpy(), [0.025, 0.975], axis=0)
    return torch.as_tensor(low), torch.as_tensor(high)


def rogue_coordinates(
    values: Sequence[Float[Tensor, "n 2 d"]], k: int
) -> list[Int[Tensor, " k"]] | None:
    """The k coordinates of largest mean square at each point, or None for k = 0."""
    if k == 0:
        return None
    return [v.double().square().mean((0, 1)).topk(k).indices for v in values]
