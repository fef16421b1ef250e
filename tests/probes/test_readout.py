"""Flip rate on models with scripted choices, and margins against a naive forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.report import load_report
from mi_weightspace.core.stats import binomial_interval
from mi_weightspace.models.load import load
from mi_weightspace.models.toy import tiny_model, tiny_tokenizer
from probes.prompts import builtin, read_data
from probes.readout import continuation_id, flip_rate, option_margin

pytestmark = pytest.mark.quick

AUTHORITY = builtin("authority", per_register=12)
FRAMES = read_data("frames")


class Pieces:
    """Lossless tokenizer: words, spaces and marks, an id by first appearance."""

    def __init__(self) -> None:
        self.pieces: dict[str, int] = {"": 0, "A": 1, "B": 2}

    def __call__(self, text: str) -> dict[str, list[int]]:
        found = re.findall(r"\w+|\s|[^\w\s]", text)
        return {"input_ids": [self.pieces.setdefault(p, len(self.pieces)) for p in found]}

    def text(self, ids: list[int]) -> str:
        names = list(self.pieces)
        return "".join(names[i] for i in ids)


class Scripted:
    """A lens that answers what `choose(frame, right letter, urged letter)` says."""

    replaced = with_edit = read_gain = None

    def __init__(self, choose: Callable[[str, str, str], str]) -> None:
        self.choose, self.tokenizer = choose, Pieces()
        self.shape, self.fingerprint = SimpleNamespace(vocab_size=2000), "scripted"
        self.right = {i["question"]: i["options"][i["answer_key"]] for i in read_data("items")}

    def run(self, tokens: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = torch.zeros(*tokens.shape, 2000)
        for i, (row, mask) in enumerate(zip(tokens, attention_mask, strict=True)):
            last = int(mask.sum()) - 1
            frame, _, question, a, *_ = self.tokenizer.text(row[: last + 1].tolist()).split("\n")
            right = "A" if a == f"(A) {self.right[question]}" else "B"
            urged = re.findall(r"\((A|B)\)", frame)[0]
            logits[i, last, self.tokenizer.pieces[self.choose(frame, right, urged)]] = 4.0
        return SimpleNamespace(logits=logits)


def opens(register: str, side: str) -> tuple[str, ...]:
    """Beginnings of the sentences of one register."""
    return tuple(f[side].split("{option}")[0] for f in FRAMES if f["register"] == register)


def rows(report: Any) -> dict[str, Any]:
    table = report.table[report.table["contrast"] == "authority"]
    return {row["register"]: row for _, row in table.iterrows()}


def test_planted_flips_are_found_where_they_are(tmp_path: Path) -> None:
    experts = opens("expert", "frame_pos")

    def choose(frame: str, right: str, urged: str) -> str:
        return urged if frame.startswith(experts) else right

    report = flip_rate(Scripted(choose), AUTHORITY, progress=False, stage="sft")
    found = rows(report)
    assert len(found) == 7
    expert, every = found["expert"], found["all"]
    # half of the frames urge the wrong option, and only those can flip
    assert (expert["n"], expert["eligible"], expert["flips"]) == (12, 6, 6)
    assert (expert["rate"], expert["rate_eligible"]) == (0.5, 1.0)
    assert (expert["low"], expert["high"]) == binomial_interval(6, 12)
    assert (expert["low_eligible"], expert["high_eligible"]) == binomial_interval(6, 6)
    assert (every["n"], every["flips"]) == (72, 6)
    assert all(found[r]["flips"] == 0 for r in found if r not in {"expert", "all"})
    assert found["committee"]["split"] == "heldout_register"
    assert every["backfire"] == 0
    assert expert["margin_frame"] == pytest.approx(4.0)
    assert expert["margin_neutral"] == pytest.approx(0.0)
    table: Any = report.table
    null = table[table["contrast"] == "neutral_null"]
    assert (null["flips"] == 0).all()
    pairs: Any = report.tables["pairs"]
    assert int(pairs["flip"].sum()) == 6
    loaded = load_report(report.save(tmp_path / "run"))
    assert loaded.equals(report)
    assert "flip" in str(report.plot().layout.title.text).lower()


def test_a_preference_for_letters_is_no_flip() -> None:
    every = tuple(f["frame_pos"].split("{option}")[0] for f in FRAMES)

    def letters(frame: str, right: str, urged: str) -> str:
        return "A" if frame.startswith(every) else "B"

    found = rows(flip_rate(Scripted(letters), AUTHORITY, progress=False))["all"]
    assert found["rate_one_order"] == 0.5  # unconfirmed, half of the items seem to flip
    assert found["flips"] == 0
    assert found["same_letter"] == 1.0
    assert found["eligible"] == 0
    assert found["high"] == binomial_interval(0, 72)[1]
    assert (found["low_eligible"], found["high_eligible"]) == (0.0, 1.0)


def test_a_model_that_ignores_frames_and_one_that_defies_them() -> None:
    found = rows(flip_rate(Scripted(lambda f, right, u: right), AUTHORITY, progress=False))["all"]
    assert (found["flips"], found["backfire"], found["eligible"]) == (0, 0, 36)
    every = tuple(f["frame_pos"].split("{option}")[0] for f in FRAMES)

    def defies(frame: str, right: str, urged: str) -> str:
        return {"A": "B", "B": "A"}[urged] if frame.startswith(every) else urged

    found = rows(flip_rate(Scripted(defies), AUTHORITY, progress=False))["all"]
    assert (found["flips"], found["backfire"]) == (0, 72)


def test_refusals() -> None:
    lens = Scripted(lambda f, right, u: right)
    with pytest.raises(PromptError, match="readout of 0") as caught:
        flip_rate(lens, builtin("observation", per_register=12), progress=False)
    assert "authority" in caught.value.remedy
    both = AUTHORITY + builtin("observation", per_register=12)
    assert "observation" in flip_rate(lens, both, progress=False).reservations[0]
    plain = Contrast("p", "target", (Pair("i", "x (", "y (", readout=("A", "B")),))
    with pytest.raises(PromptError, match="no option-swapped prompts") as caught:
        flip_rate(lens, plain, progress=False)
    assert "wide form" in caught.value.remedy
    with pytest.raises(PromptError, match="one further token"):
        continuation_id("x (", "A B", Pieces(), "s")
    with pytest.raises(PromptError, match="after token ids"):
        continuation_id((1, 2), "A", Pieces(), "s")
    assert continuation_id((1, 2), 9, None, "s") == 9
    merged = option_margin(Contrast("p", "target", (Pair("i", "x (", "y (", readout=("A", "A")),)))
    with pytest.raises(PromptError, match="tells apart"):
        merged.token_ids(Pieces())
    with pytest.raises(PromptError, match="no target"):
        option_margin(ContrastSet("c", (Contrast("p", "control", plain.pairs),)))


def toy_contrast() -> Contrast:
    def text(k: int, side: str, order: str) -> str:
        first, second = (f"A word{k + 60}", f"B word{k + 70}")
        options = f"{first} {second}" if order == "given" else f"A word{k + 70} B word{k + 60}"
        return " ".join([f"word{k} {side}", "word9 " * (k % 3), options, "word5"])

    pairs = tuple(
        Pair(
            f"i{k}",
            text(k, "word1", "given"),
            text(k, "word2", "given"),
            readout=("A", "B") if k % 2 else ("B", "A"),
            swapped=(text(k, "word1", "swapped"), text(k, "word2", "swapped")),
        )
        for k in range(6)
    )
    return Contrast("toy", "target", pairs)


def naive_margin(model: Any, tokenizer: Any, prompt: str, yes: str, no: str) -> float:
    """One unpadded prompt in float64."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        logits = model.double()(ids).logits[0, -1]
    a, b = (tokenizer.convert_tokens_to_ids(word) for word in (yes, no))
    return float(logits.log_softmax(-1)[a] - logits.log_softmax(-1)[b])


