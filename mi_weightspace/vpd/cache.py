"""Clean passes of the training batches; for a finite table of tokens each row is run once.

The host is frozen, so what a row of tokens gives never changes. Rows are run in fixed blocks of
neighbours, not as they come: what is kept of a row then does not depend on which step asked for it
first, and a resumed run, which starts with an empty cache, sees the same bits.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.distributed import own_rows
from mi_weightspace.vpd.host import Clean, Host
from mi_weightspace.vpd.stream import Stream, TokenStream


class CleanBatches:
    """``batches(step) -> Clean``: this process' rows of a step's batch, run anew every time."""

    def __init__(self, host: Host, stream: Stream) -> None:
        self.host, self.stream = host, stream

    def __call__(self, step: int) -> Clean:
        return self.host.clean(own_rows(self.stream.batch(step)).to(self.host.device))


class CachedBatches(CleanBatches):
    """The same from memory, filled on first use.

    Args:
        outputs: sites whose outputs are wanted too (what the hidden-activation rider compares).

    Raises:
        ConfigError: a stream that is not a finite table of tokens.
    """

    def __init__(self, host: Host, stream: Stream, outputs: tuple[str, ...] = ()) -> None:
        if not isinstance(stream, TokenStream):
            raise ConfigError(
                "speed.cache_clean",
                given=f"a {type(stream).__name__}, whose batches never come again",
                expected="a TokenStream: a finite table of tokens",
                remedy="Set cache_clean=False, or give the tokens as a table.",
            )
        super().__init__(host, stream)
        self.table, self.size = stream.tokens, stream.batch_size
        self.outputs = outputs
        self.filled: set[int] = set()
        self.kept: dict[str, Tensor] = {}
        self.same: dict[str, str] = {}

    def __call__(self, step: int) -> Clean:
        stream: Any = self.stream
        rows: Int[Tensor, " batch"] = own_rows(stream.rows(step))
        for block in sorted({int(row) // self.size for row in rows} - self.filled):
            self._fill(block)
        rows = rows.to(self.host.device)
        found = {key: value[rows] for key, value in self.kept.items()}
        names = self.host.names
        seen = {n: found[self.same[f"seen/{n}"]] for n in names if f"seen/{n}" in self.same}
        return Clean(
            found["batch"],
            {name: found[self.same[f"input/{name}"]] for name in names},
            {name: found[self.same[f"output/{name}"]] for name in self.outputs},
            found["output"],
            found.get("start"),
            seen or None,
        )

    def _fill(self, block: int) -> None:
        place = slice(block * self.size, (block + 1) * self.size)
        clean = self.host.clean(self.table[place].to(self.host.device))
        own = distinct(clean, self.outputs)
        if not self.kept:
            self.same = own[1]
            self.kept = {
                key: value.new_empty(len(self.table), *value.shape[1:])
                for key, value in own[0].items()
            }
        for key, value in own[0].items():
            self.kept[key][place] = value
        self.filled.add(block)


def distinct(clean: Clean, outputs: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a clean pass, each once; and which of them stands for which.

    Query, key and value read one and the same tensor.
    """
    tensors: dict[str, Tensor] = {"batch": clean.batch, "output": clean.output}
    if clean.start is not None:
        tensors["start"] = clean.start
    tensors |= {f"input/{name}": x for name, x in clean.inputs.items()}
    tensors |= {f"output/{name}": clean.outputs[name] for name in outputs}
    tensors |= {f"seen/{name}": x for name, x in (clean.seen or {}).items()}
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for key, value in tensors.items():
        first = seen.setdefault((value.data_ptr(), tuple(value.shape), value.stride()), key)
        same[key] = first
        if first == key:
            kept[key] = value
    return kept, same


def cache_bytes(clean: Clean, rows: int, outputs: tuple[str, ...] = ()) -> int:
    """Memory of a full cache of `rows` rows, told from the clean pass of any batch."""
    kept, _ = distinct(clean, outputs)
    return sum(v.numel() * v.element_size() for v in kept.values()) // len(clean.batch) * rows


def wanted_outputs(config: VPDConfig, host: Host) -> tuple[str, ...]:
    """Sites whose outputs a training step reads: all for the rider, else the embeddings."""
    if any(term.hidden_weight > 0 for term in config.reconstruction):
        return host.names
    return tuple(name for name in host.names if name in host.scales)


def clean_batches(host: Host, stream: Stream, config: VPDConfig) -> CleanBatches:
    """What `config.speed.cache_clean` asks for."""
    if config.speed.cache_clean:
        return CachedBatches(host, stream, wanted_outputs(config, host))
    return CleanBatches(host, stream)
