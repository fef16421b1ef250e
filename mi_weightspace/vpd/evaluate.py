"""One call that measures a decomposition on held-out batches (vpd.md §6).

Importances are the lower ones, every site is masked everywhere (no routing), and nothing here is
ever optimised. Passes run in the host's own precision. Every number carries `n`, the positions it
was measured on; means carry a 95 % interval over batches, worst cases a median and a range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import mi_weightspace.vpd.truth as truth
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd.evaluate_baselines import compare_baselines
from mi_weightspace.vpd.evaluate_masks import (
    HIDDEN_UNDER,
    BatchNumbers,
    measure_batch,
)
from mi_weightspace.vpd.evaluate_signs import SignedFirings
from mi_weightspace.vpd.evaluate_stats import pooled, records
from mi_weightspace.vpd.evaluate_tables import (
    TOTAL,
    hidden_table,
    l0_table,
    masking_table,
    site_table,
    spectrum_table,
)
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.ladder import LADDER, check_ladder, ladder, summarise
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import Draws

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDS = (0.0, 0.01, 0.1)
_TABLES = (
    "l0",
    "maskings",
    "ladder",
    "ladder_runs",
    "hidden",
    "spectrum",
    "sites",
    "baselines",
    "polysemy",
)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What a decomposition gave on held-out batches.

    Attributes:
        l0: ``level`` (site, group, total), ``name, threshold, l0, low, high, dense, n, n_batches``:
            mean number of subcomponents with g > threshold, beside how many there are.
        maskings: ``masking, metric, distance, low, high``; ``of_zero`` (share of the all-zero
            mask's error); for tokens ``ce, ce_difference, ce_low, ce_high`` (to the host's own
            next-token cross-entropy) and ``unrecovered`` = (CE − CE_host)/(CE_zero − CE_host), each
            with its interval; ``monitor`` (never to be optimised), ``n, n_batches``.
        ladder: `ladder.summarise`. ladder_runs: every single climb.
        hidden: ``masking, level, name, mse`` (mean over elements of a site's output, masked against
            clean; pooled over all sites at level total), ``low, high, relative, n, n_batches``.
        spectrum: one row a subcomponent, by falling ``mean_ci`` within its site: ``site, component,
            rank, mean_ci, frequency`` (share of positions with g > 0), ``firm`` (share of those
            with g ≥ 0.9), ``alive_by_mean, alive_by_firing, n``.
        sites: ``site, layer, d_out, d_in, n_components, rank_bound`` (largest possible rank),
            ``can_be_exact``, ``remainder`` = ‖Δ‖²/‖W‖².
        baselines: `evaluate_baselines.compare_baselines`. polysemy: `SignedFirings.table`.
        mean_ci: (K,) float64. firings: (K,) positions with g > 0.
        facts: plain values: metric, positions, batches, seed, thresholds, the threshold of
            headlines, ``identity`` and ``identity_scale`` (largest |full − host|, |host|),
            ``ce_host``, the hash of the host.
    """

    l0: pd.DataFrame
    maskings: pd.DataFrame
    ladder: pd.DataFrame
    ladder_runs: pd.DataFrame
    hidden: pd.DataFrame
    spectrum: pd.DataFrame
    sites: pd.DataFrame
    baselines: pd.DataFrame
    polysemy: pd.DataFrame
    mean_ci: Float[Tensor, " K"]
    firings: Int[Tensor, " K"]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alive(self) -> truth.Alive:
        """Components in use under both definitions; neither is a number of mechanisms."""
        return truth.alive(self.mean_ci, self.firings, self.facts["n"])

    def masking(self, name: str, column: str = "distance") -> float:
        """One number of `maskings`."""
        return float(records(self.maskings, masking=name)[0][column])

    def total_l0(self, threshold: float | None = None) -> float:
        """Subcomponents above the threshold per position, all sites (default: the headline's)."""
        at = self.facts["threshold"] if threshold is None else threshold
        return float(records(self.l0, level=TOTAL, threshold=at)[0]["l0"])

    def pgd(self, budget: int | None = None) -> float:
        """Median error under the attack at a budget (default: the smallest measured)."""
        own = {r["budget"]: r["median"] for r in records(self.ladder, attack="pgd")}
        return float(own[min(own) if budget is None else budget])

    def to_pandas(self) -> pd.DataFrame:
        """One row a site and one for all: L0 by threshold, dense count, alive counts, remainder,
        hidden errors, and (total only) the distances of the maskings and of the PGD ladder."""
        import pandas as pd

        rows = []
        sites = {r["site"]: r for r in records(self.sites)}
        for name in [*sites, TOTAL]:
            own = records(self.l0, level="site" if name in sites else TOTAL, name=name)
            row: dict[str, Any] = {"site": name}
            row |= {f"l0>{r['threshold']:g}": r["l0"] for r in own}
            row["dense"] = own[0]["dense"]
            only = {"site": name} if name in sites else {}
            parts = records(self.spectrum, **only)
            for kind in ("alive_by_mean", "alive_by_firing"):
                row[kind] = sum(bool(r[kind]) for r in parts)
            if name in sites:
                row["remainder"] = sites[name]["remainder"]
            for under in HIDDEN_UNDER:
                row[f"hidden_{under}"] = records(self.hidden, masking=under, name=name)[0]["mse"]
            row["n"] = self.facts["n"]
            rows.append(row)
        metric = self.facts["metric"]
        for r in records(self.maskings):
            rows[-1][f"{metric}_{r['masking']}"] = r["distance"]
        for r in records(self.ladder, attack="pgd"):
            rows[-1][f"{metric}_pgd_{r['budget']}"] = r["median"]
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """All frames by name (what a report stores)."""
        return {name: getattr(self, name) for name in _TABLES}

    def arrays(self) -> dict[str, Tensor]:
        return {"mean_ci": self.mean_ci, "firings": self.firings}

    @classmethod
    def restored(
        cls,
        tables: Mapping[str, pd.DataFrame],
        arrays: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> Evaluation:
        """What `tables`, `arrays` and `facts` were taken from."""
        return cls(
            **{name: tables[name] for name in _TABLES},
            mean_ci=arrays["mean_ci"],
            firings=arrays["firings"],
            facts=facts,
        )

    def __repr__(self) -> str:
        return (
            f"Evaluation: {self.facts['n']} positions in {self.facts['n_batches']} batches, "
            f"{len(self.sites)} sites, L0 {self.total_l0():.3g} of {len(self.mean_ci)} "
            f"(g > {self.facts['threshold']:g})"
        )


def evaluate(
    objective: Objective,
    batches: Sequence[Tensor],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    budgets: Sequence[int] = LADDER,
    free_budgets: Sequence[int] = LADDER[:1],
    n_pgd_batches: int = 5,
    n_inits: int = 1,
    groups: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure a decomposition on held-out batches.

    Args:
        batches: token ids (batch, tokens) without padding, or toy inputs; not trained on.
        thresholds: τ of L0 and of the rounded maskings.
        budgets, free_budgets, n_inits: of the PGD ladder, on the first `n_pgd_batches` batches.
        groups: name -> sites whose L0 is summed. Default: one group a layer.

    Raises:
        ConfigError: no batches, thresholds outside [0, 1), a group of unknown sites.
    """
    factors, host = objective.factors, objective.factors.host
    _check(thresholds, batches, n_pgd_batches, groups, factors)
    attacked = list(batches[:n_pgd_batches])
    check_ladder(budgets, free_budgets, attacked, n_inits)
    numbers, signs = _measure(objective, batches, thresholds, seed, progress)
    weights = np.array([b.n for b in numbers], dtype=np.float64)
    n = int(weights.sum())
    mean_ci = torch.stack([b.ci_sum for b in numbers]).sum(0) / n
    firings = torch.stack([b.firings for b in numbers]).sum(0)
    near_one = torch.stack([b.near_one for b in numbers]).sum(0)
    alive = truth.alive(mean_ci, firings, n)
    headline = headline_threshold(thresholds, host.metric)
    l0 = l0_table(numbers, thresholds, factors, groups, weights)
    runs = ladder(
        objective,
        attacked,
        budgets=budgets,
        free_budgets=free_budgets,
        n_inits=n_inits,
        seed=seed,
        progress=progress,
    )
    at_sites = records(l0, level="site", threshold=headline)
    baselines = compare_baselines(
        objective,
        attacked,
        threshold=headline,
        l0={r["name"]: r["l0"] for r in at_sites},
        mean_ci=mean_ci,
        alive=alive.by_firing,
        seed=seed,
    )
    labels = np.array([b.n_labels for b in numbers], dtype=np.float64)
    return Evaluation(
        l0=l0,
        maskings=masking_table(numbers, thresholds, host.metric, weights, labels),
        ladder=summarise(runs),
        ladder_runs=runs,
        hidden=hidden_table(numbers, factors, weights),
        spectrum=spectrum_table(factors, mean_ci, firings, near_one, alive, n),
        sites=site_table(factors),
        baselines=baselines,
        polysemy=signs.table(seed=seed),
        mean_ci=mean_ci,
        firings=firings,
        facts=_facts(objective, numbers, thresholds, labels, seed),
    )


def _facts(
    objective: Objective,
    numbers: Sequence[BatchNumbers],
    thresholds: Sequence[float],
    labels: Float[np.ndarray, " batches"],
    seed: int,
) -> dict[str, Any]:
    host = objective.factors.host
    identity, scale = (float(np.max([b.identity[i] for b in numbers])) for i in (0, 1))
    host_ce = np.array([b.ce_target for b in numbers])
    return {
        "metric": host.metric,
        "n": sum(b.n for b in numbers),
        "n_batches": len(numbers),
        "seed": seed,
        "thresholds": [float(t) for t in thresholds],
        "threshold": headline_threshold(thresholds, host.metric),
        "identity": identity,
        "identity_scale": scale,
        "ce_host": pooled(host_ce, labels).value if labels.any() else None,
        "host": host.fingerprint,
    }


def headline_threshold(thresholds: Sequence[float], metric: str) -> float:
    """The published τ: 0 for language models, 0.1 for toys; the nearest measured one."""
    wanted = 0.0 if metric == "kl" else 0.1
    return float(min(thresholds, key=lambda t: abs(t - wanted)))


def _check(
    thresholds: Sequence[float],
    batches: Sequence[Tensor],
    n_pgd_batches: int,
    groups: Mapping[str, Sequence[str]] | None,
    factors: Factors,
) -> None:
    unknown = {s for sites in (groups or {}).values() for s in sites} - set(factors.layout.names)
    good = bool(thresholds) and all(0 <= t < 1 for t in thresholds)
    if not batches or not good or n_pgd_batches < 1 or unknown:
        raise ConfigError(
            "evaluation",
            given=f"{len(batches)} batches ({n_pgd_batches} of them for PGD), thresholds "
            f"{tuple(thresholds)}" + (f", unknown sites {sorted(unknown)}" if unknown else ""),
            expected="at least one batch, thresholds in [0, 1), groups of decomposed sites",
            remedy=f"Give held-out batches; sites are {list(factors.layout.names[:4])}…",
        )


@torch.no_grad()
def _measure(
    objective: Objective,
    batches: Sequence[Tensor],
    thresholds: Sequence[float],
    seed: int,
    progress: bool,
) -> tuple[list[BatchNumbers], SignedFirings]:
    from tqdm.auto import tqdm

    host = objective.factors.host
    draws = Draws(seed, host.device, objective.draws.dtype)
    signs, numbers = SignedFirings(objective.factors), []
    with host.prepared(objective.config.speed):
        for at, batch in enumerate(tqdm(batches, "maskings", disable=not progress, leave=False)):
            clean = host.clean(batch.to(host.device))
            found, low = measure_batch(objective, clean, thresholds, draws, at)
            signs.add(clean, low)
            numbers.append(found)
    return numbers, signs
