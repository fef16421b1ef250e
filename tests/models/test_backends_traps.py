"""One test per known trap of the libraries underneath: each corrupts a number in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from conformance import TOKENS, Oracle, close, untouched

from mi_weightspace.core.errors import (
    ArchitectureError,
    CheckpointError,
    ProcessedWeightsError,
    WeightspaceError,
)
from mi_weightspace.models import toy
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.checks import site_errors
from mi_weightspace.models.lens import Edit
from mi_weightspace.models.load import load

needs_hooked_transformer = pytest.mark.skipif(
    not conformance.has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer"
)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return toy.tiny_model("gpt2")


@pytest.fixture(scope="module")
def llama() -> Any:
    return toy.tiny_model("llama")


@pytest.fixture(scope="module")
def gemma2() -> Any:
    return toy.tiny_model("gemma2")


# ---- processed weights -------------------------------------------------------------------------
@needs_hooked_transformer
@pytest.mark.parametrize(
    ("switch", "says"),
    [
        ("fold_ln", "fold_ln"),
        ("center_writing_weights", "centred writing weights"),
        ("center_unembed", "centred unembedding"),
        ("refactor_factored_attn_matrices", "refactored attention"),
    ],
)
def test_processed_hooked_transformer_is_refused(gpt2: Any, switch: str, says: str) -> None:
    model = conformance.hooked_transformer(gpt2)
    switches = ("fold_ln", "center_writing_weights", "center_unembed")
    off = dict.fromkeys((*switches, "refactor_factored_attn_matrices"), False)
    model.process_weights_(**{**off, switch: True})
    with pytest.raises(ProcessedWeightsError, match=says) as refused:
        load(model)
    assert "no_processing" in str(refused.value)


@needs_hooked_transformer
def test_centring_is_seen_through_the_rounding_of_bfloat16(gpt2: Any) -> None:
    raw, centred = (
        conformance.hooked_transformer(gpt2, center_writing_weights=on).to(torch.bfloat16)
        for on in (False, True)
    )
    assert load(raw).dtype == torch.bfloat16
    with pytest.raises(ProcessedWeightsError, match="centred writing weights"):
        load(centred)


@needs_hooked_transformer
def test_a_bias_of_zeros_is_no_bias_to_the_fingerprint(gpt2: Any) -> None:
    """A HookedTransformer has a bias of zeros wherever the checkpoint has none."""
    model = copy.deepcopy(gpt2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_fc.bias"):
                parameter.zero_()
    assert load(conformance.hooked_transformer(model)).fingerprint == load(model).fingerprint


@needs_hooked_transformer
def test_folded_value_biases_leave_every_matrix_as_it_was(gpt2: Any) -> None:
    """Harmless for matrices, so accepted; the output bias has moved and says so."""
    lens = load(conformance.hooked_transformer(gpt2, fold_value_biases=True))
    oracle = Oracle(gpt2)
    assert all(torch.equal(lens.weight(s), oracle.weight(s.name)) for s in lens.sites())
    assert lens.fingerprint != TorchLens(gpt2).fingerprint
    logits = lens.run(TOKENS).logits
    assert logits is not None and close(logits, oracle.run(TOKENS)["logits"])


@needs_hooked_transformer
def test_folding_invents_a_change_in_a_matrix_nobody_trained(llama: Any) -> None:
    """Why folded weights are refused: move one gain by 2 %, and `mlp.gate` 'changes'."""
    after = copy.deepcopy(llama)
    with torch.no_grad():
        after.model.layers[0].post_attention_layernorm.weight.mul_(1.02)
    raw = [load(m).weight("blocks.0.mlp.gate") for m in (llama, after)]
    assert torch.equal(*raw)
    folded = [conformance.hooked_transformer(m, fold_ln=True) for m in (llama, after)]
    gates = [m.blocks[0].mlp.W_gate for m in folded]
    assert not torch.allclose(*gates)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bridge_compatibility_mode_is_refused_when_it_processes(
    family: str, tmp_path: Path
) -> None:
    bridge = conformance.bridge(toy.tiny_model(family), tmp_path)
    # centring is off, so that only the bridge's own mark can tell
    bridge.enable_compatibility_mode(
        disable_warnings=True, center_writing_weights=False, center_unembed=False
    )
    with pytest.raises(ProcessedWeightsError, match="no_processing=True") as refused:
        load(bridge)
    assert "enable_compatibility_mode" in refused.value.given


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_bridge_compatibility_mode_without_processing_is_the_raw_model(
    family: str, tmp_path: Path
) -> None:
    model = toy.tiny_model(family)
    bridge = conformance.bridge(model, tmp_path)
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    lens, oracle = load(bridge), Oracle(model)
    facts = oracle.run(TOKENS)
    captures = [f"{s.name}:{side}" for s in lens.sites() for side in ("in", "out")]
    run = lens.run(TOKENS, capture=[*captures, *map(str, lens.points())])
    assert run.logits is not None and close(run.logits, facts["logits"])
    assert all(close(value, facts[name]) for name, value in run.captured.items() if ":" not in name)
    for site in lens.sites():
        assert torch.equal(lens.weight(site), oracle.weight(site.name))
    name = "blocks.0.mlp.in"
    new = 2 * lens.weight(name)
    expected = Oracle(oracle.with_weight(name, new)).run(TOKENS)["logits"]
    edited = lens.run(TOKENS, edit=Edit(weights={name: new})).logits
    assert edited is not None and close(edited, expected), "a gated MLP bypassed its matrix"


# ---- HookedTransformer's hook names -------------------------------------------------------------
@needs_hooked_transformer
def test_ln1_hook_normalized_is_not_the_input_of_q(llama: Any) -> None:
    model = conformance.hooked_transformer(llama)
    _, cache = model.run_with_cache(TOKENS)
    read = load(model).run(TOKENS, capture=["blocks.0.attn.q:in"]).captured["blocks.0.attn.q:in"]
    normal = cache["blocks.0.ln1.hook_normalized"]
    assert not close(normal, read, 1e-2), "it fires before the gain"
    assert close(read, Oracle(llama).run(TOKENS)["blocks.0.attn.q:in"])


@needs_hooked_transformer
@pytest.mark.parametrize("name", ["attn.o", "mlp.out"])
def test_hook_attn_out_and_hook_mlp_out_are_behind_the_post_norm(gemma2: Any, name: str) -> None:
    model = conformance.hooked_transformer(gemma2)
    _, cache = model.run_with_cache(TOKENS)
    site = f"blocks.0.{name}"
    written = load(model).run(TOKENS, capture=[f"{site}:out"]).captured[f"{site}:out"]
    hook = cache["blocks.0.hook_attn_out" if name == "attn.o" else "blocks.0.hook_mlp_out"]
    assert not close(hook, written, 1e-2)
    assert close(written, Oracle(gemma2).run(TOKENS)[f"{site}:out"])


@needs_hooked_transformer
def test_grouped_keys_are_not_expanded_to_every_head(llama: Any) -> None:
    model = conformance.hooked_transformer(llama)
    assert model.blocks[0].attn.W_K.shape[0] == 4, "the property is expanded"
    lens = load(model)
    assert lens.weight("blocks.0.attn.k").shape == (16, 32)
    assert lens.sites("blocks.0.attn.k")[0].n_heads == 2


@needs_hooked_transformer
def test_hook_pre_of_a_gated_mlp_is_the_gate(llama: Any) -> None:
    model = conformance.hooked_transformer(llama)
    _, cache = model.run_with_cache(TOKENS)
    names = {"blocks.0.mlp.gate:out": "hook_pre", "blocks.0.mlp.in:out": "hook_pre_linear"}
    run = load(model).run(TOKENS, capture=list(names))
    for site, hook in names.items():
        assert close(run.captured[site], cache[f"blocks.0.mlp.{hook}"])


@needs_hooked_transformer
@pytest.mark.parametrize(
    "switch", ["use_attn_in", "use_split_qkv_input", "ungroup_grouped_query_attention"]
)
def test_switches_that_change_what_a_hook_holds_are_refused(llama: Any, switch: str) -> None:
    model = conformance.hooked_transformer(llama)
    setattr(model.cfg, switch, True)
    with pytest.raises(ArchitectureError, match=switch):
        load(model)


@needs_hooked_transformer
def test_scaled_embedding_of_gemma_is_divided_back(tmp_path: Path) -> None:
    """The library stores √d times the matrix; tied, the exact matrix is the unembedding's."""
    model = toy.tiny_model("gemma", tie_word_embeddings=True)
    hooked = conformance.hooked_transformer(model)
    lens = load(hooked)
    assert lens.shape.tied
    assert torch.equal(lens.weight("embed"), model.lm_head.weight.T)
    assert lens.fingerprint == TorchLens(model).fingerprint


