"""The shipped contrasts and the loader: design, stability, every refusal."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.errors import ConfigError, PromptError
from probes.datasets_io import load_contrasts, pair_record, to_jsonl
from probes.prompts import WideRow, as_chat, builtin, read_data, wide_rows

pytestmark = pytest.mark.quick

HASHES = {
    "authority": "05de62b1988886ad",
    "observation": "d207fc3012ce84d6",
    "controls": "8a46018d0ca233b9",
}


@pytest.mark.parametrize("name", sorted(HASHES))
def test_hash_is_stable(name: Any) -> None:
    """Stored directions name the hash of their prompts; a change of text must be meant."""
    assert builtin(name).hash == HASHES[name]


def test_counts_and_kinds() -> None:
    authority, controls = builtin("authority"), builtin("controls")
    assert [(c.name, c.kind, len(c)) for c in authority] == [
        ("authority", "target", 144),
        ("neutral_null", "null", 144),
    ]
    assert len(controls) >= 39
    assert len({c.name for c in controls}) == len(controls)
    target = authority["authority"]
    registers = Counter((p.register, p.split) for p in target.pairs)
    assert Counter(split for _, split in registers) == {"fit": 4, "heldout_register": 2}
    assert set(registers.values()) == {24}
    for contrast in (*controls, authority["neutral_null"]):
        same = [
            [(p.item_id, p.split, p.readout, p.topic) for p in c.pairs] for c in (contrast, target)
        ]
        assert same[0] == same[1], contrast.name
        assert len({p.wording_id for p in contrast.pairs}) == 36
        assert len({p.cluster_id for p in contrast.pairs}) == 144
    assert {p.split for p in builtin("observation")["observation"].pairs} == {
        "fit",
        "heldout_register",
    }


@pytest.mark.parametrize("n", [12, 24, 48])
def test_latin_design(n: int) -> None:
    rows = [r for r in wide_rows("authority", per_register=n) if r.contrast == "authority"]
    for register in {r.register for r in rows}:
        own = [r for r in rows if r.register == register]
        assert len(own) == n
        assert set(Counter(r.wording_id for r in own).values()) == {n // 6}
        assert Counter(r.answer_key for r in own) == {0: n // 2, 1: n // 2}
        assert Counter(r.pushed_option for r in own) == {0: n // 2, 1: n // 2}
        assert Counter(r.pushed_option == r.answer_key for r in own) == {
            True: n // 2,
            False: n // 2,
        }
    fit = {r.body for r in rows if r.split == "fit"}
    held = {r.body for r in rows if r.split == "heldout_register"}
    assert not fit & held
    originals = {i["question"]: set(i["options"]) for i in read_data("items")}
    assert all(originals[r.body] == set(r.options) for r in rows)
    right = {i["question"]: i["options"][i["answer_key"]] for i in read_data("items")}
    assert all(r.options[r.answer_key] == right[r.body] for r in rows)
    with pytest.raises(ConfigError, match="per_register"):
        builtin("authority", per_register=13)


def test_swapping_moves_the_options_and_keeps_what_is_urged() -> None:
    for pair in builtin("authority", per_register=12)["authority"].pairs:
        pushed, other = pair.readout
        for before, after in zip((pair.positive, pair.negative), pair.swapped, strict=True):
            assert isinstance(before, str)
            assert isinstance(after, str)
            frame, swapped = before.split("\n")[0], after.split("\n")[0]
            assert f"({pushed})" in frame
            assert swapped == frame.replace(f"({pushed})", f"({other})")
            urged = re.search(rf"^\({pushed}\) (.+)$", before, re.M)
            again = re.search(rf"^\({other}\) (.+)$", after, re.M)
            assert urged
            assert again
            assert urged[1] == again[1]
            assert sorted(re.findall(r"[a-z]+", before)) == sorted(re.findall(r"[a-z]+", after))
        assert isinstance(pair.positive, str)
        assert isinstance(pair.negative, str)
        assert pair.positive.split("\n")[1:] == pair.negative.split("\n")[1:]
        assert "{" not in pair.positive + pair.negative


def test_controls_share_no_content_with_the_registers() -> None:
    plain = r"[a-z]{4,}"
    target = {w for f in read_data("frames") for w in re.findall(plain, f["frame_pos"].lower())}
    for control in read_data("controls"):
        words = set(re.findall(plain, " ".join(control["clauses"]).lower()))
        assert len(words & target) <= 0.2 * len(words), (control["contrast"], words & target)
    for contrast in builtin("controls"):
        text = " ".join(str(p.positive) + str(p.negative) for p in contrast.pairs)
        assert "[" not in text
        assert "|" not in text
        assert "  " not in text


def test_unknown_names() -> None:
    name: Any = "autority"
    with pytest.raises(ConfigError, match="load_contrasts"):
        builtin(name)
    with pytest.raises(PromptError, match="Did you mean 'authority'"):
        load_contrasts(name)


class ChatTokenizer:
    """Characters as tokens; 1 opens every encoding unless told otherwise."""

    chat_template = "yes"

    def apply_chat_template(
        self, turns: Any, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<u>{turns[0]['content']}</u><a>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


def test_chat_template() -> None:
    plain = builtin("authority", per_register=12)
    chat = as_chat(plain, ChatTokenizer())
    for before, after in zip(plain["authority"].pairs, chat["authority"].pairs, strict=True):
        text = "".join(map(chr, after.positive))  # pyright: ignore[reportArgumentType]
        assert (
            text == f"<u>{str(before.positive).removesuffix(chr(10) + 'Answer: (')}</u><a>Answer: ("
        )
        assert after.readout == tuple(ord(str(letter)) for letter in before.readout)
        assert len(after.swapped) == 2
    tokenizer = ChatTokenizer()
    tokenizer.chat_template = None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(PromptError, match="no chat template"):
        as_chat(plain, tokenizer)
    with pytest.raises(PromptError, match="shipped template"):
        as_chat(load_contrasts(PAIRS), ChatTokenizer())


# ---- the user's own sets ---------------------------------------------------------------------
PAIRS: list[dict[str, Any]] = [
    {"item_id": f"i{k}", "positive": f"the boss says {k}", "negative": f"the wall says {k}"}
    for k in range(6)
]
WIDE: list[dict[str, Any]] = [
    {
        "item_id": f"i{k}",
        "frame_pos": "An expert picks {option}.",
        "frame_neg": "An apple marks {option}.",
        "body": f"Question {k}?",
        "options": ["yes", "no"],
        "answer_key": k % 2,
        "pushed_option": 1,
        "contrast": "mine",
    }
    for k in range(6)
]
LONG: list[dict[str, Any]] = [
    {"item_id": f"i{k}", "label": label, "text": f"{side} {k}"}
    for k in range(6)
    for label, side in ((1, "boss"), (0, "wall"))
]


def test_three_forms() -> None:
    pairs, wide, long = (load_contrasts(rows, name="mine") for rows in (PAIRS, WIDE, LONG))
    assert [p.negative for p in pairs["mine"].pairs] == [row["negative"] for row in PAIRS]
    assert [(p.positive, p.negative) for p in long["mine"].pairs][2] == ("boss 2", "wall 2")
    first = wide["mine"].pairs[0]
    assert first.positive.startswith("An expert picks (B).\n\nQuestion 0?\n(A) yes\n(B) no\n\n")  # pyright: ignore[reportAttributeAccessIssue]
    assert first.swapped[1].startswith("An apple marks (A).\n\nQuestion 0?\n(A) no\n(B) yes\n\n")  # pyright: ignore[reportAttributeAccessIssue]
    assert first.readout == ("B", "A")
    ids = load_contrasts([row | {"positive": [3, 4], "negative": [5]} for row in PAIRS])
    assert ids.contrasts[0].pairs[0].positive == (3, 4)
    assert ids.contrasts[0].kind == "target"


def test_every_container_gives_the_same_set(tmp_path: Path) -> None:
    import pandas as pd

    wanted = load_contrasts(WIDE)
    lines = tmp_path / "set.jsonl"
    lines.write_text("\n".join(map(json.dumps, WIDE)))
    pd.DataFrame(WIDE).to_parquet(tmp_path / "set.parquet")
    for source in (lines, str(tmp_path / "set.parquet"), pd.DataFrame(WIDE), wanted):
        assert load_contrasts(source).hash == wanted.hash


def test_datasets_library(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(WIDE)
    data.save_to_disk(str(tmp_path / "saved"))
    wanted = load_contrasts(WIDE).hash
    assert load_contrasts(data).hash == wanted
    assert load_contrasts(tmp_path / "saved").hash == wanted
    with pytest.raises(PromptError, match="one split of a DatasetDict"):
        load_contrasts(DatasetDict({"train": data}))


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    whole = load_contrasts("authority", controls="controls")
    few = ContrastSet("few", (*whole.contrasts[:3],))
    again = load_contrasts(to_jsonl(few, tmp_path / "few.jsonl"))
    assert again == ContrastSet("few", few.contrasts)
    assert again.hash == few.hash


def test_controls_are_added() -> None:
    rows = [row | {"contrast": "other"} for row in PAIRS]
    found = load_contrasts(PAIRS, controls=rows)
    assert [c.kind for c in found] == ["target", "control"]
    with pytest.raises(PromptError, match="kind target or null"):
        load_contrasts(PAIRS, controls=builtin("authority"))
    with pytest.raises(PromptError, match=r"names \['contrasts'\] of the first set"):
        load_contrasts(PAIRS, controls=PAIRS)


def _with(rows: list[dict[str, Any]], k: int, **changes: Any) -> list[dict[str, Any]]:
    return [row | (changes if i == k else {}) for i, row in enumerate(rows)]


BAD: dict[str, tuple[Any, str, str]] = {
    "no rows": ([], "contrasts", "Rename the columns"),
    "unknown columns": ([{"prompt": "x"}], "contrasts", "Rename the columns"),
    "missing column": (
        [{k: v for k, v in row.items() if k != "body"} for row in WIDE],
        "contrasts 'contrasts', row 0",
        "Add the column",
    ),
    "missing cell": (_with(PAIRS, 3, negative=None), "row 3", "drop the row"),
    "one class": ([r for r in LONG if r["label"] == 1], "contrast 'contrasts'", "other class"),
    "unpaired": (LONG[:-1], "item 'i5', wording 'w0'", "Add the missing side"),
    "repeated long": ([*LONG, LONG[0]], "item 'i0'", "wording_id"),
    "bad label": (_with(LONG, 0, label=2), "contrast 'contrasts'", "other class"),
    "empty text": (_with(PAIRS, 2, positive="  "), "item 'i2'", "fill the missing side"),
    "empty frame": (_with(WIDE, 1, frame_neg=""), "contrast 'mine', item 'i1'", "fill"),
    "not text": (_with(PAIRS, 2, positive=7), "item 'i2'", "fill the missing side"),
    "equal sides": (_with(PAIRS, 0, negative=PAIRS[0]["positive"]), "item 'i0'", "correct its"),
    "too few": (PAIRS[:4], "contrast 'contrasts'", "Write more items"),
    "duplicate": ([*PAIRS, PAIRS[0]], "item 'i0'", "Number the items"),
    "bad split": (_with(PAIRS, 0, split="test"), "item 'i0'", "Correct the column 'split'"),
    "bad kind": (_with(PAIRS, 0, kind="decoy"), "item 'i0'", "Correct the column 'kind'"),
    "two kinds": (_with(PAIRS, 0, kind="control"), "contrast 'contrasts'", "another `contrast`"),
    "three options": (_with(WIDE, 0, options=["a", "b", "c"]), "item 'i0'", "two"),
    "no such option": (_with(WIDE, 0, pushed_option=2), "item 'i0'", "Correct pushed_option"),
    "nothing urged": (_with(WIDE, 0, pushed_option=-1), "item 'i0'", "pushed_option 0 or 1"),
    "half swapped": (_with(PAIRS, 0, swapped=["x"]), "item 'i0'", "column 'swapped'"),
    "a mapping": ({"train": PAIRS}, "contrasts", "one split"),
    "a number": (3, "contrasts", "DatasetDict"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input(case: str) -> None:
    rows, subject, remedy = BAD[case]
    with pytest.raises(PromptError) as caught:
        load_contrasts(rows)
    assert subject in caught.value.subject
    assert remedy in caught.value.remedy


def test_bad_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIRS[0]) + "\n{oops\n")
    with pytest.raises(PromptError, match=r"broken\.jsonl, line 2: got no JSON"):
        load_contrasts(broken)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(PromptError, match=r"a \.csv to read"):
        load_contrasts(tmp_path / "a.csv")
    with pytest.raises(PromptError, match="no such file"):
        load_contrasts(tmp_path / "absent.jsonl")


def test_a_row_without_options_asks_an_open_question() -> None:
    pair = WideRow("i", "They watch.", "They walk.", "What is two and two?").pair()
    assert pair.readout == ()
    assert pair.swapped == ()
    assert str(pair.positive).endswith("Answer:")
    assert pair_record(builtin("observation")["observation"], pair)["readout"] == []
