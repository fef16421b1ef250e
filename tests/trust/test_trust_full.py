"""A device without room, as standard output and behind a page."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from trust_counter import Figure

import mi_weightspace as mw
from mi_weightspace.cli import main
from mi_weightspace.core import output_io
from mi_weightspace.core.errors import OutputError
from mi_weightspace.core.report import Report
from mi_weightspace.html_report import write_report
from mi_weightspace.models import toy

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here (Linux)")
SAID = "/dev/full as standard output and as the file behind a page: one message, runs stay whole"


def example() -> Report:
    return Report(table=pd.DataFrame({"a": [1.0]}), arrays={"x": torch.ones(2)})


@needs_full
def test_printing_to_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = toy.save_tiny("llama", tmp_path / "base"), tmp_path / "out"
    other = toy.save_tiny("llama", tmp_path / "other", seed=1)
    capsys.readouterr()
    commands: tuple[tuple[object, ...], ...] = (
        ("sites", base),
        ("check", base, other),
        ("svd", base, other, "--sites", "blocks.0.mlp.out", "--quiet", "--out", out),
        ("report", out, "--out", tmp_path / "page.html"),
    )
    with Figure("full disk", "runs", SAID) as figure:
        for command in commands:
            full = Path("/dev/full").open("w")  # noqa: SIM115 — closing it fails
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", full)
                code = main([str(word) for word in command])
            with suppress(OSError):
                full.close()
            said = capsys.readouterr().err
            once = "standard output" in said and "Free space" in said and said.count("\n") == 1
            problem = None if code == 1 and once else f"{command[0]}: exit code {code}, {said}"
            figure.add(problem=problem)
        hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
        figure.problems += [f"left behind {name}" for name in hidden]
        assert mw.load_report(out).kind == "svd"
        assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")


@needs_full
def test_a_page_to_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ".page.partial"
    place.symlink_to("/dev/full")
    with Figure("full disk", "runs", SAID) as figure:
        with monkeypatch.context() as patch:
            patch.setattr(output_io, "hidden", lambda target: place)
            with pytest.raises(OutputError, match=r"page\.html.*No space left.*free space"):
                write_report([example()], tmp_path / "page.html")
        figure.add(problem=None if not list(tmp_path.iterdir()) else "something is left")
        assert Path("/dev/full").is_char_device()
        write_report([example()], tmp_path / "page.html")
