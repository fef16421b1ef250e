"""Runs every intervention of a causal gate on every direction, and makes the table of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.shifts import cluster_index, cluster_signs
from mi_weightspace.core.stats import auroc, cluster_weights, percentile_interval, rank_p
from probes.gate_interventions import Change, Intervened, Outcome, Subspaces
from probes.gate_judge import WINDOW, bootstrap, ranked, two_sided_p
from probes.gate_nulls import REFERENCES
from probes.gate_prompts import FRAME, NEUTRAL

if TYPE_CHECKING:
    import pandas as pd

DECIDING = "pair_residual"
SIDES = {"frame": FRAME, "neutral": NEUTRAL}


@dataclass(frozen=True)
class Test:
    """One intervention at one size on one set of prompts; `alpha` is nan but for ``add``."""

    change: Change
    alpha: float
    prompts: str

    @property
    def name(self) -> str:
        return self.change.operation


@dataclass(frozen=True, eq=False)
class Reading:
    """The same run on one scale: each pair's value before, and each direction's change of it."""

    scale: str
    before: Float[Tensor, " pairs"]
    delta: Float[Tensor, "n pairs"]


@dataclass(frozen=True, eq=False)
class Measured:
    """The table and what goes with it; `facts` are numbers of the run as a whole."""

    table: pd.DataFrame
    pairs: dict[str, Float[Tensor, " pairs"]]
    controls: pd.DataFrame
    arrays: dict[str, Tensor]
    facts: dict[str, Any]


def tests_of(changes: Sequence[tuple[Change, float]], ablation: str) -> list[Test]:
    """Ablations on the frame's prompts, the deciding one on neutral ones too; there ``add``."""
    found = []
    for change, alpha in changes:
        sides = ("neutral",) if change.operation == "add" else ("frame",)
        sides = ("frame", "neutral") if change.operation == ablation else sides
        found += [Test(change, alpha, side) for side in sides]
    return found


def measure(
    on_target: Intervened,
    on_control: Intervened | None,
    groups: Mapping[str, Subspaces],
    tests: Sequence[Test],
    ablation: str,
    weights: Float[Tensor, "b pairs"],
    *,
    seed: int,
    progress: bool,
) -> Measured:
    """Every test on every direction of `groups`, of which ``observed`` comes first.

    Args:
        weights: bootstrap weights of the pairs.
    """
    import pandas as pd
    from rich.progress import track

    every = Subspaces.joined(list(groups.values()))
    sizes = [len(g) for g in groups.values()]
    rows: list[dict[str, Any]] = []
    effects: list[dict[str, Tensor]] = []
    deciding: dict[str, tuple[Reading, Outcome]] = {}
    for test in track(tests, "causal gate", disable=not progress, transient=True):
        index = on_target.rows.of(SIDES[test.prompts])
        outcome = on_target.run(test.change, every, index)
        for reading in _readings(test, on_target, outcome, index):
            parts = dict(zip(groups, reading.delta.mean(1).split(sizes), strict=True))
            effects.append(parts)
            rows.append(_row(test, on_target, outcome, reading, weights) | _nulls(parts))
            if test.name == ablation:
                deciding[test.prompts] = reading, outcome
    _adjust(rows, effects)
    frame, neutral = deciding["frame"][0], deciding["neutral"][0]
    controls, facts = _on_controls(on_control, groups, tests, ablation, deciding, weights, seed)
    facts["difference"] = float((frame.before - neutral.before).mean())
    return Measured(
        table=pd.DataFrame(rows),
        pairs={
            "p_frame": frame.before,
            "p_neutral": neutral.before,
            "p_frame_ablated": frame.before + frame.delta[0],
        },
        controls=controls,
        arrays={
            f"effects/{name}": torch.stack([e[name] for e in effects]).float() for name in groups
        },
        facts=facts,
    )


def _readings(test: Test, runner: Intervened, outcome: Outcome, index: Tensor) -> Iterator[Reading]:
    """In probability; for ``add`` also with the threshold moved to the neutral mean.

    Where a behaviour is absent without its frame, its probability cannot fall and no symmetry can
    show. On the centred scale, ``sigmoid(log-odds − neutral mean)``, neutral prompts stand at 1/2.
    """
    base = runner.base.log_odds[:, index]
    centres = {"probability": 0.0}
    if test.name == "add":
        centres["centred"] = float(base.mean())
    for scale, centre in centres.items():
        before = (base - centre).sigmoid()
        delta = (outcome.log_odds - centre).sigmoid() - before
        yield Reading(
            scale,
            runner.rows.per_pair(before[0], index),
            runner.rows.per_pair(delta, index),
        )


def _row(
    test: Test, runner: Intervened, outcome: Outcome, reading: Reading, weights: Tensor
) -> dict[str, Any]:
    index = runner.rows.of(SIDES[test.prompts])
    before, delta = reading.before, reading.delta[0]
    odds = outcome.log_odds[0] - runner.base.log_odds[0, index]
    se, low, high = bootstrap(delta, weights)
    flips = float(((before > 0.5) != (before + delta > 0.5)).double().mean())
    return {
        "intervention": test.name,
        "alpha": test.alpha,
        "prompts": test.prompts,
        "scale": reading.scale,
        "n": len(delta),
        "before": float(before.mean()),
        "effect": float(delta.mean()),
        "se": se,
        "low": low,
        "high": high,
        "effect_log_odds": float(runner.rows.per_pair(odds, index).mean()),
        "flips": flips if reading.scale == "probability" else math.nan,
        "kl": float(outcome.kl[0].mean()),
    }


