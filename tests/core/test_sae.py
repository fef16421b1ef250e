"""Dictionaries as tensors: naive float64 encoders, sparse codes, the two nulls, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mi_weightspace.core import sae as sae_module
from mi_weightspace.core.errors import ConfigError, MismatchError
from mi_weightspace.core.hook_names import hook_of_space, space_of_hook
from mi_weightspace.core.sae import Sae, SaeMetadata
from mi_weightspace.core.sae_codes import SparseCodes
from mi_weightspace.core.space import Space

pytestmark = pytest.mark.quick
D, H, N = 12, 40, 30
LINEAR = ("standard", "gated", "topk", "abstopk", "jumprelu")
AUTOENCODERS = (*LINEAR, "matching_pursuit")
TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)


def make(architecture: str, seed: int = 0, **changes: Any) -> Sae:
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    d_out = D + 3 if "transcoder" in architecture else D
    parts: dict[str, Any] = {"b_enc": 0.3 * rand(H)}
    if architecture == "gated":
        parts = {"b_gate": 0.3 * rand(H), "b_mag": 0.3 * rand(H), "r_mag": 0.3 * rand(H)}
    if "jumprelu" in architecture:
        parts["threshold"] = rand(H).abs()
        parts["threshold"][0] = -1.0  # a negative threshold lets no negative value through
    if "topk" in architecture:
        parts["k"] = 5
    parts = {"W_enc": rand(D, H), "W_dec": rand(H, d_out), "b_dec": rand(d_out)} | parts
    if architecture == "matching_pursuit":
        rows = parts["W_dec"] / parts["W_dec"].norm(dim=1, keepdim=True)
        rows = rows * (0.8 + 0.4 * torch.rand(H, 1, generator=draw))  # not all of norm one
        parts |= {"W_enc": rows.T, "W_dec": rows, "b_enc": None}
    return Sae(architecture, **(parts | changes))


def points(n: int = N, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=draw) + 0.5


def naive_pursuit(sae: Sae, x: torch.Tensor) -> torch.Tensor:
    """One token after the other; supports are kept as sets."""
    rows, bias = sae.W_dec.double(), sae.b_dec.double()
    out = torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        rest, support = token - bias if sae.apply_b_dec_to_input else token.clone(), set()
        for _ in range(sae.max_iterations or sae.d_in):
            products = [float(row @ rest) for row in rows]
            best = max(range(sae.d_sae), key=products.__getitem__)
            amount = max(products[best], 0.0)
            out[t, best] += amount
            rest = rest - amount * rows[best]
            before, support = support, support | ({best} if amount else set())
            if sae.stop_on_duplicate_support and support == before:
                break
            if float(rest.norm()) < sae.residual_threshold:
                break
    return out


def naive(sae: Sae, x: torch.Tensor) -> torch.Tensor:
    """One token and one latent at a time, float64, from the papers' formulas."""
    if sae.architecture == "matching_pursuit":
        return naive_pursuit(sae, x)
    w = {name: value.double() for name, value in sae.tensors().items()}
    out = torch.zeros(len(x), sae.d_sae, dtype=torch.float64)
    columns = w["W_enc"].T.tolist()
    for t, row in enumerate(x.double()):
        seen = (row - w["b_dec"] if sae.apply_b_dec_to_input else row).tolist()
        for j in range(sae.d_sae):
            dot = sum(a * b for a, b in zip(seen, columns[j], strict=True))
            if sae.architecture == "gated":
                magnitude = dot * float(w["r_mag"][j].exp()) + float(w["b_mag"][j])
                out[t, j] = max(magnitude, 0.0) if dot + float(w["b_gate"][j]) > 0 else 0.0
                continue
            pre = dot + float(w["b_enc"][j])
            if sae.rescale_acts_by_decoder_norm:
                pre *= float(w["W_dec"][j].norm())
            if "jumprelu" in sae.architecture and pre <= float(w["threshold"][j]):
                pre = 0.0
            out[t, j] = pre if "topk" in sae.architecture else max(pre, 0.0)
        if "topk" in sae.architecture:
            size = out[t].abs() if sae.architecture == "abstopk" else out[t]
            keep = sorted(range(sae.d_sae), key=lambda j: -float(size[j]))[: sae.k]
            row_out = torch.zeros(sae.d_sae, dtype=torch.float64)
            for j in keep:
                value = float(out[t, j])
                row_out[j] = value if sae.architecture == "abstopk" else max(value, 0.0)
            out[t] = row_out
    return out


