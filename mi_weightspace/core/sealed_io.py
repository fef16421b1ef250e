"""Safetensors files that notice a changed byte.

The format has no checksum: a flipped bit in the data is another number. Files written here carry,
in the JSON record of their header, the SHA-256 of that record and of every tensor's name, type,
shape and bytes; reading compares. Files without one (written by others, or before) are read as
they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mi_weightspace.core.json_io import DamagedJson, digest_of, parse_json

SEAL = "sha256"


class DamagedFile(ValueError):
    """A file that cannot be read, or is not what was written."""


def save_sealed(
    tensors: Mapping[str, Tensor], path: Path, key: str, record: Mapping[str, Any]
) -> None:
    """Write a safetensors file whose header entry `key` is `record` with its seal.

    Args:
        record: plain JSON values; an entry ``sha256`` is added.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    sealed = dict(record) | {SEAL: seal(own, record)}
    # one metadata entry: safetensors writes several in no fixed order
    save_tensors(own, path, {key: json.dumps(sealed, ensure_ascii=False, sort_keys=True)})


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file of contiguous tensors; `metadata` of one entry at most, for equal bytes.

    Raises:
        OSError: what the system refused; safetensors itself has a type of its own for it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def load_sealed(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and record of a file; None for a file whose header has no entry `key`.

    Raises:
        DamagedFile: no such file, no safetensors, a record that is no JSON object, or a seal that
            does not hold.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DamagedFile("no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = parse_json(metadata[key]) if key in metadata else None
    except (SafetensorError, DamagedJson, OSError) as error:
        raise DamagedFile(f"{type(error).__name__}: {error}") from error
    if record is None:
        return tensors, None
    if not isinstance(record, dict):
        raise DamagedFile("a header that is no JSON object")
    if SEAL in record and record[SEAL] != seal(tensors, record):
        raise DamagedFile("content that is not what was written: its SHA-256 differs")
    return tensors, record


def seal(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> str:
    """SHA-256 over the record (without its own seal) and the tensors."""
    import torch

    digest = hashlib.sha256(digest_of(record, without=(SEAL,)).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
