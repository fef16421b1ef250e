"""Which files a run read, by SHA-256: a replay on other bytes is no replay.

Safetensors has no checksum, and a fingerprint samples; only the hash of the whole file tells that
nothing changed. A file is hashed once a process (2 GB/s a core) as long as its size and time stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from mi_weightspace.core.errors import CheckpointError, MismatchError
from mi_weightspace.core.sealed_io import file_hash
from mi_weightspace.models.checkpoint import resolve
from mi_weightspace.models.sources import open_path

_PATTERNS = ("*.safetensors", "*.json", "*.jsonl", "*.parquet", "*.arrow", "*.model", "*.txt")
MODELS = frozenset({"model", "models", "base", "tuned", "clean", "benign"})
"""Arguments that name models: folders, adapters or hub ids."""
Record = dict[str, dict[str, Any]]


def input_files(args: Mapping[str, Any]) -> Record:
    """Path -> size and SHA-256 of every file behind a command's arguments.

    Models count with their weights, configuration and tokenizer, adapters with their base, other
    folders with their tables and tensors, other paths with the file itself.
    """
    found: dict[Path, None] = {}
    for name, value in args.items():
        for one in _texts(value):
            found |= dict.fromkeys(_model(one) if name in MODELS else _files(Path(one)))
    paths = sorted(found)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing lets go of the lock
        facts = pool.map(_fact, paths)
        return {str(path): fact for path, fact in zip(paths, facts, strict=True)}


def check_input_files(recorded: Mapping[str, Mapping[str, Any]], run: str) -> None:
    """Refuse inputs that are not what a run read.

    Raises:
        MismatchError: names the first file that is gone or has other content.
    """
    for name, fact in recorded.items():
        path = Path(name)
        now = _fact(path) if path.is_file() else None
        if now != dict(fact):
            raise MismatchError(
                f"input {name} of run {run}",
                given="no such file" if now is None else "other content than the run read",
                expected=f"SHA-256 {str(fact.get('sha256'))[:12]}…, {fact.get('size')} bytes",
                remedy="Put the file back, or run the command anew on what is there now.",
            )


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for own in value.values():
            yield from _texts(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _texts(own)


def _model(name: str) -> list[Path]:
    """Files of a checkpoint; of an adapter those of its base as well."""
    try:
        folder = resolve(name)
        base = getattr(open_path(folder), "base", None)
    except CheckpointError:  # the command has said what is wrong, or it is no model
        return []
    return _files(folder) + ([] if base is None else _files(base.path))


def _files(path: Path) -> list[Path]:
    if len(path.name) > 255 or not path.exists():
        return []
    if path.is_file():
        return [path.absolute()]
    found = [file for pattern in _PATTERNS for file in path.glob(pattern)]
    return [file.absolute() for file in found if file.is_file()]


def _fact(path: Path) -> dict[str, Any]:
    state = path.stat()
    return {"size": state.st_size, "sha256": _hash(str(path), state.st_size, state.st_mtime_ns)}


@lru_cache(maxsize=4096)
def _hash(path: str, size: int, time: int) -> str:
    return file_hash(Path(path))
