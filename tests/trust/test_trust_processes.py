"""Killed runs, full disks, threads and processes: what is left is the whole result, or none.

`tests/vpd/test_resume.py` kills VPD's loop inside a checkpoint, `tests/spectral/test_journal.py`
and `test_dask.py` kill workers of a sweep; here whole runs die at every touch of their folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trust_counter import Figure

import mi_weightspace as mw
from mi_weightspace.core.report import same_frame
from mi_weightspace.models import toy
from mi_weightspace.spectral.svd import SvdReport

HERE = Path(__file__).parent
JOBS = ("sweep", "probe", "sae", "vpd")
ROOT = str(HERE.parents[1])  # for `benchmarks`
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": ROOT}


def lives(jobs: tuple[str, ...], folder: Path, each: int, seed: int) -> list[dict[str, Any]]:
    script = HERE / "trust_processes_lives.py"
    command = [sys.executable, str(script), str(folder), ",".join(jobs), str(each), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def counted(found: list[dict[str, Any]], least: int) -> None:
    """The figures of `lives`."""
    said = "sweep, probe, SAE and VPD runs killed at touches of their folder or moments: resumed"
    with Figure("SIGKILL", "kills", f"{said} to the same bytes, nothing half-run loads") as figure:
        for job in found:
            figure.add(count=job["kills"])
            figure.problems += job["problems"]
    said = "a file that can grow no more (RLIMIT_FSIZE), in sweep, probe, SAE and VPD runs: refused"
    with Figure("full disk", "runs", f"{said} with place and remedy, then finished") as full:
        for job in found:
            full.add(count=job["full"])
            full.problems += job["full_problems"]
    assert figure.count >= least and full.count >= 2 * len(found)


def test_killed_runs_and_full_disks(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    counted(lives(JOBS, tmp_path, 1, 0), 6)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_killed_at_every_touch(job: str, tmp_path: Path) -> None:
    if job == "sae":
        pytest.importorskip("sae_lens")
    counted(lives((job,), tmp_path, 0, 1), 12)


# ---- memory ------------------------------------------------------------------------------------
def swept(shape: tuple[int, int], place: Path) -> dict[str, Any]:
    script = HERE / "trust_processes_memory.py"
    command = [sys.executable, str(script), str(place), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SHAPES = [(1024, 8192), *(pytest.param(s, marks=pytest.mark.slow) for s in
          ((1024, 32768), (2048, 32768)))]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_memory_limit_is_kept(shape: tuple[int, int], tmp_path: Path) -> None:
    """Peak private memory, sampled every millisecond, of a sweep over one matrix in bfloat16."""
    said = "peak private memory of a sweep under the least limit it accepts, within 10 % of it"
    with Figure("memory ceiling", "tensor sizes", said) as figure:
        found = swept(shape, tmp_path)
        over = found["peak"] / found["limit"] - 1
        problem = f"{shape}: {found}" if over > 0.1 else None
        figure.add(problem=problem)
        figure.notes[f"{shape[0]}x{shape[1]}: peak/limit"] = found["peak"] / found["limit"]


# ---- determinism -------------------------------------------------------------------------------
@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pair(place: Path) -> tuple[Path, Path]:
    """Matrices large enough that torch shares a product between its threads."""
    for seed, stage in enumerate(("base", "sft")):
        toy.save_tiny("llama", place / stage, seed=seed, d_model=256, n_layers=1)
    return place / "base", place / "sft"


def answer(models: tuple[Path, Path], **options: Any) -> SvdReport:
    difference = mw.load_lineage(base=models[0], sft=models[1]).diff("base", "sft")
    return mw.svd(difference, rank=4, progress=False, **options)


def test_threads_and_processes(tmp_path: Path, threads: Any) -> None:
    """A repeated run and any number of processes: the same bits. Threads: the same words, numbers
    to float32's 1e-4 (sums are cut elsewhere)."""
    models = pair(tmp_path)
    with Figure("determinism", "comparisons", "svd: 1 and 2 processes bit-identical, 1 and 2 "
                "threads within 1e-4 and the same words") as figure:  # fmt: skip
        threads(1)
        one = answer(models)
        for what, other in (("again", answer(models)), ("2 processes", answer(models, jobs=2))):
            figure.add(problem=None if one.equals(other) else f"{what}: not the same bits")
        threads(2)
        two = answer(models)
        figure.add(problem=None if two.equals(answer(models)) else "2 threads, again: other bits")
        s = (torch.tensor(r.table["singular_value"].to_numpy()) for r in (one, two))
        worst = float((next(s) / next(s) - 1).abs().max())
        figure.notes["threads: largest relative change of s"] = worst
        figure.add(problem=f"threads: s differs by {worst}" if worst > 1e-4 else None)
        words = [(r.verdicts, r.tables["sites"]["resolved"].tolist()) for r in (one, two)]
        figure.add(problem=None if words[0] == words[1] else f"threads: other words {words}")
        same = same_frame(one.tables["vectors"], two.tables["vectors"])
        figure.add(problem=None if same else "threads: other norm gains")
