"""How far a decomposition is from a known answer, and two decompositions from each other.

Definitions are those of Braun et al. 2025 (*Stochastic Parameter Decomposition*, toy targets) and
Bushnaq et al. 2026 (seed consistency, feature splitting, alive counts). Matrices are
``W (d_out, d_in)``; component c of a site is the rank-one matrix ``write[c] read[c]ᵀ``. The sign of
a (read, write) pair is arbitrary, their product is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.seeds import generator

PROBE = 0.75
"""Magnitude of the one-hot inputs at which a toy's importances are read."""
HUNGARIAN_UP_TO = 500
MEAN_ALIVE = 1e-6
FIRES_PER_POSITION = 1e-6


@dataclass(frozen=True)
class Identity:
    """One component per feature. `idle`: features that no component may serve."""

    idle: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dense:
    """`k` components serve all features together, the others none.

    Attributes:
        min_entries: features at which each of the k must be important.
    """

    k: int
    min_entries: int = 1


@dataclass(frozen=True)
class CiError:
    """Entries in which importances differ from the stated pattern.

    Attributes:
        missing: expected importances below 1 − tolerance.
        spurious: unexpected importances above the tolerance (`Identity`: entries; `Dense`:
            columns beyond the k-th that have one).
        order: component at each column after sorting or matching.
    """

    missing: int
    spurious: int
    order: tuple[int, ...]

    @property
    def errors(self) -> int:
        return self.missing + self.spurious


def one_hot_probe(n_features: int, magnitude: float = PROBE) -> Float[Tensor, "n n"]:
    """Inputs with one feature on, of the magnitude at which `target_ci_error` is defined."""
    return magnitude * torch.eye(n_features)


def target_ci_error(
    ci: Float[Tensor, "n_features C"], pattern: Identity | Dense, tolerance: float = 0.1
) -> CiError:
    """Entries of a toy's importance matrix that break the stated pattern; the target is 0.

    `Identity`: components are permuted so that the diagonal is as large as it can be (Hungarian;
    greedy by descending entry where there are more than 500 features or components), then errors =
    #(diagonal < 1 − tolerance) + #(off-diagonal > tolerance). Components left over are columns
    without a diagonal, features without a component count as missing. `Dense`: columns are sorted
    by descending sum; each of the first k that has fewer than `min_entries` entries ≥ 1 −
    tolerance adds the shortfall to `missing`; each later column with an entry > tolerance adds one
    to `spurious`.

    Args:
        ci: lower importance of each component on the one-hot input of each feature.

    Raises:
        ConfigError: a matrix that is not two-dimensional or not finite, a tolerance outside
            (0, 1), a pattern that does not fit the matrix.
    """
    values = _finite(ci, "ci", 2).detach().double().cpu().numpy()
    if not 0 < tolerance < 1:
        raise ConfigError(
            "tolerance",
            given=str(tolerance),
            expected="a number between 0 and 1",
            remedy="The published value is 0.1.",
        )
    if isinstance(pattern, Dense):
        return _dense_error(values, pattern, tolerance)
    return _identity_error(values, pattern, tolerance)


def _identity_error(values: Any, pattern: Identity, tolerance: float) -> CiError:
    n, c = values.shape
    if bad := [j for j in pattern.idle if not 0 <= j < n]:
        raise ConfigError(
            "idle features",
            given=str(bad),
            expected=f"indices below {n}",
            remedy="Number features as the rows of ci.",
        )
    idle = set(pattern.idle)
    used = [j for j in range(n) if j not in idle]
    match = match_columns(values[used])
    rows, columns = np.array([used[i] for i in match], dtype=int), np.array([*match.values()], int)
    good = values[rows, columns] >= 1 - tolerance
    high = values > tolerance
    high[rows, columns] = False
    matched = columns.tolist()
    order = (*matched, *(j for j in range(c) if j not in set(matched)))
    return CiError(len(used) - int(good.sum()), int(high.sum()), order)


def match_columns(values: Float[np.ndarray, "rows columns"]) -> dict[int, int]:
    """Row -> column, one to one, of as large a sum as possible (greedy above 500 either way)."""
    if max(values.shape) <= HUNGARIAN_UP_TO:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(values, maximize=True)
        return dict(zip(rows.tolist(), columns.tolist(), strict=True))
    found: dict[int, int] = {}
    taken: set[int] = set()
    width = values.shape[1]
    for flat in np.argsort(-values, axis=None, kind="stable").tolist():
        row, column = divmod(flat, width)
        if row not in found and column not in taken:
            found[row] = column
            taken.add(column)
            if len(found) == min(values.shape):
                break
    return dict(sorted(found.items()))


