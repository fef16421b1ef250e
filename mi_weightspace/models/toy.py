"""Tiny random models of every family, and lineages with one planted change. Offline, fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.families import FAMILIES as _TABLES

FAMILIES: tuple[str, ...] = tuple(_TABLES)
VOCAB = 320


def tiny_config(family: str, *, n_layers: int = 2, d_model: int = 32, **overrides: Any) -> Any:
    """A small configuration of one family; widths chosen so that no two dimensions coincide."""
    from transformers import AutoConfig

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    if family in {"gpt2", "gptj"}:
        common |= {"n_inner": 3 * d_model, "n_ctx": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        common |= {"attn_pdrop": 0.0} | ({"rotary_dim": 4} if family == "gptj" else {})
    else:
        common["intermediate_size"] = 3 * d_model
    if family not in {"gpt2", "gptj", "gpt_neox"}:
        common["num_key_value_heads"] = 4 if family == "phi3" else 2
    if family in {"qwen3", "gemma", "gemma2", "gemma3_text"}:
        common["head_dim"] = d_model // 4 + 2
    if family == "gemma2":
        common["query_pre_attn_scalar"] = d_model // 4 + 2
    if family == "gemma3_text":
        common |= {"query_pre_attn_scalar": d_model // 4 + 2, "sliding_window": 32}
    return AutoConfig.for_model(family, **(common | overrides))


def tiny_model(family: str, *, seed: int = 0, **config: Any) -> Any:
    """A random model in float32, evaluation mode.

    Matrices are drawn with standard deviation 0.15, norm gains are perturbed and biases are not
    zero: the default initialisation (0.02, gains exactly 1) hides layout and folding mistakes.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **config))
    draw = generator(seed, "toy", family)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.float().eval()


def tiny_tokenizer() -> Any:
    """A word-level tokenizer over `VOCAB` made-up words; unknown words share one id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<pad>", "<unk>"]
    words += list("ABCDEFGHIJ") + [f"word{i}" for i in range(VOCAB - 14)]
    vocabulary = {word: i for i, word in enumerate(words[:VOCAB])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def save_tiny(
    family: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face folder."""
    path = Path(folder)
    model = tiny_model(family, seed=seed, **config).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(path)
    return path
