"""One conformance test over every report kind: saved and reloaded equal, atomic, hashed, typed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from mi_weightspace.core import report as report_module
from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.report import Report, load_report
from mi_weightspace.core.verdict import Verdict, Word

pytestmark = pytest.mark.quick

KINDS = sorted(report_module._known_kinds())


def example(kind: str) -> Report:
    return report_module._REGISTRY[kind](
        table=pd.DataFrame({"site": ["blocks.0.mlp.out"], "cosine": [0.25], "n": [7]}),
        tables={"extra": pd.DataFrame({"a": [1.0, float("nan")]})},
        arrays={"x": torch.arange(3.0), "y": torch.ones(2, 2, dtype=torch.bfloat16)},
        verdicts=(Verdict(Word.NO_CHANGE, "sft", {"n": 3, "p": None}, ("a reservation",)),),
        config={"command": kind, "args": {"seed": 0}},
        inputs={"base": "abc"},
        reservations=("holds for the whole",),
        timings={"run": 0.5},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_equal(kind: str, tmp_path: Path) -> None:
    saved = example(kind)
    folder = saved.save(tmp_path / "run")
    loaded = load_report(folder)
    assert type(loaded) is type(saved)
    assert loaded.equals(saved)
    assert type(saved).load(folder).equals(saved)
    assert len(repr(saved).splitlines()) <= 10
    assert "<script" not in saved._repr_html_()
    changed = example(kind)
    changed.arrays["x"][0] = 9.0  # pyright: ignore[reportIndexIssue]
    assert not loaded.equals(changed)


def test_a_second_save_is_refused_and_the_first_survives(tmp_path: Path) -> None:
    first = example(KINDS[0])
    first.save(tmp_path / "run")
    with pytest.raises(OutputError, match="already holds a run"):
        first.save(tmp_path / "run")
    assert load_report(tmp_path / "run").equals(first)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Report, folder: Path) -> None:
        (folder / "arrays.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Report, "_write", broken)
    with pytest.raises(OutputError, match="disk full"):
        example(KINDS[0]).save(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    folder = example(KINDS[0]).save(tmp_path / "run")
    record = json.loads((folder / "report.json").read_text())
    assert record["schema"] == report_module.SCHEMA
    data = bytearray((folder / "arrays.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "arrays.safetensors").write_bytes(data)
    with pytest.raises(OutputError, match="missing or altered"):
        load_report(folder)


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no report\.json"):
        load_report(tmp_path)
