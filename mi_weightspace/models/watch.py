"""Calibrating and checking bands (`core.monitor`) on the prompts of a live model, any backend.

Right padding, `no_grad`; of every prompt only its smallest and largest value along each vector is
kept. Prompts are run in the order of their lengths and reported in the order given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mi_weightspace.core.components import Components, Where
from mi_weightspace.core.errors import MismatchError, PromptError
from mi_weightspace.core.monitor import (
    MARGIN,
    Alarms,
    Bands,
    Extremes,
    Measure,
    Watch,
    calibrate,
    extremes,
    items_needed,
)
from mi_weightspace.core.readout import encode, pad
from mi_weightspace.core.site import Side
from mi_weightspace.models.harvest import memory_tokens
from mi_weightspace.models.lens import Lens

Prompt = str | tuple[int, ...]


def bands(
    lens: Lens,
    prompts: Sequence[Prompt],
    components: Components | Iterable[Components],
    *,
    side: Side = "write",
    k: int | None = 20,
    where: Where = "site",
    measure: Measure = "projection",
    margin: float = MARGIN,
    rate: float | None = None,
    skip_first: bool = True,
    keep: Sequence[Sequence[bool]] | None = None,
    batch_tokens: int | None = None,
) -> Bands:
    """Bands of a model along the largest parts of one or several matrices' differences.

    Args:
        prompts: calibration items, drawn as the items to be checked will be: n of them.
        components: of an SVD, of LoRA factors or of a VPD (taken with ``fold_gains=False`` where
            the matrix's own inputs are watched).
        side, k, where, measure: see `Components.watch`; t is k times the number of matrices.
        rate: the false-positive rate wanted; refused where 2t/(n+1) exceeds it.
        skip_first: leave out each prompt's first token, whose activations are an attention sink
            and would stretch every band (prompts of one token keep it).
        keep: for each prompt, which of its tokens count (user or assistant tokens alone, say).
        batch_tokens: upper bound of rows × columns in one forward pass.

    Raises:
        PromptError: too few prompts for `rate`, or prompts this model cannot read.
        DirectionError: components of a model of other widths.
    """
    parts = [components] if isinstance(components, Components) else list(components)
    watches = [c.watch(side, k=k, where=where, measure=measure) for c in parts]
    t = sum(map(len, watches))
    if rate is not None and len(prompts) < items_needed(t, rate):
        raise PromptError(
            "calibration prompts",
            given=f"{len(prompts)} for {t} vectors",
            expected=f"at least {items_needed(t, rate)}, for 2t/(n+1) ≤ {rate:g}",
            remedy="Give more prompts, or watch fewer vectors (k=).",
        )
    found = _harvest(lens, prompts, watches, skip_first, keep, batch_tokens)
    return calibrate(
        watches, found, margin=margin, model_hash=lens.fingerprint, skip_first=skip_first
    )


def check(
    lens: Lens,
    prompts: Sequence[Prompt],
    calibrated: Bands,
    *,
    keep: Sequence[Sequence[bool]] | None = None,
    batch_tokens: int | None = None,
) -> Alarms:
    """Which prompts leave which bands; one item a prompt, in the order given.

    Raises:
        MismatchError: bands of another model. PromptError: prompts this model cannot read.
    """
    return calibrated.judge(_again(lens, prompts, calibrated, keep, batch_tokens))


def widen(
    lens: Lens,
    prompts: Sequence[Prompt],
    calibrated: Bands,
    *,
    keep: Sequence[Sequence[bool]] | None = None,
    batch_tokens: int | None = None,
) -> Bands:
    """`Bands.widened` by further prompts of the same model (all seen, not only harmless alarms).

    Raises:
        MismatchError: bands of another model. PromptError: prompts this model cannot read.
    """
    return calibrated.extended(_again(lens, prompts, calibrated, keep, batch_tokens))


def _again(
    lens: Lens,
    prompts: Sequence[Prompt],
    calibrated: Bands,
    keep: Sequence[Sequence[bool]] | None,
    batch_tokens: int | None,
) -> list[Extremes]:
    if calibrated.model_hash and calibrated.model_hash != lens.fingerprint:
        raise MismatchError(
            "model to watch",
            given=f"fingerprint {lens.fingerprint}",
            expected=f"{calibrated.model_hash}, of the model the bands were calibrated on",
            remedy="Calibrate on this model, or check the one the bands belong to.",
        )
    return _harvest(lens, prompts, calibrated.watches, calibrated.skip_first, keep, batch_tokens)


def _harvest(
    lens: Lens,
    prompts: Sequence[Prompt],
    watches: Sequence[Watch],
    skip_first: bool,
    keep: Sequence[Sequence[bool]] | None,
    batch_tokens: int | None,
) -> list[Extremes]:
    """One `Extremes` a watch, rows in the order of `prompts`."""
    ids = [encode(p, lens.tokenizer, f"prompt {i}") for i, p in enumerate(prompts)]
    _check(lens, ids, keep)
    places = list(dict.fromkeys(w.capture for w in watches))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
    if batch_tokens is None:
        batch_tokens = memory_tokens(lens, len(ids[order[0]]), places)
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * len(ids[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    found: list[list[Extremes]] = [[] for _ in watches]
    for batch in batches:
        tokens, attention, _ = pad([ids[i] for i in batch])
        run = lens.run(tokens, attention_mask=attention, capture=places, logits=False)
        counted = _counted(attention, batch, skip_first, keep)
        for own, watch in zip(found, watches, strict=True):
            own.append(extremes(watch, run.captured[watch.capture], counted))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    joined = [Extremes.join(own) for own in found]
    return [Extremes(e.low[back], e.high[back]) for e in joined]


def _counted(
    attention: Tensor,
    batch: Sequence[int],
    skip_first: bool,
    keep: Sequence[Sequence[bool]] | None,
) -> Tensor:
    counted = attention.bool().clone()
    if skip_first:
        counted[:, 0] = attention.sum(1) == 1
    if keep is not None:
        for row, i in enumerate(batch):
            counted[row, : len(keep[i])] &= torch.tensor(keep[i], dtype=torch.bool)
    return counted


def _check(lens: Lens, ids: list[list[int]], keep: Sequence[Sequence[bool]] | None) -> None:
    if not ids or (keep is not None and [len(k) for k in keep] != [len(row) for row in ids]):
        raise PromptError(
            "prompts to watch",
            given="none" if not ids else "`keep` of other lengths than the prompts",
            expected="at least one prompt, and in keep= one truth value for each of its tokens",
            remedy="Tokenise first and pass tuples of ids beside their keep=.",
        )
    for i, row in enumerate(ids):
        if min(row) < 0 or max(row) >= lens.shape.vocab_size:
            raise PromptError(
                f"prompt {i}",
                given=f"token ids from {min(row)} to {max(row)}",
                expected=f"ids below the vocabulary size {lens.shape.vocab_size}",
                remedy="Use this model's own tokenizer.",
            )
        if len(row) > lens.shape.max_positions:
            raise PromptError(
                f"prompt {i}",
                given=f"{len(row)} tokens",
                expected=f"at most {lens.shape.max_positions}, the positions this model has",
                remedy="Shorten the prompt.",
            )
