"""Adjusted matrices: a site's output as a function of its input and of the host's own output.

The host's module runs as it is, and a forward hook, first in line, changes what leaves it. Where
several sites are fused in one module it runs once, and each function gets its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, cat, nn

from mi_weightspace.core.errors import SiteError
from mi_weightspace.models.lens import SiteAdjustment


@dataclass(frozen=True)
class Rows:
    """Coordinates of a fused output: `length` from `start` on, again in every `period`.

    A period as wide as the output is one run of consecutive coordinates; GPT-NeoX interleaves
    query, key and value head by head, and its period is one head of each.
    """

    start: int
    length: int
    period: int

    @classmethod
    def of(cls, index: Int[Tensor, " d"], width: int) -> Rows:
        start, length = int(index[0]), len(index)
        jumps = (index.diff() != 1).nonzero().flatten()
        if len(jumps) == 0:
            return cls(start, length, width)
        length = int(jumps[0]) + 1
        return cls(start, length, int(index[length]) - start)


class SiteHook:
    """A forward hook that stands for the matrix itself: it comes before the user's own hooks."""


class Whole(SiteHook):
    """The adjustment of a module that is one site."""

    def __init__(self, name: str, function: SiteAdjustment) -> None:
        self.name, self.function = name, function

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        return _fitting(self.name, self.function(_first(args, kwargs), output), output)


class Pieces(SiteHook):
    """The adjustments of some of the sites fused in one module; the other rows stay."""

    def __init__(self, pieces: Sequence[tuple[str, Rows, SiteAdjustment]]) -> None:
        self.period = pieces[0][1].period
        self.blocks: list[tuple[str, SiteAdjustment | None]] = []
        self.sizes: list[int] = []
        end = 0
        for name, rows, function in sorted(pieces, key=lambda piece: piece[1].start):
            self._gap(rows.start - end)
            self.blocks.append((name, function))
            self.sizes.append(rows.length)
            end = rows.start + rows.length
        self._gap(self.period - end)

    def _gap(self, size: int) -> None:
        if size > 0:
            self.blocks.append(("", None))
            self.sizes.append(size)

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        x = _first(args, kwargs)
        periodic = output.shape[-1] != self.period
        grid = output.unflatten(-1, (-1, self.period)) if periodic else output
        # `split` and `cat`, whose gradients are a `cat` and a `split`: indexing would fill a
        # tensor of the whole width with zeros for each piece
        parts: list[Tensor] = []
        for (name, function), part in zip(self.blocks, grid.split(self.sizes, -1), strict=True):
            if function is None:
                parts.append(part)
            elif periodic:
                host = part.flatten(-2)
                parts.append(_fitting(name, function(x, host), host).view(part.shape))
            else:
                parts.append(_fitting(name, function(x, part), part))
        joined = cat(parts, -1)
        return joined.flatten(-2) if periodic else joined


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _fitting(
    name: str, value: Float[Tensor, "*pos d_out"], host: Float[Tensor, "*pos d_out"]
) -> Float[Tensor, "*pos d_out"]:
    """The value in the host's precision.

    Raises:
        SiteError: a value of another shape than the host's output.
    """
    if value.shape != host.shape:
        raise SiteError(
            f"adjusted output of {name}",
            given=f"shape {tuple(value.shape)}",
            expected=f"{tuple(host.shape)}, the shape of the host's own output",
            remedy="Return one vector of the site's output width per position.",
        )
    return value if value.dtype == host.dtype else value.to(host.dtype)


def site_hooks(
    sites: Iterable[tuple[str, nn.Module, Rows | None, SiteAdjustment]],
) -> list[tuple[nn.Module, Whole | Pieces]]:
    """One hook for each module that holds some of the sites."""
    hooks: list[tuple[nn.Module, Whole | Pieces]] = []
    fused: dict[nn.Module, list[tuple[str, Rows, SiteAdjustment]]] = {}
    for name, module, rows, function in sites:
        if rows is None:
            hooks.append((module, Whole(name, function)))
        else:
            fused.setdefault(module, []).append((name, rows, function))
    return hooks + [(module, Pieces(pieces)) for module, pieces in fused.items()]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Whole | Pieces]]) -> Iterator[None]:
    """Within the context each module has its hook, ahead of all that are not ours."""
    handles: list[Any] = []
    try:
        for module, hook in hooks:
            handles.append(put_first(module, hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def put_first(module: nn.Module, hook: Whole | Pieces) -> Any:
    """Register `hook` (given keywords too) behind other `SiteHook`s, ahead of the user's."""
    handle = module.register_forward_hook(hook, with_kwargs=True)
    table: Any = module._forward_hooks
    if len(table) > 1:
        for key, other in list(table.items()):
            if not isinstance(other, SiteHook):
                table.move_to_end(key)
    return handle
