"""A sweep over one matrix under a memory limit, in a process of its own; prints what it took.

python trust_processes_memory.py FOLDER ROWS COLUMNS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import mi_weightspace as mw
from benchmarks.machine import Peak
from mi_weightspace.core.seeds import generator
from mi_weightspace.spectral import blocks
from mi_weightspace.spectral.blocks import private_bytes, workers_within


def write(folder: Path, d: int, n: int) -> None:
    """Two one-layer checkpoints that differ in the last matrix, (d, n); the others are zeros."""
    config = LlamaConfig(
        hidden_size=d, intermediate_size=n, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=64, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    draw, low = generator(0, "memory"), torch.bfloat16
    matrix = 0.02 * torch.randn(d, n, generator=draw)
    for stage in ("base", "sft"):
        layer = "model.layers.0."

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=low)

        tensors = {f"{layer}self_attn.{k}_proj.weight": zeros(d, d) for k in "qkvo"}
        tensors |= {f"{layer}mlp.{k}_proj.weight": zeros(n, d) for k in ("gate", "up")}
        names = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{layer}{k}.weight": torch.ones(d, dtype=low) for k in names}
        tensors |= {k: zeros(64, d) for k in ("model.embed_tokens.weight", "lm_head.weight")}
        tensors["model.norm.weight"] = torch.ones(d, dtype=low)
        tensors[f"{layer}mlp.down_proj.weight"] = matrix.to(low)
        (folder / stage).mkdir(parents=True)
        save_file(tensors, folder / stage / "model.safetensors", {"format": "pt"})
        config.save_pretrained(folder / stage)
        matrix += 1e-3 * torch.randn(d, n, generator=draw)


def least(sites: list[mw.Site]) -> float:
    """The smallest limit that is accepted, bytes."""
    low, high = 0.0, 64e9
    while high - low > 1e5:
        middle = (low + high) / 2
        try:
            workers_within(middle, 1, sites)
            high = middle
        except ValueError:
            low = middle
    return high


def main() -> None:
    torch.set_num_threads(1)
    folder, d, n = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:  # in a fresh process: what the writing took is not part of it
        difference = mw.load_lineage(base=folder / "base", sft=folder / "sft").diff("base", "sft")
        sites = difference.sites("blocks.0.mlp.out")
        limit, before = 1.02 * least(sites), private_bytes()
        used = [0]
        whole = blocks.Blocks.__iter__
        blocks.Blocks.__iter__ = lambda self: (used.append(self.rows), whole(self))[1]
        peak = Peak(0.001)
        peak.start()
        mw.svd(difference, "blocks.0.mlp.out", rank=8, memory_limit=limit / 1e9, progress=False)
        print(
            json.dumps({"limit": limit, "before": before, "peak": peak.stop(), "rows": max(used)})
        )
        return
    write(folder, d, n)
    import subprocess

    subprocess.run([sys.executable, *sys.argv, "measure"], check=True)


if __name__ == "__main__":
    main()
