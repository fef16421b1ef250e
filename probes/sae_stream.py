"""Batches of tokens for training: a function of the seed and the step, whatever the memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.lens import Lens
from probes.sae_tokens import Ids, stream, token_spans

BUFFER_ELEMENTS = 1 << 26
"""Activations held at once (256 MiB in float32); a corpus that fits is run once."""
FORWARD_TOKENS = 8_192
"""Rows × columns of a forward pass: fixed, so that a resumed run sees the very same numbers."""


class Activations:
    """Batches of tokens in an order that depends on the seed and the step alone.

    Prompts are shuffled once and cut into chunks that fit the buffer; within an epoch the chunks
    come in turn, each shuffled anew. A corpus of one chunk is run through the model once.

    Raises:
        PromptError: fewer than two tokens.
    """

    def __init__(
        self,
        lens: Lens,
        base: Lens | None,
        ids: Sequence[Ids],
        name: str,
        batch: int,
        seed: int,
        *,
        buffer: int | None = None,
    ) -> None:
        self.lens, self.base, self.name, self.seed = lens, base, name, seed
        distinct = list(dict.fromkeys(ids))
        order = torch.randperm(len(distinct), generator=generator(seed, "sae prompts")).tolist()
        self.ids = [distinct[i] for i in order]
        self.spans = token_spans(self.ids, "all_mean")
        total = sum(map(len, self.spans))
        if total < 2:
            raise PromptError(
                "prompts",
                given=f"{total} token beside the first",
                expected="at least two",
                remedy="Give more or longer prompts.",
            )
        self.batch = min(batch, total)
        room = buffer or BUFFER_ELEMENTS // lens.shape.d_model
        self.chunks = self._cut(max(room, self.batch))
        self.sizes = [sum(len(self.spans[i]) for i in chunk) for chunk in self.chunks]
        self._held: tuple[int, Tensor] | None = None

    def _cut(self, room: int) -> list[list[int]]:
        chunks: list[list[int]] = [[]]
        filled = 0
        for i, span in enumerate(self.spans):
            if filled and filled + len(span) > room:
                chunks.append([])
                filled = 0
            chunks[-1].append(i)
            filled += len(span)
        return chunks

    def chunk(self, number: int) -> Float[Tensor, "m d"]:
        """All tokens of one chunk, in a fixed order."""
        if self._held is None or self._held[0] != number:
            self._held = None  # two chunks at once would double the memory
            ids = [self.ids[i] for i in self.chunks[number]]
            spans = [self.spans[i] for i in self.chunks[number]]
            columns = max(FORWARD_TOKENS, *map(len, ids))
            parts = [
                taken.values[self.name]
                for taken in stream(
                    self.lens, ids, spans, [self.name], base=self.base, batch_tokens=columns
                )
            ]
            self._held = number, torch.cat(parts)
        return self._held[1]

    def at(self, step: int) -> Float[Tensor, "batch d"]:
        """The batch of one step."""
        each = [size // self.batch for size in self.sizes]
        epoch, place = divmod(step, sum(each))
        number = 0
        while place >= each[number]:
            place -= each[number]
            number += 1
        draw = generator(self.seed, "sae tokens", epoch, number)
        order = torch.randperm(self.sizes[number], generator=draw)
        x = self.chunk(number)
        return x[order[place * self.batch : (place + 1) * self.batch].to(x.device)]
