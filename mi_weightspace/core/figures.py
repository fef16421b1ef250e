"""The few chart forms of every result. Each returns a plotly figure and never shows it.

Every axis has a unit; labels are shown as text, whatever they hold; what is not significant is
hatched or hollow and never hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mi_weightspace.core.figure_evidence import attribution_figure, evidence_strip
from mi_weightspace.core.figure_heat import heatmap
from mi_weightspace.core.figure_inoculation import detector_panels
from mi_weightspace.core.figure_panels import bars, norms
from mi_weightspace.core.figure_style import (
    DASHES,
    GREY,
    INK,
    PALETTE,
    axis,
    blank,
    categories,
    label,
    legend_only,
    log_ticks,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike

__all__ = [
    "Line",
    "attribution_figure",
    "bars",
    "detector_panels",
    "evidence_strip",
    "heatmap",
    "label",
    "norms",
    "profile",
    "spectra",
    "strip",
]


@dataclass(frozen=True)
class Line:
    """One line of a profile: `y` over `x`, with an interval where `low` and `high` are given.

    `colour` is an index into the palette (default: position); `hollow` marks points that are not
    significant; `dash` is a plotly dash name.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    hollow: ArrayLike | None = None
    dash: str = "solid"
    colour: int | None = None


def profile(
    lines: Sequence[Line],
    *,
    title: str,
    name: str,
    unit: str,
    x_title: tuple[str, str] = ("layer", "block index"),
    x_labels: Sequence[object] | None = None,
    ceiling: Line | None = None,
    reference: tuple[str, float] | None = None,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
) -> go.Figure:
    """Lines with shaded intervals; a dashed `ceiling` of the controls; a dotted reference value.

    `x_labels`: names of the positions 0, 1, … where x is an index (stream points, say).
    """
    figure = blank(title, height=380)
    for index, line in enumerate(lines):
        _draw_line(figure, line, line.colour if line.colour is not None else index)
    if ceiling is not None:
        _draw_line(figure, ceiling, None)
    if reference is not None:
        text, value = reference
        figure.add_hline(y=value, line={"color": INK, "width": 1, "dash": "dot"})
        legend_only(figure, text, dash="dot", colour=INK)
    figure.update_xaxes(title_text=axis(*x_title))
    figure.update_yaxes(title_text=axis(name, unit))
    if log_y:
        drawn = np.concatenate([np.asarray(line.y, dtype=float) for line in lines] or [np.ones(1)])
        figure.update_yaxes(**log_ticks(drawn))
    if y_range is not None:
        figure.update_yaxes(range=list(y_range))
    if x_labels is not None:
        figure.update_xaxes(range=[-0.4, len(x_labels) - 0.6], **categories(x_labels))
    else:
        _whole_ticks(figure, lines)
    figure.update_layout(showlegend=True, legend_traceorder="normal")
    return figure


def _whole_ticks(figure: go.Figure, lines: Sequence[Line]) -> None:
    """Layers are whole numbers: never a tick at 1.5."""
    every = np.concatenate([np.asarray(line.x, dtype=float) for line in lines] or [np.zeros(1)])
    if every.size and np.allclose(every, np.round(every)):
        span = float(every.max() - every.min())
        figure.update_xaxes(
            tick0=0,
            dtick=max(1, int(np.ceil(span / 20))),
            range=[float(every.min()) - 0.4, float(every.max()) + 0.4],
        )


def _draw_line(figure: go.Figure, line: Line, colour_index: int | None) -> None:
    import plotly.graph_objects as go

    colour = GREY if colour_index is None else PALETTE[colour_index % len(PALETTE)]
    dash = "dash" if colour_index is None else line.dash
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    if line.low is not None and line.high is not None:
        low, high = np.asarray(line.low, dtype=float), np.asarray(line.high, dtype=float)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        figure.add_trace(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=np.concatenate([high, low[::-1]]),
                fill="toself",
                fillcolor=f"rgba({red},{green},{blue},0.18)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines",
            name=label(line.name),
            line={"color": colour, "dash": dash, "width": 2},
            hovertemplate=f"{label(line.name)} · %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    )
    if colour_index is None or line.dash != "solid":
        return
    hollow = np.zeros(len(x), bool) if line.hollow is None else np.asarray(line.hollow, dtype=bool)
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="markers",
            marker={
                "color": ["white" if h else colour for h in hollow],
                "line": {"color": colour, "width": 1.5},
                "size": 7 if len(x) <= 45 else 5,
            },
            showlegend=False,
            hoverinfo="skip",
        )
    )


