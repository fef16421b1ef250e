"""Linear probes on paired activations, all stream points at once, in closed form.

Input is ``values`` (L, n, 2, d): L points, n pairs, positive side first. Every estimator of this
module is linear in the labels, so its leave-cluster-out scores are ``P s`` with one matrix ``P``
and the vector s of pair signs (+1 everywhere for the labels as given). A thousand label
permutations are then one product, and a permutation null with the maximum over layers costs less
than fitting a single solver-based probe.

A *filter* scores, a *pattern* (Haufe et al. 2014) is for geometry; see `core.direction`.

- ``dm`` mass-mean: filter Δμ, pattern Δμ.
- ``lda``: filter ``S_λ⁻¹ Δμ`` (shrinkage 0.1), pattern Δμ. For balanced pairs it is the ridge
  solution at ``λ = γ/(1-γ) · tr/d`` up to scale, which is how its leave-out scores are computed,
  with the trace taken over the rows centred as one class (so that it does not depend on labels).
- ``ridge``: least squares on ±1 with unpenalised intercept; λ of eight by leave-cluster-out error,
  chosen again in every permutation. Pattern ``Cov(x) w``.
- ``paired``: ridge on the differences without intercept: item variance drops out. Pattern Δμ.

(``lr`` is in `probes.logistic`; its permutation p is that of ``ridge``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.shifts import SHRINKAGE, cluster_signs, lda_filter, mean_shift

Method = Literal["dm", "lda", "ridge", "lr", "paired"]
METHODS: tuple[Method, ...] = ("dm", "lda", "ridge", "lr", "paired")
N_RIDGE = 8


def rows_of(values: Float[Tensor, "points n 2 d"]) -> Float[Tensor, "points rows d"]:
    """(L, 2n, d) float64, positives first."""
    wide = values.double()
    return torch.cat([wide[:, :, 0], wide[:, :, 1]], dim=1)


@dataclass(frozen=True, eq=False)
class Kernel:
    """Centred linear kernel of the rows of each point, with its eigenvectors.

    Attributes:
        matrix: (L, N, N), N = 2n rows, positives first; rows centred with the mean of all.
        values, vectors: its eigenvalues (L, N), clamped at zero, and eigenvectors.
        width: d of the activations.
    """

    matrix: Float[Tensor, "points rows rows"]
    values: Float[Tensor, "points rows"]
    vectors: Float[Tensor, "points rows rows"]
    width: int

    @property
    def n_pairs(self) -> int:
        return int(self.matrix.shape[-1]) // 2

    @property
    def trace(self) -> Float[Tensor, " points"]:
        return self.values.sum(-1)

    def subset(self, pairs: Int[Tensor, " m"]) -> Kernel:
        """The kernel of some of the pairs, centred anew."""
        rows = torch.cat([pairs, pairs + self.n_pairs])
        return from_gram(self.matrix[:, rows][:, :, rows], self.width)


def kernel(values: Float[Tensor, "points n 2 d"]) -> Kernel:
    rows = rows_of(values)
    rows = rows - rows.mean(dim=1, keepdim=True)
    return from_gram(rows @ rows.mT, values.shape[-1])


def from_gram(gram: Float[Tensor, "points rows rows"], width: int) -> Kernel:
    """Centre a Gram matrix of rows and decompose it."""
    centred = gram - gram.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    centred = (centred + centred.mT) / 2
    values, vectors = torch.linalg.eigh(centred)
    return Kernel(centred, values.clamp(min=0), vectors, width)


def ridge_grid(kernel_: Kernel) -> Float[Tensor, "grid points"]:
    """Eight penalties, 1e-4 to 1e3 times the mean eigenvalue of each point's kernel."""
    scale = (kernel_.trace / kernel_.matrix.shape[-1]).clamp(min=1e-300)
    return torch.logspace(-4, 3, N_RIDGE, dtype=torch.float64)[:, None] * scale


def lda_penalty(kernel_: Kernel, shrinkage: float = SHRINKAGE) -> Float[Tensor, " points"]:
    """The ridge penalty at which ridge and LDA point the same way."""
    return (shrinkage / (1 - shrinkage) * kernel_.trace / kernel_.width).clamp(min=1e-300)


