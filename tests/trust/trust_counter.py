"""Counts of what the trust suite tried, kept for the table of figures.

Every figure of the suite is a `Figure`: cases go in one by one, problems are collected instead of
stopping at the first, and at the end they must be none. Where ``MI_WEIGHTSPACE_TRUST`` names a
folder, the count is appended to ``counts.jsonl`` in it, one line a figure and process, whether the
test then passes or not.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

VARIABLE = "MI_WEIGHTSPACE_TRUST"
SECONDS = 20.0
"""A case that takes longer counts as a hang."""


def cpu_seconds() -> float:
    """Of this process and the processes it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


class Hang(BaseException):
    """Raised into a case by the watchdog; no handler of errors may catch it."""


@dataclass
class Figure:
    """One line of the table.

    Attributes:
        name: of the figure; parts of one figure in several tests share it and are summed.
        unit: what is counted (``folders``, ``strings``).
        tried: one sentence for the table.
        elsewhere: CPU seconds spent for it before it was entered, or by processes not waited for.
    """

    name: str
    unit: str
    tried: str
    count: int = 0
    problems: list[str] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    elsewhere: float = 0.0
    began: float = 0.0
    began_cpu: float = 0.0

    def __enter__(self) -> Figure:
        self.began, self.began_cpu = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.problems.append(f"the test itself stopped: {kind.__name__}: {value}")
        self._append()
        if kind is None:
            assert not self.problems, self.said()

    def add(self, *, count: int = 1, problem: str | None = None) -> None:
        """Count cases; a problem is one failure."""
        self.count += count
        if problem is not None:
            self.problems.append(problem)

    def said(self) -> str:
        head = f"{self.name}: {len(self.problems)} of {self.count} {self.unit} failed"
        return "\n".join([head, *(f"- {p}" for p in self.problems[:25])])

    def _append(self) -> None:
        folder = os.environ.get(VARIABLE)
        if not folder:
            return
        record = {
            "name": self.name,
            "unit": self.unit,
            "tried": self.tried,
            "count": self.count,
            "failures": len(self.problems),
            "first_problems": self.problems[:5],
            "seconds": time.perf_counter() - self.began,
            "cpu_seconds": cpu_seconds() - self.began_cpu + self.elsewhere,
            "notes": self.notes,
        }
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with (place / "counts.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)  # one write: lines of several processes do not mix


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """A case under the watchdog; what hangs inside a library's own code ends the process.

    Raises:
        Hang: the case took longer.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
