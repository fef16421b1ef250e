"""The engine against `naive`: losses, gradients and every move of the adversaries, in float64.

Both get the same parameters and the same draws (the engine's draws are functions of seed and step
and are asked for again here). The engine runs on its backends; the oracle on plain modules.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import naive
import naive_step
import pytest
import torch
from naive import BySite
from naive_step import Draw, NaiveHost, Site, Term
from torch import Tensor, nn

from mi_weightspace.models import toy
from mi_weightspace.models.load import load
from mi_weightspace.vpd.config import VPDConfig, make_config
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean, Host, LensHost, ModuleHost
from mi_weightspace.vpd.importance import Importance, make_importance
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import Draws, Pool, Sources, draw_route
from mi_weightspace.vpd.state import RunState
from mi_weightspace.vpd.train import train_step

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import conformance  # pyright: ignore[reportMissingImports]

TOLERANCE = 1e-6
N_STEPS, STEP, COUNT = 40, 7, 5
TOKENS = torch.randint(4, 300, (2, 2, 5), generator=torch.Generator().manual_seed(3))
TERMS: dict[str, dict[str, Any]] = {
    "subset": {"source": "uniform", "routing": "uniform_k_subset"},
    "binomial": {"source": "binomial", "routing": "all", "n_samples": 2},
    "static": {"source": "uniform", "routing": "static_p", "probability": 0.4},
    "layerwise": {"source": "uniform", "routing": "layerwise", "weight": 1.5},
    "rider": {"source": "uniform", "routing": "all", "hidden_weight": 0.3},
    "fresh": {"source": "fresh_pgd", "routing": "uniform_k_subset", "pgd_steps": 3}
    | {"pgd_step_size": 0.15},
    "fresh shared": {"source": "fresh_pgd", "routing": "all", "pgd_steps": 2, "scope": "c"}
    | {"pgd_step_size": 0.2},
    "bsc": {"source": "persistent", "routing": "all", "lr": 0.03},
    "bc, sigmoid": {"source": "persistent", "routing": "all", "scope": "bc", "sigmoid": True}
    | {"lr": 0.2, "betas": [0.3, 0.9]},
    "sc, subset": {"source": "persistent", "routing": "uniform_k_subset", "scope": "sc"},
    "c, rider": {"source": "persistent", "routing": "all", "scope": "c", "hidden_weight": 0.2},
    "repeat": {"source": "persistent", "routing": "all", "scope": "repeat", "repeat": 1},
    "merged": {"source": "persistent", "routing": "all", "adversarial_fraction": 0.5},
    "pooled": {"source": "pooled", "routing": "all", "particles": 3, "lr": 0.05},
    "no warm-up": {"source": "persistent", "routing": "all", "n_warm": 0},
}
MINIMALITY: dict[str, dict[str, Any]] = {
    "smooth": {"ema_half_life": None},
    "averaged": {"ema_half_life": 3.0, "normalize_at_one": True, "weight": 0.02},
    "lp": {"form": "lp", "weight": 0.05},
}


def config_of(
    terms: list[str], minimality: str = "averaged", *, single: bool = True, **changes: Any
) -> VPDConfig:
    values: dict[str, Any] = {
        "n_components": COUNT,
        "allow_unfaithful": True,
        "n_steps": N_STEPS,
        "importance": {"hidden": [7]},
        "minimality": MINIMALITY[minimality],
        "reconstruction": [TERMS[name] for name in terms],
        "speed": {"single_backward": single, "prefix": False, "written_attention": False},
    }
    return make_config(values | changes)


@dataclass
class Pair:
    """The engine's objective and the oracle's view of the same problem."""

    objective: Objective
    host: Host
    oracle: NaiveHost

    @property
    def names(self) -> tuple[str, ...]:
        return self.objective.factors.layout.names


def pair_of(host: Any, oracle: NaiveHost, config: VPDConfig, batch: Tensor) -> Pair:
    draw = torch.Generator().manual_seed(11)
    reads, writes = {}, {}
    for name in host.names:
        d_out, d_in = host.weight(name).shape
        reads[name] = torch.randn(COUNT, d_in, generator=draw, dtype=torch.float64) / d_in**0.5
        writes[name] = torch.randn(COUNT, d_out, generator=draw, dtype=torch.float64) / 3
    factors = Factors(host, reads, writes).requires_grad_(True)
    network = make_importance(factors, host.clean(batch), config.importance, 5)
    with torch.no_grad():  # preactivations below 0, inside and above 1
        for name, parameter in network.named_parameters():
            if "bias" in name:
                parameter.add_(0.5)
    return Pair(Objective(factors, network, config, scale=1.7), host, oracle)


def split(pair: Pair, wide: Tensor) -> BySite:
    places = pair.objective.factors.layout.slices()
    return {name: wide[..., place] for name, place in places.items()}


def by_site(pair: Pair, wide: Tensor) -> BySite:
    return {name: wide[..., i] for i, name in enumerate(pair.names)}


def joined(pair: Pair, r: Tensor, d: Tensor) -> BySite:
    """The oracle's source tensors: components of a site, then its delta source."""
    components, deltas = split(pair, r), by_site(pair, d)
    return {n: torch.cat([components[n], deltas[n].unsqueeze(-1)], -1) for n in pair.names}


