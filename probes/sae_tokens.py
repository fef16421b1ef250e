"""Activations at chosen tokens of prompts, streamed batch by batch from a live model.

Right padding, the attention mask, no gradient; the first token (an attention sink) is left out
wherever a prompt has another. Nothing is kept between batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.errors import MismatchError, PromptError
from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.readout import encode, pad
from mi_weightspace.models.harvest import memory_tokens
from mi_weightspace.models.lens import Lens

Ids = tuple[int, ...]
Prompts = LabelledSet | Sequence[str | Ids]
POSITIONS = ("suffix_mean", "last", "all_mean", "max")


@dataclass(frozen=True, eq=False)
class Taken:
    """Tokens of one batch.

    Attributes:
        values: capture name -> (m, width), float32, on the model's device.
        prompt: (m,) which prompt each token is of; tokens of one prompt are together.
    """

    values: Mapping[str, Float[Tensor, "m width"]]
    prompt: Int[Tensor, " m"]


def token_ids(lens: Lens, prompts: Prompts) -> list[Ids]:
    """Ids of every prompt.

    Raises:
        PromptError: text without a tokenizer, ids out of the vocabulary, a prompt that is empty or
            longer than the model reads, no prompts.
    """
    given = prompts.prompts if isinstance(prompts, LabelledSet) else prompts
    if not len(given):
        raise PromptError(
            "prompts", given="none", expected="at least one", remedy="Give some prompts."
        )
    known: dict[str | Ids, Ids] = {}
    for number, prompt in enumerate(given):
        if prompt not in known:
            subject = f"prompt {number}"
            known[prompt] = tuple(encode(prompt, lens.tokenizer, subject))
            _check(lens, known[prompt], subject)
    return [known[prompt] for prompt in given]


def _check(lens: Lens, ids: Ids, subject: str) -> None:
    if min(ids) < 0 or max(ids) >= lens.shape.vocab_size:
        raise PromptError(
            subject,
            given=f"token ids from {min(ids)} to {max(ids)}",
            expected=f"ids from 0 to below the vocabulary size {lens.shape.vocab_size}",
            remedy="Use this model's own tokenizer.",
        )
    if len(ids) > lens.shape.max_positions:
        raise PromptError(
            subject,
            given=f"{len(ids)} tokens",
            expected=f"at most {lens.shape.max_positions}, the positions this model has",
            remedy="Shorten the prompt.",
        )


def token_spans(ids: Sequence[Ids], position: str) -> list[range]:
    """Tokens of each prompt that are read.

    ``suffix_mean``: those all prompts share at the end, at least the last one; ``last``;
    ``all_mean`` and ``max``: all but the first.

    Raises:
        PromptError: an unknown position.
    """
    if position not in POSITIONS:
        raise PromptError(
            "position",
            given=repr(position),
            expected=f"one of {POSITIONS}",
            remedy="Use 'suffix_mean', or 'last' for the generation position.",
        )
    shared = _shared_suffix(ids) if position == "suffix_mean" else 1
    found = []
    for row in ids:
        first = 1 if len(row) > 1 else 0
        whole = position in ("all_mean", "max")
        found.append(range(first if whole else max(first, len(row) - max(1, shared)), len(row)))
    return found


def _shared_suffix(ids: Sequence[Ids]) -> int:
    reversed_ = [row[::-1] for row in dict.fromkeys(ids)]
    shared = 0
    for column in zip(*reversed_, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return shared


def stream(
    lens: Lens,
    ids: Sequence[Ids],
    spans: Sequence[range],
    names: Sequence[str],
    *,
    base: Lens | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
    label: str = "activations",
) -> Iterator[Taken]:
    """The wanted tokens of every prompt, longest prompts first.

    Args:
        names: what to capture (see `Lens.run`).
        base: with it, values are this model's minus the base's on the same tokens.
        batch_tokens: bound of rows × columns of one forward pass; default: by the free memory.

    Raises:
        PromptError: activations that are not finite.
    """
    from rich.progress import track

    if base is not None and base.shape.vocab_size != lens.shape.vocab_size:
        raise MismatchError(
            "difference of two models",
            given=f"vocabularies of {lens.shape.vocab_size} and {base.shape.vocab_size} tokens",
            expected="two stages of one model",
            remedy="Give the stage this one was trained from.",
        )
    if batch_tokens is None:
        batch_tokens = memory_tokens(lens, max(len(row) for row in ids), names)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    for batch in track(batches, label, disable=not progress, transient=True):
        tokens, mask, _ = pad([list(ids[i]) for i in batch])
        wanted = torch.zeros_like(mask, dtype=torch.bool)
        for row, i in enumerate(batch):
            wanted[row, spans[i].start : spans[i].stop] = True
        captured = _run(lens, tokens, mask, wanted, names)
        if base is not None:
            under = _run(base, tokens, mask, wanted, names)
            captured = {name: captured[name] - under[name].to(lens.device) for name in names}
        counts = torch.tensor([len(spans[i]) for i in batch])
        prompt = torch.tensor(batch).repeat_interleave(counts).to(lens.device)
        for name, value in captured.items():
            _check_finite(value, name)
        yield Taken(captured, prompt)


def _run(
    lens: Lens, tokens: Tensor, mask: Tensor, wanted: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    run = lens.run(tokens, attention_mask=mask, capture=names, logits=False)
    index = wanted.flatten().nonzero().squeeze(1).to(lens.device)
    return {
        name: value.flatten(0, 1).index_select(0, index.to(value.device)).float()
        for name, value in run.captured.items()
    }


def _check_finite(value: Tensor, name: str) -> None:
    # one sum is cheaper, and finite only if every value is
    if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        raise PromptError(
            f"activations at {name}",
            given="NaN or infinite values",
            expected="finite activations",
            remedy="Run the model in float32, or look for a damaged checkpoint.",
        )
