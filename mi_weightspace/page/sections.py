"""What the page shows of each kind of report: figures first, then the tables behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mi_weightspace.core import figure_vpd, figures
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Word
from mi_weightspace.page.charts import (
    dmu_figures,
    evidence_figures,
    gate_figure,
    has,
    path_figure,
    probe_figure,
    spectra_figure,
    targets_of,
)
from mi_weightspace.page.markup import Frame, TableView

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_CONTRASTS = 8


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
    for kind, (needs, build) in _BUILDERS.items():
        own = [r for r in left if r.kind == kind and all(c in r.table for c in needs)]
        left = [r for r in left if r not in own]
        if own:
            found.append(build(own))
    return [*found, *(_other(report) for report in left)]


def joined(reports: Sequence[Report]) -> Frame:
    import pandas as pd

    frames = [r.table for r in reports if len(r.table)]
    return pd.concat(frames, ignore_index=True) if frames else reports[0].table


# ---- attribution ---------------------------------------------------------------------------
def _attribution(reports: Sequence[Report]) -> Section:
    drawn: list[go.Figure] = []
    tables: list[TableView] = []
    for report in reports:
        extra = dict(report.tables)
        stages = extra.pop("stages", None)
        if stages is not None:
            drawn.append(figures.attribution_figure(report.table, stages))
            tables.append(TableView("Stages", in_front(stages, _STAGE_FRONT), True))
        gate = extra.pop("gate", None)
        if gate is not None and has(gate, "relative_did"):
            drawn.append(gate_figure(gate))
        path = extra.pop("path", None)
        if path is not None and has(path, "path_share"):
            drawn.extend(path_figure(own, str(s)) for s, own in path.groupby("stage", sort=False))
        drawn += evidence_figures(report.table, extra.pop("controls", None))
        tables.append(TableView("Matrices", by_evidence(report.table)))
        if path is not None and len(path):
            tables.append(TableView("Path attribution", path))
        tables += others(extra)
    return Section(
        "Which stage, which matrix",
        "The stage gate asks whether the stage changed the contrast more than it changed the "
        "matched controls; G asks whether one matrix writes that change; the path attribution asks "
        "whether the matrix carries the behaviour. R (1 by chance, ranked among the controls) is "
        "the evidence of the weights alone. Cosines and norms describe and decide nothing.",
        tuple(drawn),
        tuple(tables),
    )


def others(tables: Mapping[str, Frame]) -> list[TableView]:
    return [
        TableView(_CAPTIONS.get(name, name.replace("_", " ").capitalize()), frame)
        for name, frame in tables.items()
        if len(frame)
    ]


_CAPTIONS = {
    "did": "Difference in differences",
    "growth": "Excess growth",
    "ordering": "Ordering check",
    "choice": "Chosen place",
    "sites": "Every matrix",
    "vectors": "Biases and norm gains",
}


_STAGE_FRONT = (
    "stage",
    "verdict",
    "written_sites",
    "gate_p",
    "gate_statistic",
    "onset",
    "top_carrier",
    "readout_before",
    "readout_after",
)
_SITE_FRONT = (
    "stage",
    "site",
    "verdict",
    "G",
    "p_G",
    "p_adjusted",
    "R_lda",
    "p_lda_rank",
    "R",
    "cosine",
    "carries",
    "direction",
)


def in_front(table: Frame, columns: Sequence[str]) -> Frame:
    """The deciding columns first."""
    front = [c for c in columns if c in table]
    return table[[*front, *(c for c in table.columns if c not in front)]]


def by_evidence(table: Frame) -> Frame:
    """Strongest evidence first, the deciding columns in front."""
    keys = [c for c in ("p_adjusted", "p_G", "p_lda_rank") if has(table, c)]
    table = table.sort_values(keys, na_position="last") if keys else table
    return in_front(table, _SITE_FRONT)


# ---- activations ---------------------------------------------------------------------------
def _dmu(reports: Sequence[Report]) -> Section:
    table = joined(reports)
    targets = targets_of(table)
    drawn: list[go.Figure] = []
    for contrast in targets[:MOST_CONTRASTS]:
        drawn += dmu_figures(table, contrast)
    left = len(targets) - MOST_CONTRASTS
    more = f" The first {MOST_CONTRASTS} of {len(targets)} contrasts are drawn." if left > 0 else ""
    tables = [TableView("Shifts", table.sort_values("is_control", kind="stable"))]
    for report in reports:
        extra = {
            name: frame[~frame["is_control"].astype(bool)] if "is_control" in frame else frame
            for name, frame in report.tables.items()
        }
        tables += others(extra)
    return Section(
        "Shift of the activations (DMU)",
        "Mean shift between the two sides of the prompts, relative to the activations' norm. "
        "Hatched or hollow: not significant (sign flips, maximum over layers). Outlined: larger "
        f"than every control contrast of that stage and place.{more}",
        tuple(drawn),
        tuple(tables),
    )


def _probe(reports: Sequence[Report]) -> Section:
    drawn = [probe_figure(report) for report in reports]
    tables: list[TableView] = []
    for report in reports:
        tables += [TableView("Probe scores", report.table), *others(report.tables)]
    return Section(
        "Probe",
        "Held-out score of the direction, with intervals. A score says that the difference can be "
        "read there, not that the model uses it; where controls score as high, it is no evidence "
        "for this contrast in particular.",
        tuple(drawn),
        tuple(tables),
    )


def _gate(reports: Sequence[Report]) -> Section:
    tables: list[TableView] = []
    for report in reports:
        tables += [TableView("Interventions", report.table, True), *others(report.tables)]
    return Section(
        "Causal gate of the direction",
        "The direction is taken out of the stream, and added to it. Evidence is the rank of the "
        "effect among directions in which the contrast's own pairs differ; z against isotropic "
        "directions is description: any direction the activations occupy moves a readout. Centred: "
        "the readout's threshold stands at the mean of the neutral prompts.",
        tuple(report.plot() for report in reports),
        tuple(tables),
    )


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


def _project(reports: Sequence[Report]) -> Section:
    drawn: list[go.Figure] = []
    tables: list[TableView] = []
    for report in reports:
        extra = dict(report.tables)
        drawn += evidence_figures(report.table, extra.pop("controls", None))
        tables += [TableView("Evidence", by_evidence(report.table), True), *others(extra)]
    return Section(
        "Evidence for the direction in each matrix",
        "R is 1 where the change favours the direction no more than chance signs do; the LDA "
        "direction's R is ranked among the control contrasts by max-T over all matrices. Cosines "
        "stand beside it as description.",
        tuple(drawn),
        tuple(tables),
    )


# ---- mechanism -----------------------------------------------------------------------------
def _vpd(reports: Sequence[Report]) -> Section:
    """Figures, checks and sites of decompositions; imported ones have sites alone."""
    drawn: list[go.Figure] = []
    tables: list[TableView] = []
    for report in reports:
        extra = dict(report.tables)
        kept = {"history", "spectrum", "maskings", "ladder"}
        drawn += [figure_vpd.of_report(report, w) for w in _VPD_FIGURES if kept <= extra.keys()]
        if "checks" in extra:
            tables.append(TableView("Self-checks", extra.pop("checks"), True))
        tables.append(TableView("Matrices", report.table, not tables))
        tables += others({k: v for k, v in extra.items() if k not in ("history", "ladder_runs")})
    stopped = any(v.word == Word.UNCONVERGED for r in reports for v in r.verdicts)
    note = " Unconverged: these numbers were still moving, and no figure is final." * stopped
    return Section(
        "Decomposition into rank-one parts (VPD)",
        "Importance 1: the part is needed at that position whatever the others do, within the "
        "attack's budget; 0: it may be taken away in part or whole. Importances and rounded "
        "importances as masks are monitors. Numbers of parts are no numbers of mechanisms."
        f"{note}",
        tuple(drawn),
        tuple(tables),
    )


def _difference(reports: Sequence[Report]) -> Section:
    """The same for differences between stages: the two methods beside each other first."""
    drawn: list[go.Figure] = []
    tables: list[TableView] = []
    for report in reports:
        extra = dict(report.tables)
        kept = {"history", "spectrum", "maskings", "ladder"}
        drawn += [figure_vpd.of_report(report, w) for w in _VPD_FIGURES if kept <= extra.keys()]
        for name, caption in _DIFFERENCE_FRONT.items():
            if name in extra:
                tables.append(TableView(caption, extra.pop(name), not tables))
        tables.append(TableView("Updates", report.table))
        tables += others({k: v for k, v in extra.items() if k not in ("history", "ladder_runs")})
    stopped = any(v.word == Word.UNCONVERGED for r in reports for v in r.verdicts)
    note = " Unconverged: these numbers were still moving, and no figure is final." * stopped
    return Section(
        "Which parts of the change matter, and where (VPD of differences)",
        "All masks 0 is the first stage, all masks 1 the last; errors are shares of K0, the size "
        "of the whole change in nats. Importance 1: this part of the update cannot be taken back "
        "at that position; 0: it can, in part or whole, with any of the others. Where fine-tuning "
        "moved two matrices in compensating ways, importances stay up on text it did not change."
        f"{note}",
        tuple(drawn),
        tuple(tables),
    )


_DIFFERENCE_FRONT = {
    "together": "Two methods together: importance beside the evidence of the weights",
    "stages": "Stages",
    "streams": "Streams, in units of K0",
    "checks": "Self-checks",
}
_VPD_FIGURES = ("l0", "terms", "spectrum", "maskings", "ladder")


# ---- what was hidden ------------------------------------------------------------------------
def _inoculation(reports: Sequence[Report]) -> Section:
    """Words and reasons, then one figure for each task, then survival and the whole matrix."""
    drawn: list[go.Figure] = []
    tables: list[TableView] = []
    for report in reports:
        extra = dict(report.tables)
        for task, own in report.table.groupby("task", sort=False):
            drawn.append(figures.detector_panels(own, title=f"Detectors at each stage, {task}"))
        for name, caption in _INOCULATION_FRONT.items():
            if name in extra:
                tables.append(TableView(caption, extra.pop(name), not tables))
        tables.append(TableView("Every detector at every stage", report.table))
        tables += others(extra)
    return Section(
        "What a second training hid, and what still sees it",
        "Every detector has the same rows, splits and tuning budget, and is judged against the "
        "scores that permuted labels give, not against 0.5. The openly misaligned stage says what "
        "the instrument can see at all, the clean and the benign one what it sees where nothing "
        "was hidden. A surviving latent says little by itself: prompts alone keep latents alive.",
        tuple(drawn),
        tuple(tables),
    )


_INOCULATION_FRONT = {
    "verdicts": "Verdicts",
    "differences": "SAE minus each rival",
    "survival": "Survival of the open stage's latents",
    "facts": "The SAE at each stage",
}


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
    """A kind this page has no form for: its own figure where it has one, and its tables."""
    try:
        drawn = [report.plot()]
    except (NotImplementedError, KeyError, AttributeError):
        drawn = []
    return Section(
        report.kind.replace("_", " ").capitalize(),
        report.summary().splitlines()[0] + ".",
        tuple(drawn),
        (TableView("Table", report.table, True), *others(report.tables)),
    )


_Builder = Callable[[Sequence[Report]], Section]
_BUILDERS: dict[str, tuple[tuple[str, ...], _Builder]] = {
    "attribution": (("stage", "site", "layer", "kind", "G", "p_G", "verdict"), _attribution),
    "dmu": (("stage", "contrast", "is_control", "layer", "rel_delta", "p_adjusted", "n"), _dmu),
    "probe": (("layer", "auroc"), _probe),
    "gate": (("intervention", "alpha", "prompts", "effect", "null_low"), _gate),
    "project": (("stage", "site", "cosine"), _project),
    "svd": (("stage", "site", "rel_fro", "kind", "layer"), _svd),
    "vpd": (("site",), _vpd),
    "vpd-difference": (("site",), _difference),
    "inoculation": (("task", "stage", "role", "detector", "statistic", "value"), _inoculation),
    "check": (("stage",), _check),
}
"""Columns a form needs, and the form; a report without them is shown as tables."""
