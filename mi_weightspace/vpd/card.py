"""One component's card as a value, and how it is shown: plain text, and tables for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mi_weightspace.vpd.effects import Effect
from mi_weightspace.vpd.readings import TokenRate

SHOWN = 5
"""Contexts and tokens of the plain text."""


@dataclass(frozen=True)
class Context:
    """A window of text around a position where the component is important.

    Attributes:
        tokens: the window. at: index of the position in it. importance, activation: g and
            ā = ‖write‖ a at every token of the window.
    """

    tokens: tuple[str, ...]
    at: int
    importance: tuple[float, ...]
    activation: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Card:
    """One component. Numbers are over `n_tokens` positions of the data given.

    Attributes:
        norm: of the rank-one part. density: share of positions with g > 0; `strong`: g > 0.1.
        mean_importance: of g. mean_activation: of ā; `important_activation`: of ā weighted by g,
            whose sign turns the readings.
        contexts: most important first. writes: (token, logit) it raises and lowers most, for
            matrices that write the stream; reads: (token, cosine of its embedding), for matrices
            that read it; both empty elsewhere.
        inputs, outputs: tokens at which it fires, and tokens predicted there, by PMI.
        effect: of removing it; None where it never fires.
        unconverged: of the decomposition.
    """

    site: str
    component: int
    n_tokens: int
    norm: float
    density: float
    strong: float
    mean_importance: float
    mean_activation: float
    important_activation: float
    contexts: tuple[Context, ...] = ()
    writes: tuple[tuple[str, float], ...] = ()
    reads: tuple[tuple[str, float], ...] = ()
    inputs: tuple[TokenRate, ...] = ()
    outputs: tuple[tuple[str, float], ...] = ()
    effect: Effect | None = None
    unconverged: bool = False

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def _head(card: Card) -> list[str]:
    flag = " (unconverged)" if card.unconverged else ""
    lines = [
        f"{card.site}, component {card.component}{flag}",
        f"important at {100 * card.density:.3g} % of {card.n_tokens} positions (g > 0.1 at "
        f"{100 * card.strong:.3g} %), mean importance {card.mean_importance:.3g}; "
        f"norm {card.norm:.3g}",
        f"inner activation: mean {card.mean_activation:+.3g}, where important "
        f"{card.important_activation:+.3g}",
    ]
    effect = card.effect
    if effect is None:
        return [*lines, "removal: not measured, it never fires on these data"]
    text = f"removal: KL {effect.firing:.3g} nats at its {effect.n_firing} positions, " + (
        f"{effect.elsewhere:.3g} elsewhere" if effect.n_elsewhere else "which are all"
    )
    if effect.random_firing:
        others = ", ".join(f"{v:.3g}" for v in effect.random_firing)
        text += f"; other live components at the same positions: {others}"
    return [*lines, text]


def as_text(card: Card) -> str:
    lines = _head(card)
    half = len(card.writes) // 2
    for name, pairs in (
        ("writes, raises", card.writes[:half]),
        ("writes, lowers", card.writes[half:][::-1]),
        ("reads", card.reads[: len(card.reads) // 2]),
        ("predicted where it fires", card.outputs),
    ):
        if pairs:
            shown = ", ".join(f"{t!r} {v:+.2g}" for t, v in pairs[:SHOWN])
            lines.append(f"{name}: {shown}")
    if card.inputs:
        shown = ", ".join(f"{r.token!r} {r.pmi:.2g} (n={r.count})" for r in card.inputs[:SHOWN])
        lines.append(f"fires on (PMI): {shown}")
    lines += ["  " + _plain(context) for context in card.contexts[:SHOWN]]
    return "\n".join(lines)


def _plain(context: Context) -> str:
    tokens = [t.replace("\n", "⏎") for t in context.tokens]
    tokens[context.at] = f"⟦{tokens[context.at]}⟧"
    low = max(0, context.at - 8)
    joined = "".join(tokens[low : context.at + 6])
    return f"{joined}  g {context.importance[context.at]:.2f}"


def as_html(card: Card) -> str:
    head = "".join(f"<div>{html.escape(line)}</div>" for line in _head(card)[1:])
    flag = " <b>unconverged</b>" if card.unconverged else ""
    title = f"<h4>{html.escape(card.site)}, component {card.component}{flag}</h4>"
    half = len(card.writes) // 2
    tables = [
        _table("writes: raises", ("token", "logit"), card.writes[:half]),
        _table("writes: lowers", ("token", "logit"), card.writes[half:][::-1]),
        _table("reads", ("token", "cosine"), card.reads[: len(card.reads) // 2]),
        _table(
            "fires on",
            ("token", "PMI", "n", "precision", "recall"),
            [(r.token, r.pmi, r.count, r.precision, r.recall) for r in card.inputs],
        ),
        _table("predicted where it fires", ("token", "PMI"), card.outputs),
    ]
    row = "".join(f"<td style='vertical-align:top;padding-right:1.5em'>{t}</td>" for t in tables)
    windows = "".join(_window(context) for context in card.contexts)
    legend = (
        "<p>Background: importance g (blue is 1). Hover a token for its g and inner activation; "
        "the boxed token is the position drawn.</p>"
        if card.contexts
        else ""
    )
    return (
        f"<div style='font-family:system-ui,sans-serif;font-size:13px;max-width:1000px'>{title}"
        f"{head}<table><tr>{row}</tr></table>{legend}{windows}</div>"
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th style='text-align:left'>{c}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{html.escape(repr(v)) if isinstance(v, str) else f'{v:.3g}'}</td>" for v in row
        )
        + "</tr>"
        for row in rows
    )
    grid = f"<table style='font-size:13px'><tr>{head}</tr>{body}</table>"
    return f"<div><b>{html.escape(title)}</b></div>{grid}"


def _window(context: Context) -> str:
    parts = []
    for i, token in enumerate(context.tokens):
        g, act = context.importance[i], context.activation[i]
        shown = html.escape(token.replace("\n", "⏎")) or "∅"
        box = "outline:2px solid #D55E00;" if i == context.at else ""
        # text stays dark: the strongest background is a light blue
        parts.append(
            f"<span title='g {g:.2f}, a {act:+.2f}' style='padding:0 1px;{box}"
            f"background:rgba(86,180,233,{min(1.0, max(0.0, g)):.2f})'>{shown}</span>"
        )
    line = "".join(parts)
    return f"<div style='white-space:pre-wrap;margin:4px 0;color:#222;background:#fff'>{line}</div>"
