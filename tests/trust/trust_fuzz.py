"""Sound files of every format of ours, their readers, and ways to spoil bytes and values.

A reader given spoilt bytes answers with a refusal of the package, or with a value that is valid
(the damage hit nothing, or made another valid file). Nothing else: no other exception, no hang.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main
from mi_weightspace.core.components import Components
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import load_directions, save_direction
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.json_io import digest_of
from mi_weightspace.core.monitor import Bands, Watch
from mi_weightspace.core.monitor_io import load_bands, save_bands
from mi_weightspace.core.report import load_report
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.sae_parts import SaeMetadata
from mi_weightspace.core.sealed_io import SEAL, file_hash, seal
from mi_weightspace.core.seeds import generator
from mi_weightspace.models import toy
from mi_weightspace.models.sources import open_path
from mi_weightspace.models.weights import CheckpointSource
from mi_weightspace.spectral import journal
from mi_weightspace.vpd import state as vpd_state
from mi_weightspace.vpd.config import read_config
from mi_weightspace.vpd.corpus import read_tokens
from mi_weightspace.vpd.exchange import import_components
from probes.sae_disk import read_folder, write_folder


@dataclass(frozen=True)
class Format:
    """One file of one format.

    Attributes:
        name, file: what it is, and the sound file.
        read: its reader, given nothing (it knows the place).
        json: where the JSON lies in it: ``all``, ``lines``, ``header`` (of a safetensors file), or
            ``none``.
        reseal: puts the hashes right again after a change of values, as a hostile writer would.
        also: other files that `reseal` writes.
    """

    name: str
    file: Path
    read: Callable[[], Any]
    json: str = "none"
    reseal: Callable[[], None] | None = None
    also: tuple[Path, ...] = ()


def formats(place: Path) -> list[Format]:
    """Every format, made in `place`."""
    return [*_texts(place), *_vectors(place), *_runs(place), *_models(place)]


def _texts(place: Path) -> list[Format]:
    pairs = [{"item_id": f"i{i}", "positive": f"yes {i}", "negative": f"no {i}", "contrast": "c"}
             for i in range(4)]  # fmt: skip
    rows = [{"prompt": f"p {i}", "label": i % 2, "cluster_id": f"c{i // 2}", "context": "x",
             "attributes": {"topic": "t"}} for i in range(8)]  # fmt: skip
    tokens = [{"input_ids": list(range(8))} for _ in range(3)]
    found = {}
    for name, lines in (("contrasts", pairs), ("labelled", rows), ("tokens", tokens)):
        found[name] = place / f"{name}.jsonl"
        found[name].write_text("\n".join(json.dumps(line) for line in lines))
    config = place / "config.yaml"
    config.write_text("sites: ['blocks.*.mlp.out']\nn_components: 8\nn_steps: 10\nseed: 3\n"
                      "faithfulness: {weight: 0.5}\n")  # fmt: skip
    array, stored = place / "tokens.npy", place / "tokens.safetensors"
    np.save(array, np.arange(64, dtype=np.int32))
    save_file({"input_ids": torch.arange(64)}, stored)
    return [
        Format(
            "contrasts", found["contrasts"],
            lambda: probes.load_contrasts(str(found["contrasts"]), min_clusters=2), "lines",
        ),
        Format("labelled", found["labelled"],
               lambda: probes.load_labelled(str(found["labelled"])), "lines"),
        Format("token lines", found["tokens"], lambda: read_tokens(found["tokens"], 8), "lines"),
        Format("token array", array, lambda: read_tokens(array, 8)),
        Format("token tensors", stored, lambda: read_tokens(stored, 8), "header"),
        Format("vpd settings", config, lambda: read_config(config)),
    ]  # fmt: skip


def _resealed(file: Path, key: str) -> Callable[[], None]:
    """Put the seal of a safetensors file right for whatever it holds now."""

    def act() -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as handle:
                metadata = handle.metadata() or {}
                tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118
            record = json.loads(metadata[key])
            if isinstance(record, dict) and SEAL in record:
                record[SEAL] = seal(tensors, record)
            save_file(tensors, file, {key: json.dumps(record)})
        except (SafetensorError, KeyError, ValueError, RecursionError):
            return  # too damaged for a seal

    return act


def _vectors(place: Path) -> list[Format]:
    draw = generator(0, "fuzz")
    rows = [
        Direction(
            torch.randn(6, generator=draw), mw.Space("resid_post", layer),
            filter=torch.randn(6, generator=draw), fit={"auroc": 0.9}, mean=torch.zeros(6),
            control_patterns=torch.eye(6)[:2], control_names=("a", "b"),
        )
        for layer in range(2)
    ]  # fmt: skip
    direction = save_direction(rows, place / "direction.safetensors")
    bare = place / "bare.safetensors"
    save_file({"vector": torch.ones(6)}, bare)
    watch = Watch("blocks.0.mlp.out", "write", "resid_post.0", torch.eye(6)[:2], (0, 1))
    both = (torch.ones(2),)
    bands = save_bands(Bands((watch,), (-both[0],), both, n=9), place / "bands.safetensors")
    entry = place / "entry.safetensors"
    site = CheckpointSource(toy.save_tiny("llama", place / "site")).site("blocks.0.attn.q")
    parts = Components(site, torch.ones(1, 32), torch.ones(1, 32), torch.ones(1), stage="sft",
                       facts={"fro": 1.0})  # fmt: skip
    journal.write(entry, parts)
    sae = Sae("topk", torch.ones(4, 6), torch.ones(6, 4), torch.zeros(4), b_enc=torch.zeros(6), k=2,
              metadata=SaeMetadata(hook_name="blocks.0.hook_resid_post"))  # fmt: skip
    folder = write_folder(sae, place / "sae")

    def rehash() -> None:
        names = ("cfg.json", "sae_weights.safetensors")
        hashes = {name: file_hash(folder / name) for name in names}
        (folder / "mi_weightspace_hashes.json").write_text(json.dumps(hashes))

    read = lambda: read_folder(folder)  # noqa: E731
    hashes = (folder / "mi_weightspace_hashes.json",)
    return [
        Format("directions", direction, lambda: load_directions(direction), "header",
               _resealed(direction, "mi_weightspace.direction")),
        Format("bare direction", bare, lambda: load_directions(bare, layer=0), "header"),
        Format("bands", bands, lambda: load_bands(bands), "header",
               _resealed(bands, "mi_weightspace.bands")),
        Format("journal entry", entry, lambda: journal.read(entry, site), "header",
               _resealed(entry, "components")),
        Format("SAE settings", folder / "cfg.json", read, "all", rehash, hashes),
        Format("SAE weights", folder / "sae_weights.safetensors", read, "header", rehash, hashes),
        Format("SAE hashes", folder / "mi_weightspace_hashes.json", read, "all"),
    ]  # fmt: skip


def _runs(place: Path) -> list[Format]:
    base = place / "site"
    tuned = toy.save_tiny("llama", place / "tuned", seed=1)
    run = place / "run"
    args = ["svd", str(base), str(tuned), "--rank=1", "--sites=blocks.0.mlp.out", "--quiet"]
    assert main([*args, "--out", str(run)]) == 0

    def rehash() -> None:
        try:
            record = json.loads((run / "report.json").read_text())
            names = [n for n in record["files"] if (run / n).is_file()]
            record["files"] |= {n: file_hash(run / n) for n in names}
            record[SEAL] = digest_of(record, without=(SEAL,))
            (run / "report.json").write_text(json.dumps(record))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            return

    state = place / "state-00000001"
    state.mkdir()
    for name in ("shared.safetensors", "sources-0.safetensors"):
        save_file({"a": torch.ones(3)}, state / name)
    vpd_state.write_record(state, {
        "step": 1, "config": {"seed": 0}, "config_hash": "c", "host": "h", "sites": {"s": [4]},
        "scale": 1.5, "frequency_count": 3, "world": 1, "fast_float32": False,
    })  # fmt: skip

    def restated() -> None:
        try:
            record = json.loads((state / "state.json").read_text())
            record[SEAL] = digest_of(record, without=(SEAL,))
            (state / "state.json").write_text(json.dumps(record))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return

    read = lambda: load_report(run)  # noqa: E731
    record = (run / "report.json",)
    return [
        Format("run record", run / "report.json", read, "all", rehash),
        Format("run arrays", run / "arrays.safetensors", read, "header", rehash, record),
        Format("run table", run / "table.parquet", read, "none", rehash, record),
        Format("run settings", run / "config.yaml", read),
        Format("vpd state", state / "state.json", lambda: vpd_state.read_tensors(
            state, vpd_state.read_record(state)), "all", restated),
    ]  # fmt: skip


def _models(place: Path) -> list[Format]:
    from trust_models import save_adapter

    model, adapter = place / "site", save_adapter(place / "adapter", place / "site")
    shards = toy.save_tiny("llama", place / "shards", max_shard_size="40KB")
    parts = place / "components.safetensors"
    save_file({"model.layers.0.mlp.down_proj.V": torch.ones(96, 2),
               "model.layers.0.mlp.down_proj.U": torch.ones(2, 32)}, parts)  # fmt: skip
    lens = mw.load(str(model), verify=False)
    return [
        Format("config.json", model / "config.json", lambda: open_path(model), "all"),
        Format("weights", model / "model.safetensors", lambda: open_path(model), "header"),
        Format("index", shards / "model.safetensors.index.json", lambda: open_path(shards), "all"),
        Format("adapter settings", adapter / "adapter_config.json", lambda: open_path(adapter),
               "all"),
        Format("adapter", adapter / "adapter_model.safetensors", lambda: open_path(adapter),
               "header"),
        Format("component weights", parts, lambda: import_components(parts, lens), "header"),
    ]  # fmt: skip


# ---- damage --------------------------------------------------------------------------------
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, math.nan, math.inf, "",
    "x", "0", "\0", "\ud800", "../x", "a" * 300, [], [[]], {}, {"": None}, [None], [1, "a"], "NaN",
    "resid_post.0", "blocks.0.mlp.out", "F32", "²", "\u2028",
)  # fmt: skip


def spoilt_value(value: Any, draw: np.random.Generator, depth: int = 0) -> Any:
    """`value` with one thing in it changed, left out, doubled or replaced."""
    if isinstance(value, dict) and value and (depth == 0 or draw.random() < 0.8):
        key = list(value)[draw.integers(len(value))]
        match int(draw.integers(6)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return value | {str(ODD[draw.integers(len(ODD))]): ODD[draw.integers(len(ODD))]}
            case 2:
                return {(k if k != key else k + "_"): v for k, v in value.items()}
            case _:
                return value | {key: spoilt_value(value[key], draw, depth + 1)}
    if isinstance(value, list) and value and draw.random() < 0.6:
        at = int(draw.integers(len(value)))
        match int(draw.integers(4)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, value[at]]
            case _:
                return [*value[:at], spoilt_value(value[at], draw, depth + 1), *value[at + 1 :]]
    return ODD[draw.integers(len(ODD))]


def spoilt_bytes(data: bytes, draw: np.random.Generator) -> bytes:
    """`data` with bits flipped, bytes replaced, cut, put in, moved or repeated."""
    own, n = bytearray(data), max(1, len(data))
    for _ in range(int(draw.integers(1, 4))):
        at = int(draw.integers(n)) if draw.random() < 0.5 else int(draw.integers(min(n, 200)))
        at, size = min(at, max(0, len(own) - 1)), int(draw.integers(1, 9))
        match int(draw.integers(7)):
            case 0 if own:
                own[at] ^= 1 << int(draw.integers(8))
            case 1 if own:
                own[at] = int(draw.integers(256))
            case 2:
                own[at:at] = draw.bytes(size)
            case 3:
                del own[at : at + size]
            case 4:
                del own[at:]
            case 5:
                own[at:at] = own[max(0, at - size) : at] * int(draw.integers(1, 4))
            case _:
                words = (b"null", b"NaN", b"-1", b'"', b"{", b"]", b"\\u0000", b"\xff", b"1e999")
                own[at : at + size] = words[draw.integers(len(words))]
    return bytes(own)


def spoilt_json(data: bytes, where: str, draw: np.random.Generator) -> bytes:
    """A file whose JSON is well-formed and says something else."""
    if where == "lines":
        lines = data.decode().split("\n")
        at = int(draw.integers(len(lines)))
        lines[at] = json.dumps(spoilt_value(json.loads(lines[at]), draw))
        return "\n".join(lines).encode()
    if where == "all":
        return json.dumps(spoilt_value(json.loads(data), draw)).encode()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = [k for k, v in header.get("__metadata__", {}).items() if v.startswith("{")]
    if inner and draw.random() < 0.7:
        record = spoilt_value(json.loads(header["__metadata__"][inner[0]]), draw)
        header["__metadata__"][inner[0]] = json.dumps(record)
    else:
        header = spoilt_value(header, draw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def case(own: Format, whole: bytes, draw: np.random.Generator) -> str | None:
    """One spoilt file read; what is wrong, or None."""
    try:
        shape = own.json != "none" and draw.random() < 0.5
        data = spoilt_json(whole, own.json, draw) if shape else spoilt_bytes(whole, draw)
    except (UnicodeEncodeError, ValueError):
        return None
    own.file.write_bytes(data)
    if own.reseal is not None and draw.random() < 0.7:
        own.reseal()
    try:
        own.read()
    except WeightspaceError:
        return None
    except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
        return f"{own.name}: {type(error).__name__}: {str(error)[:140]} <- {data[:300]!r}"
    return None
