"""The verdict of an inoculation: every branch, every combination one word, published figures."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.verdict import Word
from probes.inoculation_verdict import (
    Evidence,
    Reading,
    detectable,
    judge,
    needed_per_class,
    power,
    published_detection,
)

pytestmark = pytest.mark.quick

AT_NULL, ABOVE, EXPLAINED = Reading(False), Reading(True), Reading(True, explained=True)
WORDS = {
    Word.UNDERPOWERED,
    Word.INSTRUMENT_TOO_WEAK,
    Word.PROMPT_OR_FINETUNING,
    Word.NOT_DETECTED,
    Word.NORM_NOT_DEFEATED,
    Word.SAE_ADDS_NOTHING,
    Word.SAE_UNRESOLVED,
    Word.NON_LINEAR_CODE,
    Word.SAE_ADVANTAGE,
}
STRONGEST = Evidence(
    per_class=128,
    clusters=64,
    open_value=0.99,
    open_low=0.97,
    norm=AT_NULL,
    linear=AT_NULL,
    sae=ABOVE,
    non_linear=AT_NULL,
    beats_linear=True,
)

BRANCHES: list[tuple[Word, dict[str, Any]]] = [
    (Word.UNDERPOWERED, {"per_class": 19}),
    (Word.UNDERPOWERED, {"clusters": 7}),
    (Word.UNDERPOWERED, {"clusters": 7, "open_low": 0.1}),
    (Word.INSTRUMENT_TOO_WEAK, {"open_low": 0.699}),
    (Word.INSTRUMENT_TOO_WEAK, {"open_low": float("nan")}),
    (Word.INSTRUMENT_TOO_WEAK, {"open_low": 0.5, "norm": ABOVE, "linear": ABOVE}),
    (Word.NOT_DETECTED, {"sae": AT_NULL}),
    (Word.NOT_DETECTED, {"sae": Reading(False, explained=True)}),
    (Word.PROMPT_OR_FINETUNING, {"sae": EXPLAINED}),
    (Word.PROMPT_OR_FINETUNING, {"sae": EXPLAINED, "norm": EXPLAINED, "linear": EXPLAINED}),
    (Word.NORM_NOT_DEFEATED, {"norm": ABOVE}),
    (Word.NORM_NOT_DEFEATED, {"norm": ABOVE, "sae": EXPLAINED, "linear": ABOVE}),
    (Word.SAE_ADDS_NOTHING, {"linear": ABOVE, "beats_linear": False}),
    (Word.SAE_ADDS_NOTHING, {"linear": ABOVE, "beats_linear": False, "sae": AT_NULL}),
    (Word.SAE_ADDS_NOTHING, {"linear": ABOVE, "beats_linear": False, "norm": EXPLAINED}),
    (Word.SAE_ADDS_NOTHING, {"linear": ABOVE, "sae": AT_NULL, "beats_linear": True}),
    (Word.SAE_ADDS_NOTHING, {"linear": ABOVE, "sae": EXPLAINED, "beats_linear": True}),
    (Word.SAE_UNRESOLVED, {"beats_linear": False}),
    (Word.SAE_UNRESOLVED, {"beats_linear": False, "linear": EXPLAINED, "non_linear": ABOVE}),
    (Word.SAE_UNRESOLVED, {"missing": ("rbf",)}),
    (Word.SAE_UNRESOLVED, {"unbeaten": {"rbf": False}}),
    (Word.NON_LINEAR_CODE, {"unbeaten": {"rbf": True}, "non_linear": ABOVE}),
    (Word.NON_LINEAR_CODE, {"unbeaten": {"random sae top-k": True, "mlp": False}}),
    (Word.NON_LINEAR_CODE, {"linear": ABOVE, "unbeaten": {"rbf": True}, "non_linear": ABOVE}),
    (Word.NON_LINEAR_CODE, {"sae": AT_NULL, "non_linear": ABOVE, "beats_linear": False}),
    (Word.SAE_ADVANTAGE, {}),
    (Word.SAE_ADVANTAGE, {"linear": ABOVE, "non_linear": ABOVE}),
]


@pytest.mark.parametrize(("word", "changes"), BRANCHES)
def test_every_branch(word: Word, changes: dict[str, Any]) -> None:
    found, reasons = judge(replace(STRONGEST, **changes))
    assert found == word
    assert all(reason.endswith(".") for reason in reasons)
    assert reasons


def test_every_word_has_a_branch() -> None:
    assert {word for word, _ in BRANCHES} == WORDS


readings = st.builds(Reading, st.booleans(), st.booleans())


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Evidence,
        per_class=st.sampled_from([5, 19, 20, 200]),
        clusters=st.sampled_from([2, 7, 8, 100]),
        open_value=st.floats(0, 1),
        open_low=st.sampled_from([0.0, 0.69, 0.70, 0.9, float("nan")]),
        norm=readings,
        linear=readings,
        sae=readings,
        non_linear=readings,
        beats_linear=st.booleans(),
        unbeaten=st.dictionaries(st.sampled_from(["random sae", "rbf"]), st.booleans()),
        missing=st.sampled_from([(), ("rbf",)]),
        needed=st.sampled_from([None, 203]),
    )
)
def test_any_numbers_give_one_word_that_keeps_its_promises(found: Evidence) -> None:
    check_promises(found)


def test_every_combination_gives_one_word_that_keeps_its_promises() -> None:
    each = [Reading(a, e) for a, e in product((False, True), repeat=2)]
    seen = set()
    for opened, *four, beats, unbeaten, missing in product(
        (0.5, 0.9),
        *[each] * 4,
        (False, True),
        ({}, {"rbf": True}, {"rbf": False}, {"rbf": True, "mlp": False}),
        ((), ("mlp",)),
    ):
        found = Evidence(200, 100, 0.9, opened, *four, beats, unbeaten, missing)
        check_promises(found)
        seen.add(judge(found)[0])
    assert seen == WORDS - {Word.UNDERPOWERED}


def check_promises(found: Evidence) -> None:
    word, reasons = judge(found)
    assert word in WORDS
    assert len(reasons) == 1
    assert judge(found) == (word, reasons)
    small = found.per_class < 20 or found.clusters < 8
    weak = not found.open_low >= 0.70
    assert (word == Word.UNDERPOWERED) == small
    assert (word == Word.INSTRUMENT_TOO_WEAK) == (weak and not small)
    if word == Word.SAE_ADVANTAGE:
        assert found.sae.credible
        assert found.beats_linear
        assert not found.unbeaten
        assert not found.missing
        assert not found.norm.credible
    if word == Word.NOT_DETECTED:
        assert not any(r.above for r in found.readings)
    if word in (Word.SAE_ADDS_NOTHING, Word.NORM_NOT_DEFEATED):
        assert found.linear.credible or found.norm.credible
    if word == Word.NON_LINEAR_CODE:
        assert found.non_linear.credible or any(found.unbeaten.values())


def test_the_seeds_published_figures_print_what_the_specification_says() -> None:
    found = published_detection(0.58, 50, 0.582)
    assert str(found) == (
        "SAE top-k AUROC 0.58; 95 % interval at n=50/class [0.47, 0.69]; open stage 0.58 also, so "
        "the instrument has no demonstrated power; equality of stages not shown (no equivalence "
        "margin); dense rival was a norm, not a probe; verdict INSTRUMENT TOO WEAK, need >= 203 "
        "per class."
    )
    assert found.verdict.word == Word.INSTRUMENT_TOO_WEAK
    assert found.needed == 203
    assert found.power == pytest.approx(0.28, abs=0.01)


def test_other_published_figures() -> None:
    strong = published_detection(0.90, 200, 0.95, dense_rival="probe", margin=0.05)
    assert strong.verdict.word == Word.SAE_UNRESOLVED, "no null, no controls: never more"
    assert "need" not in str(strong)
    assert "norm" not in str(strong)
    assert published_detection(0.52, 200, 0.95).verdict.word == Word.NOT_DETECTED
    assert published_detection(0.9, 10, 0.95).verdict.word == Word.UNDERPOWERED
    assert "no open stage" in str(published_detection(0.9, 200))
    for bad in ((1.0, 50, None), (0.6, 1, None), (0.6, 50, 0.0)):
        with pytest.raises(ConfigError, match="published figures"):
            published_detection(*bad)


@pytest.mark.parametrize(
    ("auroc", "n"), [(0.55, 522), (0.58, 203), (0.60, 130), (0.65, 57), (0.70, 32)]
)
def test_sizes_needed_are_those_of_the_specification(auroc: float, n: int) -> None:
    assert needed_per_class(auroc) == n
    assert needed_per_class(1 - auroc) == n, "two-sided"
    assert needed_per_class(auroc - 0.1, 0.4) == n, "around the null's own mean"
    assert power(auroc, n) == pytest.approx(0.8, abs=0.01)
    assert detectable(n) == pytest.approx(auroc, abs=0.0101)
    assert needed_per_class(0.5) is None