# ---- the engine's draws, asked for again -------------------------------------------------------
def uniform_draw(pair: Pair, at: int, pos: tuple[int, ...], step: int, *sample: int) -> Draw:
    objective = pair.objective
    config = objective.config.reconstruction[at]
    r, d = objective._uniform(config, pos, step, f"term{at}", *sample)
    if config.keeps_sources:
        route = draw_route(
            "uniform_k_subset", pos, len(pair.names), 1.0, objective.draws, f"term{at}", step, 0
        )
    else:
        route = objective._route(at, config, pos, step, *sample)
    bits = None if route is None else by_site(pair, route)
    return Draw(split(pair, r), by_site(pair, d), bits)


def term_of(pair: Pair, at: int, pos: tuple[int, ...], step: int, kept: Any) -> Term:
    objective, config = pair.objective, pair.objective.config.reconstruction[at]
    weight = config.weight / objective.scale
    if config.source == "fresh_pgd":
        return fresh_term(pair, at, pos, step, weight)
    if not config.keeps_sources:
        draws = [uniform_draw(pair, at, pos, step, s) for s in range(config.n_samples)]
        if config.routing == "layerwise":
            routes = naive.layerwise_routes(pos, len(pair.names))
            draws = [replace(d, route=by_site(pair, r)) for d in draws for r in routes]
        return Term("stochastic", weight, draws, hidden_weight=config.hidden_weight)
    term = Term("kept", weight, n_warm=config.n_warm, hidden_weight=config.hidden_weight)
    if config.source == "pooled":
        draw = objective.draws.generator(f"term{at}", "particle", step)
        index = objective.draws.uniform((pos[0],), draw) * config.particles
        term.pool, term.chosen = kept, [int(x) for x in index]
        return term
    term.sources = kept
    route = objective._route(at, config, pos, step)
    term.route = None if route is None else by_site(pair, route)
    if config.adversarial_fraction < 1:
        draw = objective.draws.generator(f"term{at}", "merge", step)
        noise = objective.draws.uniform((pos[0], *[1] * len(pos)), draw)
        term.adversarial = (noise < config.adversarial_fraction).flatten()
        term.draws = [uniform_draw(pair, at, pos, step)]
    return term


def fresh_term(pair: Pair, at: int, pos: tuple[int, ...], step: int, weight: float) -> Term:
    objective, config = pair.objective, pair.objective.config.reconstruction[at]
    shape = pos if config.scope == "bsc" else tuple(1 for _ in pos)
    draw = objective.draws.generator(f"term{at}", "source", step)
    whole = config.scope != "bsc"
    r, d = (objective.draws.uniform((*shape, k), draw, whole=whole) for k in objective.sizes)
    route = objective._route(at, config, pos, step)
    bits = None if route is None else by_site(pair, route)
    return Term(
        "fresh",
        weight,
        [Draw(split(pair, r), by_site(pair, d), bits)],
        pgd_steps=config.pgd_steps,
        pgd_step_size=config.pgd_step_size,
    )


def kept_of(pair: Pair, at: int, pos: tuple[int, ...]) -> naive.Sources | naive.Pool | None:
    """The oracle's copy of the engine's sources before their first step."""
    objective, config = pair.objective, pair.objective.config.reconstruction[at]
    if not config.keeps_sources:
        return None
    made = objective.adversaries.get(at, config, pos, objective.sizes, objective.draws, fused=True)
    lr = config.lr * min(1.0, ((STEP + 1) / N_STEPS) / config.lr_warmup)
    if isinstance(made, Pool):
        r, d = made.state["value"].clone().split(list(objective.sizes), dim=-1)
        count = torch.zeros(r.shape[:2], dtype=torch.long)
        return naive.Pool(joined(pair, r, d), lr, count, config.betas)
    r, d = (leaf.detach().clone() for leaf in made.leaves)
    return naive.Sources(joined(pair, r, d), lr, config.betas, config.sigmoid, config.scope)


