"""How a decomposed change is measured: on each stream apart, in units of K0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.vpd.assess import BUDGETS
from mi_weightspace.vpd.differences.attribution import UNCHANGED, stages_of
from mi_weightspace.vpd.differences.baselines import random_basis
from mi_weightspace.vpd.differences.diagnostics import (
    CHANGED,
    MOST_BATCHES,
    UNTOUCHED,
    diagnose,
    reversions,
    whole_matrices,
)
from mi_weightspace.vpd.differences.singular import singular_parts
from mi_weightspace.vpd.differences.tied import (
    cluster,
    cluster_table,
    firing_sets,
    tied_row,
    tied_table,
)
from mi_weightspace.vpd.differences.unit import everything_off, per_position
from mi_weightspace.vpd.evaluate import THRESHOLDS, evaluate, headline_threshold
from mi_weightspace.vpd.evaluate_masks import site_counts
from mi_weightspace.vpd.evaluate_stats import Interval, ratio, records
from mi_weightspace.vpd.ladder import importances
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import pandas as pd

ALL = "total"
N_ATTACKED = 5
"""Batches that `evaluate` attacks by default."""


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
        ``zero``), every masking, ``pgd``, ``pgd_free``, ``protection``; the baselines ``svd,
        static, random_alive, coordinates`` of `evaluate_baselines` and ``random_basis``, at this
        stream's counts; all in nats or squared error but for protection. ``l0>τ`` by stage and in
        total, in components, for every stream, for its ``changed`` and ``unchanged`` positions,
        and those of all streams. Intervals are 95 % over batches (L0: over rows); of attacks,
        median and range.

        ``whole_matrices`` and ``diagnostics`` (`differences.diagnostics`, on the first
        `MOST_BATCHES` batches of each stream), ``singular`` (`differences.singular`), ``tied`` and
        ``clusters`` (`differences.tied`).
    """
    import pandas as pd

    names = list(streams)
    tables = {names[0]: found}
    for name in names[1:]:
        tables[name] = _evaluated(objective, streams[name], options)
    own_k0 = {name: _zero(tables[name]["maskings"]) for name in names}
    k0, seed = own_k0[names[0]], options.get("seed", 0)
    epsilon = unchanged_below * k0
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += _distances(name, tables[name], k0)
        rows += _baselines(objective, name, streams[name], tables[name], k0, options)
    taus = options.get("thresholds", THRESHOLDS)
    positions = {name: positions_of(objective, streams[name], taus) for name in names}
    rows += _counts(objective, positions, epsilon)
    undone = {
        name: reversions(objective, batches[:MOST_BATCHES], seed=seed)
        for name, batches in streams.items()
    }
    return {
        "streams": pd.DataFrame(rows).astype({"budget": "Int64", "dense": "Int64"}),
        "whole_matrices": whole_matrices(undone, stages_by_site(objective), k0, epsilon),
        "diagnostics": diagnose(undone, k0, epsilon),
        "singular": singular_parts(objective, streams[names[0]]),
        **_tied(objective, streams, tables, own_k0, options),
    }


def _tied(
    objective: Objective,
    streams: Mapping[str, Sequence[Tensor]],
    tables: Mapping[str, Mapping[str, pd.DataFrame]],
    k0: Mapping[str, float],
    options: Mapping[str, Any],
) -> dict[str, pd.DataFrame]:
    """Clusters from all streams together, and both attacks at the smallest budget."""
    budget = min(options.get("budgets", BUDGETS))
    every = [batch for batches in streams.values() for batch in batches]
    clusters = cluster(firing_sets(objective, every))
    tied = {
        name: tied_row(
            objective,
            _attacked(batches, options),
            clusters,
            budget=budget,
            n_inits=options.get("n_inits", 1),
            seed=options.get("seed", 0),
        )
        for name, batches in streams.items()
    }
    untied = {
        name: records(own["ladder"], attack="pgd", budget=budget)[0] for name, own in tables.items()
    }
    return {
        "tied": tied_table(tied, untied, k0, objective.sizes[0]),
        "clusters": cluster_table(objective, clusters),
    }


def _attacked(batches: Sequence[Tensor], options: Mapping[str, Any]) -> Sequence[Tensor]:
    """The batches on which `evaluate` ran its ladder and its baselines."""
    return batches[: options.get("n_pgd_batches", N_ATTACKED)]


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


