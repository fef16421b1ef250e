"""Permutation p-values, multiplicity, intervals. Small, exact where exactness is possible.

Rank p-values are ``(1 + #{null ≥ observed}) / (B + 1)``: valid for any B, never zero.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator, numpy_generator


def rank_p(observed: Tensor, null: Tensor) -> Tensor:
    """p of `observed` (…,) against `null` (B, …), large values extreme (one-sided)."""
    return (1 + (null >= observed).sum(0)).double() / (null.shape[0] + 1)


def sign_flips(n: int, n_draws: int, *, seed: int, name: str = "flips") -> Float[Tensor, "b n"]:
    """(n_draws, n) independent ±1 signs, float64."""
    drawn = torch.randint(0, 2, (n_draws, n), generator=generator(seed, name, n))
    return drawn.double() * 2 - 1


def shared_signs(n: int, n_draws: int, *, seed: int, name: str) -> Float[Tensor, "b n"]:
    """(n_draws, n) independent ±1 signs in bfloat16, one random bit each."""
    drawn = numpy_generator(seed, "shared signs", name).bytes((n_draws * n + 7) // 8)
    bits = np.unpackbits(np.frombuffer(drawn, dtype=np.uint8), count=n_draws * n)
    return torch.from_numpy(bits).view(n_draws, n).to(torch.bfloat16).mul_(2).sub_(1)


def cluster_weights(
    clusters: list[str], n_draws: int, *, seed: int, name: str = "bootstrap"
) -> Float[Tensor, "b n"]:
    """Multinomial bootstrap weights over clusters, expanded to their members.

    Row sums vary with cluster sizes; divide by them for a mean.
    """
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    k = len(names)
    drawn = torch.randint(0, k, (n_draws, k), generator=generator(seed, name, k))
    counts = torch.zeros(n_draws, k, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts[:, torch.from_numpy(index)]


def percentile_interval(draws: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Two-sided percentile interval over axis 0."""
    tail = (1 - level) / 2
    edges = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail]).double(), dim=0)
    return edges[0], edges[1]


def holm(p: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Holm step-down adjusted p-values."""
    m = p.shape[0]
    order = torch.argsort(p)
    factors = torch.arange(m, 0, -1, dtype=torch.float64)
    adjusted = torch.cummax((p[order].double() * factors).clamp(max=1.0), dim=0).values
    result = torch.empty_like(adjusted)
    result[order] = adjusted
    return result


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Mann-Whitney AUROC with mid-ranks; `labels` is 0/1."""
    from scipy.stats import rankdata

    ranks = rankdata(scores.detach().double().numpy())
    positive = labels.bool().numpy()
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    assert n_pos and n_neg, (n_pos, n_neg)
    return float((ranks[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def perfect_score_bound(n: int, level: float = 0.95) -> float:
    """Exact lower bound of a proportion observed as n out of n (Clopper-Pearson, one-sided)."""
    return float((1 - level) ** (1 / n))


def binomial_interval(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval for k successes out of n."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def isotropic_cosine_p(cosine: Tensor, d: int) -> Tensor:
    """P(|cos| ≥ |cosine|) for a uniformly random direction: ``cos² ~ Beta(1/2, (d-1)/2)``.

    A reference column only: its measured false-positive rate is 62-100 % where a few coordinates
    dominate the activations. It never carries a verdict.
    """
    from scipy.special import betaincc  # `scipy.stats` takes seconds to import

    return torch.from_numpy(np.asarray(betaincc(0.5, (d - 1) / 2, cosine.double().numpy() ** 2)))
