"""The corpus: how a checkpoint folder can be damaged so that it must not be read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from trust_models import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Case,
    New,
    edit_bytes,
    edit_header,
    edit_json,
    edit_tensors,
    put,
    raw,
)

SIZES = {
    "llama": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    "gpt2": ("n_embd", "n_layer", "n_head", "vocab_size"),
}
BAD_VALUES: dict[str, Any] = {
    "text": "32",
    "null": None,
    "negative": -32,
    "zero": 0,
    "fraction": 31.5,
    "nan": float("nan"),
    "infinite": float("inf"),
    "list": [32],
    "object": {"value": 32},
    "true": True,
    "huge": 10**12,
    "beyond-int64": 10**40,
    "off-by-one": "+1",
}


# ---- safetensors ---------------------------------------------------------------------------
def cut_cases(size: int, header: int) -> Iterator[Case]:
    """The one file cut at offsets in the length field, the header, the data and at its end."""
    inside = [0, 1, 4, 7, 8, 9, 8 + header // 4, 8 + header // 2, 7 + header, 8 + header]
    data = size - 8 - header
    inside += [8 + header + data * k // 6 for k in range(1, 6)] + [size - 40, size - 4, size - 1]
    for offset in inside:
        yield Case(f"cut at {offset}", edit_bytes(WEIGHTS, lambda b, o=offset: b[:o]), (WEIGHTS,))
    for extra in (1, 8, 4096):
        grow = edit_bytes(WEIGHTS, lambda b, n=extra: b + bytes(n))
        yield Case(f"{extra} bytes more", grow, (WEIGHTS,))


def length_cases() -> Iterator[Case]:
    def lie(length: int) -> Callable[[Path], None]:
        return lambda folder: put(folder / WEIGHTS, *raw(folder / WEIGHTS), length=length)

    for length in (0, 1, 7, 100, 10**6, 2**31, 2**40, 2**63 - 1, 2**64 - 1):
        yield Case(f"header length {length}", lie(length), (WEIGHTS,))


def header_cases(key: str, other: str) -> Iterator[Case]:
    """`key`, `other`: two tensors of the file."""

    def own(**fields: Any) -> Callable[[dict[str, Any]], object]:
        return lambda h: h[key].update(fields)

    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "dtype unknown": own(dtype="F31"),
        "dtype wider": own(dtype="F64"),
        "dtype narrower": own(dtype="F16"),
        "dtype null": own(dtype=None),
        "dtype number": own(dtype=32),
        "shape larger": lambda h: h[key].update(shape=[h[key]["shape"][0] + 1, 7]),
        "shape negative": own(shape=[-1, 32]),
        "shape huge": own(shape=[2**62, 2**62]),
        "shape text": own(shape="32x32"),
        "shape empty": own(shape=[]),
        "shape with nought": own(shape=[0, 32]),
        "offsets overlap": lambda h: h[key].update(data_offsets=h[other]["data_offsets"]),
        "offsets reversed": lambda h: h[key]["data_offsets"].reverse(),
        "offsets beyond": own(data_offsets=[0, 2**50]),
        "offsets negative": own(data_offsets=[-8, 8]),
        "offsets one": own(data_offsets=[0]),
        "no offsets": lambda h: h[key].pop("data_offsets"),
        "no dtype": lambda h: h[key].pop("dtype"),
        "entry is text": lambda h: h.update({key: "F32"}),
        "header a list": lambda h: New(list(h)),
        "header empty": lambda h: New({}),
        "metadata a list": lambda h: h.update({"__metadata__": [1]}),
        "metadata nested": lambda h: h.update({"__metadata__": {"a": {"b": 1}}}),
        "gap in the data": lambda h: h.pop(key),
        "tensor renamed": lambda h: h.update({"x" + key: h.pop(key)}),
    }
    for name, change in changes.items():
        yield Case(name, edit_header(WEIGHTS, change), (WEIGHTS, key))
    for name, text in {
        "header no JSON": b"{" * 64,
        "header binary": bytes(range(256)),
        "header deep": b'{"a":' + b"[" * 20000 + b"]" * 20000 + b"}",
        "header UTF-16": '{"__metadata__":{}}'.encode("utf-16"),
    }.items():
        damage = lambda f, t=text: put(f / WEIGHTS, t, raw(f / WEIGHTS)[1])  # noqa: E731
        yield Case(name, damage, (WEIGHTS,))


def tensor_cases(sound: Path) -> Iterator[Case]:
    """Whole, well-formed files that hold the wrong tensors: each missing, transposed, cast, cut."""
    held = load_file(sound / WEIGHTS)
    for key in held:
        live = ".wpe." in key  # positions: no matrix depends on them
        leaf = key.removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
        names = (key, leaf)
        yield Case(f"without {key}", edit_tensors(lambda h, k=key: h.pop(k)), names, live)
    for key in [k for k in held if ".0." in k]:
        names = (key, key.split(".0.", 1)[1])
        if held[key].ndim == 2 and held[key].shape[0] != held[key].shape[1]:
            turn = edit_tensors(lambda h, k=key: h.update({k: h[k].T}))
            yield Case(f"transposed {key}", turn, (*names, "blocks.0."))
        shorter = edit_tensors(lambda h, k=key: h.update({k: h[k][:-1]}))
        yield Case(f"shorter {key}", shorter, (*names, "blocks.0."))
        if held[key].ndim == 2:
            cast = edit_tensors(lambda h, k=key: h.update({k: h[k].to(torch.int8)}))
            yield Case(f"int8 {key}", cast, names)
            none = edit_tensors(lambda h, k=key: h.update({k: h[k][:0]}))
            yield Case(f"zero-length {key}", none, (*names, "blocks.0."))
        flat = edit_tensors(lambda h, k=key: h.update({k: h[k].flatten()[None, None]}))
        yield Case(f"3-d {key}", flat, (*names, "blocks.0."))
    stems = {k.split(".0.", 1)[1] for k in held if ".0." in k}
    for stem in sorted(stems | {k for k in held if ".0." not in k and ".1." not in k}):
        if "wpe" in stem:
            continue  # positions: any number of them
        every = [k for k in held if k.endswith(stem)]
        cut = edit_tensors(lambda h, e=every: h.update({k: h[k][:-1] for k in e}))
        names = (stem, stem.removeprefix("model."), "blocks.", "embed")
        yield Case(f"shorter in every layer: {stem}", cut, names)
    layer = next(k for k in held if ".1." in k)
    beyond = edit_tensors(lambda h: h.update({layer.replace(".1.", ".2."): h[layer]}))
    yield Case("a third layer begun", beyond, (layer.replace(".1.", ".2."),))


# ---- index and files -----------------------------------------------------------------------
def index_cases(sound: Path, outside: Path) -> Iterator[Case]:
    """`outside`: a folder that holds a sound copy of the first shard."""
    weight_map = json.loads((sound / INDEX).read_text())["weight_map"]
    key, shard = sorted(weight_map.items())[0]
    places = {
        "absent": "model-00099-of-00099.safetensors",
        "parent": f"../{outside.name}/{shard}",
        "deep parent": f"../../../../../../../..{outside / shard}",
        "absolute": str(outside / shard),
        "below": f"sub/{shard}",
        "backslash": f"..\\{outside.name}\\{shard}",
        "empty": "",
        "dot": ".",
        "dots": "..",
        "nul": shard + "\0",
        "newline": shard + "\n",
        "very long": "m" * 5000,
        "directory": "sub",
        "null": None,
        "number": 7,
        "list": [shard],
        "object": {"file": shard},
        "true": True,
        "lone surrogate": "\ud800.safetensors",
        "right-to-left": "\u202estfas.ledom",
    }
    for name, value in places.items():
        change = edit_json(INDEX, lambda r, v=value: r["weight_map"].update({key: v}))
        yield Case(f"index: {name}", change, (INDEX, "99-of", "sub"))
    maps: dict[str, Callable[[dict[str, Any]], object]] = {
        "no map": lambda r: r.pop("weight_map"),
        "map a list": lambda r: r.update(weight_map=list(r["weight_map"])),
        "map empty": lambda r: r.update(weight_map={}),
        "map null": lambda r: r.update(weight_map=None),
        "index a list": lambda r: New([r]),
        "absent tensor": lambda r: r["weight_map"].update({"model.ghost.weight": shard}),
        "tensor left out": lambda r: r["weight_map"].pop(key),
        "swapped shards": lambda r: r.update(
            weight_map=dict(
                zip(r["weight_map"], reversed([*r["weight_map"].values()]), strict=True)
            )
        ),
    }
    for name, change in maps.items():
        yield Case(f"index: {name}", edit_json(INDEX, change), (INDEX, key, "shard", "lm_head"))
    yield from text_cases(INDEX)
    yield Case("index empty", edit_bytes(INDEX, lambda b: b""), (INDEX,))
    shards = sorted(set(weight_map.values()))
    for name in shards[:3]:
        yield Case(f"{name} gone", lambda f, n=name: (f / n).unlink(), (name,))
        yield Case(f"{name} empty", edit_bytes(name, lambda b: b""), (name,))
        yield Case(f"{name} half", edit_bytes(name, lambda b: b[: len(b) // 2]), (name,))
        yield Case(f"{name} a folder", lambda f, n=name: _folder(f / n), (name,))
        yield Case(f"{name} a dead link", lambda f, n=name: _dead_link(f / n), (name,))
        yield Case(f"{name} a loop", lambda f, n=name: _loop(f / n), (name,))
        yield Case(f"{name} a pipe", lambda f, n=name: _pipe(f / n), (name,))
        twin = lambda f, n=name: shutil.copy(f / shards[-1], f / n)  # noqa: E731
        yield Case(f"{name} another shard", twin, (name,))


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _dead_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all")


def _loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _link_to_folder(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent)


def text_cases(name: str) -> Iterator[Case]:
    """Damage of any JSON file of a folder."""
    changes: dict[str, Callable[[bytes], bytes]] = {
        "cut early": lambda b: b[: len(b) // 5],
        "cut late": lambda b: b[:-2],
        "binary": lambda b: bytes(range(255, 128, -1)) + b,
        "comma": lambda b: b.rstrip()[:-1] + b",}",
        "comment": lambda b: b"// mine\n" + b,
        "two objects": lambda b: b + b,
        "deep": lambda b: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "long number": lambda b: b'{"hidden_size": ' + b"9" * 6000 + b"}",
        "only null": lambda b: b"null",
        "a string": lambda b: b'"config"',
        "NUL bytes": lambda b: bytes(len(b)),
    }
    for what, change in changes.items():
        yield Case(f"{name}: {what}", edit_bytes(name, change), (name,))


def file_cases() -> Iterator[Case]:
    """The one file, or the folder."""
    for name in (WEIGHTS, CONFIG):
        for what, damage in {
            "gone": lambda f, n=name: (f / n).unlink(),
            "empty": edit_bytes(name, lambda b: b""),
            "a folder": lambda f, n=name: _folder(f / n),
            "a dead link": lambda f, n=name: _dead_link(f / n),
            "a loop": lambda f, n=name: _loop(f / n),
            "a pipe": lambda f, n=name: _pipe(f / n),
            "a link to a folder": lambda f, n=name: _link_to_folder(f / n),
        }.items():
            yield Case(f"{name} {what}", damage, (name, "config"))
    for legacy in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin"):
        yield Case(f"only {legacy}", lambda f, n=legacy: _legacy(f, n), (legacy,))


def _legacy(folder: Path, name: str) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / name)
    (folder / WEIGHTS).unlink()


# ---- config.json ---------------------------------------------------------------------------
def config_cases(family: str) -> Iterator[Case]:
    yield from text_cases(CONFIG)
    sizes = SIZES.get(family, SIZES["llama"])
    for key in sizes:
        for name, value in BAD_VALUES.items():
            change = edit_json(CONFIG, lambda r, k=key, v=value: r.update({k: _off(r[k], v)}))
            yield Case(f"{key} {name}", change, (key, CONFIG))
    more: dict[str, Callable[[dict[str, Any]], object]] = {
        "model_type absent": lambda r: r.pop("model_type"),
        "model_type unknown": lambda r: r.update(model_type="mamba"),
        "model_type null": lambda r: r.update(model_type=None),
        "model_type list": lambda r: r.update(model_type=["llama"]),
        "model_type object": lambda r: r.update(model_type={"a": 1}),
        "model_type other": lambda r: r.update(model_type="gptj" if family != "gptj" else "llama"),
        "nested": lambda r: New({"config": r}),
        "a list": lambda r: New([r]),
        "empty": lambda r: New({}),
        "quantised": lambda r: r.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        "tie text": lambda r: r.update(tie_word_embeddings="no"),
        "one layer less": lambda r: r.update({sizes[1]: 1}),
        "one layer more": lambda r: r.update({sizes[1]: 3}),
        "width doubled": lambda r: r.update({sizes[0]: 64}),
        "vocabulary halved": lambda r: r.update(vocab_size=160),
    }
    for name, change in more.items():
        yield Case(f"config: {name}", edit_json(CONFIG, change), (CONFIG, "config", "layers", "h."))
    twice = edit_bytes(CONFIG, lambda b: b'{"vocab_size": 1, ' + b.lstrip()[1:])
    yield Case("config: a key twice", twice, ("vocab_size",))


def _off(old: int, value: Any) -> Any:
    return old + 1 if value == "+1" else value


# ---- adapters ------------------------------------------------------------------------------
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter_cases(folder: Path) -> Iterator[Case]:
    yield from text_cases(ADAPTER_CONFIG)
    values: dict[str, list[Any]] = {
        "r": [None, 0, -1, 3, 1.5, "2", True, float("nan"), [2], 10**12],
        "lora_alpha": [None, "4", float("nan"), float("inf"), True, [4], {}, 0],
        "target_modules": [["v_proj"], [], 7, [1, 2], {"q_proj": 1}, ["proj"]],
        "use_rslora": ["yes", 1],
        "alpha_pattern": [[1], "x", {"q_proj": "4"}, {"(": 2}, {"q_proj": None}],
        "rank_pattern": [[1], {"q_proj": 5}, {"q_proj": "2"}, {"[": 2}, {"down_proj": 0}],
        "base_model_name_or_path": ["", None, 7, ["a"], "/nowhere/at/all", "../../etc"],
        "peft_type": ["IA3", None, 1, ["LORA"]],
        "bias": ["all", "lora_only", 1],
        "use_dora": [True, "yes"],
        "modules_to_save": [["lm_head"], "lm_head"],
        "init_lora_weights": ["pissa", "olora"],
        "layer_replication": [[[0, 1]]],
    }
    for key, bad in values.items():
        for value in bad:
            if key == "peft_type" and value is None:
                continue  # read as a plain adapter
            change = edit_json(ADAPTER_CONFIG, lambda r, k=key, v=value: r.update({k: v}))
            yield Case(f"adapter {key}={value!r}", change, (key, str(value), "q_proj", "down_proj"))
    for key in ("r", "lora_alpha", "base_model_name_or_path"):
        change = edit_json(ADAPTER_CONFIG, lambda r, k=key: r.pop(k))
        yield Case(f"adapter without {key}", change, (key,))
    held = load_file(folder / ADAPTER)
    for key in held:
        stem = key.removeprefix("base_model.model.").split(".lora_")[0]
        tensors: dict[str, Callable[[dict[str, Any]], object]] = {
            "without": lambda h, k=key: h.pop(k),
            "shorter": lambda h, k=key: h.update({k: h[k][:-1]}),
            "transposed": lambda h, k=key: h.update({k: h[k].T}),
            "empty": lambda h, k=key: h.update({k: h[k][:0]}),
            "flat": lambda h, k=key: h.update({k: h[k].flatten()}),
            "int8": lambda h, k=key: h.update({k: h[k].to(torch.int8)}),
        }
        for name, change in tensors.items():
            yield Case(f"adapter {name} {key}", edit_tensors(change, ADAPTER), (stem,))
    stem = sorted(held)[0].split(".lora_")[0]
    both = lambda h: [h.pop(f"{stem}.lora_{x}.weight") for x in "AB"]  # noqa: E731
    yield Case("adapter pair gone", edit_tensors(both, ADAPTER), (stem.split("model.", 2)[-1],))
    yield Case("adapter no tensors", edit_tensors(lambda h: h.clear(), ADAPTER), (ADAPTER,))
    ghost = lambda h: h.update({"model.ghost.weight": torch.ones(2)})  # noqa: E731
    yield Case("adapter ghost", edit_tensors(ghost, ADAPTER), ("ghost",))
    for name, damage in {
        "gone": lambda f: (f / ADAPTER).unlink(),
        "empty": edit_bytes(ADAPTER, lambda b: b""),
        "half": edit_bytes(ADAPTER, lambda b: b[: len(b) // 2]),
        "a folder": lambda f: _folder(f / ADAPTER),
        "a pipe": lambda f: _pipe(f / ADAPTER),
    }.items():
        yield Case(f"adapter file {name}", damage, (ADAPTER,))
    yield Case("adapter pickle only", _adapter_pickle, (ADAPTER, "adapter_model.bin"))


def _adapter_pickle(folder: Path) -> None:
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()
