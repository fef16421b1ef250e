"""The checks a decomposition prints by itself (vpd.md §11): PASS, WARN or FAIL with the number.

Limits are this library's own, stated here; none is a published criterion unless said. Of the
fifteen, those of a checkpoint difference (12) and of an attribution graph (14) do not apply to the
weights of one model.

====  =============================================================================
 1    host_identity
 2    coverage
 3    unmasked, remainder
 4    history, anneal, drift_l0, drift_adversary
 5    importance_collapse, density
 6    gradients_importance, gradients_components
 7    ladder
 8    monitors
 9    alive
10    anchor
11    baselines
13    polysemy
15    wording
====  =============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING

from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.evaluate import Evaluation
from mi_weightspace.vpd.evaluate_masks import MONITORS
from mi_weightspace.vpd.evaluate_stats import records
from mi_weightspace.vpd.host import LensHost
from mi_weightspace.vpd.ladder import ladder_sentence
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.selfchecks_anchor import Anchor, code_version
from mi_weightspace.vpd.selfchecks_convergence import STAMPS, convergence, gradients
from mi_weightspace.vpd.selfchecks_form import Check, Outcome, graded
from mi_weightspace.vpd.selfchecks_history import History
from mi_weightspace.vpd.selfchecks_wording import guard, violations

if TYPE_CHECKING:
    import pandas as pd

ADDED, IDENTITY = 1e-6, 1e-5
"""Relative difference of full masks from the host that only reassociation can explain: of one
added update, and at most."""
UNMASKED = 0.01
UNMASKED_FAIL = 0.1
SELECTED = 0.1
"""Of K0, where a difference is decomposed without faithfulness: what the components leave out."""
SELECTED_FAIL = 0.3
REMAINDER = 1e-3
REMAINDER_FAIL = 1e-2
FIRM = 0.5
"""A subcomponent is firm if g ≥ 0.9 at this share of its firings."""
UNSURE = 0.1
"""Of the importance of a difference's components, at updates none of whose components is firm."""
DENSE = 0.9
LADDER_BATCHES = 5
HEADLINE = 0.5
"""Of a ceiling: above it, importances hardly restrain the adversary."""
LISTED = 120
"""Characters of a list of names in a sentence."""


def self_checks(
    objective: Objective,
    history: History,
    evaluation: Evaluation,
    *,
    anchor: Anchor | None = None,
) -> list[Check]:
    """All checks that apply, in the order of the table above.

    Args:
        history: `train.Trained.history`.
        evaluation: of held-out data. anchor: `selfchecks_anchor.run_anchor`, if it was run.
    """
    config = objective.config
    data = f"{evaluation.facts['n']} held-out positions"
    checks = [
        _identity(objective, evaluation, data),
        _coverage(objective, evaluation),
        *_unmasked(config, evaluation, data),
        *convergence(config, history, evaluation),
        _collapse(objective, evaluation, data),
        _density(evaluation, data),
        *(gradients(history, who) for who in ("importance", "components")),
        _ladder(evaluation),
        _monitors(config, history),
        _alive(evaluation, data),
        _anchor(anchor),
        _baselines(evaluation),
        _polysemy(evaluation, data),
    ]
    return [*checks, _wording(checks)]


def converged(checks: Sequence[Check]) -> bool:
    """Whether the end of the run is settled; if not, every number and figure says so.

    True only if the run finished, γ (or p) stood at its end value, and neither L0 nor the
    adversarial term still moved: what could not be told counts as not settled.
    """
    found = {c.name: c.outcome for c in checks}
    return all(found.get(name) == "PASS" for name in STAMPS)


def stamp(checks: Sequence[Check]) -> str | None:
    """``"unconverged"`` for figures and tables of a run that is; None otherwise."""
    return None if converged(checks) else "unconverged"


