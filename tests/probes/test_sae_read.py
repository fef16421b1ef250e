"""Reading a stage through an SAE: a naive loop over prompts is the oracle; wrong places refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mi_weightspace as mw
from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import (
    ConfigError,
    ConventionError,
    MismatchError,
    PromptError,
    SiteError,
)
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.space import Space
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.toy import tiny_model
from probes import sae_pool
from probes.sae import (
    check_fit,
    read_stage,
    readings_of,
    reference_activations,
    rival_saes,
    sae_reservations,
)
from probes.sae_fit import activations, capture_of, fvu_of
from probes.sae_tokens import token_spans

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import conformance

D, H = 32, 80


def lens_of(family: str = "llama", n_layers: int = 3, seed: int = 0) -> TorchLens:
    return TorchLens(tiny_model(family, n_layers=n_layers, seed=seed), None)


def prompt_set(n: int = 12, suffix: tuple[int, ...] = (7, 8, 9)) -> LabelledSet:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for i in range(n):
        length = int(torch.randint(3, 9, (1,), generator=draw))
        # the token in front of the suffix differs, so that the suffix is what is shared
        body = torch.randint(20, 300, (length,), generator=draw).tolist()
        prompt = (3, *body, 10 + i % 2, *suffix)
        rows.append(LabelledPrompt(prompt, i % 2, f"c{i // 2}", f"i{i}"))
    return LabelledSet(tuple(rows), "toy")


def drawn_sae(hook: str = "blocks.1.hook_resid_post", architecture: str = "topk") -> Sae:
    draw = torch.Generator().manual_seed(2)
    enc = torch.randn(D, H, generator=draw)
    extra: dict[str, Any] = {"k": 6} if "topk" in architecture else {}
    if architecture == "jumprelu":
        extra = {"threshold": torch.full((H,), 2.0)}
    return Sae(
        architecture,
        W_enc=enc,
        W_dec=torch.randn(H, D, generator=draw),
        b_dec=torch.randn(D, generator=draw),
        b_enc=0.1 * torch.randn(H, generator=draw),
        apply_b_dec_to_input=True,
        **extra,
    ).described(hook_name=hook)


def fitting_sae(lens: TorchLens, point: str, prompts: LabelledSet, rank: int = 16) -> Sae:
    """Principal components of one point, each with both signs: rebuilds that point and no other."""
    x = activations(lens, list(prompts.prompts), [point])[point]
    mean = x.mean(0)
    v = torch.linalg.svd(x - mean, full_matrices=False).Vh[:rank]
    return Sae(
        "standard",
        W_enc=torch.cat([v, -v]).T,
        W_dec=torch.cat([v, -v]),
        b_dec=mean,
        b_enc=torch.zeros(2 * rank),
        apply_b_dec_to_input=True,
    ).described(hook_name=f"blocks.{point.rpartition('.')[2]}.hook_resid_post")


def naive(lens: TorchLens, labelled: LabelledSet, sae: Sae, n_last: int, how: str) -> Any:
    """One prompt at a time through Hugging Face's own hidden states, no padding."""
    dense, codes, rebuilt, tokens = [], [], [], []
    for prompt in labelled.prompts:
        with torch.no_grad():
            out = lens.model(torch.tensor([prompt]), output_hidden_states=True)
        x = out.hidden_states[2][0]  # after block 1
        x = x[1:] if how in ("all_mean", "max") else x[-n_last:]
        f = sae.encode(x)
        codes.append(f.amax(0) if how == "max" else f.mean(0))
        dense.append(x.mean(0))
        rebuilt.append(sae.decode(f).mean(0))
        tokens.append(x)
    return torch.stack(dense), torch.stack(codes), torch.stack(rebuilt), torch.cat(tokens)


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu"])
@pytest.mark.parametrize(
    ("position", "n_last"), [("suffix_mean", 3), ("last", 1), ("all_mean", 0), ("max", 0)]
)
def test_readings_are_the_naive_loop(position: str, n_last: int, architecture: str) -> None:
    lens, labelled, sae = lens_of(), prompt_set(), drawn_sae(architecture=architecture)
    found = read_stage(
        lens,
        labelled,
        sae,
        stage="s",
        role="open",
        position=position,
        rivals={},
        fvu_bound=None,
        batch_tokens=30,
        progress=False,
    )
    dense, codes, rebuilt, tokens = naive(lens, labelled, sae, n_last, position)
    assert (found.dense - dense).abs().max() < 1e-4
    assert (found.codes["sae"] - codes).abs().max() < 1e-4 * codes.abs().max()
    assert (found.reconstruction - rebuilt).abs().max() < 1e-4 * rebuilt.abs().max()
    f = sae.encode(tokens)
    left = (tokens - sae.decode(f)).double().square().sum()
    fvu = left / (tokens - tokens.mean(0)).double().square().sum()
    assert found.facts["n_tokens"] == len(tokens)
    assert found.facts["l0"] == pytest.approx(float((f != 0).sum(1).float().mean()))
    assert found.facts["dead_share"] == pytest.approx(float((f == 0).all(0).float().mean()))
    assert found.facts["fvu"] == pytest.approx(float(fvu), rel=1e-4)
    assert set(found.codes) == {"sae"} and found.space == Space("resid_post", 1)
    assert (found.stage, found.role, found.position) == ("s", "open", position)
    assert found.model_hash == lens.fingerprint


