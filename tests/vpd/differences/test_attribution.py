"""Shares of stages against permutations of models whose weights are written out."""

from __future__ import annotations

from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from difference_problems import Toy, importances_of, toy
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd.differences.attribution import NOTHING, attribute

pytestmark = pytest.mark.quick

THREE = ("sft", "dpo", "rl")


def reverted(problem: Toy, x: Tensor, present: set[str]) -> Tensor:
    """v(S) from matrices that were added up."""
    pair = []
    for side in (0, 1):
        matrix = problem.matrices[0][side].clone()
        for at, stage in enumerate(problem.stages):
            if stage in present:
                matrix += problem.matrices[at + 1][side] - problem.matrices[at][side]
        pair.append(matrix)
    return -problem.error(x, *pair)


def components_only(problem: Toy, x: Tensor, present: set[str]) -> Tensor:
    m, d = importances_of(problem, x), {}
    for name in m:
        if name.partition("@")[2] not in present:
            m[name] = torch.zeros_like(m[name])
        d[name] = torch.zeros(len(x))
    return -problem.masked_error(x, m, d)


def averaged(value, problem: Toy, x: Tensor, stage: str) -> np.ndarray:
    """The mean over all orders of arrival of what `stage` adds when it arrives."""
    gains = []
    for order in permutations(problem.stages):
        before = set(order[: order.index(stage)])
        gains.append(value(problem, x, before | {stage}) - value(problem, x, before))
    return torch.stack(gains).mean(0).numpy()


@pytest.mark.parametrize("stages", [("sft",), ("sft", "dpo"), THREE])
def test_shares_are_the_average_over_orders(stages: tuple[str, ...]) -> None:
    problem = toy(stages)
    x = problem.inputs(6)
    found = attribute(problem.objective, [x[:4], x[4:]], epsilon=0.0, attack_steps=0)
    table: Any = found.per_token
    for stage in stages:
        for prefix, value in (("shapley", reverted), ("components", components_only)):
            expected = averaged(value, problem, x, stage)
            np.testing.assert_allclose(table[f"{prefix}_{stage}"], expected, rtol=1e-9, atol=1e-12)
    everything = -reverted(problem, x, set()).numpy()
    np.testing.assert_allclose(table["kl"], everything, rtol=1e-9)
    whole = table[[f"shapley_{s}" for s in stages]].sum(axis=1)
    np.testing.assert_allclose(whole, everything, rtol=1e-9)  # efficiency
    parts = table[[f"components_{s}" for s in stages]].sum(axis=1)
    gained = components_only(problem, x, set(stages)) - components_only(problem, x, set())
    np.testing.assert_allclose(parts, gained.numpy(), rtol=1e-9, atol=1e-12)
    assert list(table["row"]) == list(range(6)) and table["low_sft"].isna().all()


def test_counts_per_stage_are_of_importances_above_the_threshold() -> None:
    problem = toy(("sft", "dpo"))
    x = problem.inputs(5)
    found = attribute(
        problem.objective, [x], epsilon=0.0, threshold=0.4, attack_steps=0, stages=("sft", "dpo")
    )
    g = importances_of(problem, x)
    for stage in ("sft", "dpo"):
        expected = [
            sum(int((g[f"{m}@{stage}"][i] > 0.4).sum()) for m in ("inner", "outer"))
            for i in range(5)
        ]
        assert found.per_token[f"l0_{stage}"].tolist() == expected
    table: Any = found.per_token
    total = table["l0_sft"] + table["l0_dpo"]
    assert total.tolist() == table["l0"].tolist()
    assert total.nunique() > 1, "one count everywhere would say nothing"


def test_unchanged_tokens_are_owed_to_nothing_and_the_rest_to_the_largest() -> None:
    problem = toy(("sft", "dpo"))
    x = problem.inputs(12)
    kl = -reverted(problem, x, set())
    epsilon = float(kl.median())
    table: Any = attribute(problem.objective, [x], epsilon=epsilon, attack_steps=0).per_token
    for i, row in enumerate(table.to_dict("records")):
        largest = max(("sft", "dpo"), key=lambda s: row[f"shapley_{s}"])
        assert row["owed_to"] == (largest if kl[i] >= epsilon else NOTHING)
        largest = max(("sft", "dpo"), key=lambda s: row[f"components_{s}"])
        recovered = row["components_sft"] + row["components_dpo"]
        assert row["owed_to_components"] == (
            largest if kl[i] >= epsilon and recovered >= epsilon else NOTHING
        )
    assert {"sft", "dpo", NOTHING} == set(table["owed_to"])


