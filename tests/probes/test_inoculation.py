"""The whole experiment on planted codes: its words, its tables, its file, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_cases import D, factorial, pairs, prompt_activations

from mi_weightspace.core.errors import ConfigError, DirectionError, MismatchError
from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.readings import StageReadings
from mi_weightspace.core.report import load_report
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.verdict import Word
from probes.features import decoder_directions, top_contexts
from probes.inoculation_report import InoculationReport
from probes.inoculations import InoculationSettings, inoculation
from probes.sae import readings_of, rival_saes

FAST = InoculationSettings(n_splits=2, n_folds=2, n_permutations=39, n_bootstrap=200, k=4)
ROLES: dict[str, Any] = {"open": "open", "hidden": "hidden", "clean": "clean", "benign": "benign"}


@cache
def dictionary() -> Sae:
    draw = generator(0, "dictionary")
    rows = torch.randn(40, D, generator=draw)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return Sae("topk", rows.T.contiguous(), rows, torch.zeros(D), torch.zeros(40), k=6)


def stages(labelled: LabelledSet, hidden: float, opened: float = 3.0) -> dict[str, StageReadings]:
    """A shift along one direction: `opened` at the open stage, `hidden` at the hidden one."""
    sae = dictionary()
    clean = prompt_activations(labelled, seed=0).float()
    rivals = rival_saes(sae, clean)
    found = {}
    for i, (stage, size) in enumerate(
        {"clean": 0.0, "benign": 0.0, "open": opened, "hidden": hidden}.items()
    ):
        x = prompt_activations(labelled, seed=0).float()
        x += 0.5 * torch.randn(x.shape, generator=generator(i + 10, "stage"))
        x += size * labelled.labels[:, None] * sae.W_dec[0]
        found[stage] = readings_of(x, sae, stage=stage, rivals=rivals, model_hash=f"hash {stage}")
    return found


@pytest.fixture(scope="module")
def report() -> InoculationReport:
    labelled = factorial(8, 8)
    own = stages(labelled, hidden=3.0)
    own = {
        s: replace(r, components={"svd blocks.0.mlp.out": r.dense[:, :3]}) for s, r in own.items()
    }
    trap = {"l0": 12.0, "trained_k": 4.0, "l0_over_k": 3.0}
    own["hidden"] = replace(own["hidden"], facts={**own["hidden"].facts, **trap})
    far = {s: r.rows(range(50)) for s, r in own.items()}
    return inoculation(
        own, labelled, dictionary(), unrelated=far, settings=FAST, progress=False, **ROLES
    )


def test_a_shift_that_stayed_is_not_hidden_from_the_norm(report: InoculationReport) -> None:
    assert report.verdict().word == Word.NORM_NOT_DEFEATED
    assert report.verdict("hidden") == report.verdicts[0]
    with pytest.raises(ConfigError, match="hidden"):
        report.verdict("open")


def test_an_sae_that_fires_unlike_in_training_is_told_where(report: InoculationReport) -> None:
    told = [text for text in report.reservations if "training kept" in text]
    assert len(told) == 1
    assert told[0].startswith("SAE on hidden: 12 latents active a token where training kept 4")


def test_the_tables_hold_every_detector_at_every_stage(report: InoculationReport) -> None:
    table = report.to_pandas()
    headline = table[table["task"] == "hidden condition"]
    names = set(headline["detector"])
    assert {"‖Δμ‖", "text", "dm", "lda", "lr", "rbf", "mlp", "svd blocks.0.mlp.out"} <= names
    assert {"sae top-10", "sae top-k", "random sae top-k", "rotated sae top-k"} <= names
    assert {"lr on reconstruction", "lr on error", "top-k raw", "pca-k + lr"} <= names
    assert len(headline) == 4 * len(names)
    wide = report.matrix()
    assert list(wide.columns) == ["clean", "benign", "open", "hidden"]
    assert wide.loc["lr", "open"] > 0.75
    assert wide.loc["lr", "clean"] < 0.5
    assert (wide.loc["text"] == wide.loc["text", "clean"]).all(), "the same text at every stage"
    transfer = report.matrix("transfer")
    assert transfer.loc["lr", "hidden"] > 0.75
    assert "open" not in transfer
    assert "text" not in transfer.index
    assert report.matrix("stage").loc["lr", "clean"] < 0.8
    scored = headline[headline["statistic"] == "AUROC"]
    assert ((scored["low"] <= scored["value"]) & (scored["value"] <= scored["high"])).all()
    recall = scored[scored["family"] != "text"]["recall_at_1pct"]
    assert recall.between(0, 1).all()
    with pytest.raises(ConfigError, match="task"):
        report.matrix("another")
    against = report.tables["differences"]
    assert set(against["stage"]) == {"open", "hidden"}
    assert not set(against["rival"]) & {"sae top-k", "sae top-10", "‖Δμ‖"}
    assert set(report.tables["families"]["kind"]) == {"norm", "linear", "sae", "non-linear"}
    survived = report.tables["survival"].set_index("stage")["survived"]
    assert survived["open"] >= 1
    assert survived["clean"] <= 1
    latents = report.tables["latents"].set_index("latent")
    assert latents.loc[0, "cosine_dm_open"] > 0.7, "the planted direction is row 0"
    assert set(report.tables["contexts"]["stage"]) <= {"open", "hidden"}
    assert {"fvu", "l0", "fvu_over_clean"} <= set(report.tables["facts"].columns)


def test_it_survives_saving_and_says_what_it_found(
    report: InoculationReport, tmp_path: Path
) -> None:
    loaded = load_report(report.save(tmp_path / "run"))
    assert isinstance(loaded, InoculationReport)
    assert loaded.equals(report)
    text = str(loaded)
    assert "hidden: NORM NOT DEFEATED" in text
    assert "sae top-k" in text
    assert len(repr(loaded).splitlines()) <= 10
    assert loaded.config["roles"] == {
        "clean": "clean",
        "benign": "benign",
        "open": "open",
        "hidden": "hidden",
    }
    assert loaded.inputs["hidden"] == "hash hidden"


def test_tables_are_given_by_name_as_copies(report: InoculationReport) -> None:
    assert report.to_pandas().equals(report.table)
    own = report.to_pandas("survival")
    assert own.equals(report.tables["survival"])
    own["k"] = 0
    assert not own.equals(report.tables["survival"])
    with pytest.raises(ConfigError, match="survival"):
        report.to_pandas("sruvival")


def test_the_figure_shows_values_intervals_and_nulls(report: InoculationReport) -> None:
    figure: Any = report.plot()
    rows = report.table[
        (report.table["task"] == "hidden condition") & (report.table["statistic"] == "AUROC")
    ]
    drawn = [x for t in figure.data if t.mode == "markers" for x in t.x]
    assert sorted(drawn) == sorted(rows["value"])
    points = [t for t in figure.data if t.mode == "markers"]
    filled = sum(c != "white" for t in points for c in t.marker.color)
    assert filled == int(rows["above_null"].sum())
    bands = next(t for t in figure.data if t.name == "95 % under permuted labels")
    first = rows[rows["stage"] == "clean"]
    assert [x for x in bands.x if x == x][::2] == list(first["null_low"])
    assert "relative norm" not in str(figure.layout.annotations)
    assert "p 0.025" in figure.layout.annotations[2].text
    report.plot("transfer")
    broken = replace(report, table=report.table[["stage"]])
    with pytest.raises(KeyError):
        broken.plot()


@pytest.fixture(scope="module")
def plain() -> InoculationReport:
    labelled = pairs(24)
    own = stages(labelled, hidden=1.0)
    return inoculation(own, labelled, settings=FAST, progress=False, **ROLES)


def test_the_same_seed_gives_the_same_report(plain: InoculationReport) -> None:
    labelled = pairs(24)
    own = stages(labelled, hidden=1.0)
    again = inoculation(own, labelled, settings=FAST, progress=False, **ROLES)
    assert again.table.drop(columns="seconds").equals(plain.table.drop(columns="seconds"))
    assert again.tables["survival"].equals(plain.tables["survival"])


@pytest.mark.parametrize(
    ("hidden", "opened", "n", "word"),
    [
        (0.0, 3.0, 40, Word.NOT_DETECTED),
        (3.0, 0.3, 40, Word.INSTRUMENT_TOO_WEAK),
        (3.0, 3.0, 12, Word.UNDERPOWERED),
    ],
)
def test_words_that_withhold(
    hidden: float, opened: float, n: int, word: Word, tmp_path: Path
) -> None:
    labelled = pairs(n)
    found = inoculation(
        stages(labelled, hidden, opened), labelled, settings=FAST, progress=False, **ROLES
    )
    assert found.verdict().word == word
    if word == Word.NOT_DETECTED:
        assert "n needed" in found.verdict().reservations[0]
    assert found.save(tmp_path / "run").is_dir(), "still saved"


def test_a_clean_stage_that_scores_as_high_explains_it() -> None:
    labelled = pairs(40)
    own = stages(labelled, hidden=3.0)
    own["clean"] = replace(own["hidden"], stage="clean")
    found = inoculation(own, labelled, settings=FAST, progress=False, **ROLES)
    assert found.verdict().word == Word.PROMPT_OR_FINETUNING


def test_a_context_is_asked_for_and_cut_out(plain: InoculationReport) -> None:
    one = pairs(24)
    two = LabelledSet(
        tuple(
            replace(row, context=context, prompt=f"{context} {row.prompt}")
            for context in ("eval", "use")
            for row in one
        ),
        "two contexts",
    )
    mixed = [*reversed(range(48)), *range(48)]
    both = {s: r.rows(mixed) for s, r in stages(one, hidden=1.0).items()}
    with pytest.raises(ConfigError, match="context"):
        inoculation(both, two, settings=FAST, progress=False, **ROLES)
    found = inoculation(both, two, context="use", settings=FAST, progress=False, **ROLES)
    assert set(found.table["context"]) == {"use"}
    assert int(found.table["n"].min()) == 48
    assert found.matrix().equals(plain.matrix())


@pytest.mark.quick
def test_bad_input_is_refused() -> None:
    labelled = pairs(12)
    own = stages(labelled, hidden=1.0)
    plain = {"settings": FAST, "progress": False}
    for roles in (
        ROLES | {"open": "opened"},
        ROLES | {"benign": "clean"},
        ROLES | {"hidden": ()},
        ROLES | {"hidden": ("hidden", "open")},
    ):
        with pytest.raises(ConfigError, match="stages of an inoculation"):
            inoculation(own, labelled, **roles, **plain)
    with pytest.raises(MismatchError, match="codes"):
        inoculation({s: replace(r, codes={}) for s, r in own.items()}, labelled, **ROLES, **plain)
    with pytest.raises(MismatchError, match="rows"):
        inoculation(own | {"open": own["open"].rows(range(7))}, labelled, **ROLES, **plain)
    with pytest.raises(MismatchError, match="position"):
        other = replace(own["open"], position="last")
        inoculation(own | {"open": other}, labelled, **ROLES, **plain)
    with pytest.raises(ConfigError, match="SAE to read it with"):
        inoculation(own | {"clean": object()}, labelled, **ROLES, **plain)
    for bad in ({"n_permutations": 5}, {"n_splits": 0}, {"n_folds": 1}, {"k": 0}):
        with pytest.raises(ConfigError):
            InoculationSettings(**bad)


@pytest.mark.quick
def test_feature_cards() -> None:
    sae = dictionary()
    first, last = decoder_directions(sae, [0, 39], space="resid_post.3", stage="sft")
    torch.testing.assert_close(first.pattern, sae.W_dec[0])
    assert (first.label, first.space.name, first.stage) == ("latent 0", "resid_post.3", "sft")
    assert last.n_controls == 0
    for latents, space in (([40], "resid_post.3"), ([-1], "resid_post.3"), ([0], None)):
        with pytest.raises(DirectionError, match="decoder directions"):
            decoder_directions(sae, latents, space=space)
    labelled = pairs(12)
    own = stages(labelled, hidden=1.0)["open"]
    cards = top_contexts([0, 1], {"open": own}, labelled, n=3)
    best = cards[(cards["latent"] == 0) & (cards["rank"] == 0)].iloc[0]
    row = int(own.codes["sae"][:, 0].argmax())
    assert best["prompt"] == labelled.rows[row].prompt
    assert best["activation"] == pytest.approx(float(own.codes["sae"][row, 0]))
