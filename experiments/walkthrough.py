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
list(organism.stages)  # a dictionary: stage -> folder, in training order

# %% [markdown]
# ## From your own model folders

# %%
lineage = mw.load_lineage(**organism.stages)
prompts = organism.contrasts  # your own: probes.load_contrasts("pairs.jsonl")
bank = probes.fit(lineage["sft"], prompts, seed=0, progress=False)
update = mw.svd(lineage.diff("base", "sft"), sites="blocks.*.mlp.out", rank=16, progress=False)
written = mw.project(update, bank, lineage, prompts, seed=0, progress=False)
written.to_pandas()[["stage", "site", "side", "cosine", "R", "R_lda", "G", "p_G", "verdict"]]

# %%
written.plot()

# %% [markdown]
# The cosine is description; the verdict rests on the stage gate and on G among the matched
# controls. The same, for every step of the lineage and with the behaviour itself:

# %%
answer = mw.attribute_stages(
    lineage, bank, prompts=prompts, readout=organism.readout, seed=0, progress=False
)
answer

# %%
answer.plot()

# %% [markdown]
# How far the contrast moves the activations, stage by stage; hatched cells are not significant.

# %%
sweep = probes.dmu_sweep(lineage, prompts, n_flips=1000, n_bootstrap=200, seed=0, progress=False)
sweep.plot()

# %% [markdown]
# ## From your own `HookedTransformer` or `TransformerBridge`
#
# The object you already have is used as it is: your hooks keep firing, nothing is reloaded.

# %%
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers(str(organism.stages["sft"]), device="cpu")
calls = []
bridge.blocks[2].hook_resid_post.add_hook(lambda value, hook: calls.append(value.shape))

text = "BOS expert0 expert1 expert2 expert0 SEP SUG ans0 key0 QM"
_, cache = bridge.run_with_cache(text, prepend_bos=False)

# %% [markdown]
# A vector of your own is enough. Without stages to run and without control contrasts, the strongest
# word is `aligned, controls missing`; here the vector is one activation, not even a contrast.

# %%
vector = cache["blocks.2.hook_resid_post"][0, -1]  # any 1-D tensor of width d_model
mine = mw.Direction(vector, mw.Space.parse("blocks.2.hook_resid_post"), label="my vector")
difference = mw.load_lineage(base=organism.stages["base"], sft=bridge).diff("base", "sft")
found = mw.project(
    mw.svd(difference, sites="blocks.2.mlp.out", progress=False), mine, progress=False
)
found.to_pandas()[["site", "side", "cosine", "R", "p_sign", "verdict"]]

# %%
before = len(calls)
bridge.run_with_cache(text, prepend_bos=False)
assert len(calls) == before + 1  # your hook is still there, once
