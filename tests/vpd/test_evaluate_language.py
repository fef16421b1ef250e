"""Evaluation on live language models: the host's own loss, layers as groups, every site."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mi_weightspace.core.seeds import generator
from mi_weightspace.models import toy
from mi_weightspace.models.load import load
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.evaluate import Evaluation, evaluate
from mi_weightspace.vpd.evaluate_stats import records
from mi_weightspace.vpd.factors import initial_factors
from mi_weightspace.vpd.host import LensHost
from mi_weightspace.vpd.importance import make_importance
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.selfchecks import self_checks

SITES = ("blocks.*.mlp.*", "blocks.1.attn.o", "embed")


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(4, 300, (3, 7), generator=generator(seed, "evaluate_language"))


def start(model: Any, sites: tuple[str, ...], **values: Any) -> Objective:
    """A decomposition at step 0, SVD parts (exact where C ≥ rank)."""
    host: Any = LensHost(load(model, tokenizer=toy.tiny_tokenizer()), list(sites))
    config = make_config({"init": "svd", "n_components": 130, "n_steps": 10, **values})
    factors = initial_factors(host, config)
    importance = make_importance(factors, host.clean(tokens(0)), config.importance, seed=0)
    return Objective(factors, importance, config)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def measured(request: pytest.FixtureRequest) -> tuple[Any, Objective, Evaluation]:
    model = toy.tiny_model(request.param, seed=0)
    objective = start(model, SITES)
    batches = [tokens(i) for i in range(3)]
    return model, objective, evaluate(objective, batches, budgets=(2,), progress=False)


def test_the_host_is_reproduced_and_exact_parts_lose_nothing(measured: Any) -> None:
    _, _, evaluation = measured
    assert evaluation.facts["identity"] == 0
    assert evaluation.masking("unmasked") < 1e-6 < evaluation.masking("zero")
    assert evaluation.sites["remainder"].max() < 1e-9
    assert evaluation.facts["metric"] == "kl" and evaluation.facts["n"] == 63


def test_cross_entropy_is_the_models_own_loss(measured: Any) -> None:
    model, _, evaluation = measured
    with torch.no_grad():
        losses = [float(model(tokens(i), labels=tokens(i)).loss) for i in range(3)]
    assert evaluation.facts["ce_host"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    (row,) = records(evaluation.maskings, masking="full")
    # nothing was learned: where all-zero masks do not raise the loss there is nothing to recover
    assert row["ce_difference"] == 0 and (row["unrecovered"] == 0 or math.isnan(row["unrecovered"]))


def test_layers_are_groups_and_the_embedding_is_in_none(measured: Any) -> None:
    _, objective, evaluation = measured
    groups = {r["name"]: r for r in records(evaluation.l0, level="group", threshold=0.0)}
    assert list(groups) == ["layer 0", "layer 1"]
    by_site = {r["name"]: r["l0"] for r in records(evaluation.l0, level="site", threshold=0.0)}
    assert set(by_site) == set(objective.factors.layout.names) and "embed" in by_site
    own = sum(v for k, v in by_site.items() if k.startswith("blocks.1."))
    assert groups["layer 1"]["l0"] == pytest.approx(own)
    rest = groups["layer 0"]["l0"] + groups["layer 1"]["l0"] + by_site["embed"]
    assert evaluation.total_l0(0.0) == pytest.approx(rest)


def test_every_check_has_an_answer_and_coverage_counts_the_models_matrices(measured: Any) -> None:
    _, objective, evaluation = measured
    checks = {c.name: c for c in self_checks(objective, [], evaluation)}
    assert checks["host_identity"].outcome == checks["unmasked"].outcome == "PASS"
    every = len(objective.factors.host.lens.sites())  # pyright: ignore
    names = len(objective.factors.layout.names)
    assert f"{names} of {every} matrices" in checks["coverage"].sentence
    assert checks["history"].outcome == "FAIL"


def test_a_frozen_prefix_changes_nothing() -> None:
    """Sites from block 1 on: passes start at the cached residual, and `full` is still the host."""
    model = toy.tiny_model("llama", seed=1)
    objective = start(model, ("blocks.1.mlp.out",))
    clean = objective.factors.host.clean(tokens(0))
    assert clean.start is not None
    evaluation = evaluate(objective, [tokens(0)], budgets=(2,), progress=False)
    assert evaluation.facts["identity"] == 0 and evaluation.masking("unmasked") < 1e-6
