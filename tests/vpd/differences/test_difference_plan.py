"""The plan of a difference: operations against torch's own counter, bytes against the process."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mi_weightspace.core.seeds import generator
from mi_weightspace.models import toy
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.vpd import planning
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.differences.planning import plan_difference
from mi_weightspace.vpd.differences.stages import host_of
from mi_weightspace.vpd.train import start, train_step

BATCH, LENGTH = 2, 8
UNIFORM = {"source": "uniform", "routing": "uniform_k_subset"}
PERSISTENT = {"source": "persistent", "routing": "all"}
LATE = ["blocks.1.mlp.gate", "blocks.1.mlp.out", "blocks.2.mlp.gate", "blocks.2.mlp.out"]


def settings(**values: Any) -> VPDConfig:
    return make_config(
        {
            "sites": ["blocks.1.*", "blocks.2.*"],
            "n_components": 16,
            "init": "svd",
            "faithfulness": {"weight": 0.0},
            "n_steps": 4,
            "batch_size": BATCH,
            "reconstruction": [UNIFORM, PERSISTENT],
            **values,
        }
    )


@pytest.fixture(autouse=True)
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBE_SECONDS", 0.0)


@lru_cache(maxsize=2)
def lineage(n_stages: int) -> Lineage:
    """Every matrix of every block moves in every stage."""
    stages = {"base": toy.tiny_model("llama", n_layers=3)}
    for at in range(n_stages):
        tuned, draw = copy.deepcopy(stages[list(stages)[-1]]), generator(at, "stage")
        with torch.no_grad():
            for p in tuned.parameters():
                if p.ndim > 1:
                    p.add_(0.05 * torch.randn(p.shape, generator=draw))
        stages[f"stage{at}"] = tuned
    return Lineage(stages)


def started(config: VPDConfig, n_stages: int) -> tuple[Any, Any, Any]:
    """(host, run at step 0, tokens)."""
    given = lineage(n_stages)
    chosen = given.source("base").sites(config.sites)
    names = [f"{site.name}@{stage}" for site in chosen for stage in given.stages[1:]]
    host = host_of(given, names, config, "tuned")
    assert len(host.names) == len(names)
    tokens = torch.randint(4, 300, (BATCH, LENGTH), generator=generator(0, "tokens"))
    with host.prepared(config.speed):
        return host, start(host, host.clean(tokens), config), tokens


def counted(config: VPDConfig, n_stages: int) -> float:
    """Operations of one training step, as torch counts the products that were executed."""
    host, state, tokens = started(config, n_stages)
    with host.prepared(config.speed), FlopCounterMode(display=False) as counter:
        train_step(state, host.clean(tokens))
    return float(counter.get_total_flops())


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "the late MLPs": {"sites": LATE},
    "one late matrix": {"sites": ["blocks.2.mlp.out"]},
    "unembedding": {"sites": ["unembed"]},
    "embedding": {"sites": ["embed"]},
    "layerwise": {"reconstruction": [{"source": "uniform", "routing": "layerwise"}]},
    "fresh": {"reconstruction": [{"source": "fresh_pgd", "routing": "all", "pgd_steps": 3}]},
    "transformer": {"importance": {"kind": "global_transformer", "d_model": 32, "d_mlp": 64}},
    "global": {"importance": {"kind": "global_mlp", "hidden": (48, 24)}},
}


@pytest.mark.parametrize("n_stages", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_executed(name: str, n_stages: int) -> None:
    """Within 10 %, as for a decomposition of the matrices themselves."""
    config = settings(**CASES[name])
    found = plan_difference(lineage(1).lens("base"), config, n_stages=n_stages, length=LENGTH)
    assert found.flops_per_step == pytest.approx(counted(config, n_stages), rel=0.1)


@pytest.mark.parametrize("kind", ["component_mlp", "layerwise_mlp", "global_mlp", "transformer"])
def test_the_network_reads_every_update(kind: str) -> None:
    """Its parameters, to the last one, are those of the network a run makes."""
    network = {"kind": kind, "hidden": (48, 24) if kind != "component_mlp" else (48,)}
    config = settings(
        **(CASES["transformer"] if kind == "transformer" else {"importance": network})
    )
    for n_stages in (1, 2):
        _, state, _ = started(config, n_stages)
        made = sum(p.numel() for p in state.objective.importance.parameters())
        model = lineage(1).lens("base")
        found = plan_difference(model, config, n_stages=n_stages, length=LENGTH)
        assert found.memory["importance network"] == 4 * made
        assert found.flops["importance network"] >= 6 * made * BATCH * LENGTH


def test_a_narrower_model_needs_the_differences_twice() -> None:
    """float32 differences beside copies in the model's precision, and one first stage's."""
    model, config = lineage(1).lens("base"), settings(sites=LATE)
    entries = sum(s.d_out * s.d_in for s in plan_difference(model, config, length=LENGTH).sites)
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        found = plan_difference(model, config, n_stages=3, length=LENGTH, dtype=dtype)
        again = 0 if item == 4 else item
        assert found.memory["copies of the matrices"] == 3 * (4 + again) * entries
        assert found.memory["the first stage's matrices"] == item * entries


# ---- memory --------------------------------------------------------------------------------
MEASURE = """
import copy, gc, sys
import torch
from mi_weightspace.core.seeds import generator
from mi_weightspace.models import toy
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.differences.planning import plan_difference
from mi_weightspace.vpd.differences.stages import host_of
from mi_weightspace.vpd.stream import TokenStream
from mi_weightspace.vpd.train import train

