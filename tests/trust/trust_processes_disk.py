"""Disks of a size of one's own, and places that cannot be written, for as long as a block lasts.

Mounting needs a process with a mount namespace of its own, as `command` starts it: nothing that is
mounted there is seen elsewhere, or left when the process has died.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LARGE = "size=64m,nr_inodes=0"
_CAPABILITIES, _MAY_WRITE_ANYWHERE = 0x20080522, 0b110
"""Version 3 of the system call; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@cache
def command() -> tuple[str, ...] | str:
    """What to put before a command so that it may mount; or why that cannot be done."""
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        return "no unshare or mount here (Linux)"
    words = ""
    for flags in (("--mount",), ("--mount", "--map-root-user")):
        tried = ["unshare", *flags, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        done = subprocess.run(tried, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return ("unshare", *flags)
        words = done.stderr.strip()[-200:]
    return f"mounting a file system is not permitted here: {words}"


def mount(place: Path, options: str) -> None:
    """A tmpfs with these options, or new options of the one that is there."""
    again = "remount," if place.is_mount() else ""
    call = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(place)]
    subprocess.run(call, check=True, capture_output=True)


@contextmanager
def disk(place: Path, options: str | None) -> Iterator[None]:
    """A disk at `place`, made here; None: a folder."""
    place.mkdir(parents=True)
    if options is not None:
        mount(place, options)
    try:
        yield
    finally:
        if options is not None:
            subprocess.run(["umount", str(place)], check=True, capture_output=True)


def ordinary() -> None:
    """Give up the superuser's right to write where the rights of a folder forbid it."""
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low words, high words
    assert system.capget(header, sets) == 0
    for which in range(3):
        sets[which] &= ~_MAY_WRITE_ANYWHERE
    assert system.capset(header, sets) == 0
