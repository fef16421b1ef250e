"""A narrow version of the calibration: planted truth, planted absence, a resumable journal."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import null_calibration, null_cells, null_table
from mi_weightspace.core.evidence import row_normalised

WIDTH = 96
pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return null_calibration.run(
        tmp_path_factory.mktemp("nulls"), seed=3, n_draws=3, d=WIDTH, progress=False
    )


@pytest.fixture(scope="module")
def found(journal):
    return null_table.decided(null_table.load(journal))


def test_every_draw_has_every_cell_and_condition(found):
    keys = ["draw", "noise", "share", "confounded", "planted"]
    assert len(found) == 3 * 16 and not found.duplicated(keys).any()


def test_planted_writes_are_found_and_cosines_fooled(found, journal):
    table: Any = null_table.load(journal)
    planted, null = table[table["planted"]], table[~table["planted"]]
    assert (planted["p_lda_rank"] <= 0.05).mean() > 0.9
    assert (null["p_lda_rank"] <= 0.05).mean() < 0.35
    fooled = null[(null["noise"] == "A") & null["confounded"]]
    assert (fooled["p_isotropic"] <= 0.05).mean() > 0.9


def test_rogue_coordinates_hold_their_share_of_variance_and_of_the_difference():
    w = null_cells.world(0, 0, WIDTH)
    for share in null_cells.SHARES:
        values = null_cells.activations(w, share, confounded=False).flatten(0, 2).double()
        variance = values.var(0)
        held = float(variance[w.rogue].sum() / variance.sum())
        assert held == pytest.approx(share, abs=0.1)  # concepts add to the bulk
    matrix = null_cells.difference(w, "A", False, 0, 0).weight("blocks.0.attn.o")
    size = matrix.norm(dim=1)
    assert set(size.topk(3).indices.tolist()) == set(w.rogue.tolist())
    rest = torch.ones(WIDTH, dtype=torch.bool)
    rest[w.rogue] = False
    assert 5 < float(size[w.rogue].min() / size[rest].mean()) < 17


def test_the_plant_is_what_planting_adds():
    w = null_cells.world(0, 1, WIDTH)
    with_, without = (
        null_cells.difference(w, "A", planted, 0, 1).weight("blocks.0.attn.o").double()
        for planted in (True, False)
    )
    u, s, _ = torch.linalg.svd(with_ - without)
    assert abs(float(u[:, 0] @ w.concepts[0].double())) > 0.999
    edge = null_cells.NOISE_STD * 2 * WIDTH**0.5
    assert float(s[0]) == pytest.approx(null_cells.PLANTED * edge, rel=1e-3)
    assert float(s[1]) < 1e-3 * float(s[0])


def test_b_is_rounding_noise_on_the_bfloat16_grid():
    w = null_cells.world(0, 2, WIDTH)
    source = null_cells.difference(w, "B", False, 0, 2)
    assert source.before.stored("blocks.0.attn.o").dtype == torch.bfloat16
    matrix = source.weight("blocks.0.attn.o")
    assert float(matrix.std()) > 2 * null_cells.CHANGE_STD  # noise exceeds the change it hides
    assert float(row_normalised(matrix).norm(dim=1).min()) == pytest.approx(1, abs=1e-4)


def test_confounding_moves_the_target_and_every_control_alike():
    w = null_cells.world(0, 3, WIDTH)
    plain, moved = (
        null_cells.activations(w, 0.9, confounded).mean(1) for confounded in (False, True)
    )
    change = (moved - plain)[:, 0] - (moved - plain)[:, 1]
    assert torch.allclose(change, change[0].expand_as(change), atol=1e-4)
    assert int(change[0].abs().argmax()) == int(w.rogue[0])


def test_an_interrupted_run_goes_on_and_repeats_nothing(journal, tmp_path):
    lines = journal.read_text().splitlines()
    part = tmp_path / "draws.jsonl"
    part.write_text("\n".join(lines[:2]) + "\n" + lines[2][: lines[2].index("}") + 1])
    null_calibration.run(tmp_path, seed=3, n_draws=3, d=WIDTH, progress=False)
    again, whole = null_table.load(part), null_table.load(journal)
    assert sorted(again["draw"].unique()) == [0, 1, 2]
    pd.testing.assert_frame_equal(again.reset_index(drop=True), whole)


def test_the_report_counts_what_the_journal_says(tmp_path):
    row = {
        "noise": "A", "share": 0.5, "confounded": True, "cosine": 0.95, "resolved": True,
        "resolved_row_normalised": True, "nuisance_cosine": 0.1, "explained": False,
        "rounding_flag": "none",
        **{k: 0.5 for k in null_table.TESTS if k.startswith(("p_", "stage"))},
        "word": "not significant", "word_run": "not significant",
    }  # fmt: skip
    hit = row | {"p_lda_rank": 0.025, "p_row_normalised": 0.05, "word": "aligned"}
    cells = [
        {"noise": noise, "share": share, "confounded": confounded}
        for noise, share in null_table.CELLS
        for confounded in (True, False)
    ]
    lines = []
    for draw in range(10):
        rows = [row | c | {"planted": False} for c in cells]
        rows += [hit | c | {"planted": True} for c in cells]
        if draw < 3:
            rows[0] = hit | {"planted": False}
        lines.append(json.dumps({"draw": draw, "rows": rows}) + "\n")
    path = tmp_path / "draws.jsonl"
    path.write_text("".join(lines))
    text = null_table.report(path)
    shipped = next(x for x in text.splitlines() if x.startswith(f"| {null_table.RULES['shipped']}"))
    assert "30.0 (6.7–65.2)" in shipped and "100.0 (69.2–100.0)" in shipped
    assert "| no | " in shipped and shipped.endswith("| yes |")