@needs_hooked_transformer
def test_hooked_transformer_of_no_known_checkpoint_is_refused() -> None:
    import transformer_lens

    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=1, d_model=8, d_head=4, n_ctx=8, d_vocab=10, act_fn="relu"
    )
    with pytest.raises(ArchitectureError, match="boot_transformers"):
        load(transformer_lens.HookedTransformer(cfg))


# ---- TransformerBridge --------------------------------------------------------------------------
def test_a_model_that_a_bridge_has_wrapped_is_refused_by_itself(llama: Any, tmp_path: Path) -> None:
    bridge = conformance.bridge(llama, tmp_path)
    with pytest.raises(ArchitectureError, match="Pass the bridge itself"):
        load(bridge.original_model)


def test_native_bridge_without_a_hugging_face_model_is_refused() -> None:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(
        d_model=16, d_head=4, n_heads=4, n_layers=1, n_ctx=16, d_vocab=20, d_mlp=32, act_fn="gelu"
    )
    with pytest.raises(WeightspaceError):
        load(TransformerBridge.boot_native(cfg))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_booting_a_bridge_does_not_change_other_models(family: str, tmp_path: Path) -> None:
    """3.9 replaces the eager attention of Gemma for the whole process at the first boot."""
    model = toy.tiny_model(family)
    before = TorchLens(model).run(TOKENS).logits
    conformance.bridge(toy.tiny_model("llama"), tmp_path / "a")
    conformance.bridge(toy.tiny_model(family), tmp_path / "b")
    after = TorchLens(model).run(TOKENS).logits
    assert before is not None and after is not None and close(after, before)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "phi3"])
