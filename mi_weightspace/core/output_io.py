"""Places to write: what cannot be one is refused before any work is done for it; what is written
appears whole or not at all, and what killed writers left is removed."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mi_weightspace.core.errors import OutputError

_REMEDY = "Choose another --out, or free space."
_STALE_SECONDS = 24 * 3600
_STAGED = re.compile(
    r"\..*\.(?P<host>[0-9a-f]{8})\.(?P<process>[0-9]+)\.[0-9]+\.partial", re.DOTALL
)


def check_place(target: Path, what: str) -> bool:
    """Whether something is there already; a place that can never be written is refused.

    Raises:
        OutputError: a name no file can have, a file where a folder must be, a link that leads
            nowhere, or a folder (this one, else the nearest above) that is not writable.
    """
    try:
        os.fsencode(target)
        if "\0" in str(target):
            raise UnicodeError("a NUL character")
        if target.is_symlink() and not target.exists():
            raise OSError("a link that leads nowhere")
        there = target.exists()
        if there and not target.is_dir():
            return True
        parent = target if there else target.absolute().parent
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
            expected="a writable folder",
            remedy="Choose another --out.",
        )
    return there


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
def writing(target: Path, what: str, remedy: str = _REMEDY) -> Iterator[None]:
    """Around writing to a place that may exist: what goes wrong with it is a refusal.

    Raises:
        OutputError: as `check_place`, or what the system says.
    """
    check_place(target, what)
    try:
        yield
    except OSError as error:
        raise unwritable(target, what, error, remedy) from error


@contextmanager
def staged(target: Path, what: str) -> Iterator[Path]:
    """A hidden path beside `target` to write a file or folder at, which then becomes the target.

    Nothing is left of it on an error;
    a target that is there is replaced if it is a file or an empty folder.

    Raises:
        OutputError: a place that cannot be written, or a full disk.
    """
    partial = hidden(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise unwritable(target, what, error) from error
    finally:
        remove(partial)


def hidden(target: Path) -> Path:
    """A path beside `target` that nothing has and whose name says who writes it."""
    label = os.fsencode(target.name)[:120].decode(errors="ignore")  # a name has 255 bytes at most
    own = f".{label}.{host()}.{os.getpid()}.{time.time_ns()}.partial"
    return target.with_name(own)


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left in a folder, see `stale`; what resists stays."""
    try:
        found = [Path(entry) for entry in os.scandir(folder) if _STAGED.fullmatch(entry.name)]
    except OSError:
        return  # a folder that may be written and not listed
    for partial in found:
        if stale(partial):
            remove(partial)


def stale(partial: Path) -> bool:
    """Whether the process that was writing a path of `staged` is gone for certain.

    Of this host: when no process has its number (a number given to another process keeps the path
    until that one has ended). Of another host, an earlier start of this one or another container,
    whose processes cannot be asked: when nothing in it has changed for a day. A link never is.
    """
    named = _STAGED.fullmatch(partial.name)
    if named is None or partial.is_symlink():
        return False
    if named["host"] == host():
        return not lives(int(named["process"]))
    try:
        changed = [path.lstat().st_mtime for path in (partial, *partial.rglob("*"))]
    except OSError:
        return False  # somebody is at it
    return time.time() - max(changed) > _STALE_SECONDS


def lives(process: int) -> bool:
    """Whether a process of this host has the number; in doubt it does."""
    if os.name != "posix":
        return True  # signal 0 is no question there
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


@cache
def host() -> str:
    """8 hex digits of what numbers processes here: machine, its start, container."""
    parts = [platform.node()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    except OSError:
        pass  # no Linux: the name alone
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def remove(path: Path) -> None:
    """Remove a file or a folder as far as that is possible; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def unwritable(target: Path, what: str, error: Exception, remedy: str = _REMEDY) -> OutputError:
    """The refusal of a place that could not be written."""
    name = str(target).encode("utf-8", "backslashreplace").decode()
    return OutputError(
        f"{what} {name[:300]}",
        given=f"{type(error).__name__}: {error}"[:300],
        expected="a folder that can be created and written",
        remedy=remedy,
    )
