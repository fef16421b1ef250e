"""Synthetic paired activations for the tests of probes: planted truth and planted absence."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space

D = 16
POINTS = (
    Space("resid_pre", 0),
    *(Space(p, layer) for layer in range(3) for p in ("resid_mid", "resid_post")),
)
Shift = Mapping[str, float]


def contrast_set(n: int = 20, n_controls: int = 20, *, registers: bool = True) -> ContrastSet:
    """Target ``authority`` and controls on the same items; every fourth register held out."""

    def pairs(name: str) -> tuple[Pair, ...]:
        return tuple(
            Pair(
                f"i{i}",
                f"{name} + {i}",
                f"{name} - {i}",
                register=f"r{i % 4}",
                split="heldout_register" if registers and i % 4 == 3 else "fit",
            )
            for i in range(n)
        )

    controls = [Contrast(f"c{j}", "control", pairs(f"c{j}")) for j in range(n_controls)]
    return ContrastSet("cases", (Contrast("authority", "target", pairs("t")), *controls))


def activations(
    stage: str = "sft",
    *,
    contrasts: ContrastSet | None = None,
    shift: Callable[[str, int], float] = lambda name, point: 0.0,
    seed: int = 0,
    d: int = D,
    points: tuple[Space, ...] = POINTS,
    dead_first: bool = True,
) -> PairedActivations:
    """Unit Gaussian rows with item variance, the same at every stage of one seed.

    `shift(contrast, index of point)` is added along the first coordinate of positive rows. The
    first point carries one and the same vector everywhere where `dead_first`.
    """
    chosen = contrast_set() if contrasts is None else contrasts
    values = {}
    for contrast in chosen:
        for i, point in enumerate(points):
            draw = generator(seed, contrast.name, point.name)
            value = torch.randn(len(contrast), 2, d, generator=draw)
            value += 1.5 * torch.randn(len(contrast), 1, d, generator=draw)
            if i == 0 and dead_first:
                value[:] = value[0, 0].clone()
            else:
                value[:, 0, 0] += shift(contrast.name, i)
            values[contrast.name, point.name] = value
    return PairedActivations(stage, f"hash-{stage}", chosen, "last", points, values, {}, {})


def planted(size: float, first: int = 4, name: str = "authority") -> Callable[[str, int], float]:
    """A shift of one contrast from the point of index `first` on."""
    return lambda contrast, point: size if contrast == name and point >= first else 0.0
