"""Checkpoints of SAE training: one safetensors file with the trainer's state, no pickle.

Schedules are functions of the step, so they are stepped again instead of being saved.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mi_weightspace.core.errors import CheckpointError, ConfigError
from mi_weightspace.core.json_io import DamagedJson, take
from mi_weightspace.core.output_io import writing
from mi_weightspace.core.sealed_io import DamagedFile, load_sealed, save_sealed

STATE = "training.safetensors"
_HEADER = "training"
_COUNTS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")


def save(trainer: Any, path: Path, record: Mapping[str, Any]) -> None:
    """Write a checkpoint; it appears whole or not at all.

    Args:
        record: what must be the same for the run to be continued.

    Raises:
        OutputError: a folder that cannot be written, or a full disk; the last checkpoint stays.
    """
    tensors = {f"sae/{name}": value for name, value in trainer.sae.state_dict().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{number}/{name}": value for name, value in state.items()}
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        tensors[name] = getattr(trainer, name)
    counts = {name: getattr(trainer, name) for name in _COUNTS}
    partial = path.with_name(f".{path.name}.partial")
    with writing(path.parent, "checkpoints in"):
        save_sealed(tensors, partial, _HEADER, {"record": dict(record), "counts": counts})
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.rename(path)


def restore(trainer: Any, path: Path, record: Mapping[str, Any]) -> int:
    """Put the trainer where a checkpoint left it; the number of steps done, 0 without one.

    Raises:
        CheckpointError: a damaged file.
        ConfigError: a checkpoint of another run; names what differs.
    """
    if not path.exists():
        return 0
    try:
        tensors, found = load_sealed(path, _HEADER)
        if found is None:
            raise DamagedJson("no header of a training run")
        counts = {key: take(take(found, "counts", "object"), key, "number") for key in _COUNTS}
        own = take(found, "record", "object")
    except (DamagedFile, DamagedJson) as error:
        raise CheckpointError(
            str(path),
            given=f"a damaged checkpoint ({error})",
            expected="one written by train_sae",
            remedy="Remove the folder and train again.",
        ) from error
    check_record(own, record, str(path))
    _place(trainer, tensors, counts)
    return counts["n_training_steps"]


def check_record(found: Mapping[str, Any], record: Mapping[str, Any], subject: str) -> None:
    """The run found is the run asked for.

    Raises:
        ConfigError: names what differs.
    """
    other = sorted(name for name in record if record[name] != found.get(name))
    if other:
        raise ConfigError(
            subject,
            given=f"a run with other {', '.join(other)}",
            expected="the run that is asked for",
            remedy="Continue it with its own settings, or choose another folder.",
        )


def _place(trainer: Any, tensors: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedules stepped without their optimiser
        for schedule in (trainer.lr_scheduler, *trainer.coefficient_schedulers.values()):
            for _ in range(counts["n_training_steps"]):
                schedule.step()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, number, key = name.split("/")
            state.setdefault(int(number), {})[key] = value
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": state})
    own = {name[4:]: value for name, value in tensors.items() if name.startswith("sae/")}
    trainer.sae.load_state_dict(own)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        setattr(trainer, name, tensors[name].to(trainer.sae.W_dec.device))
    for name, value in counts.items():
        setattr(trainer, name, value)
