"""Partial reversions against matrices written out; compensating changes told from others."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from difference_problems import COUNT, D_HIDDEN, D_IN, D_OUT, Toy, toy
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.differences.diagnostics import (
    Compensation,
    compensation,
    diagnose,
    reversions,
    whole_matrices,
)
from mi_weightspace.vpd.evaluate_stats import records

pytestmark = pytest.mark.quick


def partly(problem: Toy, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """Row i with update n at t[n][i] of itself; updates not named are whole."""
    found = []
    for i in range(len(x)):
        pair = []
        for side, matrix in enumerate(("inner", "outer")):
            whole = {}
            for at, stage in enumerate(problem.stages):
                name = f"{matrix}@{stage}"
                if name in t:
                    change = problem.matrices[at + 1][side] - problem.matrices[at][side]
                    whole[name] = t[name][i] * change
            pair.append(problem.matrix(side, whole))
        found.append(problem.error(x[i : i + 1], *pair))
    return torch.cat(found)


def constant(names: list[str], value: float, rows: int) -> dict[str, Tensor]:
    return {name: torch.full((rows,), value, dtype=torch.float64) for name in names}


def test_single_updates_alone_on_and_off() -> None:
    problem = toy()
    x = problem.inputs(6)
    names = list(problem.objective.factors.host.names)
    found = reversions(problem.objective, [x[:3], x[3:]], n_draws=1)
    every = partly(problem, x, constant(names, 0.0, 6))
    np.testing.assert_allclose(found.all_off[:, 0], every, rtol=1e-9)
    stages = {name: name.partition("@")[2] for name in names}
    epsilon, k0 = float(every.median()) * 1.001, 2.0
    table = whole_matrices({"behaviour": found}, stages, k0, epsilon)
    for name in names:
        off = partly(problem, x, constant([name], 0.0, 6))
        on = partly(problem, x, constant([n for n in names if n != name], 0.0, 6))
        np.testing.assert_allclose(found.alone_off[name][:, 0], off, rtol=1e-9)
        np.testing.assert_allclose(found.alone_on[name][:, 0], on, rtol=1e-9)
        for alone, errors in (("off", off), ("on", on)):
            for stream, kept in (
                ("behaviour", every >= 0),
                ("unchanged", every < epsilon),
                ("changed", every >= epsilon),
            ):
                (row,) = records(table, stream=stream, site=name, alone=alone)
                value = float(errors[kept].mean())
                assert row["value"] == pytest.approx(value)
                assert row["of_behaviour"] == pytest.approx(value / k0)
                assert row["of_own"] == pytest.approx(value / float(every[kept].mean()))
                assert row["n"] == int(kept.sum()) and row["stage"] == stages[name]
                assert row["low"] < row["value"] < row["high"]
    diagnosis = diagnose({"behaviour": found}, k0, epsilon)
    (row,) = records(diagnosis, stream="unchanged", quantity="R_single")
    quiet = every < epsilon
    singles = {n: float(found.alone_off[n][quiet, 0].mean()) for n in names}
    assert row["site"] == max(singles, key=lambda n: singles[n])
    assert row["value"] == pytest.approx(max(singles.values()))
    assert row["share"] == pytest.approx(0.5)


def test_random_reversions_have_the_mean_of_their_law() -> None:
    """Means over many draws, against draws of this test's own."""
    problem = toy(size=1.0, spread=0.8, seed=6)
    x = problem.inputs(3).repeat(40, 1)
    names = list(problem.objective.factors.host.names)
    found = reversions(problem.objective, [x], n_draws=40)
    draw = torch.Generator().manual_seed(0)
    means: dict[str, list[Tensor]] = {"R_path": [], "R_site": [], "R_box": []}
    for _ in range(20):

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=draw, dtype=torch.float64)

        t = uniform(len(x))
        means["R_path"].append(partly(problem, x, dict.fromkeys(names, t)))
        means["R_site"].append(partly(problem, x, {n: uniform(len(x)) for n in names}))
        m = {n: uniform(len(x), COUNT) for n in names}
        d = {n: uniform(len(x)) for n in names}
        means["R_box"].append(problem.masked_error(x, m, d))
    expected = {kind: float(torch.stack(v).mean()) for kind, v in means.items()}
    for kind, value in expected.items():
        assert float(found.random[kind].mean()) == pytest.approx(value, rel=0.06), kind
    sizes = sorted(expected.values())
    assert all(b > 1.2 * a for a, b in pairwise(sizes)), "laws too close to be told apart"


