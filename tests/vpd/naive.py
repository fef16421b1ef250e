"""VPD written from its equations: float64, loops, Δ = W − VU formed, no reuse of graphs.

Slow and obvious on purpose: the engine is compared with this file, so it shares no line with it.
Orientation is the paper's, ``y = x W + b`` with ``W (d_in, d_out)``, ``V (d_in, C)``, ``U (C,
d_out)``. Everything per site is a dictionary by site name; every random draw is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BySite = dict[str, Tensor]


# ---- the two squashings ------------------------------------------------------------------------
class _Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.leak = leak
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,), (grad,) = ctx.saved_tensors, grads
        out = torch.zeros_like(grad)
        for index in range(z.numel()):
            one, g = float(z.reshape(-1)[index]), float(grad.reshape(-1)[index])
            raised = ctx.leak * g if g < 0 else 0.0
            inside = g if one <= 1 else 0.0
            out.view(-1)[index] = raised if one <= 0 else inside
        return out, None


class _Upper(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.leak = leak
        return torch.where(z > 1, 1 + leak * (z - 1), z.clamp(0, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,), (grad,) = ctx.saved_tensors, grads
        above, inside = (z > 1).to(z.dtype), ((z >= 0) & (z <= 1)).to(z.dtype)  # as torch's clamp
        return grad * (ctx.leak * above + inside), None


def lower(z: Tensor, leak: float = 0.01) -> Tensor:
    """Importance for masks: clamp(z, 0, 1); below 0 only a gradient that raises z passes."""
    return _Lower.apply(z, leak)  # pyright: ignore[reportReturnType]


def upper(z: Tensor, leak: float = 0.01) -> Tensor:
    """Importance for the minimality terms: clamp, but slope `leak` above 1."""
    return _Upper.apply(z, leak)  # pyright: ignore[reportReturnType]


# ---- one matrix --------------------------------------------------------------------------------
def masked_output(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    v: Tensor,
    u: Tensor,
    m: Tensor,
    d: Tensor,
    route: Tensor | None,
) -> Tensor:
    """b + ((xV)⊙m)U + d·(xΔ), and b + xW where not routed. `d` and `route` lack the last axis."""
    delta = w - v @ u
    out = ((x @ v) * m) @ u + d.unsqueeze(-1) * (x @ delta)
    if route is not None:
        out = torch.where(route.unsqueeze(-1), out, x @ w)
    return out if b is None else out + b


# ---- losses ------------------------------------------------------------------------------------
def kl(clean_logits: Tensor, masked_logits: Tensor) -> Tensor:
    """KL(p_clean ‖ p_masked), nats, mean over every position."""
    log_p = torch.log_softmax(clean_logits.detach().double(), -1)
    log_q = torch.log_softmax(masked_logits.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def mse(clean: Tensor, masked: Tensor) -> Tensor:
    return ((clean.detach().double() - masked.double()) ** 2).mean()


def faithfulness(weights: BySite, params: Mapping[str, tuple[Tensor, Tensor]], form: str) -> Tensor:
    errors, sizes, norms = [], [], []
    for name, (v, u) in params.items():
        errors.append(((weights[name] - v @ u) ** 2).sum())
        norms.append((weights[name] ** 2).sum())
        sizes.append(weights[name].numel())
    if form == "param_mean":
        return torch.stack(errors).sum() / sum(sizes)
    return torch.stack([e / n for e, n in zip(errors, norms, strict=True)]).mean()


def _phi(f: Tensor, count: float) -> Tensor:
    return f * torch.log2(1 + count * f)


def _phi_slope(f: Tensor, count: float) -> Tensor:
    return torch.log2(1 + count * f) + f * count / ((1 + count * f) * math.log(2))


@dataclass
class Minimality:
    """``lp`` uses p, beta; ``smooth_l0`` the rest. `half_life` None: no running average."""

    form: str = "smooth_l0"
    weight: float = 1e-3
    frequency_weight: float = 5e-4
    reference_count: int = 32_768
    gamma: float = 1.0
    normalize_at_one: bool = False
    half_life: float | None = None
    p: float = 2.0
    beta: float = 0.5


def minimality(
    z: BySite, how: Minimality, average: BySite | None = None, step: int = 0, leak: float = 0.01
) -> tuple[Tensor, BySite]:
    """The weighted penalty and the new running averages of f (empty where none are kept)."""
    total, averages = torch.zeros((), dtype=torch.float64), {}
    for name, one in z.items():
        g = upper(one, leak).reshape(-1, one.shape[-1])
        n = g.shape[0]
        if how.form == "lp":
            f = ((g + 1e-12) ** how.p).sum(0) / n
            total = total + how.weight * (f * (1 + how.beta * torch.log2(1 + n * f))).sum()
            continue
        psi = g**2 / (g**2 + how.gamma**2)
        if how.normalize_at_one:
            psi = psi * (1 + how.gamma**2)
        f = psi.sum(0) / n
        total = total + how.weight * f.sum()
        if how.half_life is None:
            frequency = _phi(f, how.reference_count)
        else:
            keep = 2 ** (-1 / how.half_life)
            before = torch.zeros_like(f) if average is None else average[name]
            averages[name] = keep * before + (1 - keep) * f.detach()
            unbiased = averages[name] / (1 - keep ** (step + 1))
            slope = _phi_slope(unbiased, how.reference_count)
            frequency = _phi(unbiased, how.reference_count) + slope * (f - f.detach())
        total = total + how.frequency_weight * frequency.sum()
    return total, averages


def hidden_error(clean: BySite, masked: BySite) -> Tensor:
    """Mean over points of Σ‖h_masked − h_clean‖² / Σ‖h_clean‖²."""
    parts = [((masked[k] - clean[k]) ** 2).sum() / (clean[k] ** 2).sum() for k in masked]
    return torch.stack(parts).mean()


# ---- routing from explicit draws ---------------------------------------------------------------
def subset_route(k: Tensor, noise: Tensor) -> Tensor:
    """The k (*pos) sites of smallest noise (*pos, S) at each position."""
    flat, counts = noise.reshape(-1, noise.shape[-1]), k.reshape(-1)
    out = torch.zeros_like(flat, dtype=torch.bool)
    for row in range(flat.shape[0]):
        out[row, flat[row].argsort()[: int(counts[row])]] = True
    return out.view(noise.shape)


def layerwise_routes(shape: tuple[int, ...], n_sites: int) -> list[Tensor]:
    """One routing per site, (*pos, S), that site alone."""
    routes = []
    for site in range(n_sites):
        route = torch.zeros(*shape, n_sites, dtype=torch.bool)
        route[..., site] = True
        routes.append(route)
    return routes


# ---- adversary ---------------------------------------------------------------------------------
@dataclass
class Sources:
    """Sources kept across steps and their Adam; ``value[name]`` is (*scope, C + 1), delta last."""

    value: BySite
    lr: float
    betas: tuple[float, float] = (0.5, 0.99)
    sigmoid: bool = False
    scope: str = "bsc"
    first: BySite = field(default_factory=dict)
    second: BySite = field(default_factory=dict)
    count: int = 0

    def spread(self, leaves: BySite, batch: int, tokens: int | None) -> tuple[BySite, BySite]:
        """(r, d) at every position; `repeat` rows are used in turn along the batch."""
        r, d = {}, {}
        for name, leaf in leaves.items():
            value = torch.sigmoid(leaf) if self.sigmoid else leaf
            if self.scope == "repeat":
                value = torch.stack([value[i % value.shape[0]] for i in range(batch)])
            shape = (batch,) if tokens is None else (batch, tokens)
            value = value.expand(*shape, value.shape[-1])
            r[name], d[name] = value[..., :-1], value[..., -1]
        return r, d

    def ascend(self, grads: BySite) -> Sources:
        """One bias-corrected Adam ascent; ε outside the root; clamped unless sigmoid."""
        b1, b2 = self.betas
        count = self.count + 1
        value, first, second = {}, {}, {}
        for name, g in grads.items():
            first[name] = b1 * self.first.get(name, torch.zeros_like(g)) + (1 - b1) * g
            second[name] = b2 * self.second.get(name, torch.zeros_like(g)) + (1 - b2) * g**2
            step = (first[name] / (1 - b1**count)) / (
                (second[name] / (1 - b2**count)).sqrt() + 1e-8
            )
            new = self.value[name] + self.lr * step
            value[name] = new if self.sigmoid else new.clamp(0, 1)
        return Sources(value, self.lr, self.betas, self.sigmoid, self.scope, first, second, count)


@dataclass
class Pool:
    """K particles a batch index, ``value[name]`` (B, K, C + 1); a counter each, (B, K)."""

    value: BySite
    lr: float
    count: Tensor
    betas: tuple[float, float] = (0.5, 0.99)
    first: BySite = field(default_factory=dict)
    second: BySite = field(default_factory=dict)

    def particle(self, row: int, k: int) -> Sources:
        def pick(table: BySite) -> BySite:
            return {name: t[row, k] for name, t in table.items()}

        n = int(self.count[row, k])
        return Sources(
            pick(self.value),
            self.lr,
            self.betas,
            scope="c",
            first=pick(self.first),
            second=pick(self.second),
            count=n,
        )

    def ascend(self, chosen: list[int], grads: BySite) -> Pool:
        """Each row's chosen particle takes its own Adam ascent; the others rest."""
        zero = {name: torch.zeros_like(t) for name, t in self.value.items()}
        new = Pool(
            {n: t.clone() for n, t in self.value.items()},
            self.lr,
            self.count.clone(),
            self.betas,
            {n: t.clone() for n, t in (self.first or zero).items()},
            {n: t.clone() for n, t in (self.second or zero).items()},
        )
        for row, k in enumerate(chosen):
            moved = new.particle(row, k).ascend({n: g[row] for n, g in grads.items()})
            for name in self.value:
                new.value[name][row, k] = moved.value[name]
                new.first[name][row, k] = moved.first[name]
                new.second[name][row, k] = moved.second[name]
            new.count[row, k] += 1
        return new


