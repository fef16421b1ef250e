"""Tests of "does this matrix favour this direction?" that hold under rogue coordinates.

Notation: a matrix D whose rows are indexed by the coordinates of the direction's space, ``D_i`` its
rows, ``w`` a unit direction.

* ``R(w) = ‖wᵀD‖² / Σ w_i² ‖D_i‖²`` is 1 in expectation when the rows of D are unrelated, and large
  when D writes coherently along w. One giant row makes numerator and denominator equal: no
  evidence.
* Its sign-flip null draws independent signs for the coordinates of w; the denominator stays.
* The first left singular vector of the *row-normalised* D is compared with w by the sign test of
  ``Σ s_i u_i w_i``.

Sign tests are exact if the rows are sign-symmetric given their sizes. Training leaves structure
everywhere, so they are necessary and never sufficient: a rank among matched controls decides.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.stats import rank_p, sign_flips

LOUD_COORDINATES = 8
_BLOCK = 256


def row_energies(matrix: Float[Tensor, "d n"]) -> Float[Tensor, " d"]:
    """``‖D_i‖²``, float64."""
    return matrix.square().sum(1, dtype=torch.float64)


def projected_energy(
    matrix: Float[Tensor, "d n"], vectors: Float[Tensor, "m d"]
) -> Float[Tensor, " m"]:
    """``‖wᵀD‖²`` of each row of `vectors`, float64 sums."""
    parts = [
        (block.to(matrix.dtype) @ matrix).float().square_().sum(1, dtype=torch.float64)
        for block in vectors.split(_BLOCK)
    ]
    return torch.cat(parts)


def row_energy_ratio(
    matrix: Float[Tensor, "d n"],
    vectors: Float[Tensor, "m d"],
    energies: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, " m"]:
    """R of each row of `vectors`; NaN for a zero matrix."""
    energies = row_energies(matrix) if energies is None else energies
    return projected_energy(matrix, vectors) / (vectors.double().square() @ energies)


def sign_flip_ratio_p(
    matrix: Float[Tensor, "d n"], vector: Float[Tensor, " d"], *, n_null: int, seed: int, name: str
) -> float:
    """p of R(w) under independent signs of w's coordinates."""
    signs = sign_flips(vector.shape[0], n_null, seed=seed, name=name)
    null = projected_energy(matrix, signs * vector.double())
    return float(rank_p(projected_energy(matrix, vector[None])[0], null))


def sign_cosine_p(
    u: Float[Tensor, " d"], w: Float[Tensor, " d"], *, n_null: int, seed: int, name: str
) -> float:
    """p of |Σ u_i w_i| under independent signs: a Rademacher sum with the terms' sizes."""
    terms = u.double() * w.double()
    null = (sign_flips(terms.shape[0], n_null, seed=seed, name=name) @ terms).abs()
    return float(rank_p(terms.sum().abs(), null))


def row_normalised(
    matrix: Float[Tensor, "d n"], energies: Float[Tensor, " d"] | None = None
) -> Float[Tensor, "d n"]:
    """Every row scaled to unit norm; zero rows stay zero."""
    energies = row_energies(matrix) if energies is None else energies
    return matrix * inverse_sizes(energies).to(matrix.dtype)[:, None]


def inverse_sizes(energies: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """``1/‖D_i‖``; 1 for zero rows."""
    size = energies.sqrt()
    return torch.where(size > 0, 1 / size, 1.0)


def participation(u: Float[Tensor, " d"]) -> float:
    """``1 / Σ u_i⁴`` of a unit vector: about how many coordinates carry it."""
    return float(1 / u.double().pow(4).sum())


def cosine(u: Float[Tensor, " d"], w: Float[Tensor, " d"]) -> float:
    """|cos|; 0 where a vector is zero. Singular vectors have no sign, so there is none."""
    size = float(u.double().norm() * w.double().norm())
    return abs(float(u.double() @ w.double())) / size if size > 0 else 0.0


def cosines(vectors: Float[Tensor, "m d"], w: Float[Tensor, " d"]) -> Float[Tensor, " m"]:
    """`cosine` of each row with w."""
    rows, w = vectors.double(), w.double()
    size = rows.norm(dim=1) * w.norm()
    return torch.where(size > 0, (rows @ w).abs() / size, 0.0)


def cosine_without(
    u: Float[Tensor, " d"], w: Float[Tensor, " d"], variance: Float[Tensor, " d"] | None
) -> float:
    """|cos| after removing the `LOUD_COORDINATES` of highest variance; NaN without variances."""
    if variance is None or u.shape[0] <= LOUD_COORDINATES:
        return float("nan")
    keep = torch.ones_like(u, dtype=torch.bool)
    keep[variance.topk(LOUD_COORDINATES).indices] = False
    return cosine(u[keep], w[keep])
