"""Labelled sets from JSONL, parquet, Hugging Face `datasets` and lists of rows; and back.

Columns: ``prompt`` (or ``text``; text, or a list of token ids), ``label`` (0 or 1) and
``cluster_id``, or ``item_id`` with an optional ``wording_id``, which then make the cluster.
Optional: ``context``, ``attributes`` (a JSON object), ``source``. Contrast sets, and files in their
wide and pair forms, are read as well: each pair becomes two rows of one cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_weightspace.core.contrasts import Contrast, ContrastSet
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.json_io import DamagedJson, parse_json
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet, Prompt
from probes.datasets_io import load_contrasts
from probes.prompts import NAMES
from probes.rows_io import Row, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("prompt", "label", "cluster_id", "item_id", "context", "attributes", "source")
_CONTRAST_MARKS = {"positive", "negative", "frame_pos", "frame_neg"}


def load_labelled(source: Any, *, name: str | None = None) -> LabelledSet:
    """A labelled set from anything that holds one, checked.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, a folder written by ``datasets.save_to_disk``,
            a ``datasets.Dataset``, a pandas frame, a list of rows, a built-in contrast name, a
            ContrastSet, or a LabelledSet (returned as it is).
        name: of the set; default the file's.

    Raises:
        PromptError: an unknown source, a missing column, a label other than 0 and 1, an empty
            prompt, attributes that are no JSON object, or what `LabelledSet` refuses.
    """
    if isinstance(source, LabelledSet):
        return source
    if isinstance(source, ContrastSet | Contrast):
        return LabelledSet.from_contrast(source)
    if isinstance(source, str) and source in NAMES:
        return LabelledSet.from_contrast(load_contrasts(source))
    label = name or (Path(source).stem if isinstance(source, str | Path) else "labelled")
    rows = read_rows(source, "labelled prompts", NAMES)
    if {key for row in rows for key in row} & _CONTRAST_MARKS:
        return LabelledSet.from_contrast(load_contrasts(rows, name=label))
    return LabelledSet(tuple(_row(row, i, label) for i, row in enumerate(rows)), label)


def to_rows(labelled: LabelledSet) -> list[Row]:
    """Rows of plain JSON values, columns `COLUMNS`; attributes as one JSON text."""
    return [
        {
            "prompt": row.prompt if isinstance(row.prompt, str) else list(row.prompt),
            "label": row.label,
            "cluster_id": row.cluster_id,
            "item_id": row.item_id,
            "context": row.context,
            "attributes": json.dumps(dict(row.attributes), ensure_ascii=False, sort_keys=True),
            "source": row.source,
        }
        for row in labelled
    ]


def labelled_to_jsonl(labelled: LabelledSet, path: str | Path) -> Path:
    """Write one row a line; `load_labelled` gives the set back with the same hash."""
    target = Path(path)
    lines = [json.dumps(row, ensure_ascii=False) for row in to_rows(labelled)]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def labelled_to_dataset(labelled: LabelledSet) -> Dataset:
    """The rows as a Hugging Face dataset.

    Raises:
        PromptError: text and token ids mixed, which one column cannot hold.
    """
    from datasets import Dataset

    if len({isinstance(row.prompt, str) for row in labelled}) > 1:
        raise PromptError(
            f"labelled set {labelled.name!r}",
            given="text in some rows and token ids in others",
            expected="one kind of prompt",
            remedy="Write it as JSONL, or as two datasets.",
        )
    return Dataset.from_list(to_rows(labelled))


def _row(row: Row, number: int, label: str) -> LabelledPrompt:
    subject = f"labelled prompts {label!r}, row {number}"
    item = str(row.get("item_id", f"row{number}"))
    return LabelledPrompt(
        prompt=_prompt(row, subject),
        label=_label(row, subject),
        cluster_id=_cluster(row, subject),
        item_id=item,
        context=str(row.get("context", "")),
        attributes=_attributes(row, subject),
        source=str(row.get("source", "")),
    )


def _prompt(row: Row, subject: str) -> Prompt:
    value = row.get("prompt", row.get("text"))
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | tuple) and value and all(type(token) is int for token in value):
        return tuple(value)
    raise PromptError(
        subject,
        given="no prompt" if value is None else f"the prompt {value!r}",
        expected="text that is not empty, or a list of token ids, in the column 'prompt'",
        remedy="Drop the row or fill in its prompt.",
    )


def _label(row: Row, subject: str) -> int:
    value = row.get("label")
    if value is None or isinstance(value, str) or value not in (0, 1):
        raise PromptError(
            subject,
            given="no label" if value is None else f"the label {value!r}",
            expected="1 (behaviour) or 0 (none), in the column 'label'",
            remedy="Encode the two classes as 0 and 1.",
        )
    return int(value)


def _cluster(row: Row, subject: str) -> str:
    if "cluster_id" in row:
        return str(row["cluster_id"])
    if "item_id" in row:
        wording = row.get("wording_id")
        return str(row["item_id"]) if wording is None else f"{row['item_id']}×{wording}"
    raise PromptError(
        subject,
        given="neither cluster_id nor item_id",
        expected="the cluster of every row: rows that share it are never on both sides of a fold",
        remedy="Give rows of one item, pair or template one cluster_id; else each row its own.",
    )


def _attributes(row: Row, subject: str) -> dict[str, str]:
    value = row.get("attributes", {})
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except DamagedJson as error:
            raise _no_object(subject, f"attributes that are no JSON ({error})") from error
    if not isinstance(value, Mapping):
        raise _no_object(subject, f"attributes {value!r}")
    return {str(key): str(cell) for key, cell in value.items() if cell is not None}


def _no_object(subject: str, given: str) -> PromptError:
    return PromptError(
        subject,
        given=given,
        expected='a JSON object such as {"topic": "travel"} in the column \'attributes\'',
        remedy="Correct the column, or leave it out.",
    )