def test_rows_keep_the_order_of_the_set_and_repeats_are_run_once() -> None:
    lens, labelled, sae = lens_of(), prompt_set(), drawn_sae()
    rows = [labelled.prompts[i] for i in (5, 0, 5, 3)]
    whole = read_stage(lens, labelled, sae, rivals={}, fvu_bound=None, progress=False)
    some = read_stage(lens, rows, sae, rivals={}, fvu_bound=None, progress=False)
    assert (some.codes["sae"] - whole.codes["sae"][[5, 0, 5, 3]]).abs().max() < 1e-4
    assert some.facts["n_tokens"] == 9  # three distinct prompts, three tokens each


def test_suffix_is_what_every_prompt_shares() -> None:
    ids = [(1, 5, 6, 7), (1, 9, 6, 7), (2, 4, 6, 7)]
    assert token_spans(ids, "suffix_mean") == [range(2, 4)] * 3
    assert token_spans([*ids, (1, 2, 3)], "suffix_mean") == [range(3, 4)] * 3 + [range(2, 3)]
    assert token_spans([(5,), (5, 6)], "all_mean") == [range(0, 1), range(1, 2)]
    # the first token never counts, even where all prompts are one
    assert token_spans([(1, 2, 3), (1, 2, 3)], "suffix_mean") == [range(1, 3)] * 2
    with pytest.raises(PromptError, match="position"):
        token_spans(ids, "middle")


def test_rivals_are_read_beside_it_with_its_l0() -> None:
    lens, labelled = lens_of(), prompt_set(40)
    for architecture in ("topk", "jumprelu"):
        sae = drawn_sae(architecture=architecture)
        found = read_stage(lens, labelled, sae, position="all_mean", fvu_bound=None, progress=False)
        assert set(found.codes) == {"sae", "random sae", "rotated sae"}
        for name in ("random sae", "rotated sae"):
            assert found.facts[f"{name} l0"] == pytest.approx(found.facts["l0"], rel=0.05)
            assert not torch.allclose(found.codes[name], found.codes["sae"])
        again = read_stage(lens, labelled, sae, position="all_mean", fvu_bound=None, progress=False)
        other = read_stage(
            lens, labelled, sae, position="all_mean", seed=1, fvu_bound=None, progress=False
        )
        assert torch.equal(again.codes["random sae"], found.codes["random sae"])
        assert not torch.equal(other.codes["random sae"], found.codes["random sae"])


