"""What every chart shares: colours, escaped labels, axes with units, a blank figure.

Colours are the Okabe-Ito set and scales that grow darker with size: readable with any colour
vision and in grey print. Labels come from data and are shown as text, whatever they hold.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
GREY, INK = "#8C8C8C", "#222222"
WIDTH = 1000
"""Pixels: fits a 1280 px window beside its margins, and landscape A4 without scaling."""


def _scale(*colours: str) -> list[list[float | str]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


SEQUENTIAL = _scale("#F7FBFF", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B")
DIVERGING = _scale("#B35806", "#FDB863", "#F7F7F7", "#B2ABD2", "#542788")


def label(text: object) -> str:
    """Any string as plotly text: its small HTML dialect is escaped, so tokens show as they are."""
    return html.escape(str(text), quote=False).replace("\n", "⏎")


def axis(name: str, unit: str) -> str:
    """Axis title with its unit; ``1`` for a ratio."""
    assert name and unit, f"an axis needs a name and a unit, got {name!r} ({unit!r})"
    return f"{label(name)} ({label(unit)})"


def wrapped(title: str, width: int = 105) -> str:
    """The title as escaped lines that fit the figure's width."""
    return "<br>".join(label(line) for line in textwrap.wrap(title, width)) or " "


def top_margin(title: str) -> int:
    """Pixels above the plot that keep `title` clear of it."""
    return 58 + 22 * wrapped(title).count("<br>")


def blank(title: str, *, height: int) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        width=WIDTH,
        height=height + 20 * wrapped(title).count("<br>"),
        title={
            "text": wrapped(title),
            "x": 0.01,
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12 + 18 * wrapped(title).count("<br>")},
            "font_size": 15,
        },
        margin={"l": 90, "r": 30, "t": top_margin(title), "b": 70},
        font={"family": "system-ui, 'DejaVu Sans', sans-serif", "size": 12, "color": INK},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top", "font_size": 12},
        hoverlabel={"font_size": 12},
    )
    figure.update_xaxes(automargin=True, showline=True, linecolor=GREY, ticks="outside")
    figure.update_yaxes(automargin=True, showline=True, linecolor=GREY, ticks="outside")
    return figure


def categories(labels: Sequence[object], *, most: int = 30) -> dict[str, Any]:
    """Ticks at 0, 1, … with escaped labels, thinned so that neighbours never touch."""
    step = max(1, -(-len(labels) // most))
    at = list(range(0, len(labels), step))
    longest = max((len(str(labels[i])) for i in at), default=1)
    crowded = longest * len(at) > 110
    return {
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [label(labels[i]) for i in at],
        "tickangle": -60 if crowded else 0,
    }


def log_ticks(values: Iterable[float], *, most: int = 8) -> dict[str, Any]:
    """Range and ticks of a logarithmic axis: 1, 2, 5 of every decade, thinned to `most`."""
    real = [float(v) for v in values if math.isfinite(v) and v > 0]
    low, high = (min(real), max(real)) if real else (0.1, 10.0)
    room = max(0.08, 0.06 * math.log10(high / low))
    first, last = math.log10(low) - room, math.log10(high) + room
    decades = range(math.floor(first), math.ceil(last) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        at = [m * 10.0**k for k in decades for m in steps]
        at = [v for v in at if first <= math.log10(v) <= last]
        if len(at) <= most:
            break
    at = at[:: max(1, -(-len(at) // most))] if at else [low]
    return {
        "type": "log",
        "range": [first, last],
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [_power(v) for v in at],
    }


def _power(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    lead = round(value / 10.0**power)
    return ("" if lead == 1 else f"{lead}·") + f"10<sup>{str(power).replace('-', '−')}</sup>"


def legend_only(figure: go.Figure, text: str, *, dash: str, colour: str) -> None:
    import plotly.graph_objects as go

    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": colour, "dash": dash, "width": 1},
            name=label(text),
        )
    )
