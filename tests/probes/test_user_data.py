"""Activations the user already has, against `harvest` and against slicing by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import ProcessedWeightsError, PromptError
from mi_weightspace.core.readout import pad
from mi_weightspace.models.harvest import harvest
from mi_weightspace.models.load import load
from mi_weightspace.models.toy import tiny_model, tiny_tokenizer
from probes.activations import from_cache, prompt_list

LENGTHS = [[3, 5], [1, 4], [6, 6], [2, 7], [5, 5]]


def contrast_set() -> ContrastSet:
    draw = torch.Generator().manual_seed(5)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 200, (n,), generator=draw).tolist())

    def contrast(name: str, kind: Any, rows: list[list[int]]) -> Contrast:
        pairs = tuple(Pair(f"i{k}", ids(a), ids(b)) for k, (a, b) in enumerate(rows))
        return Contrast(name, kind, pairs)

    return ContrastSet(
        "s", (contrast("a", "target", LENGTHS), contrast("b", "control", LENGTHS[:2]))
    )


CONTRASTS = contrast_set()
ID_ROWS: Any = [list(ids) for ids in prompt_list(CONTRASTS)]
N = 7


@pytest.fixture(scope="module")
def lens() -> Any:
    return load(tiny_model("gpt2"), tokenizer=tiny_tokenizer(), verify=False)


@pytest.fixture(scope="module")
def captured(lens: Any) -> dict[str, torch.Tensor]:
    tokens, mask, _ = pad(ID_ROWS)
    names = [p.name for p in lens.points()]
    return dict(lens.run(tokens, attention_mask=mask, capture=names).captured)


@pytest.mark.quick
@pytest.mark.parametrize("position", ["last", "all_mean", "first_k"])
def test_equals_harvest(lens: Any, captured: dict[str, torch.Tensor], position: str) -> None:
    wanted = harvest(lens, CONTRASTS, position=position, progress=False)
    found = from_cache(captured, CONTRASTS, stage="sft", position=position, model_hash="m")
    assert [p.name for p in found.points] == [p.name for p in wanted.points]
    for key, value in wanted.values.items():
        torch.testing.assert_close(found.values[key], value, atol=1e-5, rtol=1e-5)
    assert (found.stage, found.model_hash, found.position) == ("sft", "m", position)
    assert not found.site_shift
    assert found.values["a", "resid_post.1"].shape == (5, 2, 32)


@pytest.mark.quick
def test_shapes_names_and_batches(captured: dict[str, torch.Tensor]) -> None:
    wanted = from_cache(captured, CONTRASTS, stage="")
    last = torch.tensor([len(ids) for ids in prompt_list(CONTRASTS)])
    rows = {k: v[torch.arange(2 * N), last - 1] for k, v in captured.items()}
    renamed = {f"blocks.{k[-1]}.hook_{k[:-2]}": v for k, v in captured.items()}
    junk = {"hook_embed": torch.ones(3), "blocks.0.ln1.hook_normalized": torch.ones(3)}
    ways: list[Any] = [
        rows,
        {k: v.reshape(N, 2, -1) for k, v in rows.items()},
        renamed | junk,
        [{k: v[:9] for k, v in captured.items()}, {k: v[9:] for k, v in captured.items()}],
        {k: SimpleNamespace(value=v) for k, v in captured.items()},
        {k: (v, None) for k, v in captured.items()},
        SimpleNamespace(cache_dict=renamed, model=None),
        {k: v.double() for k, v in captured.items()},
    ]
    for way in ways:
        found = from_cache(way, CONTRASTS, stage="")
        assert found.points == wanted.points
        assert all(torch.equal(found.values[k], v) for k, v in wanted.values.items())
        assert all(v.dtype == torch.float32 for v in found.values.values())
    one = from_cache(captured, CONTRASTS, stage="", points=["resid_pre.1"])
    assert [p.name for p in one.points] == ["resid_post.0"]


@pytest.mark.quick
def test_padding_never_enters(captured: dict[str, torch.Tensor]) -> None:
    spoiled = {k: v.clone() for k, v in captured.items()}
    for i, ids in enumerate(prompt_list(CONTRASTS)):
        for value in spoiled.values():
            value[i, len(ids) :] = float("nan")
    for position in ("last", "all_mean", "first_k"):
        a, b = (
            from_cache(cache, CONTRASTS, stage="", position=position)
            for cache in (captured, spoiled)
        )
        assert all(torch.equal(a.values[k], v) for k, v in b.values.items())


@pytest.mark.quick
def test_refusals(captured: dict[str, torch.Tensor]) -> None:
    def refused(cache: Any, contrasts: ContrastSet = CONTRASTS, **options: Any) -> PromptError:
        with pytest.raises(PromptError) as caught:
            from_cache(cache, contrasts, stage="", **options)
        return caught.value

    text = ContrastSet(
        "t", tuple(Contrast("a", "target", (Pair(f"{k}", "x y", "z y"),)) for k in range(1))
    )
    stream = {"resid_post.0": torch.zeros(2, 3, 8)}
    error = refused(stream, text)
    assert "without lengths" in error.given
    assert "attention_mask" in error.remedy
    from_cache(stream, text, stage="", lengths=[2, 3])
    for wrong in ([2], [2, 4], [0, 2]):
        assert "lengths" in refused(stream, text, lengths=wrong).subject
    assert "resid_post.0" in refused({"resid_post.0": torch.zeros(13, 4, 8)}).subject
    assert "prompt_list" in refused({"resid_post.0": torch.zeros(4, 8)}).remedy
    assert "no residual-stream point" in refused({"hook_embed": torch.zeros(14, 8)}).given
    assert "resid_mid.9" in refused(captured, points=["resid_mid.9"]).given
    assert "position" in refused(captured, position="frame_mean").subject
    assert "nothing" in refused({}).given
    assert "a Tensor" in refused(torch.zeros(3)).given
    assert "a str" in refused({"resid_post.0": "x"}).given
    spoiled = captured | {"resid_post.0": captured["resid_post.0"] * float("nan")}
    assert "NaN" in refused(spoiled).given
    folded = SimpleNamespace(
        cache_dict=captured, model=SimpleNamespace(cfg=SimpleNamespace(normalization_type="LNPre"))
    )
    with pytest.raises(ProcessedWeightsError, match="no_processing"):
        from_cache(folded, CONTRASTS, stage="")
    named = from_cache(folded, CONTRASTS, stage="", convention="folded")
    assert named.convention == "folded"


def test_a_real_activation_cache() -> None:
    """TransformerLens's own object, heads included, against its tensors sliced by hand."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_ctx=16,
        d_head=4,
        n_heads=4,
        d_vocab=200,
        act_fn="gelu",
        normalization_type="LN",
        seed=1,
    )
    model = HookedTransformer(config)
    tokens, mask, last = pad(ID_ROWS)
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    found = from_cache(cache, CONTRASTS, stage="", points=["resid_mid.1", "attn_z.0"])
    wanted = cache["blocks.1.hook_resid_mid"][torch.arange(2 * N), last]
    heads = cache["blocks.0.attn.hook_z"].flatten(2)[torch.arange(2 * N), last]
    for name, rows in (("resid_mid.1", wanted), ("attn_z.0", heads)):
        both = torch.cat([found.values["a", name], found.values["b", name]])
        torch.testing.assert_close(both, rows.reshape(N, 2, -1))
    stream = from_cache(cache, CONTRASTS, stage="")
    assert [p.name for p in stream.points] == [
        "resid_pre.0",
        "resid_mid.0",
        "resid_post.0",
        "resid_mid.1",
        "resid_post.1",
    ]
