"""Probe banks: independent oracles, planted truth, planted absence, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_cases import POINTS, activations, contrast_set, planted
from scipy.stats import kstest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

import probes
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.direction_io import load_directions
from mi_weightspace.core.errors import ConfigError, DirectionError, PromptError
from mi_weightspace.core.report import load_report
from mi_weightspace.core.space import Space
from mi_weightspace.core.verdict import Word
from probes.bank import ProbeBank, principal_rows
from probes.defer import fit

FAST = {"n_permutations": 99, "n_bootstrap": 200, "progress": False}
SETS = contrast_set()
FIT = [i for i in range(20) if i % 4 != 3]


@pytest.fixture(scope="module")
def bank() -> ProbeBank:
    return fit(activations(shift=planted(4.0)), n_permutations=499, n_bootstrap=200, progress=False)


def rows(value: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    flat = torch.cat([value[:, 0], value[:, 1]]).double().numpy()
    return flat, np.repeat([1, 0], len(value))


# ---- oracles -------------------------------------------------------------------------------
def test_filters_and_heldout_scores_equal_scikit_learn(bank: ProbeBank) -> None:
    """scikit-learn's shrunk LDA, on the fit registers only, for the target and for a control."""
    data = activations(shift=planted(4.0))
    held = [i for i in range(20) if i % 4 == 3]
    for point in ("resid_mid.1", "resid_post.2"):
        direction = bank.direction(point=point)
        value = data.at("authority", point)
        oracle = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1)
        oracle.fit(*rows(value[FIT]))
        expected = oracle.coef_[0] / np.linalg.norm(oracle.coef_[0])
        assert direction.filter is not None
        assert np.allclose(direction.filter.numpy(), expected, atol=1e-5)
        x, y = rows(value[held])
        auroc = roc_auc_score(y, oracle.decision_function(x))
        assert direction.fit["heldout_register_auroc"] == pytest.approx(auroc)
        shift = (value[FIT][:, 0] - value[FIT][:, 1]).double().mean(0)
        assert torch.allclose(direction.pattern.double(), shift / shift.norm(), atol=1e-6)
        assert direction.scale == pytest.approx(float(shift.norm()), rel=1e-5)
        oracle.fit(*rows(data.at("c7", point)))
        expected = oracle.coef_[0] / np.linalg.norm(oracle.coef_[0])
        assert direction.control_filters is not None
        index = direction.control_names.index("c7")
        assert np.allclose(direction.control_filters[index].numpy(), expected, atol=1e-5)


def test_leave_cluster_out_auroc_equals_refitting(bank: ProbeBank) -> None:
    value = activations(shift=planted(4.0)).at("authority", "resid_post.2")[FIT]
    x, y = rows(value)
    centred = x - x.mean(0)
    penalty = 0.1 / 0.9 * (centred**2).sum() / x.shape[1]
    scores = np.zeros(len(x))
    for i in range(len(FIT)):
        held = [i, i + len(FIT)]
        kept = np.setdiff1d(np.arange(len(x)), held)
        scores[held] = Ridge(alpha=penalty).fit(x[kept], 2.0 * y[kept] - 1).predict(x[held])
    row = bank.table.set_index("point").loc["resid_post.2"]
    assert row["auroc"] == pytest.approx(roc_auc_score(y, scores))
    assert row["n"] == row["n_clusters"] == len(FIT)


def test_scores_put_class_means_at_one_and_moments_are_those_of_all_prompts(
    bank: ProbeBank,
) -> None:
    data = activations(shift=planted(4.0))
    value = data.at("authority", "resid_post.2")[FIT]
    means = bank.scores(value, point="resid_post.2").mean(0)
    assert torch.allclose(means, torch.tensor([1.0, -1.0]).double(), atol=1e-4)
    every = torch.cat([data.at(c.name, "resid_post.2").flatten(0, 1) for c in SETS]).double()
    direction = bank.direction(layer=2)
    assert direction.space == Space("resid_post", 2)
    assert direction.mean is not None and direction.variance is not None
    assert torch.allclose(direction.mean.double(), every.mean(0), atol=1e-5)
    assert torch.allclose(direction.variance.double(), every.var(0), atol=1e-4)
    assert direction.pcs is not None
    gram = (direction.pcs @ direction.pcs.T).double()
    assert torch.allclose(gram, torch.eye(8).double(), atol=1e-5)


def test_principal_rows_equal_numpy() -> None:
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13)
    own = principal_rows([x], 4)[0].double().numpy()
    _, _, oracle = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0))
    assert np.allclose(np.abs((own * oracle[:4]).sum(1)), 1, atol=1e-6)


