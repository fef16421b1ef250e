"""The terms of the objective, normalised as vpd.md §4 says; every reduction in float32 or better.

Sums over positions happen before any logarithm and over the *global* batch: several processes get
the value, and the gradient, of the one big batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.vpd.config import FaithfulnessConfig, MinimalityConfig
from mi_weightspace.vpd.distributed import global_mean
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean, Metric
from mi_weightspace.vpd.importance import rows

CHUNK = 1 << 22
"""Entries of a logit matrix handled at a time: bounds the float32 scratch of the KL."""


def faithfulness(factors: Factors, config: FaithfulnessConfig) -> Float[Tensor, ""]:
    """``relative``: mean_s ‖Δ_s‖²/‖W_s‖²; ``param_mean``: Σ_s‖Δ_s‖² / Σ_s d_in d_out."""
    squares, sizes, norms = [], 0, []
    for name in factors.layout.names:
        weight = factors.weights[name]
        squares.append(factors.remainder(name).square().sum())
        norms.append(weight.square().sum())
        sizes += weight.numel()
    if config.form == "param_mean":
        return torch.stack(squares).sum() / sizes
    floor = torch.finfo(norms[0].dtype).tiny
    return (torch.stack(squares) / torch.stack(norms).clamp_min(floor)).mean()


class _SmoothL0(torch.autograd.Function):
    """``g (n, K) -> mean over n of g²/(g²+γ²)``, one pass each way."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(g)
        ctx.gamma = gamma
        total = g.new_zeros(g.shape[-1])
        for part in rows(g):
            square = part.square()
            total += square.div_(square + gamma**2).sum(0)
        return total / len(g)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = ctx.saved_tensors
        scale = (2 * ctx.gamma**2 / len(g)) * grads[0]
        out = torch.empty_like(g)
        for part, d in zip(rows(g), rows(out), strict=True):
            bottom = part.square().add_(ctx.gamma**2).square_()
            torch.mul(scale, part, out=d)
            d.div_(bottom)
        return out, None


@dataclass
class Frequencies:
    """Moving average of the per-component frequency f, (K,), and the steps it has seen."""

    average: Tensor | None = None
    count: int = 0

    def update(self, f: Tensor, half_life: float) -> Tensor:
        """Fold a batch in; returns the debiased average."""
        keep = 2 ** (-1 / half_life)
        f = f.detach()
        old = torch.zeros_like(f) if self.average is None else self.average
        self.average = keep * old + (1 - keep) * f
        self.count += 1
        return self.average / (1 - keep**self.count)


def minimality(
    up: Float[Tensor, "*pos K"],
    config: MinimalityConfig,
    progress: float,
    frequencies: Frequencies,
) -> tuple[Float[Tensor, ""], Float[Tensor, " K"]]:
    """The weighted penalty, and the frequencies f_c (global mean over positions of ψ).

    Args:
        up: upper importances. progress: share of the run done, in [0, 1].
    """
    flat = up.flatten(0, -2)
    done = min(1.0, progress / config.anneal_until)
    if config.form == "lp":
        p = config.p[0] + (config.p[1] - config.p[0]) * done
        f = global_mean((flat + 1e-12).pow(p).mean(0))
        n = len(flat) * _world()
        return config.weight * (f * (1 + config.beta * torch.log2(1 + n * f))).sum(), f.detach()
    gamma = config.gamma[0] + (config.gamma[1] - config.gamma[0]) * done
    psi = _SmoothL0.apply(flat, gamma)
    assert isinstance(psi, Tensor)
    f = global_mean(psi)
    if config.normalize_at_one:
        f = f * (1 + gamma**2)
    penalty = config.weight * f.sum()
    if config.frequency_weight > 0:
        penalty = penalty + config.frequency_weight * _frequency(f, config, frequencies)
    return penalty, f.detach()


