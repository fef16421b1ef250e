"""Products with a matrix that is stored as one difference, seen from either side.

Norm gains are applied to the thin factors of a product: a large bfloat16 difference is then never
copied to float32, whatever the gains of its model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.site import Side
from mi_weightspace.spectral.blocks import Blocks

_FAST_SIZE = 2**20
_CHUNK = 2**20
_CACHE_CHUNK = 2**18


class Gains(NamedTuple):
    """Norm gains around a matrix, ``diag(write)·D·diag(read)``; None for ones."""

    read: Float[Tensor, " d_in"] | None = None
    write: Float[Tensor, " d_out"] | None = None

    @property
    def given(self) -> bool:
        return self.read is not None or self.write is not None


ONES = Gains()


def folded(matrix: Float[Tensor, "d_out d_in"], gains: Gains) -> Float[Tensor, "d_out d_in"]:
    """``diag(write)·D·diag(read)``; float32 and a copy where there are gains."""
    if not gains.given:
        return matrix
    matrix = matrix.to(torch.float32, copy=True)
    if gains.read is not None:
        matrix.mul_(gains.read)
    if gains.write is not None:
        matrix.mul_(gains.write[:, None])
    return matrix


class _Work(threading.local):
    """Products of this thread so far; whole numbers, so that differences of counts are exact."""

    flop = 0


_WORK = _Work()


def flop_done() -> int:
    """Floating-point operations of this thread's products with `Dense` matrices so far."""
    return _WORK.flop


class Operator(Protocol):
    """A matrix known by its products; the rows of its left vectors have length ``shape[0]``."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def times(self, x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]: ...

    def left_times(self, y: Float[Tensor, "b m"]) -> Float[Tensor, "b n"]: ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A stored matrix (float32 or bfloat16) seen from one side.

    Attributes:
        matrix: (d_out, d_in), in memory or formed in blocks as it is read.
        side: ``write``: left vectors are output-side; ``read``: the transpose is decomposed. Both
            use the two fast product forms ``D X`` and ``Yᵀ D``; no transposed view is multiplied.
        precise: products in float32 whatever the storage, a chunk of rows at a time.
        gains: of ``diag(write)·D·diag(read)``, which is what is seen.

    Products run where the matrix is; thin factors come and go, everything else stays on the
    processor.
    """

    matrix: Float[Tensor, "d_out d_in"] | Blocks
    side: Side = "write"
    precise: bool = False
    gains: Gains = ONES

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.matrix.shape
        return (rows, columns) if self.side == "write" else (columns, rows)

    def times(self, x: Float[Tensor, "n b"]) -> Float[Tensor, "m b"]:
        _WORK.flop += self._flop(x.shape[1])
        return self._right(x) if self.side == "write" else self._left(x.T.contiguous()).T

    def left_times(self, y: Float[Tensor, "b m"]) -> Float[Tensor, "b n"]:
        _WORK.flop += self._flop(y.shape[0])
        return self._left(y) if self.side == "write" else self._right(y.T).T

    def _flop(self, width: int) -> int:
        return 2 * self.matrix.numel() * width

    def energies(self) -> Float[Tensor, " m"]:
        """``‖row‖²`` of the matrix seen; float32 within a row of D (1e-6), float64 in all."""
        along = 1 if self.side == "write" else 0
        read, write = (None if g is None else g.to(self._device) for g in self.gains)
        found = torch.zeros(self.shape[0], dtype=torch.float64)
        for start, chunk in self._chunks(_CACHE_CHUNK):
            stop = start + chunk.shape[0]
            own = chunk.float() if read is None else chunk * read
            own = own if write is None else own * write[start:stop, None]
            sums = own.square().sum(along).double().cpu()  # `own` may be the matrix itself
            if along:
                found[start:stop] = sums
            else:
                found += sums
        return found

    def fro(self) -> float:
        """Frobenius norm of the matrix seen."""
        return math.sqrt(float(self.energies().sum()))

    def _right(self, x: Tensor) -> Tensor:
        """``diag(write) D diag(read) x``."""
        x = x if self.gains.read is None else x * self.gains.read[:, None]
        found = self._stored_right(x.contiguous())
        return found if self.gains.write is None else found.mul_(self.gains.write[:, None])

    def _left(self, y: Tensor) -> Tensor:
        """``y diag(write) D diag(read)``."""
        y = y if self.gains.write is None else y * self.gains.write
        found = self._stored_left(y.contiguous())
        return found if self.gains.read is None else found.mul_(self.gains.read)

    def _stored_right(self, x: Tensor) -> Tensor:
        if isinstance(self.matrix, Tensor) and not self._widened:
            return (self.matrix @ x.to(self.matrix)).float().cpu()
        dtype = self._working
        x = x.to(self._device, dtype)
        return torch.cat([(chunk.to(dtype) @ x).float().cpu() for _, chunk in self._chunks()])

    def _stored_left(self, y: Tensor) -> Tensor:
        if isinstance(self.matrix, Tensor) and not self._widened:
            return (y.to(self.matrix) @ self.matrix).float().cpu()
        dtype = self._working
        y = y.to(self._device)
        total = torch.zeros(y.shape[0], self.matrix.shape[1], device=self._device)
        for start, chunk in self._chunks():
            total += y[:, start : start + chunk.shape[0]].to(dtype) @ chunk.to(dtype)
        return total.cpu()

    @property
    def _widened(self) -> bool:
        return self.precise and self.matrix.dtype != torch.float32

    @property
    def _device(self) -> torch.device:
        return self.matrix.device if isinstance(self.matrix, Tensor) else torch.device("cpu")

    @property
    def _working(self) -> torch.dtype:
        return torch.float32 if self.precise else self.matrix.dtype

    def _chunks(self, entries: int = _CHUNK) -> Iterator[tuple[int, Tensor]]:
        if isinstance(self.matrix, Blocks):
            yield from self.matrix
            return
        rows = max(1, entries // self.matrix.shape[1])
        for start in range(0, self.matrix.shape[0], rows):
            yield start, self.matrix[start : start + rows]


@contextmanager
def fast_float32(matrix: Tensor | Blocks) -> Iterator[None]:
    """Send large float32 products to oneDNN within the context, where that stays float32.

    On processors without bfloat16 tiles oneDNN runs a true float32 kernel, 2.5-4 times faster for
    thin products than MKL on some; where a self-check finds rounding to bfloat16, nothing changes.
    """
    wanted = matrix.dtype == torch.float32 and matrix.numel() >= _FAST_SIZE
    if not (wanted and _onednn_is_accurate()):
        yield
        return
    setting = _matmul_setting()
    previous = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = previous


def _matmul_setting() -> Any:
    """oneDNN's precision setting for products; None in torch versions without it."""
    return getattr(torch.backends.mkldnn, "matmul", None)


@lru_cache(maxsize=1)
def _onednn_is_accurate() -> bool:
    setting = _matmul_setting()
    if setting is None or not torch.backends.mkldnn.is_available():
        return False
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(256, 512, generator=draw)
    b = torch.randn(512, 16, generator=draw)
    previous = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        error = ((a @ b).double() - a.double() @ b.double()).norm() / 512**0.5
    finally:
        setting.fp32_precision = previous
    return float(error) < 1e-3
