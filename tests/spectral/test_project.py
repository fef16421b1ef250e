"""`project` on checkpoints on disk: naive numpy oracles, planted writes, refusals, reopening."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mi_weightspace as mw
from mi_weightspace.core.components import Components
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import DirectionError, MismatchError
from mi_weightspace.core.space import Space
from mi_weightspace.core.verdict import Word
from mi_weightspace.models import toy
from mi_weightspace.models.grammar import shape_of, sites_of
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.organisms.truth import matrix_of
from mi_weightspace.spectral import face as face_module
from mi_weightspace.spectral.project import ProjectionReport, pairs_of, project
from mi_weightspace.spectral.svd import SvdReport

SITE, OTHER, READER = "blocks.1.mlp.out", "blocks.0.mlp.out", "blocks.1.attn.q"
HERE = Space("resid_post", 1)
D = 32
DESIGN = (
    "stage", "site", "layer", "kind", "side", "direction", "direction_layer", "cosine",
    "cosine_row_normalised", "cosine_without_loud", "participation", "energy_share",
    "effect_share", "subspace_energy", "stage_gate_p", "G", "p_G", "R", "R_lda", "p_sign",
    "p_row_normalised", "p_lda_rank", "n_controls", "p_adjusted", "alpha", "null_edge",
    "certificate", "resolved", "rounding_flag", "nuisance_cosine", "nuisance_name", "verdict",
)  # fmt: skip
OURS = (
    "participation_direction", "did_cosine", "did_energy", "named_k", "fro", "rel_fro",
    "subspace_k", "p_isotropic", "p_covariance", "p_permutation", "resolved_row_normalised",
    "explained_by", "written_share",
)  # fmt: skip
EVIDENCE = (
    "R", "R_lda", "p_sign", "p_row_normalised", "p_lda_rank", "cosine_row_normalised",
    "energy_share", "effect_share", "G", "p_G", "nuisance_cosine", "p_adjusted",
)  # fmt: skip


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W = unit(draw(100, D))
"""The direction planted in `SITE`."""


def direction(
    n_controls: int = 39, *, space: Space = HERE, label: str = "authority", **more: Any
) -> Direction:
    given: dict[str, Any] = {
        "filter": unit(W + 0.3 * unit(draw(101, D))),
        "mean": draw(102, D),
        "variance": draw(103, D).square() + 0.1,
        "pcs": unit(draw(104, 3, D)),
    }
    if n_controls:
        given["control_patterns"] = unit(draw(105, n_controls, D))
        given["control_filters"] = unit(draw(106, n_controls, D))
        given["control_names"] = tuple(f"c{i}" for i in range(n_controls))
    return Direction(W, space, label, **(given | more))


def stages(folder: Path, family: str = "llama", *, planted: float = 0.4, seed: int = 1) -> Lineage:
    """Noise on three matrices, and `planted`·w vᵀ as the stream sees it in one of them."""
    model = toy.tiny_model(family, seed=0)
    model.save_pretrained(folder / "base")
    gain = mw.load_lineage(a=folder / "base", b=folder / "base").diff("a", "b").write_gain(SITE)
    with torch.no_grad():
        for index, site in enumerate(sites_of(shape_of(model.config))):
            if site.name in (SITE, OTHER, READER):
                noise = 0.01 * draw(seed * 1000 + index, site.d_out, site.d_in)
                matrix_of(model, site).add_(noise)
            if site.name == SITE:
                write = W if gain is None else W / gain
                matrix_of(model, site).add_(planted * write[:, None] * unit(draw(7, site.d_in)))
    model.save_pretrained(folder / "sft")
    return mw.load_lineage(base=folder / "base", sft=folder / "sft")


def update(lineage: Lineage, sites: Any = (SITE, OTHER, READER)) -> SvdReport:
    return mw.svd(lineage.diff("base", "sft"), sites, rank=4, progress=False)


def ask(components: Any, directions: Any, *rest: Any, **more: Any) -> Any:
    return project(components, directions, *rest, **({"n_null": 99, "progress": False} | more))


def at(report: ProjectionReport, site: str = SITE, side: str = "write") -> dict[str, Any]:
    own = report.table.query("site == @site and side == @side")
    assert len(own) == 1
    return own.iloc[0].to_dict()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lineage, SvdReport]:
    lineage = stages(tmp_path_factory.mktemp("planted"))
    return lineage, update(lineage)


def naive_ratio(matrix: np.ndarray, vector: np.ndarray) -> float:
    return float(((vector @ matrix) ** 2).sum() / (vector**2 @ (matrix**2).sum(1)))


def naive_cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a @ b) / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_numbers_of_the_writer_are_numpys(family: str, tmp_path: Path) -> None:
    """Where a post-norm follows the matrix, the stream sees diag(g)·D, and w is planted there."""
    lineage = stages(tmp_path, family)
    base, sft = lineage.source("base"), lineage.source("sft")
    gain = base.write_gain(SITE)
    assert (gain is not None) == (family != "llama")
    delta = sft.weight(SITE).double().numpy() - base.weight(SITE).double().numpy()
    seen = delta if gain is None else gain.double().numpy()[:, None] * delta
    given = direction()
    w, f = given.pattern.double().numpy(), given.filter.double().numpy()  # pyright: ignore[reportOptionalMemberAccess]
    u = np.linalg.svd(seen)[0]
    normed = np.linalg.svd(seen / np.linalg.norm(seen, axis=1, keepdims=True))[0][:, 0]
    loud = np.argsort(given.variance.numpy())[-8:]  # pyright: ignore[reportOptionalMemberAccess]
    bulk, bulk_w = np.delete(u[:, 0], loud), np.delete(w, loud)
    nuisances = [
        ("activation mean", given.mean),
        ("unembedding mean", base.weight("unembed").mean(0)),
        *((f"activation pc {i}", pc) for i, pc in enumerate(given.pcs)),  # pyright: ignore[reportArgumentType]
        *((f"control c{i}", c) for i, c in enumerate(given.control_patterns)),  # pyright: ignore[reportArgumentType]
        *((f"control c{i} (filter)", c) for i, c in enumerate(given.control_filters)),  # pyright: ignore[reportArgumentType]
    ]
    sizes = [naive_cosine(u[:, 0], v.double().numpy()) for _, v in nuisances]  # pyright: ignore[reportOptionalMemberAccess]
    tested = max(naive_cosine(normed, v.double().numpy()) for _, v in nuisances)  # pyright: ignore[reportOptionalMemberAccess]
    assert tested < naive_cosine(normed, f)
    expected = {
        "cosine": naive_cosine(u[:, 0], w),
        "cosine_without_loud": naive_cosine(bulk, bulk_w),
        "cosine_row_normalised": naive_cosine(normed, w),
        "participation": 1 / (u[:, 0] ** 4).sum(),
        "participation_direction": 1 / (w**4).sum(),
        "energy_share": ((w @ seen) ** 2).sum() / (seen**2).sum(),
        "subspace_energy": ((u[:, :4].T @ w) ** 2).sum(),
        "R": naive_ratio(seen, w),
        "R_lda": naive_ratio(seen, f),
        "nuisance_cosine": max(sizes),
        "fro": np.linalg.norm(delta),
    }
    row = at(ask(update(lineage, SITE), given))
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=2e-4), name
    assert row["nuisance_name"] == nuisances[int(np.argmax(sizes))][0]
    assert row["explained_by"] == "" and row["resolved_row_normalised"]
    assert row["cosine"] > 0.95
    assert row["verdict"] == Word.ALIGNED
    assert row["p_sign"] == row["p_row_normalised"] == 0.01
    if gain is not None:
        raw = naive_cosine(np.linalg.svd(delta)[0][:, 0], w)
        assert abs(raw - row["cosine"]) > 1e-4, "the gain makes no difference here: no test"


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_reader_is_seen_before_its_norm(family: str, tmp_path: Path) -> None:
    lineage = stages(tmp_path, family)
    base, sft = lineage.source("base"), lineage.source("sft")
    delta = sft.weight(READER).double().numpy() - base.weight(READER).double().numpy()
    gain = base.read_gain(READER)
    assert (gain is not None) == (family == "llama")
    seen = delta if gain is None else delta * gain.double().numpy()
    given = direction(space=Space("resid_post", 0))
    row = at(ask(update(lineage), [given]), READER, "read")
    w = given.pattern.double().numpy()
    assert row["cosine"] == pytest.approx(naive_cosine(np.linalg.svd(seen)[2][0], w), abs=1e-5)
    assert row["R"] == pytest.approx(naive_ratio(seen.T, w), rel=1e-5)
    assert row["verdict"] == Word.NOT_SIGNIFICANT


def test_columns_are_those_of_the_design(case: tuple[Lineage, SvdReport]) -> None:
    report = ask(case[1], direction())
    assert set(report.table.columns) == {*DESIGN, *OURS}
    assert set(report.tables) == {"components", "controls"}
    row, own = at(report), report.tables["components"].query("site == @SITE")
    assert list(own["component"]) == [0, 1, 2, 3]
    assert own["cosine"].iloc[0] == row["cosine"]
    assert own["cumulative_energy"].iloc[-1] == pytest.approx(row["subspace_energy"], rel=1e-5)
    np.testing.assert_allclose(own["chance_energy"], np.arange(1, 5) / D)
    ranked = report.tables["controls"].query("site == @SITE")
    assert list(ranked["control"]) == ["", *(f"c{i}" for i in range(39))]
    assert len(report.plot().data) > 0  # pyright: ignore[reportArgumentType]


def test_planted_and_unplanted_matrices(case: tuple[Lineage, SvdReport], tmp_path: Path) -> None:
    report = ask(case[1], direction())
    words = dict(
        zip(report.table["site"] + " " + report.table["side"], report.table["verdict"], strict=True)
    )
    assert words == {
        f"{SITE} write": Word.ALIGNED,
        f"{OTHER} write": Word.NOT_SIGNIFICANT,
        f"{READER} read": Word.NOT_SIGNIFICANT,
    }
    assert [v.subject for v in report.verdicts] == [f"sft / {SITE} / authority"]
    assert any("strongest word is `aligned`" in text for text in report.reservations)
    absent = ask(update(stages(tmp_path, planted=0.0)), direction())
    assert [v.word for v in absent.verdicts] == [Word.NOT_SIGNIFICANT]
    assert set(absent.table["verdict"]) <= {Word.NOT_SIGNIFICANT}


def test_control_rank_is_the_naive_max_over_matrices(case: tuple[Lineage, SvdReport]) -> None:
    lineage, parts = case
    given = direction(space=Space("resid_post", 0))  # alone: it judges every stream side
    table = ask(parts, given).table
    f = torch.cat([given.filter[None], given.control_filters]).double().numpy()  # pyright: ignore[reportOptionalSubscript, reportArgumentType, reportCallIssue]
    source = lineage.diff("base", "sft")
    every: dict[str, list[float]] = {}
    for name, side in zip(table["site"], table["side"], strict=True):
        matrix = source.weight(name).double().numpy()
        gain = source.read_gain(name)
        if side == "read":
            matrix = (matrix * gain.double().numpy()).T  # pyright: ignore[reportOptionalMemberAccess]
        every[name] = [naive_ratio(matrix, v) for v in f]
    for row in table.to_dict("records"):
        own = every[row["site"]][0]
        beaten = sum(max(v[k] for v in every.values()) >= own for k in range(1, len(f)))
        assert row["p_lda_rank"] == pytest.approx((1 + beaten) / len(f)), row["site"]
        assert row["p_adjusted"] == row["p_lda_rank"]
    assert table.set_index("site")["p_lda_rank"].nunique() > 1


def test_signs_of_components_and_direction_change_nothing(
    case: tuple[Lineage, SvdReport],
) -> None:
    lineage, parts = case
    turned = [replace(p, read=-p.read, write=-p.write) for p in parts]
    one = ask(list(parts), direction(), lineage).table
    other = ask(turned, -direction(), lineage).table
    assert one.equals(other)


def test_a_lone_direction_judges_every_layer_and_says_so(case: tuple[Lineage, SvdReport]) -> None:
    every = mw.svd(case[0].diff("base", "sft"), rank=1, progress=False)
    early = Space("resid_post", 0)
    alone = [(p.site.name, s) for p in every for s, _ in pairs_of(p, [direction(space=early)])]
    kinds = {"attn.q": "read", "attn.k": "read", "attn.v": "read", "attn.o": "write"}
    kinds |= {"mlp.gate": "read", "mlp.in": "read", "mlp.out": "write"}
    assert sorted(alone) == sorted((f"blocks.{i}.{k}", s) for i in (0, 1) for k, s in kinds.items())
    both = [direction(space=early), direction()]
    exact = {(p.site.name, s, d.space.layer) for p in every for s, d in pairs_of(p, both)}
    readers = {(f"blocks.1.attn.{k}", "read", 0) for k in "qkv"}
    assert exact == {(OTHER, "write", 0), (SITE, "write", 1)} | readers
    named = [direction(space=early), direction(label="b")]
    assert len([1 for p in every for _ in pairs_of(p, named)]) == 28, "one each of two labels"
    row = at(ask(case[1], direction(space=early)))
    assert (row["layer"], row["direction_layer"]) == (1, 0)


def test_a_direction_off_the_stream_meets_its_own_space_only(
    case: tuple[Lineage, SvdReport],
) -> None:
    hidden = Direction(draw(0, 3 * D), Space("mlp_hidden", 1), "neuron")
    table = ask(case[1], hidden).table
    assert list(table["site"]) == [SITE] and list(table["side"]) == ["read"]
    delta = case[0].diff("base", "sft").weight(SITE).double().numpy()
    right = np.linalg.svd(delta)[2][0]
    assert table["cosine"][0] == pytest.approx(
        naive_cosine(right, hidden.pattern.double().numpy()), abs=1e-5
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Direction(draw(0, D - 1), HERE), rf"width {D - 1}.*{D}, the width of"),
        (lambda: Direction(torch.zeros(D), HERE), "zero vector"),
        (lambda: Direction(draw(0, D).fill_(float("nan")), HERE), "non-finite"),
        (lambda: direction(convention="folded"), "convention 'folded'.*unprocessed"),
        (lambda: Direction(draw(0, D), Space("attn_z", 7)), "no decomposed matrix reads or writes"),
        (lambda: [], "expected a Direction"),
        (lambda: [W], "Wrap a vector"),
    ],
)
def test_bad_directions_are_refused(make: Any, says: str, case: tuple[Lineage, SvdReport]) -> None:
    with pytest.raises(DirectionError, match=f"(?s){says}"):
        ask(case[1], make())


@pytest.mark.parametrize(
    ("n", "word"),
    [(0, Word.ALIGNED_NO_CONTROLS), (18, Word.UNDERPOWERED), (19, Word.ALIGNED)],
)
def test_the_strongest_word_depends_on_the_controls(
    n: int, word: Word, case: tuple[Lineage, SvdReport]
) -> None:
    report = ask(case[1], direction(n))
    row = at(report)
    assert (row["verdict"], row["n_controls"]) == (word, n)
    assert math.isnan(row["p_lda_rank"]) == (n == 0)
    assert any("without control contrasts" in t for t in report.reservations) == (n == 0)
    assert row["p_sign"] == 0.01, "the numbers stand there all the same"


def test_without_a_filter_the_pattern_is_ranked(case: tuple[Lineage, SvdReport]) -> None:
    report = ask(case[1], direction(filter=None))
    row = at(report)
    assert math.isnan(row["R_lda"]) and row["verdict"] == Word.ALIGNED
    ranked = report.tables["controls"].query("site == @SITE and control == ''")
    assert ranked["R_lda"].iloc[0] == pytest.approx(row["R"])
    assert any("without a filter" in text for text in report.reservations)


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"rounding_flag": "red"}, Word.BELOW_FLOOR),
        ({"rounding_flag": "amber"}, Word.ALIGNED),
        ({"resolved": False}, Word.ALIGNED),
    ],
)
def test_vetoes(facts: dict[str, Any], word: Word, case: tuple[Lineage, SvdReport]) -> None:
    lineage, parts = case
    found = parts[SITE]
    given = replace(found, facts=found.facts | facts)
    assert at(ask(given, direction(), lineage))["verdict"] == word


def test_a_nuisance_that_explains_more(case: tuple[Lineage, SvdReport]) -> None:
    u = case[1][SITE].write[0]
    report = ask(case[1], direction(mean=5 * u))
    assert at(report)["verdict"] == Word.ALIGNED_NUISANCE
    assert at(report)["nuisance_name"] == at(report)["explained_by"] == "activation mean"
    assert "activation mean" in report.verdicts[0].reservations[0]


def test_the_unembedding_mean_is_a_nuisance_of_its_own(case: tuple[Lineage, SvdReport]) -> None:
    lineage, parts = case
    plain = Direction(W, HERE)
    row = at(ask(parts, plain))
    mean = lineage.source("base").weight("unembed").double().mean(0).numpy()
    u = parts[SITE].write[0].double().numpy()
    assert row["nuisance_name"] == "unembedding mean"
    assert row["nuisance_cosine"] == pytest.approx(naive_cosine(u, mean), rel=1e-4)


def test_identical_weights_are_no_change(case: tuple[Lineage, SvdReport]) -> None:
    base = case[0].source("base").name
    lineage = mw.load_lineage(base=base, sft=base)
    report = ask(update(lineage), direction())
    assert [v.word for v in report.verdicts] == [Word.NO_CHANGE]
    assert set(report.table["verdict"]) == {Word.NO_CHANGE}
    assert report.table["cosine"].isna().all(), "no cosine of nothing"


def test_two_stages_of_one_name_are_not_confused(case: tuple[Lineage, SvdReport]) -> None:
    base = case[0].source("base").name
    still = update(mw.load_lineage(base=base, sft=base), SITE)
    for given in ([still, case[1]], [*still, case[1][OTHER]], [case[1][OTHER], *still]):
        with pytest.raises(MismatchError, match="Two stages need two names"):
            ask(given, direction())


def test_a_loaded_report_finds_its_checkpoints_again(tmp_path: Path) -> None:
    lineage = stages(tmp_path)
    parts = update(lineage)
    fresh = ask(parts, direction())
    loaded = mw.load_report(parts.save(tmp_path / "run"))
    assert isinstance(loaded, SvdReport) and not loaded.live
    again = ask(loaded, direction())
    assert again.table.equals(fresh.table)
    saved = mw.load_report(again.save(tmp_path / "projection"))
    assert saved.equals(again) and isinstance(saved, ProjectionReport)

    moved = tmp_path / "elsewhere"
    (tmp_path / "sft").rename(moved)
    gone = ask(loaded, direction())
    assert gone.table[list(EVIDENCE)].isna().all().all()
    assert at(gone)["cosine"] == at(fresh)["cosine"]
    assert set(gone.table["verdict"]) == {Word.NOT_SIGNIFICANT}
    assert any("no evidence could be computed" in text for text in gone.reservations)
    at_hand = mw.load_lineage(base=tmp_path / "base", sft=moved)
    assert ask(loaded, direction(), at_hand).table.equals(fresh.table)

    shutil.copytree(tmp_path / "base", tmp_path / "sft")
    changed = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "sft")
    other = toy.save_tiny("llama", tmp_path / "another", seed=9)
    earlier = mw.load_lineage(base=other, sft=moved)
    for rest in ((), (changed,), (earlier,)):
        with pytest.raises(MismatchError, match="run svd again"):
            ask(loaded, direction(), *rest)


def test_components_without_a_reference_are_described_only(
    case: tuple[Lineage, SvdReport],
) -> None:
    parts = replace(case[1][SITE], source=None)
    report = ask(parts, direction())
    assert at(report)["verdict"] == Word.NOT_SIGNIFICANT
    assert report.table[list(EVIDENCE)].isna().all().all()
    assert any("no reference" in text for text in report.reservations)


def test_a_whole_checkpoint_is_found_again_too(tmp_path: Path) -> None:
    lineage = stages(tmp_path)
    parts = mw.svd(lineage.source("sft"), SITE, rank=2, progress=False)
    fresh = ask(parts, direction())
    loaded = mw.load_report(parts.save(tmp_path / "run"))
    assert ask(loaded, direction()).table.equals(fresh.table)
    matrix = lineage.source("sft").weight(SITE).double().numpy()
    assert at(fresh)["R"] == pytest.approx(naive_ratio(matrix, W.double().numpy()), rel=1e-4)


def test_live_models_give_the_numbers_of_their_folders(case: tuple[Lineage, SvdReport]) -> None:
    from transformers import AutoModelForCausalLM

    lineage, parts = case
    live: dict[str, Any] = {
        s: AutoModelForCausalLM.from_pretrained(lineage.source(s).name) for s in ("base", "sft")
    }
    report = update(mw.load_lineage(**live))
    columns = [c for c in DESIGN if c not in ("stage", "site")]
    one, other = ask(report, direction()).table, ask(parts, direction()).table
    assert one[columns].equals(other[columns])


def test_a_lora_stage(tmp_path: Path) -> None:
    """w planted in an adapter's factors is found as in the merged matrix."""
    peft = pytest.importorskip("peft")
    base = toy.tiny_model("llama", seed=0)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * draw(3, *parameter.shape))
                if "layers.1" in name:
                    parameter[:, 0].add_(W)
    model.save_pretrained(tmp_path / "adapter")
    lineage = mw.load_lineage(base=tmp_path / "base", sft=tmp_path / "adapter")
    parts = update(lineage, "*.mlp.out")
    assert parts[SITE].method == "lora"
    report = ask(parts, direction())
    assert at(report)["verdict"] == Word.ALIGNED
    assert at(report, OTHER)["verdict"] == Word.NOT_SIGNIFICANT
    factors = lineage.source("sft").factors(SITE)
    assert factors is not None
    delta = (factors[0].double() @ factors[1].double()).numpy()
    w = W.double().numpy()
    assert at(report)["R"] == pytest.approx(naive_ratio(delta, w), rel=1e-4)
    u = np.linalg.svd(delta)[0][:, 0]
    assert at(report)["cosine"] == pytest.approx(naive_cosine(u, w), rel=1e-5)
    loaded = mw.load_report(parts.save(tmp_path / "run"))
    assert ask(loaded, direction()).table.equals(report.table)


