"""A matrix formed in blocks is the matrix in memory; a memory limit changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mi_weightspace as mw
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.models.rounding import flip_signs
from mi_weightspace.spectral import blocks
from mi_weightspace.spectral.blocks import Blocks, block_rows, private_bytes, workers_within
from mi_weightspace.spectral.dense import Dense, Gains, folded
from mi_weightspace.spectral.form import form, subtract
from mi_weightspace.spectral.krylov import leading_triplets
from mi_weightspace.spectral.svd import known_device

pytestmark = pytest.mark.quick
M, N = 90, 8000  # signs are drawn for 32 rows of 8000 at a time


def pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    draw = generator(0, "blocks")
    before = 0.02 * torch.randn(M, N, generator=draw)
    u, v = torch.randn(M, generator=draw), torch.randn(N, generator=draw)
    after = before + 1e-4 * torch.randn(M, N, generator=draw) + 2e-4 * torch.outer(u, v)
    return before.to(dtype), after.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_the_matrix_bit_for_bit(dtype: torch.dtype) -> None:
    before, after = pair(dtype)
    got, whole = Blocks(before, after, 64), form(before, after).matrix
    assert [start for start, _ in got] == [0, 64]
    assert got.dtype == whole.dtype == dtype
    assert torch.equal(got.whole(), whole)
    assert torch.equal(subtract(before, after), whole)
    flipped = whole.clone()
    flip_signs(flipped, seed=3, name="x")
    assert torch.equal(got.flipped(3, "x").whole(), flipped)
    assert not torch.equal(got.flipped(4, "x").whole(), flipped)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("which", ["", "read", "write", "both"])
def test_gains_in_the_factors_are_gains_in_the_matrix(which: str, side: Any, blocked: bool) -> None:
    before, after = pair(torch.bfloat16)
    draw = generator(1, "gains")
    read = torch.rand(N, generator=draw) + 0.5 if which in ("read", "both") else None
    write = torch.rand(M, generator=draw) + 0.5 if which in ("write", "both") else None
    gains, whole = Gains(read, write), form(before, after).matrix
    expected = whole.double()
    expected = expected if read is None else expected * read.double()
    expected = expected if write is None else write.double()[:, None] * expected
    torch.testing.assert_close(folded(whole, gains).double(), expected, rtol=1e-6, atol=0)
    matrix = Blocks(before, after, 32) if blocked else whole
    seen = Dense(matrix, side, precise=True, gains=gains)
    own = expected if side == "write" else expected.T
    x, y = torch.randn(own.shape[1], 3, generator=draw), torch.randn(2, own.shape[0])
    assert float((seen.times(x) - own @ x.double()).norm() / (own @ x.double()).norm()) < 1e-5
    assert float((seen.left_times(y) - y.double() @ own).norm() / own.norm()) < 1e-5
    torch.testing.assert_close(seen.energies(), own.square().sum(1), rtol=1e-5, atol=0)
    assert seen.fro() == pytest.approx(float(own.norm()), rel=1e-6)
    found = leading_triplets(matrix, 1, generator=draw, side=side, gains=gains)
    u, s, _ = torch.linalg.svd(own, full_matrices=False)
    assert float((found.left[0].double() @ u[:, 0]).abs()) > 1 - 1e-5
    assert float(found.scale[0]) == pytest.approx(float(s[0]), rel=1e-3)


def test_products_and_triplets_are_those_in_memory() -> None:
    before, after = pair(torch.bfloat16)
    got, whole = Blocks(before, after, 32), form(before, after).matrix
    x, y = torch.randn(N, 5), torch.randn(5, M)
    for precise in (False, True):
        one, other = Dense(got, precise=precise), Dense(whole, precise=precise)
        torch.testing.assert_close(one.times(x), other.times(x), rtol=1e-2, atol=2e-4)
        torch.testing.assert_close(one.left_times(y), other.left_times(y), rtol=1e-2, atol=1e-4)
    a, b = (leading_triplets(m, 2, generator=generator(0, "t")) for m in (got, whole))
    assert float((a.left[0] @ b.left[0]).abs()) > 1 - 1e-5
    torch.testing.assert_close(a.scale[:1], b.scale[:1], rtol=1e-3, atol=0)


def test_rows_that_fit() -> None:
    used, fixed = private_bytes(), 4 * blocks.WORKSPACE_ROWS * (M + N)
    assert block_rows((M, N), 2, used + fixed + 2 * M * N + 2**24, "m") is None
    one = blocks.BLOCK_BYTES * N * 32
    got = block_rows((M * 1000, N), 2, private_bytes() + fixed + 3 * one + 2**22 * 90, "m")
    assert got is not None
    assert got % 32 == 0
    with pytest.raises(ConfigError, match=r"memory limit.*m \(90×8000\)"):
        block_rows((M, N), 2, used // 2, "m")


def test_a_limit_changes_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=384, intermediate_size=3000, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "a")
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-3 * torch.randn_like(p)
        model.save_pretrained(tmp_path / "b")
    difference = mw.load_lineage(a=tmp_path / "a", b=tmp_path / "b").diff("a", "b")
    free = mw.svd(difference, rank=3, progress=False)
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(blocks, "private_bytes", blocks.held_bytes)
    monkeypatch.setattr(blocks, "LIBRARY_BYTES", 0)
    whole = Blocks.__iter__
    monkeypatch.setattr(Blocks, "__iter__", lambda self: (made.append(self.shape), whole(self))[1])
    limit = 4 * blocks.WORKSPACE_ROWS * 3384 + blocks.BLOCK_BYTES * 3000 * 87
    tight = mw.svd(difference, rank=3, progress=False, memory_limit=1.01 * limit / 1e9)
    assert {(384, 3000), (3000, 384)} <= set(made)  # the limit was felt
    for name in ("singular_value", "null_edge", "fro"):
        torch.testing.assert_close(
            torch.tensor(tight.table[name].to_numpy()),
            torch.tensor(free.table[name].to_numpy()),
            rtol=1e-3,
            atol=1e-9,
        )
    for one, other in zip(free, tight, strict=True):
        assert float((one.write[0] @ other.write[0]).abs()) > 1 - 1e-3
    with pytest.raises(ConfigError, match="memory-limit"):
        mw.svd(difference, progress=False, memory_limit=1e-6)


def test_fewer_workers_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = Space.parse("mlp_hidden.0"), Space.parse("resid_post.0")
    site = Site("blocks.0.mlp.out", "mlp.out", 0, M, N, reads, writes)
    monkeypatch.setattr(blocks, "private_bytes", lambda: 0)
    need = blocks.LIBRARY_BYTES + 4 * blocks.WORKSPACE_ROWS * (M + N) + blocks.BLOCK_BYTES * N * 32
    assert workers_within(3.5 * need, 8, [site]) == (3, int(3.5 * need / 3))
    assert workers_within(100 * need, 8, [site])[0] == 8
    with pytest.raises(ConfigError, match="GB a worker"):
        workers_within(0.9 * need, 8, [site])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_gives_the_triplets_of_the_processor() -> None:
    before, after = pair(torch.bfloat16)
    whole = form(before, after).matrix
    a, b = (leading_triplets(m, 2, generator=generator(0, "t")) for m in (whole, whole.cuda()))
    assert float((a.left[0] @ b.left[0]).abs()) > 1 - 1e-4
    torch.testing.assert_close(a.scale[:1], b.scale[:1], rtol=1e-3, atol=0)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert known_device("cpu") == "cpu"
    for name in ("cuda:7", "nothing"):
        with pytest.raises(ConfigError, match=f"device.*'{name}'"):
            known_device(name)