# ---- comparison --------------------------------------------------------------------------------
def assert_same(engine: Tensor, oracle: Tensor, what: str, tolerance: float) -> None:
    assert engine.shape == oracle.shape, what
    size = float(oracle.norm())
    assert size > 0, f"{what}: nothing to compare"
    error = float((engine.detach().double() - oracle).norm()) / size
    assert error <= tolerance, f"{what}: {error:.1e}"


def importance_of(pair: Pair, network: Importance, batch: Tensor) -> Any:
    """The engine's network as a function of what the oracle saw."""

    def call(inputs: BySite) -> BySite:
        seen = dict(inputs)
        if "embed" in seen:  # a network reads what the embedding answers
            seen["embed"] = seen["embed"] @ pair.oracle.weights["embed"]
        clean = Clean(batch, seen, {}, batch)
        return split(pair, network(clean, pair.objective.factors))

    return call


def naive_minimality(config: VPDConfig, step: int) -> naive.Minimality:
    how = config.minimality
    done = min(1.0, step / (N_STEPS - 1) / how.anneal_until)
    return naive.Minimality(
        how.form,
        how.weight,
        how.frequency_weight,
        how.reference_count,
        how.gamma[0] + (how.gamma[1] - how.gamma[0]) * done,
        how.normalize_at_one,
        how.ema_half_life,
        how.p[0] + (how.p[1] - how.p[0]) * done,
        how.beta,
    )


def check(pair: Pair, batches: list[Tensor], pos: tuple[int, ...], tolerance: float) -> None:
    """Two steps without parameter updates: the second has moments, averages and counters."""
    objective, config = pair.objective, pair.objective.config
    number = len(config.reconstruction)
    kept: list[Any] = [kept_of(pair, at, pos) for at in range(number)]
    averages: BySite | None = None
    for i, batch in enumerate(batches):
        # the running average counts its own updates: its step is i
        step = STEP + i
        network = copy.deepcopy(objective.importance)
        factors = objective.factors
        params = {
            n: (factors.reads[n].detach().T.clone(), factors.writes[n].detach().clone())
            for n in pair.names
        }
        terms = [term_of(pair, at, pos, step, kept[at]) for at in range(number)]
        found = naive_step.naive_step(
            pair.oracle,
            params,
            importance_of(pair, network, batch),
            list(network.parameters()),
            batch,
            terms,
            naive_minimality(config, step),
            faith=(config.faithfulness.form, config.faithfulness.weight),
            averages=averages or None,
            step=i,
        )
        with pair.host.prepared(config.speed):
            losses = objective(pair.host.clean(batch), step)
        parameters = [*factors.parameters(), *objective.importance.parameters()]
        for parameter in parameters:
            parameter.grad = None
        losses.total.backward()
        losses.ascend((step + 1) / N_STEPS)
        compare_losses(pair, losses.terms, found, tolerance)
        assert_same(losses.total, found.total, "total", tolerance)
        for name, (v, u) in found.param_grads.items():
            read, write = factors.reads[name].grad, factors.writes[name].grad
            assert read is not None and write is not None
            assert_same(read, v.T, f"gradient of read {name}", tolerance)
            assert_same(write, u, f"gradient of write {name}", tolerance)
        flat = [p.grad.flatten() for p in objective.importance.parameters() if p.grad is not None]
        expected = torch.cat([g.flatten() for g in found.ci_grads])
        assert_same(torch.cat(flat), expected, "gradient of the importance network", tolerance)
        kept, averages = found.sources, found.averages
        for at in range(number):
            if kept[at] is not None:
                compare_sources(pair, objective.adversaries.kept[at], kept[at], tolerance)


def compare_losses(
    pair: Pair, terms: dict[str, Tensor], found: naive_step.Step, tolerance: float
) -> None:
    for name in ("faithfulness", "minimality"):
        assert_same(terms[name], found.losses[name], name, tolerance)
    for at, term in enumerate(pair.objective.config.reconstruction):
        key = f"reconstruction.{at}.{term.source}"
        assert_same(terms[key], found.losses[f"recon.{at}"], key, tolerance)


