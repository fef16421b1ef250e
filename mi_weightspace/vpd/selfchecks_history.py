"""What the log of a run says about its end: drift over the last tenth, rises of gradient norms.

Levels are window statistics, never last points: single values of an oscillating curve are not a
result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

WINDOW = 0.1
"""Share of the run that counts as its end."""
MIN_RECORDS = 4
"""Below this a slope has no interval worth the name."""
N_WINDOWS = 10
ADVERSARIAL = ("persistent", "pooled", "fresh_pgd")
History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Drift:
    """A least-squares line over the last tenth of a run.

    Attributes:
        change: of the line across the window. half: of its 95 % interval (Student t).
        level: mean over the window. n: records in it.
    """

    change: float
    half: float
    level: float
    n: int

    @property
    def bound(self) -> float:
        """The largest change the interval allows."""
        return abs(self.change) + self.half

    @property
    def certain(self) -> float:
        """The smallest change the interval allows."""
        return max(0.0, abs(self.change) - self.half)


def series(history: History, key: str) -> Float[np.ndarray, "2 n"]:
    """Steps and values of the records that have the key."""
    pairs = [(r["step"], r[key]) for r in history if key in r]
    return np.array(pairs, dtype=np.float64).reshape(-1, 2).T


def end_drift(history: History, key: str, n_steps: int) -> Drift | None:
    """Drift of a logged number over the last `WINDOW`; None with fewer than 4 records there."""
    steps, values = series(history, key)
    chosen = steps >= (1 - WINDOW) * (n_steps - 1)
    if int(chosen.sum()) < MIN_RECORDS:
        return None
    x = (steps[chosen] - (1 - WINDOW) * (n_steps - 1)) / max(1e-12, WINDOW * (n_steps - 1))
    return drift(x, values[chosen])


def drift(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Drift:
    """Line through (x, y), x in units of the window."""
    from scipy.stats import t

    if not np.isfinite(y).all():
        return Drift(math.inf, 0.0, math.nan, len(y))
    centred = x - x.mean()
    spread = float((centred**2).sum())
    slope = float((centred * (y - y.mean())).sum()) / spread
    left = y - y.mean() - slope * centred
    error = math.sqrt(float((left**2).sum()) / (len(y) - 2) / spread)
    return Drift(slope, float(t.ppf(0.975, len(y) - 2)) * error, float(y.mean()), len(y))


def largest_rise(values: Float[np.ndarray, " n"]) -> float:
    """Largest ratio of a later to an earlier window median, over ten windows of the run.

    The first window is left out: a start is no signature of anything. inf where a value is not
    finite; 1 with too few records for windows.
    """
    if not np.isfinite(values).all():
        return math.inf
    if len(values) < 2 * N_WINDOWS:
        return 1.0
    medians = [float(np.median(w)) for w in np.array_split(values, N_WINDOWS)][1:]
    lowest, rise = medians[0], 1.0
    for value in medians[1:]:
        rise = max(rise, value / lowest if lowest > 0 else (math.inf if value > 0 else 1.0))
        lowest = min(lowest, value)
    return rise


def adversarial_terms(history: History) -> list[str]:
    """Logged reconstruction terms whose masks were attacked."""
    keys = {k for record in history for k in record if k.startswith("reconstruction.")}
    return sorted(k for k in keys if k.rsplit(".", 1)[1] in ADVERSARIAL)


def first_non_finite(history: History) -> tuple[int, str] | None:
    """Step and name of the first logged number that is not finite."""
    for record in history:
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                return int(record["step"]), key
    return None
