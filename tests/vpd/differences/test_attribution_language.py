"""Shares of stages of a language model, from the checkpoints themselves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.models.toy import tiny_model
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.differences.attribution import attribute
from mi_weightspace.vpd.differences.stages import host_of
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.objective import Objective


def test_a_language_model_s_stages_are_those_of_its_checkpoints() -> None:
    """At every position, with the four models of two stages built from their weights."""
    base = tiny_model("llama")
    draw = generator(0, "stages")
    models = [base]
    for layer in (0, 1):
        model = copy.deepcopy(models[-1])
        matrix = model.model.layers[layer].mlp.down_proj.weight
        with torch.no_grad():
            matrix.add_(0.2 * torch.randn(matrix.shape, generator=draw))
        models.append(model)
    only_second = copy.deepcopy(base)
    only_second.model.layers[1].load_state_dict(models[2].model.layers[1].state_dict())
    stages: dict[str, Any] = dict(zip(("base", "sft", "dpo"), models, strict=True))
    names = ["blocks.0.mlp.out@sft", "blocks.1.mlp.out@dpo"]
    host = host_of(Lineage(stages), names, make_config({}), "tuned")
    reads, writes = (
        {n: torch.zeros(1, host.weight(n).shape[side]) for n in names} for side in (1, 0)
    )
    factors = Factors(host, reads, writes)
    objective = Objective(factors, lambda clean, _: clean.output[..., :2], make_config({}))  # pyright: ignore[reportArgumentType]
    tokens = torch.randint(4, 300, (3, 5), generator=draw)
    table: Any = attribute(objective, [tokens], epsilon=0.0, attack_steps=0).per_token
    with torch.no_grad():
        log_p = {
            key: model(tokens).logits.double().log_softmax(-1)
            for key, model in {"": base, "1": models[1], "2": only_second, "12": models[2]}.items()
        }
    last = log_p["12"]
    v = {k: -(last.exp() * (last - q)).sum(-1).flatten() for k, q in log_p.items()}
    first = 0.5 * (v["1"] - v[""] + v["12"] - v["2"])
    np.testing.assert_allclose(table["shapley_sft"], first, rtol=1e-3, atol=1e-6)
    assert table["token"].tolist() == tokens.flatten().tolist()
    assert table["position"].tolist() == list(range(5)) * 3
    assert table["row"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
