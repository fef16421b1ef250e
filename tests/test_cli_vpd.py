"""``mi-weightspace vpd``: run folders, resume, replay, refusals, the plan, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import mi_weightspace as mw
from mi_weightspace.cli import main
from mi_weightspace.core.errors import PromptError
from mi_weightspace.models import toy
from mi_weightspace.vpd.corpus import read_tokens

SETTINGS = """\
n_components: 32
n_steps: 3
batch_size: 2
warmup_steps: 2
log_every: 1
checkpoint_every: 1
importance: {hidden: [8]}
"""
SITE = "blocks.1.attn.v"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint, ids to train on, and a configuration file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vpd")
    toy.save_tiny("gpt2", folder / "model", seed=0)
    np.save(folder / "ids.npy", ids(12))
    np.save(folder / "apart.npy", ids(4, seed=1))
    (folder / "small.yaml").write_text(SETTINGS)
    return folder


def ids(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 300, (rows, 8))


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def asked(ground: Path, out: object, *more: object) -> list[object]:
    """The usual command line."""
    return ["vpd", ground / "model", "--tokens", ground / "ids.npy", "--sites", SITE, "--ladder",
            "2", "--config", ground / "small.yaml", "--quiet", "--out", out, *more]  # fmt: skip


def test_a_run_folder_that_loads_prints_and_replays(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(*asked(ground, out, "--seed", 3)) == 0
    said = capsys.readouterr().out
    parts: Any = mw.load_report(out)
    assert parts.kind == "vpd" and parts.sites == (SITE,)
    assert parts.settings.seed == 3 and parts.settings.n_steps == 3
    assert f"run folder: {out}" in said
    for word in (SITE, "unmasked", "pgd", "host_identity", "unconverged"):
        assert word in said, word
    assert (out / "training" / "metrics.jsonl").is_file()
    assert run(*asked(ground, out, "--seed", 3)) == 1
    assert "never overwritten" in capsys.readouterr().err

    assert run("replay", out, "--quiet", "--out", tmp_path / "again") == 0
    assert "the same numbers" in capsys.readouterr().out
    again = mw.load_report(tmp_path / "again")
    pd.testing.assert_frame_equal(parts.table, again.table)
    assert torch.equal(parts.write(SITE), again.arrays[f"{SITE}/write"])


def test_flags_override_the_file(ground: Path) -> None:
    from mi_weightspace.commands_vpd import globs, merged

    values = merged(
        str(ground / "small.yaml"),
        {"n_steps": 9, "sites": globs("a.*, b"), "seed": None, "allow_unfaithful": None},
    )
    assert values["n_steps"] == 9 and values["sites"] == ["a.*", "b"]
    assert values["n_components"] == 32 and values["importance"] == {"hidden": [8]}
    assert "seed" not in values and "allow_unfaithful" not in values


def test_the_plan_reads_no_weight_and_needs_no_tokens(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((ground / "model/config.json").read_text())
    command = ["vpd", tmp_path / "bare", "--plan", "--sites", "blocks.*.attn.v", "--components", 8]
    assert run(*command, "--length", 16) == 0
    said = capsys.readouterr().out
    for word in ("2 × attn.v 32×32, C = 8", "peak memory", "FLOP a token", "estimate", "refused"):
        assert word in said, (word, said)
    assert run(*command, "--length", 65) == 1
    assert "64" in capsys.readouterr().err


def test_refusals_exit_one_with_one_message_and_write_nothing(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", ground / "model"
    bad = ids(12)
    bad[5, 3] = toy.VOCAB
    np.save(tmp_path / "outside.npy", bad)
    np.save(tmp_path / "few.npy", ids(3))
    np.save(tmp_path / "floats.npy", ids(12) / 3)
    (tmp_path / "key.yaml").write_text(SETTINGS + "n_component: 3\n")
    (tmp_path / "idle.yaml").write_text(SETTINGS + "minimality: {form: lp, gamma: [1.0, 0.1]}\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    cases: list[tuple[list[object], str]] = [
        (asked(ground, out, "--sites", "blocks.1.ln_1"), "blocks.1.ln_1"),
        (asked(ground, out, "--sites", "blocks.0.mlp.up"), "blocks.0.mlp.up"),
        (asked(ground, out, "--components", 8), "the rank of this"),
        (asked(ground, out, "--components", 0), "n_components"),
        (asked(ground, out, "--ladder", "20,x"), "--ladder"),
        (asked(ground, out, "--tokens", tmp_path / "outside.npy"), "row 5 column 3"),
        (asked(ground, out, "--tokens", tmp_path / "few.npy"), "3 rows"),
        (asked(ground, out, "--tokens", tmp_path / "floats.npy"), "float64"),
        (asked(ground, out, "--tokens", tmp_path / "no.npy"), "no such file"),
        (asked(ground, out, "--config", tmp_path / "key.yaml"), "n_component"),
        (asked(ground, out, "--config", tmp_path / "idle.yaml"), "gamma"),
        (asked(ground, out, "--config", tmp_path / "list.yaml"), "mapping"),
        (asked(ground, out, "--config", tmp_path / "no.yaml"), "no.yaml"),
        (["vpd", tmp_path / "no", *asked(ground, out)[2:]], "no such folder"),
        (["vpd", tmp_path / "no", "--plan"], "no such folder"),
        (["vpd", model, "--plan", "--sites", "blocks.1.ln_1"], "blocks.1.ln_1"),
    ]
    for arguments, said in cases:
        assert run(*arguments) == 1, arguments
        captured = capsys.readouterr()
        message = captured.err.strip().splitlines()[-1]
        assert message.startswith("mi-weightspace: ") and said in message, (arguments, captured.err)
        assert "Traceback" not in captured.err and "Traceback" not in captured.out
        assert not out.exists() and not list(tmp_path.glob(".out*")), arguments


def test_missing_options_are_a_usage_error(
    ground: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("vpd", ground / "model") == 2
    assert "--plan" in capsys.readouterr().err
    assert run("vpd") == 2


def test_fewer_components_than_the_rank_on_request(ground: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*asked(ground, out, "--components", 8, "--allow-unfaithful", "--steps", 1)) == 0
    words = {v.word.value for v in mw.load_report(out).verdicts}
    assert "not decomposable here" in words


def test_interrupted_exits_130_loads_as_nothing_and_resumes(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGINT between two steps; --resume ends in the bits of the uninterrupted run."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = [str(a) for a in asked(ground, out, "--steps", 20)]
    code = (
        # a parent that runs in the background hands down an ignored SIGINT
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mi_weightspace.cli import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    metrics = out / "training" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert not (out / "report.json").exists() and list((out / "training").glob("state-*"))

    assert run(*arguments) == 1  # not without --resume
    assert "--resume" in capsys.readouterr().err
    assert run(*arguments, "--resume", "--seed", 1) == 1
    assert "seed" in capsys.readouterr().err
    assert not (out / "report.json").exists()
    assert run(*arguments, "--resume") == 0
    assert run(*[str(a) for a in asked(ground, whole, "--steps", 20)]) == 0
    one, other = mw.load_report(out), mw.load_report(whole)
    assert all(torch.equal(one.arrays[k], other.arrays[k]) for k in one.arrays)
    pd.testing.assert_frame_equal(one.table, other.table)


def test_two_processes(ground: Path, tmp_path: Path) -> None:
    """torchrun starts two; one run folder, one table, the numbers of the doubled batch."""
    out, alone = tmp_path / "two", tmp_path / "one"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    apart = ["--held-out", ground / "apart.npy"]
    own = asked(ground, out, "--batch-size", 1, *apart)
    command += ["-m", "mi_weightspace.cli", *map(str, own)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("run folder:") == 1, found.stdout
    assert run(*asked(ground, alone, *apart)) == 0
    two: Any = mw.load_report(out)
    one: Any = mw.load_report(alone)
    columns = ["total", "faithfulness", "minimality"]
    for name in columns:
        a, b = two.tables["history"][name], one.tables["history"][name]
        np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name)


# ---- files of tokens -----------------------------------------------------------------------
def test_every_format_gives_the_same_ids(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = ids(6)
    rows = [{"input_ids": row.tolist()} for row in table]
    np.save(tmp_path / "a.npy", table)
    np.save(tmp_path / "flat.npy", np.append(table.flatten(), [5, 6]))
    save_file(
        {"tokens": torch.from_numpy(table), "mask": torch.ones(6)}, tmp_path / "a.safetensors"
    )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    uneven = [table.flatten()[:5].tolist(), table.flatten()[5:].tolist()]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in uneven))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    names = ["a.npy", "flat.npy", "a.safetensors", "a.jsonl", "bare.jsonl", "a.parquet", "folder"]
    for name in names:
        found = read_tokens(tmp_path / name, length=8)
        assert isinstance(found, torch.Tensor), name
        assert found.dtype == torch.long and found.tolist() == table.tolist(), name
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(PromptError, match=r"splits \['train'\]"):
        read_tokens(tmp_path / "splits")
    assert isinstance(read_tokens(tmp_path / "splits" / "train"), torch.Tensor)


def test_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word1 word2\nword3")
    (tmp_path / "a.jsonl").write_text('{"text": "word1"}\n{"text": " "}\n"word2"\n')
    pd.DataFrame({"text": ["word1", "word2"], "n": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert read_tokens(tmp_path / "a.txt") == ["word1 word2\nword3"]
    assert read_tokens(tmp_path / "a.jsonl") == ["word1", "word2"]
    assert read_tokens(tmp_path / "a.parquet") == ["word1", "word2"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "line 2"),
        ("a.jsonl", b'{"prompt": "x"}\n', "prompt"),
        ("a.jsonl", b'{"text": "x"}\n[1, 2]\n', "neither"),
        ("a.jsonl", b"[1.5, 2]\n", "neither"),
        ("a.npy", b"none", "no array"),
        ("a.safetensors", b"none", "damaged"),
        ("a.parquet", b"none", "no parquet"),
        ("a.csv", b"1,2", ".csv"),
        ("a.jsonl", b"[1, 2, 3]\n[4]\n", "no whole row"),
    ],
)
def test_files_that_hold_no_tokens(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=r"a\." + name[2:]) as refused:
        read_tokens(tmp_path / name)
    assert said in str(refused.value)
