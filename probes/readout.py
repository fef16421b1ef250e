"""The behavioural readout of two-option prompts: does the frame change the chosen option?

A frame *flips* an item when the model chooses the urged option with the frame and the other one
with the neutral partner, in both option orders (so that a preference for a letter cannot count).
The reverse, choosing the urged option without the frame and the other one with it, is counted as
``backfire``: without an effect of the frame the two are equally likely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.readout import encode, pad
from mi_weightspace.core.report import Report
from mi_weightspace.core.stats import binomial_interval
from mi_weightspace.models.lens import Lens
from mi_weightspace.models.load import load

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Prompt = str | tuple[int, ...]
Side = Literal["positive", "negative", "difference"]
MAX_LOGITS = 2**26
"""Logits of one forward pass, in numbers: 256 MiB of float32."""


def continuation_id(
    prompt: Prompt, word: str | int, tokenizer: Any, subject: str, **options: Any
) -> int:
    """The token that continues `prompt` with `word`, or with a space and `word`.

    Looked up in its context: a tokenizer may give the letter alone another id.

    Args:
        options: of the tokenizer's call.

    Raises:
        PromptError: no such single token.
    """
    if isinstance(word, int):
        return word
    if isinstance(prompt, str) and tokenizer is not None:
        start = list(tokenizer(prompt, **options)["input_ids"])
        for spelled in (word, f" {word}"):
            full = list(tokenizer(prompt + spelled, **options)["input_ids"])
            if len(full) == len(start) + 1 and full[:-1] == start:
                return int(full[-1])
    raise PromptError(
        subject,
        given=f"{word!r} after {'a text prompt' if isinstance(prompt, str) else 'token ids'}",
        expected="a continuation that is one further token",
        remedy="Choose another spelling, or give the readout as token ids.",
    )


@dataclass(frozen=True)
class _Choice:
    """A prompt, the two continuations compared, and the sign it enters a mean with."""

    prompt: Prompt
    pushed: str | int
    other: str | int
    subject: str
    sign: float = 1.0

    def ids(self, tokenizer: Any) -> tuple[int, int]:
        """Raises PromptError where the two continuations are one token."""
        found = tuple(
            continuation_id(self.prompt, word, tokenizer, self.subject)
            for word in (self.pushed, self.other)
        )
        if found[0] == found[1]:
            raise PromptError(
                self.subject,
                given=f"token {found[0]} for both {self.pushed!r} and {self.other!r}",
                expected="two continuations that this tokenizer tells apart",
                remedy="Choose other letters, or give the readout as token ids.",
            )
        return found[0], found[1]


def _choices(contrast: Contrast, pair: Pair) -> list[_Choice]:
    """Frame and neutral; then both with options swapped, where the pair has them."""
    subject = f"contrast {contrast.name!r}, item {pair.item_id!r}"
    if len(pair.readout) != 2:
        raise PromptError(
            subject,
            given=f"a readout of {len(pair.readout)} continuations",
            expected="two: the one the frame urges first",
            remedy="Use a contrast whose frames urge an option, such as 'authority'.",
        )
    pushed, other = pair.readout
    found = [_Choice(side, pushed, other, subject) for side in (pair.positive, pair.negative)]
    return found + [_Choice(side, other, pushed, subject) for side in pair.swapped]


@dataclass(frozen=True)
class OptionMargin:
    """Mean log-odds, nats, of the urged option against the other one, over many prompts.

    Has the methods of `core.readout.Readout`; the two continuations differ from prompt to prompt.

    Attributes:
        yes, no: continuation of each prompt, as words or (after `token_ids`) ids.
        signs: +1, or -1 for the prompts that are subtracted.
    """

    name: str
    prompts: tuple[Prompt, ...]
    yes: tuple[str | int, ...]
    no: tuple[str | int, ...]
    signs: tuple[float, ...]

    def tokens(
        self, tokenizer: Any
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
        """Right-padded ids, attention mask, and the index of each prompt's last token."""
        return pad([encode(prompt, tokenizer, self.name) for prompt in self.prompts])

    def token_ids(self, tokenizer: Any) -> OptionMargin:
        """The same readout with `yes` and `no` as ids."""
        rows = zip(self.prompts, self.yes, self.no, strict=True)
        ids = [_Choice(*row, f"readout {self.name!r}").ids(tokenizer) for row in rows]
        yes, no = zip(*ids, strict=True)
        return OptionMargin(self.name, self.prompts, yes, no, self.signs)

    def value(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, ""]:
        """Differentiable; ``difference`` is the mean over pairs of frame minus neutral."""
        logits = logits.float()
        rows = torch.arange(len(self.yes), device=logits.device)
        yes, no = (torch.tensor(side, device=logits.device) for side in (self.yes, self.no))
        signs = torch.tensor(self.signs, device=logits.device)
        margins = logits[rows, yes] - logits[rows, no]
        return (signs * margins).sum() / (signs > 0).sum()


