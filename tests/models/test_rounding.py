"""Rounding facts against simulations in which the true change is known."""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.rounding import (
    RoundingFacts,
    dither_energy,
    flip_signs,
    grid_dtype,
    judge,
    l1_size,
    noise_energy,
    spacing,
    threshold,
)
from mi_weightspace.spectral.dense import Dense
from mi_weightspace.spectral.krylov import top_value

pytestmark = pytest.mark.quick

M, N = 384, 768
Case = Literal["both", "one"]
BFLOAT16 = torch.bfloat16
SMALL = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 4.8e-3)
LARGE = (2.1e-2, 5e-2)


@cache
def weights() -> Tensor:
    return 0.02 * torch.randn(M, N, generator=generator(0, "weights")).double()


@cache
def change(rank: int) -> Tensor:
    """Unit Frobenius norm; rank 0 is dense Gaussian."""
    draw = generator(rank, "change")
    if rank == 0:
        made = torch.randn(M, N, generator=draw).double()
    else:
        left = torch.randn(M, rank, generator=draw).double()
        made = left @ torch.randn(rank, N, generator=draw).double()
    return made / made.norm()


def stored(
    relative: float, case: Case, rank: int, dtype: torch.dtype = BFLOAT16
) -> tuple[Tensor, Tensor, Tensor]:
    """(before, after, true change), rounded from masters or onto the first one's grid."""
    master = weights()
    d = relative * master.norm() * change(rank)
    before = master.to(dtype)
    after = (master + d if case == "both" else before.double() + d).to(dtype)
    return before, after, d


def judged(before: Tensor, after: Tensor) -> RoundingFacts:
    d = after.float() - before.float()
    null = d.clone()
    flip_signs(null, seed=0, name="test")
    draw = generator(0, "edge")
    return judge(
        before,
        after,
        fro=float(d.norm()),
        before_fro=float(before.float().norm()),
        mean_absolute=float(d.abs().mean()),
        top=top_value(Dense(d), generator=draw),
        null_edge=top_value(Dense(null), generator=draw),
    )


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("case", ["both", "one"])
@pytest.mark.parametrize("relative", SMALL)
def test_small_changes_are_flagged(relative: float, case: Case, rank: int) -> None:
    before, after, _ = stored(relative, case, rank)
    facts = judged(before, after)
    assert facts.dtype == "bfloat16"
    assert facts.flag != "none"


@pytest.mark.parametrize("rank", [0, 1, 8])
@pytest.mark.parametrize("case", ["both", "one"])
@pytest.mark.parametrize("relative", LARGE)
def test_large_changes_are_not_flagged(relative: float, case: Case, rank: int) -> None:
    assert judged(*stored(relative, case, rank)[:2]).flag == "none"


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("relative", [1e-3, 1e-2])
def test_float32_is_not_flagged(relative: float, rank: int) -> None:
    facts = judged(*stored(relative, "both", rank, torch.float32)[:2])
    assert facts.flag == "none"
    assert facts.dtype == "float32"


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("relative", [1e-4, 1e-3, 3e-3, 1e-2])
def test_l1_size_is_right_below_the_floor(relative: float, rank: int) -> None:
    before, after, d = stored(relative, "both", rank)
    facts = judged(before, after)
    assert facts.l1_size == pytest.approx(float(d.norm()), rel=0.06)
    inflated = float((after.float() - before.float()).norm() / d.norm())
    if relative <= 1e-3:
        assert inflated > 1.5  # the Frobenius norm is not


def test_l1_size_where_one_entry_in_a_thousand_moved() -> None:
    draw = generator(4, "l1")
    master = 0.02 * torch.randn(1536, 2048, generator=draw)
    d = 2e-7 * torch.randn(1536, 2048, generator=draw)
    stored_d = (master + d).to(BFLOAT16).float() - master.to(BFLOAT16).float()
    assert 1e-4 < float((stored_d != 0).double().mean()) < 1e-2
    size = l1_size(float(stored_d.abs().mean()), 1536, 2048)
    assert size == pytest.approx(float(d.norm()), rel=0.06)
    assert float(stored_d.norm() / d.norm()) > 10


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("relative", [1e-5, 1e-4, 1e-3, 1e-2])
def test_expected_noise_is_the_noise(relative: float, rank: int) -> None:
    before, after, d = stored(relative, "both", rank)
    truth = float(((after.double() - before.double()) - d).square().mean())
    assert noise_energy(before, after, BFLOAT16) == pytest.approx(truth, rel=0.15)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


