# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # What did training change, in checkpoints of your own?
#
# Two folders, no prompts, no probe. Here both are made on the spot: a random Llama in bfloat16, and
# the same with a rank-one change planted in one matrix and rounding noise in another. Put your own
# folders, hub ids or adapters in their place. About ten CPU-seconds.

# %%
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import mi_weightspace as mw

place = Path(tempfile.mkdtemp())
base, tuned = place / "base", place / "tuned"
mw.toy.save_tiny("llama", base, n_layers=4, d_model=64, dtype=torch.bfloat16)

model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
draw = torch.Generator().manual_seed(1)
planted = torch.nn.functional.normalize(torch.randn(64, generator=draw), dim=0)
with torch.no_grad():
    matrix = model.model.layers[1].mlp.down_proj.weight
    reads = torch.randn(matrix.shape[1], generator=draw) / matrix.shape[1] ** 0.5
    matrix += (2.0 * torch.outer(planted, reads)).to(matrix.dtype)
    noisy = model.model.layers[3].mlp.down_proj.weight
    noisy += (1e-4 * torch.randn(noisy.shape, generator=draw)).to(noisy.dtype)
model.save_pretrained(tuned)

# %% [markdown]
# ## Do they fit together, and what differs at all?
#
# Shapes, tokenizers and precisions are compared first. Nothing is loaded as a model.

# %%
lineage = mw.load_lineage(base=base, sft=tuned)
lineage.check().to_pandas()

# %% [markdown]
# ## The sweep
#
# One matrix at a time, as it lies on disk. `jobs` is the number of processes, `journal` a folder in
# which finished matrices are kept: the same call again goes on after an interruption.

# %%
update = mw.svd(
    lineage.diff("base", "sft"), rank=4, jobs=1, journal=place / "journal", progress=False
)
table = update.to_pandas("sites")
table[["site", "fro", "rel_fro", "spectral", "null_edge", "resolved", "rounding_flag"]].query(
    "fro > 0"
)

# %% [markdown]
# Two matrices differ. The planted one clears the noise edge. In the other, `rounding_flag` says
# that what is left of so small a change is rounding: its norm, rank and leading vector describe
# bfloat16, not training.

# %%
update.plot()

# %%
parts = update["blocks.1.mlp.out"]
print("planted write recovered: cosine", round(abs(float(parts.write[0] @ planted)), 4))
update.to_pandas().query("site == 'blocks.1.mlp.out'")[
    ["component", "singular_value", "energy", "residual", "above_floor"]
]

# %% [markdown]
# ## A direction of your own
#
# Any vector of the residual stream. Without control contrasts the strongest word is
# `aligned, controls missing`.

# %%
mine = mw.Direction(planted, mw.Space.parse("resid_post.1"), label="mine")
found = mw.project(update, mine, progress=False).to_pandas()
found.query("side == 'write' and cosine == cosine")[
    ["site", "cosine", "R", "p_sign", "resolved", "verdict"]
]

# %% [markdown]
# ## Kept, and read again

# %%
update.save(place / "run")
again = mw.load_report(place / "run")
print(again.equals(update))
print(sorted(file.name for file in (place / "run").iterdir()))
