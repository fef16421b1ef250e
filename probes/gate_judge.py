"""Numbers and verdicts of the causal gate (`methods`: probes.md §6.3).

Two protocols read the same runs. ``pair_residual`` (the default) ranks the direction among
directions in which the contrast's own pairs differ; ``v1.1`` is the earlier gate, a z-score against
isotropic directions, kept because published verdicts used it. It passes directions nobody trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.stats import percentile_interval
from mi_weightspace.core.verdict import Verdict, Word

Protocol = Literal["pair_residual", "v1.1"]
PROTOCOLS: tuple[Protocol, ...] = ("pair_residual", "v1.1")
ABLATION_P, STEERING_P, DETECTION_P = 0.01, 0.05, 0.05
FLOOR: dict[Protocol, float] = {"pair_residual": 0.05, "v1.1": 0.02}
"""Smallest effect that counts, in probability."""
WINDOW = 0.03
"""An alpha is interpretable while isotropic directions move the readout by at most this."""
LEAST_Z = 6.0
MIN_CLUSTERS = 10
"""Fewer clusters of pairs than this decide nothing."""
WORDS: dict[str, Word] = {
    "PASS": Word.LOAD_BEARING,
    "PASS*": Word.NECESSARY_ONLY,
    "DETECTOR-ONLY": Word.DETECTOR_ONLY,
    "GENERIC": Word.GENERIC,
    "UNDERPOWERED": Word.UNDERPOWERED,
    "FAIL": Word.NOT_LOAD_BEARING,
}
"""The gate's own names and the words they print as; FAIL is neither causal nor a detector."""


@dataclass(frozen=True)
class Ranked:
    """One effect among its null's; `p` two-sided around the null's mean."""

    mean: float
    sd: float
    low: float
    high: float
    z: float
    p: float


def ranked(observed: float, null: Float[Tensor, " b"]) -> Ranked:
    """`observed` against the draws; an empty null gives p = 1 and no moments."""
    if not len(null):
        nan = math.nan
        return Ranked(nan, nan, nan, nan, nan, 1.0)
    mean, low_high = float(null.mean()), percentile_interval(null)
    sd = float(null.std()) if len(null) > 1 else 0.0
    z = (observed - mean) / sd if sd > 0 else math.nan
    p = float(two_sided_p(torch.tensor([observed]), null[:, None])[0][0])
    return Ranked(mean, sd, float(low_high[0]), float(low_high[1]), z, p)


