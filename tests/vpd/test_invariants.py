"""The invariants of ``vpd/SPEC.md`` that need no oracle; and that each has a test."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import vpd_problems as problems
from torch import Tensor

from mi_weightspace.vpd import config as settings
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Host
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Losses, Objective
from mi_weightspace.vpd.sources import lifted
from mi_weightspace.vpd.stream import Stream
from mi_weightspace.vpd.train import start, train

SPEC = Path(settings.__file__).with_name("SPEC.md")
HERE = Path(__file__).parent
POS = {"toy": (4,), "gpt2": (2, problems.TOKENS)}


def problem(name: str, **changes: Any) -> tuple[Host, Stream, VPDConfig]:
    if name == "toy":
        return problems.toy_host(), problems.toy_stream(), problems.toy_config(**changes)
    return problems.gpt2_host(), problems.token_stream(), problems.gpt2_config(**changes)


def objective_of(name: str, **changes: Any) -> tuple[Objective, Any]:
    host, stream, config = problem(name, **changes)
    clean = host.clean(stream.batch(0))
    return start(host, clean, config).objective, clean


def full(objective: Objective, pos: tuple[int, ...], m: float, d: float) -> Masks:
    components, sites = objective.sizes
    return Masks(torch.full((*pos, components), m), torch.full((*pos, sites), d))


# ---- the masked forward pass -------------------------------------------------------------------
@pytest.mark.parametrize("name", POS)
def test_everything_on_or_not_routed_is_the_host_bit_for_bit(name: str) -> None:
    """SPEC 1."""
    objective, clean = objective_of(name)
    expected = objective.factors.host.forward(clean, {}).detach()
    masks = full(objective, POS[name], 1.0, 1.0)
    assert torch.equal(objective.masked(clean, masks), expected)
    off = full(objective, POS[name], 0.3, 0.1)
    nowhere = torch.zeros(*POS[name], objective.sizes[1], dtype=torch.bool)
    unrouted = Masks(off.component, off.delta, nowhere)
    assert torch.equal(objective.masked(clean, unrouted), expected)
    changed = objective.masked(clean, off).detach()
    assert float((changed - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", POS)
def test_the_parts_of_a_site_sum_to_what_the_matrix_does(name: str) -> None:
    """SPEC 2: the components' share, the remainder's share and the bias; each is its own."""
    objective, clean = objective_of(name)
    factors = objective.factors
    for site in factors.layout.names:
        weight, bias = factors.weights[site], factors.biases[site]
        parts = factors.writes[site].T @ factors.reads[site]
        assert torch.allclose(parts + factors.remainder(site), weight, atol=1e-6)
        x, y = clean.inputs[site], clean.outputs[site]
        base = torch.zeros_like(y) if bias is None else bias.expand_as(y)

        def answer(m: float, d: float, *, site: str = site, x: Tensor = x, y: Tensor = y) -> Tensor:
            masks = full(objective, POS[name], m, d)
            return factors.functions(masks)[site](x, y).detach()

        assert torch.allclose(answer(1, 0), base + (x @ parts.T), atol=1e-4)
        assert torch.allclose(answer(0, 1), base + x @ factors.remainder(site).T, atol=1e-4)
        assert torch.allclose(answer(0, 0), base, atol=1e-4)
        assert torch.allclose(answer(1, 0) + answer(0, 1) - base, y, atol=1e-4)


def test_the_remainder_is_never_formed_in_a_masked_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPEC 3: faithfulness alone asks for it, once a site and step."""
    asked: list[str] = []
    original = Factors.remainder

    def noted(self: Factors, name: str) -> Tensor:
        asked.append(name)
        return original(self, name)

    objective, clean = objective_of("toy")
    monkeypatch.setattr(Factors, "remainder", noted)
    objective(clean, 0).total.backward()
    assert asked == ["linear1", "linear2"]


