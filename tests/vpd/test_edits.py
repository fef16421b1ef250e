"""Edits as values: an ablated model is the masked one, a rewritten one does what is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, DirectionError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.edits import ablated, rewritten
from mi_weightspace.vpd.masked import Masks
from tests.vpd.decomposed import language, parts_of, square_parts, tokens

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("site", ["blocks.0.attn.q", "blocks.0.mlp.in", "blocks.1.mlp.out"])
def test_an_ablated_model_is_the_model_with_those_masks_off(family: str, site: str) -> None:
    parts, lens, ids = parts_of(family), language(family), tokens(3, seed=2)
    before = lens.run(ids).logits
    edited = lens.with_edit(parts.ablate(site, [3, 17])).run(ids).logits
    objective = parts.objective
    start = objective.factors.layout.slices()[site].start
    mask = torch.ones(objective.sizes[0])
    mask[[start + 3, start + 17]] = 0
    ones = torch.ones(*ids.shape, objective.sizes[1])
    clean = objective.factors.host.clean(ids)
    with torch.no_grad():
        masked = objective.masked(clean, Masks(mask, ones), train=False)
    assert edited is not None and before is not None
    scale = float(before.abs().max())
    assert float((edited - masked).abs().max()) < 1e-6 * scale
    assert float((edited - before).abs().max()) > 1e-4 * scale  # it does something
    assert torch.equal(lens.run(ids).logits, before)  # pyright: ignore[reportArgumentType]


def naive_ablated(weight: Tensor, read: Tensor, write: Tensor, chosen: list[int]) -> Tensor:
    out = weight.double().clone()
    for c in chosen:
        for i in range(out.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] -= float(write[c, i]) * float(read[c, j])
    return out


def random_site() -> tuple[Tensor, Tensor, Tensor]:
    draw = generator(0, "edits")
    return tuple(torch.randn(s, generator=draw) for s in ((3, 4), (5, 4), (5, 3)))  # pyright: ignore[reportReturnType]


def test_ablation_by_hand() -> None:
    weight, read, write = random_site()
    expected = naive_ablated(weight, read, write, [1, 4])
    found = ablated(weight, read, write, [1, 4], "x")
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_rewritten_write_side_adds_the_new_vector_where_the_component_is_important(
    sign: float,
) -> None:
    """At an input with inner activation a of that sign, W'x − W₋ x = strength·‖write‖·|a|·û."""
    weight, read, write = random_site()
    x = torch.randn(4, generator=generator(1, "x"))
    x = x * sign * torch.sign(x @ read[2])
    new = torch.tensor([2.0, -1.0, 0.5])
    args: dict[str, Any] = {"strength": 1.5, "sign": sign, "subject": "x"}
    found = rewritten(weight, read, write, 2, new, "write", **args)
    without = naive_ablated(weight, read, write, [2])
    size = 1.5 * float(write[2].norm()) * abs(float(x @ read[2]))
    added = found.double() @ x.double() - without @ x.double()
    torch.testing.assert_close(added, size * new.double() / new.norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_rewritten_read_side_fires_on_the_new_vector_as_it_did(sign: float) -> None:
    """On input +r̂ it writes what it wrote at activations of that sign."""
    weight, read, write = random_site()
    new = torch.tensor([0.3, -2.0, 1.0, 0.0])
    args: dict[str, Any] = {"strength": 1.0, "sign": sign, "subject": "x"}
    found = rewritten(weight, read, write, 0, new, "read", **args)
    x = (new / new.norm()).double()
    added = found.double() @ x - naive_ablated(weight, read, write, [0]) @ x
    expected = sign * write[0].double() * float(read[0].norm())
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-5)


def test_the_sign_is_the_measured_one() -> None:
    parts, site = parts_of(), "blocks.1.mlp.out"
    table = parts.to_pandas("components").query("site == @site").set_index("component")
    vector = torch.randn(32, generator=generator(0, "new"))
    negative = int(table["important_activation"].idxmin())
    assert float(table["important_activation"].loc[negative]) < 0
    by_itself = parts.rewrite(site, negative, write=vector).weights[site]
    given = parts.rewrite(site, negative, write=vector, sign=-1).weights[site]
    other = parts.rewrite(site, negative, write=vector, sign=1).weights[site]
    assert torch.equal(by_itself, given)
    assert not torch.equal(by_itself, other)


def test_what_is_no_edit_is_refused() -> None:
    parts, site = parts_of(), "blocks.1.mlp.out"
    for components in ([40], [-1], [2, 2], []):
        with pytest.raises(ConfigError, match="from 0 to 39"):
            parts.ablate(site, components)
    vector = torch.ones(32)
    with pytest.raises(ConfigError, match="write=vector or read=vector"):
        parts.rewrite(site, 0)
    with pytest.raises(ConfigError, match="both sides"):
        parts.rewrite(site, 0, write=vector, read=torch.ones(96))
    for bad in (torch.ones(31), torch.zeros(32), torch.full((32,), float("nan"))):
        with pytest.raises(DirectionError, match="width 32"):
            parts.rewrite(site, 0, write=bad)
    with pytest.raises(ConfigError, match="sign"):
        parts.rewrite(site, 0, write=vector, sign=0.5)


def test_a_component_that_was_never_important_has_no_sign() -> None:
    toy = square_parts()
    table = toy.tables["components"].copy()
    table["important_activation"] = float("nan")
    import dataclasses

    silent = dataclasses.replace(toy, tables={**toy.tables, "components": table})
    silent = silent.with_objective(toy.objective)
    with pytest.raises(ConfigError, match="never important"):
        silent.rewrite("first", 0, write=torch.ones(3))
