"""Text or token ids from files: what ``mi-weightspace vpd --tokens`` accepts.

=====================  ==========================================================================
``.txt``               one text
``.jsonl .parquet``    a column ``text``, or ``input_ids`` / ``tokens`` (lists of ids); a line of
                       jsonl may also be a bare string or a bare list of ids
``.npy .safetensors``  ids, (rows, tokens) or one long row
folder                 written by ``datasets.save_to_disk``, columns as above
=====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.json_io import DamagedJson, parse_json

ID_COLUMNS = ("input_ids", "tokens")
FORMS = ".txt, .jsonl, .parquet, .npy, .safetensors, or a folder of datasets.save_to_disk"


def read_tokens(path: str | Path, length: int = 64) -> Int[Tensor, "rows tokens"] | list[str]:
    """Token ids as a table, or texts still to be tokenised.

    Args:
        length: tokens a row, where ids come as one long row or as rows of different lengths (these
            are joined and cut; what is left over at the end is dropped).

    Raises:
        PromptError: no such file, an unknown format, neither text nor ids in it, or no whole row.
    """
    file = Path(path)
    read = _READERS.get(file.suffix) if file.is_file() else None
    if file.is_dir() and (
        (file / "state.json").is_file() or (file / "dataset_dict.json").is_file()
    ):
        read = _dataset
    if read is None:
        raise _refused(
            file,
            "no such file" if not file.exists() else f"a {file.suffix or 'folder'} to read",
            FORMS,
            "Check the path.",
        )
    return _table(read(file), file, length)


def _refused(path: Path, given: str, expected: str, remedy: str) -> PromptError:
    return PromptError(f"tokens {str(path)!r}", given=given, expected=expected, remedy=remedy)


# ---- formats -------------------------------------------------------------------------------
def _text(path: Path) -> list[Any]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        given = f"bytes that are no UTF-8 ({error.reason})"
        raise _refused(path, given, "text", "Convert it.") from error


def _jsonl(path: Path) -> list[Any]:
    rows: list[Any] = []
    # by line feeds alone: other separators may stand inside a JSON string
    for number, line in enumerate(_text(path)[0].split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_cell(parse_json(line), path))
        except DamagedJson as error:
            raise _refused(
                path,
                f"no JSON in line {number} ({error})",
                "one JSON value a line",
                "Mend or remove the line.",
            ) from error
    return rows


def _parquet(path: Path) -> list[Any]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (ValueError, LookupError, TypeError, NotImplementedError, OSError) as error:
        raise _refused(path, f"no parquet ({error})", "a parquet file", "Write it anew.") from error
    return _column(path, list(frame.columns), lambda name: frame[name].tolist())


def _dataset(path: Path) -> list[Any]:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    if isinstance(found, DatasetDict):
        raise _refused(
            path,
            f"the splits {sorted(found)}",
            "one split",
            f"Name its folder: {path / sorted(map(str, found))[0]}.",
        )
    return _column(path, found.column_names, lambda name: list(found[name]))


def _npy(path: Path) -> list[Any]:
    from tokenize import TokenError  # numpy's reader of old headers lets it through

    import numpy as np

    try:
        return [torch.from_numpy(np.load(path, allow_pickle=False))]
    except (
        ValueError,
        TypeError,
        SyntaxError,
        TokenError,
        EOFError,
        OSError,
        MemoryError,
    ) as error:
        raise _refused(path, f"no array of numbers ({error})", "token ids", "Save ids.") from error


def _safetensors(path: Path) -> list[Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _refused(path, f"a damaged file ({error})", "token ids", "Copy it again.") from error
    names = [
        n for n in (*ID_COLUMNS, *found) if n in found and (n in ID_COLUMNS or len(found) == 1)
    ]
    if not names:
        raise _refused(
            path,
            f"the tensors {sorted(found)[:5]}",
            f"one tensor, or one named {' or '.join(ID_COLUMNS)}",
            "Rename the tensor of ids.",
        )
    return [found[names[0]]]


_READERS = {
    ".txt": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".npy": _npy,
    ".safetensors": _safetensors,
}


# ---- rows ----------------------------------------------------------------------------------
def _column(path: Path, names: Sequence[str], get: Any) -> list[Any]:
    chosen = next((n for n in (*ID_COLUMNS, "text") if n in names), None)
    if chosen is None:
        raise _refused(
            path,
            f"the columns {list(names)[:8]}",
            f"one of text, {', '.join(ID_COLUMNS)}",
            "Rename the column that holds the text or the ids.",
        )
    return get(chosen)


def _cell(value: Any, path: Path) -> Any:
    return _column(path, list(value), value.__getitem__) if isinstance(value, dict) else value


def _table(rows: list[Any], path: Path, length: int) -> Tensor | list[str]:
    if rows and all(isinstance(row, str) for row in rows):
        return [row for row in rows if row.strip()]
    if len(rows) == 1 and isinstance(rows[0], Tensor):
        ids = rows[0]
    else:
        listed = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        if not listed or not all(_are_ids(row) for row in listed):
            raise _refused(
                path,
                "rows that are neither all text nor all lists of whole numbers",
                "text, or token ids",
                "Write one column of one kind.",
            )
        even = len({len(row) for row in listed}) == 1
        ids = torch.tensor(listed if even else list(chain.from_iterable(listed)))
    if ids.is_floating_point() or ids.is_complex() or ids.ndim not in {1, 2}:
        raise _refused(
            path,
            f"a {ids.dtype} array of shape {tuple(ids.shape)}",
            "whole numbers, (rows, tokens) or one long row",
            "Save token ids, not activations.",
        )
    if ids.ndim == 1:
        n = len(ids) // length
        ids = ids[: n * length].view(n, length)
    if ids.dtype == torch.bool or (ids.numel() and int(ids.long().min()) < 0):
        given = "booleans" if ids.dtype == torch.bool else "negative numbers"
        raise _refused(path, given, "token ids", "Save token ids.")
    if ids.numel() == 0:
        raise _refused(path, "no whole row", f"rows of {length} tokens", "Give more text.")
    return ids.long()


def _are_ids(row: Any) -> bool:
    return isinstance(row, list) and all(type(i) is int and 0 <= i < 2**31 for i in row)