def test_masks_lie_between_the_importance_and_one() -> None:
    """SPEC 4."""
    draw = torch.Generator().manual_seed(0)
    low, source = (torch.rand(50, 9, generator=draw) for _ in range(2))
    masks = lifted(low, source)
    assert bool((masks >= low).all()) and bool((masks <= 1).all())
    assert torch.equal(lifted(torch.ones(3), torch.rand(3, generator=draw)), torch.ones(3))
    assert torch.equal(lifted(torch.zeros(9), source[0]), source[0])
    assert torch.allclose(masks, low + (1 - low) * source, atol=1e-6)


# ---- losses ------------------------------------------------------------------------------------
def test_no_gradient_reaches_the_model_or_its_clean_output() -> None:
    """SPEC 7, 18: within a loop; afterwards the model is as it was."""
    host, stream, config = problem("gpt2", n_steps=2)
    root: Any = problems_root(host)
    before = {k: v.clone() for k, v in root.state_dict().items()}
    wanted = {k: p.requires_grad for k, p in root.named_parameters()}
    root.train()
    train(host, stream, config, progress=False)
    assert root.training
    assert {k: p.requires_grad for k, p in root.named_parameters()} == wanted
    assert all(p.grad is None for p in root.parameters())
    assert all(torch.equal(v, before[k]) for k, v in root.state_dict().items())


def problems_root(host: Any) -> Any:
    return host.lens.root


def test_what_can_be_driven_to_zero_is_no_loss() -> None:
    """SPEC 10: importances as masks, rounded or not, are monitors."""
    sources = set(get_args(settings.Source))
    assert sources == {"uniform", "binomial", "fresh_pgd", "persistent", "pooled"}


def test_losses_are_float32_in_bfloat16_runs() -> None:
    """SPEC 11; and the masked passes are not."""
    seen: list[torch.dtype] = []
    objective, clean = objective_of("gpt2", precision="bfloat16")
    exact, _ = objective_of("gpt2")
    host: Any = objective.factors.host
    forward = host.forward

    def noted(*args: Any) -> Tensor:
        seen.append(forward(*args).dtype)
        return forward(*args)

    host.forward = noted
    with host.prepared(objective.config.speed):
        losses, expected = objective(clean, 0), exact(clean, 0)
    assert set(seen) == {torch.bfloat16}
    assert losses.total.dtype == torch.float32
    assert {v.dtype for v in losses.terms.values()} == {torch.float32}
    for key in ("faithfulness", "minimality"):
        assert torch.equal(losses.terms[key], expected.terms[key])
    key = "reconstruction.0.uniform"
    assert float(losses.terms[key]) == pytest.approx(float(expected.terms[key]), rel=0.1)


# ---- adversaries -------------------------------------------------------------------------------
def evaluated(objective: Objective, clean: Any, step: int) -> Losses:
    losses = objective(clean, step)
    losses.total.backward()
    losses.ascend((step + 1) / objective.config.n_steps)
    return losses


def moves(objective: Objective, clean: Any) -> list[Tensor]:
    evaluated(objective, clean, 5)
    kept = objective.adversaries.kept
    return [v.detach().clone() for at in kept for v in kept[at].named().values()]


def test_one_bundle_of_sources_feeds_one_term() -> None:
    """SPEC 12: two equal terms keep bundles of their own, drawn and moved apart."""
    objective, clean = objective_of(
        "toy", reconstruction=[problems.KEPT["bsc"], problems.KEPT["bsc"]]
    )
    evaluated(objective, clean, 5)
    one, two = (objective.adversaries.kept[at].leaves for at in (0, 1))
    assert one[0] is not two[0]
    assert float((one[0] - two[0]).detach().abs().max()) > 0.1