def _frequency(f: Tensor, config: MinimalityConfig, frequencies: Frequencies) -> Tensor:
    """Σ Φ(f), Φ(f) = f log2(1 + a' f); with a moving average f̂ its value is Φ(f̂) and its
    gradient Φ'(f̂)·∇f: the batch alone over-penalises rare components (Φ is convex), Φ of the
    average alone would shrink the gradient."""
    a = config.reference_count
    if config.ema_half_life is None:
        return (f * torch.log2(1 + a * f)).sum()
    mean = frequencies.update(f, config.ema_half_life)
    log = torch.log2(1 + a * mean)
    slope = log + mean * a / ((1 + a * mean) * torch.log(torch.tensor(2.0)))
    return (mean * log).sum() + (slope * (f - f.detach())).sum()


def _world() -> int:
    from mi_weightspace.vpd.distributed import world

    return world()


# ---- reconstruction ------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Target:
    """The clean output, prepared once a step: logits (n, vocab) and their log-sum-exp (n,)."""

    output: Tensor
    log_sum: Tensor | None
    metric: Metric

    @classmethod
    def of(cls, clean: Clean, metric: Metric) -> Target:
        output = clean.output.detach()
        if metric == "mse":
            return cls(output, None, metric)
        flat = output.flatten(0, -2)
        wide = torch.promote_types(flat.dtype, torch.float32)
        sums = [c.to(wide).logsumexp(-1) for c in flat.split(_rows(flat))]
        return cls(flat, torch.cat(sums), metric)

    def distance(self, output: Tensor) -> Float[Tensor, ""]:
        """KL(p_clean ‖ p_masked) in nats, mean over positions; or MSE, mean over elements."""
        if self.log_sum is None:
            return (output.to(self.output.dtype) - self.output).square().mean()
        value = _KL.apply(output.flatten(0, -2), self.output, self.log_sum)
        assert isinstance(value, Tensor)
        return value

    def per_position(self, output: Tensor) -> Float[Tensor, " n"]:
        """The same without the mean (MSE: mean over the features of a position)."""
        with torch.no_grad():
            if self.log_sum is None:
                return (output - self.output).square().mean(-1).flatten()
            flat, rows = output.flatten(0, -2), _rows(output)
            parts = zip(
                flat.split(rows), self.output.split(rows), self.log_sum.split(rows), strict=True
            )
            return torch.cat([_kl_rows(q, p, s)[0] for q, p, s in parts])


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])


def _kl_rows(masked: Tensor, clean: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Per-position KL and the log-sum-exp of the masked logits, in float32 or better."""
    masked, clean = masked.to(log_sum.dtype), clean.to(log_sum.dtype)
    own = masked.logsumexp(-1)
    log_p = clean - log_sum[:, None]
    gap = log_p - masked
    gap += own[:, None]
    return torch.linalg.vecdot(log_p.exp_(), gap), own


class _KL(torch.autograd.Function):
    """``(masked logits, clean logits, clean log-sum) -> mean KL``; softmaxes are recomputed in the
    backward pass chunk by chunk, so no probability matrix is kept."""

    @staticmethod
    def forward(ctx: Any, masked: Tensor, clean: Tensor, log_sum: Tensor) -> Tensor:
        rows = _rows(masked)
        total = log_sum.new_zeros(())
        sums = []
        for q, p, s in zip(masked.split(rows), clean.split(rows), log_sum.split(rows), strict=True):
            each, own = _kl_rows(q, p, s)
            total += each.sum()
            sums.append(own)
        ctx.save_for_backward(masked, clean, log_sum, torch.cat(sums))
        return total / len(masked)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        masked, clean, log_sum, own = ctx.saved_tensors
        out = torch.empty_like(masked)
        rows, scale = _rows(masked), grads[0] / len(masked)
        for at in range(0, len(masked), rows):
            part = slice(at, at + rows)
            q = (masked[part].to(own.dtype) - own[part, None]).exp_()
            q -= (clean[part].to(own.dtype) - log_sum[part, None]).exp_()
            out[part] = q.mul_(scale)
        return out, None, None


def hidden_distance(masked: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Mean over sites of Σ‖h_masked − h‖² / Σ‖h‖² of the site outputs."""
    ratios = []
    for name, value in masked.items():
        target = clean[name].to(value.dtype)
        size = global_mean(target.square().sum())  # of the whole batch, all processes together
        ratios.append((value - target).square().sum() / size)
    return torch.stack(ratios).mean()
