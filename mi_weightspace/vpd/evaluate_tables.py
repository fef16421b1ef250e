"""The tables of an evaluation, from what its batches gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import mi_weightspace.vpd.truth as truth
from mi_weightspace.vpd.evaluate_masks import (
    HIDDEN_UNDER,
    MONITORS,
    BatchNumbers,
    masking_names,
)
from mi_weightspace.vpd.evaluate_stats import Interval, pooled, ratio
from mi_weightspace.vpd.factors import Factors

if TYPE_CHECKING:
    import pandas as pd

TOTAL = "total"


def l0_table(
    numbers: Sequence[BatchNumbers],
    thresholds: Sequence[float],
    factors: Factors,
    groups: Mapping[str, Sequence[str]] | None,
    weights: Float[np.ndarray, " batches"],
) -> pd.DataFrame:
    import pandas as pd

    names, sizes = factors.layout.names, factors.layout.sizes
    made: list[tuple[str, str, list[int]]] = [("site", n, [i]) for i, n in enumerate(names)]
    for group, sites in (layer_groups(factors) if groups is None else groups).items():
        made.append(("group", group, [names.index(s) for s in sites]))
    made.append((TOTAL, TOTAL, list(range(len(names)))))
    rows = []
    for level, name, members in made:
        for threshold in thresholds:
            each = np.array([float(b.l0[threshold][members].sum()) for b in numbers])
            found = pooled(each, weights)
            rows.append(
                {
                    "level": level,
                    "name": name,
                    "threshold": float(threshold),
                    **_interval("l0", found, ""),
                    "dense": sum(sizes[i] for i in members),
                    "n": int(weights.sum()),
                    "n_batches": len(numbers),
                }
            )
    return pd.DataFrame(rows)


def layer_groups(factors: Factors) -> dict[str, list[str]]:
    """``layer 3`` -> its sites; sites outside the layers are in no group."""
    found: dict[str, list[str]] = {}
    for name in factors.layout.names:
        layer = factors.host.layers[name]
        if layer is not None:
            found.setdefault(f"layer {layer}", []).append(name)
    return found


def _interval(name: str, found: Interval, prefix: str) -> dict[str, float]:
    return {name: found.value, f"{prefix}low": found.low, f"{prefix}high": found.high}


def masking_table(
    numbers: Sequence[BatchNumbers],
    thresholds: Sequence[float],
    metric: str,
    weights: Float[np.ndarray, " batches"],
    labels: Float[np.ndarray, " batches"],
) -> pd.DataFrame:
    import pandas as pd

    zero = np.array([b.distance["zero"] for b in numbers])
    tokens = bool(labels.all())
    rows = []
    for name in masking_names(thresholds):
        distance = np.array([b.distance[name] for b in numbers])
        row: dict[str, Any] = {"masking": name, "metric": metric}
        row |= _interval("distance", pooled(distance, weights), "")
        row |= _interval("of_zero", ratio(distance, zero, weights), "of_zero_")
        if tokens:
            ce = np.array([b.ce[name] for b in numbers])
            extra = ce - np.array([b.ce_target for b in numbers])
            lost = np.array([b.ce["zero"] - b.ce_target for b in numbers])
            row["ce"] = pooled(ce, labels).value
            row |= _interval("ce_difference", pooled(extra, labels), "ce_")
            row |= _interval("unrecovered", ratio(extra, lost, labels), "unrecovered_")
        row["monitor"] = name.split(">")[0] in MONITORS
        row["n"], row["n_batches"] = int(weights.sum()), len(numbers)
        rows.append(row)
    return pd.DataFrame(rows)


def hidden_table(
    numbers: Sequence[BatchNumbers], factors: Factors, weights: Float[np.ndarray, " batches"]
) -> pd.DataFrame:
    import pandas as pd

    names = factors.layout.names
    made: list[tuple[str, str, tuple[str, ...]]] = [("site", name, (name,)) for name in names]
    made.append((TOTAL, TOTAL, names))
    rows = []
    for masking in HIDDEN_UNDER:
        for level, name, members in made:
            sums = np.array(
                [[sum(b.hidden[masking][s][i] for s in members) for i in range(3)] for b in numbers]
            )
            mse = pooled(sums[:, 0] / sums[:, 1], sums[:, 1])
            relative = ratio(sums[:, 0], sums[:, 2], np.ones(len(numbers)))
            rows.append(
                {
                    "masking": masking,
                    "level": level,
                    "name": name,
                    **_interval("mse", mse, ""),
                    "relative": relative.value,
                    "n": int(weights.sum()),
                    "n_batches": len(numbers),
                }
            )
    return pd.DataFrame(rows)


def spectrum_table(
    factors: Factors,
    mean_ci: Float[Tensor, " K"],
    firings: Int[Tensor, " K"],
    near_one: Int[Tensor, " K"],
    alive: truth.Alive,
    n: int,
) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for site, place in factors.layout.slices().items():
        order = torch.argsort(mean_ci[place], descending=True, stable=True)
        fired = firings[place][order]

        def column(values: Float[Tensor, " K"] | Bool[Tensor, " K"]) -> np.ndarray:
            return values[place][order].numpy()  # noqa: B023 (called at once)

        frames.append(
            pd.DataFrame(
                {
                    "site": site,
                    "component": order.numpy(),
                    "rank": np.arange(len(order)),
                    "mean_ci": column(mean_ci),
                    "frequency": fired.numpy() / n,
                    "firm": (near_one[place][order] / fired.clamp_min(1)).numpy(),
                    "alive_by_mean": column(alive.by_mean),
                    "alive_by_firing": column(alive.by_firing),
                    "n": n,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def site_table(factors: Factors) -> pd.DataFrame:
    """Shapes, capacity and remainder of every site.

    `can_be_exact` is False where there are fewer components than the rank of the matrix: then no
    choice of them sums to it. The rank is computed only where the shape leaves a doubt.
    """
    import pandas as pd

    rows = []
    for name, count in zip(factors.layout.names, factors.layout.sizes, strict=True):
        weight = factors.weights[name]
        bound = min(weight.shape)
        if count < bound:
            bound = int(torch.linalg.matrix_rank(weight))
        energy = float(weight.double().square().sum())
        left = float(factors.remainder(name).double().square().sum())
        rows.append(
            {
                "site": name,
                "layer": factors.host.layers[name],
                "d_out": weight.shape[0],
                "d_in": weight.shape[1],
                "n_components": count,
                "rank_bound": bound,
                "can_be_exact": count >= bound,
                "remainder": left / energy if energy > 0 else float("nan"),
            }
        )
    return pd.DataFrame(rows).astype({"layer": "Int64"})
