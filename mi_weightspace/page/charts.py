"""The figures of each kind of report, made from its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mi_weightspace.core import figures
from mi_weightspace.core.figures import Line
from mi_weightspace.core.report import Report
from mi_weightspace.page.markup import Frame, number

if TYPE_CHECKING:
    import plotly.graph_objects as go

ALPHA = 0.05
MOST_SPECTRA = 8


def has(frame: Frame, *columns: str) -> bool:
    return len(frame) > 0 and all(c in frame and frame[c].notna().any() for c in columns)


def gate_figure(gate: Frame) -> go.Figure:
    """Relative difference-in-differences over stream points, beside the controls' ceiling."""
    points = list(dict.fromkeys(gate["point"]))
    at = {point: i for i, point in enumerate(points)}
    lines: list[Line] = []
    for index, (stage, own) in enumerate(gate.groupby("stage", sort=False)):
        x = own["point"].map(at)
        lines.append(Line(str(stage), x, own["relative_did"], colour=index))
        lines.append(
            Line(f"{stage}: largest control", x, own["control_max"], dash="dash", colour=index)
        )
    n = int(gate["n_controls"].max())
    return figures.profile(
        lines,
        title=f"Stage gate: change of the contrast by stream point; ceiling of {n} controls",
        name="‖DiD‖ / ‖Δμ before‖",
        unit="ratio",
        x_title=("stream point", "in forward order"),
        x_labels=points,
    )


def path_figure(path: Frame, stage: str) -> go.Figure:
    change = float(path["readout_after"].iloc[0] - path["readout_before"].iloc[0])
    return figures.bars(
        list(path["site"]),
        path["path_share"],
        title=f"Path attribution of {stage}: the readout changed by {number(change)} nats in all",
        name="share of the change of the readout",
        unit="log-odds, nats",
        markers={
            name: path[column]
            for name, column in (("reverted alone", "revert_effect"), ("added alone", "add_effect"))
            if has(path, column)
        },
        highlight=path["carries"],
        highlight_name="carries (confirmed alone)",
    )


def targets_of(table: Frame) -> list[str]:
    """The contrasts asked about: neither controls nor null contrasts."""
    own = table[~table["is_control"].astype(bool)]
    if "kind" in own:
        own = own[own["kind"] != "null"]
    return list(dict.fromkeys(own["contrast"]))


def dmu_figures(table: Frame, contrast: str) -> list[go.Figure]:
    """Heat-map of one contrast over stage and place, and its profile with the control ceiling."""
    own = table[table["contrast"] == contrast]
    where = "point" if has(table, "point") else "layer"
    stages, places = list(dict.fromkeys(own["stage"])), list(dict.fromkeys(own[where]))
    controls = table[table["is_control"].astype(bool) & (table["contrast"] != contrast)]

    def cells(frame: Frame, column: str, how: str = "first") -> np.ndarray:
        wide = frame.pivot_table(index="stage", columns=where, values=column, aggfunc=how)
        return wide.reindex(index=stages, columns=places).to_numpy(dtype=float)

    values, p = cells(own, "rel_delta"), cells(own, "p_adjusted")
    ceiling = cells(controls, "rel_delta", "max") if len(controls) else None
    n, n_controls = int(own["n"].max()), controls["contrast"].nunique()
    x_title = ("stream point", "in forward order") if where == "point" else ("layer", "block index")
    heat = figures.heatmap(
        values,
        places,
        stages,
        title=f"{contrast}: relative shift (n = {n} pairs, {n_controls} controls)",
        name="‖Δμ‖ / ‖x‖",
        unit="ratio",
        hatch_mask=np.isfinite(values) & ~(p <= ALPHA),
        ceiling=ceiling,
        x_title=x_title,
    )
    low, high = cells(own, "ci_low"), cells(own, "ci_high")
    at = np.arange(len(places))
    lines = [
        Line(str(stage), at, values[i], low[i], high[i], hollow=~(p[i] <= ALPHA))
        for i, stage in enumerate(stages)
    ]
    if "kind" in table:
        for name, null in table[table["kind"] == "null"].groupby("contrast"):
            size = np.nanmax(cells(null, "rel_delta"), axis=0)
            lines.append(Line(f"{name}: null, any stage", at, size, dash="dot", colour=6))
    edge = None
    if ceiling is not None:
        edge = Line("largest control, any stage", at, np.nanmax(ceiling, axis=0))
    line = figures.profile(
        lines,
        title=f"{contrast}: the same with 95 % intervals; hollow points are not significant",
        name="‖Δμ‖ / ‖x‖",
        unit="ratio",
        ceiling=edge,
        x_title=x_title,
        x_labels=places,
    )
    return [heat, line]