@pytest.mark.parametrize("kind", problems.KEPT)
@pytest.mark.parametrize("single", [True, False])
def test_adversaries_climb_the_unweighted_term(kind: str, single: bool) -> None:
    """SPEC 13: whatever the weight of their term, its unit, and the other terms. (Adam is nearly
    blind to a factor; its second moment, which is compared too, is not.)"""
    found = []
    for weight, scale, more in [(0.5, 1.0, []), (64.0, 0.25, []), (0.5, 1.0, [{"weight": 3.0}])]:
        term = problems.KEPT[kind] | {"weight": weight, "start_fraction": 0.0}
        objective, clean = objective_of(
            "toy", reconstruction=[term, *more], speed={"single_backward": single}
        )
        objective.scale = scale
        found.append(moves(objective, clean))
    assert len(found[0]) >= 4
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-9)


def test_ascents_reach_sources_alone() -> None:
    """SPEC 14: an evaluation without the backward pass of its total leaves no gradient."""
    objective, clean = objective_of("toy", reconstruction=[*problems.KEPT.values()])
    objective(clean, 5)
    assert all(p.grad is None for p in objective.factors.parameters())
    assert all(p.grad is None for p in objective.importance.parameters())


def test_the_last_ascent_sees_the_parameters_before_the_update() -> None:
    """SPEC 15: moving the parameters between the backward pass and the ascent changes nothing."""
    found = []
    for disturbed in (False, True):
        objective, clean = objective_of("toy")
        losses = objective(clean, 5)
        losses.total.backward()
        if disturbed:
            with torch.no_grad():
                for parameter in objective.factors.parameters():
                    parameter.add_(1.0)
        losses.ascend(0.5)
        found.append(objective.adversaries.kept[1].leaves[0].detach().clone())
    assert torch.equal(found[0], found[1])


def test_the_warm_up_ascents_route_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPEC 16: also where the loss of the term routes subsets or merges."""
    routes: list[bool] = []
    original = Objective.masked

    def noted(self: Objective, clean: Any, masks: Masks, **options: Any) -> Tensor:
        routes.append(masks.route is None)
        return original(self, clean, masks, **options)

    monkeypatch.setattr(Objective, "masked", noted)
    subset = {"source": "persistent", "routing": "uniform_k_subset", "n_warm": 3}
    for term in (subset, problems.KEPT["merged"] | {"n_warm": 3}):
        routes.clear()
        objective, clean = objective_of("toy", reconstruction=[term])
        objective(clean, 5)
        assert routes == [True, True, True, False]


def test_draws_are_functions_of_seed_purpose_and_step() -> None:
    """SPEC 17."""
    objective, clean = objective_of("toy", reconstruction=[{"source": "uniform"}])
    key = "reconstruction.0.uniform"
    with torch.no_grad():
        one, two, other = (objective(clean, step).terms[key] for step in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)
    seeded, clean = objective_of("toy", reconstruction=[{"source": "uniform"}], seed=9)
    seeded.factors, seeded.importance = objective.factors, objective.importance
    assert not torch.equal(seeded(clean, 3).terms[key], one)


# ---- the document ------------------------------------------------------------------------------
def test_every_invariant_is_cited_by_the_tests_it_names() -> None:
    """Each numbered line names its tests; each exists; each of ours says the number."""
    items = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^#|\Z)", SPEC.read_text(), re.M | re.S)
    assert [int(n) for n, _ in items] == list(range(1, len(items) + 1))
    cited: set[int] = set()
    for path in HERE.rglob("test_*.py"):
        for found in re.findall(r"SPEC ((?:\d+(?:–\d+)?(?:, )?)+)", path.read_text()):
            for part in found.strip(", ").split(", "):
                first, _, last = part.partition("–")
                cited |= set(range(int(first), int(last or first) + 1))
    assert cited <= {int(n) for n, _ in items}
    for number, text in items:
        tests = re.findall(r"`((?:differences/)?test_\w+)\.py::(test_\w+)`", text)
        assert tests, f"invariant {number} names no test"
        for file, name in tests:
            assert f"def {name}(" in (HERE / f"{file}.py").read_text(), (number, file, name)
