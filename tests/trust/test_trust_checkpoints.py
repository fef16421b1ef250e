"""Damaged checkpoints: one typed refusal that names the file or the key, in bounded time.

A sound copy of each folder is read first, so a refusal is the damage's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import trust_damage as damage
from trust_counter import Figure, Hang, bounded
from trust_models import FAMILIES, INDEX, WEIGHTS, Case, copied, raw, save_adapter, sound

import mi_weightspace as mw
from mi_weightspace.cli import main
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.models.sources import open_path

NAME, UNIT = "malformed checkpoints", "folders"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sound")


def use(folder: Path, against: Path, live: bool) -> None:
    """Everything a sweep reads; for `live` damage also a running model."""
    lineage = mw.load_lineage(before=against, after=folder)
    lineage.check()
    if live:
        with lineage.opened("after"):
            pass


def refused(case: Case, folder: Path, against: Path) -> str | None:
    """What is wrong with how a damaged folder is treated; None where it is refused well."""
    try:
        with bounded():
            use(folder, against, case.live)
    except WeightspaceError as error:
        said = str(error)
        if not any(name in said for name in case.names):
            return f"{case.name}: names none of {case.names}: {said[:200]}"
        return None if error.remedy else f"{case.name}: no remedy"
    except Hang as error:
        return f"{case.name}: hangs ({error})"
    except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
        return f"{case.name}: {type(error).__name__}: {str(error)[:150]}"
    return f"{case.name}: read without a word"


def run(figure: Figure, cases: Iterable[Case], source: Path, against: Path, tmp: Path) -> None:
    use(source, against, True)  # sound before
    for number, case in enumerate(cases):
        folder = copied(source, tmp / f"case{number}", case.damage)
        figure.add(problem=refused(case, folder, against))


def test_damaged_files(place: Path, tmp_path: Path) -> None:
    source = sound(place, "llama")
    header, _ = raw(source / WEIGHTS)
    size = (source / WEIGHTS).stat().st_size
    length = int.from_bytes((source / WEIGHTS).read_bytes()[:8], "little")
    keys = [k for k in header if k.endswith("mlp.up_proj.weight")]
    cases = [
        *damage.cut_cases(size, length),
        *damage.length_cases(),
        *damage.header_cases(keys[0], keys[1]),
        *damage.file_cases(),
    ]
    tried = "files cut, lengthened, replaced; header lies: length, dtype, shape, offsets, JSON"
    with Figure(NAME, UNIT, tried) as figure:
        run(figure, cases, source, source, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_tensors(family: str, place: Path, tmp_path: Path) -> None:
    source = sound(place, family)
    tried = "each tensor left out; transposed, shorter, int8, zero-length, 3-d (7 families)"
    with Figure(NAME, UNIT, tried) as figure:
        run(figure, damage.tensor_cases(source), source, source, tmp_path)


def test_damaged_indices(place: Path, tmp_path: Path) -> None:
    source = sound(place, "llama", sharded=True)
    outside = place / "outside"
    outside.mkdir()
    for shard in source.glob("model-*.safetensors"):
        (outside / shard.name).write_bytes(shard.read_bytes())
    assert (source / INDEX).is_file()
    tried = "indices naming what is absent, outside, no file; shards gone, halved, linked, a pipe"
    with Figure(NAME, UNIT, tried) as figure:
        run(figure, damage.index_cases(source, outside), source, source, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_damaged_configurations(family: str, place: Path, tmp_path: Path) -> None:
    source = sound(place, family)
    tried = "config.json: fields of 13 wrong kinds, absent, twice, nested, no JSON (5 families)"
    with Figure(NAME, UNIT, tried) as figure:
        run(figure, damage.config_cases(family), source, source, tmp_path)


def test_damaged_adapters(place: Path, tmp_path: Path) -> None:
    base = sound(place, "llama")
    source = save_adapter(place / "adapter", base)
    tried = "adapters: r, alpha, targets, patterns, base, tensors, a pickle"
    with Figure(NAME, UNIT, tried) as figure:
        run(figure, damage.adapter_cases(source), source, base, tmp_path)


def test_a_refused_folder_leaves_no_run(place: Path, tmp_path: Path, capsys: object) -> None:
    """The command line: exit code 1, nothing written, whatever was refused."""
    source = sound(place, "llama")
    header, _ = raw(source / WEIGHTS)
    key, other = [k for k in header if k.endswith("mlp.up_proj.weight")][:2]
    cases = [*damage.header_cases(key, other), *damage.file_cases()][::4]
    with Figure(NAME, UNIT, "`svd` on them: exit code 1, no run folder") as figure:
        for number, case in enumerate(cases):
            folder = copied(source, tmp_path / f"case{number}", case.damage)
            out = tmp_path / f"out{number}"
            code = main(
                ["svd", str(source), str(folder), "--rank", "2", "--quiet", "--out", str(out)]
            )
            left = [p.name for p in tmp_path.iterdir() if f"out{number}" in p.name]
            wrong = f"{case.name}: exit {code}, left {left}" if code != 1 or left else None
            figure.add(problem=wrong)
    assert open_path(source).shape.n_layers == 2
