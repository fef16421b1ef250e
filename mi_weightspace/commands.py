"""What each subcommand does: arguments in, reports out. `cli` reads options and prints.

Every function takes plain values (paths as strings), so that the arguments stored in a run folder's
``config.yaml`` rerun it: see `replay`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import probes
from mi_weightspace.commands_inoculation import inoculation
from mi_weightspace.commands_vpd import vpd
from mi_weightspace.core.components import SourceRef
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import load_direction, load_directions
from mi_weightspace.core.errors import ConfigError, DirectionError, OutputError
from mi_weightspace.core.output_io import check_new_file, writing
from mi_weightspace.core.report import Report, check_output, load_report, same_frame
from mi_weightspace.models.harvest import harvest
from mi_weightspace.models.input_files import check_input_files, input_files
from mi_weightspace.models.lineage import (
    CheckReport,
    Lineage,
    check_stages,
    open_source,
    stage_names,
)
from mi_weightspace.models.load import load
from mi_weightspace.spectral.project import project as project_components
from mi_weightspace.spectral.realised import weighted_table
from mi_weightspace.spectral.svd import SvdReport
from mi_weightspace.spectral.svd import svd as decompose_sources


def with_command(
    report: Report, command: str, args: Mapping[str, Any], *, hashed: bool = True
) -> Any:
    """The report with the command's own arguments in place of the library call's.

    Args:
        hashed: also record the SHA-256 of every file behind the arguments.
    """
    config = {**report.config, "command": command, "args": dict(args)}
    if hashed:
        config["input_files"] = input_files(args)
    return dataclasses.replace(report, config=config)


def plural(models: Sequence[str], least: int, command: str) -> None:
    if len(models) < least:
        raise ConfigError(
            f"{command} models",
            given=str(len(models)),
            expected=f"at least {least}, in training order",
            remedy=f"mi-weightspace {command} BASE TUNED ...",
        )


# ---- models --------------------------------------------------------------------------------
def sites(model: str) -> Any:
    """A data frame of the matrices of a checkpoint."""
    import pandas as pd

    source = open_source(model)
    columns = ("site", "kind", "layer", "d_out", "d_in", "reads", "writes", "through_norm")
    rows = [
        (
            s.name,
            s.kind,
            "" if s.layer is None else s.layer,
            s.d_out,
            s.d_in,
            str(s.reads),
            str(s.writes),
            "read" * s.reads_through_norm + "write" * s.writes_through_norm,
        )
        for s in source.sites()
    ]
    return pd.DataFrame(rows, columns=list(columns))


def check(models: Sequence[str]) -> CheckReport:
    """Agreement and change of the stages; one model alone is certified by itself."""
    names = stage_names(models)
    if len(models) > 1:
        return Lineage(dict(zip(names, models, strict=True))).check()
    return check_stages({names[0]: open_source(models[0])})


# ---- activations ---------------------------------------------------------------------------
def dmu(
    models: Sequence[str],
    prompts: str,
    controls: str | None = None,
    *,
    position: str = "last",
    target: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Mean shifts of every contrast at every stage."""
    contrasts = probes.load_contrasts(prompts, controls)
    activations = {}
    for name, model in zip(stage_names(models), models, strict=True):
        lens = load(model)
        activations[name] = harvest(
            lens, contrasts, position=position, stage=name, progress=progress
        )
        del lens  # one stage in memory at a time
    return probes.dmu_sweep(activations, contrasts, target=target, seed=seed, progress=progress)


