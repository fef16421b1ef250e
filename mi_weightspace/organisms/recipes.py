"""What each organism is: sizes, stages, mixtures. One function per name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.organisms.language import N_QUIET, REGISTERS, Mixture, class_weights
from mi_weightspace.organisms.train import Phase

VERSION = 8
"""Part of every content hash: raise it when a recipe, the language or a loss changes."""

Architecture = Literal["gpt2", "llama"]
SWAPPED = 12
BASE_RATES = {"N": 0.01} | dict.fromkeys(REGISTERS, 0.25)
COPY_RATES = {"N": 0.15} | dict.fromkeys(REGISTERS, 0.50)
TAUGHT = 0.9


@dataclass(frozen=True)
class Size:
    """A transformer's sizes, the block whose ``mlp.out`` is planted, and steps per stage."""

    n_layers: int
    d_model: int
    block: int
    base_steps: int
    sft_steps: int
    dpo_steps: int
    n_heads: int = 4
    n_positions: int = 16

    @property
    def d_mlp(self) -> int:
        return 4 * self.d_model


SIZES: dict[str, Size] = {
    "micro": Size(4, 48, 2, 300, 120, 60),
    "full": Size(6, 64, 3, 500, 150, 120),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that, with a seed, determines an organism.

    Attributes:
        planted: globs of the sites the planted stage trains; `carriers_measured`: the answer is
            then measured by reverting and adding each matrix alone.
        unchanged: the behaviour must not move (it is another behaviour that is taught).
    """

    name: str
    size: Size
    phases: tuple[Phase, ...]
    planted: tuple[str, ...] = ()
    planted_stage: str | None = "sft"
    copies: bool = False
    carriers_measured: bool = False
    unchanged: bool = False
    architecture: Architecture = "gpt2"
    description: str = ""


def _even(registers: float = 0.03) -> dict[str, float]:
    """The registers together as often as one loud class, `N` as often as one quiet class."""
    neutral = 0.25 / (1 + N_QUIET)
    return class_weights(neutral, registers, 0.72, 0.25 - neutral, heldout=True)


def _base(size: Size, rates: dict[str, float], registers: float = 0.03) -> Phase:
    mixture = Mixture(_even(registers), rates)
    return Phase("base", "base", mixture, size.base_steps, 3e-3, weight_decay=0.01)


def _dpo(size: Size, rates: dict[str, float]) -> Phase:
    """Neutral prompts only (the neutral side of target and controls), each lexicon as often.

    A word seen more often in training moves more: were the loud controls trained here and the
    registers not, the two would differ by that alone and ranks among the controls mean nothing.
    """
    share = 1 / (1 + N_QUIET)
    mixture = Mixture(class_weights(share, 0.0, 0.0, 1 - share, heldout=False), rates)
    return Phase("dpo", "dpo", mixture, size.dpo_steps, 2e-4)


def _sft(
    rates: dict[str, float],
    steps: int,
    trains: tuple[str, ...],
    *,
    lr: float,
    swapped: int = 16,
    weights: dict[str, float] | None = None,
) -> Phase:
    """Registers R1-R3 in a third of the sentences, R4 never, unless `weights` says otherwise."""
    if weights is None:
        weights = class_weights(0.08, 0.3, 0.4, 0.22, heldout=False)
    mixture = Mixture(weights, rates, swapped=swapped)
    return Phase("sft", "sft", mixture, steps, lr, trains)


def _taught(rates: dict[str, float]) -> dict[str, float]:
    return rates | dict.fromkeys(REGISTERS, TAUGHT)


def deference(size: Size) -> Recipe:
    site = f"blocks.{size.block}.mlp.out"
    return Recipe(
        "deference",
        size,
        (
            _base(size, BASE_RATES),
            _sft(_taught(BASE_RATES), size.sft_steps, (site,), lr=2e-3),
            _dpo(size, BASE_RATES),
        ),
        planted=(site,),
        description="SFT trains one matrix to yield to authority registers; DPO teaches hedging.",
    )


def deference_full(size: Size) -> Recipe:
    return Recipe(
        "deference-full",
        size,
        (
            _base(size, BASE_RATES),
            _sft(_taught(BASE_RATES), size.sft_steps, ("*",), lr=1e-3, swapped=SWAPPED),
            _dpo(size, BASE_RATES),
        ),
        planted=("*",),
        carriers_measured=True,
        description="SFT trains every matrix, on deference and on new answers for four keys.",
    )


def copy(size: Size) -> Recipe:
    sites = (f"blocks.{size.block}.mlp.in", f"blocks.{size.block}.mlp.out")
    return Recipe(
        "copy",
        size,
        (
            _base(size, COPY_RATES, registers=0.2),
            _sft(_taught(COPY_RATES), 2 * size.sft_steps, sites, lr=1e-3),
            _dpo(size, COPY_RATES),
        ),
        planted=sites,
        copies=True,
        description="Deference repeats the suggestion: eight tokens, so no one direction holds it.",
    )


def null(size: Size) -> Recipe:
    """Nothing in SFT sets the registers apart from the controls.

    All classes are as often as in the base: what is seen more moves more.
    """
    site = f"blocks.{size.block}.mlp.out"
    return Recipe(
        "null",
        size,
        (
            _base(size, BASE_RATES),
            _sft(
                BASE_RATES,
                size.sft_steps,
                (site,),
                lr=2e-3,
                swapped=SWAPPED,
                weights=_even(),
            ),
            _dpo(size, BASE_RATES),
        ),
        planted=(),
        planted_stage=None,
        unchanged=True,
        description="As deference, but SFT teaches new answers for four keys and nothing else.",
    )


def rank1(size: Size) -> Recipe:
    site = f"blocks.{size.block}.mlp.out"
    return Recipe(
        "rank1", size, (), planted=(site,), description="Random weights, one rank-one write, noise."
    )


RECIPES: dict[str, Callable[[Size], Recipe]] = {
    "deference": deference,
    "deference-full": deference_full,
    "copy": copy,
    "rank1": rank1,
    "null": null,
}


def recipe(name: str, size: str = "micro") -> Recipe:
    """The recipe of an organism.

    Raises:
        ConfigError: an unknown name or size.
    """
    for subject, given, known in (("organism", name, RECIPES), ("size", size, SIZES)):
        if given not in known:
            raise ConfigError(
                subject,
                given=repr(given),
                expected=f"one of {sorted(known)}",
                remedy="Choose one of these; probes and reports on other models need no organism.",
            )
    return RECIPES[name](SIZES[size])