def _dense_error(values: Any, pattern: Dense, tolerance: float) -> CiError:
    n, c = values.shape
    if not (0 <= pattern.k <= c and 1 <= pattern.min_entries <= n):
        raise ConfigError(
            "dense pattern",
            given=f"k={pattern.k}, min_entries={pattern.min_entries}",
            expected=f"k ≤ {c} components and 1 ≤ min_entries ≤ {n} features",
            remedy="State the pattern of this site.",
        )
    order = np.argsort(-values.sum(0), kind="stable")
    strong = (values[:, order[: pattern.k]] >= 1 - tolerance).sum(0)
    missing = int(np.maximum(0, pattern.min_entries - strong).sum())
    spurious = int((values[:, order[pattern.k :]] > tolerance).any(0).sum())
    return CiError(missing, spurious, tuple(order.tolist()))


@dataclass(frozen=True)
class Geometry:
    """How the best component of each input feature compares with the column of the matrix.

    Attributes:
        mmcs: mean over input features of the largest cosine. 1 where every column is one component.
        ml2r: mean ratio of norms for that component. Below 1: shrunken.
        best: that component, per input feature.
    """

    mmcs: float
    ml2r: float
    best: tuple[int, ...]


def mmcs(
    read: Float[Tensor, "C d_in"], write: Float[Tensor, "C d_out"], weight: Float[Tensor, "out in"]
) -> Geometry:
    """Mean max cosine similarity and mean L2 ratio (Braun et al. 2025), per column of the matrix.

    Over input features j: ``max_c cos(read[c, j] write[c], W[:, j])``, and the mean of
    ``‖read[c, j] write[c]‖ / ‖W[:, j]‖`` at that c. The cosine of a zero vector is 0.

    Raises:
        ConfigError: shapes that do not fit, values that are not finite, a column of the matrix
            that is zero (its cosine is undefined).
    """
    a, b, w = (_finite(t, n, 2).detach().double() for t, n in _named(read, write, weight))
    if w.shape != (b.shape[1], a.shape[1]) or len(a) != len(b):
        raise ConfigError(
            "read, write, weight",
            given=f"{tuple(a.shape)}, {tuple(b.shape)}, {tuple(w.shape)}",
            expected="(C, d_in), (C, d_out), (d_out, d_in)",
            remedy="Pass the factors of the site the matrix belongs to.",
        )
    norms = w.norm(dim=0)
    if (norms == 0).any():
        raise ConfigError(
            "weight",
            given=f"zero columns {torch.nonzero(norms == 0).flatten().tolist()[:8]}",
            expected="a matrix that reads every input feature",
            remedy="Leave unread features out.",
        )
    directions = b / b.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = a.sign() * (directions @ w) / norms  # (C, d_in)
    top, best = cosines.max(dim=0)
    each = torch.arange(a.shape[1])
    ratio = a[best, each].abs() * b.norm(dim=1)[best] / norms
    return Geometry(float(top.mean()), float(ratio.mean()), tuple(best.tolist()))


def ml2r(
    read: Float[Tensor, "C d_in"], write: Float[Tensor, "C d_out"], weight: Float[Tensor, "out in"]
) -> float:
    """Mean L2 ratio; see `mmcs`."""
    return mmcs(read, write, weight).ml2r


@dataclass(frozen=True, eq=False)
class Parts:
    """The alive components of one site of one run."""

    read: Float[Tensor, "C d_in"]
    write: Float[Tensor, "C d_out"]

    def only(self, alive: Bool[Tensor, " C"]) -> Parts:
        return Parts(self.read[alive], self.write[alive])


@dataclass(frozen=True)
class Consistency:
    """Mean max cosine similarity of write, read and whole rank-one parts."""

    write: float
    read: float
    rank_one: float


@dataclass(frozen=True)
class SeedConsistency:
    """Agreement of two runs, beside what two untrained ones of the same sizes give."""

    runs: Consistency
    at_init: Consistency


def seed_consistency(
    first: Parts,
    second: Parts,
    at_init: tuple[Parts, Parts] | None = None,
    *,
    seed: int = 0,
) -> SeedConsistency:
    """Do two seeds find the same components of the same frozen matrix?

    For write and read vectors: mean over components of one run of the largest |cosine| with a
    component of the other (signs are arbitrary). For rank-one parts the similarity is
    ``cos(read, read') · cos(write, write')``, the cosine of the two matrices, and keeps its sign.
    Every number is the mean of the two directions (first to second, second to first).

    Args:
        first, second: alive components of the two runs (`Parts.only`).
        at_init: the two runs' components before training, for the baseline. None draws Gaussian
            vectors of the same numbers and widths, the law of a random start.

    Raises:
        ConfigError: different widths, no components, values that are not finite, zero vectors.
    """
    if at_init is None:
        draw = generator(seed, "vpd", "seed_consistency")
        at_init = _random_like(first, draw), _random_like(second, draw)
    return SeedConsistency(_consistency(first, second), _consistency(*at_init))


def _random_like(parts: Parts, draw: torch.Generator) -> Parts:
    return Parts(
        torch.randn(parts.read.shape, generator=draw),
        torch.randn(parts.write.shape, generator=draw),
    )


