"""How well a probe does on what it has not seen: held-out scores, intervals, layer choice.

Folds are whole clusters throughout. The layer with the best score is chosen on inner folds only,
and what is reported for it comes from outer folds that took no part in the choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.contrasts import Pair
from mi_weightspace.core.shifts import cluster_index
from mi_weightspace.core.stats import cluster_weights, percentile_interval, perfect_score_bound
from probes.linear import (
    Kernel,
    Method,
    bootstrap_auroc,
    fit_filter,
    kernel,
    leave_out_scores,
    operators,
    pair_auroc,
    ridge_grid,
    within_pair,
)
from probes.logistic import choose_c, fit_logistic, folds_of, out_of_fold_scores, score


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Leave-cluster-out scores at every point.

    Attributes:
        scores: (L, n, 2); `auroc` and `within_pair` (L,) from them.
        penalty: (L,) chosen on all pairs (C for ``lr``), NaN where the method has none.
        ops: the leave-out operators, empty for ``lr``.
    """

    scores: Float[Tensor, "points n 2"]
    penalty: Float[Tensor, " points"]
    ops: tuple[Float[Tensor, "points rows n"], ...]

    @property
    def auroc(self) -> Float[Tensor, " points"]:
        return pair_auroc(self.scores)

    @property
    def within_pair(self) -> Float[Tensor, " points"]:
        return within_pair(self.scores)


def hold_out(
    method: Method,
    values: Float[Tensor, "points n 2 d"],
    clusters: Int[Tensor, " n"],
    kernel_: Kernel | None = None,
) -> HeldOut:
    """Leave-cluster-out scores of a method (grouped five-fold for ``lr``)."""
    if method == "lr":
        scores = out_of_fold_scores(values, clusters)
        return HeldOut(scores, choose_c(values, clusters), ())
    kernel_ = kernel(values) if kernel_ is None else kernel_
    ops = tuple(operators(method, kernel_, clusters))
    ones = torch.ones(1, values.shape[1], dtype=torch.float64)
    scores, choice = leave_out_scores(ops, ones)
    penalty = torch.full((len(values),), torch.nan, dtype=torch.float64)
    if len(ops) > 1:
        penalty = ridge_grid(kernel_).gather(0, choice)[0]
    return HeldOut(scores[0], penalty, ops)


def fit_all(
    method: Method, values: Float[Tensor, "points n 2 d"], penalty: Float[Tensor, " points"]
) -> tuple[Float[Tensor, "points d"], Float[Tensor, " points"]]:
    """Filter and bias of every point, raw units."""
    if method == "lr":
        return fit_logistic(values, penalty).raw()
    return fit_filter(method, values, None if method in {"dm", "lda"} else penalty)


# ---- intervals -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Estimate:
    """AUROC and within-pair accuracy of one set of scores, with cluster-bootstrap intervals."""

    n: int
    n_clusters: int
    auroc: float
    auroc_low: float
    auroc_high: float
    within_pair: float
    within_pair_low: float
    within_pair_high: float


def estimates(
    scores: Float[Tensor, "points n 2"], clusters: Sequence[str], n_bootstrap: int, *, seed: int
) -> list[Estimate]:
    """One estimate a point; 95 % intervals.

    A perfect score has no spread to resample: its lower bound is the exact ``0.05^(1/k)`` for k
    clusters all right.
    """
    weights = cluster_weights(list(clusters), n_bootstrap, seed=seed, name="probe bootstrap")
    k, n = len(set(clusters)), len(clusters)
    bound = perfect_score_bound(k)
    curve, accuracy = pair_auroc(scores), within_pair(scores)
    draws = bootstrap_auroc(scores, weights)
    (a_low, a_high), (w_low, w_high) = (percentile_interval(d) for d in draws)
    result = []
    for i in range(scores.shape[0]):
        low = bound if curve[i] == 1.0 else float(a_low[i])
        w = bound if accuracy[i] == 1.0 else float(w_low[i])
        result.append(
            Estimate(
                n,
                k,
                float(curve[i]),
                low,
                float(a_high[i]),
                float(accuracy[i]),
                w,
                float(w_high[i]),
            )
        )
    return result


# ---- schemes -------------------------------------------------------------------------------
def group_schemes(pairs: Sequence[Pair]) -> dict[str, Int[Tensor, " n"]]:
    """Leave-wording-out and leave-register-out groups, where there are at least two of each."""
    names = {
        "leave_wording_out": [f"{p.register}×{p.wording_id}" for p in pairs],
        "leave_register_out": [p.register for p in pairs],
    }
    return {k: cluster_index(v) for k, v in names.items() if len(set(v)) > 1}


# ---- nested layer choice -------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen point and what it scores on outer folds.

    Attributes:
        point: index of the point chosen on all pairs.
        scores: (n, 2) outer-fold scores, each from the point its own inner folds chose.
        inner: how often each point was chosen by the inner folds.
    """

    point: int
    scores: Float[Tensor, "n 2"]
    inner: dict[int, int]


def choose_point(
    method: Method,
    values: Float[Tensor, "points n 2 d"],
    clusters: Int[Tensor, " n"],
    whole: Kernel,
) -> Choice:
    """Nested choice among all points (grouped five-fold outside, leave-cluster-out inside).

    ``lr`` ranks points by ridge, which costs a hundredth, and scores outer folds by ``lr``.
    """
    ranking: Method = "ridge" if method == "lr" else method
    folds = folds_of(clusters)
    result = torch.zeros(values.shape[1], 2, dtype=torch.float64)
    chosen: list[int] = []
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        part = whole.subset(torch.nonzero(train).flatten())
        held = hold_out(ranking, values[:, train], clusters[train], part)
        best = _best(held)
        own, penalty = values[best : best + 1], held.penalty[best : best + 1]
        if method == "lr":
            penalty = choose_c(own[:, train], clusters[train])
        weight, bias = fit_all(method, own[:, train], penalty)
        result[~train] = score(own[:, ~train], weight, bias)[0]
        chosen.append(best)
    final = _best(hold_out(ranking, values, clusters, whole))
    return Choice(final, result, dict(Counter(chosen)))


def _best(held: HeldOut) -> int:
    """Highest AUROC; among equals the largest standardised gap between the two sides."""
    gap = held.scores[..., 0] - held.scores[..., 1]
    effect = gap.mean(1) / gap.std(1).clamp(min=1e-300)
    return int((held.auroc + 1e-6 * effect / (1 + effect.abs())).argmax())


def as_row(estimate: Estimate) -> dict[str, Any]:
    """Columns of a table."""
    return {
        "n": estimate.n,
        "n_clusters": estimate.n_clusters,
        "auroc": estimate.auroc,
        "auroc_low": estimate.auroc_low,
        "auroc_high": estimate.auroc_high,
        "within_pair": estimate.within_pair,
        "within_pair_low": estimate.within_pair_low,
        "within_pair_high": estimate.within_pair_high,
    }
