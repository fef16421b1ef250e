"""Our own readers under random and structured damage: a refusal or a valid value, nothing else."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trust_counter import Figure, Hang, bounded
from trust_fuzz import Format, case, formats

from mi_weightspace.core.errors import WeightspaceError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from probes.labelled_io import labelled_to_jsonl, load_labelled

NAME, UNIT = "fuzz of our readers", "files"
QUICK = 12_000
SLOW = int(os.environ.get("MI_WEIGHTSPACE_FUZZ", "1000000"))
"""Cases of the slow run; the environment variable sets another number."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: ten thousand files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as found:
        yield Path(found)


def run(figure: Figure, every: Sequence[Format], n: int, seed: int) -> None:
    """n cases, spread over the formats; every 200 one after the other of each."""
    whole = {}
    for own in every:
        own.read()  # sound before
        whole[own.name] = {path: path.read_bytes() for path in (own.file, *own.also)}
    draw, done = np.random.default_rng(seed), 0
    while done < n:
        own = every[done // 100 % len(every)]
        sound = whole[own.name]
        try:
            with bounded(60):  # a watchdog a case would cost more than the case
                for _ in range(min(100, n - done)):
                    figure.add(problem=case(own, sound[own.file], draw))
                    for path, data in sound.items():
                        path.write_bytes(data)
        except Hang as error:
            figure.add(problem=f"{own.name}: hangs ({error})")
        done += min(100, n - done)


def distinct(problems: list[str]) -> list[str]:
    """The first of each kind."""
    return list({p.split(" <- ")[0][:70]: p for p in reversed(problems)}.values())


@pytest.mark.filterwarnings("ignore")
def test_spoilt_files(place: Path) -> None:
    every = formats(place)
    tried = (
        f"{len(every)} formats: bytes flipped, cut, put in; JSON values of other kinds, resealed"
    )
    with Figure(NAME, UNIT, tried) as figure:
        run(figure, every, QUICK, 0)
        assert figure.count >= 10_000
        if figure.problems:
            figure.problems = distinct(figure.problems) + figure.problems


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_spoilt_files(place: Path) -> None:
    every = formats(place)
    with Figure(NAME, UNIT, "the same, other seeds") as figure, warnings.catch_warnings():
        run(figure, every, SLOW, 1)
        if figure.problems:
            figure.problems = distinct(figure.problems) + figure.problems


TEXT = st.text(min_size=1, max_size=12).filter(lambda t: bool(t.strip()))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
COLUMNS = ("prompt", "text", "label", "cluster_id", "item_id", "wording_id", "context",
           "attributes", "source", "positive", "negative", "kind", "frame_pos", "frame_neg",
           "contrast")  # fmt: skip
ROWS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(COLUMNS, VALUES)), max_size=4)
OPTIONS = settings(
    max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), database=None,
    derandomize=True,
)  # fmt: skip


def test_rows_of_any_kind(place: Path) -> None:
    """Whole files of structured rows, drawn by hypothesis."""
    import probes

    file, figure = place / "rows.jsonl", Figure(NAME, UNIT, "rows of any columns and values")

    @OPTIONS
    @given(ROWS)
    def check(rows: list[dict[str, object]]) -> None:
        try:
            text = "\n".join(json.dumps(row) for row in rows)
        except ValueError:  # an integer of more digits than Python writes
            return
        file.write_text(text)
        for read in (probes.load_contrasts, probes.load_labelled):
            try:
                read(str(file))
                problem = None
            except WeightspaceError:
                problem = None
            except Exception as error:  # noqa: BLE001 (whatever is no refusal is the finding)
                problem = f"{read.__name__}: {type(error).__name__}: {error} <- {text[:200]}"
            figure.add(problem=problem)

    with figure:
        check()


def test_labelled_sets_come_back_whole(place: Path) -> None:
    """Any text, separators of lines included, is the same after writing and reading."""
    figure = Figure(NAME, UNIT, "labelled sets of any text written and read back")

    @OPTIONS
    @given(st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=4, unique_by=lambda t: t[0]))
    def check(texts: list[tuple[str, str]]) -> None:
        rows = [
            LabelledPrompt(prompt, i % 2, f"c{i}", f"i{i}", context, {"a": context})
            for i, (prompt, context) in enumerate(texts)
        ]
        try:
            own = LabelledSet(tuple(rows), "s")
        except WeightspaceError:
            return
        back = load_labelled(labelled_to_jsonl(own, place / "set.jsonl"), name="s")
        figure.add(problem=None if back.rows == own.rows else f"{texts!r} is another")

    with figure:
        check()
