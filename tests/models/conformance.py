"""An oracle that knows Hugging Face modules and nothing of this library, and the user's objects.

The oracle has its own table of names and its own slicing, so that a mistake in the library's
grammar cannot hide in both.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mi_weightspace.models import toy

LEAVES = {
    "q_proj": "attn.q",
    "k_proj": "attn.k",
    "v_proj": "attn.v",
    "o_proj": "attn.o",
    "out_proj": "attn.o",
    "attn.c_proj": "attn.o",
    "dense": "attn.o",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.in",
    "fc_in": "mlp.in",
    "c_fc": "mlp.in",
    "dense_h_to_4h": "mlp.in",
    "down_proj": "mlp.out",
    "fc_out": "mlp.out",
    "mlp.c_proj": "mlp.out",
    "dense_4h_to_h": "mlp.out",
    "c_attn": "attn.qkv",
    "query_key_value": "attn.qkv",
    "qkv_proj": "attn.qkv",
    "gate_up_proj": "mlp.gate+in",
}
EDGES = {
    "wte": "embed",
    "embed_tokens": "embed",
    "embed_in": "embed",
    "lm_head": "unembed",
    "embed_out": "unembed",
}
TOKENS = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def has_hooked_transformer() -> bool:
    """TransformerLens 4 has none."""
    return importlib.util.find_spec("transformer_lens.HookedTransformer") is not None


class Oracle:
    """A plain Hugging Face model, its matrices, and what enters and leaves each of them."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)
        self.config = model.config
        self.family = model.config.model_type
        self.modules: dict[str, tuple[Any, str]] = {}
        for path, module in self.model.named_modules():
            tail = ".".join(path.split(".")[-2:])
            kind = LEAVES.get(tail) or LEAVES.get(tail.split(".")[-1])
            layer = re.search(r"\.(\d+)\.", path)
            if kind and layer:
                branch, parts = kind.split(".")
                names = list(parts) if parts == "qkv" else parts.split("+")
                for part in names:
                    piece = part if len(names) > 1 else ""
                    self.modules[f"blocks.{layer[1]}.{branch}.{part}"] = (module, piece)
            elif tail.split(".")[-1] in EDGES:
                self.modules[EDGES[tail.split(".")[-1]]] = (module, "")

    def pick(self, piece: str, last: Tensor) -> Tensor:
        """The piece's own coordinates of the fused last dimension."""
        if not piece:
            return last
        heads = self.config.num_attention_heads
        if piece in {"gate", "in"}:
            return last.chunk(2, -1)[("gate", "in").index(piece)]
        slot = "qkv".index(piece)
        if self.family == "gpt_neox":
            return last.unflatten(-1, (heads, 3, -1))[..., slot, :].flatten(-2)
        if self.family == "gpt2":
            return last.chunk(3, -1)[slot]
        head = self.config.hidden_size // heads
        kv = self.config.num_key_value_heads * head
        return last.split([heads * head, kv, kv], -1)[slot]

    def weight(self, name: str) -> Tensor:
        module, piece = self.modules[name]
        out_last = module.weight.detach()  # (d_in, d_out) for Conv1D and embeddings' transpose
        if name == "embed":
            return out_last.T
        if type(module).__name__ != "Conv1D":
            out_last = out_last.T
        return self.pick(piece, out_last).T

    def bias(self, name: str) -> Tensor | None:
        module, piece = self.modules[name]
        bias = getattr(module, "bias", None)
        return None if bias is None else self.pick(piece, bias.detach())

    def with_weight(self, name: str, matrix: Tensor) -> Any:
        """A copy of the model that holds `matrix` at the site."""
        other = Oracle(self.model)
        module, piece = other.modules[name]
        if name == "unembed" and self.config.tie_word_embeddings:
            module.weight = torch.nn.Parameter(module.weight.clone())
        index = torch.arange(module.weight.numel()).view(module.weight.shape)
        transposed = name == "embed" or type(module).__name__ == "Conv1D"
        where = other.pick(piece, index if transposed else index.T).T
        if name == "embed":
            where = index.T
        with torch.no_grad():
            module.weight.view(-1)[where.reshape(-1)] = matrix.reshape(-1)
        return other.model

    def blocks(self) -> Any:
        inner = self.model
        for path in ("model.layers", "transformer.h", "gpt_neox.layers"):
            if hasattr(inner, path.split(".")[0]):
                return inner.get_submodule(path)
        raise AssertionError(self.family)

    def run(self, tokens: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Logits, every site's input and output, and every stream point."""
        seen: dict[str, Tensor] = {}
        handles = []

        def watch(name: str, module: Any, piece: str) -> None:
            def hook(_m: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen[f"{name}:in"] = args[0]
                seen[f"{name}:out"] = self.pick(piece, output)

            handles.append(module.register_forward_hook(hook))

        for name, (module, piece) in self.modules.items():
            watch(name, module, piece)
        for layer, block in enumerate(self.blocks()):
            handles.extend(self._watch_block(layer, block, seen))
        with torch.no_grad():
            seen["logits"] = self.model(tokens, **kwargs).logits
        for handle in handles:
            handle.remove()
        return seen

    def _watch_block(self, layer: int, block: Any, seen: dict[str, Tensor]) -> list[Any]:
        def edge(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[f"resid_pre.{layer}"] = args[0] if args else kwargs["hidden_states"]
            seen[f"resid_post.{layer}"] = output[0] if isinstance(output, tuple) else output

        attention = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        branch = attention or block.attention
        if self.family in {"gemma2", "gemma3_text", "olmo2"}:
            branch = block.post_attention_layernorm

        def middle(_m: Any, _a: Any, output: Any) -> None:
            seen[f"branch.{layer}"] = output[0] if isinstance(output, tuple) else output

        def add(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _o: Any) -> None:
            start = args[0] if args else kwargs["hidden_states"]
            seen[f"resid_mid.{layer}"] = start + seen[f"branch.{layer}"]

        return [
            block.register_forward_hook(edge, with_kwargs=True),
            branch.register_forward_hook(middle),
            block.register_forward_hook(add, with_kwargs=True),
        ]


def gain(model: Any, name: str, side: str) -> Tensor | None:
    """The norm gain next to a site, by the family's own naming."""
    family = model.config.model_type
    offset = 1.0 if family.startswith("gemma") else 0.0
    oracle = Oracle(model)
    kind = name.split(".", 2)[-1]
    leaf = None
    if side == "read":
        attn, mlp = {
            "gpt2": ("ln_1", "ln_2"),
            "gptj": ("ln_1", "ln_1"),
            "gemma2": ("input_layernorm", "pre_feedforward_layernorm"),
            "gemma3_text": ("input_layernorm", "pre_feedforward_layernorm"),
            "olmo2": (None, None),
        }.get(family, ("input_layernorm", "post_attention_layernorm"))
        leaf = {"attn": attn, "mlp": mlp}.get(kind.split(".")[0]) if name != "unembed" else None
        if kind in {"attn.o", "mlp.out"}:
            leaf = None
        if name == "unembed":
            top = oracle.model
            for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm"):
                if hasattr(top, path.split(".")[0]):
                    weight = getattr(top.get_submodule(path), "weight", None)
                    return None if weight is None else weight.detach() + offset
    elif family in {"gemma2", "gemma3_text", "olmo2"}:
        leaf = {"attn.o": "post_attention_layernorm", "mlp.out": "post_feedforward_layernorm"}.get(
            kind
        )
    if leaf is None:
        return None
    weight = getattr(getattr(oracle.blocks()[int(name.split(".")[1])], leaf), "weight", None)
    return None if weight is None else weight.detach() + offset


# ---- the user's objects ------------------------------------------------------------------------
def tokenizer(folder: Path) -> Any:
    """Saved and loaded again: TransformerLens builds its own copy from the folder's name."""
    from transformers import AutoTokenizer

    toy.tiny_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def bridge(model: Any, folder: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    theirs = copy.deepcopy(model)
    theirs.config.architectures = [type(model).__name__]  # as a saved configuration has it
    return TransformerBridge.boot_transformers(
        model.config.model_type, hf_model=theirs, tokenizer=tokenizer(folder), device="cpu"
    )


def language_model(model: Any, folder: Path) -> Any:
    from nnsight import TransformersModel

    return TransformersModel(
        copy.deepcopy(model), task="text-generation", tokenizer=tokenizer(folder)
    )


def hooked_transformer(model: Any, **processing: bool) -> Any:
    """A HookedTransformer with the model's weights; `processing` switches default to off."""
    import transformer_lens
    from transformer_lens.pretrained import weight_conversions

    model = copy.deepcopy(model)
    family = model.config.model_type
    stem = {"gptj": "gptj", "gpt_neox": "neox", "gemma2": "gemma", "gemma3_text": "gemma"}
    convert = getattr(weight_conversions, f"convert_{stem.get(family, family)}_weights")
    cfg = transformer_lens.HookedTransformerConfig(**_hooked_fields(model.config))
    state = convert(model, cfg)
    hooked = transformer_lens.HookedTransformer(cfg)
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    off = dict.fromkeys((*names, "refactor_factored_attn_matrices"), False)
    hooked.load_and_process_state_dict(state, **{**off, **processing})
    return hooked.eval()


def _hooked_fields(config: Any) -> dict[str, Any]:
    family = config.model_type
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    old = family in {"gpt2", "gptj", "gpt_neox"}
    norm = getattr(config, "layer_norm_epsilon", None) or getattr(config, "layer_norm_eps", None)
    fields: dict[str, Any] = {
        "d_model": config.hidden_size,
        "d_head": width,
        "n_heads": heads,
        "n_layers": config.num_hidden_layers,
        "n_ctx": 64,
        "d_vocab": config.vocab_size,
        "d_mlp": getattr(config, "n_inner", None) or config.intermediate_size,
        "act_fn": getattr(config, "hidden_activation", None)
        or getattr(config, "hidden_act", None)
        or config.activation_function,
        "eps": norm or getattr(config, "rms_norm_eps", None) or 1e-5,
        "original_architecture": type_name(family),
        "normalization_type": "LN" if old or family == "olmo" else "RMS",
        "device": "cpu",
    }
    if family != "gpt2":
        fields |= {"positional_embedding_type": "rotary", "rotary_dim": width}
        fields["rotary_base"] = float(_theta(config))
    if family == "gptj":
        fields |= {"rotary_dim": config.rotary_dim, "rotary_adjacent_pairs": True}
    if family == "gpt_neox":
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        fields["rotary_dim"] = round(share * width)
    if old:
        return fields | {"parallel_attn_mlp": family != "gpt2"}
    fields |= {"gated_mlp": True, "final_rms": family != "olmo"}
    if kv != heads or family.startswith("gemma"):
        fields["n_key_value_heads"] = kv
    if family in {"qwen3", "gemma3_text"}:
        fields["use_qk_norm"] = True
    if family in {"gemma2", "gemma3_text"}:
        local = [kind == "sliding_attention" for kind in config.layer_types]
        fields |= {
            "use_normalization_before_and_after": True,
            "use_local_attn": True,
            "window_size": 64,
            "attn_types": ["local" if one else "global" for one in local],
        }
    if family == "gemma2":
        fields["attn_scores_soft_cap"] = config.attn_logit_softcapping
        fields["output_logits_soft_cap"] = config.final_logit_softcapping
    if family == "gemma3_text":
        fields["rotary_base_local"] = config.rope_parameters["sliding_attention"]["rope_theta"]
    return fields


def _theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    return parameters.get("rope_theta", 10000.0)


def type_name(family: str) -> str:
    names = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}
    names["gemma3_text"] = "Gemma3ForCausalLM"
    return names.get(family, f"{family.capitalize()}ForCausalLM")


# ---- is the user's object as it was? -----------------------------------------------------------
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(root: Any) -> dict[str, Any]:
    """All that a user could find changed in a module tree."""
    modules = dict(root.named_modules(remove_duplicate=False))
    facts: dict[str, Any] = {}
    for path, module in modules.items():
        facts[f"{path} itself"] = id(module)
        facts[f"{path} training"] = module.training
        facts[f"{path} forward"] = id(module.__dict__.get("forward"))
        for table in _TABLES:
            facts[f"{path} {table}"] = list(getattr(module, table))
    for name, parameter in root.named_parameters(remove_duplicate=False):
        facts[f"{name} requires_grad"] = parameter.requires_grad
        facts[f"{name} pointer"] = parameter.data_ptr()
        facts[f"{name} version"] = parameter._version
        facts[f"{name} grad"] = parameter.grad is None
    return facts


@contextmanager
def untouched(root: Any) -> Iterator[None]:
    """Within it nothing of `root` may change, down to hook tables and parameter versions."""
    state = {name: value.clone() for name, value in root.state_dict().items()}
    before = snapshot(root)
    yield
    after = snapshot(root)
    differ = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not differ, differ[:5]
    now = root.state_dict()
    assert list(state) == list(now)
    assert all(torch.equal(state[name], now[name]) for name in state)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    """Largest difference at most `tolerance`, relative to the size where that exceeds one."""
    left, right = left.detach(), right.detach()
    scale = max(1.0, float(right.abs().max()))
    return left.shape == right.shape and float((left - right).abs().max()) <= tolerance * scale
