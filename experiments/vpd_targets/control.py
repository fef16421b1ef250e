"""A target with nothing to find: an orthogonal map of dense Gaussian inputs, and an idle matrix.

    y = Q x + 0 · (M x)

Every direction of Q is used on every input, and all equally: whatever the rank-one parts, each one
left out changes almost every output, so no sparse decomposition of `dense` exists. Truth: L0 of
`dense` is its rank d. `unused` (M, random) never reaches the output: L0 0. A sparse answer at
`dense`, or an active component at `unused`, is an artefact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import nn

from experiments.vpd_targets.common import Target, frozen, linear
from mi_weightspace.core.seeds import generator


@dataclass(frozen=True)
class ControlConfig:
    """Width of the map. `zero_matrix`: the idle matrix holds zeros instead of random values."""

    d: int = 16
    zero_matrix: bool = False


PRESETS = {"control": {"toy": ControlConfig(), "paper": ControlConfig(64)}}


class Control(nn.Module):
    def __init__(self, dense: nn.Linear, unused: nn.Linear) -> None:
        super().__init__()
        self.dense = dense
        self.unused = unused

    def forward(self, x: Float[torch.Tensor, "n d"]) -> Float[torch.Tensor, "n d"]:
        return self.dense(x) + 0.0 * self.unused(x)


def train(config: ControlConfig, seed: int) -> Control:
    """The target; drawn, not trained."""
    draw = generator(seed, "vpd_targets", "control")
    q = torch.linalg.qr(torch.randn(config.d, config.d, generator=draw))[0]
    idle = torch.randn(config.d, config.d, generator=draw) / config.d**0.5
    module = Control(linear(q), linear(0 * idle if config.zero_matrix else idle))
    frozen(module)
    return module


def sample(
    config: ControlConfig, batch: int, draw: torch.Generator
) -> Float[torch.Tensor, "batch d"]:
    return torch.randn(batch, config.d, generator=draw)


def expected_l0(config: ControlConfig) -> dict[str, float]:
    """Components per input that the truth asks for."""
    return {"dense": float(config.d), "unused": 0.0}


def target(config: ControlConfig, seed: int) -> Target:
    module = train(config, seed)
    scale = torch.linalg.svdvals(module.dense.weight)
    spread = float(scale.max() / scale.min() - 1)
    return Target(
        "control",
        module,
        {"dense": "dense", "unused": "unused"},
        lambda batch, draw: sample(config, batch, draw),
        "mse",
        quality={"spread_of_singular_values": spread},
        accepted=spread < 1e-4,
    )