def test_the_bridges_split_of_a_fused_matrix_is_what_runs(family: str, tmp_path: Path) -> None:
    """A write into the fused tensor may have no effect; the lens reports what computes."""
    bridge = conformance.bridge(toy.tiny_model(family), tmp_path)
    lens = load(bridge)
    old = lens.fingerprint
    with torch.no_grad():
        for name, parameter in bridge.original_model.named_parameters():
            if any(f in name for f in ("query_key_value", "c_attn", "qkv_proj")):
                parameter.mul_(1.5)
    assert max(site_errors(lens).values()) <= 1e-5
    with torch.no_grad():
        bridge.blocks[0].attn.q.original_component.weight.mul_(2.0)
    assert max(site_errors(lens).values()) <= 1e-5
    assert lens.fingerprint != old


def test_bridge_unembedding_bias_of_zeros_is_no_bias(llama: Any, tmp_path: Path) -> None:
    lens = load(conformance.bridge(llama, tmp_path))
    assert lens.bias("unembed") is None
    assert lens.fingerprint == TorchLens(llama).fingerprint


def test_bridge_keeps_the_precision_asked_for(tmp_path: Path) -> None:
    """`cfg.dtype` says float32 whatever the parameters are."""
    folder = toy.save_tiny("llama", tmp_path)
    lens = load(folder, backend="transformer_lens", dtype=torch.bfloat16)
    assert lens.dtype == torch.bfloat16
    assert lens.weight("blocks.0.mlp.out").dtype == torch.float32


