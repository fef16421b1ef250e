"""Bands: the bound by simulation, planted shifts, a naive oracle, files and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import ConfigError, DirectionError, OutputError, PromptError
from mi_weightspace.core.monitor import (
    Extremes,
    Watch,
    calibrate,
    extremes,
    false_positive_bound,
    items_needed,
)
from mi_weightspace.core.monitor_io import load_bands, save_bands
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space

pytestmark = pytest.mark.quick

D_IN, D_OUT, K = 7, 9, 4
SITE = Site(
    "blocks.1.mlp.out",
    "mlp.out",
    1,
    D_OUT,
    D_IN,
    Space("mlp_hidden", 1),
    Space("resid_post", 1),
)


def components(seed: int = 0, index: Tensor | None = None) -> Components:
    draw = generator(seed, "monitor")
    read, write = (torch.randn(K, d, generator=draw) for d in (D_IN, D_OUT))
    read, write = (v / v.norm(dim=1, keepdim=True) for v in (read, write))
    return Components(SITE, read, write, torch.arange(K, 0, -1.0), stage="sft", index=index)


def items(n: int, seed: int, tokens: int = 5, d: int = D_OUT) -> Tensor:
    """Tokens of one item share an offset: they are not exchangeable with other items' tokens."""
    draw = generator(seed, "items", n)
    offset = torch.randn(n, 1, d, generator=draw)
    return offset + 0.3 * torch.randn(n, tokens, d, generator=draw)


def measured(t: int, n: int, calibrations: int, draw: torch.Generator) -> float:
    """Rate at which one new item leaves t bands of n items, over fresh calibrations; heavy tails,
    neighbouring vectors correlated."""
    watch = Watch("s", "write", "s:out", torch.eye(t), tuple(range(t)))
    flagged = 0
    for _ in range(calibrations):
        x = torch.randn(n + 1, 3, t, generator=draw)
        x = (x + 0.5 * x.roll(1, -1)).sinh()
        found = calibrate([watch], [extremes(watch, x[:n])], margin=0.0)
        flagged += int(found.check(x[n:]).flagged)
    return flagged / calibrations


@pytest.mark.parametrize(("t", "n"), [(1, 19), (6, 59)])
def test_the_false_positive_rate_is_below_the_bound_and_near_it(t: int, n: int) -> None:
    calibrations = 3_000
    rate = measured(t, n, calibrations, generator(t, "rate"))
    bound = 2 * t / (n + 1)
    error = math.sqrt(bound * (1 - bound) / calibrations)
    assert rate < bound + 3 * error
    assert rate > 0.75 * bound  # one vector: equality; six correlated ones: a little less
    assert false_positive_bound(t, n) == pytest.approx(bound)


def test_items_needed_is_the_smallest_number_that_will_do() -> None:
    assert false_positive_bound(160, 20_000) == pytest.approx(0.016, abs=1e-4)  # as published
    for t, rate in ((1, 0.05), (40, 0.01), (3, 0.5), (5, 1.0)):
        n = items_needed(t, rate)
        assert false_positive_bound(t, n) <= rate + 1e-12
        assert n == 1 or 2 * t / n > rate


