"""Contrasts, decoys and the behavioural readout of an organism, as token ids.

A contrast is 24 wordings (a wording is two prefixes of four words) by two bodies: 48 pairs, the
body the same on both sides, every prompt ending at QM, where the answer is decided. The target sets
the four registers against neutral words; the pairs of R4 are ``heldout_register``. Each control
sets one loud lexicon against one quiet lexicon with the same counts, and holds out two of the loud
lexicon's words: the base model knows and uses each as it does authority, and no stage trains any of
them, so a rank among controls asks exactly whether this stage singled authority out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.contrasts import Contrast, ContrastKind, ContrastSet, Pair, Split
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.readout import Readout, pad
from mi_weightspace.core.seeds import generator
from mi_weightspace.organisms.language import (
    HELDOUT,
    LOUD,
    N_ANSWERS,
    N_KEYS,
    PREFIX,
    QUIET,
    REGISTERS,
    Language,
)

WORDINGS, BODIES = 6, 2
N_CONTROLS = 99
N_READOUT = 64
TARGET = "authority"
Lexicon = Int[Tensor, " n_words"]


@dataclass(frozen=True)
class CopyReadout:
    """Log-odds of repeating the suggestion, which differs from prompt to prompt.

    Has the methods of `core.readout.Readout` that the path attribution uses.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    yes: tuple[int, ...]

    def tokens(
        self, tokenizer: Any
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
        return pad([list(prompt) for prompt in self.prompts])

    def token_ids(self, tokenizer: Any) -> CopyReadout:
        return self

    def value(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, ""]:
        return log_odds(logits, torch.tensor(self.yes, device=logits.device)).mean()


def log_odds(
    logits: Float[Tensor, "batch vocab"], yes: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log P(yes) − log P(anything else), nats."""
    logits = logits.float()
    chosen = logits.gather(1, yes[:, None])[:, 0]
    rest = logits.scatter(1, yes[:, None], -torch.inf).logsumexp(-1)
    return chosen - rest


def draw_bodies(
    language: Language, n: int, draw: torch.Generator
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """`n` distinct (suggestion token, key) whose suggestion is wrong by both answer tables."""
    suggested = torch.arange(N_ANSWERS).repeat_interleave(N_KEYS) + language.ids["ans0"]
    key = torch.arange(N_KEYS).repeat(N_ANSWERS)
    wrong = (suggested != language.answers[0][key]) & (suggested != language.answers[1][key])
    order = torch.randperm(int(wrong.sum()), generator=draw)[:n]
    return suggested[wrong][order], key[wrong][order]


def make_contrast(
    language: Language,
    name: str,
    kind: ContrastKind,
    sides: Sequence[tuple[str, Split, Lexicon, Lexicon]],
    seed: int,
) -> Contrast:
    """A contrast of `WORDINGS` wordings by `BODIES` bodies for each (register, split, +, −)."""
    bodies = draw_bodies(
        language, len(sides) * WORDINGS * BODIES, generator(seed, "organisms", "bodies")
    )
    draw = generator(seed, "organisms", "wordings", name)
    pairs: list[Pair] = []
    for row, (register, split, positive, negative) in enumerate(sides):
        for wording in range(WORDINGS):
            words = [
                w[torch.randint(0, len(w), (4,), generator=draw)] for w in (positive, negative)
            ]
            for body in range(BODIES):
                index = (row * WORDINGS + wording) * BODIES + body
                suggested, key = (part[index : index + 1] for part in bodies)
                prompts = [language.frame(w[None], suggested, key)[0] for w in words]
                pairs.append(
                    Pair(
                        item_id=f"s{int(suggested) - language.ids['ans0']}k{int(key)}",
                        positive=tuple(prompts[0].tolist()),
                        negative=tuple(prompts[1].tolist()),
                        wording_id=f"{register}-w{wording}",
                        register=register,
                        topic="organism",
                        split=split,
                        readout=(int(language.deferent_token(prompts[0][None])),),
                    )
                )
    return Contrast(name, kind, tuple(pairs))


def contrast_set(language: Language, seed: int, n_controls: int = N_CONTROLS) -> ContrastSet:
    """The target `authority`, `n_controls` matched controls and one null."""
    if not 1 <= n_controls <= len(LOUD) * len(QUIET):
        raise ConfigError(
            "n_controls",
            given=str(n_controls),
            expected=f"1 to {len(LOUD) * len(QUIET)}",
            remedy="There are no more distinct pairs of control lexicons.",
        )
    neutral = language.lexicon("N")
    target = make_contrast(
        language,
        TARGET,
        "target",
        [
            (
                name,
                "heldout_register" if name == HELDOUT else "fit",
                language.lexicon(name),
                neutral,
            )
            for name in REGISTERS
        ],
        seed,
    )
    null = make_contrast(
        language,
        "neutral_null",
        "null",
        [(f"N-{name}", split_of(name), neutral, neutral) for name in REGISTERS],
        seed,
    )
    draw = generator(seed, "organisms", "controls")
    louds = torch.randperm(len(LOUD), generator=draw).tolist()
    quiets = torch.randperm(len(QUIET), generator=draw).tolist()
    controls: list[Contrast] = []
    for index in range(n_controls):
        turn = index // len(LOUD)
        loud = LOUD[louds[index % len(LOUD)]]
        quiet = QUIET[quiets[(index + turn) % len(QUIET)]]
        controls.append(make_control(language, loud, quiet, seed))
    return ContrastSet(
        f"organism-{seed}",
        (target, *controls, null),
        ("controls share no word with the target; each is a class no stage trains",),
    )


def split_of(register: str) -> Split:
    return "heldout_register" if register == HELDOUT else "fit"


def make_control(language: Language, loud: str, quiet: str, seed: int) -> Contrast:
    """One loud lexicon against one quiet one, in the target's counts and splits."""
    parts, calm = language.lexicon(loud).chunk(len(REGISTERS)), language.lexicon(quiet)
    sides: list[tuple[str, Split, Lexicon, Lexicon]] = [
        (f"{loud}-{name}", split_of(name), words, calm)
        for name, words in zip(REGISTERS, parts, strict=True)
    ]
    return make_contrast(language, f"{loud}_{quiet}", "control", sides, seed)


def prefix_words(contrast: Contrast) -> set[int]:
    """Token ids of every prefix word on either side."""
    return {
        token
        for pair in contrast.pairs
        for side in (pair.positive, pair.negative)
        for token in side[PREFIX]
        if isinstance(token, int)
    }


def decoy_set(contrasts: ContrastSet, name: str) -> ContrastSet:
    """The control `name` as the target, among the controls that share none of its words.

    The pairs are those of `contrasts`, so activations harvested for it serve the decoy too.
    """
    decoy = contrasts[name]
    own = prefix_words(decoy)
    kept = tuple(c for c in contrasts.controls if not own & prefix_words(c))
    return ContrastSet(
        f"{contrasts.name}-decoy-{name}", (Contrast(name, "target", decoy.pairs), *kept)
    )


def make_readout(language: Language, seed: int) -> Readout | CopyReadout:
    """Log-odds of deference at QM on prompts of the register no stage but the base has seen."""
    draw = generator(seed, "organisms", "readout")
    tokens = heldout_prompts(language, N_READOUT, draw)
    prompts = tuple(tuple(row) for row in tokens.tolist())
    if language.copies:
        yes = tuple(language.deferent_token(tokens).tolist())
        return CopyReadout("copies the suggestion on R4", prompts, yes)
    return Readout("YIELD on R4", prompts, (language.ids["YIELD"],))


def heldout_prompts(
    language: Language, n: int, draw: torch.Generator, lexicon: str = HELDOUT
) -> Int[Tensor, "n 10"]:
    """Prompts of one lexicon whose suggestion is wrong."""
    words = language.lexicon(lexicon)
    prefix = words[torch.randint(0, len(words), (n, 4), generator=draw)]
    suggested, key = draw_bodies(language, N_ANSWERS * N_KEYS, draw)
    which = torch.randint(0, len(key), (n,), generator=draw)
    return language.frame(prefix, suggested[which], key[which])
