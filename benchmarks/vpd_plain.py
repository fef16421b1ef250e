"""One VPD step the plain way, for `vpd_step.py` to compare with. Uses nothing of the library.

The equations as a torch reference writes them down: the remainder Δ = W − (VU)ᵀ formed in every
masked forward pass, one module per matrix, gates, sources and penalties in loops over matrices, a
pass for each reconstruction term, and one more backward pass for the last ascent of the sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAM_EPS = 1e-8


class Lower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, leak: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.leak = leak
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (z,), grad = ctx.saved_tensors, grads[0]
        below = torch.where(grad < 0, ctx.leak * grad, torch.zeros_like(grad))
        inside = torch.where(z <= 1, grad, torch.zeros_like(grad))
        return torch.where(z <= 0, below, inside), None


def upper(z: Tensor, leak: float) -> Tensor:
    return torch.where(z > 1, 1 + leak * (z - 1), z.clamp(0, 1))


class MaskedLinear(nn.Module):
    """A frozen matrix (d_out, d_in) with V (d_in, C) and U (C, d_out)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, v: Tensor, u: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.V, self.U = nn.Parameter(v.clone()), nn.Parameter(u.clone())
        self.mask: Tensor | None = None
        self.delta_mask: Tensor | None = None
        self.route: Tensor | None = None
        self.seen: Tensor | None = None

    def delta(self) -> Tensor:
        return self.weight - (self.V @ self.U).T

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.delta_mask is None:
            self.seen = x.detach()
            return F.linear(x, self.weight, self.bias)
        out = ((x @ self.V) * self.mask) @ self.U
        if self.bias is not None:
            out = out + self.bias
        out = out + self.delta_mask.unsqueeze(-1) * F.linear(x, self.delta())
        if self.route is not None:
            frozen = F.linear(x, self.weight, self.bias)
            out = torch.where(self.route.unsqueeze(-1), out, frozen)
        return out


