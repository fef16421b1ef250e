"""A trap on unpickling, for the whole test session.

Whatever reads a pickle while a function of the package is on the stack fails its test: whether it
is called by the package or by a library the package called. Processes that talk to each other
(joblib, dask, multiprocessing) and compilation caches may: their bytes come from this very run.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("mi_weightspace", "probes"))
MAY = ("joblib", "multiprocessing", "concurrent", "distributed", "torch.distributed",
       "torch._inductor", "torch._dynamo", "torch._functorch", "torch.multiprocessing")  # fmt: skip
caught: list[str] = []
"""Where the trap closed in this session."""


def frames() -> Iterator[tuple[str, str]]:
    """(module, file) of every frame of the caller's stack, innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
        frame = frame.f_back


def check(what: str) -> None:
    """Fail where a frame of the package comes before one that may unpickle."""
    for module, file in frames():
        if any(module == name or module.startswith(f"{name}.") for name in MAY):
            return
        if file.startswith(OURS):
            caught.append(f"{what} from {file}")
            raise AssertionError(f"unpickled: {caught[-1]}")


def set_up() -> None:
    """Replace the unpicklers of `pickle` and `torch.load`; once a process."""
    import torch

    if getattr(pickle, "_trapped", False):
        return
    pickle._trapped = True  # pyright: ignore[reportAttributeAccessIssue]
    pickle.load = _guarded(pickle.load, "pickle.load")
    pickle.loads = _guarded(pickle.loads, "pickle.loads")
    torch.load = _guarded(torch.load, "torch.load")
    slow: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
    slow.load = _guarded(slow.load, "pickle._Unpickler")

    class Unpickler(pickle.Unpickler):
        def load(self) -> Any:
            check("pickle.Unpickler")
            return super().load()

    pickle.Unpickler = Unpickler  # pyright: ignore[reportAttributeAccessIssue]


def _guarded(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    def guarded(*args: Any, **options: Any) -> Any:
        check(name)
        return call(*args, **options)

    return guarded
