"""Block Krylov against float64 LAPACK on easy, hard and hopeless spectra."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.rounding import edge_spread
from mi_weightspace.spectral.dense import Dense, fast_float32, flop_done
from mi_weightspace.spectral.krylov import (
    BFLOAT16_REACH,
    Triplets,
    block_krylov,
    blocks_of,
    exact_svd,
    is_small,
    leading_triplets,
    orthonormalise,
    out_of_reach,
    polish,
    top_value,
)

pytestmark = pytest.mark.quick

M, N, RANK = 384, 768, 8
EDGE = M**0.5 + N**0.5
SPECTRA = ("low_rank", "spiked", "power_law", "rogue_row", "near_edge", "noise")
SEPARATED = ("low_rank", "spiked", "power_law", "rogue_row")
DTYPES = (torch.float32, torch.bfloat16)


def factors(rank: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    left = torch.linalg.qr(torch.randn(M, rank, generator=draw).double())[0]
    right = torch.linalg.qr(torch.randn(N, rank, generator=draw).double())[0]
    return left, right


def spiked(draw: torch.Generator, sizes: list[float]) -> Tensor:
    left, right = factors(len(sizes), draw)
    noise = torch.randn(M, N, generator=draw).double()
    return noise + left @ torch.diag(torch.tensor(sizes).double()) @ right.T


@cache
def matrix(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = generator(7, "test_krylov", name)
    if name == "low_rank":
        left, right = factors(5, draw)
        made = left @ torch.diag(torch.tensor([9.0, 7, 5, 3, 2]).double()) @ right.T
    elif name == "spiked":
        made = spiked(draw, [3 * EDGE, 2.5 * EDGE, 2 * EDGE])
    elif name == "power_law":
        left, right = factors(M, draw)
        made = left @ torch.diag(1 / torch.arange(1, M + 1).double()) @ right.T
    elif name == "rogue_row":
        made = torch.randn(M, N, generator=draw).double()
        made[17] *= 10
    elif name == "near_edge":  # observed 3-4 % above the edge
        made = spiked(draw, [0.87 * EDGE])
    else:
        made = torch.randn(M, N, generator=draw).double()
    return (0.01 * made).to(dtype)


@cache
def lapack(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    left, scale, right = np.linalg.svd(matrix(name, dtype).double().numpy(), full_matrices=False)
    return torch.from_numpy(left.T.copy()), torch.from_numpy(scale), torch.from_numpy(right)


@cache
def found(name: str, dtype: torch.dtype = torch.float32) -> Triplets:
    return leading_triplets(matrix(name, dtype), RANK, generator=generator(0, "sketch", name))


def sine(u: Tensor, space: Tensor) -> float:
    """Angle of one vector to the span of orthonormal rows, in float64 (no 1 − cos²)."""
    u = u.double() / u.double().norm()
    return float((u - space.T @ (space @ u)).norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values(name: str, dtype: torch.dtype) -> None:
    truth, got = lapack(name, dtype)[1], found(name, dtype)
    rounding = 1e-6 if dtype == torch.float32 else 5e-4
    assert len(got) == (5 if name == "low_rank" and dtype == torch.float32 else RANK)
    error = (got.scale - truth[: len(got)]).abs() / truth[0]
    assert float((got.scale - truth[: len(got)]).max() / truth[0]) < rounding  # from below
    separated = {"low_rank": 5, "spiked": 3, "power_law": 4, "rogue_row": 1}.get(name, 0)
    assert float(error[:separated].max() if separated else 0.0) < 5e-4
    assert float(error.max()) < 0.03  # inside a dense bulk
    assert got.following <= float(truth[len(got)]) * (1 + rounding) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_certificate_bounds_the_true_angle(name: str, dtype: torch.dtype) -> None:
    truth, got = lapack(name, dtype)[0], found(name, dtype)
    for k in range(3):
        angle = sine(got.left[k], truth[k : k + 1])
        assert angle <= 1.05 * got.certificate(k, k) + 2e-6, (k, angle, got.certificate(k, k))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEPARATED)
def test_separated_directions_are_resolved(name: str, dtype: torch.dtype) -> None:
    """Resolved: certificate at most 0.2; then any cosine is right to 1e-4."""
    got, truth = found(name, dtype), lapack(name, dtype)[0]
    assert got.certificate(0, 0) < 0.1
    w = torch.randn(M, generator=generator(1, "probe")).double() / M**0.5
    for probe in (w / w.norm(), truth[0], (truth[0] + w) / (truth[0] + w).norm()):
        error = abs(abs(float(got.left[0].double() @ probe)) - abs(float(truth[0] @ probe)))
        assert error < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["near_edge", "noise"])
def test_hard_directions_are_right_or_unresolved(name: str, seed: int, dtype: torch.dtype) -> None:
    truth = lapack(name, dtype)[0]
    got = leading_triplets(matrix(name, dtype), RANK, generator=generator(seed, "hard"))
    w = torch.randn(M, generator=generator(2, "probe")).double()
    w = truth[0] + 0.5 * w / w.norm()
    w /= w.norm()
    error = abs(abs(float(got.left[0].double() @ w)) - abs(float(truth[0] @ w)))
    assert got.certificate(0, 0) > 0.2 or error < 2e-3, (got.certificate(0, 0), error)


def test_certificate_is_residual_over_the_smaller_gap() -> None:
    scale = torch.tensor([3.0, 2.0, 1.9]).double()
    residual = torch.tensor([0.1, 0.2, 0.3]).double()
    made = Triplets(torch.eye(3), scale, torch.eye(3), residual, following=1.0)
    assert made.certificate(0, 0) == pytest.approx(0.1 / (9 - 4))
    assert made.certificate(1, 1) == pytest.approx(0.2 / (4 - 1.9**2))
    assert made.certificate(2, 2) == pytest.approx(0.3 / (4 - 1.9**2))
    assert made.certificate(1, 2) == pytest.approx(0.13**0.5 / (1.9**2 - 1))


def test_following_is_the_next_value() -> None:
    got, truth = found("power_law"), lapack("power_law")[1]
    assert got.following == pytest.approx(float(truth[RANK]), rel=0.03)


def test_residual_is_the_true_residual() -> None:
    for name in SEPARATED[1:]:
        a, got = matrix(name).double(), found(name)
        u = got.left.double()
        explicit = (u @ a @ a.T - got.scale[:, None] ** 2 * u).norm(dim=1)
        slack = 4e-6 * float(got.scale[0]) ** 2
        assert bool((explicit <= 1.02 * got.residual + slack).all())
        assert bool((got.residual <= 1.02 * explicit + slack).all())


def test_triplets_belong_together() -> None:
    for name in SPECTRA:
        a, got = matrix(name).double(), found(name)
        eye = torch.eye(len(got))
        assert float((got.left @ got.left.T - eye).abs().max()) < 1e-5
        assert float((got.right @ got.right.T - eye).abs().max()) < 1e-4
        pushed = got.left.double() @ a - got.scale[:, None] * got.right.double()
        assert float(pushed.norm() / got.scale[0]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["spiked", "rogue_row"])
def test_sign_and_side_do_not_matter(name: str, dtype: torch.dtype) -> None:
    a, got = matrix(name, dtype), found(name, dtype)
    negated = leading_triplets(-a, RANK, generator=generator(0, "sketch", name))
    torch.testing.assert_close(negated.scale, got.scale, rtol=1e-9, atol=0)
    rows = torch.randint(0, 2, (M, 1), generator=generator(5, "rows")) * 2.0 - 1
    flipped = leading_triplets(
        a * rows.to(dtype), RANK, generator=generator(0, "sketch", name)
    )  # u is flipped row by row, v is not
    assert float((flipped.scale - got.scale).abs().max() / got.scale[0]) < 1e-3
    u = flipped.left[0] * rows[:, 0]
    assert abs(float(u @ got.left[0])) > 1 - 1e-5
    assert abs(float(negated.left[0] @ got.left[0])) > 1 - 1e-6
    read = leading_triplets(a, RANK, generator=generator(0, "other"), side="read")
    assert read.left.shape == (RANK, N)
    assert read.right.shape == (RANK, M)
    assert sine(read.left[0], lapack(name, dtype)[2][:1]) < 5e-3
    assert float((read.scale - got.scale).abs().max() / got.scale[0]) < 0.02


def test_same_seed_same_bits() -> None:
    a = matrix("spiked", torch.bfloat16)
    one, two = (leading_triplets(a, RANK, generator=generator(3, "x")) for _ in range(2))
    assert torch.equal(one.left, two.left)
    assert torch.equal(one.scale, two.scale)


def test_no_step_is_spent_on_confirming() -> None:
    """A gap of a factor of five settles in two steps, by its residual; noise never does."""
    left, right = factors(20, generator(12, "gap"))
    sizes = torch.cat([torch.linspace(10, 5, 8), torch.full((12,), 0.5)]).double()
    a = left @ torch.diag(sizes) @ right.T + 1e-3 * matrix("noise").double()
    got = block_krylov(Dense(a.float()), RANK, generator=generator(0, "gap"))
    assert got.steps <= 2
    truth = np.linalg.svd(a.numpy())
    assert float(np.abs(got.scale.numpy() / truth[1][:RANK] - 1).max()) < 1e-3
    assert sine(got.left[0], torch.from_numpy(truth[0].T[:1].copy())) < 5e-3
    assert found("noise").steps > 4


def test_steep_spectra_leave_bfloat16() -> None:
    """s₈ = 1e-3 s₁ drowns in bfloat16 products; the float32 route must be taken."""
    draw = generator(3, "steep")
    left, right = factors(RANK, draw)
    sizes = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.01, 0.003, 0.001]).double()
    a = (left @ torch.diag(sizes) @ right.T).to(torch.bfloat16)
    truth = np.linalg.svd(a.double().numpy())[1][:RANK]
    got = leading_triplets(a, RANK, generator=generator(0, "steep"))
    assert out_of_reach(torch.from_numpy(truth), RANK, BFLOAT16_REACH)
    assert float(np.abs(got.scale.numpy() / truth - 1).max()) < 1e-3
    lossy = block_krylov(Dense(a), RANK, generator=generator(0, "steep"))
    assert float(np.abs(lossy.scale.numpy() / truth - 1).max()) > 0.01


def test_polish_removes_the_rounding_of_bfloat16_products() -> None:
    a, truth = matrix("spiked", torch.bfloat16), lapack("spiked", torch.bfloat16)
    raw = found("spiked", torch.bfloat16)
    fine = polish(Dense(a, precise=True), raw)
    assert sine(fine.left[0], truth[0][:1]) < 0.5 * sine(raw.left[0], truth[0][:1])
    assert abs(float(fine.scale[0] / truth[1][0]) - 1) < 1e-5
    via = leading_triplets(a, RANK, generator=generator(0, "sketch", "spiked"), polished=True)
    torch.testing.assert_close(via.scale, fine.scale, rtol=1e-9, atol=0)


def test_small_matrices_are_exact() -> None:
    a = torch.randn(48, 4000, generator=generator(4, "small"))
    assert is_small(*a.shape)
    assert not is_small(M, N)
    got = leading_triplets(a, 5, generator=generator(0, "small"))
    scale = torch.linalg.svdvals(a.double())
    assert got.steps == 0
    torch.testing.assert_close(got.scale, scale[:5], rtol=1e-12, atol=0)
    assert got.following == pytest.approx(float(scale[5]), rel=1e-12)
    assert got.spectrum is not None
    assert len(got.spectrum) == 48
    assert got.certificate(0, 0) < 1e-10


def test_ties_are_never_resolved_one_by_one() -> None:
    tied = exact_svd(torch.diag(torch.tensor([2.0, 2.0, 1.0])), 3)
    assert tied.certificate(0, 0) > 1
    assert tied.certificate(0, 1) < 1e-10
    assert blocks_of(tied.scale) == [0, 0, 1]
    left, right = factors(3, generator(9, "tie"))
    a = (left @ torch.diag(torch.tensor([2.0, 2.0, 1.0]).double()) @ right.T).float()
    got = leading_triplets(a, 3, generator=generator(0, "tie"))
    assert got.certificate(0, 0) > 0.2
    assert got.certificate(0, 1) < 1e-3
    for k in range(2):
        assert sine(got.left[k], left[:, :2].T) < 1e-4


def test_blocks_join_what_noise_would_mix() -> None:
    scale = torch.tensor([10.0, 9.9, 5.0, 4.999])
    assert blocks_of(scale) == [0, 1, 2, 2]
    assert blocks_of(scale, noise=0.1) == [0, 0, 1, 1]


def test_nothing_in_a_zero_matrix() -> None:
    assert len(leading_triplets(torch.zeros(M, N), 4, generator=generator(0, "zero"))) == 0
    assert len(exact_svd(torch.zeros(8, 9), 4)) == 0
    assert top_value(Dense(torch.zeros(M, N)), generator=generator(0, "zero")) == 0.0


def test_rank_deficient_and_all_of_a_matrix() -> None:
    """More components asked for than there are, and a basis that fills the whole space."""
    got = block_krylov(
        Dense(matrix("low_rank")), 16, generator=generator(0, "deficient"), tolerance=1e-6
    )
    assert len(got) == 5
    a = torch.randn(40, 70, generator=generator(8, "full"))
    every = block_krylov(Dense(a), 40, generator=generator(0, "full"))
    truth = torch.linalg.svdvals(a.double())
    torch.testing.assert_close(every.scale, truth, rtol=1e-4, atol=0)


def test_orthonormalise_drops_dependent_columns() -> None:
    draw = generator(6, "qr")
    basis = torch.linalg.qr(torch.randn(60, 5, generator=draw))[0]
    y = torch.cat([torch.randn(60, 3, generator=draw), basis[:, :2]], dim=1)
    y = torch.cat([y, y[:, :1] * 2], dim=1)
    q, factor = orthonormalise(y, basis)
    assert q.shape == (60, 3)
    assert float((q.T @ q - torch.eye(3)).abs().max()) < 1e-6
    assert float((basis.T @ q).abs().max()) < 1e-6
    rest = y - basis @ (basis.T @ y)
    torch.testing.assert_close(q @ factor.float(), rest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_forms(dtype: torch.dtype) -> None:
    draw = generator(2, "products")
    a = torch.randn(700, 1900, generator=draw).to(dtype)  # several chunks
    x, y = torch.randn(1900, 3, generator=draw), torch.randn(3, 700, generator=draw)
    wx, wy = a.double() @ x.double(), y.double() @ a.double()
    for precise, tolerance in ((True, 1e-5), (False, 1e-5 if dtype == torch.float32 else 1e-2)):
        write, read = Dense(a, "write", precise), Dense(a, "read", precise)
        assert (write.shape, read.shape) == ((700, 1900), (1900, 700))
        for got, truth in (
            (write.times(x), wx),
            (write.left_times(y), wy),
            (read.times(y.T), wy.T),
            (read.left_times(x.T), wx.T),
        ):
            assert got.shape == truth.shape
            assert float((got.double() - truth).norm() / truth.norm()) < tolerance


def test_fast_products_stay_float32() -> None:
    a = torch.randn(1100, 1000, generator=generator(2, "fast"))
    x = torch.randn(1000, 8, generator=generator(3, "fast"))
    setting = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    with fast_float32(a):
        got = a @ x
    assert setting == torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    assert float((got.double() - a.double() @ x.double()).norm() / got.double().norm()) < 1e-6


def test_edge_of_noise() -> None:
    """Top values of noise matrices: the mean at √m + √n, the spread as predicted."""
    m, n = 96, 160
    tops = []
    for k in range(60):
        noise = torch.randn(m, n, generator=generator(k, "edge"))
        tops.append(float(torch.linalg.matrix_norm(noise.double(), 2)))
    spread = np.std(tops) / np.mean(tops)
    assert edge_spread(m, n) == pytest.approx(spread, rel=0.35)


@pytest.mark.parametrize("kind", ["flat", "rogue", "rows", "heavy"])
@pytest.mark.parametrize("shape", [(384, 768), (768, 768), (1024, 300)])
def test_top_value_of_noise(kind: str, shape: tuple[int, int]) -> None:
    draw = generator(1, "top", kind, *shape)
    noise = torch.randn(shape, generator=draw)
    if kind == "rogue":
        noise[7] *= 6
    elif kind == "rows":
        noise *= torch.exp(0.5 * torch.randn(shape[0], 1, generator=draw))
    elif kind == "heavy":
        noise *= torch.exp(torch.randn(shape, generator=draw))
    truth = float(torch.linalg.matrix_norm(noise.double(), 2))
    for dtype in DTYPES:
        got = top_value(Dense(noise.to(dtype)), generator=generator(0, "top"))
        assert got == pytest.approx(truth, rel=4e-3)


def test_top_value_of_a_large_noise_matrix() -> None:
    """Where early stopping leaves most; ARPACK in float64 is the oracle."""
    from scipy.sparse.linalg import svds

    noise = torch.randn(1600, 1600, generator=generator(3, "large noise"))
    start = np.ones(1600)
    truth: Any = svds(noise.double().numpy(), 1, v0=start, return_singular_vectors=False)
    got = top_value(Dense(noise), generator=generator(0, "top"))
    assert got == pytest.approx(float(truth[0]), rel=4e-3)


def test_work_is_counted_without_rounding() -> None:
    """The same products count the same, whatever this thread has done before."""
    matrix = Dense(torch.ones(7, 11))
    counts = []
    for _ in range(50):
        begun = flop_done()
        matrix.times(torch.ones(11, 3))
        matrix.left_times(torch.ones(2, 7))
        counts.append(flop_done() - begun)
    assert set(counts) == {2 * 7 * 11 * (3 + 2)}
