"""Each check passes where it holds by construction, and fails where a defect is planted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from exact_toy import N, features, language, one_matrix, scored, sentences
from scipy.stats import linregress

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd import selfchecks_anchor
from mi_weightspace.vpd.evaluate import Evaluation, evaluate
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.selfchecks import (
    Check,
    check_table,
    converged,
    guard,
    self_checks,
    stamp,
    violations,
)
from mi_weightspace.vpd.selfchecks_anchor import Anchor, code_version, engine_files
from mi_weightspace.vpd.selfchecks_history import drift, end_drift, largest_rise

pytestmark = pytest.mark.quick
NAMES = [
    "host_identity", "coverage", "unmasked", "remainder", "history", "anneal", "drift_l0",
    "drift_adversary", "importance_collapse", "density", "gradients_importance",
    "gradients_components", "ladder", "monitors", "alive", "anchor", "baselines", "polysemy",
    "wording",
]  # fmt: skip


def settled(n: int = 200, noise: float = 0.02, seed: int = 0, **changes: Any) -> list[dict]:
    """A log of 1000 steps that falls and then stands; `changes`: key -> function of progress."""
    draw = np.random.default_rng(seed)
    records = []
    for i in range(n):
        at = i / (n - 1)
        base = {
            "total": 1 + 10 * math.exp(-10 * at),
            "reconstruction.1.persistent": 0.1 + 3 * math.exp(-20 * at),
            "l0": 4 + 30 * math.exp(-20 * at),
            "grad_importance": 0.2 + math.exp(-20 * at),
            "grad_components": 0.3 + math.exp(-20 * at),
        }
        base |= {k: f(at) for k, f in changes.items()}
        noisy = {k: v * (1 + noise * draw.standard_normal()) for k, v in base.items()}
        records.append({"step": round(at * 999), **noisy})
    return records


@pytest.fixture(scope="module")
def exact() -> tuple[Objective, Evaluation]:
    objective = one_matrix()
    return objective, scored(objective)


def found(
    pair: tuple[Objective, Evaluation], history: list[dict] | None = None, **options: Any
) -> dict[str, Check]:
    checks = self_checks(pair[0], settled() if history is None else history, pair[1], **options)
    assert [c.name for c in checks] == NAMES
    for check in checks:
        assert check.sentence and check.measured_on and check.outcome in str(check)
    return {c.name: c for c in checks}


def judged(objective: Objective, **options: Any) -> dict[str, Check]:
    return found((objective, scored(objective, **options)))


def anchor(errors: int = 0, code: str | None = None) -> Anchor:
    return Anchor("toy", errors, 1.0, 0.1, 0, 10, 1.0, code_version() if code is None else code)


def test_an_exact_decomposition_with_a_settled_run_passes_everything(exact: Any) -> None:
    checks = found(exact, anchor=anchor())
    assert {n: c.outcome for n, c in checks.items() if c.outcome != "PASS"} == {}
    assert converged(list(checks.values())) and stamp(list(checks.values())) is None
    frame = check_table(list(checks.values()))
    assert list(frame["name"]) == NAMES and frame["number"].dtype == float
    assert checks["host_identity"].number == 0 and checks["alive"].number == N


# ---- 1–3 --------------------------------------------------------------------------------------
def test_a_host_that_is_not_reproduced_fails(exact: Any) -> None:
    for gap, outcome in ((1e-7, "WARN"), (1e-2, "FAIL"), (math.nan, "FAIL")):
        facts = {**exact[1].facts, "identity": gap}
        changed = dataclasses.replace(exact[1], facts=facts)
        assert found((exact[0], changed))["host_identity"].outcome == outcome


def test_capacity_below_the_rank_fails() -> None:
    check = judged(one_matrix(count=4))["coverage"]
    assert check.outcome == "FAIL" and check.number == 1
    assert "cannot be parameter-faithful" in check.sentence and "first (4 of 6)" in check.sentence


def test_a_wrong_part_fails_unmasked_and_remainder() -> None:
    def broken(reads, writes):
        del reads
        writes[1] = 0

    checks = judged(one_matrix(change=broken))
    assert checks["unmasked"].outcome == checks["remainder"].outcome == "FAIL"
    assert checks["remainder"].number == pytest.approx(1 / N)
    assert checks["host_identity"].outcome == "PASS"


def test_matrices_that_do_not_matter_are_said_not_to() -> None:
    objective = one_matrix()
    silent = evaluate(objective, [torch.zeros(8, N).double()] * 5, budgets=(1,), progress=False)
    check = found((objective, silent))["unmasked"]
    assert check.outcome == "FAIL" and "do not matter" in check.sentence


# ---- 4, 6: histories ---------------------------------------------------------------------------
def test_drift_is_a_least_squares_line() -> None:
    draw = np.random.default_rng(1)
    x = np.linspace(0, 1, 30)
    y = 2 + 0.4 * x + 0.1 * draw.standard_normal(30)
    ours, theirs = drift(x, y), linregress(x, y)
    assert ours.change == pytest.approx(theirs.slope) and ours.level == pytest.approx(y.mean())
    assert ours.half == pytest.approx(theirs.stderr * 2.0484, rel=1e-4)  # t, 28 degrees
    records = [{"step": s, "l0": v} for s, v in zip(range(0, 300, 10), y, strict=True)]
    assert end_drift(records, "l0", 291) is None  # two records in the last tenth
    assert end_drift(records, "l0", 1) is not None


@pytest.mark.parametrize("key", ["l0", "reconstruction.1.persistent"])
@pytest.mark.parametrize(
    ("shape", "outcome"),
    [
        (lambda at: 1.0, "PASS"),
        (lambda at: 1.0 - at, "FAIL"),  # still falling
        (lambda at: 1.0 + 50 * max(0.0, at - 0.9), "FAIL"),  # rising at the end
        (lambda at: 1.0 + 5 * max(0.0, 0.8 - at), "PASS"),  # fell long before
    ],
)
def test_only_what_stands_still_is_converged(
    exact: Any, key: str, shape: Any, outcome: str
) -> None:
    checks = found(exact, settled(**{key: shape}))
    name = "drift_l0" if key == "l0" else "drift_adversary"
    assert checks[name].outcome == outcome
    assert converged(list(checks.values())) == (outcome == "PASS")
    assert stamp(list(checks.values())) == (None if outcome == "PASS" else "unconverged")


def test_noise_that_hides_the_drift_is_not_convergence(exact: Any) -> None:
    checks = found(exact, settled(noise=0.6, seed=3))
    assert checks["drift_l0"].outcome == "WARN" and not converged(list(checks.values()))


def test_drifts_below_a_thousandth_of_the_behaviour_do_not_matter(exact: Any) -> None:
    tiny = 1e-4 * exact[1].masking("zero")
    checks = found(exact, settled(**{"reconstruction.1.persistent": lambda at: tiny * (2 - at)}))
    assert checks["drift_adversary"].outcome == "PASS"


@pytest.mark.parametrize(
    ("history", "name", "words"),
    [
        (settled()[:150], "history", "stopped at step 748 of 1000"),
        ([], "history", "stopped"),
        (settled(total=lambda at: math.nan if at > 0.5 else 1.0), "history", "not finite"),
        (settled(n=20), "drift_l0", "cannot be told"),
        ([{"step": r["step"], "l0": r["l0"]} for r in settled()], "drift_adversary", "no advers"),
    ],
)
def test_runs_that_cannot_be_called_converged(
    exact: Any, history: list, name: str, words: str
) -> None:
    checks = found(exact, history)
    assert checks[name].outcome in ("WARN", "FAIL") and words in checks[name].sentence
    assert not converged(list(checks.values()))


@pytest.mark.parametrize(
    ("minimality", "outcome"),
    [
        ({"anneal_until": 0.9}, "PASS"),
        ({"anneal_until": 1.0}, "FAIL"),
        ({"anneal_until": 1.0, "gamma": (0.1, 0.1)}, "PASS"),
        ({"form": "lp", "anneal_until": 1.0}, "FAIL"),
        ({"form": "lp", "anneal_until": 0.95}, "PASS"),
    ],
)
def test_the_anneal_must_have_stood_at_its_end(minimality: dict, outcome: str, exact: Any) -> None:
    check = found((one_matrix(minimality=minimality), exact[1]))["anneal"]
    assert check.outcome == outcome
    assert check.sentence.startswith("p " if minimality.get("form") == "lp" else "γ ")


def test_a_late_rise_of_the_gradient_is_seen_though_the_loss_hides_it(exact: Any) -> None:
    """The signature of the divergence: norm 0.2 → 50 at 80 % of the run; the total barely moves."""

    def late(at: float) -> float:
        return 0.2 if at < 0.8 else 50.0

    checks = found(exact, settled(grad_importance=late))
    assert checks["gradients_importance"].outcome == "FAIL"
    assert checks["gradients_importance"].number == pytest.approx(250, rel=0.1)
    assert checks["gradients_components"].outcome == "PASS"
    assert found(exact, settled(grad_components=late))["gradients_components"].outcome == "WARN"
    spike = settled(grad_importance=lambda at: 30.0 if 0.5 < at < 0.506 else 0.2)
    assert found(exact, spike)["gradients_importance"].outcome == "PASS"  # one record is no rise
    assert found(exact, settled(n=15))["gradients_importance"].outcome == "WARN"
    assert largest_rise(np.r_[np.full(100, 5.0), np.nan]) == math.inf
    assert largest_rise(np.linspace(9, 1, 100)) == 1  # falling all the way
    slow = largest_rise(np.repeat(2.0 ** np.arange(10), 10))  # no step above twofold
    assert slow == 2.0**8


# ---- 5, 9: importances -------------------------------------------------------------------------
def test_importances_that_are_on_everywhere_are_dense() -> None:
    check = judged(one_matrix(lambda c: torch.ones(len(c.batch), N).double()))["density"]
    assert check.outcome == "FAIL" and check.number == 1


def test_as_many_on_as_the_rank_is_a_warning() -> None:
    """Twice as many parts as the rank, half of them always on: the matrix itself is no larger."""

    def half(clean):
        return torch.tensor([1.0] * N + [0.0] * N).double().repeat(len(clean.batch), 1)

    objective = one_matrix(half)
    factors = objective.factors
    doubled = [
        {n: torch.cat([v, torch.zeros_like(v)]) for n, v in part.items()}
        for part in (factors.reads, factors.writes)
    ]
    from mi_weightspace.vpd.factors import Factors

    objective = Objective(Factors(factors.host, *doubled), objective.importance, objective.config)
    check = judged(objective)["density"]
    assert check.outcome == "WARN" and check.number == 0.5 and "rank" in check.sentence


def test_collapsed_and_dead_importances_fail() -> None:
    faint = judged(one_matrix(lambda c: 0.3 * (c.batch != 0).double()))
    assert faint["importance_collapse"].outcome == "FAIL" and faint["alive"].outcome == "PASS"
    dead = judged(one_matrix(lambda c: -torch.ones(len(c.batch), N).double()))
    assert dead["importance_collapse"].outcome == dead["alive"].outcome == "FAIL"
    assert "nothing ever fires at 1 sites" in dead["importance_collapse"].sentence
    assert "mechanism" not in dead["alive"].sentence


# ---- 7, 8 --------------------------------------------------------------------------------------
def test_the_ladder_must_be_there_with_five_batches_and_restrain_the_adversary(exact: Any) -> None:
    none = dataclasses.replace(exact[1], ladder=exact[1].ladder[:0])
    assert found((exact[0], none))["ladder"].outcome == "FAIL"
    few = scored(exact[0], n_pgd_batches=4)
    check = found((exact[0], few))["ladder"]
    assert check.outcome == "WARN" and "fewer than 5 batches" in check.sentence
    weak = judged(one_matrix(lambda c: -torch.ones(len(c.batch), N).double()))["ladder"]
    assert weak.outcome == "WARN" and weak.number == pytest.approx(1)
    passed = found(exact)["ladder"]
    assert "20 steps" in passed.sentence and "5 batches" in passed.measured_on


def test_optimised_monitors_fail(exact: Any) -> None:
    for name in ("ci", "rounded"):
        history = [{**r, f"reconstruction.2.{name}": 0.1} for r in settled()]
        check = found(exact, history)["monitors"]
        assert check.outcome == "FAIL" and check.number == 1 and name in check.sentence


# ---- 10, 11, 13, 15 ----------------------------------------------------------------------------
def test_the_anchor_must_be_run_right_and_of_this_code(exact: Any) -> None:
    outcomes = {
        None: "WARN",
        anchor(0): "PASS",
        anchor(1): "WARN",
        anchor(2): "FAIL",
        anchor(0, code="older"): "WARN",
    }
    for given, outcome in outcomes.items():
        assert found(exact, anchor=given)["anchor"].outcome == outcome
    assert "not run" in found(exact)["anchor"].sentence


def test_code_version_follows_the_engine_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    names = {p.stem for p in engine_files()}
    assert names >= {"train", "objective", "losses", "sources", "masked", "factors", "importance"}
    assert not names & {"evaluate", "selfchecks", "ladder", "decomposition", "truth"}
    copies = []
    for path in engine_files():
        copies.append(tmp_path / path.name)
        copies[-1].write_bytes(path.read_bytes())
    before = code_version()
    monkeypatch.setattr(selfchecks_anchor, "engine_files", lambda: copies)
    assert code_version() == before
    copies[0].write_text(copies[0].read_text() + "\n")
    assert code_version() != before


def test_a_baseline_that_is_as_good_is_a_warning(exact: Any) -> None:
    assert found(exact)["baselines"].outcome == "PASS"
    always = judged(one_matrix(lambda c: torch.ones(len(c.batch), N).double()))["baselines"]
    assert always.outcome == "WARN"  # all on: the SVD of full rank does the same
    frame = exact[1].baselines.copy()
    frame.loc[frame["baseline"] == "static", "of_zero"] = 0.0
    check = found((exact[0], dataclasses.replace(exact[1], baselines=frame)))["baselines"]
    assert check.outcome == "WARN" and "no better than static" in check.sentence
    none = dataclasses.replace(exact[1], baselines=exact[1].baselines[:0])
    assert found((exact[0], none))["baselines"].outcome == "FAIL"


def test_a_part_with_two_roles_is_a_warning() -> None:
    """Part 0 reads x₀ − x₁, written along the mean of their columns' difference."""

    def merged(reads, writes):
        reads[0, 1], writes[1] = -1, 0

    def answer(clean):
        z = (clean.batch != 0).double() * 2
        z[:, 0] = torch.maximum(z[:, 0], z[:, 1])
        return z

    objective = one_matrix(answer, change=merged)
    batches = [features(1500, seed=i, p=0.04) for i in range(5)]
    evaluation = evaluate(objective, batches, budgets=(1,), progress=False)
    check = found((objective, evaluation))["polysemy"]
    assert check.outcome == "WARN" and "first#0" in check.sentence
    assert check.number == 1