def test_every_backend_gives_a_prompt_the_same_ids(tmp_path: Path) -> None:
    """TransformerLens re-creates the tokenizer with a BOS in front; ids must not depend on it."""
    from transformers import AutoTokenizer

    folder = toy.save_tiny("llama", tmp_path)
    text = "word3 word5 A B"
    expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    for backend in ("torch", "transformer_lens", "nnsight"):
        assert load(folder, backend=backend).tokenizer(text)["input_ids"] == expected, backend
    booted = conformance.bridge(toy.tiny_model("llama"), folder)
    assert load(booted).tokenizer(text)["input_ids"] == expected


def test_bridge_needs_a_saved_tokenizer(tmp_path: Path) -> None:
    toy.tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="backend='torch'"):
        load(tmp_path, backend="transformer_lens")


def test_bridge_over_a_model_nnsight_has_wrapped(llama: Any, tmp_path: Path) -> None:
    model = conformance.language_model(llama, tmp_path)._module
    lens = load(conformance.bridge(model, tmp_path))
    logits = lens.run(TOKENS).logits
    assert logits is not None and close(logits, Oracle(llama).run(TOKENS)["logits"])
    name = "blocks.1.mlp.out"
    new = 2 * lens.weight(name)
    expected = Oracle(Oracle(llama).with_weight(name, new)).run(TOKENS)["logits"]
    edited = lens.run(TOKENS, edit=Edit(weights={name: new})).logits
    assert edited is not None and close(edited, expected)


def test_nnsight_over_a_bridge_is_refused_with_the_way_out(llama: Any, tmp_path: Path) -> None:
    from nnsight import NNsight

    bridge = conformance.bridge(llama, tmp_path)
    for wrapped in (bridge, bridge.original_model):
        with pytest.raises(WeightspaceError):
            load(NNsight(wrapped))


# ---- nnsight ------------------------------------------------------------------------------------
def test_no_stale_envoy_while_a_matrix_is_replaced(llama: Any, tmp_path: Path) -> None:
    """A module put only in the torch tree leaves an envoy that reports the old matrix."""
    model = conformance.language_model(llama, tmp_path)
    lens = load(model)
    name = "blocks.0.mlp.out"
    envoy, module = model.model.layers[0].mlp.down_proj, model._module.model.layers[0].mlp.down_proj
    weight = lens.weight(name)

    def trace() -> torch.Tensor:
        with model.trace(input_ids=TOKENS):
            out = model.model.layers[0].mlp.down_proj.output.save()
        return out  # noqa: RET504  (nnsight reads the block's source)

    plain = trace()
    with lens.replaced({name: lambda x: 3 * x @ weight.T}):
        assert close(trace(), 3 * plain)
    assert torch.equal(trace(), plain)
    assert model.model.layers[0].mlp.down_proj is envoy
    assert model._module.model.layers[0].mlp.down_proj is module
    assert envoy._module is module


def test_trace_sees_a_partly_replaced_fused_matrix_once(gpt2: Any, tmp_path: Path) -> None:
    """q of GPT-2's fused matrix is replaced, k and v come from the module itself."""
    model = conformance.language_model(gpt2, tmp_path)
    lens = load(model)
    weight, bias = lens.weight("blocks.0.attn.q"), lens.bias("blocks.0.attn.q")

    def trace() -> torch.Tensor:
        with torch.no_grad(), model.trace(input_ids=TOKENS):
            out = model.transformer.h[0].attn.c_attn.output.save()
        return out  # noqa: RET504  (nnsight reads the block's source)

    plain = trace()
    with lens.replaced(
        {"blocks.0.attn.q": lambda x: 3 * torch.nn.functional.linear(x, weight, bias)}
    ):
        mixed = trace()
    assert close(mixed[..., :32], 3 * plain[..., :32])
    assert torch.equal(mixed[..., 32:], plain[..., 32:])
    assert torch.equal(trace(), plain)


