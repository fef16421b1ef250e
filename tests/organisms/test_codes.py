"""Planted codes: each kind has what it says, measured with scikit-learn and nothing of ours."""

from __future__ import annotations

import time
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.verdict import Word
from mi_weightspace.organisms.codes import KINDS, Kind, PlantedCode, planted_code

Array = np.ndarray


def held_out(x: Array, code: PlantedCode, fit: Any) -> float:
    """AUROC of scores from five folds over clusters; `fit(x, y)` gives a scoring function."""
    y, groups = code.labelled.labels.numpy(), code.labelled.cluster_index.numpy()
    scores = np.zeros(len(y))
    # cluster i holds one class: fold i // 2 mod 5 is balanced
    for fold in range(5):
        test = (groups // 2) % 5 == fold
        found = fit(x[~test], y[~test])(x[test])
        scores[test] = (found - found.mean()) / found.std()
    return float(roc_auc_score(y, scores))


def linear(alpha: float = 10.0) -> Any:
    def fit(x: Array, y: Array) -> Any:
        return make_pipeline(StandardScaler(), Ridge(alpha)).fit(x, 2.0 * y - 1).predict

    return fit


def best_latents(x: Array, y: Array) -> Any:
    spread = x.std(0)
    effect = np.abs(x[y == 1].mean(0) - x[y == 0].mean(0)) / np.where(spread > 1e-6, spread, np.inf)
    chosen = np.argsort(-effect)[:24]
    inner = linear()(x[:, chosen], y)
    return lambda rows: inner(rows[:, chosen])


def kernel(x: Array, y: Array) -> Any:
    scale = StandardScaler().fit(x)
    z = scale.transform(x)
    gamma = 1 / (2 * z.shape[1])  # the median squared distance of standardised rows
    model = KernelRidge(kernel="rbf", gamma=gamma, alpha=0.1).fit(z, 2.0 * y - 1)
    return lambda rows: model.predict(scale.transform(rows))


def encoded(code: PlantedCode, stage: str, which: str = "sae") -> Array:
    x = code.stages[stage]
    made = {
        "sae": lambda: code.sae,
        "random": lambda: code.sae.randomised(7, x=x),
        "rotated": lambda: code.sae.rotated(7, x),
    }[which]()
    return made.encode(x).numpy()


def mean_over_seeds(kind: Kind, stage: str, detector: str, seeds: range = range(2)) -> float:
    found = []
    for seed in seeds:
        code = planted_code(kind, seed)
        x = code.stages[stage].numpy()
        if detector == "linear":
            found.append(max(held_out(x, code, linear(a)) for a in (1.0, 100.0)))
        elif detector == "kernel":
            found.append(held_out(x, code, kernel))
        else:
            found.append(held_out(encoded(code, stage, detector), code, best_latents))
    return float(np.mean(found))


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_form(kind: Kind) -> None:
    start = time.process_time()
    code = planted_code(kind, 3)
    assert time.process_time() - start < 3.0, "about 0.05 s; a loaded machine is given its time"
    n, d = code.stages["clean"].shape
    assert (n, d) == (400, code.sae.d_in) and code.sae.d_sae == 4 * d
    assert list(code.stages) == ["clean", "benign", "open", "hidden"]
    for x in code.stages.values():
        assert x.shape == (n, d) and x.dtype == torch.float32 and x.isfinite().all()
    assert code.labelled.labels.sum() == n // 2 and code.labelled.n_clusters == n // 2
    assert code.sae.space is not None and code.sae.space.name == "resid_post.0"
    assert code.expected and all(isinstance(word, Word) for word in code.expected)
    share = float((code.sae.encode(code.stages["hidden"]) > 0).double().mean())
    assert 0.005 < share < 0.1, "a sparse code"
    small = planted_code(kind, 3, n_per_class=8)
    assert len(small.labelled) == 16 and small.stages["open"].shape == (16, d)


@pytest.mark.quick
def test_the_seed_decides_every_number() -> None:
    first, again, other = (planted_code("sparse", seed) for seed in (0, 0, 1))
    for stage, x in first.stages.items():
        assert torch.equal(x, again.stages[stage])
        assert not torch.equal(x, other.stages[stage])
    assert torch.equal(first.sae.W_enc, again.sae.W_enc)
    assert not torch.equal(first.sae.W_enc, other.sae.W_enc)
    stages = list(first.stages.values())
    assert not torch.equal(stages[0], stages[1]), "each stage draws its own rows"


@pytest.mark.quick
@pytest.mark.parametrize(
    "given", [{"kind": "sparce"}, {"kind": "none", "n_per_class": 7}, {"n_per_class": 6}]
)
def test_refusals(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"kind|n_per_class"):
        planted_code(**({"kind": "sparse"} | given))


@pytest.mark.quick
def test_verdicts_cover_the_outcomes_a_code_can_plant() -> None:
    assert set(get_args(Kind)) == set(KINDS)
    named = {word for kind in KINDS for word in planted_code(kind, n_per_class=8).expected}
    assert {Word.SAE_ADVANTAGE, Word.NON_LINEAR_CODE, Word.INSTRUMENT_TOO_WEAK} <= named


@pytest.mark.parametrize("kind", KINDS)
def test_open_is_read_and_clean_is_not(kind: Kind) -> None:
    opened = mean_over_seeds(kind, "open", "sae")
    if kind == "weak":
        assert 0.5 < opened < 0.68, "barely"
    else:
        assert opened > 0.93
    for stage in ("clean", "benign"):
        for detector in ("sae", "linear"):
            assert abs(mean_over_seeds(kind, stage, detector) - 0.5) < 0.08


@pytest.mark.parametrize(
    ("kind", "above", "below"),
    [
        (
            "sparse",
            {"sae": 0.78},
            {"linear": 0.58, "kernel": 0.62, "random": 0.58, "rotated": 0.58},
        ),
        (
            "nonlinear",
            {"sae": 0.78, "kernel": 0.88},
            {"linear": 0.58, "random": 0.74, "rotated": 0.74},
        ),
        ("linear", {"sae": 0.75, "linear": 0.84}, {"random": 0.58, "rotated": 0.58}),
        ("norm", {"sae": 0.9, "linear": 0.95}, {}),
        ("none", {}, {"sae": 0.58, "linear": 0.58, "kernel": 0.58}),
        ("weak", {}, {"sae": 0.6, "linear": 0.58, "kernel": 0.58}),
    ],
)
def test_who_reads_the_hidden_stage(
    kind: Kind, above: dict[str, float], below: dict[str, float]
) -> None:
    found = {name: mean_over_seeds(kind, "hidden", name) for name in above | below}
    for name, edge in above.items():
        assert found[name] > edge, found
    for name, edge in below.items():
        assert found[name] < edge, found
    if kind == "nonlinear":
        assert found["kernel"] > found["sae"] + 0.03
        assert found["sae"] > max(found["random"], found["rotated"]) + 0.08
    if kind == "linear":
        assert found["linear"] > found["sae"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_the_hidden_stage_against_permuted_clusters(kind: Kind) -> None:
    """‖Δμ‖ by an own permutation of cluster labels; unremarkable for all but `norm`."""
    for seed in range(3):
        code = planted_code(kind, seed)
        x, y = code.stages["hidden"].double().numpy(), code.labelled.labels.numpy()
        rng = np.random.default_rng(seed)
        rows = y.reshape(-1, 2)[:, 0]
        norms = []
        for labels in [rows, *(rng.permutation(rows) for _ in range(199))]:
            full = np.repeat(labels, 2)
            norms.append(np.linalg.norm(x[full == 1].mean(0) - x[full == 0].mean(0)))
        p = np.mean(np.array(norms) >= norms[0])
        assert p < 0.02 if kind == "norm" else 0.1 < p < 0.9, (seed, p)


@pytest.mark.parametrize("kind", ["sparse", "nonlinear"])
def test_equal_means_in_the_population(kind: Kind) -> None:
    """Twenty times the rows shrink what differs between the classes to the sampling error."""
    small, large = (planted_code(kind, 0, n_per_class=n) for n in (200, 4000))  # same dictionary
    gaps = []
    for code in (small, large):
        x, y = code.stages["hidden"], code.labelled.labels.bool()
        gaps.append(float((x[y].mean(0) - x[~y].mean(0)).norm()))
    assert gaps[1] / gaps[0] == pytest.approx(20**-0.5, rel=0.35)
    if kind == "sparse":
        x, y = large.stages["hidden"], large.labelled.labels.bool()
        spread = [float(x[rows].var(0).sum()) for rows in (y, ~y)]
        assert spread[0] == pytest.approx(spread[1], rel=0.02), "and equal energies"
