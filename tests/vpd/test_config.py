"""What a decomposition refuses to be told, and what its first step is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import vpd_problems as problems
from torch import Tensor, nn

from mi_weightspace.core.errors import ConfigError, DivergedError, PromptError, SiteError
from mi_weightspace.vpd import train as loop
from mi_weightspace.vpd.config import VPDConfig, make_config, read_config
from mi_weightspace.vpd.factors import Factors, component_counts, initial_factors
from mi_weightspace.vpd.host import Clean, LensHost, ModuleHost
from mi_weightspace.vpd.losses import faithfulness
from mi_weightspace.vpd.objective import Losses, Objective
from mi_weightspace.vpd.state import latest
from mi_weightspace.vpd.stream import SampledStream, TokenStream, check_vocabulary
from mi_weightspace.vpd.train import METRICS, train, warm_up

pytestmark = pytest.mark.quick


# ---- keys and values ---------------------------------------------------------------------------
def one_term(**values: Any) -> dict[str, Any]:
    return {"reconstruction": [values]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"learning_rate": 1.0}, "learning_rate"),
    "unknown inner key": ({"minimality": {"gama": 1}}, r"minimality\.gama"),
    "unknown kind": ({"importance": {"kind": "magic"}}, r"importance\.kind"),
    "unknown source": (one_term(source="nobody"), r"reconstruction\.0\.source"),
    "unknown routing": (one_term(routing="none"), r"reconstruction\.0\.routing"),
    "unknown init": ({"init": "zeros"}, "init"),
    "unknown precision": ({"precision": "float16"}, "precision"),
    "unknown switch": ({"speed": {"warp": True}}, r"speed\.warp"),
    # out of range
    "no steps": ({"n_steps": 0}, "n_steps"),
    "negative rate": ({"lr": -1.0}, "lr"),
    "rate that ends above 1": ({"lr_end": 1.5}, "lr_end"),
    "no rows": ({"batch_size": 0}, "batch_size"),
    "clip of 0": ({"clip": 0}, "clip"),
    "weight of 0": (one_term(weight=0), r"reconstruction\.0\.weight"),
    "negative rider": (one_term(hidden_weight=-1), "hidden_weight"),
    "no draws": (one_term(n_samples=0), "n_samples"),
    "probability above 1": (one_term(routing="static_p", probability=1.1), "probability"),
    "start at the end": (one_term(start_fraction=1.0), "start_fraction"),
    "leak of 1": ({"importance": {"leak": 1.0}}, "leak"),
    "negative minimality": ({"minimality": {"weight": -1}}, r"minimality\.weight"),
    "gamma of 0": ({"minimality": {"gamma": [1.0, 0.0]}}, "gamma"),
    "p of 0": ({"minimality": {"form": "lp", "p": [2.0, 0.0]}}, "must be positive"),
    "anneal past the end": ({"minimality": {"anneal_until": 1.2}}, "anneal_until"),
    "half-life of 0": ({"minimality": {"ema_half_life": 0}}, "ema_half_life"),
    "negative faithfulness": ({"faithfulness": {"weight": -1}}, r"faithfulness\.weight"),
    "no components": ({"n_components": 0}, "at least one"),
    "no components somewhere": ({"n_components": {"*": 3, "a": 0}}, "at least one"),
    "no counts": ({"n_components": {}}, "at least one"),
    "no terms": ({"reconstruction": []}, "reconstruction is empty"),
    "no widths": ({"importance": {"hidden": []}}, "positive width"),
    "width of 0": ({"importance": {"hidden": [0]}}, "positive width"),
    "odd heads": (
        {"importance": {"kind": "global_transformer", "d_model": 12, "n_heads": 4}},
        "even multiple",
    ),
    # contradictions
    "two hidden layers of one": (
        {"importance": {"kind": "component_mlp", "hidden": [4, 4]}},
        "one hidden layer",
    ),
    "heads of an MLP": ({"importance": {"kind": "global_mlp", "n_heads": 2}}, "n_heads"),
    "hidden of a transformer": (
        {"importance": {"kind": "global_transformer", "hidden": [4]}},
        "hidden",
    ),
    "chunks of a global transformer": (
        {"importance": {"kind": "global_transformer", "chunk_layers": 2}},
        "chunk_layers",
    ),
    "gamma of lp": ({"minimality": {"form": "lp", "gamma": [1, 0.1]}}, "smooth_l0"),
    "frequency weight of lp": ({"minimality": {"form": "lp", "frequency_weight": 1}}, "smooth_l0"),
    "beta of smooth": ({"minimality": {"beta": 1.0}}, "lp"),
    "probability of a subset": (one_term(probability=0.3), "static_p"),
    "draws of an adversary": (one_term(source="persistent", n_samples=2), "n_samples"),
    "ascents of a draw": (one_term(pgd_steps=2), "fresh_pgd"),
    "rate of a draw": (one_term(lr=0.1), "kept sources"),
    "merged draw": (one_term(adversarial_fraction=0.5), "kept sources"),
    "merged fresh": (one_term(source="fresh_pgd", adversarial_fraction=0.5), "kept sources"),
    "sigmoid of a pool": (one_term(source="pooled", sigmoid=True), "persistent"),
    "scope of a draw": (one_term(scope="c"), "PGD sources"),
    "scope of a pool": (one_term(source="pooled", scope="c"), "PGD sources"),
    "particles of a persistent one": (one_term(source="persistent", particles=2), "pooled"),
    "repeat without its scope": (one_term(source="persistent", repeat=2), "scope='repeat'"),
    "layerwise adversary": (one_term(source="persistent", routing="layerwise"), "layerwise"),
    "layerwise rider": (one_term(routing="layerwise", hidden_weight=0.1), "hidden_weight"),
    "rate of no warm-up": ({"warmup_steps": 0, "warmup_lr": 0.1}, "warmup_lr"),
    "warm-up of an exact start": ({"init": "svd", "warmup_steps": 5}, "init='random'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """SPEC 30: by name; an idle key is refused as loudly as an unknown one."""
    values, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        make_config(values)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_for_its_stated_reason(name: str) -> None:
    """Without the offending keys, and with nothing else changed, the rest is accepted."""
    values, _ = REFUSED[name]
    allowed = {
        key: [{k: v for k, v in term.items() if k in {"source", "routing"}} for term in value]
        for key, value in values.items()
        if key == "reconstruction" and value
    }
    if any(word in name for word in ("unknown", "layerwise adversary")):
        allowed = {}
    make_config(allowed)


def test_a_configuration_survives_json() -> None:
    config = problems.toy_config(n_components={"linear1": 5, "*": 6}, seed=3)
    assert make_config(config.model_dump(mode="json", exclude_unset=True)) == config
    assert VPDConfig.model_validate_json(config.model_dump_json(exclude_unset=True)) == config


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_config({}).lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


# ---- files -------------------------------------------------------------------------------------
def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vpd.yaml"
    path.write_text("n_components: {'*.in': 7, '*': 3}\nminimality: {form: lp, p: [2, 0.5]}\n")
    config = read_config(path)
    assert config.n_components == {"*.in": 7, "*": 3}
    assert config.minimality.p == (2.0, 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: [1, 2", "a YAML file"),
        ("- lr\n- 3\n", "a mapping of keys to values"),
        ("", "NoneType"),
        ("lr: fast\n", "lr"),
        ("lrr: 1\n", "lrr"),
        ("n_steps: 1.5\n", "n_steps"),
    ],
)
def test_a_yaml_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """SPEC 30: with the name of the file."""
    path = tmp_path / "vpd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        read_config(path)
    assert str(path) in refused.value.subject


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        read_config(tmp_path / "none.yaml")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vpd.yaml"
    path.write_bytes(b"\xff\xfe\x00lr: 1")
    with pytest.raises(ConfigError, match="a YAML file"):
        read_config(path)


# ---- counts and ranks --------------------------------------------------------------------------
def test_counts_by_glob() -> None:
    """The first match counts; every glob must match and every site must be matched."""
    names = ("blocks.0.mlp.in", "blocks.0.mlp.out")
    config = make_config({"n_components": {"*.in": 5, "*": 2}})
    assert component_counts(config, names) == {"blocks.0.mlp.in": 5, "blocks.0.mlp.out": 2}
    with pytest.raises(ConfigError, match="matches no site"):
        component_counts(make_config({"n_components": {"*.attn": 5, "*": 2}}), names)
    with pytest.raises(ConfigError, match=r"no number for.*mlp\.out"):
        component_counts(make_config({"n_components": {"*.in": 5}}), names)


def test_fewer_components_than_the_rank_are_refused() -> None:
    """SPEC 31: the rank, not the smaller side, is the limit."""
    host = problems.toy_host()
    config = problems.toy_config(n_components={"linear1": 1, "*": 2})
    with pytest.raises(ConfigError, match="linear1") as refused:
        initial_factors(host, config)
    assert "at least 2" in refused.value.expected and "allow_unfaithful" in refused.value.remedy
    with torch.no_grad():
        weight: Any = host.module.get_submodule("down").weight
        weight[1] = 2 * weight[0]
    assert len(initial_factors(host, config).reads["linear1"]) == 1


def test_fewer_components_than_the_rank_are_accepted_on_request() -> None:
    """SPEC 31."""
    for more in ({"allow_unfaithful": True}, {"faithfulness": {"weight": 0.0}}):
        config = problems.toy_config(n_components=1, **more)
        assert initial_factors(problems.toy_host(), config).layout.sizes == (1, 1)


# ---- the first step ----------------------------------------------------------------------------
def wide_host() -> ModuleHost:
    """(7, 5) and (5, 7), full rank."""
    draw = torch.Generator().manual_seed(8)
    module = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return ModuleHost(module, {"a.mlp.in": "0", "a.mlp.out": "2"})


def made(init: str, count: int, **more: Any) -> Factors:
    values: dict[str, Any] = {"init": init, "n_components": count, **more}
    return initial_factors(wide_host(), make_config(values))


@pytest.mark.parametrize("init", ["svd", "aligned"])
@pytest.mark.parametrize("count", [7, 8, 20])
def test_exact_starts_are_exact(init: str, count: int) -> None:
    """SPEC 32: |Δ| ≤ 1e-6 |W| at step 0, with C equal to and above the number of coordinates."""
    factors = made(init, count)
    for name in factors.layout.names:
        left, weight = factors.remainder(name).detach(), factors.weights[name]
        assert float(left.norm()) <= 1e-6 * float(weight.norm())
        assert factors.reads[name].requires_grad and factors.reads[name].is_leaf


def test_the_spectral_start_is_exact_from_the_rank_on() -> None:
    """SPEC 32; and below it the best approximation of that rank."""
    factors = made("svd", 5)
    weight = factors.weights["a.mlp.in"]
    assert float(factors.remainder("a.mlp.in").detach().norm()) <= 1e-6 * float(weight.norm())
    few = made("svd", 2, allow_unfaithful=True)
    left = torch.linalg.svdvals(weight)[2:]
    missing = float(few.remainder("a.mlp.in").detach().norm())
    assert missing == pytest.approx(float(left.norm()), rel=1e-5)


def test_an_aligned_component_is_one_coordinate_of_the_nonlinearity() -> None:
    """SPEC 32: `mlp.in` writes one neuron, `mlp.out` reads one."""
    factors = made("aligned", 7)
    for axes in (factors.writes["a.mlp.in"], factors.reads["a.mlp.out"]):
        assert sorted(axes.detach().argmax(-1).tolist()) == list(range(7))
        assert torch.equal(axes.detach().sum(-1), torch.ones(7))
        assert int((axes != 0).sum()) == 7


def test_aligned_with_more_components_splits_coordinates_without_overlap() -> None:
    """SPEC 32."""
    factors = made("aligned", 20)
    read, write = (v["a.mlp.in"].detach() for v in (factors.reads, factors.writes))
    neuron = write.argmax(-1)
    for n in range(7):
        mine = read[neuron == n] != 0
        assert len(mine) in {2, 3}
        assert int(mine.sum(0).max()) <= 1


def test_aligned_with_fewer_components_samples_coordinates() -> None:
    """SPEC 32: what is there is exact, the other coordinates are not there at all."""
    factors = made("aligned", 3, allow_unfaithful=True)
    weight, left = factors.weights["a.mlp.in"], factors.remainder("a.mlp.in").detach()
    zero = [n for n in range(7) if torch.equal(left[n], torch.zeros(5))]
    assert len(zero) == 3
    assert all(torch.equal(left[n], weight[n]) for n in range(7) if n not in zero)


def test_random_starts_are_drawn_per_site_and_seed_and_warm_up_makes_them_faithful() -> None:
    one, same = made("random", 9), made("random", 9)
    other = made("random", 9, seed=1)
    assert torch.equal(one.reads["a.mlp.in"], same.reads["a.mlp.in"])
    assert not torch.equal(one.reads["a.mlp.in"], other.reads["a.mlp.in"])
    config = make_config({"n_components": 9, "warmup_steps": 300})
    before = float(faithfulness(one, config.faithfulness).detach())
    warm_up(one, config, progress=False)
    assert float(faithfulness(one, config.faithfulness).detach()) < 1e-3 * before
    assert all(p.grad is None for p in one.parameters())


# ---- sites and data ----------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["norm", "nowhere", "up.bias", ""])
def test_a_site_that_is_no_matrix_is_refused(path: str) -> None:
    module = nn.Module()
    module.norm, module.up = nn.LayerNorm(3), nn.Linear(3, 3)
    with pytest.raises(SiteError, match="expected an nn"):
        ModuleHost(module, {"site": path})


@pytest.mark.parametrize("pattern", ["blocks.0.ln_1", "blocks.7.*", "blocks.0.mlp.out.bias"])
def test_a_pattern_without_a_matrix_is_refused(pattern: str) -> None:
    with pytest.raises(SiteError):
        LensHost(problems.gpt2_host().lens, [pattern])


@pytest.mark.parametrize("bad", [-1, problems.VOCAB])
def test_tokens_out_of_the_vocabulary_are_refused_with_their_place(bad: int) -> None:
    tokens = problems.token_table(3)
    check_vocabulary(tokens, problems.VOCAB)
    tokens[2, 4] = bad
    with pytest.raises(PromptError, match=rf"row 2 column 4.*id {bad}"):
        check_vocabulary(tokens, problems.VOCAB)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.zeros(4, 3), "float32"),
        (torch.zeros(4, dtype=torch.long), "shape"),
        (torch.zeros(1, 3, dtype=torch.long), "1 rows"),
    ],
)
def test_a_table_that_is_none_is_refused(tokens: Tensor, says: str) -> None:
    with pytest.raises(PromptError, match=says):
        TokenStream(tokens, 2)


def test_every_row_comes_once_an_epoch_in_another_order_each() -> None:
    stream = TokenStream(torch.arange(6)[:, None], 2, 9)
    epochs = [torch.cat([stream.batch(3 * e + i) for i in range(3)]).flatten() for e in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(6)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(stream.batch(4), TokenStream(torch.arange(6)[:, None], 2, 9).batch(4))


def test_a_repeat_that_does_not_divide_the_batch_is_refused() -> None:
    term = {"source": "persistent", "routing": "all", "scope": "repeat", "repeat": 3}
    with pytest.raises(ConfigError, match="3 rows for a batch of 4"):
        train(
            problems.toy_host(),
            problems.toy_stream(),
            problems.toy_config(reconstruction=[term]),
            progress=False,
        )


# ---- not finite --------------------------------------------------------------------------------
def poisoned(step: int, poison: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `step` on, `poison` is done to the objective before it is evaluated."""
    call = Objective.__call__

    def evaluate(self: Objective, clean: Clean, at: int) -> Losses:
        if at == step:
            poison(self)
        return call(self, clean, at)

    monkeypatch.setattr(Objective, "__call__", evaluate)