def test_flips_and_seed_are_recorded_and_reproduce(case: tuple[Lineage, SvdReport]) -> None:
    one, same, other = (ask(case[1], direction(), seed=s) for s in (0, 0, 1))
    assert one.table.equals(same.table)
    assert not one.table["p_row_normalised"].equals(other.table["p_row_normalised"])
    assert one.config["args"] == {"n_null": 99, "alpha": 0.05, "seed": 0}
    assert ask(case[1], direction(), n_null=9).table["p_sign"].min() == 0.1


def test_given_parts_may_be_a_report_a_list_or_one(case: tuple[Lineage, SvdReport]) -> None:
    lineage, parts = case
    reference = ask(parts, direction()).table
    loose: list[Components] = list(parts)
    assert ask([parts], direction()).table.equals(reference)
    assert ask(loose, direction()).table.equals(reference), "each reopens its own checkpoints"
    assert at(ask(parts[SITE], direction(), lineage))["R"] == at(ask(parts, direction()))["R"]


def test_the_route_of_large_matrices_gives_the_same_words(
    case: tuple[Lineage, SvdReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One product, shared signs, sketches: what decides stays the same."""
    report = case[1]
    small = ask(report, direction()).table
    monkeypatch.setattr(face_module, "LARGE", 1)
    monkeypatch.setattr(face_module, "SKETCH", 8)
    large = ask(report, direction()).table
    assert list(large["verdict"]) == list(small["verdict"])
    assert "aligned" in set(small["verdict"])
    for name in ("R", "R_lda", "p_lda_rank", "energy_share"):
        np.testing.assert_allclose(large[name], small[name], rtol=1e-4)
    np.testing.assert_allclose(
        large["cosine_row_normalised"], small["cosine_row_normalised"], atol=0.02
    )
    # the edge of a row-normalised matrix is drawn only where a verdict may ask for it
    asked = (large["p_lda_rank"] <= 0.05) & (large["p_row_normalised"] <= 0.05)
    assert asked.any() and not asked.all()
    assert large["resolved_row_normalised"][asked].all()
    assert large["resolved_row_normalised"][~asked].isna().all()
    bare = ask(report, direction(control_patterns=None, control_filters=None)).table
    assert bare["resolved_row_normalised"][bare["p_row_normalised"] <= 0.05].notna().all()
