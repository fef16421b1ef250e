"""Pooled activations of a contrast set on a live model, any backend.

Right padding, the attention mask, `no_grad`; only pooled values are kept, so memory does not grow
with the number of tokens. Site inputs are reduced batch by batch to the mean shift of each
contrast. A prompt that stands in several pairs is run once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
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
MEMORY_SHARE = 0.2
"""Share of the free memory one forward pass may use, by the estimate of `memory_tokens`."""
MAX_BATCH_TOKENS = 65_536


def harvest(
    lens: Lens,
    contrasts: ContrastSet,
    *,
    points: Sequence[Space | str] | None = None,
    sites: Sequence[str] = (),
    position: str = "last",
    stage: str = "",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> PairedActivations:
    """Run every prompt once and pool.

    Args:
        points: stream points or other spaces; default every stream point of the model.
        sites: matrices whose own input's mean shift (and mean) is wanted.
        position: ``last`` token (the generation position), ``suffix_mean`` (tokens the two sides
            of a pair share at the end), ``frame_mean`` (the tokens before them), ``all_mean``,
            ``first_k`` (the first five). The first token is left out of every mean.
        batch_tokens: upper bound of rows × columns in one forward pass; default: sized to the
            free memory.

    Raises:
        PromptError: an unknown position, text without a tokenizer, token ids out of vocabulary,
            a prompt longer than the model reads.
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
    pooled = _Pooled(rows, len(contrasts), [s.name for s in spaces], list(sites))
    if batch_tokens is None:
        longest = max(len(row.ids) for row in rows)
        batch_tokens = memory_tokens(lens, longest, [*pooled.points, *pooled.inputs])
    _run_rows(lens, rows, pooled, batch_tokens, progress, stage)
    values: dict[tuple[str, str], Tensor] = {}
    sizes = [2 * len(contrast) for contrast in contrasts]
    for space in spaces:
        parts = pooled.values[space.name].split(sizes)
        for contrast, part in zip(contrasts, parts, strict=True):
            values[contrast.name, space.name] = part.unflatten(0, (len(contrast), 2))
    return PairedActivations(
        stage=stage,
        model_hash=lens.fingerprint,
        contrasts=contrasts,
        position=position,
        points=tuple(spaces),
        values=values,
        site_shift={site: pooled.shift[site] for site in sites},
        site_mean={site: pooled.mean[site] for site in sites},
        convention=lens.convention,
    )


@dataclass(frozen=True)
class _Row:
    """One side of one pair.

    Attributes:
        pool: the tokens averaged.
        contrast: index of its contrast; `weight`: ±1/n_pairs, its part in the mean shift.
    """

    ids: tuple[int, ...]
    pool: range
    contrast: int
    weight: float


class _Pooled:
    """Accumulates what is kept: one vector per row at `points`, sums at the `inputs` of sites."""

    def __init__(
        self, rows: Sequence[_Row], n_contrasts: int, points: list[str], sites: list[str]
    ) -> None:
        self.rows, self.n_contrasts, self.points = rows, n_contrasts, points
        self.inputs = {f"{site}:in": site for site in sites}
        self.values: dict[str, Float[Tensor, "rows d"]] = {}
        self.shift: dict[str, Float[Tensor, "n_contrasts d_in"]] = {}
        self.mean: dict[str, Float[Tensor, " d_in"]] = {}

    def add(self, captured: Mapping[str, Tensor], batch: Sequence[tuple[int, int]]) -> None:
        """`batch`: (index of the sequence in the captured batch, index of the row)."""
        sequence = torch.tensor([s for s, _ in batch])
        index = torch.tensor([r for _, r in batch])
        length = next(iter(captured.values())).shape[1]
        wanted = torch.zeros(len(batch), length)
        for i, (_, r) in enumerate(batch):
            pool = self.rows[r].pool
            wanted[i, pool.start : pool.stop] = 1 / len(pool)
        done: dict[int, Tensor] = {}  # q, k and v read one and the same tensor
        for name, value in captured.items():
            if id(value) not in done:
                done[id(value)] = _pool(value, sequence, wanted)
            mean = done[id(value)]
            if name in self.inputs:
                self._accumulate(self.inputs[name], mean, index)
            else:
                kept = self.values.setdefault(name, torch.empty(len(self.rows), mean.shape[-1]))
                kept[index] = mean

    def _accumulate(self, site: str, mean: Float[Tensor, "rows d"], index: Tensor) -> None:
        rows = [self.rows[int(r)] for r in index]
        if site not in self.shift:
            self.shift[site] = torch.zeros(self.n_contrasts, mean.shape[-1])
            self.mean[site] = torch.zeros(mean.shape[-1])
        weights = torch.tensor([row.weight for row in rows])
        contrast = torch.tensor([row.contrast for row in rows])
        self.shift[site].index_add_(0, contrast, mean * weights[:, None])
        self.mean[site] += mean.sum(0) / len(self.rows)


