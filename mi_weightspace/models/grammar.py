"""Architectures as tables: where each canonical matrix lives in a Hugging Face model and on disk.

A `Part` says which module holds a matrix, whether it is stored transposed (Conv1D), and which of
its rows belong to it when several matrices are fused. A `Family` lists the parts, the norms in
front of and behind them, and the stream points. Nothing here runs a model; `models.checks` checks
each table by behaviour at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.errors import ArchitectureError, CheckpointError
from mi_weightspace.core.site import Kind, Site
from mi_weightspace.core.space import Space
from mi_weightspace.models.config_file import check_size, config_of
from mi_weightspace.models.families import FAMILIES, Family, Part

Slot = Literal["q", "k", "v", "gate", "in"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one model, read from its configuration.

    Attributes:
        family: Hugging Face ``model_type``.
        d_head, n_heads, n_kv_heads: attention sizes; ``d_mlp`` the MLP's hidden width.
        parallel: attention and MLP read the same stream point (no ``resid_mid``).
        tied: the unembedding shares the embedding's storage.
    """

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    parallel: bool
    tied: bool
    max_positions: int

    @property
    def table(self) -> Family:
        return FAMILIES[self.family]


def shape_of(config: Any, where: str = "config.json") -> ModelShape:
    """Sizes from a `PretrainedConfig` (or the same as a dict read from ``config.json``).

    Args:
        where: the configuration's file, for messages.

    Raises:
        ArchitectureError: no table for this family.
        CheckpointError: quantised weights, or a size or key that no model has.
    """
    if isinstance(config, Mapping):
        config = _config_from_dict(config, where)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{config.model_type} checkpoint ({where})",
            given="quantised weights",
            expected="float32, bfloat16 or float16 weights",
            remedy="Use the unquantised checkpoint: rounding hides what training changed.",
        )
    family = config.model_type
    if family not in FAMILIES:
        raise ArchitectureError(
            f"model_type {family!r}",
            given="a family without a grammar table",
            expected=f"one of {sorted(FAMILIES)}",
            remedy="Add a table to mi_weightspace/models/families.py; the checks certify it.",
        )
    table = FAMILIES[family]
    heads = config.num_attention_heads
    d_model = config.hidden_size
    d_mlp = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None)
    parallel = table.parallel
    if family == "gpt_neox":
        parallel = bool(config.use_parallel_residual)
    shape = ModelShape(
        family=family,
        n_layers=config.num_hidden_layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_head=getattr(config, "head_dim", None) or d_model // heads,
        d_mlp=d_mlp or 4 * d_model,
        vocab_size=config.vocab_size,
        parallel=parallel,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        max_positions=getattr(config, "max_position_embeddings", None) or 2048,
    )
    for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "vocab_size"):
        check_size(key, getattr(shape, key), where)
    return shape


