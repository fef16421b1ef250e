"""Charts of a decomposition. Each says what it was measured on, and ``unconverged`` where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_weightspace.core.figure_heat import heatmap
from mi_weightspace.core.figure_style import (
    DASHES,
    DIVERGING,
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
from mi_weightspace.core.figures import Line, profile
from mi_weightspace.core.verdict import Word

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

    from mi_weightspace.core.report import Report

ALIVE = 1e-6
"""Mean importance above which a component counts as alive (Bushnaq et al. 2026)."""
STEPS = ("training step", "optimiser steps")
TRAINING = "training batches"


def of_report(report: Report, what: str = "l0") -> go.Figure:
    """A chart from a decomposition's stored tables: ``l0``, ``terms``, ``spectrum``, ``maskings``
    or ``ladder``."""
    unconverged = any(v.word == Word.UNCONVERGED for v in report.verdicts)
    tables, on = report.tables, str(report.config.get("measured_on", ""))
    unit = "nats" if report.config.get("facts", {}).get("metric") == "kl" else "MSE"
    if what == "l0":
        return l0_history(tables["history"], unconverged=unconverged)
    if what == "terms":
        return terms_history(tables["history"], unconverged=unconverged)
    if what == "spectrum":
        return spectrum(tables["spectrum"], unconverged=unconverged, measured_on=on)
    if what == "maskings":
        return maskings(tables["maskings"], unconverged=unconverged, measured_on=on, unit=unit)
    assert what == "ladder", f"no figure {what!r} of a decomposition"
    return ladder(tables["ladder"], unconverged=unconverged, measured_on=on, unit=unit)


def titled(text: str, measured_on: str, unconverged: bool) -> str:
    stamp = "unconverged: " if unconverged else ""
    return f"{stamp}{text}" + (f" ({measured_on})" if measured_on else "")


def stamped(figure: go.Figure, unconverged: bool) -> go.Figure:
    """The word at the plot's edge too, where a crop without the title keeps it."""
    if unconverged:
        figure.add_annotation(
            text="unconverged",
            xref="paper",
            yref="paper",
            x=1,
            y=1,
            xanchor="right",
            yanchor="bottom",
            showarrow=False,
            font={"size": 14, "color": PALETTE[1]},
        )
    return figure


# ---- training ------------------------------------------------------------------------------
def l0_history(history: pd.DataFrame, *, unconverged: bool) -> go.Figure:
    """Mean number of components with g > 0 at a position, every site, over training.

    `history` has ``step`` and ``l0/SITE`` columns.
    """
    sites = [str(c) for c in history.columns if str(c).startswith("l0/")]
    lines = [
        Line(site[3:], history["step"], history[site], dash=_dash(i), colour=i)
        for i, site in enumerate(sites)
    ]
    total = f", {float(history['l0'].iloc[-1]):.3g} in all at the end" if len(history) else ""
    figure = profile(
        lines,
        title=titled(f"L0 of every matrix over training{total}", TRAINING, unconverged),
        name="L0",
        unit="components with g > 0",
        x_title=STEPS,
    )
    return stamped(_steps_axis(figure, history), unconverged)


def terms_history(history: pd.DataFrame, *, unconverged: bool) -> go.Figure:
    """Every term of the objective over training, unweighted (minimality: weighted), logarithmic."""
    heads = ("faithfulness", "minimality", "reconstruction", "hidden")
    terms = [str(c) for c in history.columns if str(c).split(".")[0] in heads]
    lines = []
    for i, term in enumerate(terms):
        values = np.asarray(history[term], dtype=float)
        values = np.where(values > 0, values, np.nan)
        lines.append(Line(_term_name(term), history["step"], values, dash=_dash(i), colour=i))
    figure = profile(
        lines,
        title=titled("Terms of the objective over training", TRAINING, unconverged),
        name="term",
        unit="each in its own unit",
        x_title=STEPS,
        log_y=True,
    )
    return stamped(_steps_axis(figure, history), unconverged)


def _term_name(term: str) -> str:
    """``reconstruction.1.persistent`` -> ``reconstruction: persistent (term 1)``."""
    parts = term.split(".")
    return term if len(parts) < 3 else f"{parts[0]}: {parts[2]} (term {parts[1]})"


