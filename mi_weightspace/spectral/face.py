"""One side of a matrix under judgement: what the tests of `core.evidence` need of it.

A large matrix is never copied, transposed or widened: norm gains and the scaling of its rows go
into the thin factors of products with the stored difference. What directions share is computed
once: one product for all of them with their controls, one set of signs, one sketch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.evidence import (
    inverse_sizes,
    projected_energy,
    row_energies,
    row_normalised,
    sign_cosine_p,
    sign_flip_ratio_p,
)
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Side, Site
from mi_weightspace.core.stats import rank_p, shared_signs
from mi_weightspace.models.rounding import flip_signs
from mi_weightspace.models.weights import Difference, WeightSource
from mi_weightspace.spectral.decompose import UNRESOLVED_ANGLE, clears, gains_of
from mi_weightspace.spectral.dense import ONES, Dense, Gains, fast_float32, folded
from mi_weightspace.spectral.form import subtract
from mi_weightspace.spectral.krylov import (
    Triplets,
    block_krylov,
    blocks_of,
    leading_triplets,
    top_value,
)

LARGE = 2**22
"""Entries from which a matrix is large."""
SKETCH = 128
NORMED_TOLERANCE = 1e-3
"""Of the first singular value of a large row-normalised matrix, relative."""
NORMED_ANGLE = 0.03
"""Of its first vector: a sign test over thousands of terms does not see it."""
_BLOCK = 256


class Nulls(NamedTuple):
    """How the sign-flip nulls of one direction are drawn."""

    n_null: int
    seed: int
    name: str


class Face(Protocol):
    """One side of a matrix D, rows indexed by the coordinates of its directions.

    Attributes:
        energies: ``‖D_i‖²``.
        left: the first left vector of the row-normalised D, which the sign test is about.
    """

    @property
    def energies(self) -> Float[Tensor, " d"]: ...

    @property
    def left(self) -> Float[Tensor, " d"]: ...

    def resolved(self, *, needed: bool) -> bool | None:
        """Whether `left` is certified and above the edge of the same matrix with random entry
        signs; None where it is costly and not `needed`."""
        ...

    def projected(self, vectors: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """``‖wᵀD‖²`` of each row."""
        ...

    def written(self, shift: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
        """``D x``."""
        ...

    def flip_p(self, vector: Float[Tensor, " d"], nulls: Nulls, *, decides: bool) -> float:
        """p of R(w) under sign flips; `decides`: a verdict reads it."""
        ...

    def cosine_ps(
        self, vectors: Sequence[Float[Tensor, " d"]], nulls: Sequence[Nulls]
    ) -> list[float]:
        """p of each |⟨left, w⟩| under sign flips."""
        ...


def faces(source: WeightSource, site: Site, *, fold: bool, seed: int, stage: str) -> Faces:
    """Both sides of a matrix of `source`, formed once; the next call of this thread ends them."""
    gains = gains_of(source, site) if fold else ONES
    large = site.d_out * site.d_in >= LARGE
    # nulls that directions share are drawn anew for each stage
    name = f"{stage}/{site.name}" if large else site.name
    if large and isinstance(source, Difference) and source.factors(site) is None:
        matrix = subtract(source.before.stored(site), source.after.stored(site))
        return Faces(matrix, gains, seed, name, large, own=True)
    return Faces(source.weight(site).cpu(), gains, seed, name, large)


class Faces:
    """A matrix in memory and its two sides.

    Args:
        own: nobody else sees the matrix, so that its signs may be flipped in place.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "d_out d_in"],
        gains: Gains,
        seed: int,
        name: str,
        large: bool,
        *,
        own: bool = False,
    ) -> None:
        self._matrix, self._gains, self._own = matrix, gains, own
        self._seed, self._name, self._large = seed, name, large

    def __call__(self, side: Side) -> Face:
        name = f"{self._name}/{side}"
        if self._large:
            dense = Dense(self._matrix, side, gains=self._gains)
            return LargeFace(dense, seed=self._seed, name=name, own=self._own)
        matrix = folded(self._matrix, self._gains).float()
        oriented = matrix if side == "write" else matrix.T.contiguous()
        return SmallFace(oriented, seed=self._seed, name=name)


