"""What reverting a piece of an update does to probe scores and to behaviours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.differences.host import DifferenceHost
from mi_weightspace.vpd.differences.updates import Update
from mi_weightspace.vpd.masked import Adjust


@dataclass(frozen=True, eq=False)
class Piece:
    """A rank-one part of an update, in the coordinates of its core."""

    site: str
    read: Float[Tensor, " columns"]
    write: Float[Tensor, " rows"]

    def removed(self, scale: float | None) -> Adjust:
        """The update without it: its mask 0, all others and the remainder 1."""

        def adjust(x: Tensor, y: Tensor) -> Tensor:
            if scale is None:
                inner = x.to(self.read.dtype) @ self.read
            else:
                inner = F.embedding(x, self.read[:, None])[..., 0] * scale
            return y - (inner[..., None] * self.write).to(y.dtype)

        return adjust


class ReadoutLike(Protocol):
    """What `core.readout.Readout` has."""

    @property
    def name(self) -> str: ...
    def tokens(
        self, tokenizer: Any
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]: ...
    def token_ids(self, tokenizer: Any) -> Any: ...
    def value(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class Effect:
    """What a reversion takes away: the last stage's value minus the value without the piece.

    Attributes:
        behaviour: nats; NaN without a readout. controls: of each control readout.
        scores: direction -> raw units of the stream, mean over prompts.
        pieces, piece_scores: the same for random pieces of the same update.
    """

    behaviour: float
    controls: tuple[float, ...]
    scores: Mapping[str, float]
    pieces: tuple[float, ...] = ()
    piece_scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Prompts of one readout (or rows of tokens), and where each one ends."""

    tokens: Int[Tensor, "batch tokens"]
    last: Int[Tensor, " batch"]
    readout: Any = None

    @classmethod
    def of(cls, readout: ReadoutLike, tokenizer: Any) -> _Prompts:
        tokens, _mask, last = readout.tokens(tokenizer)
        return cls(tokens, last, readout.token_ids(tokenizer))


class Causes:
    """Runs the last stage with pieces of its updates taken back.

    Prompts are padded on the right, which a causal model's last token does not see.

    Args:
        rows: tokens whose last position is scored where there is no readout.

    Attributes:
        whole: what reverting every update does.
    """

    def __init__(
        self,
        host: DifferenceHost,
        directions: Sequence[Direction],
        readout: ReadoutLike | None,
        controls: Sequence[ReadoutLike],
        rows: Int[Tensor, "rows tokens"],
        batch_size: int,
    ) -> None:
        self.host, self.batch_size = host, batch_size
        tokenizer = host.lens.tokenizer
        if readout is None:
            self.own = _Prompts(rows, torch.full((len(rows),), rows.shape[1] - 1))
        else:
            self.own = _Prompts.of(readout, tokenizer)
        self.controls = tuple(_Prompts.of(c, tokenizer) for c in controls)
        self.points = {d.name: d.space.name for d in directions}
        self.filters = {d.name: d.pattern if d.filter is None else d.filter for d in directions}
        nothing: dict[str, Adjust] = {n: lambda _x, y: torch.zeros_like(y) for n in host.names}
        self.last = self._values({}, controls=True)
        self.whole = self._taken(self._values(nothing, controls=True))
        self._spaces: dict[str, Tensor] = {}

    def effect(self, piece: Piece, n_random: int, seed: int) -> Effect:
        """Of reverting a piece, and of reverting random pieces of the same update.

        A random piece is what the update makes of a random direction x of its row space,
        ``dW x xᵀ``: something training did put there. Taking out a vector that is not there (the
        piece's size along a random direction) is damage, not reversion: in the logits it lowers
        the odds of whatever answer was given.
        """
        own = self._taken(self._without(piece, controls=True))
        core, space = self.host.updates[piece.site].core, self._row_space(piece.site)
        draw = generator(seed, "random pieces", piece.site)
        drawn = torch.randn(n_random, space.shape[1], generator=draw, dtype=torch.float64)
        reads = drawn.to(space) @ space.T
        reads /= reads.norm(dim=1, keepdim=True)
        found = [self._taken(self._without(Piece(piece.site, x, core @ x))) for x in reads]
        return Effect(
            own.behaviour,
            own.controls,
            own.scores,
            tuple(f.behaviour for f in found),
            {name: tuple(f.scores[name] for f in found) for name in self.points},
        )

    def _row_space(self, site: str) -> Float[Tensor, "columns p"]:
        if site not in self._spaces:
            self._spaces[site] = row_space(self.host.updates[site])
        return self._spaces[site]

    def _without(self, piece: Piece, *, controls: bool = False) -> Effect:
        removed = piece.removed(self.host.scales.get(piece.site))
        return self._values({piece.site: removed}, controls=controls)

    def _taken(self, other: Effect) -> Effect:
        last = self.last
        return Effect(
            last.behaviour - other.behaviour,
            tuple(a - b for a, b in zip(last.controls, other.controls, strict=False)),
            {name: value - other.scores[name] for name, value in last.scores.items()},
        )

    @torch.no_grad()
    def _values(self, functions: Mapping[str, Adjust], *, controls: bool) -> Effect:
        logits, scores = self._run(self.own, functions, tuple(dict.fromkeys(self.points.values())))
        behaviour = float("nan")
        if self.own.readout is not None:
            behaviour = float(self.own.readout.value(logits))
        others = [
            float(p.readout.value(self._run(p, functions, ())[0]))
            for p in (self.controls if controls else ())
        ]
        found = {
            name: float((scores[point] @ self.filters[name].to(scores[point])).mean())
            for name, point in self.points.items()
        }
        return Effect(behaviour, tuple(others), found)

    def _run(
        self, prompts: _Prompts, functions: Mapping[str, Adjust], points: tuple[str, ...]
    ) -> tuple[Float[Tensor, "batch vocab"], dict[str, Float[Tensor, "batch d"]]]:
        """Logits, and the stream at `points`, at each prompt's last token."""
        lens, logits = self.host.lens, []
        caught: dict[str, list[Tensor]] = {point: [] for point in points}
        with lens.replaced(self.host.of_matrices(functions)):
            for tokens, last in zip(
                prompts.tokens.split(self.batch_size),
                prompts.last.split(self.batch_size),
                strict=True,
            ):
                result = lens.run(tokens.to(lens.device), capture=points)
                assert result.logits is not None
                at = torch.arange(len(tokens)), last
                logits.append(result.logits[at].float())
                for point in points:
                    caught[point].append(result.captured[point][at].float())
        return torch.cat(logits), {point: torch.cat(found) for point, found in caught.items()}


def row_space(update: Update) -> Float[Tensor, "columns p"]:
    """Orthonormal basis of what the core reads, at its numerical rank."""
    _, s, vh = torch.linalg.svd(update.core, full_matrices=False)
    return vh[s > s[0] * max(update.core.shape) * torch.finfo(torch.float32).eps].T
