"""Leading singular triplets of a weight difference: this library against the usual routes.

One interleaved run, CPU seconds at one thread, from two bfloat16 matrices to the answer. The
planted difference is a dense change with eight spikes above its noise edge. Errors are against
ARPACK in float64 run to machine precision. ``python benchmarks/svd_diff.py [--full] [--check]``.

The floor is the least any route can do: form the difference once, with the entry statistics a
report needs (norms, mean size, share of changed entries, overlap with the earlier matrix), and
multiply it by sixteen vectors from each side. The lean floor forms it without any statistic.
``--full`` also runs Gram and full SVD once, and a LoRA adapter of rank 16 in closed form.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.spectral.decompose import factored_svd
from mi_weightspace.spectral.form import form
from mi_weightspace.spectral.krylov import leading_triplets

RANK = 8
WIDTH = 16
SIZES = {"default": (1536, 4096), "full": (5120, 13696)}
Answer = tuple[Tensor, Tensor]
"""(singular values (k,), left vectors (k, m))."""
LIMITS = {"over_floor": 3.5, "svd_lowrank": 4.5, "propack": 2.8}
"""Alarms for ``--full --check``, a tenth beyond what was measured."""
_FLOOR: dict[tuple[int, ...], Tensor] = {}
OUT = Path(__file__).parent / "results"


def planted(m: int, n: int) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices whose difference has spikes at 4 … 1.5 times its noise edge."""
    draw = generator(0, "benchmark", m, n)
    before = 0.02 * torch.randn(m, n, generator=draw)
    sigma = 2e-4
    edge = sigma * (math.sqrt(m) + math.sqrt(n))
    left = torch.linalg.qr(torch.randn(m, RANK, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(n, RANK, generator=draw))[0]
    sizes = edge * torch.linspace(4.0, 1.5, RANK)
    change = sigma * torch.randn(m, n, generator=draw) + (left * sizes) @ right.T
    return before.bfloat16(), (before + change).bfloat16()


def floor(a: Tensor, b: Tensor) -> None:
    """Form with statistics, then two thin products."""
    _thin_products(form(a, b, reuse=True).matrix)


def lean_floor(a: Tensor, b: Tensor) -> None:
    """Subtract in chunks that fit the cache into memory at hand, then two thin products."""
    d = _FLOOR.setdefault(tuple(a.shape), torch.empty_like(a))
    rows = max(1, 2**18 // a.shape[1])
    for start in range(0, a.shape[0], rows):
        part = slice(start, start + rows)
        d[part] = b[part].float() - a[part].float()
    _thin_products(d)


def _thin_products(d: Tensor) -> None:
    torch.matmul(d, torch.ones(d.shape[1], WIDTH, dtype=d.dtype))
    torch.matmul(torch.ones(WIDTH, d.shape[0], dtype=d.dtype), d)


def ours(
    a: Tensor, b: Tensor, *, polished: bool = False, dtype: torch.dtype | None = None
) -> Answer:
    d = form(a, b, reuse=True).matrix  # as in a sweep
    d = d if dtype is None else d.to(dtype)
    draw = generator(0, "svd", "benchmark")
    found = leading_triplets(d, RANK, generator=draw, polished=polished)
    return found.scale, found.left


def subtract(a: Tensor, b: Tensor) -> Tensor:
    return b.float() - a.float()


def lowrank(a: Tensor, b: Tensor, q: int, niter: int) -> Answer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        u, s, _ = torch.svd_lowrank(subtract(a, b), q=q, niter=niter)
    return s[:RANK].double(), u[:, :RANK].T


def sklearn(a: Tensor, b: Tensor, n_iter: int | str) -> Answer:
    d = subtract(a, b).numpy()
    u, s, _ = randomized_svd(d, RANK, n_iter=n_iter, random_state=1)  # pyright: ignore[reportArgumentType]
    return torch.from_numpy(s).double(), torch.from_numpy(np.ascontiguousarray(u.T))


def scipy(a: Tensor, b: Tensor, solver: str, tol: float, *, double: bool = False) -> Answer:
    d = subtract(a, b)
    d = (d.double() if double else d).numpy()
    found: Any = svds(d, RANK, solver=solver, tol=tol, rng=np.random.default_rng(1))  # pyright: ignore[reportArgumentType]
    u, s, _ = found
    order = np.argsort(-s)
    return torch.from_numpy(s[order]).double(), torch.from_numpy(np.ascontiguousarray(u.T[order]))


def gram(a: Tensor, b: Tensor) -> Answer:
    d = subtract(a, b)
    squares, vectors = torch.linalg.eigh(d @ d.T)
    return squares.flip(0)[:RANK].clamp(min=0).sqrt().double(), vectors.flip(1)[:, :RANK].T


def full(a: Tensor, b: Tensor) -> Answer:
    u, s, _ = torch.linalg.svd(subtract(a, b), full_matrices=False)
    return s[:RANK].double(), u[:, :RANK].T


METHODS: dict[str, Callable[[Tensor, Tensor], Answer | None]] = {
    "floor (form with statistics + 2 thin products)": floor,
    "**this library**": ours,
    "lean floor (no statistics)": lean_floor,
    "this library, float32 polish": lambda a, b: ours(a, b, polished=True),
    "this library, float32 throughout": lambda a, b: ours(a, b, dtype=torch.float32),
    "torch.svd_lowrank q=16 niter=6": lambda a, b: lowrank(a, b, 16, 6),
    "torch.svd_lowrank default (q=6, niter=2)": lambda a, b: lowrank(a, b, 6, 2),
    "sklearn randomized_svd n_iter=8": lambda a, b: sklearn(a, b, 8),
    "sklearn randomized_svd default": lambda a, b: sklearn(a, b, "auto"),
    "scipy svds PROPACK tol=1e-4": lambda a, b: scipy(a, b, "propack", 1e-4),
    "scipy svds ARPACK tol=1e-3": lambda a, b: scipy(a, b, "arpack", 1e-3),
}
ONCE: dict[str, Callable[[Tensor, Tensor], Answer]] = {
    "full Gram + eigh": gram,
    "torch.linalg.svd": full,
}


def adapter_ms(m: int, n: int, rank: int = 16, repeats: int = 21) -> float:
    """CPU ms of the exact SVD of a LoRA adapter's difference, from its factors."""
    draw = generator(0, "adapter")
    factors = torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        factored_svd(factors, rank)
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def errors(answer: Answer, truth: Answer) -> dict[str, float]:
    """Worst relative singular value, sin ∠ of u₁, and the error of its cosine with a probe."""
    scale, left = answer
    k = min(len(scale), RANK)
    u, v = truth[1][0].double(), left[0].double()
    v = v / v.norm()
    noise = torch.randn(len(u), generator=generator(5, "probe")).double()
    w = u + noise / noise.norm()
    w = w / w.norm()
    return {
        "values": float(((scale[:k] - truth[0][:k]).abs() / truth[0][:k]).max()),
        "angle": float((v - u * (u @ v)).norm()),
        "cosine": abs(abs(float(v @ w)) - abs(float(u @ w))),
    }


def measure(m: int, n: int, repeats: int, once: bool) -> list[dict[str, float | str]]:
    a, b = planted(m, n)
    truth = scipy(a, b, "arpack", 0.0, double=True)
    every = METHODS | ONCE if once else METHODS
    times: dict[str, list[float]] = {name: [] for name in every}
    answers: dict[str, Answer | None] = {}
    for repeat in range(repeats):
        for name, method in (every if repeat == 0 else METHODS).items():
            start = time.process_time()
            answers[name] = method(a, b)
            times[name].append(time.process_time() - start)
    rows: list[dict[str, float | str]] = []
    for name, seconds in times.items():
        answer = answers[name]
        found = {} if answer is None else errors(answer, truth)
        rows.append({"method": name, "ms": 1000 * statistics.median(seconds)} | found)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; the first row is the floor, the second this library."""
    base, own = (float(row["ms"]) for row in rows[:2])
    lines = [
        "| method | CPU ms | ÷ ours | ÷ floor | worst rel. s error | sin ∠ u₁ | cosine error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = float(row["ms"])
        found = [f"{row[k]:.0e}" if k in row else "" for k in ("values", "angle", "cosine")]
        cells = [str(row["method"]), f"{ms:.0f}", f"{ms / own:.2f}", f"{ms / base:.1f}", *found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(rows: list[dict[str, float | str]], m: int, n: int) -> dict[str, float]:
    time_of = {str(r["method"]): float(r["ms"]) for r in rows}
    base, own = list(time_of.values())[:2]
    print(f"\n{m} × {n}, top {RANK} triplets, CPU ms at one thread (median)\n")
    print(markdown(rows))
    return {
        "over_floor": own / base,
        "svd_lowrank": time_of["torch.svd_lowrank q=16 niter=6"] / own,
        "sklearn": time_of["sklearn randomized_svd n_iter=8"] / own,
        "propack": time_of["scipy svds PROPACK tol=1e-4"] / own,
        "over_lean_floor": own / time_of["lean floor (no statistics)"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="5120 × 13696 (minutes, 2 GB)")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is out of bounds")
    parser.add_argument("--repeats", type=int, default=0)
    options = parser.parse_args()
    m, n = SIZES["full" if options.full else "default"]
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = measure(m, n, options.repeats or (5 if options.full else 7), options.full)
        adapter = adapter_ms(m, n)
    ratios = show(rows, m, n)
    OUT.mkdir(exist_ok=True)
    file = OUT / f"svd_diff_{m}x{n}.json"
    print(f"LoRA adapter, rank 16, exact from its factors: {adapter:.1f} CPU ms")
    record = {"rows": rows, "ratios": ratios, "adapter_ms": adapter, "torch": torch.__version__}
    file.write_text(json.dumps(record, indent=1) + "\n")
    if not options.check:
        return 0
    bad = ratios["over_floor"] > LIMITS["over_floor"]
    bad = bad or any(ratios[k] < LIMITS[k] for k in ("svd_lowrank", "propack"))
    print(f"ratios {ratios}, limits {LIMITS}: {'out of bounds' if bad else 'ok'}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
