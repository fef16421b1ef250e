"""Training batches as a function of the step, so that a resumed run needs no loader state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.distributed import world


class Stream(Protocol):
    """``batch(step)`` is the whole batch of a step, all processes together."""

    def batch(self, step: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Rows of a token table in a fresh order every epoch.

    Args:
        tokens: (n, tokens) ids, no padding. batch_size: rows a step and process.

    Raises:
        PromptError: fewer rows than a batch, or not a table of whole numbers.
    """

    tokens: Int[Tensor, "n tokens"]
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.is_floating_point():
            raise PromptError(
                "tokens",
                given=f"a {self.tokens.dtype} tensor of shape {tuple(self.tokens.shape)}",
                expected="token ids of shape (rows, tokens)",
                remedy="Cut the text into rows of equal length.",
            )
        if len(self.tokens) < self.batch_size * world():
            raise PromptError(
                "tokens",
                given=f"{len(self.tokens)} rows",
                expected=f"at least one batch of {self.batch_size * world()}",
                remedy="Give more text, or lower batch_size.",
            )

    def rows(self, step: int) -> Int[Tensor, " batch"]:
        size = self.batch_size * world()
        per_epoch = len(self.tokens) // size
        order = _order(len(self.tokens), self.seed, step // per_epoch)
        at = (step % per_epoch) * size
        return order[at : at + size]

    def batch(self, step: int) -> Tensor:
        return self.tokens[self.rows(step)]


@dataclass(frozen=True, eq=False)
class MixedStream(TokenStream):
    """Batches of two tables: the first `n_first` rows of `tokens` fill `first_size` of each.

    Raises:
        PromptError: a part with fewer rows than it has to give to one batch.
    """

    n_first: int = 0
    first_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for n, size in self._parts:
            if n < size * world():
                raise PromptError(
                    "tokens of one part of a mixture",
                    given=f"{n} rows",
                    expected=f"at least {size * world()}, its share of a batch",
                    remedy="Give more text, or lower batch_size.",
                )

    @property
    def _parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        rest = len(self.tokens) - self.n_first, self.batch_size - self.first_size
        return (self.n_first, self.first_size), rest

    def rows(self, step: int) -> Int[Tensor, " batch"]:
        """Every process' share holds both parts in the same proportion."""
        drawn, start = [], 0
        for n, size in self._parts:
            if size:
                whole = size * world()
                per_epoch = n // whole
                order = _order(n, self.seed, step // per_epoch)
                at = (step % per_epoch) * whole
                drawn.append((start + order[at : at + whole]).view(world(), size))
            start += n
        return torch.cat(drawn, dim=1).flatten()


@lru_cache(maxsize=8)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


@dataclass(frozen=True, eq=False)
class SampledStream:
    """Fresh draws of a data law: ``sample(batch, generator) -> (batch, features)``."""

    sample: Callable[[int, torch.Generator], Tensor]
    batch_size: int
    seed: int = 0

    def batch(self, step: int) -> Tensor:
        return self.sample(self.batch_size * world(), generator(self.seed, "batch", step))


def check_vocabulary(tokens: Int[Tensor, "n tokens"], vocab_size: int) -> None:
    """Refuse ids outside the model's vocabulary.

    Raises:
        PromptError: with the id and where it is.
    """
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise PromptError(
            f"tokens, row {row} column {column}",
            given=f"id {int(tokens[row, column])}",
            expected=f"ids from 0 to {vocab_size - 1}, the model's vocabulary",
            remedy="Tokenise with the model's own tokenizer.",
        )
