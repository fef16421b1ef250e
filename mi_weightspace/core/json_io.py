"""JSON from outside, read so that whatever is wrong with it is one kind of error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Kind = Literal["text", "whole", "number", "flag", "list", "texts", "wholes", "object"]


class DamagedJson(ValueError):
    """Text that is not JSON, nests too deeply, names a key twice, or lacks what it must hold."""


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        unique: also refuse an object that names a key twice: readers disagree about which counts.

    Raises:
        DamagedJson: not UTF-8, not JSON, nested deeper than Python reads, or a number of more
            digits than it reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_once if unique else None)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise DamagedJson(str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DamagedJson(f"the key {twice!r} twice")
    return found


def take(record: Mapping[str, Any], key: str, kind: Kind, default: Any = None) -> Any:
    """One entry of an object, of the kind it must have.

    Args:
        default: what stands for an absent entry; None: there is no such thing.

    Raises:
        DamagedJson: names the key.
    """
    value = record.get(key, default)
    if not _is(value, kind):
        written = repr(value)[:80]
        raise DamagedJson(f"{key}: {written if key in record else 'nothing'}, which is no {kind}")
    return value


def _is(value: Any, kind: Kind) -> bool:
    match kind:
        case "text":
            return isinstance(value, str)
        case "whole":
            return type(value) is int and abs(value) < 2**63
        case "number":
            return type(value) in (int, float) and abs(value) < 2**1023
        case "flag":
            return isinstance(value, bool)
        case "object":
            return isinstance(value, dict)
        case "list":
            return isinstance(value, list)
        case "texts":
            return isinstance(value, list) and all(isinstance(v, str) for v in value)
        case "wholes":
            return isinstance(value, list) and all(_is(v, "whole") for v in value)


def digest_of(record: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    kept = json.loads(json.dumps({k: v for k, v in record.items() if k not in without}))
    text = json.dumps(kept, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_plain_name(name: object) -> bool:
    """Whether `name` is a file name alone: no folder, no way up, nothing a path cannot hold."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "surrogatepass")) <= 255
        and name not in {".", ".."}
        and not set(name) & set("/\\\0")
        and name.isprintable()
    )
