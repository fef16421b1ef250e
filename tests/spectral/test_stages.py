"""`attribute_stages` on trained organisms: the planted answer, the innocent one, naive oracles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import mi_weightspace as mw
import probes
from mi_weightspace.core.components import Components
from mi_weightspace.core.contrasts import Contrast, ContrastSet
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.organisms import Organism
from mi_weightspace.organisms.prompts import contrast_set
from mi_weightspace.spectral.measure import NAMED_ENERGY, Row, _named
from mi_weightspace.spectral.path import REST, PathAttribution
from mi_weightspace.spectral.stage_evidence import StageEvidence, pick_target, stage_evidence
from mi_weightspace.spectral.stages import (
    AttributionReport,
    _stage_word,
    _with_paths,
    attribute_stages,
    carriers,
)

N_CONTROLS = 39
"""Fewer than the organism's 99, to save time: the smallest p is 1/40."""
Case = tuple[Lineage, ContrastSet, StageEvidence, Any]


def case_of(organism: Organism) -> Case:
    lineage = Lineage(organism.stages)
    prompts = contrast_set(organism.language, organism.seed, n_controls=N_CONTROLS)
    evidence = stage_evidence(lineage, prompts, progress=False)
    return lineage, prompts, evidence, probes.fit(evidence.activations["sft"], prompts, seed=0)


@pytest.fixture(scope="module")
def case(deference: Organism) -> Case:
    return case_of(deference)


@pytest.fixture(scope="module")
def answer(deference: Organism, case: Case) -> Any:
    lineage, prompts, evidence, bank = case
    return attribute_stages(
        lineage,
        bank,
        prompts=prompts,
        readout=deference.readout,
        evidence=evidence,
        n_null=99,
        progress=False,
    )


def models(organism: Organism) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return {s: AutoModelForCausalLM.from_pretrained(f).eval() for s, f in organism.stages.items()}


def naive_log_odds(organism: Organism, model: Any) -> float:
    """log P(YIELD) − log P(anything else), prompt by prompt, float64."""
    yes = organism.language.ids["YIELD"]
    values = []
    for prompt in organism.readout.prompts:  # pyright: ignore[reportOptionalMemberAccess]
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].double().numpy()
        chance = np.exp(logits - logits.max())
        chance /= chance.sum()
        values.append(np.log(chance[yes]) - np.log(np.delete(chance, yes).sum()))
    return float(np.mean(values))


def caught(model: Any, organism: Organism, contrast: Contrast) -> dict[str, np.ndarray]:
    """Pair differences at the planted matrix's input and at its block's output."""
    block = model.transformer.h[int(organism.truth["onset"].split(".")[1])]
    seen: dict[str, list[Tensor]] = {"input": [], "output": []}
    hooks = [
        block.mlp.c_proj.register_forward_pre_hook(lambda _, a: seen["input"].append(a[0][:, -1])),
        block.register_forward_hook(
            lambda _, __, out: seen["output"].append(
                (out if torch.is_tensor(out) else out[0])[:, -1]
            )
        ),
    ]
    for side in ("positive", "negative"):
        with torch.no_grad():
            model(torch.tensor([getattr(pair, side) for pair in contrast.pairs]))
    for hook in hooks:
        hook.remove()
    return {k: (a - b).double().numpy() for k, (a, b) in seen.items()}


def test_the_planted_matrix_and_nothing_else(deference: Organism, answer: Any) -> None:
    (planted,) = deference.truth["planted_sites"]
    written = answer.table.query("verdict == @Word.WRITTEN_HERE")
    assert list(zip(written["stage"], written["site"], strict=True)) == [("sft", planted)]
    row = written.iloc[0]
    assert row["p_G"] == row["stage_gate_p"] == 1 / (N_CONTROLS + 1) == row["p_adjusted"]
    assert row["named_k"] == 1 and row["did_cosine"] > 0.9
    rest = answer.table.query("stage == 'sft' and site != @planted")
    assert set(rest["verdict"]) == {Word.NO_CHANGE}
    assert answer.answer.word == Word.WRITTEN_HERE
    assert answer.answer.subject == f"sft / {planted}"