def _config_from_dict(record: Mapping[str, Any], where: str) -> Any:
    fields = dict(record)
    family = fields.pop("model_type", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise ArchitectureError(
            f"{where}, model_type {family!r}",
            given="a family without a grammar table",
            expected=f"one of {sorted(FAMILIES)}",
            remedy="Add a table to mi_weightspace/models/families.py; the checks certify it.",
        )
    return config_of(family, fields, where)


def sites_of(shape: ModelShape) -> list[Site]:
    """Every site, in forward order: embed, blocks, unembed."""
    table = shape.table
    found = [_edge_site("embed", shape)]
    for layer in range(shape.n_layers):
        found += [_block_site(kind, layer, shape) for kind in table.parts]
    return [*found, _edge_site("unembed", shape)]


def _edge_site(kind: Literal["embed", "unembed"], shape: ModelShape) -> Site:
    if kind == "embed":
        reads, writes = Space("tokens"), Space("resid_pre", 0)
        return Site("embed", "embed", None, shape.d_model, shape.vocab_size, reads, writes)
    last = Space("resid_post", shape.n_layers - 1)
    sizes = (shape.vocab_size, shape.d_model)
    return Site("unembed", "unembed", None, *sizes, last, Space("logits"), reads_through_norm=True)


def _block_site(kind: Kind, layer: int, shape: ModelShape) -> Site:
    table = shape.table
    q, kv = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
    before_mlp: Any = "resid_pre" if shape.parallel else "resid_mid"
    after_attn: Any = "resid_post" if shape.parallel else "resid_mid"
    rows: dict[str, tuple[int, int, Any, Any]] = {
        "attn.q": (q, shape.d_model, "resid_pre", "attn_q"),
        "attn.k": (kv, shape.d_model, "resid_pre", "attn_k"),
        "attn.v": (kv, shape.d_model, "resid_pre", "attn_v"),
        "attn.o": (shape.d_model, q, "attn_z", after_attn),
        "mlp.gate": (shape.d_mlp, shape.d_model, before_mlp, "mlp_gate"),
        "mlp.in": (shape.d_mlp, shape.d_model, before_mlp, "mlp_in"),
        "mlp.out": (shape.d_model, shape.d_mlp, "mlp_hidden", "resid_post"),
    }
    d_out, d_in, reads, writes = rows[kind]
    heads = {"attn.q": shape.n_heads, "attn.o": shape.n_heads}.get(kind, shape.n_kv_heads)
    return Site(
        name=f"blocks.{layer}.{kind}",
        kind=kind,
        layer=layer,
        d_out=d_out,
        d_in=d_in,
        reads=Space(reads, layer),
        writes=Space(writes, layer),
        reads_through_norm=reads.startswith("resid") and table.pre_norm(kind) is not None,
        writes_through_norm=writes.startswith("resid") and table.post_norm(kind) is not None,
        n_heads=heads if kind.startswith("attn") else 0,
        d_head=shape.d_head if kind.startswith("attn") else 0,
    )


def part_of(site: Site, shape: ModelShape) -> Part:
    table = shape.table
    if site.kind == "embed":
        return Part(table.embed, layout="embedding")
    if site.kind == "unembed":
        return Part(table.unembed, disk=table.unembed_disk)
    return table.parts[site.kind]


def module_path(site: Site, shape: ModelShape) -> str:
    """Path of the module holding the site in the Hugging Face tree."""
    return part_of(site, shape).module.format(L=site.layer)


def row_index(site: Site, shape: ModelShape) -> Int[Tensor, " d_out"] | None:
    """Rows of the (un-transposed) fused matrix that are this site's; None when all are."""
    part = part_of(site, shape)
    if part.fused is None:
        return None
    dh, q = shape.d_head, shape.n_heads * shape.d_head
    kv = shape.n_kv_heads * shape.d_head
    if part.fused == "qkv":
        start = {"attn.q": 0, "attn.k": q, "attn.v": q + kv}[site.kind]
        return torch.arange(start, start + site.d_out)
    if part.fused == "qkv_per_head":
        slot = {"attn.q": 0, "attn.k": 1, "attn.v": 2}[site.kind]
        heads = torch.arange(shape.n_heads)[:, None] * 3 * dh + slot * dh
        return (heads + torch.arange(dh)[None]).flatten()
    assert part.fused == "gate_up", part
    start = {"mlp.gate": 0, "mlp.in": shape.d_mlp}[site.kind]
    return torch.arange(start, start + site.d_out)


def stored_shape(site: Site, shape: ModelShape) -> tuple[int, int]:
    """Shape of the whole stored tensor that holds this site, by the configuration."""
    part = part_of(site, shape)
    if part.fused in {"qkv", "qkv_per_head"}:
        rows = (shape.n_heads + 2 * shape.n_kv_heads) * shape.d_head
    else:
        rows = 2 * shape.d_mlp if part.fused == "gate_up" else site.d_out
    return (rows, site.d_in) if part.layout == "linear" else (site.d_in, rows)


def canonical(
    stored: Float[Tensor, "a b"], site: Site, shape: ModelShape
) -> Float[Tensor, "d_out d_in"]:
    """The site's own (d_out, d_in) matrix from the stored tensor; a view where rows are whole.

    Args:
        stored: the whole (possibly fused) tensor, or the site's own rows where a library has
            split it already.

    Raises:
        CheckpointError: when the shape is not what the configuration says.
    """
    part = part_of(site, shape)
    matrix = stored if part.layout == "linear" else stored.T
    if tuple(stored.shape) == stored_shape(site, shape):
        rows = row_index(site, shape)
        if rows is None:
            return matrix
        consecutive = part.fused != "qkv_per_head"
        return matrix[int(rows[0]) : int(rows[-1]) + 1] if consecutive else matrix[rows]
    if tuple(matrix.shape) == (site.d_out, site.d_in):
        return matrix
    raise wrong_shape(site, tuple(stored.shape), shape)


def wrong_shape(
    site: Site, found: tuple[int, ...], shape: ModelShape, where: str = ""
) -> CheckpointError:
    return CheckpointError(
        f"matrix {site.name}{where and ' of '}{where}",
        given=f"a stored tensor of shape {found}",
        expected=f"{stored_shape(site, shape)} by the configuration",
        remedy="The weights and config.json belong to different models.",
    )


def canonical_bias(
    stored: Float[Tensor, " n"], site: Site, shape: ModelShape
) -> Float[Tensor, " d_out"]:
    """The site's own bias from the (possibly fused) stored one."""
    rows = row_index(site, shape)
    return stored if rows is None or stored.shape[0] == site.d_out else stored[rows]
