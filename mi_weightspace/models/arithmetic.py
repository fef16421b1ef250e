"""Faster float32 matrix products on a CPU, where they are still float32.

torch hands float32 products to MKL, which runs at half speed and less on processors that are not
Intel's; it hands them to oneDNN when reduced precision is allowed. On a processor without matrix
tiles (AMX) oneDNN does not reduce anything, and is faster. Whether that holds is found out by
multiplying, not by the name of the processor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator

TOLERANCE = 2e-6
"""Relative error (Frobenius norm, against float64) of a float32 product; bfloat16's is 2e-3 and
tensor float's 3e-4."""
GAIN = 1.3
"""Least ratio of the times that is worth a switch."""
SHAPES = ((512, 128, 512), (64, 512, 128), (2048, 32, 96), (96, 1536, 320), (17, 129, 65))
"""Rows, inner width and columns of the products tried."""
_REPEATS = 12


@contextmanager
def fast_float32() -> Iterator[bool]:
    """Within the context float32 matrix products on the CPU take the faster of two true paths.

    Yields whether that is another path than torch's own choice; where it is not, nothing is
    changed. It is found out once a process (some 50 ms): other products must be exact to
    `TOLERANCE` on every one of `SHAPES`, in both orientations and batched, and faster by `GAIN`.
    The last bits differ from those outside the context. The fused attention kernel is *slower*
    within it: use `Lens.written_attention` too. The switch is one of the process, and while it is
    on `torch.get_float32_matmul_precision` raises (torch mixes no older setting with it).
    """
    switch = _switch()
    if switch is None or not worthwhile():
        yield False
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield True
    finally:
        switch.fp32_precision = before


_decided: list[bool] = []


def worthwhile() -> bool:
    """Whether products with the switch on are float32 products, and faster; found out once."""
    if not _decided:
        _decided.append(exact() and _faster())
    return _decided[0]


def decide(choice: bool) -> bool:
    """Make an earlier process' choice this one's: a busy machine may time otherwise.

    Returns whether it can be: products that are not float32 ones are never chosen.
    """
    if choice and not exact():
        return False
    _decided[:] = [choice]
    return True


def forget() -> None:
    """Ask again the next time."""
    _decided.clear()
    exact.cache_clear()


@cache
def exact() -> bool:
    """Whether products with the switch on are float32 products."""
    switch = _switch()
    if switch is None:
        return False
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        return all(product_error(*shape) <= TOLERANCE for shape in SHAPES)
    finally:
        switch.fp32_precision = before


def _faster() -> bool:
    switch = _switch()
    before = switch.fp32_precision
    try:
        return _gain(switch, before) >= GAIN
    finally:
        switch.fp32_precision = before


def product_error(rows: int, inner: int, columns: int) -> float:
    """Largest relative error of the products of a layer: forward, its two gradients, batched."""
    draw = generator(0, "arithmetic", rows, inner, columns)
    x = torch.randn(rows, inner, generator=draw)
    w = torch.randn(columns, inner, generator=draw)
    y = torch.randn(rows, columns, generator=draw)
    heads = torch.randn(4, min(rows, 128), 32, generator=draw)
    pairs = [(x, w.T), (y, w), (y.T, x), (heads, heads.mT)]
    errors = [_relative(a @ b, a.double() @ b.double()) for a, b in pairs]
    errors.append(_relative(torch.addmm(y, x, w.T), y.double() + x.double() @ w.double().T))
    errors.append(_relative(torch.nn.functional.linear(x[None], w)[0], x.double() @ w.double().T))
    return max(errors)


def _relative(found: Float[Tensor, "*n"], exact: Float[Tensor, "*n"]) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _gain(switch: Any, plain: str) -> float:
    """Time of a product without the switch over the time with it; the best of several turns."""
    draw = generator(0, "arithmetic", "time")
    x = torch.randn(512, 128, generator=draw)
    w = torch.randn(512, 128, generator=draw)
    best = {plain: float("inf"), "bf16": float("inf")}
    for _ in range(_REPEATS):
        for name in best:
            switch.fp32_precision = name
            started = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[name] = min(best[name], time.perf_counter() - started)
    return best[plain] / best["bf16"]


def _switch() -> Any:
    """torch's setting for oneDNN's matrix products; None where it has none."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    known = torch.backends.mkldnn.is_available() and hasattr(matmul, "fp32_precision")
    return matmul if known else None