class SmallFace:
    """Everything on the matrix itself, signs drawn for each direction."""

    def __init__(self, matrix: Float[Tensor, "d n"], *, seed: int, name: str) -> None:
        self.matrix, self._seed, self._name = matrix, seed, name

    @cached_property
    def _energies(self) -> Tensor:
        return row_energies(self.matrix)

    @property
    def energies(self) -> Float[Tensor, " d"]:
        return self._energies

    @cached_property
    def _normed(self) -> tuple[Tensor, bool]:
        normed = row_normalised(self.matrix, self.energies)
        draw = generator(self._seed, "row normalised", self._name)
        found = leading_triplets(normed, 4, generator=draw)
        flip_signs(normed, seed=self._seed, name=f"row normalised {self._name}")
        draw = generator(self._seed, "row normalised edge", self._name)
        return found.left[0], _is_resolved(found, top_value(Dense(normed), generator=draw), normed)

    @property
    def left(self) -> Float[Tensor, " d"]:
        return self._normed[0]

    def resolved(self, *, needed: bool) -> bool | None:
        return self._normed[1]

    def projected(self, vectors: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        return projected_energy(self.matrix, vectors)

    def written(self, shift: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
        return self.matrix @ shift

    def flip_p(self, vector: Float[Tensor, " d"], nulls: Nulls, *, decides: bool) -> float:
        return sign_flip_ratio_p(self.matrix, vector, **nulls._asdict())

    def cosine_ps(
        self, vectors: Sequence[Float[Tensor, " d"]], nulls: Sequence[Nulls]
    ) -> list[float]:
        pairs = zip(vectors, nulls, strict=True)
        return [sign_cosine_p(self.left, w, **own._asdict()) for w, own in pairs]


class LargeFace:
    """The same by products with the stored matrix; the directions share their signs.

    Flips that no verdict reads are done on a sketch ``D Ω`` with `SKETCH` Gaussian columns.
    Whatever Ω is, flipping signs of rows of D flips those of D Ω, so the test stays exact; what it
    costs falls by n / `SKETCH`. The price is power: energies are known to ``√(2/SKETCH)`` = 12 %,
    so that an R below about 1.3 is not told from 1. Products with bfloat16 are bfloat16: R is good
    to 1e-3.
    """

    def __init__(self, dense: Dense, *, seed: int, name: str, own: bool = False) -> None:
        self.dense, self._seed, self._name, self._own = dense, seed, name, own

    @cached_property
    def _energies(self) -> Tensor:
        return self.dense.energies()

    @property
    def energies(self) -> Float[Tensor, " d"]:
        return self._energies

    @cached_property
    def _scaled(self) -> Dense:
        """Rows of unit norm: the scaling joins the gains of this side."""
        side, (read, write) = self.dense.side, self.dense.gains
        factor = inverse_sizes(self.energies).float()
        if side == "write":
            gains = Gains(read, factor if write is None else factor * write)
        else:
            gains = Gains(factor if read is None else factor * read, write)
        return replace(self.dense, gains=gains)

    @cached_property
    def _found(self) -> Triplets:
        draw = generator(self._seed, "row normalised", self._name)
        with fast_float32(self.dense.matrix):
            found = block_krylov(
                self._scaled,
                4,
                generator=draw,
                tolerance=NORMED_TOLERANCE,
                angle_tolerance=NORMED_ANGLE,
            )
        rounding = torch.finfo(self.dense.matrix.dtype).eps / 2 * found.scale * found.scale[:1]
        return replace(found, residual=torch.hypot(found.residual, rounding))

    @property
    def left(self) -> Float[Tensor, " d"]:
        return self._found.left[0]

    def resolved(self, *, needed: bool) -> bool | None:
        return self._resolved if needed else None

    @cached_property
    def _resolved(self) -> bool:
        scaled, name = self._scaled, f"row normalised {self._name}"
        assert isinstance(scaled.matrix, Tensor)
        matrix = scaled.matrix if self._own else scaled.matrix.clone()
        flip_signs(matrix, seed=self._seed, name=name)
        draw = generator(self._seed, "row normalised edge", self._name)
        with fast_float32(matrix):
            edge = top_value(replace(scaled, matrix=matrix), generator=draw)
        if self._own:
            flip_signs(matrix, seed=self._seed, name=name)  # and back
        return _is_resolved(self._found, edge, matrix)

    def projected(self, vectors: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        first: dict[bytes, int] = {}  # contrasts of one set share their controls
        place = [first.setdefault(row.tobytes(), len(first)) for row in vectors.float().numpy()]
        once = [place.index(i) for i in range(len(first))]
        found = torch.cat([self._energy(block) for block in vectors[once].split(_BLOCK)])
        return found[place]

    def _energy(self, vectors: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        with fast_float32(self.dense.matrix):
            return self.dense.left_times(vectors).square_().sum(1).double()

    def written(self, shift: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
        return self.dense.times(shift[:, None])[:, 0]

    @cached_property
    def _sketch(self) -> Float[Tensor, "d r"]:
        draw = generator(self._seed, "sketch", self._name)
        columns = torch.randn(self.dense.shape[1], SKETCH, generator=draw)
        with fast_float32(self.dense.matrix):
            return self.dense.times(columns)

    _drawn: Tensor | None = None

    def _signs(self, nulls: Nulls) -> Float[Tensor, "1+b d"]:
        """Ones, then `n_null` draws."""
        d = self.dense.shape[0]
        if self._drawn is None or len(self._drawn) != 1 + nulls.n_null:
            drawn = shared_signs(d, nulls.n_null, seed=nulls.seed, name=self._name)
            self._drawn = torch.cat([torch.ones(1, d, dtype=drawn.dtype), drawn])
        return self._drawn

    def flip_p(self, vector: Float[Tensor, " d"], nulls: Nulls, *, decides: bool) -> float:
        signs = self._signs(nulls)
        if decides:
            blocks = signs.split(_BLOCK)
            found = torch.cat([self._energy(block.float() * vector) for block in blocks])
        else:
            # rounding the sketch is the same for all flips: the test stays exact
            weighted = (self._sketch * vector[:, None]).to(signs.dtype)
            found = (signs @ weighted).float().square_().sum(1)
        return float(rank_p(found[0], found[1:]))

    def cosine_ps(
        self, vectors: Sequence[Float[Tensor, " d"]], nulls: Sequence[Nulls]
    ) -> list[float]:
        terms = (torch.stack(list(vectors)) * self.left).T.contiguous()
        signs = self._signs(nulls[0]).split(_BLOCK)
        sums = torch.cat([block.float() @ terms for block in signs]).abs()
        return [float(rank_p(own[0], own[1:])) for own in sums.T]


def _is_resolved(found: Triplets, edge: float, matrix: Tensor) -> bool:
    m, n = matrix.shape
    noise = edge / (math.sqrt(m) + math.sqrt(n))
    last = blocks_of(found.scale, noise).count(0) - 1
    certified = found.certificate(0, last) <= UNRESOLVED_ANGLE
    return bool(certified and clears(float(found.scale[0]), edge, m, n))
