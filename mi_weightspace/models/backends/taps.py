"""Places of a forward pass, and torch hooks that read or change what passes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Int
from torch import Tensor, nn

StreamFunction = Callable[[Tensor], Tensor]


class StopForward(Exception):
    """Raised by the last wanted hook so that the rest of the model is not run."""


@dataclass(frozen=True, eq=False)
class Tap:
    """A place of the forward pass: one side of a module.

    Attributes:
        rows: the coordinates wanted of a fused output; None is all.
        argument: name of the input, where the module is called by keyword.
        carries: for a stream point read at the *input* of a branch, the block whose output the
            same change must reach (the skip connection does not pass through the branch).
    """

    module: nn.Module
    side: Literal["in", "out"]
    rows: Int[Tensor, " d"] | None = None
    argument: str = "hidden_states"
    carries: nn.Module | None = None


def _flat(value: Any) -> Tensor:
    """The main tensor of a module's output, heads flattened: (batch, tokens, d)."""
    tensor = value[0] if isinstance(value, tuple) else value
    return tensor if tensor.ndim < 4 else tensor.flatten(2)


@contextmanager
def capturing(tap: Tap, name: str, keep: Callable[[str, Tensor], None]) -> Iterator[None]:
    if tap.side == "in":

        def pre(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(name, _flat(args[0] if args else kwargs[tap.argument]))

        handle = tap.module.register_forward_pre_hook(pre, with_kwargs=True)
    else:

        def post(_m: Any, _a: Any, output: Any) -> None:
            value = _flat(output)
            keep(name, value if tap.rows is None else value[..., tap.rows.to(value.device)])

        handle = tap.module.register_forward_hook(post)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def streaming(tap: Tap, change: StreamFunction) -> Iterator[None]:
    """Within the context the value at `tap` is `change` of it, for all that reads it."""
    with ExitStack() as stack:
        if tap.side == "in":
            moved: list[Tensor] = []

            def new(x: Tensor) -> Tensor:
                out = change(x)
                if tap.carries is not None:
                    moved[:] = [out - x]
                return out

            def pre(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if args:
                    return (new(args[0]), *args[1:]), kwargs
                return args, {**kwargs, tap.argument: new(kwargs[tap.argument])}

            stack.callback(tap.module.register_forward_pre_hook(pre, with_kwargs=True).remove)
            if tap.carries is not None:
                carry = tap.carries.register_forward_hook(
                    lambda _m, _a, output: _change_first(output, lambda y: y + moved.pop())
                )
                stack.callback(carry.remove)
        else:

            def part(y: Tensor) -> Tensor:
                if tap.rows is None:
                    return change(y.flatten(2)).reshape(y.shape) if y.ndim == 4 else change(y)
                rows = tap.rows.to(y.device)
                return y.index_copy(-1, rows, change(y[..., rows]))

            handle = tap.module.register_forward_hook(
                lambda _m, _a, output: _change_first(output, part)
            )
            stack.callback(handle.remove)
        yield


def _change_first(output: Any, change: StreamFunction) -> Any:
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
