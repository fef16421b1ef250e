"""A loaded decomposition attached to the user's own TransformerLens model: same card, same edit."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from mi_weightspace.models import toy
from mi_weightspace.models.load import load
from mi_weightspace.vpd.assemble import rebuilt
from mi_weightspace.vpd.host import LensHost
from tests.vpd.decomposed import language, parts_of, tokens

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import conformance  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_card_and_an_edit_through_hooked_transformer(family: str) -> None:
    if not conformance.has_hooked_transformer():
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    parts = parts_of(family)
    mine = conformance.hooked_transformer(toy.tiny_model(family, seed=0))
    lens = load(mine, tokenizer=toy.tiny_tokenizer())
    host = LensHost(lens, parts.sites)
    there = parts.with_objective(rebuilt(parts.arrays, parts.settings, host))  # pyright: ignore[reportArgumentType]
    data = tokens(8, 20, seed=4)
    for site in ("blocks.0.mlp.in", "blocks.1.mlp.out", "blocks.0.attn.q"):
        one, other = (p.card(site, 5, data, n_random=1) for p in (parts, there))
        assert one.density == pytest.approx(other.density)
        assert one.important_activation == pytest.approx(other.important_activation, rel=1e-4)
        assert [t for t, _ in one.writes[:3]] == [t for t, _ in other.writes[:3]]
        assert [t for t, _ in one.reads[:3]] == [t for t, _ in other.reads[:3]]
        assert one.effect is not None and other.effect is not None
        assert one.effect.firing == pytest.approx(other.effect.firing, rel=1e-2, abs=1e-7)
        assert dataclasses.asdict(one.effect).keys() == dataclasses.asdict(other.effect).keys()
        gaps = [
            m.with_edit(parts.ablate(site, [1, 2])).run(data).logits
            for m in (language(family), lens)
        ]
        first, second = (g.log_softmax(-1) for g in gaps if g is not None)
        torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
