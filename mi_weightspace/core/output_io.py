"""Places to write: what cannot be one is refused before any work is done for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mi_weightspace.core.errors import OutputError

_REMEDY = "Choose another --out, or free space."


def check_place(target: Path, what: str) -> bool:
    """Whether something is there already; a place that can never be written is refused.

    Raises:
        OutputError: a name no file can have, a file where a folder must be, a link that leads
            nowhere, or a parent folder that is not writable.
    """
    try:
        os.fsencode(target)
        if "\0" in str(target):
            raise UnicodeError("a NUL character")
        if target.is_symlink() and not target.exists():
            raise OSError("a link that leads nowhere")
        if target.exists():
            return True
        parent = target.absolute().parent
        while not parent.exists() and not parent.is_symlink():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent}, which is no folder")
    except (OSError, UnicodeError) as error:
        raise unwritable(target, what, error) from error
    if not os.access(parent, os.W_OK):
        raise OutputError(
            f"{what} {target}",
            given=f"{parent}, which is not writable",
            expected="a writable parent folder",
            remedy="Choose another --out.",
        )
    return False


def check_new_file(target: Path, what: str) -> None:
    """Refuse a file that exists, or cannot be made.

    Raises:
        OutputError: as `check_place`, or a path that is taken.
    """
    if check_place(target, what):
        raise OutputError(
            f"{what} {target}",
            given="a path that is taken",
            expected="a new file",
            remedy="Choose another name; files are never overwritten.",
        )


@contextmanager
def writing(target: Path, what: str) -> Iterator[None]:
    """Around writing to a place that may exist: what goes wrong with it is a refusal.

    Raises:
        OutputError: as `check_place`, or what the system says.
    """
    check_place(target, what)
    try:
        yield
    except OSError as error:
        raise unwritable(target, what, error) from error


def unwritable(target: Path, what: str, error: Exception) -> OutputError:
    """The refusal of a place that could not be written."""
    name = str(target).encode("utf-8", "backslashreplace").decode()
    return OutputError(
        f"{what} {name[:300]}",
        given=f"{type(error).__name__}: {error}"[:300],
        expected="a folder that can be created and written",
        remedy=_REMEDY,
    )
