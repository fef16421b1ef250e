"""The importance networks of vpd.md §2, written out: float64, heads and components in loops.

Each takes plain tensors by name (a state dictionary) and the site inputs (batch, tokens, d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
EPS = 2.0**-23
"""float32 machine epsilon."""


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def rms(x: Tensor) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + EPS).sqrt()


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, state[f"{name}.weight"])
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def mlp(state: State, x: Tensor) -> Tensor:
    """Linear layers 0, 2, 4, … with a GELU between."""
    numbers = sorted({int(key.split(".")[0]) for key in state})
    for at, number in enumerate(numbers):
        x = linear(state, str(number), gelu(x) if at else x)
    return x


def per_component(state: State, x: Tensor) -> Tensor:
    """C networks d → h → 1: of the last axis of `x`, or (d = 1) of the component's own entry."""
    found = []
    for c in range(len(state["second"])):
        own = x[..., c : c + 1] if state["first"].shape[1] == 1 else x
        hidden = gelu(own @ state["first"][c] + state["first_bias"][c])
        found.append(hidden @ state["second"][c] + state["second_bias"][c])
    return torch.stack(found, dim=-1)


def turned(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of one head, (tokens, e): coordinates i and i + e/2 turn together."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for t in range(x.shape[0]):
        for i in range(half):
            angle = t * base ** (-2 * i / x.shape[-1])
            a, b = x[t, i], x[t, i + half]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(state: State, name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    qkv = linear(state, f"{name}.qkv", x)
    q, k, v = qkv.chunk(3, dim=-1)
    width, rows = x.shape[-1] // heads, []
    for b in range(x.shape[0]):
        mixed = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            scores = turned(q[b, :, own]) @ turned(k[b, :, own]).T / math.sqrt(width)
            if causal:
                future = torch.ones_like(scores).triu(1) > 0
                scores = scores.masked_fill(future, -math.inf)
            mixed.append(scores.softmax(-1) @ v[b, :, own])
        rows.append(torch.cat(mixed, dim=-1))
    return linear(state, f"{name}.out", torch.stack(rows))


def transformer(
    state: State,
    inputs: list[Tensor],
    heads: int,
    *,
    causal: bool = False,
    final_norm: bool = False,
) -> Tensor:
    """RMS-normed inputs side by side → d → pre-norm blocks → head.

    The published network has no norm in front of its head; `final_norm` adds one.
    """
    x = linear(state, "read", torch.cat([rms(one) for one in inputs], dim=-1))
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    for at in range(blocks):
        x = x + attention(state, f"blocks.{at}", rms(x), heads, causal)
        hidden = gelu(linear(state, f"blocks.{at}.up", rms(x)))
        x = x + linear(state, f"blocks.{at}.down", hidden)
    return linear(state, "head", rms(x) if final_norm else x)
