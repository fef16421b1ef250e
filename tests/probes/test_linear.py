"""Closed-form probes against refitting, scikit-learn and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import cluster_index, lda_filter, studentised_max_p
from mi_weightspace.core.stats import cluster_weights
from probes.linear import (
    METHODS,
    bootstrap_auroc,
    fit_filter,
    haufe_pattern,
    kernel,
    lda_penalty,
    leave_out_dm,
    leave_out_paired,
    leave_out_ridge,
    leave_out_scores,
    operators,
    pair_auroc,
    permuted_aurocs,
    required_pairs,
    ridge_grid,
    rows_of,
    separation,
    within_pair,
)
from probes.logistic import choose_c, fit_logistic, folds_of, out_of_fold_scores, score

pytestmark = pytest.mark.quick

N, D = 9, 14
CLUSTERS = cluster_index(["a", "a", "b", "c", "d", "d", "e", "f", "g"])  # sizes 2 and 1


def data(
    seed: int = 0, shift: float = 0.6, n: int = N, d: int = D, points: int = 2
) -> torch.Tensor:
    values = torch.randn(points, n, 2, d, generator=generator(seed, "linear", n, d))
    values += 2 * torch.randn(points, n, 1, d, generator=generator(seed, "items", n, d))
    values[:, :, 0, :3] += shift
    return values


def kept(cluster: int) -> torch.Tensor:
    return torch.nonzero(cluster != CLUSTERS).flatten()


def signs_of(seed: int) -> torch.Tensor:
    drawn = torch.randint(0, 2, (7,), generator=generator(seed, "signs")) * 2.0 - 1.0
    return drawn[CLUSTERS].double()


def flipped(values: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    return torch.where(signs[None, :, None, None] > 0, values, values.flip(2))


@pytest.mark.parametrize("seed", [0, 1])
def test_leave_cluster_out_ridge_equals_refitting_with_scikit_learn(seed: int) -> None:
    values, signs = data(seed), signs_of(seed)
    k = kernel(values)
    penalty = ridge_grid(k)[3 + seed]
    scores, _ = leave_out_scores([leave_out_ridge(k, CLUSTERS, penalty)], signs[None])
    swapped = flipped(values, signs)
    for point in range(2):
        for c in range(7):
            train = rows_of(swapped[:, kept(c)])[point].numpy()
            half = len(train) // 2
            model = Ridge(alpha=float(penalty[point]), solver="svd").fit(
                train, [1.0] * half + [-1.0] * half
            )
            for i in torch.nonzero(c == CLUSTERS).flatten().tolist():
                expected = model.predict(swapped[point, i].double().numpy())
                assert np.allclose(scores[0, point, i].numpy(), expected, atol=1e-10, rtol=0)


def test_leave_cluster_out_dm_and_paired_equal_refitting() -> None:
    values, signs = data(3), signs_of(3)
    k = kernel(values)
    penalty = ridge_grid(k)[4]
    dm, _ = leave_out_scores([leave_out_dm(k, CLUSTERS)], signs[None])
    paired, _ = leave_out_scores([leave_out_paired(k, CLUSTERS, penalty)], signs[None])
    swapped = flipped(values, signs).double()
    for point in range(2):
        for c in range(7):
            train = swapped[point][kept(c)]
            differences = train[:, 0] - train[:, 1]
            centre = train.mean((0, 1))
            system = differences @ differences.T
            system = system + float(penalty[point]) * torch.eye(len(train), dtype=torch.float64)
            dual = torch.linalg.solve(system, torch.ones(len(train), dtype=torch.float64))
            for i in torch.nonzero(c == CLUSTERS).flatten().tolist():
                x = swapped[point, i] - centre
                assert torch.allclose(dm[0, point, i], x @ differences.mean(0), atol=1e-10)
                assert torch.allclose(paired[0, point, i], x @ differences.T @ dual, atol=1e-10)


def test_lda_is_ridge_at_its_penalty() -> None:
    """Identity behind the leave-out scores of ``lda``: same direction for balanced classes."""
    values = data(5, n=8, d=30)
    weight, _ = fit_filter("lda", values)
    assert torch.allclose(
        torch.nn.functional.normalize(weight, dim=-1),
        torch.nn.functional.normalize(lda_filter(values), dim=-1),
        atol=1e-12,
    )
    rows = rows_of(values)
    scatter = sum(
        (part - part.mean(1, keepdim=True)).square().sum((1, 2))
        for part in (rows[:, :8], rows[:, 8:])
    )
    exact = 0.1 / 0.9 * torch.as_tensor(scatter) / 30
    ridge, _ = fit_filter("ridge", values, exact)
    assert torch.allclose(ridge, weight, atol=1e-9)
    assert bool((lda_penalty(kernel(values)) >= exact).all())


def test_penalty_is_chosen_by_leave_out_error_for_every_labelling() -> None:
    values, signs = data(6), torch.stack([signs_of(s) for s in range(5)])
    ops = operators("ridge", kernel(values), CLUSTERS)
    scores, choice = leave_out_scores(ops, signs)
    for b in range(5):
        single = torch.stack([leave_out_scores([op], signs[b : b + 1])[0][0] for op in ops])
        target = torch.tensor([1.0, -1.0], dtype=torch.float64)
        error = (single - target).square().sum((-1, -2))
        assert torch.equal(choice[b], error.argmin(0))
        for point in range(2):
            assert torch.allclose(scores[b, point], single[choice[b, point], point])


@pytest.mark.parametrize("method", ["dm", "lda", "ridge", "paired"])
def test_filters_put_the_class_means_at_one_and_minus_one(method: str) -> None:
    values = data(7)
    penalty = ridge_grid(kernel(values))[4] if method in {"ridge", "paired"} else None
    weight, bias = fit_filter(method, values, penalty)  # pyright: ignore[reportArgumentType]
    means = score(values, weight, bias).mean(1)
    assert torch.allclose(means, torch.tensor([1.0, -1.0]).double().expand(2, 2), atol=1e-9)


def test_haufe_pattern_is_covariance_times_filter() -> None:
    values = data(8)
    weight, _ = fit_filter("lda", values)
    for point in range(2):
        covariance = torch.cov(rows_of(values)[point].T)
        assert torch.allclose(haufe_pattern(values, weight)[point], covariance @ weight[point])


def test_auroc_counts_ties_by_mid_ranks() -> None:
    g = generator(0, "ties")
    scores = torch.randint(0, 4, (30, 12, 2), generator=g).double()
    labels = [1] * 12 + [0] * 12
    for row, value in zip(scores, pair_auroc(scores).tolist(), strict=True):
        assert value == pytest.approx(roc_auc_score(labels, torch.cat([row[:, 0], row[:, 1]])))
    assert float(within_pair(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]]))) == (
        pytest.approx(2.5 / 4)
    )


def test_separation_is_the_gap_over_the_pooled_spread() -> None:
    scores = torch.randn(2, N, 2, generator=generator(2, "apart")).double()
    weights = cluster_weights([str(int(c)) for c in CLUSTERS], 5, seed=0)
    found = separation(scores, weights)
    for b in range(5):
        index = torch.repeat_interleave(torch.arange(N), weights[b].long())
        drawn = scores[:, index].numpy()
        gap = drawn[..., 0].mean(1) - drawn[..., 1].mean(1)
        assert np.allclose(found[b].numpy(), gap / drawn.var(1).mean(-1) ** 0.5)
    assert torch.allclose(separation(scores), separation(scores, torch.ones(1, N).double()))


def test_bootstrap_auroc_equals_resampled_rows() -> None:
    scores = torch.randn(2, N, 2, generator=generator(1, "boot")).double()
    weights = cluster_weights([str(int(c)) for c in CLUSTERS], 20, seed=0)
    curve, pairs = bootstrap_auroc(scores, weights)
    for b in range(20):
        index = torch.repeat_interleave(torch.arange(N), weights[b].long())
        assert torch.allclose(curve[b], pair_auroc(scores[:, index]))
        assert torch.allclose(pairs[b], within_pair(scores[:, index]))


@pytest.mark.parametrize("method", ["dm", "lda", "ridge", "paired"])
def test_permutation_p_is_uniform_without_an_effect(method: str) -> None:
    """Also through the maximum over three points; AUROC is discrete, so KS against its jitter."""
    joint = []
    clusters = torch.arange(10)
    for seed in range(150):
        values = data(seed, shift=0.0, n=10, d=12, points=3)
        ops = operators(method, kernel(values), clusters)  # pyright: ignore[reportArgumentType]
        observed = pair_auroc(leave_out_scores(ops, torch.ones(1, 10).double())[0])[0]
        null = permuted_aurocs(ops, clusters, 99, seed=seed)
        _, adjusted = studentised_max_p(observed, null)
        joint.append(float(adjusted.min()))
    assert kstest(joint, "uniform").pvalue > 0.01


def test_a_planted_class_is_found() -> None:
    values = data(0, shift=0.0, n=30, d=12, points=3)
    values[1, :, 0, 0] += 3.0
    clusters = torch.arange(30)
    for method in ("lda", "ridge", "paired"):
        ops = operators(method, kernel(values), clusters)
        observed = pair_auroc(leave_out_scores(ops, torch.ones(1, 30).double())[0])[0]
        _, p = studentised_max_p(observed, permuted_aurocs(ops, clusters, 199, seed=0))
        assert p[1] <= 0.01, method
        assert p[0] > 0.05, method
        assert p[2] > 0.05, method


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_logistic_equals_scikit_learn_and_scores_survive_unstandardising(c: float) -> None:
    values = data(9, n=20, d=7) * torch.tensor([1, 5, 0.1, 1, 100, 1, 1.0])
    values[..., 5] = 3.0  # no spread
    fitted = fit_logistic(values, torch.full((2,), c).double())
    weight, bias = fitted.raw()
    for point in range(2):
        rows = rows_of(values)[point].numpy()
        standard = StandardScaler().fit(rows)
        oracle = LogisticRegression(C=c, tol=1e-12, max_iter=10_000, solver="newton-cholesky")
        oracle.fit(standard.transform(rows), [1] * 20 + [0] * 20)
        assert np.allclose(fitted.weight[point].numpy(), oracle.coef_[0], atol=1e-5, rtol=1e-4)
        expected = oracle.decision_function(standard.transform(rows))
        own = score(values, weight, bias)[point]
        assert np.allclose(torch.cat([own[:, 0], own[:, 1]]).numpy(), expected, atol=1e-4)
    standardised = (rows_of(values) - fitted.centre[:, None]) / fitted.spread[:, None]
    direct = torch.einsum("lrd,ld->lr", standardised, fitted.weight) + fitted.bias[:, None]
    raw = torch.einsum("lrd,ld->lr", rows_of(values), weight) + bias[:, None]
    assert torch.allclose(direct, raw, atol=1e-8)


def test_logistic_with_more_dimensions_than_rows_equals_scikit_learn() -> None:
    values = data(10, n=8, d=40, points=1)
    fitted = fit_logistic(values, torch.tensor([0.1]).double())
    z = ((rows_of(values) - fitted.centre[:, None]) / fitted.spread[:, None])[0].numpy()
    oracle = LogisticRegression(C=0.1, tol=1e-12, max_iter=10_000).fit(z, [1] * 8 + [0] * 8)
    assert np.allclose(fitted.weight[0].numpy(), oracle.coef_[0], atol=1e-5)


def test_logistic_folds_hold_whole_clusters_and_score_only_held_out_rows() -> None:
    folds = folds_of(CLUSTERS)
    for c in range(7):
        assert len(set(folds[c == CLUSTERS].tolist())) == 1
    noise = data(11, shift=0.0, n=20, d=60, points=1)
    held = out_of_fold_scores(noise, torch.arange(20))
    fitted = fit_logistic(noise, torch.tensor([1.0]).double())
    assert float(pair_auroc(score(noise, *fitted.raw()))[0]) == 1.0
    assert float(pair_auroc(held)[0]) < 0.8
    assert float(choose_c(noise, torch.arange(20))[0]) <= 1e-2, "noise is shrunk away"


@pytest.mark.parametrize(
    ("auroc", "n"), [(0.55, 522), (0.58, 203), (0.60, 130), (0.65, 57), (0.70, 32)]
)
def test_sample_sizes_of_hanley_and_mcneil(auroc: float, n: int) -> None:
    assert abs(required_pairs(auroc) - n) <= 1
    assert METHODS == ("dm", "lda", "ridge", "lr", "paired")
