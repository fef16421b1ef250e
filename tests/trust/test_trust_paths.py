"""Names from outside never lead out of a folder, and nothing but the target is ever written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from trust_counter import Figure, Hang, bounded
from trust_models import INDEX, WEIGHTS, edit_json, save_adapter, sound

import mi_weightspace as mw
from mi_weightspace.cli import main
from mi_weightspace.core import report as report_module
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import load_directions, save_direction
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.json_io import digest_of
from mi_weightspace.core.monitor import Bands, Watch
from mi_weightspace.core.monitor_io import save_bands
from mi_weightspace.core.report import Report, load_report
from mi_weightspace.core.sae import Sae
from mi_weightspace.html_report import write_report
from mi_weightspace.models.sources import open_path
from probes.sae_disk import read_folder, write_folder

NAME, UNIT = "path safety", "names and places"
ODD = {
    "parent": "../stolen",
    "deep parent": "../../../../../../../../etc/stolen",
    "absolute": "/etc/stolen",
    "below": "a/b",
    "backslash": "..\\stolen",
    "dot": ".",
    "dots": "..",
    "empty": "",
    "nul": "a\0b",
    "newline": "a\nb",
    "escape": "\x1b[2J",
    "long": "n" * 3000,
    "right-to-left": "\u202ea",
    "lone surrogate": "\ud800",
    "home": "~/stolen",
    "variable": "$HOME/stolen",
    "space": " ",
}


def tree(place: Path) -> dict[str, Any]:
    """Everything under a folder: names, sizes, times; links as links."""
    found = {}
    for path in sorted(place.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(place))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


def tried(
    act: Callable[[], Any], guarded: Path, what: str, *, may_work: bool = False
) -> str | None:
    """What is wrong: no refusal, or something under `guarded` that changed."""
    before, wrong = tree(guarded), None
    try:
        with bounded():
            act()
        if not may_work:
            wrong = f"{what}: taken"
    except WeightspaceError:
        pass
    except Hang:
        wrong = f"{what}: hangs"
    except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
        wrong = f"{what}: {type(error).__name__}: {str(error)[:120]}"
    return wrong or (None if tree(guarded) == before else f"{what}: changed something elsewhere")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """(a folder to work in, a folder beside it that nothing may touch)."""
    guarded, inside = tmp_path / "stolen", tmp_path / "work"
    guarded.mkdir()
    inside.mkdir()
    (guarded / "secret.txt").write_text("secret")
    return inside, guarded


def example() -> Report:
    kind = report_module._known_kinds()["audit"]
    return kind(table=pd.DataFrame({"a": [1.0]}), arrays={"x": torch.ones(2)})


def altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A record as a hostile writer would make it: hash and all."""
    record = json.loads((folder / "report.json").read_text())
    change(record)
    record["sha256"] = digest_of(record, without=("sha256",))
    (folder / "report.json").write_text(json.dumps(record))


