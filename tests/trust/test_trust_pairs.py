"""Two checkpoints: equal ones say `no change` in whatever form, unlike ones are never compared."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trust_counter import Figure
from trust_models import CONFIG, INDEX, WEIGHTS, save_adapter

import mi_weightspace as mw
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.weights import CheckpointSource, ModuleSource

Pair = tuple[Any, Any]
Change = Callable[[dict[str, Any]], dict[str, Any]]


# ---- equal ---------------------------------------------------------------------------------
def saved(folder: Path, family: str = "llama", **options: Any) -> Path:
    return toy.save_tiny(family, folder, **options)


def rewritten(source: Path, target: Path, change: Change) -> Path:
    """A copy with other tensors in its one file."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / WEIGHTS)), target / WEIGHTS, {"format": "pt"})
    return target


def reconfigured(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    record = json.loads((target / CONFIG).read_text()) | changes
    (target / CONFIG).write_text(json.dumps(record))
    return target


def without_prefix(held: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix("model.").removeprefix("transformer."): v for k, v in held.items()}


def identical_pairs(place: Path) -> dict[str, Pair]:
    one = saved(place / "one")
    half = saved(place / "half", dtype=torch.bfloat16)
    gpt2 = saved(place / "gpt2", "gpt2", tie_word_embeddings=True)
    link = place / "link"
    link.symlink_to(one)
    hub = place / "hub"
    shutil.copytree(one, hub)
    (place / "blob").write_bytes((one / WEIGHTS).read_bytes())
    (hub / WEIGHTS).unlink()
    (hub / WEIGHTS).symlink_to(place / "blob")
    model = toy.tiny_model("llama")
    resaved = place / "resaved"
    mw.load(one).model.save_pretrained(resaved)
    wide = rewritten(half, place / "wide", lambda h: {k: v.float() for k, v in h.items()})
    live = ModuleSource(TorchLens(copy.deepcopy(model)), "live")
    nothing = save_adapter(place / "nothing", one, scale=0.0)
    adapter = save_adapter(place / "adapter", one)
    hidden = reconfigured(one, place / "hidden", use_cache=False, architectures=["Mine"])
    masked = rewritten(
        gpt2,
        place / "masked",
        lambda h: h | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)},
    )
    single = saved(place / "shards", max_shard_size="20KB")
    stale = place / "stale"
    shutil.copytree(one, stale)
    (stale / INDEX).write_text("{}")  # the one file is what is loaded, and read
    (stale / "pytorch_model.bin").write_bytes(b"not read")
    return {
        "the same folder": (one, one),
        "a copy": (one, shutil.copytree(one, place / "copy")),
        "a symlink to the folder": (one, link),
        "a symlinked file, as in the hub's cache": (one, hub),
        "one file and shards": (one, single),
        "other shards": (single, saved(place / "shards2", max_shard_size="60KB")),
        "saved again by the library": (one, resaved),
        "without the prefix of the base model": (
            one,
            rewritten(one, place / "bare", without_prefix),
        ),
        "another order of tensors": (
            one,
            rewritten(one, place / "order", lambda h: dict(reversed(h.items()))),
        ),
        "a stale index and a pickle beside the file": (one, stale),
        "tied embeddings": (gpt2, shutil.copytree(gpt2, place / "gpt2b")),
        "tied, the unembedding written out": (
            gpt2,
            rewritten(
                gpt2,
                place / "tied",
                lambda h: h | {"lm_head.weight": h["transformer.wte.weight"].clone()},
            ),
        ),
        "Conv1D without the prefix": (gpt2, rewritten(gpt2, place / "gpt2c", without_prefix)),
        "saved attention masks": (gpt2, masked),
        "an adapter with B = 0": (one, nothing),
        "one adapter twice": (adapter, shutil.copytree(adapter, place / "adapter2")),
        "two adapters with B = 0": (nothing, shutil.copytree(nothing, place / "nothing2")),
        "bf16 and its float32 copy": (half, wide),
        "float32 copy and bf16": (wide, half),
        "bf16 twice": (half, saved(place / "half2", dtype=torch.bfloat16)),
        "fp16 twice": (
            saved(place / "fp16", dtype=torch.float16),
            saved(place / "fp16b", dtype=torch.float16),
        ),
        "a live model and its folder": (live, one),
        "a folder and its live model": (one, ModuleSource(TorchLens(model), "live")),
        "a live model twice": (live, ModuleSource(TorchLens(model), "live")),
        "another tokenizer": (one, _other_tokenizer(one, place / "tokenizer")),
        "settings that are no sizes": (one, hidden),
        "negative zeros": (
            rewritten(one, place / "zero", _zeroed(0.0)),
            rewritten(one, place / "negative", _zeroed(-0.0)),
        ),
        "float64 copy": (
            one,
            rewritten(one, place / "double", lambda h: {k: v.double() for k, v in h.items()}),
        ),
    }


def _other_tokenizer(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / "tokenizer.json").unlink()
    return target


def _zeroed(value: float) -> Change:
    return lambda h: h | {"model.layers.0.mlp.up_proj.weight": torch.full((96, 32), value)}


