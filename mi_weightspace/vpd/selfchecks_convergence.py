"""Checks of a run's end: finished, annealed, still, and no late rise of gradients (4 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.evaluate import Evaluation
from mi_weightspace.vpd.selfchecks_form import Check, Outcome
from mi_weightspace.vpd.selfchecks_history import (
    MIN_RECORDS,
    WINDOW,
    Drift,
    History,
    adversarial_terms,
    end_drift,
    first_non_finite,
    largest_rise,
    series,
)

MAX_DRIFT = 0.25
"""Change across the last tenth that the interval may still allow, relative to the level."""
SURE_DRIFT = 0.05
"""A change that the interval puts above this share of the level is one."""
ADVERSARY_FLOOR = 1e-3
"""Drifts below this share of the all-zero mask's error do not matter."""
L0_FLOOR = 0.01
SETTLED = 0.05
"""Share of the run that γ (or p) must have stood at its end value."""
RISE = 10.0
"""The signature of a late divergence: the importance network's gradient norm grows tenfold."""
STAMPS = ("history", "anneal", "drift_l0", "drift_adversary")
"""Checks without which a run is not called converged."""


def convergence(config: VPDConfig, history: History, evaluation: Evaluation) -> list[Check]:
    zero = evaluation.masking("zero")
    checks = [_history(config, history), _anneal(config)]
    checks.append(_drift("drift_l0", "L0", history, ["l0"], config, L0_FLOOR))
    terms = adversarial_terms(history)
    if terms:
        floor = ADVERSARY_FLOOR * zero
        checks.append(
            _drift("drift_adversary", "the attacked error", history, terms, config, floor)
        )
    else:
        text = "no adversarial term was trained or logged: worst-case masks were never part of it"
        checks.append(Check("drift_adversary", "WARN", None, MAX_DRIFT, "history", text))
    return checks


def _history(config: VPDConfig, history: History) -> Check:
    last = int(history[-1]["step"]) if history else -1
    bad = first_non_finite(history)
    done = (last + 1) / config.n_steps
    measured = f"{len(history)} logged records"
    if bad is not None:
        text = f"{bad[1]} is not finite at step {bad[0]}"
        return Check("history", "FAIL", done, 1.0, measured, text)
    if last + 1 < config.n_steps:
        text = f"stopped at step {last} of {config.n_steps}: schedules did not reach their end"
        return Check("history", "FAIL", done, 1.0, measured, text)
    return Check("history", "PASS", done, 1.0, measured, f"all {config.n_steps} steps, all finite")


def _anneal(config: VPDConfig) -> Check:
    how = config.minimality
    name, (start, end) = ("p", how.p) if how.form == "lp" else ("γ", how.gamma)
    held = 1.0 if start == end else 1 - how.anneal_until
    text = f"{name} went {start:g} → {end:g} and stood there for {held:.0%} of the run"
    outcome: Outcome = "PASS" if held >= SETTLED - 1e-9 else "FAIL"
    return Check("anneal", outcome, held, SETTLED, "configuration", text)


def _drift(
    name: str, what: str, history: History, keys: Sequence[str], config: VPDConfig, floor: float
) -> Check:
    found = [d for k in keys if (d := end_drift(history, k, config.n_steps)) is not None]
    if not found:
        text = (
            f"fewer than {MIN_RECORDS} records in the last {WINDOW:.0%} of the run: whether {what} "
            "still moves cannot be told (lower log_every)"
        )
        return Check(name, "FAIL", None, MAX_DRIFT, f"{len(history)} logged records", text)
    worst = max(found, key=lambda d: d.bound / d.level if d.level > 0 else d.bound)
    number = worst.bound / worst.level if worst.level > 0 else worst.bound
    text = (
        f"{what} changed by {worst.change:+.3g} ± {worst.half:.2g} across the last {WINDOW:.0%} "
        f"of the run, around {worst.level:.3g}"
    )
    measured = f"{worst.n} records, steps ≥ {(1 - WINDOW) * (config.n_steps - 1):.0f}"
    return Check(name, _settled(worst, floor), number, MAX_DRIFT, measured, text)


def _settled(found: Drift, floor: float) -> Outcome:
    """FAIL if even the interval's near end is a real change, PASS if its far end is small."""
    level = abs(found.level)
    if not math.isfinite(found.bound) or found.certain > max(floor, SURE_DRIFT * level):
        return "FAIL"
    return "PASS" if found.bound <= max(floor, MAX_DRIFT * level) else "WARN"


def gradients(history: History, who: str) -> Check:
    _, values = series(history, f"grad_{who}")
    rise = largest_rise(values)
    bad: Outcome = "FAIL" if who == "importance" else "WARN"
    text = f"largest later-to-earlier ratio of window medians {rise:.3g}"
    if len(values) < 20:
        bad = "WARN"
        text = f"only {len(values)} records: a late rise would not be seen"
        return Check(f"gradients_{who}", "WARN", None, RISE, f"{len(values)} records", text)
    outcome: Outcome = "PASS" if rise < RISE else bad
    if rise >= RISE:
        text += ": the signature of a late divergence, which the total loss hides"
    return Check(f"gradients_{who}", outcome, rise, RISE, f"{len(values)} records", text)