def probe_figure(report: Report) -> go.Figure:
    """Held-out AUROC over places, with intervals, beside that of the controls."""
    table: Frame = report.table
    where = "point" if has(table, "point") else "layer"
    places = list(dict.fromkeys(table[where]))
    at = {value: i for i, value in enumerate(places)}
    lines: list[Line] = []
    name = next((c for c in ("contrast", "method", "label") if has(table, c)), None)
    for key, own in table.groupby(name, sort=False) if name else [("probe", table)]:
        x = own[where].map(at)
        for column, text in (("auroc", ""), ("heldout_register_auroc", ", register held out")):
            if not has(own, column):
                continue
            low, high = (
                own[c] if has(own, c) else None for c in (f"{column}_low", f"{column}_high")
            )
            p = next((own[c] for c in ("p_adjusted", "p") if has(own, c)), None)
            hollow = None if p is None or text else ~(p <= ALPHA)
            lines.append(Line(f"{key}{text}", x, own[column], low, high, hollow=hollow))
    ceiling = None
    controls = report.tables.get("controls")
    if controls is not None and has(controls, "auroc", where):
        highest: Frame = controls.groupby(where)["auroc"].max()
        most = highest.reindex(places)
        n = controls["control"].nunique()
        ceiling = Line(f"largest of {n} controls", np.arange(len(places)), most)
    low = min([0.45, *(float(np.nanmin(np.asarray(v.low))) for v in lines if v.low is not None)])
    return figures.profile(
        lines[:7],
        title="Held-out AUROC of the probe; hollow points are not significant",
        name="AUROC",
        unit="ratio",
        x_title=("stream point", "in forward order")
        if where == "point"
        else ("layer", "block index"),
        x_labels=places,
        ceiling=ceiling,
        reference=("chance", 0.5),
        y_range=(low, 1.02),
    )


def spectra_figure(own: Frame, stage: str) -> go.Figure | None:
    if not has(own, "singular_value", "component"):
        return None
    first = own.loc[own["singular_value"] > 0].sort_values("singular_value", ascending=False)
    every = list(dict.fromkeys(first["site"]))
    chosen = every[:MOST_SPECTRA]
    if not chosen:
        return None
    values = {
        str(site): own.loc[own["site"] == site].sort_values("component")["singular_value"]
        for site in chosen
    }
    edge = None
    if has(own, "null_edge"):
        edge = {str(s): float(own.loc[own["site"] == s, "null_edge"].iloc[0]) for s in chosen}
    more = (
        f", the {len(chosen)} largest of {len(every)} matrices" if len(every) > len(chosen) else ""
    )
    return figures.spectra(values, title=f"Spectra of the change at {stage}{more}", edge=edge)


def evidence_figures(table: Frame, controls: Frame | None) -> list[go.Figure]:
    """One strip a stage; none where nothing was measured."""
    import pandas as pd

    if not has(table, "cosine") or not all(c in table for c in ("stage", "site", "side", "layer")):
        return []
    columns = ["stage", "site", "side", "direction", "control", "R_lda"]
    known: Frame = controls if controls is not None else pd.DataFrame(columns=columns)
    return [
        figures.evidence_strip(own, known[known["stage"] == stage], stage=str(stage))
        for stage, own in table.groupby("stage", sort=False)
        if has(own, "cosine")
    ]
