"""Statistics of a mean shift between the two sides of paired prompts, mostly in Gram space.

``D`` (…, n, d) holds the paired differences (positive minus negative) of n pairs, with any batch
axes in front (stream points, contrasts). Everything about ``‖Δμ‖`` with ``Δμ = mean_i D_i`` is a
quadratic form of ``G = D Dᵀ`` (n × n): for signs s the flipped norm is ``√(sᵀ G s) / n``, for
bootstrap weights w it is ``√(wᵀ G w) / Σw``. So ten thousand flips of forty layers cost less than
one forward pass (`methods`: paired sign flips are the exact null; Westfall and Young 1993 for the
maximum over layers).

Float32 activations are taken to float64 before any product: a shift of one unit inside activations
of norm a thousand is otherwise lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.stats import sign_flips

SHRINKAGE = 0.1
"""Weight of the isotropic part of the shrunk covariance ``(1-γ) S + γ mean(diag S) I``."""
DEAD_SHIFT = 1e-5
"""A shift below this share of the activations' norm is no shift (identical tokens, float noise)."""
_TIE = 1e-10
_CHUNK = 1 << 24


# ---- shifts and their Gram matrix ----------------------------------------------------------
def differences(values: Float[Tensor, "*batch n 2 d"]) -> Float[Tensor, "*batch n d"]:
    """Positive minus negative, float64."""
    return values[..., 0, :].double() - values[..., 1, :].double()


