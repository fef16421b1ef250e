"""Causal-importance networks: clean activations -> one preactivation per subcomponent.

The same preactivation z is squashed twice (vpd.md §2): the lower sigmoid feeds every mask and
every reported importance, the upper one the minimality losses alone, so that each consumer can
push an importance only in its permitted direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import ImportanceConfig
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean

EPS = torch.finfo(torch.float32).eps
ROPE_BASE = 10_000.0


class Squash(torch.autograd.Function):
    """``z -> (g_low, g_up)`` with their separate backward rules.

    g_low = clamp(z, 0, 1); its gradient for z ≤ 0 is ``leak · grad`` where grad < 0 and 0
    elsewhere, ``grad`` inside, 0 above 1. g_up = 1 + leak (z − 1) above 1, else clamp(z, 0, 1),
    with the ordinary gradient.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, leak: float) -> tuple[Tensor, Tensor]:
        z = z.contiguous()
        ctx.save_for_backward(z)
        ctx.leak = leak
        low = z.clamp(0, 1)
        up = torch.empty_like(z)
        for part, out, base in zip(rows(z), rows(up), rows(low), strict=True):
            torch.add(base, (part - 1).clamp_(min=0), alpha=leak, out=out)
        return low, up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # indicators as clamped multiples: a selection by a boolean mask is forty times slower
        (z,), leak = ctx.saved_tensors, ctx.leak
        out = torch.empty_like(z)
        for x, d_low, d_up, d in zip(rows(z), *map(rows, grads), rows(out), strict=True):
            scaled = x * _HUGE
            positive = scaled.clamp(0, 1)
            above = (x - 1).mul_(_HUGE).clamp_(0, 1)
            torch.mul(d_low, positive - above, out=d)
            d.addcmul_(d_low.clamp(max=0), 1 - positive, value=leak)
            reached = scaled.add_(1).clamp_(0, 1)  # clamp passes the gradient at z = 0 too
            d.addcmul_(d_up, reached.sub_(above, alpha=1 - leak))
        return out, None


TILE = 1 << 16
"""Entries handled at a time: a chain of cheap operations stays in the processor's cache."""


def rows(x: Float[Tensor, "*pos K"]) -> tuple[Float[Tensor, "rows K"], ...]:
    """Consecutive positions, about `TILE` entries each."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.split(max(1, TILE // flat.shape[-1]))


_HUGE = 1e38
"""Any normal number above 0 times this is above 1."""


def squash(z: Float[Tensor, "*pos K"], leak: float) -> tuple[Tensor, Tensor]:
    """Lower and upper importances of preactivations, (*pos, K) each."""
    low, up = Squash.apply(z, leak)
    return low, up


def rms_normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


class Linear(nn.Module):
    """Fan-in initialised, bias 0; gain √2 in front of a nonlinearity, 1 at a head."""

    def __init__(
        self, d_in: int, d_out: int, draw: torch.Generator, *, gain: float, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in, generator=draw) * (gain / d_in**0.5))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _mlp(widths: Sequence[int], draw: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        last = i == len(widths) - 2
        layers.append(Linear(widths[i], widths[i + 1], draw, gain=1.0 if last else 2**0.5))
        if not last:
            layers.append(nn.GELU())
    return nn.Sequential(*layers)


class PerComponentMLP(nn.Module):
    """C independent MLPs: of the component's inner activation, or of the whole site input."""

    def __init__(self, count: int, d_in: int, hidden: int, draw: torch.Generator) -> None:
        super().__init__()
        scale = (2 / d_in) ** 0.5
        self.first = nn.Parameter(torch.randn(count, d_in, hidden, generator=draw) * scale)
        self.first_bias = nn.Parameter(torch.zeros(count, hidden))
        self.second = nn.Parameter(torch.randn(count, hidden, generator=draw) / hidden**0.5)
        self.second_bias = nn.Parameter(torch.zeros(count))

    def forward(self, x: Float[Tensor, "*pos d"]) -> Float[Tensor, "*pos C"]:
        if self.first.shape[1] == 1:  # x: one scalar per component
            hidden = x.unsqueeze(-1) * self.first[:, 0] + self.first_bias
        else:
            hidden = torch.einsum("...d,cdh->...ch", x, self.first) + self.first_bias
        return (F.gelu(hidden) * self.second).sum(-1) + self.second_bias


class Block(nn.Module):
    """Pre-norm transformer block: weightless RMS norm, rotary attention without biases, MLP."""

    def __init__(self, config: ImportanceConfig, draw: torch.Generator) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.causal = config.n_heads, config.causal
        self.qkv = Linear(d, 3 * d, draw, gain=1.0, bias=False)
        self.out = Linear(d, d, draw, gain=1.0, bias=False)
        self.up = Linear(d, config.d_mlp, draw, gain=2**0.5)
        self.down = Linear(config.d_mlp, d, draw, gain=1.0)

    def forward(self, x: Float[Tensor, "b t d"], rope: tuple[Tensor, Tensor]) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(rms_normed(x)).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(qkv[0], rope), rotate(qkv[1], rope)
        mixed = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(rms_normed(x))))


