"""`Bands` on disk: one safetensors file whose header carries the rest as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.json_io import DamagedJson, take
from mi_weightspace.core.monitor import Bands, Watch
from mi_weightspace.core.output_io import check_new_file, staged
from mi_weightspace.core.sealed_io import DamagedFile, load_sealed, save_sealed

SCHEMA = 1
_HEADER = "mi_weightspace.bands"
_TEXTS = ("site", "side", "capture", "stage", "measure")


def save_bands(bands: Bands, path: str | Path) -> Path:
    """Write bands to a new file, under a temporary name first; returns its path.

    Raises:
        OutputError: a path that is taken or cannot be written.
    """
    target = Path(path)
    check_new_file(target, "bands file")
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
    with staged(target, "bands file") as partial:
        save_sealed(arrays, partial, _HEADER, record)
    return target


def load_bands(path: str | Path) -> Bands:
    """Read back what `save_bands` wrote.

    Raises:
        OutputError: no such file, or not one of bands.
    """
    source = Path(path)
    try:
        arrays, record = load_sealed(source, _HEADER)
        if record is None:
            raise DamagedJson("no header of bands")
        return _bands(arrays, record)
    except (DamagedFile, DamagedJson) as error:
        raise _not_bands(source, str(error)) from error


def _bands(arrays: dict[str, Tensor], record: dict[str, Any]) -> Bands:
    """Bands from a file's content.

    Raises:
        DamagedJson: entries and tensors that are no bands.
    """
    if take(record, "schema", "whole") > SCHEMA:
        raise DamagedJson(f"schema {record['schema']}")
    watches, low, high = [], [], []
    for i, own in enumerate(take(record, "watches", "list")):
        if not isinstance(own, dict):
            raise DamagedJson(f"watch {i}, which is no object")
        index = take(own, "index", "wholes")
        vectors, ends = (
            arrays.get(f"{i}/vectors"),
            [arrays.get(f"{i}/{k}") for k in ("low", "high")],
        )
        if vectors is None or vectors.ndim != 2 or len(vectors) != len(index):
            raise DamagedJson(f"the tensor {i}/vectors")
        for end in ends:
            if end is None or end.shape != (len(index),):
                raise DamagedJson(f"the band of watch {i}")
        if not all(bool(t.isfinite().all()) for t in (vectors, *ends) if t is not None):
            raise DamagedJson(f"values of watch {i} that are not finite")
        texts = {name: take(own, name, "text") for name in _TEXTS}
        watches.append(Watch(vectors=vectors, index=tuple(index), **texts))
        low.append(ends[0])
        high.append(ends[1])
    if not watches:
        raise DamagedJson("no watch")
    return Bands(
        tuple(watches),
        tuple(low),
        tuple(high),
        n=take(record, "n", "whole"),
        margin=take(record, "margin", "number"),
        model_hash=take(record, "model_hash", "text"),
        skip_first=take(record, "skip_first", "flag"),
    )


def _not_bands(source: Path, given: str) -> OutputError:
    return OutputError(
        f"bands file {source}",
        given=given,
        expected=f"a file written by save_bands, schema ≤ {SCHEMA}",
        remedy="Check the path, or calibrate again.",
    )
