"""The result of a decomposition: what it holds, how it is saved, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mi_weightspace as mw
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import (
    ConfigError,
    MismatchError,
    OutputError,
    PromptError,
    SiteError,
)
from mi_weightspace.core.report import load_report
from mi_weightspace.core.space import Space
from mi_weightspace.core.verdict import Word
from mi_weightspace.vpd.data import prepare, prompt_ids, table_of
from mi_weightspace.vpd.host import LensHost
from mi_weightspace.vpd.stream import SampledStream, TokenStream
from tests.vpd.decomposed import (
    FAST,
    config,
    inputs,
    language,
    parts_of,
    square_config,
    square_host,
    square_parts,
    tokens,
)

SITE = "blocks.1.mlp.out"


def run(host: Any, data: Any, settings: Any, **options: Any) -> Any:
    return mw.vpd.decompose(host, data, settings, progress=False, evaluation=FAST, **options)


# ---- files -----------------------------------------------------------------------------------
def test_saved_and_loaded_it_is_equal_and_gives_the_same_importances(tmp_path: Path) -> None:
    parts = parts_of()
    loaded = load_report(parts.save(tmp_path / "run"))
    assert isinstance(loaded, mw.vpd.Decomposition)
    assert loaded.equals(parts)
    again = loaded.attach(language()).importances(tokens(4, seed=1))
    now = parts.importances(tokens(4, seed=1))
    assert set(now) == set(parts.sites)
    for name, values in now.items():
        assert torch.equal(values, again[name])
        assert values.shape == (4, 6, 40)
        assert 0 <= float(values.min()) <= float(values.max()) <= 1
        assert float(values.std()) > 0  # a constant would be equal too


def test_a_loaded_one_asks_for_its_model_and_refuses_another(tmp_path: Path) -> None:
    loaded = mw.vpd.Decomposition.load(parts_of().save(tmp_path / "run"))
    for use in (
        lambda: loaded.importances(tokens(1)),
        lambda: loaded.ablate(SITE, [0]),
        lambda: loaded.evaluate(tokens(4)),
    ):
        with pytest.raises(ConfigError, match="attach"):
            use()
    with pytest.raises(MismatchError, match="weights that were decomposed"):
        loaded.attach(language("gpt2", seed=5))


def test_the_run_folder_resumes_to_the_same_bits(tmp_path: Path) -> None:
    settings = square_config(n_steps=8, checkpoint_every=2)
    whole = run(square_host(), inputs(), settings, out=tmp_path / "whole")

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(square_host(), inputs(), settings, out=tmp_path / "cut", on_log=kill)
    with pytest.raises(OutputError, match=r"report\.json"):
        load_report(tmp_path / "cut")
    with pytest.raises(OutputError, match="resume"):
        run(square_host(), inputs(), settings, out=tmp_path / "cut")
    resumed = run(square_host(), inputs(), settings, out=tmp_path / "cut", resume=True)
    assert set(resumed.arrays) == set(whole.arrays)
    assert all(torch.equal(resumed.arrays[k], v) for k, v in whole.arrays.items())
    assert list(resumed.tables["history"]["step"]) == list(range(8))
    assert {p.name for p in (tmp_path / "cut").iterdir()} >= {"training", "report.json"}
    assert not list((tmp_path / "cut").glob(".*"))


def test_a_finished_folder_is_read_back_and_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, place = square_config(), tmp_path / "run"
    first = run(square_host(), inputs(), settings, out=place)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("mi_weightspace.vpd.run.train", never)
    second = run(square_host(), inputs(), settings, out=place, resume=True)
    assert second.equals(first)
    assert second.importances(inputs(3))["first"].shape == (3, 5)
    with pytest.raises(OutputError, match="finished run"):
        run(square_host(), inputs(), settings, out=place)
    with pytest.raises(ConfigError, match="configuration of the run"):
        run(square_host(), inputs(), square_config(seed=1), out=place, resume=True)
    with pytest.raises(MismatchError, match="fingerprint"):
        run(square_host(seed=3), inputs(), settings, out=place, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        run(square_host(), inputs(), settings, out=tmp_path / "other")


# ---- components ------------------------------------------------------------------------------
@pytest.mark.parametrize("fold", [False, True])
def test_components_are_unit_parts_that_sum_to_the_factors(fold: bool) -> None:
    parts = parts_of()
    name = "blocks.0.mlp.in"
    found = parts.components(name, fold_gains=fold)
    read, write = parts.read(name).double(), parts.write(name).double()
    if fold:  # the gain of the norm in front, read from the model itself
        block: Any = language().model.transformer.h[0]
        read = read * block.ln_2.weight.detach().double()
    torch.testing.assert_close(found.matrix().double(), write.T @ read, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.read.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(found.write.norm(dim=1), torch.ones(40))
    assert bool((found.scale.diff() <= 0).all())
    assert found.index is not None
    assert sorted(found.index.tolist()) == list(range(40))
    own = int(found.index[3])
    cosine = torch.cosine_similarity(found.write[3].double(), write[own], dim=0)
    torch.testing.assert_close(cosine, torch.ones((), dtype=torch.float64))
    top = found.top(5)
    assert top.index is not None
    assert top.index.tolist() == found.index[:5].tolist()


def test_projection_names_components_by_their_own_number_and_tests_nothing() -> None:
    parts = parts_of()
    wanted = 7
    vector = parts.write(SITE)[wanted]
    direction = Direction(vector / vector.norm(), Space.parse("resid_post.1"))
    report = mw.project(parts[SITE], direction, progress=False)
    detail = report.tables["components"].sort_values("cosine", ascending=False)
    assert int(detail["component"].iloc[0]) == wanted
    assert float(detail["cosine"].iloc[0]) == pytest.approx(1, abs=1e-5)
    assert float(detail["cosine"].iloc[1]) < 0.9
    assert bool(
        # parts overlap: energies do not add up
        np.isnan(np.asarray(detail["cumulative_energy"], dtype=float)).all()
    )
    evidence = report.to_pandas()[["G", "p_G", "R", "R_lda", "p_sign", "stage_gate_p"]]
    assert bool(np.asarray(evidence.isna()).all())
    assert [v.word for v in report.verdicts] == [Word.UNDERPOWERED]
    assert any("own weights" in text for v in report.verdicts for text in v.reservations)
    several = mw.project(list(parts), direction, progress=False)
    assert set(several.to_pandas()["site"]) == set(parts.sites)


def test_a_toy_has_no_spaces_to_project_in() -> None:
    parts = square_parts()
    with pytest.raises(SiteError, match="toy"):
        parts["first"]
    assert list(parts) == []
    assert parts.read("first").shape == (5, 4)
    with pytest.raises(SiteError, match="not decomposed"):
        parts["third"]


# ---- verdicts --------------------------------------------------------------------------------
def test_a_short_run_is_unconverged_and_few_components_are_not_decomposable() -> None:
    assert square_parts().unconverged
    word = square_parts().verdicts[0]
    assert word.word == Word.UNCONVERGED
    assert word.reservations
    few = run(square_host(), inputs(), square_config(n_components=2, allow_unfaithful=True))
    found = {v.subject: v for v in few.verdicts if v.word == Word.NOT_DECOMPOSABLE}
    assert set(found) == {"first", "second"}
    assert found["first"].evidence == {"n_components": 2, "rank": 3}
    assert not any(v.word == Word.NOT_DECOMPOSABLE for v in square_parts().verdicts)
    with pytest.raises(ConfigError, match="rank"):
        run(square_host(), inputs(), square_config(n_components=2))


def test_a_settled_run_is_not_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mi_weightspace.vpd.assess.converged", lambda checks: True)
    assert not run(square_host(), inputs(), square_config()).unconverged


def test_evaluating_on_other_data_changes_tables_and_not_parts() -> None:
    parts = square_parts()
    other = parts.evaluate(inputs(16, seed=9) * 3, progress=False, **FAST)
    assert other.measured_on == "data given, 2 batches of 8×4"
    assert parts.measured_on == "held-out rows, 1 batch of 8×4"
    assert not other.to_pandas("maskings").equals(parts.to_pandas("maskings"))
    assert all(torch.equal(other.arrays[k], parts.arrays[k]) for k in ("first/read", "first/write"))
    assert "site" in other.to_pandas()
    with pytest.raises(ConfigError, match="maskings"):
        parts.to_pandas("nothing")


# ---- data ------------------------------------------------------------------------------------
def test_the_last_rows_are_kept_apart_unless_held_out_are_given() -> None:
    rows = torch.arange(200).view(200, 1).expand(200, 6).contiguous()
    host: Any = LensHost(language(), ("blocks.0.mlp.in",))
    data = prepare(rows, None, host, config(), 6)
    trained = {int(r[0]) for step in range(200) for r in data.stream.batch(step)}
    held = {int(r[0]) for batch in data.batches for r in batch}
    assert trained == set(range(190))
    assert held <= set(range(190, 200))
    assert len(held) == 8  # two whole batches of four
    assert any("last 10 rows" in note for note in data.reservations)
    given = prepare(rows, rows[:8], host, config(), 6)
    assert {int(r[0]) for b in given.batches for r in b} == set(range(8))
    assert given.reservations == ()
    assert {int(r[0]) for s in range(200) for r in given.stream.batch(s)} == set(range(200))
    stream = prepare(TokenStream(rows, 4, 0), None, host, config(), 6)
    assert {int(r[0]) for b in stream.batches for r in b} <= set(range(190, 200))
    fresh = SampledStream(lambda n, g: torch.randint(4, 300, (n, 6), generator=g), 4, 0)
    later = prepare(fresh, None, host, config(), 6)
    assert torch.equal(later.batches[0], fresh.batch(config().n_steps))


def test_text_is_cut_into_rows(tmp_path: Path) -> None:
    host: Any = LensHost(language(), ("blocks.0.mlp.in",))
    words = [f"word{i}" for i in range(10)]
    ids = language().tokenizer(" ".join(words))["input_ids"]
    end = language().tokenizer.eos_token_id
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words))
    expected = torch.tensor([*ids, end][:9]).view(3, 3)
    for given in (file, str(file), [" ".join(words)]):
        assert torch.equal(table_of(given, host, 3), expected)
    two = table_of([" ".join(words[:5]), " ".join(words[5:])], host, 4)
    assert torch.equal(two.flatten(), torch.tensor([*ids[:5], end, *ids[5:], end]))
    ids_alone = [(5, 6, 7), (8, 9, 10)]
    assert torch.equal(table_of(ids_alone, host, 2), torch.tensor(ids_alone))
    joined = torch.tensor([[5, 6], [7, 8]])
    assert torch.equal(table_of([[5, 6, 7], [8, 9]], host, 2), joined)
    assert torch.equal(prompt_ids("word1 word2", host), torch.tensor([ids[1:3]]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.full((20, 6), 400), "ids from 0 to 319"),
        (torch.full((20, 6), -1), "id -1"),
        (torch.zeros(20, dtype=torch.long), "rows, tokens"),
        (torch.ones(5, 6, dtype=torch.long), "at least 8"),
        (torch.ones(20, 3000, dtype=torch.long), "this model reads"),
        ("no such file and no text either", "list of texts"),
        (["word1"], "at least one row"),
        ([1, 2, 3], "table of ids"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(given: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        run(language(), given, config())


def test_prompts_of_several_lengths_are_refused() -> None:
    host: Any = LensHost(language(), ("blocks.0.mlp.in",))
    with pytest.raises(PromptError, match="different lengths"):
        prompt_ids(["word1", "word1 word2"], host)


def test_a_configuration_may_be_values_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "vpd.yaml"
    values = "n_components: 5\nbatch_size: 8\nn_steps: 2\nlog_every: 1\nimportance: {hidden: [8]}\n"
    file.write_text(values)
    parts = run(square_host(), inputs(), file)
    assert parts.settings.n_steps == 2
    assert parts.settings.importance.hidden == (8,)
    with pytest.raises(ConfigError, match="n_stepz"):
        run(square_host(), inputs(), {"n_stepz": 2})
    with pytest.raises(SiteError, match="matches no site"):
        run(language(), tokens(), config(sites=("blocks.9.mlp.in",)))
