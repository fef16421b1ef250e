"""Open a path as weights: a checkpoint folder, a hub id, or a PEFT adapter folder."""

from __future__ import annotations

from pathlib import Path

from mi_weightspace.models.checkpoint import INDEX, SINGLE, resolve
from mi_weightspace.models.lora import AdapterSource
from mi_weightspace.models.weights import CheckpointSource


def open_path(model: str | Path) -> CheckpointSource | AdapterSource:
    """Weights by path; an adapter opens the base model its configuration names.

    A folder that holds whole weights beside an adapter is read as whole weights.

    Raises:
        CheckpointError: what is wrong with the folder.
    """
    folder = resolve(model)
    whole = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if not whole and (folder / "adapter_config.json").is_file():
        return AdapterSource.open(folder)
    return CheckpointSource(model)
