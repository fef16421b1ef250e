"""Run the trust suite and write its figures as a table.

    python -m tests.trust.trust_table            # what `make test` runs of it
    python -m tests.trust.trust_table --slow     # everything; the table of benchmarks/results

A figure is one or more `trust_counter.Figure`s of one name; counts, failures and seconds of its
parts are summed. The exit code is pytest's: a failing test leaves its failures in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "benchmarks" / "results" / "trust.md"
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pandas", "pyarrow")


def run(folder: Path, slow: bool, paths: list[str]) -> int:
    """The suite in a process of its own; returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", *paths, "-q", "--no-header"]
    if not slow:
        command += ["-m", "not slow and not gpu"]
    environment = os.environ | {"MI_WEIGHTSPACE_TRUST": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.call(command, cwd=ROOT, env=environment)


def read(folder: Path) -> list[dict[str, Any]]:
    """Figures by name, in the order in which they first came, parts summed."""
    found: dict[str, dict[str, Any]] = {}
    file = folder / "counts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        part = json.loads(line)
        own = found.setdefault(
            part["name"], part | {"count": 0, "failures": 0, "cpu_seconds": 0.0, "tried": []}
        )
        for key in ("count", "failures", "cpu_seconds"):
            own[key] += part[key]
        if part["tried"] not in own["tried"]:
            own["tried"].append(part["tried"])
    return list(found.values())


def table(figures: list[dict[str, Any]], which: str) -> str:
    """The page; `which` says what was run."""
    versions = ", ".join(f"{p} {version(p)}" for p in PACKAGES)
    lines = [
        "# Trust figures",
        "",
        f"`make trust`, {date.today().isoformat()}: {which}. {machine()}, one thread; Python "
        f"{platform.python_version()}, {versions}. A failure is a case that was not refused by "
        "name, hung, left something behind, or gave another answer than it must.",
        "",
        "| figure | what was tried | count | failures | CPU-s |",
        "|---|---|---:|---:|---:|",
    ]
    for own in figures:
        tried = "; ".join(own["tried"]).replace("|", "\\|")
        count = f"{own['count']:,} {own['unit']}"
        seconds = f"{own['cpu_seconds']:.1f}"
        lines.append(f"| {own['name']} | {tried} | {count} | {own['failures']} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    reader.add_argument("paths", nargs="*", default=["tests/trust"])
    reader.add_argument("--slow", action="store_true", help="the costly part as well")
    reader.add_argument("--out", type=Path, default=TARGET)
    reader.add_argument("--counts", type=Path, help="a table of counts that are there; nothing run")
    given = reader.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.counts or Path(temporary)
        code = 0 if given.counts else run(folder, given.slow, given.paths)
        figures = read(folder)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    which = "all of the suite" if given.slow else "the part of the suite that `make test` runs"
    if given.counts:
        which = "counts kept from runs of the suite's parts"
    given.out.write_text(table(figures, which), encoding="utf-8")
    print(f"{len(figures)} figures, {sum(f['failures'] for f in figures)} failures: {given.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
