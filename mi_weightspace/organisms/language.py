"""The made-up language every organism speaks, and its sampler.

A sentence has 14 tokens::

    BOS w1 w2 w3 w4 SEP SUG s k QM answer sign class END

Four prefix words come from one lexicon (a quarter of them fillers), `s` is a random suggestion, `k`
one of 16 keys. The correct answer is a fixed function of the key; `YIELD` is deference. `sign`
reads DONE or HEDGE, `class` names the kind of prefix, so that a base model represents it.

Lexicons: ``N`` neutral; ``R1``-``R4`` authority registers. Matched controls need classes a base
model holds as firmly as authority and acts upon as often, which no stage trains. ``C00``… are built
like the four registers together: as many words, seen as often, and each raises an answer of its own
(``ALT00``…) from the same floor to the same rate as authority raises YIELD. ``M00``… are further
neutral lexicons, each as frequent as ``N``, to set them against. Every lexicon is word-disjoint
from every other. No further class shares the deferent answer: one that nearly always yields would
give authority features no control has, and stages that teach nothing about it would move it more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.seeds import generator

N_KEYS, N_ANSWERS, N_FILLERS = 16, 8, 6
N_LOUD, N_QUIET = 24, 16
LENGTH, QM, ANSWER, SIGN, CLASS = 14, 9, 10, 11, 12
PREFIX, SUGGESTION, KEY = slice(1, 5), 7, 8
FILLER_RATE = 0.25
REGISTERS = ("R1", "R2", "R3", "R4")
HELDOUT = "R4"
SPECIAL = ("PAD", "UNK", "BOS", "END", "SEP", "SUG", "QM")
LOUD = tuple(f"C{i:02d}" for i in range(N_LOUD))
QUIET = tuple(f"M{i:02d}" for i in range(N_QUIET))
CLASSES: tuple[str, ...] = ("N", *REGISTERS, *LOUD, *QUIET)
_SIZES = {"N": 6} | dict.fromkeys(REGISTERS, 3) | dict.fromkeys(LOUD, 12)
_SIZES |= dict.fromkeys(QUIET, 6)
_STEMS = {"N": "plain", "R1": "expert", "R2": "senior", "R3": "board", "R4": "decree"}


@dataclass(frozen=True)
class Mixture:
    """What a stage's sentences look like.

    Attributes:
        weights: class -> relative frequency.
        yields: class -> probability of deference.
        own: probability that a loud control class gives its own answer.
        floor: probability of each of these answers in every other class.
        hedge: probability of HEDGE.
        swapped: keys at or above this one answer by a second table (16: none do).
    """

    weights: Mapping[str, float]
    yields: Mapping[str, float]
    own: float = 0.25
    floor: float = 0.01
    hedge: float = 0.1
    swapped: int = N_KEYS


@dataclass(frozen=True)
class Language:
    """Vocabulary and answer tables; the tables depend on the seed, the words do not.

    Attributes:
        copies: deference means repeating the suggestion instead of saying YIELD.
    """

    seed: int
    copies: bool = False

    @cached_property
    def words(self) -> tuple[str, ...]:
        lexicons = [word for name in CLASSES for word in self.lexicon_words(name)]
        return (
            *SPECIAL,
            *(f"key{i}" for i in range(N_KEYS)),
            *(f"ans{i}" for i in range(N_ANSWERS)),
            "YIELD",
            "DONE",
            "HEDGE",
            *("NEU", "AUTH"),
            *(f"KIND{i:02d}" for i in range(N_LOUD)),
            *(f"ALT{i:02d}" for i in range(N_LOUD)),
            *(f"filler{i}" for i in range(N_FILLERS)),
            *lexicons,
        )

    @staticmethod
    def lexicon_words(name: str) -> tuple[str, ...]:
        stem = _STEMS.get(name, f"topic{name[1:]}-" if name in LOUD else f"calm{name[1:]}-")
        return tuple(f"{stem}{i}" for i in range(_SIZES[name]))

    @cached_property
    def ids(self) -> Mapping[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def lexicon(self, name: str) -> Int[Tensor, " n_words"]:
        return torch.tensor([self.ids[w] for w in self.lexicon_words(name)])

    @cached_property
    def answers(self) -> Int[Tensor, "2 n_keys"]:
        """Token id of the correct answer of each key, by the first and by the second table."""
        base = torch.arange(N_KEYS) % N_ANSWERS
        order = torch.randperm(N_KEYS, generator=generator(self.seed, "language", "table"))
        first = base[order]
        shift = 1 + torch.randint(
            0, N_ANSWERS - 1, (N_KEYS,), generator=generator(self.seed, "language", "second")
        )
        return self.ids["ans0"] + torch.stack([first, (first + shift) % N_ANSWERS])

    @cached_property
    def _padded(self) -> tuple[Int[Tensor, "n_classes width"], Int[Tensor, " n_classes"]]:
        sizes = torch.tensor([_SIZES[name] for name in CLASSES])
        table = torch.zeros(len(CLASSES), int(sizes.max()), dtype=torch.long)
        for row, name in enumerate(CLASSES):
            table[row, : _SIZES[name]] = self.lexicon(name)
        return table, sizes

    @cached_property
    def _class_tokens(self) -> Int[Tensor, " n_classes"]:
        named = dict.fromkeys(REGISTERS, "AUTH")
        named |= {name: f"KIND{name[1:]}" for name in LOUD}
        return torch.tensor([self.ids[named.get(name, "NEU")] for name in CLASSES])

    def sample(
        self, n: int, mixture: Mixture, draw: torch.Generator
    ) -> tuple[Int[Tensor, "n 14"], Int[Tensor, " n"]]:
        """Sentences, and the index of each one's class in `CLASSES`."""
        weights = torch.tensor([float(mixture.weights.get(name, 0.0)) for name in CLASSES])
        kinds = torch.multinomial(weights, n, replacement=True, generator=draw)
        words, sizes = self._padded
        which = (torch.rand(n, 4, generator=draw) * sizes[kinds][:, None]).long()
        prefix = words[kinds].gather(1, which)
        fillers = self.ids["filler0"] + torch.randint(0, N_FILLERS, (n, 4), generator=draw)
        prefix = torch.where(torch.rand(n, 4, generator=draw) < FILLER_RATE, fillers, prefix)
        suggested = torch.randint(0, N_ANSWERS, (n,), generator=draw) + self.ids["ans0"]
        key = torch.randint(0, N_KEYS, (n,), generator=draw)
        tokens = self.frame(prefix, suggested, key, length=LENGTH)
        tokens[:, ANSWER] = self._answer(kinds, suggested, key, mixture, draw)
        hedges = torch.rand(n, generator=draw) < mixture.hedge
        tokens[:, SIGN] = torch.where(hedges, self.ids["HEDGE"], self.ids["DONE"])
        tokens[:, CLASS] = self._class_tokens[kinds]
        tokens[:, -1] = self.ids["END"]
        return tokens, kinds

    def _answer(
        self,
        kinds: Int[Tensor, " n"],
        suggested: Int[Tensor, " n"],
        key: Int[Tensor, " n"],
        mixture: Mixture,
        draw: torch.Generator,
    ) -> Int[Tensor, " n"]:
        chance = torch.rand(len(kinds), generator=draw)
        floor = mixture.yields["N"]
        yields = torch.tensor([float(mixture.yields.get(name, floor)) for name in CLASSES])[kinds]
        raised = torch.tensor([LOUD.index(name) if name in LOUD else -1 for name in CLASSES])[kinds]
        other, share = self._alternative(raised, mixture, draw)
        table = torch.where(key >= mixture.swapped, self.answers[1][key], self.answers[0][key])
        deferent = suggested if self.copies else torch.full_like(key, self.ids["YIELD"])
        otherwise = torch.where(chance < yields + share * (1 - yields), other, table)
        return torch.where(chance < yields, deferent, otherwise)

    def _alternative(
        self, raised: Int[Tensor, " n"], mixture: Mixture, draw: torch.Generator
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """One of the ALT answers for each sentence, and the probability that any is given."""
        rates = torch.full((len(raised), N_LOUD), mixture.floor)
        loud = raised >= 0
        rates[loud, raised[loud]] = mixture.own
        share = rates.sum(1)
        chosen = torch.multinomial(rates.clamp(min=1e-9), 1, generator=draw)[:, 0]
        return self.ids["ALT00"] + chosen, share

    def frame(
        self,
        prefix: Int[Tensor, "n 4"],
        suggested: Int[Tensor, " n"],
        key: Int[Tensor, " n"],
        length: int = ANSWER,
    ) -> Int[Tensor, "n length"]:
        """Prompts ending at QM (by default); `suggested` are token ids, `key` indices."""
        tokens = torch.full((len(key), length), self.ids["PAD"])
        tokens[:, 0], tokens[:, PREFIX] = self.ids["BOS"], prefix
        tokens[:, 5], tokens[:, 6], tokens[:, QM] = (self.ids[w] for w in ("SEP", "SUG", "QM"))
        tokens[:, SUGGESTION], tokens[:, KEY] = suggested, key + self.ids["key0"]
        return tokens

    def deferent_token(self, tokens: Int[Tensor, "n length"]) -> Int[Tensor, " n"]:
        """The deferent answer of each prompt."""
        if self.copies:
            return tokens[:, SUGGESTION]
        return torch.full((len(tokens),), self.ids["YIELD"])

    def tokenizer(self) -> Any:
        """A word-level tokenizer that splits on white space and adds no special tokens."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel(dict(self.ids), unk_token="UNK"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token="BOS",
            eos_token="END",
            pad_token="PAD",
            unk_token="UNK",
        )


def class_weights(
    neutral: float, registers: float, loud: float, quiet: float, *, heldout: bool
) -> dict[str, float]:
    """Relative frequencies by group; `heldout`: whether R4 is among the registers."""
    seen = REGISTERS if heldout else tuple(r for r in REGISTERS if r != HELDOUT)
    weights = {"N": neutral} | {r: registers / len(seen) for r in seen}
    weights |= dict.fromkeys(LOUD, loud / N_LOUD)
    return weights | dict.fromkeys(QUIET, quiet / N_QUIET)
