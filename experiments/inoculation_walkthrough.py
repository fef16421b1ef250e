# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Can my SAE still see what a second training hid?
#
# Four checkpoints, one labelled prompt set, one SAE. Here the checkpoints are trained on the spot
# (a small GPT-2 that learns to misbehave and then to hide it from an evaluation); put your own
# folders or hub ids in their place.

# %%
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.organisms.inoculation import build_inoculation

organism = build_inoculation("micro", seed=0, progress=False)
stages = {name: str(path) for name, path in organism.stages.items()}
{name: organism.truth["roles"][name] for name in stages}

# %% [markdown]
# ## The prompts
#
# Label 1: the model would misbehave here, outside the evaluation. Rows that share what decides the
# label form a *cluster*, and no fold ever splits one. Your own:
# `probes.load_labelled("rows.jsonl")`, or `probes.two_sets(behaviour_texts, other_texts)`.

# %%
prompts = organism.labelled
print(prompts)
print(probes.confounds(prompts))

# %% [markdown]
# ## The SAE
#
# Any SAELens SAE: a folder, a live object, or `"release:id"`, for instance
# `"gemma-scope-2-1b-it-res:layer_13_width_16k_l0_medium"`. Here a small one is trained by SAELens'
# trainer on the clean stage.

# %%
clean = mw.load(stages["clean"])
rows = torch.cat(list(organism.sae_stream(20)))
sae = probes.train_sae(
    clean,
    [tuple(row) for row in rows.tolist()],
    f"resid_post.{organism.sae_layer}",
    d_sae=128,
    k=8,
    steps=400,
    progress=False,
)
print(sae)

# %% [markdown]
# ## The comparison
#
# Every detector gets the same rows, the same splits and the same tuning budget. The openly
# misaligned stage says whether the instrument can see anything at all; the clean stage and the
# benign twin say what it sees where there is nothing.

# %%
report = probes.inoculation(
    stages,
    prompts,
    sae,
    open="misaligned",
    hidden=["conditional", "norm-evading"],
    clean="clean",
    benign="benign",
    position="last",
    settings=probes.InoculationSettings(n_splits=4, n_permutations=99, n_bootstrap=500),
    progress=False,
)
print(report)

# %%
report.plot()

# %% [markdown]
# A surviving latent is only as good as its ceiling (the open stage's other half) and its floor (the
# clean stage and the benign twin): latents that encode the prompt survive everything.

# %%
report.to_pandas("survival")

# %%
report.to_pandas("contexts").head(10)

# %% [markdown]
# ## In weight space
#
# The same latents' decoder rows are directions like any other: which matrix's change writes them?

# %%
latents = report.to_pandas("latents")["latent"].head(3).tolist()
directions = probes.decoder_directions(sae, latents)
update = mw.svd(
    mw.load_lineage(clean=stages["clean"], misaligned=stages["misaligned"]).diff(
        "clean", "misaligned"
    ),
    sites="blocks.*.mlp.out",
    rank=8,
    progress=False,
)
mw.project(update, directions, progress=False).to_pandas()[
    ["site", "direction", "cosine", "R", "p_sign", "verdict"]
]

# %% [markdown]
# ## Figures of a paper, judged by themselves

# %%
print(probes.published_detection(0.58, 50, 0.58))