def mean_shift(differences: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch d"]:
    """Δμ, float64."""
    return differences.double().mean(dim=-2)


def gram(differences: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n n"]:
    """``D Dᵀ`` in float64."""
    wide = differences.double()
    return wide @ wide.mT


def norm_sq(gram_: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """‖Δμ‖² from the Gram matrix."""
    return gram_.sum(dim=(-2, -1)).clamp(min=0) / gram_.shape[-1] ** 2


def cluster_index(clusters: Sequence[str]) -> Int[Tensor, " n"]:
    """Pair -> number of its cluster, numbered by sorted name."""
    return torch.from_numpy(np.unique(np.asarray(list(clusters)), return_inverse=True)[1])


def sampling_variance(
    gram_: Float[Tensor, "*batch n n"], clusters: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "*batch"]:
    """Estimate of ``E‖Δμ − μ‖²``; for independent pairs it is ``tr(S_D)/n`` with S_D unbiased.

    With `clusters` (see `cluster_index`) the residuals are first added up within each cluster,
    with the factor k/(k-1).

    Raises:
        PromptError: fewer than two clusters.
    """
    n = gram_.shape[-1]
    index = torch.arange(n) if clusters is None else clusters
    k = int(index.max()) + 1
    if k < 2:
        raise PromptError(
            "paired differences",
            given=f"{k} cluster of {n} pairs",
            expected="at least two clusters (item × wording)",
            remedy="One cluster has no sampling variance; add items.",
        )
    row = gram_.mean(dim=-1)
    centred = gram_ - row[..., :, None] - row[..., None, :] + row.mean(dim=-1)[..., None, None]
    member = torch.zeros(k, n, dtype=gram_.dtype)
    member[index, torch.arange(n)] = 1.0
    within = torch.einsum("ki,...ij,kj->...", member, centred, member)
    return within.clamp(min=0) / n**2 * k / (k - 1)


def debiased_norm_sq(
    differences: Float[Tensor, "*batch n d"], clusters: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "*batch"]:
    """``‖Δμ‖² − tr(S_D)/n``: unbiased for the population's ‖μ‖², and so at times negative."""
    g = gram(differences)
    return norm_sq(g) - sampling_variance(g, clusters)


def signed_sqrt(square: Tensor) -> Tensor:
    """``sign(x) √|x|``, so that a de-biased square keeps its sign as a length."""
    return square.sign() * square.abs().sqrt()


# ---- null and interval ---------------------------------------------------------------------
def cluster_signs(
    clusters: Int[Tensor, " n"], n_draws: int, *, seed: int, name: str = "flips"
) -> Float[Tensor, "b n"]:
    """±1 for each cluster, given to all its pairs; the exact null of a paired design."""
    return sign_flips(int(clusters.max()) + 1, n_draws, seed=seed, name=name)[:, clusters]


def _quadratic(
    gram_: Float[Tensor, "*batch n n"], vectors: Float[Tensor, "b n"]
) -> Float[Tensor, "b ..."]:
    """``vᵀ G v`` for every row v, in chunks of bounded memory."""
    batch, n = gram_.shape[:-2], gram_.shape[-1]
    flat = gram_.reshape(-1, n, n)
    v = vectors.to(flat.dtype)
    result = torch.empty(v.shape[0], flat.shape[0], dtype=flat.dtype)
    step = max(1, _CHUNK // max(1, v.shape[0] * n))
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step]
        product = torch.matmul(v, part)  # (points, b, n)
        result[:, start : start + step] = (product * v).sum(-1).T
    return result.clamp(min=0).reshape(v.shape[0], *batch)


def sign_flip_norms(
    gram_: Float[Tensor, "*batch n n"], signs: Float[Tensor, "b n"]
) -> Float[Tensor, "b ..."]:
    """‖mean_i s_i D_i‖ for every row of signs; the same signs serve every point and contrast."""
    return _quadratic(gram_, signs).sqrt() / gram_.shape[-1]


def bootstrap_norms(
    gram_: Float[Tensor, "*batch n n"], weights: Float[Tensor, "b n"]
) -> Float[Tensor, "b ..."]:
    """‖Σ w_i D_i / Σ w_i‖ for every row of weights (see `core.stats.cluster_weights`)."""
    totals = weights.sum(dim=1).to(gram_.dtype)
    draws = _quadratic(gram_, weights).sqrt()
    return draws / totals.reshape(-1, *[1] * (draws.ndim - 1))


def recentred_norm_sq(
    gram_: Float[Tensor, "*batch n n"],
    weights: Float[Tensor, "b n"],
    clusters: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "b ..."]:
    """Bootstrap draws of ``‖Δμ‖²`` less the sampling variance that resampling adds.

    The draws of ‖Δμ*‖² lie around ``‖Δμ‖² + tr(S_D)/n``. Taking the surplus off centres them on the
    observed ``‖Δμ‖²``; taking it off twice centres them on the de-biased square.
    """
    k = gram_.shape[-1] if clusters is None else int(clusters.max()) + 1
    surplus = sampling_variance(gram_, clusters) * (k - 1) / k
    return bootstrap_norms(gram_, weights) ** 2 - surplus


def studentised_max_p(
    observed: Float[Tensor, " m"], null: Float[Tensor, "b m"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """One-sided p of each of m tests, and adjusted by the maximum over all of them.

    Each test is studentised with the mean and sd over its null *and* its observed value: the
    observed labelling is one element of the group, so both p stay exact at any number of draws.
    A test whose null has no spread (identical inputs on both sides) gets p = 1 and is left out of
    the maximum.
    """
    every = torch.cat([observed[None], null]).double()
    scale = every.abs().max(dim=0).values
    centre, spread = every.mean(dim=0), every.std(dim=0)
    dead = spread <= 1e-9 * scale
    t = torch.where(dead, -torch.inf, (every - centre) / torch.where(dead, 1.0, spread))
    draws = null.shape[0]
    threshold = torch.where(dead, -torch.inf, t[0] - _TIE * t[0].abs().clamp(min=1))
    single = (1 + (t[1:] >= threshold).sum(0)).double() / (draws + 1)
    largest = t[1:].max(dim=1).values
    joint = (1 + (largest[:, None] >= threshold).sum(0)).double() / (draws + 1)
    return single, joint


# ---- difference in differences -------------------------------------------------------------
def did(
    after: Float[Tensor, "*batch n d"], before: Float[Tensor, "*batch n d"]
) -> Float[Tensor, "*batch d"]:
    """``mean_i (D_i^after − D_i^before)`` on identical inputs, float64.

    Raises:
        PromptError: the two stages hold different numbers of pairs or widths.
    """
    return mean_shift(change(after, before))


def change(
    after: Float[Tensor, "*batch n d"], before: Float[Tensor, "*batch n d"]
) -> Float[Tensor, "*batch n d"]:
    """Per-pair differences of differences: what the DiD's null flips the signs of."""
    if after.shape != before.shape:
        raise PromptError(
            "difference in differences",
            given=f"paired differences of shapes {tuple(after.shape)} and {tuple(before.shape)}",
            expected="the same pairs, in the same order, at both stages",
            remedy="Harvest both stages on the same contrast set.",
        )
    return after.double() - before.double()


def check_same_prompts(before: PairedActivations, after: PairedActivations) -> None:
    """Both stages ran the same prompts at the same position.

    Raises:
        PromptError: otherwise.
    """
    if before.contrasts.hash != after.contrasts.hash or before.position != after.position:
        raise PromptError(
            f"stages {before.stage!r} and {after.stage!r}",
            given=f"prompts {before.contrasts.hash} at {before.position!r} and "
            f"{after.contrasts.hash} at {after.position!r}",
            expected="identical prompts and position at both stages",
            remedy="Harvest both stages with one contrast set.",
        )


# ---- shrunk covariance in sample space -----------------------------------------------------
def within_class(values: Float[Tensor, "*batch n 2 d"]) -> Float[Tensor, "*batch m d"]:
    """Rows centred within their class, (…, 2n, d): positives first, then negatives. Float64."""
    wide = values.double()
    centred = wide - wide.mean(dim=-3, keepdim=True)
    return torch.cat([centred[..., 0, :], centred[..., 1, :]], dim=-2)


def lda_filter(
    values: Float[Tensor, "*batch n 2 d"], shrinkage: float = SHRINKAGE
) -> Float[Tensor, "*batch d"]:
    """``S_λ⁻¹ Δμ`` with ``S_λ = (1-γ) S + γ mean(diag S) I``, S the pooled within-class covariance.

    Solved by Woodbury in the 2n-dimensional sample space where that is smaller than d. Not
    normalised: ``Δμ · filter`` is the squared Mahalanobis distance of the class means. Leading axes
    are batch axes, so all points or all control contrasts of one size go in one call. Float64.

    Raises:
        PromptError: fewer than two pairs, or no variance within the classes.
    """
    n, d = values.shape[-3], values.shape[-1]
    if n < 2:
        raise PromptError(
            "LDA filter",
            given=f"{n} pair",
            expected="at least 2 pairs",
            remedy="A covariance needs more than one item.",
        )
    rows = within_class(values)
    freedom = 2 * n - 2
    ridge = shrinkage * rows.square().sum(dim=(-2, -1)) / (freedom * d)
    if bool((ridge <= 0).any()):
        raise PromptError(
            "LDA filter",
            given="activations without any variance within the classes",
            expected="items that differ",
            remedy="This point carries the same vector for every item; use another point.",
        )
    shift = mean_shift(differences(values))[..., None]
    if 2 * n >= d:
        covariance = (1 - shrinkage) * rows.mT @ rows / freedom
        system = covariance + ridge[..., None, None] * torch.eye(d, dtype=torch.float64)
        return torch.linalg.solve(system, shift)[..., 0]
    small = (freedom * ridge / (1 - shrinkage))[..., None, None]
    system = rows @ rows.mT + small * torch.eye(2 * n, dtype=torch.float64)
    inner = torch.linalg.solve(system, rows @ shift)
    return ((shift - rows.mT @ inner) / ridge[..., None, None])[..., 0]


def whitened_gram(
    values: Float[Tensor, "*batch n 2 d"], shrinkage: float = SHRINKAGE
) -> Float[Tensor, "*batch n n"]:
    """``D S_λ⁻¹ Dᵀ``: the Gram matrix of Mahalanobis geometry, S_λ held at its observed value."""
    n, d = values.shape[-3], values.shape[-1]
    rows, pairs = within_class(values), differences(values)
    freedom = 2 * n - 2
    ridge = shrinkage * rows.square().sum(dim=(-2, -1)) / max(1, freedom * d)
    ridge = ridge.clamp(min=1e-300)[..., None, None]
    system = rows @ rows.mT
    system = system + (freedom * ridge / (1 - shrinkage)) * torch.eye(2 * n, dtype=torch.float64)
    cross = rows @ pairs.mT
    return (pairs @ pairs.mT - cross.mT @ torch.linalg.solve(system, cross)) / ridge
