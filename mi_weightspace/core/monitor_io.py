"""`Bands` on disk: one safetensors file whose header carries the rest as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.monitor import Bands, Watch

SCHEMA = 1
_HEADER = "mi_weightspace.bands"
_TEXTS = ("site", "side", "capture", "stage", "measure")


def save_bands(bands: Bands, path: str | Path) -> Path:
    """Write bands to a new file, under a temporary name first; returns its path.

    Raises:
        OutputError: a path that is taken or cannot be written.
    """
    from safetensors.torch import save_file

    target = Path(path)
    if target.exists():
        raise OutputError(
            f"bands file {target}",
            given="a path that is taken",
            expected="a new file",
            remedy="Choose another name; files are never overwritten.",
        )
    arrays = {}
    for i, (watch, low, high) in enumerate(zip(bands.watches, bands.low, bands.high, strict=True)):
        parts = {"vectors": watch.vectors, "low": low, "high": high}
        arrays |= {f"{i}/{k}": v.detach().cpu().contiguous().clone() for k, v in parts.items()}
    record = {
        "schema": SCHEMA,
        "n": bands.n,
        "margin": bands.margin,
        "model_hash": bands.model_hash,
        "skip_first": bands.skip_first,
        "watches": [
            {**{name: getattr(w, name) for name in _TEXTS}, "index": list(w.index)}
            for w in bands.watches
        ],
    }
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, partial, metadata={_HEADER: json.dumps(record, ensure_ascii=False)})
        partial.rename(target)
    except OSError as error:
        raise OutputError(
            f"bands file {target}",
            given=f"{type(error).__name__}: {error}",
            expected="a folder that can be written",
            remedy="Choose another path, or free space.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_bands(path: str | Path) -> Bands:
    """Read back what `save_bands` wrote.

    Raises:
        OutputError: no such file, or not one of bands.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    try:
        with safe_open(source, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(header) if header is not None else {}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise _not_bands(source, f"{type(error).__name__}: {error}") from error
    if not record or record["schema"] > SCHEMA:
        raise _not_bands(source, f"schema {record.get('schema')}")
    watches = tuple(
        Watch(
            vectors=arrays[f"{i}/vectors"],
            index=tuple(w["index"]),
            **{name: w[name] for name in _TEXTS},
        )
        for i, w in enumerate(record["watches"])
    )
    every = range(len(watches))
    return Bands(
        watches,
        tuple(arrays[f"{i}/low"] for i in every),
        tuple(arrays[f"{i}/high"] for i in every),
        n=record["n"],
        margin=record["margin"],
        model_hash=record["model_hash"],
        skip_first=record["skip_first"],
    )


def _not_bands(source: Path, given: str) -> OutputError:
    return OutputError(
        f"bands file {source}",
        given=given,
        expected=f"a file written by save_bands, schema ≤ {SCHEMA}",
        remedy="Check the path, or calibrate again.",
    )
