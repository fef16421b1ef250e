"""What rounding to the storage precision does to a weight difference.

Let u be the spacing of the stored numbers at a weight and d the true change of that weight. If both
checkpoints were rounded from higher-precision masters, the stored difference is a dithered version
of d: unbiased, with variance ``f(1−f) u²``, f the fractional part of |d|/u. Where d ≪ u that is
``|d| u ≫ d²``: a dense noise floor that inflates Frobenius norms and stable ranks and fills the
spectrum. If the second checkpoint was rounded onto the first one's grid, changes below u/2 are
lost; nothing repairs that, and the two cases cannot be told apart from the files.

The L1 norm is unbiased in the dithered case, so ``√(π/2) · mean|D| · √(mn)`` estimates the size of
a Gaussian change below the floor (5 % low for a low-rank one).

Flags (thresholds for bfloat16; they scale with the storage epsilon):

* ``amber``: relative difference, as stored or with the expected rounding energy taken off, below
  5e-3: norms, ranks and shares are unreliable, leading directions may stand.
* ``red``: relative difference below 3e-5, or s₁ below the rounding edge: nothing is readable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.seeds import generator, numpy_generator

Flag = Literal["none", "amber", "red"]
AMBER = 5e-3
RED = 3e-5
NOISE_ERROR = 0.03
"""Relative error of the expected rounding noise, measured on simulated roundings."""
_BFLOAT16_EPSILON = torch.finfo(torch.bfloat16).eps
_SAMPLE = 2**19


@dataclass(frozen=True)
class RoundingFacts:
    """Rounding of one stored difference.

    Attributes:
        dtype: the coarser of the two storage grids.
        flag: ``none``, ``amber`` or ``red``.
        noise_fro: Frobenius norm the rounding noise is expected to have.
        floor: the s₁ of that noise, spread over the entries as the difference itself is.
        l1_size: the L1-based estimate of the true Frobenius norm.
    """

    dtype: str
    flag: Flag
    noise_fro: float
    floor: float
    l1_size: float


def threshold(value: float, dtype: torch.dtype) -> float:
    """A bfloat16 threshold carried over to another storage precision."""
    return value * torch.finfo(dtype).eps / _BFLOAT16_EPSILON


def spacing(weights: Tensor, dtype: torch.dtype) -> Float[Tensor, ...]:
    """Distance between neighbouring numbers of `dtype` at each weight (subnormals included)."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(weights.double().abs().clamp(min=info.smallest_normal))
    return _power(info.eps, exponent)


def _power(epsilon: float, exponent: Int[Tensor, ...]) -> Float[Tensor, ...]:
    """Spacing of numbers with that `frexp` exponent; exact, as `exp2` need not be."""
    return torch.ldexp(torch.full(exponent.shape, epsilon, dtype=torch.float64), exponent - 1)