@pytest.mark.parametrize("rank", [0, 1, 8])
@pytest.mark.parametrize("relative", [5e-5, 1e-4, 2e-4, 3e-4, 1e-3])
def test_red_exactly_below_the_simulated_edge(relative: float, rank: int) -> None:
    """The edge: s₁ of what rounding added, known here because the true change is."""
    before, after, d = stored(relative, "both", rank)
    difference = after.double() - before.double()
    edge = top(difference - d)
    facts = judged(before, after)
    if facts.flag == "red":
        assert top(difference) < 1.06 * edge
    else:
        assert top(difference) > edge
    if relative <= 2e-4:  # beyond, a low-rank change shapes the null edge
        assert facts.floor == pytest.approx(edge, rel=0.05)


@pytest.mark.parametrize("case", ["both", "one"])
def test_nothing_readable_is_red(case: Case) -> None:
    assert judged(*stored(5e-7, case, 8)[:2]).flag == "red"
    tiny = weights().to(BFLOAT16)
    moved = tiny.clone()
    moved[3, 5] = moved[3, 5] * (1 + 2**-7)
    d = moved.float() - tiny.float()
    size = float(d.norm())
    assert size / float(tiny.float().norm()) < 3e-5
    facts = judge(
        tiny,
        moved,
        fro=size,
        before_fro=float(tiny.float().norm()),
        mean_absolute=float(d.abs().mean()),
        top=size,
        null_edge=size,
    )
    assert facts.flag == "red"


def test_pure_rounding_is_red() -> None:
    """A structureless update far below the spacing: the spectrum is that of rounding."""
    for relative in (3e-5, 5e-5, 1e-4):
        assert judged(*stored(relative, "both", 0)[:2]).flag == "red"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    w = (10.0 ** torch.linspace(-3, 2, 200)).to(dtype)
    integer = {2: torch.int16, 4: torch.int32}[w.element_size()]
    following = (w.view(integer) + 1).view(dtype).double()
    torch.testing.assert_close(spacing(w, dtype), following - w.double(), rtol=0, atol=0)
    torch.testing.assert_close(spacing(-w, dtype), spacing(w, dtype), rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [1e-3, 0.01, 0.019, 0.021, 0.1, 0.5, 2.0])
def test_dither_energy_against_monte_carlo(ratio: float) -> None:
    draw = generator(1, "dither", str(ratio))
    d = torch.randn(400_000, generator=draw).double() * ratio * math.sqrt(math.pi / 2)
    master = 1000 * torch.rand(400_000, generator=draw).double()
    error = torch.round(master + d) - torch.round(master) - d
    got = float(dither_energy(torch.tensor(ratio)))
    assert got == pytest.approx(float(error.square().mean()), rel=0.12 if ratio < 0.01 else 0.04)


def test_grid_of_the_file() -> None:
    w = weights()
    assert grid_dtype(w.to(BFLOAT16)) == BFLOAT16
    assert grid_dtype(w.float()) == torch.float32
    assert grid_dtype(w.to(BFLOAT16).float()) == BFLOAT16  # a float32 file of bfloat16 numbers
    assert grid_dtype(w.float(), w.to(BFLOAT16)) == BFLOAT16
    assert grid_dtype(w.to(torch.float16).float()) == torch.float16
    assert grid_dtype(torch.zeros(4, 4)) == torch.float32


def test_thresholds_follow_the_storage() -> None:
    assert threshold(5e-3, BFLOAT16) == 5e-3
    assert threshold(5e-3, torch.float16) == pytest.approx(5e-3 / 8)
    assert threshold(5e-3, torch.float32) == pytest.approx(5e-3 / 2**16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flip_signs(dtype: torch.dtype) -> None:
    a = weights().to(dtype)
    one, two, other = a.clone(), a.clone(), a.clone()
    flip_signs(one, seed=0, name="x")
    flip_signs(two, seed=0, name="x")
    flip_signs(other, seed=0, name="y")
    assert torch.equal(one, two)
    assert torch.equal(one.abs(), a.abs())
    flipped = one != a
    assert float(flipped.double().mean()) == pytest.approx(0.5, abs=0.005)
    assert float((one == other).double().mean()) == pytest.approx(0.5, abs=0.005)
    neighbours = flipped[:, 1:] == flipped[:, :-1]
    assert float(neighbours.double().mean()) == pytest.approx(0.5, abs=0.005)
    structured = change(1).float().clone()
    flip_signs(structured, seed=0, name="x")
    top = float(torch.linalg.matrix_norm(structured, 2))
    assert top < 0.2  # of 1 before: no structure is left


def test_l1_size_of_a_gaussian() -> None:
    a = 3.0 * torch.randn(300, 200, generator=generator(1, "l1")).double()
    assert l1_size(float(a.abs().mean()), 300, 200) == pytest.approx(float(a.norm()), rel=0.01)
