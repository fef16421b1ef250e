"""A residual MLP fine-tuned to compute five more features: a difference with a known answer.

    h = x E,   y = (h + W_out ReLU(W_in h)) Eᵀ,   target x + ReLU(x) if computed, else x

Rows of E are random orthonormal vectors, so that each feature has an output of its own. The base
computes the first 10 of 20 features and leaves the others alone; fine-tuning of both matrices, on
the same law of inputs, adds the next 5 and keeps the old ones; the last 5 stay idle throughout.
`pull` adds ``pull · Σ ‖W − W_base‖²`` to the fine-tuning loss: a smaller update, slightly underfit.

Truth about the update: a change of ``mlp_in`` per new feature is needed, on the inputs that hold
the feature. On inputs without new features everything may be reverted together, but not one matrix
alone: the two moved in a compensating way.

Measured over seeds 0-4 (`pull` 0 against `PULL`), distances squared and over that of the two
models: ‖dW‖/‖W_base‖ 0.47-0.49 against 0.31-0.34; everything reverted on inputs without new
features 5e-5 to 2e-4 against 4e-3 to 5e-3; ``mlp_in`` alone reverted there .35 against .09 (seed
0). The figures this follows: .47, .30; 7e-5, .008; .40, .18 (vpd.md §9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.vpd_targets.common import cosine, frozen, sparse_features
from experiments.vpd_targets.resid_mlp import ResidMlp, readoff
from mi_weightspace.core.seeds import generator

SITES = {"mlp_in": "layers.0.mlp_in", "mlp_out": "layers.0.mlp_out"}
"""Site name -> submodule path, the same in both models."""
PULL = 1e-4
"""The pull at which ‖dW‖/‖W‖ is about 0.3."""


@dataclass(frozen=True)
class FineTunedConfig:
    """Sizes, data law and training of both models.

    `init`: standard deviation of the first weights in units of ``1/√d_in``.
    """

    n_features: int = 20
    n_base: int = 10
    n_new: int = 5
    d_embed: int = 32
    n_neurons: int = 24
    probability: float = 0.1
    init: float = 1.5
    steps: int = 2_000
    tuning_steps: int = 1_000
    batch_size: int = 512
    lr: float = 1e-2
    tuning_lr: float = 3e-3


@dataclass(frozen=True, eq=False)
class FineTuned:
    """Two models of one architecture, and what training between them added.

    Attributes:
        base, tuned: frozen; E, which neither stage trains, is the same buffer.
        base_features, new_features: features computed by both, and by `tuned` alone.
        sample: ``(batch, generator) -> (batch, n_features)`` inputs of the training law.
        sites: site name -> submodule path of the two matrices that differ.
    """

    base: ResidMlp
    tuned: ResidMlp
    base_features: tuple[int, ...]
    new_features: tuple[int, ...]
    sample: Callable[[int, torch.Generator], Float[Tensor, "batch n_features"]]
    config: FineTunedConfig

    @property
    def sites(self) -> dict[str, str]:
        return dict(SITES)

    def without_new(self, batch: int, draw: torch.Generator) -> Float[Tensor, "batch n_features"]:
        """Inputs of the same law with the new features off: the tokens nothing was taught on."""
        x = self.sample(batch, draw)
        x[:, list(self.new_features)] = 0.0
        return x

    def change(self, site: str) -> Float[Tensor, "d_out d_in"]:
        """W_tuned − W_base."""
        after, before = (
            dict(m.named_parameters())[f"{SITES[site]}.weight"] for m in (self.tuned, self.base)
        )
        return (after - before).detach()

    def relative_change(self) -> float:
        """‖dW‖/‖W_base‖ over both matrices together."""
        parameters = dict(self.base.named_parameters())
        before = torch.cat([parameters[f"{path}.weight"].flatten() for path in SITES.values()])
        change = torch.cat([self.change(site).flatten() for site in SITES])
        return float(change.norm() / before.norm())


def build(seed: int, pull: float = 0.0, config: FineTunedConfig | None = None) -> FineTuned:
    """Train the base, then fine-tune it. Deterministic in `seed`; the base knows no `pull`."""
    config = FineTunedConfig() if config is None else config
    draw = generator(seed, "vpd_targets", "finetuned", "start")
    columns = torch.randn(config.d_embed, config.n_features, generator=draw)
    embedding = torch.linalg.qr(columns).Q.T.contiguous()
    start: list[Tensor] = []
    for shape in ((config.n_neurons, config.d_embed), (config.d_embed, config.n_neurons)):
        start.append(torch.randn(shape, generator=draw) * config.init * shape[1] ** -0.5)
    base = tuple(range(config.n_base))
    new = tuple(range(config.n_base, config.n_base + config.n_new))
    first = _train(config, embedding, start, base, 0.0, seed, "base")
    second = _train(config, embedding, first, base + new, pull, seed, "tuned")
    models = [ResidMlp(embedding, [(w[0], w[1])]) for w in (first, second)]
    for model in models:
        frozen(model)
    return FineTuned(models[0], models[1], base, new, lambda n, g: sample(config, n, g), config)


def sample(
    config: FineTunedConfig, batch: int, draw: torch.Generator
) -> Float[Tensor, "batch n_features"]:
    return sparse_features(batch, config.n_features, config.probability, draw, -1.0, 1.0)


def _train(
    config: FineTunedConfig,
    embedding: Tensor,
    start: list[Tensor],
    computed: tuple[int, ...],
    pull: float,
    seed: int,
    stage: str,
) -> list[Tensor]:
    """Both matrices after AdamW on the squared error, cosine to 0."""
    draw = generator(seed, "vpd_targets", "finetuned", stage)
    tuning = stage == "tuned"
    steps, lr = (config.tuning_steps, config.tuning_lr) if tuning else (config.steps, config.lr)
    parameters = [w.detach().clone().requires_grad_() for w in start]
    wanted = torch.zeros(config.n_features)
    wanted[list(computed)] = 1.0
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * cosine(step, steps)
        x = sample(config, config.batch_size, draw)
        y = readoff(x, embedding, [(parameters[0], parameters[1])])
        loss = (y - x - wanted * x.relu()).square().mean()
        if pull:
            away = [(p - w).square().sum() for p, w in zip(parameters, start, strict=True)]
            loss = loss + pull * (away[0] + away[1])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return [p.detach() for p in parameters]


@torch.no_grad()
def computed_features(model: ResidMlp) -> Float[Tensor, " n_features"]:
    """How much of each ReLU is computed: 1 all of it, 0 none.

    The rise of ``y − x`` on the feature's own output between −0.75 and 0.75, in units of 0.75.
    """
    probe = 0.75 * torch.eye(model.embedding.shape[0])
    rise = (model(probe) - probe).diagonal() - (model(-probe) + probe).diagonal()
    return rise / 0.75
