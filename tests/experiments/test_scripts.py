"""Scripts a reader copies from: the walk-through runs, claim 1's toy preset finds its answer."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from mi_weightspace.core.verdict import Word
from mi_weightspace.organisms import Organism

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_walkthrough_runs(
    deference: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MI_WEIGHTSPACE_CACHE", str(deference.folder.parent))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "experiments" / "walkthrough.py"))
    assert str(names["answer"].answer.word) == Word.WRITTEN_HERE
    assert set(names["found"].table["verdict"]) <= {
        Word.ALIGNED_NO_CONTROLS,
        Word.NOT_SIGNIFICANT,
        Word.ALIGNED_NUISANCE,
    }


@pytest.mark.slow
def test_inoculation_walkthrough_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(ROOT / "experiments" / "inoculation_walkthrough.py"))
    words = {v.subject: v.word for v in names["report"].verdicts}
    assert words["conditional"] == Word.NORM_NOT_DEFEATED
    assert set(words) == {"conditional", "norm-evading"}


def test_claim_one_on_the_organism(
    deference: Organism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments import stage_attribution

    monkeypatch.setenv("MI_WEIGHTSPACE_CACHE", str(deference.folder.parent))
    config = replace(stage_attribution.PRESETS["toy"], n_null=99, n_flips=200)
    answer = stage_attribution.run(config, tmp_path / "run")
    assert next(str(v) for v in answer.verdicts) == "sft / blocks.2.mlp.out: written here"
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_real_preset_needs_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from experiments import stage_attribution

    command = ["stage_attribution", "--preset", "talkie", "--out", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        stage_attribution.main()
    assert caught.value.code == 2
    assert "--base" in capsys.readouterr().err
