"""How well each detector does on clusters it has not seen, with its null and its interval.

AUROC is the mean over splits. Its interval resamples clusters on the held-out scores (every split
weighted alike in one draw); training is not repeated, so that it leaves out what another training
sample would change. Its null permutes labels as the design gives them out (`probes.splits`), trains
anew, and tests on the permuted labels; configurations are tuned anew where that is cheap
(`Detector.retuned`) and otherwise stay as tuned on the labels as given. p is
two-sided around the null's mean: a rank with at least `RANKED` draws, otherwise Student's t for one
more draw of a normal null.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.seeds import derive
from mi_weightspace.core.stats import (
    cluster_weights,
    holm,
    percentile_interval,
    perfect_score_bound,
)
from probes.detectors import Configuration, Detector, aurocs, class_weights
from probes.splits import (
    N_FOLDS,
    N_SPLITS,
    Scheme,
    Split,
    grouped_splits,
    holders,
    labelings,
    swapped,
)

RANKED = 199
FALSE_POSITIVES = 0.01


@dataclass(frozen=True, eq=False)
class Design:
    """Labels, clusters and everything drawn over them: shared by every detector and stage.

    Attributes:
        signs: (b, n) permuted labels, +1 for label 1; `scheme` says how.
        weights: (draws, n) bootstrap weights over clusters.
    """

    labels: Int[Tensor, " n"]
    clusters: Int[Tensor, " n"]
    splits: tuple[Split, ...]
    signs: Float[Tensor, "b n"]
    scheme: Scheme
    weights: Float[Tensor, "draws n"]
    seed: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def per_class(self) -> int:
        """Rows of the rarer label."""
        ones = int(self.labels.sum())
        return min(ones, len(self) - ones)

    @cached_property
    def holders(self) -> int:
        """Clusters that hold the label which fewer clusters hold."""
        return min(holders(self.labels, self.clusters))

    @classmethod
    def of(
        cls,
        labelled: LabelledSet,
        *,
        n_splits: int = N_SPLITS,
        n_folds: int = N_FOLDS,
        n_permutations: int = 399,
        n_bootstrap: int = 2000,
        seed: int = 0,
    ) -> Design:
        """Hidden condition: the labels of the set.

        Raises:
            PromptError: a label that fewer than two clusters hold.
        """
        labels, clusters = labelled.labels, labelled.cluster_index
        drawn = labelings(labelled, n_permutations, seed=seed)
        return cls(
            labels,
            clusters,
            grouped_splits(labels, clusters, n_splits=n_splits, n_folds=n_folds, seed=seed),
            drawn.signs,
            drawn.scheme,
            _weights(clusters, n_bootstrap, seed),
            seed,
        )

    def between_stages(self) -> Design:
        """The same prompts read at two stages, first one then the other; label 1: the first.

        Clusters hold both stages, so that no prompt is trained on at one and tested at the other.
        """
        n = len(self)
        labels = torch.cat([torch.ones(n), torch.zeros(n)]).long()
        clusters = self.clusters.repeat(2)
        splits = tuple(
            Split(torch.cat([s.train, s.train + n]), torch.cat([s.test, s.test + n]))
            for s in self.splits
        )
        signs = swapped(labels, clusters, len(self.signs), seed=self.seed)
        return Design(
            labels, clusters, splits, signs, "pairs", self.weights.repeat(1, 2), self.seed
        )


def _weights(clusters: Int[Tensor, " n"], draws: int, seed: int) -> Float[Tensor, "draws n"]:
    names = [str(c) for c in clusters.tolist()]
    return cluster_weights(names, draws, seed=seed, name="detection bootstrap")


# ---- one detector, one stage ---------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Found:
    """What one detector does at one stage.

    Attributes:
        value: mean AUROC over splits (the relative norm, for the norm); `per_split` each split's.
        low, high: 95 % cluster bootstrap of `draws`; a perfect score has an exact bound.
        null: (b,) the same statistic under permuted labels.
        chosen: configuration of each split. others: AUROC draws on further stages' rows.
        recall: share of label 1 above the score that 1 % of unrelated rows exceed; NaN without.
    """

    value: float
    low: float
    high: float
    draws: Float[Tensor, " draws"]
    null: Float[Tensor, " b"]
    per_split: Float[Tensor, " splits"]
    chosen: tuple[Configuration, ...] = ()
    others: Mapping[str, Found] = field(default_factory=dict)
    recall: float = float("nan")
    seconds: float = 0.0
    upward_only: bool = False

    @property
    def null_mean(self) -> float:
        return float(self.null.mean()) if len(self.null) else float("nan")

    @property
    def null_interval(self) -> tuple[float, float]:
        if self.p_method == "none":
            return float("nan"), float("nan")
        if self.p_method == "rank":
            low, high = percentile_interval(self.null)
            return float(low), float(high)
        reach = 1.959964 * float(self.null.std())
        return self.null_mean - reach, self.null_mean + reach

    @property
    def p_method(self) -> str:
        if len(self.null) < 2:
            return "none"
        return "rank" if self.upward_only or len(self.null) >= RANKED else "t"

    @cached_property
    def p(self) -> float:
        """Of the value under the null; NaN without one."""
        if self.p_method == "none":
            return float("nan")
        gap, off = self.value - self.null_mean, self.null - self.null_mean
        if not self.upward_only:
            gap, off = abs(gap), off.abs()
        if self.p_method == "rank":
            return float(1 + (off >= gap - 1e-12).sum()) / (len(self.null) + 1)
        return self.student_p

    @cached_property
    def student_p(self) -> float:
        """By Student's t for one more draw of the null, two-sided."""
        from scipy.stats import t

        gap = abs(self.value - self.null_mean)
        spread = float(self.null.std()) * (1 + 1 / len(self.null)) ** 0.5
        if spread <= 1e-12:
            return 1.0 if gap <= 1e-12 else 1 / (len(self.null) + 1)
        return float(min(1.0, 2 * t.sf(gap / spread, len(self.null) - 1)))

    def above(self, level: float = 0.05) -> bool:
        """Above its null, and not by chance."""
        return self.value > self.null_mean and self.p <= level


