"""PGD with sources tied within clusters of co-important components.

Untied, the adversary may revert one of two changes that compensate each other. Tied, it may only
revert a mechanism as a whole: a weaker question, asked beside the other (vpd.md §9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.vpd.evaluate_stats import spread
from mi_weightspace.vpd.ladder import (
    STEP_SIZE,
    first_sources,
    importances,
    run_masked,
)
from mi_weightspace.vpd.losses import Target
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import lifted

if TYPE_CHECKING:
    import pandas as pd

FIRES = 0.01
CUT = 0.5
"""Average Jaccard distance below which clusters are joined."""
MOST_POSITIONS = 8192


@dataclass(frozen=True, eq=False)
class Clusters:
    """Components by cluster; one that never fires is a cluster of its own.

    Attributes:
        index: (K,) cluster of each component, 0 to n−1 in order of first member.
        firings: (K,) positions with g > `FIRES`. n_positions: that were looked at.
    """

    index: Int[Tensor, " K"]
    firings: Int[Tensor, " K"]
    n_positions: int

    @property
    def n(self) -> int:
        return int(self.index.max()) + 1


@torch.no_grad()
def firing_sets(objective: Objective, batches: Sequence[Tensor]) -> Bool[Tensor, "positions K"]:
    """Where each component fires, on the first `MOST_POSITIONS` positions."""
    host, found, seen = objective.factors.host, [], 0
    with host.prepared(objective.config.speed):
        for batch in batches:
            low = importances(objective, host.clean(batch.to(host.device)))
            found.append((low > FIRES).flatten(0, -2).cpu())
            seen += len(found[-1])
            if seen >= MOST_POSITIONS:
                break
    return torch.cat(found)[:MOST_POSITIONS]


def cluster(on: Bool[Tensor, "positions K"], cut: float = CUT) -> Clusters:
    """Average linkage on the Jaccard distances of firing sets."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    firings = on.sum(0)
    live = firings.nonzero().flatten()
    labels = torch.arange(on.shape[1]) + on.shape[1]  # none of linkage's
    if len(live) > 1:
        sets = on[:, live].double()
        both = sets.T @ sets
        sizes = firings[live].double()
        distance = (1 - both / (sizes[:, None] + sizes - both)).clamp_min(0).fill_diagonal_(0)
        tree = linkage(squareform(distance.numpy(), checks=False), "average")
        labels[live] = torch.from_numpy(fcluster(tree, cut, "distance").astype(np.int64))
    numbers: dict[int, int] = {}
    index = [numbers.setdefault(int(label), len(numbers)) for label in labels]
    return Clusters(torch.tensor(index), firings, len(on))


def cluster_table(objective: Objective, clusters: Clusters) -> pd.DataFrame:
    """``site, component, cluster, size`` (of the cluster), ``frequency, n``; firing ones only."""
    import pandas as pd

    sizes = torch.bincount(clusters.index)
    rows = []
    for name, place in objective.factors.layout.slices().items():
        for at in range(place.start, place.stop):
            if clusters.firings[at] > 0:
                own = int(clusters.index[at])
                rows.append(
                    {
                        "site": name,
                        "component": at - place.start,
                        "cluster": own,
                        "size": int(sizes[own]),
                        "frequency": int(clusters.firings[at]) / clusters.n_positions,
                        "n": clusters.n_positions,
                    }
                )
    columns = ["site", "component", "cluster", "size", "frequency", "n"]
    return pd.DataFrame(rows, columns=columns).sort_values(
        ["size", "cluster"], ascending=[False, True], ignore_index=True
    )


def climb_tied(
    objective: Objective,
    batch: Tensor,
    index: Int[Tensor, " K"],
    sources: tuple[Float[Tensor, " clusters"], Float[Tensor, " S"]],
    budget: int,
    step_size: float = STEP_SIZE,
) -> float:
    """`ladder.climb` with one source a cluster; remainders keep one each."""
    host = objective.factors.host
    clean = host.clean(batch.to(host.device))
    low, target = importances(objective, clean), Target.of(clean, host.metric)
    r, d = sources
    index = index.to(low.device)
    for _ in range(budget):
        r, d = (leaf.detach().requires_grad_() for leaf in (r, d))
        value = target.distance(run_masked(objective, clean, Masks(lifted(low, r[index]), d)))
        slopes = torch.autograd.grad(value, [r, d])
        r, d = (
            (leaf.detach() + step_size * slope.sign()).clamp(0, 1)
            for leaf, slope in zip((r, d), slopes, strict=True)
        )
    with torch.no_grad():
        return float(target.distance(run_masked(objective, clean, Masks(lifted(low, r[index]), d))))


def tied_row(
    objective: Objective,
    batches: Sequence[Tensor],
    clusters: Clusters,
    *,
    budget: int,
    n_inits: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Median over batches (of the mean over starts) and range, as `ladder.summarise`.

    A cluster starts where its first member would start untied.
    """
    index = clusters.index
    lead = torch.tensor([int((index == k).nonzero()[0]) for k in range(clusters.n)])
    losses, n = [], 0
    host = objective.factors.host
    with host.prepared(objective.config.speed):
        for at, batch in enumerate(batches):
            own = []
            for init in range(n_inits):
                r, d = first_sources(objective, seed, at, init)
                own.append(climb_tied(objective, batch, index, (r[lead.to(r.device)], d), budget))
            losses.append(float(np.mean(own)))
            n += len(batch) if batch.is_floating_point() else batch.numel()
    found = spread(np.array(losses))
    return {
        "sources": "tied",
        "n_sources": clusters.n,
        "budget": budget,
        "median": found.value,
        "low": found.low,
        "high": found.high,
        "n_batches": len(losses),
        "n": n,
    }


def tied_table(
    tied: Mapping[str, Mapping[str, Any]],
    untied: Mapping[str, Mapping[str, Any]],
    k0: Mapping[str, float],
    n_components: int,
) -> pd.DataFrame:
    """Both attacks on every stream, at one budget.

    Columns: ``stream, sources`` (tied, untied), ``n_sources`` (of components; every remainder has
    one more), ``budget, median, low, high`` (range over batches), ``of_behaviour, of_own``,
    ``n_batches, n``.
    """
    import pandas as pd

    unit = next(iter(k0.values()))
    rows = []
    for stream, row in tied.items():
        keys = ("budget", "median", "low", "high", "n_batches", "n")
        plain = {k: untied[stream][k] for k in keys}
        other = {"sources": "untied", "n_sources": n_components, **plain}
        for own in (other, row):
            shares = {
                "of_behaviour": own["median"] / unit,
                "of_own": own["median"] / k0[stream] if k0[stream] > 0 else float("nan"),
            }
            rows.append({"stream": stream, **own, **shares})
    return pd.DataFrame(rows)