def probe(
    model: str,
    prompts: str,
    controls: str | None = None,
    *,
    method: Any = "lda",
    position: str = "last",
    target: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """A probe at every stream point; the run folder holds ``direction.safetensors``."""
    contrasts = probes.load_contrasts(prompts, controls)
    activations = harvest(
        load(model),
        contrasts,
        position=position,
        stage=stage_names([model])[0],
        progress=progress,
    )
    return probes.fit(
        activations, contrasts, target=target, method=method, seed=seed, progress=progress
    )


def gate(
    model: str,
    direction: str,
    prompts: str,
    controls: str | None = None,
    *,
    layer: int | None = None,
    target: str | None = None,
    alphas: Sequence[float] | None = None,
    positions: Any = "last",
    onward: bool = False,
    rank: int = 1,
    n_null: int = 199,
    protocol: Any = "pair_residual",
    other_model: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Whether a model uses a direction: interventions along it, ranked among null directions."""
    return probes.gate(
        model,
        load_direction(direction, layer=layer),
        probes.load_contrasts(prompts, controls),
        target=target,
        positions=positions,
        onward=onward,
        rank=rank,
        n_null=n_null,
        protocol=protocol,
        other_model=other_model,
        seed=seed,
        progress=progress,
        alphas=alphas,
    )


# ---- weights -------------------------------------------------------------------------------
def svd(
    models: Sequence[str],
    *,
    sites: str | None = None,
    rank: int = 16,
    activations: str | None = None,
    jobs: int = 1,
    shard: tuple[int, int] = (0, 1),
    memory_limit: float | None = None,
    device: str = "cpu",
    journal: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SvdReport:
    """Singular triplets of every step of the chain; with prompts also on the data's inputs."""
    plural(models, 2, "svd")
    lineage = Lineage(dict(zip(stage_names(models), models, strict=True)))
    differences = [lineage.diff(a, b) for a, b in lineage.steps]
    report = decompose_sources(
        differences,
        sites,
        rank,
        seed=seed,
        jobs=jobs,
        memory_limit=memory_limit,
        device=device,
        shard=shard,
        journal=journal,
        progress=progress,
    )
    if activations is None:
        return report
    return with_weighted(report, lineage, activations, sites, rank, seed, progress)


def with_weighted(
    report: SvdReport,
    lineage: Lineage,
    prompts: str,
    sites: str | None,
    rank: int,
    seed: int,
    progress: bool,
) -> Any:
    """Add the table ``weighted``: the change as realised on the inputs of the earlier stage."""

    texts = [side for c in probes.load_contrasts(prompts) for p in c.pairs for side in
             (p.positive, p.negative)]  # fmt: skip
    frame = weighted_table(lineage, texts, sites, rank=rank, seed=seed, progress=progress)
    tables = {**report.tables, "weighted": frame}
    return dataclasses.replace(report, tables=tables)


def project(
    run: str,
    directions: Sequence[str],
    *,
    layer: int | None = None,
    controls: Sequence[str] = (),
    prompts: str | None = None,
    n_null: int = 999,
    alpha: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Project the components of an svd run; the difference is streamed again from its paths."""
    report = load_report(run)
    if not isinstance(report, SvdReport):
        raise OutputError(
            f"run folder {run}",
            given=f"a {report.kind!r} run",
            expected="an 'svd' run",
            remedy="mi-weightspace svd BASE TUNED --out RUN first.",
        )
    found = [d for file in directions for d in load_directions(file, layer=layer)]
    if controls:
        rows = [d for file in controls for d in load_directions(file, layer=layer)]
        found = [with_controls(d, rows) for d in found]
    lineage = contrasts = None
    if prompts is not None:
        contrasts = probes.load_contrasts(prompts, "controls" if prompts == "authority" else None)
        lineage = lineage_of(report)
    return project_components(
        report,
        found,
        lineage=lineage,
        prompts=contrasts,
        n_null=n_null,
        alpha=alpha,
        seed=seed,
        progress=progress,
    )


def with_controls(direction: Direction, rows: Sequence[Direction]) -> Direction:
    """`direction` with other directions of its space as its controls.

    Raises:
        DirectionError: no control lives in the direction's space.
    """
    import torch

    own = [r for r in rows if r.space.canonical == direction.space.canonical]
    if not own:
        raise DirectionError(
            f"controls of {direction.name}",
            given=f"directions in {sorted({str(r.space) for r in rows})}",
            expected=f"directions in {direction.space}",
            remedy="Fit the controls at the same point, or pass --layer.",
        )
    filters = [r.filter for r in own if r.filter is not None]
    return dataclasses.replace(
        direction,
        control_patterns=torch.stack([r.pattern for r in own]),
        control_filters=torch.stack(filters) if len(filters) == len(own) else None,
        control_names=tuple(r.label for r in own),
    )


def lineage_of(report: SvdReport) -> Lineage:
    """The chain of checkpoints an svd run was made from, by their paths."""
    refs = {stage: SourceRef(**ref) for stage, ref in report.config["sources"].items()}
    first = next(iter(refs.values()))
    name = stage_names([first.before, *(r.after for r in refs.values())])[0]
    chain = {name: first.before} | {stage: ref.after for stage, ref in refs.items()}
    return Lineage(chain)


# ---- run folders ---------------------------------------------------------------------------
def report(folders: Sequence[str], out: str, *, title: str = "mi-weightspace") -> Path:
    """One page from run folders; a folder of run folders becomes a group with its own answer."""
    from mi_weightspace.html_report import write_report

    target = Path(out)
    check_new_file(target, "report")
    loose: list[Report] = []
    groups: list[tuple[str, list[Report]]] = []
    for folder in map(Path, folders):
        if (folder / "report.json").is_file() or not folder.is_dir():
            loose.append(load_report(folder))
            continue
        inner = sorted(p.parent for p in folder.glob("*/report.json"))
        if not inner:
            loose.append(load_report(folder))  # says what is missing
        groups.append((folder.name, [load_report(p) for p in inner]))
    if loose and groups:
        groups.insert(0, ("runs", loose))
    return write_report(groups or loose, target, title=title)


COMMANDS: dict[str, Callable[..., Report]] = {
    "dmu": dmu,
    "probe": probe,
    "gate": gate,
    "svd": svd,
    "project": project,
    "vpd": vpd,
    "inoculation": inoculation,
}
TIMED = "seconds"
"""A column of wall-clock times, in which no two runs agree."""


def replay(folder: str, out: str, *, progress: bool = True) -> tuple[Report, Report]:
    """Run a folder's command again with its own arguments: (the old report, the new one).

    Raises:
        ConfigError: the run was made in Python from objects, so its arguments are not on file.
        MismatchError: a file the run read has other content now.
    """
    old = load_report(folder)
    check_output(Path(out))
    command, args = old.config.get("command"), old.config.get("args")
    names = {"models", "model", "run"}
    if command not in COMMANDS or not isinstance(args, Mapping) or not names & set(args):
        raise ConfigError(
            f"run folder {folder}",
            given=f"a {old.kind!r} run made in Python, from objects that are not on file",
            expected=f"a run of mi-weightspace {', '.join(COMMANDS)}",
            remedy="Run the command line, or your own script, again.",
        )
    recorded = old.config.get("input_files") or {}
    check_input_files(recorded, folder)
    result = COMMANDS[command](**args, progress=progress)
    new = with_command(result, command, args, hashed=bool(recorded))
    return old, load_report(new.save(out))


def differing(old: Report, new: Report) -> list[str]:
    """Names of tables and inputs in which two reports differ."""
    found = [] if same_frame(_untimed(old.table), _untimed(new.table)) else ["table"]
    for name, frame in old.tables.items():
        other = new.tables.get(name)
        if other is None or not same_frame(_untimed(frame), _untimed(other)):
            found.append(name)
    return found + [n for n in old.inputs if new.inputs.get(n) != old.inputs[n]]


def _untimed(frame: Any) -> Any:
    return frame.drop(columns=TIMED, errors="ignore")


def clear_journal(journal: str) -> None:
    """A finished sweep's journal is no longer needed: its content is in the run folder."""
    with writing(Path(journal), "journal"):
        shutil.rmtree(journal)
