"""Labelled sets and readings with a known answer, for the tests of detectors and verdicts."""

from __future__ import annotations

import torch
from torch import Tensor

from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.seeds import generator

D = 24


def factorial(keys: int = 8, sides: int = 8, copies: int = 2) -> LabelledSet:
    """Label = (key in the upper half) xor (side in the upper half); a cluster is one cell."""
    return LabelledSet(
        tuple(
            LabelledPrompt(
                prompt=f"key{k} side{s} copy{c} filler",
                label=int((k >= keys // 2) != (s >= sides // 2)),
                cluster_id=f"{k}/{s}",
                item_id=f"{k}/{s}/{c}",
                attributes={"key": str(k), "side": str(s), "copy": str(c)},
            )
            for k in range(keys)
            for s in range(sides)
            for c in range(copies)
        ),
        "factorial",
    )


def pairs(n: int = 40) -> LabelledSet:
    return LabelledSet(
        tuple(
            LabelledPrompt(f"item {i} side {label}", label, f"c{i}", f"i{i}")
            for i in range(n)
            for label in (1, 0)
        ),
        "pairs",
    )


def prompt_activations(
    labelled: LabelledSet, *, seed: int, d: int = D, noise: float = 0.5
) -> Tensor:
    """(n, d): each attribute level (or cluster) its own random vector, plus noise; no label."""
    draw = generator(seed, "prompt vectors", d)
    names = sorted(set.intersection(*(set(r.attributes) for r in labelled)) - {"copy"})
    rows = noise * torch.randn(len(labelled), d, generator=draw, dtype=torch.float64)
    columns = [[r.attributes[name] for r in labelled] for name in names] or [labelled.clusters]
    for column in columns:
        levels = {v: i for i, v in enumerate(dict.fromkeys(column))}
        vectors = torch.randn(len(levels), d, generator=draw, dtype=torch.float64)
        rows += vectors[torch.tensor([levels[v] for v in column])]
    return rows
