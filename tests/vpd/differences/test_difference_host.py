"""All masks off is the first stage, all on the last, whatever kind of parameter has changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.models.toy import save_tiny, tiny_model
from mi_weightspace.vpd.config import SpeedConfig, make_config
from mi_weightspace.vpd.differences.host import DifferenceHost
from mi_weightspace.vpd.differences.stages import host_of
from mi_weightspace.vpd.differences.updates import updates
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.masked import Masks

pytestmark = pytest.mark.quick

FAMILIES = ("gpt2", "llama", "gpt_neox", "phi3", "olmo2", "gemma2")
TOKENS = torch.randint(4, 300, (3, 7), generator=generator(0, "tokens"))


def tuned_from(model: Any, seed: int, *, vectors: bool = True) -> Any:
    """A copy with every matrix of its blocks moved, and their gains and biases where asked."""
    tuned, draw = copy.deepcopy(model), generator(seed, "tuned")
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if any(part in name for part in (".h.", "layers.")) and (p.ndim > 1 or vectors):
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    return tuned


def host(lineage: Lineage, sites: str = "blocks.*", **options: Any) -> DifferenceHost:
    settings = make_config({"sites": (sites,)})
    sources = {n: lineage.source(n) for n in lineage.stages}
    chosen = lineage.source(lineage.stages[-1]).sites(sites)
    names = [u.name for u in updates(sources, chosen)]
    return host_of(lineage, names, settings, options.pop("features", "tuned"))


PLAIN = SpeedConfig(written_attention=False, fused_activations=False)
"""The host's own operations, in which its own bits can be asked for."""


def masked(found: DifferenceHost, component: float, delta: float) -> Tensor:
    """The output with every component and every remainder at one value, random factors."""
    draw, c = generator(0, "factors"), 3
    reads = {n: torch.randn(c, found.weight(n).shape[1], generator=draw) for n in found.names}
    writes = {n: torch.randn(c, found.weight(n).shape[0], generator=draw) for n in found.names}
    factors = Factors(found, reads, writes)
    masks = Masks(
        torch.full((factors.layout.total,), component), torch.full((len(found.names),), delta)
    )
    with found.prepared(PLAIN), torch.no_grad():
        return found.forward(found.clean(TOKENS), factors.functions(masks, train=False))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_first_stage_and_on_the_last(family: str) -> None:
    """SPEC 34."""
    base = tiny_model(family)
    tuned = tuned_from(base, 1)
    lineage = Lineage({"base": base, "sft": tuned})
    found = host(lineage)
    with torch.no_grad():
        first, last = (lineage[s].forward(TOKENS) for s in ("base", "sft"))
    assert not close(first, last, 1e-2), "the stages must differ for this to say anything"
    assert close(masked(found, 1.0, 1.0), last, 3e-6)
    if family in {"gpt2", "llama", "gpt_neox", "phi3"}:  # no norm behind a matrix
        assert close(masked(found, 0.0, 0.0), first, 3e-6)
    else:  # a post-norm's gain is no matrix: it stays with the last stage, and shows as a gap
        assert not close(masked(found, 0.0, 0.0), first, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_alone_leave_no_gap(family: str) -> None:
    """SPEC 34."""
    base = tiny_model(family)
    lineage = Lineage({"base": base, "sft": tuned_from(base, 1, vectors=False)})
    with torch.no_grad():
        first = lineage["base"].forward(TOKENS)
    assert close(masked(host(lineage), 0.0, 0.0), first, 2e-6)


def test_linear_layers_are_the_first_stage_bit_for_bit() -> None:
    """SPEC 34."""
    base = tiny_model("llama")
    lineage = Lineage({"base": base, "sft": tuned_from(base, 1, vectors=False)})
    with torch.no_grad():
        first = lineage["base"].forward(TOKENS)
    assert torch.equal(masked(host(lineage), 0.0, 0.0), first)


def test_stages_in_a_row_share_a_matrix() -> None:
    """SPEC 34. Switching off only the second stage's updates gives the first tuned model."""
    base = tiny_model("llama")
    sft = tuned_from(base, 1)
    dpo = tuned_from(sft, 2)
    lineage = Lineage({"base": base, "sft": sft, "dpo": dpo})
    found = host(lineage)
    assert {n.partition("@")[2] for n in found.names} == {"sft", "dpo"}
    with torch.no_grad():
        middle = lineage["sft"].forward(TOKENS)
    off = {n: lambda _x, y: torch.zeros_like(y) for n in found.names if n.endswith("@dpo")}
    with found.prepared(SpeedConfig()), torch.no_grad():
        assert close(found.forward(found.clean(TOKENS), off), middle, 3e-6)


def test_an_adapter_is_decomposed_inside_its_own_spaces(tmp_path: Path) -> None:
    """SPEC 36."""
    peft = pytest.importorskip("peft")
    base = save_tiny("llama", tmp_path / "base")
    model = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    )
    draw = generator(0, "adapter")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    lineage = Lineage({"base": base, "sft": tmp_path / "adapter"})
    found = host(lineage)
    assert all(found.weight(n).shape == (3, 3) for n in found.names)
    with torch.no_grad():
        first = lineage["base"].forward(TOKENS)
        last = model.merge_and_unload()(TOKENS).logits
    assert close(masked(found, 0.0, 0.0), first) and close(masked(found, 1.0, 1.0), last, 3e-6)
    update = found.updates[found.names[0]]
    expected = lineage.diff("base", "sft").weight(update.site)
    assert close(update.dense(), expected, 1e-5)
    read, write = torch.eye(3), torch.eye(3)
    full_read, full_write = found.in_matrix(update.name, read, write)
    core = torch.einsum("co,cd,di->oi", full_write, update.core, full_read)
    assert close(core, expected, 1e-5)


