"""The largest singular part of a change is not always the one that acts: the report says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.verdict import Word
from mi_weightspace.models.load import load
from mi_weightspace.models.toy import tiny_model
from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.differences.run import decompose_difference

SITE = "blocks.1.mlp.out"
ROWS = torch.randint(4, 300, (48, 6), generator=generator(0, "rows"))
CONFIG: dict[str, Any] = {
    "sites": (SITE,),
    "n_components": 2,
    "batch_size": 8,
    "n_steps": 60,
    "lr": 2e-3,
    "importance_lr": 5e-3,
    "log_every": 5,
    "importance": {"kind": "layerwise_mlp", "hidden": (8,)},
}
IDLE, ACTIVE = 6.0, 3.0


def changed(idle: float) -> DifferenceDecomposition:
    """A write of size `ACTIVE` read where activations are largest, and one of size `idle` read
    where they hardly go; the second is the top singular part if `idle` is larger."""
    base = tiny_model("llama")
    hidden = load(base).run(ROWS, capture=[f"{SITE}:in"]).captured[f"{SITE}:in"].flatten(0, 1)
    spread, axes = torch.linalg.eigh(hidden.double().T @ hidden.double())
    assert float(spread[0]) < 1e-2 * float(spread[-1])
    write = torch.linalg.qr(torch.randn(base.config.hidden_size, 2, generator=generator(0, "w")))[0]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        matrix = tuned.model.layers[1].mlp.down_proj.weight
        matrix.add_(ACTIVE * torch.outer(write[:, 0], axes[:, -1].float()))
        matrix.add_(idle * torch.outer(write[:, 1], axes[:, 0].float()))
    return decompose_difference(
        {"base": base, "sft": tuned},
        ROWS,
        CONFIG,
        held_out=ROWS[:16],
        progress=False,
        evaluation={"budgets": (3,), "n_pgd_batches": 2},
    )


@pytest.fixture(scope="module")
def idle_on_top() -> DifferenceDecomposition:
    return changed(IDLE)


def test_an_idle_top_part_is_said_to_bear_no_load(idle_on_top: DifferenceDecomposition) -> None:
    table = idle_on_top.tables["singular"].set_index("part")
    assert float(table["value"][0]) == pytest.approx(IDLE, rel=1e-4)
    assert float(table["value"][1]) == pytest.approx(ACTIVE, rel=1e-4)
    assert float(table["energy"][0]) == pytest.approx(0.8, rel=1e-3)
    assert list(table["verdict"]) == [Word.NOT_LOAD_BEARING, Word.LOAD_BEARING]
    assert float(table["reverted"][0]) < 0.05 < 0.9 < float(table["reverted"][1])
    assert float(table["kept"][0]) > 0.9 and float(table["kept"][1]) < 0.05
    assert float(table["update"][0]) == pytest.approx(1.0)  # the only update there is
    said = [text for text in idle_on_top.reservations if "Top singular part" in text]
    assert len(said) == 1 and f"{SITE}@sft" in said[0] and "80%" in said[0]


def test_components_follow_what_acts_and_not_what_is_large(
    idle_on_top: DifferenceDecomposition,
) -> None:
    table = idle_on_top.to_pandas("components").set_index("component")["mean_importance"]
    assert float(table.max()) > 0.5 and float(table.min()) < 0.1


def test_a_top_part_that_acts_is_not_called_idle() -> None:
    found = changed(0.5)
    table = found.tables["singular"].set_index("part")
    assert list(table["verdict"]) == [Word.LOAD_BEARING, Word.NOT_LOAD_BEARING]
    assert not [text for text in found.reservations if "Top singular part" in text]
