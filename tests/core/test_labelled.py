"""Labelled prompts: what a set refuses, and that its clusters and contexts are what was given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet

pytestmark = pytest.mark.quick


def row(prompt: Any, label: Any, cluster: str, context: str = "", **more: Any) -> LabelledPrompt:
    return LabelledPrompt(prompt, label, cluster, f"i-{prompt}", context, **more)


ROWS = (
    row("a", 1, "x", "eval"),
    row("b", 0, "y", "eval", attributes={"topic": "tea", "key": "3"}),
    row((3, 4), 1, "x", "other"),
    row("d", 0, "z", "other"),
    row("e", 1, "w", "eval"),
)


def test_columns_are_in_the_order_of_the_rows() -> None:
    found = LabelledSet(ROWS, "s")
    assert found.labels.tolist() == [1, 0, 1, 0, 1] and found.labels.dtype == torch.int64
    assert found.clusters == ("x", "y", "x", "z", "w")
    assert found.cluster_index.tolist() == [0, 1, 0, 2, 3] and found.n_clusters == 4
    assert found.contexts == ("eval", "eval", "other", "other", "eval")
    assert found.context_names == ("eval", "other")
    assert found.prompts == ("a", "b", (3, 4), "d", "e")
    assert len(found) == 5 and list(found) == list(ROWS)
    assert "3 + 2 rows in 4 clusters" in repr(found)
    assert LabelledSet(list(ROWS), "s") == found  # pyright: ignore[reportArgumentType]


def test_within_take_and_sum() -> None:
    found = LabelledSet(ROWS, "s")
    inside, outside = found.within("eval"), found.within("other")
    assert [r.prompt for r in inside] == ["a", "b", "e"]
    assert outside.labels.tolist() == [1, 0]
    assert found.take([3, 0]).prompts == ("d", "a")
    both = inside + outside
    assert sorted(map(str, both.prompts)) == sorted(map(str, found.prompts))
    assert both.n_clusters == 4, "x is in both contexts and is one cluster"
    with pytest.raises(PromptError, match=r"context 'evil'.*\['eval', 'other'\]"):
        found.within("evil")
    with pytest.raises(PromptError, match="all of label 1"):
        LabelledSet((*ROWS, row("f", 1, "q", "third")), "s").within("third")


def test_the_hash_knows_every_field_and_no_order_of_attributes() -> None:
    base = LabelledSet(ROWS, "s").prompts_hash
    swapped = replace(ROWS[1], attributes={"key": "3", "topic": "tea"})
    assert LabelledSet((ROWS[0], swapped, *ROWS[2:]), "other name").prompts_hash == base
    changes: list[dict[str, Any]] = [
        {"prompt": "A"}, {"label": 0}, {"cluster_id": "v"}, {"item_id": "n"}, {"context": "c"},
        {"attributes": {"topic": "tin"}}, {"source": "book"},
    ]  # fmt: skip
    others = {
        LabelledSet((*ROWS[:4], replace(ROWS[4], **change)), "s").prompts_hash for change in changes
    }
    assert len(others | {base}) == len(changes) + 1 and len(base) == 16


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((), "got no rows"),
        ((row("a", 1, "x"), row("b", 1, "y")), "2 rows, all of label 1"),
        ((row("a", 0, "x"), row("b", 0, "y")), "all of label 0"),
        ((row("a", 1, "x"), row("b", 0, "x")), "rows in one cluster"),
        ((*ROWS, row("a", 1, "other")), "items 'i-a' and 'i-a'.*two clusters"),
        ((*ROWS, row("a", 0, "x")), "same prompt under both labels"),
    ],
)
def test_refused_sets(rows: Any, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        LabelledSet(rows, "s")
    repeated = LabelledSet((*ROWS, ROWS[0]), "s")
    assert len(repeated) == 6, "a row twice in its own cluster leaks nothing"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("", 1, "x"), "an empty prompt"),
        (("  ", 1, "x"), "an empty prompt"),
        (((), 1, "x"), "an empty prompt"),
        (("a", 2, "x"), "the label 2"),
        (("a", True, "x"), "the label True"),
        (("a", 1.0, "x"), "the label 1.0"),
        (("a", "1", "x"), "the label '1'"),
        (("a", 1, ""), "no cluster_id"),
    ],
)
def test_refused_rows(given: Any, says: str) -> None:
    with pytest.raises(PromptError, match=f"labelled prompt 'i-.*{says}"):
        row(*given)


def test_a_pair_of_a_contrast_is_one_cluster_of_two_rows() -> None:
    pairs = tuple(
        Pair(f"i{k}", f"bad {k} {w}", f"good {k} {w}", wording_id=w, topic="tea")
        for k in range(3)
        for w in ("w0", "w1")
    )
    target = Contrast("authority", "target", pairs)
    control = Contrast("weather", "control", pairs)
    found = LabelledSet.from_contrast(ContrastSet("set", (target, control)))
    assert found.name == "authority" and len(found) == 12 and found.n_clusters == 6
    assert found.labels.tolist() == [1, 0] * 6
    for pair, ours in zip(pairs, zip(found.rows[::2], found.rows[1::2], strict=True), strict=True):
        assert [r.prompt for r in ours] == [pair.positive, pair.negative]
        assert {r.cluster_id for r in ours} == {pair.cluster_id}
        assert ours[0].attributes == {"topic": "tea", "wording": pair.wording_id}
    assert LabelledSet.from_contrast(target) == found
    assert LabelledSet.from_contrast(control).name == "weather"
    two = ContrastSet("two", (target, replace(target, name="second")))
    with pytest.raises(PromptError, match=r"targets \['authority', 'second'\]"):
        LabelledSet.from_contrast(two)
    with pytest.raises(PromptError, match=r"targets \[\]"):
        LabelledSet.from_contrast(ContrastSet("none", (control,)))
