"""Every detector against another implementation, and what it may not see."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mi_weightspace.core.seeds import generator
from probes.detector_list import DETECTORS, detectors_for, token_counts
from probes.detectors import (
    BUDGET,
    C_GRID,
    Configuration,
    Detector,
    Scorer,
    aurocs,
    logistic,
    mean_difference,
    principal_logistic,
    selected,
    selected_logistic,
    shrunk_discriminant,
)
from probes.detectors_nonlinear import (
    DECAY,
    RATE,
    RIDGES,
    STEPS,
    UNITS,
    kernel_ridge,
    small_network,
)

pytestmark = pytest.mark.quick


def problem(n: int = 60, d: int = 12, m: int = 25, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated columns of very different scales; rows, signs, test rows."""
    draw = generator(seed, "problem")
    mix = torch.randn(d, d, generator=draw, dtype=torch.float64)
    mix *= torch.logspace(1, -1, d, dtype=torch.float64)
    signs = (torch.arange(n) % 2 * 2 - 1).double()
    rows = torch.randn(n, d, generator=draw, dtype=torch.float64)
    rows[:, 0] += 0.7 * signs
    return rows @ mix + 3, signs, torch.randn(m, d, generator=draw, dtype=torch.float64) @ mix + 3


def fitted(c: float, rows: np.ndarray, signs: Tensor) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(rows, signs.numpy())


@pytest.mark.parametrize("shape", [(60, 12), (30, 50)])
def test_logistic_equals_scikit_learn_at_every_penalty(shape: tuple[int, int]) -> None:
    rows, signs, test = problem(*shape)
    rows[:, 3] = 5.0  # a column without spread
    together = logistic(rows, signs[None], test, [(c,) for c in C_GRID], 0)[:, 0]  # float32
    scale = StandardScaler().fit(rows.numpy())
    shown = scale.transform(test.numpy())
    shown[:, 3] = 0
    for c, coarse in zip(C_GRID, together, strict=True):
        oracle = fitted(c, scale.transform(rows.numpy()), signs).decision_function(shown)
        own = logistic(rows, signs[None], test, [(c,)], 0)[0, 0]
        np.testing.assert_allclose(own, oracle, atol=5e-3 * np.abs(oracle).max() + 1e-9)
        np.testing.assert_allclose(coarse, oracle, atol=3e-2 * np.abs(oracle).max() + 1e-9)


def test_selected_logistic_equals_scikit_learn_on_the_selected() -> None:
    rows, signs, test = problem(seed=1)
    scale = StandardScaler().fit(rows.numpy())
    shown = torch.from_numpy(scale.transform(rows.numpy()))
    gap = shown[signs > 0].mean(0) - shown[signs < 0].mean(0)
    for k, c in ((1, 1.0), (4, 0.1), (128, 10.0)):
        best = gap.abs().argsort(descending=True)[:k]
        assert torch.equal(selected(rows, (signs > 0).long(), k), best)
        best = best.numpy()
        own = selected_logistic(rows, signs[None], test, [(k, c)], 0)[0, 0]
        model = fitted(c, shown[:, best].numpy(), signs)
        oracle = model.decision_function(scale.transform(test.numpy())[:, best])
        np.testing.assert_allclose(own, oracle, atol=1e-3 * np.abs(oracle).max())


def test_principal_logistic_equals_a_scikit_learn_pipeline() -> None:
    rows, signs, test = problem(seed=2)
    for k, c in ((1, 1.0), (4, 10.0), (64, 0.01)):
        parts = PCA(min(k, rows.shape[1]), whiten=True).fit(rows.numpy())
        grow = (len(rows) / (len(rows) - 1)) ** 0.5  # its whitening divides by n - 1
        model = fitted(c, parts.transform(rows.numpy()) * grow, signs)
        oracle = model.decision_function(parts.transform(test.numpy()) * grow)
        own = principal_logistic(rows, signs[None], test, [(k, c)], 0)[0, 0]
        np.testing.assert_allclose(own, oracle, atol=2e-3 * np.abs(oracle).max())


def test_closed_forms_equal_their_definitions() -> None:
    rows, signs, _ = problem(n=61)
    one, zero = rows[signs > 0], rows[signs < 0]
    shift = one.mean(0) - zero.mean(0)
    probe = rows.mean(0) + torch.eye(12, dtype=torch.float64)  # scores are the weight vector
    own = mean_difference(rows, signs[None], probe, [()], 0)[0, 0]
    torch.testing.assert_close(own, shift)
    within = (one - one.mean(0)).T @ (one - one.mean(0)) + (zero - zero.mean(0)).T @ (
        zero - zero.mean(0)
    )
    total = (rows - rows.mean(0)).square().sum() / len(rows) / 12
    oracle = torch.linalg.solve(within / len(rows) + total / 9 * torch.eye(12).double(), shift)
    own = shrunk_discriminant(rows, signs[None], probe, [()], 0)[0, 0]
    assert float(torch.cosine_similarity(own, oracle, dim=0)) == pytest.approx(1, abs=1e-9)


