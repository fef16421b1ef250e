"""What a killed writer leaves is removed by the next one; what a living one writes never is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from trust_counter import Figure

import mi_weightspace as mw
from mi_weightspace.core import output_io
from mi_weightspace.core.report import Report
from mi_weightspace.html_report import write_report

pytestmark = pytest.mark.quick

WRITER = """
import sys, time
from pathlib import Path
from mi_weightspace.core.output_io import staged
with staged(Path(sys.argv[1]), "output folder") as partial:
    partial.mkdir()
    (partial / "arrays.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
DAY = 24 * 3600


def report() -> Report:
    return Report(table=pd.DataFrame({"a": [1.0]}), arrays={"x": torch.ones(2)})


def writer(target: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing `target`."""
    command = [sys.executable, "-c", WRITER, str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def partials(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".partial"))


def named(folder: Path, *, host: str, process: int, days: float = 0.0) -> Path:
    """A folder as `staged` names it, whose content changed so many days ago."""
    partial = folder / f".run.{host}.{process}.{time.time_ns()}.partial"
    partial.mkdir()
    (partial / "table.parquet").write_text("half")
    for path in (partial / "table.parquet", partial):
        moment = time.time() - days * DAY
        os.utime(path, (moment, moment))
    return partial


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_killed_writer_and_a_living_one(tmp_path: Path) -> None:
    said = "an unfinished folder goes with the next save beside it if its writer is dead, else not"
    with Figure("SIGKILL", "kills", said) as figure:
        dead, alive = writer(tmp_path / "dead"), writer(tmp_path / "alive")
        try:
            dead.kill()
            dead.wait()
            left = partials(tmp_path)
            assert len(left) == 2
            report().save(tmp_path / "next")
            kept = [name for name in left if name.startswith(".alive.")]
            wrong = partials(tmp_path) != kept
            figure.add(problem=f"{partials(tmp_path)} of {left} after a save" if wrong else None)
            alive.kill()
            alive.wait()
            write_report([report()], tmp_path / "page.html")
            after = partials(tmp_path)
            figure.add(problem=f"{after} after a page" if after else None)
        finally:
            for process in (dead, alive):
                process.kill()
                process.wait()


@pytest.mark.parametrize(
    ("host", "process", "days", "goes"),
    [
        ("own", gone, 0.0, True),
        ("own", os.getpid, 9.0, False),  # however old: a process of that number lives
        ("own", lambda: 1, 9.0, False),
        ("own", lambda: 10**40, 0.0, True),  # a number no process can have
        ("other", gone, 0.9, False),
        ("other", gone, 1.1, True),
        ("other", os.getpid, 1.1, True),
        ("other", gone, -1.1, False),  # a clock that is ahead
    ],
)
def test_what_goes(
    host: str, process: Callable[[], int], days: float, goes: bool, tmp_path: Path
) -> None:
    tag = output_io.host() if host == "own" else "0" * 8
    partial = named(tmp_path, host=tag, process=process(), days=days)
    output_io.remove_stale(tmp_path)
    assert partial.exists() is not goes


def test_the_newest_file_inside_counts(tmp_path: Path) -> None:
    partial = named(tmp_path, host="0" * 8, process=gone(), days=2)
    (partial / "late").write_text("just now")
    moment = time.time() - 2 * DAY
    os.utime(partial, (moment, moment))
    output_io.remove_stale(tmp_path)
    assert partial.exists()


def test_names_of_others_and_links_stay(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    number, tag = gone(), output_io.host()
    names = (".notes.partial", f"run.{tag}.{number}.1.partial", f".run.{number}.1.partial",
             f".run.{tag}.{number}.1.partial.txt", f".run.{tag}0.{number}.1.partial")  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("mine")
    link = tmp_path / f".run.{tag}.{number}.2.partial"
    link.symlink_to(mine)
    output_io.remove_stale(tmp_path)
    assert all((tmp_path / name).exists() for name in names)
    assert link.is_symlink() and (mine / "file").read_text() == "mine"


def test_a_long_name_has_room_for_the_hidden_one(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        report().save(tmp_path / name)
        assert mw.load_report(tmp_path / name).equals(report())
