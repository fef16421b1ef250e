"""Every table of an evaluation against float64 loops and against decompositions known exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from exact_toy import (
    VOCAB,
    N,
    config,
    features,
    language,
    one_matrix,
    scored,
    sentences,
)
from scipy.special import log_softmax, rel_entr
from scipy.stats import t as student
from torch import nn

from mi_weightspace.core.errors import ConfigError, MismatchError
from mi_weightspace.vpd import truth
from mi_weightspace.vpd.evaluate import Evaluation, evaluate
from mi_weightspace.vpd.evaluate_baselines import coordinates, random_alive, svd_factors
from mi_weightspace.vpd.evaluate_compare import compare_capacities, compare_seeds, toy_scores
from mi_weightspace.vpd.evaluate_stats import pooled, ratio, records
from mi_weightspace.vpd.factors import Factors, initial_factors
from mi_weightspace.vpd.host import ModuleHost
from mi_weightspace.vpd.ladder import importances
from mi_weightspace.vpd.masked import Layout
from mi_weightspace.vpd.objective import Objective

pytestmark = pytest.mark.quick
TAUS = (0.0, 0.01, 0.1)
BATCHES = [sentences(5, 6, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def spoken() -> tuple[Objective, Evaluation]:
    objective = language()
    return objective, evaluate(objective, BATCHES, budgets=(20,), progress=False)


def naive_run(objective: Objective, ids, m, d) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and site outputs in numpy, Δ materialised. m (b, t, K), d (S,)."""
    module: Any = objective.factors.host.module  # pyright: ignore
    x, at, outputs = module.table[ids].numpy(), 0, []
    for i, (name, linear) in enumerate((("one", module.one), ("two", module.two))):
        w = linear.weight.numpy().T
        v, u = objective.factors.reads[name].numpy().T, objective.factors.writes[name].numpy()
        y = ((x @ v) * m[..., at : at + len(u)]) @ u + d[i] * (x @ (w - v @ u))
        y = y if linear.bias is None else y + linear.bias.numpy()
        outputs.append(y)
        x, at = np.tanh(y), at + len(u)
    return outputs[-1], outputs


def importance(objective: Objective, ids) -> np.ndarray:
    return importances(objective, objective.factors.host.clean(ids)).numpy()


def test_l0_by_loops(spoken: tuple[Objective, Evaluation]) -> None:
    objective, evaluation = spoken
    for name, place, dense in (("one", slice(0, 6), 6), ("two", slice(6, 10), 4)):
        for tau in TAUS:
            count = rows = 0
            for ids in BATCHES:
                for sentence in importance(objective, ids):
                    for g in sentence:
                        rows += 1
                        count += sum(1 for value in g[place] if value > tau)
            (row,) = records(evaluation.l0, level="site", name=name, threshold=tau)
            assert row["l0"] == pytest.approx(count / rows, rel=1e-12)
            assert (row["dense"], row["n"], row["n_batches"]) == (dense, rows, 4)
    (total,) = records(evaluation.l0, level="total", threshold=0.0)
    parts = [r["l0"] for r in records(evaluation.l0, level="site", threshold=0.0)]
    assert total["l0"] == pytest.approx(sum(parts)) and total["dense"] == 10
    assert not records(evaluation.l0, level="group")  # a toy's sites have no layers


def test_groups_are_sums_of_their_sites() -> None:
    groups = {"both": ["two", "one"], "second": ["two"]}
    evaluation = evaluate(language(), BATCHES[:2], budgets=(1,), groups=groups, progress=False)
    both, second = (records(evaluation.l0, level="group", name=n, threshold=0.0)[0] for n in groups)
    assert both["l0"] == evaluation.total_l0(0.0) and both["dense"] == 10
    assert second["l0"] == records(evaluation.l0, name="two", threshold=0.0)[0]["l0"]