def test_stages_table(deference: Organism, answer: Any) -> None:
    (planted,) = deference.truth["planted_sites"]
    stages = answer.tables["stages"].set_index("stage")
    assert list(stages.index) == ["sft", "dpo"] and list(stages["previous"]) == ["base", "sft"]
    assert stages["verdict"].to_dict() == {"sft": Word.WRITTEN_HERE, "dpo": Word.NOT_SIGNIFICANT}
    assert stages["onset"]["sft"] == deference.truth["onset"]
    assert stages["gate_p"]["sft"] == 1 / (N_CONTROLS + 1) and stages["gate_p"]["dpo"] > 0.05
    assert stages["written_sites"].to_dict() == {"sft": planted, "dpo": ""}
    assert stages["top_carrier"]["sft"] == planted
    assert (stages["completeness_error"] < 0.01).all()
    assert (stages["n_controls"] == N_CONTROLS).all()
    assert answer.tables["gate"].groupby("stage").size().nunique() == 1


def test_the_readout_is_what_transformers_gives(deference: Organism, answer: Any) -> None:
    values = {s: naive_log_odds(deference, m) for s, m in models(deference).items()}
    stages = answer.tables["stages"].set_index("stage")
    for before, after in (("base", "sft"), ("sft", "dpo")):
        assert stages["readout_before"][after] == pytest.approx(values[before], abs=1e-4)
        assert stages["readout_after"][after] == pytest.approx(values[after], abs=1e-4)
        path = answer.tables["path"].query("stage == @after")
        change = values[after] - values[before]
        assert path["path_share"].sum() == pytest.approx(change, rel=0.01)
        assert path["path_fraction"].sum() == pytest.approx(1, rel=0.01)


def test_the_only_changed_matrix_carries_all_of_it(deference: Organism, answer: Any) -> None:
    (planted,) = deference.truth["planted_sites"]
    path = answer.tables["path"].query("stage == 'sft'").set_index("site")
    own, change = path.loc[planted], path["readout_after"].iloc[0] - path["readout_before"].iloc[0]
    for column in ("path_share", "revert_effect", "add_effect"):
        assert own[column] == pytest.approx(change, rel=0.01), column
    assert path.index[path["carries"]].tolist() == [planted]
    others = path.drop(index=planted)
    assert others["path_share"].abs().max() < 1e-4
    assert path.index[-1] == REST
    row = answer.table.query("stage == 'sft' and site == @planted").iloc[0]
    assert row["carries"] and row["path_share"] == own["path_share"]


def test_g_and_did_at_the_planted_matrix_are_numpys(
    deference: Organism, case: Case, answer: Any
) -> None:
    (planted,) = deference.truth["planted_sites"]
    lineage, prompts, evidence, _ = case
    live = models(deference)
    shifts = {s: caught(live[s], deference, prompts["authority"]) for s in ("base", "sft")}
    pairs = shifts["sft"]["output"] - shifts["base"]["output"]
    did = pairs.mean(0)
    delta = lineage.source("sft").weight(planted) - lineage.source("base").weight(planted)
    written = (
        delta.double().numpy() @ (shifts["sft"]["input"] + shifts["base"]["input"]).mean(0) / 2
    )
    size = np.linalg.norm(shifts["base"]["output"].mean(0))
    g = written @ did / (np.linalg.norm(did) * size)
    assert evidence.g["sft", planted] == pytest.approx(g, rel=1e-3)
    row = answer.table.query("stage == 'sft' and site == @planted").iloc[0]
    assert row["G"] == evidence.g["sft", planted]
    u = np.linalg.svd(delta.double().numpy())[0]
    unit = did / np.linalg.norm(did)
    assert row["did_cosine"] == pytest.approx(abs(u[:, 0] @ unit), rel=1e-3)
    held = ((pairs @ u) ** 2).sum(0).cumsum() / (pairs**2).sum()
    assert row["did_energy"] == pytest.approx(held[15], rel=1e-3)
    assert row["named_k"] == 1 and held[0] >= NAMED_ENERGY
    gate = answer.tables["gate"].query("stage == 'sft'").set_index("point")
    point = deference.truth["onset"]
    assert gate["relative_did"][point] == pytest.approx(np.linalg.norm(did) / size, rel=1e-3)
    # only this matrix changed, so all that is written along w is written here
    assert abs(row["effect_share"]) == 1


