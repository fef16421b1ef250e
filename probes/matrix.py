"""Stage × detector: every detector on every stage with the same splits, rows and budget.

Three tasks, not interchangeable:

- ``hidden condition``: inside one stage, the set's labels. The headline; nulls and verdicts.
- ``transfer``: trained on the open stage's training folds, scored on the test folds of the others,
  as a monitor would be.
- ``stage``: the same prompts at this stage and at the benign twin (clean where there is none); any
  training makes it easy, so that it says nothing alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.readings import StageReadings
from mi_weightspace.core.stats import holm
from probes.detection import Design, Difference, Found, differences, joint_p, measure, measure_norm
from probes.detector_list import (
    NORM,
    PRIMARY,
    SHARED_NULL,
    STAGE_TASK,
    detectors_for,
    parts_read,
)
from probes.detectors import Configuration, Detector
from probes.inoculation_verdict import Evidence, Reading, needed_per_class

HIDDEN, TRANSFER, STAGE = "hidden condition", "transfer", "stage"
NON_LINEAR = ("rbf", "mlp")
NULL_SAES = ("random sae top-k", "rotated sae top-k")


@dataclass(frozen=True, eq=False)
class Matrix:
    """Every detector at every stage.

    Attributes:
        readings: in the order given. found: stage -> detector -> result, the norm under `NORM`.
        transferred: stage -> detector trained at the open stage. between: stage -> detector,
            against `reference`.
    """

    design: Design
    readings: Mapping[str, StageReadings]
    detectors: Mapping[str, Detector]
    found: Mapping[str, Mapping[str, Found]]
    transferred: Mapping[str, Mapping[str, Found]] = field(default_factory=dict)
    between: Mapping[str, Mapping[str, Found]] = field(default_factory=dict)
    reference: str = ""

    def role(self, stage: str) -> str:
        return self.readings[stage].role

    def of_role(self, *roles: str) -> list[str]:
        return [s for s, r in self.readings.items() if r.role in roles]


def run_matrix(
    design: Design,
    readings: Mapping[str, StageReadings],
    *,
    text: Float[Tensor, "n vocab"] | None = None,
    unrelated: Mapping[str, StageReadings] | None = None,
    seen: Callable[[str], None] = lambda _: None,
) -> Matrix:
    """Measure every detector on every stage; `seen` is called with each stage done."""
    parts = {stage: parts_read(own, text) for stage, own in readings.items()}
    far = {stage: parts_read(own, None) for stage, own in (unrelated or {}).items()}
    detectors = {d.name: d for d in detectors_for(next(iter(parts.values())))}
    opened = next((s for s, r in readings.items() if r.role == "open"), None)
    found: dict[str, dict[str, Found]] = {}
    same: Found | None = None
    for stage in readings:
        own: dict[str, Found] = {NORM: measure_norm(design, parts[stage]["dense"])}
        for name, detector in detectors.items():
            if detector.part == "text" and same is not None:
                own[name] = same
                continue
            others = {s: parts[s][detector.part] for s in readings if s != stage}
            own[name] = measure(
                detector,
                design,
                parts[stage][detector.part],
                others=others if stage == opened and detector.part != "text" else None,
                unrelated=far.get(stage, {}).get(detector.part),
            )
            same = own[name] if detector.part == "text" else same
        found[stage] = own
        seen(stage)
    transferred: dict[str, dict[str, Found]] = {}
    for name, open_found in found.get(opened or "", {}).items():
        for stage, moved in open_found.others.items():
            transferred.setdefault(stage, {})[name] = moved
    matrix = Matrix(design, readings, detectors, found, transferred)
    return _between(matrix, parts)


def _between(matrix: Matrix, parts: Mapping[str, Mapping[str, Tensor]]) -> Matrix:
    """Each stage against the benign twin (or clean): a few detectors, without nulls."""
    reference = next(iter([*matrix.of_role("benign"), *matrix.of_role("clean")]), "")
    if not reference:
        return matrix
    design = matrix.design.between_stages()
    between = {
        stage: {
            name: measure(
                detector,
                design,
                torch.cat([parts[stage][detector.part], parts[reference][detector.part]]),
                n_permutations=0,
            )
            for name, detector in matrix.detectors.items()
            if name in STAGE_TASK
        }
        for stage in matrix.readings
        if stage != reference
    }
    return Matrix(
        matrix.design,
        matrix.readings,
        matrix.detectors,
        matrix.found,
        matrix.transferred,
        between,
        reference,
    )


# ---- tables --------------------------------------------------------------------------------
def matrix_rows(matrix: Matrix) -> list[dict[str, Any]]:
    """One row a task, stage and detector."""
    tasks = ((HIDDEN, matrix.found), (TRANSFER, matrix.transferred), (STAGE, matrix.between))
    return [
        _row(matrix, task, stage, name, own)
        for task, found in tasks
        for stage in matrix.readings
        for name, own in found.get(stage, {}).items()
    ]


def _row(matrix: Matrix, task: str, stage: str, name: str, found: Found) -> dict[str, Any]:
    design, detector = matrix.design, matrix.detectors.get(name)
    low, high = found.null_interval
    tuned = detector is not None and len(detector.configurations) > 1
    judged = found.p_method != "none"
    needed = needed_per_class(found.value, found.null_mean) if judged and detector else None
    return {
        "task": task,
        "stage": stage,
        "role": matrix.role(stage),
        "detector": name,
        "family": "norm" if detector is None else detector.family,
        "statistic": "relative norm" if detector is None else "AUROC",
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "null_mean": found.null_mean,
        "null_low": low,
        "null_high": high,
        "p": found.p,
        "p_method": found.p_method,
        "n_permutations": len(found.null),
        "above_null": found.above() if judged else None,
        "null_tuning": ("anew" if detector and detector.retuned else "as tuned") if tuned else "",
        "n_configurations": 1 if detector is None else len(detector.configurations),
        "tuned": _usual(found.chosen) if tuned else "",
        "spread": float(found.per_split.std()) if len(found.per_split) > 1 else float("nan"),
        "n_splits": len(found.per_split),
        "n": len(design) * (2 if task == STAGE else 1),
        "n_per_class": len(design) if task == STAGE else design.per_class,
        "n_clusters": len(design.clusters.unique()),
        "needed_per_class": float("nan") if needed is None else float(needed),
        "recall_at_1pct": found.recall,
        "seconds": found.seconds,
    }


def _usual(chosen: Sequence[Configuration]) -> str:
    """The configuration most splits chose, and how many did."""
    if not chosen:
        return ""
    value, times = Counter(chosen).most_common(1)[0]
    return f"{', '.join(f'{v:g}' for v in value)} ({times} of {len(chosen)})"


def family_rows(matrix: Matrix) -> list[dict[str, Any]]:
    """What each kind of detector says at each stage, corrected over kinds."""
    rows: list[dict[str, Any]] = []
    for stage in matrix.readings:
        for kind, reading in family_readings(matrix, stage).items():
            rows.append(
                {
                    "stage": stage,
                    "role": matrix.role(stage),
                    "kind": kind,
                    "detector": reading.detector,
                    "value": reading.value,
                    "low": reading.low,
                    "high": reading.high,
                    "p_holm": reading.p,
                    "above_null": reading.above,
                    "reached_by_control": reading.explained,
                }
            )
    return rows


def difference_rows(matrix: Matrix) -> list[dict[str, Any]]:
    """The dictionary's row less each rival, at every stage that has one."""
    return [
        {
            "stage": stage,
            "role": matrix.role(stage),
            "detector": PRIMARY,
            "rival": d.rival,
            "rival_family": matrix.detectors[d.rival].family,
            "difference": d.value,
            "low": d.low,
            "high": d.high,
            "p": d.p,
            "p_holm": d.p_holm,
        }
        for stage in matrix.of_role("open", "hidden")
        for d in stage_differences(matrix, stage).values()
    ]