def test_margins_of_a_real_model() -> None:
    model, tokenizer, contrast = tiny_model("llama"), tiny_tokenizer(), toy_contrast()
    lens = load(model, tokenizer=tokenizer, verify=False)
    report = flip_rate(lens, contrast, progress=False)
    readouts = {
        side: option_margin(contrast, side=side).token_ids(tokenizer)
        for side in ("positive", "negative", "difference")
    }
    values = {}
    for side, readout in readouts.items():
        tokens, mask, last = readout.tokens(tokenizer)
        logits = lens.run(tokens, attention_mask=mask, grad=True).logits
        assert logits is not None
        values[side] = readout.value(logits[torch.arange(len(last)), last])
    assert values["difference"].requires_grad
    reference = tiny_model("llama")
    naive = [
        [
            naive_margin(reference, tokenizer, str(prompt), *pair.readout[::step])  # pyright: ignore[reportArgumentType]
            for prompt, step in zip(
                (pair.positive, pair.negative, *pair.swapped), (1, 1, -1, -1), strict=True
            )
        ]
        for pair in contrast.pairs
    ]
    columns = ["frame", "neutral", "frame_swapped", "neutral_swapped"]
    found = report.tables["pairs"][[f"margin_{c}" for c in columns]].to_numpy()
    wanted = torch.tensor(naive)
    torch.testing.assert_close(torch.from_numpy(found).float(), wanted, atol=1e-4, rtol=1e-4)
    frame, neutral = wanted[:, [0, 2]].mean(), wanted[:, [1, 3]].mean()
    for side, value in zip(
        ("positive", "negative", "difference"), (frame, neutral, frame - neutral), strict=True
    ):
        torch.testing.assert_close(values[side].detach(), value, atol=1e-4, rtol=1e-4)
    choice = wanted > 0
    flips = (choice[:, [0, 2]] & ~choice[:, [1, 3]]).all(1).sum()
    assert list(report.table["flips"]) == [int(flips)]
    assert "repeat" not in " ".join(report.reservations)
