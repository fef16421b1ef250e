"""The difference of two stored matrices and its entry statistics, in one pass."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 2**17
"""Entries formed at a time: every statistic reads them from the cache, and calls stay few."""


class Formed(NamedTuple):
    """A difference and its entry statistics.

    Attributes:
        fro, before_fro: Frobenius norms of the difference and of the earlier matrix.
        mean_absolute: mean |entry| of the difference.
        changed: share of entries that differ.
        inner: ``⟨after − before, before⟩``.
    """

    matrix: Float[Tensor, "d_out d_in"]
    fro: float
    before_fro: float
    mean_absolute: float
    changed: float
    inner: float


class _Buffers(threading.local):
    """One buffer per thread and precision, as large as the largest matrix so far."""

    def __init__(self) -> None:
        self.held: dict[torch.dtype, Tensor] = {}


_BUFFERS = _Buffers()


def form(
    before: Float[Tensor, "d_out d_in"],
    after: Float[Tensor, "d_out d_in"],
    *,
    reuse: bool = False,
    keep: bool = True,
) -> Formed:
    """``after − before`` in chunks of rows, float32 or, where both are bfloat16, bfloat16.

    The subtraction is float32; storing it in bfloat16 is exact wherever the two entries are within
    a factor of two (Sterbenz). Statistics are float32 within a chunk (1e-6), float64 across.

    Args:
        reuse: put the result in a buffer that this thread's next such call overwrites. In a sweep
            that halves the time: fresh memory of this size costs more than the subtraction.
        keep: False for the statistics alone; the matrix then has no rows.
    """
    dtype = stored_dtype(before, after)
    m, n = before.shape
    if not keep:
        result = torch.empty(0, n, dtype=dtype)
    elif reuse:
        result = _reused(m * n, dtype).view(m, n)
    else:
        result = torch.empty(m, n, dtype=dtype)
    rows = chunk_rows(m, n)
    old, new = (torch.empty(rows, n) for _ in range(2))
    spare = torch.empty(rows, n, dtype=dtype)
    sums = [0.0] * 5
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        height = part.stop - part.start
        w = old[:height].copy_(before[part]).view(-1)
        d = new[:height].copy_(after[part]).view(-1).sub_(w)
        own = result[part] if keep else spare[:height]
        own.copy_(d.view(height, n))
        found = (*_statistics(d, w), _nonzero(own))
        sums = [total + float(value) for total, value in zip(sums, found, strict=True)]
    squares, before_squares, absolute, inner, changed = sums
    size = max(1, before.numel())
    return Formed(
        result,
        math.sqrt(squares),
        math.sqrt(before_squares),
        absolute / size,
        changed / size,
        inner,
    )


def subtract(
    before: Float[Tensor, "d_out d_in"], after: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """The matrix of `form`, bit for bit, without statistics and in the buffer of ``reuse``."""
    dtype = stored_dtype(before, after)
    result = _reused(before.numel(), dtype).view(before.shape)
    rows = chunk_rows(*before.shape)
    for start in range(0, before.shape[0], rows):
        part = slice(start, start + rows)
        if dtype == torch.bfloat16:
            torch.sub(after[part], before[part], out=result[part])  # float32 within, then rounded
        else:
            torch.sub(after[part].float(), before[part].float(), out=result[part])
    return result


def stored_dtype(before: Tensor, after: Tensor) -> torch.dtype:
    """What a difference is kept in: bfloat16 where both sides are."""
    both = before.dtype == after.dtype == torch.bfloat16
    return torch.bfloat16 if both else torch.float32


def chunk_rows(m: int, n: int) -> int:
    """Rows formed at a time."""
    return max(1, min(m, _CHUNK // max(1, n)))


def _statistics(
    d: Float[Tensor, " e"], w: Float[Tensor, " e"]
) -> tuple[float, float, float, float]:
    """``(d·d, w·w, Σ|d|, d·w)``. OpenBLAS takes half the time of torch's own here (measured)."""
    if not len(d):
        return 0.0, 0.0, 0.0, 0.0
    sdot, sasum = _blas()
    d_, w_ = d.numpy(), w.numpy()
    return sdot(d_, d_), sdot(w_, w_), sasum(d_), sdot(d_, w_)


@lru_cache(maxsize=1)
def _blas() -> tuple[Callable[..., float], Callable[..., float]]:
    from scipy.linalg import get_blas_funcs

    sdot, sasum = get_blas_funcs(("dot", "asum"), dtype=np.float32)
    return sdot, sasum


def _nonzero(stored: Tensor) -> int:
    """Entries other than ±0, counted on the bits: seven times faster than on the numbers."""
    integer = {4: torch.int32, 2: torch.int16}[stored.element_size()]
    bits = stored.view(-1).view(integer).numpy()
    if not len(bits):
        return 0
    found = int(np.count_nonzero(bits))
    negative_zero = np.iinfo(bits.dtype).min
    if bits.min() == negative_zero:  # +0 turned into −0 is no change
        found -= int(np.count_nonzero(bits == negative_zero))
    return found


def _reused(size: int, dtype: torch.dtype) -> Tensor:
    held = _BUFFERS.held.get(dtype)
    if held is None or held.numel() < size:
        _BUFFERS.held.pop(dtype, None)
        del held  # before the larger one is made
        held = _BUFFERS.held[dtype] = torch.empty(size, dtype=dtype)
    return held[:size]


def held_bytes() -> int:
    """Memory of this thread's buffers."""
    return sum(held.nbytes for held in _BUFFERS.held.values())


def release_buffers() -> None:
    """Give this thread's buffers back."""
    _BUFFERS.held.clear()
