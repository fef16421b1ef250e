"""Residual MLP that computes more ReLUs than it has neurons (Braun et al. 2025).

    h₀ = x E,   h_{l+1} = h_l + W_out,l ReLU(W_in,l h_l),   y = h_L Eᵀ,   target x + ReLU(x)

Rows of E are fixed random unit vectors of width 1000; 100 features (102 with three layers) share 50
neurons (51) over one, two or three layers. Features are on with probability 0.01, uniform in
[−1, 1].

Truth: over all `mlp_in` sites together one component per feature (each feature is computed in some
layer or layers); the `mlp_out` of a layer, which writes into all features at once, is one block of
the layer's rank. With two or three layers the assignment of features to layers is the target's
own business: a pattern is stated, and errors counted, for one layer only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.vpd_targets.common import Target, cosine, frozen, linear, sparse_features
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.truth import Dense, Identity, one_hot_probe


@dataclass(frozen=True)
class ResidMlpConfig:
    """Sizes, data law and training of the target. `n_neurons`: over all layers."""

    n_layers: int = 1
    n_features: int = 100
    d_embed: int = 1_000
    n_neurons: int = 50
    probability: float = 0.01
    steps: int = 2_000
    batch_size: int = 2_048
    lr: float = 3e-3


PRESETS = {
    f"resid_mlp_{n}": {
        "toy": ResidMlpConfig(n, 20, 64, 12, 0.05, steps=800, batch_size=512),
        "paper": ResidMlpConfig(n, 102, n_neurons=51) if n == 3 else ResidMlpConfig(n),
    }
    for n in (1, 2, 3)
}


class Layer(nn.Module):
    """One MLP; the residual stream is added by the model."""

    def __init__(self, mlp_in: Tensor, mlp_out: Tensor) -> None:
        super().__init__()
        self.mlp_in = linear(mlp_in)
        self.mlp_out = linear(mlp_out)

    def forward(self, h: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return self.mlp_out(self.mlp_in(h).relu())


class ResidMlp(nn.Module):
    """The target; the embedding is a buffer, not a site."""

    embedding: Tensor

    def __init__(
        self, embedding: Float[Tensor, "n_features d"], layers: list[tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.register_buffer("embedding", embedding)
        self.layers = nn.ModuleList(Layer(*pair) for pair in layers)

    def forward(self, x: Float[Tensor, "n n_features"]) -> Float[Tensor, "n n_features"]:
        h = x @ self.embedding
        for layer in self.layers:
            h = h + layer(h)
        return h @ self.embedding.T


def embed(config: ResidMlpConfig, draw: torch.Generator) -> Float[Tensor, "n_features d"]:
    rows = torch.randn(config.n_features, config.d_embed, generator=draw)
    return rows / rows.norm(dim=1, keepdim=True)


def readoff(
    x: Float[Tensor, "n n_features"], embedding: Tensor, layers: Sequence[tuple[Tensor, Tensor]]
) -> Float[Tensor, "n n_features"]:
    """The model's output by products of its weights, without its residual stream.

    The stream is only ever read through E, W_in and Eᵀ, so a step costs n_features² per input
    instead of n_features · d_embed: the same function, summed in another order.
    """
    y = x @ (embedding @ embedding.T)
    writers: list[tuple[Tensor, Tensor]] = []  # activations of earlier layers, their W_outᵀ
    for mlp_in, mlp_out in layers:
        pre = x @ (embedding @ mlp_in.T)
        for activation, write in writers:
            pre = pre + activation @ (write @ mlp_in.T)
        activation, write = pre.relu(), mlp_out.T
        writers.append((activation, write))
        y = y + activation @ (write @ embedding.T)
    return y


def train(config: ResidMlpConfig, seed: int) -> ResidMlp:
    """The target after AdamW on the squared error, cosine to 0. Deterministic in its seed."""
    draw = generator(seed, "vpd_targets", "resid_mlp")
    embedding = embed(config, draw)
    width = config.n_neurons // config.n_layers
    parameters: list[Tensor] = []
    for _ in range(config.n_layers):
        for shape in ((width, config.d_embed), (config.d_embed, width)):
            bound = shape[1] ** -0.5
            draws = torch.rand(shape, generator=draw).mul_(2 * bound).sub_(bound)
            parameters.append(draws.requires_grad_())
    layers = list(zip(parameters[::2], parameters[1::2], strict=True))
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = config.lr * cosine(step, config.steps)
        x = sample(config, config.batch_size, draw)
        loss = (readoff(x, embedding, layers) - (x + x.relu())).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    module = ResidMlp(embedding, layers)
    frozen(module)
    return module


def sample(
    config: ResidMlpConfig, batch: int, draw: torch.Generator
) -> Float[Tensor, "batch n_features"]:
    return sparse_features(batch, config.n_features, config.probability, draw, -1.0, 1.0)


@torch.no_grad()
def quality(module: ResidMlp, config: ResidMlpConfig, seed: int) -> dict[str, float]:
    """Error in units of what leaving every ReLU out would cost, and features computed.

    A feature counts as computed when the ReLU part of its output rises by at least a quarter of
    what was asked between −0.75 and +0.75. A target that gives a neuron each to half the features
    leaves the others at 0, at a relative loss of 0.5.
    """
    x = sample(config, 20_000, generator(seed, "vpd_targets", "resid_mlp", "quality"))
    error = (module(x) - x - x.relu()).square().mean() / x.relu().square().mean()
    probe = one_hot_probe(config.n_features)
    rise = (module(probe) - probe).diagonal() - (module(-probe) + probe).diagonal()
    return {
        "relative_loss": float(error),
        "computed": float((rise > 0.25 * 0.75).sum()),
        "smallest_rise": float(rise.min() / 0.75),
    }


def target(config: ResidMlpConfig, seed: int) -> Target:
    module = train(config, seed)
    found = quality(module, config, seed)
    sites = {
        f"layers.{i}.{part}": f"layers.{i}.{part}"
        for i in range(config.n_layers)
        for part in ("mlp_in", "mlp_out")
    }
    patterns: dict[str, Identity | Dense] = {}
    frames: dict[str, tuple[Literal["in", "out"], Tensor]] = {}
    if config.n_layers == 1:
        patterns = {"layers.0.mlp_in": Identity(), "layers.0.mlp_out": Dense(config.n_neurons)}
        frames = {"layers.0.mlp_in": ("in", module.embedding)}
    return Target(
        f"resid_mlp_{config.n_layers}",
        module,
        sites,
        lambda batch, draw: sample(config, batch, draw),
        "mse",
        patterns,
        one_hot_probe(config.n_features),
        frames,
        found,
        accepted=found["computed"] == config.n_features,
    )
