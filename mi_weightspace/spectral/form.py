"""The difference of two stored matrices and its entry statistics, in one pass."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 2**17
"""Entries formed at a time: small enough that every statistic reads them from the cache."""


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
    before: Float[Tensor, "d_out d_in"], after: Float[Tensor, "d_out d_in"], *, reuse: bool = False
) -> Formed:
    """``after − before`` in chunks of rows, float32 or, where both are bfloat16, bfloat16.

    The subtraction is float32; storing it in bfloat16 is exact wherever the two entries are within
    a factor of two (Sterbenz). Statistics are float32 within a chunk (1e-6), float64 across.

    Args:
        reuse: put the result in a buffer that this thread's next such call overwrites. In a sweep
            that halves the time: fresh memory of this size costs more than the subtraction.
    """
    both = before.dtype == after.dtype == torch.bfloat16
    dtype = torch.bfloat16 if both else torch.float32
    m, n = before.shape
    result = _reused(m * n, dtype).view(m, n) if reuse else torch.empty(m, n, dtype=dtype)
    rows = max(1, min(m, _CHUNK // max(1, n)))
    old, new, spare = (torch.empty(rows, n) for _ in range(3))
    sums = [0.0] * 5
    for start in range(0, m, rows):
        part = slice(start, min(start + rows, m))
        height = part.stop - part.start
        w = old[:height].copy_(before[part]).view(-1)
        d = new[:height].copy_(after[part]).view(-1).sub_(w)
        result[part] = d.view(height, n)
        free = spare[:height].view(-1)  # vector_norm and count_nonzero are 2-5 times slower
        absolute, changed = torch.abs(d, out=free).sum(), torch.ne(d, 0, out=free).sum()
        found = (d.dot(d), w.dot(w), absolute, changed, d.dot(w))
        sums = [total + float(value) for total, value in zip(sums, found, strict=True)]
    squares, before_squares, absolute, changed, inner = sums
    size = max(1, before.numel())
    return Formed(
        result,
        math.sqrt(squares),
        math.sqrt(before_squares),
        absolute / size,
        changed / size,
        inner,
    )


def _reused(size: int, dtype: torch.dtype) -> Tensor:
    held = _BUFFERS.held.get(dtype)
    if held is None or held.numel() < size:
        _BUFFERS.held[dtype] = held = torch.empty(size, dtype=dtype)
    return held[:size]
