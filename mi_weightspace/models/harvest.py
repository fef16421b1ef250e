"""Pooled activations of a contrast set on a live model, any backend.

Right padding, the attention mask, `no_grad`; only pooled values are kept, so memory does not grow
with the number of tokens. Site inputs are reduced at once to the mean shift of each contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.readout import encode, pad
from mi_weightspace.core.space import Space
from mi_weightspace.models.lens import Lens

Position = Literal["last", "suffix_mean", "frame_mean", "all_mean", "first_k"]
POSITIONS: tuple[Position, ...] = ("last", "suffix_mean", "frame_mean", "all_mean", "first_k")
FIRST_K = 5
BATCH_TOKENS = 16_384


def harvest(
    lens: Lens,
    contrasts: ContrastSet,
    *,
    points: Sequence[Space | str] | None = None,
    sites: Sequence[str] = (),
    position: str = "last",
    stage: str = "",
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> PairedActivations:
    """Run every prompt once and pool.

    Args:
        points: stream points or other spaces; default every stream point of the model.
        sites: matrices whose own input's mean shift (and mean) is wanted.
        position: ``last`` token (the generation position), ``suffix_mean`` (tokens the two sides
            of a pair share at the end), ``frame_mean`` (the tokens before them), ``all_mean``,
            ``first_k`` (the first five). The first token is left out of every mean.
        batch_tokens: upper bound of rows x columns in one forward pass.

    Raises:
        PromptError: an unknown position, text without a tokenizer, token ids out of vocabulary.
    """
    if position not in POSITIONS:
        raise PromptError(
            "position",
            given=repr(position),
            expected=f"one of {POSITIONS}",
            remedy="Use 'last' for the generation position.",
        )
    spaces = [Space.parse(p).canonical for p in (lens.points() if points is None else points)]
    rows = _encode_rows(lens, contrasts, position)
    names = [s.name for s in spaces] + [f"{site}:in" for site in sites]
    pooled = _run_rows(lens, rows, names, batch_tokens, progress, stage)
    n_pairs = [len(c) for c in contrasts]
    values: dict[tuple[str, str], Tensor] = {}
    for space in spaces:
        for contrast, part in zip(
            contrasts, pooled[space.name].split([2 * n for n in n_pairs]), strict=True
        ):
            values[contrast.name, space.name] = part.unflatten(0, (len(contrast), 2))
    shifts: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for site in sites:
        inputs = pooled[f"{site}:in"]
        parts = inputs.split([2 * n for n in n_pairs])
        shifts[site] = torch.stack([p[0::2].mean(0) - p[1::2].mean(0) for p in parts])
        means[site] = inputs.mean(0)
    return PairedActivations(
        stage=stage,
        model_hash=lens.fingerprint,
        contrasts=contrasts,
        position=position,
        points=tuple(spaces),
        values=values,
        site_shift=shifts,
        site_mean=means,
        convention=lens.convention,
    )


class _Row:
    """One prompt: its ids and the tokens pooled."""

    def __init__(self, ids: list[int], pool: range) -> None:
        self.ids, self.pool = ids, pool


def _encode_rows(lens: Lens, contrasts: ContrastSet, position: str) -> list[_Row]:
    rows: list[_Row] = []
    cache: dict[str | tuple[int, ...], list[int]] = {}

    def ids_of(prompt: str | tuple[int, ...], contrast: Contrast) -> list[int]:
        if prompt not in cache:
            cache[prompt] = encode(prompt, lens.tokenizer, f"contrast {contrast.name!r}")
        return cache[prompt]

    for contrast in contrasts:
        for pair in contrast.pairs:
            sides = [ids_of(pair.positive, contrast), ids_of(pair.negative, contrast)]
            top = max(max(side) for side in sides)
            if top >= lens.shape.vocab_size:
                raise PromptError(
                    f"contrast {contrast.name!r}, item {pair.item_id!r}",
                    given=f"token id {top}",
                    expected=f"ids below the vocabulary size {lens.shape.vocab_size}",
                    remedy="Use this model's own tokenizer.",
                )
            shared = _common_suffix(*sides)
            for side in sides:
                rows.append(_Row(side, _pooled(len(side), shared, position, contrast, pair)))
    return rows


def _common_suffix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def _pooled(length: int, shared: int, position: str, contrast: Contrast, pair: Pair) -> range:
    first = 1 if length > 1 else 0  # the first token's activation is an attention sink
    span = {
        "last": range(length - 1, length),
        "suffix_mean": range(max(first, length - shared), length),
        "frame_mean": range(first, length - shared),
        "all_mean": range(first, length),
        "first_k": range(first, min(length, first + FIRST_K)),
    }[position]
    if not len(span):
        raise PromptError(
            f"contrast {contrast.name!r}, item {pair.item_id!r}",
            given=f"no token for position {position!r}",
            expected="two sides with a differing frame and a shared suffix",
            remedy="Use position='last', or give the prompts a common suffix.",
        )
    return span


def _run_rows(
    lens: Lens,
    rows: list[_Row],
    names: list[str],
    batch_tokens: int,
    progress: bool,
    stage: str,
) -> dict[str, Float[Tensor, "rows d"]]:
    """Longest rows first within memory, results in the order given."""
    from rich.progress import track

    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    batches: list[list[int]] = []
    for i in order:
        longest = len(rows[batches[-1][0]].ids) if batches else 0
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    pooled: dict[str, Tensor] = {}
    for batch in track(batches, f"activations {stage}", disable=not progress, transient=True):
        tokens, mask, _ = pad([rows[i].ids for i in batch])
        wanted = torch.zeros(tokens.shape, dtype=torch.bool)
        for r, i in enumerate(batch):
            wanted[r, rows[i].pool.start : rows[i].pool.stop] = True
        run = lens.run(tokens, attention_mask=mask, capture=names, logits=False)
        for name in names:
            value = _pool(run.captured[name], wanted)
            if name not in pooled:
                pooled[name] = torch.empty(len(rows), value.shape[-1])
            pooled[name][torch.tensor(batch)] = value
    return pooled


def _pool(
    value: Float[Tensor, "batch tokens d"], wanted: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch d"]:
    weights = wanted.to(value.device, torch.float32)
    total = torch.einsum("btd,bt->bd", value.float(), weights)
    return (total / weights.sum(1, keepdim=True)).cpu()
