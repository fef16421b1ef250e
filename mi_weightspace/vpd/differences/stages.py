"""Stages as given -> a lineage in the order of the update, and the host of its updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mi_weightspace.core.site import select_sites
from mi_weightspace.models.grammar import sites_of
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.differences.host import DifferenceHost, Features
from mi_weightspace.vpd.differences.updates import starting_matrix, updates
from mi_weightspace.vpd.factors import matrix_of

Direction = Literal["install", "remove"]


def as_lineage(stages: Any) -> Lineage:
    return stages if isinstance(stages, Lineage) else Lineage(dict(stages))


def directed(lineage: Lineage, direction: Direction) -> Lineage:
    """The stages in the order in which the update is applied."""
    if direction == "install":
        return lineage
    return Lineage(
        {name: lineage.source(name) for name in reversed(lineage.stages)},
        backend=lineage.backend,
        **lineage.placed,
    )


def host_of(
    lineage: Lineage, names: Sequence[str], settings: VPDConfig, features: Features
) -> DifferenceHost:
    """The host of the updates named ``MATRIX@STAGE``, the last stage loaded."""
    sources = {name: lineage.source(name) for name in lineage.stages}
    first, last = lineage.stages[0], lineage.stages[-1]
    matrices = list(dict.fromkeys(matrix_of(name) for name in names))
    chosen = select_sites(sites_of(sources[last].shape), matrices)
    kept = [u for u in updates(sources, chosen) if u.name in set(names)]
    starts = {u.site.name: starting_matrix(sources[first], sources[last], u.site) for u in kept}
    prefix = settings.speed.prefix
    return DifferenceHost(lineage.lens(last), kept, starts, features=features, prefix=prefix)
