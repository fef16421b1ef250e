"""One entrance to live models: a folder, a hub id, or the object the user already has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mi_weightspace.core.errors import ArchitectureError, CheckpointError
from mi_weightspace.models.checks import verify_sites
from mi_weightspace.models.grammar import module_path, part_of, row_index
from mi_weightspace.models.lens import Backend, Lens
from mi_weightspace.models.lora import AdapterSource
from mi_weightspace.models.sources import open_path
from mi_weightspace.models.weights import CheckpointSource

_BACKENDS = {
    "transformer_lens": "mi_weightspace.models.backends.transformer_lens",
    "nnsight": "mi_weightspace.models.backends.nnsight",
}


def load(
    model: Any,
    *,
    backend: Backend = "torch",
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> Lens:
    """A `Lens` over `model`, its grammar table checked by behaviour on a few tokens.

    Args:
        model: folder, hub id, PEFT adapter folder, Hugging Face module, `HookedTransformer`,
            `TransformerBridge`, nnsight or nnterp model, or a Lens (returned as it is). An object
            of yours is used as it is and never left changed.
        backend: which library runs a model loaded from a path.
        dtype: precision of a model loaded from a path.

    Raises:
        ArchitectureError: unknown family, or a table that does not describe this model.
        ProcessedWeightsError: folded, centred or otherwise processed weights.
        CheckpointError: what is wrong with the folder.
    """
    if is_lens(model):
        return model
    lens = (
        _from_path(model, backend, tokenizer, device, dtype)
        if isinstance(model, str | Path | CheckpointSource | AdapterSource)
        else _from_object(model, tokenizer)
    )
    if verify:
        verify_sites(lens)
    return lens


def is_lens(model: Any) -> bool:
    """Whether `model` is a Lens already (asked of its class: properties may be costly)."""
    return all(hasattr(type(model), name) for name in ("replaced", "with_edit", "read_gain", "run"))


def _from_path(
    model: str | Path | CheckpointSource | AdapterSource,
    backend: Backend,
    tokenizer: Any,
    device: Any,
    dtype: torch.dtype,
) -> Lens:
    module, found = hugging_face(model, device=device, dtype=dtype)
    tokenizer = found if tokenizer is None else tokenizer
    if backend == "torch":
        from mi_weightspace.models.backends.torch_hooks import TorchLens

        return TorchLens(module, tokenizer)
    return import_module(_BACKENDS[backend]).from_hugging_face(module, tokenizer)


def hugging_face(
    model: str | Path | CheckpointSource | AdapterSource,
    *,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer or None) from a checkpoint or adapter folder."""
    from transformers import AutoModelForCausalLM

    # opening refuses what cannot be trusted before anything is built
    source = open_path(model) if isinstance(model, str | Path) else model
    base = source.base if isinstance(source, AdapterSource) else source
    with without_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype, output_loading_info=True
        )
    module, said = loaded
    absent = sorted(said["missing_keys"])
    if absent:
        raise CheckpointError(
            f"checkpoint {base.name}",
            given=f"no tensor {absent[0]!r} ({len(absent)} in all), which would be drawn at random",
            expected="every tensor of the model",
            remedy="The weights are incomplete; copy or save the checkpoint again.",
        )
    if isinstance(source, AdapterSource):
        _merge(module, source)
    module.eval()
    tokenizer = find_tokenizer(source.path)
    if tokenizer is None:  # an adapter folder need not carry its own
        tokenizer = find_tokenizer(base.path)
    return module if device is None else module.to(device), tokenizer


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the loading library's own progress bars; its setting is restored."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _merge(module: Any, adapter: AdapterSource) -> None:
    """Put an adapter's float32 matrices into a model that was built for it here."""
    with torch.no_grad():
        for site in adapter.sites():
            b, a = adapter.factors(site)
            if not b.shape[1]:
                continue
            owner = module.get_submodule(module_path(site, adapter.shape))
            if site.kind == "unembed" and adapter.shape.tied:
                # the adapter sits on the unembedding alone: the embedding must not follow
                owner.weight = torch.nn.Parameter(owner.weight.clone())
            weight = owner.weight
            view = weight if part_of(site, adapter.shape).layout == "linear" else weight.T
            rows = row_index(site, adapter.shape)
            view[slice(None) if rows is None else rows] += (b @ a).to(weight.dtype)


def find_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when it ships none."""
    from transformers import AutoTokenizer

    if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def _from_object(model: Any, tokenizer: Any) -> Lens:
    for library, home in _BACKENDS.items():
        if library in sys.modules:
            found = import_module(home).accept(model, tokenizer)
            if found is not None:
                return found
    if isinstance(model, torch.nn.Module) and hasattr(model, "config"):
        from mi_weightspace.models.backends.torch_hooks import TorchLens

        return TorchLens(model, tokenizer)
    raise ArchitectureError(
        f"object of type {type(model).__name__}",
        given="something that is no model this library knows",
        expected="a folder, a hub id, or a Hugging Face, TransformerLens or nnsight model",
        remedy="Pass the model itself, not its output or its configuration.",
    )
