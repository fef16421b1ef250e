"""The faster float32 products are float32 products, and the setting returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mi_weightspace.models import arithmetic

SETTING: Any = getattr(torch.backends.mkldnn, "matmul", None)
pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not hasattr(SETTING, "fp32_precision"), reason="torch before 2.9"),
]


@pytest.fixture(autouse=True)
def asked_again() -> Any:
    arithmetic.forget()
    yield
    arithmetic.forget()


def naive_error(inner: int) -> float:
    draw = np.random.default_rng(inner)
    a, b = draw.standard_normal((33, inner)), draw.standard_normal((inner, 47))
    a, b = a.astype(np.float32), b.astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    found = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def test_products_within_are_float32_and_the_setting_returns() -> None:
    before = SETTING.fp32_precision
    state = torch.get_rng_state()
    with arithmetic.fast_float32() as changed:
        assert SETTING.fp32_precision == ("bf16" if changed else before)
        assert all(naive_error(inner) < 1e-6 for inner in (16, 128, 768, 4608))
        x = torch.randn(256, 128, requires_grad=True, generator=torch.Generator())
        w = torch.randn(96, 128, generator=torch.Generator().manual_seed(1))
        y = torch.nn.functional.linear(x, w)
        assert torch.equal(y, torch.nn.functional.linear(x, w)), "the same bits each time"
        (slope,) = torch.autograd.grad(y.square().sum(), x)
        exact = 2 * (x.double() @ w.double().T) @ w.double()
        assert float((slope - exact.detach()).norm() / exact.detach().norm()) < 1e-6
    assert SETTING.fp32_precision == before
    with pytest.raises(KeyError), arithmetic.fast_float32():
        raise KeyError("mine")
    assert SETTING.fp32_precision == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == "highest", "asking works again"


def test_the_error_measured_tells_rounded_products_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: products whose factors were rounded to bfloat16 are found out, on every shape."""
    kept = {shape: arithmetic.product_error(*shape) for shape in arithmetic.SHAPES}
    assert max(kept.values()) < arithmetic.TOLERANCE / 2
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional,
        "linear",
        lambda x, w: linear(x.bfloat16().float(), w.bfloat16().float()),
    )
    for shape in arithmetic.SHAPES:
        assert arithmetic.product_error(*shape) > 100 * arithmetic.TOLERANCE


@pytest.mark.parametrize("reason", ["inexact", "no gain", "no setting"])
def test_nothing_is_changed_without_a_reason(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted absence: a processor that rounds, one that gains nothing, a build without oneDNN."""
    monkeypatch.setattr(arithmetic, "product_error", lambda *_: 1e-7)
    monkeypatch.setattr(arithmetic, "_gain", lambda *_: 2.0)
    with arithmetic.fast_float32() as changed:
        assert changed and SETTING.fp32_precision == "bf16"
    arithmetic.forget()
    if reason == "inexact":
        monkeypatch.setattr(arithmetic, "product_error", lambda *_: 1e-4)
    elif reason == "no gain":
        monkeypatch.setattr(arithmetic, "_gain", lambda *_: 1.1)
    else:
        monkeypatch.setattr(arithmetic, "_switch", lambda: None)
    before = SETTING.fp32_precision
    with arithmetic.fast_float32() as changed:
        assert not changed and SETTING.fp32_precision == before
    assert SETTING.fp32_precision == before


def test_an_earlier_choice_is_kept_where_it_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine times otherwise; a processor that rounds is another matter."""
    monkeypatch.setattr(arithmetic, "product_error", lambda *_: 1e-7)
    monkeypatch.setattr(arithmetic, "_gain", lambda *_: 1.0)
    assert not arithmetic.worthwhile()
    assert arithmetic.decide(True) and arithmetic.worthwhile()
    assert arithmetic.decide(False) and not arithmetic.worthwhile()
    arithmetic.forget()
    monkeypatch.setattr(arithmetic, "product_error", lambda *_: 1e-4)
    assert not arithmetic.decide(True) and not arithmetic.worthwhile()
