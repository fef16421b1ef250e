"""A user's own object, with the user's own hooks on it, is used as it is and left as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from conformance import TOKENS, close, untouched

import mi_weightspace as mw
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.models import toy
from mi_weightspace.models.harvest import harvest
from mi_weightspace.models.lens import Edit

CONTRASTS = ContrastSet(
    "t", (Contrast("c", "target", (Pair("i", (5, 6, 7), (5, 9, 7)), Pair("j", (5, 4), (6, 4)))),)
)


def use(lens: Any) -> None:
    """Everything a method does to a model."""
    name = "blocks.0.mlp.out"
    new = 1.5 * lens.weight(name)
    lens.run(TOKENS, capture=["resid_post.0", f"{name}:in", "blocks.1.attn.k:out"])
    lens.run(TOKENS, capture=["resid_post.0"], logits=False)
    lens.with_edit(
        Edit(weights={name: new, "blocks.1.attn.v": lens.weight("blocks.1.attn.v")})
    ).run(TOKENS)
    lens.run(TOKENS, edit=Edit(stream={"resid_mid.0": torch.zeros_like}))
    harvest(lens, CONTRASTS, sites=[name], progress=False)
    with lens.replaced({name: lambda x: x @ new.T}):
        lens.run(TOKENS, grad=True).logits.sum()


def caches_equal(left: Any, right: Any) -> bool:
    keys = set(left.keys())
    return keys == set(right.keys()) and all(torch.equal(left[key], right[key]) for key in keys)


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    return toy.tiny_model(request.param)


@pytest.mark.parametrize("kind", ["bridge", "hooked_transformer"])
def test_transformer_lens_object(model: Any, kind: str, tmp_path: Path) -> None:
    if kind == "hooked_transformer":
        if not conformance.has_hooked_transformer():
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        mine = conformance.hooked_transformer(model)
    else:
        mine = conformance.bridge(model, tmp_path)
    seen: list[str] = []

    def watch(value: torch.Tensor, hook: Any) -> None:
        seen.append(hook.name)

    def steer(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value + torch.linspace(-1, 1, value.shape[-1])

    mine.add_hook("blocks.0.hook_resid_post", steer)
    mine.add_hook("blocks.0.attn.hook_z", watch)
    mine.add_hook("blocks.1.hook_resid_pre", watch)
    mine.add_perma_hook("blocks.1.mlp.hook_post", watch)
    logits, cache = mine.run_with_cache(TOKENS)
    with torch.no_grad():
        steered = mine(TOKENS)
    fired = sorted(set(seen))
    assert len(fired) == 3
    lens = mw.load(mine)
    assert lens.model is mine
    seen.clear()
    with untouched(mine):
        result = lens.run(TOKENS, capture=["resid_pre.1", "resid_post.1"])
        assert sorted(set(seen)) == fired, "the user's hooks fire in the library's runs"
        use(lens)
    assert result.logits is not None and close(result.logits, steered)
    assert close(result.captured["resid_post.1"], cache["blocks.1.hook_resid_post"])
    seen.clear()
    again, later = mine.run_with_cache(TOKENS)
    assert torch.equal(again, logits) and caches_equal(later, cache)
    assert sorted(set(seen)) == fired
    mine.reset_hooks(including_permanent=True)
    with torch.no_grad():
        assert not close(mine(TOKENS), steered, 1e-2), "the hook did steer"


def test_temporary_hooks_around_a_run_act_in_it(model: Any, tmp_path: Path) -> None:
    mine = conformance.bridge(model, tmp_path)
    lens = mw.load(mine)
    plain = lens.run(TOKENS).logits
    with mine.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: 0 * value)]):
        inside = lens.run(TOKENS).logits
        expected = mine(TOKENS)
    after = lens.run(TOKENS).logits
    assert plain is not None and inside is not None and after is not None
    assert close(inside, expected.detach()) and not close(inside, plain, 1e-2)
    assert torch.equal(after, plain)


@pytest.mark.parametrize("name", ["TransformersModel", "LanguageModel"])
def test_nnsight_model(model: Any, name: str, tmp_path: Path) -> None:
    import nnsight

    if name == "LanguageModel":  # the older name, still in many notebooks
        mine = nnsight.LanguageModel(model, tokenizer=conformance.tokenizer(tmp_path))
    else:
        mine = conformance.language_model(model, tmp_path)
    family = model.config.model_type
    calls: list[int] = []
    path = "transformer.h" if family == "gpt2" else "model.layers"
    layer = mine._module.get_submodule(f"{path}.0")
    handle = layer.register_forward_hook(lambda _m, _a, out: calls.append(1))

    def trace() -> tuple[torch.Tensor, torch.Tensor]:
        blocks = mine.transformer.h if family == "gpt2" else mine.model.layers
        with torch.no_grad(), mine.trace(input_ids=TOKENS):
            middle = blocks[0].output.save()
            logits = mine.output.logits.save()
        return middle, logits

    before = trace()
    lens = mw.load(mine)
    assert lens.model is mine
    calls.clear()
    with untouched(mine._module):
        result = lens.run(TOKENS, capture=["resid_post.0"])
        assert calls, "the user's hook fires in the library's runs"
        use(lens)
    assert result.logits is not None
    assert close(result.captured["resid_post.0"], before[0])
    assert close(result.logits, before[1])
    assert all(torch.equal(a, b) for a, b in zip(trace(), before, strict=True))
    assert list(layer._forward_hooks) == [handle.id]


def test_plain_hugging_face_model(model: Any) -> None:
    calls: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: calls.append(1))
    with torch.no_grad():
        before = model(TOKENS).logits
    lens = mw.load(model)
    assert lens.model is model
    calls.clear()
    with untouched(model):
        result = lens.run(TOKENS)
        assert len(calls) == 1
        use(lens)
    assert result.logits is not None and torch.equal(result.logits, before)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)
    handle.remove()


def test_a_lens_is_returned_as_it_is(model: Any) -> None:
    lens = mw.load(model)
    assert mw.load(lens) is lens


@pytest.mark.parametrize("kind", ["bridge", "nnsight", "hooked_transformer"])
def test_stages_of_a_lineage_may_be_the_users_objects(kind: str, tmp_path: Path) -> None:
    if kind == "hooked_transformer" and not conformance.has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    base, sft = toy.tiny_model("llama", seed=0), toy.tiny_model("llama", seed=1)
    make: Any = {
        "bridge": lambda m: conformance.bridge(m, tmp_path),
        "nnsight": lambda m: conformance.language_model(m, tmp_path),
        "hooked_transformer": conformance.hooked_transformer,
    }[kind]
    saved = toy.save_tiny("llama", tmp_path / "base", seed=0)
    expected = sft.model.layers[0].mlp.down_proj.weight - base.model.layers[0].mlp.down_proj.weight
    for first in (make(base), saved):  # both live, or one on disk
        lineage = mw.load_lineage(base=first, sft=make(sft))
        assert torch.equal(lineage.diff("base", "sft").weight("blocks.0.mlp.out"), expected)
        with lineage.opened("sft") as lens:
            logits = lens.run(TOKENS).logits
        assert logits is not None and close(logits, conformance.Oracle(sft).run(TOKENS)["logits"])
    same = mw.load_lineage(base=saved, sft=make(base))
    assert float(same.diff("base", "sft").weight("blocks.1.attn.k").abs().max()) == 0.0