CASES = [
    *((name, False, False) for name in AUTOENCODERS + TRANSCODERS),
    *((name, True, False) for name in AUTOENCODERS),
    *((name, applied, True) for name in ("topk", "abstopk") for applied in (False, True)),
]


@pytest.mark.parametrize(("architecture", "applied", "rescaled"), CASES)
def test_codes_are_the_formulas(architecture: str, applied: bool, rescaled: bool) -> None:
    sae = make(architecture, apply_b_dec_to_input=applied, rescale_acts_by_decoder_norm=rescaled)
    x = points(8)
    expected = naive(sae, x)
    assert (expected != 0).any() and (expected == 0).any()
    codes = sae.encode(x)
    assert (codes - expected).abs().max() < 1e-6 * expected.abs().max() + 1e-6
    norm = sae.W_dec.double().norm(dim=1) if rescaled else torch.ones(H, dtype=torch.float64)
    tied = architecture == "matching_pursuit"  # adds only what it took away
    bias = sae.b_dec.double() * (applied or not tied)
    decoded = (expected / norm) @ sae.W_dec.double() + bias
    assert (sae.decode(codes) - decoded).abs().max() < 1e-5 * decoded.abs().max()
    assert torch.equal(sae.encode(x.reshape(2, 4, D)).reshape(8, H), codes)