def test_kernel_ridge_equals_scikit_learn() -> None:
    rows, signs, test = problem(n=41)
    scale = StandardScaler().fit(rows.numpy())
    shown, other = scale.transform(rows.numpy()), scale.transform(test.numpy())
    apart = np.linalg.norm(shown[:, None] - shown[None], axis=-1)
    width = np.sort(apart[~np.eye(41, dtype=bool)])[(41 * 40 - 1) // 2]
    scores = kernel_ridge(rows, signs[None], test, RIDGES, 0)[:, 0]
    mean = float(signs.mean())
    for (penalty,), own in zip(RIDGES, scores, strict=True):
        model = KernelRidge(alpha=penalty, kernel="rbf", gamma=1 / (2 * width**2))
        oracle = model.fit(shown, signs.numpy() - mean).predict(other) + mean
        np.testing.assert_allclose(own, oracle, atol=1e-6)


def test_the_network_equals_autograd_and_adamw() -> None:
    rows, signs, test = problem()
    many = torch.stack([signs, -signs, signs.roll(1)])
    scores = small_network(rows, many, test, STEPS, 7)
    scale = StandardScaler().fit(rows.numpy())
    x = torch.from_numpy(scale.transform(rows.numpy())).float()
    held = torch.from_numpy(scale.transform(test.numpy())).float()
    d = rows.shape[1]
    draw = generator(7, "small network", d)
    first = torch.randn(d, UNITS, generator=draw) * (2 / d) ** 0.5
    last = torch.randn(UNITS, generator=draw) * (1 / UNITS) ** 0.5
    for b, y in enumerate(many.float()):
        weights = [first.clone(), torch.zeros(UNITS), last.clone(), torch.zeros(())]
        for w in weights:
            w.requires_grad_()
        adam = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
        for step in range(1, 31):
            adam.zero_grad()
            out = (x @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]
            torch.nn.functional.softplus(-y * out).mean().backward()
            adam.step()
            if (float(step),) in STEPS:
                shown = (held @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]
                own = scores[STEPS.index((float(step),)), b]
                torch.testing.assert_close(own, shown.detach(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.name)
def test_labellings_do_not_see_each_other_nor_test_rows_one_another(detector: Detector) -> None:
    rows, signs, test = problem(d=16)
    draw = generator(0, "labellings")
    many = torch.stack([signs[torch.randperm(60, generator=draw)] for _ in range(12)])
    config = detector.configurations[len(detector.configurations) // 2]
    whole = detector.scorer(rows, many, test, [config], 3)[0].double()
    for b in (0, 11):
        alone = detector.scorer(rows, many[b : b + 1], test, [config], 3)[0, 0].double()
        size = float(alone.abs().max())
        torch.testing.assert_close(whole[b], alone, atol=5e-3 * size, rtol=0)
    changed = test.clone()
    changed[1:] += 100
    again = detector.scorer(rows, many, changed, [config], 3)[0].double()
    torch.testing.assert_close(again[:, 0], whole[:, 0], atol=1e-4, rtol=1e-4)


def test_auroc_equals_scikit_learn_with_ties() -> None:
    draw = generator(0, "auroc")
    scores = torch.randint(0, 6, (5, 40), generator=draw).double()
    labels = torch.randint(0, 2, (5, 40), generator=draw)
    expected = [roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)]
    np.testing.assert_allclose(aurocs(scores, labels), expected, atol=1e-12)
    assert bool(aurocs(scores[0], torch.ones(40).long()).isnan())


def test_the_budget_is_the_same_for_all() -> None:
    sizes = {d.name: len(d.configurations) for d in DETECTORS}
    assert {name: size for name, size in sizes.items() if size != BUDGET} == {"dm": 1, "lda": 1}
    extra = detectors_for(["dense", "components/svd blocks.0.mlp.out"])[-1]
    assert extra.name == "svd blocks.0.mlp.out"
    assert extra.family == "handed in"


def recording(seen: list[tuple[set[int], set[int]]]) -> Scorer:
    """Notes the clusters (in the first column) it trains and is tested on; prefers the last."""

    def scorer(
        train: Tensor, signs: Tensor, test: Tensor, configurations: list[Configuration], seed: int
    ) -> Tensor:
        del seed
        seen.append((set(train[:, 0].int().tolist()), set(test[:, 0].int().tolist())))
        better = torch.tensor([c for (c,) in configurations])[:, None, None]
        return (better * test[:, 1]).expand(-1, len(signs), -1)

    return scorer  # pyright: ignore[reportReturnType]


def test_tuning_keeps_clusters_whole_and_takes_the_best() -> None:
    seen: list[tuple[set[int], set[int]]] = []
    clusters = torch.arange(24) // 4
    labels = clusters % 2
    rows = torch.stack([clusters.double(), labels.double()], 1)
    choices = tuple((c,) for c in (-1.0, 0.0, 2.0, 3.0))
    detector = Detector("d", "linear", "dense", recording(seen), choices)
    assert detector.tune(rows, labels, clusters, 0) == (2.0,), "the first among the best"
    assert len(seen) == 3
    for train, test in seen:
        assert not train & test
        assert train | test == set(range(6))
    score = detector.fit(rows, labels, clusters, 0)
    assert float(aurocs(score(rows), labels)) == 1.0
    few = detector.tune(rows[:8], labels[:8], clusters[:8], 0)
    assert few == choices[2], "no inner folds: the middle one"


def test_retuning_chooses_for_every_labelling() -> None:
    rows, signs, test = problem(n=80)
    clusters = torch.arange(80) // 2
    many = torch.stack([signs.sort().values, signs])
    own = Detector("rbf", "non-linear", "dense", kernel_ridge, RIDGES, retuned=True)
    drawn = own.permuted(rows, many, test, clusters, RIDGES[0], 0)
    every = kernel_ridge(rows, many, test, RIDGES, 0)
    for b in range(2):
        assert any(torch.equal(drawn[b], scores) for scores in every[:, b])


def test_token_counts() -> None:
    counts = token_counts(["a b, a", "B c"])
    assert counts.tolist() == [[1, 2, 1, 0], [0, 0, 1, 1]]
    ids = token_counts([(5, 5, 7), (7,)])
    assert ids.tolist() == [[2, 1], [0, 1]]
