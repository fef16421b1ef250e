"""Stored directions: equal after a round trip, refused where they do not belong, exported truly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import (
    check_convention,
    hook_name,
    load_direction,
    load_directions,
    save_direction,
    to_layer_dict,
    to_nnsight,
    to_transformer_lens_hook,
)
from mi_weightspace.core.errors import ConventionError, DirectionError, OutputError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space

pytestmark = pytest.mark.quick


def direction(space: str, seed: int = 0) -> Direction:
    g = generator(seed, space)
    return Direction(
        pattern=torch.randn(6, generator=g),
        space=Space.parse(space),
        label="authority",
        filter=torch.randn(6, generator=g),
        scale=2.5,
        stage="sft",
        model_hash="abc",
        prompts_hash="def",
        position="last",
        method="lda",
        fit={"auroc": 0.9, "n_clusters": 12, "rule": "nested"},
        mean=torch.randn(6, generator=g),
        variance=torch.rand(6, generator=g),
        pcs=torch.randn(2, 6, generator=g),
        control_patterns=torch.randn(3, 6, generator=g),
        control_filters=torch.randn(3, 6, generator=g),
        control_names=("shelf", "weather", "☃"),
    )


def same(a: Direction, b: Direction) -> bool:
    tensors = ("filter", "mean", "variance", "pcs", "control_patterns", "control_filters")
    texts = ("space", "label", "stage", "model_hash", "prompts_hash", "position", "method")
    return (
        torch.allclose(a.pattern, b.pattern, atol=1e-7)
        and all(torch.allclose(getattr(a, n), getattr(b, n), atol=1e-7) for n in tensors)
        and all(getattr(a, n) == getattr(b, n) for n in texts)
        and (a.scale, a.control_names, dict(a.fit)) == (b.scale, b.control_names, dict(b.fit))
    )


def test_round_trip_of_one_and_of_many(tmp_path: Path) -> None:
    one = direction("resid_mid.3")
    assert same(load_direction(save_direction(one, tmp_path / "one.safetensors")), one)
    spaces = ["resid_pre.0", "resid_mid.0", "resid_post.0", "resid_mid.1", "resid_post.1"]
    many = [direction(s) for s in spaces]
    path = save_direction(many, tmp_path / "many.safetensors")
    assert all(same(a, b) for a, b in zip(load_directions(path), many, strict=True))
    assert load_direction(path, layer=1).space == Space("resid_post", 1)
    assert load_direction(path, space="resid_mid.1").space == Space("resid_mid", 1)
    assert load_direction(path, space="resid_pre.1").space == Space("resid_post", 0)
    with pytest.raises(DirectionError, match="5 directions"):
        load_direction(path)
    with pytest.raises(DirectionError, match=r"layer=7"):
        load_direction(path, layer=7)


def test_a_bare_vector_needs_its_layer(tmp_path: Path) -> None:
    vector = torch.tensor([3.0, 0.0, 4.0])
    save_file({"v": vector}, tmp_path / "bare.safetensors")
    loaded = load_direction(tmp_path / "bare.safetensors", layer=5)
    assert (loaded.space, loaded.scale) == (Space("resid_post", 5), 5.0)
    assert torch.allclose(loaded.pattern, vector / 5)
    with pytest.raises(DirectionError, match="the layer or space"):
        load_direction(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"v": torch.zeros(4)}, "zero vector"),
        ({"v": torch.tensor([1.0, float("nan")])}, "non-finite"),
        ({"v": torch.ones(2, 4)}, "without a direction header"),
        ({"v": torch.ones(4), "w": torch.ones(4)}, "without a direction header"),
    ],
)
def test_bad_vectors_are_refused(
    tensors: dict[str, torch.Tensor], match: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(DirectionError, match=match):
        load_direction(tmp_path / "bad.safetensors", layer=0)


def test_what_is_no_direction_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match="no such file"):
        load_direction(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(DirectionError, match="readable safetensors"):
        load_direction(tmp_path / "text.safetensors", layer=0)
    path = save_direction(direction("resid_post.0"), tmp_path / "x.safetensors")
    with pytest.raises(OutputError, match="taken"):
        save_direction(direction("resid_post.0"), path)
    with pytest.raises(DirectionError, match="none"):
        save_direction([], tmp_path / "y.safetensors")
    mixed = [direction("resid_post.0"), replace(direction("resid_post.1"), filter=None)]
    with pytest.raises(DirectionError, match="different widths or contents"):
        save_direction(mixed, tmp_path / "y.safetensors")
    assert [p.name for p in tmp_path.glob("*y*")] == []


def test_a_direction_is_refused_on_another_model() -> None:
    shape = SimpleNamespace(d_model=6, n_layers=4)
    lens = SimpleNamespace(shape=shape, convention="raw")
    good = direction("resid_post.3")
    check_convention(good, lens)
    check_convention(good, SimpleNamespace(shape=shape))
    with pytest.raises(ConventionError, match="folded"):
        check_convention(replace(good, convention="folded"), lens)
    with pytest.raises(ConventionError, match="centred"):
        check_convention(good, SimpleNamespace(shape=shape, convention="centred"))
    with pytest.raises(DirectionError, match="width 6"):
        check_convention(good, SimpleNamespace(shape=SimpleNamespace(d_model=8, n_layers=4)))
    with pytest.raises(DirectionError, match="layer 4"):
        check_convention(direction("resid_post.4"), lens)


def test_exports_add_alpha_scale_pattern() -> None:
    d = direction("resid_post.2")
    x = torch.randn(2, 3, 6, generator=generator(0, "x"), dtype=torch.float64)
    step = 0.5 * 2.5 * d.pattern.double()
    hook = to_transformer_lens_hook(d, 0.5)
    assert torch.allclose(hook(x, hook=None), x + step, atol=1e-6)
    assert hook(x.float(), hook=None).dtype == torch.float32
    last = to_nnsight(d, 0.5, position=-1)(x)
    assert torch.equal(last[:, :-1], x[:, :-1])
    assert torch.allclose(last[:, -1], x[:, -1] + step, atol=1e-6)
    assert hook_name(d) == "blocks.2.hook_resid_post"
    assert Space.parse(hook_name(d)) == d.space
    exported = to_layer_dict([d, direction("resid_mid.2")])
    assert list(exported) == [2]
    assert torch.equal(exported[2], d.pattern)
    with pytest.raises(DirectionError, match="no direction at a resid_post"):
        to_layer_dict([direction("resid_mid.2")])
