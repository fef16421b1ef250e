"""The simulated matrices and probes of `experiments.null_calibration`, whose docstring says why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import lda_filter
from mi_weightspace.core.site import Site
from mi_weightspace.models.grammar import ModelShape, shape_of
from mi_weightspace.models.weights import Difference
from probes.bank import principal_rows

N_CONTROLS = 39
N_SAMPLES = 50
"""Samples per class of a contrast."""
SAMPLING = math.sqrt(2 / N_SAMPLES)
CONCEPT = 0.5
"""Shift along a contrast's own concept; the bulk's total standard deviation is 1."""
CONFOUND = 2.0
"""Shift of the rogue coordinate, in its standard deviations."""
ROGUE = 3
ROGUE_SHARES = (0.6, 0.25, 0.15)
ROGUE_MEAN = 3.0
"""Mean of a rogue coordinate in its standard deviations: they act as biases."""
ROGUE_ROWS = (6.0, 16.0)
SHARES = (0.5, 0.9)
UNRELATED = (2.0, 1.5, 1.2)
PLANTED = 3.0
WEIGHT_STD = 0.02
NOISE_STD = 1e-4
"""Standard deviation of the difference's bulk rows in A."""
CHANGE_STD = 1e-5
"""Standard deviation of the change before rounding in B: about a tenth of a bfloat16 spacing."""
LAYER_SITE = "blocks.0.attn.o"
N_PCS = 8
MOMENT_ROWS = 200
"""Samples, evenly over all contrasts, that give mean, variance and principal directions."""


@dataclass(eq=False)
class Stored:
    """One matrix in memory as a `WeightSource`."""

    name: str
    shape: ModelShape
    matrix: Tensor

    @property
    def fingerprint(self) -> str:
        return self.name

    def stored(self, site: Site | str) -> Tensor:
        return self.matrix

    def weight(self, site: Site | str) -> Tensor:
        return self.matrix.float()

    def bias(self, site: Site | str) -> None:
        return None

    read_gain = write_gain = factors = bias

    def sites(self, select: Any = None) -> list[Site]:
        return [site(len(self.matrix))[1]]


@dataclass(frozen=True, eq=False)
class World:
    """What the cells of one draw share.

    Attributes:
        rogue: (3,) the loud coordinates; `gains` (d,) their row sizes, 1 elsewhere.
        concepts: (1 + controls, d) unit rows, the target's first; `inputs` the same at the input.
        samples: (1 + controls, n, 2, d) without rogue coordinates and without shifts.
        loud: (1 + controls, n, 2, 3) standard normal values of the rogue coordinates.
    """

    rogue: Tensor
    gains: Tensor
    concepts: Tensor
    inputs: Tensor
    samples: Tensor
    loud: Tensor


@lru_cache(maxsize=1)
def site(d: int) -> tuple[ModelShape, Site]:
    """A square matrix that writes the stream of a one-layer model of width `d`."""
    config = {"model_type": "gpt2", "n_layer": 1, "n_embd": d, "n_head": 4}
    config |= {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    shape = shape_of(config)
    empty = Stored("empty", shape, torch.zeros(0))
    return shape, Difference(empty, empty).site(LAYER_SITE)


@lru_cache(maxsize=1)
def rotation(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator(0, "rotation", d)))[0]


def unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def world(seed: int, draw: int, d: int) -> World:
    g = generator(seed, "world", draw)
    rogue = torch.randperm(d, generator=g)[:ROGUE]
    low, high = ROGUE_ROWS
    sizes = (low + (high - low) * torch.rand(ROGUE, generator=g)).sort(descending=True).values
    gains = torch.ones(d).index_copy(0, rogue, sizes)
    m = N_CONTROLS + 1
    concepts = torch.randn(m, d, generator=g)
    concepts[:, rogue] = 0
    scale = torch.arange(1, d + 1).float().rsqrt()
    bulk = torch.randn(m * N_SAMPLES * 2, d, generator=g) * (scale / scale.norm())
    centre = torch.randn(d, generator=g) / math.sqrt(d)
    samples = (bulk @ rotation(d) + centre).view(m, N_SAMPLES, 2, d)
    loud = torch.randn(m, N_SAMPLES, 2, ROGUE, generator=g)
    inputs = unit_rows(torch.randn(m, d, generator=g))
    return World(rogue, gains, unit_rows(concepts), inputs, samples, loud)


def activations(w: World, share: float, confounded: bool) -> Tensor:
    """(1 + controls, n, 2, d); index 0 of axis 2 is the positive class."""
    std = (torch.tensor(ROGUE_SHARES) * share / (1 - share)).sqrt()
    values = w.samples.clone()
    loud = (w.loud + ROGUE_MEAN) * std
    if confounded:
        loud[:, :, 0, 0] += CONFOUND * std[0]
    values[..., w.rogue] = loud
    values[:, :, 0] += CONCEPT * w.concepts[:, None]
    return values


def direction(values: Tensor) -> Direction:
    """The target's probe with its controls and the moments of samples, as `probes.fit` has."""
    shift = values.mean(1)[:, 0] - values.mean(1)[:, 1]
    # a few contrasts at a time stay in the cache
    filters = unit_rows(torch.cat([lda_filter(part) for part in values.split(4)]).float())
    every = values.flatten(0, 2)
    sample = every[:: max(1, len(every) // MOMENT_ROWS)]
    return Direction(
        shift[0],
        site(values.shape[-1])[1].writes,
        label="target",
        filter=filters[0],
        mean=sample.mean(0),
        variance=sample.var(0),
        pcs=principal_rows([sample], N_PCS)[0],
        control_patterns=unit_rows(shift[1:]),
        control_filters=filters[1:],
    )


# ---- differences ---------------------------------------------------------------------------
@lru_cache(maxsize=1)
def rounding_std(d: int) -> float:
    """Standard deviation of B's noise in a bulk row."""
    g = generator(0, "rounding std", d)
    before = torch.randn(d, d, generator=g) * WEIGHT_STD
    after = before + torch.randn(d, d, generator=g) * CHANGE_STD
    return float((after.bfloat16().float() - before.bfloat16().float()).std())


def difference(w: World, kind: str, planted: bool, seed: int, draw: int) -> Difference:
    """Two stored matrices whose difference is noise A or B, an unrelated change, and a plant."""
    d = len(w.gains)
    g = generator(seed, "difference", draw, kind)
    shape, _ = site(d)
    edge = (NOISE_STD if kind == "A" else rounding_std(d)) * 2 * math.sqrt(d)
    before = torch.randn(d, d, generator=g) * WEIGHT_STD
    noise = torch.randn(d, d, generator=g)
    left, right = (unit_rows(torch.randn(len(UNRELATED), d, generator=g)) for _ in range(2))
    change = edge * (left.T * torch.tensor(UNRELATED)) @ right
    if planted:
        change += PLANTED * edge * w.concepts[0][:, None] * w.inputs[0]
    if kind == "A":
        change += NOISE_STD * w.gains[:, None] * noise
        return Difference(Stored("before", shape, before), Stored("after", shape, before + change))
    before *= w.gains[:, None]
    after = before + change.add_(noise, alpha=CHANGE_STD)
    return Difference(
        Stored("before", shape, before.bfloat16()), Stored("after", shape, after.bfloat16())
    )
