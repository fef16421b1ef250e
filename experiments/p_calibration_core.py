"""What a calibration of a printed p is made of: the p, the draws, the rate with its interval."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mi_weightspace.core.stats import binomial_interval

ALPHA = 0.05
LEAST = 20
"""Draws that are made whatever they cost."""
Draw = Callable[[int, int, bool], Mapping[str, float]]
"""(seed, number of the draw, planted) -> p by key; of a family the smallest."""


@dataclass(frozen=True)
class Printed:
    """One p as the product prints it, and what it is measured on.

    Attributes:
        key: its name among the numbers of a draw.
        where: report kind, table (where it is not the main one) and column.
        sources, columns: the files that make the column, and the names it has there.
        null: what is exchangeable. effect: what is planted for the power.
        family: over what the error is family-wise; "" for a single test.
        decides: the word it takes part in; "" for a reference column, which carries no verdict.
        note: what a reader of the rate must know.
    """

    key: str
    where: str
    sources: tuple[str, ...]
    columns: tuple[str, ...]
    null: str
    effect: str
    family: str = ""
    decides: str = ""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Simulated inputs that several printed p are measured on at once; `sizes` says how large."""

    name: str
    draw: Draw
    printed: tuple[Printed, ...]
    sizes: str


@dataclass(frozen=True)
class Rate:
    """k rejections at `ALPHA` among n draws, with the 95 % Clopper-Pearson interval."""

    k: int
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Rate:
        return cls(sum(p <= ALPHA for p in values), len(values))  # NaN rejects nothing

    @property
    def value(self) -> float:
        return self.k / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return binomial_interval(self.k, self.n)

    @property
    def above(self) -> bool:
        """Above its level: the whole interval lies over `ALPHA`."""
        return self.interval[0] > ALPHA

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


@dataclass(frozen=True)
class Measured:
    """One printed p with its rate of false positives and its power."""

    case: str
    printed: Printed
    false_positives: Rate
    power: Rate

    @property
    def finding(self) -> bool:
        """It decides a word and is above its level."""
        return bool(self.printed.decides) and self.false_positives.above


def calibrate(
    case: Case, *, n_draws: int, seed: int = 0, seconds: float = math.inf
) -> list[Measured]:
    """Draws under the null and with the plant in turn, until `n_draws` or `seconds` of CPU."""
    start = time.process_time()
    found: dict[bool, list[Mapping[str, float]]] = {False: [], True: []}
    for index in range(n_draws):
        if index >= LEAST and time.process_time() - start > seconds:
            break
        for planted in found:
            found[planted].append(case.draw(seed, index, planted))
    rates = {
        planted: {p.key: Rate.of([d[p.key] for d in draws]) for p in case.printed}
        for planted, draws in found.items()
    }
    return [Measured(case.name, p, rates[False][p.key], rates[True][p.key]) for p in case.printed]
