"""DMU sweep: how far a contrast moves the activations, at every stream point of every stage.

The sizes are descriptive; three questions get an answer. Is the shift there at all (sign flips,
maximum over points, Holm over targets)? Is it larger than that of matched controls (`ordering`),
and did it grow more than theirs from the first stage on (`growth`)? What did a stage change on
identical prompts (`did`, with the first point where it did: its onset)? A result is labelled where
it holds under one denominator only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import ConfigError, DirectionError
from mi_weightspace.core.report import Report
from mi_weightspace.core.shifts import cluster_index
from mi_weightspace.core.space import Space
from mi_weightspace.models.lineage import Lineage
from probes.dmu_tables import Sweep, tables, verdicts
from probes.gather import obtain_stages, pick_points, roles
from probes.shift_stats import (
    DENOMINATORS,
    draw,
    geometry,
    measure_changes,
    measure_stages,
    rogue_coordinates,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

ALPHA = 0.05


class DmuReport(Report):
    """Mean shifts of every contrast at every stage.

    Table, one row for each (stage, contrast, point): ``stage, contrast, kind, is_control, layer,
    point, n, n_clusters, delta_norm`` (‖Δμ‖, raw residual units), ``rel_delta`` (over the mean
    activation norm) with its 95 % cluster-bootstrap interval ``ci_low, ci_high``, sign-flip ``p``
    and ``p_adjusted`` (maximum over points), ``above_controls`` (larger than every control there;
    empty without controls), ``raw_debiased`` (signed), ``rel_spread`` (over the within-class
    spread), ``mahal`` (shrunk Mahalanobis length), ``snr``, ``rogue_share`` (of the mean square in
    three coordinates).
    Tables: ``ordering`` (log of target peak over strongest control peak; PASS, FAIL, UNRESOLVED),
    ``growth`` (excess log growth over the controls' RMS since the first stage), ``did``, ``peaks``
    (bootstrap set of the largest point; relocation).
    Arrays: ``did/STAGE/CONTRAST`` (n_points, d) for targets.
    """

    kind: ClassVar[str] = "dmu"

    def did_direction(
        self, stage: str, *, contrast: str | None = None, point: Space | str | None = None
    ) -> Direction:
        """The change a stage made to a target's shift, as a direction; default: at its onset.

        Raises:
            DirectionError: no such stage or contrast, no onset, or no change at the point.
        """
        name = self.config["targets"][0] if contrast is None else contrast
        key = f"did/{stage}/{name}"
        rows = self.tables["did"]
        rows = rows[(rows["stage"] == stage) & (rows["contrast"] == name)]
        if point is None and bool(rows["onset"].any()):
            point = rows.loc[rows["onset"], "point"].iloc[0]
        names = list(self.config["points"])
        wanted = "" if point is None else Space.parse(point).canonical.name
        if key not in self.arrays or wanted not in names:
            raise DirectionError(
                f"change of {name!r} at stage {stage!r}",
                given=f"point {wanted or 'of onset, and no significant change'}",
                expected=f"a stage after the first, a target, and one of {names[:12]}",
                remedy="Name a point, or use another stage.",
            )
        vector = self.arrays[key][names.index(wanted)]
        return Direction(
            pattern=vector,
            space=Space.parse(wanted),
            label=name,
            scale=float(vector.double().norm()),
            stage=stage,
            model_hash=self.inputs[stage],
            prompts_hash=self.inputs["prompts"],
            position=self.config["position"],
            method="did",
            convention=self.config["convention"],
        )

    def plot(self, contrast: str | None = None) -> go.Figure:
        """Heat-map over stages and points of a target (default the first).

        Hatched: not significant; outlined: above every control.
        """
        from mi_weightspace.core.figures import heatmap

        name = self.config["targets"][0] if contrast is None else contrast
        points, stages = list(self.config["points"]), list(self.config["stages"])

        def cells(column: str, which: object, how: str) -> np.ndarray:
            frame = self.table[which]
            wide = frame.pivot_table(index="stage", columns="point", values=column, aggfunc=how)  # pyright: ignore[reportArgumentType]
            return wide.reindex(index=stages, columns=points).to_numpy(dtype=float)

        own, controls = self.table["contrast"] == name, self.table["is_control"]
        values = cells("rel_delta", own, "first")
        ceiling = cells("rel_delta", controls, "max") if bool(controls.any()) else None
        return heatmap(
            values,
            points,
            stages,
            title=f"{name}: relative shift (n = {int(self.table.loc[own, 'n'].iloc[0])} pairs, "
            f"{self.table.loc[controls, 'contrast'].nunique()} controls)",
            name="‖Δμ‖ / ‖x‖",
            unit="ratio",
            hatch_mask=~(cells("p_adjusted", own, "first") <= ALPHA),
            ceiling=ceiling,
            x_title=("stream point", "in forward order"),
        )


def dmu_sweep(
    activations: Mapping[str, PairedActivations] | Lineage,
    contrasts: ContrastSet | None = None,
    *,
    target: str | None = None,
    points: Sequence[Space | str] | None = None,
    position: str | None = None,
    n_flips: int = 10_000,
    n_bootstrap: int = 2_000,
    denominators: Sequence[str] = DENOMINATORS,
    drop_rogue: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> DmuReport:
    """Mean shift of every contrast at every point of every stage, with nulls and intervals.

    Args:
        activations: stage -> activations in training order, or a lineage (then harvested, one
            stage in memory at a time).
        contrasts: the prompts; needed for a lineage. Every pair counts, whatever its split.
        target: the contrast asked about; default every target of the set.
        denominators: for the ordering, growth and peaks; ``rel_norm`` is always among them.
        drop_rogue: leave out this many coordinates of largest mean square at each point (chosen
            on the first target at the first stage).

    Raises:
        PromptError: no target, stages on different prompts, fewer than two clusters.
        ConfigError: no draws, or an unknown denominator.
    """
    _check(n_flips, n_bootstrap, denominators, drop_rogue)
    chosen = tuple(d for d in DENOMINATORS if d in {"rel_norm", *denominators})
    start = time.perf_counter()
    stages = obtain_stages(
        activations, contrasts, points=points, position=position, progress=progress
    )
    harvested = time.perf_counter()
    first = next(iter(stages.values()))
    who = roles(first.contrasts, target)
    spaces = pick_points(first, points)
    sweep = Sweep(tuple(stages), who, spaces, chosen, first.contrasts)
    draws = {"n_flips": n_flips, "n_bootstrap": n_bootstrap, "seed": seed}
    arrays = _measure(sweep, stages, draws, drop_rogue, progress)
    frames = tables(sweep)
    return DmuReport(
        table=frames.pop("sweep"),
        tables=frames,
        arrays=arrays,
        verdicts=verdicts(sweep, frames["ordering"]),
        config={
            "stages": list(stages),
            "targets": list(who.targets),
            "points": [p.name for p in spaces],
            "position": first.position,
            "convention": first.convention,
            "denominators": list(chosen),
            "drop_rogue": drop_rogue,
            **draws,
        },
        inputs={s: a.model_hash for s, a in stages.items()} | {"prompts": first.contrasts.hash},
        reservations=_reservations(sweep),
        timings={"harvest": harvested - start, "sweep": time.perf_counter() - harvested},
    )


def _check(n_flips: int, n_bootstrap: int, denominators: Sequence[str], drop: int) -> None:
    unknown = set(denominators) - set(DENOMINATORS)
    if n_flips < 1 or n_bootstrap < 1 or unknown or drop < 0:
        raise ConfigError(
            "dmu sweep",
            given=f"n_flips={n_flips}, n_bootstrap={n_bootstrap}, drop_rogue={drop}, "
            f"denominators={list(denominators)}",
            expected=f"at least one draw, denominators of {DENOMINATORS}, drop_rogue ≥ 0",
            remedy="Leave them at their defaults.",
        )


def _measure(
    sweep: Sweep,
    stages: Mapping[str, PairedActivations],
    draws: dict[str, int],
    drop_rogue: int,
    progress: bool,
) -> dict[str, Float[Tensor, "n_points d"]]:
    """Fill the sweep, one contrast at a time; returns the targets' DiD vectors."""
    from rich.progress import track

    names = list(stages)

    def at(stage: str, contrast: str) -> list[Tensor]:
        return [stages[stage].at(contrast, p) for p in sweep.points]

    dropped = rogue_coordinates(at(names[0], sweep.who.targets[0]), drop_rogue)
    arrays: dict[str, Tensor] = {}
    every, held, drawn = sweep.who.every, [], None
    for contrast in track(every, "mean shifts", transient=True, disable=not progress):
        clusters = [pair.cluster_id for pair in sweep.contrasts[contrast].pairs]
        layout = cluster_index(clusters).tolist()
        if layout != held or drawn is None:
            held, drawn = layout, draw(clusters, **draws)
        values = [at(stage, contrast) for stage in names]
        found = [geometry(own, dropped) for own in values]
        shifts = measure_stages(found, drawn, denominators=sweep.denominators)
        for stage, shift in zip(names, shifts, strict=True):
            sweep.add(stage, contrast, shift)
        if len(names) == 1:
            continue
        changes = measure_changes(values, shifts, drawn, dropped=dropped)
        for (before, stage), change in zip(pairwise(names), changes, strict=True):
            sweep.add_change(before, stage, contrast, change)
            if contrast in sweep.who.targets:
                arrays[f"did/{stage}/{contrast}"] = change.vector.to(torch.float32)
    return arrays


def _reservations(sweep: Sweep) -> tuple[str, ...]:
    found = []
    n = len(sweep.who.controls)
    if n == 0:
        found.append("No controls: the shifts cannot be called specific to the contrast.")
    sizes = {c: len(sweep.contrasts[c]) for c in sweep.who.every}
    unequal = [c for c in sweep.who.controls if sizes[c] != sizes[sweep.who.targets[0]]]
    if unequal:
        found.append(
            f"{len(unequal)} controls have another number of pairs than {sweep.who.targets[0]}: "
            "chance alone then gives them another size."
        )
    return tuple(found)
