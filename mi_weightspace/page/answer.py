"""The one-screen answer: a verdict and the three numbers that carry it.

A number is never shown without its n, its null and its interval; where one of them was not
computed the page says so instead of leaving it out.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mi_weightspace.core.report import Report
from mi_weightspace.core.stats import binomial_interval
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.page.markup import Frame, number, probability
from mi_weightspace.page.vpd_numbers import vpd_numbers

N_NUMBERS = 3
ALPHA = 0.05
MEANING: dict[str, str] = {
    Word.WRITTEN_HERE: "this stage changed the direction more than every calibrated control "
    "allows, and this matrix writes at least half of the change",
    Word.READ_HERE: "this matrix reads the direction beyond null, controls and multiplicity",
    Word.STAGE_DISTRIBUTED: "the stage changed the direction beyond its controls, but no single "
    "matrix stands out",
    Word.ALIGNED: "the change lies along the direction more than along its controls; without "
    "running the stages nothing stronger can be said",
    Word.ALIGNED_NOT_SPECIFIC: "matrices stand out, but the stage moved its controls as much",
    Word.ALIGNED_NO_CONTROLS: "the change lies along the direction; with no control contrasts it "
    "is unknown whether that is special",
    Word.ALIGNED_NUISANCE: "a nuisance direction explains the match",
    Word.NO_CHANGE: "the weights are identical: nothing was written, anywhere",
    Word.BELOW_FLOOR: "what differs is no larger than rounding",
    Word.NOT_SIGNIFICANT: "the test had enough controls to find a change and found none beyond "
    "theirs",
    Word.UNRESOLVED: "the direction of the change cannot be told from its neighbours",
    Word.UNDERPOWERED: "too few controls or pairs to say either way; this is not a no",
    Word.AXIS_SPECIFIC: "the shift exceeds that of every control contrast",
    Word.NOT_AXIS_SPECIFIC: "control contrasts shift as much",
    Word.LOAD_BEARING: "the behaviour changes when it is removed or added alone",
    Word.NECESSARY_ONLY: "the behaviour goes when it is taken away; adding it was not shown to "
    "bring the behaviour about",
    Word.DETECTOR_ONLY: "it can be read there, but the model does not use it: taking it away "
    "changes the behaviour no more than null directions do",
    Word.GENERIC: "taking it away changes the behaviour, and other things as much",
    Word.NOT_LOAD_BEARING: "the behaviour does not change when it is removed or added alone",
    Word.UNCONVERGED: "the computation stopped before its own criterion was met",
    Word.NOT_DECOMPOSABLE: "the method does not apply to this matrix",
    Word.INSTRUMENT_TOO_WEAK: "the detector does not see the openly misaligned stage either, so "
    "its silence about the hidden one means nothing",
    Word.PROMPT_OR_FINETUNING: "a stage that never misbehaved scores as high: what is read is the "
    "prompts, or that there was training at all",
    Word.NOT_DETECTED: "no detector is above the scores that permuted labels give, at this n",
    Word.NORM_NOT_DEFEATED: "the distance of the class means itself still shows the behaviour: "
    "nothing was hidden from it",
    Word.SAE_ADDS_NOTHING: "a tuned linear probe on the activations reads what was hidden, no "
    "worse than the SAE",
    Word.SAE_UNRESOLVED: "the SAE reads what was hidden; whether better than its rivals is open",
    Word.NON_LINEAR_CODE: "what was hidden is there as a non-linear code, which dense non-linear "
    "probes read too",
    Word.SAE_ADVANTAGE: "the SAE reads what was hidden and every rival, linear or not, reads it "
    "worse",
}
FOUND = frozenset(
    {
        Word.WRITTEN_HERE,
        Word.READ_HERE,
        Word.STAGE_DISTRIBUTED,
        Word.ALIGNED,
        Word.ALIGNED_NOT_SPECIFIC,
        Word.ALIGNED_NO_CONTROLS,
        Word.AXIS_SPECIFIC,
        Word.LOAD_BEARING,
        Word.NECESSARY_ONLY,
        Word.SAE_ADVANTAGE,
        Word.NON_LINEAR_CODE,
        Word.SAE_ADDS_NOTHING,
        Word.SAE_UNRESOLVED,
        Word.NORM_NOT_DEFEATED,
    }
)
"""Words that report something; the others are answers too, and look quieter."""


@dataclass(frozen=True)
class Number:
    """One number of the answer, every field a sentence fragment ready to print."""

    name: str
    value: str
    n: str
    null: str
    interval: str


@dataclass(frozen=True)
class Step:
    """One training stage in the answer's table, every field ready to print."""

    step: str
    verdict: str
    place: str
    gate: str
    behaviour: str


