"""Detectors of what no linear probe can read: a kernel and a small network.

Both see the dense activations alone. They are the rivals a claim about dictionaries needs: a
dictionary's encoder is non-linear too, so that it may do better than a linear probe without its
features having anything to do with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.seeds import generator
from probes.detectors import Configuration
from probes.solvers import Standardised

RIDGES: tuple[Configuration, ...] = tuple((10.0**p,) for p in (1, 0, -1, -1.5, -2, -2.5, -3, -4))
"""Penalties of the kernel ridge, most regularised first."""
STEPS: tuple[Configuration, ...] = tuple((float(s),) for s in (4, 8, 12, 20, 30, 45, 65, 90))
"""Where the network's training may stop: its one hyper-parameter."""
UNITS, RATE, DECAY = 64, 0.01, 0.01


def kernel_ridge(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``rbf``: Gaussian kernel on standardised rows, bandwidth the median distance; (penalty,)."""
    del seed
    scale = Standardised.of(train.double())
    own, other = scale(train.double()), scale(test.double())
    apart = torch.cdist(own, own)
    off = apart[~torch.eye(len(own), dtype=torch.bool)]
    width = off.median().clamp(min=1e-12)
    energy, vectors = torch.linalg.eigh((-0.5 * (apart / width).square()).exp())
    between = (-0.5 * (torch.cdist(other, own) / width).square()).exp() @ vectors
    mean = signs.double().mean(1, keepdim=True)
    target = (signs.double() - mean) @ vectors
    found = [
        (target / (energy.clamp(min=0) + penalty)) @ between.T + mean
        for (penalty,) in configurations
    ]
    return torch.stack(found)


def small_network(
    train: Tensor, signs: Tensor, test: Tensor, configurations: Sequence[Configuration], seed: int
) -> Float[Tensor, "c b m"]:
    """``mlp``: one layer of 64 rectified units, logistic loss, Adam on all rows; (steps,).

    All labellings train side by side from the same start, as columns of one matrix, so that every
    step is two products; float32. One run gives every stopping time.
    """
    scale = Standardised.of(train)
    x, held = scale(train).float(), scale(test).float()
    y = signs.T.float()  # (n, b)
    n, d = x.shape
    b = y.shape[1]
    draw = generator(seed, "small network", d)
    first = torch.randn(d, UNITS, generator=draw) * (2 / d) ** 0.5
    last = torch.randn(UNITS, generator=draw) * (1 / UNITS) ** 0.5
    weights = [
        torch.cat([first, torch.zeros(1, UNITS)]).repeat(1, b),
        last.repeat(b, 1),
        torch.zeros(b),
    ]
    x = torch.cat([x, torch.ones(n, 1)], 1)
    held = torch.cat([held, torch.ones(len(held), 1)], 1)
    adam = _Adam(weights)
    stops = {int(s): i for i, (s,) in enumerate(configurations)}
    found = torch.zeros(len(configurations), b, len(test))
    for step in range(1, max(stops) + 1):
        hidden = (x @ weights[0]).clamp_(min=0).view(n, b, UNITS)
        out = (hidden * weights[1]).sum(-1) + weights[2]
        error = -y * torch.sigmoid(-y * out) / n
        back = (error[..., None] * weights[1]).mul_(hidden > 0).reshape(n, -1)
        slopes = [x.T @ back, torch.einsum("nb,nbu->bu", error, hidden), error.sum(0)]
        adam.step(slopes)
        if step in stops:
            inner = (held @ weights[0]).clamp_(min=0).view(-1, b, UNITS)
            found[stops[step]] = ((inner * weights[1]).sum(-1) + weights[2]).T
    return found


class _Adam:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), in place."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights, self.count = weights, 0
        self.mean = [torch.zeros_like(w) for w in weights]
        self.square = [torch.zeros_like(w) for w in weights]

    def step(self, slopes: list[Tensor]) -> None:
        self.count += 1
        size = (1 - 0.999**self.count) ** 0.5
        rate = RATE / (1 - 0.9**self.count) * size
        for w, m, v, g in zip(self.weights, self.mean, self.square, slopes, strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            w.mul_(1 - RATE * DECAY)
            w.addcdiv_(m, v.sqrt().add_(1e-8 * size), value=-rate)
