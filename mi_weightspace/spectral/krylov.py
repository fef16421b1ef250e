"""Leading singular triplets by adaptive block Krylov iteration.

From the side whose vectors matter (``left``): ``Y₀ = A Ω``; each step orthonormalises ``Y`` against
the stored basis ``Q``, keeps ``Z = Qᵀ A`` and continues with ``Y = A Zᵀ``. The stacked ``Z`` *is*
``Qᵀ A``, so Ritz values need no further pass over A; and since ``A Aᵀ Q`` leaves the basis only
through the last block, the residual of a Ritz pair is ``‖R c_last‖`` with R the triangular factor
of the next block (block Lanczos; Musco & Musco 2015, arXiv:1504.05477).

The certificate ``sin ∠ ≤ ‖A Aᵀ u − s² u‖ / gap`` (Davis-Kahan) uses Ritz values for the gap, so it
is a bound to first order. Products may run in bfloat16; all orthogonalisation is float32/float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.site import Side
from mi_weightspace.spectral.blocks import Blocks
from mi_weightspace.spectral.dense import ONES, Dense, Gains, Operator, fast_float32, folded

EXACT_SIDE = 64
"""A matrix whose shorter side is at most this is decomposed exactly, in float64."""
EXACT_WORK = 2**23
"""… and so is one whose m·n·min(m, n) is at most this."""
NEGLIGIBLE = 1e-7
"""Singular values below this share of s₁ are float32 rounding and are not reported."""
FLOAT32_ERROR = 16 * torch.finfo(torch.float32).eps
"""Error of float32 products in a residual, in units of s s₁: the recurrence cannot see it."""
NEAR_EQUAL = 1e-3
"""Relative gap below which two singular values count as equal whatever the noise."""
BFLOAT16_REACH = 0.02
"""Singular values below this share of s₁ drown in the rounding of bfloat16 products."""
_COLUMNS = 2**11


@dataclass(frozen=True, eq=False)
class Triplets:
    """Singular triplets, largest first, and what is known about their accuracy.

    Attributes:
        left: (k, m) orthonormal rows, float32; right: (k, n).
        scale: (k,) singular values, float64 (Ritz values: from below).
        residual: (k,) ``‖A Aᵀ u − s² u‖``, float64; ``ε s₁²`` for an exact decomposition.
        following: the next singular value (Ritz), 0 where there is none.
        steps: Krylov steps taken; 0 for an exact decomposition.
        previous: s₁ one step earlier; 0 after a single step.
        spectrum: every singular value, for an exact decomposition only.
    """

    left: Float[Tensor, "k m"]
    scale: Float[Tensor, " k"]
    right: Float[Tensor, "k n"]
    residual: Float[Tensor, " k"]
    following: float = 0.0
    steps: int = 0
    previous: float = 0.0
    spectrum: Float[Tensor, " r"] | None = None

    def __len__(self) -> int:
        return int(self.scale.shape[0])

    def certificate(self, first: int, last: int) -> float:
        """Bound on ``sin ∠`` of the span of components first…last (inclusive); inf with no gap."""
        squares = torch.cat([self.scale, torch.tensor([self.following]).double()]).square()
        gaps = [squares[last] - squares[last + 1]]
        if first > 0:
            gaps.append(squares[first - 1] - squares[first])
        gap = float(min(gaps))
        return float(self.residual[first : last + 1].norm()) / gap if gap > 0 else math.inf


def exact_svd(matrix: Float[Tensor, "m n"], rank: int) -> Triplets:
    """Full SVD in float64, cut to `rank` and to values above 1e-7 of the first."""
    left, scale, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    k = int((scale[:rank] > NEGLIGIBLE * scale[:1]).sum())
    return Triplets(
        left=left[:, :k].T.float().contiguous(),
        scale=scale[:k].clone(),
        right=right[:k].float().contiguous(),
        residual=torch.finfo(torch.float64).eps * scale[:1].square().expand(k),
        following=float(scale[k]) if k < len(scale) else 0.0,
        spectrum=scale,
    )


def is_small(m: int, n: int) -> bool:
    """Whether an (m, n) matrix is decomposed exactly."""
    return min(m, n) <= EXACT_SIDE or m * n * min(m, n) <= EXACT_WORK


def leading_triplets(
    matrix: Float[Tensor, "d_out d_in"] | Blocks,
    rank: int,
    *,
    generator: torch.Generator,
    side: Side = "write",
    polished: bool = False,
    gains: Gains = ONES,
) -> Triplets:
    """Top singular triplets of a stored matrix within its gains; left vectors live on `side`.

    A bfloat16 matrix is multiplied in bfloat16 unless its spectrum is too steep for that.
    """
    if is_small(*matrix.shape):
        matrix = matrix.cpu() if isinstance(matrix, Tensor) else matrix.whole()
        matrix = folded(matrix, gains)
        return exact_svd(matrix if side == "write" else matrix.T, rank)
    state = generator.get_state()
    plain = Dense(matrix, side, gains=gains)
    precise = replace(plain, precise=True)
    with fast_float32(matrix):
        if matrix.dtype == torch.float32:
            return block_krylov(precise, rank, generator=generator)
        found = block_krylov(plain, rank, generator=generator, reach=BFLOAT16_REACH)
        if out_of_reach(found.scale, rank, BFLOAT16_REACH):
            generator.set_state(state)
            return block_krylov(precise, rank, generator=generator)
        # the block recurrence cannot see the rounding of its own products
        rounding = torch.finfo(matrix.dtype).eps / 2 * found.scale * found.scale[0]
        found = replace(found, residual=torch.hypot(found.residual, rounding))
        return polish(precise, found) if polished else found


def out_of_reach(scale: Float[Tensor, " k"], rank: int, reach: float) -> bool:
    """Whether any of the first `rank` values is too small, or lost, beside the first."""
    return len(scale) < rank or bool(scale[rank - 1] < reach * scale[0])


def block_krylov(
    operator: Operator,
    rank: int,
    *,
    generator: torch.Generator,
    block: int | None = None,
    tolerance: float = 1e-4,
    angle_tolerance: float = 5e-3,
    max_steps: int = 20,
    reach: float = 0.0,
) -> Triplets:
    """Leading triplets of an operator.

    Args:
        generator: draws the sketch; never the generator that made the matrix.
        block: sketch width; default max(16, rank rounded up to 8).
        tolerance: stop when s₁ moved by less than this, relative, every other reported value by
            less than 300 times this (values inside a dense bulk move slowly and carry little), and
        angle_tolerance: the first vector (the span of its near-equal block) turned by less; or
            when the residuals already bound the errors by as much.
        reach: give up after two steps when the products cannot resolve the values asked for.

    A zero operator gives no triplets.
    """
    m, n = operator.shape
    width = min(block or max(16, 8 * math.ceil(rank / 8)), m, n)
    draw = torch.randn(n, width, generator=generator)
    new, factor = orthonormalise(operator.times(draw), None)
    basis = new
    rows = torch.zeros(0, n)
    gram = torch.zeros(0, 0, dtype=torch.float64)
    values = torch.zeros(0, dtype=torch.float64)
    vectors = torch.zeros(0, 0, dtype=torch.float64)
    residual = torch.zeros(0, dtype=torch.float64)
    before = values
    step = 0
    while new.shape[1] and step < max_steps:
        step += 1
        before, turned_from = values, vectors
        rows_new = operator.left_times(new.T.contiguous())
        rows = torch.cat([rows, rows_new])
        gram = _extend(gram, rows)
        values, vectors = _ritz(gram)
        new, factor = orthonormalise(operator.times(rows_new.T), basis)
        last = vectors[-rows_new.shape[0] :]
        residual = (factor @ last).norm(dim=0) if new.shape[1] else torch.zeros_like(values)
        if _bounded(values, residual, rank, tolerance, angle_tolerance):
            break
        if _settled(before, values, turned_from, vectors, rank, tolerance, angle_tolerance):
            break
        if reach and step == 2 and out_of_reach(values, rank, reach):
            break
        room = min(m, n) - basis.shape[1]
        if room <= 0:
            break
        new = new[:, :room]
        basis = torch.cat([basis, new], dim=1)
    k = int((values[:rank] > NEGLIGIBLE * values[:1]).sum())
    top = vectors[:, :k].float()
    used = basis[:, : rows.shape[0]]
    rounding = FLOAT32_ERROR * values[:k] * values[:1]
    return Triplets(
        left=(used @ top).T.contiguous(),
        scale=values[:k],
        right=(top / values[:k].float()).T @ rows,
        residual=torch.hypot(residual[:k], rounding),
        following=float(values[k]) if k < len(values) else 0.0,
        steps=step,
        previous=float(before[0]) if len(before) else 0.0,
    )


def orthonormalise(
    y: Float[Tensor, "m b"], basis: Float[Tensor, "m l"] | None
) -> tuple[Float[Tensor, "m c"], Float[Tensor, "c b"]]:
    """``(Q, R)`` with ``y − P_basis y = Q R``: two Gram-Schmidt passes, Cholesky-QR in each.

    Columns that lie in the span already (to float32 rounding) are dropped; R is float64.
    """
    size = float(y.norm())
    total = torch.eye(y.shape[1], dtype=torch.float64)
    for _ in range(2):
        if basis is not None and y.shape[1]:
            y = y - basis @ (basis.T @ y)
        y, factor = _qr(y, 1e-6 * size)
        total = factor @ total
        size = 1.0
    return y, total


def _qr(y: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Cholesky-QR with a float64 Gram; Householder where the columns are nearly dependent."""
    if y.shape[1] == 0:
        return y, torch.zeros(0, y.shape[1], dtype=torch.float64)
    wide = y.double()
    lower, info = torch.linalg.cholesky_ex(wide.T @ wide)
    diagonal = lower.diagonal()
    if int(info) == 0 and float(diagonal.min()) > max(floor, 1e-6 * float(diagonal.max())):
        q = torch.linalg.solve_triangular(lower, wide.T, upper=False).T
        return q.float(), lower.T
    q, factor = torch.linalg.qr(wide)
    keep = factor.diagonal().abs() > floor
    return q[:, keep].float(), factor[keep]