@pytest.mark.parametrize("kind", ["R_path", "R_site", "R_box"])
def test_a_row_is_one_model(kind: str) -> None:
    problem = toy()
    x = problem.inputs(1)[None].repeat(4, 3, 1)  # one input at every position of every row
    found = reversions(problem.objective, [x], n_draws=2).random[kind]
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found[:, 1:], found[:, :1].expand(4, 2), rtol=1e-9)
    assert len(set(found[:, 0].tolist())) == 4, "rows are drawn apart"


def planted(strength: float) -> Toy:
    """A linear path whose first input carries something new; the others' path is scaled up in one
    matrix and down in the other (1: left as it was)."""
    draw = generator(0, "compensation")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inner, outer = random(D_HIDDEN, D_IN), random(D_OUT, D_HIDDEN)
    inner[1:, 0] = 0.0  # the first input alone reaches the first hidden unit, and no other
    inner[0, 1:] = 0.0
    new = outer.clone()
    new[:, 0] += 1.0
    mixing = torch.eye(D_HIDDEN, dtype=torch.float64)
    mixing[1:, 1:] *= strength
    tuned = mixing @ inner, new @ torch.linalg.inv(mixing)
    return toy(("sft",), linear=True, matrices=[(inner, outer), tuned])


def diagnosed(problem: Toy) -> Compensation:
    behaviour = problem.inputs(40)
    broad = problem.inputs(40, 1)
    broad[:, 0] = 0.0
    found = {
        name: reversions(problem.objective, [x]) for name, x in (("a", behaviour), ("b", broad))
    }
    k0 = float(problem.error(behaviour, *problem.matrices[0]).mean())
    return compensation(diagnose(found, k0, 0.05 * k0))


def test_compensating_changes_are_told() -> None:
    found = diagnosed(planted(2.0))
    assert found.told and found.site.partition("@")[0] in {"inner", "outer"}
    assert found.all_off < 0.02 and found.single > 0.5
    assert "reverting one is not" in str(found) and found.site in str(found)


def test_a_change_that_compensates_nothing_is_not_told() -> None:
    found = diagnosed(planted(1.0))
    assert found.told is False
    assert str(found).startswith("No sign of compensating changes")


def test_compensation_too_small_to_matter_is_not_told() -> None:
    found = diagnosed(planted(1.1))
    assert 10 * found.all_off < found.single_low < found.single < 0.1
    assert found.told is False


def test_effects_that_cancel_by_chance_are_not_told() -> None:
    """Two independent changes of one number: on some inputs they cancel, and those inputs are the
    unchanged ones; they are too few."""
    draw = generator(1, "chance")
    inner = torch.eye(D_IN, dtype=torch.float64)
    outer = torch.randn(1, D_IN, generator=draw, dtype=torch.float64)
    change = 0.2 * torch.randn(D_IN, D_IN, generator=draw, dtype=torch.float64)
    pushed = outer + (outer @ change).norm() * torch.nn.functional.normalize(
        torch.randn(1, D_IN, generator=draw, dtype=torch.float64)
    )
    problem = toy(("sft",), linear=True, matrices=[(inner, outer), (inner + change, pushed)])
    x = problem.inputs(400)
    k0 = float(problem.error(x, *problem.matrices[0]).mean())
    found = compensation(diagnose({"a": reversions(problem.objective, [x])}, k0, 0.05 * k0))
    assert found.single_low > 10 * found.all_off, "they do cancel on the positions chosen"
    assert found.told is None and "give broad text" in str(found)


@pytest.mark.parametrize(
    ("low", "share", "told"), [(0.2, 0.5, True), (0.05, 0.5, False), (0.2, 0.2, None)]
)
def test_it_is_told_from_the_lower_end_of_the_interval(
    low: float, share: float, told: bool | None
) -> None:
    import pandas as pd

    rows = [
        {"stream": "unchanged", "quantity": name, "site": "a@s", "share": share, **numbers}
        for name, numbers in (
            ("all_off", {"of_behaviour": 0.004, "of_behaviour_low": 0.003}),
            ("R_single", {"of_behaviour": 0.5, "of_behaviour_low": low}),
        )
    ]
    assert compensation(pd.DataFrame(rows)).told is told
