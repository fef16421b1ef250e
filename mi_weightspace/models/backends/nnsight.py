"""nnsight: a user's `NNsight`, `TransformersModel` or `LanguageModel` (nnterp's among them).

nnsight wraps nothing: its parameters and paths are Hugging Face's, and it installs an object in
every module's instance `forward`. So torch hooks capture, a matrix is replaced through its
*envoy* (a module put in the tree alone would leave a stale envoy), and `module.forward` is never
overridden. Edits the user has stored on the model (`model.edit`) are replayed on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mi_weightspace.core.errors import ArchitectureError
from mi_weightspace.models.backends.hooks import forward_arguments
from mi_weightspace.models.backends.torch_hooks import Piece, SiteModule, TorchLens


@dataclass(eq=False)
class NNsightLens(TorchLens):
    """A `Lens` over an nnsight model; `model` is the user's envoy tree."""

    @property
    def root(self) -> nn.Module:
        return self.model._module

    def _forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if not getattr(self.model, "_edits", None):
            return super()._forward(tokens, mask)
        from nnsight import save

        with self.model.trace(**forward_arguments(tokens, mask)):
            logits = save(self.model.output.logits)
        return logits  # noqa: RET504  (nnsight reads the block's source)

    def _resumed(self, layer: int, residual: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if getattr(self.model, "_edits", None):
            raise ArchitectureError(
                f"start of a forward pass at block {layer}",
                given="an nnsight model with stored edits, which may wait for a block in front",
                expected="a model without stored edits",
                remedy="Clear them with `model.clear_edits()`, or run the whole pass.",
            )
        return super()._resumed(layer, residual, tokens, mask)

    @contextmanager
    def _swapped(self, path: str, pieces: Sequence[Piece]) -> Iterator[None]:
        parent_path, _, leaf = path.rpartition(".")
        parent, original, envoy = self.at(parent_path), self.at(path), self._envoy(path)
        kind = type(original)
        # the instance `forward` is nnsight's: calling it would offer this location twice
        stand_in = SiteModule(original, pieces, lambda x: kind.forward(original, x))
        # the same envoy is pointed elsewhere and back, so that one the user holds is never stale
        setattr(parent, leaf, stand_in)
        envoy._update(stand_in)
        try:
            yield
        finally:
            setattr(parent, leaf, original)
            envoy._update(original)

    def _envoy(self, path: str) -> Any:
        found = self.model
        for name in path.split(".") if path else ():
            found = found[int(name)] if name.isdigit() else getattr(found, name)
        return found


def accept(model: Any, tokenizer: Any) -> NNsightLens | None:
    """A lens over an nnsight object, None for anything else."""
    from nnsight import NNsight
    from nnsight.intervention.envoy import Envoy

    if not isinstance(model, NNsight | Envoy):
        return None
    own = model.__dict__.get("tokenizer")
    return NNsightLens(model, own if tokenizer is None else tokenizer)


def from_hugging_face(module: Any, tokenizer: Any) -> NNsightLens:
    from nnsight import NNsight, TransformersModel

    if tokenizer is None:
        return NNsightLens(NNsight(module), None)
    wrapped = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    return NNsightLens(wrapped, tokenizer)
