"""Every family on every backend against a plain Hugging Face model with its own bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import conformance
import pytest
import torch
from conformance import TOKENS, Oracle, close, untouched

from mi_weightspace.models import toy
from mi_weightspace.models.backends.hooks import HookedLens
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.lens import Edit
from mi_weightspace.models.load import load

BACKENDS = ("torch", "bridge", "nnsight", "hooked_transformer")


@dataclass(frozen=True)
class Case:
    oracle: Oracle
    lens: HookedLens
    facts: dict[str, torch.Tensor]
    backend: str

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.lens.sites()]


def build(family: str, backend: str, folder: Any, **config: Any) -> tuple[Any, Any]:
    """(plain model, the user's object over a copy of it)."""
    if family.startswith("olmo") and backend == "hooked_transformer":
        config["num_key_value_heads"] = 4  # its converter for OLMo knows no grouped queries
    model = toy.tiny_model(family, **config)
    if backend == "torch":
        return model, model
    if backend == "bridge":
        return model, conformance.bridge(model, folder)
    if backend == "nnsight":
        return model, conformance.language_model(model, folder)
    return model, conformance.hooked_transformer(model)


@pytest.fixture(
    scope="module",
    params=[f"{family}-{backend}" for family in toy.FAMILIES for backend in BACKENDS],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, backend = request.param.split("-")
    if backend == "hooked_transformer" and not conformance.has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model, theirs = build(family, backend, tmp_path_factory.mktemp("tokenizer"))
    oracle = Oracle(model)
    lens: Any = load(theirs)
    return Case(oracle, lens, oracle.run(TOKENS), backend)


def test_sites_matrices_biases_and_gains(case: Case) -> None:
    """Matrices bit for bit; a bias of zeros counts as none, for a library may fill one in."""
    assert set(case.names) == set(case.oracle.modules)
    assert case.lens.fingerprint == TorchLens(case.oracle.model).fingerprint or _rounded(case)
    for site in case.lens.sites():
        weight, expected = case.lens.weight(site), case.oracle.weight(site.name)
        assert weight.dtype == torch.float32
        if site.kind == "embed" and _rounded(case):
            assert close(weight, expected, 1e-7)
        else:
            assert torch.equal(weight, expected), site
        bias, theirs = case.lens.bias(site), case.oracle.bias(site.name)
        if bias is None:
            assert theirs is None or not theirs.any(), site
        else:
            assert theirs is not None and torch.equal(bias, theirs), site
        for side, mine in (
            ("read", case.lens.read_gain(site)),
            ("write", case.lens.write_gain(site)),
        ):
            gain = conformance.gain(case.oracle.model, site.name, side)
            assert (mine is None) == (gain is None), (site, side)
            assert mine is None or torch.equal(mine, gain), (site, side)
        shift, theirs = case.lens.read_shift(site), TorchLens(case.oracle.model).read_shift(site)
        assert (shift is None) == (theirs is None), site
        assert shift is None or theirs is None or torch.equal(shift, theirs), site


def _rounded(case: Case) -> bool:
    """A HookedTransformer stores Gemma's embedding times √d; untied, dividing rounds."""
    return case.backend == "hooked_transformer" and case.oracle.family.startswith("gemma")


def test_site_inputs_outputs_and_stream_points(case: Case) -> None:
    captures = [f"{name}:{side}" for name in case.names for side in ("in", "out")]
    captures += [str(point) for point in case.lens.points()]
    captures += [f"resid_pre.{layer}" for layer in range(2)]
    captures += ["attn_z.1", "mlp_hidden.0", "attn_q.0", "attn_v.1", "mlp_in.1"]
    alias = {
        "attn_z.1": "blocks.1.attn.o:in",
        "mlp_hidden.0": "blocks.0.mlp.out:in",
        "attn_q.0": "blocks.0.attn.q:out",
        "attn_v.1": "blocks.1.attn.v:out",
        "mlp_in.1": "blocks.1.mlp.in:out",
    }
    with untouched(case.lens.root):
        run = case.lens.run(TOKENS, capture=captures)
        early = case.lens.run(TOKENS, capture=captures[:-1], logits=False)
    assert early.logits is None and run.logits is not None
    assert close(run.logits, case.facts["logits"])
    for name in captures:
        assert close(run.captured[name].float(), case.facts[alias.get(name, name)].float()), name
        assert not run.captured[name].requires_grad, "a kept graph grows memory batch by batch"
    assert all(torch.equal(early.captured[n], run.captured[n]) for n in captures[:-1])


def test_edit_of_one_matrix_is_the_model_with_that_matrix(case: Case) -> None:
    chosen = [name for name in case.names if not name.startswith("blocks.0")]
    for name in chosen:
        old = case.lens.weight(name)
        new = old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1))
        expected = Oracle(case.oracle.with_weight(name, new)).run(TOKENS)["logits"]
        moved = float((expected - case.facts["logits"]).abs().max())
        assert moved > 1e-3, "an edit that nothing shows cannot test anything"
        with untouched(case.lens.root):
            edited = case.lens.with_edit(Edit(weights={name: new}))
            assert torch.equal(edited.weight(name), new)
            logits = edited.run(TOKENS).logits
            once = case.lens.run(TOKENS, edit=Edit(weights={name: new})).logits
        assert logits is not None and once is not None
        assert close(logits, expected), name
        assert torch.equal(logits, once)


