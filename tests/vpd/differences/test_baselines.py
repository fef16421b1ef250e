"""Random dimensions of an update's column space."""

from __future__ import annotations

import pytest
import torch
from difference_problems import toy

from mi_weightspace.vpd.differences.baselines import column_space, random_basis

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("linear", [False, True])
def test_all_dimensions_are_the_last_stage_and_none_the_first(linear: bool) -> None:
    problem = toy(linear=linear)
    x = problem.inputs(6)
    names = problem.objective.factors.host.names
    k0 = float(problem.error(x, *problem.matrices[0]).mean())
    value, share, n, units = random_basis(problem.objective, [x], dict.fromkeys(names, 0.0))
    assert value.value == pytest.approx(k0) and share.value == pytest.approx(1) and n == 6
    value, *_ = random_basis(problem.objective, [x[:3], x[3:]], dict.fromkeys(names, 9.0))
    assert value.value == pytest.approx(0, abs=1e-20)
    assert units == 3


def test_counts_are_rounded_up_and_the_law_is_uniform() -> None:
    """The mean over bases, against bases drawn here by another construction."""
    problem = toy(("sft",))
    x = problem.inputs(12)
    names = problem.objective.factors.host.names
    value, *_ = random_basis(problem.objective, [x], dict.fromkeys(names, 1.2), n_bases=400)
    draw = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(400):
        weights = {}
        for name in names:
            change = problem.objective.factors.weights[name]
            # projection on 2 dimensions: of Gaussian combinations of the columns, made isotropic
            space = torch.linalg.qr(change)[0]
            space = space[:, : torch.linalg.matrix_rank(change)]
            a = space @ torch.randn(space.shape[1], 2, generator=draw, dtype=torch.float64)
            weights[name] = a @ torch.linalg.inv(a.T @ a) @ a.T @ change
        errors.append(problem.error(x, *(problem.matrix(s, weights) for s in (0, 1))).mean())
    assert value.value == pytest.approx(float(torch.stack(errors).mean()), rel=0.1)
    assert value.low < value.value < value.high


def test_the_column_space_leaves_out_what_is_not_written() -> None:
    matrix = torch.zeros(5, 4, dtype=torch.float64)
    matrix[1, 0], matrix[3, 2] = 2.0, 1e-3
    found = column_space(matrix)
    assert found.shape == (5, 2)
    assert float(found[[0, 2, 4]].abs().max()) < 1e-12