def test_the_attack_is_sign_steps_within_the_box() -> None:
    """Both ends of the range, from matrices written out and gradients by differences."""
    problem = toy(("sft", "dpo"))
    x = problem.inputs(3)
    table: Any = attribute(problem.objective, [x], epsilon=0.0, attack_steps=2).per_token
    g = importances_of(problem, x)
    names = list(g)

    def share(stage: str, r: dict[str, Tensor], d: dict[str, Tensor]) -> Tensor:
        def value(present: set[str]) -> Tensor:
            absent = [n for n in names if n.partition("@")[2] not in present]
            if not absent:
                return torch.zeros(len(x), dtype=torch.float64)
            m = {n: (1 - g[n]) * r[n] for n in absent}
            return -problem.masked_error(x, m, {n: d[n] for n in absent})

        (other,) = {"sft", "dpo"} - {stage}
        alone = value({stage}) - value(set())
        return 0.5 * (alone + value({stage, other}) - value({other}))

    def slope(stage: str, r: dict[str, Tensor], d: dict[str, Tensor], leaf: Tensor) -> Tensor:
        found, flat = torch.zeros_like(leaf), leaf.view(-1)
        for i in range(leaf.numel()):
            ends = []
            for step in (1e-6, -2e-6, 1e-6):
                flat[i] += step
                ends.append(float(share(stage, r, d).sum()))
            found.view(-1)[i] = ends[0] - ends[1]
        return found

    for stage in ("sft", "dpo"):
        for sign, column in ((-1, "low"), (1, "high")):
            r = {n: torch.zeros_like(g[n]) for n in names}
            d = {n: torch.zeros(len(x), dtype=torch.float64) for n in names}
            best = sign * share(stage, r, d)
            for _ in range(2):
                moved = [
                    (leaf, sign * slope(stage, r, d, leaf).sign())
                    for leaf in (*r.values(), *d.values())
                ]
                for leaf, direction in moved:
                    leaf.add_(0.25 * direction).clamp_(0, 1)
                best = torch.maximum(best, sign * share(stage, r, d))
            np.testing.assert_allclose(
                table[f"{column}_{stage}"], (sign * best).numpy(), rtol=1e-6, atol=1e-9
            )
        inside = table[f"shapley_{stage}"].between(table[f"low_{stage}"], table[f"high_{stage}"])
        assert inside.all()
        assert (table[f"low_{stage}"] < table[f"shapley_{stage}"] - 1e-3).any()


def test_more_steps_find_a_wider_range() -> None:
    """What was met stays met, even where a later step leads back."""
    problem = toy(("sft", "dpo"), size=1.0)
    x = problem.inputs(12)
    tables: list[Any] = [
        attribute(problem.objective, [x], epsilon=0.0, attack_steps=steps).per_token
        for steps in (1, 2, 4, 8, 16)
    ]
    for fewer, more in pairwise(tables):
        for stage in ("sft", "dpo"):
            assert (more[f"low_{stage}"] <= fewer[f"low_{stage}"] + 1e-12).all()
            assert (more[f"high_{stage}"] >= fewer[f"high_{stage}"] - 1e-12).all()


def test_too_many_stages_are_refused() -> None:
    problem = toy(tuple("abcdefg"))
    with pytest.raises(ConfigError, match="at most 6"):
        attribute(problem.objective, [problem.inputs(2)], epsilon=0.0)
    with pytest.raises(ConfigError, match="all stages with updates"):
        attribute(toy().objective, [problem.inputs(2)], epsilon=0.0, stages=("sft",))


def test_the_summary_counts_tokens_and_weighs_shares() -> None:
    problem = toy(("sft", "dpo"))
    x = problem.inputs(9)
    epsilon = float(-reverted(problem, x, set()).median())
    found = attribute(problem.objective, [x], epsilon=epsilon, attack_steps=0)
    rows: Any = found.summary().set_index("stage")
    table: Any = found.per_token
    assert rows.loc["sft", "owed"] == pytest.approx((table["owed_to"] == "sft").mean())
    assert rows["owed"].sum() == pytest.approx(1)
    share = table["shapley_sft"].sum() / table["kl"].sum()
    assert rows.loc["sft", "share"] == pytest.approx(share)
    assert rows.loc["sft", "share"] + rows.loc["dpo", "share"] == pytest.approx(1)
    assert rows.loc["dpo", "l0"] == pytest.approx(table["l0_dpo"].mean())
    assert rows.loc[NOTHING, "owed_of_changed"] == 0
    assert (rows["n"] == 9).all() and (rows["n_changed"] == 5).all()
    assert "nothing 4" in repr(found)
