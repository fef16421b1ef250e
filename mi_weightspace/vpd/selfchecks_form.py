"""The form of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        number: what was measured; None where nothing could be. limit: what it was held against.
        measured_on: data or records, with their number.
        sentence: the finding in words, guarded.
    """

    name: str
    outcome: Outcome
    number: float | None
    limit: float | None
    measured_on: str
    sentence: str

    def __str__(self) -> str:
        number = "" if self.number is None else f" {self.number:.3g}"
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        return f"{self.outcome} {self.name}{number}{limit}: {self.sentence} [{self.measured_on}]"


def graded(value: float, good: float, bad: float) -> Outcome:
    """PASS up to `good`, WARN up to `bad`, FAIL above and where there is no number."""
    if value <= good:
        return "PASS"
    return "WARN" if value <= bad else "FAIL"
