"""Contrast sets from JSONL, parquet, Hugging Face `datasets` and lists of rows; and back to JSONL.

Three forms of a row, told apart by their columns:

- wide: ``item_id, frame_pos, frame_neg, body`` and optionally ``contrast, kind, register,
  wording_id, topic, options, answer_key, pushed_option, split, source`` (`probes.prompts.WideRow`);
- pair: ``item_id, positive, negative`` and optionally ``contrast, kind, wording_id, register,
  topic, split, readout, swapped``; texts, or lists of token ids;
- long: ``item_id, label, text``, two rows a pair, label 1 the positive side.

`to_jsonl` writes the pair form, which loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mi_weightspace.core.contrasts import Contrast, ContrastKind, ContrastSet, Pair, Split
from mi_weightspace.core.errors import PromptError
from probes.prompts import NAMES, WideRow, builtin
from probes.rows_io import Row, read_rows

MIN_CLUSTERS = 5
"""Item × wording clusters a contrast needs: fewer leave no fold to hold out."""
_FORMS = {
    "wide": ("item_id", "frame_pos", "frame_neg", "body"),
    "pair": ("item_id", "positive", "negative"),
    "long": ("item_id", "label", "text"),
}


def load_contrasts(
    source: Any, controls: Any = None, *, name: str | None = None, min_clusters: int = MIN_CLUSTERS
) -> ContrastSet:
    """A contrast set from anything that holds one, checked.

    Args:
        source: a built-in name, a ``.jsonl`` or ``.parquet`` file, a folder written by
            ``datasets.save_to_disk``, a ``datasets.Dataset``, a pandas frame, a list of rows, or
            a ContrastSet (returned as it is).
        controls: the matched controls, from any of these; rows without ``kind`` are controls.
        name: of the set, and of the contrast of rows that name none.

    Raises:
        PromptError: an unknown name or format, a missing column, one class only, unpaired items,
            empty text, equal sides, duplicate items, or fewer than `min_clusters` clusters.
    """
    found = _load(source, name, "target", min_clusters)
    if controls is None:
        return found
    extra = _load(controls, None, "control", min_clusters)
    wrong = [c.name for c in extra if c.kind != "control"]
    clash = sorted({c.name for c in found} & {c.name for c in extra})
    if wrong or clash:
        raise PromptError(
            "controls",
            given=f"contrasts of kind target or null: {wrong[:5]}"
            if wrong
            else f"the names {clash[:5]} of the first set again",
            expected="contrasts of kind 'control', each with a name of its own",
            remedy="Correct the column `kind` or `contrast` of the controls.",
        )
    return found + extra


def _load(
    source: Any, name: str | None, default_kind: ContrastKind, min_clusters: int
) -> ContrastSet:
    if isinstance(source, ContrastSet):
        return source
    if isinstance(source, str) and source in NAMES:
        return builtin(source)
    label = name or (Path(source).stem if isinstance(source, str | Path) else "contrasts")
    rows = read_rows(source, "contrasts", NAMES)
    return _assemble(rows, label, default_kind, min_clusters)


def _form(rows: Sequence[Row], label: str) -> str:
    columns = {key for row in rows for key in row}
    for form, marks in (
        ("wide", {"frame_pos", "frame_neg"}),
        ("pair", {"positive", "negative"}),
        ("long", {"text", "label"}),
    ):
        if marks & columns:
            return form
    raise PromptError(
        f"contrasts {label!r}",
        given=f"the columns {sorted(columns)}" if rows else "no rows",
        expected="the columns of one form: " + "; ".join(", ".join(f) for f in _FORMS.values()),
        remedy="Rename the columns, or see the documentation of probes.load_contrasts.",
    )


def _assemble(
    rows: Sequence[Row], label: str, default_kind: ContrastKind, min_clusters: int
) -> ContrastSet:
    form = _form(rows, label)
    for number, row in enumerate(rows):
        missing = [column for column in _FORMS[form] if column not in row]
        if missing:
            raise PromptError(
                f"contrasts {label!r}, row {number}",
                given=f"no value for {missing}",
                expected=f"the columns {list(_FORMS[form])} in every row of the {form} form",
                remedy="Add the column, or drop the row.",
            )
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("contrast", label)), []).append(row)
    contrasts = [
        _contrast(name, group, form, default_kind, min_clusters) for name, group in groups.items()
    ]
    return ContrastSet(label, tuple(contrasts))


def _contrast(
    name: str, rows: list[Row], form: str, default_kind: ContrastKind, min_clusters: int
) -> Contrast:
    subject = f"contrast {name!r}"
    kinds = {_choice(row, "kind", default_kind, get_args(ContrastKind), subject) for row in rows}
    if len(kinds) > 1:
        raise PromptError(
            subject,
            given=f"the kinds {sorted(kinds)}",
            expected="one kind",
            remedy="Give rows of another kind another `contrast`.",
        )
    if form == "long":
        rows = _join(rows, subject)
    pairs = [_wide(row, name, subject) if form == "wide" else _pair(row, subject) for row in rows]
    seen: set[str] = set()
    for pair in pairs:
        _check_sides(pair, subject)
        if pair.cluster_id in seen:
            raise PromptError(
                f"{subject}, item {pair.item_id!r}",
                given=f"two pairs with wording {pair.wording_id!r}",
                expected="each item once with a wording",
                remedy="Number the items, or give each wording its own wording_id.",
            )
        seen.add(pair.cluster_id)
    contrast = Contrast(name, next(iter(kinds)), tuple(pairs))
    check_clusters(contrast, min_clusters)
    return contrast


def check_clusters(contrast: Contrast, least: int = MIN_CLUSTERS) -> None:
    """Refuse a contrast of fewer than `least` item × wording clusters."""
    n = len({pair.cluster_id for pair in contrast.pairs})
    if n < least:
        raise PromptError(
            f"contrast {contrast.name!r}",
            given=f"{n} pairs of their own item and wording",
            expected=f"at least {least}",
            remedy="Write more items; every fold, bootstrap and permutation needs them.",
        )


def _choice(row: Row, key: str, default: str, allowed: tuple[str, ...], subject: str) -> Any:
    value = row.get(key, default)
    if value not in allowed:
        raise PromptError(
            f"{subject}, item {row['item_id']!r}",
            given=f"{key} {value!r}",
            expected=f"one of {list(allowed)}",
            remedy=f"Correct the column {key!r}.",
        )
    return value


def _join(rows: Sequence[Row], subject: str) -> list[Row]:
    """Long rows to pairs.

    Raises:
        PromptError: one class only, a label that is not 0 or 1, or an item without both sides.
    """
    labels = {row["label"] for row in rows}
    if not labels <= {0, 1} or len(labels) < 2:
        raise PromptError(
            subject,
            given=f"the labels {sorted(map(str, labels))}",
            expected="both classes, 0 and 1",
            remedy="Add the rows of the other class; a direction needs both.",
        )
    items: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        key = (str(row["item_id"]), str(row.get("wording_id", "w0")))
        items.setdefault(key, {}).setdefault(int(row["label"]), []).append(row)
    joined: list[Row] = []
    for (item, wording), sides in items.items():
        counts = [len(sides.get(label, ())) for label in (1, 0)]
        if counts != [1, 1]:
            raise PromptError(
                f"{subject}, item {item!r}, wording {wording!r}",
                given=f"{counts[0]} positive and {counts[1]} negative rows",
                expected="one of each: items are pairs",
                remedy="Add the missing side, drop the item, or tell repeats apart by wording_id.",
            )
        positive, negative = sides[1][0], sides[0][0]
        row = positive | {"positive": positive["text"], "negative": negative["text"]}
        if "readout_tokens" in positive:
            row["readout"] = positive["readout_tokens"]
        joined.append(row)
    return joined


def _wide(row: Row, name: str, subject: str) -> Pair:
    for key in ("frame_pos", "frame_neg", "body"):
        _text(row, key, subject)
    return WideRow(
        item_id=str(row["item_id"]),
        frame_pos=row["frame_pos"],
        frame_neg=row["frame_neg"],
        body=row["body"],
        contrast=name,
        register=str(row.get("register", "")),
        wording_id=str(row.get("wording_id", "w0")),
        topic=str(row.get("topic", "")),
        options=tuple(row.get("options", ())),
        answer_key=int(row.get("answer_key", -1)),
        pushed_option=int(row.get("pushed_option", -1)),
        split=_choice(row, "split", "fit", get_args(Split), subject),
    ).pair()


def _pair(row: Row, subject: str) -> Pair:
    swapped = row.get("swapped", ())
    if len(swapped) not in (0, 2):
        raise PromptError(
            f"{subject}, item {row['item_id']!r}",
            given=f"{len(swapped)} swapped prompts",
            expected="two (positive, negative), or none",
            remedy="Correct the column 'swapped'.",
        )
    return Pair(
        item_id=str(row["item_id"]),
        positive=_prompt(row, "positive", subject),
        negative=_prompt(row, "negative", subject),
        wording_id=str(row.get("wording_id", "w0")),
        register=str(row.get("register", "")),
        topic=str(row.get("topic", "")),
        split=_choice(row, "split", "fit", get_args(Split), subject),
        readout=tuple(row.get("readout", ())),
        swapped=tuple(
            _prompt({"item_id": row["item_id"], "swapped": side}, "swapped", subject)
            for side in swapped
        ),
    )


def _prompt(row: Row, key: str, subject: str) -> str | tuple[int, ...]:
    value = row[key]
    if isinstance(value, list | tuple) and value and all(type(token) is int for token in value):
        return tuple(value)
    return _text(row, key, subject)


def _text(row: Row, key: str, subject: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise PromptError(
            f"{subject}, item {row['item_id']!r}",
            given=f"{key} {value!r}",
            expected="text that is not empty",
            remedy="Drop the item or fill the missing side.",
        )
    return value


def _check_sides(pair: Pair, subject: str) -> None:
    if pair.positive == pair.negative:
        raise PromptError(
            f"{subject}, item {pair.item_id!r}",
            given="the same prompt on both sides",
            expected="two prompts that differ",
            remedy="Drop the item, or correct its negative side.",
        )


def pair_record(contrast: Contrast, pair: Pair) -> Row:
    """A pair as a row of the pair form; plain JSON values."""
    sides = {"positive": pair.positive, "negative": pair.negative}
    return {
        "contrast": contrast.name,
        "kind": contrast.kind,
        "item_id": pair.item_id,
        "wording_id": pair.wording_id,
        "register": pair.register,
        "topic": pair.topic,
        "split": pair.split,
        **{k: v if isinstance(v, str) else list(v) for k, v in sides.items()},
        "readout": list(pair.readout),
        "swapped": [s if isinstance(s, str) else list(s) for s in pair.swapped],
    }


def from_records(rows: Sequence[Row], name: str, *, min_clusters: int = 1) -> ContrastSet:
    """The inverse of `pair_record`, row by row."""
    return _assemble(read_rows(rows, "contrasts"), name, "target", min_clusters)


def to_jsonl(contrasts: ContrastSet, path: str | Path) -> Path:
    """Write the set in the pair form; `load_contrasts` gives it back with the same hash."""
    target = Path(path)
    lines = [
        json.dumps(pair_record(contrast, pair), ensure_ascii=False)
        for contrast in contrasts
        for pair in contrast.pairs
    ]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target
