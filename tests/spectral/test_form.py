"""The streamed difference and its statistics against float64, entry by entry."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mi_weightspace.core.seeds import generator
from mi_weightspace.spectral.form import form

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("f32", "f32"), ("bf16", "f32")])
@pytest.mark.parametrize("shape", [(300, 700), (7, 200_000), (257, 513), (1, 3), (0, 4)])
def test_difference_and_statistics(shape: tuple[int, int], dtypes: tuple[str, str]) -> None:
    kinds = {"bf16": torch.bfloat16, "f32": torch.float32}
    draw = generator(0, "form", *shape)
    before = (0.02 * torch.randn(shape, generator=draw)).to(kinds[dtypes[0]])
    after = (before.float() + 1e-4 * torch.randn(shape, generator=draw)).to(kinds[dtypes[1]])
    got = form(before, after)
    truth = after.double() - before.double()
    assert got.matrix.dtype == (torch.bfloat16 if dtypes == ("bf16", "bf16") else torch.float32)
    near = (before.abs() <= 2 * after.abs()) & (after.abs() <= 2 * before.abs())
    same_sign = before.float() * after.float() > 0
    if got.matrix.dtype == torch.bfloat16:  # Sterbenz
        exact = near & same_sign
        assert torch.equal(got.matrix.double()[exact], truth[exact])
    torch.testing.assert_close(got.matrix.double(), truth, rtol=4e-3, atol=1e-9)
    size = max(1, truth.numel())
    assert got.fro == pytest.approx(float(truth.norm()), rel=1e-5)
    assert got.before_fro == pytest.approx(float(before.double().norm()), rel=1e-5)
    assert got.mean_absolute == pytest.approx(float(truth.abs().sum()) / size, rel=1e-5)
    assert got.changed == float((truth != 0).sum()) / size
    scale = got.fro * got.before_fro
    assert abs(got.inner - float((truth * before.double()).sum())) <= 1e-5 * scale


def test_transposed_views_and_untouched_inputs() -> None:
    """Some layouts store the transpose; the inputs are memory-mapped and must not be written."""
    stored = torch.randn(40, 30, generator=generator(1, "form"))
    other = stored + 1
    copies = stored.clone(), other.clone()
    got = form(stored.T, other.T)
    torch.testing.assert_close(got.matrix, torch.ones(30, 40), rtol=1e-5, atol=1e-5)
    assert got.changed == 1.0
    assert torch.equal(stored, copies[0])
    assert torch.equal(other, copies[1])


def test_no_change() -> None:
    w = torch.randn(20, 30, generator=generator(2, "form")).bfloat16()
    got = form(w, w.clone())
    assert (got.fro, got.changed, got.mean_absolute, got.inner) == (0.0, 0.0, 0.0, 0.0)


def test_reused_buffers() -> None:
    draw = generator(3, "form")
    small, large = (torch.randn(k, 50, generator=draw).bfloat16() for k in (20, 60))
    for w in (small, large, small, large.float()):
        own, shared = form(w, 2 * w), form(w, 2 * w, reuse=True)
        assert torch.equal(own.matrix, shared.matrix)
        assert own[1:] == shared[1:]
    first = form(small, 2 * small, reuse=True).matrix
    form(large, 3 * large, reuse=True)
    again = form(small, 3 * small, reuse=True).matrix
    assert first.data_ptr() != again.data_ptr() or torch.equal(first, again)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(form, small, 2 * small, reuse=True).result().matrix
    assert other.data_ptr() != again.data_ptr()
