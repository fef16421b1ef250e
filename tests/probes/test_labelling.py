"""The clustered design out of two prompt sets, and confounds planted and absent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import BernoulliNB

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from probes.labelling import _Design, _presence, confounds, two_sets

pytestmark = pytest.mark.quick

TOPICS = ("tea", "rain", "chess", "trains")


def balanced(n: int = 48, seed: int = 0, **changes: Any) -> LabelledSet:
    """Labels drawn without regard to anything in the texts; two wordings a cluster."""
    rng = np.random.default_rng(seed)
    vocabulary = [f"word{i}" for i in range(40)]
    rows = []
    for cluster in range(n):
        for wording in range(2):
            words = " ".join(rng.choice(vocabulary, 8))
            topic = TOPICS[(cluster // 2) % 4]
            label = cluster % 2
            extra = changes.get("extra", lambda label, topic: "")(label, topic)
            named = {
                "topic": changes.get("topics", {}).get(label, topic),
                "id": f"{cluster}-{wording}",
            }
            text = f"{words} {topic}{extra} {cluster} {wording}"
            rows.append(
                LabelledPrompt(text, label, f"c{cluster}", f"i{cluster}-{wording}", "", named)
            )
    return LabelledSet(tuple(rows), "made")


def test_a_balanced_set_is_not_called_confounded() -> None:
    """Over seeds: the share of sets in which anything at all is called is near the level."""
    called = [confounds(balanced(seed=s), n_permutations=39).confounded for s in range(12)]
    assert sum(bool(c) for c in called) <= 2, called
    found = confounds(balanced())
    assert {c.what for c in found.found} == {"length", "words", "attribute topic"}
    assert found["words"].auroc is not None and 0.3 < found["words"].auroc < 0.7
    assert "does not tell the label" in str(found) and "48 clusters" in str(found)
    assert confounds(balanced()) == found, "the seed decides"


def test_length_is_said() -> None:
    longer = balanced(extra=lambda label, _: " and so on" * label)
    found = confounds(longer)
    assert "length" in found.confounded
    assert found["length"].auroc == pytest.approx(1.0)
    assert "14.0 against 11.0 words" in found["length"].says and "! length" in str(found)
    shorter = confounds(balanced(extra=lambda label, _: " and so on" * (1 - label)))["length"]
    assert shorter.confounded and shorter.auroc == pytest.approx(0.0), "in either direction"


def test_a_telling_word_is_said() -> None:
    """One word in half of the positives: seen by the words, and by nothing else."""
    rng = np.random.default_rng(3)
    marked = balanced(
        80, extra=lambda label, _: " gladly" if label and rng.random() < 0.7 else " simply"
    )
    found = confounds(marked)
    assert found.confounded == ("words",)
    assert 0.6 < (found["words"].auroc or 0) < 0.98


def test_a_skewed_attribute_is_said() -> None:
    skewed = balanced(topics={1: "tea"})
    found = confounds(skewed)
    assert "attribute topic" in found.confounded and "length" not in found.confounded
    frame = found.to_pandas()
    assert list(frame.columns) == ["what", "auroc", "p", "confounded", "says"]
    assert "attribute id" not in set(frame["what"]), "an identifier is no attribute to balance"


def test_contexts_without_both_labels_are_said() -> None:
    rows = [
        replace(row, context="eval" if row.label else "other", prompt=f"{row.prompt} x")
        for row in balanced()
    ]
    found = confounds(LabelledSet(tuple(rows), "apart"))
    assert {"context", "context 'eval'", "context 'other'"} <= set(found.confounded)
    assert found["context"].auroc == pytest.approx(1.0)
    assert "holds label 1 alone" in found["context 'eval'"].says
    both = LabelledSet(
        tuple(
            replace(row, context=context, prompt=f"{context} {row.prompt}")
            for row in balanced()
            for context in ("eval", "other")
        ),
        "crossed",
    )
    crossed = confounds(both)
    assert not [c for c in crossed.confounded if c.startswith("context")]
    assert crossed["context"].auroc == pytest.approx(0.5, abs=0.05)


def test_a_perfectly_balanced_attribute_is_not_called() -> None:
    """Its held-out AUROC lies far below one half, and below all permutations."""
    rows = balanced(64).rows
    even = tuple(
        replace(row, attributes={"shape": "ab"[(i // 4) % 2]}) for i, row in enumerate(rows)
    )
    found = confounds(LabelledSet(even, "factorial"))["attribute shape"]
    assert (found.auroc or 0) < 0.45 and (found.p or 0) > 0.5 and not found.confounded


def test_few_clusters_are_said() -> None:
    found = confounds(balanced(12), n_permutations=19)
    assert "label 1 has 6 clusters" in found["clusters of label 1"].says
    assert "clusters of label 0" in {c.what for c in found.found}
    assert not [c for c in confounds(balanced(40)).found if c.what.startswith("clusters")]


def test_pairs_are_permuted_within_and_pure_clusters_whole() -> None:
    pure = _Design(balanced(10), 0)
    assert pure.pure
    for _ in range(20):
        labels = pure.permuted()
        assert labels.sum() == 10
        assert all(len(set(labels[pure.index == c])) == 1 for c in range(10))
    pairs = two_sets([f"bad {i}" for i in range(9)], [f"good {i}" for i in range(9)])
    mixed = _Design(pairs, 0)
    assert not mixed.pure
    drawn = [mixed.permuted() for _ in range(20)]
    assert all((np.bincount(mixed.index, labels) == 1).all() for labels in drawn)
    assert len({tuple(labels) for labels in drawn}) > 5
    assert confounds(pairs)["words"].auroc == pytest.approx(1.0), "bad against good"


def test_words_against_naive_bayes_of_another_library() -> None:
    """Out-of-fold log-odds of present words, fold by fold, equal BernoulliNB's presence terms."""
    labelled = balanced(extra=lambda label, topic: f" {topic[0]}" * label)
    labelled = labelled.take([i for i in range(len(labelled)) if i % 4 or i > 60])  # uneven classes
    design = _Design(labelled, 0)
    table = _presence([str(row.prompt).split() for row in labelled])
    y = labelled.labels.numpy()
    scores = np.zeros(len(y))
    folds = design.folds(y)
    for fold in np.unique(folds):
        test = folds == fold
        assert not set(design.index[test]) & set(design.index[~test]), "clusters stay whole"
        model = BernoulliNB(alpha=1.0).fit(table[~test], y[~test])
        odds = model.feature_log_prob_[1] - model.feature_log_prob_[0]
        found = table[test] @ odds
        scores[test] = found - found.mean()
    assert design._bayes(table, y) == pytest.approx(roc_auc_score(y, scores), abs=1e-9)


