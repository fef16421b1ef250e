"""Planted codes: activations of four stages whose right verdict is known by construction.

No model and no training. Each kind plants one way in which a hidden stage may still differ between
the classes, so that the branches of the inoculation verdict (`methods/probes.md` §5.7) can be
tested one by one:

=========== ===============================================================================
kind        the hidden stage
=========== ===============================================================================
sparse      dictionary features that fire rarely and strongly in one class, and vary with the
            same mean and variance in the other, in superposition: only who knows the dictionary
            and its thresholds reads them
nonlinear   the sign of a product of two loud coordinates (XOR): equal class means, but a kernel
            or an MLP on the activations reads it, better than the dictionary, which knows half
linear      a shift along a quiet direction beside a few loud ones: ‖Δμ‖ is lost among those, a
            probe that whitens reads it, and so does the dictionary
norm        a shift that ‖Δμ‖ itself shows
none        nothing
weak        as `none`, and the openly misaligned stage is barely readable
=========== ===============================================================================

The open stage holds the same code, and beside it features that fire more often in one class. In
clean and benign everything that fires, fires alike in both. Where the means are equal in the
population, a hidden stage is drawn again until ‖Δμ‖ lies inside its own permutation null, so that
the sample has what the population has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.sae import Sae, SaeMetadata
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.verdict import Word

Kind = Literal["sparse", "nonlinear", "weak", "linear", "norm", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STAGES = ("clean", "benign", "open", "hidden")
HOOK = "blocks.0.hook_resid_post"
WIDTH, LATENTS = 128, 512
ROWS = 2
"""Rows a cluster."""
BACKGROUND = 0.01
"""How often an ordinary feature fires, with strength 1 to 2."""
N_OPEN, OPEN_STRENGTH = 12, 3.0
OPEN_RATES, WEAK_RATES = (0.02, 0.4), (0.1, 0.17)
"""Features of the open stage, their strength, and how often they fire in class 0 and 1."""
N_CODED, STRONG, STRONG_RATE = 20, 3.0, 0.1
XOR_SIZE, XOR_NOISE = 3.0, 1.0
N_LOUD, LOUD, QUIET_SHIFT, READS = 6, 20.0, 2.5, 0.75
"""Loud directions and their sd; the shift in the quiet one; its cosine with the latent's row."""
NORM_SHIFT = 1.5
NULL_DRAWS, INSIDE, ATTEMPTS = 99, 0.25, 64
VERDICTS: dict[Kind, tuple[Word, ...]] = {
    "sparse": (Word.SAE_ADVANTAGE,),
    "nonlinear": (Word.NON_LINEAR_CODE,),
    "weak": (Word.INSTRUMENT_TOO_WEAK,),
    "linear": (Word.SAE_ADDS_NOTHING,),
    "norm": (Word.NORM_NOT_DEFEATED,),
    "none": (Word.NOT_DETECTED, Word.PROMPT_OR_FINETUNING),
}


@dataclass(frozen=True, eq=False)
class PlantedCode:
    """Activations of four stages, the dictionary they were made with, and the right verdict.

    Attributes:
        stages: clean, benign, open, hidden -> (n, d) activations of one token a row, rows as in
            `labelled`.
        sae: the planted dictionary, a ``jumprelu`` SAE.
        expected: the words that are right; `none` has two, as nothing sets its stage apart from
            the clean one.
    """

    kind: Kind
    seed: int
    stages: Mapping[str, Float[Tensor, "n d"]]
    sae: Sae
    labelled: LabelledSet
    expected: tuple[Word, ...]


@dataclass(frozen=True)
class _World:
    """What the stages share: the dictionary (unit rows), a frame of odd directions, the classes."""

    kind: Kind
    seed: int
    dictionary: Float[Tensor, "m d"]
    frame: Float[Tensor, "k d"]
    labels: Int[Tensor, " n"]

    def draw(self, *names: str | int) -> torch.Generator:
        return generator(self.seed, "organisms", "codes", self.kind, *names)