def _extend(gram: Float[Tensor, "l l"], rows: Float[Tensor, "k n"]) -> Float[Tensor, "k k"]:
    """The Gram of all rows in float64, given that of the first ``len(gram)``."""
    old, k = gram.shape[0], rows.shape[0]
    side = torch.zeros(k - old, k, dtype=torch.float64)
    for start in range(0, rows.shape[1], _COLUMNS):  # a float64 copy of all costs fresh memory
        part = rows[:, start : start + _COLUMNS].double()
        side.addmm_(part[old:], part.T)
    full = torch.empty(k, k, dtype=torch.float64)
    full[:old, :old], full[old:], full[:old, old:] = gram, side, side[:, :old].T
    return full


def _ritz(gram: Tensor) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _bounded(
    values: Tensor, residual: Tensor, rank: int, tolerance: float, angle_tolerance: float
) -> bool:
    """The stop rule by a-posteriori bounds: no step is spent on confirming the one before.

    ``|s² − σ²| ≤ ‖r‖`` always, and ``≤ ‖r‖²/gap`` where there is a gap (Parlett 1998, ch. 11).
    """
    k = min(rank, len(values) - 1)
    if k < rank or float(values[0]) == 0.0:
        return False
    squares = values.square()
    if bool((residual[:k] > 600 * tolerance * squares[:k]).any()):
        return False
    together = int((values > (1 - NEAR_EQUAL) * values[0]).sum())
    if together == len(values):
        return False
    gap = float(squares[together - 1] - squares[together])
    angle = float(residual[:together].norm()) / gap if gap > 0 else math.inf
    return angle < angle_tolerance and angle**2 < 2 * tolerance


