"""The few chart forms of every result. Each returns a plotly figure and never shows it.

Every axis has a unit; labels are shown as text, whatever they hold; what is not significant is
hatched or hollow and never hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mi_weightspace.core.figure_panels import bars, norms
from mi_weightspace.core.figure_style import (
    DASHES,
    DIVERGING,
    GREY,
    INK,
    PALETTE,
    SEQUENTIAL,
    axis,
    blank,
    categories,
    label,
    legend_only,
    top_margin,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike

__all__ = [
    "Line",
    "attribution_figure",
    "bars",
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


def heatmap(
    values: ArrayLike,
    x: Sequence[object],
    y: Sequence[object],
    *,
    title: str,
    unit: str,
    name: str = "value",
    hatch_mask: ArrayLike | None = None,
    ceiling: ArrayLike | None = None,
    outline: ArrayLike | None = None,
    outline_name: str = "outlined: above every control",
    diverging: bool = False,
    x_title: tuple[str, str] = ("layer", "block index"),
    y_title: tuple[str, str] = ("stage", "in training order"),
) -> go.Figure:
    """Cells `values` (len(y), len(x)), first row on top.

    Args:
        hatch_mask: True where not significant: those cells are hatched.
        ceiling: the largest value among the controls, one number or one a cell: cells above it
            get a heavy outline.
        outline: cells to outline instead, for the reason `outline_name`.
        diverging: signed values, white at zero.
    """
    import plotly.graph_objects as go

    cells = np.asarray(values, dtype=float)
    assert cells.shape == (len(y), len(x)), (cells.shape, len(y), len(x))
    figure = blank(title, height=_heat_height(x, y))
    finite = cells[np.isfinite(cells)]
    top = float(np.abs(finite).max()) if finite.size else 1.0
    top = top or 1.0
    hover = [[f"{label(b)} · {label(a)}" for a in x] for b in y]
    figure.add_trace(
        go.Heatmap(
            z=cells,
            zmin=-top if diverging else min(0.0, float(finite.min(initial=0.0))),
            zmax=top,
            colorscale=DIVERGING if diverging else SEQUENTIAL,
            xgap=1,
            ygap=1,
            customdata=hover,
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
            colorbar={
                "title": {"text": axis(name, unit), "side": "right"},
                "thickness": 14,
                "len": 1.0,
            },
        )
    )
    if hatch_mask is not None:
        _hatch(figure, np.asarray(hatch_mask, dtype=bool))
    if ceiling is not None:
        edge = np.broadcast_to(np.asarray(ceiling, dtype=float), cells.shape)
        outline = cells > edge
    if outline is not None:
        _outline(figure, np.asarray(outline, dtype=bool), outline_name)
    figure.update_xaxes(title_text=axis(*x_title), showgrid=False, **categories(x))
    figure.update_yaxes(
        title_text=axis(*y_title), showgrid=False, range=[len(y) - 0.5, -0.5], **categories(y)
    )
    figure.update_yaxes(tickangle=0)
    figure.update_xaxes(range=[-0.5, len(x) - 0.5])
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
    )
    figure.update_layout(margin_t=top_margin(title) + 14)
    return figure


def _heat_height(x: Sequence[object], y: Sequence[object]) -> int:
    """Room for the rows, the title and legend, and slanted column labels where they are long."""
    longest = max((len(str(v)) for v in x), default=1)
    slanted = categories(x)["tickangle"] != 0
    return 150 + 34 * max(4, len(y)) + (7 * longest if slanted else 20)


_STROKES = ((-0.45, 0.0, 0.0, -0.45), (-0.45, 0.45, 0.45, -0.45), (0.0, 0.45, 0.45, 0.0))


def _hatch(figure: go.Figure, mask: np.ndarray) -> None:
    """Three diagonals in every marked cell, dark on white so that they show on any colour."""
    import plotly.graph_objects as go

    xs: list[float | None] = []
    ys: list[float | None] = []
    for row, column in zip(*np.nonzero(mask), strict=True):
        for x0, y0, x1, y1 in _STROKES:
            xs += [column + x0, column + x1, None]
            ys += [row + y0, row + y1, None]
    for colour, width, shown in (("rgba(255,255,255,0.7)", 3, False), ("#555555", 1, True)):
        figure.add_trace(
            go.Scatter(
                x=xs or [None],
                y=ys or [None],
                mode="lines",
                line={"color": colour, "width": width},
                name="hatched: not significant",
                showlegend=shown,
                hoverinfo="skip",
            )
        )


def _outline(figure: go.Figure, mask: np.ndarray, name: str) -> None:
    import plotly.graph_objects as go

    xs: list[float | None] = []
    ys: list[float | None] = []
    for row, column in zip(*np.nonzero(mask), strict=True):
        xs += [column - 0.47, column + 0.47, column + 0.47, column - 0.47, column - 0.47, None]
        ys += [row - 0.47, row - 0.47, row + 0.47, row + 0.47, row - 0.47, None]
    figure.add_trace(
        go.Scatter(
            x=xs or [None],
            y=ys or [None],
            mode="lines",
            line={"color": PALETTE[1], "width": 2.5},
            name=label(name),
            hoverinfo="skip",
        )
    )


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
    figure.update_yaxes(title_text=axis(name, unit), type="log" if log_y else "linear")
    if log_y:
        figure.update_yaxes(exponentformat="power", dtick=1)
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
        figure.update_xaxes(tick0=0, dtick=max(1, int(np.ceil(span / 20))))


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
    hollow = np.zeros(len(x), bool) if line.hollow is None else np.asarray(line.hollow, dtype=bool)
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines" if colour_index is None else "lines+markers",
            name=label(line.name),
            line={"color": colour, "dash": dash, "width": 2},
            marker={
                "color": ["white" if h else colour for h in hollow],
                "line": {"color": colour, "width": 1.5},
                "size": 7,
            },
            hovertemplate=f"{label(line.name)} · %{{x}}: %{{y:.4g}}<extra></extra>",
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
    figure.update_yaxes(title_text=axis(name, unit), type="log" if log_y else "linear")
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
    figure.update_yaxes(dtick=None)
    for index, site in enumerate(values):
        level = (edge or {}).get(site)
        if level is not None and np.isfinite(level) and level > 0:
            colour = PALETTE[index % len(PALETTE)]
            figure.add_hline(y=level, line={"color": colour, "width": 1, "dash": "dot"})
    if edge:
        legend_only(figure, "dotted: largest expected from noise", dash="dot", colour=INK)
    return figure


def attribution_figure(table: pd.DataFrame, stages: pd.DataFrame) -> go.Figure:
    """The site statistic G of every step over layers, a row for every stage and matrix kind.

    Without prompts G is missing and the size of the cosine is drawn in its place. Hatched: not
    significant over all matrices of all stages; outlined: ``written here``.
    """
    from mi_weightspace.core.site import KINDS

    rows = table.dropna(subset=["layer"]).copy()
    decided = bool(rows["G"].notna().to_numpy().any())
    value, p, name = (
        ("G", "p_G", "site statistic G") if decided else ("cosine", "p_adjusted", "size of cosine")
    )
    rows["drawn"] = rows[value] if decided else rows[value].abs()
    rows = rows.dropna(subset=["drawn"])
    rows["written"] = rows["verdict"] == "written here"
    # several directions may judge one matrix: the strongest evidence is drawn
    rows = rows.sort_values(["written", "drawn"], ascending=False)
    rows = rows.drop_duplicates(["stage", "site"])
    rows["row"] = rows["stage"].astype(str) + " · " + rows["kind"].astype(str)
    present = set(rows["row"])
    order = [f"{s} · {k}" for s in stages["stage"] for k in KINDS if f"{s} · {k}" in present]
    layers = list(range(int(np.max(rows["layer"].to_numpy())) + 1)) if len(rows) else [0]

    def cells(column: str) -> np.ndarray:
        wide = rows.pivot(index="row", columns="layer", values=column)
        return wide.reindex(index=order, columns=layers).to_numpy(dtype=float)

    size = cells("drawn")
    return heatmap(
        size,
        layers,
        order,
        title=f"{name[0].upper()}{name[1:]} of every matrix, by stage and layer",
        name=name,
        unit="ratio",
        diverging=bool((size[np.isfinite(size)] < 0).any()),
        hatch_mask=np.isfinite(size) & ~(cells(p) <= 0.05),
        outline=cells("written") == 1,
        outline_name="outlined: written here",
        y_title=("matrix", "stage · kind"),
    )


def evidence_strip(table: pd.DataFrame, controls: pd.DataFrame) -> go.Figure:
    """The statistic ranked among the controls, a column for every (stage, matrix, side).

    Where a direction has no controls, the size of the cosine is drawn alone.
    """
    import pandas as pd

    keys = ["stage", "site", "side", "direction"]
    rows = table.drop_duplicates(keys).reset_index(drop=True)
    names = [
        f"{stage} {site}{' (read)' if side == 'read' else ''}"
        for stage, site, side in zip(rows["stage"], rows["site"], rows["side"], strict=True)
    ]
    if not len(controls):
        return strip(
            names,
            rows["cosine"],
            np.zeros((len(rows), 0)),
            title="Size of the cosine with the first component; no control contrasts",
            name="|cos|",
            unit="ratio",
            x_title=("matrix", "stage and site"),
        )
    wide = controls.pivot_table(index=keys, columns="control", values="R_lda")
    wide = wide.reindex(pd.MultiIndex.from_arrays([rows[k].to_numpy() for k in keys], names=keys))
    own = wide.pop("") if "" in wide else wide.max(axis=1) * np.nan
    return strip(
        names,
        own,
        wide.to_numpy(dtype=float),
        title=f"R of the direction in every matrix, among {wide.shape[1]} control contrasts",
        name="R",
        unit="ratio, 1 by chance",
        passed=rows["p_lda_rank"] <= 0.05,
        x_title=("matrix", "stage and site"),
        log_y=True,
    )