def grid_dtype(*stored: Tensor) -> torch.dtype:
    """The coarsest storage grid among tensors: a float32 file may hold bfloat16 numbers."""
    found = [_grid(tensor) for tensor in stored]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _grid(tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor.dtype
    sample = tensor[:: max(1, tensor.shape[0] // 16), :: max(1, tensor.shape[1] // 256)]
    for candidate in (torch.bfloat16, torch.float16):
        if _on(sample, candidate) and bool(sample.any()) and _on(tensor, candidate):
            return candidate
    return torch.float32


def _on(tensor: Tensor, dtype: torch.dtype) -> bool:
    rows = max(1, _SAMPLE // max(1, tensor.shape[1]))  # a whole copy may not fit
    parts = (tensor[i : i + rows] for i in range(0, tensor.shape[0], rows))
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in parts)


def dither_energy(ratio: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """``E f(1−f)`` for a Gaussian change whose mean size is `ratio` spacings.

    Fourier: ``f(1−f) = 1/6 − Σ cos(2πkx)/(π²k²)`` with ``E cos(2πkx) = exp(−2π²k²s²)`` and
    ``s = ratio·√(π/2)``. Below 0.02 spacings, where the series is slow, it is ``ratio − s²``.
    """
    ratio = ratio.double()
    variance = ratio.square() * math.pi / 2
    total = torch.full_like(ratio, 1 / 6)
    for k in range(1, 40):
        total -= torch.exp(-2 * math.pi**2 * k**2 * variance) / (math.pi * k) ** 2
    return torch.where(ratio < 0.02, ratio - variance, total).clamp(min=0)


def noise_energy(
    before: Float[Tensor, "m n"], after: Float[Tensor, "m n"], dtype: torch.dtype
) -> float:
    """Expected rounding energy per entry of ``after − before``.

    Entries are grouped by the exponent of the weight, where the spacing is constant; the mean
    |difference| of a group, which is unbiased, gives its expected noise. Large matrices are judged
    on a fixed sample of rows.
    """
    rows = max(1, _SAMPLE // before.shape[1])
    if rows < before.shape[0]:
        chosen = torch.randperm(before.shape[0], generator=generator(0, "rounding", *before.shape))
        chosen = chosen[:rows].sort().values
        before, after = before[chosen], after[chosen]
    old = before.float()
    size = (after.float() - old).abs().double().flatten()
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(old.double().abs().clamp(min=info.smallest_normal).flatten())
    group, count, total = _grouped(exponent, size)
    step = _power(info.eps, group)
    energy = count * dither_energy(total / count / step) * step.square()
    return float(energy.sum() / len(size))


def _grouped(
    exponent: Int[Tensor, " e"], size: Float[Tensor, " e"]
) -> tuple[Int[Tensor, " g"], Float[Tensor, " g"], Float[Tensor, " g"]]:
    """Exponents that occur, with the number and total size of their entries."""
    lowest = int(exponent.min())
    bins = (exponent - lowest).long()
    count = torch.bincount(bins).double()
    total = torch.bincount(bins, weights=size)
    there = count > 0
    return torch.nonzero(there).flatten() + lowest, count[there], total[there]


def l1_size(mean_absolute: float, m: int, n: int) -> float:
    """``√(π/2) · mean|D| · √(mn)``: the Frobenius norm of a Gaussian change with that L1 norm."""
    return math.sqrt(math.pi / 2) * mean_absolute * math.sqrt(m * n)


def judge(
    before: Float[Tensor, "m n"],
    after: Float[Tensor, "m n"],
    *,
    fro: float,
    before_fro: float,
    mean_absolute: float,
    top: float,
    null_edge: float,
) -> RoundingFacts:
    """The flag of one difference, from its norms and its null edge.

    Args:
        before, after: as stored, (d_out, d_in).
        fro, before_fro: Frobenius norms of the difference and of the earlier matrix.
        top, null_edge: s₁ of the difference and of the difference with random entry signs. Rounding
            noise has independent signs, so its own edge is the null edge scaled by the share of the
            energy that rounding can explain.
    """
    m, n = before.shape
    dtype = grid_dtype(before, after)
    noise = min(math.sqrt(noise_energy(before, after, dtype) * m * n), fro)
    floor = null_edge * noise / fro
    denoised = math.sqrt(max(fro**2 - noise**2, 0.0))
    relative = min(fro, denoised) / before_fro if before_fro > 0 else math.inf
    edge = floor * (1 + NOISE_ERROR + 3 * edge_spread(m, n))
    if top <= edge or (before_fro > 0 and fro / before_fro < threshold(RED, dtype)):
        flag: Flag = "red"
    else:
        flag = "amber" if relative < threshold(AMBER, dtype) else "none"
    return RoundingFacts(
        dtype=str(dtype).removeprefix("torch."),
        flag=flag,
        noise_fro=noise,
        floor=floor,
        l1_size=l1_size(mean_absolute, m, n),
    )


def edge_spread(m: int, n: int) -> float:
    """Relative standard deviation of s₁ of an (m, n) noise matrix (Tracy-Widom, Johnstone 2001)."""
    root = math.sqrt(m) + math.sqrt(n)
    return 0.5 * 1.27 * (m**-0.5 + n**-0.5) ** (1 / 3) / root


def flip_signs(matrix: Float[Tensor, "m n"], *, seed: int, name: str) -> None:
    """Give every entry an independent random sign, in place: the null of no structure.

    Sign bits are flipped on the integer view; the values of the entries, and with them every norm
    of rows and columns, stay.
    """
    draw = numpy_generator(seed, "signs", name)
    rows = sign_rows(matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        flip_rows(matrix[start : start + rows], draw)


def sign_rows(n: int) -> int:
    """Rows whose signs are drawn at a time, for matrices of n columns."""
    return max(1, 2**18 // max(1, n))


def flip_rows(rows: Float[Tensor, "r n"], draw: np.random.Generator) -> None:
    """Signs of the next `sign_rows` rows of a matrix, in place."""
    integer = {4: torch.int32, 2: torch.int16}[rows.element_size()]
    bits = rows.view(integer)
    drawn = _random_bits(draw, bits.shape).to(bits.device, integer)
    bits ^= drawn * -(2 ** (8 * rows.element_size() - 1))


def _random_bits(draw: np.random.Generator, shape: torch.Size) -> Int[Tensor, "m n"]:
    n = shape[0] * shape[1]
    packed = np.frombuffer(draw.bytes(n // 8 + 1), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=n)).view(shape)