def _encode_rows(lens: Lens, contrasts: ContrastSet, position: str) -> list[_Row]:
    rows: list[_Row] = []
    cache: dict[str | tuple[int, ...], tuple[int, ...]] = {}

    def ids_of(prompt: str | tuple[int, ...], contrast: Contrast, pair: Pair) -> tuple[int, ...]:
        if prompt not in cache:
            subject = f"contrast {contrast.name!r}, item {pair.item_id!r}"
            cache[prompt] = tuple(encode(prompt, lens.tokenizer, subject))
            _check_ids(lens, cache[prompt], subject)
        return cache[prompt]

    for c, contrast in enumerate(contrasts):
        for pair in contrast.pairs:
            sides = [ids_of(side, contrast, pair) for side in (pair.positive, pair.negative)]
            shared = _common_suffix(*sides)
            for side, sign in zip(sides, (1, -1), strict=True):
                pool = _pooled(len(side), shared, position, contrast, pair)
                rows.append(_Row(side, pool, c, sign / len(contrast)))
    return rows


def _check_ids(lens: Lens, ids: tuple[int, ...], subject: str) -> None:
    if max(ids) >= lens.shape.vocab_size or min(ids) < 0:
        raise PromptError(
            subject,
            given=f"token ids from {min(ids)} to {max(ids)}",
            expected=f"ids below the vocabulary size {lens.shape.vocab_size}",
            remedy="Use this model's own tokenizer.",
        )
    if len(ids) > lens.shape.max_positions:
        raise PromptError(
            subject,
            given=f"a prompt of {len(ids)} tokens",
            expected=f"at most {lens.shape.max_positions}, the positions this model has",
            remedy="Shorten the prompt.",
        )


def _common_suffix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
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
    rows: Sequence[_Row],
    pooled: _Pooled,
    batch_tokens: int,
    progress: bool,
    stage: str,
) -> None:
    """Longest prompts first, each distinct prompt once."""
    from rich.progress import track

    where: dict[tuple[int, ...], list[int]] = {}
    for r, row in enumerate(rows):
        where.setdefault(row.ids, []).append(r)
    prompts = sorted(where, key=len, reverse=True)
    batches: list[list[tuple[int, ...]]] = []
    for ids in prompts:
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > batch_tokens:
            batches.append([])
        batches[-1].append(ids)
    names = [*pooled.points, *pooled.inputs]
    for batch in track(batches, f"activations {stage}", disable=not progress, transient=True):
        tokens, mask, _ = pad([list(ids) for ids in batch])
        run = lens.run(tokens, attention_mask=mask, capture=names, logits=False)
        pooled.add(run.captured, [(i, r) for i, ids in enumerate(batch) for r in where[ids]])


def _pool(
    value: Float[Tensor, "batch tokens d"],
    sequence: Int[Tensor, " rows"],
    wanted: Float[Tensor, "rows tokens"],
) -> Float[Tensor, "rows d"]:
    """Mean over the wanted tokens, float32, on the CPU.

    One-token pools are read, not multiplied: the padding's values never enter.
    """
    tokens = wanted.argmax(1)
    sequence = sequence.to(value.device)
    if bool((wanted.amax(1) == 1).all()):
        return value[sequence, tokens.to(value.device)].float().cpu()
    weights = wanted.to(value.device)
    picked = value[sequence].float().masked_fill(weights[..., None] == 0, 0.0)
    return torch.einsum("btd,bt->bd", picked, weights).cpu()


def memory_tokens(lens: Lens, longest: int, captured: Sequence[str]) -> int:
    """Tokens one forward pass may hold: a share of the free memory by what a token needs.

    A token needs its captured vectors, the working set of one block (stream, heads, MLP) and its
    row of attention scores; logits are never formed.
    """
    shape = lens.shape
    widest = max(shape.d_model, shape.d_mlp if any(":in" in n for n in captured) else 0)
    working = 12 * shape.d_model + 4 * shape.d_mlp + 2 * shape.n_heads * longest
    n_bytes = torch.empty(0, dtype=lens.dtype).element_size()
    per_token = n_bytes * (working + widest * len(captured)) + 4 * widest
    if lens.device.type == "cuda":
        free = torch.cuda.mem_get_info(lens.device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return int(min(max(MEMORY_SHARE * free / per_token, longest), MAX_BATCH_TOKENS))
