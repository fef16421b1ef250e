"""What each training stage changed in each matrix, as something a site can add to its output.

Every stage's matrix is expressed in the coordinates of the *last* stage's site input: with gain g
and shift β of the norm in front, ``x_k = (g_k/g_K) x_K + β_k − (g_k/g_K) β_K``, so

    W̃_k = W_k diag(g_k/g_K),   b̃_k = b_k + W_k (β_k − (g_k/g_K) β_K)

and ``dW_k = W̃_k − W̃_{k−1}`` is exact although the norms changed too. A change of the bias is one
more column, read from a constant 1 (vpd.md §9).

A low-rank update (an adapter's factors) is kept as ``left · core · rightᵀ`` with orthonormal outer
parts: components are sought inside its row and column spaces by decomposing the core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.models.rounding import AMBER, RED, grid_dtype, threshold
from mi_weightspace.models.weights import Difference, WeightSource

ROUNDING_STD = 2.35e-3
"""σ of the difference of two independent bfloat16 roundings, in units of the rms weight."""
EXACT_SPECTRUM = 1 << 22
"""Entries up to which a matrix' singular values are computed in full."""


@dataclass(frozen=True)
class UpdateFacts:
    """Size of one update.

    Attributes:
        relative: ‖dW‖/‖W_before‖ (Frobenius, the bias column left out). rank: numerical rank.
        changed_fraction: share of matrix entries that differ.
        edge: largest singular value that two independent roundings to the storage grid would give
            (``2.35e-3 · rms|W| · (√d_in + √d_out)`` for bfloat16, scaled with its epsilon);
            0 for an adapter, which was never rounded onto the matrix.
        flag: ``none``, ``amber`` (relative below 5e-3 of bfloat16: norms and ranks unreliable) or
            ``red`` (s₁ below the edge, or relative below 3e-5: nothing is readable).
    """

    fro: float
    relative: float
    top: float
    rank: int
    changed_fraction: float
    edge: float
    storage: str
    flag: str


@dataclass(frozen=True, eq=False)
class Update:
    """One matrix as one stage changed it.

    Attributes:
        site: the matrix. stage: which stage changed it.
        core: what is decomposed: (d_out, d_in), one column more where the bias changed; or the
            (r, r) core of a low-rank update.
        left, right: (d_out, r) and (d_in, r) with orthonormal columns, of a low-rank update.
        biased: whether the last column of `core` is the change of the bias.
        product: `core` in the precision of the model, where that is another.
    """

    site: Site
    stage: str
    core: Float[Tensor, "rows columns"]
    facts: UpdateFacts
    left: Float[Tensor, "d_out r"] | None = None
    right: Float[Tensor, "d_in r"] | None = None
    biased: bool = False
    product: Float[Tensor, "rows columns"] | None = None

    @property
    def name(self) -> str:
        return f"{self.site.name}@{self.stage}"

    def inner(self, x: Float[Tensor, "*pos d_in"]) -> Float[Tensor, "*pos columns"]:
        """What the core reads: the site's input with a 1 behind it, or rotated."""
        if self.right is not None:
            return x.to(self.right.dtype) @ self.right
        if not self.biased:
            return x
        return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)

    def outer(self, y: Float[Tensor, "*pos rows"]) -> Float[Tensor, "*pos d_out"]:
        """From the core's output to the site's."""
        return y if self.left is None else y @ self.left.T

    def whole(self, inner: Float[Tensor, "*pos columns"]) -> Float[Tensor, "*pos rows"]:
        core = self.core if self.product is None else self.product
        return F.linear(inner, core.to(inner.dtype))

    def full_read(self, read: Float[Tensor, "C columns"]) -> Float[Tensor, "C d_in"]:
        """Reads of the core as reads of the site's own input (the bias entry left out)."""
        if self.right is not None:
            return read @ self.right.T.to(read)
        return read[:, :-1] if self.biased else read

    def full_write(self, write: Float[Tensor, "C rows"]) -> Float[Tensor, "C d_out"]:
        return write if self.left is None else write @ self.left.T.to(write)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The update of the matrix (the bias' own is left out)."""
        if self.left is not None and self.right is not None:
            return self.left @ self.core @ self.right.T
        return self.core[:, :-1] if self.biased else self.core

    def to(self, device: torch.device, dtype: torch.dtype, model: torch.dtype) -> Update:
        """The update on a device, its numbers in `dtype`, to be run in a model of `model`."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, dtype)

        return Update(
            self.site,
            self.stage,
            self.core.to(device, dtype),
            self.facts,
            moved(self.left),
            moved(self.right),
            self.biased,
            None if model == dtype else self.core.to(device, model),
        )


@dataclass(frozen=True, eq=False)
class Start:
    """A matrix of the first stage in the last stage's coordinates: what `m = d = 0` computes."""

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, " d_out"] | None


def starting_matrix(first: WeightSource, last: WeightSource, site: Site) -> Start:
    """W̃_0 and b̃_0, in the storage precision where no gain changed (then bit for bit)."""
    ratio, shift = _transfer(first, last, site)
    stored, bias = first.stored(site), first.bias(site)
    if ratio is None and shift is None:
        return Start(stored, bias)
    weight = first.weight(site)
    if shift is not None:
        moved = weight @ shift
        bias = moved if bias is None else bias + moved
    return Start(weight if ratio is None else weight * ratio, bias)


