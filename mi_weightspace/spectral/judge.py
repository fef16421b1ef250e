"""From what was measured to a verdict word (design §6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mi_weightspace.core.stats import rank_p
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.spectral.measure import Row
from mi_weightspace.spectral.stage_evidence import StageEvidence

GONE = "The matrix is gone: cosines describe, nothing is tested."
OWN_WEIGHTS = (
    "Components of a model's own weights, not of a difference: cosines describe, nothing is tested."
)
WRITTEN_SHARE = 0.5
"""A matrix is where a stage wrote a change only if it writes at least half of it."""
ALIGNED_RATES = (
    "accepted in 2 of 20 innocent later stages and 0 of 20 null lineages, and found 9 of 20 "
    "planted stages (trained organisms, seeds 300-319)"
)
"""Probe bank of the SFT stage, every matrix of both steps, weights alone.

A stage counts when any of its matrices gets the word."""


def rank(rows: Sequence[Row]) -> None:
    """Max-T rank of each row's statistic among its label's controls, over all rows."""
    largest: dict[tuple[str, int], Tensor] = {}
    for row in rows:
        if row.ranked is None:
            continue
        key = (row.direction.label, len(row.ranked))
        own = torch.nan_to_num(row.ranked[1:], nan=0.0)
        largest[key] = torch.maximum(largest[key], own) if key in largest else own
    for row in rows:
        if row.ranked is not None:
            null = largest[row.direction.label, len(row.ranked)]
            row.values["p_lda_rank"] = float(rank_p(row.ranked[0], null))


def effect_shares(rows: Sequence[Row]) -> None:
    """Signed share of each matrix in its stage's total realised write along the direction."""
    totals: dict[tuple[str, str], float] = {}
    for row in rows:
        key = (row.parts.stage, row.direction.label)
        totals[key] = totals.get(key, 0.0) + abs(row.values.get("effect", 0.0))
    for row in rows:
        effect, total = row.values.pop("effect", None), totals[row.parts.stage, row.direction.label]
        row.values["effect_share"] = math.nan if effect is None or not total else effect / total


def judge(row: Row, evidence: StageEvidence | None, alpha: float) -> Verdict:
    values = row.values
    run = "p_G" in values
    values["alpha"] = alpha
    values["p_adjusted"] = values.get("p_G" if run else "p_lda_rank", math.nan)
    word, reservations = _run_word(values, evidence, alpha) if run else _weights_word(values, alpha)
    if row.parts.method == "vpd" and row.parts.source is None:
        word, reservations = Word.UNDERPOWERED, (OWN_WEIGHTS,)
    elif not float(values.get("fro") or 0.0):
        word, reservations = Word.NO_CHANGE, ()
    values["verdict"] = str(word)
    subject = f"{values['stage']} / {values['site']} / {row.direction.label}"
    if word == Word.WRITTEN_HERE and values.get("named_k", 1) != 1:
        k = values["named_k"]
        subject += f" (subspace, {k})" if k else " (no leading subspace holds the change)"
    numbers = ("stage_gate_p", "G", "p_G", "R", "R_lda", "p_lda_rank", "p_sign", "cosine")
    kept = {k: values[k] for k in (*numbers, "n_controls") if k in values}
    return Verdict(word, subject, kept, reservations)


def _vetoed(values: Mapping[str, Any], *keys: str) -> Word | None:
    """A veto by rounding, or because none of the vectors asked about is resolved."""
    if values["rounding_flag"] == "red":
        return Word.BELOW_FLOOR
    return None if any(values.get(key) for key in keys) else Word.UNRESOLVED


def _run_word(
    values: Mapping[str, Any], evidence: StageEvidence | None, alpha: float
) -> tuple[Word, tuple[str, ...]]:
    assert evidence is not None
    if "R" not in values:
        return Word.NOT_SIGNIFICANT, (GONE,)
    if evidence.smallest_p > alpha:
        n = evidence.n_controls
        text = f"{n} controls cannot reach p = {alpha:g}; at least {math.ceil(1 / alpha) - 1} can."
        return Word.UNDERPOWERED, (text,)
    if values["p_G"] > alpha:
        return Word.NOT_SIGNIFICANT, ()
    if values["stage_gate_p"] > alpha:
        return Word.ALIGNED_NOT_SPECIFIC, ()
    if values["written_share"] < WRITTEN_SHARE:
        share = f"{100 * values['written_share']:.0f} % of the stage's change is written here."
        return Word.STAGE_DISTRIBUTED, (share,)
    return _vetoed(values, "resolved", "resolved_row_normalised") or Word.WRITTEN_HERE, ()


def _weights_word(values: Mapping[str, Any], alpha: float) -> tuple[Word, tuple[str, ...]]:
    """The words open to weights and a stored direction; the strongest is `aligned`."""
    if "R" not in values:
        return Word.NOT_SIGNIFICANT, (GONE,)
    signs = values["p_sign"] <= alpha and values["p_row_normalised"] <= alpha
    rank = values.get("p_lda_rank", math.nan)
    if math.isnan(rank):
        strongest = Word.ALIGNED_NO_CONTROLS
        passed = signs
    elif values["n_controls"] < 1 / alpha - 1:
        n = values["n_controls"]
        return Word.UNDERPOWERED, (f"{n} controls cannot reach p = {alpha:g} by rank.",)
    else:
        strongest = Word.ALIGNED
        passed = rank <= alpha and values["p_row_normalised"] <= alpha
    if not passed:
        return Word.NOT_SIGNIFICANT, ()
    veto = _vetoed(values, "resolved_row_normalised")
    if veto is not None:
        return veto, ()
    if values.get("explained_by"):
        return Word.ALIGNED_NUISANCE, (f"The change is closer to {values['explained_by']}.",)
    return strongest, (f"Without running the stages this word is {ALIGNED_RATES}.",)
