"""Rows from a file, a Hugging Face dataset, a data frame or a list, without missing cells."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.json_io import DamagedJson, parse_json

Row = dict[str, Any]


def read_rows(source: Any, what: str, names: Sequence[str] = ()) -> list[Row]:
    """The rows of `source`.

    Args:
        what: the rows are, for messages (``contrasts``). names: built-in ones, to suggest for a
            path that is not there.

    Raises:
        PromptError: an unknown kind of source, no such file, or a line that is no JSON.
    """
    return [_present(row) for row in _read(source, what, names)]


def _read(source: Any, what: str, names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    if isinstance(source, str | Path):
        return _read_path(Path(source), what, names)
    if hasattr(source, "to_list") and hasattr(source, "column_names"):
        return source.to_list()
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        return source.to_dict("records")
    if isinstance(source, Sequence) and all(isinstance(row, Mapping) for row in source):
        return source
    splits = f" with the splits {sorted(source)}" if isinstance(source, Mapping) else ""
    raise PromptError(
        what,
        given=f"a {type(source).__name__}{splits}",
        expected="a name, a file, a Dataset, a data frame or a list of rows",
        remedy="Pass one split of a DatasetDict, for example data['train'].",
    )


def _read_path(path: Path, what: str, names: Sequence[str]) -> Sequence[Mapping[str, Any]]:
    if path.suffix == ".jsonl" and path.is_file():
        return _read_jsonl(path)
    if path.suffix == ".parquet" and path.is_file():
        return _read_parquet(path)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        try:
            found = load_from_disk(str(path))
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise _damaged(path, "a folder of save_to_disk", error) from error
        return _read(found, what, names)
    near = difflib.get_close_matches(str(path), names, n=1)
    known = f"one of {list(names)}, " if names else ""
    raise PromptError(
        f"{what} {str(path)!r}",
        given="no such file" if not path.exists() else f"a {path.suffix or 'folder'} to read",
        expected=f"{known}a .jsonl or .parquet file, or a folder of save_to_disk",
        remedy=f"Did you mean {near[0]!r}?" if near else "Check the path.",
    )


def _read_parquet(path: Path) -> list[Row]:
    import pandas as pd

    try:
        return pd.read_parquet(path).to_dict("records")  # pyright: ignore[reportReturnType]
    except (ValueError, LookupError, TypeError, NotImplementedError, OSError) as error:
        raise _damaged(path, "a parquet file", error) from error


def _damaged(path: Path, expected: str, error: Exception) -> PromptError:
    return PromptError(
        f"file {path}",
        given=f"one that cannot be read ({type(error).__name__}: {error})"[:300],
        expected=expected,
        remedy="Write the file again.",
    )


def _read_jsonl(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise _damaged(path, "UTF-8 text, one JSON object a line", error) from error
    rows: list[Row] = []
    # by line feeds alone: other separators may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except DamagedJson as error:
            raise _no_row(path, number, f"no JSON ({error})") from error
        if not isinstance(row, dict):
            raise _no_row(path, number, f"a {type(row).__name__}")
        rows.append(row)
    return rows


def _no_row(path: Path, number: int, given: str) -> PromptError:
    return PromptError(
        f"{path.name}, line {number}",
        given=given,
        expected="one JSON object a line",
        remedy="Mend or remove the line.",
    )


def _present(row: Mapping[str, Any]) -> Row:
    """`row` as plain values, without its missing cells."""
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()}
    return {k: v for k, v in plain.items() if v is not None and v == v}
