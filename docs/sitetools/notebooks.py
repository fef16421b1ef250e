"""The notebooks of `experiments/`, executed, as pages with their outputs."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from sitetools.blocks import (
    CACHE,
    MARK,
    ROOT,
    fresh,
    organism_cache,
    plotly,
    pre,
    state_hash,
)

NAMES = ("walkthrough", "inoculation_walkthrough", "vpd_walkthrough", "sweep_walkthrough")
TIMEOUT = 900


def source(name: str) -> Path:
    return ROOT / "experiments" / f"{name}.py"


def executed(name: str) -> Any:
    """The notebook with its outputs; kept until it or the library changes.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds its traceback.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    key = state_hash(source(name).read_text())
    kept = CACHE / "notebooks" / f"{name}.ipynb"
    if kept.is_file():
        found = nbformat.read(kept, as_version=4)
        if fresh(found.metadata.get("built_from", ""), key):
            return found
    notebook = jupytext.read(source(name))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("MI_WEIGHTSPACE_CACHE", organism_cache())
    CACHE.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    place = {"metadata": {"path": str(CACHE)}}
    client = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources=place)
    client.execute()
    notebook.metadata["built_from"] = key
    notebook.metadata["seconds"] = round(time.perf_counter() - start, 1)
    kept.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook


def page(name: str) -> tuple[str, list[str]]:
    """Markdown with a mark for every output, and the outputs as HTML."""
    notebook = executed(name)
    shown: list[str] = []
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        html = "".join(_output(o) for o in cell.outputs)
        if html:
            parts.append(MARK.format(len(shown)))
            shown.append(html)
    parts.append(
        f"*Executed when this page was built, from `experiments/{name}.py` "
        f"({notebook.metadata.get('seconds', '?')} s). `make notebooks` writes it as a notebook.*"
    )
    return "\n\n".join(parts), shown


def _output(output: Any) -> str:
    """One output of a cell: the richest form there is."""
    if output.output_type == "stream":
        return pre(output.text) if output.name == "stdout" else ""
    data = output.get("data", {})
    for kind in ("application/vnd.plotly.v1+json", "text/html", "image/png", "text/plain"):
        if kind in data:
            value = data[kind]
            break
    else:
        return ""
    if kind.startswith("application"):
        return plotly(json.dumps({"data": value["data"], "layout": value["layout"]}))
    if kind == "text/html":
        value = re.sub(r"<style.*?</style>", "", value, flags=re.S)  # pandas' own
        return value if re.sub(r"<[^>]*>|\s", "", value) else ""  # a bar that has gone
    if kind == "image/png":
        return f'<img alt="" src="data:image/png;base64,{value}">'
    return pre(value)
