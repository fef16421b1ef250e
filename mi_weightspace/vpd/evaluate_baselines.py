"""What a decomposition has to beat at the same number of active parts per site.

All with the remainder off, on the same batches, at the counts of the rounded importances:

* ``svd``: the first ⌈L0_s⌉ singular parts of each matrix, always on;
* ``static``: the ⌈L0_s⌉ subcomponents of largest mean importance, always on (does it matter that
  importances depend on the input?);
* ``random_alive``: at each position as many alive subcomponents as fire there, drawn at random;
* ``coordinates``: at each position as many input coordinates as fire there, those of largest
  ``|x_j| ‖W_:,j‖`` (neurons at an MLP's output matrix, head channels at attention's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.vpd.evaluate_masks import rounded_name, site_counts
from mi_weightspace.vpd.evaluate_stats import pooled, ratio
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.ladder import importances, run_masked
from mi_weightspace.vpd.losses import Target
from mi_weightspace.vpd.masked import Adjust, Layout, Masks
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import Draws

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("svd", "static", "random_alive", "coordinates")


@torch.no_grad()
def compare_baselines(
    objective: Objective,
    batches: Sequence[Tensor],
    *,
    threshold: float,
    l0: Mapping[str, float],
    mean_ci: Float[Tensor, " K"],
    alive: Bool[Tensor, " K"],
    seed: int,
) -> pd.DataFrame:
    """Error under the rounded importances and under each baseline, on the same batches.

    Args:
        threshold: of the rounded importances. l0: site -> mean count at that threshold.

    Columns: ``baseline, distance, low, high, of_zero, of_zero_low, of_zero_high, n, n_batches``.
    """
    import pandas as pd

    host = objective.factors.host
    layout = objective.factors.layout
    counts = {name: math.ceil(l0[name] - 1e-9) for name in layout.names}
    truncated = svd_factors(objective.factors, counts)
    static = top_components(mean_ci, layout, counts).to(host.device)
    draws = Draws(seed, host.device, objective.draws.dtype)
    found: dict[str, list[float]] = {}
    sizes = []
    with host.prepared(objective.config.speed):
        for at, batch in enumerate(batches):
            clean = host.clean(batch.to(host.device))
            low = importances(objective, clean)
            target, on = Target.of(clean, host.metric), low > threshold
            rounded = Masks(on.to(low.dtype))
            ones = low.new_ones(sum(truncated.layout.sizes))
            draw = draws.generator("evaluate", "baselines", at)
            noise = draws.uniform(tuple(low.shape), draw, whole=True)
            random = random_alive(on, alive.to(host.device), layout, noise)
            outputs = {
                rounded_name(threshold): run_masked(objective, clean, rounded),
                "svd": host.forward(clean, truncated.functions(Masks(ones), train=False)),
                "static": run_masked(objective, clean, Masks(static.to(low.dtype))),
                "random_alive": run_masked(objective, clean, Masks(random.to(low.dtype))),
                "coordinates": host.forward(clean, coordinates(objective.factors, on)),
                "zero": run_masked(
                    objective, clean, Masks(torch.zeros_like(static, dtype=low.dtype))
                ),
            }
            for name, output in outputs.items():
                found.setdefault(name, []).append(float(target.distance(output)))
            sizes.append(low[..., 0].numel())
    weights = np.array(sizes, dtype=np.float64)
    zero = np.array(found.pop("zero"))
    rows = []
    for name, values in found.items():
        distance = pooled(np.array(values), weights)
        share = ratio(np.array(values), zero, weights)
        rows.append(
            {
                "baseline": name,
                "distance": distance.value,
                "low": distance.low,
                "high": distance.high,
                "of_zero": share.value,
                "of_zero_low": share.low,
                "of_zero_high": share.high,
                "n": int(weights.sum()),
                "n_batches": len(sizes),
            }
        )
    return pd.DataFrame(rows)


def svd_factors(factors: Factors, counts: Mapping[str, int]) -> Factors:
    """The first `counts` singular parts of every matrix, as factors of the same host."""
    reads, writes = {}, {}
    for name in factors.layout.names:
        u, s, vh = torch.linalg.svd(factors.weights[name], full_matrices=False)
        k = min(counts[name], len(s))
        reads[name], writes[name] = vh[:k], (u[:, :k] * s[:k]).T
    return Factors(factors.host, reads, writes)


def top_components(
    mean_ci: Float[Tensor, " K"], layout: Layout, counts: Mapping[str, int]
) -> Bool[Tensor, " K"]:
    """The `counts` subcomponents of largest mean importance of each site."""
    chosen = torch.zeros(layout.total, dtype=torch.bool)
    for name, place in layout.slices().items():
        top = mean_ci[place].cpu().topk(min(counts[name], place.stop - place.start)).indices
        chosen[top + place.start] = True
    return chosen


def random_alive(
    on: Bool[Tensor, "*pos K"],
    alive: Bool[Tensor, " K"],
    layout: Layout,
    noise: Float[Tensor, "*pos K"],
) -> Bool[Tensor, "*pos K"]:
    """As many of a site's alive components as are `on` at the position, drawn by `noise`."""
    chosen = torch.zeros_like(on)
    for place in layout.slices().values():
        order = torch.where(alive[place], noise[..., place], noise[..., place] + 2)
        rank = order.argsort(-1).argsort(-1)
        chosen[..., place] = (rank < on[..., place].sum(-1, keepdim=True)) & alive[place]
    return chosen


def coordinates(factors: Factors, on: Bool[Tensor, "*pos K"]) -> dict[str, Adjust]:
    """Keep each site's largest input coordinates; embeddings (one coordinate each) stay whole."""
    counts = site_counts(on, factors.layout.sizes)
    found: dict[str, Adjust] = {}
    for at, name in enumerate(factors.layout.names):
        if name not in factors.host.scales:
            weight, bias = factors.weights[name], factors.biases[name]
            found[name] = _largest(weight, bias, counts[..., at : at + 1])
    return found


def _largest(
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    count: Int[Tensor, "*pos 1"],
) -> Adjust:
    def kept(x: Tensor, y: Tensor) -> Tensor:
        wide = x.to(weight.dtype)
        rank = (wide.abs() * weight.norm(dim=0)).argsort(-1, descending=True).argsort(-1)
        out = (wide * (rank < count)) @ weight.T
        return (out if bias is None else out + bias).to(y.dtype)

    return kept
