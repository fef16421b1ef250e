"""The audit: a clean set passes, each planted fault is found and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.report import load_report
from probes.prompt_audit import audit
from probes.prompts import builtin

pytestmark = pytest.mark.quick


class Words:
    """One token a word, an id by first appearance."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {
            "input_ids": [[self.ids.setdefault(w, len(self.ids)) for w in t.split()] for t in texts]
        }


SUFFIX = " please give your answer in one word now :"


def pair(k: int, positive: str, negative: str, split: Any, **more: Any) -> Pair:
    body = f" question{k}{SUFFIX}"
    fields = {"item_id": f"i{k}", "topic": "t", "readout": ("AB"[k % 2], "BA"[k % 2])} | more
    return Pair(positive=positive + body, negative=negative + body, split=split, **fields)


def make(**changes: Any) -> ContrastSet:
    """Ten fit and six held-out pairs without a word in common."""
    pairs = [pair(k, f"boss{k} says", f"wall{k} hums", "fit") for k in range(10)]
    pairs += [pair(k, f"law{k} rules", f"tree{k} sways", "heldout_register") for k in range(10, 16)]
    for k, change in changes.items():
        pairs[int(k[1:])] = replace(pairs[int(k[1:])], **change)
    return ContrastSet("mine", (Contrast("mine", "target", tuple(pairs)),))


def value(report: Any, check: str) -> tuple[float, bool, str]:
    row = report.table[report.table["check"] == check].iloc[0]
    return float(row["value"]), bool(row["ok"]), str(row["detail"])


def test_a_clean_set_passes(tmp_path: Path) -> None:
    contrasts = make()
    report = audit(contrasts, Words())
    assert report.ok
    assert not report.reservations
    assert report.contrasts.hash == contrasts.hash
    assert value(report, "suffix")[0] == 10  # the question and nine words
    assert value(report, "register_overlap")[0] == 0
    assert value(report, "bag_of_words")[0] == 0.5
    assert value(report, "letter_balance")[0] == 0
    loaded = load_report(report.save(tmp_path / "run"))
    assert loaded.equals(report)
    assert loaded.contrasts.hash == contrasts.hash  # pyright: ignore[reportAttributeAccessIssue]
    assert report.plot().data


def test_the_name_stays_the_function() -> None:
    """A module of the same name would take its place on first use."""
    import probes

    assert probes.audit is audit
    assert probes.audit is audit


def test_the_shipped_sets_pass() -> None:
    whole = builtin("authority") + builtin("observation")
    some = ContrastSet("some", whole.contrasts + builtin("controls").contrasts[:6])
    report = audit(some, Words())
    table: Any = report.table
    # words are not matched exactly in controls, whose lengths were matched in tokens
    assert table[table["check"] != "token_length"]["ok"].all()
    authored = table[(table["check"] == "token_length") & (table["kind"] != "control")]
    assert (authored["value"] == 0).all()
    baseline = table[(table["check"] == "bag_of_words") & (table["contrast"] == "authority")]
    assert 0.35 < float(baseline["value"].iloc[0]) < 0.75


def test_pairs_of_unlike_length_are_dropped_and_counted() -> None:
    long = make()["mine"].pairs[3]
    one = make(p3={"positive": f"so {long.positive}"})
    two = make(p3={"positive": f"and so {long.positive}"})
    assert len(audit(one, Words()).contrasts["mine"]) == 16
    report = audit(two, Words())
    assert value(report, "token_length") == (1 / 16, False, "1 of 16 pairs dropped")
    assert [p.item_id for p in report.contrasts["mine"].pairs] == [
        p.item_id for p in two["mine"].pairs if p.item_id != "i3"
    ]
    assert "1 of 16 pairs dropped" in report.reservations[0]