@pytest.mark.parametrize("architecture", AUTOENCODERS)
def test_sparse_codes_are_the_dense_ones(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = make(architecture, rescale_acts_by_decoder_norm="topk" in architecture), points()
    whole = sae.encode_sparse(x)
    monkeypatch.setattr(sae_module, "CHUNK_ELEMENTS", 3 * H)
    parts = sae.encode_sparse(x)
    for codes in (whole, parts):
        assert len(codes) == N
        assert (codes.dense() - sae.encode(x)).abs().max() < 1e-5
        assert codes.l0 == pytest.approx(float((sae.encode(x) != 0).sum(1).float().mean()))
        assert (sae.decode(codes) - sae.decode(sae.encode(x))).abs().max() < 1e-4


def test_a_k_that_reaches_negative_values_keeps_none_of_them() -> None:
    for architecture in ("topk", "abstopk"):
        sae, x = make(architecture, k=34), points(8)
        expected = naive(sae, x)
        assert bool((expected < 0).any()) == (architecture == "abstopk")
        assert (sae.encode(x) - expected).abs().max() < 1e-5
        assert (sae.encode_sparse(x).dense() - expected).abs().max() < 1e-5
        assert (sae.encode_sparse(x).value != 0).all()


def test_no_active_latent_decodes_to_the_bias() -> None:
    sae = replace(make("standard"), b_enc=torch.full((H,), -1e3))
    codes = sae.encode_sparse(points())
    assert codes.l0 == 0 and codes.latent.numel() == 0
    assert torch.equal(sae.decode(codes), sae.b_dec.expand(N, D))
    assert SparseCodes.join([codes, codes], H).dense().shape == (2 * N, H)


@pytest.mark.parametrize("architecture", AUTOENCODERS)
@pytest.mark.parametrize("applied", [False, True])
def test_rotated_is_the_trained_dictionary_on_turned_activations(
    architecture: str, applied: bool
) -> None:
    sae = make(architecture, apply_b_dec_to_input=applied)
    turned = sae.rotated(3)
    # the rotation, read off the encoders: W' = Q W with W of full row rank
    q = turned.W_enc.double() @ torch.linalg.pinv(sae.W_enc.double())
    assert (q @ q.T - torch.eye(D)).abs().max() < 1e-5
    assert (q - torch.eye(D)).abs().max() > 0.3
    x, centre = points().double(), sae.decode(torch.zeros(H)).double()
    back = (centre + (x - centre) @ q.T).float()
    assert (turned.encode(back) - sae.encode(x.float())).abs().max() < 1e-4
    rebuilt = turned.decode(turned.encode(back)).double()
    expected = centre + (sae.decode(sae.encode(x.float())).double() - centre) @ q.T
    assert (rebuilt - expected).abs().max() < 1e-3
    assert torch.equal(sae.rotated(3).W_enc, turned.W_enc)
    assert not torch.equal(sae.rotated(4).W_enc, turned.W_enc)


@pytest.mark.parametrize("architecture", (*AUTOENCODERS, "transcoder", "jumprelu_transcoder"))
def test_nulls_keep_width_rule_and_l0(architecture: str) -> None:
    sae, x = make(architecture), points(200) + 3.0
    l0 = sae.l0(x)
    near = 0.5 if architecture == "matching_pursuit" else 0.05  # whole steps
    for null in (sae.rotated(1, x), sae.randomised(1, x=x)):
        assert (null.d_in, null.d_sae, null.rule) == (D, H, sae.rule)
        assert null.l0(x) == pytest.approx(l0, abs=near)
    drawn = sae.randomised(1, x=x)
    assert (drawn.W_enc.norm(dim=0) - 1).abs().max() < 1e-5
    if sae.reconstructs:
        assert torch.equal(drawn.W_enc.T, drawn.W_dec)
    assert (drawn.W_enc * sae.W_enc).sum(0).abs().mean() < 2.0  # not the trained rows
    assert drawn.randomised(1, l0=3.0, x=x).l0(x) == pytest.approx(3.0, abs=near)


def test_random_latents_do_not_all_fire_on_the_mean() -> None:
    """With a mean twenty times the spread, uncentred random rows would fire by their mean alone."""
    sae, x = make("jumprelu"), points(200) + 20.0
    firing = (sae.randomised(0, l0=4.0, x=x).encode(x) > 0).float().mean(0)
    assert float(firing.max()) < 0.6


def test_without_activations_the_largest_latents_are_taken() -> None:
    drawn = make("standard").randomised(0, l0=6.2)
    assert drawn.architecture == "topk" and drawn.k == 6
    assert make("topk").randomised(0).k == 5
    assert make("gated").randomised(0, l0=3).l0(points()) <= 3
    with pytest.raises(ConfigError, match="neither l0"):
        make("standard").randomised(0)


@pytest.mark.parametrize("architecture", LINEAR)
@pytest.mark.parametrize("l0", [2.0, 7.5, 25.0])
def test_l0_is_set(architecture: str, l0: float) -> None:
    sae, x = make(architecture), points(100)
    moved = sae.with_l0(x, l0)
    if "topk" in architecture:
        assert moved.k == round(l0)
    else:
        assert moved.l0(x) == pytest.approx(l0, abs=0.02)
    for bad in (0.0, float(H), float("nan")):
        with pytest.raises(ConfigError, match="l0"):
            sae.with_l0(x, bad)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"W_dec": torch.ones(H, D + 1)}, "W_dec"),
        ({"b_dec": torch.ones(D + 1)}, "b_dec"),
        ({"b_enc": None}, "b_enc"),
        ({"b_enc": torch.full((H,), float("nan"))}, "b_enc.*not finite"),
        ({"W_enc": torch.ones(D)}, "W_enc"),
        ({"k": 0}, "k"),
        ({"k": H + 1}, "k"),
        ({"architecture": "temporal"}, "architecture"),
        ({"architecture": "matching_pursuit"}, "W_enc.*transpose"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"residual_threshold": float("nan")}, "residual_threshold"),
        ({"architecture": "gated"}, "b_gate"),
        ({"architecture": "jumprelu"}, "threshold"),
    ],
)
def test_refusals_name_the_part(changes: dict[str, Any], words: str) -> None:
    sae = make("topk").described(source="folder/sae_weights.safetensors")
    with pytest.raises(MismatchError, match=f"folder/sae_weights.safetensors, {words}"):
        replace(sae, **changes)


STOPS = [
    {"max_iterations": 3},
    {"residual_threshold": 1.8, "stop_on_duplicate_support": False},
    {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "max_iterations": 25},
    {"residual_threshold": 0.0},
    {"residual_threshold": 1.8},
]


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("stops", STOPS)
def test_a_pursuit_stops_where_it_should(stops: dict[str, Any], applied: bool) -> None:
    sae, x = make("matching_pursuit", apply_b_dec_to_input=applied, **stops), points(12)
    expected = naive(sae, x)
    others = [make("matching_pursuit", apply_b_dec_to_input=applied, **s) for s in STOPS]
    assert sum(torch.allclose(expected, naive(other, x)) for other in others) == 1  # it matters
    scale = expected.abs().max()
    assert (sae.encode(x) - expected).abs().max() < 1e-5 * scale
    assert (sae.encode_sparse(x).dense() - expected).abs().max() < 1e-5 * scale