def check_table(checks: Sequence[Check]) -> pd.DataFrame:
    """One row a check."""
    import pandas as pd

    frame = pd.DataFrame([asdict(c) for c in checks])
    return frame.astype({"number": "float64", "limit": "float64"})


# ---- 1–3: is it a decomposition of this model at all? ---------------------------------------
def _identity(objective: Objective, evaluation: Evaluation, data: str) -> Check:
    gap, scale = evaluation.facts["identity"], evaluation.facts["identity_scale"]
    # an update is added to the first stage's output: the last stage's own sum rounds otherwise,
    # once an update, and independent roundings add up as the root of their number
    host = objective.factors.host
    allowed = ADDED * math.sqrt(len(host.names)) * scale if host.adds_updates else 0.0
    outcome = graded(gap, allowed, max(IDENTITY * scale, allowed))
    text = "with all masks and remainders on, the output is the host's own, bit for bit"
    if gap != 0:
        text = f"with all masks and remainders on, outputs differ by up to {gap:.3g} of {scale:.3g}"
    return Check("host_identity", outcome, gap, 0.0, data, text)


def _coverage(objective: Objective, evaluation: Evaluation) -> Check:
    sites, host = records(evaluation.sites), objective.factors.host
    short = [r for r in sites if not r["can_be_exact"]]
    of = f" of {len(host.lens.sites())}" if isinstance(host, LensHost) else ""
    text = f"{len(sites)}{of} matrices decomposed; each has at least as many components as rank"
    if short:
        names = ", ".join(f"{r['site']} ({r['n_components']} of {r['rank_bound']})" for r in short)
        text = (
            f"cannot be parameter-faithful: fewer components than rank at {len(short)} of "
            f"{len(sites)} sites: {names[:LISTED]}"
        )
    outcome: Outcome = "FAIL" if short else "PASS"
    if short and objective.config.faithfulness.weight == 0:
        outcome = "PASS"  # the remainder holds the rest, and the adversary owns the remainder
        text = f"{len(sites)} matrices; {len(short)} have fewer components than rank, as asked"
    return Check("coverage", outcome, float(len(short)), 0.0, "shapes", text)


def _unmasked(config: VPDConfig, evaluation: Evaluation, data: str) -> list[Check]:
    share, zero = evaluation.masking("unmasked", "of_zero"), evaluation.masking("zero")
    text = f"components alone lose {share:.3g} of what switching all of them off loses ({zero:.3g})"
    if math.isnan(share):
        text = "switching every component off changes nothing: these matrices do not matter here"
    selective = config.faithfulness.weight == 0
    limits = (SELECTED, SELECTED_FAIL) if selective else (UNMASKED, UNMASKED_FAIL)
    first = Check("unmasked", graded(share, *limits), share, limits[0], data, text)
    left = {r["site"]: r["remainder"] for r in records(evaluation.sites)}
    left = {k: 0.0 if math.isnan(v) else v for k, v in left.items()}  # of a zero matrix: nothing
    worst = max(left, key=lambda k: left[k])
    text = f"largest |Δ|²/|W|² {left[worst]:.3g} at {worst}, median {median(left.values()):.3g}"
    if config.faithfulness.weight == 0:
        text += "; faithfulness was not asked for"
    limits = (1.0, math.inf) if selective else (REMAINDER, REMAINDER_FAIL)
    outcome = graded(left[worst], *limits)
    return [first, Check("remainder", outcome, left[worst], limits[0], f"{len(left)} sites", text)]


