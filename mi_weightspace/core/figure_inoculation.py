"""Detector × stage: AUROC with intervals, before the band that permuted labels reach.

Import `detector_panels` from `mi_weightspace.core.figures`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mi_weightspace.core.figure_style import GREY, INK, PALETTE, axis, blank, label, top_margin

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_FAMILIES = {
    "text": 6,
    "linear": 0,
    "sae": 1,
    "null sae": 4,
    "sae parts": 3,
    "non-linear": 2,
    "handed in": 5,
}
"""Family -> palette index; an unknown family is grey."""


def detector_panels(frame: pd.DataFrame, *, title: str) -> go.Figure:
    """A panel for each stage, a row for each detector.

    Filled: above the null's mean with p ≤ 0.05; hollow: not, or no null was drawn. The norm is no
    AUROC: it stands in the panel's title.

    Args:
        frame: rows of one task, with ``stage, role, detector, family, statistic, value, low,
            high, null_low, null_high, p, above_null``.
    """
    from plotly.subplots import make_subplots

    scored = frame.loc[frame["statistic"] == "AUROC"]
    norms = frame.loc[frame["statistic"] != "AUROC"].set_index("stage")
    stages = list(dict.fromkeys(scored["stage"]))
    names = list(dict.fromkeys(scored["detector"]))
    roles = dict(zip(scored["stage"], scored["role"], strict=True))
    figure = make_subplots(
        rows=1,
        cols=max(1, len(stages)),
        shared_yaxes=True,
        subplot_titles=[_heading(s, roles[s], norms) for s in stages],
        horizontal_spacing=0.015,
    )
    base = blank(title, height=210 + 24 * len(names))
    figure.update_layout(base.layout)
    figure.update_layout(
        margin={"l": 80, "r": 20, "t": top_margin(title) + 46, "b": 118},
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0.01, "yanchor": "bottom"},
        showlegend=True,
    )
    shown: set[str] = set()
    for column, stage in enumerate(stages, start=1):
        own = scored[scored["stage"] == stage].set_index("detector").reindex(names)
        _draw_stage(figure, own, names, column, shown)
    figure.update_xaxes(
        range=[-0.03, 1.06], tickvals=[0, 0.5, 1], ticks="outside", showline=True, linecolor=GREY
    )
    figure.update_xaxes(title_text=axis("AUROC", "0.5 = no order"), title_font_size=11)
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        range=[len(names) - 0.4, -0.6],
        zeroline=False,
    )
    figure.update_yaxes(
        ticktext=[label(n) for n in names],
        title_text=axis("detector", "name"),
        automargin=True,
        row=1,
        col=1,
    )
    figure.update_annotations(font_size=11)
    return figure


def _heading(stage: str, role: str, norms: pd.DataFrame) -> str:
    head = f"{label(stage)} ({label(role)})" if role != stage else label(stage)
    if stage not in norms.index:
        return head
    row = norms.loc[stage]
    return f"{head}<br>‖Δμ‖/‖x‖ {float(row['value']):.2f}, p {float(row['p']):.2g}"


def _draw_stage(
    figure: go.Figure, own: pd.DataFrame, names: list[str], column: int, shown: set[str]
) -> None:
    import plotly.graph_objects as go

    place: dict[str, Any] = {"row": 1, "col": column}
    at = np.arange(len(names))
    low, high = own["null_low"].to_numpy(float), own["null_high"].to_numpy(float)
    xs = np.stack([low, high, np.full(len(names), np.nan)], axis=1).ravel()
    figure.add_trace(
        go.Scatter(
            x=xs,
            y=np.repeat(at, 3).astype(float),
            mode="lines",
            line={"color": GREY, "width": 9},
            opacity=0.45,
            name="95 % under permuted labels",
            legendgroup="null",
            showlegend="null" not in shown,
            hoverinfo="skip",
        ),
        **place,
    )
    figure.add_vline(x=0.5, line={"color": INK, "width": 1, "dash": "dot"}, **place)
    shown.add("null")
    for family in dict.fromkeys(own["family"].dropna()):
        rows = (own["family"] == family).to_numpy()
        values = own["value"].to_numpy(float)[rows]
        above = [bool(a) if a is not None and a == a else False for a in own["above_null"][rows]]
        index = _FAMILIES.get(str(family))
        colour = GREY if index is None else PALETTE[index]
        figure.add_trace(
            go.Scatter(
                x=values,
                y=at[rows],
                mode="markers",
                marker={
                    "color": [colour if a else "white" for a in above],
                    "line": {"color": colour, "width": 1.5},
                    "size": 8,
                },
                error_x={
                    "array": own["high"].to_numpy(float)[rows] - values,
                    "arrayminus": values - own["low"].to_numpy(float)[rows],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 2,
                },
                name=label(family),
                legendgroup=str(family),
                showlegend=str(family) not in shown,
                customdata=[label(n) for n, r in zip(names, rows, strict=True) if r],
                hovertemplate="%{customdata}: %{x:.3f}<extra></extra>",
            ),
            **place,
        )
        shown.add(str(family))