@dataclass(frozen=True)
class Answer:
    """What the page says first.

    Attributes:
        verdict: the deciding word; `subject` what it is about; `meaning` the word in plain
            language; `found` whether it reports something.
        numbers: at most three.
        steps: one row a stage, in order.
    """

    question: str
    verdict: str
    subject: str
    meaning: str
    numbers: tuple[Number, ...]
    steps: tuple[Step, ...] = ()
    found: bool = False


_ORDER = (
    "attribution",
    "project",
    "gate",
    "inoculation",
    "dmu",
    "flip_rate",
    "check",
    "svd",
    "probe",
    "audit",
)
_STRENGTH = (
    Word.LOAD_BEARING,
    Word.NECESSARY_ONLY,
    Word.WRITTEN_HERE,
    Word.READ_HERE,
    Word.STAGE_DISTRIBUTED,
    Word.ALIGNED,
    Word.ALIGNED_NOT_SPECIFIC,
    Word.ALIGNED_NO_CONTROLS,
    Word.AXIS_SPECIFIC,
    Word.SAE_ADVANTAGE,
    Word.NON_LINEAR_CODE,
    Word.SAE_ADDS_NOTHING,
    Word.SAE_UNRESOLVED,
    Word.NORM_NOT_DEFEATED,
    Word.ALIGNED_NUISANCE,
    Word.PROMPT_OR_FINETUNING,
    Word.GENERIC,
    Word.UNDERPOWERED,
    Word.DETECTOR_ONLY,
    Word.NOT_LOAD_BEARING,
    Word.NOT_AXIS_SPECIFIC,
    Word.UNRESOLVED,
    Word.NOT_SIGNIFICANT,
    Word.NOT_DETECTED,
    Word.INSTRUMENT_TOO_WEAK,
    Word.BELOW_FLOOR,
    Word.NO_CHANGE,
)


def _own_verdicts(report: Report) -> tuple[Verdict, ...]:
    """Those about the question: of an attribution the stages', which stand first.

    A matrix that reads the direction is judged from weights alone and may be aligned at a stage
    that changed nothing; that is a detail of its table, not the answer.
    """
    stages = report.tables.get("stages") if report.kind == "attribution" else None
    return report.verdicts if stages is None else report.verdicts[: max(1, len(stages))]


def answer(reports: Sequence[Report], question: str = "") -> Answer:
    """The strongest report decides: attribution, else projection, else DMU, else the rest."""
    by_kind = {report.kind: report for report in reversed(reports)}
    kinds = [*(k for k in _ORDER if k in by_kind), *(k for k in by_kind if k not in _ORDER)]
    deciding = next((by_kind[k] for k in kinds if by_kind[k].verdicts), None)
    numbers = tuple(_numbers(by_kind))[:N_NUMBERS]
    if deciding is None:
        meaning = "these runs describe; none of them tests"
        return Answer(question, "no verdict", "", meaning, numbers)
    ranked = sorted(
        _own_verdicts(deciding),
        key=lambda v: _STRENGTH.index(v.word) if v.word in _STRENGTH else len(_STRENGTH),
    )
    best = ranked[0]
    found = best.word in FOUND
    subjects = [v.subject for v in ranked if v.word == best.word]
    return Answer(
        question,
        str(best.word),
        best.subject if found else ", ".join(dict.fromkeys(subjects[:3])),
        MEANING[best.word],
        numbers,
        tuple(_steps(by_kind.get("attribution"))),
        found,
    )


def _steps(report: Report | None) -> Iterable[Step]:
    stages = None if report is None else _extra(report, "stages")
    if stages is None or "verdict" not in stages:
        return
    for row in stages.to_dict("records"):
        change = row.get("readout_after", math.nan) - row.get("readout_before", math.nan)
        behaviour = "not measured"
        if _known(change):
            behaviour = f"{number(change)} nats"
            if change and row.get("top_carrier"):
                behaviour += f", most through {row['top_carrier']}"
        yield Step(
            f"{row['previous']} → {row['stage']}",
            str(row["verdict"]),
            str(row.get("written_sites") or "—"),
            probability(row.get("gate_p")),
            behaviour,
        )


