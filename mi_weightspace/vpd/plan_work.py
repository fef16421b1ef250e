"""Floating-point operations of a step, from shapes (vpd.md §10)."""

from __future__ import annotations

from collections.abc import Mapping

from mi_weightspace.models.grammar import ModelShape, sites_of
from mi_weightspace.vpd.config import ReconstructionConfig, VPDConfig
from mi_weightspace.vpd.plan_trace import Traced

_STAGES: Mapping[str, int] = {"attn.o": 1, "mlp.gate": 2, "mlp.in": 2, "mlp.out": 3}
Place = tuple[int, int]
"""Where a matrix stands in the forward pass: layer (embed −1), stage within it."""


def flops(
    found: Traced, config: VPDConfig, shape: ModelShape, batch: int, length: int
) -> dict[str, float]:
    """Operations of one step, by part."""
    tokens = batch * length
    importance = 6.0 * found.importance_parameters
    if config.importance.kind.endswith("transformer"):
        groups = 1 if config.importance.kind.startswith("global") else shape.n_layers
        importance += 12 * groups * config.importance.n_blocks * config.importance.d_model * length
    parts = {"clean forward": frozen(shape, 0, length), "importance network": importance}
    every = tuple(found.counts)
    climb = _pass(found, shape, length, every, learn=False)
    loss = _pass(found, shape, length, every, learn=True)
    for at, term in enumerate(config.reconstruction):
        name = label(at, term)
        ascents = term.pgd_steps if term.source == "fresh_pgd" else 0
        ascents = term.n_warm if term.keeps_sources else ascents
        parts[f"{name}: ascents"] = ascents * climb
        one = loss
        if term.routing == "layerwise":
            one = sum(_pass(found, shape, length, (name,), learn=True) for name in every)
        parts[f"{name}: loss"] = term.n_samples * one
        if term.keeps_sources and (term.hidden_weight > 0 or not config.speed.single_backward):
            # a backward pass of its own for the sources
            parts[f"{name}: ascents"] += _backward(found, shape, length, every, learn=True)
    entries = sum(d_out * d_in * found.counts[n] for n, (d_out, d_in) in found.matrices.items())
    return {k: float(v * tokens) for k, v in parts.items()} | {"faithfulness": 6.0 * entries}


def _pass(
    found: Traced, shape: ModelShape, length: int, names: tuple[str, ...], *, learn: bool
) -> float:
    """A masked forward pass and its backward pass, per token; `learn`: also to the components."""
    components = sum(2 * found.counts[n] * sum(_widths(found, n)) for n in names)
    forward = frozen(shape, found.first, length) + components
    return forward + _backward(found, shape, length, names, learn=learn)


def _backward(
    found: Traced, shape: ModelShape, length: int, names: tuple[str, ...], *, learn: bool
) -> float:
    """Gradients reach what lies behind the first masked matrix; frozen matrices pass them on."""
    first = min(_place(n, shape) for n in names)
    total = 8.0 * length * shape.n_heads * shape.d_head  # attention's two products, two sides each
    total *= sum((layer, 1) > first for layer in range(shape.n_layers))
    behind = {s.name for s in sites_of(shape) if _place(s.name, shape) > first}
    total += sum(2 * s.d_in * s.d_out for s in sites_of(shape) if s.name in behind)
    for name in names:
        d_out, d_in = _widths(found, name)
        total += 2 * found.counts[name] * (d_out * (1 + learn) + d_in * ((name in behind) + learn))
    return total


def _widths(found: Traced, name: str) -> tuple[int, int]:
    """(d_out, d_in) of the products; an embedding looks its reads up."""
    d_out, d_in = found.matrices[name]
    return d_out, 0 if name == "embed" else d_in


def _place(name: str, shape: ModelShape) -> Place:
    if not name.startswith("blocks."):
        return (-1, 0) if name == "embed" else (shape.n_layers, 0)
    _, layer, kind = name.split(".", 2)
    stage = _STAGES.get(kind, 0)
    return int(layer), 0 if shape.parallel and stage == 2 else stage


def frozen(shape: ModelShape, first: int, length: int) -> float:
    """F_m of blocks from `first` on and the unembedding, per token: every product, attention's
    over all `length` positions (masked ones are computed too)."""
    attention = 4.0 * length * shape.n_heads * shape.d_head * (shape.n_layers - first)
    matrices = sum(
        2 * site.d_in * site.d_out
        for site in sites_of(shape)
        if site.kind != "embed" and (site.layer is None or site.layer >= first)
    )
    return attention + matrices


def label(at: int, term: ReconstructionConfig) -> str:
    return f"reconstruction {at} ({term.source}, {term.routing})"