# ---- leave-cluster-out operators -----------------------------------------------------------
def leave_out_ridge(
    kernel_: Kernel, clusters: Int[Tensor, " n"], penalty: Float[Tensor, " points"]
) -> Float[Tensor, "points rows n"]:
    """Scores of every row by the ridge fitted without its cluster, as a matrix on pair signs.

    With hat matrix ``H = U diag(e/(e+λ)) Uᵀ + 11ᵀ/N``, residuals of a held-out block B are
    ``e_B = (I - H_BB)⁻¹ (y - H y)_B`` and its predictions ``y_B - e_B``: equal to refitting.
    """
    n_rows = kernel_.matrix.shape[-1]
    shrunk = kernel_.values / (kernel_.values + penalty[:, None])
    hat = (kernel_.vectors * shrunk[:, None]) @ kernel_.vectors.mT + 1.0 / n_rows
    residual = torch.eye(n_rows, dtype=torch.float64) - hat
    result = torch.eye(n_rows, dtype=torch.float64).repeat(kernel_.matrix.shape[0], 1, 1)
    for blocks in _blocks(torch.cat([clusters, clusters])):
        own = residual[:, blocks[:, :, None], blocks[:, None, :]]
        result[:, blocks] -= _solve_blocks(own, residual[:, blocks])
    return _on_pairs(result)


def leave_out_dm(kernel_: Kernel, clusters: Int[Tensor, " n"]) -> Float[Tensor, "points rows n"]:
    """The same for the mass-mean probe, threshold at the mean of the rows kept."""
    keep = (clusters[:, None] != torch.unique(clusters)[None]).double()  # (pairs, folds)
    rows_keep = torch.cat([keep, keep])
    weight = rows_keep / rows_keep.sum(0)
    centre = weight.T @ kernel_.matrix  # (L, folds, rows): mean kept row against every row
    fold = torch.searchsorted(torch.unique(clusters), torch.cat([clusters, clusters]))
    score = (kernel_.matrix - centre[:, fold]) * rows_keep[:, fold].T
    return _on_pairs(score) / keep.sum(0)[fold][:, None]


def leave_out_paired(
    kernel_: Kernel, clusters: Int[Tensor, " n"], penalty: Float[Tensor, " points"]
) -> Float[Tensor, "points rows n"]:
    """The same for the ridge on differences, threshold at the mean of the rows kept."""
    n = kernel_.n_pairs
    cross = kernel_.matrix[:, :, :n] - kernel_.matrix[:, :, n:]  # rows against differences
    pair_gram = cross[:, :n] - cross[:, n:]
    result = torch.zeros_like(cross)
    for c in torch.unique(clusters):
        kept = torch.nonzero(clusters != c).flatten()
        held = torch.nonzero(clusters == c).flatten()
        rows, rows_kept = torch.cat([held, held + n]), torch.cat([kept, kept + n])
        system = pair_gram[:, kept][:, :, kept]
        system = system + penalty[:, None, None] * torch.eye(len(kept), dtype=torch.float64)
        seen = cross[:, rows][:, :, kept] - cross[:, rows_kept][:, :, kept].mean(1, keepdim=True)
        solved = torch.linalg.solve(system, seen.mT).mT
        result[:, rows[:, None], kept[None]] = solved
    return result


def _blocks(clusters: Int[Tensor, " rows"]) -> list[Int[Tensor, "k size"]]:
    """Row numbers of every cluster, clusters of one size stacked."""
    by_size: dict[int, list[Tensor]] = {}
    for c in torch.unique(clusters):
        rows = torch.nonzero(clusters == c).flatten()
        by_size.setdefault(len(rows), []).append(rows)
    return [torch.stack(group) for group in by_size.values()]


def _solve_blocks(
    blocks: Float[Tensor, "points k m m"], right: Float[Tensor, "points k m rows"]
) -> Float[Tensor, "points k m rows"]:
    """`torch.linalg.solve`; two by two (one pair a cluster) by Cramer's rule, far faster."""
    if blocks.shape[-1] != 2:
        return torch.linalg.solve(blocks, right)
    a, b, c, d = (blocks[..., i, j, None] for i in (0, 1) for j in (0, 1))
    first, second = right[..., 0, :], right[..., 1, :]
    solved = torch.stack([d * first - b * second, a * second - c * first], dim=-2)
    return solved / (a * d - b * c)[..., None, :]


