# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Which stage wrote this direction, and where?
#
# Ten lines, on checkpoints that lie in folders. Here they are trained on the spot (about twenty
# CPU-seconds): a small GPT-2 whose supervised fine-tuning changed one matrix, then a DPO stage that
# taught something else. Put your own folders, hub ids or PEFT adapters in their place.

# %%
import mi_weightspace as mw
import probes

organism = mw.organisms.build("deference", size="micro", seed=0)
organism.stages  # {"base": folder, "sft": folder, "dpo": folder}

# %% [markdown]
# ## From your own model folders

# %%
lineage = mw.load_lineage(**organism.stages)
prompts = organism.contrasts  # your own: probes.prompts.load("pairs.jsonl")
bank = probes.fit(lineage["sft"], prompts, seed=0)
update = mw.svd(lineage.diff("base", "sft"), sites="blocks.*.mlp.out", rank=16)
written = mw.project(update, bank, lineage=lineage, prompts=prompts, seed=0)
written.to_pandas()[["stage", "site", "cosine", "R", "R_lda", "G", "p_G", "verdict"]]

# %% [markdown]
# The cosine is description; the verdict rests on the stage gate and on G among the matched
# controls. The same, for every step of the lineage and with the behaviour itself:

# %%
answer = mw.attribute_stages(lineage, bank, prompts=prompts, readout=organism.readout, seed=0)
answer

# %%
answer.plot()

# %% [markdown]
# ## From your own `HookedTransformer` or `TransformerBridge`
#
# The object you already have is used as it is: your hooks keep firing, nothing is reloaded.

# %%
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers(str(organism.stages["sft"]), device="cpu")
calls = []
bridge.blocks[2].hook_resid_post.add_hook(lambda value, hook: calls.append(value.shape))


lens = mw.load(bridge)  # checks that the weights are raw and the family's table is true of them
lens.sites("blocks.2.*")

# %% [markdown]
# A probe vector of your own is enough. Without stages to run, and without control contrasts, the
# strongest word is `aligned, controls missing`.

# %%
vector = bank.direction(point="resid_post.2").pattern  # any 1-D tensor of width d_model
mine = mw.Direction(vector, mw.Space.parse("blocks.2.hook_resid_post"), label="my probe")
difference = mw.load_lineage(base=organism.stages["base"], sft=bridge).diff("base", "sft")
found = mw.project(mw.svd(difference, sites="blocks.2.mlp.out"), mine)
found.to_pandas()[["site", "cosine", "R", "p_sign", "verdict"]]
