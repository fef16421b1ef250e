"""Matching pursuit: codes picked greedily, one latent a step, with a tied encoder.

Mallat & Zhang, "Matching pursuits with time-frequency dictionaries" (IEEE Trans. Signal Processing,
1993); the stopping rules are those of SAELens 6.54.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Stops:
    """When a token's pursuit ends.

    Attributes:
        steps: at most so many.
        residual: what is left has a norm below this; 0 or less switches the rule off.
        repeat: after a step that takes up no new latent.
    """

    steps: int
    residual: float
    repeat: bool


def pursue(
    x: Float[Tensor, "n d_in"], rows: Float[Tensor, "d_sae d_in"], stops: Stops
) -> Float[Tensor, "n d_sae"]:
    """Codes of all tokens together.

    Each step takes the latent with the largest positive product of its row with what is left of the
    token, adds the product to that latent's code and takes its part away; a latent may come again.
    """
    codes = x.new_zeros(x.shape[0], rows.shape[0])
    for _ in _walk(codes, x, rows, stops):
        pass
    return codes


def stops_for(
    x: Float[Tensor, "n d_in"], rows: Float[Tensor, "d_sae d_in"], stops: Stops, l0: float
) -> dict[str, Any]:
    """Fields of an `Sae` with which the mean number of active latents of `x` is nearest `l0`.

    The number of steps is sought up to the larger of d_in and 2·l0. Where the other stops end the
    pursuit before `l0` is met, they are switched off.
    """
    stops = replace(stops, steps=max(x.shape[1], round(2 * l0)))
    steps, met = _steps(x, rows, stops, l0)
    if met:
        return {"max_iterations": steps}
    steps, _ = _steps(x, rows, Stops(stops.steps, residual=0.0, repeat=False), l0)
    off = {"residual_threshold": 0.0, "stop_on_duplicate_support": False}
    return {"max_iterations": steps, **off}


def _steps(
    x: Float[Tensor, "n d_in"], rows: Float[Tensor, "d_sae d_in"], stops: Stops, l0: float
) -> tuple[int, bool]:
    """The number of steps that comes nearest, and whether `l0` was met."""
    codes = x.new_zeros(x.shape[0], rows.shape[0])
    wanted, active, done = l0 * x.shape[0], 0, 0
    for new in _walk(codes, x, rows, stops):
        if active + new >= wanted:
            return max(1, done + (active + new - wanted <= wanted - active)), True
        active, done = active + new, done + 1
    return max(1, done), False


def _walk(
    codes: Float[Tensor, "n d_sae"],
    x: Float[Tensor, "n d_in"],
    rows: Float[Tensor, "d_sae d_in"],
    stops: Stops,
) -> Iterator[int]:
    """Fill `codes` step by step; yields how many codes became non-zero in each."""
    live, rest = torch.arange(x.shape[0], device=x.device), x
    for _ in range(stops.steps):
        if not len(live):
            return
        # relu first: where no product is positive, which latent is met does not matter
        latent = (rest @ rows.T).relu_().max(dim=1).indices
        picked = rows[latent]
        value = (rest * picked).sum(-1).relu_()
        before = codes[live, latent]
        codes[live, latent] = before + value
        rest = rest - value[:, None] * picked
        fresh = (before == 0) & (value != 0)
        yield int(fresh.sum())
        stopped = value == 0  # nothing is left to take, now or later
        if stops.repeat:
            stopped |= ~fresh
        if stops.residual > 0:
            stopped |= rest.norm(dim=-1) < stops.residual
        going = ~stopped
        live, rest = live[going], rest[going]


__all__ = ["Stops", "pursue", "stops_for"]
