"""Cards of planted components: one that fires on one token, one that never fires."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_weightspace.core.errors import ConfigError, PromptError, SiteError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.card import Card
from mi_weightspace.vpd.cards import PER_BATCH, WINDOW, _Gathered, cards, component_table
from mi_weightspace.vpd.effects import ablation_effect
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean, LensHost
from mi_weightspace.vpd.objective import Objective
from tests.vpd.decomposed import config, language, parts_of, square_parts, tokens

pytestmark = pytest.mark.quick

SITE = "blocks.1.mlp.out"
TOKEN, STRENGTH = 17, 0.6


class OnToken(nn.Module):
    """z = STRENGTH for component 0 at TOKEN, 1 for component 1 everywhere, else below 0."""

    def forward(self, clean: Clean, factors: Factors) -> Tensor:
        z = -torch.ones(*clean.batch.shape, factors.layout.total)
        z[..., 0] = torch.where(clean.batch == TOKEN, STRENGTH, -1.0)
        z[..., 1] = 1.0
        return z


def planted(family: str = "gpt2") -> Objective:
    host: Any = LensHost(language(family), (SITE,))
    draw = generator(0, "planted")
    width = host.weight(SITE).shape
    factors = Factors(
        host,
        {SITE: torch.randn(4, width[1], generator=draw) * 0.3},
        {SITE: torch.randn(4, width[0], generator=draw) * 0.3},
    )
    network: Any = OnToken()
    return Objective(factors, network, config(sites=(SITE,), n_components=4))


def data() -> list[Tensor]:
    rows = tokens(24, 30, seed=3)
    rows[rows == TOKEN] = TOKEN + 1
    rows[::3, 5] = TOKEN
    rows[1, [2, 9]] = TOKEN
    return list(rows.split(6))


def test_numbers_contexts_and_rates_of_a_component_that_fires_on_one_token() -> None:
    objective, batches = planted(), data()
    card = cards(objective, {SITE: [0]}, batches, n_contexts=6)[0]
    ids = torch.cat(batches)
    n = int((ids == TOKEN).sum())
    assert n == 10
    assert card.n_tokens == ids.numel()
    assert card.density == pytest.approx(n / ids.numel())
    assert card.strong == pytest.approx(n / ids.numel())
    assert card.mean_importance == pytest.approx(STRENGTH * n / ids.numel())
    (rate,) = card.inputs
    assert (rate.count, rate.precision, rate.recall) == (n, 1.0, 1.0)
    assert rate.pmi == pytest.approx(math.log(ids.numel() / n))
    assert rate.token == language().tokenizer.decode([TOKEN])
    assert len(card.contexts) == 6
    host = objective.factors.host
    clean = host.clean(ids)
    inner = clean.inputs[SITE] @ objective.factors.reads[SITE][0]
    act = inner * objective.factors.writes[SITE][0].norm()
    assert card.mean_activation == pytest.approx(float(act.mean()), rel=1e-4)
    important = float(act[ids == TOKEN].mean())
    assert card.important_activation == pytest.approx(important, rel=1e-4)
    for context in card.contexts:
        assert context.tokens[context.at] == rate.token
        assert context.importance[context.at] == pytest.approx(STRENGTH)
        assert len(context.tokens) == len(context.importance) == len(context.activation)
        assert len(context.tokens) <= 2 * WINDOW + 1
        fired = [t == rate.token for t in context.tokens]
        assert [g > 0 for g in context.importance] == fired
        assert any(
            context.activation[context.at] == pytest.approx(float(v), rel=1e-4)
            for v in act[ids == TOKEN]
        )


def test_a_component_that_never_fires_has_nothing_to_show() -> None:
    card = cards(planted(), {SITE: [2]}, data())[0]
    assert (card.density, card.mean_importance) == (0.0, 0.0)
    assert (card.contexts, card.inputs, card.outputs, card.effect) == ((), (), (), None)
    assert "never fires" in str(card)


def test_one_that_always_fires_goes_with_no_token_in_particular() -> None:
    card = cards(planted(), {SITE: [1]}, data())[0]
    assert card.density == 1
    assert (card.inputs, card.outputs) == ((), ())
    assert card.effect is not None
    assert card.effect.n_elsewhere == 0
    assert "which are all" in str(card)


def test_the_effect_is_that_of_the_edited_model() -> None:
    """Against the model with the matrix changed, KL by torch, positions split by hand."""
    objective, batches = planted(), data()
    found = cards(objective, {SITE: [0]}, batches, n_random=3)[0].effect
    assert found is not None
    lens: Any = language()
    ids = torch.cat(batches)
    fires = ids == TOKEN

    def means(component: int) -> tuple[float, float]:
        f = objective.factors
        matrix = lens.weight(SITE) - torch.outer(
            f.writes[SITE][component], f.reads[SITE][component]
        )
        from mi_weightspace.models.lens import Edit

        edited = lens.with_edit(Edit(weights={SITE: matrix})).run(ids).logits.double()
        clean = lens.run(ids).logits.double()
        kl = F.kl_div(
            edited.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
        )
        kl = kl.sum(-1)
        return float(kl[fires].mean()), float(kl[~fires].mean())

    at, elsewhere = means(0)
    assert found.firing == pytest.approx(at, rel=1e-3)
    assert found.elsewhere == pytest.approx(elsewhere, rel=1e-3)
    assert (found.n_firing, found.n_elsewhere) == (10, ids.numel() - 10)
    # the only other live component is number 1: one draw, not three equal ones
    assert len(found.random_firing) == 1
    other = means(1)
    assert found.random_firing[0] == pytest.approx(other[0], rel=1e-3)
    assert found.random_elsewhere[0] == pytest.approx(other[1], rel=1e-3)


def test_random_components_come_in_matched_numbers_and_never_overlap() -> None:
    found = ablation_effect(planted(), SITE, [0, 2], data(), live=[0, 1, 2, 3], n_random=4)
    assert len(found.random_firing) == 1  # of two others there is one pair
    none = ablation_effect(planted(), SITE, [0, 2], data(), live=[0, 1], n_random=4)
    assert none.random_firing == ()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_readings_through_unembedding_and_embedding(family: str) -> None:
    """Against the weights of the module itself: LayerNorm centres, RMSNorm does not."""
    parts = parts_of(family)
    model: Any = language(family).model
    base = model.transformer if family == "gpt2" else model.model
    final = base.ln_f if family == "gpt2" else base.norm
    embed = (base.wte if family == "gpt2" else base.embed_tokens).weight.detach()
    names = [language(family).tokenizer.decode([i]) for i in range(len(embed))]
    card = parts.card(SITE, 3, tokens(8, 30), n_random=0, n_tokens=5)
    sign = -1 if card.important_activation < 0 else 1
    vector = parts.write(SITE)[3] * sign
    if family == "gpt2":
        vector = vector - vector.mean()
    logits = model.lm_head.weight.detach() @ (vector * final.weight.detach())
    logits = logits - logits.mean()
    order = logits.argsort(descending=True)
    assert [t for t, _ in card.writes[:5]] == [names[i] for i in order[:5]]
    assert [t for t, _ in card.writes[5:]] == [names[i] for i in order[-5:]]
    assert card.writes[0][1] == pytest.approx(float(logits.max()), rel=1e-4)
    assert card.reads == ()  # it reads the MLP's hidden units
    reader = parts.card("blocks.0.mlp.in", 3, tokens(8, 30), n_random=0, n_tokens=5)
    sign = -1 if reader.important_activation < 0 else 1
    block = base.h[0] if family == "gpt2" else base.layers[0]
    gain = (block.ln_2 if family == "gpt2" else block.post_attention_layernorm).weight.detach()
    pulled = parts.read("blocks.0.mlp.in")[3] * sign * gain
    centred = embed - embed.mean(0)
    cosines = F.cosine_similarity(centred, pulled[None], dim=1)
    assert reader.reads[0][0] == names[int(cosines.argmax())]
    assert reader.reads[0][1] == pytest.approx(float(cosines.max()), rel=1e-4)
    assert reader.writes == ()


def test_the_reservoir_is_weighted_by_importance_and_bounded() -> None:
    """Of one position at g = 1 and nine at 0.1, the heavy one is kept first in 1/1.9 of draws."""
    g = torch.full((1, 10), 0.1)
    g[0, 4] = 1.0
    row = torch.arange(10)[None]
    heavy = 0
    for i in range(400):
        one = _Gathered()
        one.offer(row, g, g, generator(i, "draw"), 1)
        heavy += int(one.kept[0][0][one.kept[0][1]]) == 4
        assert len(one.kept) == 1
    assert abs(heavy / 400 - 1 / 1.9) < 4 * math.sqrt(0.25 / 400)
    many = _Gathered()
    for i in range(30):
        many.offer(row, g, g, generator(i, "batch"), 7)
        assert len(many.kept) <= min(7, PER_BATCH * (i + 1))
    assert len(many.kept) == 7
    silent = _Gathered()
    silent.offer(row, torch.zeros(1, 10), g, generator(0, "x"), 3)
    assert silent.kept == []


def test_the_table_of_components_is_that_of_the_whole_sample() -> None:
    objective, batches = planted(), data()
    table = component_table(objective, batches).set_index("component")
    card = cards(objective, {SITE: [0]}, batches)[0]
    for name in ("density", "strong", "mean_importance", "mean_activation", "norm"):
        assert table[name].loc[0] == pytest.approx(getattr(card, name), rel=1e-6)
    assert table["max_importance"].tolist() == pytest.approx([STRENGTH, 1, 0, 0])
    assert math.isnan(table["important_activation"].loc[2])
    split = component_table(objective, [b[i : i + 1] for b in batches for i in range(6)])
    torch.testing.assert_close(
        torch.tensor(split["mean_activation"].to_numpy()),
        torch.tensor(table["mean_activation"].to_numpy()),
    )


def test_a_card_is_shown_as_text_whatever_the_tokens_hold() -> None:
    from mi_weightspace.vpd.card import Context

    hostile = "<script>alert(1)</script>"
    card = Card(
        site=SITE,
        component=0,
        n_tokens=10,
        norm=1.0,
        density=0.5,
        strong=0.5,
        mean_importance=0.5,
        mean_activation=0.1,
        important_activation=0.1,
        contexts=(Context((hostile, "b\n"), 1, (0.0, 1.0), (0.0, 2.0)),),
        writes=((hostile, 1.0), ("x", -1.0)),
        unconverged=True,
    )
    page = card._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "unconverged" in page
    assert "(unconverged)" in str(card)


def test_what_has_no_card_is_refused() -> None:
    with pytest.raises(PromptError, match="token ids"):
        square_parts().card("first", 0, torch.rand(8, 4))
    with pytest.raises(ConfigError, match="numbers below 40"):
        parts_of().card(SITE, 40, tokens(4))
    with pytest.raises(SiteError, match="not decomposed"):
        parts_of().card("blocks.0.mlp.out", 0, tokens(4))
    with pytest.raises(PromptError, match="ids from 0"):
        parts_of().card(SITE, 0, torch.full((4, 6), 900))