def _on_pairs(operator: Float[Tensor, "points rows rows"]) -> Float[Tensor, "points rows n"]:
    n = operator.shape[-1] // 2
    return operator[..., :n] - operator[..., n:]


def operators(
    method: Method, kernel_: Kernel, clusters: Int[Tensor, " n"]
) -> list[Float[Tensor, "points rows n"]]:
    """Leave-cluster-out operators of a method, one for each penalty it chooses among."""
    if method == "dm":
        return [leave_out_dm(kernel_, clusters)]
    if method == "lda":
        return [leave_out_ridge(kernel_, clusters, lda_penalty(kernel_))]
    leave_out = leave_out_paired if method == "paired" else leave_out_ridge
    return [leave_out(kernel_, clusters, penalty) for penalty in ridge_grid(kernel_)]


def leave_out_scores(
    ops: Sequence[Float[Tensor, "points rows n"]], signs: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, "b points n 2"], Int[Tensor, "b points"]]:
    """Scores with the sides swapped where a sign is negative, and the penalty chosen.

    The last axis is (labelled positive, labelled negative) under each row of signs. The penalty
    is the one of least squared leave-out error, chosen for every row of signs anew.
    """
    n, up = signs.shape[1], signs.T > 0  # (n, b)
    best = ops[0] @ signs.T  # (L, rows, b), sides as they are in the data
    choice = torch.zeros(best.shape[0], best.shape[2], dtype=torch.long)
    least = _squared_error(best, signs) if len(ops) > 1 else choice.double()
    for i, op in enumerate(ops[1:], start=1):
        raw = op @ signs.T
        error = _squared_error(raw, signs)
        better = error < least
        best = torch.where(better[:, None], raw, best)
        least, choice = torch.where(better, error, least), torch.where(better, i, choice)
    first, second = best[:, :n], best[:, n:]
    sides = torch.stack([torch.where(up, first, second), torch.where(up, second, first)], dim=-1)
    return sides.permute(2, 0, 1, 3), choice.T


def _squared_error(
    raw: Float[Tensor, "points rows b"], signs: Float[Tensor, "b n"]
) -> Float[Tensor, "points b"]:
    """Of the scores against +1 and -1, up to the constant 2n."""
    n = signs.shape[1]
    gap = (raw[:, :n] - raw[:, n:]) * signs.T
    return raw.square().sum(1) - 2 * gap.sum(1)


def permuted_aurocs(
    ops: Sequence[Float[Tensor, "points rows n"]],
    clusters: Int[Tensor, " n"],
    n_permutations: int,
    *,
    seed: int,
) -> Float[Tensor, "b points"]:
    """Leave-cluster-out AUROC with sides swapped at random, whole clusters together."""
    signs = cluster_signs(clusters, n_permutations, seed=seed, name="probe labels")
    parts = [pair_auroc(leave_out_scores(ops, part)[0]) for part in signs.split(250)]
    return torch.cat(parts) if parts else torch.zeros(0, ops[0].shape[0], dtype=torch.float64)


# ---- scores --------------------------------------------------------------------------------
def pair_auroc(scores: Float[Tensor, "*batch n 2"]) -> Float[Tensor, "*batch"]:
    """Mann-Whitney AUROC of (positive, negative) scores, ties counted half (mid-ranks)."""
    positive = scores[..., 0].contiguous()
    negative = scores[..., 1].sort(dim=-1).values.contiguous()
    below = torch.searchsorted(negative, positive)
    at_most = torch.searchsorted(negative, positive, right=True)
    return (below + at_most).double().mean(-1) / (2 * scores.shape[-2])


def within_pair(scores: Float[Tensor, "*batch n 2"]) -> Float[Tensor, "*batch"]:
    """Share of pairs whose positive side scores higher, ties half: no threshold is pooled."""
    gap = scores[..., 0] - scores[..., 1]
    return ((gap > 0).double() + 0.5 * (gap == 0).double()).mean(-1)


