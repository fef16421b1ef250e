"""Help with labels: the clustered design out of two prompt sets, and what is confounded in a set.

A detector scored on prompts can read their length, their topic or single words instead of the
model's state. `confounds` measures what the texts alone tell, with folds that hold out whole
clusters, before any model is run.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet, Prompt
from mi_weightspace.core.seeds import numpy_generator
from mi_weightspace.core.stats import auroc

if TYPE_CHECKING:
    import pandas as pd

Item = Prompt | Mapping[str, Any]
N_PERMUTATIONS, LEVEL = 199, 0.05
FOLDS = 8
SMOOTHING, PLAIN = 1.0, 0.2
MIN_CLUSTERS = 16
"""Clusters of each class below which the audit says that it has little power."""


# ---- two prompt sets -> one design -------------------------------------------------------------
def two_sets(
    behaviour: Sequence[Item],
    other: Sequence[Item],
    *,
    contexts: Mapping[str, str] | None = None,
    item: str | None = None,
    name: str = "two sets",
) -> LabelledSet:
    """Prompts with the behaviour (label 1) and without (label 0) as one clustered set.

    A prompt is text, token ids, or a mapping with ``prompt`` and any of ``item_id``,
    ``cluster_id``, ``context``, ``source``; what else it holds becomes an attribute. A row's
    cluster is its ``cluster_id``; else the attribute named by `item`; else its ``item_id``; else,
    for bare prompts of two lists of the same length, its number (prompt i of both lists is one
    pair); else its own. Every cluster is repeated in each context with the same id, so that no fold
    trains on an item in one context and tests on it in another.

    Args:
        contexts: name -> template with ``{prompt}``; every prompt is set into each. None leaves
            prompts and their contexts as they are.
        item: attribute that says which rows share an item.

    Raises:
        PromptError: an empty list, a template without ``{prompt}`` (or with token ids), a row
            without a prompt or without the attribute `item`, or what `LabelledSet` refuses.
    """
    paired = len(behaviour) == len(other)
    rows: list[LabelledPrompt] = []
    for label, side, items in ((1, "behaviour", behaviour), (0, "other", other)):
        if not len(items):
            raise PromptError(
                f"{name}: {side}",
                given="no prompts",
                expected="prompts of both classes",
                remedy="A detector is scored between the two; add the missing class.",
            )
        for i, given in enumerate(items):
            row = _as_row(given, f"{name}: {side}, prompt {i}")
            own = f"p{i}" if paired and not isinstance(given, Mapping) else f"{side}{i}"
            base = _labelled(row, label, own, item, f"{name}: {side}, prompt {i}")
            rows += [base] if contexts is None else _in_contexts(base, contexts, name)
    return LabelledSet(tuple(rows), name)


def _as_row(given: Item, subject: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        return {"prompt": given}
    if "prompt" not in given and "text" not in given:
        raise PromptError(
            subject,
            given=f"the columns {sorted(map(str, given))}",
            expected="a column 'prompt'",
            remedy="Name the column that holds the text 'prompt'.",
        )
    row = dict(given)
    return {"prompt": row.pop("prompt", row.pop("text", None)), **row}


def _labelled(
    row: dict[str, Any], label: int, own: str, item: str | None, subject: str
) -> LabelledPrompt:
    fields = {"prompt", "label", "item_id", "cluster_id", "context", "source", "attributes"}
    attributes = {str(k): str(v) for k, v in dict(row.get("attributes") or {}).items()}
    attributes |= {k: str(v) for k, v in row.items() if k not in fields and v is not None}
    if item is not None and item not in attributes:
        raise PromptError(
            subject,
            given=f"the attributes {sorted(attributes)}",
            expected=f"the attribute {item!r} that names the item",
            remedy="Add it to every row, or leave `item` out.",
        )
    shared = attributes[item] if item is not None else row.get("item_id", own)
    prompt = row["prompt"]
    return LabelledPrompt(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        label=label,
        cluster_id=str(row.get("cluster_id", shared)),
        item_id=str(row.get("item_id", f"{own}-{label}")),
        context=str(row.get("context", "")),
        attributes=attributes,
        source=str(row.get("source", "")),
    )


def _in_contexts(
    row: LabelledPrompt, contexts: Mapping[str, str], name: str
) -> list[LabelledPrompt]:
    made: list[LabelledPrompt] = []
    for context, template in contexts.items():
        if "{prompt}" not in template or not isinstance(row.prompt, str):
            ids = "" if isinstance(row.prompt, str) else " for token ids"
            raise PromptError(
                f"{name}: context {context!r}",
                given=f"the template {template!r}{ids}",
                expected="a text with {prompt} where the prompt goes",
                remedy="Write for example 'You are being evaluated. {prompt}'; token ids take no "
                "template.",
            )
        made.append(
            LabelledPrompt(
                template.replace("{prompt}", row.prompt),
                row.label,
                row.cluster_id,
                f"{row.item_id}-{context}",
                context,
                row.attributes,
                row.source,
            )
        )
    return made


# ---- what is confounded ------------------------------------------------------------------------
@dataclass(frozen=True)
class Confound:
    """One thing the texts alone may tell.

    Attributes:
        what: ``length``, ``words``, ``attribute topic``, ``context`` …
        auroc: of the label by this thing alone, leave-cluster-out where it is fitted; None where
            nothing is scored.
        p: rank p of it among permutations of the labels over clusters; two-sided for the length,
            one-sided for what is fitted.
        confounded: whether it tells the label, or makes a comparison impossible.
        says: the finding as a sentence.
    """

    what: str
    auroc: float | None
    p: float | None
    confounded: bool
    says: str


@dataclass(frozen=True)
class Confounds:
    """What is confounded in a labelled set; `str` of it is one line a finding."""

    name: str
    n: int
    n_clusters: int
    found: tuple[Confound, ...]

    @property
    def confounded(self) -> tuple[str, ...]:
        return tuple(c.what for c in self.found if c.confounded)

    def __getitem__(self, what: str) -> Confound:
        return {c.what: c for c in self.found}[what]

    def __str__(self) -> str:
        head = f"{self.name}: {self.n} rows in {self.n_clusters} clusters"
        lines = [f"  {'!' if c.confounded else ' '} {c.says}" for c in self.found]
        return "\n".join([head, *lines])

    def to_pandas(self) -> pd.DataFrame:
        """One row a finding: what, auroc, p, confounded, says."""
        import pandas as pd

        return pd.DataFrame([vars(c) for c in self.found])


def confounds(
    labelled: LabelledSet, *, n_permutations: int = N_PERMUTATIONS, seed: int = 0
) -> Confounds:
    """Length, attributes, single words and contexts against the label.

    Numbers are AUROC of the label by the thing alone; words and attributes are fitted on other
    clusters (bag of words, naive Bayes with add-one smoothing; at most `FOLDS` folds). Each is
    judged against permutations of the labels that keep clusters whole; what is fitted is judged
    one-sidedly, as held-out scores of a balanced factorial design lie below those of its
    permutations. `confounded` at p ≤ .05 after Holm over the tests.
    """
    design = _Design(labelled, seed)
    tests = {"length": _lengths(labelled)}
    scores: dict[str, Any] = {"length": design.judge_scores(tests["length"], n_permutations)}
    for attribute in _attribute_names(labelled):
        tokens = [[row.attributes.get(attribute, "")] for row in labelled]
        scores[f"attribute {attribute}"] = design.judge_words(tokens, n_permutations)
    if len(labelled.context_names) > 1:
        tokens = [[row.context] for row in labelled]
        scores["context"] = design.judge_words(tokens, n_permutations)
    scores["words"] = design.judge_words([_words(row.prompt) for row in labelled], n_permutations)
    adjusted = _holm([p for _, p in scores.values()])
    found = [
        _finding(what, value, p, q, labelled)
        for (what, (value, p)), q in zip(scores.items(), adjusted, strict=True)
    ]
    found += _structure(labelled)
    return Confounds(labelled.name, len(labelled), labelled.n_clusters, tuple(found))


def _lengths(labelled: LabelledSet) -> np.ndarray:
    return np.array([len(_words(row.prompt)) for row in labelled], dtype=float)


def _words(prompt: Prompt) -> list[str]:
    """Words of a text in lower case, or its token ids as words."""
    if isinstance(prompt, str):
        return re.findall(r"\w+|[^\w\s]", prompt.lower())
    return [str(token) for token in prompt]


def _attribute_names(labelled: LabelledSet) -> list[str]:
    """Attributes with at least two values that are not one a row."""
    values: dict[str, set[str]] = defaultdict(set)
    for row in labelled:
        for key, value in row.attributes.items():
            values[key].add(value)
    return [key for key, seen in values.items() if 1 < len(seen) < len(labelled) / 2]


class _Design:
    """Clusters, folds over clusters, and permutations of the labels that keep clusters whole."""

    def __init__(self, labelled: LabelledSet, seed: int) -> None:
        self.labels = labelled.labels.numpy()
        self.index = labelled.cluster_index.numpy()
        self.n = labelled.n_clusters
        self.order = numpy_generator(seed, "confounds", "folds").permutation(self.n)
        share = self._share(self.labels)
        self.pure = bool(np.isin(share, (0.0, 1.0)).all())
        self.cluster_label = (share > 0.5).astype(int)
        self.rng = numpy_generator(seed, "confounds", "permutations")

    def _share(self, labels: np.ndarray) -> np.ndarray:
        """Share of label 1 in each cluster."""
        return np.bincount(self.index, labels) / np.bincount(self.index)

    def folds(self, labels: np.ndarray) -> np.ndarray:
        """Fold of every row: clusters dealt out in order of their share of label 1.

        Of the labels scored: folds balanced for the given labels alone would give permuted ones
        unbalanced folds, where held-out scores lie lower, and the p would be too small.
        """
        share = self._share(labels)
        folds = np.empty(self.n, dtype=int)
        folds[self.order[np.argsort(share[self.order], kind="stable")]] = np.arange(self.n) % min(
            FOLDS, self.n
        )
        return folds[self.index]

    def permuted(self) -> np.ndarray:
        """Labels permuted over clusters of one label, else within each cluster."""
        if self.pure:
            return self.rng.permutation(self.cluster_label)[self.index]
        drawn = self.labels.copy()
        for cluster in range(self.n):
            rows = np.flatnonzero(self.index == cluster)
            drawn[rows] = drawn[self.rng.permutation(rows)]
        return drawn

    def judge_scores(self, scores: np.ndarray, n_permutations: int) -> tuple[float, float]:
        """AUROC of fixed scores and its two-sided rank p."""
        null = [_auroc(scores, self.permuted()) for _ in range(n_permutations)]
        observed = _auroc(scores, self.labels)
        middle = float(np.median(null))
        return observed, _rank(abs(observed - middle), [abs(v - middle) for v in null])

    def judge_words(self, tokens: Sequence[list[str]], n_permutations: int) -> tuple[float, float]:
        """Leave-cluster-out AUROC of a bag of words and its one-sided rank p."""
        counts = _presence(tokens)
        observed = self._bayes(counts, self.labels)
        null = [self._bayes(counts, self.permuted()) for _ in range(n_permutations)]
        return observed, _rank(observed, null)

    def _bayes(self, counts: np.ndarray, labels: np.ndarray) -> float:
        """AUROC of out-of-fold log-odds of naive Bayes, centred within each fold."""
        scores = np.zeros(len(labels))
        folds = self.folds(labels)
        for fold in np.unique(folds):
            test = folds == fold
            train = ~test
            ones = int(labels[train].sum())
            zeros = int(train.sum()) - ones
            if not ones or not zeros:
                continue
            in_one = labels[train] @ counts[train]
            in_zero = (1 - labels[train]) @ counts[train]
            odds = np.log((in_one + SMOOTHING) / (ones + 2 * SMOOTHING))
            odds -= np.log((in_zero + SMOOTHING) / (zeros + 2 * SMOOTHING))
            found = counts[test] @ odds
            scores[test] = found - found.mean()
        return _auroc(scores, labels)


def _rank(observed: float, null: Sequence[float]) -> float:
    return (1 + sum(v >= observed - 1e-12 for v in null)) / (len(null) + 1)


def _auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    return auroc(torch.from_numpy(scores), torch.from_numpy(labels))


def _presence(tokens: Sequence[Iterable[str]]) -> np.ndarray:
    """(rows, words) 0/1 of words found in at least two rows and not in all."""
    rows = [set(row) for row in tokens]
    seen = Counter(word for row in rows for word in row)
    kept = {w: i for i, w in enumerate(w for w, n in seen.items() if 1 < n < len(rows))}
    table = np.zeros((len(rows), max(1, len(kept))))
    for i, row in enumerate(rows):
        table[i, [kept[w] for w in row if w in kept]] = 1.0
    return table


def _holm(p: Sequence[float]) -> list[float]:
    from mi_weightspace.core.stats import holm

    return [float(q) for q in holm(torch.tensor(list(p), dtype=torch.float64))]


def _finding(what: str, value: float, p: float, q: float, labelled: LabelledSet) -> Confound:
    # p cannot fall below 1/(B+1), so Holm alone could hide an AUROC near 0 or 1 in many tests
    tells = q <= LEVEL or (p <= LEVEL and abs(value - 0.5) >= PLAIN)
    verb = "tells the label" if tells else "does not tell the label"
    says = f"{what} {verb}: AUROC {value:.2f}, p {p:.3f}"
    if what == "length":
        lengths, labels = _lengths(labelled), labelled.labels.numpy()
        means = [lengths[labels == k].mean() for k in (1, 0)]
        says += f" (mean {means[0]:.1f} against {means[1]:.1f} words)"
    return Confound(what, round(value, 4), round(p, 4), tells, says)


def _structure(labelled: LabelledSet) -> list[Confound]:
    """Contexts that miss a label, and too few clusters of a class."""
    found: list[Confound] = []
    for context in labelled.context_names:
        labels = {row.label for row in labelled if row.context == context}
        if len(labels) < 2:
            only = labels.pop()
            says = f"context {context!r} holds label {only} alone: nothing can be scored within it"
            found.append(Confound(f"context {context!r}", None, None, True, says))
    for label in (1, 0):
        n = len({row.cluster_id for row in labelled if row.label == label})
        if n < MIN_CLUSTERS:
            says = f"label {label} has {n} clusters: below {MIN_CLUSTERS} this audit sees little"
            found.append(Confound(f"clusters of label {label}", None, None, False, says))
    return found