@pytest.mark.parametrize(
    "name", ["ci", "unmasked", "rounded>0", "rounded>0.1", "zero", "full", "delta_only"]
)
def test_maskings_by_scipy(spoken: tuple[Objective, Evaluation], name: str) -> None:
    """KL by `rel_entr`, CE by a loop over the shifted labels of each row."""
    objective, evaluation = spoken
    kl, ce, host_ce, zero_ce = [], [], [], []
    for ids in BATCHES:
        g = importance(objective, ids)
        ones, off, on = np.ones_like(g), np.zeros(2), np.ones(2)
        m, d = {
            "ci": (g, off),
            "unmasked": (ones, off),
            "rounded>0": ((g > 0) * 1.0, off),
            "rounded>0.1": ((g > 0.1) * 1.0, off),
            "zero": (0 * ones, off),
            "full": (ones, on),
            "delta_only": (0 * ones, on),
        }[name]
        host = log_softmax(naive_run(objective, ids, ones, on)[0], axis=-1)
        masked = log_softmax(naive_run(objective, ids, m, d)[0], axis=-1)
        zeroed = log_softmax(naive_run(objective, ids, 0 * ones, off)[0], axis=-1)
        kl.append(rel_entr(np.exp(host), np.exp(masked)).sum(-1).mean())
        for found, log_p in ((ce, masked), (host_ce, host), (zero_ce, zeroed)):
            losses = [
                -log_p[row, at - 1, ids[row, at]]
                for row in range(ids.shape[0])
                for at in range(1, ids.shape[1])
            ]
            found.append(np.mean(losses))
    (row,) = records(evaluation.maskings, masking=name)
    assert row["distance"] == pytest.approx(np.mean(kl), rel=1e-9, abs=1e-12)
    assert row["ce_difference"] == pytest.approx(np.mean(ce) - np.mean(host_ce), abs=1e-9)
    lost = np.mean(zero_ce) - np.mean(host_ce)
    share = (np.mean(ce) - np.mean(host_ce)) / lost if lost > 0 else math.nan
    assert row["unrecovered"] == pytest.approx(share, rel=1e-8, abs=1e-8, nan_ok=True)
    assert row["n"] == 120 and row["monitor"] == (name.split(">")[0] in ("ci", "rounded"))
    assert evaluation.facts["ce_host"] == pytest.approx(np.mean(host_ce))
    half = student.ppf(0.975, 3) * np.std(kl, ddof=1) / 2
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=1e-6, abs=1e-12)


def test_full_is_the_host_bit_for_bit_whatever_the_parts(spoken: Any) -> None:
    assert spoken[1].facts["identity"] == 0 and spoken[1].masking("full") < 1e-15
    assert spoken[1].masking("unmasked") > 0.01  # random parts: Δ holds nearly everything


def test_sampled_maskings_lie_where_uniform_masks_put_them() -> None:
    """With y = Qx and parts e_j: E|error|² under m~U is Σ E(1−m)² x² = ⅓ of the zero error."""
    x = [features(20_000, seed=i) for i in range(2)]
    evaluation = evaluate(one_matrix(), x, budgets=(1,), progress=False)
    assert evaluation.masking("random", "of_zero") == pytest.approx(1 / 3, abs=0.01)
    assert evaluation.masking("stoch") < 1e-25  # pinned where it matters

    def half(clean):
        return torch.full((len(clean.batch), N), 0.5).double()

    # m = ½ + ½r: E(1−m)² = E(1−r)²/4 = 1/12
    evaluation = evaluate(one_matrix(half), x, budgets=(1,), progress=False)
    assert evaluation.masking("stoch", "of_zero") == pytest.approx(1 / 12, abs=0.005)
    assert evaluation.masking("ci", "of_zero") == pytest.approx(1 / 4)


def test_hidden_errors_by_loops(spoken: tuple[Objective, Evaluation]) -> None:
    objective, evaluation = spoken
    gaps: list[list[float]] = [[], []]
    norms = [0.0, 0.0]
    for ids in BATCHES:
        g = importance(objective, ids)
        clean = naive_run(objective, ids, np.ones_like(g), np.ones(2))[1]
        masked = naive_run(objective, ids, g, np.zeros(2))[1]
        for i in range(2):
            gaps[i] += ((clean[i] - masked[i]) ** 2).ravel().tolist()
            norms[i] += float((clean[i] ** 2).sum())
    for i, name in enumerate(("one", "two")):
        (row,) = records(evaluation.hidden, masking="ci", name=name)
        assert row["mse"] == pytest.approx(np.mean(gaps[i]), rel=1e-9)
        assert row["relative"] == pytest.approx(np.sum(gaps[i]) / norms[i], rel=1e-9)
    (row,) = records(evaluation.hidden, masking="ci", name="total")
    assert row["mse"] == pytest.approx(np.mean(gaps[0] + gaps[1]), rel=1e-9)
    (stoch,) = records(evaluation.hidden, masking="stoch", name="total")
    assert 0 < stoch["mse"] != row["mse"]


