"""One self-contained page of any reports: the answer first, then what it rests on.

The file fetches nothing (its security policy forbids it), shows every string that came from data
as text, and reads the same for a finding, a refusal and a null result.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.output_io import check_new_file, staged
from mi_weightspace.core.report import Report
from mi_weightspace.page.answer import MEANING, Answer, answer
from mi_weightspace.page.markup import document, json_block, table, text
from mi_weightspace.page.sections import Section, sections
from mi_weightspace.page.style import SCRIPT, STYLE

DEFAULT_QUESTION = (
    "Which training stage wrote this direction, into which matrix, and how sure are we?"
)
Group = tuple[str, Sequence[Report]]


def write_report(
    reports: Sequence[Report] | Sequence[Group],
    path: str | Path,
    *,
    title: str = "mi-weightspace",
    question: str = "",
    rerun: str = "",
) -> Path:
    """Write the page and return its path.

    Args:
        reports: reports of one question, or ``(name, reports)`` groups, each with its own answer.
        rerun: the command that makes all of it again, where there is one.

    Raises:
        OutputError: no report, the file exists, or it cannot be written.
    """
    target = Path(path)
    groups = as_groups(reports)
    if not groups:
        raise OutputError(
            f"report {target}",
            given="no report to show",
            expected="at least one report",
            remedy="Name run folders.",
        )
    check_new_file(target, "report")
    page = render(groups, title=title, question=question or DEFAULT_QUESTION, rerun=rerun)
    with staged(target, "report") as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def as_groups(reports: Sequence[Report] | Sequence[Group]) -> list[Group]:
    if all(isinstance(r, Report) for r in reports):
        return [("", list(reports))] if reports else []  # pyright: ignore[reportReturnType]
    return [(name, list(own)) for name, own in reports]  # pyright: ignore[reportGeneralTypeIssues]


def render(groups: Sequence[Group], *, title: str, question: str, rerun: str = "") -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    drawn: list[dict[str, Any]] = []
    built = [(name, own, sections(own)) for name, own in groups]
    answers = "".join(_answer(name, answer(own, question)) for name, own in groups)
    parts = [
        f'<h1>{text(title)}</h1><p class="question">{text(question)}</p>',
        f'<div class="answers">{answers}</div>',
        _contents([(name, found) for name, _, found in built]),
    ]
    for index, (name, own, found) in enumerate(built):
        for place, section in enumerate(found):
            parts.append(_section(section, f"g{index}s{place}", name, drawn))
        parts.append(_footing(name, own, f"g{index}end"))
    parts.append(_again(groups, rerun))
    parts.append(_words(groups))
    parts.append("<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>")
    parts.append(json_block("figures", drawn))
    return document(
        title=title, body="\n".join(parts), style=STYLE, scripts=[get_plotlyjs(), SCRIPT]
    )


def _answer(name: str, found: Answer) -> str:
    numbers = "".join(
        f'<div class="number"><b>{text(n.value)}</b>{text(n.name)}<dl>'
        f"<dt>n</dt><dd>{text(n.n)}</dd>"
        f"<dt>null</dt><dd>{text(n.null)}</dd>"
        f"<dt>interval</dt><dd>{text(n.interval)}</dd></dl></div>"
        for n in found.numbers
    )
    subject = f" <span>{text(found.subject)}</span>" if found.subject else ""
    meaning = found.meaning[:1].upper() + found.meaning[1:]
    return (
        f'<section class="answer{" found" if found.found else ""}">'
        f'<div class="group">{text(name)}</div>'
        f'<div class="verdict">{text(found.verdict)}{subject}</div><p>{text(meaning)}.</p>'
        f'<div class="numbers">{numbers}</div>{_steps(found)}</section>'
    )


def _steps(found: Answer) -> str:
    if not found.steps:
        return ""
    rows = "".join(
        f"<tr><td>{text(s.step)}</td><td>{text(s.verdict)}</td><td>{text(s.place)}</td>"
        f"<td>{text(s.gate)}</td><td>{text(s.behaviour)}</td></tr>"
        for s in found.steps
    )
    head = "".join(
        f'<th scope="col">{h}</th>'
        for h in ("stage", "verdict", "matrix", "gate p", "change of behaviour")
    )
    return f'<table class="stages"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _contents(groups: Sequence[tuple[str, Sequence[Section]]]) -> str:
    lines = []
    for index, (name, found) in enumerate(groups):
        links = "".join(
            f'<a href="#g{index}s{place}">{text(section.heading)}</a>'
            for place, section in enumerate(found)
        )
        head = f"<b>{text(name)}</b>" if name else ""
        end = f'<a href="#g{index}end">Reservations</a>'
        lines.append(f"<div>{head}{links}{end}</div>")
    return f'<nav>{"".join(lines)}<div><a href="#again">Run it again</a></div></nav>'


def _section(section: Section, anchor: str, name: str, drawn: list[dict[str, Any]]) -> str:
    group = f" <small>{text(name)}</small>" if name else ""
    first = ' class="first"' if anchor.endswith("s0") else ""
    head = f'<h2 id="{anchor}"{first}>{text(section.heading)}{group}</h2>'
    parts = [f'<div class="keep">{head}<p>{text(section.note)}</p>']
    for place, figure in enumerate(section.figures):
        identifier = f"{anchor}f{place}"
        caption, data = captioned(json.loads(str(figure.to_json())))
        drawn.append({"id": identifier, "figure": data})
        height = int(data["layout"].get("height", 400))
        parts.append(
            f"<figure><figcaption>{text(caption)}</figcaption>"
            f'<div class="figure" id="{identifier}" style="height:{height}px"></div></figure>'
            + ("</div>" if place == 0 else "")
        )
    if not section.figures:
        parts.append("</div>")
    parts.extend(table(view) for view in section.tables)
    if not section.figures and not any(len(v.frame) for v in section.tables):
        parts.append('<p class="none">Nothing to show.</p>')
    return "\n".join(parts)


def captioned(figure: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A figure's title as plain text, and the figure without it and the room it took."""
    layout = figure["layout"]
    marked = (layout.pop("title", None) or {}).get("text") or ""
    spare = 36 + 22 * marked.count("<br>")
    top = layout.get("margin", {}).get("t", 0)
    if marked and top > spare and "height" in layout:
        layout["margin"]["t"] = top - spare
        layout["height"] -= spare
    return html.unescape(marked.replace("<br>", " ")), figure


