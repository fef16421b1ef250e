"""What ``mi-weightspace inoculation`` does: plain values in, an `InoculationReport` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.report import load_report
from mi_weightspace.models.load import load
from probes.inoculation_report import InoculationReport
from probes.inoculations import InoculationSettings
from probes.inoculations import inoculation as compare
from probes.labelled_io import load_labelled
from probes.sae_io import load_sae

BEFORE, AFTER, CLEAN, BENIGN = "before", "after", "clean", "benign"


def inoculation(
    models: Sequence[str],
    clean: str | None,
    prompts: str,
    sae: str,
    *,
    benign: str | None = None,
    context: str | None = None,
    unrelated: str | None = None,
    components: Sequence[str] = (),
    position: str = "suffix_mean",
    n_splits: int = 8,
    n_permutations: int = 399,
    k: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> InoculationReport:
    """Compare detectors before and after the training that is said to hide the behaviour.

    Args:
        models: the openly misaligned stage, and the one after it.
        clean: the stage that never misbehaved (usually what both were trained from).
        benign: a stage trained as long as the others on harmless data.
        unrelated: a file of prompts without the behaviour, for recall at 1 % false positives.
        components: run folders of ``svd`` or ``vpd --diff``, whose parts are detectors too.

    Raises:
        ConfigError: other than two models, or no clean stage.
    """
    if len(models) != 2 or clean is None:
        raise ConfigError(
            "inoculation",
            given=f"{len(models)} models" + ("" if clean else " and no --clean"),
            expected="BEFORE (openly misaligned), AFTER (said to be clean now) and --clean MODEL",
            remedy="Without a stage that never misbehaved nothing tells the behaviour from what "
            "prompts and any training do: give the checkpoint both were trained from.",
        )
    labelled = load_labelled(prompts)
    dictionary = load_sae(sae)
    paths = {CLEAN: clean} | ({BENIGN: benign} if benign is not None else {})
    paths |= {BEFORE: models[0], AFTER: models[1]}
    parts: dict[str, Components] = {}
    for folder in components:
        parts |= components_of(folder)
    return compare(
        {name: load(path) for name, path in paths.items()},
        labelled,
        dictionary,
        open=BEFORE,
        hidden=AFTER,
        clean=CLEAN,
        benign=None if benign is None else BENIGN,
        context=context,
        detectors=parts,
        unrelated=None if unrelated is None else prompts_of(unrelated),
        position=position,
        settings=InoculationSettings(
            n_splits=n_splits, n_permutations=n_permutations, k=k, seed=seed
        ),
        progress=progress,
    )


def components_of(folder: str, most: int = 8) -> dict[str, Components]:
    """The parts of a run of ``svd`` or ``vpd --diff``, by a name of their own; of at most `most`
    matrices, those with the largest parts.

    Raises:
        ConfigError: a run of another kind.
    """
    report: Any = load_report(folder)
    if report.kind not in {"svd", "vpd-difference"}:
        raise ConfigError(
            f"run folder {folder}",
            given=f"a run of kind {report.kind!r}",
            expected="a run of svd, or of vpd --diff",
            remedy="Leave it out, or decompose the difference of the two stages first.",
        )
    found = sorted(report, key=lambda part: -float(part.scale.abs().max()))
    return {
        f"{report.kind} {part.site.name}" + (f"@{part.stage}" if part.stage else ""): part
        for part in found[:most]
    }


def prompts_of(path: str) -> list[str]:
    """One prompt a line of a text file.

    Raises:
        ConfigError: no such file, or an empty one.
    """
    place = Path(path)
    lines = place.read_text(encoding="utf-8").splitlines() if place.is_file() else []
    found = [line for line in lines if line.strip()]
    if not found:
        raise ConfigError(
            f"unrelated prompts {path}",
            given="no file" if not place.is_file() else "an empty file",
            expected="a text file with one prompt a line",
            remedy="Write the prompts one a line, or leave --unrelated out.",
        )
    return found
