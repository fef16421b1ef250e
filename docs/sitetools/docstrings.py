"""A griffe extension: the house's short docstrings, written out for the reference.

``a, b: text`` in a list of parameters is about both; several exceptions may share a line.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTION = re.compile(r"^(\s*)(Args|Attributes|Raises):\s*$")
_SEVERAL = re.compile(r"^(\s*)(\w+(?:, \w+)+): (.*)$")
_NEXT_ERROR = re.compile(r" (?=\w*Error: )")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: Any, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = written_out(obj.docstring.value)


def written_out(text: str) -> str:
    """The docstring with one name and one exception a line."""
    lines, found, at = text.split("\n"), [], 0
    while at < len(lines):
        head = _SECTION.match(lines[at])
        found.append(lines[at])
        at += 1
        if head is None:
            continue
        end = at
        while end < len(lines) and (not lines[end].strip() or _deeper(lines[end], head[1])):
            end += 1
        body = lines[at:end]
        found += _raises(body) if head[2] == "Raises" else _names(body)
        at = end
    return "\n".join(found)


def _deeper(line: str, indent: str) -> bool:
    return len(line) - len(line.lstrip()) > len(indent)


def _names(body: list[str]) -> list[str]:
    """The text stays with the first name; the others point to it."""
    found: list[str] = []
    later: list[str] = []
    own = min((len(x) - len(x.lstrip()) for x in body if x.strip()), default=0)
    for line in [*body, ""]:
        starts = len(line) - len(line.lstrip()) <= own
        if starts and later:
            found, later = [*found, *later], []
        several = _SEVERAL.match(line) if starts else None
        if several:
            first, *others = several[2].split(", ")
            line = f"{several[1]}{first}: {several[3]}"
            later = [f"{several[1]}{name}: see `{first}`." for name in others]
        found.append(line)
    return found[:-1]


def _raises(body: list[str]) -> list[str]:
    """One exception a line, however the sentences were wrapped."""
    if any(line.strip() == "" for line in body[:-1]):
        return body
    joined = " ".join(line.strip() for line in body if line.strip())
    if not re.match(r"\w*Error: ", joined):
        return body
    tail = body[-1:] if body and not body[-1].strip() else []
    return [f"    {line}" for line in _NEXT_ERROR.split(joined)] + tail