def test_spectrum_and_alive(spoken: tuple[Objective, Evaluation]) -> None:
    objective, evaluation = spoken
    g = np.concatenate([importance(objective, ids).reshape(-1, 10) for ids in BATCHES])
    for name, start in (("one", 0), ("two", 6)):
        rows = records(evaluation.spectrum, site=name)
        means = [r["mean_ci"] for r in rows]
        assert means == sorted(means, reverse=True) and [r["rank"] for r in rows] == list(
            range(len(rows))
        )
        for row in rows:
            own = g[:, start + row["component"]]
            assert row["mean_ci"] == pytest.approx(own.mean())
            assert row["frequency"] == pytest.approx((own > 0).mean())
            fired = (own > 0).sum()
            assert row["firm"] == pytest.approx((own >= 0.9).sum() / fired if fired else 0)
            assert row["alive_by_firing"] == (fired > 0) == row["alive_by_mean"]
    assert evaluation.alive.counts == (int((g.mean(0) > 1e-6).sum()), int((g > 0).any(0).sum()))


def test_an_exact_decomposition_scores_exactly() -> None:
    """Planted truth: L0 is the number of features on; maskings that keep them lose nothing."""
    batches = [features(seed=10 + i) for i in range(6)]
    evaluation = scored(one_matrix())
    on = torch.cat([(b != 0).sum(1) for b in batches]).double()
    assert evaluation.total_l0() == pytest.approx(float(on.mean()), rel=1e-12)
    for name in ("ci", "unmasked", "rounded>0.1", "stoch", "full"):
        assert evaluation.masking(name) < 1e-25
    energy = float(torch.cat(batches).square().mean())
    assert evaluation.masking("zero") == pytest.approx(energy)
    assert evaluation.masking("delta_only") == pytest.approx(energy)
    assert evaluation.sites["remainder"].iloc[0] < 1e-25 and evaluation.pgd() < 1e-25
    assert evaluation.alive.counts == (N, N)


def test_a_wrong_part_shows_where_it_is_wrong() -> None:
    """Planted absence: part 1 writes nothing. Unmasked loses its energy; full stays the host."""

    def broken(reads, writes):
        del reads
        writes[1] = 0

    evaluation = scored(one_matrix(change=broken))
    x = torch.cat([features(seed=10 + i) for i in range(6)])
    lost = float(x[:, 1].square().sum()) / x.numel()
    assert evaluation.masking("unmasked") == pytest.approx(lost)
    assert evaluation.masking("ci") == pytest.approx(lost)
    assert evaluation.masking("delta_only") == pytest.approx(evaluation.masking("zero") - lost)
    assert evaluation.facts["identity"] == 0
    assert evaluation.sites["remainder"].iloc[0] == pytest.approx(1 / N)


def test_capacity_below_the_rank_is_reported() -> None:
    evaluation = scored(one_matrix(count=4))
    (row,) = records(evaluation.sites)
    assert (row["rank_bound"], row["n_components"], row["can_be_exact"]) == (N, 4, False)
    assert row["remainder"] == pytest.approx(2 / N)


# ---- baselines -------------------------------------------------------------------------------
def test_baselines_by_loops(spoken: tuple[Objective, Evaluation]) -> None:
    objective, evaluation = spoken
    module: Any = objective.factors.host.module  # pyright: ignore
    l0 = {r["name"]: r["l0"] for r in records(evaluation.l0, level="site", threshold=0.0)}
    own, *rest = records(evaluation.baselines)
    assert own["baseline"] == "rounded>0"
    assert own["distance"] == pytest.approx(evaluation.masking("rounded>0"), rel=1e-9)
    assert [r["baseline"] for r in rest] == ["svd", "static", "random_alive", "coordinates"]
    errors: dict[str, list[float]] = {"svd": [], "coordinates": [], "static": []}
    mean = evaluation.mean_ci.numpy()
    for ids in BATCHES:
        g = importance(objective, ids)
        host = log_softmax(module(ids).numpy(), axis=-1)
        still = np.zeros(10)
        for name, place in (("one", slice(0, 6)), ("two", slice(6, 10))):
            top = np.argsort(-mean[place])[: math.ceil(l0[name])]
            still[place.start + top] = 1
        outputs = {"static": naive_run(objective, ids, np.broadcast_to(still, g.shape), (0, 0))[0]}
        for kind in ("svd", "coordinates"):
            x = module.table[ids].numpy()
            for name, place, linear in (
                ("one", slice(0, 6), module.one),
                ("two", slice(6, 10), module.two),
            ):
                w = linear.weight.numpy()
                if kind == "svd":
                    k = math.ceil(l0[name])
                    u, s, vt = np.linalg.svd(w, full_matrices=False)
                    y = x @ ((u[:, :k] * s[:k]) @ vt[:k]).T
                else:
                    kept = x.copy()
                    for at in np.ndindex(x.shape[:2]):
                        count = int((g[at][place] > 0).sum())
                        size = np.abs(x[at]) * np.linalg.norm(w, axis=0)
                        kept[at][np.argsort(-size)[count:]] = 0
                    y = kept @ w.T
                y = y if linear.bias is None else y + linear.bias.numpy()
                x = np.tanh(y)
            outputs[kind] = y
        for kind, logits in outputs.items():
            masked = log_softmax(logits, axis=-1)
            errors[kind].append(rel_entr(np.exp(host), np.exp(masked)).sum(-1).mean())
    for row in rest:
        if row["baseline"] in errors:
            assert row["distance"] == pytest.approx(np.mean(errors[row["baseline"]]), rel=1e-8)