def test_names_in_files(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inside, guarded = places
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = mw.toy.save_tiny("llama", inside / "model", max_shard_size="20KB")
    for shard in model.glob("*.safetensors"):
        shutil.copy2(shard, guarded / shard.name)
    run = example().save(inside / "run")
    first = sorted(json.loads((model / INDEX).read_text())["weight_map"].items())[0]
    with Figure(NAME, UNIT, "names in indices, run folders, adapters") as figure:
        for name, odd in ODD.items():
            for value in (odd, odd if name == "empty" else f"{odd}/{first[1]}"):
                folder = shutil.copytree(model, inside / "case")
                edit_json(INDEX, lambda r, v=value: r["weight_map"].update({first[0]: v}))(folder)
                figure.add(problem=tried(lambda f=folder: open_path(f), guarded, f"index {name}"))
                shutil.rmtree(folder)
            for change in (
                lambda r, v=odd: r["files"].update({v: "0" * 64}),
                lambda r, v=odd: r["tables"].append(v),
                lambda r, v=odd: r.update(kind=v),
            ):
                folder = shutil.copytree(run, inside / "case")
                altered(folder, change)
                figure.add(
                    problem=tried(lambda f=folder: load_report(f), guarded, f"run folder {name}")
                )
                shutil.rmtree(folder)
        base = sound(inside, "llama")
        adapter = save_adapter(inside / "adapter", base)
        for name, odd in ODD.items():
            edit_json("adapter_config.json", lambda r, v=odd: r.update(base_model_name_or_path=v))(
                adapter
            )
            figure.add(problem=tried(lambda: open_path(adapter), guarded, f"adapter base {name}"))


def test_names_of_tables_and_files_to_write(places: tuple[Path, Path]) -> None:
    """A table's name becomes a file's: never one outside the run folder."""
    inside, guarded = places
    kind = report_module._known_kinds()["audit"]
    frame = pd.DataFrame({"a": [1.0]})
    with Figure(NAME, UNIT, "names of tables that are saved") as figure:
        for name, odd in ODD.items():
            report = kind(table=frame, tables={odd: frame})
            act = lambda r=report: r.save(inside / "run")  # noqa: E731
            fine = name in ("space", "dot", "dots", "empty")  # table_...parquet
            figure.add(problem=tried(act, guarded, f"table {name}", may_work=fine))
            left = sorted(str(p.relative_to(inside)) for p in inside.rglob("*"))
            wrong = [p for p in left if fine and not p.startswith("run")] if fine else left
            figure.add(problem=f"table {name}: left {wrong}" if wrong else None)
            if fine:
                assert load_report(inside / "run").equals(report)
                shutil.rmtree(inside / "run")


def writers() -> dict[str, Callable[[Path], Any]]:
    direction = Direction(torch.ones(4), mw.Space("resid_post", 0))
    watch = Watch("blocks.0.mlp.out", "write", "resid_post.0", torch.eye(4)[:1], (0,))
    bands = Bands((watch,), (-torch.ones(1),), (torch.ones(1),), n=9)
    sae = Sae("standard", torch.ones(4, 6), torch.ones(6, 4), torch.zeros(4), b_enc=torch.zeros(6))
    return {
        "report": lambda p: example().save(p),
        "direction": lambda p: save_direction(direction, p),
        "bands": lambda p: save_bands(bands, p),
        "page": lambda p: write_report([example()], p),
        "SAE": lambda p: write_folder(sae, p),
    }


def test_places_to_write(places: tuple[Path, Path]) -> None:
    """Output paths that are taken, links, files, impossible names: refused, or written there."""
    inside, guarded = places
    (inside / "file").write_text("mine")
    (inside / "full").mkdir()
    (inside / "full" / "mine.txt").write_text("mine")
    (inside / "to-guarded").symlink_to(guarded)
    (inside / "to-file").symlink_to(guarded / "secret.txt")
    (inside / "loop").symlink_to("loop")
    taken = ("file", "full", "file/below", "to-guarded", "to-file", "loop", "loop/below")
    odd = [v for k, v in ODD.items() if k in ("nul", "long", "lone surrogate", "dot", "dots")]
    with Figure(NAME, UNIT, "output paths given to 5 writers and the command line") as figure:
        for what, write in writers().items():
            for name in (*taken, *odd):
                if what == "SAE" and name in ("full", "to-guarded", ".", ".."):
                    continue  # an SAE's folder may hold other files
                act = lambda w=write, n=name: w(Path(f"{inside}/{n}"))  # noqa: E731
                figure.add(problem=tried(act, guarded, f"{what} to {name[:20]!r}"))
        assert (inside / "file").read_text() == (inside / "full" / "mine.txt").read_text() == "mine"
        strange = [p.name for p in inside.iterdir() if p.name not in _ALLOWED]
        figure.add(problem=f"left behind: {strange}" if strange else None)
        base = sound(inside / "m", "llama")
        for name in (*taken, *odd):
            code = main(["svd", str(base), str(base), "--sites=blocks.0.mlp.out", "--quiet",
                         "--out", f"{inside}/{name}"])  # fmt: skip
            refused = code in (1, 2)  # 2: a path the command line cannot hold
            figure.add(problem=None if refused else f"svd --out {name[:20]!r}: exit {code}")
        strange = [p.name for p in inside.iterdir() if p.name not in _ALLOWED | {"m"}]
        figure.add(problem=f"left behind: {strange}" if strange else None)


_ALLOWED = {"file", "full", "to-guarded", "to-file", "loop"}


def test_odd_names_that_are_fine(places: tuple[Path, Path]) -> None:
    """Unicode, spaces, dashes and dots are names like others: written there, read back."""
    inside, guarded = places
    readers: dict[str, Callable[[Path], Any]] = {
        "report": load_report,
        "direction": load_directions,
        "SAE": read_folder,
    }
    fine = ("ünï cødé", "-rf", "a..b", "…", "名前", "a'b\"c", "$HOME", "*", "x" * 180, " lead")
    with Figure(NAME, UNIT, "unusual names that are fine: written there and read back") as figure:
        for name in fine:
            for what, read in readers.items():
                target = inside / what / name
                target.parent.mkdir(exist_ok=True)
                write = writers()[what]
                act = lambda w=write, r=read, t=target: (w(t), r(t))  # noqa: E731
                problem = tried(act, guarded, f"{what} at {name!r}", may_work=True)
                figure.add(problem=problem or (None if target.exists() else f"{name!r}: nowhere"))


def test_links_inside_inputs_are_read_and_never_written(places: tuple[Path, Path]) -> None:
    """The hub's cache is made of links, so they are followed; what they point to stays as it is."""
    inside, guarded = places
    model = sound(inside, "llama")
    for file in model.iterdir():
        shutil.move(file, guarded / file.name)
        file.symlink_to(guarded / file.name)
    copy = shutil.copytree(model, inside / "copy")
    held = load_file(copy / WEIGHTS)
    assert held
    with Figure(NAME, UNIT, "a checkpoint made of links: read, nothing behind them changed") as f:
        args = ["svd", str(model), str(copy), "--sites=blocks.0.mlp.out", "--quiet"]
        act = lambda: main([*args, "--out", str(inside / "out")])  # noqa: E731
        f.add(problem=tried(act, guarded, "svd over links", may_work=True))
        f.add(problem=None if (inside / "out" / "report.json").is_file() else "no run")


def test_a_run_without_rights(places: tuple[Path, Path]) -> None:
    _, guarded = places
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    guarded.chmod(0o500)
    with Figure(NAME, UNIT, "a folder that may not be written") as figure:
        for what, write in writers().items():
            act = lambda w=write: w(guarded / "new")  # noqa: E731
            figure.add(problem=tried(act, guarded, f"{what} without rights"))
    guarded.chmod(0o700)
