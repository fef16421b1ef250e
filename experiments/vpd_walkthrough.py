# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Does VPD find parts that are known?
#
# A toy with an answer: five sparse features go through two dimensions and come back. Each feature
# should need one rank-one part of the matrix that reads it, and no other. The module is yours; VPD
# only wants its `nn.Linear` layers and data. About forty CPU-seconds.

# %%
import torch
from torch import nn

import mi_weightspace as mw


class Toy(nn.Module):
    def __init__(self, angles: torch.Tensor) -> None:
        super().__init__()
        plane = torch.stack([angles.cos(), angles.sin()])  # (2, 5): a pentagon
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 5)
        with torch.no_grad():
            self.down.weight.copy_(plane)
            self.up.weight.copy_(plane.T)
            self.up.bias.fill_(-0.32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x)).relu()


toy = Toy(torch.arange(5) * 2 * torch.pi / 5).requires_grad_(False)
draw = torch.Generator().manual_seed(0)
on = torch.rand(40_000, 5, generator=draw) < 0.05
data = on * torch.rand(40_000, 5, generator=draw)
toy(torch.eye(5)).round(decimals=2)

# %% [markdown]
# ## What it will cost, and the run
#
# Twenty parts a matrix, though five are enough: nobody knows the number beforehand. The adversary
# joins for the last part of the run. `faithfulness` asks the parts to sum to the matrix.

# %%
host = mw.vpd.ModuleHost(toy, {"down": "down", "up": "up"})
uniform = {"source": "uniform", "weight": 0.5}
config = mw.vpd.Config(
    sites=("down", "up"),
    n_components=20,
    n_steps=4500,
    batch_size=512,
    lr=2e-3,
    importance_lr=2e-3,
    lr_end=0.02,
    warmup_steps=200,
    importance={"kind": "layerwise_mlp", "hidden": (64,)},
    faithfulness={"form": "relative", "weight": 1.0},
    minimality={
        "weight": 3e-2,
        "frequency_weight": 1.5e-2,
        "ema_half_life": None,
        "gamma": (1.0, 0.02),
    },
    reconstruction=(
        uniform | {"routing": "all"},
        uniform | {"routing": "layerwise"},
        {"source": "persistent", "routing": "all", "scope": "bc", "weight": 0.5}
        | {"start_fraction": 0.7},
    ),
    normalise="zero_mask",
    seed=0,
)
parts = mw.vpd.decompose(host, data, config, evaluation={"budgets": (20,)}, progress=False)
parts.to_pandas()

# %% [markdown]
# `l0>0.1`: parts that are needed at once, on average; a feature is on one time in twenty. `pgd`:
# the error when an adversary chooses every mask that importance leaves free; `zero`: all off.
#
# ## Was the answer found?
#
# One feature at a time at 0.75. Each should need one part of each matrix, each part one feature.

# %%
found = parts.importances(0.75 * torch.eye(5))
for site, g in found.items():
    used = g[:, g.amax(0) > 0.1]
    print(site, tuple(used.shape), (used.round(decimals=2) + 0.0).tolist())

# %%
parts.plot_factors("down", most=6)

# %% [markdown]
# ## What the run says about itself
#
# Each check prints its number. A `WARN` is no failure: it says what was not shown.

# %%
parts.to_pandas("checks")[["name", "outcome", "number", "sentence"]]

# %%
parts.plot("l0")

# %% [markdown]
# ## Taking one part away
#
# The part that serves feature 0 in `down` goes; the others answer as before.

# %%
part = int(found["down"][0].argmax())
matrix = toy.down.weight - torch.outer(parts.write("down")[part], parts.read("down")[part])
with torch.no_grad():
    print("feature 0 before, after:", round(toy(torch.eye(5))[0, 0].item(), 3), end=" ")
    toy.down.weight.copy_(matrix)
    print(round(toy(torch.eye(5))[0, 0].item(), 3))
toy(torch.eye(5)).round(decimals=2)

# %% [markdown]
# Five parts were found because the toy has five. On a model without a known answer a number of
# parts is no number of mechanisms: it is what these data need, up to this adversary's budget.