def test_random_baseline_keeps_counts_and_draws_alive_parts() -> None:
    layout = Layout(("a", "b"), (5, 3))
    on = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)) < 0.3
    alive = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    on &= alive
    noise = torch.rand(200, 8, generator=torch.Generator().manual_seed(1))
    drawn = random_alive(on, alive, layout, noise)
    for place in layout.slices().values():
        assert torch.equal(drawn[:, place].sum(1), on[:, place].sum(1))
    assert not drawn[:, ~alive].any() and not torch.equal(drawn, on)
    assert (drawn.float().mean(0)[alive] > 0.1).all()


def test_svd_of_full_rank_and_all_coordinates_are_the_host() -> None:
    objective = language()
    svd = svd_factors(objective.factors, {"one": 99, "two": 99})
    assert float(max(svd.remainder(n).abs().max() for n in ("one", "two"))) < 1e-12
    clean = objective.factors.host.clean(BATCHES[0])
    every = torch.ones(5, 6, 10).bool()
    out = objective.factors.host.forward(clean, coordinates(objective.factors, every))
    assert not torch.allclose(out, clean.output)  # `two` has 5 inputs, 4 parts: one is left out
    wide = language(counts=(6, 6)).factors
    every = torch.ones(5, 6, 12).bool()
    assert torch.allclose(wide.host.forward(clean, coordinates(wide, every)), clean.output)


# ---- polysemy --------------------------------------------------------------------------------
class Lookup(nn.Module):
    """Tokens -> their embedding -> one matrix."""

    def __init__(self, table) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.only = nn.Linear(table.shape[1], VOCAB, bias=False, dtype=torch.float64)
        self.only.requires_grad_(False)

    def forward(self, ids):
        return self.only(self.table[ids])


def signs(table) -> list[dict[str, Any]]:
    """Polysemy rows of two parts that read coordinate 0 and 1 and always fire."""
    module = Lookup(table)
    host: Any = ModuleHost(module, {"only": "only"}, metric="kl")
    reads = torch.eye(table.shape[1], dtype=torch.float64)[:2]
    factors = Factors(host, {"only": reads}, {"only": torch.ones(2, VOCAB).double()})
    known: Any = nn.Module()
    known.forward = lambda clean, factors: torch.ones(*clean.batch.shape, 2).double()
    objective = Objective(factors, known, config(n_components=2))
    batches = [sentences(20, 8, seed=i) for i in range(4)]
    return records(evaluate(objective, batches, budgets=(1,), progress=False).polysemy)


def test_a_part_with_two_unrelated_roles_is_flagged() -> None:
    """Part 0: tokens 0–2 push it up, 3–5 down, 6 hardly at all. Part 1: always up."""
    table = torch.zeros(VOCAB, 3, dtype=torch.float64)
    table[:, 0] = torch.tensor([1.0, 1.1, 0.9, -1.0, -0.9, -1.1, 0.9])
    table[:, 1] = 1 + 0.1 * torch.arange(VOCAB)
    (row,) = signs(table)
    assert (row["component"], row["flagged"], row["overlap"]) == (0, True, 0)
    assert row["overlap_null"] > 0.8 and 0.3 < row["minor_share"] < 0.5 and row["separation"] > 10


