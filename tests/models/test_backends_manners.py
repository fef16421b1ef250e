"""What must hold on every backend alike: padding, modes, gradients, copies, hooks, messages."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from conformance import TOKENS, Oracle, close, untouched

from mi_weightspace.core.errors import (
    ArchitectureError,
    SiteError,
    WeightspaceError,
)
from mi_weightspace.models import toy
from mi_weightspace.models.lens import Edit
from mi_weightspace.models.load import load


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return toy.tiny_model("gpt2")


@pytest.fixture(scope="module")
def llama() -> Any:
    return toy.tiny_model("llama")


@pytest.fixture(scope="module", params=["torch", "bridge", "nnsight", "hooked_transformer"])
def theirs(request: pytest.FixtureRequest, gpt2: Any, tmp_path_factory: Any) -> Any:
    if request.param == "torch":
        return copy.deepcopy(gpt2)
    if request.param == "hooked_transformer":
        if not conformance.has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        return conformance.hooked_transformer(gpt2)
    make = {"bridge": conformance.bridge, "nnsight": conformance.language_model}[request.param]
    return make(gpt2, tmp_path_factory.mktemp("tokenizer"))


def test_left_padding_without_positions_would_misread_gpt2(gpt2: Any, theirs: Any) -> None:
    """Hugging Face's GPT-2 is wrong on a left-padded mask; every backend must be right."""
    tokens = torch.cat([torch.full((1, 3), 2), TOKENS[:1, :5]], 1)
    mask = (torch.arange(8) >= 3).long()[None]
    alone = Oracle(gpt2).run(TOKENS[:1, :5])["logits"]
    with torch.no_grad():
        naive = gpt2(tokens, attention_mask=mask).logits[:, 3:]
    assert not close(naive, alone, 1e-2)
    logits = load(theirs).run(tokens, attention_mask=mask).logits
    assert logits is not None and close(logits[:, 3:], alone)


def test_model_left_in_training_mode_runs_without_dropout_and_stays_so(theirs: Any) -> None:
    lens: Any = load(theirs)
    plain = lens.run(TOKENS).logits
    lens.root.train()
    modules = [m for m in lens.root.modules() if isinstance(m, torch.nn.Dropout)]
    for module in modules:
        module.p = 0.5
    assert torch.equal(lens.run(TOKENS).logits, plain)
    assert lens.root.training and all(m.training for m in modules)
    lens.root.eval()


def test_frozen_parameters_stay_frozen_and_no_gradient_is_left(theirs: Any) -> None:
    lens: Any = load(theirs)
    frozen = [p for i, p in enumerate(lens.root.parameters()) if i % 2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    weight = lens.weight("blocks.0.mlp.out").requires_grad_(True)
    with untouched(lens.root):
        bias = lens.bias("blocks.0.mlp.out")
        function = {"blocks.0.mlp.out": lambda x: torch.nn.functional.linear(x, weight, bias)}
        with lens.replaced(function):
            loss = lens.run(TOKENS, grad=True).logits.square().mean()
        assert float(torch.autograd.grad(loss, weight)[0].abs().max()) > 0
    for parameter in frozen:
        parameter.requires_grad_(True)


def test_weights_are_copies(theirs: Any) -> None:
    lens: Any = load(theirs)
    with untouched(lens.root):
        for site in lens.sites():
            lens.weight(site).zero_()
            for vector in (lens.bias(site), lens.read_gain(site), lens.write_gain(site)):
                if vector is not None:
                    vector.zero_()


def test_captures_under_no_grad_keep_no_graph(theirs: Any) -> None:
    run = load(theirs).run(TOKENS, capture=["resid_post.0", "blocks.1.mlp.out:in"])
    assert all(value.grad_fn is None for value in run.captured.values())
    kept = load(theirs).run(TOKENS, capture=["resid_post.0"], grad=True)
    assert kept.captured["resid_post.0"].grad_fn is not None


def test_the_users_hook_sees_the_replaced_output(gpt2: Any, theirs: Any) -> None:
    """And what the hook returns goes on: it comes after the matrix, replaced or not."""
    lens: Any = load(theirs)
    name = "blocks.0.mlp.out"
    module = lens._site_tap(lens.site(name), "out").module
    weight, bias = lens.weight(name), lens.bias(name)
    seen: list[torch.Tensor] = []

    def halve(_m: Any, _a: Any, out: torch.Tensor) -> torch.Tensor:
        seen.append(out.detach())
        return out / 2

    handle = module.register_forward_hook(halve)
    with lens.replaced({name: lambda x: 2 * torch.nn.functional.linear(x, weight, bias)}):
        logits = lens.run(TOKENS).logits
    handle.remove()
    plain = Oracle(gpt2).run(TOKENS)
    assert len(seen) == 1 and close(seen[0], 2 * plain[f"{name}:out"])
    assert close(logits, plain["logits"])


def test_a_bridges_hook_point_does_not_hide_the_matrix(gpt2: Any, tmp_path: Path) -> None:
    """A user's hook at `hook_mlp_out` comes after the matrix: loading still checks the matrix."""
    bridge = conformance.bridge(gpt2, tmp_path)
    bridge.add_hook("blocks.0.mlp.out.hook_out", lambda value, hook: 0 * value)
    name = "blocks.0.mlp.out"
    run = load(bridge).run(TOKENS, capture=[f"{name}:out"])
    assert close(run.captured[f"{name}:out"], Oracle(gpt2).run(TOKENS)[f"{name}:out"])
    with torch.no_grad():
        assert run.logits is not None and close(run.logits, bridge(TOKENS))


def test_a_hook_that_changes_a_matrixs_output_is_named_at_loading(gpt2: Any) -> None:
    model = copy.deepcopy(gpt2)
    handle = model.transformer.h[0].mlp.c_proj.register_forward_hook(lambda _m, _a, out: 2 * out)
    with pytest.raises(ArchitectureError, match="a hook that changes an output"):
        load(model)
    assert load(model, verify=False).run(TOKENS).logits is not None
    handle.remove()


def test_parametrised_matrix_is_read_and_run_as_it_is_computed(llama: Any) -> None:
    class Double(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = copy.deepcopy(llama)
    torch.nn.utils.parametrize.register_parametrization(
        model.model.layers[0].mlp.down_proj, "weight", Double()
    )
    lens = load(model)
    weight = lens.weight("blocks.0.mlp.out")
    assert torch.equal(weight, 2 * llama.model.layers[0].mlp.down_proj.weight)


def test_unknown_points_and_sites_are_named(theirs: Any) -> None:
    lens = load(theirs)
    for name in ("resid_post.7", "blocks.0.mlp.ou:in", "attn_pattern.0", "mlp_gate.0"):
        with pytest.raises(WeightspaceError, match=r"resid_post\.|blocks\.0\.mlp\.out"):
            lens.run(TOKENS, capture=[name])
    with pytest.raises(SiteError, match="output by input"):
        lens.with_edit(Edit(weights={"blocks.0.mlp.out": torch.zeros(96, 32)}))


def test_loading_warns_of_nothing_that_is_ours(theirs: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(theirs)
    assert not [w for w in caught if "mi_weightspace" in str(w.filename)]