def strip(
    x: Sequence[object],
    target: ArrayLike,
    controls: ArrayLike,
    *,
    title: str,
    name: str,
    unit: str,
    target_name: str = "target",
    passed: ArrayLike | None = None,
    x_title: tuple[str, str] = ("layer", "block index"),
    log_y: bool = False,
) -> go.Figure:
    """The target's evidence among that of the control contrasts, at every layer or site.

    Args:
        target: (len(x),). controls: (len(x), n_controls); NaN where missing.
        passed: True where the test is significant after multiplicity: filled marker, else hollow.
    """
    import plotly.graph_objects as go

    values, cloud = np.asarray(target, dtype=float), np.asarray(controls, dtype=float)
    assert cloud.shape[0] == len(values) == len(x), (cloud.shape, values.shape, len(x))
    n_controls = cloud.shape[1]
    figure = blank(title, height=400)
    spread = ((np.arange(n_controls) * 0.618034) % 1 - 0.5) * 0.5 if n_controls else np.zeros(0)
    figure.add_trace(
        go.Scatter(
            x=(np.arange(len(x))[:, None] + spread[None]).ravel(),
            y=cloud.ravel(),
            mode="markers",
            marker={"color": GREY, "size": 4, "opacity": 0.55},
            name=f"{n_controls} control contrasts",
            hovertemplate="control: %{y:.4g}<extra></extra>",
        )
    )
    if n_controls:
        edge = np.nanmax(np.where(np.isnan(cloud), -np.inf, cloud), axis=1)
        xs = np.arange(len(x))[:, None] + np.array([-0.35, 0.35, np.nan])
        figure.add_trace(
            go.Scatter(
                x=xs.ravel(),
                y=np.repeat(np.where(np.isfinite(edge), edge, np.nan), 3),
                mode="lines",
                line={"color": INK, "width": 1.5},
                name="largest control",
                hoverinfo="skip",
            )
        )
    filled = np.ones(len(values), bool) if passed is None else np.asarray(passed, dtype=bool)
    for mask, text, symbol in (
        (filled, "", "diamond"),
        (~filled, ", not significant", "diamond-open"),
    ):
        if mask.any():
            figure.add_trace(
                go.Scatter(
                    x=np.arange(len(x))[mask],
                    y=values[mask],
                    mode="markers",
                    marker={"color": PALETTE[1], "size": 10, "symbol": symbol, "line_width": 1.5},
                    name=f"{label(target_name)}{text}",
                    customdata=[label(v) for v, m in zip(x, mask, strict=True) if m],
                    hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
                )
            )
    figure.update_xaxes(title_text=axis(*x_title), range=[-0.6, len(x) - 0.4], **categories(x))
    figure.update_yaxes(title_text=axis(name, unit))
    if log_y:
        figure.update_yaxes(**log_ticks(np.append(cloud.ravel(), values)))
    figure.update_layout(showlegend=True)
    return figure


def spectra(
    values: Mapping[str, ArrayLike],
    *,
    title: str,
    edge: Mapping[str, float] | None = None,
    unit: str = "weight units",
) -> go.Figure:
    """Singular values of each matrix's change, largest first, logarithmic; null edges dotted."""
    lines = []
    for index, (site, row) in enumerate(values.items()):
        spectrum = np.asarray(row, dtype=float)
        spectrum = np.where(spectrum > 0, spectrum, np.nan)
        x = np.arange(len(spectrum))
        dash = DASHES[index // len(PALETTE) % len(DASHES)]
        lines.append(Line(site, x, spectrum, dash=dash, colour=index))
    figure = profile(
        lines,
        title=title,
        name="singular value",
        unit=unit,
        x_title=("component", "index, 0 is the largest"),
        log_y=True,
    )
    for index, site in enumerate(values):
        level = (edge or {}).get(site)
        if level is not None and np.isfinite(level) and level > 0:
            colour = PALETTE[index % len(PALETTE)]
            figure.add_hline(y=level, line={"color": colour, "width": 1, "dash": "dot"})
    if edge:
        drawn = [np.asarray(row, dtype=float) for row in values.values()]
        figure.update_yaxes(**log_ticks(np.concatenate([*drawn, np.array(list(edge.values()))])))
        legend_only(figure, "dotted: largest expected from noise", dash="dot", colour=INK)
    return figure
