"""Training and held-out data from what users have: tables of ids, text, streams, a toy's inputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.readout import encode
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.corpus import read_tokens
from mi_weightspace.vpd.distributed import world
from mi_weightspace.vpd.host import Host
from mi_weightspace.vpd.stream import SampledStream, Stream, TokenStream, check_vocabulary

HELD_OUT = 0.05
"""Share of the rows kept apart where no held-out data are given."""
MAX_BATCHES = 8
"""Held-out batches evaluated by default."""


@dataclass(frozen=True, eq=False)
class Data:
    """What a run is trained and evaluated on.

    Attributes:
        batches: held out. measured_on: what they are, in words. digest: hash of the training data.
    """

    stream: Stream
    batches: tuple[Tensor, ...]
    measured_on: str
    digest: str
    reservations: tuple[str, ...] = ()


def prepare(tokens: Any, held_out: Any, host: Host, config: VPDConfig, length: int) -> Data:
    """Training stream and held-out batches.

    Raises:
        PromptError: what is no data, ids out of vocabulary, fewer rows than needed.
    """
    size = config.batch_size
    kept = None if held_out is None else table_of(held_out, host, length)
    notes: tuple[str, ...] = ()
    if hasattr(tokens, "batch") and not isinstance(tokens, TokenStream | Tensor):
        stream: Stream = tokens
        if kept is None:
            notes = ("Held-out batches are later batches of the training stream.",)
            drawn = [stream.batch(config.n_steps + i) for i in range(MAX_BATCHES)]
            return _data(stream, drawn, stream.batch(0), "later batches of the stream", notes)
    else:
        rows = tokens.tokens if isinstance(tokens, TokenStream) else table_of(tokens, host, length)
        if kept is None:
            n = max(size, math.ceil(HELD_OUT * len(rows)))
            if len(rows) < n + size * world():
                raise _too_few(len(rows), n + size * world())
            rows, kept = rows[:-n], rows[-n:]
            share = 100 * n / (n + len(rows))
            notes = (
                f"Evaluated on the last {n} rows of the data given ({share:.2g} %), which were "
                "not trained on.",
            )
        seed = tokens.seed if isinstance(tokens, TokenStream) else config.seed
        stream = _stream(rows, size, seed)
    first = stream.batch(0)
    _check_ids(first, host)
    assert kept is not None
    chosen = list(kept.split(size))
    if held_out is None:
        chosen = chosen[:MAX_BATCHES]
    if len(chosen) > 1 and len(chosen[-1]) < size:
        chosen = chosen[:-1]  # intervals are over batches of one size
    return _data(stream, chosen, first, "held-out rows", notes)


def _data(
    stream: Stream, batches: Sequence[Tensor], first: Tensor, what: str, notes: tuple[str, ...]
) -> Data:
    digest = hashlib.sha256(first.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return Data(stream, tuple(batches), what, digest, notes)


def _stream(rows: Tensor, size: int, seed: int) -> Stream:
    if not rows.is_floating_point():
        return TokenStream(rows, size, seed)
    return SampledStream(
        lambda n, draw: rows[torch.randint(len(rows), (n,), generator=draw)], size, seed
    )


def table_of(given: Any, host: Host, length: int) -> Tensor:
    """(rows, tokens) ids, or a toy's (rows, features)."""
    if isinstance(given, TokenStream):
        given = given.tokens
    if isinstance(given, Tensor):
        if given.ndim != 2:
            raise PromptError(
                "tokens",
                given=f"a tensor of shape {tuple(given.shape)}",
                expected="(rows, tokens), or (rows, features) for a toy",
                remedy="Cut the text into rows of equal length.",
            )
        _check_ids(given, host)
        return given
    texts: Any = read_tokens(given, length) if _is_path(given) else given
    if isinstance(texts, Tensor):
        return table_of(texts, host, length)
    if isinstance(texts, list | tuple) and texts and all(map(_are_ids, texts)):
        even = len({len(row) for row in texts}) == 1
        return _cut(list(texts) if even else [list(chain.from_iterable(texts))], host, length)
    if isinstance(texts, str | bytes) or not all(isinstance(t, str) for t in texts):
        raise PromptError(
            "tokens",
            given=f"{type(given).__name__} {str(given)[:60]!r}",
            expected="a table of ids, the path of a file, a list of texts, or a Stream",
            remedy="Pass [text] for one text.",
        )
    tokenizer = _tokenizer(host)
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[int] = []
    for text in texts:
        ids += encode(text, tokenizer, "tokens") + ([] if end is None else [end])
    return _cut([ids], host, length)


def _are_ids(row: Any) -> bool:
    return isinstance(row, list | tuple) and all(type(i) is int for i in row)


def _cut(rows: list[Sequence[int]], host: Host, length: int) -> Tensor:
    """A table of equal rows as it is; one long row cut into rows, the rest dropped."""
    table = torch.tensor(rows)
    if len(rows) == 1:
        n = len(rows[0]) // length
        table = table[0, : n * length].view(n, length)
    if table.numel() == 0:
        raise PromptError(
            "tokens",
            given=f"{sum(map(len, rows))} tokens of text",
            expected=f"at least one row of {length}",
            remedy="Give more text, or a smaller length=.",
        )
    _check_ids(table, host)
    return table


def prompt_ids(given: Any, host: Host) -> Tensor:
    """Rows to look at: a tensor, one prompt, or prompts of one length in tokens."""
    if isinstance(given, Tensor):
        rows = given if given.ndim > 1 else given[None]
        _check_ids(rows, host)
        return rows
    prompts = [given] if isinstance(given, str) else list(given)
    ids = [encode(p, _tokenizer(host), "prompt") if isinstance(p, str) else p for p in prompts]
    if len({len(row) if isinstance(row, list) else -1 for row in ids}) != 1:
        raise PromptError(
            "prompts",
            given=f"{len(prompts)} prompts of different lengths",
            expected="prompts of one length in tokens",
            remedy="Look at them one by one: padding would change what their tokens see.",
        )
    rows = torch.tensor(ids if isinstance(ids[0], list) else [ids])
    _check_ids(rows, host)
    return rows


def _is_path(given: Any) -> bool:
    """A Path, or a string that names something on disk (text is no path: it goes in a list)."""
    return isinstance(given, Path) or (
        isinstance(given, str) and len(given) < 1024 and Path(given).exists()
    )


def _tokenizer(host: Host) -> Any:
    return getattr(getattr(host, "lens", None), "tokenizer", None)


def _check_ids(rows: Tensor, host: Host) -> None:
    lens: Any = getattr(host, "lens", None)
    if lens is None or rows.is_floating_point():
        return
    check_vocabulary(rows, lens.shape.vocab_size)
    if rows.shape[1] > lens.shape.max_positions:
        raise PromptError(
            "tokens",
            given=f"rows of {rows.shape[1]} tokens",
            expected=f"at most {lens.shape.max_positions}, which this model reads",
            remedy="Cut them shorter: length=.",
        )


def _too_few(given: int, needed: int) -> PromptError:
    return PromptError(
        "tokens",
        given=f"{given} rows",
        expected=f"at least {needed}: one batch to train on and one kept apart",
        remedy="Give more rows, a smaller batch_size, or held_out= data.",
    )