def measure(
    detector: Detector,
    design: Design,
    rows: Float[Tensor, "n d"],
    *,
    n_permutations: int | None = None,
    others: Mapping[str, Float[Tensor, "n d"]] | None = None,
    unrelated: Float[Tensor, "m d"] | None = None,
) -> Found:
    """One detector at one stage, over every split.

    Args:
        n_permutations: at most this many draws of the null (default: the detector's).
        others: the same prompts at other stages; scored by the detector as trained here.
        unrelated: rows without the behaviour, for the recall at 1 % false positives.
    """
    start = time.perf_counter()
    far = dict(others or {})
    own = torch.full((len(design.splits), len(design)), torch.nan, dtype=torch.float64)
    moved = {name: own.clone() for name in far}
    n_draws = detector.n_permutations if n_permutations is None else n_permutations
    signs = design.signs[: min(n_draws, detector.n_permutations)]
    null = torch.full((len(design.splits), len(signs)), torch.nan, dtype=torch.float64)
    chosen: list[Configuration] = []
    recalls: list[float] = []
    truth = (design.labels.double() * 2 - 1)[None]
    for i, split in enumerate(design.splits):
        seed = derive(design.seed, detector.name, i)
        train, test = rows[split.train], split.test
        labels, clusters = design.labels[split.train], design.clusters[split.train]
        config = detector.tune(train, labels, clusters, seed)
        chosen.append(config)
        shown = [rows[test], *(far[name][test] for name in far)]
        shown += [] if unrelated is None else [unrelated]
        scores = detector.scorer(train, truth[:, split.train], torch.cat(shown), [config], seed)
        pieces = scores[0, 0].double().split([len(s) for s in shown])
        own[i, test] = pieces[0]
        for name, piece in zip(far, pieces[1:], strict=False):
            moved[name][i, test] = piece
        if unrelated is not None:
            recalls.append(_recall(pieces[0][design.labels[test] > 0], pieces[-1]))
        if len(signs):
            drawn = detector.permuted(
                train, signs[:, split.train], rows[test], clusters, config, seed
            )
            null[i] = aurocs(drawn, (signs[:, test] > 0).long())
    return score_found(
        own,
        design,
        null=null.nanmean(0),
        chosen=tuple(chosen),
        others={name: score_found(moved[name], design) for name in far},
        recall=sum(recalls) / len(recalls) if recalls else float("nan"),
        seconds=time.perf_counter() - start,
    )


def _recall(positive: Float[Tensor, " p"], unrelated: Float[Tensor, " m"]) -> float:
    """At the score that at most 1 % of the unrelated rows exceed (with under 100: none does)."""
    allowed = int(FALSE_POSITIVES * len(unrelated))
    edge = unrelated.sort(descending=True).values[allowed]
    return float((positive > edge).double().mean())


def score_found(
    scores: Float[Tensor, "splits n"],
    design: Design,
    *,
    null: Float[Tensor, " b"] | None = None,
    chosen: tuple[Configuration, ...] = (),
    others: Mapping[str, Found] | None = None,
    recall: float = float("nan"),
    seconds: float = 0.0,
) -> Found:
    """AUROC and interval of held-out scores; NaN where a row was not tested in a split."""
    plain = torch.ones(1, len(design), dtype=torch.float64)
    each = weighted_aurocs(scores, design.labels, torch.cat([plain, design.weights]))
    value, draws = float(each[0].nanmean()), each[1:].nanmean(1)
    low, high = (float(e) for e in percentile_interval(draws[~draws.isnan()]))
    bound = perfect_score_bound(design.holders)
    if value == 1.0:
        low = bound
    elif value == 0.0:
        high = 1 - bound
    return Found(
        value,
        low,
        high,
        draws,
        torch.zeros(0, dtype=torch.float64) if null is None else null,
        each[0],
        chosen,
        others or {},
        recall,
        seconds,
    )


