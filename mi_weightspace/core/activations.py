"""Pooled activations of paired prompts at one stage: what every activation statistic eats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.space import Space


@dataclass(frozen=True, eq=False)
class PairedActivations:
    """One stage's activations, float32 on the CPU.

    Attributes:
        stage, model_hash, convention: which weights gave them (`convention`: see `Direction`).
        contrasts: the prompts; row i of a tensor is pair i of that contrast.
        position: pooling rule (``last``, ``suffix_mean``, …).
        points: the stream points and other spaces captured, in forward order.
        values: (contrast name, point name) -> (n_pairs, 2, d); index 0 of axis 1 is the positive.
        site_shift: site name -> (n_contrasts, d_in), the mean positive-minus-negative shift at the
            matrix's own input (after any norm), contrasts in the set's order.
        site_mean: site name -> (d_in,), mean input over all prompts.
    """

    stage: str
    model_hash: str
    contrasts: ContrastSet
    position: str
    points: tuple[Space, ...]
    values: Mapping[tuple[str, str], Float[Tensor, "n 2 d"]]
    site_shift: Mapping[str, Float[Tensor, "n_contrasts d_in"]]
    site_mean: Mapping[str, Float[Tensor, " d_in"]]
    convention: str = "raw"

    def __post_init__(self) -> None:
        for contrast in self.contrasts:
            for point in self.points:
                value = self.values[contrast.name, point.name]
                if value.ndim != 3 or value.shape[:2] != (len(contrast), 2):
                    raise PromptError(
                        f"activations of contrast {contrast.name!r} at {point}",
                        given=f"shape {tuple(value.shape)}",
                        expected=f"({len(contrast)} pairs, 2, width)",
                        remedy="Give one positive and one negative row for each pair.",
                    )
                _check_finite(value, f"activations of contrast {contrast.name!r} at {point}")
        for what in ("site_shift", "site_mean"):
            for site, value in getattr(self, what).items():
                _check_finite(value, f"{what.replace('_', ' ')} of {site}")

    def at(self, contrast: str, point: str | Space) -> Float[Tensor, "n 2 d"]:
        return self.values[contrast, Space.parse(point).canonical.name]

    def differences(self, contrast: str, point: str | Space) -> Float[Tensor, "n d"]:
        """Positive minus negative, pair by pair."""
        value = self.at(contrast, point)
        return value[:, 0] - value[:, 1]

    def select(self, contrasts: ContrastSet) -> PairedActivations:
        """The same activations for some of the contrasts, in that set's order and with its kinds.

        Raises:
            PromptError: a contrast that was not harvested, or with other pairs.
        """
        order = {c.name: i for i, c in enumerate(self.contrasts)}
        for contrast in contrasts:
            if contrast.name not in order or contrast.pairs != self.contrasts[contrast.name].pairs:
                raise PromptError(
                    f"contrast {contrast.name!r}",
                    given="a contrast these activations do not hold",
                    expected=f"some of the {len(order)} contrasts of {self.contrasts.name!r}",
                    remedy="Harvest it.",
                )
        rows = torch.tensor([order[c.name] for c in contrasts])
        return replace(
            self,
            contrasts=contrasts,
            site_shift={site: shift[rows] for site, shift in self.site_shift.items()},
        )


def _check_finite(value: Tensor, subject: str) -> None:
    if not torch.isfinite(value).all():
        raise PromptError(
            subject,
            given="NaN or infinite values",
            expected="finite activations",
            remedy="Run the model in float32, or look for a damaged checkpoint.",
        )
