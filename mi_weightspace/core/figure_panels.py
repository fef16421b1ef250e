"""Chart forms with one row or one panel for each matrix: `norms` and `bars`.

Import them from `mi_weightspace.core.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_weightspace.core.figure_style import (
    GREY,
    INK,
    PALETTE,
    axis,
    blank,
    label,
    log_ticks,
    top_margin,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike


def norms(
    frame: pd.DataFrame,
    *,
    title: str,
    value: str = "rel_fro",
    floor: str | None = "rounding_floor",
    name: str = "‖D‖/‖W‖",
    unit: str = "ratio",
    columns: int = 4,
) -> go.Figure:
    """Size of each stage's change over layers, a panel for every matrix kind, logarithmic.

    `frame` has one row (or several equal ones) per ``stage, site``, with ``layer, kind``, `value`
    and, where given, `floor`, drawn dotted: what rounding alone produces. Zero is not drawable on
    a logarithmic axis: matrices that did not change are counted in the panel's title.
    """
    from plotly.subplots import make_subplots

    rows = frame.drop_duplicates(["stage", "site"])
    rows = rows.dropna(subset=["layer"]).sort_values("layer")
    kinds = list(dict.fromkeys(rows["kind"]))
    columns = max(1, min(columns, len(kinds)))
    n_rows = max(1, -(-len(kinds) // columns))
    unchanged = {k: int((rows.loc[rows["kind"] == k, value] == 0).sum()) for k in kinds}
    grid = make_subplots(
        rows=n_rows,
        cols=columns,
        shared_yaxes="all",  # pyright: ignore[reportArgumentType]
        subplot_titles=[
            label(k) + (f" · {unchanged[k]} unchanged" if unchanged[k] else "") for k in kinds
        ],
        horizontal_spacing=0.03,
        vertical_spacing=0.36 / n_rows,
    )
    base = blank(title, height=150 + 220 * n_rows)
    grid.update_layout(base.layout)
    grid.update_layout(
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0.01, "yanchor": "bottom"}
    )
    grid.update_layout(margin={"l": 80, "r": 20, "t": top_margin(title) + 10, "b": 112})
    for index, stage in enumerate(dict.fromkeys(rows["stage"])):
        for panel, kind in enumerate(kinds):
            own = rows.loc[(rows["stage"] == stage) & (rows["kind"] == kind)]
            place: dict[str, Any] = {"row": panel // columns + 1, "col": panel % columns + 1}
            _norm_lines(grid, own, str(stage), index, value, floor, place, panel == 0)
    sizes = [rows[value], *([rows[floor]] if floor is not None and floor in rows else [])]
    ticks = log_ticks(np.concatenate([np.asarray(s, dtype=float) for s in sizes]), most=6)
    grid.update_yaxes(**ticks, tickfont_size=12, ticks="outside", showline=True)
    grid.update_annotations(font_size=13)
    for row in range(n_rows):
        grid.update_yaxes(title_text=axis(name, unit), title_font_size=12, row=row + 1, col=1)
    step = max(1, int(np.ceil((rows["layer"].max() if len(rows) else 1) / 8)))
    grid.update_xaxes(dtick=step, tick0=0, ticks="outside", showline=True)
    for panel in range(len(kinds)):
        if panel + columns >= len(kinds):
            grid.update_xaxes(
                title_text=axis("layer", "block index"),
                row=panel // columns + 1,
                col=panel % columns + 1,
            )
    return grid


def _norm_lines(
    grid: go.Figure,
    own: pd.DataFrame,
    stage: str,
    index: int,
    value: str,
    floor: str | None,
    place: dict[str, Any],
    first: bool,
) -> None:
    import plotly.graph_objects as go

    colour = PALETTE[index % len(PALETTE)]
    drawn = own[value].where(own[value] > 0)
    grid.add_trace(
        go.Scatter(
            x=own["layer"],
            y=drawn,
            mode="lines+markers",
            line={"color": colour},
            marker={"size": 6},
            name=label(stage),
            legendgroup=label(stage),
            showlegend=first,
            customdata=[label(s) for s in own["site"]],
            hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
        ),
        **place,
    )
    if floor is not None and floor in own:
        edge = own[floor].where(own[floor] > 0)
        grid.add_trace(
            go.Scatter(
                x=own["layer"],
                y=edge,
                mode="lines",
                line={"color": colour, "dash": "dot", "width": 1.5},
                name=f"{label(stage)}: rounding floor",
                legendgroup=f"{label(stage)} floor",
                showlegend=first and bool(edge.notna().any()),
                hovertemplate="rounding floor %{y:.3g}<extra></extra>",
            ),
            **place,
        )


def bars(
    labels: Sequence[object],
    values: ArrayLike,
    *,
    title: str,
    name: str,
    unit: str,
    markers: Mapping[str, ArrayLike] | None = None,
    highlight: ArrayLike | None = None,
    highlight_name: str = "confirmed",
    bar_name: str = "path attribution",
    most: int = 16,
) -> go.Figure:
    """Horizontal bars, largest |value| first; `markers` are further readings of the same rows.

    For the path attribution: bars are shares, markers the single revert and the single addition,
    `highlight` the confirmed carriers. Rows beyond `most`, and rows below a five-hundredth of the
    largest, are summed into one bar.
    """
    import plotly.graph_objects as go

    size = np.asarray(values, dtype=float)
    order = np.argsort(-np.abs(np.nan_to_num(size)), kind="stable")
    readings = np.stack([size, *(np.asarray(m, dtype=float) for m in (markers or {}).values())])
    reach = np.abs(np.nan_to_num(readings)).max(axis=0)
    visible = reach[order] >= reach.max(initial=0.0) / 500
    visible[0:1] = True
    kept = order[visible][:most]
    rest = np.setdiff1d(order, kept)
    names = [label(labels[i]) for i in kept]
    shown = size[kept]
    marked = np.zeros(len(size), bool) if highlight is None else np.asarray(highlight, dtype=bool)
    colour = [PALETTE[1] if marked[i] else PALETTE[0] for i in kept]
    if len(rest):
        names.append(f"{len(rest)} more, summed")
        shown, colour = np.append(shown, np.nansum(size[rest])), [*colour, GREY]
    figure = blank(title, height=170 + 24 * max(5, len(names)))
    at = np.arange(len(names))
    figure.add_trace(
        go.Bar(
            x=shown,
            y=at,
            orientation="h",
            marker={"color": colour, "line_width": 0},
            name=label(bar_name),
            showlegend=False,
            customdata=names,
            hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
        )
    )
    keys = [(bar_name, PALETTE[0])] + ([(highlight_name, PALETTE[1])] if marked.any() else [])
    for text, tint in keys:
        figure.add_trace(go.Bar(x=[None], y=[None], marker_color=tint, name=label(text)))
    for (text, row), symbol in zip(
        (markers or {}).items(), ("circle", "x-thin", "square"), strict=False
    ):
        reading = np.asarray(row, dtype=float)[kept]
        figure.add_trace(
            go.Scatter(
                x=reading,
                y=at[: len(kept)],
                mode="markers",
                marker={
                    "symbol": symbol,
                    "size": 9,
                    "color": INK,
                    "line": {"width": 2, "color": INK if symbol == "x-thin" else "white"},
                },
                name=label(text),
                hovertemplate=f"{label(text)}: %{{x:.4g}}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text=axis(name, unit), zeroline=True, zerolinecolor=INK)
    figure.update_yaxes(
        tickmode="array",
        tickvals=at,
        ticktext=names,
        range=[len(names) - 0.4, -0.6],
        title_text=axis("matrix", "site name"),
    )
    figure.update_layout(showlegend=True, barmode="overlay")
    return figure
