"""Polysemy of the sign: does a subcomponent fire for two unrelated sets of tokens, one each way?

The subcomponent activation is ``ā = ‖write‖ (x · read)``; its overall sign is arbitrary, that it
takes *both* signs at firings is not. A subcomponent is flagged where (i) each sign has a tenth of
its firings, (ii) the two signs are further apart than the halves of a flat distribution are
(Ashman's D above 2√3), and (iii) the tokens at which it fires positively and negatively hardly
overlap although as many draws from one common law would. The remedy is a larger frequency weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.seeds import numpy_generator
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean

if TYPE_CHECKING:
    import pandas as pd

FIRES = 0.1
MINOR_SHARE = 0.1
MIN_FIRINGS = 20
SEPARATION = 2 * 3**0.5
"""Ashman's D = √2|μ₊−μ₋|/√(σ₊²+σ₋²) of the two halves of a flat distribution around 0."""
MAX_OVERLAP = 0.1
NULL_OVERLAP = 0.3
N_NULL = 20


def contexts_of(clean: Clean, positions: tuple[int, ...]) -> Int[Tensor, "*pos"] | None:
    """What a position shows: its token; for feature vectors the index of the largest |entry|."""
    batch = clean.batch
    if not batch.is_floating_point() and tuple(batch.shape) == positions:
        return batch.long()
    if batch.is_floating_point() and tuple(batch.shape[:-1]) == positions:
        return batch.abs().argmax(-1)
    return None


@dataclass(eq=False)
class SignedFirings:
    """Running counts of positive and negative activations at firings (g > 0.1).

    Attributes:
        moments: (2, 3, K): for negative and positive firings, count, Σ|ā| and Σā².
        pairs: (component · 2⁴⁰ + context, is positive, count) of distinct pairs, unmerged.
    """

    factors: Factors
    moments: Float[Tensor, "2 3 K"] = field(init=False)
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.moments = torch.zeros(2, 3, self.factors.layout.total, dtype=torch.float64)

    @torch.no_grad()
    def add(self, clean: Clean, low: Float[Tensor, "*pos K"]) -> None:
        contexts = contexts_of(clean, tuple(low.shape[:-1]))
        flat_contexts = None if contexts is None else contexts.flatten()
        for name, place in self.factors.layout.slices().items():
            on = low[..., place].flatten(0, -2) > FIRES
            row, column = on.nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            size = self.factors.writes[name].norm(dim=1)
            value = (self._inner(clean, name).flatten(0, -2) * size)[row, column].double().cpu()
            row, column = row.cpu(), column.cpu() + place.start
            for sign, chosen in enumerate((value < 0, value > 0)):
                where, size_ = column[chosen], value[chosen].abs()
                for k, term in enumerate((torch.ones_like(size_), size_, size_.square())):
                    self.moments[sign, k].index_add_(0, where, term)
            if flat_contexts is not None:
                shown = flat_contexts.cpu()[row]
                key = (column << 40) + (shown << 1) + (value > 0).long()
                self.pairs.append(torch.unique(key, return_counts=True))

    def _inner(self, clean: Clean, name: str) -> Tensor:
        x, read = clean.inputs[name], self.factors.reads[name]
        if not x.is_floating_point():
            return torch.nn.functional.embedding(x, read.T)
        return x.to(read.dtype) @ read.T

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row a subcomponent with at least 20 firings of each sign.

        Columns: ``site, component, n_firings, minor_share, separation, overlap, overlap_null,
        flagged``; `overlap` is Σ_token min(p₊, p₋), `overlap_null` its mean under random signs
        (both NaN unless (i) and (ii) hold, or where positions show no token).
        """
        import pandas as pd

        count, total, square = self.moments[:, 0], self.moments[:, 1], self.moments[:, 2]
        mean = total / count.clamp_min(1)
        spread = (square / count.clamp_min(1) - mean.square()).clamp_min(0)
        apart = 2**0.5 * mean.sum(0) / spread.sum(0).sqrt().clamp_min(1e-300)
        enough = count.min(0).values >= MIN_FIRINGS
        share = count.min(0).values / count.sum(0).clamp_min(1)
        bimodal = enough & (share >= MINOR_SHARE) & (apart > SEPARATION)
        overlaps = self._overlaps(bimodal, seed)
        rows = []
        for site, place in self.factors.layout.slices().items():
            for c in torch.nonzero(enough[place]).flatten().tolist():
                k = c + place.start
                overlap, null = overlaps.get(k, (float("nan"), float("nan")))
                rows.append(
                    {
                        "site": site,
                        "component": c,
                        "n_firings": int(count[:, k].sum()),
                        "minor_share": float(share[k]),
                        "separation": float(apart[k]),
                        "overlap": overlap,
                        "overlap_null": null,
                        "flagged": bool(overlap <= MAX_OVERLAP and null >= NULL_OVERLAP),
                    }
                )
        columns = ["site", "component", "n_firings", "minor_share", "separation"]
        return pd.DataFrame(rows, columns=[*columns, "overlap", "overlap_null", "flagged"])

    def _overlaps(self, chosen: Tensor, seed: int) -> dict[int, tuple[float, float]]:
        if not self.pairs or not bool(chosen.any()):
            return {}
        keys = torch.cat([k for k, _ in self.pairs])
        counts = torch.cat([c for _, c in self.pairs])
        merged, inverse = torch.unique(keys, return_inverse=True)
        sums = torch.zeros(len(merged), dtype=torch.long).index_add_(0, inverse, counts)
        component = merged >> 40
        found = {}
        for k in torch.nonzero(chosen).flatten().tolist():
            own = component == k
            shown, positive = (merged[own] & ((1 << 40) - 1)) >> 1, (merged[own] & 1).bool()
            names, where = torch.unique(shown, return_inverse=True)
            both = torch.zeros(2, len(names), dtype=torch.long)
            both[0].index_add_(0, where[~positive], sums[own][~positive])
            both[1].index_add_(0, where[positive], sums[own][positive])
            found[k] = _overlap_and_null(both.numpy(), numpy_generator(seed, "signs", k))
        return found


def _overlap_and_null(
    counts: Int[np.ndarray, "2 contexts"], draw: np.random.Generator
) -> tuple[float, float]:
    every, positives = counts.sum(0), int(counts[1].sum())
    drawn = draw.multivariate_hypergeometric(every, positives, size=N_NULL, method="marginals")
    nulls = [_overlap(np.stack([every - d, d])) for d in drawn]
    return _overlap(counts), float(np.mean(nulls))


def _overlap(counts: Int[np.ndarray, "2 contexts"]) -> float:
    shares = counts / counts.sum(1, keepdims=True)
    return float(shares.min(0).sum())