def weighted_aurocs(
    scores: Float[Tensor, "splits n"], labels: Int[Tensor, " n"], weights: Float[Tensor, "draws n"]
) -> Float[Tensor, "draws splits"]:
    """AUROC of each split under each row of weights, ties half; NaN where a label has no weight."""
    found = torch.full((len(weights), len(scores)), torch.nan, dtype=torch.float64)
    for i, row in enumerate(scores):
        tested = ~row.isnan()
        one = (tested & (labels > 0)).nonzero().flatten()
        zero = (tested & (labels == 0)).nonzero().flatten()
        gap = row[one][:, None] - row[zero][None]
        won = (gap > 0).double() + 0.5 * (gap == 0)
        up, down = weights[:, one], weights[:, zero]
        total = up.sum(1) * down.sum(1)
        found[:, i] = ((up @ won) * down).sum(1) / torch.where(total > 0, total, torch.nan)
    return found


# ---- the norm ------------------------------------------------------------------------------
def measure_norm(design: Design, rows: Float[Tensor, "n d"]) -> Found:
    """``‖Δμ‖`` over the mean activation norm, in sample, with the null of the same permutations.

    Its interval is the bootstrap of the square less the variance that resampling adds, so that it
    lies around the observed value. p is one-sided: a norm is only ever too large.
    """
    start = time.perf_counter()
    wide = rows.double()
    size = wide.norm(dim=1).mean().clamp(min=1e-300)
    truth = (design.labels.double() * 2 - 1)[None]
    shift = class_weights(truth) @ wide
    value = float(shift.norm() / size)
    null = (class_weights(design.signs) @ wide).norm(dim=1) / size
    up = design.weights * (truth > 0)
    down = design.weights * (truth < 0)
    kept = (up.sum(1) > 0) & (down.sum(1) > 0)
    up, down = up[kept], down[kept]
    drawn = (up / up.sum(1, keepdim=True) - down / down.sum(1, keepdim=True)) @ wide
    surplus = (drawn - shift).square().sum(1).mean()
    square = drawn.square().sum(1) - surplus
    draws = square.sign() * square.abs().sqrt() / size
    low, high = percentile_interval(draws)
    return Found(
        value,
        max(0.0, float(low)),
        max(value, float(high)),
        draws,
        null,
        torch.zeros(0, dtype=torch.float64),
        seconds=time.perf_counter() - start,
        upward_only=True,
    )


# ---- between detectors ---------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """One detector's AUROC less a rival's, on the same rows and draws.

    `p` is two-sided from the paired cluster bootstrap, `p_holm` adjusted over all rivals.
    """

    rival: str
    value: float
    low: float
    high: float
    p: float
    p_holm: float = float("nan")

    def better(self, level: float = 0.05) -> bool:
        """Whether the difference is positive and not by chance, over all rivals."""
        return self.value > 0 and self.p_holm <= level


def differences(own: Found, rivals: Mapping[str, Found]) -> dict[str, Difference]:
    """`own` less each rival, Holm over the rivals."""
    found: list[Difference] = []
    for name, rival in rivals.items():
        gap = own.draws - rival.draws
        gap = gap[~gap.isnan()]
        low, high = (float(e) for e in percentile_interval(gap))
        tail = min(int((gap <= 0).sum()), int((gap >= 0).sum()))
        p = min(1.0, 2 * (1 + tail) / (len(gap) + 1))
        found.append(Difference(name, own.value - rival.value, low, high, p))
    adjusted = holm(torch.tensor([d.p for d in found], dtype=torch.float64)).tolist()
    return {
        d.rival: Difference(d.rival, d.value, d.low, d.high, d.p, p)
        for d, p in zip(found, adjusted, strict=True)
    }


def joint_p(rows: Sequence[Found]) -> tuple[float, int]:
    """p of the best of several rows, and which it is: Bonferroni over the rows.

    By Student's t for every row, whatever its number of draws: kinds of detectors with few and with
    many draws must be judged alike, and a rank among few cannot be small. Below the null is none.
    """
    found = [row.student_p if row.value > row.null_mean else 1.0 for row in rows]
    best = min(range(len(rows)), key=lambda i: (found[i], -rows[i].value))
    return min(1.0, len(rows) * found[best]), best
