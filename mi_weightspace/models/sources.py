"""Open a path as weights: a checkpoint folder, a hub id, or a PEFT adapter folder."""

from __future__ import annotations

from pathlib import Path

from mi_weightspace.models.lora import AdapterSource
from mi_weightspace.models.weights import CheckpointSource


def open_path(model: str | Path) -> CheckpointSource | AdapterSource:
    """Weights by path; an adapter opens the base model its configuration names.

    Raises:
        CheckpointError: what is wrong with the folder.
    """
    if (Path(model) / "adapter_config.json").is_file():
        return AdapterSource.open(model)
    return CheckpointSource(model)