def test_saved_loaded_and_drawn(answer: Any, tmp_path: Path) -> None:
    loaded = mw.load_report(answer.save(tmp_path / "run"))
    assert isinstance(loaded, AttributionReport) and loaded.equals(answer)
    for name, table in answer.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table)
    assert loaded.answer == answer.answer
    for report in (answer, loaded):
        assert len(report.plot().data) > 0  # pyright: ignore[reportArgumentType]


def test_one_direction_instead_of_a_bank(case: Case, deference: Organism) -> None:
    """A direction of the last layer, by hand: the run stages decide, whatever its layer."""
    lineage, prompts, evidence, bank = case
    last = bank.directions()[-1]
    report: Any = attribute_stages(
        lineage, last, prompts=prompts, evidence=evidence, sites="*.mlp.out", n_null=19,
        progress=False,
    )  # fmt: skip
    written = report.table.query("verdict == @Word.WRITTEN_HERE")
    assert list(written["site"]) == deference.truth["planted_sites"]
    assert set(report.table["direction_layer"]) == {last.space.layer}


def test_without_prompts_no_stage_is_run(case: Case) -> None:
    lineage, _, _, bank = case
    report: Any = attribute_stages(lineage, bank, sites="*.mlp.out", n_null=19, progress=False)
    allowed = {Word.NO_CHANGE, Word.NOT_SIGNIFICANT, Word.ALIGNED, Word.ALIGNED_NUISANCE}
    allowed |= {Word.UNRESOLVED, Word.BELOW_FLOOR}
    assert set(report.table["verdict"]) <= allowed
    assert {v.word for v in report.verdicts} <= allowed
    assert report.table[["G", "p_G", "stage_gate_p", "effect_share", "carries"]].isna().all().all()
    assert report.tables["stages"][["gate_p", "gate_statistic"]].isna().all().all()
    assert any("strongest word is `aligned`" in text for text in report.reservations)


def test_an_innocent_lineage_names_nothing(innocent: Organism) -> None:
    """The planted absence: trained as long, on something else. Without a readout, no `carries`."""
    lineage, prompts, evidence, bank = case_of(innocent)
    report: Any = attribute_stages(
        lineage, bank, prompts=prompts, evidence=evidence, n_null=19, progress=False
    )
    assert Word.WRITTEN_HERE not in set(report.table["verdict"])
    assert set(report.tables["stages"]["verdict"]) <= {Word.NOT_SIGNIFICANT, Word.STAGE_DISTRIBUTED}
    assert report.answer.word != Word.WRITTEN_HERE
    assert report.table["carries"].isna().all() and len(report.tables["path"]) == 0
    assert (report.tables["stages"]["top_carrier"] == "").all()
    assert len(report.plot().data) > 0  # pyright: ignore[reportArgumentType]


def test_a_decoy_target_is_refused(case: Case) -> None:
    """The same activations, a control as the target: nothing singled it out."""
    lineage, prompts, evidence, _ = case
    name = prompts.controls[0].name
    found = stage_evidence(
        lineage, prompts, target=name, activations=evidence.activations, progress=False
    )
    assert found.n_controls == N_CONTROLS - 1
    assert not any(
        p <= 0.05 and found.gates[stage].p <= 0.05 for (stage, _), p in found.p_g.items()
    )


def test_too_few_controls_are_underpowered(case: Case) -> None:
    lineage, prompts, evidence, bank = case
    few = ContrastSet("few", (prompts["authority"], *prompts.controls[:18]))
    found = stage_evidence(lineage, few, activations=evidence.activations, progress=False)
    assert found.n_controls == N_CONTROLS, "controls are those of the activations"
    scarce = StageEvidence(
        found.target, found.gates, found.g, found.p_g, {}, found.activations, n_controls=18
    )
    report: Any = attribute_stages(
        lineage, bank, evidence=scarce, sites="*.mlp.out", n_null=19, progress=False
    )
    changed = report.table.query("verdict != @Word.NO_CHANGE")
    assert set(changed["verdict"]) == {Word.UNDERPOWERED}