def _nulls(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    observed = float(parts["observed"][0])
    own = ranked(observed, parts[DECIDING])
    found: dict[str, Any] = {
        "null_mean": own.mean,
        "null_sd": own.sd,
        "null_low": own.low,
        "null_high": own.high,
        "z": own.z,
        "p": own.p,
        "p_adjusted": own.p,
    }
    for name in (*REFERENCES, "controls"):
        other = ranked(observed, parts.get(name, torch.zeros(0)))
        found |= {
            f"{name}_mean": other.mean,
            f"{name}_sd": other.sd,
            f"{name}_z": other.z,
            f"{name}_p": other.p,
        }
    found["interpretable"] = bool(abs(found["isotropic_mean"]) <= WINDOW)
    return found


def _adjust(rows: Sequence[dict[str, Any]], effects: Sequence[Mapping[str, Tensor]]) -> None:
    """p of ``add`` by the maximum over every signed alpha, on each scale by itself."""
    for scale in dict.fromkeys(row["scale"] for row in rows):
        steers = [
            i
            for i, row in enumerate(rows)
            if row["intervention"] == "add" and row["scale"] == scale
        ]
        if steers:
            observed = torch.stack([effects[i]["observed"][0] for i in steers])
            null = torch.stack([effects[i][DECIDING] for i in steers], dim=1)
            for i, p in zip(steers, two_sided_p(observed, null)[1].tolist(), strict=True):
                rows[i]["p_adjusted"] = p


# ---- detection -----------------------------------------------------------------------------
def detection(
    values: Float[Tensor, "n 2 d"],
    direction: Direction,
    clusters: Sequence[str],
    *,
    in_sample: bool,
    seed: int,
) -> tuple[float, float]:
    """AUROC of the two sides along a direction, and p that they differ along it.

    The p is that of sign flips of whole clusters. Along a direction fitted on these very pairs
    (`in_sample`) noise differs too, and the held-out p of the fit stands in its place, where known.
    """
    along = values.double() @ direction.pattern.double()
    labels = torch.tensor([1, 0]).expand(len(along), 2)
    score = auroc(along.flatten(), labels.flatten())
    known = float(direction.fit.get("p_adjusted", math.nan))
    if in_sample and not math.isnan(known):
        return score, known
    shift = along[:, 0] - along[:, 1]
    flips = cluster_signs(cluster_index(clusters), 999, seed=seed, name="gate")
    # a direction of this contrast is positive towards the frame; a decoy may be either way
    return score, float(rank_p(shift.mean().abs(), (flips @ shift / len(shift)).abs()))


# ---- specificity and side effects ----------------------------------------------------------
def _on_controls(
    runner: Intervened | None,
    groups: Mapping[str, Subspaces],
    tests: Sequence[Test],
    ablation: str,
    deciding: Mapping[str, tuple[Reading, Outcome]],
    weights: Float[Tensor, "b pairs"],
    seed: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The ablation on prompts it should leave alone, and what follows for specificity.

    A control's readout is its own where it has one, and the continuation the unchanged model
    prefers there; the larger mean change of the two counts. Side effects are the divergence of the
    next token on neutral and control prompts, among tokens that are not the behaviour's, beside
    that of the null directions: where the behaviour has leaked to controls, taking it away there is
    no side effect.
    """
    import pandas as pd

    names = list(groups)[:2]
    assert names == ["observed", DECIDING], names
    n = 1 + len(groups[DECIDING])
    outcomes = [deciding["neutral"][1]]
    frame = pd.DataFrame(columns=pd.Index(["control", "n", "effect", "effect_top"]))
    facts: dict[str, Any] = dict.fromkeys(
        ("specificity", "specificity_low", "control_effect"), math.nan
    )
    facts["n_control_prompts"] = 0
    if runner is not None:
        change = next(t.change for t in tests if t.name == ablation)
        outcomes.append(runner.run(change, Subspaces.joined([groups[name] for name in names])))
        frame = _control_table(runner, outcomes[1])
        facts |= _specificity(deciding["frame"][0].delta[0], weights, frame, seed)
        facts["n_control_prompts"] = len(runner.rows.last)
    for name in ("kl_rest", "kl"):
        side = torch.cat([getattr(o, name)[:n] for o in outcomes], 1).mean(1)
        null = float(side[1:].quantile(0.95)) if n > 1 else math.nan
        facts |= {f"side_{name}": float(side[0]), f"side_{name}_null95": null}
    return frame, facts


def _control_table(runner: Intervened, outcome: Outcome) -> pd.DataFrame:
    import pandas as pd

    own = (outcome.p - runner.base.p)[0]
    top = (outcome.top - runner.base.top)[0]
    groups = [runner.rows.groups[i] for i in runner.rows.pair.tolist()]
    rows = []
    for name in dict.fromkeys(groups):
        index = [i for i, group in enumerate(groups) if group == name]
        effects = {"effect": float(own[index].mean()), "effect_top": float(top[index].mean())}
        rows.append({"control": name, "n": len(index)} | effects)
    return pd.DataFrame(rows)


def _specificity(delta: Tensor, weights: Tensor, frame: Any, seed: int) -> dict[str, float]:
    """|effect on the target| minus the mean over controls of theirs, resampled on both sides."""
    sign = 1.0 if float(delta.mean()) >= 0 else -1.0
    larger = frame[["effect", "effect_top"]].abs().max(axis=1).to_numpy()
    size = torch.from_numpy(larger.astype(float))
    draws = sign * (weights @ delta.double()) / weights.sum(1)
    others = cluster_weights(list(frame["control"]), len(draws), seed=seed, name="gate controls")
    low, _ = percentile_interval(draws - others @ size / others.sum(1))
    return {
        "specificity": float(sign * delta.mean() - size.mean()),
        "specificity_low": float(low),
        "control_effect": float(size.mean()),
    }