def _footing(name: str, reports: Sequence[Report], anchor: str) -> str:
    """Reservations and provenance."""
    reservations = list(dict.fromkeys(_reservations(reports)))
    items = "".join(f"<li>{text(r)}</li>" for r in reservations)
    inputs = {k: v for report in reports for k, v in report.inputs.items()}
    rows = "".join(
        f"<tr><td>{text(k)}</td><td><code>{text(v)}</code></td></tr>" for k, v in inputs.items()
    )
    versions = ", ".join(f"{k} {v}" for k, v in reports[0].versions.items())
    seconds = "; ".join(
        f"{r.kind} " + ", ".join(f"{k} {v:.1f} s" for k, v in r.timings.items())
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
        + (
            f"<details><summary>Inputs <small>({len(inputs)} hashes)</small></summary>"
            f'<div class="scroll"><table>{rows}</table></div></details>'
            if rows
            else ""
        )
        + f"<p class='soft'>{text(versions)}</p>"
        + (f"<p class='soft'>Time: {text(seconds)}.</p>" if seconds else "")
    )


def _again(groups: Sequence[Group], rerun: str) -> str:
    """How to make it again: the one command, the commands of the runs, and every setting."""
    every = [(name, report) for name, own in groups for report in own]
    commands = [rerun] if rerun else []
    commands += [c for c in (command_line(r) for _, r in every) if c]
    listed = chr(10).join(dict.fromkeys(commands))
    rows = "".join(
        f"<tr><td>{text(name)}</td><td>{text(report.kind)}</td>"
        f"<td><code>{text(shortened(report.config))}</code></td></tr>"
        for name, report in every
    )
    return (
        '<h2 id="again">Run it again</h2>'
        + (f"<pre>{text(listed)}</pre>" if listed else "")
        + "<p>A run folder made by a command is run again by "
        "<code>mi-weightspace replay RUN_FOLDER</code>; its config.yaml holds every setting.</p>"
        f"<details><summary>Settings <small>({len(every)} runs)</small></summary>"
        f'<div class="scroll"><table class="words">{rows}</table></div></details>'
    )


def shortened(config: Mapping[str, Any], most: int = 600) -> str:
    written = json.dumps(dict(config), default=str, ensure_ascii=False)
    return written if len(written) <= most else written[:most] + " …"


def _reservations(reports: Sequence[Report]) -> Iterable[str]:
    for report in reports:
        yield from report.reservations
        for verdict in report.verdicts:
            for reservation in verdict.reservations:
                yield f"{verdict.subject}: {reservation}"


def command_line(report: Report) -> str:
    """The command of a run made on the command line; empty where it was made in Python."""
    command, args = report.config.get("command"), report.config.get("args")
    if not isinstance(command, str) or not isinstance(args, Mapping):
        return ""
    if not any(args.get(name) for name in POSITIONAL):
        return ""
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
