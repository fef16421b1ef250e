"""TransformerLens: a user's `TransformerBridge` (3.9 and 4.x) or `HookedTransformer` (3.x).

A bridge wraps the Hugging Face modules in place, so runs go through its own model and every hook
the user has put on it fires. Matrices are replaced through `set_original_component`, and torch
hooks sit on the original components: `run_with_hooks` is never used (its fixed cost is 40 ms a
forward in 3.9), and no name that 4.x lacks is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.core.errors import ArchitectureError, CheckpointError
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.models.backends.adjust import Rows
from mi_weightspace.models.backends.hooked_transformer import (
    HookedTransformerLens,
    refuse_centred,
    refuse_processed,
)
from mi_weightspace.models.backends.hooks import HookedLens, forward_arguments
from mi_weightspace.models.backends.prefix import Prefix
from mi_weightspace.models.backends.taps import StreamFunction, Tap
from mi_weightspace.models.backends.torch_hooks import SiteModule
from mi_weightspace.models.grammar import ModelShape, shape_of
from mi_weightspace.models.lens import SiteFunction


@dataclass(eq=False)
class BridgeLens(HookedLens):
    """A `Lens` over an unprocessed TransformerBridge.

    `enable_compatibility_mode(no_processing=True)` is accepted; with processing it is refused:
    gated MLPs then bypass their matrices, and swaps and hooks would be ignored in silence.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._prefix: Prefix | None = None
        if getattr(self.model, "_weights_processed", False):
            raise refuse_processed("TransformerBridge", "processed by enable_compatibility_mode()")
        refuse_centred(self, "TransformerBridge")

    @property
    def root(self) -> nn.Module:
        return self.model.original_model

    def _read_shape(self) -> ModelShape:
        config = getattr(self.root, "config", None)
        if getattr(config, "model_type", None) is None:
            raise ArchitectureError(
                "TransformerBridge",
                given=f"a bridge over {type(self.root).__name__}, no Hugging Face model",
                expected="a bridge booted on a Hugging Face causal language model",
                remedy="Boot it with TransformerBridge.boot_transformers.",
            )
        return shape_of(config)

    def component(self, site: Site | str) -> Any:
        """The bridge component of a site: its `original_component` is the Linear or Conv1D."""
        site = self.site(site)
        if site.layer is None:
            return getattr(self.model, site.kind)
        branch, leaf = site.kind.split(".")
        return getattr(getattr(self.model.blocks[site.layer], branch), leaf)

    def module(self, site: Site | str) -> nn.Module:
        return self.component(site).original_component

    def _raw(self, site: Site) -> Float[Tensor, "d_out d_in"]:
        module: Any = self.module(site)
        weight: Tensor = module.weight.detach()
        # fused matrices are split by the bridge into plain Linears: the kind of module decides
        if site.kind == "embed" or hasattr(module, "nf"):
            weight = weight.T
        if weight.shape != (site.d_out, site.d_in):
            raise CheckpointError(
                f"matrix {site.name} of the bridge",
                given=f"shape {tuple(weight.shape)}",
                expected=f"({site.d_out}, {site.d_in})",
                remedy="The bridge's model and its configuration disagree; boot it again.",
            )
        return weight

    def _raw_bias(self, site: Site) -> Float[Tensor, " d_out"] | None:
        bias: Any = getattr(self.module(site), "bias", None)
        if bias is None or (site.kind == "unembed" and not bool(bias.any())):
            return None  # the bridge gives an unembedding without a bias one of zeros
        return bias.detach()

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        return self._gain(self.shape.table.pre_norm(site.kind), site.layer)

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        path = self.shape.table.pre_norm(site.kind)
        norm = None if path is None else self.root.get_submodule(path.format(L=site.layer))
        bias: Any = getattr(getattr(norm, "original_component", norm), "bias", None)
        return None if bias is None else bias.detach().float()

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        site = self.site(site)
        return self._gain(self.shape.table.post_norm(site.kind), site.layer)

    def _gain(self, path: str | None, layer: int | None) -> Tensor | None:
        if path is None:
            return None
        norm = self.root.get_submodule(path.format(L=layer))
        weight: Any = getattr(getattr(norm, "original_component", norm), "weight", None)
        return None if weight is None else weight.detach().float() + self.shape.table.gain_offset

    def unembed(self) -> tuple[StreamFunction, Float[Tensor, "vocab d_model"]]:
        return self.model.ln_final.original_component, self.weight("unembed")

    def embed_scale(self) -> float:
        return float(getattr(self.module("embed"), "embed_scale", 1.0))

    def _forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.root(**forward_arguments(tokens, mask)).logits

    def _resumed(self, layer: int, residual: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self._prefix is None:
            self._prefix = Prefix(self.root, self.shape.table.blocks)
        # inside the block, past the user's `hook_resid_pre`, where `resid_pre` is captured
        tap = Tap(self.model.blocks[layer].original_component, "in")
        return self._prefix.logits(layer, tap, residual, mask)

    def _site_tap(self, site: Site, side: Literal["in", "out"]) -> Tap:
        return Tap(self.module(site), side)

    def _output(self, name: str) -> tuple[nn.Module, Rows | None]:
        return self.module(name), None

    def _stream_tap(self, space: Space) -> Tap | None:
        table = self.shape.table
        block = self.model.blocks[space.layer]
        if space.point == "resid_pre":  # inside the block, past the user's `hook_resid_pre`
            return Tap(block.original_component, "in")
        if space.point == "resid_post":
            return Tap(block, "out")
        if self.shape.parallel:
            return None
        branch = (table.mlp_norm or table.mlp).format(L=space.layer)
        return Tap(self.root.get_submodule(branch), "in", carries=block)

    @contextmanager
    def _replacing(self, functions: Mapping[str, SiteFunction]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, function in functions.items():
                stack.enter_context(_swapped(self.component(name), function))
            yield


@contextmanager
def _swapped(component: Any, function: SiteFunction) -> Iterator[None]:
    original = component.original_component
    component.set_original_component(SiteModule(original, [(None, function)]))
    try:
        yield
    finally:
        component.set_original_component(original)


def accept(model: Any, tokenizer: Any) -> HookedLens | None:
    """A lens over a TransformerLens object, None for anything else."""
    make: dict[str, Callable[..., HookedLens]] = {
        "TransformerBridge": BridgeLens,
        "HookedTransformer": HookedTransformerLens,
    }
    for base in type(model).__mro__:
        if base.__name__ in make and base.__module__.startswith("transformer_lens"):
            own = plain_tokenizer(getattr(model, "tokenizer", None))
            return make[base.__name__](model, own if tokenizer is None else tokenizer)
    return None


def plain_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer as its folder has it.

    TransformerLens makes a copy that prepends BOS; every backend must give a prompt the same ids.
    The copy is kept where the folder is not on this machine.
    """
    name = getattr(tokenizer, "init_kwargs", {}).get("name_or_path")
    if not name:
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except OSError:
        return tokenizer


def from_hugging_face(module: Any, tokenizer: Any) -> BridgeLens:
    """Boot a bridge on `module`, which it then owns (it is wrapped in place).

    Raises:
        CheckpointError: no tokenizer, or one that was never saved (a bridge loads it again by
            name).
    """
    from transformer_lens.model_bridge import TransformerBridge

    name = getattr(tokenizer, "init_kwargs", {}).get("name_or_path")
    if not name:
        raise CheckpointError(
            "tokenizer",
            given="none" if tokenizer is None else "a tokenizer that was never saved",
            expected="a saved tokenizer: a TransformerBridge loads it again from its folder",
            remedy="Save it beside the model with tokenizer.save_pretrained, or use "
            "backend='torch'.",
        )
    device = str(next(module.parameters()).device)
    label = getattr(module.config, "_name_or_path", "") or str(name)
    bridge = TransformerBridge.boot_transformers(
        label, hf_model=module, tokenizer=tokenizer, device=device
    )
    return BridgeLens(bridge, tokenizer)