# ---- 5: importances -----------------------------------------------------------
def _collapse(objective: Objective, evaluation: Evaluation, data: str) -> Check:
    """Something must be important, and surely so, at most places where it is important at all.

    A matrix that is decomposed whole does something; an update may well do nothing, so silent
    sites of a difference are an answer, and unsure ones count by what they hold of all importance.
    """
    fires = [r for r in records(evaluation.spectrum) if r["frequency"] > 0]
    firm = [r for r in fires if r["firm"] >= FIRM]
    silent = {r["site"] for r in records(evaluation.sites)} - {r["site"] for r in fires}
    weak = {r["site"] for r in fires} - {r["site"] for r in firm}
    text = (
        f"{len(firm)} of {len(fires)} subcomponents that fire have g ≥ 0.9 at most of their firings"
    )
    if silent:
        text += f"; nothing ever fires at {len(silent)} sites, e.g. {min(silent)}"
    if weak and firm:
        text += f"; none is that sure at {len(weak)} sites, e.g. {min(weak)}"
    odd = bool(silent or weak)
    if objective.factors.host.adds_updates:
        total = sum(r["mean_ci"] for r in fires)
        unsure = sum(r["mean_ci"] for r in fires if r["site"] in weak) / max(total, 1e-300)
        odd = unsure > UNSURE
        text += f" ({unsure:.1%} of all importance)" if weak and firm else ""
    outcome: Outcome = "FAIL" if not firm else ("WARN" if odd else "PASS")
    return Check("importance_collapse", outcome, float(len(firm)), 1.0, data, text)


def _density(evaluation: Evaluation, data: str) -> Check:
    """L0 beside the dense count, and beside the rank, which the matrix itself needs."""
    at = evaluation.facts["threshold"]
    rank = {r["site"]: r["rank_bound"] for r in records(evaluation.sites)}
    own = {r["name"]: r for r in records(evaluation.l0, level="site", threshold=at)}
    share = {name: r["l0"] / r["dense"] for name, r in own.items()}
    worst = max(share, key=lambda k: share[k])
    text = (
        f"L0 (g > {at:g}) {evaluation.total_l0():.3g} of {len(evaluation.mean_ci)}; densest site "
        f"{worst} {own[worst]['l0']:.3g} of {own[worst]['dense']} (rank at most {rank[worst]})"
    )
    full = [name for name, r in own.items() if r["l0"] >= DENSE * max(1, rank[name])]
    outcome: Outcome = "WARN" if full else "PASS"
    if share[worst] > DENSE:
        outcome = "FAIL"
        text += ": nearly all components are on nearly always, so none was told apart"
    elif full:
        text += f"; at {len(full)} sites, e.g. {full[0]}, as many are on as the matrix' rank"
    return Check("density", outcome, share[worst], DENSE, data, text)


# ---- 7–9: worst cases, monitors, counts -------------------------------------------------------
def _ladder(evaluation: Evaluation) -> Check:
    own = sorted(records(evaluation.ladder, attack="pgd"), key=lambda r: r["budget"])
    if not own:
        text = "no PGD ladder was run: nothing is known about worst-case masks"
        return Check("ladder", "FAIL", None, HEADLINE, "nothing", text)
    first, text = own[0], ladder_sentence(evaluation.ladder)
    measured = f"{first['n']} positions in {first['n_batches']} batches"
    outcome: Outcome = "PASS"
    if first["n_batches"] < LADDER_BATCHES:
        outcome, text = "WARN", f"fewer than {LADDER_BATCHES} batches; {text}"
    if not first["of_zero"] <= HEADLINE or first["protection"] < 1 - HEADLINE:
        outcome, text = "WARN", f"importances hardly restrain the adversary; {text}"
    return Check("ladder", outcome, first["of_zero"], HEADLINE, measured, text)


def _monitors(config: VPDConfig, history: History) -> Check:
    sources = {str(term.source) for term in config.reconstruction}
    logged = {k.rsplit(".", 1)[1] for r in history for k in r if k.startswith("reconstruction.")}
    bad = sorted((sources | logged) & set(MONITORS))
    text = "reconstruction under CI and rounded masks is a monitor and was not optimised"
    if bad:
        text = f"{bad} was optimised: it is trivially driven to 0 and shows nothing"
    outcome: Outcome = "FAIL" if bad else "PASS"
    return Check("monitors", outcome, float(len(bad)), 0.0, f"{len(sources)} loss terms", text)


