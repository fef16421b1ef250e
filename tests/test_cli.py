"""The command line: every subcommand on checkpoints on disk, exit codes, nothing half-written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.models import toy

WORDS = [f"word{i}" for i in range(40)]


def contrast(name: str, kind: str, seed: int, n: int = 8) -> Contrast:
    draw = torch.Generator().manual_seed(seed)

    def text() -> str:
        return " ".join(WORDS[i] for i in torch.randint(0, 40, (4,), generator=draw).tolist())

    pairs = tuple(
        Pair(f"i{i}", f"{text()} word1 word2", f"{text()} word1 word2", wording_id=f"v{i % 2}")
        for i in range(n)
    )
    return Contrast(name, kind, pairs)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages of a tiny model (the third equal to the second), prompts and controls."""
    folder = tmp_path_factory.mktemp("cli")
    toy.save_tiny("llama", folder / "base", seed=0)
    base = toy.tiny_model("llama", seed=0)
    with torch.no_grad():
        weight = base.model.layers[0].mlp.down_proj.weight
        draw = torch.Generator().manual_seed(5)
        weight.add_(0.05 * torch.randn(weight.shape, generator=draw))
    toy.save_tiny("llama", folder / "sft", seed=0)
    base.save_pretrained(folder / "sft")
    toy.save_tiny("llama", folder / "same", seed=0)
    base.save_pretrained(folder / "same")
    target = contrast("target", "target", 0)
    controls = tuple(contrast(f"c{i}", "control", 1 + i) for i in range(4))
    probes.to_jsonl(ContrastSet("set", (target, *controls)), folder / "prompts.jsonl")
    return folder


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_the_road_from_checkpoints_to_a_page(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sft, prompts = ground / "base", ground / "sft", ground / "prompts.jsonl"
    assert run("sites", base) == 0
    assert "blocks.1.mlp.out" in capsys.readouterr().out
    assert run("check", base, sft) == 0
    assert "changed_matrices" in capsys.readouterr().out
    quiet = ["--quiet", "--out"]
    assert run("dmu", base, sft, "--prompts", prompts, *quiet, tmp_path / "dmu") == 0
    assert run("probe", sft, "--prompts", prompts, *quiet, tmp_path / "probe") == 0
    assert run("svd", base, sft, "--rank", 4, *quiet, tmp_path / "svd") == 0
    direction = tmp_path / "probe" / "direction.safetensors"
    projected = ["project", tmp_path / "svd", "--direction", direction]
    assert run(*projected, *quiet, tmp_path / "plain") == 0
    assert run(*projected, "--prompts", prompts, *quiet, tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "run") in out and "run folder" in out

    plain, with_stages = (mw.load_report(tmp_path / n).table for n in ("plain", "run"))
    assert plain["G"].isna().all() and with_stages["G"].notna().any()
    # four controls: p cannot reach 0.05, and the word says so
    judged = with_stages[with_stages["G"].notna() & (with_stages["fro"] > 0)]
    assert set(judged["verdict"]) == {"underpowered"}
    changed = with_stages[with_stages["fro"] > 0]["site"].unique()
    assert list(changed) == ["blocks.0.mlp.out"]

    page = tmp_path / "page.html"
    assert run("report", tmp_path / "svd", tmp_path / "run", "--out", page) == 0
    assert "blocks.0.mlp.out" in page.read_text()
    assert run("report", tmp_path / "svd", "--out", page) == 1
    assert "never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["svd", "dmu", "probe", "project"])
def test_replay_gives_the_same_numbers(
    command: str, ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sft, prompts = ground / "base", ground / "sft", ground / "prompts.jsonl"
    first = tmp_path / "first"
    arguments: list[object] = {
        "svd": ["svd", base, sft, "--rank", 2],
        "dmu": ["dmu", base, sft, "--prompts", prompts],
        "probe": ["probe", sft, "--prompts", prompts],
        "project": [
            "project",
            tmp_path / "svd",
            "--direction",
            tmp_path / "p/direction.safetensors",
        ],
    }[command]
    if command == "project":
        assert run("svd", base, sft, "--quiet", "--out", tmp_path / "svd") == 0
        assert run("probe", sft, "--prompts", prompts, "--quiet", "--out", tmp_path / "p") == 0
    assert run(*arguments, "--quiet", "--out", first) == 0
    assert run("replay", first, "--quiet", "--out", tmp_path / "again") == 0
    assert "the same numbers" in capsys.readouterr().out
    old, new = mw.load_report(first), mw.load_report(tmp_path / "again")
    pd.testing.assert_frame_equal(old.table, new.table)


def test_weighted_view_is_a_table(ground: Path, tmp_path: Path) -> None:
    base, sft, prompts = ground / "base", ground / "sft", ground / "prompts.jsonl"
    out = tmp_path / "run"
    assert run("svd", base, sft, "--activations", prompts, "--quiet", "--out", out) == 0
    frame = mw.load_report(out).tables["weighted"]
    assert list(frame["site"]) == ["blocks.0.mlp.out"]
    assert 0 < float(frame["share_1"].iloc[0]) <= 1


def test_identical_checkpoints_are_no_change_and_exit_zero(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("svd", ground / "sft", ground / "same", "--quiet", "--out", tmp_path / "r") == 0
    assert "same: no change" in capsys.readouterr().out
    assert run("check", ground / "sft", ground / "same") == 0
    assert "same: no change" in capsys.readouterr().out


def test_refusals_exit_one_with_one_message_and_write_nothing(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, sft = ground / "base", ground / "sft"
    out = tmp_path / "out"
    other = toy.save_tiny("llama", tmp_path / "other", seed=0, n_layers=3)
    (tmp_path / "legacy").mkdir()
    (tmp_path / "legacy" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "legacy" / "config.json").write_text((base / "config.json").read_text())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    one_class = tmp_path / "one.jsonl"
    one_class.write_text(json.dumps({"text": "word1 word2", "label": 1, "item_id": "a"}) + "\n")
    bare = tmp_path / "wide.safetensors"
    from safetensors.torch import save_file

    save_file({"v": torch.ones(7)}, bare)
    assert run("svd", base, sft, "--rank", 2, "--quiet", "--out", tmp_path / "svd") == 0
    capsys.readouterr()
    cases: list[tuple[list[object], str]] = [
        (["svd", base, other, "--out", out], "n_layers"),
        (["svd", base, tmp_path / "nothing", "--out", out], "nothing"),
        (["svd", base, tmp_path / "legacy", "--out", out], "safetensors"),
        (["svd", base, sft, "--sites", "blocks.*.mlp.down", "--out", out], "blocks.*.mlp.down"),
        (["svd", base, "--out", out], "at least 2"),
        (["svd", base, sft, "--shard", "3/2", "--out", out], "i/n"),
        (["svd", base, sft, "--memory-limit", "1e-9", "--out", out], "--memory-limit"),
        (["svd", base, sft, "--out", tmp_path / "taken"], "new or empty"),
        (["dmu", base, "--prompts", one_class, "--out", out], "both classes"),
        (["project", tmp_path / "svd", "--direction", bare, "--layer", 0, "--out", out], "width 7"),
        (["project", tmp_path / "svd", "--direction", tmp_path / "no.st", "--out", out], "no.st"),
        (["replay", tmp_path / "taken", "--out", out], "report.json"),
        (["report", tmp_path / "taken", "--out", tmp_path / "x.html"], "report.json"),
    ]
    for arguments, said in cases:
        assert run(*arguments) == 1, arguments
        captured = capsys.readouterr()
        message = captured.err.strip().splitlines()[-1]
        assert message.startswith("mi-weightspace: ") and said in message, (arguments, captured.err)
        assert "Traceback" not in captured.err
        assert not out.exists() and not (tmp_path / "x.html").exists()
        assert not list(tmp_path.glob(".out*")), list(tmp_path.glob(".out*"))


def test_usage_errors_exit_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("svd") == 2
    assert run("nonsense") == 2
    assert "nonsense" in capsys.readouterr().err


def test_interrupted_exits_130_and_resumes(ground: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of a sweep; --resume finishes it with the same numbers."""
    base, sft, out = ground / "base", ground / "sft", tmp_path / "out"
    code = (
        # a parent that runs in the background hands down an ignored SIGINT
        "import signal, sys, time, mi_weightspace.spectral.svd as m\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "real = m.decompose\n"
        "def slow(*a):\n    time.sleep(0.3); print('one', flush=True); return real(*a)\n"
        "slow.__module__, slow.__qualname__ = real.__module__, real.__qualname__\n"
        "m.decompose = slow\n"
        "from mi_weightspace.cli import main\n"
        f"sys.exit(main(['svd', {str(base)!r}, {str(sft)!r}, '--quiet', '--out', {str(out)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline().strip() == "one"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stdout.close()
    journal = tmp_path / ".out.journal"
    kept = len(list(journal.glob("*.safetensors")))
    assert kept >= 2 and not out.exists()
    assert run("svd", base, sft, "--quiet", "--out", out) == 1  # not without --resume
    assert run("svd", base, sft, "--quiet", "--resume", "--out", out) == 0
    whole = mw.svd(mw.load_lineage(base=base, sft=sft).diff("base", "sft"), progress=False)
    pd.testing.assert_frame_equal(mw.load_report(out).table, whole.table)
    assert not journal.exists()


def test_shards_join(ground: Path, tmp_path: Path) -> None:
    base, sft, out = ground / "base", ground / "sft", tmp_path / "out"
    for part in ("0/2", "1/2"):
        assert run("svd", base, sft, "--shard", part, "--quiet", "--out", out) == 0
        assert not out.exists()
    assert run("svd", base, sft, "--resume", "--quiet", "--out", out) == 0
    whole = mw.svd(mw.load_lineage(base=base, sft=sft).diff("base", "sft"), progress=False)
    pd.testing.assert_frame_equal(mw.load_report(out).table, whole.table)
