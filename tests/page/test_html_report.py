"""The page: self-contained, safe against hostile strings, answer first, right for every kind."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from page_examples import HOSTILE, attribution, everything, report

from mi_weightspace.core import report as report_module
from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.html_report import captioned, command_line, render, write_report
from mi_weightspace.page.answer import FOUND, MEANING, Number, answer, exceedances
from mi_weightspace.page.markup import PRINTED_COLUMNS, TableView, json_block, number, table
from mi_weightspace.page.sections import sections

quick = pytest.mark.quick
KINDS = sorted(report_module._known_kinds())
FETCHING = ("src", "srcset", "data", "poster", "background", "action", "formaction", "ping")


@dataclass
class Page(HTMLParser):
    """Every element with its attributes, and the text of scripts and of the rest."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    scripts: list[tuple[dict[str, str], str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {k: v or "" for k, v in attrs}
        self.elements.append((tag, known))
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append((known, ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            known, body = self.scripts[-1]
            self.scripts[-1] = (known, body + data)
        elif not self.inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def figures(self) -> list[dict[str, Any]]:
        return json.loads(next(b for a, b in self.scripts if a.get("id") == "figures"))


def parsed(page: str) -> Page:
    reader = Page()
    reader.feed(page)
    reader.close()
    return reader


@pytest.fixture(scope="module")
def found() -> str:
    return render(
        [("deference", everything(found=True)), ("null", everything(found=False))],
        title="t",
        question="Which stage?",
        rerun="mi-weightspace demo --seed 3",
    )


@pytest.fixture(scope="module")
def hostile() -> str:
    reports = everything(found=True, label=HOSTILE)
    bad = pd.DataFrame({HOSTILE: [HOSTILE], "n": [1]})
    reports.append(report("audit", bad, tables={"x": bad}, reservations=(HOSTILE,)))
    reports.append(
        report(
            "flip_rate",
            bad,
            verdicts=(Verdict(Word.UNDERPOWERED, HOSTILE, {}, (HOSTILE,)),),
            config={"command": "dmu", "args": {"models": [HOSTILE], "prompts": HOSTILE}},
            inputs={HOSTILE: HOSTILE},
        )
    )
    return render([(HOSTILE, reports)], title=HOSTILE, question=HOSTILE, rerun=HOSTILE)


# ---- self-contained ------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["found", "hostile"])
def test_nothing_is_fetched_and_only_hashed_scripts_run(
    which: str, request: pytest.FixtureRequest
) -> None:
    page = parsed(request.getfixturevalue(which))
    for tag, attributes in page.elements:
        assert not set(attributes) & set(FETCHING), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#"), attributes
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "svg"), tag
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv"))
    assert page.elements[3][1].get("http-equiv") == "Content-Security-Policy", "before any content"
    rules = {r.split()[0]: r.split()[1:] for r in policy.split("; ")}
    assert rules["default-src"] == ["'none'"]
    assert rules["base-uri"] == rules["form-action"] == ["'none'"]
    running = [b for a, b in page.scripts if a.get("type") != "application/json"]
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'"
        for b in running
    ]
    assert rules["script-src"] == hashes
    assert len(running) == 2
    assert not any("http" in s or "*" in s for row in rules.values() for s in row)


def test_style_fetches_nothing(found: str) -> None:
    style = re.findall(r"<style>(.*?)</style>", found, re.S)
    assert style
    assert not any("url(" in s or "@import" in s for s in style)


# ---- hostile strings -----------------------------------------------------------------------
def test_hostile_strings_make_no_element_and_are_shown_as_they_are(hostile: str) -> None:
    page = parsed(hostile)
    assert HOSTILE in page.text
    assert len(page.scripts) == 3
    assert not any("evil.example" in str(a) for t, a in page.elements if t != "div")
    assert not any("alert(" in b for a, b in page.scripts if a.get("type") != "application/json")
    raw = next(b for a, b in page.scripts if a.get("id") == "figures")
    assert "<" not in raw
    assert "&lt;script&gt;" not in page.text, "escaped twice"


@quick
def test_json_block_cannot_be_closed_from_inside() -> None:
    block = json_block("a", ["</script><script>x()</script>", "<!--", "&amp;"])
    page = parsed(block)
    assert len(page.scripts) == 1
    assert json.loads(page.scripts[0][1]) == ["</script><script>x()</script>", "<!--", "&amp;"]


