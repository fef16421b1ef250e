"""Watching a model along the vectors of a difference (Zhong and Raghunathan 2025, 2508.00161).

For every watched vector u the values ``c = x · u`` of all tokens of an *item* (a prompt, a
conversation) are reduced to their smallest and largest. The band of u is [smallest, largest] over
n calibration items; a new item is flagged when any of its tokens leaves the band of any vector.

Where the new item and the n calibration items are exchangeable, its largest value exceeds all of
theirs with probability at most 1/(n+1) (equal where ties have probability 0); so does its smallest
fall below. With t vectors, whatever their dependence,

    P(a harmless item is flagged) ≤ 2t / (n+1).

The bound counts *items*, never tokens (tokens of one item are not exchangeable with those of
another), and is an average over calibration sets: bands calibrated once have a rate of their own,
for one side of one vector Beta(1, n) distributed. Nothing else about the distribution enters.

Sides. ``read``: inputs of the matrix on its read vectors, i.e. how strongly a change is called on.
``write``: outputs of the matrix, or the stream behind it, on its write vectors, i.e. how much
there is of what it puts there. Signs of vectors are arbitrary, and both ends are watched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, DirectionError, PromptError
from mi_weightspace.core.site import Side

if TYPE_CHECKING:
    import pandas as pd

Measure = Literal["projection", "cosine"]
Ragged = Tensor | Sequence[Tensor]
"""Activations of items: (n, d), (n, tokens, d), or one (tokens_i, d) per item."""
MARGIN = 1e-3
"""Default widening: float32 sums of one prompt in batches of other shapes differ by less."""


@dataclass(frozen=True, eq=False)
class Watch:
    """Vectors watched at one place of the forward pass.

    Attributes:
        capture: where the activations come from, as `Lens.run` names it (``SITE:in``,
            ``SITE:out``, ``resid_post.3``); one place may be watched by several.
        vectors: (k, d), unit rows. index: their numbers among the site's components.
        measure: ``projection`` x·u, or ``cosine`` x·u/‖x‖ as published, which a mere change of
            the activations' norm does not move.
    """

    site: str
    side: Side
    capture: str
    vectors: Float[Tensor, "k d"]
    index: tuple[int, ...]
    stage: str = ""
    measure: Measure = "projection"

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure) or self.side not in get_args(Side):
            raise ConfigError(
                f"watch of {self.site}",
                given=f"measure={self.measure!r}, side={self.side!r}",
                expected=f"measure of {get_args(Measure)}, side of {get_args(Side)}",
                remedy="Use measure='projection' and side='write'.",
            )
        assert self.vectors.ndim == 2 and len(self.index) == len(self.vectors)

    @property
    def name(self) -> str:
        return f"{self.stage + '/' if self.stage else ''}{self.site}/{self.side}@{self.capture}"

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Extremes:
    """Smallest and largest value of each item along each vector of one watch, (n, k)."""

    low: Float[Tensor, "n k"]
    high: Float[Tensor, "n k"]

    def __len__(self) -> int:
        return len(self.low)

    @classmethod
    def join(cls, parts: Sequence[Extremes]) -> Extremes:
        return cls(torch.cat([p.low for p in parts]), torch.cat([p.high for p in parts]))


def extremes(
    watch: Watch, activations: Ragged, mask: Bool[Tensor, "n tokens"] | None = None
) -> Extremes:
    """Reduce items to their smallest and largest values; float32, on the CPU.

    Args:
        activations: see `Ragged`. mask: (n, tokens), True where a token counts.

    Raises:
        DirectionError: activations of another width than the vectors.
        PromptError: no item, an item without a token, or a value that is not finite.
    """
    if not isinstance(activations, Tensor):
        parts = [extremes(watch, a[None]) for a in activations]
        if not parts:
            raise _no_items(watch, 0)
        return Extremes.join(parts)
    x = activations[:, None] if activations.ndim == 2 else activations
    if x.ndim != 3 or x.shape[-1] != watch.vectors.shape[1]:
        raise DirectionError(
            f"activations for {watch.name}",
            given=f"shape {tuple(activations.shape)}",
            expected=f"(items, tokens, {watch.vectors.shape[1]}), the width of its vectors",
            remedy=f"Capture {watch.capture!r}.",
        )
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    if not len(x) or not bool(keep.any(1).all()):
        raise _no_items(watch, len(x))
    x = x.detach().float().masked_fill(~keep.to(x.device)[..., None], 0.0)
    value = x @ watch.vectors.to(x).T
    if watch.measure == "cosine":
        value = value / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    value = value.cpu()
    if not bool(value.isfinite().all()):
        raise PromptError(
            f"activations for {watch.name}",
            given="values that are not finite",
            expected="finite activations: a band around NaN never fires",
            remedy="Run the model in float32 or bfloat16, or drop the items.",
        )
    low = value.masked_fill(~keep[..., None], math.inf).amin(1)
    return Extremes(low, value.masked_fill(~keep[..., None], -math.inf).amax(1))


def _no_items(watch: Watch, n: int) -> PromptError:
    return PromptError(
        f"items for {watch.name}",
        given="no item" if not n else "an item of which no token is left",
        expected="at least one item, each with a token",
        remedy="Check the mask, or drop empty prompts.",
    )


def false_positive_bound(t: int, n: int) -> float:
    """``min(1, 2t/(n+1))``: t two-sided bands of n calibration items."""
    return min(1.0, 2 * t / (n + 1))


def items_needed(t: int, rate: float) -> int:
    """The smallest n whose bound is at most `rate`."""
    return max(1, math.ceil(2 * t / rate - 1 - 1e-9))


@dataclass(frozen=True, eq=False)
class Bands:
    """Calibrated bands of any number of watches; a value (`monitor_io` saves it).

    Attributes:
        watches: what is watched. low, high: per watch (k,), before widening by `margin`.
        n: calibration items.
        margin: each band reaches this share of its own width further on either side; the bound
            holds for any margin ≥ 0.
        model_hash: fingerprint of the model whose activations these are ("" for activations given
            without a model).
        skip_first: whether the first token of a prompt was left out.
    """

    watches: tuple[Watch, ...]
    low: tuple[Float[Tensor, " k"], ...]
    high: tuple[Float[Tensor, " k"], ...]
    n: int
    margin: float = MARGIN
    model_hash: str = ""
    skip_first: bool = False

    def __post_init__(self) -> None:
        if not self.watches or self.n < 1 or not self.margin >= 0:
            raise ConfigError(
                "bands",
                given=f"{len(self.watches)} watches, n={self.n}, margin={self.margin}",
                expected="at least one watch and one calibration item, and a margin of at least 0",
                remedy="Give components and calibration prompts.",
            )

    def __len__(self) -> int:
        """t, the number of watched vectors."""
        return sum(len(watch) for watch in self.watches)

    def __repr__(self) -> str:
        return (
            f"Bands: {len(self)} vectors at {len(self.watches)} places, {self.n} calibration "
            f"items; a harmless item is flagged with probability ≤ {self.bound:.3g}"
        )

    @property
    def bound(self) -> float:
        """Upper bound of the probability that an exchangeable item is flagged, 2t/(n+1)."""
        return false_positive_bound(len(self), self.n)

    @property
    def captures(self) -> tuple[str, ...]:
        """The places to capture, each once."""
        return tuple(dict.fromkeys(watch.capture for watch in self.watches))

    def limits(self) -> tuple[list[Tensor], list[Tensor]]:
        """Lower and upper ends with the margin, per watch."""
        pairs = list(zip(self.low, self.high, strict=True))
        return (
            [low - self.margin * (high - low) for low, high in pairs],
            [high + self.margin * (high - low) for low, high in pairs],
        )

    def check(
        self,
        activations: Ragged | Mapping[str, Ragged],
        mask: Bool[Tensor, "n tokens"] | None = None,
    ) -> Alarms:
        """Which items leave a band, and along which vectors.

        Args:
            activations: of one place, or by capture name where several are watched.

        Raises:
            ConfigError: a place whose activations are not given.
            DirectionError, PromptError: as `extremes`.
        """
        given = self._by_capture(activations)
        return self.judge([extremes(w, given[w.capture], mask) for w in self.watches])

    def judge(self, found: Sequence[Extremes]) -> Alarms:
        """`check` on items that are already reduced, one `Extremes` a watch.

        Raises:
            PromptError: watches that saw different numbers of items.
        """
        self._check_counts(found)
        lower, upper = self.limits()
        excess = []
        for e, lo, up in zip(found, lower, upper, strict=True):
            above, below = (e.high - up).clamp_min(0), (lo - e.low).clamp_min(0)
            excess.append(torch.where(above >= below, above, -below))
        return Alarms(self, torch.cat(excess, 1))

    def widened(
        self,
        activations: Ragged | Mapping[str, Ragged],
        mask: Bool[Tensor, "n tokens"] | None = None,
    ) -> Bands:
        """Bands of the old and the new calibration items together.

        For the bound to hold with the larger n, *all* items seen since must be given, not only
        the flagged ones that turned out harmless.
        """
        given = self._by_capture(activations)
        return self.extended([extremes(w, given[w.capture], mask) for w in self.watches])

    def extended(self, found: Sequence[Extremes]) -> Bands:
        """`widened` by items that are already reduced."""
        self._check_counts(found)
        return replace(
            self,
            low=tuple(
                torch.minimum(a, e.low.amin(0)) for a, e in zip(self.low, found, strict=True)
            ),
            high=tuple(
                torch.maximum(a, e.high.amax(0)) for a, e in zip(self.high, found, strict=True)
            ),
            n=self.n + len(found[0]),
        )

    def _check_counts(self, found: Sequence[Extremes]) -> None:
        counts = sorted({len(e) for e in found})
        if len(found) != len(self.watches) or len(counts) != 1:
            raise PromptError(
                "items for bands",
                given=f"{len(found)} places with {counts} items",
                expected=f"the same items at each of {len(self.watches)} places",
                remedy="Capture every place in one pass over the same prompts.",
            )

    def _by_capture(self, activations: Ragged | Mapping[str, Ragged]) -> Mapping[str, Ragged]:
        wanted = self.captures
        given = activations if isinstance(activations, Mapping) else {wanted[0]: activations}
        missing = [name for name in wanted if name not in given]
        if missing:
            raise ConfigError(
                "activations for bands",
                given=f"nothing for {missing[:6]}",
                expected=f"activations by name for each of {list(wanted)[:6]}",
                remedy="Capture them with lens.run(tokens, capture=bands.captures).",
            )
        return given


@dataclass(frozen=True, eq=False)
class Alarms:
    """What a check found.

    Attributes:
        bands: the bands it was made with, hence the bound.
        excess: (n, t) how far outside the widened band the item's worst token is, in the
            measure's units: positive above, negative below, 0 within. Vectors in the order of
            ``bands.watches``.
    """

    bands: Bands
    excess: Float[Tensor, "n t"]

    @property
    def fired(self) -> Bool[Tensor, "n t"]:
        return self.excess != 0

    @property
    def flagged(self) -> Bool[Tensor, " n"]:
        """Items of which any vector fired."""
        return self.fired.any(1)

    @property
    def rate(self) -> float:
        """Share of items flagged."""
        return float(self.flagged.float().mean())

    def rate_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Exact binomial interval of the rate, for these bands and independent items."""
        from mi_weightspace.core.stats import binomial_interval

        return binomial_interval(int(self.flagged.sum()), len(self.flagged), level)

    def __repr__(self) -> str:
        n = len(self.flagged)
        return (
            f"Alarms: {int(self.flagged.sum())} of {n} items flagged ({self.rate:.3g}); "
            f"of harmless ones at most {self.bands.bound:.3g} are expected"
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row for each (item, vector) that fired: ``item, stage, site, side, capture,
        component, value, low, high, excess, widths`` (`widths`: |excess| in band widths)."""
        import pandas as pd

        lower, upper = (torch.cat(v) for v in self.bands.limits())
        place = [(w, i) for w in self.bands.watches for i in w.index]
        rows = []
        for item, v in self.fired.nonzero().tolist():
            watch, component = place[v]
            excess, low, high = float(self.excess[item, v]), float(lower[v]), float(upper[v])
            value = (high if excess > 0 else low) + excess
            widths = abs(excess) / (high - low) if high > low else math.inf
            where = (item, watch.stage, watch.site, watch.side, watch.capture, component)
            rows.append((*where, value, low, high, excess, widths))
        columns = ("item", "stage", "site", "side", "capture", "component")
        columns = (*columns, "value", "low", "high", "excess", "widths")
        return pd.DataFrame(rows, columns=list(columns))


def calibrate(
    watches: Sequence[Watch],
    found: Sequence[Extremes],
    *,
    margin: float = MARGIN,
    model_hash: str = "",
    skip_first: bool = False,
) -> Bands:
    """Bands of calibration items that are already reduced, one `Extremes` a watch.

    Raises:
        ConfigError: nothing to watch. PromptError: places that saw different items.
    """
    empty = Bands(
        tuple(watches),
        tuple(torch.full((len(w),), math.inf) for w in watches),
        tuple(torch.full((len(w),), -math.inf) for w in watches),
        n=1,
        margin=margin,
        model_hash=model_hash,
        skip_first=skip_first,
    )
    return replace(empty.extended(found), n=len(found[0]))
