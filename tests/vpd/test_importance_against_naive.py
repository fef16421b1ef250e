"""Every importance network against `naive_importance`, values and gradients, in float64."""

from __future__ import annotations

from typing import Any

import naive_importance
import pytest
import torch
from torch import Tensor, nn

from mi_weightspace.vpd.config import ImportanceConfig
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean, ModuleHost
from mi_weightspace.vpd.importance import Importance, make_importance

pytestmark = pytest.mark.quick
KINDS: dict[str, dict[str, Any]] = {
    "component_mlp": {"hidden": (5,)},
    "vector_mlp": {"hidden": (5,)},
    "layerwise_mlp": {"hidden": (7, 6)},
    "global_mlp": {"hidden": (9,)},
    "global_transformer": {"d_model": 8, "n_blocks": 2, "n_heads": 2, "d_mlp": 12},
    "chunk_transformer": {"d_model": 8, "n_blocks": 1, "n_heads": 2, "d_mlp": 12}
    | {"chunk_layers": 2, "causal": True},
}
WIDTHS = {"a": (6, 9), "b": (9, 7), "c": (7, 6)}
COUNTS = {"a": 4, "b": 3, "c": 5}
FINAL_NORM = True
"""A departure of the library from the published network: its head reads normed activations."""
LAYERS = {"a": 0, "b": 1, "c": 2}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (d_in, d_out) in WIDTHS.items():
            self.add_module(name, nn.Linear(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        for name in WIDTHS:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def made(kind: str) -> tuple[Importance, Clean, Factors]:
    draw = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        module = Chain().double().requires_grad_(False)
    host = ModuleHost(module, {name: name for name in WIDTHS})
    host.layers = dict(LAYERS)
    reads = {n: torch.randn(COUNTS[n], WIDTHS[n][0], generator=draw).double() for n in WIDTHS}
    writes = {n: torch.randn(COUNTS[n], WIDTHS[n][1], generator=draw).double() for n in WIDTHS}
    factors = Factors(host, reads, writes)
    clean = host.clean(torch.randn(2, 5, 6, generator=draw).double())
    network = make_importance(
        factors, clean, ImportanceConfig.model_validate({"kind": kind} | KINDS[kind]), 0
    )
    with torch.no_grad():  # biases start at 0, where a forgotten one would not show
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return network, clean, factors


def written_out(kind: str, network: Importance, clean: Clean, factors: Factors) -> Tensor:
    states = [dict(part.named_parameters()) for part in network.networks]
    inputs = clean.inputs
    if kind == "component_mlp":
        pairs = zip(states, WIDTHS, strict=True)
        inner = [(s, inputs[n] @ factors.reads[n].T) for s, n in pairs]
        return torch.cat([naive_importance.per_component(s, a) for s, a in inner], dim=-1)
    if kind in {"vector_mlp", "layerwise_mlp"}:
        f = naive_importance.per_component if kind == "vector_mlp" else naive_importance.mlp
        pairs = zip(states, WIDTHS, strict=True)
        return torch.cat([f(s, inputs[n]) for s, n in pairs], dim=-1)
    if kind == "global_mlp":
        return naive_importance.mlp(states[0], torch.cat([inputs[n] for n in WIDTHS], dim=-1))
    groups = [["a", "b", "c"]] if kind == "global_transformer" else [["a", "b"], ["c"]]
    causal = kind == "chunk_transformer"
    parts = [
        naive_importance.transformer(
            s, [inputs[n] for n in g], 2, causal=causal, final_norm=FINAL_NORM
        )
        for s, g in zip(states, groups, strict=True)
    ]
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_network_is_the_one_written_down(kind: str) -> None:
    network, clean, factors = made(kind)
    got, expected = network(clean, factors), written_out(kind, network, clean, factors)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    top = torch.randn(got.shape, generator=torch.Generator().manual_seed(4)).double()
    parameters = list(network.parameters())
    one = torch.autograd.grad(got, parameters, top, retain_graph=True)
    two = torch.autograd.grad(expected, parameters, top)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_only_a_causal_network_is_blind_to_the_future(causal: bool) -> None:
    network, clean, factors = made("global_transformer")
    for block in network.networks[0].blocks:  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        block.causal = causal
    before = network(clean, factors)
    last = {n: x.clone() for n, x in clean.inputs.items()}
    for x in last.values():
        x[:, -1] += 1
    after = network(Clean(clean.batch, last, clean.outputs, clean.output), factors)
    moved = (before - after).abs().amax((0, 2))
    assert moved[-1] > 1e-3
    assert (moved[:-1] > 1e-6).all() if not causal else not moved[:-1].any()
