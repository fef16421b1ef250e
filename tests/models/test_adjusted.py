"""`Lens.adjusted` and `Lens.forward` against hooks written by hand on a plain model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import conformance
import pytest
import torch
from conformance import TOKENS, Oracle, untouched
from torch import Tensor
from torch.nn.functional import linear

from mi_weightspace.core.errors import SiteError
from mi_weightspace.models import toy
from mi_weightspace.models.lens import Edit
from mi_weightspace.models.load import load

OTHERS = {
    "bridge": ("gpt2", "gpt_neox", "llama", "gemma2", "phi3"),
    "nnsight": ("gpt2", "gpt_neox", "gemma2", "phi3"),
    "hooked_transformer": ("gpt2", "gpt_neox", "llama", "gemma2"),
}
CASES = [("torch", family) for family in toy.FAMILIES]
CASES += [(backend, family) for backend, families in OTHERS.items() for family in families]
Function = Callable[[Tensor, Tensor], Tensor]


def build(backend: str, family: str, folder: Any) -> tuple[Any, Any]:
    """(plain model, lens over a copy of it)."""
    model = toy.tiny_model(family)
    if backend == "torch":
        return model, load(model)
    if backend == "hooked_transformer":
        if not conformance.has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        return model, load(conformance.hooked_transformer(model))
    make = {"bridge": conformance.bridge, "nnsight": conformance.language_model}[backend]
    return model, load(make(model, folder))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Any]:
    backend, family = request.param
    return build(backend, family, tmp_path_factory.mktemp("tokenizer"))


def additions(lens: Any, names: list[str]) -> dict[str, Tensor]:
    """A small A (d_in, d_out) for each site; for the embedding a row per token id."""
    draw = torch.Generator().manual_seed(3)
    sizes = {site.name: (site.d_in, site.d_out) for site in lens.sites() if site.name in names}
    found = {name: 0.03 * torch.randn(size, generator=draw) for name, size in sizes.items()}
    return {name: a.requires_grad_(True) for name, a in found.items()}


def adding(name: str, a: Tensor) -> Function:
    if name == "embed":
        return lambda ids, y: y + a[ids]
    return lambda x, y: y + x @ a


def by_hand(model: Any, added: Mapping[str, Tensor]) -> Tensor:
    """Logits of the plain model with `x @ A` added to the rows of each site, fused or not."""
    oracle = Oracle(model)
    handles = []
    for name, a in added.items():
        module, piece = oracle.modules[name]

        def hook(
            _m: Any, args: Any, y: Tensor, name: str = name, a: Any = a, p: str = piece
        ) -> Any:
            more = a[args[0]] if name == "embed" else args[0] @ a
            where = oracle.pick(p, torch.arange(y.shape[-1]))
            spread = torch.zeros(len(where), y.shape[-1])
            spread[torch.arange(len(where)), where] = 1.0
            return y + more @ spread

        handles.append(module.register_forward_hook(hook))
    return oracle.model(TOKENS).logits


def test_functions_that_return_the_hosts_output_change_no_bit(case: tuple[Any, Any]) -> None:
    _, lens = case
    names = [site.name for site in lens.sites()]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Function:
        def same(x: Tensor, y: Tensor) -> Tensor:
            seen[name] = x, y
            return y

        return same

    with untouched(lens.root):
        plain = lens.run(TOKENS, capture=[f"{n}:{side}" for n in names for side in ("in", "out")])
        with torch.no_grad():
            assert torch.equal(lens.forward(TOKENS), plain.logits)
            with lens.evaluation():
                assert torch.equal(lens.forward(TOKENS), plain.logits)
                with lens.adjusted({name: watch(name) for name in names}):
                    assert torch.equal(lens.forward(TOKENS), plain.logits)
    assert set(seen) == set(names)
    for name, (x, y) in seen.items():
        assert torch.equal(x, plain.captured[f"{name}:in"]), name
        assert torch.equal(y, plain.captured[f"{name}:out"]), name


def test_additions_move_logits_and_gradients_as_hooks_by_hand_do(case: tuple[Any, Any]) -> None:
    """All sites at once, and a choice that leaves rows of every fused module unadjusted."""
    model, lens = case
    names = [site.name for site in lens.sites()]
    some = [n for n in names if n.split(".")[-1] in {"q", "v", "in", "out"} or n == "embed"]
    weights = torch.randn(*TOKENS.shape, lens.shape.vocab_size, generator=torch.Generator())
    for chosen in (names, some, ["blocks.1.attn.k"]):
        added = additions(lens, chosen)
        expected = by_hand(model, added)
        target = torch.autograd.grad((expected * weights).sum(), list(added.values()))
        with untouched(lens.root):
            with lens.adjusted({name: adding(name, a) for name, a in added.items()}):
                logits = lens.forward(TOKENS)
            moved = torch.autograd.grad((logits * weights).sum(), list(added.values()))
        assert not torch.allclose(logits, lens.run(TOKENS).logits, atol=1e-2)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        for name, mine, theirs in zip(added, moved, target, strict=True):
            size = float(theirs.abs().max())
            assert size > 0, name
            assert float((mine - theirs).abs().max()) <= 1e-4 * size, name


def test_fused_module_runs_once_and_the_model_is_as_it_was_after_an_error() -> None:
    model = toy.tiny_model("gpt2")
    lens: Any = load(model)
    calls: list[int] = []
    module = model.transformer.h[0].attn.c_attn
    inner = module.forward
    module.forward = lambda x: calls.append(1) or inner(x)
    names = [f"blocks.0.attn.{head}" for head in "qkv"]
    with lens.adjusted({name: lambda x, y: 2 * y for name in names}):
        doubled = lens.run(TOKENS).logits
    assert len(calls) == 1
    del module.forward
    assert not torch.allclose(doubled, lens.run(TOKENS).logits, atol=1e-3)

    def fails(_x: Tensor, _y: Tensor) -> Tensor:
        raise KeyError("mine")

    with untouched(model), pytest.raises(KeyError), lens.adjusted({names[0]: fails}):
        lens.run(TOKENS)
    with untouched(model), pytest.raises(SiteError, match=r"blocks\.9\.attn\.q"):
        lens.adjusted({"blocks.9.attn.q": fails})
    with (
        untouched(model),
        pytest.raises(SiteError, match=r"adjusted output of blocks\.0\.attn\.q"),
        lens.adjusted({names[0]: lambda x, y: y[..., :3]}),
    ):
        lens.run(TOKENS)


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
def test_with_edits_replacements_nesting_and_the_users_hook(backend: str, tmp_path: Any) -> None:
    """The order is fixed: the matrix (edited, replaced), ours outer to inner, the user's hook."""
    _, lens = build(backend, "gpt2", tmp_path)
    name = "blocks.0.mlp.out"
    weight, bias = lens.weight(name), lens.bias(name)
    captured = lens.run(TOKENS, capture=[f"{name}:in"]).captured[f"{name}:in"]
    steps: list[tuple[str, Tensor]] = []

    def step(label: str, factor: float) -> Function:
        def function(_: Tensor, y: Tensor) -> Tensor:
            steps.append((label, y.detach()))
            return factor * y

        return function

    module = lens._site_tap(lens.site(name), "out").module
    handle = module.register_forward_hook(lambda _m, _a, y: steps.append(("user", y.detach())))
    edited = lens.with_edit(Edit(weights={name: 3 * weight}))
    host = linear(captured, weight, bias)
    with untouched(lens.root):
        with lens.adjusted({name: step("outer", 5.0)}), lens.adjusted({name: step("inner", 7.0)}):
            edited.forward(TOKENS)
        new = {name: lambda x: 2 * linear(x, weight, bias)}
        with lens.replaced(new), lens.adjusted({name: step("within", 5.0)}):
            lens.forward(TOKENS)
        with lens.adjusted({name: step("around", 5.0)}), lens.replaced(new):
            lens.forward(TOKENS)
    handle.remove()
    base = linear(captured, 3 * weight, bias)
    expected = [("outer", base), ("inner", 5 * base), ("user", 35 * base)]
    for label in ("within", "around"):
        expected += [(label, 2 * host), ("user", 10 * host)]
    assert [label for label, _ in steps] == [label for label, _ in expected]
    for (label, mine), (_, theirs) in zip(steps, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=label)


def test_forward_in_training_mode_and_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy.tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5)
    lens: Any = load(model)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    plain = lens.run(TOKENS, attention_mask=mask).logits
    model.train()
    with untouched(model):
        assert torch.equal(lens.forward(TOKENS, mask), plain)
        with lens.evaluation(), torch.no_grad():
            assert not model.training and lens.forward(TOKENS).grad_fn is None
    assert model.training and lens.forward(TOKENS).grad_fn is not None
    with lens.evaluation(), monkeypatch.context() as patch:
        patch.setattr(model, "modules", lambda: pytest.fail("walks the tree at every call"))
        lens.forward(TOKENS)
