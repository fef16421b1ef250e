"""A sweep over 13B-shaped checkpoints: time, memory, truth; from files to verdicts.

    python benchmarks/sweep.py [--sizes 1B,7B,13B] [--layers 1]

Writes one real layer of every size (`make_checkpoint.py`; 1.8 GB for 13B), then runs both
differences over all seven matrices in a process of its own, one thread: top-16 triplets with
noise edges, and 16 probes with sign-flip nulls and 39 controls each, their own or shared. CPU
seconds without what a process does once (imports); peak *private*
memory (pages of files do not count, the kernel may drop them), sampled every 5 ms. The whole model
is an extrapolation by layers, and is called so. With ``--memory-limit`` each size is run again at
half its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Peak, machine
from benchmarks.make_checkpoint import PRESETS, make
from mi_weightspace.spectral.blocks import private_bytes

OUT = Path(__file__).parent / "results"


def work(folder: Path, limit: float | None) -> dict[str, Any]:
    """One process: svd, then project without and with many sign flips; CPU seconds and memory."""
    import mi_weightspace as mw
    from mi_weightspace.core.direction_io import load_directions

    torch.set_num_threads(1)
    lineage = mw.load_lineage(
        base=str(folder / "base"), sft=str(folder / "sft"), dpo=str(folder / "dpo")
    )
    directions = load_directions(folder / "probes.safetensors")
    differences = [lineage.diff("base", "sft"), lineage.diff("sft", "dpo")]
    for one in differences:  # reading the files once is not what is measured
        for site in one.sites("blocks.*"):
            one.before.stored(site).view(torch.int16).max()
            one.after.stored(site).view(torch.int16).max()
    settings: dict[str, Any] = {"compare_base": False, "progress": False, "memory_limit": limit}
    small = mw.svd(differences[0], "blocks.0.attn.q", rank=16, **settings)
    mw.project(small, directions, n_null=19, progress=False)  # imports: once a process, not a layer
    before, peak = private_bytes(), Peak()
    peak.start()
    seconds, found = timed(lambda: mw.svd(differences, rank=16, **settings))
    svd_peak = peak.stop()
    costs = {"svd": seconds}
    costs["project"], _ = timed(lambda: mw.project(found, directions, n_null=19, progress=False))
    peak = Peak()
    peak.start()
    costs["project_999"], tested = timed(
        lambda: mw.project(found, directions, n_null=999, progress=False)
    )
    project_peak = peak.stop()
    common = {k: getattr(directions[0], k) for k in ("control_patterns", "control_filters")}
    shared = [replace(direction, **common) for direction in directions]
    costs["project_shared"], _ = timed(
        lambda: mw.project(found, shared, n_null=999, progress=False)
    )
    if limit is None:
        own: dict[str, Any] = settings | {"compare_base": True}
        costs["svd_base"], _ = timed(lambda: mw.svd(differences, rank=16, **own))
    named = tested.table.loc[tested.table["verdict"] == "aligned"]
    sites = found.tables["sites"]
    return costs | {
        "matrices": len(sites),
        "entries": int((sites["d_out"] * sites["d_in"]).sum()),
        "private_before": before,
        "private_peak": svd_peak,
        "project_peak": project_peak,
        "aligned": named[["stage", "site", "direction"]].to_numpy().tolist(),
        "spectral": sites["spectral"].tolist(),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, result)."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def in_process(folder: Path, limit: float | None = None) -> dict[str, Any]:
    """`work` in a fresh process, so that its memory is its own."""
    command = [sys.executable, "-m", "benchmarks.sweep", "--work", str(folder)]
    command += [] if limit is None else ["--limit", str(limit)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, layers: int, folder: Path) -> dict[str, Any]:
    if not (folder / "truth.json").exists():
        make(folder, PRESETS[size], layers=layers)
    free = in_process(folder)
    print(json.dumps(free), file=sys.stderr)
    half = free["private_peak"] / 2e9
    row: dict[str, Any] = {"size": size, "layers": layers, "free": free}
    least = 1.05 * free["private_before"] / 1e9
    row["limit"] = max(half, least + 0.06)
    row["limited"] = in_process(folder, row["limit"])
    pairs = zip(free["spectral"], row["limited"]["spectral"], strict=True)
    row["largest_change"] = max(abs(a - b) / a for a, b in pairs)
    truth = json.loads((folder / "truth.json").read_text())
    planted = [truth["stage"], truth["site"], truth["direction"]]
    row["found"] = planted in free["aligned"]
    row["decoys"] = len({name for *_, name in free["aligned"]} - {truth["direction"]})
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | CPU-s a layer: svd / project, 19 flips / 999 flips / 999, controls shared "
        "| whole model on two cores, extrapolated: svd / with 19 / 999 / 999, controls shared "
        "| private memory: before / svd / project, GB | limit, "
        "GB: peak under it / CPU / largest change of s₁ "
        "| planted found; decoys of 15 called (level 5 % each) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        free, tight, k = row["free"], row["limited"], row["layers"]
        keys = ("svd", "project", "project_999", "project_shared")
        a, b, c, d = (free[x] / k for x in keys)
        n = PRESETS[row["size"]].n_layers / 2
        lines.append(
            f"| {row['size']} ({free['matrices'] // (2 * k)} matrices a layer, two differences) "
            f"| {a:.1f} / {b:.1f} / {c:.1f} / {d:.1f} "
            f"| {a * n:.0f} / {(a + b) * n:.0f} / {(a + c) * n:.0f} / {(a + d) * n:.0f} s "
            f"| {free['private_before'] / 1e9:.2f} / {free['private_peak'] / 1e9:.2f} "
            f"/ {free['project_peak'] / 1e9:.2f} "
            f"| {row['limit']:.2f}: {tight['private_peak'] / 1e9:.2f} "
            f"/ {tight['svd'] / free['svd']:.1f}× / {row['largest_change']:.0e} "
            f"| {'yes' if row['found'] else 'no'}; {row['decoys']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", default="1B,7B,13B")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work, options.limit)))
        return
    rows = []
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            place = options.folder / size if options.folder else Path(temporary)
            rows.append(measure(size, options.layers, place))
        print(table(rows[-1:]), flush=True)
    OUT.mkdir(exist_ok=True)
    record = {"rows": rows, "torch": torch.__version__, "machine": machine()}
    (OUT / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    (OUT / "sweep.md").write_text(f"{table(rows)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