def test_instance_forward_of_nnsight_is_never_overridden(llama: Any, tmp_path: Path) -> None:
    """A module whose `forward` is overridden is one nnsight no longer sees."""
    model = conformance.language_model(llama, tmp_path)
    lens = load(model)
    with untouched(model._module):
        for site in lens.sites():
            lens.run(TOKENS, edit=Edit(weights={site.name: 2 * lens.weight(site)}))
    seen = []
    with model.trace(input_ids=TOKENS):
        for layer in range(2):
            block = model.model.layers[layer]
            for branch, leaf in (("self_attn", "q_proj"), ("self_attn", "o_proj")):
                seen.append(getattr(getattr(block, branch), leaf).output.save())
            seen.append(block.mlp.down_proj.output.save())
    assert len(seen) == 6
    model._module.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == lens.fingerprint


@pytest.mark.parametrize("inplace", [True, False])
def test_stored_edits_are_replayed(llama: Any, tmp_path: Path, inplace: bool) -> None:
    model = conformance.language_model(llama, tmp_path)
    plain = Oracle(llama).run(TOKENS)
    if inplace:
        with model.edit(inplace=True):
            model.model.layers[0].output[:] = 1
        edited = model
    else:
        with model.edit() as (_tracer, edited):
            edited.model.layers[0].output[:] = 1
    with edited.trace(input_ids=TOKENS):
        expected = edited.output.logits.save()
    lens = load(edited)
    run = lens.run(TOKENS, capture=["resid_post.0", "resid_post.1"])
    assert run.logits is not None and torch.equal(run.logits, expected)
    assert not close(run.logits, plain["logits"])
    assert torch.equal(run.captured["resid_post.0"], torch.ones(2, 9, 32))
    early = lens.run(TOKENS, capture=["resid_post.0"], logits=False)
    assert early.logits is None and bool((early.captured["resid_post.0"] == 1).all())
    assert len(edited._edits) == 1, "the user's edit is still stored"
    again = lens.run(TOKENS).logits
    assert again is not None and torch.equal(again, expected)
    name = "blocks.1.mlp.out"
    weight = lens.weight(name)
    with lens.replaced({name: lambda x: torch.nn.functional.linear(x, 0 * weight)}):
        zeroed = lens.run(TOKENS, capture=[f"{name}:out"]).captured[f"{name}:out"]
    assert float(zeroed.abs().max()) == 0.0
    mask = torch.ones(weight.shape[0], requires_grad=True)
    with lens.replaced({name: lambda x: torch.nn.functional.linear(x, weight) * mask}):
        logits = lens.run(TOKENS, grad=True).logits
    assert logits is not None
    assert float(torch.autograd.grad(logits.square().mean(), mask)[0].abs().max()) > 0
    if not inplace:
        untouched_model = load(model).run(TOKENS).logits
        assert untouched_model is not None and close(untouched_model, plain["logits"])


def test_lazy_nnsight_model_is_refused(tmp_path: Path) -> None:
    from nnsight import LanguageModel

    folder = toy.save_tiny("llama", tmp_path)
    lazy = LanguageModel(str(folder), tokenizer=conformance.tokenizer(folder))
    with pytest.raises(CheckpointError, match="dispatch=True"):
        load(lazy)


def test_plain_nnsight_object_and_its_bare_trunk(llama: Any) -> None:
    from nnsight import NNsight

    model = NNsight(copy.deepcopy(llama))
    logits = load(model).run(TOKENS).logits
    assert logits is not None and close(logits, Oracle(llama).run(TOKENS)["logits"])
    with pytest.raises(ArchitectureError, match="no logits"):
        load(model.model)


def test_model_nnsight_has_wrapped_still_loads_as_a_torch_model(llama: Any, tmp_path: Path) -> None:
    wrapped = conformance.language_model(llama, tmp_path)._module
    lens = load(wrapped)
    assert type(lens).__name__ == "TorchLens"
    name = "blocks.0.attn.q"
    new = 2 * lens.weight(name)
    expected = Oracle(Oracle(llama).with_weight(name, new)).run(TOKENS)["logits"]
    with untouched(wrapped):
        edited = lens.run(TOKENS, edit=Edit(weights={name: new})).logits
    assert edited is not None and close(edited, expected)
