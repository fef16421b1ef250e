"""Two processes compute what one process with the doubled batch computes (SPEC 24–26).

Processes are forked from one child that has imported everything; run as a script, this file is
that child (or, under ``torchrun``, one of the processes itself).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vpd_problems as problems
from safetensors.torch import load_file, save_file
from torch import Tensor

from mi_weightspace.models.arithmetic import worthwhile
from mi_weightspace.vpd import distributed
from mi_weightspace.vpd.cache import clean_batches
from mi_weightspace.vpd.sources import Sources
from mi_weightspace.vpd.train import METRICS, measure_scale, start, train, train_step

ROWS = 4
"""Rows of the whole batch."""
TERMS: list[dict[str, Any]] = [
    {"source": "uniform", "routing": "uniform_k_subset"},
    {"source": "binomial", "routing": "static_p", "n_samples": 2},
    {"source": "uniform", "routing": "layerwise"},
    {"source": "fresh_pgd", "routing": "all", "pgd_steps": 2, "pgd_step_size": 0.2},
    {"source": "fresh_pgd", "routing": "uniform_k_subset", "scope": "c", "pgd_step_size": 0.3},
    {"source": "persistent", "routing": "all", "scope": "bsc"},
    {"source": "persistent", "routing": "all", "scope": "bc", "sigmoid": True},
    {"source": "persistent", "routing": "uniform_k_subset", "scope": "c"},
    {"source": "persistent", "routing": "all", "scope": "sc"},
    {"source": "persistent", "routing": "all", "scope": "repeat", "repeat": 2},
    {"source": "persistent", "routing": "all", "adversarial_fraction": 0.5},
    {"source": "pooled", "routing": "all", "particles": 2},
]
SHARED = {7, 8, 9}
MINIMALITY: dict[str, dict[str, Any]] = {
    "averaged": {"ema_half_life": 3.0, "weight": 0.02},
    "batch": {"ema_half_life": None, "weight": 0.02, "frequency_weight": 0.05},
    "lp": {"form": "lp", "weight": 0.02},
}


# ---- inside a process --------------------------------------------------------------------------
def fixed_parameters(minimality: str) -> dict[str, Tensor]:
    """Two evaluations at the first parameters: terms, averaged gradients, sources, frequencies."""
    config = problems.gpt2_config(
        reconstruction=TERMS,
        minimality=MINIMALITY[minimality],
        normalise="zero_mask",
        batch_size=ROWS // distributed.world(),
    )
    host = problems.gpt2_host(double=True)
    stream = problems.token_stream(config.batch_size)
    found: dict[str, Tensor] = {}
    with host.prepared(config.speed):
        batches = clean_batches(host, stream, config)
        objective = start(host, batches(0), config).objective
        objective.scale = measure_scale(objective, stream)
        found["scale"] = torch.tensor(objective.scale)
        parameters = dict(objective.factors.named())
        parameters |= dict(objective.importance.named_parameters())
        for step in (4, 5):
            for parameter in parameters.values():
                parameter.grad = None
            losses = objective(batches(step), step)
            losses.total.backward()
            distributed.average_(p.grad for p in parameters.values() if p.grad is not None)
            losses.ascend((step + 1) / config.n_steps)
            for name, value in losses.terms.items():
                found[f"{step}/term/{name}"] = distributed.global_mean(value)
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                found[f"{step}/grad/{name}"] = parameter.grad.clone()
            for at, kept in objective.adversaries.kept.items():
                tensors = kept.leaves if isinstance(kept, Sources) else [kept.state["value"]]
                for i, leaf in enumerate(tensors):
                    found[f"{step}/sources/{at}/{i}"] = leaf.detach().clone()
        average = objective.frequencies.average
        if average is not None:
            found["average"] = average
    return found


def trajectory() -> dict[str, Tensor]:
    """The parameters after five steps, and what the steps said."""
    terms = [TERMS[0], TERMS[5], TERMS[7], TERMS[11]]
    config = problems.gpt2_config(reconstruction=terms, batch_size=ROWS // distributed.world())
    host = problems.gpt2_host(double=True)
    found: dict[str, Tensor] = {}
    with host.prepared(config.speed):
        batches = clean_batches(host, problems.token_stream(config.batch_size), config)
        state = start(host, batches(0), config)
        for step in range(5):
            losses, norms = train_step(state, batches(step))
            found[f"{step}/total"] = losses.total
            found[f"{step}/norms"] = torch.tensor(list(norms.values()))
        found |= {name: v.detach() for name, v in state.objective.factors.named()}
    return found


def whole_run(folder: Path) -> None:
    """`train`, then once more from the checkpoint in its middle."""
    config = problems.gpt2_config(
        n_steps=6,
        batch_size=ROWS // distributed.world(),
        importance={"hidden": [6]},
        reconstruction=[TERMS[0], TERMS[5], TERMS[7]],
    )
    for name in ("run", "again"):
        place = folder / name
        if name == "again":
            distributed.barrier()
            if distributed.rank() == 0:
                shutil.copytree(folder / "run", place)
                shutil.rmtree(place / "state-00000006")
            distributed.barrier()
        train(
            problems.gpt2_host(),
            problems.token_stream(config.batch_size),
            config,
            folder=place,
            resume=name == "again",
            progress=False,
        )


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    assert distributed.setup() == torch.device("cpu")
    distributed.setup()  # harmless
    world, rank = distributed.world(), distributed.rank()
    results = {f"fixed-{name}": fixed_parameters(name) for name in MINIMALITY}
    results["trajectory"] = trajectory()
    for name, tensors in results.items():
        own = {k: v.contiguous().clone() for k, v in tensors.items()}
        save_file(own, folder / f"{name}-{world}-{rank}.safetensors")
    whole_run(folder / f"world-{world}")
    distributed.finish()


def fork(folder: Path, rank: int, world: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work(folder)
        code = 0
    finally:
        os._exit(code)


def main(folder: str) -> None:
    if "RANK" in os.environ:  # under torchrun
        return work(Path(folder))
    torch.set_num_threads(1)
    worthwhile()
    problems.gpt2_host()
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [fork(Path(folder), rank, world, port) for rank in range(world)]
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return None


# ---- comparison --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("RANK", None)
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def pieces(folder: Path, name: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """One process' results, and those of two."""
    one = load_file(folder / f"{name}-1-0.safetensors")
    return one, [load_file(folder / f"{name}-2-{rank}.safetensors") for rank in range(2)]


