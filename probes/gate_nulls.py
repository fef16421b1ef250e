"""Directions to rank a direction among (`methods`: measured comparison in probes.md §6.2).

Any direction inside the space that the activations occupy moves the readout, and an isotropic null
does not know that: it passes directions nobody trained. The null that decides is *pair-residual*:
``v_b ∝ Σ_i z_i (D_i − Δμ)`` with normal z, a direction in which pairs of this very contrast differ
from each other, but not on average. The others are reference columns. Freely sign-flipped Δμ is not
among them: under a strong effect its draws contain the direction itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import differences, mean_shift, within_class
from probes.gate_interventions import Subspaces

Null = Literal["pair_residual", "isotropic", "within_class", "half_split", "controls"]
REFERENCES: tuple[Null, ...] = ("isotropic", "within_class", "half_split")
_FLAT = 1e-9


def null_subspaces(
    kind: Null, values: Float[Tensor, "n 2 d"], n_draws: int, *, rank: int, seed: int
) -> Subspaces:
    """`n_draws` random directions (subspaces of equal rank), the first vector to steer by.

    Args:
        values: activations of the contrast's pairs, positive first.

    Returns:
        None drawn where the pairs leave no room: a residual space smaller than `rank`.
    """
    draw = generator(seed, "gate", kind, rank)
    n, d = values.shape[0], values.shape[-1]
    pairs = differences(values)
    if kind == "isotropic":
        rows = torch.eye(d, dtype=torch.float64)
    elif kind == "within_class":
        rows = within_class(values)
    else:
        rows = pairs - mean_shift(pairs)
    scale = values.double().square().sum().sqrt()
    if float(torch.linalg.matrix_norm(rows, 2)) <= _FLAT * float(scale) or n - 1 < rank:
        return empty(rank, d)
    if kind == "half_split":
        return subspaces(_half_splits(n, n_draws * rank, draw) @ pairs, rank)
    mixed = torch.randn(n_draws * rank, len(rows), generator=draw, dtype=torch.float64) @ rows
    return subspaces(mixed, rank)


def _half_splits(n: int, n_draws: int, draw: torch.Generator) -> Float[Tensor, "b n"]:
    """+1 for half of the pairs, -1 for the other half; a pair is left out where n is odd."""
    half = n // 2
    order = torch.rand(n_draws, n, generator=draw).argsort(1)
    signs = torch.zeros(n_draws, n, dtype=torch.float64)
    signs.scatter_(1, order[:, :half], 1.0)
    return signs.scatter_(1, order[:, half : 2 * half], -1.0)


def subspaces(vectors: Float[Tensor, "m d"], rank: int) -> Subspaces:
    """Every `rank` rows in turn, made orthonormal; the first row, made unit, to steer by."""
    groups = vectors.reshape(-1, rank, vectors.shape[-1])
    basis = torch.linalg.qr(groups.mT).Q.mT
    steer = groups[:, 0] / groups[:, 0].norm(dim=-1, keepdim=True)
    return Subspaces(basis.float(), steer.float())


def empty(rank: int, d: int) -> Subspaces:
    return Subspaces(torch.zeros(0, rank, d), torch.zeros(0, d))


def of_direction(
    pattern: Float[Tensor, " d"], values: Float[Tensor, "n 2 d"], rank: int
) -> Subspaces:
    """The direction itself; for rank k the span of the top k right singular vectors of D."""
    pattern = pattern.double()
    if rank == 1:
        return subspaces(pattern[None], 1)
    basis = torch.linalg.svd(differences(values), full_matrices=False).Vh[:rank]
    return Subspaces(basis[None].float(), (pattern / pattern.norm())[None].float())


def of_controls(found: Mapping[str, Float[Tensor, "n 2 d"]], rank: int) -> Subspaces:
    """Every control contrast's own direction (subspace); those without a shift are left out."""
    parts = [empty(rank, next(iter(found.values())).shape[-1])]
    for values in found.values():
        shift = mean_shift(differences(values))
        if float(shift.norm()) > 0 and len(values) >= rank:
            parts.append(of_direction(shift, values, rank))
    return Subspaces.joined(parts)
