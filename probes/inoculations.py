"""The inoculation experiment: can a dictionary, or anything else, still see what was hidden?

Stages of one model family are read on one labelled set, every detector runs on all of them with
the same splits, rows and tuning budget, and each hidden stage gets one word with its reasons
(`probes.inoculation_verdict`). The *open* stage is the positive control, *clean* and *benign* are
the negative ones; without them no word stronger than the instrument's own weakness is possible.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.labelled import LabelledSet, Prompt
from mi_weightspace.core.readings import SAE, StageReadings
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.verdict import Verdict
from probes.detection import Design
from probes.detector_list import token_counts
from probes.features import shift_cosines, top_contexts
from probes.inoculation_report import InoculationReport
from probes.inoculation_stages import Asked, Stage, obtain, stage_roles
from probes.inoculation_verdict import Evidence, judge
from probes.matrix import (
    Matrix,
    difference_rows,
    evidence_of,
    family_rows,
    matrix_rows,
    run_matrix,
)
from probes.sae import sae_reservations
from probes.survival import Survival, survival

if TYPE_CHECKING:
    import pandas as pd

OUT_OF_DISTRIBUTION = 1.5
"""FVU over the clean stage's from which the SAE is out of distribution at a stage."""


@dataclass(frozen=True)
class InoculationSettings:
    """How much is drawn: splits, null draws, bootstrap draws, latents followed."""

    n_splits: int = 8
    n_folds: int = 4
    n_permutations: int = 399
    n_bootstrap: int = 2000
    k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_splits < 1 or self.n_folds < 2 or self.n_bootstrap < 1 or self.k < 1:
            raise ConfigError(
                "inoculation",
                given=f"n_splits={self.n_splits}, n_folds={self.n_folds}, "
                f"n_bootstrap={self.n_bootstrap}, k={self.k}",
                expected="at least one split, two folds, one bootstrap draw, one latent",
                remedy="Leave them at their defaults.",
            )
        if self.n_permutations < 19:
            raise ConfigError(
                "n_permutations",
                given=str(self.n_permutations),
                expected="at least 19: fewer draws cannot reach p = 0.05",
                remedy="Leave it at its default.",
            )


def inoculation(
    stages: Mapping[str, Stage],
    prompts: LabelledSet,
    sae: Sae | None = None,
    *,
    open: str,
    hidden: str | Sequence[str],
    clean: str,
    benign: str | None = None,
    context: str | None = None,
    detectors: Sequence[Components] | Mapping[str, Components] = (),
    unrelated: Sequence[Prompt] | Mapping[str, StageReadings] | None = None,
    position: str = "suffix_mean",
    settings: InoculationSettings | None = None,
    progress: bool = True,
) -> InoculationReport:
    """Compare every detector at every stage, and judge each hidden one.

    Args:
        stages: name -> readings, lens, or path. Models are read one after the other.
        prompts: the labelled set. Labels say on which prompts the model would misbehave
            (elsewhere); they must not be readable from the text.
        sae: needed unless every stage is given as readings; also for the latents' decoder rows.
        open, hidden, clean, benign: names of stages: openly misaligned; looks clean now (one or
            several); never trained to misbehave; trained as long on harmless data.
        context: use only the rows shown there; needed where the set has several contexts.
        detectors: components (of a difference's SVD or VPD) whose inner activations are detectors
            of their own; for stages that are models.
        unrelated: prompts without the behaviour, or their readings at each stage: recall is then
            given at 1 % false positives on them.

    Raises:
        ConfigError: stages that are not there or have two roles, several contexts and none named.
        MismatchError: readings of different designs, or without codes of an SAE.
        PromptError: labels that cannot be split (`probes.splits`).
    """
    start = time.perf_counter()
    chosen = settings or InoculationSettings()
    names = (hidden,) if isinstance(hidden, str) else tuple(hidden)
    roles = stage_roles(stages, open, names, clean, benign)
    asked = Asked(prompts, context, sae, detectors, position, chosen.seed, progress)
    labelled = asked.labelled
    readings, far = obtain(stages, roles, asked, unrelated)
    read = time.perf_counter()
    design = Design.of(
        labelled,
        n_splits=chosen.n_splits,
        n_folds=chosen.n_folds,
        n_permutations=chosen.n_permutations,
        n_bootstrap=chosen.n_bootstrap,
        seed=chosen.seed,
    )
    matrix = _run(design, readings, labelled, far, progress)
    detected = time.perf_counter()
    kept = survival(
        {stage: own.codes[SAE] for stage, own in readings.items()},
        labelled,
        open,
        roles=roles,
        k=min(chosen.k, int(readings[open].codes[SAE].shape[1])),
        seed=chosen.seed,
    )
    timings = {
        "read": read - start,
        "detect": detected - read,
        "survival": time.perf_counter() - detected,
    }
    config = {
        "stages": {s: str(v) for s, v in stages.items() if isinstance(v, str | Path)},
        "roles": dict(roles),
        "context": labelled.context_names[0] if context is None else context,
        "position": next(iter(readings.values())).position,
        "settings": vars(chosen),
    }
    return _report(matrix, kept, labelled, sae, config, timings)


