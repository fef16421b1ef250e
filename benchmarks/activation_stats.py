"""Time of every activation statistic at the size of an 8B model, after the forward passes.

40 points × width 5120 × 50 pairs × 10 contrasts × 3 stages of synthetic float32 activations:
mean-shift sweep with 10,000 sign flips and 10,000 bootstraps, a probe bank for each stage, and
ridge probes with 1,000 permutations on every contrast of every stage. Goal: under 60 s of CPU
(which is what is compared with the goal: it does not depend on what else the machine does).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import probes
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import cluster_index, studentised_max_p
from mi_weightspace.core.space import Space
from probes.gather import stack
from probes.linear import from_gram, permuted_aurocs
from probes.shift_stats import geometry
from probes.validation import hold_out

GOAL_S = 60.0


def synthetic(size: argparse.Namespace) -> dict[str, PairedActivations]:
    """Item variance, a few loud coordinates, a shift of the target that grows with the stage."""
    pairs = tuple(
        Pair(f"item{i}", f"+{i}", f"-{i}", split="heldout_register" if i % 5 == 4 else "fit")
        for i in range(size.pairs)
    )
    names = ["target", *(f"control{i}" for i in range(1, size.contrasts))]
    kinds = ["target", *["control"] * (size.contrasts - 1)]
    every = tuple(Contrast(n, k, pairs) for n, k in zip(names, kinds, strict=True))  # pyright: ignore[reportArgumentType]
    contrasts = ContrastSet("synthetic", every)
    points = tuple(Space("resid_post", layer) for layer in range(size.points))
    stages = {}
    for s in range(size.stages):
        values = {}
        for name in names:
            for point in points:
                draw = generator(0, name, point.name)
                value = torch.randn(size.pairs, 2, size.width, generator=draw)
                value += torch.randn(size.pairs, 1, size.width, generator=draw)
                value[..., :3] *= 30
                value[:, 0, 5:60] += 0.3 * (1 + s) if name == "target" else 0.3
                values[name, point.name] = value
        stage = f"stage{s}"
        stages[stage] = PairedActivations(stage, stage, contrasts, "last", points, values, {}, {})
    return stages


def ridge_everywhere(stages: dict[str, PairedActivations], n_permutations: int) -> None:
    for activations in stages.values():
        for contrast in activations.contrasts:
            values = stack(activations, contrast.name, activations.points)
            clusters = cluster_index([p.cluster_id for p in contrast.pairs])
            kernel = from_gram(geometry(list(values)).rows, values.shape[-1])
            held = hold_out("ridge", values, clusters, kernel)
            null = permuted_aurocs(held.ops, clusters, n_permutations, seed=0)
            studentised_max_p(held.auroc, null)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"points": 40, "width": 5120, "pairs": 50, "contrasts": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    size = parser.parse_args()
    torch.set_num_threads(size.threads)
    stages = synthetic(size)
    before = peak_gib()
    steps: dict[str, Callable[[], Any]] = {
        "sweep, 10,000 flips and bootstraps": lambda: probes.dmu_sweep(
            stages, n_flips=10_000, n_bootstrap=10_000, progress=False
        ),
        "probe banks (lda) with controls": lambda: [
            probes.fit(a, progress=False) for a in stages.values()
        ],
        "ridge, 1,000 permutations": lambda: ridge_everywhere(stages, 1000),
    }
    cpu, wall = {}, {}
    for name, step in steps.items():
        start, busy = time.perf_counter(), time.process_time()
        step()
        wall[name], cpu[name] = time.perf_counter() - start, time.process_time() - busy
    total = sum(cpu.values())
    shape = f"{size.points} points × {size.width} × {size.pairs} pairs × {size.contrasts} contrasts"
    table = Table(title=f"{shape} × {size.stages} stages, {size.threads} threads, n = 1 run")
    for column in ("step", "CPU s", "wall s", "share of CPU"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, value in cpu.items():
        table.add_row(name, f"{value:.1f}", f"{wall[name]:.1f}", f"{100 * value / total:.0f} %")
    share = f"{total / GOAL_S:.2f} of the goal of {GOAL_S:.0f} s"
    table.add_row("total", f"{total:.1f}", f"{sum(wall.values()):.1f}", share)
    console = Console()
    console.print(table)
    console.print(f"memory: {before:.1f} GiB of activations, {peak_gib():.1f} GiB at the peak")
    return int(total > GOAL_S)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    sys.exit(main())
