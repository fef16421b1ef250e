"""Contrast data: pairs of prompts that differ in one thing, and matched controls.

The unit of data is a *pair*; the unit of inference is its *cluster* (item × wording). Folds,
bootstraps and permutations never split either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from mi_weightspace.core.errors import PromptError

ContrastKind = Literal["target", "control", "null"]
Split = Literal["fit", "heldout_item", "heldout_register"]


@dataclass(frozen=True)
class Pair:
    """One pair of prompts.

    `positive` and `negative` are texts, or tuples of token ids (organisms have their own
    vocabulary). `readout`: the candidate continuations of the behavioural readout, the one the
    frame pushes towards first; empty when the set has no readout. `swapped`: the two prompts with
    their options in the other order, so that the two continuations of `readout` trade places;
    empty when the prompts have no options.
    """

    item_id: str
    positive: str | tuple[int, ...]
    negative: str | tuple[int, ...]
    wording_id: str = "w0"
    register: str = ""
    topic: str = ""
    split: Split = "fit"
    readout: tuple[str | int, ...] = ()
    swapped: tuple[str | tuple[int, ...], ...] = ()

    @property
    def cluster_id(self) -> str:
        return f"{self.item_id}×{self.wording_id}"


@dataclass(frozen=True)
class Contrast:
    """A named set of pairs about one thing."""

    name: str
    kind: ContrastKind
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise PromptError(
                f"contrast {self.name!r}",
                given="no pairs",
                expected="at least one pair of a positive and a negative prompt",
                remedy="A contrast needs both classes; check the file's labels.",
            )
        for pair in self.pairs:
            if not pair.positive or not pair.negative:
                raise PromptError(
                    f"contrast {self.name!r}, item {pair.item_id!r}",
                    given="an empty prompt",
                    expected="text (or token ids) on both sides of the pair",
                    remedy="Drop the item or fill the missing side.",
                )

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def is_control(self) -> bool:
        return self.kind == "control"

    def select(self, *splits: Split) -> Contrast:
        return Contrast(self.name, self.kind, tuple(p for p in self.pairs if p.split in splits))


@dataclass(frozen=True)
class ContrastSet:
    """Targets, their matched controls and nulls."""

    name: str
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)

    def __iter__(self) -> Iterator[Contrast]:
        return iter(self.contrasts)

    def __len__(self) -> int:
        return len(self.contrasts)

    def __getitem__(self, name: str) -> Contrast:
        for contrast in self.contrasts:
            if contrast.name == name:
                return contrast
        raise PromptError(
            f"contrast set {self.name!r}",
            given=f"the name {name!r}",
            expected=f"one of {[c.name for c in self.contrasts][:12]}",
            remedy="Pick one of its contrasts.",
        )

    def of_kind(self, kind: ContrastKind) -> tuple[Contrast, ...]:
        return tuple(c for c in self.contrasts if c.kind == kind)

    @property
    def targets(self) -> tuple[Contrast, ...]:
        return self.of_kind("target")

    @property
    def controls(self) -> tuple[Contrast, ...]:
        return self.of_kind("control")

    def __add__(self, other: ContrastSet | Sequence[Contrast]) -> ContrastSet:
        extra = other.contrasts if isinstance(other, ContrastSet) else tuple(other)
        return ContrastSet(self.name, self.contrasts + extra, self.notes)

    @cached_property
    def hash(self) -> str:
        """First 16 hex digits of SHA-256 over every contrast, kind and pair."""
        record = [{**vars(c), "pairs": [vars(p) for p in c.pairs]} for c in self.contrasts]
        text = json.dumps(record, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
