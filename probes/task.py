"""One contrast's activations at one stage, split, with the points that have something to fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, Split
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.shifts import DEAD_SHIFT, mean_shift
from mi_weightspace.core.space import Space
from probes.gather import Roles, stack
from probes.linear import Kernel, Method, from_gram, haufe_pattern
from probes.validation import fit_all

LEAST_CLUSTERS = 3
"""Below this the nested choice has nothing to fit on."""
_CHUNK_BYTES = 1 << 26


class Task:
    """Activations of the pairs to fit at every live point, and how to fit them.

    Attributes:
        every, live: the points asked for, and those where the two sides and the items differ.
        pairs, clusters: indices of the pairs of split ``fit`` and their clusters.
        values: (L, n, 2, d) of those pairs at the live points.
        controls: control contrasts that shift at every live point.
    """

    def __init__(
        self,
        activations: PairedActivations,
        who: Roles,
        method: Method,
        seed: int,
        n_bootstrap: int,
        every: tuple[Space, ...],
    ) -> None:
        self.activations, self.who = activations, who
        self.method: Method = method
        self.seed, self.n_bootstrap, self.every = seed, n_bootstrap, every
        self.name = who.targets[0]
        self.contrast: Contrast = activations.contrasts[self.name]
        self.pairs = self.split("fit")
        self.clusters = [self.contrast.pairs[i].cluster_id for i in self.pairs]
        if len(set(self.clusters)) < LEAST_CLUSTERS:
            raise PromptError(
                f"contrast {self.name!r}",
                given=f"{len(set(self.clusters))} clusters of split 'fit'",
                expected=f"at least {LEAST_CLUSTERS} (item × wording)",
                remedy="Add items, or mark more pairs as split 'fit'.",
            )
        self.is_live = self._differs(self.name, self.pairs)
        self.live = tuple(p for p, ok in zip(every, self.is_live.tolist(), strict=True) if ok)
        if not self.live:
            raise PromptError(
                f"contrast {self.name!r}",
                given="the same activations on both sides at every point",
                expected="at least one point where the two sides differ",
                remedy="Check that the prompts differ before the position pooled.",
            )
        self.values = stack(activations, self.name, self.live, self.pairs)
        self.controls = tuple(
            name for name in who.controls if bool(self._differs(name)[self.is_live].all())
        )
        d = self.values.shape[-1]
        self.chunk = max(1, _CHUNK_BYTES // (16 * self.values.shape[1] * d))

    def split(self, split: Split) -> list[int]:
        return [i for i, pair in enumerate(self.contrast.pairs) if pair.split == split]

    def _differs(self, name: str, pairs: Sequence[int] | None = None) -> Bool[Tensor, " points"]:
        """Points with a shift and with variance between items."""
        found = []
        for point in self.every:
            value = self.activations.at(name, point)
            value = value if pairs is None else value[list(pairs)]
            mean = value.mean(0, dtype=torch.float64)
            size = DEAD_SHIFT * value.norm(dim=-1).double().mean()
            shift = (mean[0] - mean[1]).norm()
            spread = torch.linalg.vector_norm(value - mean.float()) / len(value) ** 0.5
            found.append(bool(shift > size) and bool(spread > size))
        return torch.tensor(found)

    def kernel(self) -> Kernel:
        grams = []
        for value in self.values:
            rows = torch.cat([value[:, 0], value[:, 1]]).double()
            rows = rows - rows.mean(0)
            grams.append(rows @ rows.T)
        return from_gram(torch.stack(grams), self.values.shape[-1])

    def filters(
        self, values: Float[Tensor, "points n 2 d"], penalty: Float[Tensor, " points"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Filter (L, d), bias (L,) and pattern (L, d), not normalised."""
        parts = []
        for start in range(0, len(values), self.chunk):
            part = values[start : start + self.chunk].double()
            weight, bias = fit_all(self.method, part, penalty[start : start + self.chunk])
            if self.method in {"ridge", "lr"}:
                pattern = haufe_pattern(part, weight)
            else:
                pattern = mean_shift(part[:, :, 0] - part[:, :, 1])
            parts.append((weight, bias, pattern))
        weight, bias, pattern = (torch.cat(column) for column in zip(*parts, strict=True))
        return weight, bias, pattern
