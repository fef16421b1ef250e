"""Paired-shift statistics against explicit recomputation, naive float64 and uniformity of p."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import (
    bootstrap_norms,
    check_same_prompts,
    cluster_index,
    cluster_signs,
    debiased_norm_sq,
    did,
    differences,
    gram,
    lda_filter,
    mean_shift,
    norm_sq,
    recentred_norm_sq,
    sampling_variance,
    sign_flip_norms,
    signed_sqrt,
    studentised_max_p,
    whitened_gram,
)
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import cluster_weights, sign_flips

pytestmark = pytest.mark.quick


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed, "test", *shape), dtype=torch.float64)


def test_gram_flips_and_bootstraps_equal_explicit_ones() -> None:
    d = normal(3, 7, 20) + 0.3
    signs = sign_flips(7, 50, seed=1)
    explicit = torch.einsum("bn,lnd->bld", signs, d).div(7).norm(dim=-1)
    assert torch.allclose(sign_flip_norms(gram(d), signs), explicit, rtol=1e-6, atol=0)
    weights = cluster_weights([f"c{i // 2}" for i in range(7)], 40, seed=2)
    mean = torch.einsum("bn,lnd->bld", weights, d) / weights.sum(1)[:, None, None]
    assert torch.allclose(bootstrap_norms(gram(d), weights), mean.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.allclose(norm_sq(gram(d)), mean_shift(d).square().sum(-1))


def test_float32_activations_of_large_norm_lose_nothing() -> None:
    """A shift of 0.01 beside a coordinate of 3,000: exact to 1e-6 because products are float64."""
    values = normal(12, 2, 30).float()
    values[..., 0] = 3000.0
    values[:, 0, 1] += 0.01
    exact = (values[:, 0].double() - values[:, 1].double()).mean(0).norm()
    assert float(norm_sq(gram(differences(values))).sqrt()) == pytest.approx(float(exact), rel=1e-9)


def test_debiased_norm_is_unbiased_and_raw_is_not() -> None:
    mu = torch.zeros(10, dtype=torch.float64)
    mu[0] = 0.5
    d = normal(4000, 8, 10, seed=3) + mu
    debiased = debiased_norm_sq(d)
    error = float(debiased.std()) / 4000**0.5
    assert abs(float(debiased.mean()) - 0.25) < 3 * error
    assert float(norm_sq(gram(d)).mean()) > 0.25 + 1.0  # tr(S)/n = 10/8
    assert bool((debiased < 0).any()), "the sign is kept"
    assert float(signed_sqrt(torch.tensor(-4.0))) == -2.0


def test_sampling_variance_of_independent_pairs_and_of_clusters() -> None:
    d = normal(9, 5)
    covariance = torch.cov(d.T)
    assert float(sampling_variance(gram(d))) == pytest.approx(float(covariance.trace()) / 9)
    # every pair twice: the clustered estimate of the doubled set is that of the single set
    doubled, clusters = torch.cat([d, d]), cluster_index([f"i{i}" for i in list(range(9)) * 2])
    clustered = sampling_variance(gram(doubled), clusters)
    assert float(clustered) == pytest.approx(float(sampling_variance(gram(d))))
    assert float(sampling_variance(gram(doubled))) < 0.6 * float(clustered)
    with pytest.raises(PromptError, match="at least two clusters"):
        sampling_variance(gram(d), torch.zeros(9, dtype=torch.long))


def test_cluster_signs_never_split_a_cluster() -> None:
    index = cluster_index(["b", "a", "b", "c"])
    signs = cluster_signs(index, 200, seed=0)
    assert torch.equal(signs[:, 0], signs[:, 2])
    assert not torch.equal(signs[:, 0], signs[:, 1])


def test_recentred_draws_lie_around_the_observed_square() -> None:
    d = normal(30, 40) + 0.1
    weights = cluster_weights([f"c{i}" for i in range(30)], 4000, seed=0)
    draws = recentred_norm_sq(gram(d), weights)
    error = float(draws.std()) / 4000**0.5
    assert abs(float(draws.mean()) - float(norm_sq(gram(d)))) < 4 * error
    assert float((bootstrap_norms(gram(d), weights) ** 2).mean()) > float(draws.mean()) + 0.5


def test_p_is_uniform_without_an_effect_also_for_the_maximum_over_layers() -> None:
    """400 null sets, 6 correlated layers of very different scale: KS against uniform."""
    single, joint = [], []
    scales = torch.tensor([1.0, 1.0, 5.0, 100.0, 100.0, 1000.0], dtype=torch.float64)
    for seed in range(400):
        base = normal(10, 8, seed=seed)
        layers = torch.stack([base + 0.7 * normal(10, 8, seed=1000 * s + seed) for s in range(6)])
        g = gram(layers * scales[:, None, None])
        p, adjusted = studentised_max_p(
            norm_sq(g).sqrt(), sign_flip_norms(g, sign_flips(10, 199, seed=seed))
        )
        single.append(float(p[3]))
        joint.append(float(adjusted.min()))
    assert kstest(single, "uniform").pvalue > 0.01
    assert kstest(joint, "uniform").pvalue > 0.01


def test_a_planted_shift_is_found_at_its_layer_and_nowhere_else() -> None:
    layers = normal(5, 20, 16)
    layers[3] += 1.5
    g = gram(layers)
    _, adjusted = studentised_max_p(
        norm_sq(g).sqrt(), sign_flip_norms(g, sign_flips(20, 999, seed=0))
    )
    assert adjusted[3] <= 0.002
    assert bool((adjusted[[0, 1, 2, 4]] > 0.05).all())


def test_identical_sides_have_p_one_and_do_not_spoil_the_maximum() -> None:
    layers = normal(3, 12, 6)
    layers[0] = 0.0
    layers[2] += 2.0
    g = gram(layers)
    p, adjusted = studentised_max_p(
        norm_sq(g).sqrt(), sign_flip_norms(g, sign_flips(12, 499, seed=0))
    )
    assert (float(p[0]), float(adjusted[0])) == (1.0, 1.0)
    assert adjusted[2] < 0.01


def make(stage: str, values: dict[tuple[str, str], torch.Tensor], n: int) -> PairedActivations:
    pairs = tuple(Pair(f"i{i}", "a", "b") for i in range(n))
    names = dict.fromkeys(name for name, _ in values)
    set_ = ContrastSet("s", tuple(Contrast(c, "target", pairs) for c in names))
    points = tuple(Space.parse(p) for p in dict.fromkeys(p for _, p in values))
    return PairedActivations(stage, "h", set_, "last", points, values, {}, {})


def test_stages_on_other_prompts_are_refused() -> None:
    points = [Space("resid_post", 0)]
    values = {(c, p.name): normal(6, 2, 5, seed=i) for i, c in enumerate("ab") for p in points}
    fewer = make("y", {k: v[:5] for k, v in values.items()}, 5)
    check_same_prompts(make("x", values, 6), make("y", values, 6))
    with pytest.raises(PromptError, match="identical prompts"):
        check_same_prompts(make("x", values, 6), fewer)
    with pytest.raises(PromptError, match="same pairs"):
        did(normal(5, 3), normal(6, 3))


@pytest.mark.parametrize(("n", "d"), [(5, 40), (30, 6)])
def test_lda_filter_equals_a_dense_solve(n: int, d: int) -> None:
    values = normal(2, n, 2, d).float()
    values[..., 0, 0] += 1.0
    filters = lda_filter(values)
    for b in range(2):
        x = values[b].double()
        cov = ((n - 1) * torch.cov(x[:, 0].T) + (n - 1) * torch.cov(x[:, 1].T)) / (2 * n - 2)
        shrunk = 0.9 * cov + 0.1 * cov.diagonal().mean() * torch.eye(d, dtype=torch.float64)
        dmu = (x[:, 0] - x[:, 1]).mean(0)
        expected = torch.linalg.solve(shrunk, dmu)
        assert torch.allclose(filters[b], expected, rtol=1e-7, atol=1e-9)
        pairs = x[:, 0] - x[:, 1]
        whitened = pairs @ torch.linalg.inv(shrunk) @ pairs.T
        assert torch.allclose(whitened_gram(values)[b], whitened, rtol=1e-6, atol=1e-8)
    with pytest.raises(PromptError, match="at least 2 pairs"):
        lda_filter(values[0, :1])
    with pytest.raises(PromptError, match="without any variance"):
        lda_filter(torch.ones(4, 2, 3))