# ---- planted truth and absence -------------------------------------------------------------
def test_a_planted_direction_is_found_where_it_is(bank: ProbeBank) -> None:
    table = bank.table.set_index("point")
    assert list(table.index) == [p.name for p in POINTS]
    assert (table["p_adjusted"].iloc[4:] <= 0.05).all()
    assert (table["p_adjusted"].iloc[1:4] > 0.05).all()
    assert np.isnan(table["auroc"].iloc[0])
    assert bank.best_point in POINTS[4:]
    assert bank.best_layer == bank.best_point.layer
    assert bank.verdicts[0].word == Word.AXIS_SPECIFIC
    assert bank.verdicts[0].evidence["n_controls"] == 20
    assert float(bank.direction().pattern[0]) > 0.85
    assert len(bank.directions()) == len(POINTS) - 1
    assert bank.direction().n_controls == 20
    assert any("resid_pre.0" in text for text in bank.reservations)
    assert (table["specificity_max"].iloc[1:] >= table["specificity"].iloc[1:]).all()


def test_p_is_uniform_without_an_effect_and_nothing_is_claimed() -> None:
    small = contrast_set(10, 1, registers=False)
    least, words = [], []
    for seed in range(120):
        data = activations(contrasts=small, seed=seed, d=8, points=POINTS[1:4], dead_first=False)
        found = fit(data, n_permutations=99, n_bootstrap=2, seed=seed, progress=False)
        least.append(float(found.table["p_adjusted"].min()))
        words.append(found.verdicts[0].word)
    assert kstest(least, "uniform").pvalue > 0.01
    assert sum(w == Word.NOT_SIGNIFICANT for w in words) >= 0.88 * len(words)


def test_the_layer_choice_pays_for_itself() -> None:
    """On noise the best of six points looks decodable; the nested score does not."""
    small = contrast_set(12, 0, registers=False)
    best, nested = [], []
    for seed in range(25):
        data = activations(contrasts=small, seed=100 + seed, d=8)
        found = fit(data, n_permutations=1, n_bootstrap=2, progress=False)
        best.append(float(found.table["auroc"].max()))
        nested.append(float(found.tables["choice"]["auroc"].iloc[0]))
    assert np.mean(best) > 0.58
    assert np.mean(nested) < 0.54


def test_a_probe_that_also_scores_controls_is_not_axis_specific() -> None:
    def everywhere(name: str, point: int) -> float:
        return 4.0 if point >= 4 else 0.0

    found = fit(activations(shift=everywhere), **FAST)
    assert found.verdicts[0].word == Word.NOT_AXIS_SPECIFIC
    assert found.table["specificity"].iloc[-1] > 0.3
    specific = fit(activations(shift=planted(4.0)), **FAST)
    assert specific.table["specificity"].iloc[-1] < 0.2


def test_without_controls_the_word_says_so() -> None:
    found = fit(activations(contrasts=contrast_set(20, 0), shift=planted(4.0)), **FAST)
    assert found.verdicts[0].word == Word.ALIGNED_NO_CONTROLS
    assert found.direction().control_patterns is None
    assert found.table["specificity"].isna().all()


def test_few_clusters_are_underpowered_and_a_perfect_score_has_the_exact_bound() -> None:
    few = contrast_set(4, 2, registers=False)
    found = fit(activations(contrasts=few, shift=planted(40.0, first=1)), **FAST)
    assert found.verdicts[0].word == Word.UNDERPOWERED
    row = found.table.iloc[-1]
    assert row["auroc"] == 1.0
    assert row["auroc_low"] == pytest.approx(0.05 ** (1 / 4))
    assert row["within_pair_low"] == pytest.approx(0.05 ** (1 / 4))


@pytest.mark.parametrize("method", ["dm", "ridge", "paired", "lr"])
def test_every_method_finds_the_planted_direction(method: str) -> None:
    data = activations(contrasts=contrast_set(20, 2), shift=planted(5.0, 1), points=POINTS[3:6])
    found = fit(data, method=method, **FAST)  # pyright: ignore[reportArgumentType]
    direction = found.direction(point="resid_post.1")
    assert direction.method == method
    assert float(direction.pattern[0]) > 0.75
    assert direction.filter is not None and float(direction.filter[0]) > 0.6
    assert direction.fit["heldout_register_auroc"] > 0.9
    if method == "lr":
        value = data.at("authority", "resid_post.1")[FIT].flatten(0, 1)
        haufe = torch.cov(value.double().T) @ direction.filter.double()
        cosine = torch.nn.functional.cosine_similarity(haufe, direction.pattern.double(), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)


# ---- files ---------------------------------------------------------------------------------
def test_round_trip_and_direction_file(bank: ProbeBank, tmp_path: Path) -> None:
    folder = bank.save(tmp_path / "run")
    again = load_report(folder)
    assert isinstance(again, ProbeBank)
    assert again.equals(bank)
    stored = load_directions(folder / "direction.safetensors")
    assert [d.space for d in stored] == [d.space for d in again.directions()]
    for one, two in zip(stored, again.directions(), strict=True):
        assert torch.equal(one.pattern, two.pattern)
        assert one.control_names == two.control_names == bank.direction().control_names
        assert one.fit["bias"] == two.fit["bias"]
        assert one.model_hash == "hash-sft"
        assert one.prompts_hash == SETS.hash
    assert len(again.plot().data) >= 2


