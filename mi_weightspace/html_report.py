"""One self-contained page of any reports: the answer first, then what it rests on.

The file fetches nothing (its security policy forbids it), shows every string that came from data
as text, and reads the same for a finding, a refusal and a null result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.report import Report
from mi_weightspace.page.answer import MEANING, Answer, answer
from mi_weightspace.page.markup import document, json_block, table, text
from mi_weightspace.page.sections import Section, sections
from mi_weightspace.page.style import SCRIPT, STYLE

DEFAULT_QUESTION = (
    "Which training stage wrote this direction, into which matrix, and how sure are we?"
)
Group = tuple[str, Sequence[Report]]
_QUIET = frozenset(
    {
        "no change",
        "not significant",
        "underpowered",
        "below rounding floor",
        "not axis-specific",
        "direction unresolved",
        "no verdict",
    }
)


def write_report(
    reports: Sequence[Report] | Sequence[Group],
    path: str | Path,
    *,
    title: str = "mi-weightspace",
    question: str = "",
) -> Path:
    """Write the page and return its path.

    Args:
        reports: reports of one question, or ``(name, reports)`` groups, each with its own answer.

    Raises:
        OutputError: no report, the file exists, or it cannot be written.
    """
    target = Path(path)
    groups = as_groups(reports)
    if target.exists() or not groups:
        raise OutputError(
            f"report {target}",
            given="a file that exists" if groups else "no report to show",
            expected="a new file name and at least one report",
            remedy="Choose another --out; pages are never overwritten.",
        )
    page = render(groups, title=title, question=question or DEFAULT_QUESTION)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"report {target}",
            given=f"{type(error).__name__}: {error}",
            expected="a folder that can be written",
            remedy="Choose another --out, or free space.",
        ) from error
    return target


def as_groups(reports: Sequence[Report] | Sequence[Group]) -> list[Group]:
    if all(isinstance(r, Report) for r in reports):
        return [("", list(reports))] if reports else []  # pyright: ignore[reportReturnType]
    return [(name, list(own)) for name, own in reports]  # pyright: ignore[reportGeneralTypeIssues]


def render(groups: Sequence[Group], *, title: str, question: str) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    drawn: list[dict[str, Any]] = []
    answers = "".join(_answer(name, answer(own, question)) for name, own in groups)
    parts = [
        f'<h1>{text(title)}</h1><p class="question">{text(question)}</p>',
        f'<div class="answers">{answers}</div>',
        _contents(groups),
    ]
    for index, (name, own) in enumerate(groups):
        for place, section in enumerate(sections(own)):
            parts.append(_section(section, f"g{index}s{place}", name, drawn))
        parts.append(_footing(name, own, f"g{index}end"))
    parts.append(_words(groups))
    parts.append("<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>")
    parts.append(json_block("figures", drawn))
    return document(
        title=title, body="\n".join(parts), style=STYLE, scripts=[get_plotlyjs(), SCRIPT]
    )


def _answer(name: str, found: Answer) -> str:
    numbers = "".join(
        f'<div class="number"><b>{text(n.value)}</b>{text(n.name)}<dl>'
        f"<dt>n</dt><dd>{text(n.n.removeprefix('n = '))}</dd>"
        f"<dt>null</dt><dd>{text(n.null.removeprefix('null: '))}</dd>"
        f"<dt>interval</dt><dd>{text(n.interval)}</dd></dl></div>"
        for n in found.numbers
    )
    lines = "".join(f"<li>{text(line)}</li>" for line in found.lines)
    css = "answer" if found.verdict in _QUIET else "answer found"
    return (
        f'<section class="{css}"><div class="group">{text(name)}</div>'
        f'<div class="verdict">{text(found.verdict)}</div>'
        f'<div class="subject">{text(found.subject)}</div>'
        f"<p>{text(found.meaning[:1].upper() + found.meaning[1:])}.</p>"
        f'<div class="numbers">{numbers}</div>'
        + (f'<ul class="stages">{lines}</ul>' if lines else "")
        + "</section>"
    )


def _contents(groups: Sequence[Group]) -> str:
    links = []
    for index, (name, own) in enumerate(groups):
        prefix = f"{name}: " if name else ""
        for place, section in enumerate(sections_headings(own)):
            links.append(f'<a href="#g{index}s{place}">{text(prefix + section)}</a>')
    return f"<nav>{''.join(links)}</nav>"


def sections_headings(reports: Sequence[Report]) -> list[str]:
    return [s.heading for s in sections(reports)]


def _section(section: Section, anchor: str, name: str, drawn: list[dict[str, Any]]) -> str:
    group = f" <small>{text(name)}</small>" if name else ""
    parts = [f'<h2 id="{anchor}">{text(section.heading)}{group}</h2><p>{text(section.note)}</p>']
    for place, figure in enumerate(section.figures):
        identifier = f"{anchor}f{place}"
        drawn.append({"id": identifier, "figure": json.loads(str(figure.to_json()))})
        height = figure.layout["height"] or 400
        parts.append(f'<div class="figure" id="{identifier}" style="height:{int(height)}px"></div>')
    parts.extend(table(view) for view in section.tables)
    if not section.figures and not any(len(v.frame) for v in section.tables):
        parts.append('<p class="none">Nothing to show.</p>')
    return "\n".join(parts)


def _footing(name: str, reports: Sequence[Report], anchor: str) -> str:
    """Reservations, provenance, and how to run it again."""
    reservations = list(dict.fromkeys(_reservations(reports)))
    items = "".join(f"<li>{text(r)}</li>" for r in reservations)
    inputs = {k: v for report in reports for k, v in report.inputs.items()}
    rows = "".join(
        f"<tr><td>{text(k)}</td><td><code>{text(v)}</code></td></tr>" for k, v in inputs.items()
    )
    versions = ", ".join(f"{k} {v}" for k, v in reports[0].versions.items())
    seconds = "".join(
        f"<li>{text(r.kind)}: "
        + text(", ".join(f"{k} {v:.1f} s" for k, v in r.timings.items()))
        + "</li>"
        for r in reports
        if r.timings
    )
    group = f" <small>{text(name)}</small>" if name else ""
    return (
        f'<h2 id="{anchor}">Reservations and provenance{group}</h2>'
        + (
            f'<ul class="reservations">{items}</ul>'
            if items
            else '<p class="none">No reservation was recorded.</p>'
        )
        + (f'<h3>Inputs</h3><div class="scroll"><table>{rows}</table></div>' if rows else "")
        + f"<p class='soft'>{text(versions)}</p>"
        + (f"<h3>Time</h3><ul>{seconds}</ul>" if seconds else "")
        + "<h3>Run it again</h3><p>Every run folder replays itself: "
        + "<code>mi-weightspace replay RUN_FOLDER --out NEW_FOLDER</code>. As commands:</p>"
        + f"<pre>{text(chr(10).join(dict.fromkeys(command_line(r) for r in reports)))}</pre>"
    )


def _reservations(reports: Sequence[Report]) -> Iterable[str]:
    for report in reports:
        yield from report.reservations
        for verdict in report.verdicts:
            for reservation in verdict.reservations:
                yield f"{verdict.subject}: {reservation}"


def command_line(report: Report) -> str:
    """The command of a run made on the command line, else its arguments as they are."""
    command, args = report.config.get("command"), report.config.get("args")
    if not isinstance(command, str) or not isinstance(args, Mapping):
        return f"# {report.kind}: {json.dumps(dict(report.config), default=str)}"
    return f"mi-weightspace {command} " + " ".join(_options(args))


def _options(args: Mapping[str, Any]) -> Iterable[str]:
    import shlex

    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if name in POSITIONAL:
            yield from (
                shlex.quote(str(v)) for v in (value if isinstance(value, list) else [value])
            )
        elif value is True:
            yield flag
        else:
            for one in value if isinstance(value, list) else [value]:
                yield f"{flag} {shlex.quote(str(one))}"


POSITIONAL = frozenset({"models", "model", "base", "tuned", "run", "folder", "folders"})


def _words(groups: Sequence[Group]) -> str:
    used = {str(v.word) for _, own in groups for r in own for v in r.verdicts}
    rows = "".join(
        f"<tr><td><b>{text(word)}</b></td><td>{text(meaning)}</td></tr>"
        for word, meaning in MEANING.items()
        if word in used
    )
    if not rows:
        return ""
    head = '<h2 id="words">The words of this page</h2>'
    return f'{head}<div class="scroll"><table class="words">{rows}</table></div>'
