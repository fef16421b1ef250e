"""From numbers to words: every word of both situations, ranks and shares against naive loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mi_weightspace.core.components import Components
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.core.verdict import Word
from mi_weightspace.spectral.judge import GONE, effect_shares, judge, rank
from mi_weightspace.spectral.measure import Row
from mi_weightspace.spectral.stage_evidence import StageEvidence

pytestmark = pytest.mark.quick

D = 4
SOUND: dict[str, Any] = {
    "stage": "sft", "site": "blocks.1.mlp.out", "fro": 1.0, "resolved": True,
    "resolved_row_normalised": True, "explained_by": "", "rounding_flag": "none", "R": 9.0,
    "p_sign": 0.001, "p_row_normalised": 0.001, "cosine": 0.9, "nuisance_cosine": 0.2,
    "nuisance_name": "activation mean", "n_controls": 39,
}  # fmt: skip
GATED: dict[str, Any] = {"stage_gate_p": 0.025, "G": 0.8, "p_G": 0.025, "written_share": 0.9}
NEITHER: dict[str, Any] = {"resolved": False, "resolved_row_normalised": False}
RANKED: dict[str, Any] = {"p_lda_rank": 0.025}


def row(label: str = "authority", stage: str = "sft", **values: Any) -> Row:
    site = Site(
        "blocks.1.mlp.out", "mlp.out", 1, D, D, Space("mlp_hidden", 1), Space("resid_post", 1)
    )
    parts = Components(site, torch.eye(D)[:1], torch.eye(D)[:1], torch.ones(1), stage=stage)
    direction = Direction(torch.ones(D), site.writes, label)
    return Row(parts, "write", direction, {"stage": stage} | values)


def ran(n_controls: int = 39) -> StageEvidence:
    return StageEvidence("authority", {}, {}, {}, {}, {}, n_controls)


@pytest.mark.parametrize(
    ("change", "word", "says"),
    [
        ({}, Word.WRITTEN_HERE, ""),
        ({"p_G": 0.05, "stage_gate_p": 0.05}, Word.WRITTEN_HERE, ""),
        ({"written_share": 0.5}, Word.WRITTEN_HERE, ""),
        (
            {"written_share": 0.494},
            Word.STAGE_DISTRIBUTED,
            "49 % of the stage's change is written here.",
        ),
        ({"p_G": 0.051}, Word.NOT_SIGNIFICANT, ""),
        ({"p_G": 0.051, "stage_gate_p": 0.5}, Word.NOT_SIGNIFICANT, ""),
        ({"stage_gate_p": 0.051}, Word.ALIGNED_NOT_SPECIFIC, ""),
        ({"rounding_flag": "red"}, Word.BELOW_FLOOR, ""),
        ({"rounding_flag": "amber"}, Word.WRITTEN_HERE, ""),
        ({"resolved": False}, Word.WRITTEN_HERE, ""),
        ({"resolved_row_normalised": False}, Word.WRITTEN_HERE, ""),
        ({"resolved": False, "resolved_row_normalised": False}, Word.UNRESOLVED, ""),
        ({"resolved": False, "rounding_flag": "red"}, Word.BELOW_FLOOR, ""),
        (
            {"resolved": False, "resolved_row_normalised": False, "p_G": 0.3},
            Word.NOT_SIGNIFICANT,
            "",
        ),
        ({"fro": 0.0}, Word.NO_CHANGE, ""),
        ({"R": None}, Word.NOT_SIGNIFICANT, GONE),
        # what only describes never decides
        ({"p_sign": 1.0, "p_row_normalised": 1.0, "p_lda_rank": 1.0}, Word.WRITTEN_HERE, ""),
        ({"explained_by": "activation mean"}, Word.WRITTEN_HERE, ""),
        ({"p_G": 0.9, "p_sign": 0.001, "p_lda_rank": 0.001}, Word.NOT_SIGNIFICANT, ""),
    ],
)
def test_words_where_the_stages_were_run(change: dict[str, Any], word: Word, says: str) -> None:
    values = {k: v for k, v in (SOUND | GATED | RANKED | change).items() if v is not None}
    given = row(**values)
    verdict = judge(given, ran(), 0.05)
    assert verdict.word == word == given.values["verdict"]
    assert verdict.reservations == ((says,) if says else ())
    assert given.values["p_adjusted"] == values["p_G"]
    assert given.values["alpha"] == 0.05
    assert verdict.subject == "sft / blocks.1.mlp.out / authority"


@pytest.mark.parametrize(
    ("change", "word", "says"),
    [
        ({}, Word.ALIGNED, "accepted in"),
        ({"p_lda_rank": 0.05, "p_row_normalised": 0.05}, Word.ALIGNED, "accepted in"),
        ({"p_lda_rank": 0.075}, Word.NOT_SIGNIFICANT, ""),
        ({"p_row_normalised": 0.06}, Word.NOT_SIGNIFICANT, ""),
        ({"p_sign": 1.0}, Word.ALIGNED, "accepted in"),
        ({"n_controls": 18}, Word.UNDERPOWERED, "18 controls"),
        ({"n_controls": 19}, Word.ALIGNED, "accepted in"),
        ({"p_lda_rank": None, "n_controls": 0}, Word.ALIGNED_NO_CONTROLS, "accepted in"),
        ({"p_lda_rank": math.nan}, Word.ALIGNED_NO_CONTROLS, "accepted in"),
        ({"p_lda_rank": None, "p_sign": 0.06}, Word.NOT_SIGNIFICANT, ""),
        ({"p_lda_rank": None, "p_row_normalised": 0.06}, Word.NOT_SIGNIFICANT, ""),
        ({"rounding_flag": "red"}, Word.BELOW_FLOOR, ""),
        ({"resolved_row_normalised": False}, Word.UNRESOLVED, ""),
        ({"resolved": False}, Word.ALIGNED, "accepted in"),
        ({"explained_by": "activation mean"}, Word.ALIGNED_NUISANCE, "activation mean"),
        (
            {"explained_by": "activation mean", "p_lda_rank": None},
            Word.ALIGNED_NUISANCE,
            "activation mean",
        ),
        ({"nuisance_cosine": 0.99}, Word.ALIGNED, "accepted in"),
        ({"explained_by": None}, Word.ALIGNED, "accepted in"),
        ({"R": None}, Word.NOT_SIGNIFICANT, GONE),
        ({"fro": 0.0}, Word.NO_CHANGE, ""),
        ({"fro": 0.0, "R": None}, Word.NO_CHANGE, ""),
    ],
)
def test_words_of_weights_alone(change: dict[str, Any], word: Word, says: str) -> None:
    values = {k: v for k, v in (SOUND | RANKED | change).items() if v is not None}
    given = row(**values)
    verdict = judge(given, None, 0.05)
    assert verdict.word == word == given.values["verdict"]
    assert says in " ".join(verdict.reservations)
    assert bool(verdict.reservations) == bool(says)
    rank_p = values.get("p_lda_rank", math.nan)
    assert given.values["p_adjusted"] == pytest.approx(rank_p, nan_ok=True)


@pytest.mark.parametrize(
    ("n", "alpha", "enough"),
    [(18, 0.05, False), (19, 0.05, True), (98, 0.01, False), (99, 0.01, True)],
)
def test_controls_that_cannot_reach_the_level(n: int, alpha: float, enough: bool) -> None:
    values: dict[str, Any] = SOUND | GATED | {"p_G": 1 / (n + 1), "stage_gate_p": 1 / (n + 1)}
    run = judge(row(**values), ran(n), alpha)
    small: dict[str, Any] = {
        "p_sign": 0.001,
        "p_row_normalised": 0.001,
        "p_lda_rank": 1 / (n + 1),
        "n_controls": n,
    }
    alone = judge(row(**(SOUND | small)), None, alpha)
    assert (run.word == Word.WRITTEN_HERE) == (alone.word == Word.ALIGNED) == enough
    if not enough:
        assert run.word == alone.word == Word.UNDERPOWERED
        assert f"at least {round(1 / alpha) - 1}" in run.reservations[0]


@pytest.mark.parametrize(
    ("k", "says"),
    [(1, ""), (3, " (subspace, 3)"), (0, " (no leading subspace holds the change)")],
)
def test_a_subspace_is_named_where_no_component_holds_the_change(k: int, says: str) -> None:
    verdict = judge(row(**(SOUND | GATED), named_k=k), ran(), 0.05)
    assert verdict.word == Word.WRITTEN_HERE
    assert verdict.subject == f"sft / blocks.1.mlp.out / authority{says}"
    assert verdict.evidence["p_G"] == 0.025


def test_rank_is_max_t_over_all_matrices_of_a_label() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [row(stage=f"s{i % 2}") for i in range(5)] + [row("other")]
    for given in rows:
        given.ranked = torch.rand(20, generator=draw)
    rows[2].ranked[4] = math.nan  # pyright: ignore[reportOptionalSubscript]
    silent = row()
    rank([*rows, silent])
    for given in rows:
        fellows = [r for r in rows if r.direction.label == given.direction.label]
        beaten = 0
        for control in range(1, 20):
            largest = max(
                v for r in fellows
                if not math.isnan(v := float(r.ranked[control]))  # pyright: ignore[reportOptionalSubscript]
            )  # fmt: skip
            beaten += largest >= float(given.ranked[0])  # pyright: ignore[reportOptionalSubscript]
        assert given.values["p_lda_rank"] == pytest.approx((1 + beaten) / 20)
    assert "p_lda_rank" not in silent.values


def test_effect_shares_keep_their_sign_and_add_up_within_a_stage() -> None:
    rows = [row(effect=3.0), row(effect=-1.0), row(), row(stage="dpo", effect=5.0), row("b")]
    effect_shares(rows)
    shares = [r.values["effect_share"] for r in rows]
    assert shares == pytest.approx([0.75, -0.25, math.nan, 1.0, math.nan], nan_ok=True)
    assert all("effect" not in r.values for r in rows)