def separation(
    scores: Float[Tensor, "*batch n 2"], weights: Float[Tensor, "b n"] | None = None
) -> Float[Tensor, "b ..."]:
    """Gap of the class means over the pooled within-class sd (d'), for every row of weights.

    Unlike an AUROC it still orders scores that separate perfectly. Without weights, b = 1.
    """
    n = scores.shape[-2]
    rows = torch.ones(1, n, dtype=torch.float64) if weights is None else weights
    share = rows / rows.sum(1, keepdim=True)
    mean = torch.einsum("bn,...ns->b...s", share, scores)
    square = torch.einsum("bn,...ns->b...s", share, scores.square())
    variance = (square - mean.square()).clamp(min=0).mean(-1)
    gap = mean[..., 0] - mean[..., 1]
    return gap / (variance.sqrt() + 1e-12 * gap.abs() + 1e-300)


def bootstrap_auroc(
    scores: Float[Tensor, "points n 2"], weights: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, "b points"], Float[Tensor, "b points"]]:
    """AUROC and within-pair accuracy for every row of bootstrap weights over pairs."""
    totals = weights.sum(1)
    curves, pairs = [], []
    for point in scores:
        wins = (point[:, None, 0] > point[None, :, 1]).double()
        wins += 0.5 * (point[:, None, 0] == point[None, :, 1]).double()
        curves.append(((weights @ wins) * weights).sum(1) / totals**2)
        pairs.append(weights @ wins.diagonal() / totals)
    return torch.stack(curves, 1), torch.stack(pairs, 1)


# ---- fits on all pairs ---------------------------------------------------------------------
def fit_filter(
    method: Method,
    values: Float[Tensor, "points n 2 d"],
    penalty: Float[Tensor, " points"] | None = None,
) -> tuple[Float[Tensor, "points d"], Float[Tensor, " points"]]:
    """Filter and bias in raw units; scaled so that the training class means score +1 and -1.

    Args:
        penalty: of ``ridge`` and ``paired``, one for each point.
    """
    shift = mean_shift(values[:, :, 0].double() - values[:, :, 1].double())
    centre = values.double().mean(dim=(1, 2))
    if method == "dm":
        weight = shift
    elif method == "lda":
        weight = lda_filter(values)
    else:
        assert penalty is not None, method
        wide = values.double()
        if method == "paired":
            design, target = wide[:, :, 0] - wide[:, :, 1], torch.ones(values.shape[1])
        else:
            design = rows_of(values) - centre[:, None]
            target = torch.cat([torch.ones(values.shape[1]), -torch.ones(values.shape[1])])
        eye = torch.eye(design.shape[1], dtype=torch.float64)
        system = design @ design.mT + penalty[:, None, None] * eye
        dual = torch.linalg.solve(system, target.double()[None, :, None].expand(len(design), -1, 1))
        weight = (design.mT @ dual)[..., 0]
    gap = (weight * shift).sum(-1)
    weight = 2 * weight / torch.where(gap.abs() > 0, gap, 1.0)[:, None]
    return weight, -(weight * centre).sum(-1)


def haufe_pattern(
    values: Float[Tensor, "points n 2 d"], weight: Float[Tensor, "points d"]
) -> Float[Tensor, "points d"]:
    """``Cov(x) w`` over all rows (Haufe et al. 2014), float64."""
    rows = rows_of(values)
    rows = rows - rows.mean(1, keepdim=True)
    return (rows.mT @ (rows @ weight[..., None]))[..., 0] / (rows.shape[1] - 1)


# ---- planning ------------------------------------------------------------------------------
def required_pairs(auroc: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Rows per class for one pre-registered probe to find an AUROC (Hanley and McNeil 1982).

    Two-sided level `alpha`; the variance is taken at 0.5 under the null and at `auroc` otherwise.
    """
    from scipy.stats import norm

    assert 0.5 < auroc < 1.0, auroc
    z0, z1 = float(norm.ppf(1 - alpha / 2)), float(norm.ppf(power))
    n = 2
    while auroc - 0.5 < z0 * hanley_mcneil_se(0.5, n) + z1 * hanley_mcneil_se(auroc, n):
        n += 1
    return n


def hanley_mcneil_se(auroc: float, n: int) -> float:
    """Standard error of an AUROC with n rows in each class."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    spread = auroc * (1 - auroc) + (n - 1) * (q1 + q2 - 2 * auroc**2)
    return spread**0.5 / n
