"""Checkpoints of a run: everything that decides the next step, written atomically.

Random draws and batches are functions of (seed, step), so the step itself stands for all generator
and loader states. A folder ``state-N`` is complete as long as it has that name; killed writes and
removals leave only hidden temporary ones, which the next checkpoint or the resumed run sweeps.
Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, OutputError
from mi_weightspace.core.json_io import DamagedJson, digest_of, parse_json, take
from mi_weightspace.core.output_io import writing
from mi_weightspace.core.sealed_io import SEAL, file_hash, save_tensors
from mi_weightspace.models.arithmetic import worthwhile
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.distributed import barrier, rank, world
from mi_weightspace.vpd.objective import Objective

KEEP = 2
"""Checkpoints kept: should the newest be damaged, the one before it can be resumed."""
IDLE_KEYS = {"log_every", "checkpoint_every"}
"""What a resumed run may change: the result does not depend on it."""


@dataclass(eq=False)
class RunState:
    """An objective with its optimisers, between two steps.

    Attributes:
        step: the next step to do.
    """

    objective: Objective
    components: torch.optim.Optimizer
    importance: torch.optim.Optimizer
    step: int = 0


def config_hash(config: VPDConfig) -> str:
    """Of everything that decides the result (all but `IDLE_KEYS`)."""
    values = config.model_dump(mode="json", exclude=IDLE_KEYS)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _optimiser_tensors(optimiser: torch.optim.Optimizer, name: str) -> dict[str, Tensor]:
    parameters = optimiser.param_groups[0]["params"]
    return {
        f"{name}/{i}/{key}": value
        for i, parameter in enumerate(parameters)
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _restore_optimiser(optimiser: torch.optim.Optimizer, name: str, t: dict[str, Tensor]) -> None:
    for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
        prefix = f"{name}/{i}/"
        state = {k[len(prefix) :]: v.clone() for k, v in t.items() if k.startswith(prefix)}
        if state:
            optimiser.state[parameter] = state


def _shared_tensors(state: RunState) -> dict[str, Tensor]:
    objective = state.objective
    found = {f"factors/{k}": v for k, v in objective.factors.named()}
    found |= {f"importance/{k}": v for k, v in objective.importance.state_dict().items()}
    found |= _optimiser_tensors(state.components, "components_adam")
    found |= _optimiser_tensors(state.importance, "importance_adam")
    if objective.frequencies.average is not None:
        found["frequencies"] = objective.frequencies.average
    return found


def _own_tensors(state: RunState) -> dict[str, Tensor]:
    return {
        f"{at}/{key}": value
        for at, sources in state.objective.adversaries.kept.items()
        for key, value in sources.named().items()
    }


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_tensors({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)


def save_state(state: RunState, folder: Path) -> Path:
    """Write ``state-N`` under `folder`; every process calls it, each writes its own sources.

    Raises:
        OutputError: a folder that cannot be written, or a full disk; earlier checkpoints stay.
    """
    staging = folder / f".state-{state.step:08d}.partial"
    with writing(folder, "checkpoints in"):
        try:
            return _save_state(state, folder, staging)
        finally:
            if rank() == 0:
                shutil.rmtree(staging, ignore_errors=True)


def _save_state(state: RunState, folder: Path, staging: Path) -> Path:
    target = folder / f"state-{state.step:08d}"
    if rank() == 0:
        sweep(folder)
        staging.mkdir(parents=True)
    barrier()
    _write(staging / f"sources-{rank()}.safetensors", _own_tensors(state))
    barrier()
    if rank() == 0:
        _write(staging / "shared.safetensors", _shared_tensors(state))
        objective = state.objective
        record = {
            "step": state.step,
            "config": objective.config.model_dump(mode="json"),
            "config_hash": config_hash(objective.config),
            "host": objective.factors.host.fingerprint,
            "sites": dict(
                zip(objective.factors.layout.names, objective.factors.layout.sizes, strict=True)
            ),
            "scale": objective.scale,
            "frequency_count": objective.frequencies.count,
            "world": world(),
            "fast_float32": takes_fast_float32(objective.config),
        }
        write_record(staging, record)  # behind the barrier: every process has written
    barrier()
    if rank() == 0:
        for path in staging.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        if target.exists():
            _remove(target)
        staging.rename(target)
        sweep(folder)
    barrier()
    return target


def sweep(folder: Path) -> None:
    """Remove what killed writes and removals left, and all checkpoints but the last `KEEP`."""
    for left in folder.glob(".state-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    for old in sorted(folder.glob("state-*"))[:-KEEP]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """In one step as far as any reader sees: half a checkpoint never has a checkpoint's name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.partial")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def takes_fast_float32(config: VPDConfig) -> bool:
    """Whether this process' float32 products take another path than torch's default."""
    return config.speed.fast_float32 and worthwhile()


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = sorted(folder.glob("state-*"))
    return found[-1] if found else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """``state.json``: the record, the hashes of the folder's files, and its own."""
    files = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    whole = record | {"files": files}
    whole[SEAL] = digest_of(whole)
    (folder / "state.json").write_text(json.dumps(whole, indent=2))


