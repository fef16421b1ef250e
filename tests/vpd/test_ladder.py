"""PGD against a literal loop, against closed forms, and with a planted defect."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from exact_toy import N, features, language, one_matrix, sentences

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd.ladder import (
    climb,
    first_sources,
    importances,
    ladder,
    ladder_sentence,
    summarise,
)

pytestmark = pytest.mark.quick


def naive_kl(objective, ids, g, r, d):
    """KL(host ‖ masked), Δ materialised, from the parts."""
    module, parts = objective.factors.host.module, objective.factors
    x = module.table[ids]
    at, hidden = 0, []
    for i, (name, linear) in enumerate((("one", module.one), ("two", module.two))):
        w, v, u = linear.weight.T, parts.reads[name].T, parts.writes[name]
        c = u.shape[0]
        m = g[..., at : at + c] + (1 - g[..., at : at + c]) * r[at : at + c]
        x = ((x @ v) * m) @ u + d[i] * (x @ (w - v @ u))
        x = x + linear.bias if linear.bias is not None else x
        hidden.append(x)
        x = torch.tanh(x)
        at += c
    log_p = torch.log_softmax(module(ids), -1)
    log_q = torch.log_softmax(hidden[-1], -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def test_climb_is_the_literal_loop() -> None:
    objective, ids = language(), sentences()
    clean = objective.factors.host.clean(ids)
    g = importances(objective, clean)
    start = first_sources(objective, 0, 0, 0)
    found = climb(objective, clean, g, start, budgets=(1, 7, 20))
    r, d = start
    assert float(r.min()) >= 0 and float(r.max()) <= 1 and r.shape == (10,) and d.shape == (2,)
    for step in range(20):
        r, d = r.detach().requires_grad_(), d.detach().requires_grad_()
        naive_kl(objective, ids, g, r, d).backward()
        r, d = ((s + 0.1 * s.grad.sign()).clamp(0, 1) for s in (r, d))  # pyright: ignore
        if step + 1 in found:
            expected = naive_kl(objective, ids, g, r, d).item()
            assert found[step + 1] == pytest.approx(expected, rel=1e-9)
    assert found[20] > float(naive_kl(objective, ids, g, *start))


def test_one_trajectory_serves_all_budgets() -> None:
    """Bit for bit what separate runs from the same start give."""
    objective, ids = language(seed=1), sentences(seed=1)
    clean = objective.factors.host.clean(ids)
    g, start = importances(objective, clean), first_sources(objective, 5, 0, 0)
    together = climb(objective, clean, g, start, budgets=(3, 10, 30))
    apart = {k: climb(objective, clean, g, start, budgets=(k,))[k] for k in (3, 10, 30)}
    assert together == apart and len(set(apart.values())) == 3


def test_importances_that_pin_every_needed_part_leave_nothing_to_attack() -> None:
    """Parts sum to the matrix and are important wherever they are used: the error stays 0. Without
    importances the adversary gets the whole all-zero error, the maximum of a convex sum."""
    frame = ladder(
        one_matrix(), [features(seed=i) for i in range(5)], budgets=(20, 40), progress=False
    )
    own, free = (frame[frame["attack"] == a] for a in ("pgd", "pgd_free"))
    assert own["loss"].max() < 1e-25
    assert np.allclose(free["loss"], free["zero"], rtol=1e-12)
    table = summarise(frame)
    first = table[(table["attack"] == "pgd") & (table["budget"] == 20)].iloc[0]
    assert first["protection"] == pytest.approx(1) and first["of_zero"] < 1e-20


def test_one_missed_importance_costs_exactly_that_feature() -> None:
    """Feature 2 wrongly unimportant: PGD finds its energy, Σ x₂² / (n·N), and no more."""

    def wrong(clean):
        z = (clean.batch != 0).double() * 2
        z[:, 2] = -1
        return z

    x = features(seed=4)
    frame = ladder(one_matrix(wrong), [x], budgets=(20,), free_budgets=(), progress=False)
    assert frame["loss"].iloc[0] == pytest.approx(float(x[:, 2].square().sum()) / (len(x) * N))
    assert set(frame["attack"]) == {"pgd"}


def test_the_remainder_is_attacked_too() -> None:
    """Half of a part lies in Δ: masks all on, the remainder's source alone makes the error."""

    def halve(reads, writes):
        del reads
        writes[0] *= 0.5

    x = features(seed=2)
    objective = one_matrix(lambda c: torch.ones(len(c.batch), N).double(), change=halve)
    frame = ladder(objective, [x], budgets=(20,), free_budgets=(), progress=False)
    assert frame["loss"].iloc[0] == pytest.approx(
        float((0.5 * x[:, 0]).square().sum()) / (len(x) * N)
    )


def test_starts_are_fixed_by_seed_batch_and_init() -> None:
    objective = language()
    again = first_sources(objective, 0, 1, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(first_sources(objective, 0, 1, 2), again, strict=True)
    )
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(first_sources(objective, *other)[0], again[0])


def test_summary_is_median_over_batches_of_means_over_starts() -> None:
    runs = pd.DataFrame(
        [
            {"attack": "pgd", "budget": 20, "batch": b, "init": i, "loss": v, "zero": z, "n": 10}
            for b, z, losses in ((0, 2.0, (1, 3)), (1, 4.0, (5, 5)), (2, 9.0, (0, 2)))
            for i, v in enumerate(losses)
        ]
    ).assign(step_size=0.1)
    row = summarise(runs).iloc[0]
    assert (row["median"], row["low"], row["high"], row["zero"]) == (2, 1, 5, 4)
    assert (row["n"], row["n_batches"], row["n_inits"]) == (30, 3, 2)
    assert np.isnan(row["protection"]) and row["of_zero"] == 0.5


def test_the_sentence_has_budget_shape_range_and_ceilings() -> None:
    frame = ladder(language(), [sentences(seed=i) for i in range(3)], budgets=(20, 40), n_inits=3,
                   progress=False)  # fmt: skip
    text = ladder_sentence(summarise(frame))
    for piece in ("20 steps", "40 steps", "shared over batch", "3 batches × 3 starts", "all-zero",
                  "without importances", "[range]"):  # fmt: skip
        assert piece in text
    assert ladder_sentence(summarise(frame)[:0]) == "PGD: not run"


@pytest.mark.parametrize("bad", [{"budgets": ()}, {"budgets": (0, 20)}, {"n_inits": 0}])
def test_meaningless_ladders_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="PGD ladder"):
        ladder(language(), [sentences()], progress=False, **bad)
    with pytest.raises(ConfigError, match="0 batches"):
        ladder(language(), [], progress=False)