# ---- the answer ----------------------------------------------------------------------------
def test_the_answer_comes_first_with_three_complete_numbers(found: str) -> None:
    body = found.split("<body>")[1]
    assert body.index('class="answers"') < body.index("<h2")
    cards = re.findall(r'<section class="answer.*?</section>', body, re.S)
    assert len(cards) == 2
    assert 'class="answer found"' in cards[0]
    assert "written here" in cards[0]
    assert "sft / blocks.2.mlp.out" in cards[0]
    assert 'class="answer"' in cards[1]
    assert "not significant" in cards[1]
    for card in cards:
        numbers = re.findall(r'<div class="number">.*?</dl></div>', card, re.S)
        assert len(numbers) == 3
        for one in numbers:
            fields = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", one)
            assert [name for name, _ in fields] == ["n", "null", "interval"]
            assert all(value.strip() for _, value in fields)
            assert re.search(r"<b>.*\d.*</b>", one)


@quick
def test_the_numbers_are_those_of_the_reports() -> None:
    reports = everything(found=True)
    given = answer(reports)
    gate, site, path = given.numbers
    assert (gate.value, gate.n) == ("2.90", "99 matched controls")
    assert "p = 0.01" in gate.null
    assert "0 of 99 controls as large" in gate.interval
    assert site.value == "1.31"
    assert site.name.endswith("blocks.2.mlp.out at sft")
    assert site.n == "99 matched controls, 24 matrices"
    assert path.value == "2.40 of 2.70 nats"
    assert path.interval.startswith("2.20 to 2.60")
    assert [s.step for s in given.steps] == ["base → sft", "sft → dpo"]
    assert [s.gate for s in given.steps] == ["0.01", "0.61"]
    assert given.steps[0].behaviour == "2.70 nats, most through blocks.2.mlp.out"
    assert given.steps[1].behaviour == "0 nats"


@quick
def test_a_null_shows_no_carrier_among_its_numbers() -> None:
    given = answer(everything(found=False))
    assert not given.found
    assert given.verdict == Word.NOT_SIGNIFICANT
    assert given.subject == "sft, dpo"
    assert not any("runs through" in n.name for n in given.numbers)


@quick
def test_exceedances_counts_and_bounds() -> None:
    assert exceedances(0.01, 99).startswith("0 of 99")
    assert exceedances(1.0, 99).startswith("99 of 99")
    assert exceedances(0.5, 39).startswith("19 of 39")
    assert exceedances(float("nan"), 39) == exceedances(0.1, 0) == "not computed"


@quick
def test_every_word_has_a_meaning_and_no_quiet_word_is_loud() -> None:
    assert set(MEANING) == set(Word)
    quiet = {Word.NO_CHANGE, Word.NOT_SIGNIFICANT, Word.UNDERPOWERED, Word.BELOW_FLOOR}
    assert not FOUND & quiet


def test_identical_weights_say_so() -> None:
    given = answer(everything(found=False)[1:])
    assert given.numbers
    reports = [r for r in everything(found=False) if r.kind == "svd"]
    page = render([("", reports)], title="t", question="q")
    assert "no change" in parsed(page).text
    assert MEANING[Word.NO_CHANGE][4:] in page


def test_without_a_test_there_is_no_verdict() -> None:
    given = answer([r for r in everything(found=True) if r.kind in ("check", "probe")])
    assert given.verdict == "no verdict"
    assert all(isinstance(n, Number) for n in given.numbers)


# ---- every kind ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_minimal_report_of_every_kind_is_shown(kind: str) -> None:
    minimal = report(
        kind,
        pd.DataFrame({"site": ["blocks.0.mlp.out"], "cosine": [0.25], "n": [7]}),
        tables={"extra": pd.DataFrame({"a": [1.0, float("nan")]})},
        verdicts=(Verdict(Word.NO_CHANGE, "sft", {"n": 3, "p": None}, ("a reservation",)),),
        config={"command": kind, "args": {"seed": 0}},
        inputs={"base": "abc"},
        reservations=("holds for the whole",),
        timings={"run": 0.5},
    )
    page = parsed(render([("", [minimal])], title="t", question="q"))
    assert "no change" in page.text
    assert "holds for the whole" in page.text
    assert "sft: a reservation" in page.text
    assert ("td", {"class": "t"}) in page.elements
    empty = report(kind, pd.DataFrame())
    assert "no verdict" in parsed(render([("", [empty])], title="t", question="q")).text


def test_sections_follow_the_argument_and_every_figure_is_there() -> None:
    built = {s.heading: s for s in sections(everything(found=True))}
    assert list(built) == [
        "Which stage, which matrix",
        "Shift of the activations (DMU)",
        "Probe",
        "What each stage changed in the weights",
        "The checkpoints",
    ]
    assert [len(s.figures) for s in built.values()] == [6, 4, 1, 3, 0]
    assert all(s.tables for s in built.values())