def read_record(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        OutputError: missing, no JSON, or not what was written.
    """
    try:
        record = parse_json((path / "state.json").read_bytes())
        if not isinstance(record, dict):
            raise DamagedJson("state.json, which is no JSON object")
        sealed = "files" in record  # checkpoints of before carry no hashes
        if sealed and record.get(SEAL) != digest_of(record, without=(SEAL,)):
            raise DamagedJson("state.json, which is not what was written: its SHA-256 differs")
        for key in ("step", "frequency_count", "world"):
            take(record, key, "whole")
        for key in ("config", "sites", *(("files",) if sealed else ())):
            take(record, key, "object")
        for key in ("config_hash", "host"):
            take(record, key, "text")
        take(record, "scale", "number")
        take(record, "fast_float32", "flag")
    except (OSError, DamagedJson) as error:
        raise _unreadable(path, error) from error
    return record


def read_tensors(path: Path, record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What all processes share, and this process' own sources.

    Raises:
        OutputError: a file that is missing, damaged or altered.
    """
    try:
        names = ("shared.safetensors", f"sources-{rank()}.safetensors")
        for name in names:
            _check_file(path, name, record)
        return load_file(path / names[0]), load_file(path / names[1])
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _check_file(path: Path, name: str, record: dict[str, Any]) -> None:
    """A file of a checkpoint is as it was written (checkpoints of before carry no hashes)."""
    if "files" in record and file_hash(path / name) != record["files"].get(name):
        raise _unreadable(path, ValueError(f"{name} was altered: its SHA-256 differs"))


def restore_state(state: RunState, path: Path, positions: tuple[int, ...]) -> None:
    """Put a checkpoint into freshly made objects.

    Args:
        positions: leading shape of one process' activations, (batch, tokens) or (batch,).

    Raises:
        ConfigError: the checkpoint belongs to another configuration, model or process count.
        OutputError: a damaged file.
    """
    record, objective = read_record(path), state.objective
    _agree(
        "configuration",
        record["config_hash"],
        config_hash(objective.config),
        _changed(record, objective),
    )
    _agree("model", record["host"], objective.factors.host.fingerprint, "other weights")
    _agree("number of processes", record["world"], world(), "another torchrun world size")
    _agree(
        "speed.fast_float32",
        record["fast_float32"],
        takes_fast_float32(objective.config),
        "another processor: products that were float32 there are not here",
    )
    tensors, own = read_tensors(path, record)
    with torch.no_grad():
        for name, value in objective.factors.named():
            value.copy_(tensors[f"factors/{name}"])
    objective.importance.load_state_dict(_under(tensors, "importance/"))
    _restore_optimiser(state.components, "components_adam", tensors)
    _restore_optimiser(state.importance, "importance_adam", tensors)
    objective.frequencies.average = tensors.get("frequencies")
    objective.frequencies.count = int(record["frequency_count"])
    objective.scale = float(record["scale"])
    config = objective.config
    for at in sorted({int(key.split("/", 1)[0]) for key in own}):
        sources = objective.adversaries.get(
            at,
            config.reconstruction[at],
            positions,
            objective.sizes,
            objective.draws,
            fused=config.speed.fused_optimiser,
        )
        sources.restore(_under(own, f"{at}/"))
    state.step = int(record["step"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _changed(record: dict[str, Any], objective: Objective) -> str:
    new = _flat(objective.config.model_dump(mode="json", exclude=IDLE_KEYS))
    old = _flat({k: v for k, v in record["config"].items() if k not in IDLE_KEYS})
    keys = sorted(k for k in {*new, *old} if new.get(k) != old.get(k))
    return f"changed: {', '.join(keys)}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path, ``reconstruction.1.lr``."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _agree(what: str, stored: object, given: object, how: str) -> None:
    if stored != given:
        raise ConfigError(
            f"{what} of the run to resume",
            given=f"{given} ({how})",
            expected=f"{stored}, what the run was started with",
            remedy="Resume with the same one, or start a new run in another folder.",
        )


def _unreadable(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"checkpoint {path}",
        given=f"{type(error).__name__}: {error}",
        expected="the files of a complete checkpoint",
        remedy="Remove this folder; the one before it is then resumed.",
    )


def artefact_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and bytes: equal exactly when every tensor is."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