@pytest.mark.parametrize("measure", ["projection", "cosine"])
@pytest.mark.parametrize("side", ["read", "write"])
def test_bands_and_alarms_by_hand(side: str, measure: str) -> None:
    parts, d = components(), D_IN if side == "read" else D_OUT
    calibration, new = items(12, 0, d=d), items(30, 1, d=d)
    mask = torch.rand(12, 5, generator=generator(2, "mask")) < 0.6
    mask[:, 3] = True
    found = parts.bands(calibration, side=side, mask=mask, measure=measure, margin=0.1)  # pyright: ignore[reportArgumentType]
    alarms = found.check(new)
    vectors = (parts.read if side == "read" else parts.write).double()

    def value(x: Tensor, k: int) -> float:
        dot = float((x.double() * vectors[k]).sum())
        return dot / float(x.double().norm()) if measure == "cosine" else dot

    for k in range(K):
        seen = [value(calibration[i, t], k) for i in range(12) for t in range(5) if mask[i, t]]
        assert float(found.low[0][k]) == pytest.approx(min(seen), abs=1e-5)
        assert float(found.high[0][k]) == pytest.approx(max(seen), abs=1e-5)
        slack = 0.1 * (max(seen) - min(seen))
        for i in range(30):
            own = [value(new[i, t], k) for t in range(5)]
            above = max(0.0, max(own) - max(seen) - slack)
            below = max(0.0, min(seen) - slack - min(own))
            expected = above if above >= below else -below
            assert float(alarms.excess[i, k]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(alarms.flagged, (alarms.excess != 0).any(1))
    assert (found.n, len(found), found.bound) == (12, K, pytest.approx(8 / 13))


@pytest.mark.parametrize("offset", [-20.0, 0.0, 20.0])
def test_padding_never_counts_and_ragged_items_are_the_same(offset: float) -> None:
    parts = components()
    # along every vector all values have one sign: a 0 for padding would be an extreme
    calibration = items(8, 3) + offset * torch.linalg.pinv(parts.write).sum(1)
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[2, 3:] = False
    padded = calibration.clone()
    padded[2, 3:] = math.nan
    found = parts.bands(padded, mask=mask)
    ragged = parts.bands([row[m] for row, m in zip(calibration, mask, strict=True)])
    torch.testing.assert_close(found.low, ragged.low)
    torch.testing.assert_close(found.high, ragged.high)
    single = parts.bands(calibration[:, 0])
    assert torch.equal(single.high[0], (calibration[:, 0] @ parts.write.T).amax(0))


def test_a_planted_shift_is_caught_where_it_is_and_only_there() -> None:
    parts = components(index=torch.tensor([11, 5, 3, 2]))
    found = parts.bands(items(800, 4))
    clean, shifted = items(200, 5), items(200, 5)
    # along what the second part alone sees
    dual = torch.linalg.pinv(parts.write)[:, 1]
    shifted[::2, 4] -= 30 * dual / (dual @ parts.write[1])
    before, after = found.check(clean), found.check(shifted)
    assert after.flagged[::2].all()
    assert torch.equal(after.flagged[1::2], before.flagged[1::2])
    assert before.rate <= found.bound + 0.02
    low, high = before.rate_interval()
    assert low <= before.rate <= high
    rows = after.to_pandas()
    new = rows[(rows["item"] % 2 == 0) & (rows["component"] == 5)]
    assert len(new) == 100
    assert bool(np.all(np.asarray(new["excess"]) < 0))
    assert bool(np.all(np.asarray(new["value"]) < np.asarray(new["low"])))
    assert set(rows["stage"]) == {"sft"}
    assert len(rows) == int(after.fired.sum())


def test_a_shift_across_the_watched_vectors_is_not_seen() -> None:
    parts = components()
    found = parts.bands(items(300, 6))
    clean = items(50, 7)
    null = torch.linalg.svd(parts.write).Vh[K]
    assert torch.equal(found.check(clean + 40 * null).fired, found.check(clean).fired)


def test_what_calibrated_the_bands_is_within_them() -> None:
    x = items(40, 8)
    found = components().bands(x, margin=0.0)
    assert not bool(found.check(x).flagged.any())
    low = x.clone()
    low[3] -= 5.0  # the margin is what separates these two
    narrow, wide = components().bands(x, margin=0.0), components().bands(x, margin=5.0)
    assert narrow.check(low).rate > 0 == wide.check(low).rate


def test_both_ends_at_once_report_the_worse() -> None:
    watch = Watch("s", "write", "s:out", torch.eye(1), (0,))
    found = calibrate([watch], [extremes(watch, torch.tensor([[0.0], [1.0]]))], margin=0.0)
    both = torch.tensor([[[4.0], [-2.0]], [[2.0], [-2.5]]])
    assert found.check(both).excess.flatten().tolist() == [3.0, -2.5]


def test_widening_is_calibrating_on_both() -> None:
    parts, first, second = components(), items(20, 9), items(15, 10)
    widened = parts.bands(first).widened(second)
    together = parts.bands(torch.cat([first, second]))
    assert widened.n == together.n == 35
    torch.testing.assert_close(widened.low, together.low)
    torch.testing.assert_close(widened.high, together.high)


def test_several_places_share_one_bound() -> None:
    read, write = components().watch("read", k=2), components().watch("write", k=3)
    stream = components().watch("write", where="stream", k=1)
    assert (read.capture, write.capture) == ("blocks.1.mlp.out:in", "blocks.1.mlp.out:out")
    assert stream.capture == "resid_post.1"
    x = {"blocks.1.mlp.out:in": items(10, 0, d=D_IN), "blocks.1.mlp.out:out": items(10, 1)}
    found = calibrate([read, write], [extremes(w, x[w.capture]) for w in (read, write)])
    assert (len(found), found.bound) == (5, pytest.approx(10 / 11))
    assert found.check(x).excess.shape == (10, 5)
    with pytest.raises(ConfigError, match=r"blocks\.1\.mlp\.out:out"):
        found.check(items(10, 0, d=D_IN))
    with pytest.raises(PromptError, match=r"\[3, 10\] items"):
        found.judge([extremes(read, x[read.capture]), extremes(write, items(3, 1))])


def test_saved_and_loaded_bands_judge_alike(tmp_path: Path) -> None:
    found = components(index=torch.tensor([9, 8, 1, 0])).bands(items(30, 0), measure="cosine")
    path = save_bands(found, tmp_path / "deep" / "bands.safetensors")
    again = load_bands(path)
    new = items(40, 1) + 0.5
    assert torch.equal(again.check(new).excess, found.check(new).excess)
    assert again.check(new).to_pandas().equals(found.check(new).to_pandas())
    assert repr(again) == repr(found)
    assert (again.watches[0].index, again.watches[0].measure) == ((9, 8, 1, 0), "cosine")
    with pytest.raises(OutputError, match="taken"):
        save_bands(found, path)
    with pytest.raises(OutputError, match="save_bands"):
        load_bands(tmp_path / "none.safetensors")
    (tmp_path / "other").write_bytes(b"not bands")
    with pytest.raises(OutputError, match="save_bands"):
        load_bands(tmp_path / "other")


def test_refusals() -> None:
    parts = components()
    with pytest.raises(DirectionError, match="width of its vectors"):
        parts.bands(items(5, 0, d=D_IN))
    with pytest.raises(PromptError, match="no item"):
        parts.bands(items(5, 0)[:0])
    with pytest.raises(PromptError, match="no item"):
        parts.bands([])
    with pytest.raises(PromptError, match="no token is left"):
        parts.bands(items(2, 0), mask=torch.tensor([[True] * 5, [False] * 5]))
    with pytest.raises(PromptError, match="not finite"):
        parts.bands(torch.full((2, D_OUT), math.nan))
    with pytest.raises(ConfigError, match="margin"):
        parts.bands(items(2, 0), margin=-0.1)
    with pytest.raises(ConfigError, match="measure"):
        parts.bands(items(2, 0), measure="dot")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="0 watches"):
        calibrate([], [Extremes(torch.zeros(2, 0), torch.zeros(2, 0))])
