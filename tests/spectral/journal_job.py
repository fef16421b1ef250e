"""A job for the journal's tests, importable from worker processes, and a sweep to be killed."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import CheckpointError
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.weights import CheckpointSource, Difference
from mi_weightspace.spectral.dense import Dense
from mi_weightspace.spectral.journal import run_sites
from mi_weightspace.spectral.krylov import block_krylov


@dataclass(frozen=True)
class Settings:
    rank: int = 3
    fail_at: str = ""


def decompose(source: Any, site: Any, settings: Settings) -> Components:
    log = os.environ.get("JOURNAL_LOG")
    if log:
        with Path(log).open("a") as file:
            file.write(f"{site.name} {torch.get_num_threads()} {os.getpid()}\n")
    time.sleep(float(os.environ.get("JOURNAL_SLEEP", "0")))
    if site.name == settings.fail_at:
        raise CheckpointError("a tensor", given="NaN", expected="numbers", remedy="Train again.")
    matrix = source.weight(site)
    found = block_krylov(Dense(matrix), settings.rank, generator=generator(0, site.name))
    facts = {"fro": float(matrix.norm()), "edge": float("inf"), "flag": "none", "list": [1.5, 2]}
    return Components(
        site,
        found.right,
        found.left,
        found.scale.float(),
        stage=source.stage,
        source=source.ref,
        facts=facts,  # pyright: ignore[reportArgumentType]
    )


def difference(folder: Path, stage: str = "sft") -> Difference:
    before, after = (CheckpointSource(folder / name) for name in ("base", "sft"))
    return Difference(before, after, stage=stage)


def sweep(folder: Path, out: Path, n_jobs: int) -> list[Components]:
    source = difference(folder)
    keys = [(source, site) for site in source.sites()]
    return run_sites(decompose, keys, Settings(), n_jobs=n_jobs, folder=out, progress=False)


if __name__ == "__main__":
    import journal_job  # so that the job has its importable name

    journal_job.sweep(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
