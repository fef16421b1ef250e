"""The score of VPD of differences: what it asks for, and one small cell from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import score_diff_vpd as score
from mi_weightspace.organisms.language import LOUD, QM, REGISTERS, Language

SITE = "blocks.2.mlp.out"
SHARES = {"a": 1, "b": 3, "c": 2}


def test_rows_end_where_the_answer_is_decided() -> None:
    language = Language(3)
    rows = score.streams(language, 3)
    assert {r.shape[1] for r in rows.values()} == {QM + 1}
    assert all((r[:, -1] == language.ids["QM"]).all() for r in rows.values())
    words = {int(i) for name in REGISTERS for i in language.lexicon(name)}
    assert not words & set(rows["broad"].flatten().tolist())
    first, held_out = (rows[f"behaviour{part}"] for part in ("", "_held_out"))
    assert words & set(first.flatten().tolist()) and not (first[:128] == held_out).all()
    asked = score.controls(language, 3)
    assert len(asked) == len(LOUD) and asked[0].yes == (language.ids["ALT00"],)


def test_rankings_are_read_against_the_truth() -> None:
    truth: dict[str, Any] = {
        "planted_sites": ["*"],
        "shares": {"carriers": ["b"], "sites": {k: {"share": s} for k, s in SHARES.items()}},
    }
    found = score._against_truth(
        {"vpd": [0.1, 0.9, 0.2], "fro": [3.0, 1.0, 2.0]}, ["a@sft", "b@sft", "c@sft"], truth
    )
    assert found["first_vpd"] and not found["first_fro"]
    assert found["spearman_vpd"] == pytest.approx(1) and found["spearman_fro"] == pytest.approx(-1)


def test_the_table_counts_what_was_asked_for() -> None:
    cells = [
        {"organism": "deference", "owed_sft_behaviour": owed, "top_right": right}
        | {f"l0_sft_{s}": 1.0 for s in ("behaviour", "broad", "broad_unchanged")}
        | {f"first_{r}": True for r in ("vpd", "svd_effect", "svd_cosine", "fro")}
        | {"n_bearing_dpo": 0, "pgd_of_k0": 0.1}
        for owed, right in ((1.0, True), (0.9, False))
    ]
    cells.append({"organism": "null", "n_bearing": 1, "pgd_of_k0": 0.2})
    text = score.summarise(pd.DataFrame(cells))
    assert "| deference | ≥ 95 % of behaviour tokens owed to SFT | 1/2" in text
    assert "| deference | planted matrix carries most | 1/2" in text
    assert "| deference | no DPO component blamed | 2/2" in text
    assert "| null | the behaviour is put down to no component | 0/1" in text


def test_a_finished_cell_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(score, "score_cell", lambda *a: calls.append(a) or {"organism": a[0]})
    for _ in range(2):
        assert score.kept_cell("null", 1, "micro", tmp_path) == {"organism": "null"}
    assert len(calls) == 1
    assert json.loads((tmp_path / "cells" / "null-micro-1.json").read_text())


@pytest.mark.slow
def test_one_cell_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted rank-one write, its own matrix alone decomposed."""
    monkeypatch.setenv("MI_WEIGHTSPACE_CACHE", str(tmp_path))
    changes = {"sites": (SITE,), "n_steps": 100}
    cell = score.score_cell("rank1", 0, changes=changes)
    assert cell["planted_found"] == f"{SITE}@sft"
    assert cell["cosine"] > 0.99 and cell["reverted_of_k0"] > 0.9
    assert len(cell["components"]) >= 1 and json.dumps(cell, default=float)