def test_identical_pairs_are_no_change(tmp_path: Path) -> None:
    pairs = identical_pairs(tmp_path)
    families = [f for f in toy.FAMILIES if f != "llama"]
    for family in families:
        first = saved(tmp_path / f"1{family}", family)
        pairs[f"{family}, resharded"] = (
            first,
            saved(tmp_path / f"2{family}", family, max_shard_size="20KB"),
        )
    tried = "one model in two forms: shards, links, prefixes, precisions, ties, adapters, live"
    with Figure("no-change guard", "pairs", tried) as figure:
        for name, (before, after) in pairs.items():
            figure.add(problem=found_change(name, before, after))


def found_change(name: str, before: Any, after: Any) -> str | None:
    lineage = mw.load_lineage(before=before, after=after)
    checked = lineage.check()
    report = mw.svd(lineage.diff("before", "after"), None, 2, progress=False)
    words = [v.word for v in checked.verdicts], [v.word for v in report.verdicts]
    if words != ([Word.NO_CHANGE], [Word.NO_CHANGE]):
        return f"{name}: {words}"
    sizes = report.tables["sites"]
    if (
        (sizes["fro"] != 0).any()
        or len(report.tables["vectors"])
        or report.table["singular_value"].any()
    ):
        return f"{name}: a size, a vector or a value that is not 0"
    return None


def test_one_changed_entry_is_a_change(tmp_path: Path) -> None:
    """The guard is not blind: the smallest change of each kind of tensor is seen."""
    one = saved(tmp_path / "one", "gpt2")
    for number, key in enumerate(load_file(one / WEIGHTS)):

        def nudge(held: dict[str, Any], key: str = key) -> dict[str, Any]:
            held[key].view(-1)[-1] = torch.nextafter(held[key].view(-1)[-1], torch.tensor(9.0))
            return held

        other = rewritten(one, tmp_path / f"n{number}", nudge)
        assert not mw.load_lineage(before=one, after=other).check().verdicts, key


# ---- unlike --------------------------------------------------------------------------------
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "one layer more": ("llama", {"n_layers": 3}),
    "wider": ("llama", {"d_model": 64}),
    "larger vocabulary": ("llama", {"vocab_size": 352}),
    "two heads": ("llama", {"num_attention_heads": 2}),
    "as many key heads": ("llama", {"num_key_value_heads": 4}),
    "wider MLP": ("llama", {"intermediate_size": 128}),
    "attention bias": ("llama", {"attention_bias": True}),
    "MLP bias": ("llama", {"mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3, norms of queries and keys": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2, four norms": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "olmo, norms without gain": ("olmo", {}),
    "olmo2, post-norm": ("olmo2", {}),
    "phi3, fused": ("phi3", {}),
    "gpt2, layer norm": ("gpt2", {}),
    "gptj, parallel": ("gptj", {}),
    "neox, parallel": ("gpt_neox", {}),
    "neox, not parallel": ("gpt_neox", {"use_parallel_residual": False}),
}


def test_unlike_pairs_are_refused(tmp_path: Path) -> None:
    """Every ordered pair of 22 architectures: opening as stages, and as adapters' bases."""
    sources = {
        name: CheckpointSource(saved(tmp_path / f"m{i}", family, **sizes))
        for i, (name, (family, sizes)) in enumerate(SMALL.items())
    }
    tried = f"every ordered pair of {len(sources)} families, sizes, heads, norms and biases"
    with Figure("pair-mismatch matrix", "ordered pairs", tried) as figure:
        for (one, a), (other, b) in itertools.permutations(sources.items(), 2):
            figure.add(problem=silent(f"{one} and {other}", a, b))
    with Figure("pair-mismatch matrix", "ordered pairs", "an adapter on another base") as figure:
        for i, (name, (family, sizes)) in enumerate(SMALL.items()):
            if family == "llama" and not sizes:
                continue
            figure.add(problem=strange_base(tmp_path, tmp_path / f"m{i}", name))


def silent(name: str, before: Any, after: Any) -> str | None:
    try:
        mw.load_lineage(before=before, after=after)
    except WeightspaceError as error:
        return None if "stages" in str(error) else f"{name}: {error}"
    return f"{name}: compared without a word"


def strange_base(tmp: Path, base: Path, name: str) -> str | None:
    """An adapter of the plain llama on another base; one of its shapes is refused at opening."""
    shape = CheckpointSource(base).shape
    plain = (shape.n_layers, shape.d_model, shape.d_mlp, shape.n_heads * shape.d_head)
    named = CheckpointSource(base).shape.table.blocks.startswith("model.layers")
    fits = named and plain == (2, 32, 96, 32) and shape.family not in {"phi3"}
    folder = tmp / f"adapter-{base.name}"
    save_adapter(folder, base)
    try:
        mw.load_lineage(before=base, after=folder)
    except WeightspaceError:
        return f"{name}: refused though every factor fits" if fits else None
    return None if fits else f"{name}: an adapter of another model was taken"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 1e-3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
    ],
)
def test_other_settings_of_the_same_sizes_are_said(key: str, value: Any, tmp_path: Path) -> None:
    """The matrices can be compared, but the functions differ: a reservation names the setting."""
    one = saved(tmp_path / "one")
    other = reconfigured(one, tmp_path / "other", **{key: value})
    with Figure("pair-mismatch matrix", "ordered pairs", "another activation, norm or rope") as f:
        said = mw.load_lineage(before=one, after=other).reservations
        named = any(key in text for text in said)
        f.add(problem=None if named else f"{key}: {said}")