def option_margin(
    contrasts: Contrast | ContrastSet, *, side: Side = "positive", name: str | None = None
) -> OptionMargin:
    """The urged option's log-odds as a behavioural readout, both option orders averaged.

    Args:
        contrasts: a contrast, or a set, of which the targets are used.
        side: prompts with the frame (``positive``), without (``negative``), or the ``difference``.

    Raises:
        PromptError: pairs without a readout.
    """
    chosen = contrasts.targets if isinstance(contrasts, ContrastSet) else (contrasts,)
    wanted = {"positive": (1.0, None), "negative": (None, 1.0), "difference": (1.0, -1.0)}[side]
    rows = [
        (choice, sign)
        for contrast in chosen
        for pair in contrast.pairs
        for i, choice in enumerate(_choices(contrast, pair))
        if (sign := wanted[i % 2]) is not None
    ]
    if not rows:
        raise PromptError(
            f"contrast set {contrasts.name!r}",
            given="no target",
            expected="a contrast of kind 'target'",
            remedy="Pass the contrast itself.",
        )
    return OptionMargin(
        name or f"urged option, {side}, {contrasts.name}",
        tuple(choice.prompt for choice, _ in rows),
        tuple(choice.pushed for choice, _ in rows),
        tuple(choice.other for choice, _ in rows),
        tuple(sign for _, sign in rows),
    )


@dataclass(frozen=True, eq=False, repr=False)
class FlipReport(Report):
    """Flip rates by contrast and register; register ``all`` is the contrast as a whole.

    `table` columns: ``contrast, kind, register, split, n`` (pairs), ``flips, rate, low, high``
    (share of all pairs, 95 % Clopper-Pearson interval), ``eligible`` (the other option is chosen
    without the frame, in both orders), ``rate_eligible, low_eligible, high_eligible`` (flips among
    these), ``backfire`` (reverse flips), ``rate_one_order`` (flips in the order given, not
    confirmed), ``same_letter`` (share of pairs whose neutral prompts get one letter in both
    orders), ``margin_frame, margin_neutral`` (mean log-odds of the urged option, nats).
    ``tables["pairs"]`` has the four margins of every pair.
    """

    kind: ClassVar[str] = "flip_rate"

    def plot(self) -> go.Figure:
        """Rate and interval of every register."""
        import plotly.graph_objects as go

        from mi_weightspace.core.figure_style import PALETTE, axis, blank, label

        table = self.table
        names = [
            label(f"{c} · {r}") for c, r in zip(table["contrast"], table["register"], strict=True)
        ]
        figure = blank(
            "Flips to the urged option, both option orders", height=160 + 24 * len(names)
        )
        figure.add_trace(
            go.Scatter(
                x=table["rate"],
                y=names,
                mode="markers",
                marker={"color": PALETTE[1], "size": 9, "symbol": "diamond"},
                error_x={
                    "array": table["high"] - table["rate"],
                    "arrayminus": table["rate"] - table["low"],
                },
                name="rate, 95 % interval",
            )
        )
        figure.update_xaxes(title_text=axis("flip rate", "share of pairs"), range=[-0.02, 1.02])
        figure.update_yaxes(title_text=axis("contrast and register", "name"), autorange="reversed")
        return figure


def flip_rate(
    model: Any,
    contrasts: Contrast | ContrastSet,
    *,
    tokenizer: Any = None,
    stage: str = "",
    progress: bool = True,
) -> FlipReport:
    """How often a frame makes the model choose the option it urges, confirmed in both orders.

    Args:
        model: a Lens or anything `mi_weightspace.load` takes.
        contrasts: a contrast, or a set; contrasts without a readout are left out and named.

    Raises:
        PromptError: no contrast with a readout and swapped prompts, text without a tokenizer, or
            options that are not one token.
    """
    import time

    import pandas as pd

    started = time.perf_counter()
    lens = load(model, tokenizer=tokenizer)
    every = tuple(contrasts) if isinstance(contrasts, ContrastSet) else (contrasts,)
    chosen = [c for c in every if all(pair.readout for pair in c.pairs)]
    left_out = [c.name for c in every if c not in chosen]
    choices: list[_Choice] = []
    for contrast in chosen or every[:1]:
        for pair in contrast.pairs:
            found = _choices(contrast, pair)
            if len(found) != 4:
                raise PromptError(
                    f"contrast {contrast.name!r}, item {pair.item_id!r}",
                    given="no option-swapped prompts",
                    expected="`swapped`: both prompts with the options in the other order",
                    remedy="Load the wide form with two options, which makes them.",
                )
            choices += found
    margins = _margins(lens, choices, tokenizer or lens.tokenizer, progress).reshape(-1, 4)
    pairs = _pair_table(chosen, margins)
    rows = [_rates(group) for group in _groups(pairs)]
    source = ContrastSet(contrasts.name, tuple(chosen))
    reservations = [f"no readout, left out: {', '.join(left_out)}"] if left_out else []
    if any(len({p.item_id for p in c.pairs}) < len(c) for c in chosen):
        reservations.append("questions repeat among pairs; intervals take each pair as one draw")
    return FlipReport(
        table=pd.DataFrame(rows),
        tables={"pairs": pairs},
        config={"command": "flip_rate", "contrasts": source.name, "stage": stage},
        inputs={"model": lens.fingerprint, "contrasts": source.hash},
        reservations=tuple(reservations),
        timings={"flip_rate": time.perf_counter() - started},
    )