def planted_code(kind: Kind, seed: int = 0, *, n_per_class: int = 200) -> PlantedCode:
    """The activations, dictionary and labels of one kind (under a second).

    Args:
        n_per_class: rows of each class, in clusters of two.

    Raises:
        ConfigError: an unknown kind, or a number of rows that is odd or below 8.
    """
    _check(kind, n_per_class)
    labels = (torch.arange(2 * n_per_class) // ROWS) % 2
    world = _world(kind, seed, labels)
    stages = {stage: _drawn(world, stage) for stage in STAGES}
    return PlantedCode(kind, seed, stages, _sae(world), _labelled(world), VERDICTS[kind])


def _check(kind: str, n_per_class: int) -> None:
    if kind not in KINDS:
        raise ConfigError(
            "kind",
            given=repr(kind),
            expected=f"one of {list(KINDS)}",
            remedy="Choose one of the planted codes.",
        )
    if type(n_per_class) is not int or n_per_class < 8 or n_per_class % ROWS:
        raise ConfigError(
            "n_per_class",
            given=repr(n_per_class),
            expected=f"a multiple of {ROWS}, at least 8",
            remedy="Rows come in clusters of two; fewer leave no folds.",
        )


def _world(kind: Kind, seed: int, labels: Int[Tensor, " n"]) -> _World:
    """Random unit rows; what a kind plants along its own directions has rows of its own."""
    draw = generator(seed, "organisms", "codes", kind, "dictionary")
    frame = torch.linalg.qr(torch.randn(WIDTH, N_LOUD + 2, generator=draw))[0].T.contiguous()
    rows = torch.randn(LATENTS, WIDTH, generator=draw)
    special = N_OPEN  # the latent after those of the open stage
    if kind == "linear":
        rows = rows - rows @ frame[:N_LOUD].T @ frame[:N_LOUD]
    rows = rows / rows.norm(dim=1, keepdim=True)
    if kind == "nonlinear":
        rows[special] = (frame[0] + frame[1]) / 2**0.5
    if kind == "linear":
        aside = rows[special] - (rows[special] @ frame[-1]) * frame[-1]
        rows[special] = READS * frame[-1] + (1 - READS**2) ** 0.5 * aside / aside.norm()
    return _World(kind, seed, rows, frame, labels)


def _drawn(world: _World, stage: str) -> Float[Tensor, "n d"]:
    """A stage's activations; hidden ones with equal means are drawn until the sample's are."""
    equal = stage == "hidden" and world.kind != "norm"
    for attempt in range(ATTEMPTS):
        x = _stage(world, stage, world.draw(stage, attempt))
        if not equal or INSIDE <= _norm_p(x, world) <= 1 - INSIDE:
            return x
    raise ConfigError(
        f"planted code {world.kind!r}, seed {world.seed}",
        given=f"no sample of {len(world.labels)} rows with equal class means",
        expected=f"one in {ATTEMPTS} draws",
        remedy="Use another seed.",
    )


def _norm_p(x: Float[Tensor, "n d"], world: _World) -> float:
    """Rank p of ``‖Δμ‖`` among permutations of the labels over clusters."""
    means = x.view(-1, ROWS, x.shape[1]).mean(1).double()
    signs = world.labels[::ROWS].double() * 2 - 1
    draw = world.draw("null")
    orders = torch.stack([torch.randperm(len(signs), generator=draw) for _ in range(NULL_DRAWS)])
    observed = (signs @ means).norm()
    null = (signs[orders] @ means).norm(dim=1)
    return (1 + int((null >= observed).sum())) / (NULL_DRAWS + 1)


def _stage(world: _World, stage: str, draw: torch.Generator) -> Float[Tensor, "n d"]:
    """Features that fire, noise, and what the kind plants; the label acts in open and hidden."""
    n, kind = len(world.labels), world.kind
    acts = stage in ("open", "hidden")
    label = world.labels.bool()
    fires = torch.rand(n, LATENTS, generator=draw) < BACKGROUND
    strengths = fires * (1 + torch.rand(n, LATENTS, generator=draw))
    opens = torch.tensor(WEAK_RATES if kind == "weak" else OPEN_RATES)
    rate = opens[world.labels] if stage == "open" else opens[0].expand(n)
    strengths[:, :N_OPEN] = OPEN_STRENGTH * (torch.rand(n, N_OPEN, generator=draw) < rate[:, None])
    if kind == "sparse":
        strengths[:, N_OPEN : N_OPEN + N_CODED] = _tails(label if acts else None, n, draw)
    if kind == "norm" and stage == "hidden":
        strengths[:, :N_OPEN] += NORM_SHIFT * label[:, None]
    x = strengths @ world.dictionary
    x = x + XOR_NOISE * torch.randn(n, WIDTH, generator=draw) * (0.1 if kind == "sparse" else 1.0)
    if stage == "benign":
        x = x + world.frame[2]
    if kind == "nonlinear":
        signs = _coins(n, 2, draw)
        if acts:
            signs[:, 1] = signs[:, 0] * (2.0 * label - 1)
        x = x + XOR_SIZE * signs @ world.frame[:2]
    if kind == "linear":
        x = x + LOUD * torch.randn(n, N_LOUD, generator=draw) @ world.frame[:N_LOUD]
        if acts:
            x = x + QUIET_SHIFT * label[:, None] * world.frame[-1]
    return x


def _coins(n: int, k: int, draw: torch.Generator) -> Float[Tensor, "n k"]:
    return (torch.rand(n, k, generator=draw) < 0.5) * 2.0 - 1.0


def _tails(
    label: Bool[Tensor, " n"] | None, n: int, draw: torch.Generator
) -> Float[Tensor, "n coded"]:
    """Coded strengths: rare and strong, or two-valued with the same mean and variance.

    The first half of the features is rare and strong in class 1, the second half in class 0; with
    no label each is either by a coin.
    """
    rare = STRONG * (torch.rand(n, N_CODED, generator=draw) < STRONG_RATE)
    mean, sd = STRONG * STRONG_RATE, STRONG * (STRONG_RATE * (1 - STRONG_RATE)) ** 0.5
    common = mean + sd * _coins(n, N_CODED, draw)
    coins = torch.rand(n, N_CODED, generator=draw) < 0.5
    mode = coins if label is None else label[:, None].repeat(1, N_CODED)
    mode[:, N_CODED // 2 :] = ~mode[:, N_CODED // 2 :]
    return torch.where(mode, rare, common)


def _sae(world: _World) -> Sae:
    """The planted dictionary, tied, with a threshold for each latent."""
    threshold = torch.full((LATENTS,), 1.0 if world.kind == "sparse" else 2.0)
    if world.kind == "sparse":
        threshold[N_OPEN : N_OPEN + N_CODED] = 2.1
    if world.kind == "nonlinear":
        threshold[N_OPEN] = 0.6 * 2**0.5 * XOR_SIZE
    if world.kind == "linear":
        threshold[N_OPEN] = 0.5 * READS * QUIET_SHIFT
    return Sae(
        "jumprelu",
        W_enc=world.dictionary.T.contiguous(),
        W_dec=world.dictionary.clone(),
        b_dec=torch.zeros(WIDTH),
        b_enc=torch.zeros(LATENTS),
        threshold=threshold,
        metadata=SaeMetadata(hook_name=HOOK, convention="raw", source="planted"),
    )


def _labelled(world: _World) -> LabelledSet:
    rows = tuple(
        LabelledPrompt(
            prompt=(0, 1 + i),
            label=label,
            cluster_id=f"c{i // ROWS}",
            item_id=f"r{i}",
            context="eval",
            source=f"planted code {world.kind!r}, seed {world.seed}",
        )
        for i, label in enumerate(world.labels.tolist())
    )
    return LabelledSet(rows, f"planted-{world.kind}-{world.seed}")
