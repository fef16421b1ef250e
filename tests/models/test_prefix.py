"""Forward passes that start at a block (the whole pass, bit for bit), and written attention."""

from __future__ import annotations

from typing import Any

import conformance
import pytest
import torch
from conformance import TOKENS, untouched
from torch import Tensor, nn

from mi_weightspace.core.errors import ArchitectureError, SiteError
from mi_weightspace.models import toy
from mi_weightspace.models.lens import Edit
from mi_weightspace.models.load import load

BACKENDS = ("torch", "bridge", "nnsight", "hooked_transformer")
LAYERS = 4
MASK = torch.ones_like(TOKENS)
MASK[0, :3] = 0


def build(backend: str, family: str, folder: Any) -> Any:
    """Gemma 3 alternates sliding and full attention within four layers only when told to."""
    config: dict[str, Any] = {"n_layers": LAYERS}
    if family in {"gemma2", "gemma3_text"}:
        config["layer_types"] = ["sliding_attention", "full_attention"] * 2
        config["sliding_window"] = 4
    if family.startswith("olmo") and backend == "hooked_transformer":
        config["num_key_value_heads"] = 4  # its converter for OLMo knows no grouped queries
    model = toy.tiny_model(family, **config)
    if backend == "torch":
        return load(model)
    if backend == "hooked_transformer":
        if not conformance.has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        return load(conformance.hooked_transformer(model))
    make = {"bridge": conformance.bridge, "nnsight": conformance.language_model}[backend]
    return load(make(model, folder))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_logits_from_a_captured_residual_are_those_of_the_whole_pass(
    backend: str, family: str, tmp_path: Any
) -> None:
    lens = build(backend, family, tmp_path)
    ran: list[str] = []
    watched = [(f"block {i}", lens._stream_tap(point).module) for i, point in _entries(lens)]
    watched.append(("embed", lens._site_tap(lens.site("embed"), "out").module))
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in watched
    ]
    with untouched(lens.root), torch.no_grad():
        for mask in (None, MASK):
            names = [f"resid_pre.{layer}" for layer in range(LAYERS)]
            whole = lens.run(TOKENS, attention_mask=mask, capture=names)
            assert torch.equal(lens.forward(TOKENS, mask), whole.logits)
            for layer, name in enumerate(names):
                ran.clear()
                start = (layer, whole.captured[name])
                assert torch.equal(lens.forward(TOKENS, mask, start=start), whole.logits), name
                assert ran == [f"block {i}" for i in range(layer, LAYERS)]
                other = (layer, 1.5 * whole.captured[name] + 0.1)
                assert not torch.equal(lens.forward(TOKENS, mask, start=other), whole.logits)
    for handle in handles:
        handle.remove()


def _entries(lens: Any) -> list[tuple[int, Any]]:
    from mi_weightspace.core.space import Space

    return [(layer, Space("resid_pre", layer)) for layer in range(lens.shape.n_layers)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_edits_and_adjustments_from_there_on(backend: str, tmp_path: Any) -> None:
    """Of the residual itself, of what acts behind the start, and of nothing in front of it."""
    lens = build(backend, "gptj" if backend != "hooked_transformer" else "gpt2", tmp_path)
    residual = lens.run(TOKENS, capture=["resid_pre.2"]).captured["resid_pre.2"]
    residual = residual.clone().requires_grad_(True)
    early, late = "blocks.1.mlp.out", "blocks.2.mlp.out"
    scales = {early: torch.tensor(1.1, requires_grad=True)}
    scales[late] = torch.tensor(0.9, requires_grad=True)
    functions = {name: lambda x, y, a=a: a * y for name, a in scales.items()}
    edit = Edit(
        weights={"blocks.3.attn.o": 0.5 * lens.weight("blocks.3.attn.o")},
        stream={"resid_pre.2": lambda x: 2 * x},
    )
    edited = lens.with_edit(edit)
    with untouched(lens.root), edited.adjusted(functions):
        logits = edited.forward(TOKENS, start=(2, residual))
        got = torch.autograd.grad(
            logits.square().mean(), [residual, *scales.values()], allow_unused=True
        )
    assert got[1] is None
    tail: dict[str, Tensor] = {"resid_pre.2": residual}

    def put(_: Tensor) -> Tensor:
        return 2 * tail["resid_pre.2"]

    whole = lens.with_edit(Edit(weights=edit.weights, stream={"resid_pre.2": put}))
    with whole.adjusted({late: functions[late]}):
        expected = whole.forward(TOKENS)
    wanted = torch.autograd.grad(expected.square().mean(), [residual, scales[late]])
    assert torch.equal(logits, expected)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[2], wanted[1])


def test_bad_starts_and_an_error_on_the_way(tmp_path: Any) -> None:
    model = toy.tiny_model("llama")
    lens: Any = load(model)
    residual = torch.zeros(*TOKENS.shape, lens.shape.d_model)
    for start in ((2, residual), (-1, residual), (1, residual[:1]), (1, residual[..., :5])):
        with untouched(model), pytest.raises(SiteError, match="start of a forward pass"):
            lens.forward(TOKENS, start=start)

    def fails(_m: nn.Module, _a: Any, _y: Any) -> None:
        raise KeyError("mine")

    handle = model.model.layers[1].mlp.register_forward_hook(fails)
    with untouched(model), pytest.raises(KeyError):
        lens.forward(TOKENS, start=(1, residual))
    handle.remove()
    theirs = conformance.language_model(model, tmp_path)
    with theirs.edit(inplace=True):
        theirs.model.layers[0].mlp.output[:] = 0
    stored: Any = load(theirs, verify=False)
    with pytest.raises(ArchitectureError, match="stored edits"):
        stored.forward(TOKENS, start=(1, residual))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_written_attention_is_the_default_up_to_rounding(
    backend: str, family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And calls no fused kernel, which the default does where the library has one."""
    lens = build(backend, family, tmp_path)
    fused: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        fused.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    for mask in (None, MASK):
        with untouched(lens.root), torch.no_grad():
            plain = lens.forward(TOKENS, mask)
            used = len(fused)
            config = getattr(lens.root, "config", None)
            before = getattr(config, "_attn_implementation", None)
            with lens.written_attention():
                written = lens.forward(TOKENS, mask)
                start = lens.run(TOKENS, attention_mask=mask, capture=["resid_pre.2"])
                resumed = lens.forward(TOKENS, mask, start=(2, start.captured["resid_pre.2"]))
            assert len(fused) == used
            assert getattr(config, "_attn_implementation", None) == before
            assert torch.equal(lens.forward(TOKENS, mask), plain)
        assert torch.equal(resumed, written)
        kept = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
        assert conformance.close(written[kept], plain[kept])
    if backend in {"torch", "nnsight"} and family not in {"gptj", "gemma2"}:
        assert fused, "the default of these is the fused kernel"
    with pytest.raises(KeyError), lens.written_attention():
        raise KeyError("mine")
    assert getattr(config, "_attn_implementation", None) == before
