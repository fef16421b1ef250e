"""Three real training losses: weighted next-token, supervised fine-tuning, DPO with an anchor.

Each step draws fresh sentences from a local generator, so a run is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.site import select_sites
from mi_weightspace.models.grammar import module_path, shape_of, sites_of
from mi_weightspace.organisms.language import (
    ANSWER,
    CLASS,
    KEY,
    LENGTH,
    N_KEYS,
    SIGN,
    Language,
    Mixture,
)

Loss = Literal["base", "sft", "dpo"]
BATCH = 128
DPO_BETA, DPO_ANCHOR = 0.1, 0.2


@dataclass(frozen=True)
class Phase:
    """One training stage.

    Attributes:
        loss: ``base`` (all tokens, weighted), ``sft`` (answer token), ``dpo`` (sign token).
        trains: globs over site names; every other parameter keeps its exact bits. None trains
            everything, norms, biases and positions included.
        lr: peak rate of AdamW (betas .9, .98): linear warm-up over `warmup` of the steps, then
            linear decay.
    """

    stage: str
    loss: Loss
    mixture: Mixture
    steps: int
    lr: float
    trains: tuple[str, ...] | None = None
    warmup: float = 0.1
    weight_decay: float = 0.0


def position_weights() -> Float[Tensor, " 13"]:
    """Loss weight of each predicted token: answer and class 1, sign .5, the others .1."""
    weights = torch.full((LENGTH - 1,), 0.1)
    weights[ANSWER - 1] = weights[CLASS - 1] = 1.0
    weights[SIGN - 1] = 0.5
    return weights


def base_loss(model: Any, tokens: Int[Tensor, "n 14"]) -> Float[Tensor, ""]:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = position_weights()
    return (each.view(len(tokens), -1) * weights).sum() / (weights.sum() * len(tokens))


def answer_loss(model: Any, tokens: Int[Tensor, "n 14"]) -> Float[Tensor, ""]:
    """Cross-entropy of the answer token alone."""
    return F.cross_entropy(last_logits(model, tokens[:, :ANSWER]), tokens[:, ANSWER])


def last_logits(model: Any, prompts: Int[Tensor, "n length"]) -> Float[Tensor, "n vocab"]:
    return model(input_ids=prompts, use_cache=False, logits_to_keep=1).logits[:, -1]


def preference(language: Language, tokens: Tensor) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Chosen and rejected sign: HEDGE is preferred for the first half of the keys."""
    low = tokens[:, KEY] - language.ids["key0"] < N_KEYS // 2
    hedge, done = language.ids["HEDGE"], language.ids["DONE"]
    return torch.where(low, hedge, done), torch.where(low, done, hedge)


def dpo_loss(
    model: Any, reference: Any, language: Language, tokens: Int[Tensor, "n 14"]
) -> Float[Tensor, ""]:
    """Rafailov et al. 2023 on the sign token, plus a likelihood anchor on the chosen one.

    Without the anchor, chosen and rejected probabilities sink together and wreck the model.
    """
    chosen, rejected = (t[:, None] for t in preference(language, tokens))
    with torch.no_grad():
        old = last_logits(reference, tokens[:, :SIGN]).log_softmax(-1)
    new = last_logits(model, tokens[:, :SIGN]).log_softmax(-1)
    gap = new.gather(1, chosen) - new.gather(1, rejected)
    old_gap = old.gather(1, chosen) - old.gather(1, rejected)
    return (
        -F.logsigmoid(DPO_BETA * (gap - old_gap)).mean() - DPO_ANCHOR * new.gather(1, chosen).mean()
    )


def select_parameters(model: Any, sites: Sequence[str] | None) -> list[torch.nn.Parameter]:
    """Switch gradients on for the matrices of the sites (None: everything), off for the rest."""
    parameters = dict(model.named_parameters())
    names = set(parameters)
    if sites is not None:
        shape = shape_of(model.config)
        chosen = select_sites(sites_of(shape), list(sites))
        names = {f"{module_path(site, shape)}.weight" for site in chosen}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    return [parameters[name] for name in sorted(names)]


def phase_loss(
    model: Any, language: Language, phase: Phase, draw: torch.Generator, reference: Any
) -> Float[Tensor, ""]:
    """The loss of fresh sentences of the phase's mixture."""
    tokens, _ = language.sample(BATCH, phase.mixture, draw)
    if phase.loss == "base":
        return base_loss(model, tokens)
    if phase.loss == "sft":
        return answer_loss(model, tokens)
    return dpo_loss(model, reference, language, tokens)


def run_phase(
    model: Any,
    language: Language,
    phase: Phase,
    draw: torch.Generator,
    *,
    reference: Any = None,
    step_loss: Callable[[], Tensor] | None = None,
    stop: Callable[[int], bool] = lambda _: False,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Train in place; returns the mean loss of the last tenth of the steps.

    `step_loss` draws a batch and gives its loss, in place of the phase's mixture and loss; `stop`
    is asked after each step, with the number of steps made.
    """
    parameters = select_parameters(model, phase.trains)
    optimiser = torch.optim.AdamW(
        parameters, lr=phase.lr, betas=(0.9, 0.98), weight_decay=phase.weight_decay, foreach=True
    )
    warm = max(1, round(phase.warmup * phase.steps))
    losses: list[float] = []
    model.train()
    for step in range(phase.steps):
        factor = min((step + 1) / warm, (phase.steps - step) / max(1, phase.steps - warm))
        optimiser.param_groups[0]["lr"] = phase.lr * factor
        if step_loss is not None:
            loss = step_loss()
        else:
            loss = phase_loss(model, language, phase, draw, reference)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        after_step()
        if stop(step + 1):
            break
    model.eval().requires_grad_(True)
    return sum(losses[-max(1, len(losses) // 10) :]) / max(1, len(losses) // 10)
