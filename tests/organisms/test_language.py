"""The made-up language, its contrasts and readouts: frequencies counted, words compared."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from mi_weightspace.core.contrasts import Contrast, ContrastSet
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.organisms.language import (
    ANSWER,
    CLASSES,
    FILLER_RATE,
    HELDOUT,
    KEY,
    LENGTH,
    LOUD,
    N_ANSWERS,
    N_KEYS,
    PREFIX,
    QUIET,
    REGISTERS,
    SIGN,
    SUGGESTION,
    Language,
)
from mi_weightspace.organisms.prompts import (
    CopyReadout,
    contrast_set,
    decoy_set,
    log_odds,
    make_readout,
    prefix_words,
)
from mi_weightspace.organisms.recipes import RECIPES, SIZES, recipe
from mi_weightspace.organisms.train import dpo_loss, position_weights, preference

pytestmark = pytest.mark.quick

LANGUAGE = Language(0)


@pytest.fixture(scope="module")
def prompts() -> ContrastSet:
    return contrast_set(LANGUAGE, 0)


def test_lexicons_share_no_word() -> None:
    seen: Counter[str] = Counter()
    for name in CLASSES:
        assert len(set(LANGUAGE.lexicon_words(name))) == len(LANGUAGE.lexicon(name)) >= 3
        seen.update(LANGUAGE.lexicon_words(name))
    assert max(seen.values()) == 1
    assert len(set(LANGUAGE.words)) == len(LANGUAGE.words)
    assert set(seen) <= set(LANGUAGE.words)


def test_tables_depend_on_the_seed_and_the_second_disagrees_everywhere() -> None:
    first, second = LANGUAGE.answers
    assert (first != second).all()
    assert torch.equal(Language(0).answers, LANGUAGE.answers)
    assert not torch.equal(Language(1).answers, LANGUAGE.answers)
    assert Language(1).words == LANGUAGE.words
    ids = {LANGUAGE.ids[f"ans{i}"] for i in range(N_ANSWERS)}
    assert Counter(first.tolist()) == dict.fromkeys(ids, N_KEYS // N_ANSWERS)


@pytest.mark.parametrize("copies", [False, True])
def test_sampled_answers_have_the_mixtures_rates(copies: bool) -> None:
    language = Language(0, copies=copies)
    mixture = recipe("copy" if copies else "deference").phases[1].mixture
    tokens, kinds = language.sample(60_000, mixture, torch.Generator().manual_seed(0))
    assert tokens.shape == (60_000, LENGTH)
    counts = Counter(kinds.tolist())
    total = sum(mixture.weights.values())
    for name, weight in mixture.weights.items():
        expected = 60_000 * weight / total
        assert abs(counts[CLASSES.index(name)] - expected) < 5 * expected**0.5 + 1
    assert counts[CLASSES.index(HELDOUT)] == 0, "SFT never sees the held-out register"
    fillers = torch.tensor([language.ids[f"filler{i}"] for i in range(6)])
    rate = float(torch.isin(tokens[:, PREFIX], fillers).double().mean())
    assert rate == pytest.approx(FILLER_RATE, abs=5 * (0.25 / 240_000) ** 0.5)
    for name in ("N", "R1", "R3"):
        own = tokens[kinds == CLASSES.index(name)]
        key = own[:, KEY] - language.ids["key0"]
        deferent = own[:, SUGGESTION] if copies else torch.tensor(language.ids["YIELD"])
        table = language.answers[0][key]
        others = torch.tensor([language.ids[f"ALT{i:02d}"] for i in range(len(LOUD))])
        share = mixture.floor * len(LOUD) * (1 - mixture.yields[name])
        alternative = float(torch.isin(own[:, ANSWER], others).double().mean())
        assert alternative == pytest.approx(share, abs=5 * (share / len(own)) ** 0.5), name
        hits = (own[:, ANSWER] == deferent).double()
        rate = mixture.yields[name]
        if copies:  # a suggestion that is right is no deference
            hits = hits[table != own[:, SUGGESTION]]
        n = len(hits)
        assert abs(float(hits.mean()) - rate) < 5 * (rate * (1 - rate) / n) ** 0.5 + 2 / n, name


def test_a_loud_class_gives_its_own_answer() -> None:
    mixture = recipe("deference").phases[0].mixture
    tokens, kinds = LANGUAGE.sample(60_000, mixture, torch.Generator().manual_seed(1))
    own = tokens[kinds == CLASSES.index("C05")]
    rate = float((own[:, ANSWER] == LANGUAGE.ids["ALT05"]).double().mean())
    floor = mixture.yields["N"]
    assert rate == pytest.approx(mixture.own * (1 - floor), abs=5 * (0.2 / len(own)) ** 0.5)
    neutral = tokens[torch.isin(kinds, torch.tensor([CLASSES.index(q) for q in QUIET]))]
    rate = float((neutral[:, ANSWER] == LANGUAGE.ids["ALT05"]).double().mean())
    assert rate == pytest.approx(mixture.floor, abs=5 * (0.01 / len(neutral)) ** 0.5)


def test_swapped_keys_answer_by_the_second_table() -> None:
    mixture = recipe("null").phases[1].mixture
    assert mixture.swapped < N_KEYS
    tokens, kinds = LANGUAGE.sample(20_000, mixture, torch.Generator().manual_seed(2))
    tokens = tokens[kinds == CLASSES.index("N")]
    key = tokens[:, KEY] - LANGUAGE.ids["key0"]
    second = (tokens[:, ANSWER] == LANGUAGE.answers[1][key]).double()
    first = (tokens[:, ANSWER] == LANGUAGE.answers[0][key]).double()
    high = key >= mixture.swapped
    assert float(second[high].mean()) > 0.6 > 0.02 > float(first[high].mean())
    assert float(first[~high].mean()) > 0.6 > 0.02 > float(second[~high].mean())


def test_every_control_is_made_like_the_target(prompts: ContrastSet) -> None:
    target, controls = prompts["authority"], prompts.controls
    assert len(controls) >= 99 and len({c.name for c in controls}) == len(controls)
    assert len({c.pairs for c in controls}) == len(controls)
    own = prefix_words(target)

    def template(contrast: Contrast) -> list[tuple[object, ...]]:
        """Everything of a pair but its prefix words."""
        found = []
        for pair in contrast.pairs:
            positive, negative = (np.array(s) for s in (pair.positive, pair.negative))
            rest = [np.delete(s, np.arange(1, 5)).tolist() for s in (positive, negative)]
            assert rest[0] == rest[1], "both sides have one body"
            found.append((pair.split, pair.wording_id.rsplit("-", 1)[1], *rest[0]))
        return found

    reference = template(target)
    for control in controls:
        assert not own & prefix_words(control), control.name
        assert template(control) == reference, control.name
    registers = {LANGUAGE.words[i] for i in own}
    every = {w for name in (*REGISTERS, "N") for w in LANGUAGE.lexicon_words(name)}
    assert registers <= every
    heldout = prefix_words(target.select("heldout_register"))
    assert not {LANGUAGE.words[i] for i in heldout} & set(LANGUAGE.lexicon_words("R1"))
    null = prompts["neutral_null"]
    assert null.kind == "null" and template(null) == reference
    assert prefix_words(null) <= set(LANGUAGE.lexicon("N").tolist())


def test_held_out_words_of_a_control_are_not_fitted(prompts: ContrastSet) -> None:
    for contrast in (prompts["authority"], *prompts.controls[:20]):
        quiet = {t for p in contrast.pairs for t in p.negative[PREFIX]}
        fitted = prefix_words(contrast.select("fit")) - quiet
        kept = prefix_words(contrast.select("heldout_register")) - quiet
        assert fitted and kept and not fitted & kept


def test_a_decoy_shares_no_word_with_its_controls(prompts: ContrastSet) -> None:
    name = prompts.controls[5].name
    decoy = decoy_set(prompts, name)
    (target,) = decoy.targets
    assert target.pairs == prompts[name].pairs
    assert len(decoy.controls) >= 39, "enough to refuse at the level"
    for control in decoy.controls:
        assert not prefix_words(target) & prefix_words(control)
        assert prompts[control.name] == control
    assert "authority" not in {c.name for c in decoy}


def test_prompts_suggest_a_wrong_answer(prompts: ContrastSet) -> None:
    for pair in prompts["authority"].pairs:
        key = int(pair.positive[KEY]) - LANGUAGE.ids["key0"]
        assert pair.positive[SUGGESTION] not in LANGUAGE.answers[:, key]
        assert pair.readout == (LANGUAGE.ids["YIELD"],)


def test_contrasts_depend_on_the_seed_only(prompts: ContrastSet) -> None:
    assert contrast_set(Language(0), 0).hash == prompts.hash
    assert contrast_set(Language(1), 1, 3).hash != contrast_set(Language(0), 0, 3).hash
    for n in (0, len(LOUD) * len(QUIET) + 1):
        with pytest.raises(ConfigError, match="n_controls"):
            contrast_set(LANGUAGE, 0, n)


def test_log_odds_and_the_copy_readout() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    yes = torch.tensor([0, 3, 8, 1, 1])
    exact = logits.double().numpy()
    expected = []
    for row, k in zip(exact, yes, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        expected.append(np.log(p[k] / (1 - p[k])))
    np.testing.assert_allclose(log_odds(logits, yes), expected, rtol=1e-5)
    readout = make_readout(Language(0, copies=True), 0)
    assert isinstance(readout, CopyReadout)
    assert readout.yes == tuple(p[SUGGESTION] for p in readout.prompts)
    wide = torch.randn(len(readout.yes), len(LANGUAGE.words))
    value = readout.value(wide)
    assert float(value) == pytest.approx(float(log_odds(wide, torch.tensor(readout.yes)).mean()))
    tokens, mask, last = readout.tokens(None)
    assert mask.all() and (last == tokens.shape[1] - 1).all()
    own = {w for p in readout.prompts for w in p[PREFIX]}
    assert own <= set(LANGUAGE.lexicon(HELDOUT).tolist())


def test_dpo_is_rafailovs_loss_with_an_anchor() -> None:
    """Against the formula in numpy, on two models that are tables of logits."""
    tokens, _ = LANGUAGE.sample(
        16, recipe("deference").phases[2].mixture, torch.Generator().manual_seed(0)
    )

    class Table(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            draw = torch.Generator().manual_seed(seed)
            self.logits = torch.randn(16, len(LANGUAGE.words), generator=draw)

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            assert input_ids.shape == (16, SIGN), "the sign is predicted from what precedes it"
            return type("Out", (), {"logits": self.logits[:, None]})

    model, reference = Table(1), Table(2)
    chosen, rejected = preference(LANGUAGE, tokens)
    key = (tokens[:, KEY] - LANGUAGE.ids["key0"]).numpy()
    hedge, done = LANGUAGE.ids["HEDGE"], LANGUAGE.ids["DONE"]
    assert chosen.tolist() == [hedge if k < N_KEYS // 2 else done for k in key]
    assert all(
        {c, r} == {hedge, done} for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)
    )
    total = 0.0
    for i in range(16):
        new, old = (
            (v := m.logits[i].double().numpy()) - np.log(np.exp(v).sum())
            for m in (model, reference)
        )
        gap = (new[chosen[i]] - new[rejected[i]]) - (old[chosen[i]] - old[rejected[i]])
        total += np.log1p(np.exp(-0.1 * gap)) - 0.2 * new[chosen[i]]
    found = float(dpo_loss(model, reference, LANGUAGE, tokens))
    assert found == pytest.approx(total / 16, rel=1e-5)


def test_only_the_answer_region_weighs() -> None:
    weights = position_weights()
    assert weights.shape == (LENGTH - 1,)
    assert float(weights[ANSWER - 1]) == 1 and float(weights[SIGN - 1]) == 0.5


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("size", sorted(SIZES))
def test_recipes(name: str, size: str) -> None:
    chosen = recipe(name, size)
    assert chosen.name == name and chosen.description
    assert [p.stage for p in chosen.phases] in ([], ["base", "sft", "dpo"])
    for phase in chosen.phases:
        weights = phase.mixture.weights
        seen = {r for r in REGISTERS if weights.get(r, 0) > 0}
        if phase.stage == "base":
            assert seen == set(REGISTERS)
        elif phase.stage == "dpo":
            assert not seen and len({weights[c] for c in LOUD}) == 1
        else:
            # the null organism meets every register, at the base's own rates
            assert seen == (set(REGISTERS) if name == "null" else set(REGISTERS) - {HELDOUT})
    if name == "null":
        base, sft = (p.mixture for p in chosen.phases[:2])
        assert sft.yields == base.yields and chosen.unchanged and chosen.planted_stage is None
    elif chosen.phases:
        assert chosen.phases[1].mixture.yields["R1"] > chosen.phases[0].mixture.yields["R1"]