def _alive(evaluation: Evaluation, data: str) -> Check:
    by_mean, by_firing = evaluation.alive.counts
    k = len(evaluation.mean_ci)
    text = (
        f"{by_mean} of {k} subcomponents have mean importance above 1e-6, {by_firing} fire at "
        "least once per million positions; both are counts of parts in use, nothing more"
    )
    outcome: Outcome = "PASS" if min(by_mean, by_firing) > 0 else "FAIL"
    if evaluation.facts["n"] < 1_000_000:
        text += " (fewer than a million positions: at least once in the sample)"
    return Check("alive", outcome, float(by_mean), None, data, text)


# ---- 10–15: known answer, baselines, polysemy, wording ----------------------------------------
def _anchor(anchor: Anchor | None) -> Check:
    if anchor is None:
        text = "not run: no known answer was recovered with this code (run_anchor)"
        return Check("anchor", "WARN", None, 0.0, "nothing", text)
    measured = f"{anchor.name}, seed {anchor.seed}, {anchor.n_steps} steps"
    if anchor.code != code_version():
        text = "recorded with another version of the code; run it again"
        return Check("anchor", "WARN", float(anchor.errors), 0.0, measured, text)
    text = (
        f"{anchor.errors} entries of the known importance pattern are wrong at tolerance "
        f"{anchor.tolerance:g}; mean max cosine {anchor.mmcs:.4f}"
    )
    return Check("anchor", graded(anchor.errors, 0, 1), float(anchor.errors), 0.0, measured, text)


def _baselines(evaluation: Evaluation) -> Check:
    """The coordinates' baseline is named but not held against a run: in a toy the input basis *is*
    the answer, and at one site of rank two it is nearly the whole matrix."""
    rows = records(evaluation.baselines)
    if not rows:
        text = "no baseline at matched counts was measured"
        return Check("baselines", "FAIL", None, 1.0, "nothing", text)
    own, *others = rows
    best = min((r for r in others if r["baseline"] != "coordinates"), key=lambda r: r["of_zero"])
    number = own["of_zero"] / best["of_zero"] if best["of_zero"] > 0 else math.inf
    listed = ", ".join(f"{r['baseline']} {r['of_zero']:.3g}" for r in rows)
    text = f"share of the all-zero mask's error at matched counts per site: {listed}"
    outcome: Outcome = "PASS" if number < 1 else "WARN"
    if outcome == "WARN":
        text = f"no better than {best['baseline']} at matched counts; {text}"
    measured = f"{own['n']} positions in {own['n_batches']} batches"
    return Check("baselines", outcome, number, 1.0, measured, text)


def _polysemy(evaluation: Evaluation, data: str) -> Check:
    both = records(evaluation.polysemy)
    flagged = [r for r in both if r["flagged"]]
    text = (
        f"{len(both)} subcomponents fire with both signs, {len(flagged)} of them for two sets of "
        "contexts that hardly overlap"
    )
    if flagged:
        names = ", ".join(f"{r['site']}#{r['component']}" for r in flagged)
        text += f": {names[:LISTED]}; a larger frequency_weight separates two roles in one part"
    outcome: Outcome = "WARN" if flagged else "PASS"
    return Check("polysemy", outcome, float(len(flagged)), 0.0, data, text)


def _wording(checks: Sequence[Check]) -> Check:
    settled = converged(checks)
    bad = [v for c in checks for v in violations(c.sentence, converged=settled)]
    text = "no sentence above claims more than importance on these data up to this budget"
    if bad:
        text = f"{len(bad)} sentences above claim more than was measured"
    outcome: Outcome = "FAIL" if bad else "PASS"
    return Check("wording", outcome, float(len(bad)), 0.0, f"{len(checks)} sentences", guard(text))


__all__ = [
    "Check",
    "check_table",
    "converged",
    "guard",
    "self_checks",
    "stamp",
    "violations",
]