def test_rivals_made_once_serve_every_stage() -> None:
    clean, tuned, labelled = lens_of(), lens_of(seed=1), prompt_set()
    sae = drawn_sae(architecture="jumprelu")
    rivals = rival_saes(sae, reference_activations(clean, labelled, sae))
    for lens in (clean, tuned):
        found = read_stage(lens, labelled, sae, rivals=rivals, fvu_bound=None, progress=False)
        x = read_stage(
            lens, labelled, sae, rivals={}, position="last", fvu_bound=None, progress=False
        ).dense
        last = read_stage(
            lens, labelled, sae, rivals=rivals, position="last", fvu_bound=None, progress=False
        )
        expected = rivals["random sae"].encode(x)
        assert (last.codes["random sae"] - expected).abs().max() < 1e-4
        assert found.codes["random sae"].shape == (len(labelled), H)


def test_components_read_their_own_sites_input() -> None:
    lens, labelled, sae = lens_of(), prompt_set(), drawn_sae()
    draw = torch.Generator().manual_seed(4)
    parts = []
    for name in ("blocks.2.mlp.out", "blocks.0.attn.q"):
        site = lens.site(name)
        parts.append(
            Components(
                site,
                torch.randn(5, site.d_in, generator=draw),
                torch.randn(5, site.d_out, generator=draw),
                torch.ones(5),
                method="vpd",
            )
        )
    found = read_stage(
        lens, labelled, sae, components=parts, rivals={}, fvu_bound=None, progress=False
    )
    for part in parts:
        expected = []
        for prompt in labelled.prompts:
            run = lens.run(torch.tensor([prompt]), capture=[f"{part.site.name}:in"])
            x = run.captured[f"{part.site.name}:in"][0, -3:]
            expected.append((x @ part.read.T).mean(0))
        seen = found.components[f"vpd {part.site.name}"]
        assert (seen - torch.stack(expected)).abs().max() < 1e-4
    named = read_stage(
        lens,
        labelled,
        sae,
        components={"mine": parts[0]},
        rivals={},
        fvu_bound=None,
        progress=False,
    )
    assert set(named.components) == {"mine"}
    twice = read_stage(
        lens,
        labelled,
        sae,
        components=[parts[0], replace(parts[0], stage="sft")],
        rivals={},
        fvu_bound=None,
        progress=False,
    )
    assert set(twice.components) == {"vpd blocks.2.mlp.out", "vpd blocks.2.mlp.out sft"}
    with pytest.raises(SiteError, match="components"):
        read_stage(lens_of(n_layers=2), labelled, sae, components=parts, fvu_bound=None)


def test_a_difference_is_read_on_both_models() -> None:
    base, tuned, labelled = lens_of(), lens_of(seed=3), prompt_set()
    sae = drawn_sae().described(difference_of="tuned − base")
    found = read_stage(
        tuned, labelled, sae, base=base, rivals={}, fvu_bound=None, position="last", progress=False
    )
    plain = replace(sae, metadata=replace(sae.metadata, difference_of=""))
    a, b = (
        read_stage(m, labelled, plain, rivals={}, fvu_bound=None, position="last", progress=False)
        for m in (tuned, base)
    )
    assert (found.dense - (a.dense - b.dense)).abs().max() < 1e-5
    assert (found.codes["sae"] - sae.encode(a.dense - b.dense)).abs().max() < 1e-3
    with pytest.raises(MismatchError, match="base="):
        read_stage(tuned, labelled, sae, progress=False)
    with pytest.raises(MismatchError, match="base="):
        read_stage(tuned, labelled, plain, base=base, progress=False)


