"""A bilinear MLP whose interaction matrices have a known eigen-structure, by construction.

    y = P ((W x) ⊙ (V x)),     y_k = xᵀ B_k x,     B_k = Σ_i λ_ki e_i e_iᵀ

The e_i are a random orthonormal basis of the input space; the first `n_used` are read, the rest are
idle. Eigenvector i owns a group of r neurons: on them W writes ``c_i``, V writes ``d_i``, and P
reads ``c_i ⊙ d_i`` and writes ``λ_i``, so

    W = Σ_i c_i e_iᵀ,   V = Σ_i d_i e_iᵀ,   P = Σ_i λ_i (c_i ⊙ d_i)ᵀ / |c_i ⊙ d_i|².

Output k reads `spread` eigenvectors. All nonzero singular values of W and of V are equal, hence an
SVD cannot find the parts, and a component per neuron needs r times as many as the truth.

Inputs are ``x = Σ_i s_i e_i``, each s_i on with probability p, of random sign and magnitude in
[0.5, 1]. Truth, at all three sites: one rank-one part per used eigenvector, important exactly where
it is on; none for idle ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experiments.vpd_targets.common import Target, frozen, linear
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.truth import PROBE, Dense, Identity, Parts

SITES = ("left", "right", "down")


@dataclass(frozen=True)
class BilinearConfig:
    """Sizes and data law. There is nothing to train."""

    d_in: int = 16
    n_used: int = 12
    group: int = 2
    spread: int = 3
    probability: float = 0.1


PRESETS = {
    "bilinear": {"toy": BilinearConfig(), "paper": BilinearConfig(96, 64, group=3, spread=4)}
}


@dataclass(frozen=True, eq=False)
class Structure:
    """The known answer.

    Attributes:
        basis: (d_in, d_in) rows e_i, used ones first.
        eigenvalues: (n_used outputs, n_used) λ_ki.
        parts: per site, the true rank-one parts in eigenvector order.
    """

    basis: Float[Tensor, "d_in d_in"]
    eigenvalues: Float[Tensor, "k n_used"]
    parts: dict[str, Parts]


class Bilinear(nn.Module):
    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.left, self.right, self.down = (
            linear(structure.parts[site].write.T @ structure.parts[site].read) for site in SITES
        )

    def forward(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n n_out"]:
        return self.down(self.left(x) * self.right(x))


def build(config: BilinearConfig, seed: int) -> Structure:
    draw = generator(seed, "vpd_targets", "bilinear")
    n, r = config.n_used, config.group
    basis = torch.linalg.qr(
        torch.randn(config.d_in, config.d_in, generator=draw, dtype=torch.float64)
    )[0].T

    def groups() -> Float[Tensor, "n neurons"]:
        """A unit vector per eigenvector, supported on its own neurons, none of them near 0."""
        values = 0.5 + torch.rand(n, r, generator=draw, dtype=torch.float64)
        values *= torch.randint(0, 2, (n, r), generator=draw) * 2 - 1
        values /= values.norm(dim=1, keepdim=True)
        wide = torch.zeros(n, n, r, dtype=torch.float64)
        wide[torch.arange(n), torch.arange(n)] = values
        return wide.flatten(1)

    left, right = groups(), groups()
    eigenvalues = torch.zeros(n, n, dtype=torch.float64)
    for shift in range(config.spread):
        sign = torch.randint(0, 2, (n,), generator=draw) * 2 - 1
        size = 0.5 + torch.rand(n, generator=draw, dtype=torch.float64)
        eigenvalues[torch.arange(n), (torch.arange(n) + shift) % n] = sign * size
    product = left * right
    read = product / product.square().sum(1, keepdim=True)
    used = basis[:n]
    parts = {
        "left": Parts(used.float(), left.float()),
        "right": Parts(used.float(), right.float()),
        "down": Parts(read.float(), eigenvalues.T.float().contiguous()),
    }
    return Structure(basis.float(), eigenvalues.float(), parts)


def train(config: BilinearConfig, seed: int) -> Bilinear:
    """The target; built, not trained."""
    module = Bilinear(build(config, seed))
    frozen(module)
    return module


def sample(
    config: BilinearConfig, structure: Structure, batch: int, draw: torch.Generator
) -> Float[Tensor, "batch d_in"]:
    shape = (batch, config.d_in)
    on = torch.rand(shape, generator=draw) < config.probability
    sign = torch.rand(shape, generator=draw).sub_(0.5).sign_()
    size = torch.rand(shape, generator=draw).mul_(0.5).add_(0.5)
    return (on * sign * size) @ structure.basis


def interactions(module: Bilinear) -> Float[Tensor, "n_out d_in d_in"]:
    """B_k of every output, symmetric: ``y_k = xᵀ B_k x``."""
    down, left, right = (site.weight.double() for site in (module.down, module.left, module.right))
    b = torch.einsum("kh,hi,hj->kij", down, left, right)
    return (b + b.transpose(1, 2)) / 2


def eigen_error(module: Bilinear, structure: Structure) -> float:
    """Largest entry of B_k − Σ_i λ_ki e_i e_iᵀ, in units of the largest of B_k."""
    found = interactions(module)
    used = structure.parts["left"].read.double()
    stated = torch.einsum("ki,ia,ib->kab", structure.eigenvalues.double(), used, used)
    return float((found - stated).abs().max() / stated.abs().max())


def unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / rows.norm(dim=1, keepdim=True)


def target(config: BilinearConfig, seed: int) -> Target:
    structure, module = build(config, seed), train(config, seed)
    idle = Identity(idle=tuple(range(config.n_used, config.d_in)))
    patterns: dict[str, Identity | Dense] = dict.fromkeys(SITES, idle)
    error = eigen_error(module, structure)
    return Target(
        "bilinear",
        module,
        {site: site for site in SITES},
        lambda batch, draw: sample(config, structure, batch, draw),
        "mse",
        patterns,
        PROBE * structure.basis,
        {s: ("in", unit(structure.parts[s].read)) for s in SITES},
        {"eigen_error": error},
        accepted=error < 1e-4,
    )
