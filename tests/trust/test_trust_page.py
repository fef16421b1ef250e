"""Hostile strings in every text of a report: shown as text, never run, nothing fetched."""

from __future__ import annotations

import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from trust_counter import Figure
from trust_hostile import RUN, strings

from mi_weightspace.core import report as report_module
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.html_report import render
from mi_weightspace.page.markup import json_block

sys.path.insert(0, str(Path(__file__).parents[1] / "page"))
from page_examples import everything

NAME, UNIT = "report injection", "hostile strings"
KEPT = {"verdict", "kind", "side", "layer"}
"""Columns with words of the package's own."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
INERT = {"html", "head", "body", "meta", "title", "style", "script", "h1", "h2", "h3", "p", "div",
         "section", "table", "thead", "tbody", "tr", "th", "td", "nav", "a", "b", "small", "code",
         "ul", "li", "details", "summary", "figure", "figcaption", "button", "span", "dl", "dt",
         "dd", "pre", "noscript"}  # fmt: skip


# ---- reports -------------------------------------------------------------------------------
def spoiled(frame: pd.DataFrame, text: str) -> pd.DataFrame:
    """Every cell of text with `text` behind it."""
    found = frame.copy()
    for name in found.columns:
        if name not in KEPT and found[name].map(type).eq(str).any():
            found[name] = [f"{v}{text}" if isinstance(v, str) else v for v in found[name]]
    return found


def hostile(report: Report, text: str) -> Report:
    """A report whose stages, sites, labels, prompts, notes, settings and hashes hold `text`."""
    return replace(
        report,
        table=spoiled(report.table, text),
        tables={name: spoiled(frame, text) for name, frame in report.tables.items()}
        | {text: pd.DataFrame({text: [text], "n": [1]})},
        verdicts=tuple(
            Verdict(v.word, v.subject + text, {text: text}, (*v.reservations, text))
            for v in (*report.verdicts, Verdict(Word.UNDERPOWERED, "s", {}))
        ),
        config={
            "command": "dmu",
            text: text,
            "args": {"models": [text], "prompts": text, text: [text]},
        },
        inputs={text: text},
        reservations=(text,),
        versions=dict(report.versions) | {text: text},
        timings={text: 1.0},
    )


def groups(found: Sequence[str], every: int) -> list[tuple[str, list[Report]]]:
    """A group a string: a report of any kind and, for every n-th, one with figures as well."""
    kinds = everything(found=True, n_layers=2)
    cls = report_module._known_kinds()["audit"]
    made = []
    for i, text in enumerate(found):
        own = [hostile(cls(table=pd.DataFrame({text: [text], "n": [1]})), text)]
        if i % every == 0:
            own.insert(0, hostile(kinds[i // every % len(kinds)], text))
        made.append((text, own))
    return made


def page_of(found: Sequence[str], every: int = 1) -> str:
    title = "".join(found[:8])
    made = groups(found, every)
    return render(made, title=title, question=title, rerun="\n".join(found[:8]))


# ---- the text of the page ------------------------------------------------------------------
class Elements(HTMLParser):
    """Elements, with what is wrong with them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.wrong: list[str] = []
        self.scripts = 0
        self.words: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("script", "style") else ""
        self.scripts += tag == "script"
        bad = [n for n in own if n.startswith("on") or n in ("src", "srcset", "ping", "action")]
        strange = tag not in INERT or not own.get("href", "#").startswith("#")
        if bad or strange or (tag == "meta" and own.get("http-equiv", "").lower() == "refresh"):
            self.wrong.append(f"<{tag} {own}>"[:150])

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.words.append(data)


def squeezed(text: str) -> str:
    return " ".join(text.replace("\0", "�").split())


def test_hostile_strings_are_text() -> None:
    found = strings("http://evil.example")
    assert len(found) >= 100
    assert len(set(found)) == len(found)
    tried = "scripts, handlers, fetches, styles, templates, sheets, unicode in every text"
    with Figure(NAME, UNIT, tried) as figure:
        for start in range(0, len(found), 60):
            part = found[start : start + 60]
            page = page_of(part, every=16)
            reader = Elements()
            reader.feed(page)
            reader.close()
            shown = squeezed(" ".join(reader.words))
            absent = [text for text in part if squeezed(text) not in shown]
            problems = [f"{w} in the page of {start}" for w in reader.wrong[:3]]
            problems += [f"not shown as it is: {text[:80]!r}" for text in absent]
            if reader.scripts != 3:  # the figures' data, the chart library, the page's own
                problems.append(f"{reader.scripts} scripts")
            figure.count += len(part)
            figure.problems += problems


