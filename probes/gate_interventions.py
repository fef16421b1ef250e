"""Interventions on the residual stream for many directions at once, and weight orthogonalisation.

Rows of a forward pass are (direction, prompt) couples: each runs from the layer of the
intervention on, on the residual its prompt had there. So 200 null directions cost 200 partial
forward passes and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import check_convention
from mi_weightspace.core.errors import ArchitectureError, DirectionError
from mi_weightspace.core.space import Space
from mi_weightspace.models.harvest import memory_tokens
from mi_weightspace.models.lens import Edit, Lens
from probes.gate_prompts import NEUTRAL, Positions, Rows, chosen_log_odds

StreamFunction = Callable[[Tensor], Tensor]
Operation = Literal["add", "mean_ablate", "project_out", "swap"]
OPERATIONS: tuple[Operation, ...] = ("add", "mean_ablate", "project_out", "swap")
MAX_LOGITS = 2**24
"""Logits of one forward pass, in numbers: 64 MiB of float32."""


@dataclass(frozen=True)
class Change:
    """What is done to the stream along a direction (a subspace, for rank k).

    Attributes:
        amount: of ``add``: the length of the vector added, raw residual units.
    """

    operation: Operation
    amount: float = 0.0


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Orthonormal rows and a unit vector to steer by, for each of several directions."""

    basis: Float[Tensor, "n k d"]
    steer: Float[Tensor, "n d"]

    def __len__(self) -> int:
        return len(self.steer)

    @staticmethod
    def joined(parts: Sequence[Subspaces]) -> Subspaces:
        return Subspaces(torch.cat([p.basis for p in parts]), torch.cat([p.steer for p in parts]))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the model answers: one value for each direction and row.

    Attributes:
        log_odds: of the readout, nats, float64.
        top: probability of the continuation the unchanged model prefers.
        kl: ``KL(unchanged ‖ changed)`` of the next token, nats.
        kl_rest: the same among the tokens that no readout of the behaviour counts.
    """

    log_odds: Float[Tensor, "n rows"]
    top: Float[Tensor, "n rows"]
    kl: Float[Tensor, "n rows"]
    kl_rest: Float[Tensor, "n rows"]

    @property
    def p(self) -> Float[Tensor, "n rows"]:
        """Probability of the pushed continuation (among its options, where it has several)."""
        return self.log_odds.sigmoid()


class Intervened:
    """One model on one set of prompts, ready to be changed at one point of the stream.

    Args:
        space: stream point of the intervention.
        onward: change every later ``resid_post`` too.
        mean: (d,) by point name, what ``mean_ablate`` sets projections to; default the mean over
            the edited tokens of this object's own neutral prompts.
        behaviour: tokens that `Outcome.kl_rest` leaves out.
        n_rows: rows of one forward pass; default by memory.

    Attributes:
        base: outcome of the unchanged model, (1, rows).
        pooled: mean over the edited tokens at `space`, (rows, d), float64.
    """

    def __init__(
        self,
        lens: Lens,
        rows: Rows,
        space: Space,
        *,
        positions: Positions = "last",
        onward: bool = False,
        mean: Mapping[str, Float[Tensor, " d"]] | None = None,
        behaviour: Sequence[int] = (),
        n_rows: int | None = None,
    ) -> None:
        self.rows, self.space = rows, space.canonical
        self.points = _points(lens, self.space, onward)
        self.layer, self.direct = _start(lens, self.space)
        self.start = f"resid_pre.{self.layer}"
        self.lens = lens.with_edit(
            Edit(stream={name: self._at(name) for name in self.points if name != self.direct})
        )
        self.where = rows.edited(positions)
        self.size = n_rows or _batch_rows(lens, rows, [self.start, *self.points])
        self._now: tuple[Change, Tensor, Tensor, Tensor] | None = None
        self.streams: dict[str, Float[Tensor, "rows tokens d"]] = {}
        self.log_probs = self._unchanged(lens)
        self.partners = {name: rows.aligned(self.streams[name]) for name in self.points}
        self.mean = self._neutral_mean() if mean is None else mean
        every = torch.arange(len(rows.last))
        self._rest = torch.ones(self.log_probs.shape[1], dtype=torch.bool)
        self._rest[list(behaviour)] = False
        self._top = self.log_probs.argmax(1)
        self.base = self._outcome(self.log_probs, every)
        share = self.where.double() / self.where.sum(1, keepdim=True)
        self.pooled = torch.einsum("rtd,rt->rd", self.streams[self.space.name].double(), share)

    # ---- the unchanged model ---------------------------------------------------------------
    def _unchanged(self, lens: Lens) -> Float[Tensor, "rows vocab"]:
        names = list(dict.fromkeys([self.start, *self.points]))
        kept: dict[str, list[Tensor]] = {name: [] for name in names}
        found = []
        for part in torch.arange(len(self.rows.last)).split(self.size):
            run = lens.run(
                self.rows.tokens[part], attention_mask=self.rows.mask[part], capture=names
            )
            for name in names:
                kept[name].append(run.captured[name].cpu())
            assert run.logits is not None
            found.append(self._last(run.logits, part))
        self.streams = {name: torch.cat(parts) for name, parts in kept.items()}
        return torch.cat(found)

    def _last(self, logits: Tensor, index: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        last = self.rows.last[index].to(logits.device)
        chosen = logits[torch.arange(len(index), device=logits.device), last]
        return chosen.float().log_softmax(-1).cpu()

    def _neutral_mean(self) -> dict[str, Float[Tensor, " d"]]:
        neutral = self.rows.of(NEUTRAL)
        where = self.where[neutral]
        return {name: self.streams[name][neutral][where].mean(0) for name in self.points}

    def _outcome(self, log_probs: Tensor, index: Int[Tensor, " b"]) -> Outcome:
        before = self.log_probs[index]
        # a readout of no options (a control without one) reads as a constant
        odds = chosen_log_odds(log_probs, self.rows.yes[index], self.rows.no[index])
        odds = torch.where((self.rows.yes[index] >= 0).any(1), odds, 0.0)
        top = log_probs.gather(1, self._top[index, None])[:, 0].double().exp()
        kl, rest = (
            divergence(*(rows[:, keep].log_softmax(1) for rows in (before, log_probs)))
            for keep in (slice(None), self._rest)
        )
        return Outcome(odds[None], top[None], kl[None], rest[None])

    # ---- the changed model -----------------------------------------------------------------
    def run(
        self, change: Change, subspaces: Subspaces, rows: Int[Tensor, " rows"] | None = None
    ) -> Outcome:
        """The answers with each direction changed in turn, (n directions, chosen rows)."""
        rows = torch.arange(len(self.rows.last)) if rows is None else rows
        n, r = len(subspaces), len(rows)
        parts: list[Outcome] = []
        with torch.no_grad(), self.lens.evaluation():
            for flat in torch.arange(n * r).split(self.size):
                which, index = flat // r, rows[flat % r]
                parts.append(self._batch(change, subspaces, which, index))
        return Outcome(
            *(
                torch.cat([getattr(part, name)[0] for part in parts]).reshape(n, r)
                for name in ("log_odds", "top", "kl", "kl_rest")
            )
        )

    def _batch(self, change: Change, subspaces: Subspaces, which: Tensor, index: Tensor) -> Outcome:
        self._now = change, subspaces.basis[which], subspaces.steer[which], index
        entering = self.streams[self.start][index]
        if self.direct is not None:
            entering = self._changed(self.direct, entering)
        try:
            logits = self.lens.forward(
                self.rows.tokens[index],
                self.rows.mask[index],
                start=(self.layer, entering.to(self.lens.device, self.lens.dtype)),
            )
        finally:
            self._now = None
        return self._outcome(self._last(logits, index), index)

    def _at(self, name: str) -> StreamFunction:
        return lambda value: self._changed(name, value)

    def _changed(self, name: str, value: Tensor) -> Tensor:
        if self._now is None:
            return value
        change, basis, steer, index = self._now
        device = value.device
        wide = value.float()
        if change.operation == "add":
            moved = (change.amount * steer)[:, None].to(device, wide.dtype)
        else:
            aim: Tensor | float = 0.0
            if change.operation == "mean_ablate":
                aim = self.mean[name].to(device, wide.dtype)
            elif change.operation == "swap":
                aim = self.partners[name][index].to(device, wide.dtype)
            rows = basis.to(device, wide.dtype)
            moved = torch.einsum("btd,bkd->btk", aim - wide, rows)
            moved = torch.einsum("btk,bkd->btd", moved, rows)
        where = self.where[index].to(device)[..., None]
        return torch.where(where, wide + moved, wide).to(value.dtype)


def divergence(
    before: Float[Tensor, "b vocab"], after: Float[Tensor, "b vocab"]
) -> Float[Tensor, " b"]:
    """``KL(before ‖ after)`` of log-probabilities, nats, never below zero."""
    return (before.exp() * (before - after)).sum(1).double().clamp(min=0)


def _points(lens: Lens, space: Space, onward: bool) -> list[str]:
    every = [p.canonical for p in lens.points()]
    if space not in every:
        raise DirectionError(
            f"direction at {space}",
            given="no point of this model's residual stream",
            expected=f"one of {[p.name for p in every][:12]}",
            remedy="Gate a direction fitted on the stream, such as resid_post.L.",
        )
    later = every[every.index(space) + 1 :] if onward else []
    return [space.name, *(p.name for p in later if p.point == "resid_post")]


def _start(lens: Lens, space: Space) -> tuple[int, str | None]:
    """The block to start at, and the point that is changed directly where it is that input."""
    layer = space.layer or 0
    if space.point == "resid_post" and layer + 1 < lens.shape.n_layers:
        return layer + 1, space.name
    if space.point == "resid_pre":
        return layer, space.name
    return layer, None


def _batch_rows(lens: Lens, rows: Rows, captured: Sequence[str]) -> int:
    length = rows.tokens.shape[1]
    by_logits = MAX_LOGITS // (length * lens.shape.vocab_size)
    by_memory = memory_tokens(lens, length, captured) // length
    return max(1, min(by_logits, by_memory))


def check_direction(direction: Direction, lens: Lens, *, other_model: bool) -> None:
    """The direction lives in this model's stream and was fitted on these weights.

    Raises:
        DirectionError: otherwise.
        ConventionError: another weight convention.
    """
    check_convention(direction, lens)
    if not direction.space.is_stream:
        raise DirectionError(
            f"direction {direction.name}",
            given=f"a direction of {direction.space}",
            expected="a direction of the residual stream",
            remedy="Fit the probe at a stream point.",
        )
    known = direction.model_hash
    if known and known != lens.fingerprint and not other_model:
        raise DirectionError(
            f"direction {direction.name}",
            given=f"a direction fitted on the weights {known}",
            expected=f"one fitted on this model, {lens.fingerprint}",
            remedy="Fit it here, or pass other_model=True (--other-model) for another stage of the "
            "same lineage.",
        )


# ---- the same as a change of the weights ---------------------------------------------------
def orthogonalised(lens: Lens, direction: Direction) -> Edit:
    """Every writer into the stream deprived of the direction: ``W ← W − v vᵀ W`` (2406.11717).

    Embeddings (token and position), the outputs of attention and MLP and their biases. Biases and
    position embeddings, which are no matrices of a site, are taken out where they enter the
    stream. The result equals projecting the direction out at every stream point. Behind a
    post-norm of gain g, ``g ⊙ v`` is removed instead, so that nothing is written along v; there
    the norm also rescales what is left, and the equality with projecting does not hold.

    Raises:
        DirectionError: another width, or no direction of the stream.
        ConventionError: another weight convention.
        ArchitectureError: a writer behind a post-norm with a bias or without a finite gain.
    """
    check_direction(direction, lens, other_model=True)
    v = direction.pattern.float()
    weights: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for site in lens.sites():
        if not site.writes.is_stream:
            continue
        matrix, bias, gain = lens.weight(site), lens.bias(site), lens.write_gain(site)
        if gain is not None and bias is not None:
            raise ArchitectureError(
                f"weight orthogonalisation of {site.name}",
                given="a bias in front of a post-norm",
                expected="writers whose output along a direction is linear in W and b",
                remedy="Project at the stream points instead (`project_out`).",
            )
        along = v.to(matrix.device)
        if gain is not None:
            along = gain.to(matrix.device) * along
            along = along / along.norm()
        weights[site.name] = matrix - torch.outer(along, along @ matrix)
        if bias is not None:
            name = site.writes.name
            part = (bias.cpu() @ v.cpu()) * v.cpu()
            constants[name] = constants.get(name, torch.zeros_like(part)) + part
    stream = {name: _less(part) for name, part in constants.items()}
    stream["resid_pre.0"] = _without(v)  # position embeddings; the token's part is gone already
    return Edit(weights=weights, stream=stream)


def _less(part: Float[Tensor, " d"]) -> StreamFunction:
    return lambda value: value - part.to(value.device, value.dtype)


def _without(v: Float[Tensor, " d"]) -> StreamFunction:
    def project(value: Tensor) -> Tensor:
        along = v.to(value.device, value.dtype)
        return value - (value @ along)[..., None] * along

    return project
