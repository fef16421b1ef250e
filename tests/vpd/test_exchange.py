"""Component weights from and to elsewhere: exact round trips, upstream's names, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mi_weightspace as mw
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import CheckpointError, ConfigError, SiteError
from mi_weightspace.core.report import load_report
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space
from mi_weightspace.vpd.exchange import export_components, import_components
from tests.vpd.decomposed import language, parts_of, tokens

FAMILIES = ["gpt2", "llama", "gpt_neox"]


def pair(d_in: int, c: int, d_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = generator(seed, "pair")
    return torch.randn(d_in, c, generator=draw), torch.randn(c, d_out, generator=draw)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_reads_back_exactly(family: str, tmp_path: Path) -> None:
    parts, lens = parts_of(family), language(family)
    dead = {f"{s}/write": parts.write(s).clone() for s in parts.sites}
    for write in dead.values():
        write[4] = 0.0  # a component that writes nothing keeps its number
    parts = dataclasses.replace(parts, arrays={**parts.arrays, **dead})
    export_components(parts, lens, tmp_path / "c.safetensors")
    back = import_components(tmp_path / "c.safetensors", lens)
    assert back.sites == parts.sites
    for site in parts.sites:
        assert torch.equal(back.read(site), parts.read(site))
        assert torch.equal(back.write(site), parts.write(site))
        assert torch.equal(back[site].matrix(), parts[site].matrix())  # gains included
    with pytest.raises(ConfigError, match="exists"):
        export_components(parts, lens, tmp_path / "c.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_pairs_are_the_module_in_its_own_coordinates(family: str) -> None:
    """x V U of the whole (fused) module, against our site's own matrix and the module's output."""
    parts, lens = parts_of(family), language(family)
    path = {
        "gpt2": "transformer.h.0.attn.c_attn",
        "llama": "model.layers.0.self_attn.q_proj",
        "gpt_neox": "gpt_neox.layers.0.attention.query_key_value",
    }[family]
    tensors = export_components(parts, lens)
    module: Any = lens.model.get_submodule(path)
    stored = module.weight.detach()
    upstream = stored if family == "gpt2" else stored.T  # y = x W
    v, u = tensors[f"{path}.V"], tensors[f"{path}.U"]
    assert (v @ u).shape == upstream.shape
    q = lens.weight("blocks.0.attn.q").T
    rest = q - parts.read("blocks.0.attn.q").T @ parts.write("blocks.0.attn.q")
    # what the factors leave of the fused matrix is exactly q's own remainder, in q's columns
    used = u.any(0)
    assert int(used.sum()) == q.shape[1]
    left = (upstream - v @ u)[:, used]
    torch.testing.assert_close(left, rest, atol=1e-5, rtol=1e-5)


def test_a_fused_module_trained_as_one_becomes_three_sites() -> None:
    lens = language("gpt_neox")
    d = lens.shape.d_model
    v, u = pair(d, 7, 3 * d)
    u[3] = 0.0
    parts = import_components({"layers.0.attention.query_key_value.V": v,
                               "layers.0.attention.query_key_value.U": u}, lens)  # fmt: skip
    assert parts.sites == ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v")
    x = torch.randn(5, d, generator=generator(0, "x"))
    # per-head layout: (heads, [q, k, v], d_head)
    whole = (x @ v @ u).unflatten(-1, (lens.shape.n_heads, 3, lens.shape.d_head))
    for slot, site in enumerate(parts.sites):
        own = x @ parts.read(site).T @ parts.write(site)
        torch.testing.assert_close(own, whole[:, :, slot].flatten(-2), atol=1e-4, rtol=1e-4)
        assert len(parts.read(site)) == 6  # the one that writes nothing is left out


@pytest.mark.parametrize(
    ("family", "name", "site"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj", "blocks.1.mlp.out"),
        ("gpt2", "h.1.mlp.c_fc", "blocks.1.mlp.in"),
        ("gpt2", "_components.h-1-mlp-c_fc", "blocks.1.mlp.in"),
        ("gpt2", "components.h-0-attn-q_proj", "blocks.0.attn.q"),
        ("gpt2", "h.1.mlp.down_proj", "blocks.1.mlp.out"),
        ("llama", "model.layers.0.mlp.down_proj", "blocks.0.mlp.out"),
        ("llama", "layers.1.self_attn.o_proj", "blocks.1.attn.o"),
        ("llama", "model-layers-1-self_attn-k_proj", "blocks.1.attn.k"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h", "blocks.1.mlp.out"),
        ("llama", "blocks.0.mlp.gate", "blocks.0.mlp.gate"),
        ("gpt2", "wte", "embed"),
        ("llama", "lm_head", "unembed"),
    ],
)
def test_upstream_names_find_their_site(family: str, name: str, site: str) -> None:
    lens: Any = language(family)
    found = lens.sites(site)[0]
    v, u = pair(found.d_in, 5, found.d_out)
    parts = import_components({f"{name}.V": v, f"{name}.U": u}, lens)
    assert parts.sites == (site,)
    assert torch.equal(parts.read(site), v.T)
    assert torch.equal(parts.write(site), u)


def test_an_import_projects_edits_saves_and_says_what_it_is(tmp_path: Path) -> None:
    lens = language()
    exported = export_components(parts_of(), lens)
    tensors = exported | {"ci_fn.0.weight": torch.ones(2)}
    parts = import_components(tensors, lens, name="elsewhere")
    direction = Direction(torch.ones(32) / 32**0.5, Space.parse("resid_post.1"))
    report = mw.project(parts["blocks.1.mlp.out"], direction, progress=False)
    assert len(report.tables["components"]) == 40
    weight = parts.ablate("blocks.1.mlp.out", [2]).weights["blocks.1.mlp.out"]
    own = parts_of().ablate("blocks.1.mlp.out", [2]).weights["blocks.1.mlp.out"]
    assert torch.equal(weight, own)
    assert any("trained" in text for text in parts.reservations)
    loaded = load_report(parts.save(tmp_path / "run"))
    assert isinstance(loaded, mw.vpd.Decomposition)
    assert loaded.equals(parts)
    again = loaded.attach(lens).ablate("blocks.1.mlp.out", [2])
    assert torch.equal(again.weights["blocks.1.mlp.out"], own)
    for use in (lambda: parts.importances(tokens(1)), lambda: parts.card("blocks.1.mlp.out", 0, 1)):
        with pytest.raises(ConfigError, match="imported"):
            use()
    with pytest.raises(ConfigError, match="sign"):
        parts.rewrite("blocks.1.mlp.out", 0, write=torch.ones(32))


def test_the_remainder_tells_whose_components_they_are() -> None:
    left, size, right = torch.linalg.svd(language().weight("blocks.0.mlp.in").T)
    exact = {"h.0.mlp.c_fc.V": left * size, "h.0.mlp.c_fc.U": right[: len(size)]}
    own = import_components(exact, language()).to_pandas()["remainder"]
    other = import_components(exact, language("gpt2", seed=5)).to_pandas()["remainder"]
    assert float(own.iloc[0]) < 1e-10
    assert float(other.iloc[0]) > 0.9


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path: Path) -> None:
    """A safetensors file starts with its header's length: 0x…80 and 0x4B50 are lengths too."""
    for low in (b"\x80\x02", b"PK"):
        file = tmp_path / f"{low[0]}.safetensors"
        size = int.from_bytes(low, "little")
        tensors = bad(*pair(32, 5, 96))
        save_file(tensors, file, metadata={"x": ""})
        header = int.from_bytes(file.read_bytes()[:8], "little")
        save_file(tensors, file, metadata={"x": "y" * (size - header)})
        assert file.read_bytes()[:2] == low
        assert import_components(file, language()).sites == ("blocks.0.mlp.in",)