# ---- activations the user has ---------------------------------------------------------------
def test_given_activations_in_three_shapes() -> None:
    sae, draw = drawn_sae(architecture="jumprelu"), torch.Generator().manual_seed(0)
    rows = [torch.randn(int(n), D, generator=draw) for n in (3, 1, 5, 2)]
    codes = torch.stack([sae.encode(row).mean(0) for row in rows])
    ragged = readings_of(rows, sae, rivals={}, role="clean")
    padded = torch.full((4, 5, D), 9.0)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, True
    for found in (ragged, readings_of(padded, sae, mask=mask, rivals={}, role="clean")):
        assert (found.codes["sae"] - codes).abs().max() < 1e-5
        assert (found.dense - torch.stack([row.mean(0) for row in rows])).abs().max() < 1e-5
        assert found.facts["n_tokens"] == 11
    one = readings_of(padded[:, 0], sae)
    assert (one.codes["sae"] - sae.encode(padded[:, 0])).abs().max() < 1e-5
    assert set(one.codes) == {"sae", "random sae", "rotated sae"}
    best = readings_of(rows, sae, rivals={}, largest=True)
    assert (
        best.codes["sae"] - torch.stack([sae.encode(r).amax(0) for r in rows])
    ).abs().max() < 1e-5
    with pytest.raises(MismatchError, match="width 5"):
        readings_of(torch.ones(4, 5), sae)
    with pytest.raises(PromptError, match="prompt 1"):
        readings_of([rows[0], rows[1][:0]], sae)
    with pytest.raises(PromptError, match="prompt 0"):
        readings_of(torch.full((4, D), torch.nan), sae)


def test_many_given_rows_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from probes import sae as module

    sae, x = drawn_sae(), torch.randn(50, 2, D, generator=torch.Generator().manual_seed(0))
    whole = readings_of(x, sae, rivals={})
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(sae_pool, "BLOCK", 11)
    parts = readings_of(x, sae, rivals={})
    assert torch.allclose(whole.codes["sae"], parts.codes["sae"], atol=1e-5)
    assert whole.facts == pytest.approx(parts.facts)


def test_a_matrix_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_pool, "DENSE_SHARE", 1e-12)
    with pytest.raises(PromptError, match=r"pooled codes.*narrower"):
        readings_of(torch.ones(4, D), drawn_sae(), rivals={})


# ---- fit ------------------------------------------------------------------------------------
def test_the_right_point_is_accepted_and_the_wrong_one_refused() -> None:
    lens, labelled = lens_of(), prompt_set(60)
    sae = fitting_sae(lens, "resid_post.2", labelled)
    fit = check_fit(sae, lens, labelled)
    x = activations(lens, list(labelled.prompts), ["resid_post.2"])["resid_post.2"]
    assert fit.fvu == pytest.approx(fvu_of(sae, x), abs=0.05) and fit.fvu < 0.25
    assert fit.capture == "resid_post.2" and not fit.reservations
    wrong = sae.described(hook_name="blocks.0.hook_resid_post")
    with pytest.raises(MismatchError, match=r"resid_post\.0, and of 0\.\d+ at resid_post\.2"):
        check_fit(wrong, lens, labelled)
    # a tuned stage may have moved the stream, so there the other point must fit far better
    assert check_fit(wrong, lens, labelled, tuned=True).elsewhere["resid_post.2"] < 0.25
    far = sae.described(hook_name="blocks.0.hook_resid_pre")
    with pytest.raises(MismatchError, match=r"resid_pre\.0, and of 0\.\d+ at resid_post\.2"):
        check_fit(far, lens, labelled, tuned=True)
    with pytest.raises(MismatchError, match=r"hook name \(or convention\) is probably wrong"):
        read_stage(lens, labelled, wrong, role="clean", progress=False)
    assert check_fit(wrong, lens, labelled, bound=None).elsewhere["resid_post.2"] < 0.25


def test_another_model_is_refused_unless_it_is_a_tuned_stage() -> None:
    lens, labelled = lens_of(), prompt_set(60)
    sae = drawn_sae().described(model_name="owner/base")
    with pytest.raises(MismatchError, match=r"FVU of [\d.]+.*at most 0\.9"):
        check_fit(sae, lens, labelled)
    fit = check_fit(sae, lens, labelled, tuned=True)
    assert fit.fvu > 0.9
    assert "owner/base" in fit.reservations[0] and f"FVU {fit.fvu:.3g}" in fit.reservations[0]


