"""What components write along, or read of, a direction of the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Side
from mi_weightspace.core.stats import rank_p
from mi_weightspace.vpd.data import prompt_ids
from mi_weightspace.vpd.differences.updates import Update
from mi_weightspace.vpd.effects import inner_activations, passes

if TYPE_CHECKING:
    from mi_weightspace.vpd.differences.result import DifferenceDecomposition

Z = 1.96
BATCH = 64


@dataclass(frozen=True, eq=False)
class Stream:
    """Importances and site inputs on some rows of tokens.

    Attributes:
        low: site -> (rows, tokens, C) lower importances. inner: site -> (rows, tokens, C), ``a``.
        inputs: site -> what its core reads, (rows, tokens, columns); token ids for ``embed``.
    """

    low: dict[str, Tensor]
    inner: dict[str, Tensor]
    inputs: dict[str, Tensor]

    @classmethod
    def of(cls, parts: DifferenceDecomposition, tokens: Any) -> Stream:
        objective = parts.objective
        places = objective.factors.layout.slices()
        found: list[dict[str, dict[str, Tensor]]] = []
        for clean, low in passes(objective, prompt_ids(tokens, parts.host).split(BATCH)):
            found.append(
                {
                    "low": {n: low[..., s].cpu() for n, s in places.items()},
                    "inner": {n: inner_activations(objective, clean, n).cpu() for n in places},
                    "inputs": {n: clean.inputs[n].cpu() for n in places},
                }
            )
        return cls(
            **{k: {n: torch.cat([f[k][n] for f in found]) for n in places} for k in found[0]}
        )


@dataclass(frozen=True)
class Direct:
    """A mean over tokens with its 95 % interval over rows, and the means by position."""

    value: float
    low: float
    high: float
    by_position: tuple[float, ...]

    @classmethod
    def of(cls, per_token: Float[Tensor, "rows tokens"]) -> Direct:
        rows = per_token.double().mean(1)
        value = float(rows.mean())
        half = Z * float(rows.std()) / len(rows) ** 0.5 if len(rows) > 1 else float("inf")
        return cls(value, value - half, value + half, tuple(per_token.double().mean(0).tolist()))


@dataclass(frozen=True)
class Geometry:
    """One component's side beside one direction.

    Attributes:
        cosine: of the unit vectors; p: two-sided rank of |cosine| among random directions of the
            update's own column (write) or row (read) space, whose dimension is `rank`.
        direct: for each stream, what is written along ŵ (raw units of the stream):
            ``g a ⟨u, ŵ⟩``; on the read side the part of ``g a`` that the direction makes,
            ``g ⟨r, ŵ⟩⟨x, ŵ⟩`` with ŵ as the norm in front passes it on.
    """

    side: Side
    direction: str
    cosine: float
    p: float
    null_high: float
    rank: int
    direct: tuple[Direct, ...]


def geometry(
    parts: DifferenceDecomposition,
    site: str,
    c: int,
    directions: Sequence[Direction],
    streams: Sequence[Stream],
    n_draws: int,
    seed: int,
) -> list[Geometry]:
    """Every stream side of a component beside every direction."""
    host: Any = parts.host
    update: Update = host.updates[site]
    scale = host.scales.get(site, 1.0)
    found = []
    for side in update.site.stream_sides:
        name = f"{site}/{'write' if side == 'write' else 'read'}_gain"
        gain = parts.arrays.get(name, torch.ones(())).double().cpu()
        vector = (parts.write(site) if side == "write" else parts.read(site))[c].double().cpu()
        space = _space(update, side)
        null = _draws(space, n_draws, seed, site, side) * gain
        null = null / null.norm(dim=1, keepdim=True)
        own = vector * gain
        for direction in directions:
            w = direction.pattern.double()
            cosine = float(own @ w / own.norm().clamp_min(1e-300))
            drawn = (null @ w).abs()
            if side == "write":
                direct = [Direct.of(_written(s, site, c) * float(own @ w) * scale) for s in streams]
            else:
                direct = [Direct.of(_owed(s, site, c, vector, w * gain, update)) for s in streams]
            found.append(
                Geometry(
                    side,
                    direction.name,
                    cosine,
                    # equal cosines (a space of one dimension) differ by rounding
                    float(rank_p(torch.tensor(abs(cosine) - 1e-9), drawn)),
                    float(drawn.quantile(0.95)),
                    space.shape[1],
                    tuple(direct),
                )
            )
    return found


def _written(stream: Stream, site: str, c: int) -> Float[Tensor, "rows tokens"]:
    return (stream.low[site][..., c] * stream.inner[site][..., c]).double()


def _owed(
    stream: Stream, site: str, c: int, read: Tensor, through: Tensor, update: Update
) -> Float[Tensor, "rows tokens"]:
    """``g ⟨r, ŵ⟩⟨x, ŵ⟩``, ŵ the direction as the norm in front passes it on."""
    w = through / through.norm().clamp_min(1e-300)
    x = stream.inputs[site].double()
    inner = w if update.right is None else w @ update.right.double().cpu()
    along = x[..., : len(inner)] @ inner  # a bias column reads the constant 1, no direction
    return stream.low[site][..., c].double() * float(read @ w) * along


def _space(update: Update, side: Side) -> Float[Tensor, "d p"]:
    """Orthonormal columns: the update's column space (write) or row space (read)."""
    core = update.core.double().cpu()
    if update.biased and side == "read":
        core = core[:, :-1]
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    keep = s > s[0] * max(core.shape) * torch.finfo(torch.float32).eps
    inner = u[:, keep] if side == "write" else vh[keep].T
    outer = update.left if side == "write" else update.right
    return inner if outer is None else outer.double().cpu() @ inner


def _draws(
    space: Float[Tensor, "d p"], n: int, seed: int, site: str, side: Side
) -> Float[Tensor, "n d"]:
    draw = generator(seed, "probe link", site, side)
    return torch.randn(n, space.shape[1], generator=draw, dtype=torch.float64) @ space.T