def bad(v: Any, u: Any, name: str = "h.0.mlp.c_fc") -> dict[str, Tensor]:
    return {f"{name}.V": v, f"{name}.U": u}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (bad(*pair(31, 5, 96)), CheckpointError, r"expected V \(32, C\) and U \(C, 96\)"),
        (bad(*pair(96, 5, 32)), CheckpointError, "exchange the two"),
        (bad(pair(32, 5, 96)[0], pair(32, 6, 96)[1]), CheckpointError, "same C"),
        (bad(pair(32, 5, 96)[0], torch.ones(96)), CheckpointError, "same C"),
        ({"h.0.mlp.c_fc.V": torch.ones(32, 5)}, CheckpointError, "only"),
        (bad(*pair(32, 5, 96), name="h.9.mlp.c_fc"), SiteError, "no matrix of this model"),
        (bad(*pair(32, 5, 96), name="h.0.ln_1"), SiteError, "no matrix of this model"),
        (bad(torch.full((32, 5), float("nan")), pair(32, 5, 96)[1]), CheckpointError, "finite"),
        ({"weight": torch.ones(2)}, CheckpointError, "no tensor named"),
        (
            bad(*pair(32, 5, 96)) | bad(*pair(32, 5, 96), name="transformer.h.0.mlp.c_fc"),
            CheckpointError,
            "second set",
        ),
    ],
)
def test_bad_components_are_refused(tensors: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        import_components(tensors, language())


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("c.pt", b"x"), ("c.safetensors", b"PK\x03\x04zip"), ("d", b"\x80\x02")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="pickle"):
            import_components(tmp_path / name, language())
    whole = tmp_path / "whole.safetensors"
    save_file(bad(*pair(32, 5, 96)), whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    for path in (cut, tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match="complete safetensors"):
            import_components(path, language())