@pytest.mark.parametrize(
    ("hook", "error", "words"),
    [
        ("", SiteError, "no hook name"),
        ("blocks.9.hook_resid_post", SiteError, "3-layer llama"),
        ("blocks.1.hook_mlp_in", SiteError, "no point known"),
        ("blocks.1.ln2.hook_normalized", SiteError, "no point known"),
        ("transformer.h.1.mlp.c_fc", SiteError, "no point known"),
        ("blocks.1.mlp.hook_post", MismatchError, "96"),
        ("blocks.7.mlp.down_proj.input", SiteError, "no point known"),
    ],
)
def test_places_that_are_none(hook: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_fit(drawn_sae(hook), lens_of())


@pytest.mark.parametrize(
    ("hook", "capture"),
    [
        ("blocks.2.hook_resid_post", "resid_post.2"),
        ("blocks.2.hook_out", "resid_post.2"),
        ("blocks.2.hook_in", "resid_post.1"),
        ("model.layers.2", "resid_post.2"),
        ("blocks.2.hook_resid_mid", "resid_mid.2"),
        ("blocks.2.attn.hook_z", "attn_z.2"),
        ("blocks.2.hook_mlp_out", "blocks.2.mlp.out:out"),
        ("blocks.2.hook_attn_out", "blocks.2.attn.o:out"),
        ("model.layers.2.mlp", "blocks.2.mlp.out:out"),
        ("model.layers.2.mlp.output", "blocks.2.mlp.out:out"),
        ("model.layers.2.mlp.input", "blocks.2.mlp.in:in"),
        ("model.layers.2.mlp.up_proj.input", "blocks.2.mlp.in:in"),
        ("model.layers.2.self_attn.o_proj", "blocks.2.attn.o:out"),
        ("model.layers.2.post_attention_layernorm.output", "blocks.2.mlp.in:in"),
        ("blocks.2.mlp.out.hook_out", "blocks.2.mlp.out:out"),
    ],
)
def test_hook_names_of_every_library(hook: str, capture: str) -> None:
    lens = lens_of()
    assert capture_of(drawn_sae(hook), lens) == capture
    lens.run(torch.tensor([[1, 2, 3]]), capture=[capture], logits=False)


def test_behind_a_post_norm_mlp_out_is_not_the_matrix() -> None:
    lens = lens_of("gemma2")
    with pytest.raises(SiteError, match="no point known"):
        capture_of(drawn_sae("blocks.1.hook_mlp_out"), lens)
    both = drawn_sae("blocks.1.hook_mlp_in").described(
        hf_hook_name="model.layers.1.pre_feedforward_layernorm.output"
    )
    assert capture_of(both, lens) == "blocks.1.mlp.in:in"


def test_every_backend_reads_the_same(tmp_path: Path) -> None:
    lens, labelled = lens_of("gpt2"), prompt_set()
    others = [conformance.bridge(lens.model, tmp_path)]
    if conformance.has_hooked_transformer():
        others.append(conformance.hooked_transformer(lens.model))
    for other in map(mw.load, others):
        for hook in ("blocks.1.hook_out", "transformer.h.1", "blocks.1.hook_resid_post"):
            a, b = (
                read_stage(m, labelled, drawn_sae(hook), rivals={}, fvu_bound=None, progress=False)
                for m in (lens, other)
            )
            assert (a.codes["sae"] - b.codes["sae"]).abs().max() < 1e-3
            assert a.space == b.space == Space("resid_post", 1)


# ---- conventions ------------------------------------------------------------------------------
def test_centred_weights_are_undone_where_that_is_exact() -> None:
    """The stream of a centred GPT-2 is the raw stream minus its mean over coordinates."""
    lens, labelled = lens_of("gpt2"), prompt_set(60)
    centred = fitting_sae(lens, "resid_post.2", labelled)
    x = activations(lens, list(labelled.prompts), ["resid_post.2"])["resid_post.2"]
    x = x - x.mean(-1, keepdim=True)
    v = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:16]
    centred = replace(
        centred, W_enc=torch.cat([v, -v]).T, W_dec=torch.cat([v, -v]), b_dec=x.mean(0)
    ).described(convention="centred")
    found = read_stage(lens, labelled, centred, role="clean", position="last", progress=False)
    raw = found.dense
    seen = raw - raw.mean(-1, keepdim=True)
    assert (found.codes["sae"] - centred.encode(seen)).abs().max() < 1e-4
    # the reconstruction is of the raw stream, so that its error is the SAE's
    error = found.dense - found.reconstruction
    assert (error - (seen - centred.decode(centred.encode(seen)))).abs().max() < 1e-3
    other = drawn_sae().described(convention="centred")  # its rows are not orthogonal to the mean
    found = read_stage(
        lens, labelled, other, rivals={}, position="last", fvu_bound=None, progress=False
    )
    seen = found.dense - found.dense.mean(-1, keepdim=True)
    assert (found.codes["sae"] - other.encode(seen)).abs().max() < 1e-4
    assert check_fit(centred, lens, labelled).centred
    assert not check_fit(centred, lens_of("llama")).centred  # nothing to centre behind an RMS norm
    unknown = check_fit(centred.described(convention="unknown"), lens, labelled, bound=None)
    assert any("centred" in text for text in unknown.reservations)
    with pytest.raises(ConventionError, match="centred weights"):
        check_fit(
            drawn_sae("blocks.1.attn.hook_z").described(convention="centred"), lens_of("gpt2")
        )


