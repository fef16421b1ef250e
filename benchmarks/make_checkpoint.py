"""A Llama-shaped family of checkpoints of any size, with a planted truth: real bytes on disk.

    python benchmarks/make_checkpoint.py --out DIR --preset 13B --layers 1

Stages ``base``, ``sft``, ``dpo`` in bfloat16, one safetensors file a layer, written layer by layer
(memory: one matrix). Spectra as trained matrices have them: Gaussian entries with log-normal row
sizes, a few rogue rows, a power-law top, and changes that are dense noise with a falling top of
their own. Planted: SFT writes one direction of the residual stream with one output matrix
(``truth.json`` says which); DPO changes everything and writes nothing along it. Beside the stages,
``probes.safetensors``: that direction and 15 that are planted nowhere, each with 39 controls that
share the rogue coordinates. No tokenizer, no usable model.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import save_direction
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space

VOCABULARY = 512
"""Kept small: a vocabulary's matrices are not part of a sweep over blocks."""


@dataclass(frozen=True)
class Family:
    """Sizes of a Llama-like architecture and what is planted in it.

    Attributes:
        relative: size of SFT's change, relative; DPO's is a third of it.
        spike: the planted write, in units of the change's noise edge.
        n_rogue: residual coordinates whose rows are three times as large.
    """

    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    relative: float = 0.02
    spike: float = 3.0
    n_rogue: int = 3


PRESETS = {
    "tiny": Family(64, 176, 4, 4, 2),
    "1B": Family(2048, 5632, 32, 32, 22),
    "7B": Family(4096, 11008, 32, 32, 32),
    "13B": Family(5120, 13696, 40, 40, 40),
    "70B": Family(8192, 28672, 64, 8, 80),
}


def matrices(family: Family) -> dict[str, tuple[int, int]]:
    """The seven matrices of a block, by their Llama names; (d_out, d_in)."""
    d, kv = family.d_model, family.d_model // family.n_heads * family.n_kv_heads
    return {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (family.d_mlp, d),
        "mlp.up_proj": (family.d_mlp, d),
        "mlp.down_proj": (d, family.d_mlp),
    }


def base_matrix(family: Family, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Gaussian, log-normal row sizes, rogue residual rows, a power-law top of sixteen."""
    m, n = shape
    matrix = 0.02 * torch.randn(m, n, generator=draw)
    matrix *= torch.exp(0.2 * torch.randn(m, 1, generator=draw))
    if m == family.d_model:
        matrix[: family.n_rogue] *= 3
    edge = 0.02 * (math.sqrt(m) + math.sqrt(n))
    matrix += _top(m, n, 3 * edge * torch.arange(1, 17).pow(-0.7), draw)
    return matrix


def change_of(base: Tensor, relative: float, draw: torch.Generator) -> Tensor:
    """Noise in proportion to the row sizes, with eight directions above its edge."""
    m, n = base.shape
    size = relative * base.norm(dim=1, keepdim=True) / math.sqrt(n)
    noise = torch.randn(m, n, generator=draw) * size
    edge = float(size.mean()) * (math.sqrt(m) + math.sqrt(n))
    return noise + _top(m, n, edge * torch.linspace(2.0, 1.3, 8), draw)


def _top(m: int, n: int, sizes: Tensor, draw: torch.Generator) -> Tensor:
    """A sum of random rank-one parts of these sizes; nearly orthogonal."""
    left = torch.randn(m, len(sizes), generator=draw) / math.sqrt(m)
    right = torch.randn(len(sizes), n, generator=draw) / math.sqrt(n)
    return (left * sizes) @ right


def make(out: Path, family: Family, *, layers: int, seed: int = 0) -> Path:
    """Write the family; the folder."""
    planted_layer = layers // 2
    point = Space.parse(f"resid_post.{planted_layer}")
    truth = {
        "stage": "sft",
        "site": f"blocks.{planted_layer}.mlp.out",
        "direction": f"planted@{point}",
    }
    probes = directions(family, point, seed=seed)
    probe = probes[0].pattern
    for stage in ("base", "sft", "dpo"):
        (out / stage).mkdir(parents=True, exist_ok=True)
        (out / stage / "config.json").write_text(json.dumps(config(family, layers)))
    index: dict[str, str] = {}
    for layer in range(layers):
        shards: dict[str, dict[str, Tensor]] = {s: {} for s in ("base", "sft", "dpo")}
        for name, shape in matrices(family).items():
            draw = generator(seed, "checkpoint", layer, name)
            base = base_matrix(family, shape, draw)
            sft = base + change_of(base, family.relative, draw)
            if layer == planted_layer and name == "mlp.down_proj":
                row_size = family.relative * float(base.norm()) / math.sqrt(shape[0] * shape[1])
                edge = row_size * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
                key = torch.randn(shape[1], generator=draw)
                sft += family.spike * edge * torch.outer(probe, key / key.norm())
            dpo = sft + change_of(base, family.relative / 3, draw)
            for stage, matrix in (("base", base), ("sft", sft), ("dpo", dpo)):
                shards[stage][f"model.layers.{layer}.{name}.weight"] = matrix.bfloat16()
        for stage, tensors in shards.items():
            for norm in ("input_layernorm", "post_attention_layernorm"):
                draw = generator(seed, "gain", layer, norm)  # the same in every stage
                gain = 0.5 * (0.3 * torch.randn(family.d_model, generator=draw)).exp()
                tensors[f"model.layers.{layer}.{norm}.weight"] = gain.bfloat16()
            file = f"model-{layer:05d}.safetensors"
            save_file(tensors, out / stage / file, {"format": "pt"})
            index |= dict.fromkeys(tensors, file)
    ends = _ends(family, seed)
    for stage in ("base", "sft", "dpo"):
        save_file(ends, out / stage / "model-ends.safetensors", {"format": "pt"})
        whole = {"weight_map": index | dict.fromkeys(ends, "model-ends.safetensors")}
        (out / stage / "model.safetensors.index.json").write_text(json.dumps(whole))
    save_direction(probes, out / "probes.safetensors")
    (out / "truth.json").write_text(json.dumps(truth))
    return out


def directions(
    family: Family, point: Space, *, seed: int, n: int = 16, n_controls: int = 39
) -> list[Direction]:
    """The planted direction first; all rows share the size of the rogue coordinates."""
    draw = generator(seed, "directions")
    rows = torch.randn(n, 1 + n_controls, family.d_model, generator=draw)
    rows[..., : family.n_rogue] *= 10
    rows /= rows.norm(dim=-1, keepdim=True)
    return [
        Direction(
            own[0],
            point,
            label="planted" if i == 0 else f"decoy {i}",
            filter=own[0],
            control_patterns=own[1:],
            control_filters=own[1:],
        )
        for i, own in enumerate(rows)
    ]


def config(family: Family, layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": family.d_model,
        "intermediate_size": family.d_mlp,
        "num_attention_heads": family.n_heads,
        "num_key_value_heads": family.n_kv_heads,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _ends(family: Family, seed: int) -> dict[str, Tensor]:
    draw = generator(seed, "embedding")
    shape = (VOCABULARY, family.d_model)
    return {
        "model.embed_tokens.weight": (0.02 * torch.randn(shape, generator=draw)).bfloat16(),
        "lm_head.weight": (0.02 * torch.randn(shape, generator=draw)).bfloat16(),
        "model.norm.weight": torch.ones(family.d_model, dtype=torch.bfloat16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--layers", type=int, default=0, help="0: all of the preset")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    family = PRESETS[options.preset]
    print(make(options.out, family, layers=options.layers or family.n_layers, seed=options.seed))


if __name__ == "__main__":
    main()
