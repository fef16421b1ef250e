"""A sweep on a Dask cluster of two processes: the table of this process, also when one is killed.

Nothing of ours talks to Dask: joblib's backend is exchanged. The scheduler gives a lost worker's
matrices to the other one while a nanny starts a new process; what was in files is not lost at all.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import psutil
import pytest
import torch

import mi_weightspace as mw
from mi_weightspace.models.toy import save_tiny
from mi_weightspace.models.weights import CheckpointSource, Difference
from mi_weightspace.spectral.svd import SvdReport

distributed = pytest.importorskip("distributed")
N_LAYERS = 8
N_MATRICES = 7 * N_LAYERS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Difference:
    place = tmp_path_factory.mktemp("lineage")
    for seed, name in enumerate(("base", "sft")):
        save_tiny("llama", place / name, seed=seed, n_layers=N_LAYERS)
    before, after = (CheckpointSource(place / name) for name in ("base", "sft"))
    return Difference(before, after, stage="sft")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two worker processes of one thread, each kept alive by a nanny."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=str(tmp_path_factory.mktemp("dask")),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def alone(source: Difference, tmp_path_factory: pytest.TempPathFactory) -> tuple[SvdReport, Path]:
    torch.set_num_threads(1)
    journal = tmp_path_factory.mktemp("alone")
    return mw.svd(source, rank=4, journal=journal, progress=False), journal


def hashes(journal: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(journal.iterdir())}


class Assassin(threading.Thread):
    """Kills a process of the cluster as soon as `journal` has some files.

    Attributes:
        done: results in the journal at that moment, or -1.
    """

    def __init__(self, victim: int, journal: Path, after: int) -> None:
        super().__init__(daemon=True)
        self.victim, self.journal, self.after, self.done = victim, journal, after, -1

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while len(found := list(self.journal.glob("*.safetensors"))) < self.after:
            if time.monotonic() > deadline:
                return
            time.sleep(0.002)
        self.done = len(found)
        os.kill(self.victim, signal.SIGKILL)


def test_the_same_table_and_the_same_bytes(
    source: Difference, client: Any, alone: tuple[SvdReport, Path], tmp_path: Path
) -> None:
    ours = os.getpid()
    workers = set(client.run(os.getpid).values())
    assert len(workers) == 2 and ours not in workers
    with joblib.parallel_config("dask"):
        far = mw.svd(source, rank=4, jobs=-1, journal=tmp_path / "journal", progress=False)
    assert far.equals(alone[0])
    assert hashes(tmp_path / "journal") == hashes(alone[1])
    assert len(hashes(alone[1])) == N_MATRICES
    ran = [key for log in client.run(_finished).values() for key in log]
    assert len(ran) >= N_MATRICES / 12, "joblib sends small calls in batches, but to the workers"


def _finished(dask_worker: Any) -> list[str]:
    """Keys of the calls a worker has computed (asked of it by name: `dask_worker` is Dask's)."""
    return [event[0] for event in dask_worker.state.log if "memory" in event]


def test_a_worker_killed_in_the_middle_loses_nothing(
    source: Difference, client: Any, alone: tuple[SvdReport, Path], tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    victim = next(iter(client.run(os.getpid).values()))
    assassin = Assassin(victim, journal, 5)
    assassin.start()
    with joblib.parallel_config("dask"):
        far = mw.svd(source, rank=4, jobs=-1, journal=journal, progress=False)
    assassin.join()
    assert 5 <= assassin.done < N_MATRICES, "it was in the middle of the sweep"
    assert not psutil.pid_exists(victim)
    assert far.equals(alone[0])
    assert {k: v for k, v in hashes(journal).items() if k[0] != "."} == hashes(alone[1])