def test_tokens_the_sae_was_not_trained_on_are_said() -> None:
    from mi_weightspace.models.toy import tiny_tokenizer

    lens = TorchLens(tiny_model("llama", n_layers=3), tiny_tokenizer())
    sae = drawn_sae().described(prepend_bos=True, context_size=4)
    text = check_fit(sae, lens, ["A B C", "<bos> A B C D E"], bound=None).reservations
    assert any("BOS" in t for t in text) and any("trained on 4" in t for t in text)
    clean = check_fit(sae, lens, ["<bos> A B", "<bos> B C"], bound=None).reservations
    assert clean == ()


def test_the_trap_of_batch_top_k_is_said() -> None:
    lens, labelled = lens_of(), prompt_set()
    sae = drawn_sae(architecture="jumprelu").described(trained_k=4.0)
    found = read_stage(lens, labelled, sae, rivals={}, fvu_bound=None, progress=False)
    assert found.facts["l0_over_k"] == pytest.approx(found.facts["l0"] / 4)
    assert found.facts["l0_over_k"] > 1.5 and "training kept 4" in sae_reservations(found.facts)[0]
    x = reference_activations(lens, labelled, sae)
    mended = read_stage(
        lens,
        labelled,
        sae.with_l0(x, 4.0),
        position="all_mean",
        rivals={},
        fvu_bound=None,
        progress=False,
    )
    assert sae_reservations(mended.facts) == ()


def test_a_transcoder_is_encoded_and_not_reconstructed() -> None:
    lens, labelled = lens_of(), prompt_set()
    draw = torch.Generator().manual_seed(2)
    sae = Sae(
        "jumprelu_transcoder",
        W_enc=torch.randn(D, H, generator=draw),
        W_dec=torch.randn(H, D, generator=draw),
        b_dec=torch.zeros(D),
        b_enc=torch.zeros(H),
        threshold=torch.ones(H),
    ).described(hook_name="model.layers.1.mlp.input")
    found = read_stage(lens, labelled, sae, progress=False)
    assert found.reconstruction is None and "fvu" not in found.facts and found.space is None
    assert check_fit(sae, lens, labelled).fvu is None
    assert set(found.codes) == {"sae", "random sae", "rotated sae"}


# ---- prompts ----------------------------------------------------------------------------------
def test_prompts_the_model_cannot_read() -> None:
    lens, sae = lens_of(), drawn_sae()
    for prompts, words in (
        ([], "none"),
        (["text"], "tokenizer"),
        ([(1, 999)], "vocabulary"),
        ([(1, -2)], "vocabulary"),
        ([tuple(range(70))], "70 tokens"),
        ([()], "non-empty"),
    ):
        with pytest.raises(PromptError, match=words):
            read_stage(lens, prompts, sae, progress=False)
    with pytest.raises(PromptError, match="position"):
        read_stage(lens, prompt_set(), sae, position="first", fvu_bound=None, progress=False)
    with pytest.raises(ConfigError):
        sae.with_l0(torch.ones(2, D), -1)
