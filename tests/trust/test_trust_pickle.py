"""No pickle is reachable: the readers under a trap, and planted payloads that must not run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trust_counter import Figure
from trust_models import save_adapter, sound

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main
from mi_weightspace.core.direction_io import load_directions
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.monitor_io import load_bands
from mi_weightspace.core.report import load_report
from mi_weightspace.models.sources import open_path
from mi_weightspace.vpd.corpus import read_tokens
from mi_weightspace.vpd.exchange import import_components
from probes.sae_disk import read_folder

NAME, UNIT = "no pickle reachable", "planted payloads"
LEGACY = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth")


class Payload:
    """Unpickled, it writes a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def payloads(marker: Path) -> dict[str, bytes]:
    """The payload in each container that some library would open."""
    zipped, array, legacy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"w": Payload(marker)}, zipped)
    torch.save({"w": Payload(marker)}, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Payload(marker)),
        "torch zip": zipped.getvalue(),
        "torch legacy": legacy.getvalue(),
        "npy": array.getvalue(),
    }


def readers(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Every reader of a file or folder of the package, by what it takes."""
    return {
        "direction": lambda f: load_directions(f, layer=0),
        "bands": load_bands,
        "contrasts": lambda f: probes.load_contrasts(str(f)),
        "labelled": lambda f: probes.load_labelled(str(f)),
        "components": lambda f: import_components(str(folder), f),
        "tokens": lambda f: read_tokens(str(f), 8),
        "vpd config": mw.vpd.read_config,
        "model": lambda f: mw.load(str(f)),
    }


SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".npy", ".npz", ".joblib", ".safetensors", ".jsonl",
            ".parquet", ".json", ".yaml")  # fmt: skip


def test_planted_files(tmp_path: Path) -> None:
    """Each payload under each ending, given to each reader of a file."""
    marker = tmp_path / "ran"
    model = sound(tmp_path, "llama")
    with Figure(NAME, UNIT, "4 containers × 12 endings given to 8 readers of files") as figure:
        for container, data in payloads(marker).items():
            for suffix in SUFFIXES:
                file = tmp_path / f"planted{suffix}"
                file.write_bytes(data)
                for name, read in readers(model).items():
                    what = f"{container} as {suffix} to {name}"
                    figure.add(problem=_run(lambda r=read, f=file: r(f), marker, what))


def _run(act: Callable[[], Any], marker: Path, what: str) -> str | None:
    try:
        act()
    except WeightspaceError:
        said = None
    except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
        said = f"{what}: {type(error).__name__}: {str(error)[:100]}"
    else:
        said = f"{what}: read"
    if marker.exists():
        marker.unlink()
        return f"{what}: THE PAYLOAD RAN"
    return said


def test_planted_folders(tmp_path: Path) -> None:
    """Checkpoints, adapters, SAEs and runs with a payload beside, or instead of, their files."""
    marker = tmp_path / "ran"
    base = sound(tmp_path, "llama")
    adapter = save_adapter(tmp_path / "adapter", base)
    args = ["svd", str(base), str(adapter), "--rank=2", "--sites=blocks.0.mlp.out", "--quiet"]
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    kinds: list[tuple[str, Path, str, Callable[[Path], Any], tuple[str, ...]]] = [
        ("checkpoint", base, "model.safetensors", open_path, LEGACY),
        ("checkpoint run", base, "model.safetensors", lambda f: mw.load(str(f)), LEGACY),
        ("adapter", adapter, "adapter_model.safetensors", open_path, ("adapter_model.bin",)),
        ("run", tmp_path / "run", "arrays.safetensors", load_report, ("arrays.pt", "table.pkl")),
        ("SAE", tmp_path / "sae", "sae_weights.safetensors", read_folder, ("sae.pt", "ae.pt")),
    ]
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps({"architecture": "standard"}))
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"")
    with Figure(NAME, UNIT, "checkpoints, adapters, SAEs, runs with only a pickle") as figure:
        for name, source, real, read, planted in kinds:
            for container, data in payloads(marker).items():
                for file in (*planted, real):
                    folder = shutil.copytree(source, tmp_path / "case")
                    (folder / real).unlink()
                    (folder / file).write_bytes(data)
                    what = f"{name}: {container} as {file}"
                    figure.add(problem=_run(lambda r=read, f=folder: r(f), marker, what))
                    shutil.rmtree(folder)


def test_code_in_a_folder_does_not_run(tmp_path: Path) -> None:
    """``auto_map`` and a module beside the weights: custom code is never imported."""
    marker = tmp_path / "ran"
    folder = sound(tmp_path, "llama")
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in ("modeling_mine", "configuration_mine", "tokenization_mine"):
        (folder / f"{name}.py").write_text(code + "class Mine: ...\n")
    mapped = {
        "AutoConfig": "configuration_mine.Mine",
        "AutoModelForCausalLM": "modeling_mine.Mine",
        "AutoTokenizer": ["tokenization_mine.Mine", None],
    }
    with Figure(NAME, UNIT, "custom code beside the weights (auto_map)") as figure:
        for file in ("config.json", "tokenizer_config.json"):
            record = json.loads((folder / file).read_text()) | {"auto_map": mapped}
            (folder / file).write_text(json.dumps(record))
            for act in (lambda: open_path(folder).fingerprint, lambda: mw.load(str(folder))):
                with contextlib.suppress(WeightspaceError):
                    act()
                figure.add(problem=f"{file}: the code ran" if marker.exists() else None)


def test_the_trap_closes(tmp_path: Path, unpickling: list[str]) -> None:
    """The suite's trap sees an unpickler called from the package, whichever way."""
    data, seen = pickle.dumps({"a": 1}), len(unpickling)
    name = str(Path(mw.__file__).parent / "reader.py")
    for call in ("pickle.loads(data)", "pickle.load(io.BytesIO(data))",
                 "pickle.Unpickler(io.BytesIO(data)).load()"):  # fmt: skip
        code = compile(call, name, "exec")
        with pytest.raises(AssertionError, match="unpickled"):
            exec(code, {"pickle": pickle, "io": io, "data": data})
    assert len(unpickling) == seen + 3
    del unpickling[seen:]
    assert pickle.loads(data) == {"a": 1}, "others may"


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not (tmp_path / "ran").exists()