def test_replacement_by_itself_keeps_the_logits_and_lets_gradients_through(case: Case) -> None:
    masks: dict[str, torch.Tensor] = {}

    def through(name: str) -> Any:
        weight, bias = case.lens.weight(name), case.lens.bias(name)
        masks[name] = torch.ones(weight.shape[0], requires_grad=True)
        return lambda x: torch.nn.functional.linear(x, weight, bias) * masks[name]

    sites = [name for name in case.names if name != "embed"]
    with untouched(case.lens.root):
        with case.lens.replaced({name: through(name) for name in sites}):
            logits = case.lens.run(TOKENS, grad=True).logits
        assert logits is not None
        assert close(logits.detach(), case.facts["logits"])
        loss = logits.square().mean()
        gradients = torch.autograd.grad(loss, list(masks.values()))
    assert all(float(g.abs().max()) > 0 for g in gradients)
    # each against the finite difference of the oracle: scale one output coordinate
    name, step = "blocks.0.mlp.out", 1e-2
    row = int(gradients[list(masks).index(name)].abs().argmax())
    ends = []
    for sign in (1, -1):
        matrix = case.oracle.weight(name).clone()
        model = case.oracle.with_weight(name, _scaled(matrix, row, 1 + sign * step))
        module = Oracle(model)
        bias = module.bias(name)
        if bias is not None:
            bias[row] *= 1 + sign * step
            with torch.no_grad():
                module.modules[name][0].bias.copy_(bias)
        ends.append(float(module.run(TOKENS)["logits"].double().square().mean()))
    slope = (ends[0] - ends[1]) / (2 * step)
    found = float(gradients[list(masks).index(name)][row])
    assert abs(found - slope) <= 0.02 * abs(slope) + 1e-4


def _scaled(matrix: torch.Tensor, row: int, factor: float) -> torch.Tensor:
    matrix[row] *= factor
    return matrix


def test_the_innermost_replacement_acts(case: Case) -> None:
    """Nested contexts: the inner one wins while it lasts, the outer one afterwards."""
    for name in ("blocks.0.attn.k", "blocks.1.attn.o", "blocks.1.mlp.in"):
        weight, bias = case.lens.weight(name), case.lens.bias(name)

        def use(factor: float, weight: Any = weight, bias: Any = bias) -> Any:
            return lambda x: torch.nn.functional.linear(x, factor * weight, bias)

        def seen(name: str = name) -> torch.Tensor:
            return case.lens.run(TOKENS, capture=[f"{name}:out"]).captured[f"{name}:out"]

        with case.lens.replaced({name: use(2.0)}):
            outer = seen()
            with case.lens.replaced({name: use(3.0)}):
                inner = seen()
            again = seen()
        zero = 0.0 if bias is None else bias
        plain = case.facts[f"{name}:out"] - zero
        assert close(outer - zero, 2 * plain) and close(inner - zero, 3 * plain)
        assert torch.equal(again, outer)
        assert close(seen(), case.facts[f"{name}:out"])


def test_stream_edits_reach_all_that_reads_the_point(case: Case) -> None:
    """Against the plain model with a vector added where the point is written."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    reference = TorchLens(case.oracle.model)
    for point in case.lens.points():
        edit = Edit(stream={str(point): lambda x: x + vector})
        capture = ["resid_post.1", str(point)]
        with untouched(case.lens.root):
            mine = case.lens.run(TOKENS, edit=edit, capture=capture)
        theirs = reference.run(TOKENS, edit=edit, capture=capture)
        assert mine.logits is not None and theirs.logits is not None
        assert close(mine.logits, theirs.logits), point
        assert close(mine.captured["resid_post.1"], theirs.captured["resid_post.1"]), point
        assert not close(theirs.logits, case.facts["logits"]), point
    block = case.oracle.blocks()[1]
    handle = block.register_forward_pre_hook(lambda _m, args: (args[0] + vector, *args[1:]))
    expected = case.oracle.run(TOKENS)["logits"]
    handle.remove()
    edit = Edit(stream={"resid_post.0": lambda x: x + vector})
    logits = case.lens.run(TOKENS, edit=edit).logits
    assert logits is not None and close(logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_prompt_alone(case: Case, side: str) -> None:
    short = TOKENS[1:, :4]
    pad = torch.full((1, 5), 2)
    row = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    tokens = torch.cat([TOKENS[:1], row])
    mask = (torch.arange(9) >= 5 if side == "left" else torch.arange(9) < 4).long()
    mask = torch.stack([torch.ones(9, dtype=torch.long), mask])
    points = [str(point) for point in case.lens.points()]
    alone = case.oracle.run(short)
    run = case.lens.run(tokens, attention_mask=mask, capture=points)
    span = slice(5, 9) if side == "left" else slice(0, 4)
    assert run.logits is not None
    assert close(run.logits[1:, span], alone["logits"])
    for name in points:
        assert close(run.captured[name][1:, span], alone[name]), name
        assert close(run.captured[name][:1], case.facts[name][:1]), name


def test_nothing_stays_behind_when_a_function_fails(case: Case) -> None:
    class Broken(Exception):
        pass

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise Broken

    with untouched(case.lens.root):
        with pytest.raises(Broken), case.lens.replaced({"blocks.1.attn.v": fail}):
            case.lens.run(TOKENS, capture=["resid_post.0"])
        with pytest.raises(Broken):
            case.lens.run(TOKENS, edit=Edit(stream={"resid_pre.1": fail}))
    logits = case.lens.run(TOKENS).logits
    assert logits is not None and close(logits, case.facts["logits"])
