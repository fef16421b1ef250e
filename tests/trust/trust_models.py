"""Tiny sound checkpoints, and the damage done to copies of them."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mi_weightspace.models import toy

FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "phi3", "qwen2", "olmo2")
INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One way to damage a folder.

    Attributes:
        names: the refusal's message must hold one of these.
        live: the damage is in what only a running model reads.
    """

    name: str
    damage: Damage
    names: tuple[str, ...]
    live: bool = False


@dataclass(frozen=True)
class New:
    """What an edit puts in place of the value it was given."""

    value: Any


def raw(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, read without its library."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(file: Path, header: object, data: bytes, *, length: int | None = None) -> None:
    """A safetensors file with any header, length field and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        record = json.loads((folder / name).read_text())
        changed = change(record)
        (folder / name).write_text(
            json.dumps(changed.value if isinstance(changed, New) else record)
        )

    return damage


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def edit_header(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        header, data = raw(folder / name)
        changed = change(header)
        put(folder / name, changed.value if isinstance(changed, New) else header, data)

    return damage


def edit_tensors(
    change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS
) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(
            {k: v.clone().contiguous() for k, v in held.items()}, folder / name, {"format": "pt"}
        )

    return damage


def lora_config(base: Path, targets: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": targets,
        "bias": "none",
        "use_rslora": False,
    } | changes


def save_adapter(folder: Path, base: Path, *, scale: float = 0.1) -> Path:
    """A LoRA adapter for a tiny llama, written as peft writes it."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for module, (rows, columns) in {
            "self_attn.q_proj": (32, 32),
            "mlp.down_proj": (32, 96),
        }.items():
            stem = f"base_model.model.model.layers.{layer}.{module}.lora"
            tensors[f"{stem}_A.weight"] = torch.randn(2, columns, generator=draw)
            tensors[f"{stem}_B.weight"] = scale * torch.randn(rows, 2, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    record = lora_config(base, ["q_proj", "down_proj"])
    (folder / "adapter_config.json").write_text(json.dumps(record))
    return folder


def sound(place: Path, family: str, *, sharded: bool = False) -> Path:
    """A tiny checkpoint of a family."""
    size = "20KB" if sharded else "5GB"
    return toy.save_tiny(family, place / f"{family}{'-sharded' * sharded}", max_shard_size=size)


def copied(source: Path, target: Path, damage: Damage) -> Path:
    shutil.copytree(source, target)
    damage(target)
    return target
