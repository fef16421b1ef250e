"""JSON from outside, read so that whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any


class DamagedJson(ValueError):
    """Text that is not JSON, is nested too deeply, or names a key twice."""


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