def test_too_few_left() -> None:
    pairs = make()["mine"].pairs
    longer = tuple(replace(p, positive=f"a b {p.positive}") for p in pairs[3:])
    broken = ContrastSet(
        "b", (Contrast("keep", "target", pairs), Contrast("weak", "control", pairs[:3] + longer))
    )
    report = audit(broken, Words())
    assert [c.name for c in report.contrasts] == ["keep"]
    assert any(text.startswith("weak: left out") for text in report.reservations)
    for lo, given in ((3, "3 pairs"), (0, "no pair")):
        changes = {
            f"p{k}": {"positive": f"a b {make()['mine'].pairs[k].positive}"} for k in range(lo, 16)
        }
        with pytest.raises(PromptError, match=given) as caught:
            audit(make(**changes), Words())
        assert caught.value.subject == "contrast 'mine'"


def test_no_shared_suffix() -> None:
    report = audit(make(p0={"positive": "boss0 says it", "negative": "wall0 hums it"}), Words())
    assert value(report, "suffix") == (1.0, False, "at least 1 tokens")


def test_questions_in_two_splits() -> None:
    other = make()["mine"].pairs[0]
    renamed = {
        "positive": str(other.positive).replace("boss0", "law10"),
        "negative": str(other.negative).replace("wall0", "tree10"),
    }
    for change in ({"item_id": "i0"}, renamed):
        found = value(audit(make(p10=change), Words()), "split_overlap")
        assert found[:2] == (1.0, False)


def test_the_same_options_in_another_order_are_the_same_question() -> None:
    text = "{}\n\nWhich?\n({}) rice\n({}) butter\n\none two three four five six seven eight"
    changes = {
        f"p{k}": {
            "positive": text.format(f"boss{k} .", *order),
            "negative": text.format(f"wall{k} .", *order),
        }
        for k, order in ((0, "AB"), (12, "BA"))
    }
    assert value(audit(make(**changes), Words()), "split_overlap")[:2] == (1.0, False)


def test_words_shared_by_fit_and_heldout_registers() -> None:
    """Jaccard by hand: fit {boss0-9, says, wall0-9, hums} 22, held 14, two of them shared."""
    changes = {
        f"p{k}": {
            "positive": str(make()["mine"].pairs[k].positive).replace("rules", "says"),
            "negative": str(make()["mine"].pairs[k].negative).replace("sways", "hums"),
        }
        for k in range(10, 16)
    }
    report = audit(make(**changes), Words())
    jaccard, ok, detail = value(report, "register_overlap")
    assert jaccard == pytest.approx(2 / (22 + 14 - 2))
    assert ok
    assert detail == "hums, says"
    # and those words give the label away
    assert value(report, "bag_of_words")[0] == 1.0
    everything = make(
        **{
            f"p{k}": {
                "positive": str(make()["mine"].pairs[k - 10].positive).replace(
                    f"question{k - 10}", f"question{k}"
                ),
                "negative": str(make()["mine"].pairs[k - 10].negative).replace(
                    f"question{k - 10}", f"question{k}"
                ),
            }
            for k in range(10, 16)
        }
    )
    assert not value(audit(everything, Words()), "register_overlap")[1]


def test_topics_and_letters_out_of_balance() -> None:
    topics = {f"p{k}": {"topic": "u"} for k in range(10, 13)}
    assert value(audit(make(**topics), Words()), "topic_balance")[:2] == (0.5, False)
    letters = {f"p{k}": {"readout": ("A", "B")} for k in range(16)}
    assert value(audit(make(**letters), Words()), "letter_balance")[:2] == (0.5, False)


def test_token_ids_need_no_tokenizer() -> None:
    with pytest.raises(PromptError, match="without a tokenizer") as caught:
        audit(make())
    assert "tokenizer=" in caught.value.remedy
    words = Words()
    ids = ContrastSet(
        "ids",
        tuple(
            Contrast(
                c.name,
                c.kind,
                tuple(
                    replace(
                        p,
                        positive=tuple(words([str(p.positive)])["input_ids"][0]),
                        negative=tuple(words([str(p.negative)])["input_ids"][0]),
                    )
                    for p in c.pairs
                ),
            )
            for c in make()
        ),
    )
    report = audit(ids)
    assert report.ok
    assert report.contrasts.hash == ids.hash
