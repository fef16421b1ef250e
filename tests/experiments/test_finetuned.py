"""The fine-tuned toy: what each model computes, and that the update is what its truth says."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from experiments.vpd_ground_truth import one_thread
from experiments.vpd_targets.finetuned import (
    PULL,
    FineTuned,
    FineTunedConfig,
    build,
    computed_features,
)
from experiments.vpd_targets.resid_mlp import ResidMlp
from mi_weightspace.core.seeds import generator

SHORT = FineTunedConfig(steps=500, tuning_steps=400, tuning_lr=5e-3, batch_size=256)


@lru_cache(maxsize=3)
def made(pull: float = 0.0) -> FineTuned:
    with one_thread():
        return build(0, pull, SHORT)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_hand(model: ResidMlp, x: Tensor) -> Tensor:
    parts = {k: v.double() for k, v in model.state_dict().items()}
    h = x.double() @ parts["embedding"]
    hidden = (h @ parts["layers.0.mlp_in.weight"].T).clamp(min=0)
    return (h + hidden @ parts["layers.0.mlp_out.weight"].T) @ parts["embedding"].T


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().square().mean())


@pytest.mark.quick
@pytest.mark.parametrize("pull", [0.0, PULL])
def test_the_base_computes_ten_features_and_the_tuned_model_five_more(pull: float) -> None:
    toy = made(pull)
    assert (toy.base_features, toy.new_features) == (tuple(range(10)), tuple(range(10, 15)))
    base, tuned = computed_features(toy.base), computed_features(toy.tuned)
    assert float(base[:10].min()) > 0.95
    assert float(base[10:].abs().max()) < 0.05
    assert float(tuned[:10].min()) > 0.9
    assert float(tuned[10:15].min()) > 0.75
    assert float(tuned[15:].abs().max()) < 0.05


@pytest.mark.quick
def test_what_a_model_computes_is_read_off_its_own_outputs() -> None:
    toy = made()
    for feature in (0, 12, 19):
        x = torch.zeros(2, 20)
        x[:, feature] = torch.tensor([0.75, -0.75])
        y = by_hand(toy.tuned, x)[:, feature]
        rise = float(y[0] - 0.75 - (y[1] + 0.75)) / 0.75
        assert float(computed_features(toy.tuned)[feature]) == pytest.approx(rise, abs=1e-4)


@pytest.mark.quick
def test_only_the_two_matrices_differ_and_the_pull_makes_the_change_smaller() -> None:
    toy = made()
    before, after = toy.base.state_dict(), toy.tuned.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{path}.weight" for path in toy.sites.values()}
    total = sum(float((after[k] - before[k]).double().square().sum()) for k in changed)
    size = sum(float(before[k].double().square().sum()) for k in changed)
    assert toy.relative_change() == pytest.approx((total / size) ** 0.5, rel=1e-5)
    assert 0.4 < toy.relative_change() < 0.6
    assert made(PULL).relative_change() < 0.75 * toy.relative_change()
    assert same(made(PULL).base, toy.base)


@pytest.mark.quick
def test_without_new_features_all_may_be_reverted_but_one_matrix_alone_may_not() -> None:
    toy = made()
    x = toy.sample(4_000, generator(0, "x"))
    unchanged = toy.without_new(4_000, generator(0, "x"))
    assert float(unchanged[:, 10:15].abs().max()) == 0 < float(x[:, 10:15].abs().max())
    assert torch.equal(unchanged[:, :10], x[:, :10])
    k0 = distance(toy.base(x), toy.tuned(x))
    assert distance(toy.base(unchanged), toy.tuned(unchanged)) < 0.02 * k0
    mixed = ResidMlp(
        toy.base.embedding,
        [(toy.base.layers[0].mlp_in.weight, toy.tuned.layers[0].mlp_out.weight)],  # pyright: ignore
    )
    assert distance(mixed(unchanged), toy.tuned(unchanged)) > 0.1 * k0


@pytest.mark.quick
def test_it_is_a_function_of_its_seed() -> None:
    config = replace(SHORT, steps=10, tuning_steps=10)
    before = torch.get_rng_state()
    with one_thread():
        one, again, other = (build(seed, PULL, config) for seed in (0, 0, 1))
    assert same(one.base, again.base)
    assert same(one.tuned, again.tuned)
    assert not same(one.base, other.base)
    assert not same(one.tuned, one.base)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for m in (one.base, one.tuned) for p in m.parameters())
    first, second = (one.sample(50, generator(0, "s")) for _ in range(2))
    assert torch.equal(first, second)
    assert 0.05 < float((first != 0).float().mean()) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_whole_toy_has_the_stated_figures(seed: int) -> None:
    with one_thread():
        free, pulled = build(seed), build(seed, PULL)
    assert 0.42 < free.relative_change() < 0.53
    assert 0.27 < pulled.relative_change() < 0.37
    for toy, reverted in ((free, 1e-3), (pulled, 2e-2)):
        assert float(computed_features(toy.base)[:10].min()) > 0.98
        assert float(computed_features(toy.tuned)[:15].min()) > 0.8
        x, z = toy.sample(20_000, generator(0, "x")), toy.without_new(20_000, generator(0, "z"))
        k0 = distance(toy.base(x), toy.tuned(x))
        assert distance(toy.base(z), toy.tuned(z)) < reverted * k0
