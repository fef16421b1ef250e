"""``K0 = E KL(last ‖ first)``: the size of the whole change, and the unit of everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.models.lens import Lens
from mi_weightspace.vpd.host import Host
from mi_weightspace.vpd.masked import Adjust

Z = 1.96
RESOLVED = 2.0
"""Standard errors that K0 must be away from 0 to serve as a unit."""
ARITHMETIC = 1e-8
"""Nats below which a divergence of float32 logits is rounding."""


@dataclass(frozen=True)
class Unit:
    """A mean over positions; its interval treats the rows as the independent units.

    Attributes:
        value, se: nats (or squared error) a position, and its standard error.
        n, n_rows: positions and rows.
    """

    value: float
    se: float
    n: int
    n_rows: int

    @property
    def low(self) -> float:
        return max(0.0, self.value - Z * self.se)

    @property
    def high(self) -> float:
        return self.value + Z * self.se

    @property
    def resolved(self) -> bool:
        return self.value > max(RESOLVED * self.se, ARITHMETIC)

    @property
    def needed(self) -> int:
        """Positions at which this value would be `RESOLVED` standard errors from 0."""
        if self.value <= ARITHMETIC:
            return 0
        return math.ceil(self.n * (RESOLVED * self.se / self.value) ** 2)


def unit_of(per_position: Float[Tensor, "rows ..."]) -> Unit:
    """Mean and standard error over rows."""
    rows = per_position.double().flatten(1).mean(1).cpu().numpy()
    se = float(np.std(rows, ddof=1) / len(rows) ** 0.5) if len(rows) > 1 else math.inf
    return Unit(float(rows.mean()), se, per_position.numel(), len(rows))


def per_position(output: Tensor, target: Tensor, metric: str) -> Float[Tensor, "rows ..."]:
    """KL(target ‖ output) or squared error at every position."""
    wide = torch.promote_types(output.dtype, torch.float32)
    if metric == "mse":
        return (output.to(wide) - target.to(wide)).square().mean(-1)
    log_p, log_q = target.to(wide).log_softmax(-1), output.to(wide).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def everything_off(host: Host) -> dict[str, Adjust]:
    """Masks 0 at every update: the carrier."""
    return {name: lambda _x, y: torch.zeros_like(y) for name in host.names}


@torch.no_grad()
def change_at_positions(host: Host, batches: Sequence[Tensor]) -> Float[Tensor, "rows ..."]:
    """KL(last ‖ carrier) at every position."""
    found = []
    for batch in batches:
        clean = host.clean(batch.to(host.device))
        off = host.forward(clean, everything_off(host))
        found.append(per_position(off, clean.output, host.metric).cpu())
    return torch.cat(found)


@torch.no_grad()
def unexplained(host: Host, first: Lens, batches: Sequence[Tensor]) -> Unit:
    """``E KL(first ‖ carrier)``: what differs between the stages and is not decomposed."""
    found = []
    for batch in batches:
        clean = host.clean(batch.to(host.device))
        off = host.forward(clean, everything_off(host))
        found.append(per_position(off, first.forward(batch.to(first.device)), "kl").cpu())
    return unit_of(torch.cat(found))


def refuse_unresolved(unit: Unit, what: str) -> None:
    """Refuse a unit that its own noise hides.

    Raises:
        PromptError: with the number of positions that would resolve it.
    """
    if unit.resolved:
        return
    if unit.value <= ARITHMETIC:
        raise PromptError(
            f"{what}: K0",
            given=f"{unit.value:.3g} nats on {unit.n} positions, rounding alone",
            expected="data on which the stages differ",
            remedy="Give text on which the behaviour shows; on these tokens nothing changed.",
        )
    raise PromptError(
        f"{what}: K0",
        given=f"{unit.value:.3g} ± {unit.se:.2g} nats (standard error over {unit.n_rows} rows)",
        expected=f"at least {RESOLVED:g} standard errors from 0",
        remedy=f"Give about {unit.needed} positions of such data (now {unit.n}).",
    )
