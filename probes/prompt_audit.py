"""What can be wrong with a contrast set before any forward pass.

Seven checks of each contrast: tokens a side (pairs that differ by more than one are dropped and
counted), a shared suffix, questions on both sides of a split, words shared by fit and held-out
registers, topics and urged letters in balance, and what a bag of words alone can tell. The last is
no fault: it is the text baseline that a probe on activations has to beat.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.report import Report
from mi_weightspace.core.stats import auroc
from probes.datasets_io import MIN_CLUSTERS, check_clusters, from_records, pair_record

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_LENGTH_DIFFERENCE = 1
MIN_SUFFIX = 8
MAX_JACCARD = 0.1
MAX_IMBALANCE = 0.1
_FUNCTION_WORDS = """
a about after again all also an and any are as at be been before but by can did do does each every
for from had has have he her here him his how i if in into is it its just like me my no not now of
off on once one only or other our out over own she so some such than that the their them then there
these they this those through to too under until up us very was we were what when where which while
who whom whose why will with you your
"""
_STOP = frozenset(_FUNCTION_WORDS.split())
Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class AuditReport(Report):
    """One row for each contrast and check.

    `table` columns: ``contrast, kind, check, value, limit, ok, n`` (pairs it was computed on),
    ``detail``. Checks: ``token_length`` (share of pairs dropped), ``suffix`` (fewest shared
    tokens), ``split_overlap`` (questions in two splits), ``register_overlap`` (content-word
    Jaccard of fit against held-out frames), ``topic_balance`` (largest difference of a topic's
    share between splits), ``letter_balance`` (urged letter's share from a half), ``bag_of_words``
    (AUROC on the held-out registers; no limit).
    """

    kind: ClassVar[str] = "audit"

    @property
    def contrasts(self) -> ContrastSet:
        """The set without the dropped pairs."""
        rows = [json.loads(text) for text in self.tables["pairs"]["pair"]]
        return from_records(rows, str(self.config["contrasts"]))

    @property
    def ok(self) -> bool:
        return bool(self.table["ok"].all())

    def plot(self) -> go.Figure:
        """The text baseline of each target among that of the controls."""
        from mi_weightspace.core.figures import strip

        table: Any = self.table
        rows = table[table["check"] == "bag_of_words"]
        targets = rows[rows["kind"] == "target"]
        controls = rows[rows["kind"] == "control"]["value"].to_numpy(dtype=float)
        return strip(
            list(targets["contrast"]),
            targets["value"].to_numpy(dtype=float),
            controls[None].repeat(len(targets), 0),
            title="What a bag of words tells of the held-out registers",
            name="AUROC",
            unit="1",
            x_title=("contrast", "name"),
        )


def audit(contrasts: ContrastSet, tokenizer: Any = None) -> AuditReport:
    """Check every contrast; `.contrasts` of the report is the cleaned set.

    Args:
        tokenizer: of the model to be run; may be missing where all prompts are token ids.

    Raises:
        PromptError: text without a tokenizer, or a target left with fewer than five pairs.
    """
    import pandas as pd

    ids = _tokenize(contrasts, tokenizer)
    rows: list[dict[str, Any]] = []
    kept: list[dict[str, str]] = []
    reservations: list[str] = []
    for contrast in contrasts:
        good = tuple(
            pair
            for pair in contrast.pairs
            if abs(len(ids[pair.positive]) - len(ids[pair.negative])) <= MAX_LENGTH_DIFFERENCE
        )
        dropped = len(contrast) - len(good)
        if len({pair.cluster_id for pair in good}) < MIN_CLUSTERS:
            if contrast.kind != "control":
                _refuse(contrast, good)
            reservations.append(f"{contrast.name}: left out, {len(good)} pairs of like length")
        else:
            clean = Contrast(contrast.name, contrast.kind, good)
            kept += [
                {"contrast": clean.name, "pair": json.dumps(pair_record(clean, p))} for p in good
            ]
            rows += _checks(clean, ids)
        rows.append(
            _row(
                contrast,
                "token_length",
                dropped / len(contrast),
                0.0,
                len(contrast),
                f"{dropped} of {len(contrast)} pairs dropped",
            )
        )
    table = pd.DataFrame(rows)
    failed = table[~table["ok"]]
    reservations += [
        f"{c}: {check}, {detail}"
        for c, check, detail in zip(
            failed["contrast"], failed["check"], failed["detail"], strict=True
        )
    ]
    return AuditReport(
        table=table,
        tables={"pairs": pd.DataFrame(kept, columns=pd.Index(["contrast", "pair"]))},
        config={"command": "audit", "contrasts": contrasts.name},
        inputs={"contrasts": contrasts.hash},
        reservations=tuple(reservations),
    )


def _refuse(contrast: Contrast, good: Sequence[Pair]) -> None:
    if good:
        check_clusters(Contrast(contrast.name, contrast.kind, tuple(good)))
    raise PromptError(
        f"contrast {contrast.name!r}",
        given="no pair whose sides have like numbers of tokens",
        expected=f"at most {MAX_LENGTH_DIFFERENCE} token of difference",
        remedy="Reword the frames: length alone would tell the two sides apart.",
    )


def _tokenize(contrasts: ContrastSet, tokenizer: Any) -> dict[str | Ids, Ids]:
    prompts = dict.fromkeys(
        side for c in contrasts for pair in c.pairs for side in (pair.positive, pair.negative)
    )
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and tokenizer is None:
        raise PromptError(
            f"contrast set {contrasts.name!r}",
            given="text prompts without a tokenizer",
            expected="the tokenizer of the model to be run",
            remedy="Pass tokenizer=, for example that of the loaded model: lens.tokenizer.",
        )
    found: dict[str | Ids, Ids] = {p: p for p in prompts if not isinstance(p, str)}
    if texts:
        encoded = tokenizer(texts)["input_ids"]
        found |= {text: tuple(row) for text, row in zip(texts, encoded, strict=True)}
    return found


def _row(
    contrast: Contrast,
    check: str,
    value: float,
    limit: float,
    n: int,
    detail: str,
    *,
    least: bool = False,
) -> dict[str, Any]:
    """`least`: the limit is a lower one."""
    ok = not (value < limit if least else value > limit)  # NaN: nothing to fault
    return {
        "contrast": contrast.name,
        "kind": contrast.kind,
        "check": check,
        "value": float(value),
        "limit": float(limit),
        "ok": bool(ok),
        "n": n,
        "detail": detail,
    }


def _checks(contrast: Contrast, ids: dict[str | Ids, Ids]) -> list[dict[str, Any]]:
    n = len(contrast)
    shared = min(_suffix(ids[p.positive], ids[p.negative]) for p in contrast.pairs)
    doubles = _overlap(contrast)
    frames = [_frames(pair) for pair in contrast.pairs]
    jaccard, common = _jaccard(contrast, frames)
    topic, which = _topics(contrast)
    letters = Counter(pair.readout[0] for pair in contrast.pairs if pair.readout)
    tilt = max(letters.values()) / letters.total() - 0.5 if letters else float("nan")
    baseline = _bag_of_words(contrast, frames)
    inf = float("inf")
    return [
        _row(contrast, "suffix", shared, MIN_SUFFIX, n, f"at least {shared} tokens", least=True),
        _row(contrast, "split_overlap", len(doubles), 0, n, ", ".join(doubles[:5])),
        _row(contrast, "register_overlap", jaccard, MAX_JACCARD, n, ", ".join(common[:8])),
        _row(contrast, "topic_balance", topic, MAX_IMBALANCE, n, which),
        _row(
            contrast,
            "letter_balance",
            tilt,
            MAX_IMBALANCE,
            n,
            ", ".join(f"{k}: {v}" for k, v in sorted(letters.items(), key=str)),
        ),
        _row(contrast, "bag_of_words", baseline, inf, n, "text baseline"),
    ]


def _suffix(a: Sequence[Any], b: Sequence[Any]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def _words(prompt: str | Ids) -> list[str]:
    return prompt.split() if isinstance(prompt, str) else [str(token) for token in prompt]


def _frames(pair: Pair) -> tuple[list[str], list[str]]:
    """Words of the two sides before their common suffix, lower case, without punctuation."""
    sides = [_words(pair.positive), _words(pair.negative)]
    shared = _suffix(*sides)
    bare = [
        [re.sub(r"[^\w']", "", w).lower() for w in side[: len(side) - shared]] for side in sides
    ]
    return [w for w in bare[0] if w], [w for w in bare[1] if w]


def _body(pair: Pair) -> tuple[str, ...]:
    """The question: what the sides share after the frame's line, in any order of the options."""
    sides = [_words(pair.positive), _words(pair.negative)]
    if isinstance(pair.positive, str) and isinstance(pair.negative, str):
        blocks = [text.partition("\n") for text in (pair.positive, pair.negative)]
        if blocks[0][2] and blocks[0][2] == blocks[1][2]:
            return tuple(sorted(blocks[0][2].split()))
    return tuple(sorted(sides[0][len(sides[0]) - _suffix(*sides) :]))


def _overlap(contrast: Contrast) -> list[str]:
    """Items, or questions under two names, that stand in more than one split."""
    splits: dict[Any, set[str]] = {}
    names: dict[Any, str] = {}
    for pair in contrast.pairs:
        for key in (pair.item_id, _body(pair)):
            if key:
                splits.setdefault(key, set()).add(pair.split)
                names[key] = pair.item_id
    return sorted({names[key] for key, found in splits.items() if len(found) > 1})


def _held(pair: Pair) -> bool:
    return pair.split == "heldout_register"


def _jaccard(
    contrast: Contrast, frames: Sequence[tuple[list[str], list[str]]]
) -> tuple[float, list[str]]:
    fit: set[str] = set()
    held: set[str] = set()
    for pair, sides in zip(contrast.pairs, frames, strict=True):
        target = held if _held(pair) else fit
        target.update(w for side in sides for w in side if w not in _STOP and len(w) > 1)
    if not fit or not held:
        return float("nan"), []
    return len(fit & held) / len(fit | held), sorted(fit & held)


def _topics(contrast: Contrast) -> tuple[float, str]:
    """Both sides of a pair have its topic; what can differ is the topics of the splits."""
    counts = [
        Counter(p.topic for p in contrast.pairs if _held(p) is side) for side in (False, True)
    ]
    if not all(counts):
        return float("nan"), ""
    gaps = {
        topic: abs(counts[0][topic] / counts[0].total() - counts[1][topic] / counts[1].total())
        for topic in counts[0] | counts[1]
    }
    worst = max(gaps, key=lambda topic: gaps[topic])
    return gaps[worst], worst


def _bag_of_words(contrast: Contrast, frames: Sequence[tuple[list[str], list[str]]]) -> float:
    """AUROC of a logistic regression on words, fit registers to held-out registers."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    held = [_held(pair) for pair in contrast.pairs]
    if all(held) or not any(held):
        return float("nan")
    train = [side for sides, h in zip(frames, held, strict=True) if not h for side in sides]
    test = [side for sides, h in zip(frames, held, strict=True) if h for side in sides]
    if not any(train):
        return float("nan")
    as_it_is: Any = list
    bag = CountVectorizer(analyzer=as_it_is, binary=True)
    model = LogisticRegression(max_iter=500)
    model.fit(bag.fit_transform(train), [1, 0] * (len(train) // 2))
    scores = model.decision_function(bag.transform(test))
    # rounding would break the ties of prompts without a known word
    return auroc(
        torch.from_numpy(scores).round(decimals=9), torch.tensor([1, 0] * (len(test) // 2))
    )
