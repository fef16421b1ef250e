"""mkdocs hooks: generated pages, outputs under blocks, equations, the figure script."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from mkdocs.structure.files import File

from sitetools import api, blocks, cli, maths, notebooks, planner, words

SCRIPT = """
<script src="{}"></script>
<script>
for (const place of document.querySelectorAll("div.figure")) {{
  const figure = JSON.parse(place.nextElementSibling.textContent);
  // drawn at the width it was made for, then shrunk to the column, or scrolled
  const width = figure.layout.width || 900, height = figure.layout.height || 450;
  const scale = Math.min(1, Math.max(0.7, place.parentElement.clientWidth / width));
  Object.assign(place.style, {{
    width: width + "px", transform: `scale(${{scale}})`, transformOrigin: "0 0",
    marginBottom: (scale - 1) * height + "px", marginRight: (scale - 1) * width + "px",
  }});
  Object.assign(figure.layout, {{width, height}});
  Plotly.newPlot(place, figure.data, figure.layout, {{displayModeBar: false}});
}}
</script>
"""
TABLES = {
    "verdicts": words.table,
    "planner": planner.sweep_table,
    "planner-vpd": planner.vpd_table,
    "measured": planner.measured_table,
}
_outputs: dict[str, list[str]] = {}


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(maths.Maths())
    return config


def on_files(files: Any, config: Any) -> Any:
    for uri, content in {**api.pages(), "cli.md": cli.page()}.items():
        files.append(File.generated(config, uri, content=content))
    for name in notebooks.NAMES:
        text, shown = notebooks.page(name)
        uri = f"notebooks/{name}.md"
        _outputs[uri] = shown
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    text = re.sub(r"^@@table:([\w-]+)@@$", lambda m: TABLES[m[1]](), markdown, flags=re.M)
    path = Path(config.docs_dir) / page.file.src_uri
    if page.file.src_uri in _outputs or not path.is_file():
        return text
    shown = blocks.cached(path) if blocks.blocks(path.read_text()) else []
    _outputs[page.file.src_uri] = shown
    found = blocks.blocks(text)
    assert len(found) == len(shown), page.file.src_uri
    for number, block in reversed(list(enumerate(found))):
        if shown[number]:
            text = text[: block.end] + blocks.MARK.format(number) + text[block.end :]
    return text


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    shown = _outputs.get(page.file.src_uri, [])

    def output(match: re.Match[str]) -> str:
        return f'<div class="shown">{shown[int(match[1])]}</div>'

    html = re.sub(r"<p>@@output:(\d+)@@</p>", output, html)
    assert "@@output" not in html and "@@table" not in html, page.file.src_uri
    if 'class="figure"' in html:
        up = "../" * page.file.dest_uri.count("/")
        html += SCRIPT.format(f"{up}assets/plotly.min.js")
    return html


def on_post_build(config: Any) -> None:
    import plotly

    source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    shutil.copyfile(source, Path(config.site_dir) / "assets" / "plotly.min.js")
