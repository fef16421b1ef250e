"""Edits of a decomposed matrix, as values: ablate components, or rewrite one side of one of them.

With W (d_out, d_in) the matrix itself, remainder included:

* ablate: ``W' = W − Σ_c write_c read_cᵀ``, which is the masked model with those masks 0 and every
  other mask, the remainder's too, 1;
* rewrite the write side: ``W' = W − (write_c − α s û) read_cᵀ``; the read side likewise, where s is
  the sign of the inner activation at the positions that need the component (vpd.md §8).

An edit is used with ``lens.with_edit(edit)``. Boosting (α above the old norm) is unreliable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, DirectionError


def ablated(
    weight: Float[Tensor, "d_out d_in"],
    read: Float[Tensor, "C d_in"],
    write: Float[Tensor, "C d_out"],
    components: Sequence[int],
    subject: str,
) -> Float[Tensor, "d_out d_in"]:
    """The matrix without some components.

    Raises:
        ConfigError: a number that is no component, or one named twice.
    """
    chosen = _numbers(components, len(read), subject)
    part = write[chosen].double().T @ read[chosen].double()
    return (weight.double() - part).to(weight.dtype)


def rewritten(
    weight: Float[Tensor, "d_out d_in"],
    read: Float[Tensor, "C d_in"],
    write: Float[Tensor, "C d_out"],
    component: int,
    vector: Tensor,
    side: Literal["read", "write"],
    *,
    strength: float,
    sign: float,
    subject: str,
) -> Float[Tensor, "d_out d_in"]:
    """The matrix with one side of a component put along `vector`.

    Args:
        strength: norm of the new vector in units of the old one's (α = strength · ‖old‖).
        sign: s, ±1: the sign of the inner activation where the component is important, so that
            there it now adds ``+û`` (write side), or fires as it did on inputs along ``+r̂``.

    Raises:
        ConfigError: no such component, or a sign that is not ±1.
        DirectionError: a vector of another width, zero, or not finite.
    """
    (at,) = _numbers([component], len(read), subject)
    old = (write if side == "write" else read)[at].double()
    given = vector.detach().double().flatten().to(old.device)
    if given.shape != old.shape or not bool(given.isfinite().all()) or not float(given.norm()):
        raise DirectionError(
            f"new {side} vector of component {component} of {subject}",
            given=f"shape {tuple(vector.shape)}, norm {float(given.norm()):.3g}",
            expected=f"a finite, non-zero vector of width {len(old)}",
            remedy=f"Give a vector of the space this matrix {side}s.",
        )
    if sign not in (-1.0, 1.0):
        raise ConfigError(
            f"sign of component {component} of {subject}",
            given=f"{sign}",
            expected="+1 or -1: the sign of its inner activation where it is important",
            remedy="The component was never important on the data measured: pass sign= yourself.",
        )
    change = strength * float(old.norm()) * sign * given / given.norm() - old
    other = (read if side == "write" else write)[at].double()
    added = torch.outer(change, other) if side == "write" else torch.outer(other, change)
    return (weight.double() + added).to(weight.dtype)


def _numbers(components: Sequence[int], count: int, subject: str) -> list[int]:
    found = [int(c) for c in components]
    if not found or len(set(found)) != len(found) or min(found) < 0 or max(found) >= count:
        raise ConfigError(
            f"components of {subject}",
            given=f"{found[:8]}",
            expected=f"different numbers from 0 to {count - 1}",
            remedy="`to_pandas('components')` lists them by importance.",
        )
    return found
