"""A flipped bit in any artefact is noticed; a replay on other inputs is refused.

Every case flips one bit of one file, at a random place of data or header, and reads it with the
reader that a user would: either a refusal, or exactly what was written (some bits of a JSON text
carry nothing, such as the case of an exponent's ``e``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from trust_counter import Figure, bounded
from trust_models import WEIGHTS, save_adapter, sound

import mi_weightspace as mw
from mi_weightspace.cli import main
from mi_weightspace.core.components import Components
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import load_directions, save_direction
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.monitor import Bands, Watch
from mi_weightspace.core.monitor_io import load_bands, save_bands
from mi_weightspace.core.report import load_report
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.sae_parts import SaeMetadata
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.weights import CheckpointSource
from mi_weightspace.spectral import journal
from mi_weightspace.vpd import state as vpd_state
from probes.sae_disk import read_folder, write_folder

NAME, UNIT = "integrity", "flipped bits"
Reader = Callable[[Path], Any]


def text(value: Any) -> str:
    """Everything a value holds, exactly."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.double().tolist()}"
    if isinstance(value, pd.DataFrame):
        return f"{list(value.columns)}{value.dtypes.tolist()}{value.to_numpy().tolist()}"
    if isinstance(value, dict):
        return repr({k: text(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return repr([text(v) for v in value])
    if hasattr(value, "__dataclass_fields__"):
        return repr({k: text(getattr(value, k)) for k in value.__dataclass_fields__})
    return repr(value)


def flips(file: Path, n: int, *names: str) -> list[tuple[int, int]]:
    """n (byte, bit) of a file: half of them in its first kilobyte, where headers are."""
    draw, size = generator(0, "flips", *names), file.stat().st_size
    near = torch.randint(0, min(size, 1024), (n - n // 2,), generator=draw)
    far = torch.randint(0, size, (n // 2,), generator=draw)
    bits = torch.randint(0, 8, (n,), generator=draw)
    return list(zip(torch.cat([near, far]).tolist(), bits.tolist(), strict=True))


def check_flips(figure: Figure, folder: Path, name: str, n: int, read: Reader) -> None:
    """Flip bits of ``folder/name`` one at a time; `read` is given the folder."""
    before, file = text(read(folder)), folder / name
    whole = file.read_bytes()
    for at, bit in flips(file, n, folder.name, name):
        data = bytearray(whole)
        data[at] ^= 1 << bit
        file.write_bytes(data)
        figure.add(
            problem=noticed(read, folder, before, f"{folder.name}/{name} byte {at} bit {bit}")
        )
    file.write_bytes(whole)
    assert text(read(folder)) == before


def noticed(read: Reader, folder: Path, before: str, what: str) -> str | None:
    try:
        with bounded():
            after = text(read(folder))
    except WeightspaceError:
        return None
    except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
        return f"{what}: {type(error).__name__}: {str(error)[:100]}"
    return None if after == before else f"{what}: read as something else"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a tuned model, an adapter, and an svd run of the command line."""
    place = tmp_path_factory.mktemp("runs")
    base = sound(place / "base", "llama")
    tuned = mw.toy.save_tiny("llama", place / "tuned", seed=1)
    save_adapter(place / "adapter", base)
    args = [str(base), str(tuned), "--rank=2", "--sites=blocks.0.mlp.*", "--quiet"]
    assert main(["svd", *args, "--out", str(place / "run")]) == 0
    return place


def test_run_folders(folders: Path) -> None:
    with Figure(
        NAME, UNIT, "each file of a run folder: record, arrays, tables, settings"
    ) as figure:
        for file in sorted((folders / "run").iterdir()):
            check_flips(figure, folders / "run", file.name, 60, _whole_report)


def _whole_report(folder: Path) -> Any:
    found = load_report(folder)
    return [found.table, dict(found.tables), dict(found.arrays), found.verdicts, found.config,
            found.inputs, found.reservations, found.timings, found.versions]  # fmt: skip


def test_journal_entries(folders: Path, tmp_path: Path) -> None:
    source = CheckpointSource(folders / "base" / "llama")
    site = source.site("blocks.0.mlp.out")
    draw = generator(1, "journal")
    parts = Components(
        site,
        torch.randn(3, site.d_in, generator=draw),
        torch.randn(3, site.d_out, generator=draw),
        torch.tensor([3.0, 2.0, 1.0]),
        stage="sft",
        facts={"fro": 1.25, "edge": float("inf"), "resolved": True},
    )
    journal.write(tmp_path / "entry.safetensors", parts)
    with Figure(NAME, UNIT, "journal entries of a sweep") as figure:
        read = lambda f: journal.read(f / "entry.safetensors", site)  # noqa: E731
        check_flips(figure, tmp_path, "entry.safetensors", 200, read)


def test_directions_and_bands(tmp_path: Path) -> None:
    draw = generator(2, "direction")
    rows = [
        Direction(
            torch.randn(16, generator=draw),
            mw.Space("resid_post", layer),
            label="authority",
            filter=torch.randn(16, generator=draw),
            scale=2.5,
            stage="sft",
            fit={"auroc": 0.9, "n": 40},
            mean=torch.randn(16, generator=draw),
            control_patterns=torch.eye(16)[:3],
            control_names=("a", "b", "c"),
        )
        for layer in range(2)
    ]
    save_direction(rows, tmp_path / "d.safetensors")
    watch = Watch("blocks.0.mlp.out", "write", "resid_post.0", torch.eye(16)[:4], (0, 1, 2, 3))
    save_bands(
        Bands((watch,), (-torch.ones(4),), (torch.ones(4),), n=99), tmp_path / "b.safetensors"
    )
    with Figure(NAME, UNIT, "direction files; bands of a monitor") as figure:
        read = lambda f: load_directions(f / "d.safetensors")  # noqa: E731
        check_flips(figure, tmp_path, "d.safetensors", 200, read)
        check_flips(
            figure, tmp_path, "b.safetensors", 200, lambda f: load_bands(f / "b.safetensors")
        )


def test_sae_folders(tmp_path: Path) -> None:
    draw = generator(3, "sae")
    sae = Sae(
        "jumprelu",
        torch.randn(8, 12, generator=draw),
        torch.randn(12, 8, generator=draw),
        torch.zeros(8),
        b_enc=torch.zeros(12),
        threshold=torch.ones(12),
        metadata=SaeMetadata(hook_name="blocks.1.hook_resid_post", model_name="tiny"),
    )
    write_folder(sae, tmp_path / "sae")
    with Figure(NAME, UNIT, "SAE folders written here") as figure:
        for file in sorted((tmp_path / "sae").iterdir()):
            if "hashes" in file.name:
                continue  # guards the other two; damage to it is refused or changes nothing
            check_flips(figure, tmp_path / "sae", file.name, 150, read_folder)


def test_training_states(tmp_path: Path) -> None:
    """A VPD checkpoint: the record and each tensor file, by what `restore_state` reads first."""
    from safetensors.torch import save_file

    folder = tmp_path / "state-00000004"
    folder.mkdir()
    draw = generator(4, "state")
    for name in ("shared.safetensors", "sources-0.safetensors"):
        save_file({"a": torch.randn(40, generator=draw)}, folder / name)
    record = {
        "step": 4, "config": {"seed": 0}, "config_hash": "c", "host": "h", "sites": {"s": [4]},
        "scale": 1.5, "frequency_count": 3, "world": 1, "fast_float32": False,
    }  # fmt: skip
    vpd_state.write_record(folder, record)

    def read(place: Path) -> Any:
        found = vpd_state.read_record(place)
        return [found, vpd_state.read_tensors(place, found)]

    with Figure(NAME, UNIT, "training states of a decomposition") as figure:
        for file in sorted(folder.iterdir()):
            check_flips(figure, folder, file.name, 100, read)


# ---- inputs --------------------------------------------------------------------------------
def test_a_replay_reads_the_files_the_run_read(folders: Path, tmp_path: Path) -> None:
    """One bit of a weight, at places no fingerprint samples: the replay names the file."""
    record = json.loads((folders / "run" / "report.json").read_text())["config"]["input_files"]
    weights = folders / "tuned" / WEIGHTS
    assert record[str(weights)]["size"] == weights.stat().st_size
    whole = weights.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    places = torch.randint(begin, len(whole), (20,), generator=generator(5, "replay")).tolist()
    with Figure(NAME, UNIT, "checkpoint files between a run and its replay") as figure:
        for number, at in enumerate(places):
            data = bytearray(whole)
            data[at] ^= 1  # the lowest bit of some byte: the weights stay finite
            weights.write_bytes(data)
            out = tmp_path / f"out{number}"
            code = main(["replay", str(folders / "run"), "--quiet", "--out", str(out)])
            bad = code != 1 or out.exists()
            figure.add(problem=f"byte {at}: exit {code}" if bad else None)
    weights.write_bytes(whole)
    assert main(["replay", str(folders / "run"), "--quiet", "--out", str(tmp_path / "same")]) == 0


def test_every_input_counts(folders: Path, tmp_path: Path, capsys: Any) -> None:
    """Configuration, tokenizer, an adapter and its base; a file that is gone."""
    base, adapter = folders / "base" / "llama", folders / "adapter"
    args = ["svd", str(base), str(adapter), "--rank=2", "--sites=blocks.0.mlp.out", "--quiet"]
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "report.json").read_text())["config"]["input_files"]
    named = {Path(name).name for name in record}
    assert {"model.safetensors", "config.json", "tokenizer.json", "adapter_config.json",
            "adapter_model.safetensors"} <= named  # fmt: skip
    with Figure(NAME, UNIT, "a line added to, or the loss of, any input file") as figure:
        for number, name in enumerate(record):
            for change in ("longer", "gone"):
                file, kept = Path(name), tmp_path / "kept"
                shutil.copy2(file, kept)
                file.write_bytes(file.read_bytes() + b" ") if change == "longer" else file.unlink()
                out = tmp_path / f"{number}{change}"
                code = main(["replay", str(tmp_path / "run"), "--quiet", "--out", str(out)])
                said = capsys.readouterr().err
                good = code == 1 and file.name in said and not out.exists()
                figure.add(problem=None if good else f"{file.name} {change}: {code} {said[:150]}")
                shutil.copy2(kept, file)


def test_without_hashes(folders: Path, tmp_path: Path) -> None:
    args = [str(folders / "base" / "llama"), str(folders / "tuned"), "--rank=2", "--quiet"]
    out = tmp_path / "run"
    assert main(["svd", *args, "--sites=blocks.0.mlp.out", "--no-hash", "--out", str(out)]) == 0
    assert "input_files" not in load_report(out).config
    assert main(["replay", str(out), "--quiet", "--out", str(tmp_path / "again")]) == 0
    assert "input_files" not in load_report(tmp_path / "again").config