def _numbers(by_kind: dict[str, Report]) -> Iterable[Number]:
    attribution = by_kind.get("attribution")
    if attribution is not None and _has(attribution, "stages", "gate_p", "gate_statistic"):
        stage, passed = _top_stage(attribution)
        yield from _gate_number(attribution, stage)
        yield from _site_number(attribution, stage)
        if passed:
            yield from _path_number(attribution, stage)
    judged = attribution if attribution is not None else by_kind.get("project")
    if judged is not None:
        yield from _projection_numbers(judged.table)
    if "dmu" in by_kind:
        yield from _dmu_number(by_kind["dmu"].table)
    if "gate" in by_kind:
        yield from _causal_number(by_kind["gate"])
    if "probe" in by_kind:
        yield from _probe_number(by_kind["probe"].table)
    if "svd" in by_kind or "check" in by_kind:
        yield from _size_number(by_kind)
    if "vpd-difference" in by_kind:
        yield from (Number(*fields) for fields in vpd_numbers(by_kind["vpd-difference"]))
    if "vpd" in by_kind:
        yield from (Number(*fields) for fields in vpd_numbers(by_kind["vpd"]))


def _has(report: Report, name: str, *columns: str) -> bool:
    frame = report.tables.get(name)
    return frame is not None and len(frame) > 0 and all(c in frame for c in columns)


def _extra(report: Report, name: str) -> Frame:
    """A further table by name, None where the report has none."""
    return report.tables.get(name)