def _baselines(
    objective: Objective,
    stream: str,
    batches: Sequence[Tensor],
    tables: Mapping[str, pd.DataFrame],
    k0: float,
    options: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Those of `evaluate`, and random dimensions of the updates' column spaces."""
    for r in records(tables["baselines"]):
        if not r["baseline"].startswith("rounded"):  # among the maskings already
            value = Interval(r["distance"], r["low"], r["high"])
            share = Interval(r["of_zero"], r["of_zero_low"], r["of_zero_high"])
            yield _row(stream, r["baseline"], value, k0, share, n=r["n"], n_units=r["n_batches"])
    tau = headline_threshold(options.get("thresholds", THRESHOLDS), objective.factors.host.metric)
    l0 = {r["name"]: r["l0"] for r in records(tables["l0"], level="site", threshold=tau)}
    value, share, n, units = random_basis(
        objective, _attacked(batches, options), l0, seed=options.get("seed", 0)
    )
    yield _row(stream, "random_basis", value, k0, share, n=n, n_units=units)


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
        change: (rows, positions) KL(last ‖ first). counts: threshold -> (rows, positions, S)
            components above it at each site.
    """

    change: Float[Tensor, "rows positions"]
    counts: Mapping[float, Int[Tensor, "rows positions S"]]


@torch.no_grad()
def positions_of(
    objective: Objective, batches: Sequence[Tensor], thresholds: Sequence[float]
) -> Positions:
    """How far everything off is from the last stage, and what fires, position by position."""
    host, sizes = objective.factors.host, objective.factors.layout.sizes
    changes: list[Tensor] = []
    counts: dict[float, list[Tensor]] = {t: [] for t in thresholds}
    with host.prepared(objective.config.speed):
        for batch in batches:
            clean = host.clean(batch.to(host.device))
            low = importances(objective, clean)
            output = host.forward(clean, everything_off(host))
            change = per_position(output, clean.output, host.metric)
            changes.append(change.reshape(len(batch), -1).cpu())
            for threshold, found in counts.items():
                on = site_counts(low > threshold, sizes)
                found.append(on.reshape(len(batch), -1, len(sizes)).cpu())
    return Positions(torch.cat(changes), {t: torch.cat(found) for t, found in counts.items()})


def _counts(
    objective: Objective, positions: Mapping[str, Positions], epsilon: float
) -> Iterator[dict[str, Any]]:
    """L0 of every stage on all positions of a stream, on changed and on unchanged ones."""
    layout = objective.factors.layout
    stage_of = stages_by_site(objective)
    members = {
        s: [k for k, n in enumerate(layout.names) if stage_of[n] == s]
        for s in stages_of(objective.factors.host)
    }
    members[ALL] = list(range(len(layout.names)))
    parts = list(positions.values())
    every = Positions(
        torch.cat([p.change for p in parts]),
        {t: torch.cat([p.counts[t] for p in parts]) for t in parts[0].counts},
    )
    chosen = {
        name: (p, torch.ones_like(p.change, dtype=torch.bool)) for name, p in positions.items()
    }
    for name, p in positions.items():
        chosen[name] = p, torch.ones_like(p.change, dtype=torch.bool)
        chosen[f"{name}, {CHANGED}"] = p, p.change >= epsilon
        chosen[f"{name}, {UNTOUCHED}"] = p, p.change < epsilon
    chosen[CHANGED] = every, every.change >= epsilon
    chosen[UNTOUCHED] = every, every.change < epsilon
    for subset, (own, kept) in chosen.items():
        below = kept.double().sum(1).numpy()
        for threshold, counts in own.counts.items():
            for stage, sites in members.items():
                above = (counts[..., sites].sum(-1) * kept).double().sum(1).numpy()
                value = ratio(above, below, np.ones_like(below))
                yield {
                    "stream": subset,
                    "quantity": f"l0>{threshold:g}",
                    "stage": stage,
                    **_named("value", value),
                    "dense": sum(layout.sizes[k] for k in sites),
                    "n": int(below.sum()),
                    "n_units": int((below > 0).sum()),
                }


def stages_by_site(objective: Objective) -> dict[str, str]:
    host: Any = objective.factors.host
    return {name: update.stage for name, update in host.updates.items()}
