"""The route of large matrices against the plain one, and the size of its shared, sketched nulls."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mi_weightspace.core.evidence import inverse_sizes, row_energy_ratio, row_normalised
from mi_weightspace.core.stats import shared_signs
from mi_weightspace.spectral import face as face_module
from mi_weightspace.spectral.dense import Dense, Gains, folded
from mi_weightspace.spectral.face import Faces, LargeFace, Nulls

pytestmark = pytest.mark.quick
D, N, B = 90, 140, 99


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def nulls(seed: int = 0) -> Nulls:
    return Nulls(B, seed, "t")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("side", ["read", "write"])
def test_both_routes_give_the_same_numbers(side: Any, gained: bool, dtype: torch.dtype) -> None:
    matrix = draw(0, D, N) * draw(3, D).exp()[:, None] + 9 * torch.outer(draw(4, D), draw(5, N))
    matrix = matrix.to(dtype)
    kept = matrix.clone()
    gains = Gains(draw(6, N).exp(), draw(7, D).exp()) if gained else Gains()
    small, large = (Faces(matrix, gains, 0, "m", large=big, own=big)(side) for big in (False, True))
    oracle = folded(matrix, gains).double()
    oracle = oracle if side == "write" else oracle.T
    rows = len(oracle)
    vectors = draw(1, 4, rows)[[0, 1, 1, 2, 3, 0]]  # some are shared
    naive = [float((w.double() @ oracle).square().sum()) for w in vectors]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for face in (small, large):
        np.testing.assert_allclose(face.energies, oracle.square().sum(1), rtol=1e-5)
        np.testing.assert_allclose(face.projected(vectors), naive, rtol=tolerance)
        shift = draw(8, oracle.shape[1])
        exact = oracle @ shift.double()
        assert float((face.written(shift) - exact).norm() / exact.norm()) < tolerance
        u = torch.linalg.svd(row_normalised(oracle), full_matrices=False)[0][:, 0]
        assert float((face.left.double() @ u).abs()) > 1 - 1e-4
        assert face.resolved(needed=True)
    assert large.resolved(needed=False) is None
    assert torch.equal(matrix, kept)  # signs were flipped in place, and back


def test_a_matrix_others_see_is_not_touched() -> None:
    matrix = draw(0, D, N)
    matrix.requires_grad_(False)
    face = LargeFace(Dense(matrix), seed=0, name="m", own=False)
    version = matrix._version
    assert face.resolved(needed=True) is False  # noise
    assert matrix._version == version


def test_shared_signs_are_signs_of_the_name_and_the_seed() -> None:
    one = shared_signs(501, 77, seed=0, name="a")
    assert one.shape == (77, 501) and one.dtype == torch.bfloat16
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(one.float().mean())) < 4 / math.sqrt(one.numel())
    gram = one.float() @ one.float().T / 501
    assert float((gram - torch.eye(77)).abs().max()) < 5 / math.sqrt(501)
    assert torch.equal(one, shared_signs(501, 77, seed=0, name="a"))
    assert not torch.equal(one, shared_signs(501, 77, seed=1, name="a"))
    assert not torch.equal(one, shared_signs(501, 77, seed=0, name="b"))


def test_flips_are_those_of_the_shared_signs() -> None:
    """Naive loop in float64 over the very signs."""
    matrix, w = draw(0, D, N) + torch.outer(draw(1, D), draw(2, N)), unit(draw(3, D))
    face = LargeFace(Dense(matrix), seed=0, name="m")
    signs = shared_signs(D, B, seed=0, name="m").double()
    r = [float(row_energy_ratio(matrix.double(), v[None])[0]) for v in (w.double(), *(signs * w))]
    p = (1 + sum(value >= r[0] * (1 - 1e-12) for value in r[1:])) / (B + 1)
    assert face.flip_p(w, nulls(), decides=True) == pytest.approx(p)
    terms = face.left.double() * w.double()
    sums = [abs(float(s @ terms)) for s in signs]
    p = (1 + sum(value >= abs(float(terms.sum())) for value in sums)) / (B + 1)
    others = [w, draw(9, D)]
    assert face.cosine_ps(others, [nulls()] * 2)[0] == pytest.approx(p)


def rogue(seed: int) -> tuple[Tensor, Tensor]:
    """Nothing shared between matrix and vector but one giant coordinate."""
    matrix, w = draw(2 * seed, 48, 30), draw(2 * seed + 1, 48)
    matrix[3] *= 200
    w[3] = 60 * torch.sign(w[3])
    return matrix, unit(w)


@pytest.mark.parametrize("decides", [True, False])
def test_shared_flips_are_uniform_without_a_write_and_find_one(
    decides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face_module, "SKETCH", 16)
    flips, cosines = [], []
    for seed in range(600):
        matrix, w = rogue(seed)
        face = LargeFace(Dense(matrix), seed=seed, name="m")
        flips.append(face.flip_p(w, nulls(seed), decides=decides))
        cosines += face.cosine_ps([w], [nulls(seed)])
    for values in (flips, cosines):
        assert 0.03 <= np.mean(np.array(values) <= 0.05) <= 0.075
        assert np.mean(values) == pytest.approx(0.5, abs=0.06)
    matrix, w = draw(0, 48, 30), unit(draw(1, 48))
    written = matrix + 3 * matrix.norm() * torch.outer(w, unit(draw(9, 30))) / 30**0.5
    face = LargeFace(Dense(written), seed=0, name="m")
    assert face.flip_p(w, nulls(), decides=decides) == 1 / (B + 1)
    assert face.cosine_ps([w], [nulls()]) == [1 / (B + 1)]


def test_zero_rows_stay_zero() -> None:
    matrix = draw(0, D, N)
    matrix[4] = 0
    assert float(inverse_sizes(matrix.double().square().sum(1))[4]) == 1
    face = LargeFace(Dense(matrix), seed=0, name="m")
    assert float(face.left[4].abs()) < 1e-6 and bool(torch.isfinite(face.left).all())