def _known(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def exceedances(p: float, n_controls: int) -> str:
    """A rank p as what was counted, with the exact 95 % interval of the tail it estimates."""
    if not _known(p) or n_controls <= 0:
        return "not computed"
    k = min(n_controls, max(0, round(p * (n_controls + 1)) - 1))
    low, high = binomial_interval(k, n_controls)
    return (
        f"{k} of {n_controls} controls as large; 95 % interval of that share "
        f"{number(low)} to {number(high)}"
    )


def _top_stage(report: Report) -> tuple[str, bool]:
    """The stage with the smallest gate p, then the largest statistic; whether its gate passes."""
    stages = _extra(report, "stages")
    ranked = stages.sort_values(["gate_p", "gate_statistic"], ascending=[True, False])
    top = ranked.iloc[0]
    return str(top["stage"]), not _known(top["gate_p"]) or float(top["gate_p"]) <= ALPHA


def _gate_number(report: Report, stage: str) -> Iterable[Number]:
    stages = _extra(report, "stages")
    row = stages[stages["stage"] == stage].iloc[0]
    if not _known(row["gate_statistic"]):
        return
    null = ""
    if _has(report, "gate", "stage", "control_max"):
        gate = _extra(report, "gate")
        null = f", largest {number(float(gate[gate['stage'] == stage]['control_max'].max()))}"
    n = int(row["n_controls"])
    # the number shown is the relative change, so what is counted is its rank
    relative = row["gate_p_relative"] if "gate_p_relative" in stages else row["gate_p"]
    yield Number(
        f"stage gate of {stage}: ‖change of the shift‖ / ‖shift before‖",
        number(float(row["gate_statistic"])),
        f"{n} matched controls",
        f"rank among the controls{null}; p = {probability(float(row['gate_p']))}, the larger of "
        "the relative and the absolute one",
        exceedances(float(relative), n),
    )


def _site_number(report: Report, stage: str) -> Iterable[Number]:
    table: Frame = report.table
    if "G" not in table or "p_G" not in table:
        return
    rows = table[(table["stage"] == stage) & table["G"].notna()]
    if not len(rows):
        return
    row = rows.sort_values(["p_G", "G"], ascending=[True, False]).iloc[0]
    n_tests = len(table[table["G"].notna()].drop_duplicates(["stage", "site"]))
    n = int(row["n_controls"]) if _known(row.get("n_controls")) else 0
    n = n or int(_extra(report, "stages")["n_controls"].max())
    yield Number(
        f"site statistic G of {row['site']} at {stage}",
        number(float(row["G"])),
        f"{n} matched controls, {n_tests} matrices",
        f"max-T rank over all matrices of all stages; p = {probability(float(row['p_G']))}",
        exceedances(float(row["p_G"]), n),
    )


def _path_number(report: Report, stage: str) -> Iterable[Number]:
    path = _extra(report, "path")
    if path is None or not len(path) or "n_prompts" not in path:
        return
    rows = path[(path["stage"] == stage) & (path["site"] != "everything else")]
    if not len(rows):
        return
    change = float(rows["readout_after"].iloc[0] - rows["readout_before"].iloc[0])
    signed = rows["path_share"] * (1.0 if change >= 0 else -1.0)
    row = rows.loc[signed.idxmax()]
    readings = [float(row[c]) for c in ("path_share", "revert_effect", "add_effect")]
    readings = [r for r in readings if math.isfinite(r)]
    spread = (
        f"{number(min(readings))} to {number(max(readings))} over path, reverted alone, added alone"
    )
    yield Number(
        f"of the behaviour's change at {stage} runs through {row['site']}",
        f"{number(float(row['path_share']))} of {number(change)} nats",
        f"{int(row['n_prompts'])} prompts, {len(rows)} matrices",
        f"an equal share is {number(change / len(rows))} nats; "
        f"completeness error {probability(100 * float(row['completeness_error']))} %",
        spread if len(readings) > 1 else "not confirmed by intervention",
    )


def _projection_numbers(table: Frame) -> Iterable[Number]:
    if "R_lda" not in table or not len(table):
        return
    if table["R_lda"].notna().any() and "p_lda_rank" in table:
        row = table.sort_values(["p_lda_rank", "R_lda"], ascending=[True, False]).iloc[0]
        n = int(row["n_controls"]) if _known(row.get("n_controls")) else 0
        yield Number(
            f"R of the LDA direction at {row['site']}, {row['stage']}",
            number(float(row["R_lda"])),
            f"{n} controls, {table['site'].nunique()} matrices",
            f"1 by chance; max-T rank p = {probability(float(row['p_lda_rank']))}",
            exceedances(float(row["p_lda_rank"]), n),
        )
    row = table.loc[table["cosine"].abs().fillna(-1.0).idxmax()]
    if _known(row["cosine"]):
        yield Number(
            f"largest cosine, at {row['site']}, {row['stage']} (description only)",
            number(float(row["cosine"])),
            f"{table['site'].nunique()} matrices",
            "none: a cosine carries no verdict",
            "not computed",
        )


def _dmu_number(table: Frame) -> Iterable[Number]:
    if "rel_delta" not in table or "is_control" not in table:
        return
    own = table[~table["is_control"].astype(bool)]
    own = own[own["rel_delta"].notna()]
    if not len(own):
        return
    row = own.loc[own["rel_delta"].idxmax()]
    controls = table[table["is_control"].astype(bool) & (table["stage"] == row["stage"])]
    edge = number(float(controls["rel_delta"].max())) if len(controls) else "none"
    where = row.get("point", row["layer"])
    yield Number(
        f"largest relative shift of {row['contrast']}, at {row['stage']}, {where}",
        number(float(row["rel_delta"])),
        f"{int(row['n'])} pairs",
        f"sign flips, max over layers, p = {probability(float(row['p_adjusted']))}; "
        f"largest control {edge}",
        f"95 % interval {number(float(row['ci_low']))} to {number(float(row['ci_high']))}",
    )


def _causal_number(report: Report) -> Iterable[Number]:
    facts = report.verdicts[0].evidence if report.verdicts else {}
    if not {"ablation", "effect", "p_ablation", "n", "n_null"} <= facts.keys():
        return
    table: Frame = report.table
    own = table[(table["intervention"] == facts["ablation"]) & (table["prompts"] == "frame")]
    row = own.iloc[0]
    yield Number(
        "change of the behaviour's probability with the direction taken away",
        number(float(row["effect"])),
        f"{int(row['n'])} pairs",
        f"rank among {facts['n_null']} directions in which the pairs differ (mean "
        f"{number(float(row['null_mean']))}); p = {probability(float(row['p']))}",
        f"95 % interval {number(float(row['low']))} to {number(float(row['high']))}",
    )


def _probe_number(table: Frame) -> Iterable[Number]:
    if "auroc" not in table or not table["auroc"].notna().any():
        return
    row = table.loc[table["auroc"].idxmax()]
    low, high = (row.get(c, float("nan")) for c in ("auroc_low", "auroc_high"))
    count = next((int(row[c]) for c in ("n_clusters", "n") if _known(row.get(c))), 0)
    p = next((row[c] for c in ("p_adjusted", "p") if _known(row.get(c))), None)
    yield Number(
        f"held-out AUROC of the probe at its best place, {row.get('point', row.get('layer', ''))}",
        number(float(row["auroc"])),
        f"{count} clusters",
        f"0.5; cluster permutation, max over layers, p = {probability(p)}",
        f"95 % interval {number(low)} to {number(high)}" if _known(low) else "not computed",
    )


def _size_number(by_kind: dict[str, Report]) -> Iterable[Number]:
    if "check" in by_kind and "relative_change" in by_kind["check"].table:
        table: Frame = by_kind["check"].table
        rows = table[table["relative_change"].notna()]
        for row in rows.to_dict("records"):
            yield Number(
                f"relative change of the weights at {row['stage']}",
                number(float(row["relative_change"])),
                f"{int(row['n_matrices'])} matrices, {int(row['changed_matrices'])} changed",
                "0, identical weights",
                "exact: every entry was read",
            )