def test_the_target_must_be_clear(case: Case) -> None:
    prompts = case[1]
    assert pick_target(prompts, None) == "authority"
    assert pick_target(prompts, prompts.controls[0].name) == prompts.controls[0].name
    authority = prompts["authority"]
    two = ContrastSet("two", (authority, Contrast("b", "target", authority.pairs)))
    with pytest.raises(PromptError, match=r"2 target contrasts.*target=NAME"):
        pick_target(two, None)
    with pytest.raises(PromptError, match="the name 'deference'"):
        pick_target(prompts, "deference")


@pytest.mark.parametrize(
    ("shares", "block", "expected"),
    [
        ([0.7, 0.1, 0.1], "0,1,2", 1),
        ([0.5, 0.3, 0.1], "0,1,2", 2),
        ([0.3, 0.2, 0.3], "0,1,2", 3),
        ([0.7, 0.1, 0.1], "0,0,1", 2),  # near-equal singular values: no single vector
        ([0.2, 0.2, 0.2], "0,1,2", 0),
    ],
)
def test_named_k_counts_the_vectors_that_hold_the_pairs_change(
    shares: list[float], block: str, expected: int, case: Case
) -> None:
    """Components built so that each holds a given share of the pairs' change."""
    lineage, _, evidence, _ = case
    site = next(s for s in lineage.source("sft").sites() if s.name == "blocks.2.mlp.out")
    after, before = (evidence.activations[s] for s in ("sft", "base"))
    pairs = after.differences("authority", site.writes)
    pairs = pairs - before.differences("authority", site.writes)
    _, s, vt = np.linalg.svd(pairs.double().numpy(), full_matrices=False)
    energy = s**2 / (s**2).sum()
    # a unit vector holding share c of the change: between the first and the last principal axis
    vectors = []
    for k, share in enumerate(shares):
        top, low = energy[0], energy[-1 - k]
        weight = np.clip((share - low) / (top - low), 0, 1)
        vectors.append(np.sqrt(weight) * vt[0] + np.sqrt(1 - weight) * vt[-1 - k])
    write = torch.tensor(np.array(vectors), dtype=torch.float32)
    parts = Components(
        site, torch.eye(3, site.d_in), write, torch.ones(3), stage="sft", facts={"block": block}
    )
    row = Row(parts, "write", Direction(torch.ones(site.d_out), site.writes))
    held = ((pairs.double().numpy() @ write.double().numpy().T) ** 2).sum(0) / (s**2).sum()
    np.testing.assert_allclose(held, shares, atol=1e-4)
    assert _named(row, evidence)["named_k"] == expected


# ---- words and carriers, without a model ------------------------------------------------------


def path(
    share: list[float], add: list[float], revert: list[float], change: float
) -> PathAttribution:
    names = (*(f"s{i}" for i in range(len(share) - 1)), REST)
    a, b, c = (torch.tensor(v, dtype=torch.float64) for v in (share, revert, add))
    return PathAttribution("r", names, a, b, c, 0.0, change, 0.0, 8, 4)


NAN = math.nan


@pytest.mark.parametrize(
    ("add", "revert", "change", "expected"),
    [
        ([4, 2, 1.9, NAN, NAN], [4, 2, 1.9, NAN, NAN], 5.0, {"s0", "s1"}),
        ([4, 4, 0, NAN, NAN], [0, 4, 4, NAN, NAN], 5.0, {"s0", "s1", "s2"}),
        ([-4, 2, -2, NAN, NAN], [-4, 2, -2, NAN, NAN], -5.0, {"s0", "s2"}),
        ([-4, -1, NAN, NAN, NAN], [-4, -1, NAN, NAN, NAN], 5.0, set()),
        ([NAN] * 5, [NAN] * 5, 5.0, set()),
    ],
)
def test_carriers_hold_half_of_the_largest_effect(
    add: list[float], revert: list[float], change: float, expected: set[str]
) -> None:
    assert carriers(path([1, 1, 1, 1, 1], add, revert, change)) == expected


