"""The masked forward pass of one matrix, without ever forming its remainder Δ.

With inner activations ``a = x readᵀ``, masks m, delta source d and routing bit ρ,

    y = b + ((a ⊙ m) write + d · xΔ)          where ρ = 1,   y = b + xW   where ρ = 0

is the same as ``y = y_host + (κ−1)(y_host − b) + (a ⊙ ρ(m−d)) write``, κ = 1 − ρ(1−d), because
``xΔ = xW − a write`` and ``y_host = b + xW`` is what the host has computed anyway. At m = d = 1 or
ρ = 0 it is the host's output bit for bit (invariant 1 of SPEC.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Adjust = Callable[[Tensor, Tensor], Tensor]
"""``f(x, y_host) -> y``: what a site answers instead of the host's output."""


@dataclass(frozen=True)
class Layout:
    """Where each site's components lie in tensors that hold all of them.

    Attributes:
        names: sites in model order. sizes: subcomponents of each.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.sizes) == len(set(self.names))

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def slices(self) -> dict[str, slice]:
        found, at = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            found[name] = slice(at, at + size)
            at += size
        return found


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of every site at once; every tensor broadcastable over positions.

    Attributes:
        component: (*pos, K), m; where `source` is given, the importance g it lifts.
        delta: (*pos, S), d; None is 0 everywhere (the remainder is off).
        route: (*pos, S), whether a site is masked at a position; None is everywhere.
        source: (*pos, K), r of ``m = g + (1−g) r``. Lifting site by site keeps the tensors in the
            processor's cache.
    """

    component: Float[Tensor, "*pos K"]
    delta: Float[Tensor, "*pos S"] | None = None
    route: Bool[Tensor, "*pos S"] | None = None
    source: Float[Tensor, "*pos K"] | None = None


@dataclass(frozen=True, eq=False)
class SiteMasks:
    """One site's share of `Masks`: component and source (*pos, C), delta and on (*pos, 1)."""

    component: Tensor
    source: Tensor | None
    delta: Tensor | None
    on: Tensor | None


def site_masks(masks: Masks, layout: Layout) -> list[SiteMasks]:
    sizes, n = list(layout.sizes), len(layout.sizes)
    source, delta, on = masks.source, masks.delta, masks.route
    sources = [None] * n if source is None else source.split(sizes, -1)
    deltas = [None] * n if delta is None else delta.split(1, -1)
    ons = [None] * n if on is None else on.to(masks.component.dtype).split(1, -1)
    pieces = zip(masks.component.split(sizes, -1), sources, deltas, ons, strict=True)
    return [SiteMasks(*piece) for piece in pieces]


def _gate(
    component: Tensor, source: Tensor | None, delta: Tensor | None, on: Tensor | None
) -> Tensor:
    """ρ(m − d)."""
    gate = component
    if source is not None:
        gate = torch.lerp(gate, gate.new_ones(()), source)
    if delta is not None:
        gate = gate - delta
    return gate if on is None else gate * on


def _kappa(delta: Tensor | None, on: Tensor | None) -> Tensor | None:
    """κ = 1 − ρ(1−d); None where it is 0 everywhere."""
    if on is None:
        return delta
    return 1 - on if delta is None else 1 - on * (1 - delta)


