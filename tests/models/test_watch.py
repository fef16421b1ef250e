"""Bands over the prompts of a live model: what a plain loop over single prompts gives."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from mi_weightspace.core.components import Components, Where
from mi_weightspace.core.errors import MismatchError, PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Side
from mi_weightspace.models import toy, watch
from mi_weightspace.models.lens import Lens
from mi_weightspace.models.load import load

pytestmark = pytest.mark.quick

SITES = ("blocks.0.mlp.out", "blocks.1.attn.o")
Prompts = list[tuple[int, ...]]


@lru_cache(maxsize=4)
def model(seed: int = 0) -> Lens:
    return load(toy.tiny_model("llama", seed=seed), tokenizer=toy.tiny_tokenizer())


def prompts(n: int, seed: int = 0) -> Prompts:
    draw = generator(seed, "watch")
    lengths = torch.randint(1, 7, (n,), generator=draw).tolist()
    return [tuple(torch.randint(4, 300, (k,), generator=draw).tolist()) for k in lengths]


def parts(k: int = 3) -> list[Components]:
    found = []
    for site in model().sites(",".join(SITES)):
        u, s, vh = torch.linalg.svd(model().weight(site), full_matrices=False)
        found.append(Components(site, vh[:k], u.T[:k], s[:k], stage="sft"))
    return found


@pytest.mark.parametrize(
    ("side", "where"), [("write", "site"), ("read", "site"), ("write", "stream")]
)
@pytest.mark.parametrize("skip_first", [True, False])
def test_bands_by_a_plain_loop(side: Side, where: Where, skip_first: bool) -> None:
    ids = prompts(9)
    found = watch.bands(
        model(),
        ids,
        parts(),
        side=side,
        where=where,
        skip_first=skip_first,
        batch_tokens=13,
    )
    for watched, component, low, high in zip(
        found.watches, parts(), found.low, found.high, strict=True
    ):
        values = []
        for row in ids:
            run = model().run(torch.tensor([row]), capture=[watched.capture])
            x = run.captured[watched.capture][0]
            x = x[1:] if skip_first and len(row) > 1 else x
            values.append(x @ component.vectors(side).T)
        seen = torch.cat(values)
        torch.testing.assert_close(low, seen.amin(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(high, seen.amax(0), atol=1e-4, rtol=1e-4)
    assert (found.n, len(found), found.model_hash) == (9, 6, model().fingerprint)


def test_alarms_come_in_the_order_of_the_prompts_and_batches_do_not_matter() -> None:
    found = watch.bands(model(), prompts(12), parts())
    new = prompts(30, seed=1)
    one, other = (watch.check(model(), new, found, batch_tokens=b) for b in (7, 10_000))
    torch.testing.assert_close(one.excess, other.excess, atol=1e-4, rtol=1e-4)
    assert 0 < int(one.flagged.sum()) < 30
    single = torch.stack([watch.check(model(), [p], found).excess[0] for p in new])
    torch.testing.assert_close(one.excess, single, atol=1e-4, rtol=1e-4)
    assert not bool(watch.check(model(), prompts(12)[::-1], found).flagged.any())
    assert watch.widen(model(), new, found).n == 42


def test_only_the_tokens_to_keep_count() -> None:
    row = tuple(range(10, 16))
    keep = [[False, True, True, False, True, False]]
    found = watch.bands(model(), [row], parts()[0], keep=keep)
    x = model().run(torch.tensor([row]), capture=[f"{SITES[0]}:out"]).captured[f"{SITES[0]}:out"][0]
    seen = x[[1, 2, 4]] @ parts()[0].write.T
    torch.testing.assert_close(found.high[0], seen.amax(0))
    with pytest.raises(PromptError, match="keep"):
        watch.bands(model(), [row], parts(), keep=[[True]])


def test_refusals() -> None:
    with pytest.raises(PromptError, match="at least 119"):
        watch.bands(model(), prompts(5), parts(), rate=0.1)
    found = watch.bands(model(), prompts(5), parts())
    with pytest.raises(MismatchError, match="calibrated on"):
        watch.check(model(1), prompts(2), found)
    with pytest.raises(PromptError, match="vocabulary"):
        watch.check(model(), [(5, 100_000)], found)
    with pytest.raises(PromptError, match="positions"):
        watch.check(model(), [(5,) * 100], found)
    with pytest.raises(PromptError, match="none"):
        watch.check(model(), [], found)
