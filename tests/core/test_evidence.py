"""Evidence of one matrix: naive float64 oracles, null rates, planted writes, rogue coordinates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, ortho_group
from torch import Tensor

from mi_weightspace.core.evidence import (
    LOUD_COORDINATES,
    cosine,
    cosine_without,
    participation,
    projected_energy,
    row_energies,
    row_energy_ratio,
    row_normalised,
    sign_cosine_p,
    sign_flip_ratio_p,
)
from mi_weightspace.core.stats import isotropic_cosine_p

pytestmark = pytest.mark.quick

D, N, B = 48, 6, 99


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def naive_ratio(matrix: np.ndarray, w: np.ndarray) -> float:
    """R written out entry by entry."""
    rows, columns = matrix.shape
    top = sum(sum(w[i] * matrix[i, j] for i in range(rows)) ** 2 for j in range(columns))
    energies = (sum(matrix[i, j] ** 2 for j in range(columns)) for i in range(rows))
    return top / sum(w[i] ** 2 * energy for i, energy in enumerate(energies))


def rogue(seed: int) -> tuple[Tensor, Tensor]:
    """Nothing shared between matrix and vector but one giant coordinate."""
    matrix, w = draw(2 * seed, D, N), draw(2 * seed + 1, D)
    matrix[3] *= 200
    w[3] = 60 * torch.sign(w[3])
    return matrix, unit(w)


def ordinary(seed: int) -> tuple[Tensor, Tensor]:
    """Rows of unlike sizes, unrelated to the vector."""
    matrix = draw(2 * seed, D, N) * draw(seed + 10**6, D).exp()[:, None]
    return matrix, unit(draw(2 * seed + 1, D))


@pytest.mark.parametrize("seed", range(3))
def test_ratio_is_the_naive_loop(seed: int) -> None:
    matrix, vectors = draw(seed, 9, 5), draw(seed + 10, 4, 9)
    found = row_energy_ratio(matrix, vectors)
    expected = [naive_ratio(matrix.double().numpy(), w.double().numpy()) for w in vectors]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    given = row_energy_ratio(matrix, vectors, row_energies(matrix))
    assert torch.equal(found, given)


def test_many_vectors_are_blocks_of_few() -> None:
    matrix, vectors = draw(0, 9, 5), draw(1, 600, 9)
    one = torch.cat([projected_energy(matrix, v[None]) for v in vectors])
    np.testing.assert_allclose(projected_energy(matrix, vectors), one, rtol=1e-5)


def test_ratio_does_not_depend_on_signs_scale_or_input_basis() -> None:
    matrix, w = draw(0, D, N), draw(1, D)
    turned = matrix @ torch.tensor(ortho_group.rvs(N, random_state=0), dtype=torch.float32)
    reference = float(row_energy_ratio(matrix, w[None])[0])
    for other, vector in ((-matrix, w), (matrix, -w), (5 * matrix, 3 * w), (turned, w)):
        assert float(row_energy_ratio(other, vector[None])[0]) == pytest.approx(reference, rel=1e-5)
    assert math.isnan(float(row_energy_ratio(torch.zeros(D, N), w[None])[0]))


def test_ratio_is_one_on_average_for_unrelated_rows() -> None:
    values = [float(row_energy_ratio(m, w[None])[0]) for m, w in map(ordinary, range(400))]
    assert np.mean(values) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("make", [ordinary, rogue])
def test_sign_flip_p_is_uniform_without_a_write(make: object) -> None:
    """1000 draws; under `rogue` the raw cosine and the isotropic null are fooled every time."""
    values, cosines = [], []
    for seed in range(1000):
        matrix, w = make(seed)  # pyright: ignore[reportCallIssue]
        values.append(sign_flip_ratio_p(matrix, w, n_null=B, seed=seed, name="t"))
        cosines.append(cosine(torch.linalg.svd(matrix)[0][:, 0], w) if seed < 50 else 0.0)
    assert 0.03 <= np.mean(np.array(values) <= 0.05) <= 0.07
    # p lies on a grid of 1/(B+1): its distance to the uniform is at most one step more
    assert kstest(values, "uniform").statistic < 1.63 / 1000**0.5 + 1 / (B + 1)
    if make is rogue:
        fooled = isotropic_cosine_p(torch.tensor(cosines[:50]), D)
        assert min(cosines[:50]) > 0.9 and float(fooled.max()) < 1e-10


def test_sign_cosine_p_is_uniform_without_a_write() -> None:
    values = []
    for seed in range(1000):
        matrix, w = rogue(seed)
        u = torch.linalg.svd(row_normalised(matrix), full_matrices=False)[0][:, 0]
        values.append(sign_cosine_p(u, w, n_null=B, seed=seed, name="t"))
    assert 0.03 <= np.mean(np.array(values) <= 0.05) <= 0.07
    assert kstest(values, "uniform").statistic < 1.63 / 1000**0.5 + 1 / (B + 1)


@pytest.mark.parametrize("make", [ordinary, rogue])
def test_a_planted_write_has_the_smallest_p(make: object) -> None:
    matrix, w = make(7)  # pyright: ignore[reportCallIssue]
    w = unit(torch.where(w.abs() > 0.9, 0.3 * torch.sign(w), w))  # the concept is in the bulk
    # rows that write w in proportion to their own size: a write hidden under any giant row
    size = row_energies(matrix).sqrt().float()
    matrix = matrix + 12 * (size * w)[:, None] * unit(draw(5, N))[None]
    assert sign_flip_ratio_p(matrix, w, n_null=B, seed=0, name="t") == 1 / (B + 1)
    u = torch.linalg.svd(row_normalised(matrix), full_matrices=False)[0][:, 0]
    assert sign_cosine_p(u, w, n_null=B, seed=0, name="t") == 1 / (B + 1)
    other = unit(draw(11, D))
    assert sign_flip_ratio_p(matrix, other, n_null=B, seed=0, name="t") > 0.05


def test_a_single_shared_coordinate_is_no_evidence() -> None:
    """All weight on one row: every sign pattern gives the same value, so p is exactly 1."""
    matrix, w = draw(0, D, N), torch.zeros(D)
    matrix[3] *= 1000
    w[3] = 1.0
    u = torch.linalg.svd(matrix)[0][:, 0]
    assert cosine(u, w) > 0.99
    assert float(row_energy_ratio(matrix, w[None])[0]) == pytest.approx(1)
    assert sign_flip_ratio_p(matrix, w, n_null=B, seed=0, name="t") == 1
    assert sign_cosine_p(u, w, n_null=B, seed=0, name="t") == 1


def test_signs_of_vectors_change_no_p() -> None:
    matrix, w = ordinary(3)
    u = unit(draw(4, D))
    flips = {"n_null": B, "seed": 0, "name": "t"}
    p, q = sign_flip_ratio_p(matrix, w, **flips), sign_cosine_p(u, w, **flips)
    assert sign_flip_ratio_p(matrix, -w, **flips) == p
    assert sign_cosine_p(-u, w, **flips) == sign_cosine_p(u, -w, **flips) == q


def test_seed_and_name_decide_the_flips() -> None:
    matrix, w = ordinary(3)
    given = {
        (s, n): sign_flip_ratio_p(matrix, w, n_null=B, seed=s, name=n) for s in (0, 1) for n in "ab"
    }
    assert given[0, "a"] == sign_flip_ratio_p(matrix, w, n_null=B, seed=0, name="a")
    assert len(set(given.values())) > 1


def test_row_normalised() -> None:
    matrix = draw(0, 5, 4)
    matrix[2] = 0
    found = row_normalised(matrix).double().numpy()
    exact = matrix.double().numpy()
    for i in (0, 1, 3, 4):
        np.testing.assert_allclose(found[i], exact[i] / np.sqrt((exact[i] ** 2).sum()), rtol=1e-6)
    assert (found[2] == 0).all()


@pytest.mark.parametrize("k", [1, 4, 16])
def test_participation_counts_the_coordinates(k: int) -> None:
    u = torch.zeros(D)
    u[:k] = k**-0.5
    assert participation(u) == pytest.approx(k, rel=1e-5)


def test_cosine_has_no_sign_and_is_zero_for_nothing() -> None:
    u, w = draw(0, D), draw(1, D)
    a, b = u.double().numpy(), w.double().numpy()
    expected = abs(a @ b) / np.sqrt((a @ a) * (b @ b))
    assert cosine(u, w) == cosine(-u, w) == cosine(u, -w) == pytest.approx(expected, rel=1e-6)
    assert cosine(torch.zeros(D), w) == 0


def test_cosine_without_the_loud_coordinates() -> None:
    u, w = draw(0, D), draw(1, D)
    variance = draw(2, D).square()
    loud = np.argsort(variance.numpy())[-LOUD_COORDINATES:]
    u[loud], w[loud] = 30.0, 30.0
    a, b = (np.delete(v.double().numpy(), loud) for v in (u, w))
    expected = abs(a @ b) / np.sqrt((a @ a) * (b @ b))
    assert cosine_without(u, w, variance) == pytest.approx(expected, rel=1e-5)
    assert cosine(u, w) > 0.9 > 0.5 > cosine_without(u, w, variance)
    assert math.isnan(cosine_without(u, w, None))
    few = LOUD_COORDINATES
    assert math.isnan(cosine_without(u[:few], w[:few], variance[:few]))


@pytest.mark.parametrize("d", [2, 3, 30])
def test_isotropic_reference_against_simulation(d: int) -> None:
    sample = np.random.default_rng(0).standard_normal((40_000, d))
    cosines = np.abs(sample[:, 0]) / np.linalg.norm(sample, axis=1)
    for level in (0.1, 0.4):
        rate = float((cosines >= level).mean())
        found = float(isotropic_cosine_p(torch.tensor([level]), d)[0])
        assert found == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 40_000) ** 0.5 + 1e-6)
