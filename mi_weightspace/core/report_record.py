"""``report.json`` of a run folder: read, checked, and compared with its own hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.json_io import DamagedJson, digest_of, is_plain_name, parse_json, take
from mi_weightspace.core.sealed_io import SEAL, file_hash
from mi_weightspace.core.verdict import Verdict, Word

_UNREADABLE = (ValueError, TypeError, LookupError, OSError, NotImplementedError)
"""What pyarrow and pandas raise on a damaged table (Arrow's own errors are of these kinds)."""
RECORD, ARRAYS, TABLE = "report.json", "arrays.safetensors", "table.parquet"


def is_run_file(name: str) -> bool:
    """Whether every report writes, or may write, a file of this name."""
    return name in {RECORD, ARRAYS, TABLE, "config.yaml"} or (
        name.startswith("table_") and name.endswith(".parquet")
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a run folder, every entry of its kind.

    Raises:
        OutputError: no run there, no JSON, an entry that is missing or of another kind, or a
            record that is not what was written.
    """
    file = folder / RECORD
    if not file.is_file():
        raise OutputError(
            f"run folder {folder}",
            given=f"no {RECORD}",
            expected="a folder written by Report.save",
            remedy="Check the path; an interrupted run leaves no folder.",
        )
    try:
        record = parse_json(file.read_bytes())
        if not isinstance(record, dict):
            raise DamagedJson("no JSON object")
        if SEAL in record and record[SEAL] != digest_of(record, without=(SEAL,)):
            raise DamagedJson("its SHA-256 differs from the one written")
        _check(record)
    except (DamagedJson, OSError) as error:
        raise _damaged(folder, f"{RECORD} that is not as it was written ({error})") from error
    return record


def _check(record: dict[str, Any]) -> None:
    take(record, "schema", "whole")
    take(record, "kind", "text")
    for key in ("config", "inputs", "timings", "versions", "files"):
        take(record, key, "object")
    for key in ("inputs", "versions", "files"):
        for name in record[key]:
            take(record[key], name, "text")
    for name in record["timings"]:
        take(record["timings"], name, "number")
    for key in ("reservations", "tables"):
        take(record, key, "texts")
    tables = [f"table_{name}.parquet" for name in record["tables"]]
    names = [*record["files"], *tables]
    if not all(map(is_plain_name, names)):
        raise DamagedJson(f"files or tables with names that lead elsewhere: {names}"[:200])
    needed = {ARRAYS, TABLE, *tables}
    if missing := sorted(needed - set(record["files"])):
        raise DamagedJson(f"no hash of {missing[0]}")
    take(record, "verdicts", "list")
    verdicts_of(record)


def verdicts_of(record: dict[str, Any]) -> tuple[Verdict, ...]:
    """Raises:
    DamagedJson: a verdict with another word, or no verdict.
    """
    found = []
    for own in record["verdicts"]:
        if not isinstance(own, dict) or own.get("word") not in set(Word):
            raise DamagedJson(f"a verdict {own!r}"[:120])
        subject, evidence = take(own, "subject", "text"), take(own, "evidence", "object")
        reservations = tuple(take(own, "reservations", "texts"))
        found.append(Verdict(Word(own["word"]), subject, evidence, reservations))
    return tuple(found)


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Every file is there with the hash that was written.

    Raises:
        OutputError: names the file.
    """
    for name, digest in record["files"].items():
        file = folder / name
        if not file.is_file() or file_hash(file) != digest:
            raise OutputError(
                f"run folder {folder}",
                given=f"{name} missing or altered",
                expected=f"the file saved with SHA-256 {digest[:12]}…",
                remedy="Copy the folder again, or rerun it with `mi-weightspace replay`.",
            )


def read_files(folder: Path, record: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Main table, further tables and arrays.

    Raises:
        OutputError: a file that is no table, or no arrays.
    """
    import pandas as pd
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = TABLE
    try:
        table, tables = pd.read_parquet(folder / name), {}
        for own in record["tables"]:
            name = f"table_{own}.parquet"
            tables[own] = pd.read_parquet(folder / name)
        name = ARRAYS
        arrays = load_file(folder / name)
    except (*_UNREADABLE, SafetensorError) as error:
        raise _damaged(folder, f"{name}, which cannot be read ({error})"[:300]) from error
    return table, tables, arrays


def _damaged(folder: Path, given: str) -> OutputError:
    return OutputError(
        f"run folder {folder}",
        given=given,
        expected="the files written by Report.save",
        remedy="Copy the folder again, or run its command again.",
    )