torch.set_num_threads(1)
n_stages, folder = int(sys.argv[1]), sys.argv[2]

def status(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1]) * 1024

def settings(count, steps, sites):
    return make_config({"sites": sites, "n_components": count, "init": "svd",
        "faithfulness": {"weight": 0.0}, "n_steps": steps, "batch_size": 8})

def saved(name, **config):
    names = ["base"] + [f"stage{i}" for i in range(n_stages)]
    model, stages = toy.tiny_model("llama", **config), {}
    for at, stage in enumerate(names):
        if at:
            draw = generator(at, "stage")
            for p in model.parameters():
                p.data.add_(0.05 * torch.randn(p.shape, generator=draw))
        stages[stage] = folder + "/" + name + stage
        model.save_pretrained(stages[stage])
    return stages

def run(lineage, config, length):
    sites = lineage.source("base").sites(config.sites)
    names = [f"{s.name}@{k}" for s in sites for k in lineage.stages[1:]]
    host = host_of(lineage, names, config, "tuned")
    rows = torch.randint(4, 300, (64, length), generator=generator(0, "tokens"))
    return train(host, TokenStream(rows, config.batch_size), config, progress=False)

sites = ["blocks.2.mlp.*", "blocks.3.mlp.*"]
# libraries, kernels and the allocator's own tables are there before the measurement begins
run(Lineage(saved("small")), settings(8, 1, ["blocks.1.mlp.*"]), 8)
stages = saved("large", n_layers=4, d_model=256)
config = settings(64, 2, sites)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS:")
trained = run(Lineage(stages), config, 64)
plan = plan_difference(stages["base"], config, n_stages=n_stages, length=64)
print(status("VmHWM:") - before, plan.growth + plan.model)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
@pytest.mark.parametrize("n_stages", [1, 2])
def test_peak_memory_is_as_announced(n_stages: int, tmp_path: Path) -> None:
    """Model loaded from a checkpoint included: at most 1.25 times the plan, at least 0.6 of it."""
    command = [sys.executable, "-c", MEASURE, str(n_stages), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, planned = map(int, said.stdout.split()[-2:])
    print(f"{n_stages}: grew by {grown / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB")
    assert 0.6 * planned <= grown <= 1.25 * planned, grown / planned