def test_every_axis_names_its_unit(found: str) -> None:
    drawn = parsed(found).figures()
    assert len(drawn) > 20
    for entry in drawn:
        layout = entry["figure"]["layout"]
        for letter in "xy":
            names = [k for k in layout if re.fullmatch(letter + r"axis\d*", k)]
            titles = [layout[k].get("title", {}).get("text", "") for k in names]
            assert any(titles), entry["id"]
            assert all(re.search(r"\(.+\)$", t) for t in titles if t), titles
        for trace in entry["figure"]["data"]:
            if trace["type"] == "heatmap":
                assert re.search(r"\(.+\)$", trace["colorbar"]["title"]["text"])


def test_every_figure_has_its_place_and_caption(found: str) -> None:
    page = parsed(found)
    places = [a["id"] for t, a in page.elements if a.get("class") == "figure"]
    assert places == [f["id"] for f in page.figures()]
    assert len(set(places)) == len(places)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", found)
    assert len(captions) == len(places)
    assert all(captions)
    assert all("title" not in f["figure"]["layout"] for f in page.figures())


@quick
def test_captioned_gives_back_the_plain_title_and_its_room() -> None:
    figure = {"layout": {"title": {"text": "a &lt;b&gt;<br>c"}, "height": 400, "margin": {"t": 80}}}
    caption, rest = captioned(figure)
    assert caption == "a <b> c"
    assert rest["layout"] == {"height": 342, "margin": {"t": 22}}


# ---- tables --------------------------------------------------------------------------------
@quick
def test_tables_sort_by_value_not_by_rounded_text() -> None:
    frame = pd.DataFrame({"p": [0.123456, float("nan"), float("inf")], "ok": [True, False, True]})
    shown = table(TableView("t", frame))
    assert 'data-v="0.123456">0.123<' in shown
    assert 'data-v="">—<' in shown
    assert 'data-v="">∞<' in shown
    assert ">yes<" in shown
    assert 'aria-sort="none"' in shown


@quick
def test_wide_tables_print_their_first_columns() -> None:
    frame = pd.DataFrame([range(PRINTED_COLUMNS + 3)], columns=[f"c{i}" for i in range(15)])
    page = parsed(table(TableView("t", frame)))
    hidden = [t for t, a in page.elements if "x" in a.get("class", "").split()]
    assert hidden == ["th"] * 3 + ["td"] * 3


@quick
def test_long_tables_say_that_they_are_cut() -> None:
    shown = table(TableView("t", pd.DataFrame({"a": range(1000)})))
    assert shown.count("<tr>") == 151
    assert "the first 150 of 1000 rows" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.01234, "0.0123"),
        (-1.5, "−1.50"),
        (12, "12"),
        (2.2e-8, "2.2e−08"),
        (None, "—"),
        (123.4, "123"),
    ],
)
def test_numbers_have_three_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


# ---- the file ------------------------------------------------------------------------------
def test_the_file_is_written_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = [attribution(found=True)]
    target = tmp_path / "deep" / "report.html"
    assert write_report(reports, target) == target
    first = target.read_bytes()
    assert first.rstrip().endswith(b"</html>")
    assert len(first) < 12e6
    with pytest.raises(OutputError, match="never overwritten"):
        write_report(reports, target)
    assert target.read_bytes() == first
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]

    def full(self: Path, text: str, encoding: str = "") -> int:
        self.write_bytes(text.encode()[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="no space left"):
        write_report(reports, tmp_path / "other.html")
    assert not list(tmp_path.glob("*other*"))
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(OutputError, match="no report"):
        write_report([], tmp_path / "none.html")


def test_how_to_run_it_again() -> None:
    made = report(
        "svd",
        pd.DataFrame(),
        config={
            "command": "svd",
            "args": {
                "models": ["a b", "c"],
                "rank": 4,
                "resume": False,
                "quiet": True,
                "n_null": 9,
            },
        },
    )
    assert command_line(made) == "mi-weightspace svd 'a b' c --rank 4 --quiet --n-null 9"
    assert command_line(report("svd", pd.DataFrame(), config={"command": "svd", "args": {}})) == ""
    page = render([("", [made])], title="t", question="q", rerun="mi-weightspace demo --seed 3")
    text = parsed(page).text
    assert "mi-weightspace demo --seed 3" in text
    assert "mi-weightspace svd 'a b' c" in text
