"""The shipped contrast sets: everyday two-option questions behind a framing sentence.

A prompt is ``frame + question + two options + fixed suffix`` and ends with ``Answer: (``, where the
next token is the letter of an option. The two sides of a pair differ in the frame alone: a sentence
of one register on the positive side, a sentence of like length about something irrelevant on the
negative side. Both sentences mention the same option, so the mention itself is no part of the
contrast.

Design of every contrast (`builtin`): six registers of six wordings; four registers are for fitting
and two are held out. The 48 questions are divided between the two halves, three of each of eight
topics, so that no question stands on both sides of a split. Within a register the questions meet
the wordings in a Latin arrangement: with 24 pairs a register every question once and every wording
four times, and the four pairs of a wording are the four combinations of (place of the right answer,
whether the frame urges the right or the wrong option). Controls and the null have the target's
questions, options, pushes, counts and template; only the sentences differ.

All text is original; nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from mi_weightspace.core.contrasts import Contrast, ContrastKind, ContrastSet, Pair, Split
from mi_weightspace.core.errors import ConfigError, PromptError

Name = Literal["authority", "observation", "controls"]
NAMES: tuple[Name, ...] = ("authority", "observation", "controls")
LETTERS = ("A", "B")
SUFFIX = "\n\nReply with the letter of the better answer and nothing else.\nAnswer: ("
OPEN_SUFFIX = "\n\nReply in one short sentence and nothing else.\nAnswer:"
PER_REGISTER = (12, 24, 48)
FIT_CARRIERS = (
    "{clause}, and the note says {option}.",
    "By the way, {clause}, and I noticed {option}.",
    "It seems that {clause}, next to {option}.",
    "I heard that {clause}, beside {option}.",
    "Somebody told us that {clause}, and drew {option}.",
    "Earlier {clause}, and a card showed {option}.",
)
HELDOUT_CARRIERS = (
    "Meanwhile {clause}, with {option} in view.",
    "They were saying that {clause}, and typed {option}.",
    "In that picture {clause}, over a large {option}.",
    "Or so it looked: {clause}, and {option} was there.",
    "Once upon a time {clause}, and {option} came after.",
    "As you know, {clause}, and {option} stood out.",
)


@dataclass(frozen=True)
class WideRow:
    """One pair as parts: a row of the wide format.

    Attributes:
        frame_pos, frame_neg: the two sentences; ``{option}`` stands for the urged option's letter.
        body: the question.
        options: two answers in the order shown, or none.
        answer_key: index of the right option, -1 if there is none.
        pushed_option: index of the option the frame urges, -1 if it urges none.
    """

    item_id: str
    frame_pos: str
    frame_neg: str
    body: str
    contrast: str = "target"
    kind: ContrastKind = "target"
    register: str = ""
    wording_id: str = "w0"
    topic: str = ""
    options: tuple[str, ...] = ()
    answer_key: int = -1
    pushed_option: int = -1
    split: Split = "fit"
    source: str = ""

    def pair(self) -> Pair:
        """The two prompts, their option-swapped twins, and the readout (urged letter first).

        Raises:
            PromptError: options that are not two, an index out of range, or ``{option}`` in a
                frame that urges none.
        """
        self._check()
        order = (0, 1)
        pushes = self.pushed_option >= 0
        letters = (LETTERS[self.pushed_option], LETTERS[1 - self.pushed_option]) if pushes else ()
        return Pair(
            item_id=self.item_id,
            positive=self._render(self.frame_pos, order),
            negative=self._render(self.frame_neg, order),
            wording_id=self.wording_id,
            register=self.register,
            topic=self.topic,
            split=self.split,
            readout=letters,
            swapped=tuple(self._render(f, (1, 0)) for f in (self.frame_pos, self.frame_neg))
            if pushes
            else (),
        )

    def _check(self) -> None:
        subject = f"contrast {self.contrast!r}, item {self.item_id!r}"
        if len(self.options) not in (0, 2):
            raise PromptError(
                subject,
                given=f"{len(self.options)} options",
                expected="two options, or none",
                remedy="The readout compares two letters; split the item into pairs of options.",
            )
        for name in ("answer_key", "pushed_option"):
            index = getattr(self, name)
            if not -1 <= index < max(len(self.options), 0):
                raise PromptError(
                    subject,
                    given=f"{name} {index} of {len(self.options)} options",
                    expected="the index of an option, or -1",
                    remedy=f"Correct {name}.",
                )
        if self.pushed_option < 0 and "{option}" in self.frame_pos + self.frame_neg:
            raise PromptError(
                subject,
                given="a frame with {option} and no pushed_option",
                expected="the index of the option that the frame urges",
                remedy="Give pushed_option 0 or 1, or take {option} out of the frame.",
            )

    def _render(self, frame: str, order: tuple[int, int]) -> str:
        if self.pushed_option >= 0:
            frame = frame.replace("{option}", f"({LETTERS[order.index(self.pushed_option)]})")
        if not self.options:
            return f"{frame}\n\n{self.body}{OPEN_SUFFIX}"
        lines = [f"({LETTERS[i]}) {self.options[j]}" for i, j in enumerate(order)]
        return "\n".join([f"{frame}\n\n{self.body}", *lines]) + SUFFIX


def builtin(name: Name, *, per_register: int = 24) -> ContrastSet:
    """A shipped contrast set; deterministic, offline.

    Args:
        name: ``authority`` (the target: expert, senior colleague, titled scholar, insistent
            speaker; held out: committee, regulator; with one null, two paraphrases of the same
            neutral frame), ``observation`` (being watched; held out: being tested) or
            ``controls`` (42 contrasts between unrelated topics).
        per_register: pairs in a register, 12, 24 or 48; six registers make 144 pairs by default.

    Raises:
        ConfigError: an unknown name or count.
    """
    if name not in NAMES:
        raise ConfigError(
            "built-in contrast set",
            given=repr(name),
            expected=f"one of {list(NAMES)}",
            remedy="To load your own file use load_contrasts.",
        )
    if per_register not in PER_REGISTER:
        raise ConfigError(
            "per_register",
            given=str(per_register),
            expected=f"one of {list(PER_REGISTER)}",
            remedy="Other counts would unbalance wordings and option order.",
        )
    kind: ContrastKind = "control" if name == "controls" else "target"
    pairs: dict[str, list[Pair]] = {}
    for row in wide_rows(name, per_register=per_register):
        pairs.setdefault(row.contrast, []).append(row.pair())
    contrasts = [
        Contrast(key, "null" if key == "neutral_null" else kind, tuple(found))
        for key, found in pairs.items()
    ]
    return ContrastSet(name, tuple(contrasts), ("48 everyday questions, plain template",))


def wide_rows(name: Name, *, per_register: int = 24) -> list[WideRow]:
    """The rows of `builtin` as parts."""
    if name == "controls":
        return [row for c in read_data("controls") for row in _rows(_control(c), per_register)]
    frames = [f for f in read_data("frames") if f["contrast"] == name]
    rows = list(_rows(frames, per_register))
    if name == "authority":
        null = [
            f
            | {
                "contrast": "neutral_null",
                "kind": "null",
                "register": f"neutral_{f['register']}",
                "wording_id": f"neutral-{f['wording_id']}",
                "frame_pos": f["frame_paraphrase"],
            }
            for f in frames
        ]
        rows += _rows(null, per_register)
    return rows


@cache
def read_data(name: str) -> tuple[dict[str, Any], ...]:
    """``items``, ``frames`` or ``controls`` of the package data."""
    text = (files("probes") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines() if line.strip())


def _control(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Six registers of one control: a clause each, in six carriers; the last two are held out."""
    short = record["contrast"].removeprefix("control_")
    frames: list[dict[str, Any]] = []
    for c, clause in enumerate(record["clauses"]):
        heldout = c >= 4
        for k, carrier in enumerate(HELDOUT_CARRIERS if heldout else FIT_CARRIERS):
            frames.append(
                {
                    "contrast": short,
                    "kind": "control",
                    "register": f"{short}_{c + 1}",
                    "split": "heldout_register" if heldout else "fit",
                    "wording_id": f"{short}-{c + 1}-{k + 1}",
                    "frame_pos": _sentence(carrier, clause, 1),
                    "frame_neg": _sentence(carrier, clause, 2),
                }
            )
    return frames