def _consistency(first: Parts, second: Parts) -> Consistency:
    reads = _unit_rows(first.read, "read") @ _same_width(first.read, second.read, "read").T
    writes = _unit_rows(first.write, "write") @ _same_width(first.write, second.write, "write").T
    return Consistency(
        write=_mean_max(writes.abs()),
        read=_mean_max(reads.abs()),
        rank_one=_mean_max(reads * writes),
    )


def _mean_max(similarity: Float[Tensor, "n m"]) -> float:
    return float(similarity.amax(1).mean() + similarity.amax(0).mean()) / 2


def _same_width(first: Tensor, second: Tensor, name: str) -> Tensor:
    if first.shape[-1] != second.shape[-1]:
        raise ConfigError(
            f"{name} vectors",
            given=f"widths {first.shape[-1]} and {second.shape[-1]}",
            expected="two decompositions of one matrix",
            remedy="Compare runs on the same frozen target and site.",
        )
    return _unit_rows(second, name)


@dataclass(frozen=True)
class Splitting:
    """Shares of source units with no, exactly one and several matches in the larger run."""

    unmatched: float
    single: float
    split: float


def feature_splitting(
    source_write: Float[Tensor, "n d_out"],
    larger_write: Float[Tensor, "m d_out"],
    threshold: float = 0.5,
) -> Splitting:
    """Does more capacity split units? (Bushnaq et al. 2026)

    A match of a unit is a unit of the larger run with ``|cos| > threshold`` between write vectors.

    Args:
        source_write, larger_write: write vectors of alive components at the smaller and the larger
            capacity.

    Raises:
        ConfigError: different widths, no components, zero or non-finite vectors.
    """
    larger = _same_width(source_write, larger_write, "write")
    matches = ((_unit_rows(source_write, "write") @ larger.T).abs() > threshold).sum(1)
    none, one = (float((matches == k).double().mean()) for k in (0, 1))
    return Splitting(none, one, float((matches > 1).double().mean()))


@dataclass(frozen=True)
class Alive:
    """Components in use, under two definitions; neither is a number of mechanisms.

    Attributes:
        by_mean: mean importance above 1e-6.
        by_firing: importance above 0 at least once per million positions. On a smaller sample:
            at least once.
        n_positions: size of the sample.
    """

    by_mean: Bool[Tensor, " K"]
    by_firing: Bool[Tensor, " K"]
    n_positions: int

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.by_mean.sum()), int(self.by_firing.sum())


def alive(
    mean_ci: Float[Tensor, " K"], firings: Int[Tensor, " K"] | Float[Tensor, " K"], n_positions: int
) -> Alive:
    """Which components are in use.

    Args:
        mean_ci: mean lower importance over the sample.
        firings: positions at which the lower importance is above 0.
        n_positions: positions of the sample.

    Raises:
        ConfigError: lengths that differ, more firings than positions, values not finite.
    """
    for values, name in ((mean_ci, "mean_ci"), (firings, "firings")):
        _finite(values, name, 1)
    if len(mean_ci) != len(firings) or n_positions < 1 or bool((firings > n_positions).any()):
        raise ConfigError(
            "alive",
            given=f"{len(mean_ci)} means, {len(firings)} counts, {n_positions} positions",
            expected="one mean and one count per component, counts up to n_positions",
            remedy="Take all three from one pass over the sample.",
        )
    # among fewer than a million positions a single firing is above the rate
    firing = firings >= FIRES_PER_POSITION * n_positions
    return Alive(mean_ci > MEAN_ALIVE, firing, n_positions)


def alive_counts(g_low: Float[Tensor, "n K"]) -> Alive:
    """`alive` of importances held in memory (one row per position)."""
    g = _finite(g_low, "g_low", 2)
    return alive(g.double().mean(0), (g > 0).sum(0), len(g))


def _named(read: Tensor, write: Tensor, weight: Tensor) -> tuple[tuple[Tensor, str], ...]:
    return (read, "read"), (write, "write"), (weight, "weight")


def _finite(values: Tensor, name: str, ndim: int) -> Tensor:
    if values.ndim != ndim or values.numel() == 0 or not torch.isfinite(values).all():
        raise ConfigError(
            name,
            given=f"shape {tuple(values.shape)}"
            + ("" if torch.isfinite(values).all() else " with non-finite entries"),
            expected=f"a finite, non-empty {ndim}-dimensional tensor",
            remedy="Check the run that produced it.",
        )
    return values


def _unit_rows(vectors: Tensor, name: str) -> Float[Tensor, "n d"]:
    values = _finite(vectors, name, 2).detach().double()
    norms = values.norm(dim=1, keepdim=True)
    if (norms == 0).any():
        raise ConfigError(
            f"{name} vectors",
            given=f"{int((norms == 0).sum())} zero vectors",
            expected="alive components",
            remedy="Drop dead components first (`Parts.only`).",
        )
    return values / norms
