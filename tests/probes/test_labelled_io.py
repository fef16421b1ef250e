"""Labelled sets written and read again, and what a reader is told of a bad file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from probes.datasets_io import to_jsonl
from probes.labelled_io import (
    COLUMNS,
    labelled_to_dataset,
    labelled_to_jsonl,
    load_labelled,
    to_rows,
)

pytestmark = pytest.mark.quick

TEXTS = LabelledSet(
    tuple(
        LabelledPrompt(
            f"prompt {i} — ümlaut", i % 2, f"c{i // 2}", f"i{i}", "eval" if i < 4 else "other",
            {"topic": "tea", "key": str(i)}, "book",
        )
        for i in range(8)
    ),
    "texts",
)  # fmt: skip
TOKENS = LabelledSet(
    tuple(LabelledPrompt((1, 5 + i), i % 2, f"c{i}", f"i{i}") for i in range(6)), "tokens"
)


@pytest.mark.parametrize("labelled", [TEXTS, TOKENS], ids=["texts", "tokens"])
def test_round_trips(labelled: LabelledSet, tmp_path: Path) -> None:
    path = labelled_to_jsonl(labelled, tmp_path / f"{labelled.name}.jsonl")
    assert path.read_text(encoding="utf-8").count("\n") == len(labelled)
    again = load_labelled(path)
    assert again == labelled and again.prompts_hash == labelled.prompts_hash
    assert set(json.loads(path.read_text().splitlines()[0])) == set(COLUMNS)
    data = labelled_to_dataset(labelled)
    data.save_to_disk(tmp_path / "folder")
    frame = data.to_pandas()
    frame.to_parquet(tmp_path / "rows.parquet")  # pyright: ignore[reportAttributeAccessIssue]
    sources = [tmp_path / "folder", tmp_path / "rows.parquet", data, frame, to_rows(labelled)]
    for source in sources:
        found = load_labelled(source, name=labelled.name)
        assert found == labelled, type(source)
    assert load_labelled(labelled) is labelled
    assert load_labelled(str(path)).name == labelled.name


def test_short_columns() -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"t{i}", "label": float(i % 2), "item_id": i // 2, "wording_id": "w"}
        for i in range(4)
    ]
    found = load_labelled(rows)
    assert found.clusters == ("0×w", "0×w", "1×w", "1×w") and found.labels.tolist() == [0, 1, 0, 1]
    assert found.name == "labelled" and found.contexts == ("",) * 4
    del rows[0]["wording_id"]
    assert load_labelled(rows).clusters[0] == "0"
    own = [{"prompt": f"t{i}", "label": i % 2, "cluster_id": i} for i in range(4)]
    assert [r.item_id for r in load_labelled(own)] == ["row0", "row1", "row2", "row3"]


def test_contrasts_are_read_as_pairs(tmp_path: Path) -> None:
    pairs = tuple(Pair(f"i{k}", f"bad {k}", f"good {k}") for k in range(5))
    contrasts = ContrastSet("c", (Contrast("c", "target", pairs),))
    wanted = LabelledSet.from_contrast(contrasts)
    assert load_labelled(contrasts) == wanted == load_labelled(contrasts["c"])
    path = to_jsonl(contrasts, tmp_path / "c.jsonl")
    assert load_labelled(path) == wanted
    builtin = load_labelled("authority")
    assert len(builtin) == 2 * builtin.n_clusters > 20


def good(**changes: Any) -> list[dict[str, Any]]:
    rows = to_rows(TEXTS)
    rows[2] = {k: v for k, v in (rows[2] | changes).items() if v != "absent"}
    return rows


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "absent"}, r"row 2: got no prompt"),
        ({"prompt": " "}, r"the prompt ' '"),
        ({"prompt": []}, r"the prompt \[\]"),
        ({"prompt": [1, "a"]}, r"the prompt \[1, 'a'\]"),
        ({"label": "absent"}, r"no label"),
        ({"label": "1"}, r"the label '1'"),
        ({"label": 2}, r"the label 2"),
        ({"label": 0.5}, r"the label 0.5"),
        ({"cluster_id": "absent", "item_id": "absent"}, r"neither cluster_id nor item_id"),
        ({"attributes": "{tea"}, r"attributes that are no JSON"),
        ({"attributes": "[1]"}, r"attributes \[1\]"),
        ({"attributes": 3}, r"attributes 3"),
        ({"prompt": "prompt 7 — ümlaut"}, r"same prompt under both labels"),
    ],
)
def test_refused_rows(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(PromptError, match=says) as refusal:
        load_labelled(good(**changes), name="mine")
    assert "'mine'" in str(refusal.value)


def test_refused_sources(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "label": 1\n')
    for source, says in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "a.csv", "a .csv to read"),
        (tmp_path / "a.jsonl", "a.jsonl, line 1: got no JSON"),
        (3, "a int"),
        ({"train": []}, r"a dict with the splits \['train'\]"),
        ([], "no rows"),
    ]:
        with pytest.raises(PromptError, match=says):
            load_labelled(source)
    mixed = LabelledSet((TEXTS.rows[0], TOKENS.rows[1]), "mixed")
    with pytest.raises(PromptError, match="text in some rows and token ids in others"):
        labelled_to_dataset(mixed)