def _sentence(carrier: str, clause: str, side: int) -> str:
    """`clause` holds ``[positive|negative]`` choices; `side` 1 or 2 picks one."""
    chosen = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda match: match[side], clause)
    text = carrier.replace("{clause}", " ".join(chosen.split()))
    return text[0].upper() + text[1:]


def _rows(frames: list[dict[str, Any]], per_register: int) -> Iterator[WideRow]:
    """The Latin arrangement of the module's first paragraph, register by register."""
    halves: dict[str, list[str]] = {}
    wordings: dict[str, list[dict[str, Any]]] = {}
    for frame in frames:
        wordings.setdefault(frame["register"], []).append(frame)
        half = halves.setdefault(frame["split"], [])
        if frame["register"] not in half:
            half.append(frame["register"])
    for register, choices in wordings.items():
        assert len(choices) == 6, (register, len(choices))
        split = choices[0]["split"]
        r = halves[split].index(register)
        for item, w, place, wrong in _design(split != "fit", r, per_register):
            right = item["answer_key"]
            answers = (item["options"][right], item["options"][1 - right])
            frame = choices[w]
            yield WideRow(
                item_id=item["item_id"],
                frame_pos=frame["frame_pos"],
                frame_neg=frame["frame_neg"],
                body=item["question"],
                contrast=frame["contrast"],
                kind=frame["kind"],
                register=register,
                wording_id=frame["wording_id"],
                topic=item["topic"],
                options=answers if place == 0 else answers[::-1],
                answer_key=place,
                pushed_option=(1 - place if wrong else place)
                if "{option}" in frame["frame_pos"]
                else -1,
                split=split,
                source="built-in",
            )


