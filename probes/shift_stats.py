"""Sizes of one contrast's mean shift at all points, with nulls and bootstrap draws.

One pass over the activations of a point leaves the Gram matrix of its 2n rows; every size of
the shift, under every denominator, and all draws are quadratic forms of it. Memory does not grow
with the number of points times the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
_MOST_PRODUCTS = 1 << 25


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
        flat = value.flatten(0, 1)
        if dropped is not None:
            flat = flat.index_fill(-1, dropped[i], 0.0)
        mean = flat.mean(0, dtype=torch.float64)
        centred = flat - mean  # float64, and free of coordinates that are large in every row
        gram_ = centred @ centred.T
        square = gram_.diagonal() + 2 * centred @ mean + mean.square().sum()
        sizes.append(square.clamp(min=0).sqrt().reshape(-1, 2).mean(-1))
        energy = torch.linalg.vector_norm(flat, dim=0).double().square()
        top = energy.topk(min(N_ROGUE, len(energy))).values.sum()
        rogues.append(top / energy.sum().clamp(min=1e-300))
        n = len(value)
        grams.append(gram_.reshape(n, 2, n, 2).permute(1, 0, 3, 2).reshape(2 * n, 2 * n))
    return Geometry(
        torch.stack(grams), torch.stack(sizes), torch.stack(rogues), values[0].shape[-1]
    )


# ---- draws ---------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Draws:
    """Sign flips and bootstrap weights of one set of clusters, ready for quadratic forms.

    They depend on the seed and the clusters only: contrasts on the same items, and stages, share
    them, so that their draws are joint.

    Attributes:
        clusters: (n,) cluster number of each pair.
        signs, weights: (F, n) and (B, n).
        sign_products, weight_products: products of every two entries (j ≥ i) of each row, kept
            where they fit: ``vᵀ G v`` for all points is then one matrix product.
    """

    clusters: Int[Tensor, " n"]
    signs: Float[Tensor, "f n"]
    weights: Float[Tensor, "b n"]
    sign_products: Float[Tensor, "f m"] | None
    weight_products: Float[Tensor, "b m"] | None

    @property
    def n_clusters(self) -> int:
        return int(self.clusters.max()) + 1

    def flipped(self, gram_: Float[Tensor, "points n n"]) -> Float[Tensor, "f points"]:
        """``‖mean_i s_i D_i‖``."""
        if self.sign_products is None:
            return sign_flip_norms(gram_, self.signs)
        return _forms(self.sign_products, gram_).sqrt() / gram_.shape[-1]

    def resampled_sq(self, gram_: Float[Tensor, "points n n"]) -> Float[Tensor, "b points"]:
        """``‖Δμ*‖²`` less the surplus of resampling, not below zero."""
        if self.weight_products is None:
            return recentred_norm_sq(gram_, self.weights, self.clusters).clamp(min=0)
        surplus = sampling_variance(gram_, self.clusters) * (1 - 1 / self.n_clusters)
        squared = _forms(self.weight_products, gram_) / self.weights.sum(1, keepdim=True) ** 2
        return (squared - surplus).clamp(min=0)


def draw(clusters: Sequence[str], *, n_flips: int, n_bootstrap: int, seed: int) -> Draws:
    """The draws depend on which pairs share a cluster, not on the clusters' names."""
    index = cluster_index(clusters)
    signs = cluster_signs(index, n_flips, seed=seed)
    weights = cluster_weights(list(clusters), n_bootstrap, seed=seed)
    return Draws(index, signs, weights, _products(signs), _products(weights))


def _products(vectors: Float[Tensor, "b n"]) -> Float[Tensor, "b m"] | None:
    rows, columns = torch.triu_indices(vectors.shape[1], vectors.shape[1])
    if vectors.shape[0] * len(rows) > _MOST_PRODUCTS:
        return None
    return vectors[:, rows] * vectors[:, columns]


def _forms(
    products: Float[Tensor, "b m"], gram_: Float[Tensor, "points n n"]
) -> Float[Tensor, "b points"]:
    n = gram_.shape[-1]
    rows, columns = torch.triu_indices(n, n)
    twice = torch.where(rows == columns, 1.0, 2.0).double()
    return (products @ (gram_[:, rows, columns] * twice).T).clamp(min=0)


# ---- one contrast at one stage -------------------------------------------------------------
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


def measure(found: Geometry, draws: Draws, *, denominators: Sequence[str] = DENOMINATORS) -> Shift:
    """Everything about one contrast's shift from its inner products."""
    return measure_stages([found], draws, denominators=denominators)[0]


