"""DEFER probes: one linear probe per stream point, judged on what it has not seen.

`fit` takes a live model (or activations already harvested) and a contrast set, and returns a
`ProbeBank`: a direction per point with its controls, held-out scores with intervals, permutation
p-values with the maximum over points, specificity on the controls, and a layer chosen on inner
folds. What it does not claim: that a decodable register is *used*, or that the stage where it
decodes wrote it; registers are normally decodable at AUROC 1 before any stage wires them up.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.contrasts import ContrastSet, Split
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.shifts import cluster_index, mean_shift, studentised_max_p
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import cluster_weights, percentile_interval
from mi_weightspace.core.verdict import Verdict, Word
from probes.bank import ProbeBank, principal_rows, unit_rows
from probes.gather import obtain, one_target, pick_points, stack
from probes.linear import (
    METHODS,
    Kernel,
    Method,
    leave_out_scores,
    operators,
    pair_auroc,
    permuted_aurocs,
    separation,
    within_pair,
)
from probes.logistic import score
from probes.task import Task
from probes.validation import (
    HeldOut,
    as_row,
    choose_point,
    estimates,
    group_schemes,
    hold_out,
)

if TYPE_CHECKING:
    import pandas as pd

MIN_CLUSTERS = 5
"""Below this no sign-flip p can reach 0.05 (2⁻⁵ = 0.031)."""
ALPHA = 0.05
ENOUGH_CONTROLS = 19
N_PCS = 8
MOST_PC_ROWS = 128


def fit(
    model: Any,
    contrasts: ContrastSet | None = None,
    *,
    target: str | None = None,
    points: Sequence[Space | str] | None = None,
    position: str | None = None,
    method: Method = "lda",
    n_permutations: int = 1000,
    n_bootstrap: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> ProbeBank:
    """Fit a probe of one contrast at every point of one stage.

    Args:
        model: `PairedActivations`, or anything `mi_weightspace.load` takes (then harvested).
        contrasts: the prompts; activations carry their own. Pairs of split ``fit`` are fitted,
            ``heldout_register`` and ``heldout_item`` pairs only scored.
        target: the contrast; default the set's only target.
        points: default every stream point.
        position: pooling rule of a harvest, default ``last``.
        method: see `probes.linear`; the filter is of this method, the pattern is Δμ (``ridge`` and
            ``lr``: Haufe's ``Cov(x) w``).

    Raises:
        PromptError: no or several targets, fewer than three clusters, no pairs to fit on, no point
            where the two sides differ, or prompts that are not those of the activations.
        ConfigError: an unknown method.
    """
    if method not in METHODS or n_permutations < 1 or n_bootstrap < 1:
        raise ConfigError(
            "probe",
            given=f"method={method!r}, n_permutations={n_permutations}, n_bootstrap={n_bootstrap}",
            expected=f"a method of {METHODS} and at least one draw",
            remedy="Use method='lda'.",
        )
    start = time.perf_counter()
    activations = obtain(model, contrasts, points=points, position=position, progress=progress)
    harvested = time.perf_counter()
    who = one_target(activations.contrasts, target)
    every = pick_points(activations, points)
    task = Task(activations, who, method, seed, n_bootstrap, every)
    live = task.live
    numbers = _numbers(task, n_permutations, progress)
    table = _table(task, numbers)
    arrays, controls = _arrays(task, numbers)
    verdict, reservations = _judge(task, numbers, table, len(controls))
    return ProbeBank(
        table=table,
        tables={"controls": numbers.controls, "choice": numbers.choice},
        arrays=arrays,
        verdicts=(verdict,),
        config={
            "target": task.name,
            "stage": activations.stage,
            "position": activations.position,
            "convention": activations.convention,
            "method": method,
            "points": [p.name for p in live],
            "best_point": live[numbers.best].name,
            "controls": list(controls),
            "n_permutations": n_permutations,
            "n_bootstrap": n_bootstrap,
            "seed": seed,
        },
        inputs={"model": activations.model_hash, "prompts": activations.contrasts.hash},
        reservations=reservations,
        timings={"harvest": harvested - start, "fit": time.perf_counter() - harvested},
    )


@dataclass(frozen=True, eq=False)
class _Numbers:
    """Results at the live points, in their order."""

    columns: dict[str, Any]
    weight: Float[Tensor, "points d"]
    bias: Float[Tensor, " points"]
    pattern: Float[Tensor, "points d"]
    fitted: _Controls
    controls: pd.DataFrame
    choice: pd.DataFrame
    best: int


def _numbers(task: Task, n_permutations: int, progress: bool) -> _Numbers:
    index = cluster_index(task.clusters)
    kernel_ = task.kernel()
    held = hold_out(task.method, task.values, index, kernel_)
    own = estimates(held.scores, task.clusters, task.n_bootstrap, seed=task.seed)
    columns: dict[str, Any] = {k: [as_row(e)[k] for e in own] for k in as_row(own[0])}
    columns["p"], columns["p_adjusted"] = _permutation_p(task, kernel_, held, n_permutations)
    weight, bias, pattern = task.filters(task.values, held.penalty)
    for split in ("heldout_register", "heldout_item"):
        columns |= _held_out_columns(task, split, weight, bias)
    for scheme, groups in group_schemes([task.contrast.pairs[i] for i in task.pairs]).items():
        if task.method != "lr":
            found = hold_out(task.method, task.values, groups, kernel_)
            columns[f"{scheme}_auroc"] = found.auroc.tolist()
    fitted = _fit_controls(task, weight, bias, held.penalty, progress)
    pairs, mine = task.split("heldout_register"), held.scores
    if pairs:
        mine = score(stack(task.activations, task.name, task.live, pairs), weight, bias)
    controls, extra = _specificity(task, mine, fitted)
    extra |= {"heldout_separation": separation(mine)[0].tolist()}
    extra |= {"separation": separation(held.scores)[0].tolist()}
    choice = choose_point(task.method, task.values, index, kernel_)
    nested = estimates(choice.scores[None], task.clusters, task.n_bootstrap, seed=task.seed)[0]
    import pandas as pd

    picked = {"point": task.live[choice.point].name, "layer": task.live[choice.point].layer}
    inner = ", ".join(f"{task.live[i].name} {n}" for i, n in sorted(choice.inner.items()))
    weights = cluster_weights(task.clusters, task.n_bootstrap, seed=task.seed, name="separation")
    low, high = percentile_interval(separation(choice.scores, weights))
    apart = {"separation": float(separation(choice.scores)[0])}
    apart |= {"separation_low": float(low), "separation_high": float(high)}
    row = picked | as_row(nested) | apart | {"inner_choices": inner}
    return _Numbers(
        columns | extra,
        weight,
        bias,
        pattern,
        fitted,
        controls,
        pd.DataFrame([row]),
        choice.point,
    )


def _permutation_p(
    task: Task, kernel_: Kernel, held: HeldOut, n_permutations: int
) -> tuple[list[float], list[float]]:
    """p of the leave-cluster-out AUROC, alone and by the maximum over points."""
    index = cluster_index(task.clusters)
    ops = held.ops or tuple(operators("ridge", kernel_, index))
    ones = torch.ones(1, len(task.clusters), dtype=torch.float64)
    observed = held.auroc if held.ops else pair_auroc(leave_out_scores(ops, ones)[0])[0]
    null = permuted_aurocs(ops, index, n_permutations, seed=task.seed)
    p, joint = studentised_max_p(observed, null)
    return p.tolist(), joint.tolist()


def _held_out_columns(
    task: Task, split: Split, weight: Tensor, bias: Tensor
) -> dict[str, list[float]]:
    names = ("auroc", "auroc_low", "auroc_high", "within_pair", "n_clusters")
    pairs = task.split(split)
    if not pairs:
        return {f"{split}_{name}": [float("nan")] * len(task.live) for name in names}
    values = stack(task.activations, task.name, task.live, pairs)
    clusters = [task.contrast.pairs[i].cluster_id for i in pairs]
    found = estimates(score(values, weight, bias), clusters, task.n_bootstrap, seed=task.seed)
    return {f"{split}_{name}": [float(as_row(e)[name]) for e in found] for name in names}


@dataclass(frozen=True, eq=False)
class _Controls:
    """The probe's scores on every control, and the same quantities fitted on those that shift.

    Attributes:
        scores: control -> (L, n, 2).
        patterns, filters: (L, n_controls, d) unit rows, in the order of `Task.controls`.
    """

    scores: dict[str, Float[Tensor, "points n 2"]]
    patterns: Float[Tensor, "points n_controls d"] | None
    filters: Float[Tensor, "points n_controls d"] | None


def _fit_controls(
    task: Task, weight: Tensor, bias: Tensor, penalty: Tensor, progress: bool
) -> _Controls:
    from rich.progress import track

    scores, patterns, filters = {}, [], []
    names = task.who.controls
    for name in track(names, "probes of controls", transient=True, disable=not progress):
        values = stack(task.activations, name, task.live)
        scores[name] = score(values, weight, bias)
        if name in task.controls:
            own, _, pattern = task.filters(values, penalty)
            patterns.append(unit_rows(pattern))
            filters.append(unit_rows(own))
    if not filters:
        return _Controls(scores, None, None)
    return _Controls(scores, torch.stack(patterns, 1), torch.stack(filters, 1))


def _specificity(
    task: Task, own: Tensor, fitted: _Controls
) -> tuple[pd.DataFrame, dict[str, list[float]]]:
    """The probe's score on every control, and what of it belongs in the main table.

    Args:
        own: (L, n, 2) scores of the target's held-out registers, else leave-cluster-out scores.
    """
    import pandas as pd

    if not fitted.scores:
        frame = pd.DataFrame(columns=["point", "control", "auroc", "within_pair", "separation"])
        names = ("specificity", "specificity_max", "recall_at_1_fpr")
        return frame, {name: [float("nan")] * len(task.live) for name in names}
    rows, distances = [], []
    for name, scores in fitted.scores.items():
        columns = {
            "auroc": pair_auroc(scores),
            "within_pair": within_pair(scores),
            "separation": separation(scores)[0],
        }
        distances.append((columns["auroc"] - 0.5).abs())
        rows += [
            {"point": p.name, "control": name} | {k: float(v[i]) for k, v in columns.items()}
            for i, p in enumerate(task.live)
        ]
    others = torch.cat([s.flatten(1) for s in fitted.scores.values()], 1)
    threshold = others.quantile(0.99, dim=1)
    distance = torch.stack(distances)
    return pd.DataFrame(rows), {
        "specificity": distance.mean(0).tolist(),
        "specificity_max": distance.max(0).values.tolist(),
        "recall_at_1_fpr": (own[..., 0] > threshold[:, None]).double().mean(1).tolist(),
    }


def _table(task: Task, numbers: _Numbers) -> pd.DataFrame:
    import pandas as pd

    scores = pd.DataFrame(numbers.columns, index=[p.name for p in task.live])
    scores = scores.reindex([p.name for p in task.every])
    for name, value in (("n", len(task.pairs)), ("n_clusters", len(set(task.clusters)))):
        scores[name] = value
    head = pd.DataFrame(
        {
            "point": [p.name for p in task.every],
            "layer": [p.layer for p in task.every],
            "contrast": task.name,
            "method": task.method,
        },
        index=scores.index,
    )
    scores["n_controls"] = len(task.who.controls)
    scores["chosen"] = head["point"] == task.live[numbers.best].name
    return pd.concat([head, scores], axis=1).reset_index(drop=True)


def _arrays(task: Task, numbers: _Numbers) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Directions of every live point with the controls' and the moments of all prompts."""
    shift = mean_shift(task.values[:, :, 0].double() - task.values[:, :, 1].double())
    arrays = {
        "pattern": unit_rows(numbers.pattern),
        "filter": unit_rows(numbers.weight),
        "scale": shift.norm(dim=-1).float(),
        "bias": numbers.bias,
        "filter_norm": numbers.weight.norm(dim=-1),
    }
    if numbers.fitted.patterns is not None and numbers.fitted.filters is not None:
        arrays["control_patterns"] = numbers.fitted.patterns
        arrays["control_filters"] = numbers.fitted.filters
    return arrays | _moments(task), task.controls


def _moments(task: Task) -> dict[str, Tensor]:
    """Mean and variance over every prompt, and principal directions of an even sample of them."""
    names = [c.name for c in task.activations.contrasts]
    means, variances, samples = [], [], []
    for point in task.live:
        rows = torch.cat([task.activations.at(name, point).flatten(0, 1) for name in names])
        variance, mean = _moments_of(rows)
        means.append(mean)
        variances.append(variance)
        step = -(-len(rows) // MOST_PC_ROWS)
        samples.append(rows[::step])
    return {
        "mean": torch.stack(means),
        "variance": torch.stack(variances),
        "pcs": principal_rows(samples, N_PCS),
    }


def _moments_of(rows: Float[Tensor, "m d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Variance and mean in two passes; the second on centred rows, where float32 is enough."""
    mean = rows.mean(0, dtype=torch.float64).float()
    centred = rows - mean
    return centred.square_().sum(0) / (len(rows) - 1), mean


# ---- verdict -------------------------------------------------------------------------------
def _judge(
    task: Task, numbers: _Numbers, table: pd.DataFrame, n_controls: int
) -> tuple[Verdict, tuple[str, ...]]:
    """At the chosen point: is it decodable, and more so than what the probe makes of controls?

    Controls are often separated perfectly by any direction, so AUROCs cannot order them: what is
    compared is the separation (class gap over within-class sd). The controls' ceiling is their 95th
    percentile, the largest where they are fewer than 20. Specific: the separation on held-out
    registers and the interval of the nested one are above it.
    """
    row = table[table["chosen"]].iloc[0]
    nested = numbers.choice.iloc[0]
    own = numbers.controls[numbers.controls["point"] == row["point"]]
    size = np.abs(np.asarray(own["separation"], dtype=float))
    ceiling = float(np.quantile(size, 0.95, method="higher")) if len(own) else 0.0
    least = min(float(row["heldout_separation"]), float(nested["separation"]))
    evidence = {
        "heldout_register_auroc": float(row["heldout_register_auroc"]),
        "nested_auroc": float(nested["auroc"]),
        "p_adjusted": float(row["p_adjusted"]),
        "separation": least,
        "nested_separation_low": float(nested["separation_low"]),
        "control_separation": ceiling,
        "n_clusters": len(set(task.clusters)),
        "n_controls": len(own),
    }
    if evidence["n_clusters"] < MIN_CLUSTERS:
        word = Word.UNDERPOWERED
    elif not row["p_adjusted"] <= ALPHA:
        word = Word.NOT_SIGNIFICANT
    elif not len(own):
        word = Word.ALIGNED_NO_CONTROLS
    elif least <= ceiling:
        word = Word.NOT_AXIS_SPECIFIC
    else:
        clear = nested["separation_low"] > ceiling
        word = Word.AXIS_SPECIFIC if clear else Word.UNDERPOWERED
    subject = " / ".join(filter(None, [task.activations.stage, task.name, row["point"]]))
    return Verdict(word, subject, evidence), _reservations(task, n_controls)


def _reservations(task: Task, n_controls: int) -> tuple[str, ...]:
    found = []
    given = len(task.who.controls)
    if not task.split("heldout_register"):
        found.append("No held-out register: the scores say nothing about other ways to say it.")
    if given < ENOUGH_CONTROLS:
        found.append(f"{given} controls: a rank among them cannot be below 1/{given + 1}.")
    if n_controls < given:
        found.append(
            f"{given - n_controls} controls carry no shift at some point and are left out of the "
            "directions' controls."
        )
    dead = [p.name for p in task.every if p not in task.live]
    if dead:
        found.append(f"Both sides carry the same vector at {', '.join(dead)}: no probe there.")
    return tuple(found)
