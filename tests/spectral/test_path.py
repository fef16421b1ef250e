"""Path attribution: completeness, a naive oracle, a planted carrier, a planted absence."""

from __future__ import annotations

import copy

import pytest
import torch

from mi_weightspace.core.readout import Readout
from mi_weightspace.models import toy
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.weights import ModuleSource
from mi_weightspace.spectral.path import REST, path_attribution, read_value, single_effects

pytestmark = pytest.mark.quick
PROMPTS = tuple(
    tuple(row)
    for row in torch.randint(4, 300, (6, 7), generator=torch.Generator().manual_seed(3)).tolist()
)
READOUT = Readout("yield", PROMPTS, yes=(17,))


def stages(*sites: str, scale: float = 0.05) -> tuple[TorchLens, TorchLens]:
    """A tiny model, and the same with noise added to the named matrices' modules."""
    before = TorchLens(toy.tiny_model("llama", seed=1))
    after = TorchLens(copy.deepcopy(before.model))
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for site in sites:
            weight = after.module(site).weight
            weight.add_(scale * torch.randn(weight.shape, generator=g))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return before, after


def attribute(before: TorchLens, after: TorchLens, n_nodes: int = 8):
    value = read_value(after, READOUT)
    return path_attribution(
        before,
        ModuleSource(before),
        ModuleSource(after),
        READOUT,
        value_after=value,
        n_nodes=n_nodes,
    )


def test_readout_is_the_mean_log_odds() -> None:
    lens = TorchLens(toy.tiny_model("gpt2"))
    logits = lens.model(torch.tensor(PROMPTS)).logits[:, -1].double()
    p = logits.softmax(-1)[:, 17]
    assert read_value(lens, READOUT) == pytest.approx(float((p / (1 - p)).log().mean()), rel=1e-5)


def test_shares_add_up_and_equal_a_naive_riemann_sum() -> None:
    before, after = stages("blocks.0.mlp.out", "blocks.1.attn.q")
    path = attribute(before, after)
    assert path.completeness_error < 1e-3
    site = before.sites("blocks.0.mlp.out")[0]
    old = {s: before.module(s).weight.clone() for s in ("blocks.0.mlp.out", "blocks.1.attn.q")}
    total = 0.0
    steps = 200
    for i in range(steps):
        model = copy.deepcopy(before)
        for name, weight in old.items():
            target = after.module(name).weight
            model.module(name).weight.data.copy_(weight + (i + 0.5) / steps * (target - weight))
        loss = READOUT.value(model.model(torch.tensor(PROMPTS)).logits[:, -1])
        (gradient,) = torch.autograd.grad(loss, [model.module(site).weight])
        total += float((gradient * (after.module(site).weight - old[site.name])).sum()) / steps
    share = dict(zip(path.sites, path.share.tolist(), strict=True))
    assert share[site.name] == pytest.approx(total, rel=1e-3)


def test_only_what_changed_has_a_share_and_singles_agree() -> None:
    before, after = stages("blocks.1.mlp.out")
    path = attribute(before, after)
    share = dict(zip(path.sites, path.share.tolist(), strict=True))
    assert share.pop("blocks.1.mlp.out") == pytest.approx(path.change, rel=1e-3)
    assert all(abs(v) < 1e-6 for v in share.values())
    added = single_effects(before, ModuleSource(after), READOUT, ["blocks.1.mlp.out"])
    assert added["blocks.1.mlp.out"] == pytest.approx(path.change, rel=1e-5)
    reverted = single_effects(after, ModuleSource(before), READOUT, ["blocks.0.mlp.out"])
    assert reverted["blocks.0.mlp.out"] == 0.0


def test_a_change_outside_every_matrix_lands_in_the_rest() -> None:
    before, after = stages()
    with torch.no_grad():
        after.model.model.norm.weight.mul_(1.2)
    path = attribute(before, after)
    share = dict(zip(path.sites, path.share.tolist(), strict=True))
    assert share[REST] == pytest.approx(path.change)
    assert path.change != 0.0
