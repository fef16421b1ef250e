"""What ``mi-weightspace vpd`` does: plain values in, a `Decomposition` or a `Plan` out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mi_weightspace.core.errors import ConfigError, WeightspaceError
from mi_weightspace.models.input_files import input_files
from mi_weightspace.models.lineage import Lineage, stage_names
from mi_weightspace.models.load import load
from mi_weightspace.vpd.config import VPDConfig, make_config, read_config
from mi_weightspace.vpd.corpus import read_tokens
from mi_weightspace.vpd.decomposition import Decomposition
from mi_weightspace.vpd.differences.planning import plan_difference
from mi_weightspace.vpd.differences.run import DEFAULTS, decompose_difference
from mi_weightspace.vpd.distributed import finish, rank, setup
from mi_weightspace.vpd.planning import Plan
from mi_weightspace.vpd.planning import plan as make_plan
from mi_weightspace.vpd.run import TRAINING, decompose


@dataclass(frozen=True)
class Change:
    """What ``--diff`` was told: the file of broad text, the regime (None: selective), and whether
    the stages are taken backwards."""

    broad: str | None = None
    regime: str | None = None
    remove: bool = False


def check_models(models: Sequence[str], change: Change | None, flags: Mapping[str, Any]) -> None:
    """One model, or with ``--diff`` at least two stages.

    Raises:
        ConfigError: another number, or flags that need ``--diff``.
    """
    given = sorted(flag for flag, value in flags.items() if value)
    if change is None and (len(models) != 1 or given):
        raise ConfigError(
            "vpd",
            given=f"{len(models)} models" + (f" with {', '.join(given)}" if given else ""),
            expected="one model; several stages, and these flags, go with --diff",
            remedy="mi-weightspace vpd --diff BASE TUNED [TUNED2 ...]",
        )
    if change is not None and len(models) < 2:
        raise ConfigError(
            "vpd --diff",
            given=f"{len(models)} model",
            expected="at least two stages, in training order",
            remedy="mi-weightspace vpd --diff BASE TUNED [TUNED2 ...]",
        )
    if change is not None and change.regime not in {None, "selective", "faithful"}:
        raise ConfigError(
            "--regime",
            given=repr(change.regime),
            expected="selective or faithful",
            remedy="Leave it out: selective is what a few components can do.",
        )


def vpd(
    models: Sequence[str],
    tokens: str,
    config: Mapping[str, Any],
    *,
    change: Change | Mapping[str, Any] | None = None,
    length: int = 64,
    held_out: str | None = None,
    budgets: Sequence[int] | None = None,
    anchor: bool = False,
    out: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Decomposition:
    """Decompose a checkpoint's matrices; on several processes where `torchrun` started them.

    Args:
        config: values of a `VPDConfig`.
        budgets: rungs of the PGD ladder of the evaluation; None for the usual ones.
        anchor: also recover a known answer with this code (under 20 CPU-seconds).
        out: run folder, written from the first checkpoint on. A refusal leaves none behind.
    """
    if isinstance(change, Mapping):
        change = Change(**change)
    args = {
        "models": list(models),
        "change": None if change is None else asdict(change),
        "tokens": tokens,
        "config": dict(config),
        "length": length,
        "held_out": held_out,
        "budgets": None if budgets is None else list(budgets),
        "anchor": anchor,
    }
    evaluation: dict[str, Any] = {"anchor": anchor}
    if budgets is not None:
        evaluation["budgets"] = tuple(budgets)
    data = read_tokens(tokens, length)
    kept = None if held_out is None else read_tokens(held_out, length)
    device = setup()
    options: dict[str, Any] = {
        "held_out": kept,
        "length": length,
        "out": out,
        "resume": resume,
        "progress": progress and rank() == 0,
        "evaluation": evaluation,
        "record": {"args": args, "input_files": input_files(args) if rank() == 0 else {}},
    }
    try:
        if change is None:
            settings = make_config(dict(config))
            return decompose(load(models[0], device=device), data, settings, **options)
        return decompose_difference(
            Lineage(dict(zip(stage_names(models), models, strict=True)), device=device),
            data,
            dict(config),
            broad=None if change.broad is None else read_tokens(change.broad, length),
            regime="faithful" if change.regime == "faithful" else "selective",
            direction="remove" if change.remove else "install",
            **options,
        )
    except WeightspaceError:
        if out is not None:
            remove_empty(Path(out))
        raise
    finally:
        finish()


def plan(
    models: Sequence[str], config: Mapping[str, Any], *, length: int = 64, diff: bool = False
) -> Plan:
    """What `vpd` would cost; only the last model's configuration is read."""
    if diff:
        settings = make_config(DEFAULTS | {"faithfulness": {"weight": 0.0}} | dict(config))
        return plan_difference(models[-1], settings, n_stages=len(models) - 1, length=length)
    return make_plan(models[0], make_config(dict(config)), length=length)


def merged(file: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a configuration file with those of the flags that were given over them.

    Raises:
        ConfigError: an unknown or contradictory key, in the file or after merging.
    """
    values = {} if file is None else read_config(file).model_dump(mode="json", exclude_unset=True)
    values |= {key: value for key, value in flags.items() if value is not None}
    given: VPDConfig = make_config(values)
    return given.model_dump(mode="json", exclude_unset=True)


def globs(text: str | None) -> list[str] | None:
    """Comma-separated patterns."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def rungs(text: str | None) -> list[int] | None:
    """``20,40,80`` as numbers.

    Raises:
        ConfigError: anything that is no positive whole number.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(
            "--ladder",
            given=repr(text),
            expected="positive numbers of steps, comma-separated",
            remedy="--ladder 20,40,80,160",
        )
    return sorted({int(part) for part in parts})


def begun(folder: Path) -> bool:
    """Whether a run was started there."""
    return (folder / TRAINING).is_dir()


def remove_empty(folder: Path) -> None:
    """Take away folders in which a refused run has written nothing yet."""
    if folder.is_dir() and not any(p.is_file() for p in folder.rglob("*")):
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir()
        folder.rmdir()


# ---- what is printed -----------------------------------------------------------------------
def speaks() -> bool:
    """Whether this process is the one that prints (`torchrun` starts several)."""
    return int(os.environ.get("RANK", "0")) == 0


def shown(report: Decomposition) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Tables for the terminal, each with its columns: L0 by site, maskings, PGD ladder, checks."""
    if not len(report):  # nothing had changed
        return
    yield report.table, ("site", "l0>0", "l0>0.1", "dense", "alive_by_firing", "remainder", "n")
    yield report.tables["maskings"], ("masking", "metric", "distance", "low", "high", "of_zero")
    yield (
        report.tables["ladder"],
        ("attack", "budget", "shape", "median", "low", "high", "of_zero", "n"),
    )
    yield report.tables["checks"], ("name", "outcome", "number", "limit")


def sentences(report: Decomposition) -> list[str]:
    verdicts = [str(v) for v in report.verdicts[:12]]
    return verdicts + [f"note: {text}" for text in report.reservations[:8]]
