"""The oracle itself: hand-written and finite-difference gradients, torch's own optimisers."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from naive_step import (
    Draw,
    NaiveHost,
    Params,
    Stage,
    Term,
    hf_host,
    masks,
    naive_step,
    sign_ascent,
)
from torch import Tensor

from mi_weightspace.models import toy

pytestmark = pytest.mark.quick
FAMILIES = ("gpt2", "llama", "gpt_neox")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=draws(seed), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def test_lower_backward_case_by_case() -> None:
    z = torch.tensor([-1.0, -1.0, 0.0, 0.0, 0.4, 0.4, 1.0, 1.5, 1.5], dtype=torch.float64)
    grad = torch.tensor([-2.0, 2.0, -2.0, 2.0, -2.0, 2.0, 3.0, -2.0, 2.0], dtype=torch.float64)
    z.requires_grad_()
    out = naive.lower(z)
    assert out.tolist() == [0, 0, 0, 0, 0.4, 0.4, 1, 1, 1]
    (got,) = torch.autograd.grad(out, z, grad)
    assert got.tolist() == [-0.02, 0, -0.02, 0, -2, 2, 3, 0, 0]


def test_upper_slopes() -> None:
    z = torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64, requires_grad=True)
    out = naive.upper(z)
    assert torch.allclose(out, torch.tensor([0, 0.3, 1.005], dtype=torch.float64))
    (got,) = torch.autograd.grad(out.sum(), z)
    assert got.tolist() == [0, 1, 0.01]
    assert torch.autograd.gradcheck(naive.upper, (z,))


def test_masked_linear_by_hand() -> None:
    x, w, b = randn(3, 5, seed=1), randn(5, 4, seed=2), randn(4, seed=3)
    v, u = randn(5, 6, seed=4), randn(6, 4, seed=5)
    m, d = rand(3, 6, seed=6), rand(3, seed=7)
    route = torch.tensor([True, False, True])
    v, u, m, d = (t.requires_grad_() for t in (v, u, m, d))
    y = naive.masked_output(x, w, b, v, u, m, d, route)
    top = randn(3, 4, seed=8)
    got = torch.autograd.grad(y, (v, u, m, d), top)
    hand = [torch.zeros_like(t) for t in (v, u, m, d)]
    for i in (0, 2):
        inner = x[i] @ v
        # y = Σ_c (m_c − d)(x·v_c) u_c + d xW + b
        hand[0] += torch.outer(x[i], (m[i] - d[i]) * (u @ top[i]))
        hand[1] += torch.outer((m[i] - d[i]) * inner, top[i])
        hand[2][i] = inner * (u @ top[i])
        hand[3][i] = (x[i] @ w) @ top[i] - (inner @ u) @ top[i]
    for a, e in zip(got, hand, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[1], x[1] @ w + b, rtol=0, atol=0)


def test_kl_is_clean_against_masked() -> None:
    p, q = randn(2, 3, 7, seed=1), randn(2, 3, 7, seed=2)
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1).view(6, 7), p.softmax(-1).view(6, 7), reduction="batchmean"
    )
    torch.testing.assert_close(naive.kl(p, q), expected)
    assert abs(float(naive.kl(p, q) - naive.kl(q, p))) > 1e-3


def test_minimality_against_plain_numbers() -> None:
    z = {"a": torch.tensor([[0.5, 2.0], [-1.0, 0.0]], dtype=torch.float64)}
    psi = [(0.25 / (0.25 + 0.04)), 1.01**2 / (1.01**2 + 0.04)]
    how = naive.Minimality(weight=2.0, frequency_weight=3.0, reference_count=10, gamma=0.2)
    got, _ = naive.minimality(z, how)
    f = [p / 2 for p in psi]
    want = sum(2 * x + 3 * x * math.log2(1 + 10 * x) for x in f)
    assert math.isclose(float(got), want, rel_tol=1e-12)
    one = {"a": torch.ones(4, 1, dtype=torch.float64)}
    how = naive.Minimality(weight=1.0, frequency_weight=0, gamma=0.7, normalize_at_one=True)
    assert math.isclose(float(naive.minimality(one, how)[0]), 1)
    how = naive.Minimality("lp", weight=2.0, p=0.5, beta=0.7)
    tiny = 1e-6  # (0 + 1e-12)^0.5
    f = [(0.5**0.5 + tiny) / 2, (1.01**0.5 + tiny) / 2]
    want = sum(2 * x * (1 + 0.7 * math.log2(1 + 2 * x)) for x in f)
    assert math.isclose(float(naive.minimality(z, how)[0]), want, rel_tol=1e-9)


def test_average_keeps_value_and_gradient_apart() -> None:
    z = {"a": rand(6, 3, seed=2).requires_grad_()}
    how = naive.Minimality(weight=0.0, frequency_weight=1.0, half_life=5.0, gamma=0.3)
    keep = 2 ** (-1 / 5)
    first, state = naive.minimality(z, how)
    plain, _ = naive.minimality(z, naive.Minimality(weight=0.0, frequency_weight=1.0, gamma=0.3))
    torch.testing.assert_close(first, plain)  # debiased, one batch is its own average
    torch.testing.assert_close(
        torch.autograd.grad(first, z["a"])[0], torch.autograd.grad(plain, z["a"])[0]
    )
    other = {"a": rand(6, 3, seed=3).requires_grad_()}
    second, _ = naive.minimality(other, how, state, step=1)
    g2 = other["a"].detach() ** 2
    f = (g2 / (g2 + 0.09)).mean(0)
    unbiased = (keep * state["a"] + (1 - keep) * f) / (1 - keep**2)
    probe = unbiased.clone().requires_grad_()
    phi = (probe * torch.log2(1 + how.reference_count * probe)).sum()
    torch.testing.assert_close(second, phi.detach())
    (slope,) = torch.autograd.grad(phi, probe)
    a = other["a"].detach()
    d_psi = 2 * a * 0.09 / (a**2 + 0.09) ** 2
    torch.testing.assert_close(torch.autograd.grad(second, other["a"])[0], slope * d_psi / 6)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_source_ascent_is_torch_adam_maximised(sigmoid: bool) -> None:
    start = rand(2, 3, 4, seed=1)
    ours = naive.Sources({"a": start.clone()}, lr=0.3, betas=(0.5, 0.99), sigmoid=sigmoid)
    leaf = start.clone().requires_grad_()
    theirs = torch.optim.Adam([leaf], lr=0.3, betas=(0.5, 0.99), maximize=True)
    for step in range(4):
        grad = randn(2, 3, 4, seed=10 + step)
        leaf.grad = grad.clone()
        theirs.step()
        with torch.no_grad():
            if not sigmoid:
                leaf.clamp_(0, 1)
        ours = ours.ascend({"a": grad})
    torch.testing.assert_close(ours.value["a"], leaf.detach(), rtol=1e-10, atol=1e-12)


def test_pool_moves_only_what_was_chosen() -> None:
    pool = naive.Pool({"a": rand(2, 3, 4)}, lr=0.1, count=torch.zeros(2, 3, dtype=torch.long))
    new = pool.ascend([1, 2], {"a": randn(2, 4, seed=4)})
    moved = (new.value["a"] != pool.value["a"]).any(-1)
    assert moved.tolist() == [[False, True, False], [False, False, True]]
    assert new.count.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_optimiser_schedule_and_clip() -> None:
    values = [randn(3, 2, seed=1), randn(4, seed=2)]
    leaves = [v.clone().requires_grad_() for v in values]
    theirs = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.0)
    state: dict[str, object] = {}
    for step in range(3):
        grads = [randn(3, 2, seed=20 + step), randn(4, seed=30 + step)]
        for leaf, g in zip(leaves, grads, strict=True):
            leaf.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        theirs.step()
        values, state = naive.adamw(values, naive.clipped(grads, 0.5), state, 1e-2)
    for a, e in zip(values, leaves, strict=True):
        torch.testing.assert_close(a, e.detach(), rtol=1e-7, atol=1e-9)
    assert naive.cosine_lr(2.0, 0, 11) == 2.0
    assert math.isclose(naive.cosine_lr(2.0, 10, 11), 0.2)
    assert math.isclose(naive.cosine_lr(2.0, 5, 11), 1.1)


def test_routes() -> None:
    k = torch.randint(1, 5, (3, 2), generator=draws())
    route = naive.subset_route(k, rand(3, 2, 4))
    assert torch.equal(route.sum(-1), k)
    assert [r[0].tolist() for r in naive.layerwise_routes((1,), 2)] == [
        [True, False],
        [False, True],
    ]


def setting(family: str, seed: int = 0) -> tuple[NaiveHost, Params, dict[str, Tensor], Tensor]:
    host = hf_host(toy.tiny_model(family, n_layers=1))
    tokens = torch.randint(4, 300, (2, 4), generator=draws(seed))
    params, z = {}, {}
    for i, (name, w) in enumerate(host.weights.items()):
        params[name] = (randn(w.shape[0], 3, seed=i) / 6, randn(3, w.shape[1], seed=50 + i) / 2)
        z[name] = randn(2, 4, 3, seed=90 + i)
    return host, params, z, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_on_is_the_model_and_pieces_cover_it(family: str) -> None:
    host, params, z, tokens = setting(family)
    clean, _, _ = host.clean(tokens)
    one = {n: torch.ones_like(t) for n, t in z.items()}
    on = {n: torch.ones(2, 4, dtype=torch.float64) for n in z}
    out, _ = host.masked(tokens, params, one, on, None)
    torch.testing.assert_close(out, clean, rtol=0, atol=2e-6)
    off, _ = host.masked(tokens, params, one, {n: 0 * t for n, t in on.items()}, None)
    assert float((off - clean).abs().max()) > 1e-2
    for name in z:  # each site by itself matters, so no columns are shared or dropped
        d = {n: t * (n != name) for n, t in on.items()}
        alone, _ = host.masked(
            tokens, params, {n: t * (n != name) for n, t in one.items()}, d, None
        )
        assert float((alone - clean).abs().max()) > 1e-5, name


def test_gradient_of_a_whole_step_by_finite_differences() -> None:
    host, params, z, tokens = setting("gpt2")
    draw = Draw(
        {n: rand(2, 4, 3, seed=i) for i, n in enumerate(z)},
        {n: rand(2, 4, seed=40 + i) for i, n in enumerate(z)},
    )
    term = Term("stochastic", 0.5, [draw], hidden_weight=0.1)
    how = naive.Minimality(weight=0.0, frequency_weight=0.0)
    got = naive_step(
        host,
        params,
        lambda _x: {n: t.requires_grad_() for n, t in z.items()},
        [],
        tokens,
        [term],
        how,
    )
    name, h = "blocks.0.attn.k", 1e-6

    def value(shift: float) -> float:
        moved = {n: (v.detach().clone(), u.detach().clone()) for n, (v, u) in params.items()}
        moved[name][0][2, 1] += shift
        fixed = {n: t.detach().requires_grad_() for n, t in z.items()}
        return float(naive_step(host, moved, lambda _x: fixed, [], tokens, [term], how).total)

    slope = (value(h) - value(-h)) / (2 * h)
    assert math.isclose(slope, float(got.param_grads[name][0][2, 1]), rel_tol=1e-5)


def test_persistent_term_is_ascent_then_loss_then_ascent() -> None:
    host, params, z, tokens = setting("gpt2")
    start = {n: rand(2, 4, 4, seed=i) for i, n in enumerate(z)}
    how = naive.Minimality()

    def run(n_warm: int, sources: naive.Sources) -> tuple[float, naive.Sources]:
        fixed = {n: t.detach().requires_grad_() for n, t in z.items()}
        term = Term("persistent", 0.5, sources=sources, n_warm=n_warm)
        found = naive_step(host, params, lambda _x: fixed, [], tokens, [term], how)
        return float(found.losses["recon.0"]), found.sources[0]

    at_once, after = run(2, naive.Sources(start, lr=0.05))
    loss, sources = [], naive.Sources(start, lr=0.05)
    for _ in range(3):
        value, sources = run(0, sources)
        loss.append(value)
    assert loss[0] < loss[1] < loss[2] and math.isclose(loss[2], at_once, rel_tol=1e-12)
    assert after.count == 3
    for n in start:
        torch.testing.assert_close(after.value[n], sources.value[n])


def test_sign_ascent_goes_up_in_every_coordinate() -> None:
    host, params, z, tokens = setting("llama")
    draw = Draw(
        {n: rand(2, 4, 3, seed=i) for i, n in enumerate(z)},
        {n: rand(2, 4, seed=40 + i) for i, n in enumerate(z)},
    )
    g = {n: naive.lower(t) for n, t in z.items()}
    clean, _, hidden = host.clean(tokens)
    stage = Stage(host, tokens, clean, hidden)
    term = Term("fresh", 1.0, [draw], pgd_steps=1, pgd_step_size=1e-3)
    moved = sign_ascent(stage, term, params, g)
    before, _ = stage.error(params, g, draw)
    for new in (Draw(moved.r, draw.d), Draw(draw.r, moved.d)):
        assert stage.error(params, g, new)[0] > before
    step = torch.cat([(moved.r[n] - draw.r[n]).reshape(-1) for n in z]).abs()
    inner = torch.cat([((draw.r[n] - 0.5).abs() < 0.498).reshape(-1) for n in z])
    pinned = torch.cat([(g[n] == 1).reshape(-1) for n in z])
    assert float((step[inner & ~pinned] - 1e-3).abs().max()) < 1e-9
    assert pinned.any() and not step[pinned].any()
    term.pgd_steps = 3
    assert stage.error(params, g, sign_ascent(stage, term, params, g))[0] > before
    assert masks({"a": torch.ones(1)}, {"a": torch.zeros(1)})["a"].item() == 1


def test_rider_is_a_relative_error_at_every_site() -> None:
    host, params, z, tokens = setting("gpt2")
    draw = Draw(
        {n: rand(2, 4, 3, seed=i) for i, n in enumerate(z)},
        {n: rand(2, 4, seed=40 + i) for i, n in enumerate(z)},
    )
    g = {n: naive.lower(t) for n, t in z.items()}
    clean, _, hidden = host.clean(tokens)
    main, whole = Stage(host, tokens, clean, hidden).error(params, g, draw, 0.3)
    _, outputs = host.masked(tokens, params, masks(g, draw.r), draw.d, None)
    errors = [((outputs[n] - hidden[n]).norm() / hidden[n].norm()) ** 2 for n in z]
    torch.testing.assert_close(whole - main, 0.3 * sum(errors) / len(errors))
