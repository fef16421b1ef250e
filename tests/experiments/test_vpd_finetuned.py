"""The fine-tuned toy's experiment, cut down to what a test can wait for: what a row holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import vpd_finetuned
from experiments.vpd_finetuned import BATCH, PRESETS, FinetunedRunConfig, run
from experiments.vpd_targets.finetuned import FineTuned, FineTunedConfig, build
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import make_config

TARGET = FineTunedConfig(steps=120, tuning_steps=80, batch_size=128)
CUT = {"n_steps": 6, "batch_size": 32}


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpd_finetuned, "N_BATCHES", 2)
    monkeypatch.setattr(vpd_finetuned, "PGD", (3,))


def forward(toy: FineTuned, x: Tensor, rank: int) -> Tensor:
    """The base with the first singular parts of both changes, written out in float64."""
    matrices = []
    for site, path in toy.sites.items():
        before = toy.base.get_parameter(f"{path}.weight").double()
        u, s, vh = torch.linalg.svd(toy.change(site).double())
        matrices.append(before + u[:, :rank] * s[:rank] @ vh[:rank])
    embedding = toy.base.embedding.double()
    h = x.double() @ embedding
    return (h + (h @ matrices[0].T).clamp(min=0) @ matrices[1].T) @ embedding.T


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_and_its_resumption(preset: str, tmp_path: Path) -> None:
    config = FinetunedRunConfig(preset, (0,), TARGET, overrides=CUT | {"n_components": 5})
    row = run(config, tmp_path, progress=False).iloc[0]
    written = (tmp_path / "rows.jsonl").read_text()
    again = run(config, tmp_path, progress=False)
    assert (tmp_path / "rows.jsonl").read_text() == written
    assert len(again) == 1 and again.iloc[0]["pgd_3"] == row["pgd_3"]
    for site in ("mlp_in", "mlp_out"):
        for group, size in (("new", 5), ("base", 10), ("idle", 5)):
            assert len(row[f"needs/{site}/{group}"]) == size
        assert row[f"l0_0.1/{site}"] <= row[f"l0_0/{site}"] <= 5
        assert 0 <= row[f"remainder/{site}"] < 1
    assert row["full"] < 1e-10
    ends = row["corners"]
    assert ends["m=g, d=(0.0, 0.0)"] == pytest.approx(row["ci"], rel=1e-3)
    assert ends["m=1, d=(0.0, 0.0)"] == pytest.approx(row["unmasked"], rel=1e-3)
    assert ends["m=1, d=(1.0, 1.0)"] < 1e-10
    assert len(ends) == 8 and ends[row["corner_at"]] == row["corner"] == max(ends.values())
    assert 0 <= row["new_1_or_2"] <= 5

    toy = build(0, 0.0, TARGET)
    draw = generator(0, "vpd_finetuned", "evaluation")
    x = torch.cat([toy.sample(BATCH, draw) for _ in range(2)])
    wanted = forward(toy, x, 24)
    errors = [float((forward(toy, x, k) - wanted).square().mean()) for k in (0, 1, 5)]
    assert row["k0"] == pytest.approx(errors[0], rel=1e-4)
    for k, error in zip((1, 5), errors[1:], strict=True):
        assert row[f"svd_{k}"] == pytest.approx(error / errors[0], rel=1e-4)
        assert row[f"svd_{k}_over_pgd"] == pytest.approx(row[f"svd_{k}"] / row["pgd_3"])
        assert row[f"svd_{k}_attacked"] > 0


def test_the_bound_is_that_of_parts_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts: nothing is left to attack. Few: training improves on the singular parts, whose
    own worst corner is at least their error with the remainder off."""
    monkeypatch.setattr(vpd_finetuned, "BOUND_STEPS", 60)
    assert vpd_finetuned.bounds(0, 24, TARGET)["svd"] < 1e-10
    found = vpd_finetuned.bounds(0, 5, TARGET)
    toy = build(0, 0.0, TARGET)
    x = toy.sample(8 * BATCH, generator(0, "vpd_finetuned", "bounds"))
    wanted = forward(toy, x, 24)
    errors = [float((forward(toy, x, k) - wanted).square().mean()) for k in (0, 5)]
    assert found["svd"] >= errors[1] / errors[0] * (1 - 1e-4)
    assert found["trained"] < found["svd"]


def test_the_presets_are_what_they_are_called() -> None:
    selective, faithful = (make_config(PRESETS[k]) for k in ("selective", "faithful"))
    assert selective.faithfulness.weight == 0 and selective.n_components == 5
    assert faithful.faithfulness.weight == 1 and faithful.n_components == 20