def _transfer(
    stage: WeightSource, last: WeightSource, site: Site
) -> tuple[Tensor | None, Tensor | None]:
    """``g_k/g_K`` and ``β_k − (g_k/g_K) β_K``; None where it is 1, where it is 0.

    A gain that is 0 in the last stage cannot be folded: its coordinates are left as they are.
    """
    own, end = stage.read_gain(site), last.read_gain(site)
    ratio = None
    if own is not None and end is not None and not torch.equal(own, end.to(own.device)):
        end = end.to(own.device)
        ratio = torch.where(end == 0, 1.0, own / torch.where(end == 0, 1.0, end))
    mine, theirs = stage.read_shift(site), last.read_shift(site)
    if mine is None or theirs is None:
        return ratio, None
    shift = mine - (theirs if ratio is None else ratio * theirs)
    return ratio, shift if bool(shift.any()) else None


def updates(
    stages: Mapping[str, WeightSource], sites: Sequence[Site], dtype: torch.dtype = torch.float32
) -> Iterator[Update]:
    """What every stage but the first changed in each matrix; matrices it left alone are skipped.

    Args:
        stages: name -> weights, in training order.
    """
    last = stages[list(stages)[-1]]
    for site in sites:
        for before, after in pairwise(stages):
            found = _update(stages[before], stages[after], last, site, after, dtype)
            if found is not None:
                yield found


def _update(
    before: WeightSource,
    after: WeightSource,
    last: WeightSource,
    site: Site,
    stage: str,
    dtype: torch.dtype,
) -> Update | None:
    factors = Difference(before, after).factors(site)
    folded = any(part is not None for s in (before, after) for part in _transfer(s, last, site))
    if factors is not None and not folded and site.kind != "embed":
        return _low_rank(factors, before, site, stage, dtype)
    ends = [starting_matrix(source, last, site) for source in (before, after)]
    old, new = (end.weight.to(torch.promote_types(end.weight.dtype, dtype)) for end in ends)
    change = new - old.to(new.device)
    column = _bias_change(ends[0].bias, ends[1].bias, change)
    if not bool(change.any()) and column is None:
        return None
    # whether rounding could explain it is a question about the numbers as they were stored
    facts = _facts(before.stored(site), after.stored(site), change)
    core = change if column is None else torch.cat([change, column[:, None]], dim=1)
    return Update(site, stage, core.to(dtype), facts, biased=column is not None)


def _bias_change(old: Tensor | None, new: Tensor | None, like: Tensor) -> Tensor | None:
    if old is None and new is None:
        return None
    zero = like.new_zeros(len(like))
    change = (zero if new is None else new.to(like)) - (zero if old is None else old.to(like))
    return change if bool(change.any()) else None


def _low_rank(
    factors: tuple[Tensor, Tensor],
    before: WeightSource,
    site: Site,
    stage: str,
    dtype: torch.dtype,
) -> Update | None:
    """``B A`` as ``left · diag(s) · rightᵀ``, without forming the matrix."""
    b, a = (f.to(torch.promote_types(f.dtype, dtype)) for f in factors)
    if b.shape[1] == 0 or not (bool(b.any()) and bool(a.any())):
        return None
    q_left, r_left = torch.linalg.qr(b)
    q_right, r_right = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    keep = s > s[0] * max(b.shape[0], a.shape[1]) * torch.finfo(s.dtype).eps
    fro = float(s.norm())
    base = float(before.stored(site).float().norm())
    facts = UpdateFacts(
        fro=fro,
        relative=fro / base if base > 0 else math.inf,
        top=float(s[0]),
        rank=int(keep.sum()),
        changed_fraction=1.0,
        edge=0.0,
        storage="factors",
        flag="none",
    )
    left, right = q_left @ u[:, keep], q_right @ vh[keep].T
    return Update(
        site, stage, torch.diag(s[keep]).to(dtype), facts, left.to(dtype), right.to(dtype)
    )


def _facts(
    before: Float[Tensor, "d_out d_in"],
    after: Float[Tensor, "d_out d_in"],
    change: Float[Tensor, "d_out d_in"],
) -> UpdateFacts:
    grid = grid_dtype(before, after)
    wide = before.float()
    fro, base = float(change.double().norm()), float(wide.norm())
    top, rank = _spectrum(change)
    rows, columns = change.shape
    std = threshold(ROUNDING_STD, grid) * float(wide.square().mean().sqrt())
    edge = std * (rows**0.5 + columns**0.5)
    relative = fro / base if base > 0 else math.inf
    if fro == 0:
        flag = "none"  # the bias alone changed
    elif top < edge or relative < threshold(RED, grid):
        flag = "red"
    else:
        flag = "amber" if relative < threshold(AMBER, grid) else "none"
    return UpdateFacts(
        fro=fro,
        relative=relative,
        top=top,
        rank=rank,
        changed_fraction=float((change != 0).double().mean()),
        edge=edge,
        storage=str(grid).removeprefix("torch."),
        flag=flag,
    )


def _spectrum(change: Float[Tensor, "rows columns"]) -> tuple[float, int]:
    """Largest singular value and numerical rank (large matrices: by power iteration, and the bound
    on the rank)."""
    if change.numel() <= EXACT_SPECTRUM:
        values = torch.linalg.svdvals(change)
        tolerance = values[0] * max(change.shape) * torch.finfo(torch.float32).eps
        return float(values[0]), int((values > tolerance).sum())
    draw = generator(0, "largest singular value", *change.shape)
    v = torch.randn(change.shape[1], 8, generator=draw).to(change)
    for _ in range(6):
        v = torch.linalg.qr(change.T @ (change @ v))[0]
    return float(torch.linalg.matrix_norm(change @ v, 2)), min(change.shape)
