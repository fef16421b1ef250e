"""Two problems small enough to train in a test: a TMS-shaped toy and a two-block GPT-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mi_weightspace.models.load import load
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.host import LensHost, ModuleHost
from mi_weightspace.vpd.stream import SampledStream, TokenStream

VOCAB, TOKENS = 29, 6
KEPT: dict[str, dict[str, Any]] = {
    "bsc": {"source": "persistent", "routing": "all"},
    "pooled": {"source": "pooled", "routing": "all", "particles": 3, "start_fraction": 0.3},
    "merged": {"source": "persistent", "routing": "all", "adversarial_fraction": 0.5},
    "sigmoid": {"source": "persistent", "routing": "all", "scope": "bc", "sigmoid": True},
}


class Toy(nn.Module):
    """5 features through 2 dimensions and back, as in toy models of superposition."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 5)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(self.down(x)))


def toy_host() -> ModuleHost:
    return ModuleHost(Toy(), {"linear1": "down", "linear2": "up"})


def _sparse(n: int, draw: torch.Generator) -> Tensor:
    on = torch.rand(n, 5, generator=draw) < 0.3
    return torch.rand(n, 5, generator=draw) * on


def toy_stream(batch: int = 4) -> SampledStream:
    return SampledStream(_sparse, batch, 2)


def gpt2(layers: int = 2, *, std: float = 0.3) -> Any:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=8,
        n_embd=8,
        n_layer=layers,
        n_head=2,
        n_inner=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data = std * noise + (1.0 if parameter.ndim == 1 else 0.0)
    return model


def gpt2_host(
    select: str = "blocks.*", *, layers: int = 2, double: bool = False, prefix: bool = True
) -> LensHost:
    model = gpt2(layers)
    if double:
        return LensHost(load(model.double(), verify=False), [select], prefix=prefix)
    return LensHost(load(model), [select], prefix=prefix)


def token_table(rows: int = 12) -> Tensor:
    return torch.randint(VOCAB, (rows, TOKENS), generator=torch.Generator().manual_seed(4))


def token_stream(batch: int = 2, rows: int = 12) -> TokenStream:
    return TokenStream(token_table(rows), batch, 5)


def toy_config(**changes: Any) -> VPDConfig:
    values: dict[str, Any] = {
        "n_components": 6,
        "importance": {"kind": "component_mlp", "hidden": [4]},
        "reconstruction": [{"source": "uniform", "routing": "all"}, KEPT["bsc"]],
        "n_steps": 12,
        "batch_size": 4,
        "warmup_steps": 10,
        "log_every": 1,
        "checkpoint_every": 3,
    }
    return make_config(values | changes)


def gpt2_config(**changes: Any) -> VPDConfig:
    values: dict[str, Any] = {
        "n_components": 12,
        "importance": {
            "kind": "global_transformer",
            "d_model": 8,
            "n_blocks": 1,
            "n_heads": 2,
            "d_mlp": 8,
        },
        "n_steps": 12,
        "batch_size": 2,
        "warmup_steps": 5,
        "log_every": 1,
        "checkpoint_every": 3,
    }
    return make_config(values | changes)
