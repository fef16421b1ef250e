"""The figures of a judgement: G over stages and layers, and R among the control contrasts.

Import them from `mi_weightspace.core.figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mi_weightspace.core.figure_heat import heatmap
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
from mi_weightspace.core.site import KINDS

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ALPHA = 0.05
Frame: TypeAlias = Any
"""A pandas DataFrame; its own annotations do not survive masks and groups."""
MOST_POINTS = 6000
"""Control values drawn one by one; beyond, each matrix shows their 5 to 95 % range."""
_PANEL = ["stage", "kind", "side"]
_KEYS = ["stage", "site", "side", "direction"]


def attribution_figure(table: pd.DataFrame, stages: pd.DataFrame) -> go.Figure:
    """The site statistic G of every step over layers, a row for every stage and matrix kind.

    Without prompts G is missing and the size of the cosine is drawn in its place. Hatched: not
    significant over all matrices of all stages; outlined: ``written here``.
    """
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
        hatch_mask=np.isfinite(size) & ~(cells(p) <= ALPHA),
        outline=cells("written") == 1,
        outline_name="outlined: written here",
        y_title=("matrix", "stage · kind"),
    )


def evidence_strip(
    table: pd.DataFrame, controls: pd.DataFrame, *, stage: str = "", columns: int | None = None
) -> go.Figure:
    """R of every matrix among the control contrasts, over layers; the size of the cosine below.

    Panels are (stage, kind, side). Filled diamond: R of the LDA direction, significant by max-T
    rank among the controls (grey; bar: the largest); open: not significant. Circle: R of the
    pattern itself. Matrices that did not change have no R and are left out.

    Args:
        table: rows of a projection. controls: ``stage, site, side, direction, control, R_lda``
            (control ``""`` is the target); may be empty. stage: named in the title.
    """
    rows = _strongest(table)
    panels = [(keys, own) for keys, own in rows.groupby(_PANEL, sort=False)]
    cloud = _cloud(rows, controls)
    columns = columns or (4 if len(panels) <= 8 else 5)
    grid = _strip_grid(rows, panels, cloud.shape[1], columns, stage)
    every = np.concatenate([cloud.ravel(), rows["R_lda"], rows["R"], [1.0]])
    ticks = log_ticks(every[np.isfinite(every)], most=6)
    last = int(np.nan_to_num(table["layer"].max())) if len(table) else 0
    for index, ((where, kind, side), own) in enumerate(panels):
        row, column = 2 * (index // columns) + 1, index % columns + 1
        for trace in _evidence(own, cloud[own.index], first=index == 0):
            grid.add_trace(trace, row=row, col=column)
        grid.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"}, row=row, col=column)
        grid.add_trace(_cosines(own, first=index == 0), row=row + 1, col=column)
        head = kind if stage else f"{where} · {kind}"
        grid.add_annotation(
            text=label(head) + (" (read)" if side == "read" else ""),
            showarrow=False,
            font_size=13,
            xref="x domain",
            yref="y domain",
            x=0.5,
            y=1.01,
            yanchor="bottom",
            row=row,
            col=column,
        )
        grid.update_yaxes(**ticks, row=row, col=column)
        grid.update_yaxes(range=[0, 1.04], dtick=0.5, row=row + 1, col=column)
        grid.update_xaxes(showticklabels=False, row=row, col=column)
        if index + columns >= len(panels):
            grid.update_xaxes(title_text=axis("layer", "block index"), row=row + 1, col=column)
        if column == 1:
            grid.update_yaxes(title_text=axis("R", "ratio, 1 by chance"), row=row, col=1)
            grid.update_yaxes(title_text=axis("|cos|", "ratio"), row=row + 1, col=1)
    step = max(1, int(np.ceil((last + 1) / 8)))
    grid.update_xaxes(range=[-0.6, last + 0.6], tick0=0, dtick=step, title_font_size=12)
    grid.update_yaxes(title_font_size=12, tickfont_size=12)
    return grid


def _strip_grid(
    rows: Frame, panels: Sequence[Any], n_controls: int, columns: int, stage: str
) -> Any:
    """Two rows of axes (R, cosine) for every row of panels."""
    from plotly.subplots import make_subplots

    n_rows = max(1, -(-len(panels) // columns))
    among = f"among {n_controls} control contrasts" if n_controls else "(no controls at hand)"
    changed = f"every matrix that {stage} changed" if stage else "every changed matrix"
    title = f"R of {changed}, {among}; below it the cosine"
    height = 190 + 252 * n_rows
    n_panels = max(1, len(panels))
    specs = [
        [{} if row // 2 * columns + column < n_panels else None for column in range(columns)]
        for row in range(2 * n_rows)
    ]
    grid = make_subplots(
        rows=2 * n_rows,
        cols=columns,
        specs=specs,
        row_heights=[0.66, 0.34] * n_rows,
        shared_yaxes="rows",  # pyright: ignore[reportArgumentType]
        horizontal_spacing=0.03,
        vertical_spacing=56 / height,
    )
    grid.update_layout(blank(title, height=height).layout)
    grid.update_layout(
        margin={"l": 80, "r": 20, "t": top_margin(title) + 10, "b": 112},
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0.01, "yanchor": "bottom"},
    )
    return grid


def _strongest(table: Frame) -> Frame:
    """One row a matrix and side, the direction with the strongest evidence; `at` is its layer."""
    rows = table.copy()
    for column in ("R", "R_lda", "cosine", "p_lda_rank"):
        if column not in rows:
            rows[column] = np.nan
    rows = rows[rows[["R", "R_lda", "cosine"]].notna().any(axis=1)]
    rows = rows.sort_values(["p_lda_rank", "R_lda", "R"], ascending=[True, False, False])
    rows = rows.drop_duplicates(["stage", "site", "side"])
    stages = list(dict.fromkeys(table["stage"]))
    rows = rows.assign(
        at=rows["layer"].fillna(0).astype(float),
        first=rows["stage"].map(stages.index),
        second=rows["kind"].map(lambda k: KINDS.index(k) if k in KINDS else len(KINDS)),
    )
    return rows.sort_values(["first", "second", "side", "at"]).reset_index(drop=True)


def _cloud(rows: Frame, controls: Frame) -> np.ndarray:
    """R of every control for each row, (rows, controls), NaN where missing."""
    import pandas as pd

    if not len(controls) or not len(rows):
        return np.zeros((len(rows), 0))
    own = controls[controls["control"] != ""]
    wide = own.pivot_table(index=_KEYS, columns="control", values="R_lda")
    wanted = pd.MultiIndex.from_arrays([rows[k].to_numpy() for k in _KEYS], names=_KEYS)
    return wide.reindex(wanted).to_numpy(dtype=float)


def _evidence(own: Frame, cloud: np.ndarray, *, first: bool) -> list[Any]:
    import plotly.graph_objects as go

    x = own["at"].to_numpy(dtype=float)
    traces: list[Any] = []
    if cloud.shape[1]:
        traces += _controls(x, cloud, first=first)
    names = own["site"].map(label)
    passed = own["p_lda_rank"].to_numpy(dtype=float) <= ALPHA
    for mask, text, symbol in (
        (passed, "R of the LDA direction, significant", "diamond"),
        (~passed, "R of the LDA direction, not significant", "diamond-open"),
    ):
        traces.append(
            go.Scatter(
                x=x[mask] if mask.any() else [None],
                y=own["R_lda"].to_numpy(dtype=float)[mask] if mask.any() else [None],
                mode="markers",
                marker={
                    "color": PALETTE[1],
                    "size": 9 if len(x) <= 25 else 6,
                    "symbol": symbol,
                    "line_width": 1.5,
                },
                name=text,
                legendgroup=text,
                showlegend=first,
                customdata=names[mask],
                hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
            )
        )
    traces.append(
        go.Scatter(
            x=x,
            y=own["R"],
            mode="markers",
            marker={"color": PALETTE[0], "size": 6, "symbol": "circle-open", "line_width": 1.5},
            name="R of the pattern (not ranked)",
            legendgroup="pattern",
            showlegend=first,
            customdata=names,
            hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
        )
    )
    return traces


def _controls(x: np.ndarray, cloud: np.ndarray, *, first: bool) -> list[Any]:
    import plotly.graph_objects as go

    n = cloud.shape[1]
    known = np.isfinite(cloud).any(axis=1)
    x, cloud = x[known], cloud[known]
    shared = {"hoverinfo": "skip", "showlegend": first}
    if cloud.size <= MOST_POINTS // 4:
        spread = ((np.arange(n) * 0.618034) % 1 - 0.5) * 0.6
        grey = go.Scatter(
            x=(x[:, None] + spread[None]).ravel(),
            y=cloud.ravel(),
            mode="markers",
            marker={"color": GREY, "size": 3, "opacity": 0.5},
            name="controls",
            legendgroup="controls",
            **shared,
        )
    else:
        low, high = np.nanquantile(cloud, [0.05, 0.95], axis=1)
        grey = go.Scatter(
            x=np.repeat(x, 3),
            y=np.stack([low, high, np.full(len(x), np.nan)], axis=1).ravel(),
            mode="lines",
            line={"color": GREY, "width": 4},
            opacity=0.5,
            name="controls, 5 to 95 %",
            legendgroup="controls",
            **shared,
        )
    edge = np.nanmax(cloud, axis=1) if len(x) else np.zeros(0)
    ends = np.array([-0.4, 0.4, np.nan])
    bar = go.Scatter(
        x=(x[:, None] + ends).ravel(),
        y=np.repeat(edge, 3),
        mode="lines",
        line={"color": INK, "width": 1.5},
        name="largest control",
        legendgroup="largest control",
        **shared,
    )
    return [grey, bar]


def _cosines(own: Frame, *, first: bool) -> Any:
    import plotly.graph_objects as go

    return go.Bar(
        x=own["at"],
        y=own["cosine"].abs(),
        width=0.5,
        marker={"color": PALETTE[5], "line_width": 0},
        name="|cos| of the first component (describes)",
        legendgroup="cosine",
        showlegend=first,
        customdata=own["site"].map(label),
        hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
    )
