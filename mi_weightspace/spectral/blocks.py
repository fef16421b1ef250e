"""A weight difference that is never held whole: formed a block of rows at a time, in every pass.

For a matrix that does not fit the memory it is given. Every product reads both checkpoints again
(memory-mapped, so from the page cache or the disk); the numbers that are multiplied are the same as
those of a matrix in memory, rounding included.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.seeds import numpy_generator
from mi_weightspace.core.site import Site
from mi_weightspace.models.rounding import flip_rows, sign_rows
from mi_weightspace.spectral.form import held_bytes, release_buffers, stored_dtype

BLOCK_BYTES = 14
"""Memory of an entry of a block: two float32 sides, the result, its product's working copy."""
BLOCK_ENTRIES = 2**20
"""Larger blocks are no faster, and the C library keeps what they leave."""
WORKSPACE_ROWS = 2 * 20 * 16
"""Vectors of both sides that 20 steps of width 16 keep, twice: the basis is copied as it grows."""
LIBRARY_BYTES = 300 * 2**20
"""Private memory of a worker that holds no matrix, all it imports on the way included (0.31 GB
measured; 0.26 before it reads anything)."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """``after − before`` as blocks of rows.

    Attributes:
        before, after: (d_out, d_in) as stored; `before` None for a checkpoint by itself.
        rows: rows of a block; a multiple of `sign_rows` (one where that is more).
        signs: (seed, name) of random signs for the entries, as `rounding.flip_signs` draws them.
    """

    before: Float[Tensor, "d_out d_in"] | None
    after: Float[Tensor, "d_out d_in"]
    rows: int
    signs: tuple[int, str] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        d_out, d_in = self.after.shape
        return d_out, d_in

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.after if self.before is None else self.before, self.after)

    def numel(self) -> int:
        return self.after.numel()

    def flipped(self, seed: int, name: str) -> Blocks:
        """The same with a random sign for every entry: the null of no structure."""
        return replace(self, signs=(seed, name))

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "r d_in"]]]:
        """(first row, block), in order."""
        draw = (
            None if self.signs is None else numpy_generator(self.signs[0], "signs", self.signs[1])
        )
        chunk = sign_rows(self.shape[1])
        for start in range(0, self.shape[0], self.rows):
            block = self._block(slice(start, min(start + self.rows, self.shape[0])))
            if draw is not None:
                for i in range(0, len(block), chunk):
                    flip_rows(block[i : i + chunk], draw)
            yield start, block

    def whole(self) -> Float[Tensor, "d_out d_in"]:
        """All of it, in memory."""
        return torch.cat([block for _, block in self])

    def _block(self, part: slice) -> Float[Tensor, "r d_in"]:
        block = self.after[part].to(torch.float32, copy=True)
        base = self.after if self.before is None else self.before
        if self.before is not None:
            block.sub_(self.before[part])
        return block.to(stored_dtype(base, self.after))


def block_rows(shape: tuple[int, int], itemsize: int, limit: int, name: str) -> int | None:
    """Rows of a block so that a worker stays below `limit` bytes; None where all rows fit.

    Args:
        itemsize: bytes of an entry of the difference.
        limit: bytes of private memory (file pages do not count) the process may reach.

    Raises:
        ConfigError: a limit that leaves no room for the smallest block.
    """
    m, n = shape
    fixed = max(private_bytes() - held_bytes(), LIBRARY_BYTES) + _workspace(m, n)
    if fixed + itemsize * m * n <= limit:
        return None
    release_buffers()
    _trim()
    fixed = max(private_bytes(), LIBRARY_BYTES) + _workspace(m, n)
    least = sign_rows(n)
    entries = min((limit - fixed) // BLOCK_BYTES, BLOCK_ENTRIES)
    rows = entries // n // least * least
    if rows < 1:
        raise _too_little(limit, 1, fixed + BLOCK_BYTES * n * least, f"{name} ({m}×{n})")
    return int(min(rows, m))


def workers_within(limit: float, jobs: int, sites: Sequence[Site]) -> tuple[int, int]:
    """(workers, bytes for each): as many of `jobs` workers as can do the largest matrix.

    Args:
        limit: bytes for all of them together.

    Raises:
        ConfigError: a limit below the need of one.
    """
    largest = max(sites, key=lambda s: s.d_out * s.d_in)
    m, n = largest.d_out, largest.d_in
    used = max(private_bytes() - held_bytes(), LIBRARY_BYTES)
    need = used + _workspace(m, n) + BLOCK_BYTES * n * sign_rows(n)
    workers = min(jobs, int(limit / need))
    if workers < 1:
        raise _too_little(limit, jobs, need, f"{largest.name} ({m}×{n})")
    return workers, int(limit / workers)


def _workspace(m: int, n: int) -> int:
    return 4 * WORKSPACE_ROWS * (m + n)


def _too_little(limit: float, jobs: int, need: int, name: str) -> ConfigError:
    return ConfigError(
        "memory limit (--memory-limit)",
        given=f"{limit / 1e9:g} GB for {jobs} worker{'s' * (jobs != 1)} and {name}",
        expected=f"at least {need / 1e9:.2g} GB a worker",
        remedy="Raise the limit, or leave large matrices out with --sites (sites=).",
    )


def _trim() -> None:
    """Give freed heap back to the system: the C library keeps what the matrix before took."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def private_bytes() -> int:
    """Memory of this process that no file backs; `LIBRARY_BYTES` where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("RssAnon"):
                    return 1024 * int(line.split()[1])
    except OSError:
        return LIBRARY_BYTES
    return LIBRARY_BYTES