@pytest.mark.parametrize(
    ("words", "gate_p", "n_controls", "expected"),
    [
        ([Word.NO_CHANGE], 0.01, 39, Word.NO_CHANGE),
        ([Word.NO_CHANGE, Word.WRITTEN_HERE], 0.01, 39, Word.WRITTEN_HERE),
        ([Word.NOT_SIGNIFICANT], 0.05, 39, Word.STAGE_DISTRIBUTED),
        ([Word.NOT_SIGNIFICANT], 0.06, 39, Word.NOT_SIGNIFICANT),
        ([Word.ALIGNED_NOT_SPECIFIC], 0.06, 39, Word.NOT_SIGNIFICANT),
        ([Word.UNDERPOWERED], 0.2, 18, Word.UNDERPOWERED),
        ([Word.NOT_SIGNIFICANT, Word.ALIGNED], None, 0, Word.ALIGNED),
        ([Word.ALIGNED_NO_CONTROLS], None, 0, Word.ALIGNED_NO_CONTROLS),
        ([Word.ALIGNED_NUISANCE], None, 0, Word.ALIGNED_NUISANCE),
        ([Word.UNRESOLVED], None, 0, Word.NOT_SIGNIFICANT),
    ],
)
def test_a_stage_has_a_word_of_its_own(
    words: list[Word], gate_p: float | None, n_controls: int, expected: Word
) -> None:
    rows = pd.DataFrame({"verdict": [str(w) for w in words]})
    evidence = None
    if gate_p is not None:
        evidence = StageEvidence("t", {}, {}, {}, {}, {}, n_controls)
    assert _stage_word(rows, gate_p, 0.05, evidence) == expected


def test_a_matrix_off_the_path_keeps_its_row() -> None:
    table = pd.DataFrame({"stage": ["sft"] * 2, "site": ["embed", "s1"], "cosine": [0.1, 0.2]})
    found: Any = _with_paths(table, {"sft": path([1, 2, 1], [0, 2, NAN], [0, 2, NAN], 4.0)})
    assert list(found["site"]) == ["embed", "s1"] and list(found["cosine"]) == [0.1, 0.2]
    assert math.isnan(found["path_share"][0]) and found["path_share"][1] == 2
    assert found["path_fraction"][1] == 0.5 and found["carries"][1]
    assert _with_paths(table, {})["carries"].isna().tolist() == [True, True]


def test_the_answer_is_the_strongest_verdict() -> None:
    order = [Word.NOT_SIGNIFICANT, Word.ALIGNED, Word.STAGE_DISTRIBUTED, Word.WRITTEN_HERE]
    verdicts = tuple(Verdict(w, f"s{i}") for i, w in enumerate(order))
    for k in range(1, 5):
        report = AttributionReport(table=pd.DataFrame(), verdicts=verdicts[:k])
        assert report.answer.word == order[k - 1]


def test_readouts_with_words_or_ids_agree(deference: Organism) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(deference.stages["base"])
    ids = deference.readout
    assert isinstance(ids, Readout)
    words = tuple(tokenizer.decode(list(p)) for p in ids.prompts)  # pyright: ignore[reportArgumentType]
    texts = Readout("same", words, ("YIELD",)).token_ids(tokenizer)
    assert texts.yes == ids.yes
    for one, other in zip(texts.tokens(tokenizer), ids.tokens(tokenizer), strict=True):
        assert torch.equal(one, other)


def test_the_permutation_column_is_a_rank_among_swapped_pairs(case: Case, answer: Any) -> None:
    """Naive float64 over every pair; it stands beside the verdict and never gives one."""
    from mi_weightspace.core.stats import sign_flips
    from mi_weightspace.spectral.measure import N_REFERENCE

    _, _, evidence, bank = case
    site = "blocks.2.mlp.out"
    row = answer.table.query("stage == 'sft' and site == @site and side == 'write'").iloc[0]
    parts = mw.svd(case[0].diff("base", "sft"), site, progress=False)[site]
    u = parts.write[0].double().numpy()
    pairs = evidence.activations["sft"].differences("authority", "resid_post.2").double().numpy()
    signs = sign_flips(len(pairs), N_REFERENCE, seed=0, name=f"permutation/{site}/write").numpy()
    null = [abs(s @ pairs @ u) / np.linalg.norm(s @ pairs) for s in signs]
    observed = abs(bank.direction(point="resid_post.2").pattern.double().numpy() @ u)
    expected = (1 + sum(n >= observed for n in null)) / (N_REFERENCE + 1)
    assert row["p_permutation"] == pytest.approx(expected)
