"""Killed runs, full disks, threads and processes: what is left is the whole result, or none.

`tests/vpd/test_resume.py` kills VPD's loop inside a checkpoint, `tests/spectral/test_journal.py`
and `test_dask.py` kill workers of a sweep; here whole runs die at every touch of their folder, or
find no room, or no place, to write.
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
import trust_processes_disk
from trust_counter import Figure

import mi_weightspace as mw
from mi_weightspace.core.report import same_frame
from mi_weightspace.models import toy
from mi_weightspace.spectral.svd import SvdReport

HERE = Path(__file__).parent
ROOT = str(HERE.parents[1])  # for `benchmarks`
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": ROOT}
Plan = dict[str, dict[str, int]]
Found = list[dict[str, Any]]

LONG = ["sweep", "probe", "sae", "vpd"]
SHORT = ["dmu", "gate", "project", "diff", "page", "save"]
WRITERS = (*LONG, *SHORT, "inoculation", "replay")
"""Everything that writes results: ten commands, `train_sae` and `Report.save`."""
PLAN: Plan = {
    "kills": dict.fromkeys(LONG, 1) | {"save": 0},
    "limits": dict.fromkeys(LONG, 2) | dict.fromkeys(SHORT, 1),
    "disks": dict.fromkeys(("sweep", "page", "save", "organism"), 1),
    "places": dict.fromkeys((*WRITERS, "demo", "organism"), 0),
}
SLOW: dict[str, Plan] = {
    name: {kind: {name: 0} for kind in ("kills", "limits", "disks")} for name in WRITERS
} | {
    "inoculation": {"kills": {"inoculation": 4}, "limits": {"inoculation": 2},
                    "disks": {"inoculation": 1}},
    "diff": {"kills": {"diff": 20}, "limits": {"diff": 0}, "disks": {"diff": 0}},
    "shared": {"disks": {"shared": 1}},
}  # fmt: skip
SAID = {
    "kills": ("SIGKILL", "kills", "runs of sweep, probe, SAE, VPD and Report.save (slow: every "
              "command that writes) killed at touches of their folder or moments: resumed to the "
              "same bytes, nothing half-run loads or stays"),
    "limits": ("full disk", "runs", "a file that can grow no more (RLIMIT_FSIZE), in every command "
               "that writes (inoculation, replay: slow), train_sae, Report.save: one message with "
               "place, cause and remedy, nothing half-written loads or stays, then finished to the "
               "same bytes"),
    "disks": ("full disk", "runs", "a disk that is full (tmpfs too small, then enlarged), under "
              "sweep, page, Report.save and the cache of organisms (slow: all; few files as well)"),
    "places": ("read-only output", "places", "a file, below a file, a folder without rights, a "
               "read-only file system, an empty folder on it: given to every command with --out, "
               "train_sae, Report.save and the cache of organisms: refused before models are read"),
}  # fmt: skip


def lives(plan: Plan, folder: Path, seed: int) -> Found:
    mounts = trust_processes_disk.command()
    script = str(HERE / "trust_processes_lives.py")
    whole = {**plan, "seed": seed, "mounts": isinstance(mounts, tuple)}
    if isinstance(mounts, str):
        del whole["disks"]
    command = [*(mounts if isinstance(mounts, tuple) else ()), sys.executable, script, str(folder)]
    command.append(json.dumps(whole))
    # to a file: workers that outlive a killed run would hold a pipe open for minutes
    said = folder / "said.txt"
    with said.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT, check=False
        )
    words = said.read_text()
    assert done.returncode == 0, words[-3000:]
    return json.loads(words.splitlines()[-1])


def counted(kind: str, found: Found, least: int) -> None:
    """The figure of a kind of case."""
    with Figure(*SAID[kind]) as figure:
        for job in found:
            tally = job["found"].get(kind, {"count": 0, "problems": [], "cpu_seconds": 0.0})
            figure.count += tally["count"]
            figure.problems += tally["problems"]
            figure.elsewhere += tally["cpu_seconds"]
            if tally["cpu_seconds"] < 0.01 * tally["count"]:
                figure.problems.append(f"{job['name']}: lives whose seconds nobody counted")
    assert figure.count >= least


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    pytest.importorskip("sae_lens")
    return lives(PLAN, tmp_path_factory.mktemp("lives"), 0)


def test_killed_runs(found: Found) -> None:
    counted("kills", found, 16)


def test_files_that_cannot_grow(found: Found) -> None:
    counted("limits", found, 13)


def test_full_disks(found: Found) -> None:
    unmounted()
    counted("disks", found, 4)


def test_read_only_places(found: Found) -> None:
    counted("places", found, 3 * len(PLAN["places"]))


def unmounted() -> None:
    """Skip where no disk can be made."""
    why = trust_processes_disk.command()
    if isinstance(why, str):
        pytest.skip(why)


@pytest.mark.slow
@pytest.mark.parametrize("job", SLOW)
def test_every_touch_and_every_size(job: str, tmp_path: Path) -> None:
    if job == "sae":
        pytest.importorskip("sae_lens")
    if job == "shared":
        unmounted()
    plan = SLOW[job]
    found = lives(plan, tmp_path, 1)
    for kind in plan:
        if kind != "disks" or not isinstance(trust_processes_disk.command(), str):
            counted(kind, found, 1)


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
