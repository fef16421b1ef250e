"""What the page shows of each kind of report: figures first, then the tables behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mi_weightspace.core import figures
from mi_weightspace.core.figures import Line
from mi_weightspace.core.report import Report
from mi_weightspace.page.markup import Frame, TableView

if TYPE_CHECKING:
    import plotly.graph_objects as go

ALPHA = 0.05
MOST_CONTRASTS = 8
MOST_SPECTRA = 8


@dataclass(frozen=True, eq=False)
class Section:
    """`note` says how to read it; an empty section says why it is empty."""

    heading: str
    note: str
    figures: tuple[go.Figure, ...] = ()
    tables: tuple[TableView, ...] = ()


def sections(reports: Sequence[Report]) -> list[Section]:
    """Sections in the order of the argument: answer, activations, weights, the rest."""
    found: list[Section] = []
    left = list(reports)
    for kind, build in _BUILDERS.items():
        own = [r for r in left if r.kind == kind]
        left = [r for r in left if r.kind != kind]
        if own:
            found.append(build(own))
    return [*found, *(_other(report) for report in left)]


def has(frame: Frame, *columns: str) -> bool:
    return len(frame) > 0 and all(c in frame and frame[c].notna().any() for c in columns)


def joined(reports: Sequence[Report]) -> Frame:
    import pandas as pd

    frames = [r.table for r in reports if len(r.table)]
    return pd.concat(frames, ignore_index=True) if frames else reports[0].table


# ---- attribution ---------------------------------------------------------------------------
def _attribution(reports: Sequence[Report]) -> Section:
    drawn: list[go.Figure] = []
    tables: list[TableView] = []
    for report in reports:
        stages = report.tables["stages"]
        drawn.append(figures.attribution_figure(report.table, stages))
        gate = report.tables.get("gate")
        if gate is not None and has(gate, "relative_did"):
            drawn.append(gate_figure(gate))
        path = report.tables.get("path")
        if path is not None and has(path, "path_share", "revert_effect"):
            drawn.extend(path_figure(own, str(s)) for s, own in path.groupby("stage", sort=False))
        tables += [
            TableView("Stages", stages, True),
            TableView("Matrices", by_evidence(report.table)),
        ]
        if path is not None and len(path):
            tables.append(TableView("Path attribution", path))
        if "components" in report.tables:
            tables.append(TableView("Components", report.tables["components"]))
    return Section(
        "Which stage, which matrix",
        "The stage gate asks whether the stage changed the contrast more than it changed the "
        "matched controls; G asks whether one matrix writes that change; the path attribution asks "
        "whether the matrix carries the behaviour. Cosines and norms describe and decide nothing.",
        tuple(drawn),
        tuple(tables),
    )


def by_evidence(table: Frame) -> Frame:
    """Strongest evidence first, the deciding columns in front."""
    keys = [c for c in ("p_adjusted", "p_G", "p_lda_rank") if has(table, c)]
    table = table.sort_values(keys, na_position="last") if keys else table
    front = [
        "stage",
        "site",
        "verdict",
        "direction",
        "G",
        "p_G",
        "p_adjusted",
        "R_lda",
        "p_lda_rank",
        "cosine",
        "carries",
    ]
    front = [c for c in front if c in table]
    return table[[*front, *(c for c in table.columns if c not in front)]]


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
        title=f"Path attribution of {stage}: the readout changed by {change:.3g} nats in all",
        name="share of the change of the readout",
        unit="log-odds, nats",
        markers={"reverted alone": path["revert_effect"], "added alone": path["add_effect"]},
        highlight=path["carries"],
        highlight_name="carries (confirmed alone)",
    )


# ---- activations ---------------------------------------------------------------------------
def _dmu(reports: Sequence[Report]) -> Section:
    table = joined(reports)
    targets = list(dict.fromkeys(table.loc[~table["is_control"].astype(bool), "contrast"]))
    drawn: list[go.Figure] = []
    for contrast in targets[:MOST_CONTRASTS]:
        drawn += dmu_figures(table, contrast)
    left = len(targets) - MOST_CONTRASTS
    more = f" The first {MOST_CONTRASTS} of {len(targets)} contrasts are drawn." if left > 0 else ""
    return Section(
        "Shift of the activations (DMU)",
        "Mean shift between the two sides of the prompts, relative to the activations' norm. "
        "Hatched cells are not significant (sign flips, maximum over layers); outlined cells "
        f"exceed every control contrast of their stage and layer.{more}",
        tuple(drawn),
        (TableView("Shifts", table.sort_values("is_control", kind="stable")),),
    )


def dmu_figures(table: Frame, contrast: str) -> list[go.Figure]:
    """Heat-map of one contrast over stage and layer, and its profile with the control ceiling."""
    own = table[table["contrast"] == contrast]
    stages, layers = list(dict.fromkeys(own["stage"])), sorted(set(own["layer"]))
    controls = table[table["is_control"].astype(bool) & (table["contrast"] != contrast)]

    def cells(frame: Frame, column: str, how: str = "first") -> np.ndarray:
        wide = frame.pivot_table(index="stage", columns="layer", values=column, aggfunc=how)  # pyright: ignore[reportArgumentType]
        return wide.reindex(index=stages, columns=layers).to_numpy(dtype=float)

    values, p = cells(own, "rel_delta"), cells(own, "p_adjusted")
    ceiling = cells(controls, "rel_delta", "max") if len(controls) else None
    n, n_controls = int(own["n"].max()), controls["contrast"].nunique()
    heat = figures.heatmap(
        values,
        layers,
        stages,
        title=f"{contrast}: relative shift (n = {n} pairs, {n_controls} controls)",
        name="‖Δμ‖ / ‖x‖",
        unit="ratio",
        hatch_mask=np.isfinite(values) & ~(p <= ALPHA),
        ceiling=ceiling,
    )
    lines = [
        Line(
            str(stage),
            layers,
            values[i],
            cells(own, "ci_low")[i],
            cells(own, "ci_high")[i],
            hollow=~(p[i] <= ALPHA),
        )
        for i, stage in enumerate(stages)
    ]
    edge = None
    if ceiling is not None:
        edge = Line("largest control, any stage", layers, np.nanmax(ceiling, axis=0))
    line = figures.profile(
        lines,
        title=f"{contrast}: the same with 95 % intervals; hollow points are not significant",
        name="‖Δμ‖ / ‖x‖",
        unit="ratio",
        ceiling=edge,
    )
    return [heat, line]


def _probe(reports: Sequence[Report]) -> Section:
    drawn = [figure for report in reports for figure in probe_figures(report)]
    return Section(
        "Probe",
        "Held-out score of the direction at every layer, with intervals. A score says that the "
        "difference can be read there, not that the model uses it.",
        tuple(drawn),
        tuple(TableView("Probe scores", r.table, not drawn) for r in reports),
    )


def probe_figures(report: Report) -> list[go.Figure]:
    table: Frame = report.table
    if not has(table, "auroc"):
        return []
    where = "point" if has(table, "point") else "layer"
    labels = list(dict.fromkeys(table[where]))
    at = {value: i for i, value in enumerate(labels)}
    lines = []
    name = next((c for c in ("contrast", "method", "label") if has(table, c)), None)
    groups = table.groupby(name, sort=False) if name else [("probe", table)]
    for key, own in groups:
        low, high = (own[c] if has(own, c) else None for c in ("auroc_low", "auroc_high"))
        p = next((own[c] for c in ("p_adjusted", "p") if has(own, c)), None)
        hollow = None if p is None else ~(p <= ALPHA)
        lines.append(Line(str(key), own[where].map(at), own["auroc"], low, high, hollow=hollow))
    return [
        figures.profile(
            lines[:7],
            title="Held-out AUROC of the probe; hollow points are not significant",
            name="AUROC",
            unit="ratio",
            x_title=("stream point", "in forward order")
            if where == "point"
            else ("layer", "block index"),
            x_labels=labels,
            reference=("chance", 0.5),
        )
    ]


# ---- weights -------------------------------------------------------------------------------
def _svd(reports: Sequence[Report]) -> Section:
    table = joined(reports)
    drawn: list[go.Figure] = []
    if has(table, "rel_fro", "layer"):
        drawn.append(
            figures.norms(
                table, title="Relative size of each stage's change, by matrix kind and layer"
            )
        )
    for stage, own in table.groupby("stage", sort=False):
        figure = spectra_figure(own, str(stage))
        if figure is not None:
            drawn.append(figure)
    unchanged = 0
    if "rel_fro" in table:
        unchanged = int((table.drop_duplicates(["stage", "site"])["rel_fro"] == 0).sum())
    note = f" {unchanged} matrices did not change at all." if unchanged else ""
    per_site = table.drop_duplicates(["stage", "site"]).sort_values("rel_fro", ascending=False)
    return Section(
        "What each stage changed in the weights",
        "Norms and spectra of the differences. Dotted: what rounding to the stored precision alone "
        f"would produce. A large change is not evidence about a behaviour.{note}",
        tuple(drawn),
        (
            TableView("Matrices", per_site.drop(columns=["component"], errors="ignore")),
            TableView("Components", table),
        ),
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


def _project(reports: Sequence[Report]) -> Section:
    return Section(
        "Evidence for the direction in each matrix",
        "R is 1 where the change favours the direction no more than chance signs do; the LDA "
        "direction's R is ranked among the control contrasts by max-T over all matrices. Cosines "
        "stand beside it as description.",
        tuple(figure for report in reports for figure in evidence_figures(report)),
        tuple(
            table
            for report in reports
            for table in (
                TableView("Evidence", by_evidence(report.table), True),
                *(TableView(name.capitalize(), frame) for name, frame in report.tables.items()),
            )
        ),
    )


def evidence_figures(report: Report) -> list[go.Figure]:
    try:
        return [report.plot()]
    except NotImplementedError:
        return []


# ---- the rest ------------------------------------------------------------------------------
def _check(reports: Sequence[Report]) -> Section:
    return Section(
        "The checkpoints",
        "Every matrix of every stage was read: finite, same architecture, and how much of it "
        "differs from the stage before.",
        (),
        tuple(TableView("Stages", r.table, True) for r in reports),
    )


def _other(report: Report) -> Section:
    tables = [TableView("Table", report.table, True)]
    tables += [TableView(name.capitalize(), frame) for name, frame in report.tables.items()]
    return Section(
        report.kind.capitalize(),
        report.summary().splitlines()[0],
        tuple(evidence_figures(report)),
        tuple(tables),
    )


_BUILDERS: dict[str, Callable[[Sequence[Report]], Section]] = {
    "attribution": _attribution,
    "dmu": _dmu,
    "probe": _probe,
    "project": _project,
    "svd": _svd,
    "check": _check,
}
