"""Habits that hold at run time: global random state untouched, no configuration field unread."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.models import toy
from mi_weightspace.spectral import decompose
from mi_weightspace.spectral.stage_evidence import harvest_stages

ROOT = Path(__file__).parents[2]


def tiny_set(n_controls: int = 3) -> ContrastSet:
    draw = torch.Generator().manual_seed(1)

    def contrast(name: str, kind: str) -> Contrast:
        rows = torch.randint(5, 60, (8, 2, 6), generator=draw).tolist()
        pairs = tuple(Pair(f"i{i}", tuple(a), tuple(b)) for i, (a, b) in enumerate(rows))
        return Contrast(name, kind, pairs)  # pyright: ignore[reportArgumentType]

    return ContrastSet(
        "tiny",
        (contrast("t", "target"), *(contrast(f"c{i}", "control") for i in range(n_controls))),
    )


def test_global_random_state_is_left_as_found(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("sft", 1)):
        toy.save_tiny("llama", tmp_path / name, seed=seed)
    for module in (
        "sklearn.linear_model",
        "scipy.stats",
        "transformers",
        "rich.progress",
        "pandas",
    ):
        importlib.import_module(module)  # what an import draws is not our doing
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    lineage = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "sft")
    prompts = tiny_set()
    activations, _ = harvest_stages(lineage, prompts, progress=False)
    bank = probes.fit(activations["sft"], prompts, n_permutations=9, n_bootstrap=9, progress=False)
    probes.dmu_sweep(activations, prompts, n_flips=9, n_bootstrap=9, progress=False)
    update = mw.svd(lineage.diff("base", "sft"), "blocks.0.mlp.out", rank=2, progress=False)
    mw.project(update, bank, lineage, prompts, n_null=9, progress=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]


def test_same_seed_same_numbers_other_seed_other_nulls(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("sft", 1)):
        toy.save_tiny("llama", tmp_path / name, seed=seed)
    difference = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "sft").diff("base", "sft")
    site = "blocks.0.mlp.out"
    first, again, other = (
        mw.svd(difference, site, rank=2, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert first.equals(again)
    assert first[site].facts["null_edge"] != other[site].facts["null_edge"]
    assert float((first[site].scale - other[site].scale).abs().max()) < 1e-4


def settings_classes() -> list[type]:
    """Frozen dataclasses that configure something, by their name."""
    found = []
    for package in (mw, probes):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "backends" in info.name:
                continue
            module = importlib.import_module(info.name)
            found += [
                item
                for item in vars(module).values()
                if isinstance(item, type)
                and dataclasses.is_dataclass(item)
                and item.__module__ == info.name
                and item.__name__.endswith(("Settings", "Config", "Recipe", "Size", "Phase"))
            ]
    return found


def test_every_setting_is_read_somewhere() -> None:
    classes = settings_classes()
    assert decompose.SvdSettings in classes
    read = {
        node.attr
        for path in [*ROOT.glob("mi_weightspace/**/*.py"), *ROOT.glob("probes/**/*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    for item in classes:
        unread = {f.name for f in dataclasses.fields(item)} - read
        assert not unread, f"{item.__name__}: {unread} are never read"


@pytest.mark.quick
def test_no_print_in_the_library() -> None:
    for path in [*ROOT.glob("mi_weightspace/**/*.py"), *ROOT.glob("probes/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"
