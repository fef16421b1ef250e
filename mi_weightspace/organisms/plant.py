"""The planted organism: random weights, one rank-one write along a known direction, noise."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.models.grammar import module_path, shape_of, sites_of
from mi_weightspace.organisms.language import HELDOUT, LOUD, QUIET, REGISTERS, Language
from mi_weightspace.organisms.prompts import heldout_prompts

AMPLITUDE, NOISE, SHRINKAGE, N_FIT, N_OTHER = 3.0, 0.02, 0.03, 128, 24


def site_inputs(
    model: Any, site: Site, prompts: Int[Tensor, "n length"]
) -> Float[Tensor, "n d_in"]:
    """The matrix's own input at the last token."""
    module = model.get_submodule(module_path(site, shape_of(model.config)))
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0][:, -1]))
    try:
        with torch.no_grad():
            model(input_ids=prompts, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def lda_filter(
    positive: Float[Tensor, "n d"], negative: Float[Tensor, "n d"], others: Float[Tensor, "m d"]
) -> tuple[Float[Tensor, " d"], float]:
    """Shrunk LDA filter scaled to a class gap of 1, and the midpoint of the two means.

    `others`: further inputs whose variation the filter is to ignore.
    """
    shift = positive.mean(0) - negative.mean(0)
    groups = (positive, negative, others)
    centred = torch.cat([g - g.mean(0) for g in groups])
    covariance = centred.T @ centred / len(centred)
    ridge = SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(shift))
    weights = torch.linalg.solve((1 - SHRINKAGE) * covariance + ridge, shift)
    weights = weights / (weights @ shift)
    return weights, float(weights @ (positive.mean(0) + negative.mean(0)) / 2)


def add_noise(model: Any, draw: torch.Generator) -> None:
    """Gaussian noise on every matrix, a fixed part of each one's standard deviation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(NOISE * parameter.std() * noise)


def plant_stages(
    base: Any, language: Language, site_name: str, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """base; sft = base + amplitude·u vᵀ at one site (threshold in the bias) + noise; dpo +noise.

    ``v`` is the LDA filter of the trained registers at the site's input; ``u`` is a random unit
    vector.
    """
    from mi_weightspace.organisms.truth import matrix_of

    site = next(s for s in sites_of(shape_of(base.config)) if s.name == site_name)
    draw = generator(seed, "organisms", "plant")
    seen = [name for name in REGISTERS if name != HELDOUT]
    positive = torch.cat([heldout_prompts(language, N_FIT, draw, name) for name in seen])
    negative = heldout_prompts(language, len(positive), draw, "N")
    others = torch.cat([heldout_prompts(language, N_OTHER, draw, name) for name in LOUD + QUIET])
    inputs = (site_inputs(base, site, prompts) for prompts in (positive, negative, others))
    v, threshold = lda_filter(*inputs)
    u = torch.randn(site.d_out, generator=draw)
    u = u / u.norm()
    models = {"base": base, "sft": copy.deepcopy(base)}
    add_noise(models["sft"], draw)
    with torch.no_grad():
        matrix_of(models["sft"], site).add_(AMPLITUDE * u[:, None] * v[None])
        bias = models["sft"].get_submodule(module_path(site, shape_of(base.config))).bias
        if bias is not None:
            bias.sub_(AMPLITUDE * threshold * u)
    models["dpo"] = copy.deepcopy(models["sft"])
    add_noise(models["dpo"], draw)
    planted = {"direction": u.tolist(), "read_direction": (v / v.norm()).tolist()}
    return models, planted | {"amplitude": AMPLITUDE, "noise": NOISE}
