"""Hand-built decompositions whose every score is known, and an evaluation of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.evaluate import Evaluation, evaluate
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean, ModuleHost
from mi_weightspace.vpd.objective import Objective

N = 6
VOCAB, WIDTH = 7, 5


class Known(nn.Module):
    """An importance network that answers what it is told: a function of the clean batch."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, clean: Clean, factors: Factors) -> Tensor:
        return self.answer(clean)


def rotation(n: int = N, seed: int = 0) -> Tensor:
    draw = generator(seed, "exact_toy")
    return torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]


class OneMatrix(nn.Module):
    """``y = Q x + b``, Q orthogonal: every feature its own direction, errors add up."""

    def __init__(self, n: int = N) -> None:
        super().__init__()
        self.first = nn.Linear(n, n, dtype=torch.float64)
        self.first.weight = nn.Parameter(rotation(n))
        self.first.bias = nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def features(n_rows: int = 64, seed: int = 0, p: float = 0.3, n: int = N) -> Tensor:
    draw = generator(seed, "exact_toy", "features")
    on = torch.rand(n_rows, n, generator=draw) < p
    return (torch.rand(n_rows, n, generator=draw).double() + 0.5) * on


def config(**values: Any) -> VPDConfig:
    given = {"n_steps": 1000, "n_components": N, "minimality": {"ema_half_life": None}, **values}
    return make_config(given)


def one_matrix(
    answer: Any = None, *, change: Any = None, count: int = N, **values: Any
) -> Objective:
    """One part a feature (reads e_j, writes column j); important exactly where the feature is on.

    Args:
        answer: clean -> preactivations, instead. change: called with reads and writes in place.
    """
    module = OneMatrix()
    host: Any = ModuleHost(module, {"first": "first"})
    reads = torch.eye(N, dtype=torch.float64)[:count].clone()
    writes = module.first.weight.T[:count].clone()
    if change is not None:
        change(reads, writes)
    factors = Factors(host, {"first": reads}, {"first": writes})
    known: Any = Known(answer or (lambda clean: (clean.batch[:, :count] != 0).double() * 2))
    return Objective(factors, known, config(**values))


class TinyLanguage(nn.Module):
    """Token ids -> a fixed embedding -> two matrices with a tanh between -> logits."""

    def __init__(self) -> None:
        super().__init__()
        draw = generator(3, "exact_toy", "language")
        self.table = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64))
        self.one = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.two = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
        for linear in (self.one, self.two):
            weight = torch.randn(linear.weight.shape, generator=draw, dtype=torch.float64)
            linear.weight = nn.Parameter(weight)
        self.one.bias = nn.Parameter(torch.randn(WIDTH, generator=draw, dtype=torch.float64))
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.table[ids])))


def language(counts: tuple[int, int] = (6, 4), seed: int = 0) -> Objective:
    """Random parts and random importances in (−0.5, 1.5) of `TinyLanguage`."""
    host: Any = ModuleHost(TinyLanguage(), {"one": "one", "two": "two"}, metric="kl")
    draw = generator(seed, "exact_toy", "parts")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * 0.5

    reads = {"one": random(counts[0], WIDTH), "two": random(counts[1], WIDTH)}
    writes = {"one": random(counts[0], WIDTH), "two": random(counts[1], VOCAB)}
    table = torch.rand(VOCAB, sum(counts), generator=draw, dtype=torch.float64) * 2 - 0.5
    known: Any = Known(lambda clean: table[clean.batch])
    return Objective(Factors(host, reads, writes), known, config(n_components=4))


def sentences(n: int = 5, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (n, length), generator=generator(seed, "exact_toy", "ids"))


def scored(objective: Objective, n_batches: int = 6, **options: Any) -> Evaluation:
    """An evaluation of `one_matrix` on a few batches of features."""
    batches = [features(seed=10 + i) for i in range(n_batches)]
    return evaluate(objective, batches, **{"budgets": (20,), "progress": False, **options})