def test_all_sentences_of_a_random_decomposition_pass_the_guard() -> None:
    objective = language()
    evaluation = evaluate(
        objective, [sentences(seed=i) for i in range(5)], budgets=(2,), progress=False
    )
    for history in (settled(), settled()[:50], []):
        assert found((objective, evaluation), history)["wording"].outcome == "PASS"


@pytest.mark.parametrize(
    "text",
    [
        "Component 3 is the mechanism of greeting.",
        "these are the mechanisms",
        "it IS  the\ncausal mechanism",
        "The model has 12 mechanisms",
        "has 3,709 distinct mechanisms",
        "found several mechanisms",
        "there is no structure here",
    ],
)
def test_the_guard_refuses_what_cannot_be_shown(text: str) -> None:
    assert violations(text)
    with pytest.raises(ConfigError, match="wording"):
        guard(text)


@pytest.mark.parametrize(
    "text",
    [
        "causally important on this distribution up to this budget",
        "counts of components are not numbers of mechanisms",
        "3 components; a mechanism may need several of them",
        "this is not the mechanism, only a part that matters here",
        "the structure of the toy; no structural break",
    ],
)
def test_the_guard_lets_careful_words_pass(text: str) -> None:
    assert guard(text) == text


def test_sparsity_is_claimed_of_converged_runs_only() -> None:
    assert guard("a sparse decomposition") and violations("sparse", converged=False) == ["sparse"]
    with pytest.raises(ConfigError, match="converged"):
        guard("a sparse decomposition", converged=False)