def test_one_broad_law_around_zero_is_not_flagged() -> None:
    """Signs differ, and so do the contexts, but the halves of a bell are no two roles."""
    draw = torch.Generator().manual_seed(0)
    x = torch.zeros(2000, N, dtype=torch.float64)
    x[:, 0] = torch.randn(2000, generator=draw)
    x[:, 1] = 5 * (x[:, 0] > 0)  # what a positive position shows
    x[:, 2] = 5 * (x[:, 0] < 0)
    always = one_matrix(lambda clean: torch.ones(len(clean.batch), N).double())
    rows = records(evaluate(always, [x], budgets=(1,), progress=False).polysemy)
    (row,) = [r for r in rows if r["component"] == 0]
    assert row["separation"] == pytest.approx(2.65, abs=0.2)  # 2μ/(√2σ) of a half-normal
    assert not row["flagged"] and math.isnan(row["overlap"])


def test_the_same_contexts_with_both_signs_are_not_flagged() -> None:
    """Bimodal activations whose sign has nothing to do with the context shown."""
    x = torch.zeros(400, N, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    x[:, 0] = torch.where(torch.rand(400, generator=draw) < 0.5, 1.0, -1.0)
    x[:, 1:3] = 2.0 * torch.nn.functional.one_hot(torch.randint(0, 2, (400,), generator=draw), 2)
    always = one_matrix(lambda clean: torch.ones(len(clean.batch), N).double())
    rows = records(evaluate(always, [x], budgets=(1,), progress=False).polysemy)
    (row,) = [r for r in rows if r["component"] == 0]
    assert row["separation"] > 100 and row["overlap"] > 0.8 and not row["flagged"]


# ---- statistics ------------------------------------------------------------------------------
def test_intervals_are_students_and_ratios_cover() -> None:
    x = np.array([1.0, 2.0, 4.0, 3.5])
    low, high = student.interval(0.95, 3, x.mean(), x.std(ddof=1) / 2)
    assert pooled(x, np.full(4, 7.0)) == pytest.approx((x.mean(), low, high))
    assert pooled(x, np.array([1.0, 0, 0, 1])).value == 2.25
    assert all(math.isnan(v) for v in pooled(x[:1], np.ones(1))[1:])
    assert all(math.isnan(v) for v in ratio(x, 0 * x, np.ones(4)))
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        below = draw.gamma(20, 1 / 20, 12)
        above = 0.3 * below + 0.02 * draw.standard_normal(12)
        found = ratio(above, below, np.ones(12))
        hits += found.low <= 0.3 <= found.high
    assert 0.90 <= hits / 400 <= 0.985


# ---- comparisons -----------------------------------------------------------------------------
def shuffled(factors: Factors, order: list[int]) -> Factors:
    """The same parts, reordered, with both signs of each flipped and rescaled."""
    reads = {n: -2 * v[order] for n, v in factors.reads.items()}
    writes = {n: -0.5 * v[order] for n, v in factors.writes.items()}
    return Factors(factors.host, reads, writes)


def test_the_same_parts_in_another_order_agree_fully() -> None:
    factors = one_matrix().factors
    (row,) = records(compare_seeds(factors, shuffled(factors, [3, 1, 0, 5, 4, 2])))
    assert [row[k] for k in ("write", "read", "rank_one")] == pytest.approx([1, 1, 1])
    assert row["init_rank_one"] < 0.6


def test_unrelated_parts_agree_as_their_start_does() -> None:
    objective = one_matrix()
    host = objective.factors.host
    one, other = (initial_factors(host, config(seed=s)) for s in (1, 2))
    (row,) = records(compare_seeds(one, other, at_init=(one, other)))
    assert row["rank_one"] == row["init_rank_one"] < 0.9
    dead = torch.zeros(N).bool()
    (row,) = records(compare_seeds(one, other, alive=(dead, ~dead)))
    assert row["n_first"] == 0 and math.isnan(row["write"])


def test_comparing_runs_of_different_targets_is_refused() -> None:
    with pytest.raises(MismatchError, match="same frozen"):
        compare_seeds(one_matrix().factors, language().factors)


def test_splitting_is_seen_when_capacity_splits_and_not_otherwise() -> None:
    small = one_matrix()
    factors = small.factors
    evaluation = scored(small)
    twice = {n: v.repeat(2, 1) for n, v in factors.writes.items()}
    halves = {n: v.repeat(2, 1) / 2 for n, v in factors.reads.items()}
    double: Any = lambda c: (c.batch != 0).double().repeat(1, 2)  # noqa: E731
    split = Objective(Factors(factors.host, halves, twice), small.importance, small.config)
    split.importance.answer = double  # pyright: ignore
    frame = compare_capacities([(split.factors, scored(split)), (factors, evaluation)])
    base, larger = records(frame)
    assert (base["n_components"], larger["n_components"]) == (N, 2 * N)
    assert math.isnan(base["split"]) and larger["split"] == 1 and larger["alive_by_firing"] == 12
    assert larger["l0"] == pytest.approx(2 * base["l0"])
    padded = {n: torch.cat([v, torch.zeros_like(v)]) for n, v in factors.writes.items()}
    flat = Objective(Factors(factors.host, halves, padded), small.importance, small.config)
    only: Any = lambda c: torch.cat([(c.batch != 0).double(), 0 * c.batch], 1)  # noqa: E731
    flat.importance.answer = only  # pyright: ignore
    _, larger = records(compare_capacities([(factors, evaluation), (flat.factors, scored(flat))]))
    assert (larger["split"], larger["single"], larger["alive_by_firing"]) == (0, 1, N)


def test_toy_scores_of_the_truth_and_of_an_error() -> None:
    probe = truth.one_hot_probe(N).double()
    patterns = {"first": truth.Identity()}
    rows = records(toy_scores(one_matrix(), probe, patterns))
    assert [(r["errors"], r["tolerance"]) for r in rows] == [(0, 0.1), (0, 0.2)]
    assert rows[0]["mmcs"] == pytest.approx(1) and rows[0]["ml2r"] == pytest.approx(1)
    assert rows[0]["alive"] == N

    def wrong(clean):
        z = (clean.batch != 0).double()
        z[:, 0] = 0
        z[:, 3] += 0.15
        return z

    rows = records(toy_scores(one_matrix(wrong), probe, patterns))
    assert (rows[0]["missing"], rows[0]["spurious"]) == (1, N - 1)
    assert (rows[1]["missing"], rows[1]["spurious"]) == (1, 0)


# ---- the object ------------------------------------------------------------------------------
def test_the_overview_has_a_row_a_site_and_the_totals(spoken: Any) -> None:
    frame = spoken[1].to_pandas()
    assert list(frame["site"]) == ["one", "two", "total"] and list(frame["dense"]) == [6, 4, 10]
    total = records(frame)[-1]
    assert total["l0>0.1"] == spoken[1].total_l0(0.1)
    assert total["kl_pgd_20"] == spoken[1].pgd(20) == spoken[1].pgd()
    assert total["kl_unmasked"] == spoken[1].masking("unmasked")
    assert total["alive_by_firing"] == frame["alive_by_firing"][:2].sum()
    assert (frame["n"] == 120).all() and len(repr(spoken[1])) < 120


def test_same_seed_same_numbers_and_what_is_stored_is_everything(spoken: Any) -> None:
    objective, first = spoken
    state = torch.get_rng_state()
    again = evaluate(objective, BATCHES, budgets=(20,), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate(objective, BATCHES, budgets=(20,), seed=1, progress=False)
    for name, frame in first.tables().items():
        pd.testing.assert_frame_equal(frame, again.tables()[name])
    assert first.masking("stoch") != other.masking("stoch")
    assert first.masking("ci") == other.masking("ci")
    back = Evaluation.restored(first.tables(), first.arrays(), first.facts)
    pd.testing.assert_frame_equal(back.to_pandas(), first.to_pandas())
    assert back.alive.counts == first.alive.counts


def test_evaluation_needs_no_gradients_and_leaves_the_run_as_it_was() -> None:
    objective = language()
    for parameter in objective.factors.parameters():
        parameter.requires_grad_()
    before = [p.detach().clone() for p in objective.factors.parameters()]
    evaluate(objective, BATCHES[:1], budgets=(2,), progress=False)
    after = objective.factors.parameters()
    assert all(p.grad is None for p in after) and not objective.adversaries.kept
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"batches": []},
        {"thresholds": ()},
        {"thresholds": (1.0,)},
        {"n_pgd_batches": 0},
        {"groups": {"a": ["three"]}},
    ],
)
def test_meaningless_evaluations_are_refused(bad: dict) -> None:
    batches = bad.pop("batches", BATCHES)
    with pytest.raises(ConfigError, match="evaluation"):
        evaluate(language(), batches, progress=False, **bad)
