"""The benchmark's checkpoints: real folders, and what is planted is found where it was planted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

import mi_weightspace as mw
from benchmarks.collect import page
from benchmarks.machine import Peak
from benchmarks.make_checkpoint import PRESETS, make
from mi_weightspace.core.direction_io import load_directions
from mi_weightspace.spectral.blocks import private_bytes
from mi_weightspace.spectral.progress import rates

pytestmark = pytest.mark.quick


def test_the_planted_direction_is_found_in_its_matrix(tmp_path: Path) -> None:
    folder = make(tmp_path / "family", PRESETS["tiny"], layers=2)
    truth = json.loads((folder / "truth.json").read_text())
    lineage = mw.load_lineage(
        base=folder / "base", sft=folder / "sft", dpo=folder / "dpo"
    )  # opening checks every header
    steps = [lineage.diff("base", "sft"), lineage.diff("sft", "dpo")]
    directions = load_directions(folder / "probes.safetensors")
    assert len(directions) == 16 and directions[0].n_controls == 39
    found = mw.project(
        mw.svd(steps, rank=4, progress=False), directions[:2], n_null=199, progress=False
    ).table
    named = found.loc[found["verdict"] == "aligned", ["stage", "site", "direction"]]
    assert named.to_numpy().tolist() == [[truth["stage"], truth["site"], truth["direction"]]]


def test_peak_sees_memory_that_is_given_back() -> None:
    before = private_bytes()
    peak = Peak()
    peak.start()
    held = torch.ones(2**26)  # 256 MiB
    size = held.nbytes
    time.sleep(0.2)
    del held
    time.sleep(0.05)
    assert private_bytes() < before + size / 2
    assert before + 0.9 * size < peak.stop() < before + 1.5 * size


def test_rates_in_words_and_results_on_one_page() -> None:
    assert rates(3, 8, 4 * 10**9, 100.0, 2.0) == "3/8 matrices, 2.00 GB/s, 50 GFLOP/s"
    text = page()
    assert "## One matrix, 5120 × 13696" in text and "not measured" in text
