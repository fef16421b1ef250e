"""Which stage wrote this direction, into which matrix, and does it carry the behaviour?

`attribute_stages` puts the pieces side by side for every step of a lineage: the stage gate and the
site statistic G (where the stages are run on prompts), the projection of each difference on the
direction with its nulls and controls (always), and the path attribution of a behavioural readout
(where one is given). What it does not claim: a verdict about a site is about this direction and
these prompts; ``carries`` is used only for a site confirmed by reverting and adding it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.spectral.path import (
    REST,
    PathAttribution,
    ReadoutLike,
    path_attribution,
    single_effects,
)
from mi_weightspace.spectral.project import project
from mi_weightspace.spectral.stage_evidence import StageEvidence, stage_evidence
from mi_weightspace.spectral.svd import SvdReport, svd

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mi_weightspace.models.lineage import Lineage

CARRIES = "carries"
CONFIRMED_SHARE = 0.5
"""A confirmed carrier moves the readout, alone, by at least this share of the largest effect."""
LEAST_CHANGE = 0.1
"""Nats: where a stage moved the readout by less, nothing is said to carry it."""


class AttributionReport(Report):
    """The answer to "which stage wrote this, where, is it load-bearing, and how sure are we?".

    Tables: the main one has a row per (stage, site, direction) with the columns of a projection and
    ``path_share, revert_effect, add_effect, carries``; ``stages`` one row per step; ``components``
    one row per singular vector; ``path`` the whole path attribution, with the rest and the error;
    ``gate`` the relative DiD per stream point beside its control ceiling.
    """

    kind: ClassVar[str] = "attribution"

    def plot(self) -> go.Figure:
        from mi_weightspace.core.figures import attribution_figure

        return attribution_figure(self.table, self.tables["stages"])

    @property
    def answer(self) -> Verdict:
        """The strongest verdict: a site, else a stage, else the reason there is none."""
        order = (Word.WRITTEN_HERE, Word.STAGE_DISTRIBUTED, Word.ALIGNED, Word.UNDERPOWERED)
        for word in order:
            for verdict in self.verdicts:
                if verdict.word == word:
                    return verdict
        return self.verdicts[0]


def attribute_stages(
    lineage: Lineage,
    direction: Direction | Sequence[Direction] | Any,
    *,
    prompts: ContrastSet | None = None,
    target: str | None = None,
    readout: ReadoutLike | None = None,
    sites: str | Sequence[str] | None = None,
    rank: int = 16,
    n_null: int = 999,
    alpha: float = 0.05,
    position: str = "last",
    n_nodes: int = 8,
    n_confirm: int = 3,
    evidence: StageEvidence | None = None,
    updates: Sequence[SvdReport] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AttributionReport:
    """One table and figure for every step of `lineage`.

    Args:
        direction: one direction, several (one for each stream point), or a fitted probe bank.
        prompts: the contrast set with its controls; without it no stage is run and the strongest
            word is ``aligned``.
        target: the contrast asked about; default the set's only target.
        readout: the behaviour, as log-odds at a position (`core.readout.Readout`).
        sites: globs of the matrices to judge; default every block matrix.
        rank: singular vectors kept for each matrix.
        n_null: sign flips of the nulls.
        n_nodes, n_confirm: quadrature nodes; how many top matrices are reverted and added alone.
        evidence: what `stage_evidence` returned before, to avoid running the stages again.
        updates: the SVD of every step, where it is at hand.

    Raises:
        PromptError, DirectionError, SiteError: as the parts do, before any long work.
    """
    if prompts is not None and evidence is None:
        evidence = stage_evidence(
            lineage,
            prompts,
            target=target,
            sites=sites,
            position=position,
            readout=readout,
            progress=progress,
        )
    if updates is None:
        updates = [
            svd(lineage.diff(a, b), sites=sites, rank=rank, seed=seed, progress=progress)
            for a, b in lineage.steps
        ]
    projected = project(
        updates,
        direction,
        lineage,
        evidence=evidence,
        n_null=n_null,
        alpha=alpha,
        seed=seed,
        progress=progress,
    )
    paths: dict[str, PathAttribution] = {}
    if readout is not None:
        values = dict(evidence.readout) if evidence is not None else {}
        for earlier, later in lineage.steps:
            paths[later] = _attribute_path(
                lineage, earlier, later, readout, values, n_nodes=n_nodes, n_confirm=n_confirm
            )
    table = _with_paths(projected.table, paths)
    stages = _stage_table(lineage, table, evidence, paths, alpha)
    tables = {
        "stages": stages,
        "components": projected.tables["components"],
        "controls": projected.tables["controls"],
        "path": _path_table(paths),
        "gate": _gate_table(evidence),
    }
    return AttributionReport(
        table=table,
        tables=tables,
        verdicts=(*_stage_verdicts(stages), *projected.verdicts),
        config=dict(projected.config),
        inputs={**{s: lineage.source(s).fingerprint for s in lineage.stages}, **projected.inputs},
        reservations=projected.reservations,
        timings=projected.timings,
    )


def _attribute_path(
    lineage: Lineage,
    earlier: str,
    later: str,
    readout: ReadoutLike,
    values: dict[str, float],
    *,
    n_nodes: int,
    n_confirm: int,
) -> PathAttribution:
    """Path attribution of one step, top sites confirmed; the two stages are resident in turn."""
    from mi_weightspace.spectral.path import read_value

    before, after = lineage.source(earlier), lineage.source(later)
    if later not in values:
        with lineage.opened(later) as lens:
            values[later] = read_value(lens, readout)
    with lineage.opened(earlier) as lens:
        path = path_attribution(
            lens, before, after, readout, value_after=values[later], n_nodes=n_nodes
        )
        order = torch.argsort(path.share[:-1], descending=path.change >= 0)[:n_confirm].tolist()
        names = [path.sites[i] for i in order]
        added = single_effects(lens, after, readout, names)
    with lineage.opened(later) as lens:
        reverted = single_effects(lens, before, readout, names)
    add, revert = path.add.clone(), path.revert.clone()
    for i, name in zip(order, names, strict=True):
        add[i], revert[i] = added[name], -reverted[name]
    return replace(path, add=add, revert=revert)


def carriers(path: PathAttribution) -> set[str]:
    """Confirmed sites: alone, reverted and added averaged, at least half of the largest effect.

    None where the readout moved by less than `LEAST_CHANGE`.
    """
    sign = 1.0 if path.change >= 0 else -1.0
    effect = sign * (path.add + path.revert) / 2
    tested = ~torch.isnan(effect)
    moved = abs(path.change) >= LEAST_CHANGE and bool(tested.any())
    if not moved or float(effect[tested].max()) <= 0:
        return set()
    floor = CONFIRMED_SHARE * float(effect[tested].max())
    return {
        name
        for name, value, known in zip(path.sites, effect.tolist(), tested.tolist(), strict=True)
        if known and value >= floor
    }


def _path_table(paths: dict[str, PathAttribution]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for stage, path in paths.items():
        confirmed = carriers(path)
        for i, site in enumerate(path.sites):
            rows.append(
                {
                    "stage": stage,
                    "readout": path.readout,
                    "site": site,
                    "path_share": float(path.share[i]),
                    "path_fraction": float(path.share[i]) / path.change
                    if path.change
                    else float("nan"),
                    "revert_effect": float(path.revert[i]),
                    "add_effect": float(path.add[i]),
                    "carries": site in confirmed,
                    "readout_before": path.before,
                    "readout_after": path.after,
                    "completeness_error": path.completeness_error,
                    "n_nodes": path.n_nodes,
                    "n_prompts": path.n_prompts,
                }
            )
    columns = ["stage", "readout", "site", "path_share", "path_fraction", "revert_effect"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def _with_paths(table: pd.DataFrame, paths: dict[str, PathAttribution]) -> pd.DataFrame:
    import numpy as np

    table = table.copy()
    path = _path_table(paths)
    columns = ["path_share", "path_fraction", "revert_effect", "add_effect", "carries"]
    if not len(path):
        return table.assign(**dict.fromkeys(columns, np.nan))
    return table.merge(path[["stage", "site", *columns]], on=["stage", "site"], how="left")


def _gate_table(evidence: StageEvidence | None) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for stage, gate in (evidence.gates if evidence is not None else {}).items():
        for i, point in enumerate(gate.points):
            control = torch.nan_to_num(gate.control_did[:, i], nan=0.0)
            rows.append(
                {
                    "stage": stage,
                    "point": point.name,
                    "relative_did": float(gate.relative_did[i]),
                    "control_median": float(control.median()),
                    "control_q95": float(control.quantile(0.95)),
                    "control_max": float(control.max()),
                    "n_controls": gate.n_controls,
                }
            )
    return pd.DataFrame(rows)


def _stage_table(
    lineage: Lineage,
    table: pd.DataFrame,
    evidence: StageEvidence | None,
    paths: dict[str, PathAttribution],
    alpha: float,
) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for earlier, later in lineage.steps:
        own = table[table["stage"] == later]
        gate = evidence.gates[later] if evidence is not None else None
        path = paths.get(later)
        rows.append(
            {
                "stage": later,
                "previous": earlier,
                "gate_statistic": gate.statistic if gate else float("nan"),
                "gate_p": gate.p if gate else float("nan"),
                "gate_p_relative": gate.p_relative if gate else float("nan"),
                "gate_p_absolute": gate.p_absolute if gate else float("nan"),
                "onset": str(gate.onset) if gate and gate.onset else "",
                "n_controls": gate.n_controls if gate else 0,
                "readout_before": path.before if path else float("nan"),
                "readout_after": path.after if path else float("nan"),
                "top_carrier": _top_carrier(path),
                "completeness_error": path.completeness_error if path else float("nan"),
                "written_sites": ", ".join(own[own["verdict"] == Word.WRITTEN_HERE]["site"]),
                "verdict": _stage_word(own, gate.p if gate else None, alpha, evidence),
            }
        )
    return pd.DataFrame(rows)


def _top_carrier(path: PathAttribution | None) -> str:
    if path is None:
        return ""
    share = path.share[:-1] * (1.0 if path.change >= 0 else -1.0)
    assert path.sites[-1] == REST
    return path.sites[int(share.argmax())]


def _stage_word(
    rows: Any, gate_p: float | None, alpha: float, evidence: StageEvidence | None
) -> str:
    """The step's own word: its strongest site word, or why there is none."""
    words = set(rows["verdict"])
    if words <= {Word.NO_CHANGE}:
        return Word.NO_CHANGE
    if Word.WRITTEN_HERE in words:
        return Word.WRITTEN_HERE
    if gate_p is None:
        weak = (Word.ALIGNED, Word.ALIGNED_NO_CONTROLS, Word.ALIGNED_NUISANCE)
        return next((w for w in weak if w in words), Word.NOT_SIGNIFICANT)
    if gate_p <= alpha:
        return Word.STAGE_DISTRIBUTED
    if evidence is not None and evidence.smallest_p > alpha:
        return Word.UNDERPOWERED
    return Word.NOT_SIGNIFICANT


def _stage_verdicts(stages: pd.DataFrame) -> tuple[Verdict, ...]:
    verdicts = []
    for row in stages.to_dict("records"):
        place = f" / {row['written_sites']}" if row["written_sites"] else ""
        evidence = {
            "gate_statistic": row["gate_statistic"],
            "gate_p": row["gate_p"],
            "n_controls": row["n_controls"],
            "onset": row["onset"],
        }
        verdicts.append(Verdict(Word(row["verdict"]), f"{row['stage']}{place}", evidence))
    return tuple(verdicts)
