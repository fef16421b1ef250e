"""L2 logistic regression for very many labellings of the same rows, and for many small designs.

Objective, as scikit-learn's: ``Σ log(1 + exp(-s f)) + ‖w‖² / (2C)``, s = ±1, intercept free.

- `logistic_shared`: one design, many labellings and penalties. In the eigenvectors of the design's
  Gram matrix the curvature is bounded by a *diagonal* (Böhning and Lindsay 1988: p(1-p) ≤ 1/4), so
  that a step is two matrix products for all labellings at once. Accelerated (Nesterov, momentum
  t/(t+3)) with gradient restarts of each problem (O'Donoghue and Candès 2015).
- `logistic_each`: a design for every problem (features selected by its own labels), by damped
  Newton steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MAX_STEPS, NEWTON_STEPS = 400, 40
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Of `logistic_shared`: largest step of a score, in units of the scores' root mean square."""
MANY = 8
"""Problems (labellings times configurations) from which float32 does: half the time, and AUROCs to
1e-3, enough for a null and for a choice of configurations; the fit that is reported is float64."""


def working(rows: Float[Tensor, "n d"], n_problems: int) -> Float[Tensor, "n d"]:
    """Rows in the precision that this many problems are solved in."""
    return rows.float() if n_problems >= MANY else rows


@dataclass(frozen=True, eq=False)
class Standardised:
    """Training rows at mean 0 and sd 1; columns without spread are zero everywhere."""

    centre: Float[Tensor, " d"]
    spread: Float[Tensor, " d"]

    def __call__(self, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        return (rows - self.centre) / self.spread

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Standardised:
        centre, spread = rows.mean(0), rows.std(0, correction=0)
        still = spread <= 1e-9 * (1 + centre.abs())
        return cls(centre, torch.where(still, torch.inf, spread))


@dataclass(frozen=True, eq=False)
class Rotated:
    """Rows in the principal axes of the training rows.

    Attributes:
        features: (n, k) training rows, mutually orthogonal columns of mean zero, largest first.
        energy: (k,) their squared lengths.
        axes: (d, k) orthonormal; other rows are rotated by ``rows @ axes``.
    """

    features: Float[Tensor, "n k"]
    energy: Float[Tensor, " k"]
    axes: Float[Tensor, "d k"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Rotated:
        """`rows` must be centred; directions below 1e-6 of the largest (in length) are dropped."""
        n, d = rows.shape
        gram = rows.T @ rows if d <= n else rows @ rows.T
        energy, vectors = torch.linalg.eigh(gram)
        energy, vectors = energy.flip(0), vectors.flip(1)
        keep = energy > 1e-12 * energy[0].clamp(min=1e-300)
        energy, vectors = energy[keep], vectors[:, keep]
        axes = vectors if d <= n else rows.T @ vectors / energy.sqrt()
        return cls(rows @ axes, energy, axes)


def logistic_shared(
    features: Float[Tensor, "n k"],
    energy: Float[Tensor, " k"],
    signs: Float[Tensor, "b n"],
    inverse_penalty: Float[Tensor, " c"],
) -> tuple[Float[Tensor, "c b k"], Float[Tensor, "c b"]]:
    """Weights and intercepts of every penalty and labelling.

    Args:
        features: orthogonal columns of mean zero (`Rotated.features`); `energy` their squares.
    """
    n, k = features.shape
    c, b = len(inverse_penalty), len(signs)
    x = torch.cat([features, features.new_ones(n, 1)], dim=1)
    truth = (signs.T > 0).to(x.dtype).repeat(1, c)  # columns: penalty-major
    ridge = (1 / inverse_penalty.to(x.dtype)).repeat_interleave(b)
    ridge = torch.cat([ridge.expand(k, -1), x.new_zeros(1, c * b)])
    bound = torch.cat([energy.to(x.dtype), x.new_full((1,), float(n))])[:, None] / 4 + ridge
    shorten = -1 / bound
    theta = x.new_zeros(k + 1, c * b)
    ahead, pace = theta, x.new_zeros(c * b)
    for step in range(MAX_STEPS):
        # small matrices: the number of calls is the cost, so every step makes few
        wrong = torch.mm(x, ahead).sigmoid_().sub_(truth)
        slope = torch.addmm(ridge * ahead, x.T, wrong)
        new = torch.addcmul(ahead, slope, shorten)
        moved = new - theta
        pace = (pace + 1).masked_fill_((slope * moved).sum(0) > 0, 0)
        theta, ahead = new, torch.addcmul(new, pace / (pace + 3), moved)
        if step % 10 == 9 and _settled(moved, theta, bound, n):
            break
    theta = theta.T.reshape(c, b, k + 1)
    return theta[..., :k], theta[..., k]


def _settled(moved: Tensor, theta: Tensor, bound: Tensor, n: int) -> bool:
    """No labelling's scores still move: lengths in the bound's metric, which is that of scores."""
    size = (bound * theta.square()).sum(0).sqrt()
    step = (bound * moved.square()).sum(0).sqrt()
    return bool((step <= TOLERANCE[theta.dtype] * size.clamp(min=1e-6 * n**0.5)).all())


def logistic_each(
    features: Float[Tensor, "p n k"],
    signs: Float[Tensor, "p n"],
    inverse_penalty: Float[Tensor, " p"],
) -> tuple[Float[Tensor, "p k"], Float[Tensor, " p"]]:
    """Weights and intercepts, one problem a row of `signs`; float64 for weak penalties."""
    p, n, k = features.shape
    x = torch.cat([features, features.new_ones(p, n, 1)], dim=-1)
    y = signs.to(x.dtype)
    penalty = x.new_zeros(p, k + 1)
    penalty[:, :k] = (1 / inverse_penalty.to(x.dtype))[:, None]
    ridge = torch.diag_embed(penalty + 1e-8 * n)
    theta = x.new_zeros(p, k + 1)
    enough = 1e-9 if x.dtype == torch.float64 else 1e-5

    def loss(t: Tensor) -> Tensor:
        margin = y * (x @ t[..., None])[..., 0]
        data = torch.nn.functional.softplus(-margin).sum(-1)
        return data + 0.5 * (penalty * t.square()).sum(-1)

    current = loss(theta)
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(-y * (x @ theta[..., None])[..., 0])
        gradient = penalty * theta - (x.mT @ (y * wrong)[..., None])[..., 0]
        hessian = (x * (wrong * (1 - wrong))[..., None]).mT @ x + ridge
        step = torch.cholesky_solve(gradient[..., None], torch.linalg.cholesky(hessian))[..., 0]
        decrement = (step * gradient).sum(-1)
        if bool((decrement <= enough * current.clamp(min=1e-6)).all()):
            break
        size = x.new_ones(p)
        for _ in range(20):
            proposal = loss(theta - size[:, None] * step)
            worse = proposal > current - 1e-4 * size * decrement + enough * 1e-3 * current
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        theta = theta - size[:, None] * step
        current = loss(theta)
    return theta[:, :-1], theta[:, -1]
