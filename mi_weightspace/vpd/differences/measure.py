"""How a decomposed change is measured: on each stream apart, in units of K0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.vpd.assess import BUDGETS
from mi_weightspace.vpd.differences.attribution import UNCHANGED, off, stages_of
from mi_weightspace.vpd.differences.unit import per_position
from mi_weightspace.vpd.evaluate import THRESHOLDS, evaluate
from mi_weightspace.vpd.evaluate_stats import Interval, ratio, records
from mi_weightspace.vpd.ladder import importances
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import pandas as pd

ALL = "total"
CHANGED, UNTOUCHED = "changed", "unchanged"


def measure_streams(
    objective: Objective,
    streams: Mapping[str, Sequence[Tensor]],
    options: Mapping[str, Any],
    found: Mapping[str, pd.DataFrame],
    *,
    unchanged_below: float = UNCHANGED,
) -> dict[str, pd.DataFrame]:
    """Tables beside those of `evaluate` on the first stream.

    Args:
        streams: name -> batches; the first is the behaviour, whose K0 is the unit. options: of
            `evaluate`. found: its tables on the first stream. On the others PGD is run at the
            smallest budget alone.
        unchanged_below: share of K0 below which a position counts as unchanged.

    Returns:
        ``streams``, a row a stream and quantity: ``stream, quantity, stage, budget, value, low,
        high``, the same ``of_behaviour`` (in units of the first stream's K0, itself taken as
        exact) and ``of_own`` (of this stream's K0), ``dense, n, n_units``. Quantities: K0 (as
        ``zero``), every masking, ``pgd``, ``pgd_free``, ``protection`` (all in nats or squared
        error, but for the last); ``l0>τ`` by stage and in total, in components, for every stream
        and for its ``changed`` and ``unchanged`` positions and those of all streams. Intervals are
        95 % over batches (L0: over rows); of attacks, median and range.
    """
    import pandas as pd

    names = list(streams)
    tables = {names[0]: found}
    for name in names[1:]:
        tables[name] = _evaluated(objective, streams[name], options)
    k0 = _zero(tables[names[0]]["maskings"])
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += _distances(name, tables[name], k0)
    positions = {name: positions_of(objective, streams[name]) for name in names}
    taus = options.get("thresholds", THRESHOLDS)
    rows += _counts(objective, positions, taus, unchanged_below * k0)
    return {"streams": pd.DataFrame(rows).astype({"budget": "Int64", "dense": "Int64"})}


def _evaluated(
    objective: Objective, batches: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, pd.DataFrame]:
    smallest = (min(options.get("budgets", BUDGETS)),)
    own = {**options, "budgets": smallest, "free_budgets": smallest}
    return evaluate(objective, batches, **own).tables()


def _zero(maskings: pd.DataFrame) -> float:
    return float(records(maskings, masking="zero")[0]["distance"])


# ---- distances -----------------------------------------------------------------------------
def _distances(
    stream: str, tables: Mapping[str, pd.DataFrame], k0: float
) -> Iterator[dict[str, Any]]:
    own = _zero(tables["maskings"])
    for r in records(tables["maskings"]):
        value = Interval(r["distance"], r["low"], r["high"])
        share = Interval(r["of_zero"], r["of_zero_low"], r["of_zero_high"])
        yield _row(stream, r["masking"], value, k0, share, n=r["n"], n_units=r["n_batches"])
    for r in records(tables["ladder"]):
        value = Interval(r["median"], r["low"], r["high"])
        size = {"budget": r["budget"], "n": r["n"], "n_units": r["n_batches"]}
        yield _row(stream, r["attack"], value, k0, scaled(value, own), **size)
        if r["protection"] == r["protection"]:
            missing = float("nan")
            value = Interval(r["protection"], missing, missing)
            yield {
                "stream": stream,
                "quantity": "protection",
                "stage": ALL,
                **_named("value", value),
                **size,
            }


def _row(
    stream: str,
    quantity: str,
    value: Interval,
    k0: float,
    share: Interval,
    **more: Any,
) -> dict[str, Any]:
    return {
        "stream": stream,
        "quantity": quantity,
        "stage": ALL,
        **_named("value", value),
        **_named("of_behaviour", scaled(value, k0)),
        **_named("of_own", share),
        **more,
    }


def _named(name: str, value: Interval) -> dict[str, float]:
    prefix = "" if name == "value" else f"{name}_"
    return {name: value.value, f"{prefix}low": value.low, f"{prefix}high": value.high}


def scaled(value: Interval, unit: float) -> Interval:
    """In units that are taken as exact; NaN where the unit is 0."""
    if not unit > 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    return Interval(value.value / unit, value.low / unit, value.high / unit)


# ---- counts --------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Positions:
    """What is known of every position of a stream, by row.

    Attributes:
        change: (rows, positions) KL(last ‖ first). low: (rows, positions, K) lower importances.
    """

    change: Float[Tensor, "rows positions"]
    low: Float[Tensor, "rows positions K"]


@torch.no_grad()
def positions_of(objective: Objective, batches: Sequence[Tensor]) -> Positions:
    """Importances, and how far everything off is from the last stage, position by position."""
    host = objective.factors.host
    changes, lows = [], []
    with host.prepared(objective.config.speed):
        for batch in batches:
            clean = host.clean(batch.to(host.device))
            low = importances(objective, clean)
            output = host.forward(clean, dict.fromkeys(host.names, off))
            change = per_position(output, clean.output, host.metric)
            changes.append(change.reshape(len(batch), -1).cpu())
            lows.append(low.reshape(len(batch), -1, low.shape[-1]).cpu())
    return Positions(torch.cat(changes), torch.cat(lows))


def _counts(
    objective: Objective,
    positions: Mapping[str, Positions],
    thresholds: Sequence[float],
    epsilon: float,
) -> Iterator[dict[str, Any]]:
    """L0 of every stage on all positions of a stream, on changed and on unchanged ones."""
    layout = objective.factors.layout
    host: Any = objective.factors.host
    members = {s: [] for s in stages_of(host)}
    for name, place in layout.slices().items():
        members[host.updates[name].stage] += range(place.start, place.stop)
    members[ALL] = list(range(layout.total))
    every = Positions(
        torch.cat([p.change for p in positions.values()]),
        torch.cat([p.low for p in positions.values()]),
    )
    subsets = {name: (p, torch.ones_like(p.change)) for name, p in positions.items()}
    for name, p in ({} if len(positions) == 1 else positions).items():
        subsets[f"{name}, {CHANGED}"] = p, (p.change >= epsilon).to(p.change.dtype)
        subsets[f"{name}, {UNTOUCHED}"] = p, (p.change < epsilon).to(p.change.dtype)
    subsets[CHANGED] = every, (every.change >= epsilon).to(every.change.dtype)
    subsets[UNTOUCHED] = every, (every.change < epsilon).to(every.change.dtype)
    for subset, (own, chosen) in subsets.items():
        below = chosen.double().sum(1).numpy()
        for threshold in thresholds:
            on = own.low > threshold
            for stage, components in members.items():
                count = on[..., components].sum(-1) * chosen
                above = count.double().sum(1).numpy()
                value = ratio(above, below, np.ones_like(below))
                yield {
                    "stream": subset,
                    "quantity": f"l0>{threshold:g}",
                    "stage": stage,
                    **_named("value", value),
                    "dense": len(components),
                    "n": int(below.sum()),
                    "n_units": int((below > 0).sum()),
                }
