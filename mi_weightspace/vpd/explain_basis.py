"""Least squares of a matrix on rank-one components, and energies inside and outside their spans.

Everything is worked out in coordinates of the two spans, so that a random matrix costs no more than
two random frames. Float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Part = Literal["reweighted", "rewired", "new", "rewired within", "rewired read", "rewired write"]
PARTS: tuple[Part, ...] = get_args(Part)
WHOLE: tuple[Part, ...] = PARTS[:3]
"""The parts that sum to 1; the others are parts of ``rewired``."""
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Basis:
    """Alive components of one matrix, in coordinates of the spaces they span.

    Attributes:
        numbers: their component numbers. sizes: (c,) ‖write_c read_cᵀ‖.
        reads, writes: (c, read_rank), (c, write_rank) unit vectors in those coordinates.
        read_basis, write_basis: (d_in, read_rank), (d_out, write_rank), orthonormal columns.
        gram: (c, c) normal matrix of the unit dyads; factor: Cholesky factor of it plus the ridge.
    """

    numbers: tuple[int, ...]
    sizes: Float[Tensor, " c"]
    reads: Float[Tensor, "c read_rank"]
    writes: Float[Tensor, "c write_rank"]
    read_basis: Float[Tensor, "d_in read_rank"]
    write_basis: Float[Tensor, "d_out write_rank"]
    gram: Float[Tensor, "c c"]
    factor: Float[Tensor, "c c"]

    @classmethod
    def of(
        cls,
        read: Float[Tensor, "C d_in"],
        write: Float[Tensor, "C d_out"],
        numbers: Sequence[int],
        ridge: float,
    ) -> Basis:
        """Components of zero norm are left out. `ridge`: on unit dyads, i.e. relative."""
        kept = torch.tensor(list(numbers), dtype=torch.long)
        reads, writes = read[kept].double(), write[kept].double()
        lengths = reads.norm(dim=1), writes.norm(dim=1)
        real = (lengths[0] * lengths[1]) > 0
        reads = (reads / lengths[0].clamp_min(1e-300)[:, None])[real]
        writes = (writes / lengths[1].clamp_min(1e-300)[:, None])[real]
        read_basis, write_basis = _span(reads), _span(writes)
        reads, writes = reads @ read_basis, writes @ write_basis
        gram = (reads @ reads.T) * (writes @ writes.T)
        factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        return cls(
            tuple(kept[real].tolist()),
            (lengths[0] * lengths[1])[real],
            reads,
            writes,
            read_basis,
            write_basis,
            gram,
            factor,
        )

    def fit(
        self, core: Float[Tensor, "write_rank read_rank"]
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Tensor]:
        """Coefficients on unit dyads, their inner products with G, and the energy explained.

        Args:
            core: G between the two spans; nothing else of G enters.
        """
        inner = ((self.writes @ core) * self.reads).sum(1)
        found = torch.cholesky_solve(inner[:, None], self.factor)[:, 0]
        return found, inner, 2 * (found @ inner) - found @ (self.gram @ found)

    def fractions(
        self,
        core: Float[Tensor, "write_rank read_rank"],
        on_reads: Tensor,
        on_writes: Tensor,
        total: Tensor,
    ) -> Float[Tensor, " parts"]:
        """Energies over `total`, in the order of `PARTS`.

        Args:
            on_reads, on_writes: energy of G on the span of the reads, and of the writes.
        """
        between = core.square().sum()
        reweighted = self.fit(core)[2]
        within = (between - reweighted).clamp_min(0)
        read_only = (on_reads - between).clamp_min(0)
        write_only = (on_writes - between).clamp_min(0)
        new = (total - on_reads - on_writes + between).clamp_min(0)
        rewired = within + read_only + write_only
        parts = torch.stack([reweighted, rewired, new, within, read_only, write_only])
        return parts / total

    def of_matrix(self, update: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " parts"]:
        on_reads, on_writes = update @ self.read_basis, self.write_basis.T @ update
        return self.fractions(
            self.write_basis.T @ on_reads,
            on_reads.square().sum(),
            on_writes.square().sum(),
            update.square().sum(),
        )

    def of_random(
        self, spectrum: Float[Tensor, " r"], draw: torch.Generator
    ) -> Float[Tensor, " parts"]:
        """The same of a matrix with these singular values and random singular vectors."""
        left = self.write_basis.T @ frame(len(self.write_basis), len(spectrum), draw)
        right = self.read_basis.T @ frame(len(self.read_basis), len(spectrum), draw)
        return self.fractions(
            (left * spectrum) @ right.T,
            (right * spectrum).square().sum(),
            (left * spectrum).square().sum(),
            spectrum.square().sum(),
        )


def _span(vectors: Float[Tensor, "c d"]) -> Float[Tensor, "d rank"]:
    """Orthonormal basis of the span of unit vectors."""
    _, sizes, right = torch.linalg.svd(vectors, full_matrices=False)
    top = float(sizes[0]) if len(sizes) else 0.0
    return right[sizes > _RANK_TOLERANCE * top].T


def frame(d: int, r: int, draw: torch.Generator) -> Float[Tensor, "d r"]:
    """r uniformly random orthonormal columns; the signs of QR's diagonal make it uniform."""
    q, upper = torch.linalg.qr(torch.randn(d, r, generator=draw, dtype=torch.float64))
    return q * upper.diagonal().sign()


def spectrum_of(update: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " r"]:
    """Singular values that carry energy, from the smaller Gram matrix."""
    small = update if update.shape[0] <= update.shape[1] else update.T
    values = torch.linalg.eigvalsh(small @ small.T).clamp_min(0).flip(0)
    return values[values > 1e-12 * values[0]].sqrt()
