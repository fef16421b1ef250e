"""What a step of difference-VPD costs against width and depth, and what that says of 13B.

``python benchmarks/diff_vpd_scale.py [--rounds N] [--check]``. Llama-shaped models with random
weights, moved by a dense random update; decomposed are ``mlp.gate`` and ``mlp.out`` of the last two
blocks (C = 16, batch 4 × 64, float32, one thread). One training step of every size a round, in an
order that turns from round to round; CPU seconds, the median over rounds. Three sizes are each run
in a process of their own for the peak of memory.

The law is fitted by least squares of relative errors:

    seconds = a · FLOPs + b · bytes + c

with the operations and the bytes of the weights a step reads, both as `plan_difference` and the
shapes say: a step reads the whole model once, every block a masked pass runs again (twice: forward
and backward), and the updates likewise. Coefficients are kept non-negative.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from vpd_step import machine

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.differences.planning import (
    ACCELERATOR_FLOPS,
    ACCELERATOR_SHARE,
    DifferencePlan,
    plan_difference,
)
from mi_weightspace.vpd.differences.stages import host_of
from mi_weightspace.vpd.train import start, train_step

OUT = Path(__file__).parent / "results"
LENGTH, BATCH, VOCAB = 64, 4, 2_048
WARMUP_ROUNDS = 1
LIMIT = 0.35
"""Largest relative residual of the fitted law under ``--check``."""
SEED_SITES = tuple(
    f"blocks.{layer}.mlp.{k}" for layer in (5, 29, 31, 36, 39) for k in ("gate", "out")
)
THIRTEEN = {
    "hidden_size": 5_120,
    "intermediate_size": 13_696,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32_000,
    "max_position_embeddings": 4_096,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Size:
    """One synthetic checkpoint: d_mlp is 8/3 of the width, rounded to a multiple of 32."""

    d: int
    layers: int

    @property
    def name(self) -> str:
        return f"d{self.d}_L{self.layers}"

    @property
    def sites(self) -> tuple[str, ...]:
        last = range(self.layers - 2, self.layers)
        return tuple(f"blocks.{layer}.mlp.{kind}" for layer in last for kind in ("gate", "out"))

    def shape(self) -> dict[str, Any]:
        return {
            "hidden_size": self.d,
            "intermediate_size": 32 * round(self.d * 8 / 3 / 32),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.d // 32,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
        }


_WIDTHS_AND_DEPTHS = (
    *((64, 2), (64, 8), (128, 4), (256, 2), (256, 8)),
    *((512, 2), (512, 4), (512, 8), (768, 4)),
)
SIZES = tuple(Size(*pair) for pair in _WIDTHS_AND_DEPTHS)
MEMORY_OF = (Size(256, 8), Size(512, 4), SIZES[-1])


def settings(size: Size) -> VPDConfig:
    return make_config(
        {
            "sites": size.sites,
            "n_components": 16,
            "init": "svd",
            "faithfulness": {"weight": 0.0},
            "n_steps": 100,
            "batch_size": BATCH,
        }
    )


def stages(size: Size) -> dict[str, Any]:
    """A random model, and the same with every matrix of the sites' blocks moved."""
    config = transformers.LlamaConfig(**size.shape(), tie_word_embeddings=False, use_cache=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(config).float().eval()
    tuned, draw = copy.deepcopy(base), generator(0, "update", size.d, size.layers)
    with torch.no_grad():
        for name, matrix in tuned.named_parameters():
            if ".mlp." in name:
                matrix.add_(0.1 * matrix.std() * torch.randn(matrix.shape, generator=draw))
    return {"base": base, "tuned": tuned}


class Run:
    """One size, ready to take steps."""

    def __init__(self, size: Size) -> None:
        config = settings(size)
        self.host = host_of(
            Lineage(stages(size)), [f"{s}@tuned" for s in size.sites], config, "tuned"
        )
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator(0, "tokens"))
        self.tokens, self.config = tokens, config
        with self.host.prepared(config.speed):
            self.state = start(self.host, self.host.clean(tokens), config)

    def step(self) -> float:
        """CPU seconds of one training step."""
        with self.host.prepared(self.config.speed):
            begin = time.process_time()
            train_step(self.state, self.host.clean(self.tokens))
            return time.process_time() - begin


