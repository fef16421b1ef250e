"""NaN and infinity are refused by name wherever a tensor comes in: role × dtype × entry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trust_counter import Figure
from trust_models import WEIGHTS, copied, save_adapter, sound

import mi_weightspace as mw
import probes
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.direction_io import load_directions
from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.sae import Sae
from mi_weightspace.models import toy
from probes.sae_disk import read_folder, write_folder

NAME, UNIT = "non-finite refusal", "role × dtype × entry"
VALUES = (math.nan, math.inf, -math.inf)
PLACES = ("first", "middle", "last")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def spoil(tensor: Tensor, value: float, place: str) -> Tensor:
    """A copy with one bad entry."""
    copy = tensor.clone().contiguous()
    flat = copy.view(-1)
    flat[{"first": 0, "middle": flat.numel() // 2, "last": flat.numel() - 1}[place]] = value
    return copy


def entries() -> Iterator[tuple[float, str]]:
    return itertools.product(VALUES, PLACES)


def outcome(act: Callable[[], Any], names: tuple[str, ...], what: str) -> str | None:
    try:
        act()
    except WeightspaceError as error:
        good = all(name in str(error) for name in names)
        return None if good else f"{what}: does not name {names}: {str(error)[:160]}"
    except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
        return f"{what}: {type(error).__name__}: {str(error)[:120]}"
    return f"{what}: taken"


ROLES = {
    "llama": ("embed_tokens.weight", "0.self_attn.k_proj.weight", "1.mlp.down_proj.weight",
              "1.input_layernorm.weight", "model.norm.weight", "lm_head.weight"),
    "gpt2": ("0.attn.c_attn.weight", "1.mlp.c_fc.bias", "0.attn.c_attn.bias", "0.ln_1.bias",
             "1.ln_2.weight", "wpe.weight"),
    "gemma2": ("0.post_feedforward_layernorm.weight", "1.post_attention_layernorm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("family", ROLES)
def test_checkpoints(family: str, tmp_path: Path) -> None:
    """Weights, biases, gains, shifts and positions of the earlier and the later stage."""
    tried = "weights, biases, gains, positions of either stage; 4 dtypes; NaN, ±inf; 3 places"
    source = sound(tmp_path, family)
    with Figure(NAME, UNIT, tried) as figure:
        for leaf, dtype, (number, (value, place)) in itertools.product(
            ROLES[family], DTYPES, enumerate(entries())
        ):
            if (number + DTYPES.index(dtype) + ROLES[family].index(leaf)) % 4:
                continue  # each combination of role and dtype gets two or three of the nine
            held = {k: v.to(dtype) for k, v in load_file(source / WEIGHTS).items()}
            key = next(k for k in held if k.endswith(leaf))
            held[key] = spoil(held[key], value, place)
            target = tmp_path / "bad"
            copied(source, target, lambda f, h=held: save_file(h, f / WEIGHTS, {"format": "pt"}))
            stages = {"base": source, "sft": target}
            if number % 2:
                stages = {"base": target, "sft": source}
            what = f"{family} {leaf} {dtype} {value} {place}"
            figure.add(problem=outcome(lambda s=stages: mw.load_lineage(**s).check(), (key,), what))
            for file in target.iterdir():
                file.unlink()
            target.rmdir()


def test_a_sweep_refuses_them_too(tmp_path: Path) -> None:
    """`svd` reads on its own, through the fast path of the storage precision."""
    source = sound(tmp_path, "llama")
    key = "model.layers.1.mlp.down_proj.weight"
    with Figure(NAME, UNIT, "the same matrices in a sweep") as figure:
        for number, (dtype, (value, place)) in enumerate(itertools.product(DTYPES, entries())):
            before = {k: v.to(dtype) for k, v in load_file(source / WEIGHTS).items()}
            after = before | {key: spoil(before[key], value, place)}
            folders = {}
            for name, held in (("base", before), ("sft", after)):
                folders[name] = tmp_path / f"{number}{name}"
                copied(source, folders[name], lambda f, h=held: save_file(h, f / WEIGHTS))
            difference = mw.load_lineage(**folders).diff("base", "sft")
            act = lambda d=difference: mw.svd(d, "blocks.1.mlp.out", 2, progress=False)  # noqa: E731
            figure.add(problem=outcome(act, (key,), f"svd {dtype} {value} {place}"))


def test_beyond_float32(tmp_path: Path) -> None:
    """A float64 value that is infinite in the precision that is computed in."""
    source = sound(tmp_path, "llama")
    held = {k: v.double() for k, v in load_file(source / WEIGHTS).items()}
    key = "model.layers.0.mlp.up_proj.weight"
    held[key][3, 4] = 1e300
    save_file(held, source / WEIGHTS, {"format": "pt"})
    with Figure(NAME, UNIT, "1e300 in float64") as figure:
        act = mw.load_lineage(a=sound(tmp_path / "b", "llama"), b=source).check
        figure.add(problem=outcome(act, (key,), "1e300"))


def test_adapters(tmp_path: Path) -> None:
    base = sound(tmp_path, "llama")
    source = save_adapter(tmp_path / "adapter", base)
    file = "adapter_model.safetensors"
    with Figure(NAME, UNIT, "A and B of adapters; 3 dtypes") as figure:
        for half, dtype, (value, place) in itertools.product("AB", DTYPES[:3], entries()):
            held = {k: v.to(dtype) for k, v in load_file(source / file).items()}
            key = f"base_model.model.model.layers.1.mlp.down_proj.lora_{half}.weight"
            held[key] = spoil(held[key], value, place)
            target = tmp_path / f"bad{figure.count}"
            copied(source, target, lambda f, h=held: save_file(h, f / file))
            act = lambda t=target: mw.load_lineage(base=base, sft=t)  # noqa: E731
            figure.add(problem=outcome(act, (key,), f"{half} {dtype} {value} {place}"))


def test_live_models() -> None:
    roles = ("1.self_attn.q_proj.weight", "0.mlp.up_proj.weight", "1.input_layernorm.weight",
             "model.norm.weight", "0.self_attn.k_proj.bias")  # fmt: skip
    sites = ("blocks.1.attn.q", "blocks.0.mlp.in", "blocks.1.attn", "unembed", "blocks.0.attn.k")
    from mi_weightspace.models.backends.torch_hooks import TorchLens
    from mi_weightspace.models.weights import ModuleSource

    with Figure(NAME, UNIT, "matrices, biases and gains of a live model") as figure:
        for (leaf, site), (value, place) in itertools.product(
            zip(roles, sites, strict=True), entries()
        ):
            before, after = (toy.tiny_model("qwen2", seed=s) for s in (0, 1))
            with torch.no_grad():
                tensor = next(p for n, p in after.named_parameters() if n.endswith(leaf))
                tensor.copy_(spoil(tensor, value, place))
            pair = {n: ModuleSource(TorchLens(m), n) for n, m in (("base", before), ("sft", after))}
            act = lambda p=pair: mw.load_lineage(**p).check()  # noqa: E731
            figure.add(problem=outcome(act, (site,), f"live {leaf} {value} {place}"))


def test_directions(tmp_path: Path) -> None:
    width = 8
    one = torch.arange(1.0, width + 1)
    whole: dict[str, Any] = {
        "pattern": one,
        "filter": one.flip(0),
        "mean": one,
        "variance": one,
        "pcs": torch.eye(width)[:3],
        "control_patterns": torch.eye(width)[:2],
        "control_filters": torch.eye(width)[:2],
    }
    space = mw.Space("resid_post", 1)
    with Figure(NAME, UNIT, "every tensor of a direction, in memory and on file") as figure:
        for name, (value, place) in itertools.product(whole, entries()):
            bad = whole | {name: spoil(whole[name], value, place)}
            act = lambda b=bad: mw.Direction(space=space, **b)  # noqa: E731
            said = "" if name == "pattern" else name
            figure.add(problem=outcome(act, ("direction", said), f"{name} {value} {place}"))
        for value in VALUES:
            act = lambda v=value: mw.Direction(one, space, scale=v)  # noqa: E731
            figure.add(problem=outcome(act, ("scale",), f"scale {value}"))
        for dtype, (value, place) in itertools.product(DTYPES, entries()):
            file = tmp_path / f"{figure.count}.safetensors"
            save_file({"vector": spoil(one.to(dtype), value, place)}, file)
            act = lambda f=file: load_directions(f, layer=1)  # noqa: E731
            figure.add(problem=outcome(act, ("direction",), f"file {dtype} {value} {place}"))


def test_saes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = {
        "W_enc": torch.randn(4, 6, generator=draw),
        "W_dec": torch.randn(6, 4, generator=draw),
        "b_enc": torch.zeros(6),
        "b_dec": torch.zeros(4),
        "threshold": torch.ones(6),
    }
    write_folder(Sae("jumprelu", **parts), tmp_path / "sae")
    with Figure(NAME, UNIT, "every tensor of an SAE, in memory and on file; 3 dtypes") as figure:
        for name, (value, place) in itertools.product(parts, entries()):
            bad = parts | {name: spoil(parts[name], value, place)}
            act = lambda b=bad: Sae("jumprelu", **b)  # noqa: E731
            figure.add(problem=outcome(act, (name,), f"{name} {value} {place}"))
        for name, dtype, (value, place) in itertools.product(parts, DTYPES[:3], entries()):
            target = tmp_path / f"sae{figure.count}"
            held = {k: v.to(dtype) for k, v in parts.items()}
            held[name] = spoil(held[name], value, place)
            target.mkdir()
            (target / "cfg.json").write_text((tmp_path / "sae" / "cfg.json").read_text())
            save_file(held, target / "sae_weights.safetensors")
            act = lambda t=target: read_folder(t)  # noqa: E731
            figure.add(problem=outcome(act, (name,), f"file {name} {dtype} {value} {place}"))


def test_activations() -> None:
    pairs = tuple(Pair(f"i{i}", (5, i + 6), (7, i + 6)) for i in range(8))
    contrasts = ContrastSet("t", (Contrast("t", "target", pairs),))
    points = ("resid_post.0", "resid_mid.1", "resid_post.1")
    with Figure(NAME, UNIT, "activations of a user, pooled or not; 3 dtypes") as figure:
        for point, dtype, (value, place) in itertools.product(points, DTYPES[:3], entries()):
            for size in ((16, 2, 4), (16, 4)):
                cache = {p: torch.ones(size, dtype=dtype) for p in points}
                cache[point] = spoil(cache[point], value, place)
                if len(size) == 3:  # the last token of every prompt is what is pooled
                    cache[point][:, -1] = cache[point].new_tensor(value)
                act = lambda c=cache: probes.from_cache(c, contrasts, stage="s")  # noqa: E731
                figure.add(problem=outcome(act, (point,), f"{point} {dtype} {value} {place}"))