class Beside(nn.Module):
    """Matrices that a model keeps in one, side by side."""

    def __init__(self, parts: list[MaskedLinear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class ImportanceBlock(nn.Module):
    def __init__(self, d: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(d, wide), nn.GELU(), nn.Linear(wide, d))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape
        y = F.rms_norm(x, (d,))
        q, k, v = (
            f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(F.rms_norm(x, (d,)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([one * cos - two * sin, one * sin + two * cos], dim=-1)


class ImportanceTransformer(nn.Module):
    """RMS-normed inputs -> d -> pre-norm blocks -> head; `final_norm` in front of the head too."""

    def __init__(
        self,
        d_in: int,
        total: int,
        d: int,
        blocks: int,
        heads: int,
        wide: int,
        *,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.d_head, self.final_norm = d // heads, final_norm
        self.read = nn.Linear(d_in, d)
        self.blocks = nn.ModuleList(ImportanceBlock(d, heads, wide) for _ in range(blocks))
        self.head = nn.Linear(d, total)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        x = self.read(torch.cat([F.rms_norm(y, (y.shape[-1],)) for y in inputs], dim=-1))
        half = torch.arange(0, self.d_head, 2, device=x.device) / self.d_head
        angle = torch.arange(x.shape[1], device=x.device)[:, None] * 10_000.0**-half
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin())
        return self.head(F.rms_norm(x, (x.shape[-1],)) if self.final_norm else x)


def distance(masked: Tensor, clean: Tensor) -> Tensor:
    log_q = F.log_softmax(masked.float(), dim=-1)
    p = F.softmax(clean.detach().float(), dim=-1)
    return F.kl_div(log_q, p, reduction="none").sum(-1).mean()


@dataclass
class Given:
    """Draws to use in place of fresh ones: by matrix, r (b, t, C), d (b, t), route (b, t)."""

    r: Mapping[str, Tensor]
    d: Mapping[str, Tensor]
    route: Mapping[str, Tensor]


@dataclass
class Weights:
    faithfulness: float = 1.0
    minimality: float = 1e-3
    frequency: float = 5e-4
    stochastic: float = 0.5
    adversarial: float = 0.5
    reference_count: int = 32_768
    leak: float = 0.01
    clip: float = 1.0


class PlainStep:
    """A training step over a model whose matrices have been replaced by `MaskedLinear`."""

    def __init__(
        self,
        model: Any,
        sites: dict[str, MaskedLinear],
        importance: ImportanceTransformer,
        weights: Weights,
        shape: tuple[int, int],
        *,
        n_warm: int = 2,
        source_lr: float = 0.01,
        lr: float = 1e-3,
        autocast: torch.dtype | None = None,
        own_pass: bool = False,
    ) -> None:
        self.model, self.sites, self.importance, self.weights = model, sites, importance, weights
        self.n_warm, self.source_lr = n_warm, source_lr
        self.autocast, self.own_pass = autocast, own_pass
        self.device = next(iter(sites.values())).V.device
        self.components = [p for site in sites.values() for p in (site.V, site.U)]
        network = list(importance.parameters())
        self.optimiser = torch.optim.AdamW([*self.components, *network], lr=lr, weight_decay=0.0)
        self.sources: dict[str, Tensor] = {}
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.count = 0
        for name, site in sites.items():
            start = torch.rand(*shape, site.V.shape[1] + 1, device=self.device)
            self.sources[name] = start.requires_grad_()
            self.moments[name] = torch.zeros_like(start), torch.zeros_like(start)

    # ---- passes ----------------------------------------------------------------------------
    def clear(self) -> None:
        for site in self.sites.values():
            site.mask = site.delta_mask = site.route = None

    def clean(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.clear()
        with torch.no_grad():
            logits = self.model(tokens).logits
        found: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            assert site.seen is not None
            found[name] = site.seen
        return logits, found

    def masked(
        self,
        tokens: Tensor,
        masks: Mapping[str, Tensor],
        delta: Mapping[str, Tensor],
        route: Mapping[str, Tensor] | None,
    ) -> Tensor:
        for name, site in self.sites.items():
            site.mask, site.delta_mask = masks[name], delta[name]
            site.route = None if route is None else route[name]
        try:
            return self.model(tokens).logits
        finally:
            self.clear()

    def attacked(self, tokens: Tensor, clean: Tensor, low: Mapping[str, Tensor]) -> Tensor:
        masks = {n: g + (1 - g) * self.sources[n][..., :-1] for n, g in low.items()}
        delta = {n: s[..., -1] for n, s in self.sources.items()}
        return distance(self.masked(tokens, masks, delta, None), clean)

    def ascend(self, grads: tuple[Tensor, ...]) -> None:
        self.count += 1
        b1, b2 = 0.5, 0.99
        with torch.no_grad():
            for (name, source), grad in zip(self.sources.items(), grads, strict=True):
                first, second = self.moments[name]
                first.mul_(b1).add_(grad, alpha=1 - b1)
                second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
                root = (second / (1 - b2**self.count)).sqrt() + ADAM_EPS
                source.add_(self.source_lr * (first / (1 - b1**self.count)) / root)
                source.clamp_(0, 1)

    # ---- terms -----------------------------------------------------------------------------
    def faithfulness(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        for site in self.sites.values():
            with torch.autocast(self.device.type, enabled=False):
                total = total + site.delta().pow(2).sum() / site.weight.pow(2).sum()
        return total / len(self.sites)

    def minimality(self, up: Mapping[str, Tensor], gamma: float) -> Tensor:
        how, total = self.weights, torch.zeros((), device=self.device)
        for g in up.values():
            psi = g.float() ** 2 / (g.float() ** 2 + gamma**2)
            f = psi.flatten(0, -2).mean(0)
            total = total + how.minimality * f.sum()
            total = total + how.frequency * (f * torch.log2(1 + how.reference_count * f)).sum()
        return total

    def stochastic(
        self, tokens: Tensor, clean: Tensor, low: Mapping[str, Tensor], given: Given | None
    ) -> Tensor:
        if given is None:
            shape = tuple(tokens.shape)
            r = {n: torch.rand_like(g) for n, g in low.items()}
            d = {n: torch.rand(shape, device=self.device) for n in low}
            k = torch.randint(1, len(low) + 1, shape, device=self.device)
            noise = torch.rand(len(low), *shape, device=self.device)
            ranks = noise.argsort(0).argsort(0)
            given = Given(r, d, {n: ranks[i] < k for i, n in enumerate(low)})
        masks = {n: g + (1 - g) * given.r[n] for n, g in low.items()}
        return distance(self.masked(tokens, masks, given.d, given.route), clean)

    def losses(
        self, tokens: Tensor, gamma: float, given: Given | None = None
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """Total, terms, and the sources' gradients for their last ascent."""
        how = self.weights
        dtype = self.autocast or torch.float32
        enabled = self.autocast is not None
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            clean, inputs = self.clean(tokens)
            z = self.importance(list(inputs.values())).float()
            sizes = [site.V.shape[1] for site in self.sites.values()]
            by_site = dict(zip(self.sites, z.split(sizes, dim=-1), strict=True))
            low: dict[str, Any] = {n: Lower.apply(v, how.leak) for n, v in by_site.items()}
            up = {n: upper(v, how.leak) for n, v in by_site.items()}
            held = {n: g.detach() for n, g in low.items()}
            leaves = list(self.sources.values())
            for _ in range(self.n_warm):
                self.ascend(torch.autograd.grad(self.attacked(tokens, clean, held), leaves))
            faith, minimal = self.faithfulness(), self.minimality(up, gamma)
            stochastic = self.stochastic(tokens, clean, low, given)
            adversarial = self.attacked(tokens, clean, low)
            again = self.attacked(tokens, clean, held) if self.own_pass else adversarial
        total = how.faithfulness * faith + minimal
        total = total + how.stochastic * stochastic + how.adversarial * adversarial
        grads = torch.autograd.grad(again, leaves, retain_graph=True)
        terms = {
            "faithfulness": faith,
            "minimality": minimal,
            "stochastic": stochastic,
            "adversarial": adversarial,
        }
        return total, {k: v.detach() for k, v in terms.items()}, grads

    def step(self, tokens: Tensor, gamma: float) -> dict[str, Tensor]:
        total, terms, grads = self.losses(tokens, gamma)
        self.optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.components, self.weights.clip)
        torch.nn.utils.clip_grad_norm_(list(self.importance.parameters()), self.weights.clip)
        self.optimiser.step()
        self.ascend(grads)
        return terms


def gamma_at(progress: float) -> float:
    """1 → 0.01 over the first nine tenths."""
    return 1.0 + (0.01 - 1.0) * min(1.0, progress / 0.9)


def flops_per_token(
    *, frozen: int, components: int, importance: int, n_warm: int, head: int, attention: int
) -> dict[str, float]:
    """Floating-point operations of a token: F_m, F_c and the sum F_m + 6P + 2(2F_m+3F_c) + …

    Args:
        frozen: entries of the decomposed matrices. components: Σ C(d_in + d_out).
        importance: parameters of the importance network. head: d · vocabulary.
        attention: of scores and mixtures, forward.
    """
    f_m = 2 * (frozen + head) + attention
    f_c = 2 * components
    total = f_m + 6 * importance + 2 * (2 * f_m + 3 * f_c) + n_warm * (2 * f_m + 2 * f_c)
    assert math.isfinite(total)
    return {"F_m": f_m, "F_c": f_c, "P_ci": importance, "total": total}
