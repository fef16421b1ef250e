"""A user's `HookedTransformer` (TransformerLens 3.x), by hooks on its own modules.

It has no module per matrix: the input of q, k, v is an argument of the attention module, and
`ln1.hook_normalized` is *not* that input (it fires before the gain). `hook_attn_out` and
`hook_mlp_out` are behind the post-norm where there is one, so they are not the matrix's output.
Nothing here imports TransformerLens, which no longer has this class in 4.x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.core.errors import ArchitectureError, ProcessedWeightsError
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.models.backends.adjust import Rows, SiteHook, Whole, hooked
from mi_weightspace.models.backends.hooks import HookedLens
from mi_weightspace.models.backends.taps import StreamFunction, Tap
from mi_weightspace.models.families import FAMILIES
from mi_weightspace.models.grammar import ModelShape
from mi_weightspace.models.lens import SiteAdjustment, SiteFunction

_ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "GPTJForCausalLM": "gptj",
    "GPTNeoXForCausalLM": "gpt_neox",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "OlmoForCausalLM": "olmo",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
}
_NO_GAIN = {"olmo"}
"""Families whose norms have no weight: the library fills in ones."""
_SWITCHES = (
    "use_split_qkv_input",
    "use_attn_in",
    "use_attn_result",
    "ungroup_grouped_query_attention",
    "load_in_4bit",
)
CENTRED = 1e-5
"""Largest |column mean| relative to the spread that is taken for centring: float32 rounding of a
centred matrix is below it, a trained or random matrix of any width is far above."""


@dataclass(eq=False)
class HookedTransformerLens(HookedLens):
    """A `Lens` over an unprocessed HookedTransformer.

    Raises:
        ProcessedWeightsError: folded norms (`normalization_type` ending in ``Pre``), centred
            writing weights or unembedding, or refactored attention.
    """

    def __post_init__(self) -> None:
        cfg = self.model.cfg
        if (cfg.normalization_type or "").endswith("Pre"):
            raise refuse_processed("HookedTransformer", "norms folded into the weights (fold_ln)")
        super().__post_init__()
        refuse_centred(self, "HookedTransformer")
        if _refactored(self.model.blocks[0].attn.W_O):
            raise refuse_processed("HookedTransformer", "refactored attention matrices")

    @property
    def root(self) -> nn.Module:
        return self.model

    def _read_shape(self) -> ModelShape:
        cfg = self.model.cfg
        family = _ARCHITECTURES.get(cfg.original_architecture)
        unsupported = [name for name in _SWITCHES if getattr(cfg, name, False)]
        if family is None or unsupported:
            raise ArchitectureError(
                "HookedTransformer",
                given=f"original_architecture={cfg.original_architecture!r}, {unsupported} on",
                expected=f"one of {sorted(_ARCHITECTURES)} with those switches off",
                remedy="Use TransformerBridge.boot_transformers on the same checkpoint.",
            )
        shape = ModelShape(
            family=family,
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp,
            vocab_size=cfg.d_vocab,
            parallel=cfg.parallel_attn_mlp,
            tied=False,
            max_positions=cfg.n_ctx,
        )
        scaled = self.model.W_U.T * _embed_scale(shape, self.dtype)
        return replace(shape, tied=torch.equal(self.model.W_E, scaled))

    # ---- weights ---------------------------------------------------------------------------
    def _raw(self, site: Site) -> Float[Tensor, "d_out d_in"]:
        if site.kind == "unembed" or (site.kind == "embed" and self.shape.tied):
            unembed = self.model.W_U.detach()  # exact, where dividing by the scale would round
            return unembed.T if site.kind == "unembed" else unembed
        if site.kind == "embed":
            return (self.model.W_E.detach() / self.embed_scale()).T
        block = self.model.blocks[site.layer]
        if site.kind.startswith("mlp"):
            return getattr(block.mlp, f"W_{site.kind.removeprefix('mlp.')}").detach().T
        head = site.kind[-1].upper()
        # under grouped queries `W_K` is a property expanded to every head; `_W_K` is the parameter
        name = f"_W_{head}" if hasattr(block.attn, f"_W_{head}") else f"W_{head}"
        weight: Tensor = getattr(block.attn, name).detach()
        if head == "O":
            return weight.flatten(0, 1).T
        return weight.transpose(1, 2).flatten(0, 1)

    def _raw_bias(self, site: Site) -> Float[Tensor, " d_out"] | None:
        """None where every entry is zero: the library fills in zeros where there is no bias."""
        if site.kind == "embed":
            return None
        if site.kind == "unembed":
            bias: Tensor = self.model.b_U
        else:
            module = getattr(self.model.blocks[site.layer], site.kind.split(".")[0])
            if site.kind.startswith("mlp"):
                name = f"b_{site.kind.removeprefix('mlp.')}"
                if site.kind == "mlp.gate" or (site.kind == "mlp.in" and hasattr(module, "W_gate")):
                    return None  # a gated MLP adds its `b_in` after the product
            else:
                head = site.kind[-1].upper()
                name = f"_b_{head}" if hasattr(module, f"_b_{head}") else f"b_{head}"
            bias = getattr(module, name)
        return bias.detach().flatten() if bool(bias.any()) else None

    def embed_scale(self) -> float:
        return _embed_scale(self.shape, self.dtype)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        if self.shape.table.pre_norm(site.kind) is None:
            return None
        return self._gain(self._pre_norm(site))

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        if self.shape.table.pre_norm(site.kind) is None or self.shape.family in _NO_GAIN:
            return None
        bias: Any = getattr(self._pre_norm(site), "b", None)
        return None if bias is None else bias.detach().float().clone()

    def _pre_norm(self, site: Site) -> nn.Module:
        if site.kind == "unembed":
            return self.model.ln_final
        block = self.model.blocks[site.layer]
        return block.ln1 if site.kind.startswith("attn") else block.ln2

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        site = self.site(site)
        if self.shape.table.post_norm(site.kind) is None:
            return None
        block, first = self.model.blocks[site.layer], site.kind == "attn.o"
        if self.shape.table.pre_norm("attn.q") is None:  # post-norm only: named ln1 and ln2
            return self._gain(block.ln1 if first else block.ln2)
        return self._gain(block.ln1_post if first else block.ln2_post)

    def _gain(self, norm: nn.Module) -> Tensor | None:
        """The gain as applied: for Gemma the library has added the one already."""
        weight: Any = getattr(norm, "w", None)
        if weight is None or self.shape.family in _NO_GAIN:
            return None
        return weight.detach().float().clone()

    def unembed(self) -> tuple[StreamFunction, Float[Tensor, "vocab d_model"]]:
        return self.model.ln_final, self.weight("unembed")

    # ---- running ---------------------------------------------------------------------------
    def _forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:  # without one the library reads padding tokens as masked out
            mask = torch.ones_like(tokens)
        return self.model(tokens, attention_mask=mask, return_type="logits")

    @contextmanager
    def written_attention(self) -> Iterator[None]:
        """The library writes attention out in any case."""
        yield

    def _resumed(self, layer: int, residual: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(tokens) if mask is None else mask
        return self.model(residual, start_at_layer=layer, attention_mask=mask, return_type="logits")

    def _site_tap(self, site: Site, side: Literal["in", "out"]) -> Tap:
        if site.layer is None:
            argument = "input" if site.kind == "embed" else "residual"
            return Tap(getattr(self.model, site.kind), side, argument=argument)
        block = self.model.blocks[site.layer]
        if site.kind in {"attn.q", "attn.k", "attn.v"}:
            head = site.kind[-1]
            if side == "in":
                name = {"q": "query_input", "k": "key_input", "v": "value_input"}[head]
                return Tap(block.attn, "in", argument=name)
            return Tap(getattr(block.attn, f"hook_{head}"), "out")
        if site.kind == "attn.o":
            return Tap(block.attn.hook_z if side == "in" else block.attn, "out")
        if site.kind == "mlp.out":
            return Tap(block.mlp.hook_post if side == "in" else block.mlp, "out")
        if side == "in":
            return Tap(block.mlp, "in", argument="x")
        gated = hasattr(block.mlp, "W_gate")
        plain = not gated or site.kind == "mlp.gate"  # with a gate, `hook_pre` is the gate
        return Tap(block.mlp.hook_pre if plain else block.mlp.hook_pre_linear, "out")

    def _stream_tap(self, space: Space) -> Tap | None:
        block = self.model.blocks[space.layer]
        if space.point == "resid_mid" and self.shape.parallel:
            return None
        return Tap(getattr(block, f"hook_{space.point}"), "out")

    @contextmanager
    def _replacing(self, functions: Mapping[str, SiteFunction]) -> Iterator[None]:
        """The matrix's own product is formed and dropped: there is no module to take out."""
        with ExitStack() as stack:
            for name, function in functions.items():
                site = self.site(name)
                read, write = self._site_tap(site, "in"), self._site_tap(site, "out")
                stack.enter_context(_computed(read, write, function))
            yield

    def _output(self, name: str) -> tuple[nn.Module, Rows | None]:
        return self._site_tap(self.site(name), "out").module, None

    @contextmanager
    def _adjusting(self, functions: Mapping[str, SiteAdjustment]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, function in functions.items():
                inputs = stack.enter_context(_watched(self._site_tap(self.site(name), "in")))
                hook = _Adjust(name, function, inputs)
                stack.enter_context(hooked([(self._output(name)[0], hook)]))
            yield


class _Adjust(Whole):
    """An adjustment whose input was seen elsewhere than at the module the output leaves."""

    def __init__(self, name: str, function: SiteAdjustment, inputs: list[Tensor]) -> None:
        super().__init__(name, function)
        self.inputs = inputs

    def __call__(self, _m: Any, _a: Any, _k: Any, output: Tensor) -> Tensor:
        new = super().__call__(_m, (self.inputs.pop(),), {}, _flat(output))
        return new.reshape(output.shape)


class _Put(SiteHook):
    """Forward hook that writes the function's value; silent while an inner one is active."""

    def __init__(self, function: SiteFunction, inputs: list[Tensor]) -> None:
        self.function, self.inputs, self.silent = function, inputs, False

    def __call__(self, _m: Any, _a: Any, output: Tensor) -> Tensor | None:
        x = self.inputs.pop()
        return None if self.silent else self.function(x).reshape(output.shape).to(output.dtype)


@contextmanager
def _computed(read: Tap, write: Tap, function: SiteFunction) -> Iterator[None]:
    outer = [h for h in write.module._forward_hooks.values() if isinstance(h, _Put)]
    silenced = [put for put in outer if not put.silent]
    with ExitStack() as stack:
        inputs = stack.enter_context(_watched(read))
        # first in line, so that the user's own hooks see the replaced output
        put = write.module.register_forward_hook(_Put(function, inputs), prepend=True)
        stack.callback(put.remove)
        for hook in silenced:
            hook.silent = True
        try:
            yield
        finally:
            for hook in silenced:
                hook.silent = False


@contextmanager
def _watched(read: Tap) -> Iterator[list[Tensor]]:
    """A list that holds the value last seen at the tap, (batch, tokens, d)."""
    inputs: list[Tensor] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [_flat(args[0] if args else kwargs[read.argument])]

    def seen(_m: Any, _a: Any, output: Tensor) -> None:
        inputs[:] = [_flat(output)]

    if read.side == "in":
        handle = read.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = read.module.register_forward_hook(seen)
    try:
        yield inputs
    finally:
        handle.remove()


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim < 4 else x.flatten(2)


def _embed_scale(shape: ModelShape, dtype: torch.dtype) -> float:
    """The library multiplies Gemma's embedding matrix by √d once and for all."""
    gemma = shape.family.startswith("gemma")
    return float(torch.tensor(shape.d_model**0.5, dtype=dtype)) if gemma else 1.0


def _refactored(w_o: Float[Tensor, "heads d_head d_model"]) -> bool:
    """Whether every head's W_O is a rotation, which `refactor_factored_attn_matrices` makes it."""
    gram = w_o.detach().float() @ w_o.detach().float().mT
    return bool((gram - torch.eye(gram.shape[-1], device=gram.device)).abs().max() < 1e-3)


def refuse_processed(subject: str, given: str) -> ProcessedWeightsError:
    return ProcessedWeightsError(
        subject,
        given=given,
        expected="raw weights: the difference of processed weights is not what training changed",
        remedy="Load it with from_pretrained_no_processing, or TransformerBridge.boot_transformers "
        "without enable_compatibility_mode (or with no_processing=True).",
    )


def refuse_centred(lens: HookedLens, subject: str) -> None:
    """Centring leaves no mark in the configuration; it shows in the matrices.

    Raises:
        ProcessedWeightsError: every `mlp.out` has zero mean over the stream, or the unembedding
            zero mean over the vocabulary.
    """
    outs = [site.name for site in lens.sites() if site.kind == "mlp.out"]
    if all(_centred(lens.stored(name)) for name in outs):
        raise refuse_processed(subject, "centred writing weights (center_writing_weights)")
    if _centred(lens.stored("unembed")):
        raise refuse_processed(subject, "a centred unembedding (center_unembed)")


def _centred(matrix: Float[Tensor, "d_out d_in"]) -> bool:
    """Whether every column (a vector in the output space) has mean zero, up to rounding."""
    means = matrix.float().mean(0).abs().max()
    # rounding a centred bfloat16 matrix leaves means of up to eps/2 over the root of the width;
    # those of a matrix that is not centred are about one over that root
    tolerance = max(CENTRED, torch.finfo(matrix.dtype).eps / 4)
    return bool(means <= tolerance * matrix.float().abs().max())


assert set(_ARCHITECTURES.values()) <= set(FAMILIES), "a HookedTransformer family without a table"