def stage_differences(matrix: Matrix, stage: str) -> dict[str, Difference]:
    own = matrix.found[stage]
    rivals = {n: f for n, f in own.items() if n != NORM and matrix.detectors[n].family != "sae"}
    return differences(own[PRIMARY], rivals)


# ---- evidence ------------------------------------------------------------------------------
def family_readings(matrix: Matrix, stage: str, level: float = 0.05) -> dict[str, Reading]:
    """Norm, dense linear, dictionary and dense non-linear detectors: p by Holm over the four."""
    own = matrix.found[stage]
    linear = [name for name in SHARED_NULL if name in own]
    joint, best = joint_p([own[name] for name in linear])
    curved = [name for name in NON_LINEAR if name in own]
    bent, strongest = joint_p([own[name] for name in curved])
    speakers = {
        "norm": (NORM, own[NORM].p),
        "linear": (linear[best], joint),
        "sae": (PRIMARY, joint_p([own[PRIMARY]])[0]),
        "non-linear": (curved[strongest], bent),
    }
    adjusted = holm(torch.tensor([p for _, p in speakers.values()], dtype=torch.float64)).tolist()
    controls = [s for s in matrix.of_role("clean", "benign") if s != stage]
    return {
        kind: Reading(
            above=own[name].value > own[name].null_mean and p <= level,
            explained=any(matrix.found[c][name].value >= own[name].low for c in controls),
            detector=name,
            value=own[name].value,
            low=own[name].low,
            high=own[name].high,
            p=p,
        )
        for (kind, (name, _)), p in zip(speakers.items(), adjusted, strict=True)
    }


def evidence_of(matrix: Matrix, stage: str) -> Evidence:
    """What the verdict of a hidden stage depends on."""
    own, opened = matrix.found[stage], matrix.found[matrix.of_role("open")[0]][PRIMARY]
    against = stage_differences(matrix, stage)
    linear = [n for n, d in matrix.detectors.items() if d.family == "linear"]
    rivals = (*NULL_SAES, *NON_LINEAR)
    found = family_readings(matrix, stage)
    return Evidence(
        per_class=matrix.design.per_class,
        clusters=matrix.design.holders,
        open_value=opened.value,
        open_low=opened.low,
        norm=found["norm"],
        linear=found["linear"],
        sae=found["sae"],
        non_linear=found["non-linear"],
        beats_linear=all(against[name].better() for name in linear),
        unbeaten={r: own[r].above() for r in rivals if r in own and not against[r].better()},
        missing=tuple(r for r in rivals if r not in own),
        needed=needed_per_class(own[PRIMARY].value, own[PRIMARY].null_mean),
    )
