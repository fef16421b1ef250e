"""``mi-weightspace vpd --diff`` from checkpoints to a run folder, a plan, and its refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mi_weightspace as mw
from mi_weightspace.cli import main
from mi_weightspace.models import toy

SITE = "blocks.1.mlp.out"
SETTINGS = """
importance: {kind: layerwise_mlp, hidden: [4]}
n_steps: 3
batch_size: 4
n_components: 2
"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("diff")
    toy.save_tiny("llama", folder / "base", seed=0)
    shutil.copytree(folder / "base", folder / "sft")
    file = folder / "sft" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.3
    save_file(tensors, file, metadata={"format": "pt"})
    for name, seed in (("ids", 0), ("broad", 1)):
        draw = np.random.default_rng(seed)
        np.save(folder / f"{name}.npy", draw.integers(4, 300, (16, 8)))
    (folder / "small.yaml").write_text(SETTINGS)
    return folder


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def asked(ground: Path, out: object, *more: object) -> list[object]:
    return ["vpd", ground / "base", ground / "sft", "--diff", "--tokens", ground / "ids.npy",
            "--sites", SITE, "--ladder", "2", "--config", ground / "small.yaml", "--quiet",
            "--out", out, *more]  # fmt: skip


def test_a_run_folder_that_loads_and_replays(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(*asked(ground, out, "--broad", ground / "broad.npy")) == 0
    said = capsys.readouterr().out
    parts: Any = mw.load_report(out)
    assert parts.kind == "vpd-difference" and parts.sites == (f"{SITE}@sft",)
    assert set(parts.config["units"]) == {"behaviour", "broad"}
    assert f"{SITE}@sft" in said and f"run folder: {out}" in said
    assert run("replay", out, "--out", tmp_path / "again") == 0
    again: Any = mw.load_report(tmp_path / "again")
    assert all(torch.equal(v, again.arrays[k]) for k, v in parts.arrays.items())


def test_equal_checkpoints_end_with_no_change(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = asked(ground, tmp_path / "same")
    call[2] = ground / "base"
    assert run(*call) == 0
    assert "no change" in capsys.readouterr().out
    assert mw.load_report(tmp_path / "same").kind == "vpd-difference"


def test_a_plan_needs_no_tokens(ground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("vpd", "--diff", ground / "base", ground / "sft", "--sites", SITE, "--plan") == 0
    said = capsys.readouterr().out
    for words in ("differences of 1 stage", "one accelerator of 80 GB: fits", "tokens a second"):
        assert words in said


def test_refusals(ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.save_tiny("gpt2", tmp_path / "other", seed=0)
    out = tmp_path / "out"
    cases: list[tuple[list[object], str]] = [
        (["vpd", ground / "base", ground / "sft", "--tokens", "x", "--out", out], "--diff"),
        (["vpd", "--diff", ground / "base", "--tokens", "x", "--out", out], "at least two"),
        (asked(ground, out, "--regime", "odd"), "selective or faithful"),
        (["vpd", ground / "base", "--broad", "x", "--tokens", "x", "--out", out], "--broad"),
        ([*asked(ground, out)[:1], tmp_path / "other", *asked(ground, out)[2:]], "architecture"),
    ]
    for call, words in cases:
        assert run(*call) == 1, call
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said
        assert not out.exists()
