"""Prompts of a causal gate: encoded once, each row with the tokens its readout compares.

A pair gives two rows, frame and neutral, and two more where it has its options swapped; numbers of
a pair are means over its option orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair, Split
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.readout import Readout, encode, pad
from mi_weightspace.models.lens import Lens
from probes.readout import continuation_id

Positions = Literal["last", "suffix", "all"]
POSITIONS: tuple[Positions, ...] = ("last", "suffix", "all")
FRAME, NEUTRAL = 0, 1
Prompt = str | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Prompts as right-padded token rows.

    Attributes:
        last: index of each row's last token.
        yes, no: token ids compared at the last token, padded with -1; a row without `no` is
            compared with every other token.
        pair: number of the pair; side: `FRAME` or `NEUTRAL`; partner: row of the pair's other side
            in the same option order.
        shared: tokens a row shares with its partner at the end.
        groups: label of each pair (its cluster, or the contrast of a control).
    """

    tokens: Int[Tensor, "rows tokens"]
    mask: Int[Tensor, "rows tokens"]
    last: Int[Tensor, " rows"]
    yes: Int[Tensor, "rows m"]
    no: Int[Tensor, "rows m2"]
    pair: Int[Tensor, " rows"]
    side: Int[Tensor, " rows"]
    partner: Int[Tensor, " rows"]
    shared: Int[Tensor, " rows"]
    groups: tuple[str, ...]

    def of(self, side: int) -> Int[Tensor, " rows"]:
        """Rows of one side."""
        return (self.side == side).nonzero().flatten()

    def behaviour(self) -> list[int]:
        """Every token that a readout counts for the pushed continuation."""
        return sorted(set(self.yes[self.yes >= 0].tolist()))

    def per_pair(
        self, values: Float[Tensor, "*batch rows"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "*batch pairs"]:
        """Means over the option orders of each pair, in the order of the pairs that occur."""
        pairs, index = self.pair[rows].unique(return_inverse=True)
        weights = torch.zeros(len(rows), len(pairs), dtype=torch.float64)
        weights[torch.arange(len(rows)), index] = 1.0
        return values.double() @ (weights / weights.sum(0))

    def edited(self, positions: Positions) -> Bool[Tensor, "rows tokens"]:
        """Tokens an intervention changes; the first token (an attention sink) only if alone."""
        at = torch.arange(self.tokens.shape[1])[None]
        first = {
            "last": self.last,
            "suffix": self.last - self.shared + 1,
            "all": torch.ones_like(self.last),
        }[positions]
        first = torch.minimum(first.clamp(min=1), self.last)
        return (at >= first[:, None]) & (at <= self.last[:, None])

    def aligned(self, values: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows tokens d"]:
        """Each row's partner's values, tokens matched from the end; its first token before that."""
        at = torch.arange(self.tokens.shape[1])[None]
        index = (at + (self.last[self.partner] - self.last)[:, None]).clamp(
            0, self.tokens.shape[1] - 1
        )
        return values[self.partner[:, None], index]


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    yes: tuple[int, ...]
    no: tuple[int, ...]
    pair: int
    side: int


def target_rows(
    lens: Lens,
    contrast: Contrast,
    *,
    readout: Readout | None,
    splits: Sequence[Split] | None,
    tokenizer: Any,
) -> tuple[Rows, tuple[Pair, ...]]:
    """Both sides of every pair, both option orders where the pair has them.

    Raises:
        PromptError: no pair of these splits, pairs without a readout, or options that are not one
            token.
    """
    pairs = tuple(p for p in contrast.pairs if splits is None or p.split in splits)
    if not pairs:
        raise PromptError(
            f"contrast {contrast.name!r}",
            given=f"no pair of the splits {list(splits or ())}",
            expected=f"some of {sorted({p.split for p in contrast.pairs})}",
            remedy="Leave splits out to use every pair.",
        )
    found = _encode(lens, contrast.name, pairs, readout, tokenizer, sides=(FRAME, NEUTRAL))
    return found, pairs


def control_rows(
    lens: Lens,
    controls: Sequence[Contrast],
    *,
    per_control: int,
    tokenizer: Any,
) -> Rows | None:
    """A few frame prompts of every control; None without controls.

    What is read on them is their own readout where they have one; `Rows.groups` names the control.
    """
    rows: list[_Row] = []
    groups: list[str] = []
    for contrast in controls:
        chosen = contrast.pairs[:: max(1, len(contrast) // per_control)][:per_control]
        for pair in chosen:
            subject = f"contrast {contrast.name!r}, item {pair.item_id!r}"
            ids = encode(pair.positive, tokenizer, subject)
            yes, no = ((), ())
            if pair.readout:
                yes, no = _options(pair.positive, pair.readout, tokenizer, subject)
            rows.append(_Row(ids, yes, no, len(groups), FRAME))
            groups.append(contrast.name)
    return _stack(lens, rows, groups) if rows else None


def _encode(
    lens: Lens,
    name: str,
    pairs: Sequence[Pair],
    readout: Readout | None,
    tokenizer: Any,
    sides: Sequence[int],
) -> Rows:
    fixed = None
    if readout is not None:
        own = readout.token_ids(tokenizer)
        fixed = (tuple(map(int, own.yes)), tuple(map(int, own.no)))
    rows: list[_Row] = []
    for i, pair in enumerate(pairs):
        subject = f"contrast {name!r}, item {pair.item_id!r}"
        if fixed is None and not pair.readout:
            raise PromptError(
                subject,
                given="a readout of no continuations",
                expected="the continuation the frame pushes towards, or two options",
                remedy="Pass readout=Readout(...), or use prompts with options.",
            )
        orders = [((pair.positive, pair.negative), pair.readout)]
        if len(pair.swapped) == 2 and len(pair.readout) == 2 and fixed is None:
            orders.append(((pair.swapped[0], pair.swapped[1]), pair.readout[::-1]))
        for prompts, words in orders:
            for side in sides:
                prompt = prompts[side]
                yes, no = fixed or _options(prompt, words, tokenizer, subject)
                rows.append(_Row(encode(prompt, tokenizer, subject), yes, no, i, side))
    return _stack(lens, rows, [pair.cluster_id for pair in pairs])


def _options(
    prompt: Prompt, words: Sequence[str | int], tokenizer: Any, subject: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pushed continuation's id, and those it is compared with."""
    ids = [continuation_id(prompt, word, tokenizer, subject) for word in words]
    if ids[0] in ids[1:]:
        raise PromptError(
            subject,
            given=f"token {ids[0]} on both sides of the readout",
            expected="continuations that this tokenizer tells apart",
            remedy="Choose other letters, or give the readout as token ids.",
        )
    return (ids[0],), tuple(ids[1:])


def _stack(lens: Lens, rows: Sequence[_Row], groups: Sequence[str]) -> Rows:
    largest = max(max(row.ids) for row in rows)
    tokens, mask, last = pad([row.ids for row in rows])
    shape = lens.shape
    if largest >= shape.vocab_size or tokens.shape[1] > shape.max_positions:
        raise PromptError(
            "prompts",
            given=f"token ids up to {largest}, prompts up to {tokens.shape[1]} tokens",
            expected=f"ids below {shape.vocab_size}, at most {shape.max_positions} tokens",
            remedy="Use this model's own tokenizer and shorter prompts.",
        )
    partner = list(range(len(rows)))
    both = {row.side for row in rows} == {FRAME, NEUTRAL}
    if both:  # frame and neutral of one option order stand next to each other
        partner = [i + (1 if row.side == FRAME else -1) for i, row in enumerate(rows)]
    shared = [_shared(rows[i].ids, rows[j].ids) for i, j in enumerate(partner)]
    return Rows(
        tokens,
        mask,
        last,
        _padded([row.yes for row in rows]),
        _padded([row.no for row in rows]),
        torch.tensor([row.pair for row in rows]),
        torch.tensor([row.side for row in rows]),
        torch.tensor(partner),
        torch.tensor(shared),
        tuple(groups),
    )


def _shared(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return max(n, 1)


def _padded(ids: Sequence[Sequence[int]]) -> Int[Tensor, "rows m"]:
    found = torch.full((len(ids), max(1, *(len(row) for row in ids))), -1)
    for i, row in enumerate(ids):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return found


def chosen_log_odds(
    log_probs: Float[Tensor, "b vocab"], yes: Int[Tensor, "b m"], no: Int[Tensor, "b m2"]
) -> Float[Tensor, " b"]:
    """``log P(yes) − log P(no)``, nats; without `no`, against every other token."""

    def total(ids: Tensor) -> Tensor:
        value = log_probs.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        return value.logsumexp(1)

    chosen = total(yes)
    p = chosen.double().exp().clamp(max=1 - 1e-12)
    rest = torch.log1p(-p)
    return chosen.double() - torch.where((no >= 0).any(1), total(no).double(), rest)


def controls_of(contrasts: ContrastSet, target: str) -> tuple[Contrast, ...]:
    """The set's controls, the target apart."""
    return tuple(c for c in contrasts.controls if c.name != target)
