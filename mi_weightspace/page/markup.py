"""HTML from data: everything that came from a file or a model is escaped here, once.

The page's security policy allows no fetch at all and only the scripts whose hashes it names, so
even text that slipped through could not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

MOST_ROWS = 150
PRINTED_COLUMNS = 12
"""The first columns fit on paper; the rest are shown on screen only."""
Frame: TypeAlias = Any
"""A pandas DataFrame. Its own annotations do not survive masks and cells, so none are checked."""


@dataclass(frozen=True, eq=False)
class TableView:
    """A table as shown: `caption`, the rows (the first `MOST_ROWS`), and whether it starts open."""

    caption: str
    frame: Frame
    is_open: bool = False


def text(value: object) -> str:
    """Any value as escaped text."""
    return html.escape(str(value), quote=True)


def number(value: float | None) -> str:
    """Three significant digits; an em dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "—" if value is None or math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == int(value) and abs(value) < 1e6:
        return str(int(value)).replace("-", "−")
    size = abs(value)
    if 1e-3 <= size < 1e5:
        digits = max(0, 2 - math.floor(math.log10(size)))
        return f"{value:.{digits}f}".replace("-", "−")
    return f"{value:.1e}".replace("-", "−")


def probability(value: float | None) -> str:
    """A p value to two significant digits."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}".replace("-", "−")


def cell(value: Any, place: int = 0) -> str:
    """One table cell, with the sort key of numbers beside the rounded text."""
    import numpy as np

    wide = " x" if place >= PRINTED_COLUMNS else ""

    if isinstance(value, bool | np.bool_):
        return f'<td class="b{wide}" data-v="{int(value)}">{"yes" if value else "no"}</td>'
    if isinstance(value, int | float | np.integer | np.floating):
        real = float(value)
        key = f"{real!r}" if math.isfinite(real) else ""
        return f'<td class="n{wide}" data-v="{key}">{number(real)}</td>'
    return f'<td class="t{wide}">{text("" if value is None else value)}</td>'


def table(view: TableView) -> str:
    """A sortable table; a closed one opens with its caption."""
    frame = view.frame.dropna(axis=1, how="all")
    shown = frame.head(MOST_ROWS)
    count = (
        f"{len(frame)} rows"
        if len(frame) <= MOST_ROWS
        else (
            f"the first {MOST_ROWS} of {len(frame)} rows; all are in the run folder's table.parquet"
        )
    )
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=x" if i >= PRINTED_COLUMNS else ""}>'
        f'<button type="button">{text(c)}</button></th>'
        for i, c in enumerate(shown.columns)
    )
    body = "".join(
        "<tr>" + "".join(cell(v, i) for i, v in enumerate(row)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    state = " open" if view.is_open else ""
    return (
        f"<details{state}><summary>{text(view.caption)} <small>({text(count)})</small></summary>"
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def json_block(identifier: str, value: Any) -> str:
    """Data for a script. ``<``, ``>`` and ``&`` are escaped: no string can close the element."""
    body = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        body = body.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{text(identifier)}">{body}</script>'


def script_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def document(*, title: str, body: str, style: str, scripts: Sequence[str]) -> str:
    """The whole page. Scripts are inline and allowed by hash; nothing is ever fetched.

    Inline styles are allowed because plotly sets them on the elements it draws.
    """
    scripts = [s.replace("\r\n", "\n").replace("\r", "\n") for s in scripts]
    for source in scripts:
        assert "</script" not in source.lower(), "a script that would close its own element"
        assert "<!--" not in source, "a script that would open a comment"
    policy = "; ".join(
        [
            "default-src 'none'",
            "script-src " + (" ".join(script_hash(s) for s in scripts) or "'none'"),
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    inline = "".join(f"<script>{s}</script>" for s in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{style}</style></head>\n"
        f"<body>\n{body}\n{inline}</body></html>\n"
    )
