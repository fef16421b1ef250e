"""The progress bar of a sweep: matrices done, bytes read and products done a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def sweep_progress(
    label: str, n_tasks: int, n_bytes: int, *, shown: bool
) -> Iterator[Callable[[int, float], None]]:
    """A bar that advances by bytes; call the result with each matrix's bytes and GFLOP.

    Rates are since the sweep began; the time left is by bytes.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rates]}"),
        TimeRemainingColumn(),
        disable=not shown,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=max(1, n_bytes), rates=f"0/{n_tasks}")
        begun, done, read, worked = time.perf_counter(), 0, 0, 0.0

        def step(size: int, gflop: float) -> None:
            nonlocal done, read, worked
            done, read, worked = done + 1, read + size, worked + gflop
            text = rates(done, n_tasks, read, worked, time.perf_counter() - begun)
            bar.update(task, advance=size, rates=text)

        yield step


def rates(done: int, n_tasks: int, n_bytes: int, gflop: float, seconds: float) -> str:
    """``12/280 matrices, 1.2 GB/s, 40 GFLOP/s``."""
    seconds = max(seconds, 1e-9)
    speed = f"{n_bytes / 1e9 / seconds:.2f} GB/s, {gflop / seconds:.0f} GFLOP/s"
    return f"{done}/{n_tasks} matrices, {speed}"