def measure(sizes: tuple[Size, ...], rounds: int) -> dict[str, float]:
    runs = {size.name: Run(size) for size in sizes}
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for r in range(rounds + WARMUP_ROUNDS):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = runs[name].step()
            if r >= WARMUP_ROUNDS:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(key: str) -> float:
    """Bytes of a line of this process' status (Linux): ``VmRSS`` now, ``VmHWM`` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(key)).split()[1])


def growth_of(size: Size) -> float:
    """Bytes by which loading both stages from disk and two steps raise a process' peak.

    In a process of its own, since a peak never falls.
    """
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: f"{folder}/{name}" for name in ("base", "tuned")}
        subprocess.run([sys.executable, __file__, "--save", size.name, folder], check=True)
        Run(SIZES[0]).step()  # libraries and kernels are there before the measurement begins
        gc.collect()
        before, config = resident("VmRSS"), settings(size)
        host = host_of(Lineage(folders), [f"{s}@tuned" for s in size.sites], config, "tuned")
        tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator(0, "tokens"))
        with host.prepared(config.speed):
            state = start(host, host.clean(tokens), config)
            for _ in range(2):
                train_step(state, host.clean(tokens))
    return resident("VmHWM") - before


# ---- the law -----------------------------------------------------------------------------------
def planned(shape: dict[str, Any], config: VPDConfig, **options: Any) -> DifferencePlan:
    with tempfile.TemporaryDirectory() as folder:
        own = transformers.LlamaConfig(**shape, tie_word_embeddings=False)
        own.architectures = ["LlamaForCausalLM"]
        own.save_pretrained(folder)
        return plan_difference(folder, config, **options)


def weight_bytes(plan: DifferencePlan, shape: dict[str, Any], first: int, item: int) -> float:
    """Bytes of weights a step reads: the model once, blocks from `first` on and the head twice a
    masked pass, the updates (float32 in a float32 model) likewise."""
    n_layers, d, wide = (
        shape[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    block = 4 * d * d + 3 * d * wide
    head = d * shape["vocab_size"]
    passes = 4  # uniform, two ascents, persistent
    updates = sum(s.d_out * s.d_in for s in plan.sites) * plan.n_stages
    again = 2 * passes * ((n_layers - first) * block + head + updates)
    return float(item * (n_layers * block + head + again))


def fit(x: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative coefficients that minimise the squared *relative* error, over all subsets of
    columns (three are few enough)."""
    best, found = np.inf, np.zeros(x.shape[1])
    rows = x / seconds[:, None]
    for size in range(1, x.shape[1] + 1):
        for columns in itertools.combinations(range(x.shape[1]), size):
            part, *_ = np.linalg.lstsq(rows[:, columns], np.ones(len(rows)), rcond=None)
            error = float(((rows[:, columns] @ part - 1) ** 2).sum())
            if (part >= 0).all() and error < best:
                best, found = error, np.zeros(x.shape[1])
                found[list(columns)] = part
    return found


def table(times: dict[str, float], sizes: tuple[Size, ...]) -> tuple[list[dict[str, Any]], Any]:
    rows = []
    for size in sizes:
        plan = planned(size.shape(), settings(size), length=LENGTH, dtype="float32")
        rows.append(
            {
                "size": size.name,
                "d": size.d,
                "layers": size.layers,
                "seconds": times[size.name],
                "flops": plan.flops_per_step,
                "bytes": weight_bytes(plan, size.shape(), size.layers - 2, 4),
                "planned_memory": plan.growth + plan.model,
            }
        )
    x = np.array([[r["flops"], r["bytes"], 1.0] for r in rows])
    law = fit(x, np.array([r["seconds"] for r in rows]))
    for row, values in zip(rows, x, strict=True):
        row["fitted"] = float(values @ law)
        row["residual"] = row["fitted"] / row["seconds"] - 1
    return rows, law


def prediction(law: Any) -> dict[str, Any]:
    """The seed's sites of a 13B model, two stages, C = 128, bfloat16."""
    config = make_config(
        {
            "sites": SEED_SITES,
            "n_components": 128,
            "init": "svd",
            "faithfulness": {"weight": 0.0},
            "precision": "bfloat16",
            "batch_size": 4,
            "n_steps": 10_000,
        }
    )
    plan = planned(THIRTEEN, config, n_stages=2, length=256)
    size = weight_bytes(plan, THIRTEEN, 5, 2)
    seconds = float(np.array([plan.flops_per_step, size, 1.0]) @ law)
    tokens = plan.batch * plan.length
    return {
        "plan": str(plan),
        "flops": plan.flops_per_step,
        "bytes": size,
        "seconds_here": seconds,
        "tokens_per_second_here": tokens / seconds,
        "accelerator_bytes": plan.on_accelerator,
        "accelerator_tokens_per_second": plan.tokens_per_second,
    }