class MaskedMatrix(torch.autograd.Function):
    """The masked output of one matrix, with a hand-written backward pass.

    x (*pos, d_in), y_host (*pos, d_out), read (C, d_in), write (C, d_out), bias (d_out) or None,
    then a `SiteMasks`' tensors. One node instead of a dozen: on small matrices the bookkeeping of
    autograd, and passes over tensors that fall out of the cache, cost more than the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y_host: Tensor,
        read: Tensor,
        write: Tensor,
        bias: Tensor | None,
        component: Tensor,
        source: Tensor | None,
        delta: Tensor | None,
        on: Tensor | None,
    ) -> Tensor:
        dtype = y_host.dtype
        inner = x @ read.T
        gate = _gate(component, source, delta, on).to(dtype)
        y = (inner * gate) @ write
        kappa = _kappa(delta, on)
        if kappa is not None:
            kappa = kappa.to(dtype)
            y.addcmul_(y_host, kappa)
            if bias is not None:
                y.addcmul_(1 - kappa, bias)
        elif bias is not None:
            y += bias
        keep_host = delta is not None and ctx.needs_input_grad[7]
        ctx.save_for_backward(
            x, y_host if keep_host else None, read, write, bias, component, source, delta, on,
            inner, gate,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, y_host, read, write, bias, component, source, delta, on, inner, gate = ctx.saved_tensors
        need = ctx.needs_input_grad
        d_x = d_host = d_read = d_write = d_component = d_source = d_delta = None
        if need[1]:
            kappa = _kappa(delta, on)
            d_host = None if kappa is None else grad * kappa.to(grad.dtype)
        if need[3]:
            d_write = (inner * gate).flatten(0, -2).T @ grad.flatten(0, -2)
        passed = grad @ write.T
        if need[5] or need[6] or need[7]:
            d_gate = (passed * inner).to(component.dtype)
            if on is not None:
                d_gate *= on
            if need[7]:
                host = torch.linalg.vecdot(grad, y_host)
                if bias is not None:
                    host -= grad @ bias
                host = host.unsqueeze(-1).to(d_gate.dtype)
                d_delta = (host if on is None else host * on) - d_gate.sum(-1, keepdim=True)
                d_delta = d_delta.sum_to_size(delta.shape)
            if need[6]:
                d_source = torch.addcmul(d_gate, d_gate, component, value=-1)
                d_source = d_source.sum_to_size(source.shape)
            if need[5]:
                if source is not None:
                    d_gate.addcmul_(d_gate, source, value=-1)
                d_component = d_gate.sum_to_size(component.shape)
        if need[0] or need[2]:
            passed *= gate
            d_x = passed @ read if need[0] else None
            d_read = passed.flatten(0, -2).T @ x.flatten(0, -2) if need[2] else None
        return d_x, d_host, d_read, d_write, None, d_component, d_source, d_delta, None


def masked_matrix(
    x: Float[Tensor, "*pos d_in"],
    y_host: Float[Tensor, "*pos d_out"],
    read: Float[Tensor, "C d_in"],
    write: Float[Tensor, "C d_out"],
    bias: Float[Tensor, " d_out"] | None,
    masks: SiteMasks,
) -> Float[Tensor, "*pos d_out"]:
    """`MaskedMatrix` in the precision of the host's output (autocast's)."""
    dtype = y_host.dtype
    y = MaskedMatrix.apply(
        x.to(dtype),
        y_host,
        read.to(dtype),
        write.to(dtype),
        None if bias is None else bias.to(dtype),
        masks.component,
        masks.source,
        masks.delta,
        masks.on,
    )
    assert isinstance(y, Tensor)
    return y


def masked_embedding(
    ids: Tensor,
    y_host: Float[Tensor, "*pos d_out"],
    read: Float[Tensor, "C vocab"],
    write: Float[Tensor, "C d_out"],
    scale: float,
    masks: SiteMasks,
) -> Float[Tensor, "*pos d_out"]:
    """The same for an embedding: ``a = read[:, token]``; `scale` is the host's own factor."""
    inner = torch.nn.functional.embedding(ids, read.T)
    gate = _gate(masks.component, masks.source, masks.delta, masks.on)
    parts = ((inner * gate) @ write * scale).to(y_host.dtype)
    kappa = _kappa(masks.delta, masks.on)
    return parts if kappa is None else parts + kappa.to(y_host.dtype) * y_host


def adjustments(
    layout: Layout,
    reads: Mapping[str, Tensor],
    writes: Mapping[str, Tensor],
    biases: Mapping[str, Tensor | None],
    scales: Mapping[str, float],
    masks: Masks,
    only: Sequence[str] | None = None,
) -> dict[str, Adjust]:
    """One function per site for `Host.forward`.

    Args:
        scales: site -> factor of the host's embedding module; sites in it take token ids.
        only: sites to mask; the others stay the host's own.
    """
    found: dict[str, Adjust] = {}
    for name, piece in zip(layout.names, site_masks(masks, layout), strict=True):
        if only is None or name in only:
            scale = scales.get(name)
            found[name] = _adjust(reads[name], writes[name], biases.get(name), scale, piece)
    return found


def _adjust(
    read: Tensor, write: Tensor, bias: Tensor | None, scale: float | None, masks: SiteMasks
) -> Adjust:
    if scale is None:
        return lambda x, y: masked_matrix(x, y, read, write, bias, masks)
    return lambda x, y: masked_embedding(x, y, read, write, scale, masks)