def gap(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((found - expected).norm()) / (size or 1.0)


@pytest.mark.parametrize("minimality", MINIMALITY)
def test_terms_gradients_and_frequencies_are_those_of_the_doubled_batch(
    results: Path, minimality: str
) -> None:
    """SPEC 24, 25: minimality's sums are global inside the logarithm; routing and draws are each
    process' rows of the whole batch's."""
    one, two = pieces(results, f"fixed-{minimality}")
    assert sum("/term/" in key for key in one) == 2 * (2 + len(TERMS))
    for key, expected in one.items():
        if "/sources/" in key:
            continue
        for rank in range(2):
            assert gap(two[rank][key], expected) <= 1e-9, key
    assert ("average" in one) == (minimality == "averaged")


def test_shared_sources_stay_alike_and_local_ones_are_rows(results: Path) -> None:
    """SPEC 26."""
    one, two = pieces(results, "fixed-averaged")
    sources = [key for key in one if "/sources/" in key]
    assert {int(key.split("/")[2]) for key in sources} == set(range(5, len(TERMS)))
    for key in sources:
        halves = [t[key] for t in two]
        if int(key.split("/")[2]) in SHARED:
            assert torch.equal(halves[0], halves[1]), key
            found = halves[0]
        else:
            found = torch.cat(halves)
        assert found.shape == one[key].shape
        assert float((found - one[key]).abs().max()) <= 1e-8, key
        if key.startswith("5/"):
            assert not torch.equal(one[key], one[key.replace("5/", "4/", 1)]), f"{key} rests"


def test_five_steps_stay_together(results: Path) -> None:
    """SPEC 24: loosely, for Adam turns rounding into steps; the processes agree exactly."""
    one, two = pieces(results, "trajectory")
    for key, expected in one.items():
        assert torch.equal(two[0][key], two[1][key]), key
        assert gap(two[0][key], expected) <= 1e-5, key


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_the_log_is_that_of_the_doubled_batch(results: Path) -> None:
    """SPEC 24: L0, terms, total and gradient norms of the whole batch, written once."""
    one, two = (records(results / f"world-{n}" / "run") for n in (1, 2))
    assert [r["step"] for r in two] == list(range(6))
    for a, b in zip(one[:3], two[:3], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


def test_two_processes_resume_to_the_same_bits(results: Path) -> None:
    """SPEC 20."""
    run, again = (results / "world-2" / name for name in ("run", "again"))
    assert records(run) == records(again)
    names = sorted(p.name for p in (run / "state-00000006").iterdir())
    assert names == [
        "shared.safetensors",
        "sources-0.safetensors",
        "sources-1.safetensors",
        "state.json",
    ]
    for name in names[:3]:
        found, expected = (load_file(f / "state-00000006" / name) for f in (again, run))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_alone_every_collective_is_the_identity() -> None:
    value = torch.arange(4.0)
    assert distributed.world() == 1 and distributed.rank() == 0
    assert distributed.own_rows(value) is value
    assert distributed.global_mean(value) is value
    distributed.average_([value])
    distributed.copy_from_first([value])
    distributed.barrier()
    distributed.finish()
    assert torch.equal(value, torch.arange(4.0))
    assert distributed.anywhere(True, value.device)
    assert not distributed.anywhere(False, value.device)


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """SPEC 24: the processes `torchrun` starts find each other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", __file__, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=580
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(records(tmp_path / "world-2" / "run")) == 6


if __name__ == "__main__":
    main(*sys.argv[1:])
