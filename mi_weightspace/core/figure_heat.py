"""Heat-maps whose cells can be hatched (not significant) or outlined (above every control).

Import `heatmap` from `mi_weightspace.core.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mi_weightspace.core.figure_style import (
    DIVERGING,
    PALETTE,
    SEQUENTIAL,
    axis,
    blank,
    categories,
    label,
    top_margin,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike

PLOT_WIDTH, ROW_HEIGHT, SPACING = 760, 34, 11
"""Pixels: the cells together, one row of them, and between two hatching strokes."""


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
        _hatch(figure, np.asarray(hatch_mask, dtype=bool), PLOT_WIDTH / max(1, len(x)))
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
    return 150 + ROW_HEIGHT * max(4, len(y)) + (7 * longest if slanted else 20)


def _hatch(figure: go.Figure, mask: np.ndarray, width: float) -> None:
    """Diagonals at 45 degrees in every marked cell, dark on white so that they show on any colour.

    `width` is a cell's width in pixels; its height is `ROW_HEIGHT`.
    """
    import plotly.graph_objects as go

    corners = np.arange(SPACING / 2, width + ROW_HEIGHT, SPACING)
    u0, u1 = np.maximum(0.0, corners - ROW_HEIGHT), np.minimum(width, corners)
    left, right = 0.98 * (u0 / width - 0.5), 0.98 * (u1 / width - 0.5)
    bottom = 0.96 * ((corners - u0) / ROW_HEIGHT - 0.5)
    top = 0.96 * ((corners - u1) / ROW_HEIGHT - 0.5)
    strokes = np.stack([left, right, bottom, top], axis=1).tolist()
    xs: list[float | None] = []
    ys: list[float | None] = []
    for row, column in zip(*np.nonzero(mask), strict=True):
        for x0, x1, y0, y1 in strokes:
            xs += [round(column + x0, 3), round(column + x1, 3), None]
            ys += [round(row + y0, 3), round(row + y1, 3), None]
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
