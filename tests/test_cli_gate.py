"""``mi-weightspace gate``: a run folder, a page, a replay; refusals leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main, sizes
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.models import toy

WORDS = [f"word{i}" for i in range(40)]


def contrast(name: str, kind: str, seed: int, readout: tuple[str, ...], n: int = 8) -> Contrast:
    draw = torch.Generator().manual_seed(seed)

    def text() -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, 40, (4,), generator=draw).tolist())

    pairs = tuple(
        Pair(f"i{i}", f"{text()} word1 word2", f"{text()} word1 word2", f"v{i % 2}",
             readout=readout)
        for i in range(n)
    )  # fmt: skip
    return Contrast(name, kind, pairs)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, prompts with and without a readout, and a probe's direction."""
    folder = tmp_path_factory.mktemp("gate")
    toy.save_tiny("llama", folder / "model", seed=0)
    toy.save_tiny("llama", folder / "other", seed=1)
    for name, readout in (("prompts", ("word3", "word4")), ("mute", ())):
        target = contrast("target", "target", 0, readout)
        controls = [contrast(f"c{i}", "control", 1 + i, ()) for i in range(3)]
        probes.to_jsonl(ContrastSet("set", (target, *controls)), folder / f"{name}.jsonl")
    prompts = str(folder / "prompts.jsonl")
    command = ["probe", str(folder / "model"), "--prompts", prompts, "--quiet"]
    assert main([*command, "--out", str(folder / "probe")]) == 0
    return folder


def run(ground: Path, out: Path, *extra: object, prompts: str = "prompts") -> int:
    words = ["gate", ground / "model", "--direction", ground / "probe" / "direction.safetensors",
             "--prompts", ground / f"{prompts}.jsonl", "--layer", 0, "--n-null", 9, "--alphas",
             "0.5,1", "--quiet", "--out", out, *extra]  # fmt: skip
    return main([str(w) for w in words])


def test_a_gate_is_run_shown_replayed_and_put_on_a_page(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(ground, tmp_path / "gate") == 0
    out = capsys.readouterr().out
    assert "target@resid_post.0: underpowered" in out and "mean_ablate" in out
    report = mw.load_report(tmp_path / "gate")
    assert isinstance(report, probes.GateReport)
    assert report.config["args"]["alphas"] == [0.5, 1.0]
    assert set(report.table["alpha"].dropna()) == {0.5, -0.5, 1.0, -1.0}
    assert main(["replay", str(tmp_path / "gate"), "--quiet", "--out", str(tmp_path / "re")]) == 0
    assert "the same numbers" in capsys.readouterr().out
    pd.testing.assert_frame_equal(report.table, mw.load_report(tmp_path / "re").table)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "gate"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "Causal gate of the direction" in text and "direction taken away" in text


def test_refusals_exit_one_and_leave_nothing(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(ground, out, prompts="mute") == 1
    assert "readout of no continuations" in capsys.readouterr().err
    assert run(ground, out, "--rank", 99) == 1
    assert run(ground, out, "--protocol", "v2") == 1
    assert run(ground, out, "--alphas", "0") == 1
    words = ["gate", str(ground / "other"), "--direction",
             str(ground / "probe" / "direction.safetensors"), "--prompts",
             str(ground / "prompts.jsonl"), "--layer", "0", "--n-null", "9", "--quiet", "--out",
             str(out)]  # fmt: skip
    assert main(words) == 1
    assert "--other-model" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--other-model"]) == 0
    assert any("other weights" in text for text in mw.load_report(out).reservations)


@pytest.mark.quick
def test_sizes_are_positive_numbers() -> None:
    assert sizes("0.5, 1,2") == [0.5, 1.0, 2.0] and sizes(None) is None
    for bad in ("", "a", "0", "-1", "1,,2", "nan", "inf"):
        with pytest.raises(ConfigError, match="--alphas"):
            sizes(bad)