def test_the_steps_of_a_pursuit_are_set_for_an_l0() -> None:
    sae, x = make("matching_pursuit"), points(60)
    for l0 in (1.2, 4.0, 6.4):
        moved = sae.with_l0(x, l0)
        assert moved.max_iterations is not None
        gap = abs(moved.l0(x) - l0)
        for step in (-1, 1):
            other = replace(sae, max_iterations=max(1, moved.max_iterations + step))
            assert gap <= abs(other.l0(x) - l0) + 1e-6
    far = float(sae.l0(x)) + 2  # where its stops would end it sooner
    moved = sae.with_l0(x, far)
    assert moved.l0(x) == pytest.approx(far, abs=0.6) and not moved.stop_on_duplicate_support
    for bad in (0.0, float(H), float("nan")):
        with pytest.raises(ConfigError, match="l0"):
            sae.with_l0(x, bad)
    assert sae.randomised(0, l0=3.2).max_iterations == 3
    # nothing to take: no latent, and no endless search for one
    rows = -sae.W_dec.abs()
    still = replace(sae, W_enc=rows.T, W_dec=rows)
    assert still.encode_sparse(points().abs()).l0 == 0
    assert still.with_l0(points().abs(), 3.0).max_iterations == 1


@pytest.mark.parametrize("applied", [False, True])
def test_a_pursuit_turns_about_the_mean(applied: bool) -> None:
    sae, x = make("matching_pursuit", apply_b_dec_to_input=applied, max_iterations=4), points()
    turned = replace(sae.rotated(3, x), max_iterations=4, stop_on_duplicate_support=True)
    turned = replace(turned, residual_threshold=sae.residual_threshold)
    q = turned.W_enc @ torch.linalg.pinv(sae.W_enc)
    back = x.mean(0) + (x - x.mean(0)) @ q.T
    assert (turned.encode(back) - sae.encode(x)).abs().max() < 1e-4


def test_a_tied_encoder_is_saved_once() -> None:
    assert set(make("matching_pursuit").saved_tensors()) == {"W_dec", "b_dec"}
    assert set(make("gated").saved_tensors()) == {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag",
                                                  "r_mag"}  # fmt: skip


def test_wrong_width_of_activations_is_refused() -> None:
    with pytest.raises(MismatchError, match="width 5"):
        make("topk").encode(torch.ones(3, 5))


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("blocks.3.hook_resid_post", Space("resid_post", 3)),
        ("blocks.3.hook_resid_pre", Space("resid_pre", 3)),
        ("blocks.3.hook_resid_mid", Space("resid_mid", 3)),
        ("blocks.3.hook_out", Space("resid_post", 3)),
        ("blocks.3.hook_in", Space("resid_pre", 3)),
        ("blocks.3.attn.hook_z", Space("attn_z", 3)),
        ("blocks.3.mlp.hook_post", Space("mlp_hidden", 3)),
        ("model.layers.13", Space("resid_post", 13)),
        ("model.layers.13.output", Space("resid_post", 13)),
        ("transformer.h.2", Space("resid_post", 2)),
        ("gpt_neox.layers.2.input", Space("resid_pre", 2)),
        ("model.layers.13.self_attn.o_proj.input", Space("attn_z", 13)),
        ("model.layers.13.mlp.down_proj.input", Space("mlp_hidden", 13)),
        ("resid_post.4", Space("resid_post", 4)),
        ("blocks.3.hook_mlp_out", None),
        ("blocks.3.attn.hook_resid_post", None),
        ("model.layers.13.mlp.down_proj", None),
        ("nonsense", None),
    ],
)
def test_hook_names(name: str, space: Space | None) -> None:
    assert space_of_hook(name) == space
    if space is not None:
        assert space_of_hook(hook_of_space(space)) == space


def test_the_module_path_wins_and_resid_pre_is_the_post_before() -> None:
    both = SaeMetadata(hook_name="blocks.1.hook_mlp_in", hf_hook_name="model.layers.4.output")
    assert replace(make("topk"), metadata=both).space == Space("resid_post", 4)
    assert make("topk").described(hook_name="blocks.2.hook_in").space == Space("resid_post", 1)
    assert make("topk").space is None