def _dash(index: int) -> str:
    return DASHES[index // len(PALETTE) % len(DASHES)]


def _steps_axis(figure: go.Figure, history: pd.DataFrame) -> go.Figure:
    """Round ticks: steps are thousands, not block indices."""
    last = float(np.asarray(history["step"], dtype=float).max(initial=1.0))
    figure.update_xaxes(tickmode="auto", nticks=9, range=[-0.02 * last, 1.02 * last])
    return figure


# ---- evaluation ----------------------------------------------------------------------------
def spectrum(frame: pd.DataFrame, *, unconverged: bool, measured_on: str) -> go.Figure:
    """Mean importance of every component, largest first, logarithmic; components that are never
    important cannot be drawn and are counted in the legend.

    `frame`: ``site, rank, mean_ci``.
    """
    lines = []
    for i, (site, own) in enumerate(frame.groupby("site", sort=False)):
        own = own.sort_values("rank")
        values = np.asarray(own["mean_ci"], dtype=float)
        dead = int((values <= 0).sum())
        name = f"{site}" + (f" · {dead} of {len(values)} at 0" if dead else "")
        shown = np.where(values > 0, values, np.nan)
        lines.append(Line(name, own["rank"], shown, dash=_dash(i), colour=i))
    figure = profile(
        lines,
        title=titled("Mean importance of every component", measured_on, unconverged),
        name="mean lower importance g",
        unit="0 to 1",
        x_title=("component", "rank within its matrix, 0 is the largest"),
        log_y=True,
    )
    drawn = [np.asarray(line.y, dtype=float) for line in lines] or [np.ones(1)]
    least = np.concatenate(drawn)
    if np.isfinite(least).any() and np.nanmin(least) < 10 * ALIVE:
        figure.add_hline(y=ALIVE, line={"color": INK, "width": 1, "dash": "dot"})
        legend_only(figure, "dotted: alive above 1e-6", dash="dot", colour=INK)
    figure.update_xaxes(tickmode="auto", nticks=10)
    return stamped(figure, unconverged)


def maskings(
    frame: pd.DataFrame, *, unconverged: bool, measured_on: str, unit: str = "nats"
) -> go.Figure:
    """Error under each masking, logarithmic, with 95 % intervals; monitors hollow.

    `frame`: ``masking, distance, low, high, monitor``. Exact zeros are written out.
    """
    import plotly.graph_objects as go

    values = np.asarray(frame["distance"], dtype=float)
    title = "Distance to the model's own output under each masking, 95 % intervals"
    figure = blank(titled(title, measured_on, unconverged), height=400)
    monitor = np.asarray(frame["monitor"], dtype=bool)
    at = np.arange(len(frame))
    for mask, name, symbol in (
        (~monitor, "masking", "circle"),
        (monitor, "monitor: never optimised", "circle-open"),
    ):
        mask = mask & (values > 0)
        up, down = (
            np.abs(np.asarray(frame[side], dtype=float) - values)[mask] for side in ("high", "low")
        )
        figure.add_trace(
            go.Scatter(
                x=at[mask],
                y=values[mask],
                mode="markers",
                marker={"color": PALETTE[0], "size": 11, "symbol": symbol, "line_width": 2},
                error_y={"array": up, "arrayminus": np.minimum(down, 0.999 * values[mask])},
                name=name,
                customdata=[label(v) for v in frame["masking"][mask]],
                hovertemplate="%{customdata}: %{y:.4g}<extra></extra>",
            )
        )
    names = [
        f"{m} = 0" if not v > 0 else str(m) for m, v in zip(frame["masking"], values, strict=True)
    ]
    figure.update_xaxes(
        title_text=axis("masking", "the remainder is off but in stoch, full and delta_only"),
        range=[-0.6, len(frame) - 0.4],
        **categories(names),
    )
    figure.update_yaxes(title_text=axis("error", unit))
    figure.update_yaxes(**log_ticks(values))
    figure.update_layout(showlegend=True)
    return stamped(figure, unconverged)


def ladder(
    frame: pd.DataFrame, *, unconverged: bool, measured_on: str, unit: str = "nats"
) -> go.Figure:
    """Error under attack over its budget (median and range over batches), and its ceilings.

    `frame`: ``attack, budget, median, low, high, zero, n_batches``.
    """
    own = frame.loc[frame["attack"] == "pgd"].sort_values(by="budget")
    free = frame.loc[frame["attack"] == "pgd_free"].sort_values(by="budget")
    x = np.arange(len(own))
    lines = [Line("attack within importances", x, own["median"], own["low"], own["high"])]
    n = int(np.asarray(own["n_batches"]).max(initial=0))
    figure = profile(
        lines,
        title=titled(
            f"Worst-case masks found by sign ascent: median and range over {n} batches",
            measured_on,
            unconverged,
        ),
        name="error",
        unit=unit,
        x_title=("budget", "ascent steps of 0.1, sources shared over all positions"),
        x_labels=[int(b) for b in own["budget"]],
        log_y=True,
    )
    levels: list[float] = []
    for name, dash, values in (
        ("all masks at zero", "dash", own["zero"]),
        ("same attack without importances", "dot", free["median"]),
    ):
        if len(values):
            levels.append(float(np.asarray(values)[-1]))
            figure.add_hline(y=levels[-1], line={"color": GREY, "width": 1.5, "dash": dash})
            legend_only(figure, name, dash=dash, colour=GREY)
    bounds = [np.asarray(own[c], dtype=float) for c in ("low", "high")]
    _vertical(figure, np.concatenate([*bounds, np.array(levels)]))
    return stamped(figure, unconverged)


def _vertical(figure: go.Figure, values: np.ndarray) -> None:
    """Logarithmic where the values span much; else linear from 0, so that sizes compare."""
    real = values[np.isfinite(values) & (values > 0)]
    if real.size and real.max() / real.min() > 5:
        figure.update_yaxes(**log_ticks(real))
    else:
        top = 1.08 * float(real.max(initial=0.0)) or 1.0
        figure.update_yaxes(type="linear", tickmode="auto", ticktext=None, tickvals=None)
        figure.update_yaxes(range=[0, top])


def pareto(frame: pd.DataFrame, *, measured_on: str, unit: str = "nats") -> go.Figure:
    """L0 against the error under attack over a sweep of a coefficient, both logarithmic.

    Args:
        frame: ``coefficient, l0, pgd, budget, converged`` (hollow where not), and ``group`` where
            several sweeps are drawn.
    """
    import plotly.graph_objects as go

    groups = np.asarray(frame["group"] if "group" in frame else ["sweep"] * len(frame))
    every = bool(np.asarray(frame["converged"], dtype=bool).all())
    some = "" if every else "; hollow: unconverged"
    budget = int(np.asarray(frame["budget"]).max())
    title = f"L0 against PGD-{budget} over the minimality coefficient{some}"
    figure = blank(titled(title, measured_on, False), height=460)
    for i, name in enumerate(dict.fromkeys(groups)):
        own = frame.loc[groups == name].sort_values(by="coefficient")
        done = np.asarray(own["converged"], dtype=bool)
        figure.add_trace(
            go.Scatter(
                x=own["l0"],
                y=own["pgd"],
                mode="lines+markers+text",
                line={"color": PALETTE[i % len(PALETTE)], "width": 1.5},
                marker={
                    "size": 11,
                    "line_width": 2,
                    "symbol": np.where(done, "circle", "circle-open").tolist(),
                },
                text=[f"{v:g}" for v in own["coefficient"]],
                textposition="top right",
                cliponaxis=False,
                name=label(name),
                hovertemplate="coefficient %{text}: L0 %{x:.4g}, PGD %{y:.4g}<extra></extra>",
            )
        )
    figure.update_xaxes(title_text=axis("L0: components with g > τ at a position", "number"))
    figure.update_yaxes(title_text=axis(f"error under PGD, {budget} steps", unit))
    figure.update_xaxes(**log_ticks(frame["l0"]))
    figure.update_yaxes(**log_ticks(frame["pgd"]))
    figure.update_layout(showlegend=len(set(groups)) > 1)
    return figure


# ---- single prompts and toys -----------------------------------------------------------------
def importance_heat(
    tokens: Sequence[str],
    importances: Mapping[str, Tensor],
    *,
    most: int = 30,
    unconverged: bool,
    measured_on: str,
) -> go.Figure:
    """Importances g of the most important components over the tokens of one prompt.

    Args:
        importances: site -> (tokens, C).
        most: components shown, by their largest g on this prompt; in model order.
    """
    rows: list[tuple[float, int, str, np.ndarray]] = []
    n_all = 0
    for place, (site, values) in enumerate(importances.items()):
        cells = values.detach().float().cpu().numpy()
        n_all += int((cells.max(0) > 0).sum())
        rows += [
            (float(cells[:, c].sum()), place, f"{site} · {c}", cells[:, c])
            for c in cells.max(0).nonzero()[0]
        ]
    chosen = sorted(rows, key=lambda r: -r[0])[:most]
    chosen.sort(key=lambda r: (r[1], int(r[3].argmax())))
    if not chosen:
        chosen = [(0.0, 0, "no component is important here", np.zeros(len(tokens)))]
    figure = heatmap(
        np.stack([r[3] for r in chosen]),
        [t if t.strip() else repr(t)[1:-1] for t in tokens],
        [r[2] for r in chosen],
        title=titled(
            f"Importance over the tokens of a prompt: {min(most, n_all)} of {n_all} components "
            "with g > 0",
            measured_on,
            unconverged,
        ),
        name="lower importance g",
        unit="0 to 1",
        x_title=("token", "in order"),
        y_title=("component", "matrix · number"),
    )
    figure.data[0].update(zmin=0.0, zmax=1.0)
    figure.update_layout(height=140 + 22 * max(6, len(chosen)) + 60)
    return stamped(figure, unconverged)


def factor_pictures(
    read: Tensor, write: Tensor, site: str, *, most: int = 30, unconverged: bool
) -> go.Figure:
    """The read vectors and the write vectors of a site as two pictures, a row per component.

    Each pair is balanced to equal norms and turned so that the largest entry of the read vector is
    positive (only products are meaningful); the `most` largest, ordered by what they read.
    """
    import plotly.graph_objects as go

    r, w = (v.detach().double().cpu().numpy() for v in (read, write))
    sizes = np.linalg.norm(r, axis=1), np.linalg.norm(w, axis=1)
    product = sizes[0] * sizes[1]
    top = np.argsort(-product, kind="stable")[:most]
    top = top[np.argsort(np.abs(r[top]).argmax(1), kind="stable")]
    peak = np.take_along_axis(r[top], np.abs(r[top]).argmax(1)[:, None], 1)
    turn = np.where(peak < 0, -1.0, 1.0) * np.sqrt(product[top])[:, None]
    pictures = [
        turn * v[top] / np.maximum(s[top], 1e-300)[:, None]
        for v, s in zip((r, w), sizes, strict=True)
    ]
    bound = max(float(np.abs(p).max(initial=0.0)) for p in pictures) or 1.0
    title = f"Read and write vectors of {site}, {len(top)} largest of {len(r)} components"
    figure = blank(titled(title, "weights", unconverged), height=170 + 20 * max(5, len(top)))
    share = np.clip(r.shape[1] / (r.shape[1] + w.shape[1]), 0.25, 0.75) * 0.92
    places = ((0.0, share), (share + 0.08, 1.0))
    for i, (cells, name, domain) in enumerate(
        zip(pictures, ("read", "write"), places, strict=True)
    ):
        suffix = "" if i == 0 else "2"
        figure.add_trace(
            go.Heatmap(
                z=cells,
                zmin=-bound,
                zmax=bound,
                colorscale=DIVERGING,
                showscale=i == 1,
                xaxis=f"x{suffix}",
                yaxis=f"y{suffix}",
                colorbar={
                    "title": {"text": axis("entry", "√ of weight units"), "side": "right"},
                    "thickness": 14,
                },
                customdata=[[f"component {c}"] * cells.shape[1] for c in top],
                hovertemplate="%{customdata}, coordinate %{x}: %{z:.4g}<extra></extra>",
            )
        )
        _picture_axes(figure, suffix, name, domain, top, cells.shape[1], first=i == 0)
    return stamped(figure, unconverged)


def _picture_axes(
    figure: go.Figure,
    suffix: str,
    name: str,
    domain: tuple[float, float],
    components: np.ndarray,
    width: int,
    *,
    first: bool,
) -> None:
    shared: dict[str, Any] = {"showgrid": False, "zeroline": False, "showline": True}
    side = "input" if name == "read" else "output"
    horizontal = {
        "title": {"text": axis(name, f"{side} coordinate")},
        "domain": list(domain),
        "range": [-0.5, width - 0.5],
        "tick0": 0,
        "dtick": max(1, -(-width // 12)),
    }
    rows = {
        "range": [len(components) - 0.5, -0.5],
        "anchor": f"x{suffix}",
        "showticklabels": first,
        **categories(components.tolist(), most=40),
        "tickangle": 0,
    }
    if first:
        rows["title"] = {"text": axis("component", "number")}
    figure.update_layout(
        {
            f"xaxis{suffix}": {**shared, **horizontal, "anchor": f"y{suffix}", "linecolor": GREY},
            f"yaxis{suffix}": {**shared, **rows, "linecolor": GREY},
        }
    )
