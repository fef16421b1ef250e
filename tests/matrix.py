"""The quick tests beside TransformerLens 3 and 4, each in an environment of its own.

    python tests/matrix.py [--only NAME]    # or `make matrix`

Writes ``benchmarks/results/matrix.md``: versions, counts and date of the last run. Environments are
made under ``build/matrix`` and stay there; a second run reuses them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "matrix"
TARGET = ROOT / "benchmarks" / "results" / "matrix.md"
SHOWN = ("transformer_lens", "sae_lens", "torch", "transformers", "nnsight")
TOOLS = ("pytest", "hypothesis", "beartype", "nbclient", "jupytext")


@dataclass(frozen=True)
class Environment:
    """What is installed, beside the package's own requirements.

    Attributes:
        extras: of the package.
        free: packages whose pin in ``constraints.txt`` is left out.
        also: further requirements.
    """

    name: str
    extras: str
    free: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


ENVIRONMENTS = (
    Environment("TransformerLens 3 with SAELens", "sae,lora,distributed"),
    Environment(
        "TransformerLens 4 without SAELens",
        "lora,distributed",
        free=("transformer_lens", "sae_lens"),
        also=("transformer_lens>=4,<5",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """One environment's last run."""

    name: str
    day: str
    python: str
    versions: dict[str, str]
    counts: dict[str, int]
    seconds: float
    code: int


def folder_of(environment: Environment) -> Path:
    return PLACE / re.sub(r"\W+", "-", environment.name.lower())


def install(environment: Environment) -> Path:
    """The environment's interpreter, everything installed."""
    folder = folder_of(environment)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.split("==")[0] not in environment.free]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(kept) + "\n")
    wanted = ["-e", f"{ROOT}[{environment.extras}]", *TOOLS, *environment.also]
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c",
         constraints, *wanted],
        check=True, cwd=ROOT,
    )  # fmt: skip
    return python


def versions(python: Path) -> dict[str, str]:
    code = (
        "import json, importlib.metadata as m\n"
        "def v(n):\n    try: return m.version(n)\n"
        "    except m.PackageNotFoundError: return 'absent'\n"
        f"print(json.dumps({{n: v(n) for n in {SHOWN!r}}}))"
    )
    return json.loads(subprocess.check_output([python, "-c", code], text=True))


def run(environment: Environment) -> Outcome:
    """Install and run the quick tests."""
    python, begun = install(environment), time.perf_counter()
    command = [python, "-m", "pytest", "tests", "-m", "quick and not slow and not gpu"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    sys.stdout.write(done.stdout[-6000:])
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    words = ("passed", "failed", "error", "skipped", "deselected")
    found = {word: re.search(rf"(\d+) {word}", last) for word in words}
    return Outcome(
        environment.name,
        date.today().isoformat(),
        platform.python_version(),
        versions(python),
        {word: int(match[1]) for word, match in found.items() if match},
        time.perf_counter() - begun,
        done.returncode,
    )


def table(outcomes: list[Outcome]) -> str:
    lines = [
        "# Environments",
        "",
        "`make matrix`: the quick tests in environments of their own, last run of each. Any Python "
        f"from 3.11 is accepted; run here with {platform.python_version()} alone.",
        "",
        "| environment | date | Python | versions | passed | failed | skipped |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for own in outcomes:
        names = ", ".join(f"{name} {value}" for name, value in own.versions.items())
        bad = own.counts.get("failed", 0) + own.counts.get("error", 0)
        lines.append(
            f"| {own.name} | {own.day} | {own.python} | {names} | {own.counts.get('passed', 0)} "
            f"| {bad} | {own.counts.get('skipped', 0)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--only", help="a part of an environment's name")
    given = reader.parse_args()
    chosen = [e for e in ENVIRONMENTS if not given.only or given.only in e.name]
    kept = PLACE / "outcomes.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for environment in chosen:
        known[environment.name] = asdict(run(environment))
        kept.write_text(json.dumps(known, indent=1))
    outcomes = [Outcome(**known[e.name]) for e in ENVIRONMENTS if e.name in known]
    TARGET.write_text(table(outcomes))
    sys.stdout.write(table(outcomes))
    return max(known[e.name]["code"] for e in chosen)


if __name__ == "__main__":
    sys.exit(main())
