"""Passes of a decomposition over data, and what removing components changes there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.host import Clean
from mi_weightspace.vpd.importance import squash
from mi_weightspace.vpd.losses import Target
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Objective


@dataclass(frozen=True)
class Effect:
    """KL(clean ‖ ablated) in nats, means over positions.

    Attributes:
        firing, elsewhere: where the ablated components fire, and where not.
        random_firing, random_elsewhere: the same positions, with as many other live components
            of the site removed; one value a draw.
        n_firing, n_elsewhere: positions.
    """

    firing: float
    elsewhere: float
    random_firing: tuple[float, ...]
    random_elsewhere: tuple[float, ...]
    n_firing: int
    n_elsewhere: int


def passes(
    objective: Objective, batches: Sequence[Tensor]
) -> Iterator[tuple[Clean, Float[Tensor, "*pos K"]]]:
    """Each batch through the untouched host, and its lower importances; no gradients."""
    host, leak = objective.factors.host, objective.config.importance.leak
    with host.prepared(objective.config.speed), torch.no_grad():
        for batch in batches:
            clean = host.clean(batch.to(host.device))
            yield clean, squash(objective.importance(clean, objective.factors), leak)[0]


def inner_activations(objective: Objective, clean: Clean, name: str) -> Float[Tensor, "*pos C"]:
    """``a = x readᵀ`` of a site's components."""
    x, read = clean.inputs[name], objective.factors.reads[name].detach()
    if not x.is_floating_point():
        return torch.nn.functional.embedding(x, read.T)
    return x.to(read.dtype) @ read.T


def norms(objective: Objective, name: str) -> Float[Tensor, " C"]:
    """‖write_c read_cᵀ‖ of a site's components."""
    factors = objective.factors
    return (factors.reads[name].norm(dim=1) * factors.writes[name].norm(dim=1)).detach()


def ablation_effect(
    objective: Objective,
    site: str,
    components: Sequence[int],
    batches: Sequence[Tensor],
    *,
    live: Sequence[int] = (),
    n_random: int = 3,
    seed: int = 0,
) -> Effect:
    """What removing components changes, where they fire and elsewhere (every other mask is 1).

    Args:
        live: components of the site from which `n_random` sets of the same size are drawn, for
            comparison at the same positions; fewer sets where the choice is exhausted.
    """
    others = sorted(set(live) - set(components))
    n_random = n_random if len(others) >= len(components) else 0
    sets = [list(components)]
    for i in range(n_random):
        draw = generator(seed, "random components", site, *components, i)
        sets.append([others[k] for k in torch.randperm(len(others), generator=draw)])
        sets[-1] = sets[-1][: len(components)]
    unique = [s for i, s in enumerate(sets) if i == 0 or sorted(s) not in map(sorted, sets[1:i])]
    sums = torch.zeros(len(unique), 2, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    place = objective.factors.layout.slices()[site]
    for clean, low in passes(objective, batches):
        fires = (low[..., place][..., list(components)] > 0).any(-1).flatten()
        where = torch.stack([fires, ~fires], 1).double().cpu()
        counts += where.sum(0)
        target = Target.of(clean, objective.factors.host.metric)
        for i, chosen in enumerate(unique):
            kl = target.per_position(without(objective, clean, low, site, chosen))
            sums[i] += kl.double().cpu() @ where
    means = sums / torch.where(counts > 0, counts, math.nan)
    return Effect(
        float(means[0, 0]),
        float(means[0, 1]),
        tuple(means[1:, 0].tolist()),
        tuple(means[1:, 1].tolist()),
        int(counts[0]),
        int(counts[1]),
    )


def without(
    objective: Objective, clean: Clean, low: Tensor, site: str, components: Sequence[int]
) -> Tensor:
    """The output with these masks 0 and every other mask 1, the remainders' too."""
    factors = objective.factors
    place = factors.layout.slices()[site]
    mask = low.new_ones(factors.layout.total)
    mask[[place.start + c for c in components]] = 0.0
    delta = low.new_ones(*low.shape[:-1], len(factors.layout.names))
    functions = factors.functions(Masks(mask, delta), train=False, only=(site,))
    return factors.host.forward(clean, functions)  # in the host's own precision