# ---- report ------------------------------------------------------------------------------------
def markdown(record: dict[str, Any]) -> str:
    law, far = record["law"], record["prediction"]
    lines = [
        "# Difference-VPD against size",
        "",
        f"Llama-shaped, random; `mlp.gate` and `mlp.out` of the last two blocks, C = 16, batch "
        f"{BATCH} × {LENGTH}, vocabulary {VOCAB}, float32, one thread; CPU seconds, median of "
        f"{record['rounds']} interleaved rounds. Load average at the end {record['load']:.1f}.",
        "",
        ", ".join(f"{k} {v}" for k, v in record["machine"].items()),
        "",
        "| d | layers | CPU ms a step | GFLOP a step | GFLOP/s | law ms | residual | "
        "peak memory MB | planned MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        grown = record["memory"].get(r["size"])
        peak = "" if grown is None else f"{grown / 1e6:.0f}"
        lines.append(
            f"| {r['d']} | {r['layers']} | {1e3 * r['seconds']:.0f} | {r['flops'] / 1e9:.2f} | "
            f"{r['flops'] / r['seconds'] / 1e9:.0f} | {1e3 * r['fitted']:.0f} | "
            f"{r['residual']:+.0%} | {peak} | {r['planned_memory'] / 1e6:.0f} |"
        )
    lines += [
        "",
        f"Law: seconds = {law[0]:.3g} · FLOPs + {law[1]:.3g} · bytes + {law[2]:.3g} "
        f"({_rate(law[0], 'GFLOP', 'FLOPs')}, {_rate(law[1], 'GB', 'bytes')}); largest residual "
        f"{max(abs(r['residual']) for r in record['rows']):.0%}. Peak memory: of a process that "
        "loads both stages from disk and takes two steps, beyond its libraries; planned: model, "
        "training and the slack of the allocator.",
        "",
        "## 13B at the seed's sites",
        "",
        "Extrapolated far beyond what was measured: the law says "
        f"{far['seconds_here'] / 3600:.2g} h a step of {far['flops']:.3g} FLOP on one core here, "
        f"{far['tokens_per_second_here']:.2g} tokens a second (were the memory there).",
        "",
        f"One 80 GB accelerator: {far['accelerator_bytes'] / 1e9:.3g} GB and about "
        f"{far['accelerator_tokens_per_second']:,.0f} tokens a second, assuming "
        f"{ACCELERATOR_SHARE:.0%} of {ACCELERATOR_FLOPS / 1e12:.0f} TFLOP/s (a data sheet's number "
        "and an assumption).",
        "",
        "| GPU | tokens a second |",
        "|---|---|",
        f"| any | {record['gpu']} |",
        "",
        "```",
        far["plan"],
        "```",
    ]
    return "\n".join(lines) + "\n"


def _rate(coefficient: float, unit: str, what: str) -> str:
    return f"{1e-9 / coefficient:.3g} {unit}/s" if coefficient > 0 else f"{what} explain nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail where the law misses a size")
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    by_name = {size.name: size for size in SIZES}
    if options.save:
        for name, model in stages(by_name[options.save[0]]).items():
            model.save_pretrained(f"{options.save[1]}/{name}")
        return 0
    if options.memory:
        print(growth_of(by_name[options.memory]))
        return 0
    times = measure(SIZES, options.rounds)
    rows, law = table(times, SIZES)
    memory = {size.name: peak_of(size) for size in MEMORY_OF}
    record = {
        "machine": machine(),
        "rounds": options.rounds,
        "rows": rows,
        "law": [float(v) for v in law],
        "memory": memory,
        "prediction": prediction(law),
        "gpu": "not measured",
        "load": os.getloadavg()[0],
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "diff_vpd_scale.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    (OUT / "diff_vpd_scale.md").write_text(text)
    print(text)
    worst = max(abs(r["residual"]) for r in rows)
    print(f"largest residual {worst:.0%}, limit {LIMIT:.0%}")
    return int(options.check and worst > LIMIT)


def peak_of(size: Size) -> float:
    command = [sys.executable, __file__, "--memory", size.name]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(said.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
