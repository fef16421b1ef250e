"""Means over held-out batches with intervals; batches, not positions, are the independent draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95


class Interval(NamedTuple):
    """A value and its two-sided 95 % interval (Student t over batches; NaN from one batch)."""

    value: float
    low: float
    high: float


def pooled(
    values: Float[np.ndarray, " batches"], weights: Float[np.ndarray, " batches"]
) -> Interval:
    """The mean over all positions, from batch means weighted by their numbers of positions.

    The standard error is that of a weighted mean, ``√(n/(n−1) Σ w²(x−x̄)²) / Σ w``: the usual
    ``s/√n`` where batches are of one size.
    """
    return ratio(values, np.ones_like(values), weights)


def ratio(
    above: Float[np.ndarray, " batches"],
    below: Float[np.ndarray, " batches"],
    weights: Float[np.ndarray, " batches"],
) -> Interval:
    """``Σ w·above / Σ w·below``, a ratio of two pooled means; its interval by linearisation.

    NaN where the denominator is not positive: an error relative to nothing.
    """
    top, bottom = float((weights * above).sum()), float((weights * below).sum())
    if not bottom > 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    value, n = top / bottom, len(above)
    if n < 2:
        return Interval(value, float("nan"), float("nan"))
    from scipy.stats import t

    residual = weights * (above - value * below)
    error = float(np.sqrt(n / (n - 1) * (residual**2).sum())) / bottom
    half = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * error
    return Interval(value, value - half, value + half)


def spread(values: Float[np.ndarray, " batches"]) -> Interval:
    """Median, smallest and largest: for worst cases, where a mean would be one batch's."""
    return Interval(float(np.median(values)), float(values.min()), float(values.max()))


def records(frame: pd.DataFrame, **equal: Any) -> list[dict[str, Any]]:
    """The rows of a table as dictionaries; those that have the given values."""
    rows: Any = frame.to_dict("records")
    return [row for row in rows if all(row[k] == v for k, v in equal.items())]
