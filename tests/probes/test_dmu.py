"""The mean-shift sweep: explicit recomputation, planted truth and absence, calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from probe_cases import POINTS, activations, contrast_set, planted
from scipy.stats import kstest

import probes
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import ConfigError, DirectionError, PromptError
from mi_weightspace.core.report import load_report
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import (
    bootstrap_norms,
    cluster_index,
    cluster_signs,
    gram,
    recentred_norm_sq,
    sign_flip_norms,
    whitened_gram,
)
from mi_weightspace.core.stats import cluster_weights
from mi_weightspace.core.verdict import Word
from probes import dmu_tables, shift_stats
from probes.dmu import DmuReport, dmu_sweep
from probes.shift_stats import draw, geometry, measure, measure_changes, measure_stages

FAST = {"n_flips": 499, "n_bootstrap": 300, "progress": False}
CLUSTERS = ["a", "a", "b", "c", "d", "e", "f", "g"]


def lineage(size: float = 4.0, **more: object) -> dict[str, PairedActivations]:
    return {
        "base": activations("base", **more),  # pyright: ignore[reportArgumentType]
        "sft": activations("sft", shift=planted(size), **more),  # pyright: ignore[reportArgumentType]
    }


@pytest.fixture(scope="module")
def report() -> DmuReport:
    return dmu_sweep(lineage(), **FAST)


def values(
    n: int = 8, d: int = 12, points: int = 3, seed: int = 0, shift: float = 0.5
) -> torch.Tensor:
    drawn = torch.randn(points, n, 2, d, generator=generator(seed, "dmu", n, d))
    drawn += torch.randn(points, n, 1, d, generator=generator(seed, "items", n, d))
    drawn[:, :, 0, 0] += shift
    return drawn


# ---- oracles -------------------------------------------------------------------------------
def test_sizes_equal_explicit_float64() -> None:
    x = values()
    found = measure(geometry(list(x)), draw(CLUSTERS, n_flips=50, n_bootstrap=50, seed=3))
    for i, point in enumerate(x.double().numpy()):
        difference = point[:, 0] - point[:, 1]
        shift = difference.mean(0)
        length = np.linalg.norm(shift)
        size = np.linalg.norm(point, axis=-1).mean()
        spread = (np.trace(np.cov(point[:, 0].T)) + np.trace(np.cov(point[:, 1].T))) / 2
        pooled = (np.cov(point[:, 0].T) + np.cov(point[:, 1].T)) / 2
        shrunk = 0.9 * pooled + 0.1 * np.trace(pooled) / 12 * np.eye(12)
        assert float(found.raw[i]) == pytest.approx(length)
        assert float(found.value["rel_norm"][i]) == pytest.approx(length / size)
        assert float(found.value["rel_spread"][i]) == pytest.approx(length / spread**0.5)
        mahal = (shift @ np.linalg.solve(shrunk, shift)) ** 0.5
        assert float(found.value["mahal"][i]) == pytest.approx(mahal)
        sums = np.stack([difference[[0, 1]].sum(0), *difference[2:]]) - np.outer(
            [2, 1, 1, 1, 1, 1, 1], shift
        )
        noise = (sums**2).sum() / 64 * 7 / 6
        assert float(found.snr[i]) == pytest.approx(length / noise**0.5)
        debiased = length**2 - noise
        assert float(found.raw_debiased[i]) == pytest.approx(
            np.sign(debiased) * abs(debiased) ** 0.5
        )
        energy = np.sort((point**2).mean((0, 1)))[::-1]
        assert float(found.rogue[i]) == pytest.approx(energy[:3].sum() / energy.sum(), rel=1e-5)


def test_geometry_equals_the_gram_matrices_of_the_core() -> None:
    x = values()
    found = geometry(list(x))
    pairs = gram(x[:, :, 0].double() - x[:, :, 1].double())
    assert torch.allclose(found.pairs(), pairs, rtol=1e-10)
    assert torch.allclose(found.whitened_pairs(), whitened_gram(x), rtol=1e-9)


@pytest.mark.parametrize("limit", [0, 1 << 25])
def test_draws_equal_those_of_the_core(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift_stats, "_MOST_PRODUCTS", limit)
    drawn = draw(CLUSTERS, n_flips=40, n_bootstrap=40, seed=5)
    assert (drawn.sign_products is None) == (limit == 0)
    x = values()
    difference = x[:, :, 0].double() - x[:, :, 1].double()
    index, g = cluster_index(CLUSTERS), gram(difference)
    signs = cluster_signs(index, 40, seed=5)
    explicit = torch.einsum("bn,lnd->bld", signs, difference).div(8).norm(dim=-1)
    assert torch.allclose(drawn.flipped(g), explicit, rtol=1e-9)
    assert torch.allclose(drawn.flipped(g), sign_flip_norms(g, signs), rtol=1e-9)
    weights = cluster_weights(CLUSTERS, 40, seed=5)
    expected = recentred_norm_sq(g, weights, index).clamp(min=0)
    assert torch.allclose(drawn.resampled_sq(g), expected, rtol=1e-8, atol=1e-10)
    mean = torch.einsum("bn,lnd->bld", weights, difference) / weights.sum(1)[:, None, None]
    assert torch.allclose(bootstrap_norms(g, weights), mean.norm(dim=-1), rtol=1e-9)


def test_p_values_equal_explicit_flips_with_the_maximum_over_points() -> None:
    x = values(shift=0.8)
    found = measure(geometry(list(x)), draw(CLUSTERS, n_flips=60, n_bootstrap=2, seed=1))
    difference = (x[:, :, 0].double() - x[:, :, 1].double()).numpy()
    signs = cluster_signs(cluster_index(CLUSTERS), 60, seed=1).numpy()
    every = np.stack(
        [
            [np.linalg.norm((s[:, None] * d).mean(0)) for d in difference]
            for s in [np.ones(8), *signs]
        ]
    )
    t = (every - every.mean(0)) / every.std(0, ddof=1)
    for i in range(3):
        assert float(found.p[i]) == pytest.approx((1 + (t[1:, i] >= t[0, i] - 1e-9).sum()) / 61)
        joint = (1 + (t[1:].max(1) >= t[0, i] - 1e-9).sum()) / 61
        assert float(found.p_adjusted[i]) == pytest.approx(joint)


def test_stages_measured_together_equal_each_alone() -> None:
    drawn = draw(CLUSTERS, n_flips=60, n_bootstrap=20, seed=1)
    parts = [geometry(list(values(seed=s, shift=s))) for s in (1, 2, 3)]
    for one, part in zip(measure_stages(parts, drawn), parts, strict=True):
        alone = measure(part, drawn)
        assert torch.allclose(one.p_adjusted, alone.p_adjusted)
        assert torch.allclose(one.snr, alone.snr)
        for name, draws in alone.draws.items():
            assert torch.allclose(one.draws[name], draws)
            assert torch.allclose(one.value[name], alone.value[name])


def test_change_equals_explicit_differences_in_differences() -> None:
    before, after = values(seed=1), values(seed=2, shift=2.0)
    drawn = draw(CLUSTERS, n_flips=60, n_bootstrap=2, seed=1)
    early, late = measure_stages([geometry(list(v)) for v in (before, after)], drawn)
    found = measure_changes([list(before), list(after)], [early, late], drawn)[0]
    x, y = (v.double().numpy() for v in (before, after))
    step = (y[:, :, 0] - y[:, :, 1]) - (x[:, :, 0] - x[:, :, 1])
    assert np.allclose(found.vector.numpy(), step.mean(1))
    length = np.linalg.norm(step.mean(1), axis=-1)
    assert np.allclose(found.norm.numpy(), length)
    shift = np.linalg.norm((x[:, :, 0] - x[:, :, 1]).mean(1), axis=-1)
    assert np.allclose(found.relative.numpy(), length / shift)
    signs = drawn.signs.numpy()
    flipped = np.linalg.norm(np.einsum("bn,lnd->bld", signs, step) / 8, axis=-1)
    assert np.allclose(found.p.numpy(), (1 + (flipped >= length - 1e-9).sum(0)) / 61)


def test_the_sweep_flips_whole_clusters() -> None:
    items = ["a", "a", "b", "c", "d", "e", "f", "f"]
    pairs = tuple(Pair(item, f"+{i}", f"-{i}") for i, item in enumerate(items))
    contrasts = ContrastSet("uneven", (Contrast("authority", "target", pairs),))
    data = activations(contrasts=contrasts, shift=lambda *_: 1.0, points=POINTS[1:3])
    table = dmu_sweep({"sft": data}, seed=4, **FAST).table
    assert (table["n_clusters"] == 6).all()
    drawn = draw([f"{item}×w0" for item in items], n_flips=499, n_bootstrap=2, seed=4)
    assert len(set(map(tuple, drawn.signs[:, [0, 1]].tolist()))) == 2
    expected = measure(geometry([data.at("authority", p) for p in data.points]), drawn)
    assert table["p"].tolist() == expected.p.tolist()
    assert table["p_adjusted"].tolist() == expected.p_adjusted.tolist()


def test_a_small_shift_beside_a_massive_coordinate_survives() -> None:
    x = values(shift=0.0)
    x[..., 3] = 3000.0
    x[:, :, 0] = x[:, :, 1]
    x[:, :, 0, 1] += 0.01 + 0.001 * torch.arange(8)
    exact = (x[:, :, 0].double() - x[:, :, 1].double()).mean(1).norm(dim=-1)
    found = geometry(list(x))
    assert torch.allclose(found.pairs().sum((-2, -1)).sqrt() / 8, exact, rtol=1e-7)


def test_rogue_coordinates_can_be_left_out() -> None:
    stages = lineage()
    for data in stages.values():
        for value in data.values.values():
            value[..., 5] = 500.0
    plain, dropped = (dmu_sweep(stages, drop_rogue=k, **FAST) for k in (0, 1))
    row = dropped.table[(dropped.table["contrast"] == "authority")].iloc[-1]
    x = stages["sft"].at("authority", row["point"]).double()
    x[..., 5] = 0
    shift = (x[:, 0] - x[:, 1]).mean(0).norm() / x.norm(dim=-1).mean()
    assert row["rel_delta"] == pytest.approx(float(shift))
    assert plain.table["rogue_share"].iloc[-1] > 0.99 > dropped.table["rogue_share"].iloc[-1]


# ---- planted truth -------------------------------------------------------------------------
def test_a_planted_shift_is_placed_in_stage_and_point(report: DmuReport) -> None:
    words = {v.subject: v.word for v in report.verdicts}
    assert words["sft / authority"] == Word.AXIS_SPECIFIC
    assert words["base / authority"] == Word.NOT_SIGNIFICANT
    did = report.tables["did"]
    own = did[did["contrast"] == "authority"].set_index("point")
    assert (own["did_norm"].iloc[:4] == 0).all(), "exactly zero before the first changed point"
    assert (own["p_adjusted"].iloc[:4] == 1).all()
    assert own.index[own["onset"]].tolist() == [POINTS[4].name]
    assert own["above_controls"].iloc[4:].all()
    assert own["did_norm"].iloc[4:].to_numpy(dtype=float) == pytest.approx(4.0, rel=1e-5)
    direction = report.did_direction("sft")
    assert direction.space == POINTS[4]
    assert float(direction.pattern[0]) == pytest.approx(1, abs=1e-5)
    assert direction.scale == pytest.approx(4.0, rel=1e-5)
    assert (direction.method, direction.model_hash) == ("did", "hash-sft")
    growth = report.tables["growth"]
    assert (growth["ci_low"] > 0).all()
    assert (growth["control_growth"].abs() < 1e-9).all()
    ordering = report.tables["ordering"].set_index(["stage", "denominator"])["result"]
    assert (ordering["sft"] == "PASS").all()


def test_the_table_has_a_row_for_every_stage_contrast_and_point(report: DmuReport) -> None:
    assert len(report.table) == 2 * 21 * len(POINTS)
    wanted = "stage contrast is_control layer n delta_norm rel_delta ci_low ci_high p p_adjusted"
    assert set(wanted.split()) <= set(report.table)
    live = report.table[report.table["point"] != "resid_pre.0"]
    assert (live["ci_low"] <= live["rel_delta"]).all()
    assert (live["ci_high"] >= live["rel_delta"]).mean() > 0.99
    dead = report.table[report.table["point"] == "resid_pre.0"]
    assert (dead["p_adjusted"] == 1).all()
    assert (dead["delta_norm"] == 0).all()
    late = live[(live["stage"] == "sft") & (live["contrast"] == "authority")].iloc[3:]
    assert late["above_controls"].all()
    ranks = live[live["is_control"]].groupby(["stage", "point"])["above_controls"].sum()
    assert (ranks <= 1).all(), "at most one control is above all the others"


def test_interval_of_the_relative_shift_covers_a_large_planted_one() -> None:
    hits = 0
    for seed in range(60):
        x = values(n=30, d=12, points=1, seed=seed, shift=3.0)
        names = [str(i) for i in range(30)]
        found = measure(geometry(list(x)), draw(names, n_flips=1, n_bootstrap=400, seed=seed))
        low, high = shift_stats.interval(found.draws["rel_norm"] * found.mean_norm)
        hits += bool(low[0] <= 3.0 <= high[0])
    assert hits >= 52


# ---- planted absence -----------------------------------------------------------------------
def test_identical_stages_show_no_change() -> None:
    same = activations("base", shift=planted(4.0))
    found = dmu_sweep({"base": same, "sft": same}, **FAST)
    did = found.tables["did"]
    assert (did["did_norm"] == 0).all()
    assert (did["p_adjusted"] == 1).all()
    assert not did["onset"].any()
    assert np.allclose(found.tables["growth"]["excess"], 0)
    assert not found.tables["peaks"]["relocated"].any()
    with pytest.raises(DirectionError, match="no significant change"):
        found.did_direction("sft")


def test_p_is_uniform_with_the_maximum_over_points_for_shift_and_change() -> None:
    shift, change = [], []
    for seed in range(200):
        one, two = values(seed=seed, shift=0.0), values(seed=1000 + seed, shift=0.0)
        drawn = draw([str(i) for i in range(8)], n_flips=99, n_bootstrap=2, seed=seed)
        first = measure(geometry(list(one)), drawn)
        shift.append(float(first.p_adjusted.min()))
        after = measure_changes([list(one), list(two)], [first, first], drawn)[0]
        change.append(float(after.p_adjusted.min()))
    assert kstest(shift, "uniform").pvalue > 0.01
    assert kstest(change, "uniform").pvalue > 0.01


def test_a_target_like_its_controls_rarely_passes_the_ordering() -> None:
    small = contrast_set(12, 4, registers=False)
    passes = 0
    for seed in range(40):
        data = activations(contrasts=small, seed=seed, shift=lambda name, point: 1.5)
        found = dmu_sweep({"base": data}, n_flips=9, n_bootstrap=200, progress=False)
        row = found.tables["ordering"].iloc[0]
        passes += row["result"] == "PASS"
    assert passes <= 3


def test_growth_shared_with_the_controls_is_no_excess() -> None:
    stages = {s: activations(s, shift=lambda *_, k=k: k) for s, k in {"a": 3.0, "b": 9.0}.items()}
    growth = dmu_sweep(stages, **FAST).tables["growth"].set_index("denominator").loc["rel_norm"]
    assert growth["control_growth"] > 0.3
    assert growth["growth"] > 0.3
    assert growth["ci_low"] < 0 < growth["ci_high"]
    assert growth["excess"] == pytest.approx(growth["growth"] - growth["control_growth"])


# ---- peaks ---------------------------------------------------------------------------------
def peaked(at: int, *, controls: int | None = None) -> PairedActivations:
    def shift(name: str, point: int) -> float:
        where = at if name == "authority" else controls
        return 8.0 if point == where else 0.0

    return activations(contrasts=contrast_set(20, 19), shift=shift)


def moved(before: PairedActivations, after: PairedActivations) -> bool:
    table = dmu_sweep({"a": before, "b": after}, **FAST).tables["peaks"]
    own = table[(table["stage"] == "b") & (table["contrast"] == "authority")]
    assert own["relocated"].nunique() == 1
    return bool(own["relocated"].iloc[0])


def test_relocation_needs_disjoint_sets_and_controls_that_stayed() -> None:
    assert moved(peaked(2), peaked(5))
    assert not moved(peaked(2), peaked(2))
    assert not moved(peaked(2, controls=2), peaked(5, controls=5)), "the controls moved too"
    assert not moved(activations(), activations(seed=1)), "a plateau has no peak to move"


def test_one_denominator_is_not_enough_for_a_relocation() -> None:
    stages = {"a": peaked(2), "b": peaked(5)}
    peaks = dmu_sweep(stages, denominators=["rel_norm"], **FAST).tables["peaks"]
    assert set(peaks["denominator"]) == {"rel_norm"}
    assert not peaks["relocated"].any()


def test_likely_points_are_the_smallest_set_with_ninety_per_cent() -> None:
    winners = torch.tensor([2] * 50 + [0] * 30 + [4] * 12 + [3] * 8)
    drawn = torch.nn.functional.one_hot(winners, 5).double() + 1
    peak = dmu_tables._peak(drawn.mean(0), drawn)
    assert peak.likely == (0, 2, 4)
    assert (peak.index, peak.size) == (2, pytest.approx(1.5))


# ---- heads ---------------------------------------------------------------------------------
def test_head_shares_sum_to_one_and_are_what_attention_writes() -> None:
    from mi_weightspace.models.harvest import harvest
    from mi_weightspace.models.load import load
    from mi_weightspace.models.toy import tiny_model

    lens = load(tiny_model("llama"))
    pairs = tuple(Pair(f"i{i}", (3, 10 + i, 7, 9), (4, 10 + i, 7, 9)) for i in range(6))
    contrasts = ContrastSet("ids", (Contrast("authority", "target", pairs),))
    points = ["attn_z.1", "resid_post.0", "resid_mid.1"]
    data = harvest(lens, contrasts, points=points, progress=False)
    g = torch.randn(lens.shape.d_model, generator=generator(0, "gradient"))
    table = probes.head_shares(data, "authority", 1, lens, gradient=g)
    assert len(table) == lens.shape.n_heads
    assert table["share"].sum() == pytest.approx(1, abs=1e-12)
    written = data.differences("authority", "resid_mid.1") - data.differences(
        "authority", "resid_post.0"
    )
    total = written.double().mean(0)
    assert table["along_gradient"].sum() == pytest.approx(float(total @ g.double()), rel=1e-4)
    width = lens.shape.d_head
    z = data.differences("authority", "attn_z.1").double().mean(0)
    matrix = lens.weight("blocks.1.attn.o").double()
    for head in range(lens.shape.n_heads):
        part = slice(head * width, (head + 1) * width)
        own = matrix[:, part] @ z[part]
        share = float(own @ total / total.square().sum())
        assert table["share"].iloc[head] == pytest.approx(share, rel=1e-3, abs=1e-5)
        assert table["norm"].iloc[head] == pytest.approx(float(own.norm()), rel=1e-4)
    with pytest.raises(PromptError, match=r"without attn_z\.0"):
        probes.head_shares(data, "authority", 0, lens)
    with pytest.raises(DirectionError, match="gradient"):
        probes.head_shares(data, "authority", 1, lens, gradient=g[:3])


# ---- report --------------------------------------------------------------------------------
def test_round_trip_and_figure(report: DmuReport, tmp_path: Path) -> None:
    again = load_report(report.save(tmp_path / "run"))
    assert isinstance(again, DmuReport)
    assert again.equals(report)
    figure = again.plot()
    assert np.asarray(figure.data[0]["z"]).shape == (2, len(POINTS))


def test_holm_over_targets_only_and_words_without_controls() -> None:
    pairs = contrast_set(20, 0).contrasts[0].pairs
    two = ContrastSet("two", (Contrast("a", "target", pairs), Contrast("b", "target", pairs)))
    data = activations(contrasts=two, shift=planted(4.0, name="a"))
    found = dmu_sweep({"sft": data}, **FAST)
    rows = found.tables["ordering"].drop_duplicates("contrast").set_index("contrast")
    assert rows.loc["a", "p_holm"] == pytest.approx(2 * rows.loc["a", "p_global"])  # pyright: ignore[reportOperatorIssue]
    assert {str(v.word) for v in found.verdicts} == {
        str(Word.ALIGNED_NO_CONTROLS),
        str(Word.NOT_SIGNIFICANT),
    }
    assert found.table["above_controls"].isna().all()
    assert len(found.tables["did"]) == len(found.tables["growth"]) == 0
    assert any("No controls" in text for text in found.reservations)


def test_above_controls_compares_a_control_with_the_others() -> None:
    data = activations(contrasts=contrast_set(20, 3), shift=planted(9.0, name="c1"))
    last = dmu_sweep({"sft": data}, **FAST).table.groupby("contrast").last()["above_controls"]
    assert last.to_dict() == {"authority": False, "c0": False, "c1": True, "c2": False}


def test_few_clusters_are_underpowered() -> None:
    few = contrast_set(4, 2, registers=False)
    found = dmu_sweep({"sft": activations(contrasts=few, shift=planted(9.0))}, **FAST)
    assert found.verdicts[0].word == Word.UNDERPOWERED


def test_a_lineage_is_harvested_stage_by_stage() -> None:
    from mi_weightspace.models.lineage import load_lineage
    from mi_weightspace.models.toy import tiny_model

    pairs = tuple(Pair(f"i{i}", (3, 10 + i, 7, 9), (4, 10 + i, 7, 9)) for i in range(6))
    contrasts = ContrastSet("ids", (Contrast("authority", "target", pairs),))
    stages = load_lineage(base=tiny_model("llama"), sft=tiny_model("llama", seed=1))
    found = dmu_sweep(stages, contrasts, **FAST)
    assert list(dict.fromkeys(found.table["stage"])) == ["base", "sft"]
    assert set(found.inputs) == {"base", "sft", "prompts"}
    with pytest.raises(PromptError, match="none, with a lineage"):
        dmu_sweep(stages)


def test_refusals_name_what_was_given() -> None:
    stages = lineage()
    with pytest.raises(PromptError, match="identical prompts"):
        dmu_sweep({**stages, "dpo": activations(contrasts=contrast_set(8))})
    with pytest.raises(PromptError, match="at least one stage"):
        dmu_sweep({})
    with pytest.raises(PromptError, match="the name 'nobody'"):
        dmu_sweep(stages, target="nobody")
    with pytest.raises(PromptError, match="at least two clusters"):
        dmu_sweep({"a": activations(contrasts=contrast_set(1, 0))})
    with pytest.raises(ConfigError, match="denominators"):
        dmu_sweep(stages, denominators=["size"])
    with pytest.raises(ConfigError, match="n_flips=0"):
        dmu_sweep(stages, n_flips=0)