# ---- result --------------------------------------------------------------------------------
def _run(
    design: Design,
    readings: Mapping[str, StageReadings],
    labelled: LabelledSet,
    far: Mapping[str, StageReadings],
    progress: bool,
) -> Matrix:
    from rich.progress import Progress

    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("detectors", total=len(readings))
        return run_matrix(
            design,
            readings,
            text=token_counts(labelled.prompts),
            unrelated=far,
            seen=lambda stage: bar.update(task, advance=1, description=f"detectors, {stage}"),
        )


def _report(
    matrix: Matrix,
    kept: Survival,
    labelled: LabelledSet,
    sae: Sae | None,
    config: Mapping[str, Any],
    timings: Mapping[str, float],
) -> InoculationReport:
    import pandas as pd

    table = pd.DataFrame(matrix_rows(matrix))
    table.insert(3, "context", config["context"])
    latents = kept.latents
    followed = latents["latent"].tolist()[: config["settings"]["k"]]
    if sae is not None:
        every = latents["latent"].tolist()
        for stage, values in shift_cosines(sae, every, matrix.readings, labelled.labels).items():
            latents[f"cosine_dm_{stage}"] = values
    shown = {s: matrix.readings[s] for s in matrix.of_role("open", "hidden")}
    judged = {stage: evidence_of(matrix, stage) for stage in matrix.of_role("hidden")}
    verdicts = tuple(_verdict(matrix, stage, found) for stage, found in judged.items())
    return InoculationReport(
        table=table,
        tables={
            "verdicts": pd.DataFrame(
                [
                    {"stage": v.subject, "verdict": str(v.word), "why": " ".join(v.reservations)}
                    for v in verdicts
                ]
            ),
            "families": pd.DataFrame(family_rows(matrix)),
            "differences": pd.DataFrame(difference_rows(matrix)),
            "survival": kept.table,
            "latents": latents,
            "contexts": top_contexts(followed, shown, labelled),
            "facts": _facts(matrix),
        },
        arrays={
            f"null/{stage}/{name}": found.null
            for stage, own in matrix.found.items()
            for name, found in own.items()
            if len(found.null)
        },
        verdicts=verdicts,
        config=dict(config),
        inputs={s: r.model_hash for s, r in matrix.readings.items()}
        | {"prompts": labelled.prompts_hash},
        reservations=_reservations(matrix),
        timings=dict(timings),
    )


def _verdict(matrix: Matrix, stage: str, found: Evidence) -> Verdict:
    word, reasons = judge(found)
    evidence: dict[str, float | int | str | bool | None] = {
        "per_class": found.per_class,
        "clusters": found.clusters,
        "null": matrix.design.scheme,
        "open_value": found.open_value,
        "open_low": found.open_low,
        "beats_linear": found.beats_linear,
        "unbeaten": ", ".join(found.unbeaten),
        "needed": found.needed,
    }
    names = ("norm", "linear", "sae", "non_linear")
    for name, reading in zip(names, found.readings, strict=True):
        evidence |= {
            f"{name}_detector": reading.detector,
            f"{name}_value": reading.value,
            f"{name}_p": reading.p,
            f"{name}_above": reading.above,
            f"{name}_reached_by_control": reading.explained,
        }
    return Verdict(word, stage, evidence, reasons)


def _facts(matrix: Matrix) -> pd.DataFrame:
    """What the SAE is on each stage, and whether it is out of distribution there."""
    import pandas as pd

    clean = next((matrix.readings[s].facts.get("fvu") for s in matrix.of_role("clean")), None)
    rows = []
    for stage, own in matrix.readings.items():
        fvu = own.facts.get("fvu")
        ratio = fvu / clean if fvu is not None and clean else float("nan")
        rows.append(
            {
                "stage": stage,
                "role": own.role,
                **{name: float(value) for name, value in own.facts.items()},
                "fvu_over_clean": ratio,
                "out_of_distribution": ratio > OUT_OF_DISTRIBUTION,
            }
        )
    return pd.DataFrame(rows)


def _reservations(matrix: Matrix) -> tuple[str, ...]:
    found = []
    if not matrix.of_role("benign"):
        found.append(
            "No benign twin: what any further training does cannot be told from misalignment."
        )
    facts = _facts(matrix)
    far = facts.loc[facts["out_of_distribution"], "stage"].tolist()
    if far:
        found.append(
            f"The SAE reconstructs {', '.join(far)} worse than {OUT_OF_DISTRIBUTION} × the clean "
            "stage: it is out of distribution there."
        )
    warned: dict[str, list[str]] = {}
    for stage, own in matrix.readings.items():
        for reason in sae_reservations(own.facts):
            warned.setdefault(reason, []).append(stage)
    found += [f"SAE on {', '.join(where)}: {reason}." for reason, where in warned.items()]
    text = next((own["text"] for own in matrix.found.values() if "text" in own), None)
    if text is not None and text.above():
        found.append(
            f"The text alone scores {text.value:.2f} (p {text.p:.2g}): labels can be read off the "
            "prompts."
        )
    if matrix.design.scheme == "factorial":
        found.append(
            "Held-out cells of a crossed design: nulls lie off 0.5, and are those of the design "
            "with its levels renamed."
        )
    return tuple(found)
