"""Run every stage once on the prompts and collect what decides: gates, G, the readout.

One stage is resident at a time. Only pooled activations are kept (float32, on the CPU): for each
contrast the two sides at every stream point, and the mean input shift of every writing matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.site import Site, select_sites
from mi_weightspace.models.harvest import harvest
from mi_weightspace.spectral.gate import (
    StageGate,
    control_names,
    site_p,
    site_statistic,
    stage_gate,
)
from mi_weightspace.spectral.path import ReadoutLike, read_value

if TYPE_CHECKING:
    from mi_weightspace.models.lineage import Lineage
    from mi_weightspace.models.weights import WeightSource


@dataclass(frozen=True, eq=False)
class StageEvidence:
    """What running the stages says about one target contrast.

    Attributes:
        target: the contrast's name.
        gates: later stage of each step -> its gate.
        g, p_g: (stage, site name) -> the site statistic and its max-T p over all sites and stages
            (the larger of the relative and the absolute one; see `spectral.gate`).
        readout: stage -> value of the behavioural readout, empty without one.
        activations: stage -> pooled activations (for probes and figures).
        n_controls: how many controls the ranks are among.
    """

    target: str
    gates: Mapping[str, StageGate]
    g: Mapping[tuple[str, str], float]
    p_g: Mapping[tuple[str, str], float]
    readout: Mapping[str, float]
    activations: Mapping[str, PairedActivations]
    n_controls: int

    def written_share(self, stage: str, site: str) -> float:
        """G of a matrix over the stage's relative DiD: how much of the change it writes itself."""
        statistic = self.gates[stage].statistic
        return self.g[stage, site] / statistic if statistic > 0 else 0.0

    @property
    def smallest_p(self) -> float:
        return 1 / (self.n_controls + 1)


def pick_target(prompts: ContrastSet, target: str | None) -> str:
    """The named target, or the only one.

    Raises:
        PromptError: no such contrast, no target at all, or several and none named.
    """
    if target is not None:
        return prompts[target].name
    names = [c.name for c in prompts.targets]
    if len(names) != 1:
        raise PromptError(
            f"contrast set {prompts.name!r}",
            given=f"{len(names)} target contrasts {names[:8]}",
            expected="one, or a target= naming which is asked about",
            remedy="Pass target=NAME.",
        )
    return names[0]


def writing_sites(sites: Sequence[Site]) -> list[Site]:
    """Block matrices that write the residual stream (o and mlp.out)."""
    return [s for s in sites if s.writes.is_stream and s.kind != "embed"]


def oriented_difference(
    before: WeightSource, after: WeightSource, site: Site
) -> Float[Tensor, "d_out d_in"]:
    """D in float32 with the earlier stage's post-norm gain, where there is one, in its rows."""
    difference = after.weight(site) - before.weight(site)
    gain = before.write_gain(site)
    return difference if gain is None else gain.to(difference.dtype)[:, None] * difference


def harvest_stages(
    lineage: Lineage,
    prompts: ContrastSet,
    *,
    sites: str | Sequence[str] | None = None,
    position: str = "last",
    readout: ReadoutLike | None = None,
    progress: bool = True,
) -> tuple[dict[str, PairedActivations], dict[str, float]]:
    """Pooled activations of every stage, and the readout's value where one is given."""
    activations: dict[str, PairedActivations] = {}
    values: dict[str, float] = {}
    for stage in lineage.stages:
        with lineage.opened(stage) as lens:
            names = [s.name for s in writing_sites(select_sites(lens.sites(), sites))]
            activations[stage] = harvest(
                lens, prompts, sites=names, position=position, stage=stage, progress=progress
            )
            if readout is not None:
                values[stage] = read_value(lens, readout)
    return activations, values


def stage_evidence(
    lineage: Lineage,
    prompts: ContrastSet,
    *,
    target: str | None = None,
    sites: str | Sequence[str] | None = None,
    position: str = "last",
    readout: ReadoutLike | None = None,
    activations: Mapping[str, PairedActivations] | None = None,
    readout_values: Mapping[str, float] | None = None,
    progress: bool = True,
) -> StageEvidence:
    """Gates of every step, G of every writing matrix of every step, the readout of every stage.

    Args:
        activations: stage -> activations harvested before (with `sites` included); otherwise each
            stage is opened, run and released in turn.
        readout_values: stage -> value of the readout measured before.
    """
    name = pick_target(prompts, target)
    values: dict[str, float] = dict(readout_values or {})
    if activations is None:
        activations, values = harvest_stages(
            lineage, prompts, sites=sites, position=position, readout=readout, progress=progress
        )
    elif readout is not None and not values:
        for stage in lineage.stages:
            with lineage.opened(stage) as lens:
                values[stage] = read_value(lens, readout)
    first = activations[lineage.stages[0]]
    names = (name, *control_names(first, name))
    gates: dict[str, StageGate] = {}
    keys: list[tuple[str, str]] = []
    columns: list[tuple[Tensor, Tensor]] = []
    for earlier, later in lineage.steps:
        gates[later] = stage_gate(activations[earlier], activations[later], name, stage=later)
        before, after = lineage.source(earlier), lineage.source(later)
        for site in writing_sites(select_sites(before.sites(), sites)):
            difference = oriented_difference(before, after, site)
            pair = (activations[earlier], activations[later])
            columns.append(site_statistic(difference, site, *pair, names))
            keys.append((later, site.name))
    g = torch.zeros(len(names), 0)
    p = torch.zeros(0)
    if columns:
        g, absolute = (torch.stack(values, dim=1) for values in zip(*columns, strict=True))
        p = torch.maximum(site_p(g[0], g[1:]), site_p(absolute[0], absolute[1:]))
    return StageEvidence(
        target=name,
        gates=gates,
        g={key: float(g[0, i]) for i, key in enumerate(keys)},
        p_g={key: float(p[i]) for i, key in enumerate(keys)},
        readout=values,
        activations=activations,
        n_controls=len(names) - 1,
    )
