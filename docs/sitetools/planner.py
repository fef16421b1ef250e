"""Planner tables: what a job of a given model size costs, by the measured laws.

Everything here is an extrapolation from one machine: shapes of published Llama 2 models, times an
amount of work that is counted, times a rate that was measured on matrices of 5120 × 13696.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LARGE = (5120, 13696)
BOTH = ("svd_base", "project_999")
N_CHECKPOINTS, N_DIFFERENCES, BYTES = 3, 2, 2
DISK = (1e9, 3e9)
VPD_BLOCKS, VPD_COMPONENTS, VPD_BATCH, VPD_LENGTH = 5, 128, 4, 256


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model: q, k, v, o, gate, up and down of every block."""

    name: str
    layers: int
    d: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each matrix of one block."""
        kv = self.d // self.heads * self.kv_heads
        square, up = (self.d, self.d), (self.hidden, self.d)
        attention = {"q": square, "k": (kv, self.d), "v": (kv, self.d), "o": square}
        return attention | {"gate": up, "up": up, "down": (self.d, self.hidden)}

    @property
    def entries(self) -> int:
        """Of all decomposable matrices of the blocks."""
        return self.layers * sum(m * n for m, n in self.matrices.values())

    @property
    def largest(self) -> int:
        return max(m * n for m, n in self.matrices.values())


SHAPES = (
    Shape("7B", 32, 4096, 11008, 32, 32),
    Shape("13B", 40, 5120, 13824, 40, 40),
    Shape("70B", 80, 8192, 28672, 64, 8),
)


@cache
def kernel_seconds() -> float:
    """CPU seconds of the triplets of one large matrix, as last measured."""
    rows = json.loads((RESULTS / "svd_diff_5120x13696.json").read_text())["rows"]
    found = [row["ms"] for row in rows if row["method"] == "**this library**"]
    assert len(found) == 1, "the benchmark names its rows otherwise now"
    return found[0] / 1000


def sweep_seconds(shape: Shape, each: float) -> float:
    """CPU seconds of two differences: work per entry is constant, entries are counted."""
    return N_DIFFERENCES * shape.entries * each / (LARGE[0] * LARGE[1])


@cache
def layer_seconds(*jobs: str) -> float:
    """CPU seconds of these jobs for one large matrix, as last measured on whole 13B layers."""
    rows = json.loads((RESULTS / "sweep.json").read_text())["rows"]
    (row,) = [row["free"] for row in rows if row["size"] == "13B"]
    return sum(row[job] for job in jobs) * LARGE[0] * LARGE[1] / row["entries"]


def sweep_table() -> str:
    """The SVD sweep of base → SFT → DPO."""
    rows = [
        "| | " + " | ".join(s.name for s in SHAPES) + " |",
        "|---|" + "---|" * len(SHAPES),
        _row("blocks, width, hidden", lambda s: f"{s.layers}, {s.d:,}, {s.hidden:,}"),
        _row("matrices", lambda s: f"{s.layers * len(s.matrices)}"),
        _row("entries of one checkpoint's matrices", lambda s: f"{s.entries / 1e9:.1f} G"),
        _row("bytes read, 3 checkpoints in bfloat16", lambda s: _bytes(_read(s))),
        _row("reading at 1 GB/s", lambda s: _time(_read(s) / DISK[0])),
        _row("reading at 3 GB/s", lambda s: _time(_read(s) / DISK[1])),
        _row("triplets alone, CPU", lambda s: _time(sweep_seconds(s, kernel_seconds()))),
        _row(
            "whole `svd`, `compare_base=False`, CPU",
            lambda s: _time(sweep_seconds(s, layer_seconds("svd"))),
        ),
        _row("whole `svd`, CPU", lambda s: _time(sweep_seconds(s, layer_seconds("svd_base")))),
        _row(
            "`project`, 16 probes, 39 controls each, 999 flips, CPU",
            lambda s: _time(sweep_seconds(s, layer_seconds("project_999"))),
        ),
        _row("both on 2 cores", lambda s: _time(sweep_seconds(s, layer_seconds(*BOTH)) / 2)),
        _row("both on 32 cores", lambda s: _time(sweep_seconds(s, layer_seconds(*BOTH)) / 32)),
        _row("largest matrix, its difference in float32", lambda s: _bytes(4 * s.largest)),
    ]
    return "\n".join(rows)


def vpd_table() -> str:
    """VPD of two differences at MLP sites of five blocks, by the library's own planner."""
    plans = {shape.name: _plan(shape) for shape in SHAPES}
    rows = [
        "| | " + " | ".join(plans) + " |",
        "|---|" + "---|" * len(plans),
        "| matrices, components | "
        + " | ".join(
            f"{len(p.sites)}, {sum(s.n_components for s in p.sites):,}" for p in plans.values()
        )
        + " |",
        "| FLOP a token | "
        + " | ".join(f"{p.flops_per_step / (p.batch * p.length):.2g}" for p in plans.values())
        + " |",
        "| memory on one accelerator | "
        + " | ".join(_bytes(p.on_accelerator) for p in plans.values())
        + " |",
        "| tokens a second there, assumed efficiency | "
        + " | ".join(f"{p.tokens_per_second:,.0f}" for p in plans.values())
        + " |",
    ]
    return "\n".join(rows)


def measured_table() -> str:
    """The benchmark's own table: one 5120 × 13696 pair."""
    rows = json.loads((RESULTS / "svd_diff_5120x13696.json").read_text())["rows"]
    lines = ["| method | CPU ms | error of s | error of a cosine |", "|---|---|---|---|"]
    for row in rows:
        errors = [f"{row[k]:.0e}" if k in row else "–" for k in ("values", "cosine")]
        lines.append(f"| {row['method']} | {row['ms']:,.0f} | {errors[0]} | {errors[1]} |")
    return "\n".join(lines)


def _plan(shape: Shape):
    from transformers import LlamaConfig

    from mi_weightspace.vpd.config import make_config
    from mi_weightspace.vpd.differences.planning import plan_difference

    blocks = range(shape.layers - VPD_BLOCKS, shape.layers)
    sites = tuple(f"blocks.{b}.mlp.{kind}" for b in blocks for kind in ("gate", "out"))
    config = make_config(
        {
            "sites": sites,
            "n_components": VPD_COMPONENTS,
            "init": "svd",
            "faithfulness": {"weight": 0.0},
            "precision": "bfloat16",
            "batch_size": VPD_BATCH,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.d,
            intermediate_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder)
        return plan_difference(
            folder, config, n_stages=N_DIFFERENCES, length=VPD_LENGTH, dtype="bfloat16"
        )


def _read(shape: Shape) -> float:
    return N_CHECKPOINTS * BYTES * shape.entries


def _row(name: str, of) -> str:
    return f"| {name} | " + " | ".join(of(shape) for shape in SHAPES) + " |"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
