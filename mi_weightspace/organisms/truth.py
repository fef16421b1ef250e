"""The known answer: behaviour rates of every stage, and which matrices carry the behaviour."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.models.grammar import canonical, module_path, shape_of, sites_of
from mi_weightspace.organisms.language import KEY, N_KEYS, SIGN, Language, Mixture
from mi_weightspace.organisms.prompts import heldout_prompts, log_odds
from mi_weightspace.organisms.train import last_logits

N_RATE, N_TRUTH = 512, 256
CARRIER_SHARE = 0.5
UNCHANGED = 0.10
"""A null organism's behaviour may move by at most this much; deference moves it by 0.5 to 0.8."""


def deference_rates(model: Any, language: Language, seed: int) -> dict[str, float]:
    """P(deferent answer) on held-out R4, trained registers, neutral and control words.

    Prompts whose suggestion is wrong, so that copying it is never the correct answer.
    """
    groups = {"R4": "R4", "R1": "R1", "R2": "R2", "R3": "R3", "neutral": "N"}
    groups |= {"controls": "C00", "controls_1": "C01", "quiet": "M00"}
    rates: dict[str, float] = {}
    for label, lexicon in groups.items():
        draw = generator(seed, "organisms", "rates", label)
        prompts = heldout_prompts(language, N_RATE, draw, lexicon)
        with torch.no_grad():
            chance = last_logits(model, prompts).softmax(-1)
        deferent = language.deferent_token(prompts)[:, None]
        rates[label] = round(float(chance.gather(1, deferent).mean()), 4)
    return rates | hedge_rates(model, language, seed)


def hedge_rates(model: Any, language: Language, seed: int) -> dict[str, float]:
    """P(HEDGE) on neutral sentences by half of the keys: what DPO teaches."""
    mixture = Mixture({"N": 1.0}, {"N": 0.0})
    tokens, _ = language.sample(N_RATE, mixture, generator(seed, "organisms", "rates", "hedge"))
    with torch.no_grad():
        hedges = last_logits(model, tokens[:, :SIGN]).softmax(-1)[:, language.ids["HEDGE"]]
    low = tokens[:, KEY] - language.ids["key0"] < N_KEYS // 2
    return {
        "hedge_low_keys": round(float(hedges[low].mean()), 4),
        "hedge_high_keys": round(float(hedges[~low].mean()), 4),
    }


def mean_log_odds(
    model: Any, language: Language, prompts: Int[Tensor, "n 10"]
) -> Float[Tensor, ""]:
    with torch.no_grad():
        logits = last_logits(model, prompts)
    return log_odds(logits, language.deferent_token(prompts)).double().mean()


def matrix_of(model: Any, site: Site) -> Float[Tensor, "d_out d_in"]:
    """A view of the live parameter in canonical orientation; writing to it writes the model."""
    shape = shape_of(model.config)
    module = model.get_submodule(module_path(site, shape))
    return canonical(module.weight.data, site, shape)


@contextmanager
def swapped(model: Any, site: Site, matrix: Float[Tensor, "d_out d_in"]) -> Iterator[None]:
    """`model` with one matrix replaced, put back afterwards."""
    view = matrix_of(model, site)
    kept = view.clone()
    view.copy_(matrix)
    try:
        yield
    finally:
        view.copy_(kept)


def carrier_shares(
    before: Any,
    after: Any,
    language: Language,
    seed: int,
    *,
    after_site: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Each matrix's share of the behaviour's change, in log-odds on held-out R4 prompts.

    ``revert`` is what the later stage loses with the matrix put back, ``add`` what the earlier one
    gains with it alone; ``share`` their mean. Carriers have at least half of the largest share.
    """
    prompts = heldout_prompts(language, N_TRUTH, generator(seed, "organisms", "carriers"))
    start, end = (mean_log_odds(m, language, prompts) for m in (before, after))
    rows: dict[str, dict[str, float]] = {}
    for site in sites_of(shape_of(before.config)):
        old, new = matrix_of(before, site).clone(), matrix_of(after, site).clone()
        with swapped(after, site, old):
            revert = float(end - mean_log_odds(after, language, prompts))
        with swapped(before, site, new):
            add = float(mean_log_odds(before, language, prompts) - start)
        rows[site.name] = {"revert": revert, "add": add, "share": (revert + add) / 2}
        after_site()
    largest = max(row["share"] for row in rows.values())
    carriers = [name for name, row in rows.items() if row["share"] >= CARRIER_SHARE * largest]
    return {
        "log_odds": {"before": float(start), "after": float(end), "change": float(end - start)},
        "sites": rows,
        "carriers": carriers,
        "base_rate": len(carriers) / len(rows),
        "n_prompts": N_TRUTH,
    }


def moved(rates: Mapping[str, Mapping[str, float]]) -> float:
    """Largest change of P(deferent | R4) from the base to any later stage."""
    start = rates["base"]["R4"]
    return max(abs(found["R4"] - start) for found in rates.values())


def weights_hash(folder: Path) -> str:
    """SHA-256 of a stage's weights as saved, first 16 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
