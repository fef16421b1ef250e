"""L2 logistic regression on standardised activations, all points at once, by Newton's method.

The representer theorem keeps the fit inside the span of the training rows: with standardised rows
Z and ``Z Zᵀ = U diag(e) Uᵀ`` the problem is solved in the coordinates ``U √e`` (at most N of them)
and carried back as ``w = Zᵀ U e^{-1/2} v``. Objective as scikit-learn's:
``C Σ log(1 + exp(-y f)) + ½‖w‖²``, intercept free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.linear import rows_of

C_GRID: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
N_FOLDS = 5
_STEPS = 60


@dataclass(frozen=True, eq=False)
class Logistic:
    """Fits at every point, on standardised rows.

    Attributes:
        weight: (L, d) on standardised activations; `bias` (L,).
        centre, spread: (L, d) of the training rows; coordinates without spread keep spread 1.
    """

    weight: Float[Tensor, "points d"]
    bias: Float[Tensor, " points"]
    centre: Float[Tensor, "points d"]
    spread: Float[Tensor, "points d"]

    def raw(self) -> tuple[Float[Tensor, "points d"], Float[Tensor, " points"]]:
        """Filter and bias in raw units: ``w / sd`` and ``b - mean · (w / sd)``."""
        weight = self.weight / self.spread
        return weight, self.bias - (self.centre * weight).sum(-1)


def fit_logistic(
    values: Float[Tensor, "points n 2 d"], inverse_penalty: Float[Tensor, " points"]
) -> Logistic:
    """Fit every point with its own C."""
    rows = rows_of(values)
    centre = rows.mean(1)
    spread = rows.std(1, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    z = (rows - centre[:, None]) / spread[:, None]
    eigenvalues, vectors = torch.linalg.eigh(z @ z.mT)
    root = eigenvalues.clamp(min=0).sqrt()
    n = values.shape[1]
    y = torch.cat([torch.ones(n), -torch.ones(n)]).double()
    v, bias = _newton(vectors * root[:, None], y, inverse_penalty)
    safe = torch.where(root > 1e-7 * root.max(1, keepdim=True).values, root, torch.inf)
    weight = (z.mT @ (vectors @ (v / safe)[..., None]))[..., 0]
    return Logistic(weight, bias, centre, spread)


def _newton(
    features: Float[Tensor, "points rows k"],
    y: Float[Tensor, " rows"],
    inverse_penalty: Float[Tensor, " points"],
) -> tuple[Float[Tensor, "points k"], Float[Tensor, " points"]]:
    """Damped Newton on (w, b); stops when the largest relative decrement is below 1e-12."""
    points, n_rows, k = features.shape
    x = torch.cat([features, torch.ones(points, n_rows, 1, dtype=torch.float64)], dim=-1)
    penalty = torch.cat([torch.ones(k), torch.zeros(1)]).double() / inverse_penalty[:, None]
    ridge = torch.diag_embed(penalty) + 1e-12 * torch.eye(k + 1, dtype=torch.float64)
    theta = torch.zeros(points, k + 1, dtype=torch.float64)

    def loss(t: Tensor) -> Tensor:
        margin = y * (x @ t[..., None])[..., 0]
        data = torch.nn.functional.softplus(-margin).sum(-1)
        return data + 0.5 * (penalty * t.square()).sum(-1)

    current = loss(theta)
    for _ in range(_STEPS):
        p = torch.sigmoid(-y * (x @ theta[..., None])[..., 0])
        gradient = penalty * theta - (x.mT @ (y * p)[..., None])[..., 0]
        hessian = (x * (p * (1 - p))[..., None]).mT @ x + ridge
        step = torch.linalg.solve(hessian, gradient)
        decrement = (step * gradient).sum(-1)
        if bool((decrement <= 1e-12 * current.clamp(min=1e-12)).all()):
            break
        size = torch.ones(points, dtype=torch.float64)
        for _ in range(30):
            proposal = loss(theta - size[:, None] * step)
            worse = proposal > current - 1e-4 * size * decrement
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        theta = theta - size[:, None] * step
        current = loss(theta)
    return theta[:, :-1], theta[:, -1]


def folds_of(clusters: Int[Tensor, " n"], n_folds: int = N_FOLDS) -> Int[Tensor, " n"]:
    """Fold of every pair; whole clusters, dealt round in order of their number."""
    names = torch.unique(clusters)
    position = torch.searchsorted(names, clusters)
    return position % min(n_folds, len(names))


def choose_c(
    values: Float[Tensor, "points n 2 d"], clusters: Int[Tensor, " n"]
) -> Float[Tensor, " points"]:
    """C of least log-loss by grouped five-fold cross-validation, for every point."""
    folds = folds_of(clusters)
    loss = torch.zeros(len(C_GRID), values.shape[0], dtype=torch.float64)
    for fold in range(int(folds.max()) + 1):
        train, test = values[:, folds != fold], values[:, folds == fold]
        for i, c in enumerate(C_GRID):
            weight, bias = fit_logistic(train, torch.full((len(values),), c).double()).raw()
            scores = score(test, weight, bias)
            margins = torch.cat([scores[..., 0], -scores[..., 1]], -1)
            loss[i] += torch.nn.functional.softplus(-margins).sum(-1)
    return torch.tensor(C_GRID, dtype=torch.float64)[loss.argmin(0)]


def score(
    values: Float[Tensor, "points n 2 d"],
    weight: Float[Tensor, "points d"],
    bias: Float[Tensor, " points"],
) -> Float[Tensor, "points n 2"]:
    return torch.einsum("lnsd,ld->lns", values.double(), weight) + bias[:, None, None]


def out_of_fold_scores(
    values: Float[Tensor, "points n 2 d"], clusters: Int[Tensor, " n"]
) -> Float[Tensor, "points n 2"]:
    """Grouped five-fold scores, C chosen anew inside every training part."""
    folds = folds_of(clusters)
    result = torch.zeros(values.shape[:3], dtype=torch.float64)
    for fold in range(int(folds.max()) + 1):
        train = folds != fold
        weight, bias = fit_logistic(
            values[:, train], choose_c(values[:, train], clusters[train])
        ).raw()
        result[:, ~train] = score(values[:, ~train], weight, bias)
    return result
