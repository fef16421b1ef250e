"""`svd`: against LAPACK on checkpoints on disk, adapters, gains, flags, a sweep that resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mi_weightspace as mw
from mi_weightspace.core.errors import CheckpointError, ConfigError, SiteError
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.grammar import module_path, shape_of, sites_of
from mi_weightspace.models.weights import CheckpointSource, Difference
from mi_weightspace.organisms.truth import matrix_of

SITE = "blocks.1.mlp.out"


def pair(
    folder: Path, family: str = "llama", *, rank: int = 3, **change: float
) -> tuple[Path, Path]:
    """A base on disk and a copy with a rank-`rank` change of one matrix."""
    base = toy.tiny_model(family, seed=0)
    base.save_pretrained(folder / "base")
    site = next(s for s in sites_of(shape_of(base.config)) if s.name == SITE)
    draw = torch.Generator().manual_seed(7)
    left = torch.randn(site.d_out, rank, generator=draw)
    right = torch.randn(rank, site.d_in, generator=draw)
    with torch.no_grad():
        matrix_of(base, site).add_(0.01 * left @ right)
    for name, size in change.items():
        with torch.no_grad():
            base.get_parameter(name.replace("__", ".")).mul_(1 + size)
    base.save_pretrained(folder / "sft")
    return folder / "base", folder / "sft"


def difference(folder: Path, family: str = "llama", **change: float) -> Difference:
    base, sft = pair(folder, family, **change)
    return mw.load_lineage(base=base, sft=sft).diff("base", "sft")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "phi3"])
def test_triplets_are_those_of_lapack(family: str, tmp_path: Path) -> None:
    """As the stream sees the matrix: gains of the earlier stage folded in."""
    source = difference(tmp_path, family)
    report = mw.svd(source, rank=4, progress=False)
    found = report[SITE]
    matrix = source.after.weight(SITE).double() - source.before.weight(SITE).double()
    gain = source.before.write_gain(SITE)
    seen = matrix if gain is None else gain.double()[:, None] * matrix
    u, s, vt = np.linalg.svd(seen.numpy())
    assert len(found) == 4
    np.testing.assert_allclose(found.scale[:3], s[:3], rtol=1e-5)
    for k in range(3):
        assert abs(found.write[k].numpy() @ u[:, k]) == pytest.approx(1, abs=1e-5)
        assert abs(found.read[k].numpy() @ vt[k]) == pytest.approx(1, abs=1e-5)
    assert found.facts["fro"] == pytest.approx(float(matrix.norm()), rel=1e-5)
    np.testing.assert_allclose(found.top(3).matrix(), seen, atol=2e-6)
    changed = report.table.drop_duplicates("site").query("fro > 0")["site"]
    assert list(changed) == [SITE]


def test_reading_matrix_is_seen_before_its_norm(tmp_path: Path) -> None:
    base, sft = toy.tiny_model("llama", seed=0), toy.tiny_model("llama", seed=0)
    path = module_path(
        next(s for s in sites_of(shape_of(base.config)) if s.name == "blocks.0.mlp.in"),
        shape_of(base.config),
    )
    with torch.no_grad():
        sft.get_submodule(path).weight.add_(torch.randn(1, 1) + 0.01)
    for name, model in (("base", base), ("sft", sft)):
        model.save_pretrained(tmp_path / name)
    source = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "sft").diff("base", "sft")
    found = mw.svd(source, "blocks.0.mlp.in", rank=1, progress=False)["blocks.0.mlp.in"]
    raw = mw.svd(source, "blocks.0.mlp.in", rank=1, fold_gains=False, progress=False)
    gain = source.before.read_gain("blocks.0.mlp.in")
    assert gain is not None
    expected = gain / gain.norm()  # the change is constant: its folded read vector is the gain
    assert abs(float(found.read[0] @ expected)) == pytest.approx(1, abs=1e-5)
    flat = raw["blocks.0.mlp.in"].read[0]
    assert abs(float(flat.sum())) == pytest.approx(len(flat) ** 0.5, abs=1e-4)


def test_a_changed_gain_has_its_own_row(tmp_path: Path) -> None:
    source = difference(tmp_path, model__layers__0__input_layernorm__weight=0.1)
    vectors = mw.svd(source, rank=2, progress=False).tables["vectors"]
    np.testing.assert_allclose(vectors["relative_change"], 0.1, rtol=1e-4)
    assert any("attn.q read_gain" in name for name in vectors["name"])


def test_identical_checkpoints_are_no_change(tmp_path: Path) -> None:
    base, _ = pair(tmp_path)
    report = mw.svd(mw.load_lineage(a=base, b=base).diff("a", "b"), rank=2, progress=False)
    assert [v.word for v in report.verdicts] == [Word.NO_CHANGE]
    assert (report.table["singular_value"] == 0).all()
    assert all(len(parts) == 0 for parts in report)


def test_saved_and_loaded_components_are_the_same(tmp_path: Path) -> None:
    report = mw.svd(difference(tmp_path), rank=2, progress=False)
    loaded = mw.load_report(report.save(tmp_path / "run"))
    assert loaded.equals(report)
    for old, new in zip(report, loaded, strict=True):  # pyright: ignore[reportArgumentType]
        assert old.site == new.site and old.source == new.source
        assert torch.equal(old.write, new.write)
    with pytest.raises(SiteError, match="was not decomposed"):
        report["blocks.9.mlp.out"]


def test_an_adapter_is_decomposed_from_its_factors(tmp_path: Path) -> None:
    """Factored = dense difference of the merged model, float32, to 1e-6 relative."""
    peft = pytest.importorskip("peft")
    base = toy.tiny_model("llama", seed=0)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["down_proj", "q_proj"])
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    factored = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "adapter")
    dense = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "merged")
    one = mw.svd(factored.diff("base", "sft"), rank=4, progress=False)
    other = mw.svd(dense.diff("base", "sft"), rank=4, progress=False)
    assert one[SITE].method == "lora" and other[SITE].method == "svd"
    reference = other[SITE].matrix()
    assert float((one[SITE].matrix() - reference).norm() / reference.norm()) < 2e-6
    np.testing.assert_allclose(one[SITE].scale, other[SITE].scale, rtol=1e-5)
    assert one[SITE].facts["rounding_flag"] == "none"


@pytest.mark.parametrize("size,flag", [(1e-3, "amber"), (3e-2, "none")])
def test_rounding_flag_of_bfloat16_checkpoints(size: float, flag: str, tmp_path: Path) -> None:
    base = toy.tiny_model("llama", seed=0)
    for name in ("base", "sft"):
        base.to(torch.bfloat16).save_pretrained(tmp_path / name)
        base = base.float()
        with torch.no_grad():
            for parameter in base.parameters():
                draw = torch.Generator().manual_seed(3)
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(size * parameter.std() * noise)
    source = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "sft").diff("base", "sft")
    facts = mw.svd(source, SITE, rank=2, progress=False)[SITE].facts
    assert facts["dtype"] == "bfloat16"
    assert facts["rounding_flag"] == flag


def test_several_stages_in_one_report(tmp_path: Path) -> None:
    base, sft = pair(tmp_path)
    lineage = mw.load_lineage(base=base, sft=sft, back=base)
    report = mw.svd([lineage.diff(a, b) for a, b in lineage.steps], SITE, rank=2, progress=False)
    assert report.stages == ("sft", "back")
    there, back = report["sft", SITE], report["back", SITE]
    assert torch.allclose(there.matrix(), -back.matrix(), atol=1e-6)
    twice = [lineage.diff("base", "sft")] * 2
    with pytest.raises(ConfigError, match="different names"):
        mw.svd(twice, SITE, progress=False)


def test_an_interrupted_sweep_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mi_weightspace.spectral import svd as module

    source = difference(tmp_path)
    whole = mw.svd(source, rank=2, progress=False)
    done: list[str] = []
    real = module.decompose

    def killed(source_: object, site: object, settings: object) -> object:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(str(site))
        return real(source_, site, settings)  # pyright: ignore[reportArgumentType]

    killed.__module__, killed.__qualname__ = real.__module__, real.__qualname__
    monkeypatch.setattr(module, "decompose", killed)
    with pytest.raises(KeyboardInterrupt):
        mw.svd(source, rank=2, journal=tmp_path / "journal", progress=False)
    assert len(list((tmp_path / "journal").glob("*.safetensors"))) == 5
    monkeypatch.setattr(module, "decompose", real)
    resumed = mw.svd(source, rank=2, journal=tmp_path / "journal", progress=False)
    assert resumed.table.equals(whole.table)


def test_bad_input(tmp_path: Path) -> None:
    base, sft = pair(tmp_path)
    source = mw.load_lineage(base=base, sft=sft).diff("base", "sft")
    with pytest.raises(ConfigError, match="rank"):
        mw.svd(source, rank=0)
    with pytest.raises(SiteError, match=r"blocks\.\*\.mlp\.down"):
        mw.svd(source, "blocks.*.mlp.down")
    broken = toy.tiny_model("llama", seed=0)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    bad = mw.load_lineage(base=base, sft=tmp_path / "broken").diff("base", "sft")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight"):
        mw.svd(bad, rank=2, progress=False)


def test_a_whole_checkpoint_is_a_source_too(tmp_path: Path) -> None:
    base, _ = pair(tmp_path)
    found = mw.svd(CheckpointSource(base), SITE, rank=2, progress=False)[SITE]
    s = torch.linalg.svdvals(CheckpointSource(base).weight(SITE).double())
    np.testing.assert_allclose(found.scale, s[:2], rtol=1e-5)


def test_pure_noise_is_unresolved_and_a_spike_is_not() -> None:
    """Also where a matrix is decomposed exactly, so that no angle is in doubt."""
    from mi_weightspace.spectral.decompose import clears
    from mi_weightspace.spectral.face import SmallFace

    noise = [torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(60)]
    faces = [SmallFace(m, seed=0, name=str(i)) for i, m in enumerate(noise)]
    assert sum(bool(face.resolved(needed=True)) for face in faces) <= 3
    u, v = torch.ones(64) / 8, torch.ones(96) / 96**0.5
    spiked = noise[0] + 2.5 * (64**0.5 + 96**0.5) * u[:, None] * v
    assert SmallFace(spiked, seed=0, name="spike").resolved(needed=False)
    assert clears(2.0, 1.0, 64, 96) and not clears(1.01, 1.0, 64, 96)