def test_scores_are_those_of_the_stored_filter_and_bias(bank: ProbeBank) -> None:
    direction = bank.direction(layer=2)
    value = activations(shift=planted(4.0)).at("authority", "resid_post.2").double()
    assert direction.filter is not None
    own = value @ direction.filter.double() + float(direction.fit["bias"])
    scale = bank.arrays["filter_norm"][bank.points.index(direction.space)]
    assert torch.allclose(own * scale, bank.scores(value, point="resid_post.2"), atol=1e-5)


def test_a_live_model_is_harvested() -> None:
    from mi_weightspace.models.toy import tiny_model

    def pair(i: int) -> Pair:
        return Pair(f"i{i}", (3, 10 + i, 7, 9), (4, 10 + i, 7, 9))

    target = Contrast("authority", "target", tuple(pair(i) for i in range(6)))
    found = fit(tiny_model("llama"), ContrastSet("ids", (target,)), **FAST)
    assert [p.name for p in found.points] == [
        "resid_mid.0",
        "resid_post.0",
        "resid_mid.1",
        "resid_post.1",
    ]
    assert found.config["position"] == "last"
    assert found.timings["harvest"] > 0


# ---- refusals ------------------------------------------------------------------------------
def kinds(*names: str) -> ContrastSet:
    pairs = contrast_set().contrasts[0].pairs
    return ContrastSet("k", tuple(Contrast(f"x{i}", k, pairs) for i, k in enumerate(names)))  # pyright: ignore[reportArgumentType]


def test_refusals_name_what_was_given() -> None:
    good = activations()
    with pytest.raises(PromptError, match="no contrast of kind 'target'"):
        fit(activations(contrasts=kinds("control", "null")))
    with pytest.raises(PromptError, match="2 targets"):
        fit(activations(contrasts=kinds("target", "target")))
    with pytest.raises(PromptError, match="2 clusters of split 'fit'"):
        fit(activations(contrasts=contrast_set(2, 0)))
    with pytest.raises(PromptError, match="same activations on both sides"):
        fit(good, points=["resid_pre.0"])
    with pytest.raises(PromptError, match="beside activations of"):
        fit(good, contrast_set(8))
    with pytest.raises(PromptError, match="pooled by 'last'"):
        fit(good, position="all_mean")
    with pytest.raises(PromptError, match="do not hold it"):
        fit(good, points=["resid_post.9"])
    with pytest.raises(PromptError, match="none, with a model"):
        fit("somewhere")
    with pytest.raises(ConfigError, match="method='svm'"):
        fit(good, method="svm")  # pyright: ignore[reportArgumentType]


def test_missing_directions_are_refused(bank: ProbeBank) -> None:
    with pytest.raises(DirectionError, match=r"resid_pre\.0"):
        bank.direction(point="resid_pre.0")
    with pytest.raises(DirectionError, match="one of the two"):
        bank.direction(point="resid_post.1", layer=1)


def test_a_control_without_shift_at_some_point_is_left_out_of_the_directions() -> None:
    data = activations(shift=planted(4.0))
    values = dict(data.values)
    flat = values["c3", "resid_mid.1"].clone()
    flat[:, 1] = flat[:, 0]
    values["c3", "resid_mid.1"] = flat
    found = fit(
        PairedActivations("sft", "h", data.contrasts, "last", data.points, values, {}, {}), **FAST
    )
    assert "c3" not in found.direction().control_names
    assert found.direction().n_controls == 19
    assert any("1 controls carry no shift" in text for text in found.reservations)
    assert "c3" in set(found.tables["controls"]["control"])


def test_a_point_without_variance_between_items_has_no_probe() -> None:
    data = activations(shift=planted(4.0))
    values = dict(data.values)
    constant = torch.zeros(20, 2, 16)
    constant[:, 0, 0] = constant[:, 1, 1] = 3.0
    values["authority", "resid_post.1"] = constant
    found = fit(
        PairedActivations("sft", "h", data.contrasts, "last", data.points, values, {}, {}), **FAST
    )
    assert "resid_post.1" not in found.config["points"]
    assert len(found.points) == len(POINTS) - 2


def test_a_named_control_can_be_the_target_and_then_is_nobodys_control() -> None:
    found = fit(activations(), target="c0", **FAST)
    assert found.config["target"] == "c0"
    assert "c0" not in found.config["controls"]
    assert "authority" not in found.config["controls"]
    assert not math.isnan(found.table["auroc"].iloc[-1])


def test_the_face_loads_lazily() -> None:
    assert probes.fit is fit
    assert set(probes.__all__) <= set(dir(probes))
