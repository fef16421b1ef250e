"""Always-on parts of the updates that a decomposition has to beat at the same counts.

`vpd.evaluate_baselines` has the first k singular parts of every update; here are k random
dimensions of its column space, P dW with P a random projection inside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.differences.unit import everything_off
from mi_weightspace.vpd.evaluate_stats import Interval, pooled, ratio
from mi_weightspace.vpd.losses import Target
from mi_weightspace.vpd.masked import Adjust
from mi_weightspace.vpd.objective import Objective

N_BASES = 3


@torch.no_grad()
def random_basis(
    objective: Objective,
    batches: Sequence[Tensor],
    l0: Mapping[str, float],
    *,
    n_bases: int = N_BASES,
    seed: int = 0,
) -> tuple[Interval, Interval, int, int]:
    """Error with ⌈L0_s⌉ random dimensions of every update's column space on, the rest off.

    Args:
        l0: site -> mean count.

    Returns:
        The error, its share of the everything-off error on the same batches, positions, units. The
        intervals treat (basis, batch) pairs as independent.
    """
    host = objective.factors.host
    counts = {name: math.ceil(l0[name] - 1e-9) for name in objective.factors.layout.names}
    spaces = {name: column_space(host.weight(name)) for name in host.names}
    found, zero, sizes = [], [], []
    with host.prepared(objective.config.speed):
        for batch in batches:
            clean = host.clean(batch.to(host.device))
            target = Target.of(clean, host.metric)
            alone = float(target.distance(host.forward(clean, everything_off(host))))
            for draw in range(n_bases):
                functions = dict(_projections(spaces, counts, seed, draw))
                found.append(float(target.distance(host.forward(clean, functions))))
                zero.append(alone)
                sizes.append(clean.output[..., 0].numel())
    weights = np.array(sizes, dtype=np.float64)
    n, values = sum(sizes) // n_bases, np.array(found)
    return pooled(values, weights), ratio(values, np.array(zero), weights), n, len(found)


def column_space(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rank"]:
    """An orthonormal basis of what a matrix can write."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    tolerance = s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps
    return u[:, s > tolerance]


def _projections(
    spaces: Mapping[str, Tensor], counts: Mapping[str, int], seed: int, draw: int
) -> Iterator[tuple[str, Adjust]]:
    for name, space in spaces.items():
        rank = space.shape[1]
        k = min(counts[name], rank)
        if k < rank:
            mixing = torch.randn(rank, k, generator=generator(seed, "random basis", name, draw))
            yield name, _onto(space @ torch.linalg.qr(mixing.to(space))[0])


def _onto(basis: Float[Tensor, "rows k"]) -> Adjust:
    return lambda _x, y: (y @ basis.to(y.dtype)) @ basis.T.to(y.dtype)