# ---- optimiser of the parameters ---------------------------------------------------------------
def cosine_lr(peak: float, step: int, n_steps: int, end: float = 0.1) -> float:
    """Cosine from `peak` to `end`·peak, reached at the last step."""
    progress = step / (n_steps - 1)
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def clipped(grads: list[Tensor], bound: float) -> list[Tensor]:
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    coefficient = min(1.0, bound / (norm + 1e-6))
    return [g * coefficient for g in grads]


def adamw(
    values: list[Tensor], grads: list[Tensor], state: dict[str, Any], lr: float
) -> tuple[list[Tensor], dict[str, Any]]:
    """AdamW(0.9, 0.999, 1e-8) without weight decay; `state` is empty at first."""
    count = state.get("count", 0) + 1
    first = state.get("first", [torch.zeros_like(v) for v in values])
    second = state.get("second", [torch.zeros_like(v) for v in values])
    first = [0.9 * m + 0.1 * g for m, g in zip(first, grads, strict=True)]
    second = [0.999 * s + 0.001 * g**2 for s, g in zip(second, grads, strict=True)]
    new = []
    for value, m, s in zip(values, first, second, strict=True):
        step = (m / (1 - 0.9**count)) / ((s / (1 - 0.999**count)).sqrt() + 1e-8)
        new.append(value - lr * step)
    return new, {"count": count, "first": first, "second": second}


Importance = Callable[[BySite], BySite]
