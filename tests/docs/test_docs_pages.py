"""Pages of the site: their Python runs, their tables are the code's, their equations convert."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mi_weightspace.core.verdict import Word
from mi_weightspace.organisms import Organism

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

from sitetools import blocks, notebooks  # noqa: E402

QUICK = ("faq", "inoculation", "scaling", "svd", "verdicts")
"""Pages of a few seconds; the others are run by `make docs`, and where slow tests are."""
PAGES = [
    page if page.stem in QUICK else pytest.param(page, marks=pytest.mark.slow)
    for page in blocks.pages()
]
NOT_HERE: dict[str, int] = {}
"""Blocks that need a machine that is not here, by page: no more than these."""


def named(page: object) -> str | None:
    return page.relative_to(blocks.DOCS).as_posix() if isinstance(page, Path) else None


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks_run_in_order(
    page: Path, deference: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MI_WEIGHTSPACE_CACHE", str(deference.folder.parent))
    shown = blocks.run_page(page, tmp_path)
    assert len(shown) == len(blocks.blocks(page.read_text()))


@pytest.mark.quick
def test_no_python_escapes_the_check() -> None:
    """Whatever is fenced as Python, under any name, is one of the blocks that are run."""
    for page in (p for p in blocks.DOCS.rglob("*.md")):
        text = page.read_text()
        fenced = re.findall(r"^\s*(?:```|~~~)\s*\{?\s*\.?(?:python|py|pycon)\b", text, flags=re.M)
        found = blocks.blocks(text)
        assert len(fenced) == len(found), page
        left_out = sum(not block.runs for block in found)
        assert left_out <= NOT_HERE.get(named(page), 0), page


@pytest.mark.quick
def test_a_failing_block_fails_its_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# x\n\n```python\na = 1\n```\n\n```python\na + unknown\n```\n")
    with pytest.raises(NameError, match="unknown"):
        blocks.run_page(page, tmp_path)
    page.write_text("```python\nprint('<b>')\n2 + 2\n```\n\n```python\nx = 1\n```\n")
    assert blocks.run_page(page, tmp_path) == [
        '<pre class="output">&lt;b&gt;</pre><pre class="output">4</pre>',
        "",
    ]


@pytest.mark.quick
def test_every_word_has_its_row() -> None:
    from sitetools import words

    rows = words.table().splitlines()[2:]
    assert len(rows) == len(Word)
    for word, row in zip(Word, rows, strict=True):
        assert f"`{word}`" in row
        assert row.count("|") == 4


@pytest.mark.quick
def test_the_command_page_names_every_option() -> None:
    from sitetools import cli
    from typer.main import get_command

    from mi_weightspace.cli import app

    text = cli.page()
    for name, command in get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        section = text.split(f"## mi-weightspace {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{', '.join(parameter.opts)}`" in section, (name, parameter.name)


@pytest.mark.quick
def test_the_planner_counts_what_the_models_have() -> None:
    """Published parameter counts: 6.74, 13.02 and 68.98 billion, embeddings and head included."""
    from sitetools import planner

    for shape, count in zip(planner.SHAPES, (6.738e9, 13.016e9, 68.977e9), strict=True):
        gains = (2 * shape.layers + 1) * shape.d
        assert shape.entries + 2 * shape.vocabulary * shape.d + gains == pytest.approx(count, 1e-3)
    thirteen = planner.SHAPES[1]
    large = planner.Shape("one", 1, 0, 0, 1, 1)
    assert large.entries == 0
    once = planner.sweep_seconds(thirteen, 1.0)
    assert once == pytest.approx(2 * thirteen.entries / (5120 * 13696))


@pytest.mark.quick
def test_notebooks_exist_and_are_wired() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in notebooks.NAMES:
        assert notebooks.source(name).is_file()
        assert re.search(rf"for name in .*\b{name}\b", makefile)


@pytest.mark.quick
def test_equations_convert_and_code_is_left_alone() -> None:
    markdown = pytest.importorskip("markdown")
    pytest.importorskip("latex2mathml")
    from sitetools.maths import Maths

    def html(text: str) -> str:
        return markdown.markdown(text, extensions=[Maths(), "fenced_code"])

    assert "<math" in html(r"the size $\|D\|_F$ of it")
    assert 'display="block"' in html("$$\nx = 1\n$$")
    assert "<math" not in html("`$x$` costs $5 or $6")
    with pytest.raises(ValueError, match=r"\\nosuchthing"):
        html(r"$\nosuchthing{x}$")
    for page in blocks.DOCS.rglob("*.md"):
        for equation in re.findall(r"\$\$(.+?)\$\$", page.read_text(), flags=re.S):
            assert "<math" in html(f"$${equation}$$")


@pytest.mark.quick
def test_the_look_at_the_site_sees_what_is_wrong(tmp_path: Path) -> None:
    from sitetools import check_site

    good = '<h1 id="top">x</h1><a href="b.html#part">b</a><a href="https://example.org">out</a>'
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "b.html").write_text('<h2 id="part"></h2><script src="x.js"></script>')
    (tmp_path / "x.js").touch()
    assert check_site.problems(tmp_path) == []
    for bad, sentence in {
        '<a href="c.html">': "leads nowhere",
        '<a href="b.html#other">': "no such anchor",
        '<a href="/b.html">': "absolute link",
        '<a href="../../etc/passwd">': "leads nowhere",
        '<script src="//host/x.js"></script>': "fetches",
        '<link rel="stylesheet" href="https://host/x.css">': "fetches",
        "<p>@@output:3@@</p>": "left as it was",
    }.items():
        (tmp_path / "a.html").write_text(good + bad)
        found = check_site.problems(tmp_path)
        assert len(found) == 1 and sentence in found[0], bad
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "s.css").write_text("@import url(https://fonts.example/f.css);")
    assert len(check_site.problems(tmp_path)) == 1


@pytest.mark.quick
def test_docstrings_are_written_out_name_by_name() -> None:
    pytest.importorskip("griffe")
    from sitetools.docstrings import written_out

    given = (
        "What.\n\nArgs:\n    a, b: first\n        and second.\n    c: third.\n\n"
        "Raises:\n    ConfigError: one. SiteError: two. CheckpointError: of\n    three.\n\nEnd: x."
    )
    assert written_out(given) == (
        "What.\n\nArgs:\n    a: first\n        and second.\n    b: see `a`.\n    c: third.\n\n"
        "Raises:\n    ConfigError: one.\n    SiteError: two.\n    CheckpointError: of three.\n\n"
        "End: x."
    )
    assert written_out("a, b: no section") == "a, b: no section"