def rope_table(tokens: int, d_head: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (tokens, d_head/2), base 10000."""
    frequency = ROPE_BASE ** (-torch.arange(0, d_head, 2, device=like.device) / d_head)
    angle = torch.arange(tokens, device=like.device)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Float[Tensor, "b h t e"], rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half rotary embedding."""
    cos, sin = rope
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class Transformer(nn.Module):
    """RMS-normed inputs concatenated -> d_model -> blocks -> preactivations of its sites.

    Unlike the published network it norms the last residual stream in front of the head, as
    pre-norm transformers usually do.
    """

    def __init__(
        self, widths: Sequence[int], total: int, config: ImportanceConfig, draw: torch.Generator
    ) -> None:
        super().__init__()
        self.d_head = config.d_model // config.n_heads
        self.read = Linear(sum(widths), config.d_model, draw, gain=1.0)
        self.blocks = nn.ModuleList(Block(config, draw) for _ in range(config.n_blocks))
        self.head = Linear(config.d_model, total, draw, gain=1.0)

    def forward(self, features: Sequence[Float[Tensor, "b t d"]]) -> Float[Tensor, "b t K"]:
        x = self.read(torch.cat([rms_normed(f) for f in features], dim=-1))
        rope = rope_table(x.shape[1], self.d_head, x)
        for block in self.blocks:
            x = block(x, rope)
        return self.head(rms_normed(x))


class Importance(nn.Module):
    """The importance network of a decomposition: ``forward(clean, factors) -> z (*pos, K)``.

    Args:
        widths: site -> width of what the network reads there (`Clean.features`).

    Kinds: ``component_mlp`` (the component's own inner activation; the read directions are
    detached), ``vector_mlp``, ``layerwise_mlp``, ``global_mlp``, ``global_transformer``,
    ``chunk_transformer``.
    """

    def __init__(
        self,
        factors: Factors,
        widths: dict[str, int],
        config: ImportanceConfig,
        draw: torch.Generator,
    ) -> None:
        super().__init__()
        self.config, self.layout = config, factors.layout
        counts = dict(zip(self.layout.names, self.layout.sizes, strict=True))
        names = self.layout.names
        self.groups: list[tuple[str, ...]] = [(name,) for name in names]
        if config.kind.startswith("global"):
            self.groups = [names]
        elif config.kind == "chunk_transformer":
            self.groups = _chunks(factors, config.chunk_layers)
        made: list[nn.Module] = []
        for group in self.groups:
            total, inputs = sum(counts[n] for n in group), [widths[n] for n in group]
            if config.kind == "component_mlp":
                made.append(PerComponentMLP(total, 1, config.hidden[0], draw))
            elif config.kind == "vector_mlp":
                made.append(PerComponentMLP(total, inputs[0], config.hidden[0], draw))
            elif config.kind.endswith("transformer"):
                made.append(Transformer(inputs, total, config, draw))
            else:
                made.append(_mlp([sum(inputs), *config.hidden, total], draw))
        self.networks = nn.ModuleList(made)

    def forward(self, clean: Clean, factors: Factors) -> Float[Tensor, "*pos K"]:
        found: list[Tensor] = []
        dtype = next(self.parameters()).dtype
        for group, network in zip(self.groups, self.networks, strict=True):
            if self.config.kind == "component_mlp":
                found.append(network(_inner(clean.inputs[group[0]], factors.reads[group[0]])))
                continue
            features = [clean.features(name).to(dtype) for name in group]
            if self.config.kind.endswith("transformer"):
                found.append(network(features))
            else:
                found.append(network(features[0] if len(group) == 1 else torch.cat(features, -1)))
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _inner(x: Tensor, read: Tensor) -> Tensor:
    read = read.detach()
    if not x.is_floating_point():
        return F.embedding(x, read.T)
    return x.to(read.dtype) @ read.T


def _chunks(factors: Factors, size: int) -> list[tuple[str, ...]]:
    """Sites grouped by blocks of `size` layers; sites outside the blocks join their neighbour.

    Model order is kept, so that the concatenated answers are in layout order.
    """
    groups: dict[int, list[str]] = {}
    at = 0
    for name in factors.layout.names:
        layer = factors.host.layers[name]
        at = at if layer is None else layer // size
        groups.setdefault(at, []).append(name)
    return [tuple(names) for names in groups.values()]


def make_importance(
    factors: Factors, clean: Clean, config: ImportanceConfig, seed: int
) -> Importance:
    """A fresh network for these factors; `clean` is any batch (its widths are read)."""
    widths = {name: clean.features(name).shape[-1] for name in factors.layout.names}
    network = Importance(factors, widths, config, generator(seed, "importance"))
    return network.to(device=factors.host.device, dtype=factors.host.dtype)
