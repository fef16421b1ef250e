"""A behaviour as a number: mean log-odds of some next tokens at a position of some prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.errors import PromptError


@dataclass(frozen=True)
class Readout:
    """Log-odds ``log P(yes) − log P(no)`` at the last token, averaged over prompts.

    Attributes:
        prompts: texts, or tuples of token ids.
        yes, no: the two sets of next tokens (ids, or strings of one token each); an empty `no`
            means every other token.
    """

    name: str
    prompts: tuple[str | tuple[int, ...], ...]
    yes: tuple[int | str, ...]
    no: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts or not self.yes:
            raise PromptError(
                f"readout {self.name!r}",
                given=f"{len(self.prompts)} prompts and {len(self.yes)} `yes` tokens",
                expected="at least one of each",
                remedy="Name the continuation whose log-odds measure the behaviour.",
            )

    def tokens(
        self, tokenizer: Any
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
        """Right-padded ids, attention mask, and the index of each prompt's last token."""
        ids = [encode(prompt, tokenizer, self.name) for prompt in self.prompts]
        return pad(ids)

    def token_ids(self, tokenizer: Any) -> Readout:
        """The same readout with `yes` and `no` as ids."""
        yes = tuple(_one_token(t, tokenizer, self.name) for t in self.yes)
        no = tuple(_one_token(t, tokenizer, self.name) for t in self.no)
        return Readout(self.name, self.prompts, yes, no)

    def value(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, ""]:
        """Mean log-odds in nats; differentiable. `yes` and `no` must be ids by now."""
        logits = logits.float()
        yes = torch.tensor([int(t) for t in self.yes], device=logits.device)
        if self.no:
            no = torch.tensor([int(t) for t in self.no], device=logits.device)
        else:
            rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            rest[yes] = False
            no = rest.nonzero().flatten()
        return (logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)).mean()


def encode(prompt: str | tuple[int, ...], tokenizer: Any, subject: str) -> list[int]:
    """Token ids of a prompt.

    Raises:
        PromptError: text without a tokenizer, or a prompt of no tokens.
    """
    if not isinstance(prompt, str):
        ids = list(prompt)
    elif tokenizer is None:
        raise PromptError(
            subject,
            given="text prompts for a model without a tokenizer",
            expected="a tokenizer beside the model, or prompts as token ids",
            remedy="Pass tokenizer= to mi_weightspace.load.",
        )
    else:
        ids = list(tokenizer(prompt)["input_ids"])
    if not ids:
        raise PromptError(
            subject,
            given="a prompt without tokens",
            expected="non-empty prompts",
            remedy="Drop the empty prompt.",
        )
    return ids


def pad(
    ids: list[list[int]],
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
    """Right padding: left padding shifts the positions of some families silently."""
    length = max(len(row) for row in ids)
    tokens = torch.zeros(len(ids), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return tokens, mask, mask.sum(1) - 1


def _one_token(token: int | str, tokenizer: Any, subject: str) -> int:
    if isinstance(token, int):
        return token
    ids = encode(token, tokenizer, subject)
    ids = [i for i in ids if i not in set(getattr(tokenizer, "all_special_ids", ()))]
    if len(ids) != 1:
        raise PromptError(
            f"readout {subject!r}",
            given=f"{token!r}, which is {len(ids)} tokens for this tokenizer",
            expected="continuations of exactly one token",
            remedy="Choose another spelling (with or without a leading space), or give the id.",
        )
    return ids[0]
