"""The tables: one `Family` per Hugging Face ``model_type``.

``{L}`` stands for the layer. Norm gains carry an offset: Gemma multiplies by ``1 + weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mi_weightspace.core.site import Kind

Layout = Literal["linear", "conv1d", "embedding"]
Fused = Literal["qkv", "qkv_per_head", "gate_up"]
READS_ATTN: tuple[Kind, ...] = ("attn.q", "attn.k", "attn.v")
READS_MLP: tuple[Kind, ...] = ("mlp.gate", "mlp.in")


@dataclass(frozen=True)
class Part:
    """Where one canonical matrix is stored.

    Attributes:
        module: module path in the Hugging Face tree.
        layout: ``linear`` (d_out, d_in); ``conv1d`` and ``embedding`` are stored transposed.
        fused: which other matrices share the tensor, and how its rows are laid out.
        disk: key stem in safetensors where it differs from the module path.
    """

    module: str
    layout: Layout = "linear"
    fused: Fused | None = None
    disk: str | None = None

    def key(self, layer: int | None, leaf: str = "weight") -> str:
        return f"{(self.disk or self.module).format(L=layer)}.{leaf}"


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        blocks: path of the block list; ``final_norm``, ``embed``, ``unembed`` module paths.
        attn_norm, mlp_norm: pre-norms of the two branches, None where there is none.
        attn_post_norm, mlp_post_norm: norms between a branch's last matrix and the stream.
        mlp: path of the MLP module (its input is ``resid_mid`` where there is no pre-norm).
        gain_offset: added to a norm's weight to give the gain.
        parallel: attention and MLP read the same stream point.
    """

    blocks: str
    final_norm: str
    embed: str
    parts: Mapping[Kind, Part]
    attn_norm: str | None
    mlp_norm: str | None
    mlp: str
    unembed: str = "lm_head"
    unembed_disk: str | None = None
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    gain_offset: float = 0.0
    parallel: bool = False
    prefixes: tuple[str, ...] = field(default=("", "model.", "transformer."))

    def pre_norm(self, kind: Kind) -> str | None:
        if kind in READS_ATTN:
            return self.attn_norm
        if kind in READS_MLP:
            return self.mlp_norm
        return self.final_norm if kind == "unembed" else None

    def post_norm(self, kind: Kind) -> str | None:
        return {"attn.o": self.attn_post_norm, "mlp.out": self.mlp_post_norm}.get(kind)


def _parts(block: str, attn: str, mlp: str, o: str = "o_proj") -> dict[Kind, Part]:
    names: dict[Kind, str] = {
        "attn.q": f"{attn}.q_proj",
        "attn.k": f"{attn}.k_proj",
        "attn.v": f"{attn}.v_proj",
        "attn.o": f"{attn}.{o}",
        "mlp.gate": f"{mlp}.gate_proj",
        "mlp.in": f"{mlp}.up_proj",
        "mlp.out": f"{mlp}.down_proj",
    }
    return {kind: Part(f"{block}.{name}") for kind, name in names.items()}


_BLOCK = "model.layers.{L}"

LLAMA = Family(
    blocks="model.layers",
    final_norm="model.norm",
    embed="model.embed_tokens",
    parts=_parts(_BLOCK, "self_attn", "mlp"),
    attn_norm=f"{_BLOCK}.input_layernorm",
    mlp_norm=f"{_BLOCK}.post_attention_layernorm",
    mlp=f"{_BLOCK}.mlp",
)
GEMMA2 = replace(
    LLAMA,
    mlp_norm=f"{_BLOCK}.pre_feedforward_layernorm",
    attn_post_norm=f"{_BLOCK}.post_attention_layernorm",
    mlp_post_norm=f"{_BLOCK}.post_feedforward_layernorm",
    gain_offset=1.0,
)
OLMO2 = replace(
    LLAMA,
    attn_norm=None,
    mlp_norm=None,
    attn_post_norm=f"{_BLOCK}.post_attention_layernorm",
    mlp_post_norm=f"{_BLOCK}.post_feedforward_layernorm",
)
_FUSED_QKV = Part(f"{_BLOCK}.self_attn.qkv_proj", fused="qkv")
_GATE_UP = Part(f"{_BLOCK}.mlp.gate_up_proj", fused="gate_up")
PHI3 = replace(
    LLAMA,
    parts={
        "attn.q": _FUSED_QKV,
        "attn.k": _FUSED_QKV,
        "attn.v": _FUSED_QKV,
        "attn.o": Part(f"{_BLOCK}.self_attn.o_proj"),
        "mlp.gate": _GATE_UP,
        "mlp.in": _GATE_UP,
        "mlp.out": Part(f"{_BLOCK}.mlp.down_proj"),
    },
)
_H = "transformer.h.{L}"
_C_ATTN = Part(f"{_H}.attn.c_attn", layout="conv1d", fused="qkv")
GPT2 = Family(
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    embed="transformer.wte",
    parts={
        "attn.q": _C_ATTN,
        "attn.k": _C_ATTN,
        "attn.v": _C_ATTN,
        "attn.o": Part(f"{_H}.attn.c_proj", layout="conv1d"),
        "mlp.in": Part(f"{_H}.mlp.c_fc", layout="conv1d"),
        "mlp.out": Part(f"{_H}.mlp.c_proj", layout="conv1d"),
    },
    attn_norm=f"{_H}.ln_1",
    mlp_norm=f"{_H}.ln_2",
    mlp=f"{_H}.mlp",
)
GPTJ = Family(
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    embed="transformer.wte",
    parts={
        "attn.q": Part(f"{_H}.attn.q_proj"),
        "attn.k": Part(f"{_H}.attn.k_proj"),
        "attn.v": Part(f"{_H}.attn.v_proj"),
        "attn.o": Part(f"{_H}.attn.out_proj"),
        "mlp.in": Part(f"{_H}.mlp.fc_in"),
        "mlp.out": Part(f"{_H}.mlp.fc_out"),
    },
    attn_norm=f"{_H}.ln_1",
    mlp_norm=f"{_H}.ln_1",
    mlp=f"{_H}.mlp",
    parallel=True,
)
_NEOX = "gpt_neox.layers.{L}"
_NEOX_QKV = Part(f"{_NEOX}.attention.query_key_value", fused="qkv_per_head")
GPT_NEOX = Family(
    blocks="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    embed="gpt_neox.embed_in",
    unembed="lm_head",
    unembed_disk="embed_out",
    parts={
        "attn.q": _NEOX_QKV,
        "attn.k": _NEOX_QKV,
        "attn.v": _NEOX_QKV,
        "attn.o": Part(f"{_NEOX}.attention.dense"),
        "mlp.in": Part(f"{_NEOX}.mlp.dense_h_to_4h"),
        "mlp.out": Part(f"{_NEOX}.mlp.dense_4h_to_h"),
    },
    attn_norm=f"{_NEOX}.input_layernorm",
    mlp_norm=f"{_NEOX}.post_attention_layernorm",
    mlp=f"{_NEOX}.mlp",
    parallel=True,
    prefixes=("", "gpt_neox."),
)

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": replace(LLAMA, gain_offset=1.0),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "olmo": LLAMA,
    "olmo2": OLMO2,
    "phi3": PHI3,
}
