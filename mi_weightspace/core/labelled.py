"""Labelled prompts in clusters: what a detector is trained and scored on.

The unit of inference is the *cluster*: rows that share what decides the label (an item in several
wordings, a pair, a combination of attributes). Folds, bootstraps and permutations are drawn over
clusters and never split one, so a detector cannot score by recognising an item again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from mi_weightspace.core.contrasts import Contrast, ContrastSet
from mi_weightspace.core.errors import PromptError

Prompt = str | tuple[int, ...]
MIN_CLUSTERS = 2
"""Clusters a set needs in all: with one there is nothing to hold out."""


@dataclass(frozen=True)
class LabelledPrompt:
    """One prompt and whether it belongs to the behaviour.

    Attributes:
        prompt: text, or token ids (organisms have their own vocabulary).
        label: 1 for the behaviour, 0 for its absence.
        cluster_id: rows that share it never part company.
        context: where the prompt is shown (an evaluation, a deployment); "" where there is one.
        attributes: what else is known of the row (topic, wording), for the audit of confounds.

    Raises:
        PromptError: an empty prompt, a label other than 0 and 1, or no cluster.
    """

    prompt: Prompt
    label: int
    cluster_id: str
    item_id: str
    context: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        subject = f"labelled prompt {self.item_id!r}"
        if not self.prompt or (isinstance(self.prompt, str) and not self.prompt.strip()):
            raise PromptError(
                subject,
                given="an empty prompt",
                expected="text, or token ids",
                remedy="Drop the row or fill in its prompt.",
            )
        if type(self.label) is not int or self.label not in (0, 1):
            raise PromptError(
                subject,
                given=f"the label {self.label!r}",
                expected="the integer 1 (behaviour) or 0 (none)",
                remedy="Encode the two classes as 0 and 1.",
            )
        if not self.cluster_id:
            raise PromptError(
                subject,
                given="no cluster_id",
                expected="the name of the item, pair or attribute combination the row belongs to",
                remedy="Give rows that share an item one cluster_id; else give each row its own.",
            )


@dataclass(frozen=True)
class LabelledSet:
    """Prompts of both classes, in clusters, in one or more contexts.

    Raises:
        PromptError: no rows, one class only, fewer than two clusters, or the same prompt in two
            clusters or with two labels.
    """

    rows: tuple[LabelledPrompt, ...]
    name: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        self._check_classes()
        self._check_repeats()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LabelledPrompt]:
        return iter(self.rows)

    def __add__(self, other: LabelledSet) -> LabelledSet:
        """Both sets' rows; a cluster named in both is one cluster."""
        return LabelledSet(self.rows + other.rows, f"{self.name}+{other.name}")

    def __repr__(self) -> str:
        ones = int(self.labels.sum())
        contexts = ", ".join(repr(c) for c in self.context_names)
        return (
            f"LabelledSet({self.name!r}: {ones} + {len(self) - ones} rows in "
            f"{self.n_clusters} clusters; contexts {contexts})"
        )

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(row.prompt for row in self.rows)

    @cached_property
    def labels(self) -> Int[Tensor, " n"]:
        return torch.tensor([row.label for row in self.rows])

    @property
    def clusters(self) -> tuple[str, ...]:
        """The cluster of each row."""
        return tuple(row.cluster_id for row in self.rows)

    @cached_property
    def cluster_index(self) -> Int[Tensor, " n"]:
        """The cluster of each row as a number, in order of first appearance."""
        order = {name: i for i, name in enumerate(dict.fromkeys(self.clusters))}
        return torch.tensor([order[name] for name in self.clusters])

    @property
    def n_clusters(self) -> int:
        return len(set(self.clusters))

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context of each row."""
        return tuple(row.context for row in self.rows)

    @property
    def context_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.contexts))

    @cached_property
    def prompts_hash(self) -> str:
        """First 16 hex digits of SHA-256 over every row: prompts, labels, clusters, contexts."""
        record = [
            {**vars(row), "attributes": dict(sorted(row.attributes.items()))} for row in self.rows
        ]
        text = json.dumps(record, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def within(self, context: str) -> LabelledSet:
        """The rows of one context.

        Raises:
            PromptError: no row has this context, or it holds one class only.
        """
        if context not in self.context_names:
            raise PromptError(
                f"labelled set {self.name!r}",
                given=f"the context {context!r}",
                expected=f"one of {list(self.context_names)}",
                remedy="Choose one of its contexts.",
            )
        rows = tuple(row for row in self.rows if row.context == context)
        return LabelledSet(rows, f"{self.name}, {context}" if context else self.name)

    def take(self, index: Sequence[int]) -> LabelledSet:
        """The rows of these numbers, in this order."""
        return replace(self, rows=tuple(self.rows[i] for i in index))

    @classmethod
    def from_contrast(cls, contrasts: ContrastSet | Contrast) -> LabelledSet:
        """A contrast as a labelled set: two rows a pair, positive first, both in one cluster.

        Raises:
            PromptError: a contrast set with no target, or with several.
        """
        contrast = _only_target(contrasts) if isinstance(contrasts, ContrastSet) else contrasts
        rows = [
            LabelledPrompt(
                prompt=side,
                label=label,
                cluster_id=pair.cluster_id,
                item_id=pair.item_id,
                attributes=_named(
                    register=pair.register, topic=pair.topic, wording=pair.wording_id
                ),
                source=contrast.name,
            )
            for pair in contrast.pairs
            for label, side in ((1, pair.positive), (0, pair.negative))
        ]
        return cls(tuple(rows), contrast.name)

    def _check_classes(self) -> None:
        subject = f"labelled set {self.name!r}"
        counts = Counter(row.label for row in self.rows)
        if len(counts) < 2:
            only = next(iter(counts), None)
            raise PromptError(
                subject,
                given="no rows" if only is None else f"{len(self.rows)} rows, all of label {only}",
                expected="rows of both labels, 0 and 1",
                remedy="Add prompts of the other class; a detector is scored between the two.",
            )
        if self.n_clusters < MIN_CLUSTERS:
            raise PromptError(
                subject,
                given=f"{len(self.rows)} rows in one cluster",
                expected=f"at least {MIN_CLUSTERS} clusters",
                remedy="A fold holds out whole clusters: give rows of different items other ids.",
            )

    def _check_repeats(self) -> None:
        seen: dict[Prompt, LabelledPrompt] = {}
        for row in self.rows:
            first = seen.setdefault(row.prompt, row)
            if (first.cluster_id, first.label) == (row.cluster_id, row.label):
                continue
            what = "both labels" if first.label != row.label else "two clusters"
            raise PromptError(
                f"labelled set {self.name!r}, items {first.item_id!r} and {row.item_id!r}",
                given=f"the same prompt under {what}",
                expected="one label and one cluster for each prompt",
                remedy="Drop one of the rows: it would be trained on and tested on at once.",
            )


def _only_target(contrasts: ContrastSet) -> Contrast:
    targets = contrasts.targets
    if len(targets) != 1:
        raise PromptError(
            f"contrast set {contrasts.name!r}",
            given=f"the targets {[c.name for c in targets]}",
            expected="one target",
            remedy="Pass the contrast you mean: contrasts['name'].",
        )
    return targets[0]


def _named(**values: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
