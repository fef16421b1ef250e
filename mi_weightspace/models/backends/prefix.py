"""Starting a Hugging Face forward pass at a block, on a residual stream that is given.

The model's own loop still runs, so that masks, position ids and rotary tables are made as they
always are and the layer's number stays what per-layer settings are looked up by; the blocks in
front of the start are stood in for by modules that compute nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_weightspace.models.backends.hooks import forward_arguments
from mi_weightspace.models.backends.taps import Tap

Residual = Float[Tensor, "batch tokens d_model"]


class Skipped(nn.Module):
    """Stands in for a block whose work is not wanted.

    Args:
        original: the block; what the model's loop reads of it (its attention type) is answered.
        given: holds the tensor to return. What the loop makes of it is thrown away at the first
            block that runs, so it does not matter whether blocks of this model return tuples.
    """

    def __init__(self, original: nn.Module, given: list[Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "original", original)
        self.given = given

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.given[0]


class Prefix:
    """What comes before a block of one model, and does not have to run.

    Args:
        root: the causal language model.
        blocks: path of its block list.
    """

    def __init__(self, root: nn.Module, blocks: str) -> None:
        self.root, self.blocks = root, blocks
        self.stand_ins: dict[str, Skipped] = {}
        self.given: list[Tensor] = []

    def logits(
        self,
        layer: int,
        tap: Tap,
        residual: Residual,
        mask: Int[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits when `residual` enters the block `layer`, whose input is at `tap`."""
        arguments = forward_arguments(residual, mask)
        # sizes, positions and masks are read off it; no embedding is looked up
        arguments["inputs_embeds"] = arguments.pop("input_ids")
        with self._skipped(layer, residual), _entering(tap, residual):
            return self.root(**arguments).logits

    @contextmanager
    def _skipped(self, layer: int, residual: Residual) -> Iterator[None]:
        table: Any = self.root.get_submodule(self.blocks)._modules
        originals = {str(i): table[str(i)] for i in range(layer)}
        self.given[:] = [residual]
        try:
            for key, block in originals.items():
                table[key] = self._stand_in(key, block)
            yield
        finally:
            table.update(originals)
            self.given.clear()  # the autograd graph must not outlive the call

    def _stand_in(self, key: str, block: nn.Module) -> Skipped:
        found = self.stand_ins.get(key)
        if found is None or found.__dict__["original"] is not block:
            found = self.stand_ins[key] = Skipped(block, self.given)
        return found


@contextmanager
def _entering(tap: Tap, residual: Residual) -> Iterator[None]:
    """Within the context `residual` enters the block, whatever was on its way to it."""

    def put(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (residual, *args[1:]), kwargs
        return args, {**kwargs, tap.argument: residual}

    # first in line: captures, stream edits and the user's own hooks see it as the block's input
    handle = tap.module.register_forward_pre_hook(put, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
