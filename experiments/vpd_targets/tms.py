"""Toy model of superposition: n features through a narrower layer and back (Elhage et al. 2022).

    y = ReLU(Wᵀ W x + b)        W (n_hidden, n_features), tied while training

Features are on with probability 0.05, uniform in [0, 1], all equally important. Decomposed as two
untied sites, `linear1` (W) and `linear2` (Wᵀ), optionally with a fixed identity `hidden` between.

Truth, of a target that represents all its features: one component per feature in `linear1` (it
reads that feature, and writes its column of W) and in `linear2`; the identity is one block of rank
n_hidden that every input needs. A 5-2 target often learns only 1–4 of its features; its truth
would be another one, hence `train_all_features`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.vpd_targets.common import Target, cosine, frozen, linear, sparse_features
from mi_weightspace.core.seeds import derive, generator
from mi_weightspace.vpd.truth import Dense, Identity, one_hot_probe

REPRESENTED = 0.5  # share of itself that a feature alone must put out


@dataclass(frozen=True)
class TmsConfig:
    """Sizes, data law and training of the target. `hidden`: with the identity site."""

    n_features: int = 5
    n_hidden: int = 2
    hidden: bool = False
    probability: float = 0.05
    steps: int = 4_000
    batch_size: int = 1_024
    lr: float = 5e-3


PRESETS = {
    "tms_5_2": {"toy": TmsConfig(), "paper": TmsConfig(steps=10_000, batch_size=8_192)},
    "tms_40_10": {
        "toy": TmsConfig(40, 10),
        "paper": TmsConfig(40, 10, steps=10_000, batch_size=8_192),
    },
    "tms_5_2_id": {
        "toy": TmsConfig(hidden=True),
        "paper": TmsConfig(hidden=True, steps=10_000, batch_size=8_192),
    },
    "tms_40_10_id": {
        "toy": TmsConfig(40, 10, hidden=True),
        "paper": TmsConfig(40, 10, hidden=True, steps=10_000, batch_size=8_192),
    },
}


class Tms(nn.Module):
    """The target, its tied matrix held twice."""

    def __init__(
        self,
        weight: Float[Tensor, "n_hidden n_features"],
        bias: Float[Tensor, " n_features"],
        hidden: bool = False,
    ) -> None:
        super().__init__()
        self.linear1 = linear(weight)
        self.hidden = linear(torch.eye(len(weight))) if hidden else nn.Identity()
        self.linear2 = linear(weight.T, bias)

    def forward(self, x: Float[Tensor, "n n_features"]) -> Float[Tensor, "n n_features"]:
        return self.linear2(self.hidden(self.linear1(x))).relu()


def train(config: TmsConfig, seed: int) -> Tms:
    """The target after AdamW on the squared error, cosine to 0. Deterministic in its seed."""
    draw = generator(seed, "vpd_targets", "tms")
    scale = (2 / (config.n_features + config.n_hidden)) ** 0.5  # Xavier
    weight = torch.randn(config.n_hidden, config.n_features, generator=draw).mul_(scale)
    bias = torch.zeros(config.n_features)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = config.lr * cosine(step, config.steps)
        x = sample(config, config.batch_size, draw)
        loss = ((x @ weight.T @ weight + bias).relu() - x).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    module = Tms(weight, bias, config.hidden)
    frozen(module)
    return module


def sample(
    config: TmsConfig, batch: int, draw: torch.Generator
) -> Float[Tensor, "batch n_features"]:
    return sparse_features(batch, config.n_features, config.probability, draw)


@torch.no_grad()
def represented(module: Tms) -> list[int]:
    """Features that, alone at 0.75, come out larger than half and larger than any other."""
    out = module(one_hot_probe(module.linear1.in_features)) / 0.75
    own = out.diagonal()
    others = (out - torch.diag(own)).amax(1)
    return torch.nonzero((own > REPRESENTED) & (own > 2 * others)).flatten().tolist()


def train_all_features(config: TmsConfig, seed: int, attempts: int = 64) -> tuple[Tms, int]:
    """The first target among successive sub-seeds that represents all features, and its number.

    Raises:
        RuntimeError: none of `attempts` did.
    """
    for attempt in range(attempts):
        module = train(config, derive(seed, "attempt", attempt))
        if len(represented(module)) == config.n_features:
            return module, attempt
    raise RuntimeError(f"none of {attempts} sub-seeds represents all {config.n_features} features")


def target(config: TmsConfig, seed: int) -> Target:
    module, attempt = train_all_features(config, seed)
    sites = {"linear1": "linear1", "linear2": "linear2"}
    patterns: dict[str, Identity | Dense] = {"linear1": Identity(), "linear2": Identity()}
    if config.hidden:
        sites = {"linear1": "linear1", "hidden": "hidden", "linear2": "linear2"}
        patterns["hidden"] = Dense(config.n_hidden)
    draw = generator(seed, "vpd_targets", "tms", "quality")
    x = sample(config, 20_000, draw)
    loss = float((module(x) - x).square().mean() / x.square().mean())
    norms = module.linear1.weight.norm(dim=0)
    name = f"tms_{config.n_features}_{config.n_hidden}{'_id' if config.hidden else ''}"
    return Target(
        name,
        module,
        sites,
        lambda batch, draw: sample(config, batch, draw),
        "mse",
        patterns,
        one_hot_probe(config.n_features),
        {
            "linear1": ("in", torch.eye(config.n_features)),
            "linear2": ("out", torch.eye(config.n_features)),
        },
        {
            "relative_loss": loss,
            "represented": float(len(represented(module))),
            "attempt": float(attempt),
            "smallest_norm": float(norms.min()),
        },
    )