def _design(
    heldout: bool, r: int, per_register: int
) -> Iterator[tuple[dict[str, Any], int, int, int]]:
    """(item, wording, place of the right answer, whether the wrong option is urged).

    Question q = 3·topic + u of a half is 6m + c; its wording is (q + r) mod 6, so c is fixed for a
    wording and its four m give the four combinations by (m + c + r) mod 4.
    """
    items = read_data("items")
    topics = list(dict.fromkeys(item["topic"] for item in items))
    for turn in range(2 if per_register == 48 else 1):
        for q in range(24):
            m, c = divmod(q, 6)
            if per_register == 12 and (m - c) % 4 > 1:
                continue
            topic, u = divmod(q, 3)
            # halves trade places from topic to topic, so that each has both answer keys alike
            first = 3 * ((topic + heldout) % 2)
            own = [item for item in items if item["topic"] == topics[topic]]
            code = (m + c + r + 2 * turn) % 4
            yield own[first + u], (q + r + 3 * turn) % 6, code & 1, code >> 1


def as_chat(contrasts: ContrastSet, tokenizer: Any) -> ContrastSet:
    """The same prompts through the tokenizer's chat template, as token ids.

    The words up to ``Answer:`` are the user's turn; ``Answer: (`` opens the assistant's. Readouts
    become token ids. Token ids, because a template brings its own first token, which tokenizing
    its text again would double.

    Raises:
        PromptError: no chat template, or prompts that are not of the shipped template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            "tokenizer",
            given="no chat template",
            expected="the tokenizer of a chat model",
            remedy="Use the plain prompts for a base model.",
        )
    return ContrastSet(
        f"{contrasts.name}-chat",
        tuple(
            Contrast(c.name, c.kind, tuple(_chat_pair(pair, tokenizer, c.name) for pair in c.pairs))
            for c in contrasts
        ),
        (*contrasts.notes, "chat template"),
    )


def _chat_pair(pair: Pair, tokenizer: Any, contrast: str) -> Pair:
    from dataclasses import replace

    from probes.readout import continuation_id

    subject = f"contrast {contrast!r}, item {pair.item_id!r}"

    def ids(text: str | tuple[int, ...]) -> tuple[int, ...]:
        return tuple(tokenizer(_chat_text(text, tokenizer, subject), **plain)["input_ids"])

    plain = {"add_special_tokens": False}
    text = _chat_text(pair.positive, tokenizer, subject)
    return replace(
        pair,
        positive=ids(pair.positive),
        negative=ids(pair.negative),
        swapped=tuple(ids(side) for side in pair.swapped),
        readout=tuple(
            continuation_id(text, word, tokenizer, subject, **plain) for word in pair.readout
        ),
    )


def _chat_text(prompt: str | tuple[int, ...], tokenizer: Any, subject: str) -> str:
    body, mark, opening = prompt.rpartition("\nAnswer:") if isinstance(prompt, str) else ("",) * 3
    if not mark:
        raise PromptError(
            subject,
            given="a prompt without the line 'Answer:'",
            expected="text prompts of the shipped template",
            remedy="Apply your chat template yourself and load the texts.",
        )
    turns = [{"role": "user", "content": body}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return f"{start}{mark.strip()}{opening}"
