"""Small decompositions that several tests look at: made once, read-only."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from mi_weightspace.core.seeds import generator
from mi_weightspace.models import toy
from mi_weightspace.models.lens import Lens
from mi_weightspace.models.load import load
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.decomposition import Decomposition
from mi_weightspace.vpd.host import ModuleHost
from mi_weightspace.vpd.run import decompose

SITES = ("blocks.0.attn.q", "blocks.0.mlp.in", "blocks.1.mlp.out")
FAST: dict[str, Any] = {"budgets": (1, 2), "free_budgets": (1,), "n_pgd_batches": 1}
# no attention is written out and nothing is annealed: three steps are no run
SETTINGS: dict[str, Any] = {
    "sites": SITES,
    "n_components": 20,
    "n_steps": 3,
    "batch_size": 4,
    "log_every": 1,
    "warmup_steps": 2,
    "importance": {"hidden": (8,)},
}


def config(**changes: Any) -> VPDConfig:
    return make_config(SETTINGS | changes)


@lru_cache(maxsize=8)
def language(family: str = "gpt2", seed: int = 0) -> Lens:
    tiny = toy.tiny_model(family, seed=seed)
    return load(tiny, tokenizer=toy.tiny_tokenizer())


def tokens(rows: int = 24, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(4, 300, (rows, length), generator=generator(seed, "decomposed"))


@lru_cache(maxsize=8)
def parts_of(family: str = "gpt2") -> Decomposition:
    counts = {"*.mlp.*": 40, "*": 40}
    return decompose(
        language(family),
        tokens(),
        config(n_components=counts),
        progress=False,
        evaluation=FAST,
    )


class Square(nn.Module):
    """A toy of two matrices."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 4)
        draw = generator(seed, "square")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def square_host(seed: int = 0) -> ModuleHost:
    return ModuleHost(Square(seed), {"first": "first", "second": "second"})


def inputs(rows: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(rows, 4, generator=generator(seed, "inputs"))


def square_config(**changes: Any) -> VPDConfig:
    own: dict[str, Any] = {"sites": ("*",), "n_components": 5, "batch_size": 8, "n_steps": 6}
    return config(**(own | changes))


@lru_cache(maxsize=2)
def square_parts() -> Decomposition:
    return decompose(square_host(), inputs(), square_config(), progress=False, evaluation=FAST)
