"""``mi-weightspace inoculation``: a run folder, a page, a replay; refusals leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.sae import Sae, SaeMetadata
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from probes.labelled_io import labelled_to_jsonl
from probes.sae_io import save_sae

WORDS = [f"word{i}" for i in range(40)]
STAGES = ("before", "after", "clean", "benign")


def labelled(n: int = 24) -> LabelledSet:
    draw = generator(0, "cli inoculation")
    rows = []
    for i in range(n):
        text = " ".join(WORDS[j] for j in torch.randint(0, 40, (5,), generator=draw).tolist())
        rows.append(LabelledPrompt(f"{text} word1 word2", i % 2, f"c{i // 2 * 2 + i % 2}", f"i{i}"))
    return LabelledSet(tuple(rows), "cli")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints, an SAE folder of their width, labelled prompts, a run of svd."""
    folder = tmp_path_factory.mktemp("inoculation")
    for seed, name in enumerate(STAGES):
        toy.save_tiny("llama", folder / name, seed=seed)
    width = mw.load(str(folder / "clean")).shape.d_model
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator(0, "cli sae")))[0]
    sae = Sae(  # either sign of every axis: the largest 20 coordinates are kept
        architecture="topk",
        W_enc=torch.cat([axes, -axes], dim=1),
        W_dec=torch.cat([axes, -axes], dim=1).T.contiguous(),
        b_enc=torch.zeros(2 * width),
        b_dec=torch.zeros(width),
        k=20,
        metadata=SaeMetadata(hook_name="blocks.1.hook_resid_post"),
    )
    save_sae(sae, folder / "sae")
    labelled_to_jsonl(labelled(), folder / "rows.jsonl")
    (folder / "unrelated.txt").write_text("word3 word4 word5\nword7 word8 word9\n" * 3)
    command = ["svd", str(folder / "before"), str(folder / "after"), "--sites", "blocks.1.mlp.out"]
    assert main([*command, "--rank", "2", "--quiet", "--out", str(folder / "svd")]) == 0
    return folder


def run(ground: Path, out: Path, *extra: object, prompts: str = "rows.jsonl") -> int:
    words = ["inoculation", ground / "before", ground / "after", "--prompts", ground / prompts,
             "--sae", ground / "sae", "--n-splits", 1, "--n-permutations", 19, "--k", 3,
             "--position", "last", "--quiet", "--out", out, *extra]  # fmt: skip
    return main([str(w) for w in words])


def test_a_run_is_judged_shown_replayed_and_put_on_a_page(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ("--clean", ground / "clean", "--benign", ground / "benign")
    more += ("--components", ground / "svd", "--unrelated", ground / "unrelated.txt")
    assert run(ground, out, *more) == 0
    said = capsys.readouterr().out
    report = mw.load_report(out)
    assert report.kind == "inoculation" and str(report.verdicts[0].subject) == "after"
    assert report.verdicts[0].word == Word.UNDERPOWERED  # 12 rows a class are too few for a word
    assert f"run folder: {out}" in said and "underpowered" in said and "at least" in said
    assert any("svd blocks.1.mlp.out" in str(name) for name in report.table["detector"])

    page = tmp_path / "page.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    text = page.read_text()
    assert "What a second training hid" in text and "Survival of the open stage" in text

    capsys.readouterr()
    assert main(["replay", str(out), "--quiet", "--out", str(tmp_path / "again")]) == 0
    assert "the same numbers" in capsys.readouterr().out
    again = mw.load_report(tmp_path / "again")
    pd.testing.assert_frame_equal(
        report.table.drop(columns="seconds"), again.table.drop(columns="seconds")
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((), "--clean"),
        (("--clean", "CLEAN", "--sae", "SVD"), "cfg.json"),
        (("--clean", "CLEAN", "--components", "SAE"), "report.json"),
        (("--clean", "CLEAN", "--unrelated", "NOWHERE"), "unrelated prompts"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    ground: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: tuple[str, ...],
    message: str,
) -> None:
    places = {"CLEAN": "clean", "SVD": "svd", "SAE": "sae", "NOWHERE": "nowhere.txt"}
    words = [str(ground / places[w]) if w in places else w for w in extra]
    assert run(ground, tmp_path / "run", *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_class_only_and_another_width_are_refused(
    ground: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (ground / "rows.jsonl").read_text().splitlines()]
    (ground / "ones.jsonl").write_text("\n".join(json.dumps(r | {"label": 1}) for r in rows))
    clean = ("--clean", ground / "clean")
    assert run(ground, tmp_path / "run", *clean, prompts="ones.jsonl") == 1
    assert "label" in capsys.readouterr().err
    sae = probes.load_sae(str(ground / "sae"))
    narrow = Sae(
        architecture="topk",
        W_enc=sae.W_enc[:-1],
        W_dec=sae.W_dec[:, :-1].contiguous(),
        b_enc=sae.b_enc,
        b_dec=sae.b_dec[:-1],
        k=4,
        metadata=sae.metadata,
    )
    save_sae(narrow, tmp_path / "narrow")
    assert run(ground, tmp_path / "run", *clean, "--sae", tmp_path / "narrow") == 1
    assert str(sae.d_in - 1) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
