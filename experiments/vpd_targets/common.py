"""What every target with a known mechanism provides: a module, its data, its truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.vpd.truth import Dense, Geometry, Identity, mmcs

Sample = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Target:
    """A frozen model and what is known about it.

    Attributes:
        sites: site name -> submodule path (an `nn.Linear`).
        sample: ``(batch, generator) -> inputs`` of the module, from the law it was trained on.
        patterns: site -> stated pattern of importances at `probe`; sites without one are absent.
        probe: (n_features, d_in) one input per feature, None where there is no such input.
        frames: site -> side and unit vectors of the features there, (n, d_in) or (n, d_out): where
            one component per feature is the truth, `geometry` compares it along these.
        quality: measured figures of the target itself.
        accepted: whether the target is fit to be decomposed (it learned what its truth states).
    """

    name: str
    module: nn.Module
    sites: Mapping[str, str]
    sample: Sample
    metric: Literal["kl", "mse"]
    patterns: Mapping[str, Identity | Dense] = field(default_factory=dict)
    probe: Float[Tensor, "n_features d_in"] | None = None
    frames: Mapping[str, tuple[Literal["in", "out"], Tensor]] = field(default_factory=dict)
    quality: Mapping[str, float] = field(default_factory=dict)
    accepted: bool = True

    def weight(self, site: str) -> Float[Tensor, "d_out d_in"]:
        weight = self.module.get_submodule(self.sites[site]).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def geometry(
        self, site: str, read: Float[Tensor, "C d_in"], write: Float[Tensor, "C d_out"]
    ) -> Geometry:
        """MMCS and ML2R of a site in its frame: per feature read, or per feature written."""
        side, frame = self.frames[site]
        weight = self.weight(site)
        if side == "in":
            return mmcs(read @ frame.T, write, weight @ frame.T)
        return mmcs(write @ frame.T, read, (frame @ weight).T)


def sparse_features(
    batch: int,
    n_features: int,
    probability: float,
    draw: torch.Generator,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Tensor, "batch n_features"]:
    """Each feature is on with `probability`, independently, and then uniform in [low, high]."""
    on = torch.rand(batch, n_features, generator=draw) < probability
    values = torch.rand(batch, n_features, generator=draw).mul_(high - low).add_(low)
    return values.mul_(on)


def cosine(step: int, steps: int, end: float = 0.0) -> float:
    """Factor on the learning rate: 1 at step 0, `end` at the last step."""
    progress = step / max(1, steps - 1)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def linear(
    weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> nn.Linear:
    """An `nn.Linear` that holds a copy of these values, and draws none."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