def nan_write(objective: Objective) -> None:
    with torch.no_grad():
        objective.factors.writes["linear2"][0, 0] = math.nan


def nan_importance(objective: Objective) -> None:
    with torch.no_grad():
        for parameter in objective.importance.networks[-1].parameters():
            parameter[..., -1] = math.nan


@pytest.mark.parametrize(
    ("poison", "terms", "site"),
    [
        (nan_write, r"faithfulness, reconstruction\.0\.uniform", "linear2"),
        (nan_importance, r"minimality, reconstruction\.0\.uniform", "linear2"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Any, terms: str, site: str
) -> None:
    """SPEC 33: site and terms by name; the good checkpoint goes on to the undisturbed end."""
    problem = problems.toy_host(), problems.toy_stream(), problems.toy_config()
    whole = train(*problem, folder=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        poisoned(7, poison, patch)
        with pytest.raises(DivergedError, match=f"{terms}.*first site concerned: ({site})") as told:
            train(*problem, folder=tmp_path / "run", progress=False)
    assert told.value.subject == "step 7" and "resumed" in told.value.remedy
    newest = latest(tmp_path / "run")
    assert newest is not None and newest.name == "state-00000006"
    resumed = train(*problem, folder=tmp_path / "run", resume=True, progress=False)
    for name, value in whole.factors.named():
        assert torch.equal(dict(resumed.factors.named())[name], value)


class Spoilt:
    """Numbers until step 5."""

    def batch(self, step: int) -> Tensor:
        return problems.toy_stream().batch(step) * (math.nan if step == 5 else 1.0)


def test_data_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    """SPEC 33: nothing that is not finite reaches the log."""
    problem = problems.toy_host(), Spoilt(), problems.toy_config()
    with pytest.raises(DivergedError, match=r"step 5: .*reconstruction\.0\.uniform"):
        train(*problem, folder=tmp_path, progress=False)
    lines = (tmp_path / METRICS).read_text()
    assert lines.count("\n") == 5 and "NaN" not in lines


def test_a_gradient_that_is_not_finite_names_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """SPEC 33: before clipping, which would spread it over every site."""

    def spoil(objective: Objective) -> None:
        write = objective.factors.writes["linear2"]
        write.register_hook(lambda grad: torch.full_like(grad, math.inf))

    poisoned(3, spoil, monkeypatch)
    problem = problems.toy_host(), problems.toy_stream(), problems.toy_config()
    with pytest.raises(DivergedError, match=r"got grad_components not finite.*concerned: linear2"):
        train(*problem, progress=False)


def test_a_model_that_zero_masks_do_not_touch_has_no_unit() -> None:
    config = problems.toy_config(normalise="zero_mask")
    nothing = SampledStream(lambda n, _: torch.zeros(n, 5), 4)
    with pytest.raises(DivergedError, match="all-zero mask"):
        train(problems.toy_host(), nothing, config, progress=False)


# ---- schedules ---------------------------------------------------------------------------------
def test_the_rate_goes_from_one_to_its_end_at_the_last_step() -> None:
    """SPEC 19."""
    config = problems.toy_config(n_steps=11, lr_end=0.2)
    assert loop._cosine(0, config) == 1.0
    assert loop._cosine(5, config) == pytest.approx(0.6)
    assert loop._cosine(10, config) == pytest.approx(0.2)