def _settled(
    before: Tensor,
    values: Tensor,
    turned_from: Tensor,
    vectors: Tensor,
    rank: int,
    tolerance: float,
    angle_tolerance: float,
) -> bool:
    """The stop rule; turning is measured in coefficients, where the old basis is a prefix."""
    k = min(rank, len(before))
    if k == 0 or float(values[0]) == 0.0:
        return False
    moved = (values[:k] - before[:k]).abs()
    if float(moved[0]) > tolerance * float(values[0]):
        return False
    if bool((moved > 300 * tolerance * values[:k]).any()):
        return False
    together = int((values > (1 - NEAR_EQUAL) * values[0]).sum())
    overlap = vectors[: turned_from.shape[0], :together].T @ turned_from[:, 0]
    return float((1 - overlap.square().sum()).clamp(min=0)) ** 0.5 < angle_tolerance


def polish(operator: Operator, found: Triplets) -> Triplets:
    """One sweep of float32 products and a Rayleigh-Ritz step on the result.

    Residuals are taken over unchanged: they bound the unpolished vectors.
    """
    if len(found) == 0:
        return found
    left, _ = orthonormalise(operator.times(found.right.T), None)
    rows = operator.left_times(left.T.contiguous())
    values, vectors = _ritz(_extend(torch.zeros(0, 0, dtype=torch.float64), rows))
    top = vectors.float()
    return replace(
        found,
        left=(left @ top).T.contiguous(),
        scale=values,
        right=(top / values.float()).T @ rows,
    )


def top_value(operator: Operator, *, generator: torch.Generator) -> float:
    """The largest singular value to about 0.3 %, for null edges.

    At a dense edge the Ritz value approaches from below, no slower than 1/steps². It is stopped
    early; half the extrapolation by that law, and no more than the residual allows, was within
    0.4 % on all noise matrices tried.
    """
    found = block_krylov(
        operator, 1, generator=generator, block=16, tolerance=5e-3, angle_tolerance=2.0
    )
    if len(found) == 0:
        return 0.0
    top, residual = float(found.scale[0]), float(found.residual[0])
    gap = top**2 - found.following**2
    room = min(residual, residual**2 / gap if gap > 0 else math.inf) / (2 * top)
    ahead = (top - found.previous) * (found.steps - 1) ** 2 / (2 * found.steps - 1)
    return top + min(0.5 * ahead, room)


def blocks_of(scale: Float[Tensor, " k"], noise: float = 0.0) -> list[int]:
    """For each component the number of its block of near-equal singular values.

    Entrywise noise of standard deviation σ turns neighbours into each other by about σ / gap, so
    neighbours closer than 5 σ (an angle of 0.2), or than `NEAR_EQUAL` relative, share a block.
    """
    numbers = [0] * len(scale)
    for i in range(1, len(scale)):
        gap = float(scale[i - 1] - scale[i])
        close = gap < max(NEAR_EQUAL * float(scale[i - 1]), 5 * noise)
        numbers[i] = numbers[i - 1] + (not close)
    return numbers