def test_folds_hold_both_labels() -> None:
    """Of permuted labels too: the null's folds are as balanced as those of the observed score."""
    for n in (16, 24, 50):
        design = _Design(balanced(n), 1)
        for labels in (design.labels, *(design.permuted() for _ in range(5))):
            folds = design.folds(labels)
            for fold in np.unique(folds):
                assert set(labels[folds == fold]) == {0, 1}
                assert not set(design.index[folds == fold]) & set(design.index[folds != fold])


# ---- two sets ----------------------------------------------------------------------------------
def test_two_lists_of_one_length_are_pairs() -> None:
    found = two_sets(["a", "b"], ["c", "d"])
    assert [(r.prompt, r.label, r.cluster_id) for r in found] == [
        ("a", 1, "p0"), ("b", 1, "p1"), ("c", 0, "p0"), ("d", 0, "p1"),
    ]  # fmt: skip
    apart = two_sets(["a", "b"], ["c", "d", "e"])
    assert apart.n_clusters == 5
    tokens = two_sets([(1, 2), (1, 3)], [(1, 4), (1, 5)])
    assert tokens.prompts[0] == (1, 2)


def test_contexts_repeat_every_cluster() -> None:
    contexts = {"eval": "This is a test. {prompt}", "use": "{prompt} Thanks!"}
    found = two_sets(["a", "b"], ["c", "d"], contexts=contexts)
    assert len(found) == 8 and found.n_clusters == 2 and found.context_names == ("eval", "use")
    assert found.rows[0].prompt == "This is a test. a" and found.rows[1].prompt == "a Thanks!"
    for context in contexts:
        inside = found.within(context)
        assert inside.labels.sum() == 2 and inside.n_clusters == 2
    assert len({row.item_id for row in found}) == 8


def test_mappings_keep_what_they_say() -> None:
    rows = [{"text": f"t{i}", "topic": TOPICS[i], "item_id": f"i{i}", "n": 3} for i in range(4)]
    others = [{"prompt": f"u{i}", "topic": TOPICS[i], "source": "book"} for i in range(4)]
    by_topic = two_sets(rows, others, item="topic")
    assert by_topic.n_clusters == 4 and by_topic.rows[0].attributes == {"topic": "tea", "n": "3"}
    assert by_topic.rows[4].source == "book" and by_topic.rows[0].item_id == "i0"
    free = two_sets(rows, others)
    assert free.clusters[0] == "i0" and free.clusters[4] == "other0" and free.n_clusters == 8
    named = two_sets([r | {"cluster_id": "x", "context": "eval"} for r in rows], others)
    assert set(named.clusters[:4]) == {"x"} and named.contexts[:4] == ("eval",) * 4


@pytest.mark.parametrize(
    ("given", "more", "says"),
    [
        (([], ["a"]), {}, "behaviour: got no prompts"),
        ((["a"], []), {}, "other: got no prompts"),
        ((["a", "b"], ["c", "d"]), {"contexts": {"eval": "A test."}}, r"the template 'A test.'"),
        (([(1, 2), (3, 4)], [(5, 6), (7, 8)]), {"contexts": {"e": "{prompt}"}}, "for token ids"),
        (([{"body": "a"}], ["b"]), {}, r"columns \['body'\]"),
        (([{"prompt": "a"}], ["b"]), {"item": "topic"}, r"expected the attribute 'topic'"),
        ((["a", "b"], ["a", "c"]), {}, "same prompt under both labels"),
    ],
)
def test_refusals(given: Any, more: dict[str, Any], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        two_sets(*given, **more)