def _margins(
    lens: Lens, choices: Sequence[_Choice], tokenizer: Any, progress: bool
) -> Float[Tensor, " n"]:
    """Log-odds of the pushed continuation against the other at the last token, nats."""
    from rich.progress import track

    options = torch.tensor([choice.ids(tokenizer) for choice in choices])
    where: dict[tuple[int, ...], list[int]] = {}
    for i, choice in enumerate(choices):
        ids = tuple(encode(choice.prompt, tokenizer, choice.subject))
        where.setdefault(ids, []).append(i)
    margins = torch.empty(len(choices))
    prompts = sorted(where, key=len, reverse=True)
    batch = max(1, MAX_LOGITS // (len(prompts[0]) * lens.shape.vocab_size))
    starts = range(0, len(prompts), batch)
    for start in track(starts, "choices", disable=not progress, transient=True):
        part = prompts[start : start + batch]
        tokens, mask, last = pad([list(ids) for ids in part])
        logits = lens.run(tokens, attention_mask=mask).logits
        assert logits is not None
        final = logits[torch.arange(len(part)), last.to(logits.device)].float().cpu()
        for row, ids in zip(final, part, strict=True):
            for i in where[ids]:
                margins[i] = row[options[i, 0]] - row[options[i, 1]]
    return margins


def _pair_table(chosen: Sequence[Contrast], margins: Float[Tensor, "n 4"]) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(
        [
            (c.name, c.kind, p.register, p.split, p.item_id, p.wording_id)
            for c in chosen
            for p in c.pairs
        ],
        columns=pd.Index(["contrast", "kind", "register", "split", "item_id", "wording_id"]),
    )
    names = ("frame", "neutral", "frame_swapped", "neutral_swapped")
    for i, name in enumerate(names):
        frame[f"margin_{name}"] = margins[:, i].double().numpy()
    framed, neutral = margins[:, [0, 2]], margins[:, [1, 3]]
    frame["eligible"] = (neutral < 0).all(1).numpy()
    frame["flip"] = ((framed > 0) & (neutral < 0)).all(1).numpy()
    frame["backfire"] = ((framed < 0) & (neutral > 0)).all(1).numpy()
    frame["flip_one_order"] = ((framed > 0) & (neutral < 0))[:, 0].numpy()
    # one letter in both orders: the urged option in one of them only
    frame["same_letter"] = (neutral[:, 0] * neutral[:, 1] < 0).numpy()
    return frame


def _groups(pairs: Any) -> Iterator[tuple[str, str, Any]]:
    for _, contrast in pairs.groupby("contrast", sort=False):
        yield "all", "all", contrast
        if contrast["register"].nunique() > 1:
            for register, part in contrast.groupby("register", sort=False):
                splits = part["split"].unique()
                yield str(register), str(splits[0]) if len(splits) == 1 else "mixed", part


def _rates(group: tuple[str, str, Any]) -> dict[str, Any]:
    register, split, part = group
    n, flips, eligible = len(part), int(part["flip"].sum()), int(part["eligible"].sum())
    low, high = binomial_interval(flips, n)
    among = binomial_interval(flips, eligible) if eligible else (0.0, 1.0)
    margins = part[["margin_frame", "margin_neutral"]].to_numpy()
    swapped = part[["margin_frame_swapped", "margin_neutral_swapped"]].to_numpy()
    frame, neutral = ((margins + swapped) / 2).mean(0)
    return {
        "contrast": part["contrast"].iloc[0],
        "kind": part["kind"].iloc[0],
        "register": register,
        "split": split,
        "n": n,
        "flips": flips,
        "rate": flips / n,
        "low": low,
        "high": high,
        "eligible": eligible,
        "rate_eligible": flips / eligible if eligible else float("nan"),
        "low_eligible": among[0],
        "high_eligible": among[1],
        "backfire": int(part["backfire"].sum()),
        "rate_one_order": float(part["flip_one_order"].mean()),
        "same_letter": float(part["same_letter"].mean()),
        "margin_frame": float(frame),
        "margin_neutral": float(neutral),
    }