def compare_sources(pair: Pair, engine: Sources | Pool, oracle: Any, tolerance: float) -> None:
    sizes = list(pair.objective.sizes)
    if isinstance(engine, Pool):
        r, d = engine.state["value"].split(sizes, dim=-1)
        assert torch.equal(engine.state["step"].long(), oracle.count)
    else:
        r, d = engine.leaves
    for name, value in joined(pair, r.detach(), d.detach()).items():
        error = float((value - oracle.value[name]).abs().max())
        assert error <= tolerance, f"source of {name}: {error:.1e}"


# ---- the objective on a toy and on one model, term by term -------------------------------------
class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def toy_pair(config: VPDConfig) -> tuple[Pair, list[Tensor]]:
    module = TwoLayers().double()
    other = copy.deepcopy(module)
    sites = {"one": Site(other.one), "two": Site(other.two)}
    host = ModuleHost(module.requires_grad_(False), {"one": "one", "two": "two"})
    batch = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return pair_of(host, NaiveHost(other, sites, "mse"), config, batch[0]), list(batch)


@pytest.mark.quick
@pytest.mark.parametrize("name", TERMS)
def test_each_term_on_a_toy(name: str) -> None:
    pair, batches = toy_pair(config_of([name]))
    check(pair, batches, (4,), TOLERANCE)


@pytest.mark.quick
@pytest.mark.parametrize("minimality", MINIMALITY)
@pytest.mark.parametrize("single", [True, False])
def test_each_penalty_and_either_way_of_the_last_ascent(minimality: str, single: bool) -> None:
    form = "param_mean" if single else "relative"
    faith = {"form": form, "weight": 3.0}
    config = config_of(["subset", "bsc"], minimality, single=single, faithfulness=faith)
    pair, batches = toy_pair(config)
    check(pair, batches, (4,), TOLERANCE)


@pytest.mark.quick
def test_training_steps_move_the_parameters_as_written() -> None:
    """Clip, cosine to a tenth, AdamW: three steps of `train_step` on changing batches."""
    config = config_of(["bsc"], "smooth", n_steps=4, lr=0.02, importance_lr=0.03, clip=0.05)
    pair, batches = toy_pair(config)
    objective, factors = pair.objective, pair.objective.factors
    network = objective.importance
    groups = {"components": factors.parameters(), "importance": list(network.parameters())}
    made = [torch.optim.AdamW(g, weight_decay=0, fused=True) for g in groups.values()]
    state = RunState(objective, made[0], made[1])
    ours = {k: [p.detach().clone() for p in g] for k, g in groups.items()}
    adam: dict[str, dict[str, Any]] = {k: {} for k in groups}
    for step in range(3):
        batch = batches[step % 2]
        before = {k: [p.detach().clone() for p in g] for k, g in groups.items()}
        for key, group in before.items():
            for a, b in zip(group, ours[key], strict=True):
                assert_same(a, b, f"step {step}, {key}", TOLERANCE)
        torch_grads = _unclipped(objective, pair.host.clean(batch), step, groups)
        _losses, norms = train_step(state, pair.host.clean(batch))
        for key, bound, peak in (("components", 0.05, 0.02), ("importance", 1.0, 0.03)):
            grads = torch_grads[key]
            size = sum(float(g.square().sum()) for g in grads) ** 0.5
            assert abs(norms[f"grad_{key}"] - size) < 1e-9 * size
            lr = naive.cosine_lr(peak, step, 4)
            ours[key], adam[key] = naive.adamw(
                ours[key], naive.clipped(grads, bound), adam[key], lr
            )
    for key, group in groups.items():
        for a, b in zip(group, ours[key], strict=True):
            assert_same(a, b, key, TOLERANCE)


def _unclipped(
    objective: Objective, clean: Clean, step: int, groups: dict[str, list[Any]]
) -> dict[str, list[Tensor]]:
    """Gradients of the total on a copy, so that the sources of the run stay where they are."""
    twin = copy.deepcopy(objective.adversaries)
    kept, objective.adversaries = objective.adversaries, twin
    losses = objective(clean, step)
    flat = [p for group in groups.values() for p in group]
    found = iter(torch.autograd.grad(losses.total, flat))
    objective.adversaries = kept
    return {key: [next(found) for _ in group] for key, group in groups.items()}