def two_sided_p(
    observed: Float[Tensor, " m"], null: Float[Tensor, "b m"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Rank p of every test around its null's mean, alone and by the maximum over the tests.

    The mean and sd are those of the draws and the observed value together, so that both p are exact
    at any number of draws (Westfall and Young 1993). Without draws both are 1.
    """
    every = torch.cat([observed[None], null]).double()
    spread = every.std(dim=0) if len(null) else torch.zeros(len(observed))
    flat = spread <= 1e-12
    t = ((every - every.mean(0)) / torch.where(flat, 1.0, spread)).abs()
    t = torch.where(flat, 0.0, t)
    reached = t[0] * (1 - 1e-12)
    single = (1 + (t[1:] >= reached).sum(0)).double() / (len(null) + 1)
    if not len(null):
        return single, single
    joint = (1 + (t[1:].amax(1)[:, None] >= reached).sum(0)).double() / (len(null) + 1)
    return single, joint


def bootstrap(
    values: Float[Tensor, " n"], weights: Float[Tensor, "b n"]
) -> tuple[float, float, float]:
    """Standard error and 95 % interval of a mean over resampled clusters."""
    draws = weights @ values.double() / weights.sum(1)
    low, high = percentile_interval(draws)
    return float(draws.std()), float(low), float(high)


# ---- the verdict ---------------------------------------------------------------------------
Row = Mapping[str, Any]


def judge(
    rows: Sequence[Row], facts: Mapping[str, Any], protocol: Protocol, subject: str
) -> Verdict:
    """The verdict of one protocol from the table's rows and the facts of the run."""
    ablation = next(
        r for r in rows if r["intervention"] == facts["ablation"] and r["prompts"] == "frame"
    )
    steering = best_steering(rows, ablation, protocol)
    if protocol == "pair_residual":
        outcome, reservations = _ours(rows, ablation, steering, facts)
    else:
        outcome, reservations = _earlier(ablation, steering, facts)
    evidence = {
        **facts,
        "gate": outcome,
        "protocol": protocol,
        "effect": ablation["effect"],
        "effect_low": ablation["low"],
        "effect_high": ablation["high"],
        "floor": floor_of(ablation, protocol),
        "p_ablation": ablation["p"],
        "z_isotropic": ablation["isotropic_z"],
        "steering_alpha": None if steering is None else steering.alpha,
        "steering_up": None if steering is None else steering.up,
        "steering_down": None if steering is None else steering.down,
        "p_steering": None if steering is None else steering.p,
    }
    return Verdict(WORDS[outcome], subject, evidence, tuple(reservations))


def floor_of(row: Row, protocol: Protocol) -> float:
    """Smallest effect that counts: never below twice its own standard error in our protocol."""
    least = FLOOR[protocol]
    return max(least, 2 * float(row["se"])) if protocol == "pair_residual" else least


@dataclass(frozen=True)
class Steering:
    """Both signs of one alpha; `p` is the larger of the two."""

    alpha: float
    up: float
    down: float
    p: float


def steering_rows(rows: Sequence[Row], protocol: Protocol) -> list[Row]:
    """Rows of ``add`` on the scale that has room: probability, unless it stands near 0 or 1."""
    steers = [r for r in rows if r["intervention"] == "add"]
    near = [min(r["before"], 1 - r["before"]) for r in steers if r["scale"] == "probability"]
    scale = "probability" if near and near[0] > 2 * FLOOR[protocol] else "centred"
    return [r for r in steers if r["scale"] == scale]


def best_steering(rows: Sequence[Row], ablation: Row, protocol: Protocol) -> Steering | None:
    """The interpretable alpha with opposite effects above the floor, of smallest p.

    By convention a direction is positive towards the frame, so adding it must do the opposite of
    what its ablation does on the frame's prompts (not asked by ``v1.1``).
    """
    by_alpha = {r["alpha"]: r for r in steering_rows(rows, protocol) if r["interpretable"]}
    found: list[Steering] = []
    for alpha, raising in by_alpha.items():  # of either sign
        lowering = by_alpha.get(-alpha)
        if lowering is None:
            continue
        up, down = raising["effect"], lowering["effect"]
        strong = up >= floor_of(raising, protocol) and -down >= floor_of(lowering, protocol)
        if strong and (protocol == "v1.1" or ablation["effect"] * alpha < 0):
            p = max(raising["p_adjusted"], lowering["p_adjusted"])
            found.append(Steering(alpha, up, down, p))
    return min(found, key=lambda s: (s.p, abs(s.alpha)), default=None)


def _ours(
    rows: Sequence[Row], ablation: Row, steering: Steering | None, facts: Mapping[str, Any]
) -> tuple[str, list[str]]:
    effect, floor = abs(ablation["effect"]), floor_of(ablation, "pair_residual")
    least = FLOOR["pair_residual"]
    if facts["n_clusters"] < MIN_CLUSTERS:
        return "UNDERPOWERED", [f"{facts['n_clusters']} clusters; {MIN_CLUSTERS} are needed."]
    if 1 / (facts["n_null"] + 1) > ABLATION_P:
        short = f"{facts['n_null']} null directions cannot give p ≤ {ABLATION_P}."
        return "UNDERPOWERED", [short]
    said: list[str] = []
    if abs(facts["difference"]) < least:
        said.append(
            f"The frame changes the readout by {facts['difference']:+.3f}, less than the floor: "
            "there is little behaviour to take away."
        )
    if ablation["p"] > ABLATION_P or effect < floor:
        if ablation["p"] <= ABLATION_P and effect >= least:
            said.append("The effect is smaller than twice its standard error.")
            return "UNDERPOWERED", said
        return ("DETECTOR-ONLY" if facts["detects"] else "FAIL"), said
    if ablation["effect"] * facts["difference"] > 0:
        said.append("Taking the direction away moves the readout further the frame's way.")
    generic = _generic(facts)
    if generic:
        return "GENERIC", [*said, generic]
    scale = next((r["scale"] for r in steering_rows(rows, "pair_residual")), "")
    if scale == "centred":
        said.append(
            "Neutral prompts leave the probability no room: steering is judged with the threshold "
            "moved to the neutral mean of the log-odds."
        )
    if steering is not None and steering.p <= STEERING_P:
        return "PASS", said
    return "PASS*", [*said, _why_not(rows)]


def _generic(facts: Mapping[str, Any]) -> str:
    """Why the effect is no effect on this behaviour in particular; empty where it is."""
    if facts["specificity_low"] <= 0:  # nan, without controls, is not
        return "The ablation changes what controls do as much."
    if facts["side_kl_rest"] > facts["side_kl_rest_null95"]:
        return "Side effects on other tokens exceed those of 95 % of the null directions."
    return ""


def _why_not(rows: Sequence[Row]) -> str:
    steers = steering_rows(rows, "pair_residual")
    if not steers:
        return "Nothing was added: necessary, not shown sufficient."
    usable = {r["alpha"] for r in steers if r["interpretable"]}
    if not any(-alpha in usable for alpha in usable):
        return (
            "At every alpha isotropic directions move the readout by more than "
            f"{100 * WINDOW:g} points: declare smaller alphas to test sufficiency."
        )
    return "Adding it does not bring the behaviour about: necessary, not shown sufficient."


def _earlier(
    ablation: Row, steering: Steering | None, facts: Mapping[str, Any]
) -> tuple[str, list[str]]:
    said = ["Protocol v1.1: isotropic directions are a weak opponent; untrained directions pass."]
    clear = abs(ablation["effect"]) >= FLOOR["v1.1"] and abs(ablation["isotropic_z"]) > LEAST_Z
    if clear and steering is not None:
        return "PASS", said
    return ("DETECTOR-ONLY" if facts["detects"] else "FAIL"), said
