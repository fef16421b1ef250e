"""Do the dictionary's features for an open behaviour still mark it where it is hidden?

The k latents of largest standardised mean difference are picked on one half of the clusters at the
open stage. A latent *survives* at a stage if, on the other half, its difference has the same sign,
at least half the size, and a permutation p that passes Benjamini and Hochberg at q = 0.05 among
the k. The number that survives means nothing alone; beside it stand

- the *ceiling*: the open stage itself, other half;
- the *floor*: clean and benign stages (latents that encode the prompt survive everything);
- *chance*: ``k²/alive``, the expected overlap of two random picks among latents that ever fire;
- *rank overlap*: how many of the k would be picked again on the stage's other half.

Everything is averaged over several random halvings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.errors import MismatchError
from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.seeds import derive
from mi_weightspace.core.stats import cluster_weights, percentile_interval
from probes.detectors import class_weights
from probes.splits import fold_numbers, labelings

if TYPE_CHECKING:
    import pandas as pd

KEEP = 0.5
"""Share of its first size that a surviving difference keeps."""
FALSE_DISCOVERIES = 0.05
N_HALVES = 8


@dataclass(frozen=True, eq=False)
class Survival:
    """Survival of every stage, and of every latent.

    Attributes:
        table: ``stage, role, k, n_halves, survived, low, high, overlap, alive, chance`` (counts of
            latents, means over halvings; 95 % cluster bootstrap of the tested halves, all halvings
            together).
        latents: one row a latent picked on any half: ``latent, picked`` (share of halvings),
            ``effect_STAGE`` (standardised mean difference on all rows) and ``survived_STAGE``
            (share of the halvings that picked it).
    """

    table: pd.DataFrame
    latents: pd.DataFrame


@dataclass(frozen=True, eq=False)
class _Half:
    """One halving: rows it picks on, rows it tests on, permuted labels of the latter."""

    pick: Int[Tensor, " a"]
    test: Int[Tensor, " b"]
    signs: Float[Tensor, "draws b"]
    weights: Float[Tensor, "boot b"]


def survival(
    codes: Mapping[str, Float[Tensor, "n d_sae"]],
    labelled: LabelledSet,
    open_stage: str,
    *,
    roles: Mapping[str, str] | None = None,
    k: int = 10,
    n_halves: int = N_HALVES,
    n_permutations: int = 999,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> Survival:
    """Survival of the open stage's top k latents at every stage.

    Args:
        codes: pooled codes of each stage, rows as in `labelled`; `open_stage` among them.

    Raises:
        MismatchError: no such open stage, codes of another shape, or fewer latents than k.
        PromptError: too few clusters to halve.
    """
    import pandas as pd

    _check(codes, labelled, open_stage, k)
    wide = {stage: own.double() for stage, own in codes.items()}
    halves = _halves(labelled, n_halves, n_permutations, n_bootstrap, seed)
    alive = int((wide[open_stage].amax(0) > wide[open_stage].amin(0)).sum())
    picks = [_pick(wide[open_stage][h.pick], labelled.labels[h.pick], k) for h in halves]
    rows: list[dict[str, Any]] = []
    kept: dict[str, Bool[Tensor, "halves k"]] = {}
    for stage, own in wide.items():
        counts, draws, overlaps, alike = [], [], [], []
        for half, (latents, first) in zip(halves, picks, strict=True):
            labels = labelled.labels[half.test]
            shown = own[half.test]
            alive_here, gap = _survives(shown[:, latents], labels, half.signs, first)
            again, _ = _pick(shown, labels, k)
            counts.append(float(alive_here.sum()))
            alike.append(alive_here)
            overlaps.append(float(torch.isin(again, latents).sum()))
            draws.append(_resampled(shown[:, latents], labels, half.weights, first, gap))
        low, high = percentile_interval(torch.cat(draws))
        kept[stage] = torch.stack(alike)
        rows.append(
            {
                "stage": stage,
                "role": (roles or {}).get(stage, ""),
                "k": k,
                "n_halves": n_halves,
                "survived": sum(counts) / n_halves,
                "low": float(low),
                "high": float(high),
                "overlap": sum(overlaps) / n_halves,
                "alive": alive,
                "chance": k * k / max(alive, 1),
            }
        )
    return Survival(pd.DataFrame(rows), _latent_table(wide, labelled, picks, kept))


def _check(codes: Mapping[str, Tensor], labelled: LabelledSet, open_stage: str, k: int) -> None:
    shapes = {stage: tuple(own.shape) for stage, own in codes.items()}
    width = shapes.get(open_stage, (0, 0))[-1]
    if any(shape != (len(labelled), width) for shape in shapes.values()) or not 1 <= k <= width:
        raise MismatchError(
            "feature survival",
            given=f"codes {shapes}, open stage {open_stage!r}, k = {k}",
            expected=f"({len(labelled)}, d_sae) at every stage, and 1 ≤ k ≤ d_sae",
            remedy="Read every stage with one labelled set and one SAE.",
        )


def _halves(
    labelled: LabelledSet, n_halves: int, n_permutations: int, n_bootstrap: int, seed: int
) -> list[_Half]:
    labels, clusters = labelled.labels, labelled.cluster_index
    signs = labelings(labelled, n_permutations, seed=derive(seed, "survival")).signs
    found = []
    for i in range(n_halves):
        side = fold_numbers(labels, clusters, 2, seed=seed, name=f"halves/{i}")
        pick, test = (side == 0).nonzero().flatten(), (side == 1).nonzero().flatten()
        names = [labelled.clusters[j] for j in test.tolist()]
        weights = cluster_weights(names, n_bootstrap, seed=seed, name=f"survival/{i}")
        found.append(_Half(pick, test, signs[:, test], weights))
    return found


def effects(rows: Float[Tensor, "n m"], labels: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
    """Cohen's d of every column: difference of class means over the pooled within-class sd.

    Zero where a column never varies within a class.
    """
    one, zero = rows[labels > 0], rows[labels == 0]
    freedom = max(len(rows) - 2, 1)
    within = (one - one.mean(0)).square().sum(0) + (zero - zero.mean(0)).square().sum(0)
    spread = (within / freedom).sqrt()
    gap = one.mean(0) - zero.mean(0)
    return torch.where(spread > 1e-12, gap / spread.clamp(min=1e-12), 0.0)


def _pick(
    rows: Float[Tensor, "n d_sae"], labels: Int[Tensor, " n"], k: int
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    d = effects(rows, labels)
    latents = d.abs().argsort(descending=True, stable=True)[:k]
    return latents, d[latents]


def _survives(
    rows: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    signs: Float[Tensor, "draws n"],
    first: Float[Tensor, " k"],
) -> tuple[Bool[Tensor, " k"], Float[Tensor, " k"]]:
    """Which latents survive, and the class gap each would have needed.

    The gap is the null's quantile at the largest p that passed (at q/k where none did).
    """
    d = effects(rows, labels)
    truth = class_weights(labels.double()[None] * 2 - 1) @ rows
    null = (class_weights(signs) @ rows).abs()
    p = (1 + (null >= truth.abs() - 1e-12).sum(0)).double() / (len(signs) + 1)
    passed = benjamini_hochberg(p)
    edge = float(p[passed].max()) if bool(passed.any()) else FALSE_DISCOVERIES / len(p)
    return _keeps(d, first) & passed, torch.quantile(null, 1 - edge, dim=0)


def _keeps(d: Float[Tensor, "... k"], first: Float[Tensor, " k"]) -> Bool[Tensor, "... k"]:
    return (d * first.sign() >= KEEP * first.abs()) & (first != 0)


def benjamini_hochberg(p: Float[Tensor, " m"], q: float = FALSE_DISCOVERIES) -> Bool[Tensor, " m"]:
    """Which hypotheses are rejected at false discovery rate q."""
    order = p.argsort()
    m = len(p)
    passed = p[order] <= q * torch.arange(1, m + 1, dtype=torch.float64) / m
    count = int(passed.nonzero().max()) + 1 if bool(passed.any()) else 0
    found = torch.zeros(m, dtype=torch.bool)
    found[order[:count]] = True
    return found


def _resampled(
    rows: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, "boot n"],
    first: Float[Tensor, " k"],
    gap: Float[Tensor, " k"],
) -> Float[Tensor, " boot"]:
    """How many latents keep sign, size and the gap needed under each row of bootstrap weights."""
    sums = []
    for side in (1, 0):
        own = weights * (labels == side)
        share = own / own.sum(1, keepdim=True).clamp(min=1e-12)
        mean, square = share @ rows, share @ rows.square()
        sums.append((mean, (square - mean.square()).clamp(min=0), own.sum(1, keepdim=True)))
    (up, up_var, n_up), (down, down_var, n_down) = sums
    spread = ((up_var * n_up + down_var * n_down) / (n_up + n_down)).sqrt()
    d = torch.where(spread > 1e-12, (up - down) / spread.clamp(min=1e-12), 0.0)
    return (_keeps(d, first) & ((up - down).abs() >= gap)).double().sum(1)


def _latent_table(
    codes: Mapping[str, Tensor],
    labelled: LabelledSet,
    picks: Sequence[tuple[Tensor, Tensor]],
    kept: Mapping[str, Bool[Tensor, "halves k"]],
) -> pd.DataFrame:
    import pandas as pd

    chosen = torch.stack([latents for latents, _ in picks])
    whole = {stage: effects(own, labelled.labels) for stage, own in codes.items()}
    rows: list[dict[str, Any]] = []
    for latent in chosen.unique().tolist():
        there = chosen == latent
        row: dict[str, Any] = {"latent": latent, "picked": float(there.any(1).double().mean())}
        for stage in codes:
            row[f"effect_{stage}"] = float(whole[stage][latent])
            row[f"survived_{stage}"] = float(kept[stage][there].double().mean())
        rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.sort_values(["picked", "latent"], ascending=[False, True], ignore_index=True)