@pytest.mark.quick
def test_draws_have_the_distributions_written_down() -> None:
    """The comparisons take the engine's own draws, so their law is tested by itself."""
    draws, pos, sites = Draws(3, torch.device("cpu"), torch.float32), (60, 100), 4
    route = draw_route("uniform_k_subset", pos, sites, 0.5, draws, "law")
    assert route is not None
    share = torch.bincount(route.sum(-1).flatten(), minlength=5) / 6000
    assert share[0] == 0 and float((share[1:] - 0.25).abs().max()) < 0.03
    single = route[route.sum(-1) == 1].float().mean(0)
    assert float((single - 0.25).abs().max()) < 0.05
    static = draw_route("static_p", pos, sites, 0.3, draws, "law")
    assert static is not None and abs(float(static.float().mean()) - 0.3) < 0.02
    assert draw_route("all", pos, sites, 0.5, draws, "law") is None
    config = config_of(["binomial", "merged", "pooled"])
    pair, _ = toy_pair(config)
    r, d = pair.objective._uniform(config.reconstruction[0], (500,), 0, "term0", 0)
    assert set(r.unique().tolist()) == set(d.unique().tolist()) == {0.0, 1.0}
    assert abs(float(r.mean()) - 0.5) < 0.05
    r, d = pair.objective._uniform(config.reconstruction[1], (500,), 0, "term1")
    for one in (r, d):
        assert abs(float(one.mean()) - 0.5) < 0.05 and abs(float(one.var()) - 1 / 12) < 0.01
    again, _ = pair.objective._uniform(config.reconstruction[1], (500,), 1, "term1")
    assert abs(float(torch.corrcoef(torch.stack([r.flatten(), again.flatten()]))[0, 1])) < 0.1


def language_pair(
    family: str,
    backend: str,
    config: VPDConfig,
    folder: Path,
    *,
    edges: bool = False,
    second_of_two: bool = False,
) -> Pair:
    # a quarter of NeoX's head is rotary: at least a pair of coordinates
    width, layers = 32 if family == "gpt_neox" else 16, 2 if second_of_two else 1
    model = toy.tiny_model(family, n_layers=layers, d_model=width)
    oracle = naive_step.hf_host(copy.deepcopy(model), edges=edges)
    user = {
        "torch": lambda: copy.deepcopy(model).double(),
        "bridge": lambda: conformance.bridge(model.double(), folder),
        "nnsight": lambda: conformance.language_model(model.double(), folder),
        "hooked_transformer": lambda: conformance.hooked_transformer(model).to(torch.float64),
    }[backend]()
    sites = "*" if edges else "blocks.1.*" if second_of_two else "blocks.*"
    if second_of_two:
        kept = {n: s for n, s in oracle.sites.items() if n.startswith("blocks.1.")}
        oracle = NaiveHost(oracle.model, kept)
    host = LensHost(load(user, verify=False), sites)
    return pair_of(host, oracle, config, TOKENS[0])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["subset", "fresh", "bsc", "merged"])
def test_terms_on_a_language_model(name: str, tmp_path: Path) -> None:
    pair = language_pair("gpt2", "torch", config_of([name]), tmp_path)
    check(pair, list(TOKENS), (2, 5), TOLERANCE)


SWITCHES = ["prefix", "joint_forward", "written_attention", "fused_activations", "fast_float32"]


@pytest.mark.parametrize("switch", [*SWITCHES, "all", "none"])
def test_speed_switches_change_no_number(switch: str, tmp_path: Path) -> None:
    on = dict.fromkeys(SWITCHES, switch == "all") | ({switch: True} if switch in SWITCHES else {})
    config = config_of(["subset", "static", "bsc", "merged", "pooled"], speed=on)
    pair = language_pair("gpt2", "torch", config, tmp_path, second_of_two=True)
    check(pair, list(TOKENS), (2, 5), TOLERANCE)


ALL = ["subset", "layerwise", "rider", "fresh", "bsc", "merged", "pooled", "c, rider"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("backend", ["torch", "bridge", "nnsight", "hooked_transformer"])
def test_whole_objective_on_every_backend(family: str, backend: str, tmp_path: Path) -> None:
    if backend == "hooked_transformer" and not conformance.has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    pair = language_pair(family, backend, config_of(ALL), tmp_path)
    check(pair, list(TOKENS), (2, 5), TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_embedding_and_unembedding(family: str, tmp_path: Path) -> None:
    config = config_of(["subset", "bsc"])
    pair = language_pair(family, "torch", config, tmp_path, edges=True)
    assert {"embed", "unembed"} <= set(pair.names)
    check(pair, list(TOKENS), (2, 5), TOLERANCE)
