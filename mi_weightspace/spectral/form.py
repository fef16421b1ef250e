"""The difference of two stored matrices and its entry statistics, in one pass."""

from __future__ import annotations

import math
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


def form(before: Float[Tensor, "d_out d_in"], after: Float[Tensor, "d_out d_in"]) -> Formed:
    """``after − before`` in chunks of rows, float32 or, where both are bfloat16, bfloat16.

    The subtraction is float32; storing it in bfloat16 is exact wherever the two entries are within
    a factor of two (Sterbenz). Statistics are float32 within a chunk (1e-6), float64 across.
    """
    both = before.dtype == after.dtype == torch.bfloat16
    result = torch.empty(before.shape, dtype=torch.bfloat16 if both else torch.float32)
    m, n = before.shape
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
