"""Every Python block of a page is run, in order, in one namespace; its output is shown under it.

A block whose fence says ``not run here`` in its title is shown with that title and not run; the
tests allow it only where the reason is a machine that is not there.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
CACHE = ROOT / ".cache" / "docs"
FENCE = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<code>.*?)^```[ \t]*$", re.M | re.S)
NOT_RUN = "not run here"
MARK = "\n\n@@output:{}@@\n"


@dataclass(frozen=True)
class Block:
    """Source of one block, and where in its page it ends."""

    code: str
    end: int
    runs: bool
    line: int


def pages() -> list[Path]:
    """Written pages that hold Python, in order of their path."""
    found = (p for p in sorted(DOCS.rglob("*.md")) if "sitetools" not in p.parts)
    return [page for page in found if blocks(page.read_text())]


def blocks(text: str) -> list[Block]:
    return [
        Block(m["code"], m.end(), NOT_RUN not in m["info"], text[: m.start()].count("\n") + 1)
        for m in FENCE.finditer(text)
    ]


def run_page(page: Path, folder: Path) -> list[str]:
    """HTML of what each block shows; run with `folder` as the working directory.

    Raises:
        Whatever a block raises, with the page and the line in its traceback.
    """
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "__page__"}
    shown = []
    with _inside(folder):
        for block in blocks(text):
            shown.append(_run(block, page, namespace) if block.runs else "")
    return shown


def cached(page: Path) -> list[str]:
    """As `run_page`, kept until the page or the library changes."""
    key = state_hash(page.read_text())
    kept = CACHE / "blocks" / f"{page.relative_to(DOCS).as_posix().replace('/', '-')}.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        if fresh(found["key"], key):
            return found["shown"]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        shown = run_page(page, Path(folder))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"key": key, "shown": shown}))
    return shown


def state_hash(text: str) -> str:
    """Of a text, and of every file of the library: what an output depends on."""
    digest = hashlib.sha256()
    for package in ("mi_weightspace", "probes"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(file.read_bytes())
    return f"{hashlib.sha256(text.encode()).hexdigest()}:{digest.hexdigest()}"


def fresh(kept: str, key: str) -> bool:
    """Whether kept output can be shown. While pages are written, ``DOCS_STALE=1`` looks at the
    text alone, so that a change of the library does not run everything again."""
    if os.environ.get("DOCS_STALE"):
        return kept.partition(":")[0] == key.partition(":")[0]
    return kept == key


def organism_cache() -> str:
    """Where trained organisms are kept between builds."""
    return os.environ.get("MI_WEIGHTSPACE_CACHE", str(CACHE / "organisms"))


def as_html(value: Any) -> str:
    """How a value at the end of a block is shown: a figure, a table, or its text."""
    if value is None:
        return ""
    if type(value).__module__.startswith("plotly."):
        return plotly(value.to_json())
    if hasattr(value, "to_html") and hasattr(value, "columns"):
        return value.to_html(index=False, border=0, float_format="%.3g", na_rep="–")
    return pre(repr(value))


def pre(text: str) -> str:
    return f'<pre class="output">{html.escape(text.rstrip())}</pre>' if text.strip() else ""


def plotly(figure: str) -> str:
    """A figure for the script in `hooks.SCRIPT`; JSON that cannot end its script element."""
    safe = figure.replace("<", "\\u003c")
    return f'<div class="figure"></div><script type="application/json">{safe}</script>'


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before, kept = Path.cwd(), os.environ.get("MI_WEIGHTSPACE_CACHE")
    os.environ["MI_WEIGHTSPACE_CACHE"] = organism_cache()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        if kept is None:
            os.environ.pop("MI_WEIGHTSPACE_CACHE")
        else:
            os.environ["MI_WEIGHTSPACE_CACHE"] = kept


def _run(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    """Run it; what it printed and the value of its last expression, as HTML."""
    tree = ast.parse(block.code)
    ast.increment_lineno(tree, block.line)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(page), "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(page), "eval"), namespace)
    return pre(printed.getvalue()) + as_html(value)