def measure_stages(
    parts: Sequence[Geometry], draws: Draws, *, denominators: Sequence[str] = DENOMINATORS
) -> list[Shift]:
    """`measure` at several stages; their quadratic forms are taken together, which is faster.

    Raises:
        PromptError: fewer than two clusters.
    """
    rows, size, rogue = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "size", "rogue")
    )
    found = Geometry(rows, size, rogue, parts[0].width)
    gram_, mean_norm = found.pairs(), size.mean(1)
    dead = norm_sq(gram_).sqrt() <= DEAD_SHIFT * mean_norm
    gram_ = torch.where(dead[:, None, None], 0.0, gram_)
    raw = norm_sq(gram_).sqrt()
    noise = sampling_variance(gram_, draws.clusters)
    p, p_adjusted = _p_by_stage(raw, draws.flipped(gram_), len(parts))
    length = draws.resampled_sq(gram_).sqrt()
    value, drawn = {}, {}
    if "rel_norm" in denominators:
        value["rel_norm"] = raw / mean_norm.clamp(min=1e-300)
        resampled = draws.weights @ size.T / draws.weights.sum(1, keepdim=True)
        drawn["rel_norm"] = length / resampled.clamp(min=1e-300)
    if "rel_spread" in denominators:
        spread = found.spread_sq().sqrt()
        spread = torch.where(dead, 1.0, spread.clamp(min=1e-300))
        value["rel_spread"], drawn["rel_spread"] = raw / spread, length / spread
    if "mahal" in denominators:
        white = torch.where(dead[:, None, None], 0.0, found.whitened_pairs())
        value["mahal"] = norm_sq(white).sqrt()
        drawn["mahal"] = draws.resampled_sq(white).sqrt()
    debiased = signed_sqrt(raw.square() - noise)
    snr = raw / torch.where(noise > 0, noise, torch.inf).sqrt()
    vectors = (raw, debiased, snr, mean_norm, rogue, dead, p, p_adjusted)
    names = ("raw", "raw_debiased", "snr", "mean_norm", "rogue", "dead", "p", "p_adjusted")
    points, shifts = len(parts[0].size), []
    for stage in range(len(parts)):
        own = slice(stage * points, (stage + 1) * points)
        shifts.append(
            Shift(
                n=found.n_pairs,
                n_clusters=draws.n_clusters,
                value={k: v[own] for k, v in value.items()},
                draws={k: v[:, own] for k, v in drawn.items()},
                **{k: v[own] for k, v in zip(names, vectors, strict=True)},
            )
        )
    return shifts


def _p_by_stage(
    observed: Float[Tensor, " points"], null: Float[Tensor, "b points"], n_stages: int
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    """The maximum is over the points of one stage."""
    pairs = zip(observed.chunk(n_stages), null.chunk(n_stages, dim=1), strict=True)
    found = [studentised_max_p(own, draws) for own, draws in pairs]
    return torch.cat([p for p, _ in found]), torch.cat([p for _, p in found])


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


def measure_changes(
    stages: Sequence[Sequence[Float[Tensor, "n 2 d"]]],
    shifts: Sequence[Shift],
    draws: Draws,
    *,
    dropped: Sequence[Int[Tensor, " k"]] | None = None,
) -> list[Change]:
    """Between every two neighbouring stages; the null flips the signs of the per-pair changes.

    Args:
        stages: for every stage its activations at every point.
        shifts: what `measure_stages` found there.
    """
    grams, vectors = [], []
    for before, after in pairwise(stages):
        for i, (early, late) in enumerate(zip(before, after, strict=True)):
            wide = late.double() - early
            step = wide[:, 0] - wide[:, 1]
            if dropped is not None:
                step = step.index_fill(-1, dropped[i], 0.0)
            grams.append(step @ step.T)
            vectors.append(step.mean(0))
    gram_, vector = torch.stack(grams), torch.stack(vectors)
    mean_norm, raw, dead = (
        torch.cat([getattr(shift, name) for shift in shifts[:-1]])
        for name in ("mean_norm", "raw", "dead")
    )
    still = norm_sq(gram_).sqrt() <= DEAD_SHIFT * mean_norm
    gram_ = torch.where(still[:, None, None], 0.0, gram_)
    norm = norm_sq(gram_).sqrt()
    p, p_adjusted = _p_by_stage(norm, draws.flipped(gram_), len(stages) - 1)
    low, high = interval(draws.resampled_sq(gram_).sqrt())
    relative = torch.where(dead, torch.nan, norm / raw.clamp(min=1e-300))
    columns = (vector, norm, low, high, relative, p, p_adjusted)
    steps = zip(*(column.chunk(len(stages) - 1) for column in columns), strict=True)
    return [Change(*step) for step in steps]


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