def test_removing_mirrors_installing() -> None:
    """SPEC 35. Stages swapped: every update is the negative, on and off change places."""
    base = tiny_model("gpt2")
    tuned = tuned_from(base, 1, vectors=False)
    there = host(Lineage({"base": base, "sft": tuned}))
    back = host(Lineage({"sft": tuned, "base": base}))
    for one, other in zip(there.names, back.names, strict=True):
        assert torch.equal(there.weight(one), -back.weight(other))
    assert close(masked(there, 0.0, 0.0), masked(back, 1.0, 1.0), 2e-6)
    assert close(masked(there, 1.0, 1.0), masked(back, 0.0, 0.0), 2e-6)


def test_embeddings_are_matrices_too() -> None:
    """SPEC 34."""
    base = tiny_model("llama")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.model.embed_tokens.weight.add_(0.1)
        tuned.lm_head.weight.mul_(1.1)
    lineage = Lineage({"base": base, "sft": tuned})
    found = host(lineage, "*embed")
    assert [n.partition("@")[0] for n in found.names] == ["embed", "unembed"]
    with torch.no_grad():
        first, last = (lineage[s].forward(TOKENS) for s in ("base", "sft"))
    assert close(masked(found, 0.0, 0.0), first) and close(masked(found, 1.0, 1.0), last)


def test_the_network_can_read_what_changed_in_its_inputs() -> None:
    base = tiny_model("llama")
    lineage = Lineage({"base": base, "sft": tuned_from(base, 1)})
    found = host(lineage, features="tuned_and_change")
    name = "blocks.1.mlp.out@sft"
    clean = found.clean(TOKENS)
    captured = [
        lineage[s].run(TOKENS, capture=["blocks.1.mlp.out:in"]).captured["blocks.1.mlp.out:in"]
        for s in ("base", "sft")
    ]
    expected = torch.cat([captured[1], captured[1] - captured[0]], dim=-1)
    assert clean.features(name).shape[-1] == found.width(name)
    assert close(clean.features(name), expected, 1e-5)