def test_each_string_alone_in_a_notebook() -> None:
    """``_repr_html_`` of a report, which a notebook puts into its own page."""
    with Figure(NAME, UNIT, "the same in a notebook's output cell") as figure:
        for text in strings("http://evil.example"):
            frame = pd.DataFrame({text: [text], "n": [1]})
            own = report_module._known_kinds()["audit"](
                table=frame, verdicts=(Verdict(Word.UNDERPOWERED, text, {}),), reservations=(text,)
            )
            reader = Elements()
            reader.feed(own._repr_html_().replace(' border="1"', ""))
            reader.close()
            figure.add(problem=f"{text[:60]!r}: {reader.wrong[0]}" if reader.wrong else None)


def test_each_string_as_data() -> None:
    """The block of data the page's script reads: closed by nothing in it, the same when read."""
    with Figure(NAME, UNIT, "the same as data for the page's script") as figure:
        for text in strings("http://evil.example"):
            reader = Elements()
            block = json_block("figures", [text, {text: text}])
            reader.feed(f"{block}<p>end</p>")
            reader.close()
            body = block.split(">", 1)[1].rsplit("<", 1)[0]
            whole = json.loads(body) == [text, {text: text}] and "<" not in body
            good = whole and reader.scripts == 1 and not reader.wrong
            figure.add(problem=None if good and reader.words == ["end"] else f"{text[:60]!r}")


# ---- a browser -----------------------------------------------------------------------------
class Requests(http.server.BaseHTTPRequestHandler):
    seen: list[str] = []  # noqa: RUF012 (the server makes a handler for every request)

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@contextmanager
def listening() -> Iterator[str]:
    Requests.seen.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Requests)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def opened(page: str, folder: Path) -> tuple[str, str]:
    """(document after its scripts ran, the browser's console) of a page opened from disk."""
    assert CHROMIUM is not None
    file = folder / "page.html"
    file.write_bytes(page.encode("utf-8", "surrogatepass"))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
               "--enable-logging=stderr", "--disable-component-update",
               "--disable-background-networking",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=6000",
               "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.decode(), done.stderr.decode(errors="replace")


RAN = re.compile(r"<html[^>]*data-ran=")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_nothing_runs_and_nothing_is_fetched(tmp_path: Path) -> None:
    with listening() as remote:
        bare = f'<!DOCTYPE html><html><body><img src={remote}/seen onerror="{RUN}"></body></html>'
        document, _ = opened(bare, tmp_path)
        assert RAN.search(document), "the mark is set where a payload runs"
        assert Requests.seen, "a request is seen where one is made"
    tried = "the same pages in headless Chromium, figures drawn: marks set, requests made, CSP"
    with listening() as remote, Figure(NAME, UNIT, tried) as figure:
        found = strings(remote)
        for start in range(0, len(found), 24):
            part = found[start : start + 24]
            document, console = opened(page_of(part, every=4), tmp_path)
            figure.count += len(part)
            figure.problems += browser_problems(document, console, start)
        figure.problems += [f"a request for {path}" for path in Requests.seen]


def browser_problems(document: str, console: str, start: int) -> list[str]:
    found = []
    document = re.sub(r"<script\b.*?</script>", "", document, flags=re.DOTALL)
    if RAN.search(document):
        found.append(f"a payload of page {start} ran")
    if "svg-container" not in document:
        found.append(f"page {start}: no figure was drawn, so its labels were not tried")
    links = re.findall(r"<a\b[^>]*?(?:xlink:)?href=\"([^\"#][^\"]*)\"", document)
    found += [f"a link to {html.unescape(link)[:80]} in page {start}" for link in links[:3]]
    refused = [line for line in console.splitlines() if "Content Security Policy" in line]
    found += [f"only the policy stopped: {line[:160]}" for line in refused[:3]]
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_policy_holds_even_where_escaping_would_fail(tmp_path: Path) -> None:
    """The page with every payload put in unescaped: the policy alone stops scripts and fetches."""
    with listening() as remote:
        raw = [s for s in strings(remote) if "http-equiv" not in s and "<base" not in s]
        raw = [s for s in raw if "<a " not in s and "<form" not in s and "noscript" not in s]
        page = page_of(["plain"])
        with Figure(NAME, UNIT, "put in unescaped: the page's policy alone") as figure:
            for text in raw:
                if text.startswith(("<", '"><', "'><", "</", "--><")):
                    figure.count += 1
            injected = "".join(
                f"<div>{s}</div>" for s in raw if s.startswith("<") and "<!--" not in s
            )
            document, _ = opened(page.replace("<body>", f"<body>{injected}", 1), tmp_path)
            if RAN.search(document):
                figure.problems.append("a payload ran")
            figure.problems += [f"a request for {path}" for path in Requests.seen]
