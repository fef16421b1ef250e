"""Runs that are killed, or whose disk is full or read-only, each in a forked process of its own; as
a script, the process that forks.

A life dies by SIGKILL at its n-th touch of the folder it writes to (open, rename, remove, mkdir:
Python's audit events), before the operation, or after some CPU time. What the next life with
``--resume`` ends in is compared with an undisturbed run, byte by byte, times left out. So is what a
life ends in that finds room where the last one found none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from trust_counter import cpu_seconds
from trust_processes_disk import LARGE, disk, mount, ordinary
from trust_processes_jobs import JOBS, Job, ground

from mi_weightspace.core.errors import OutputError, WeightspaceError
from mi_weightspace.models.arithmetic import worthwhile

TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
NEVER = 1 << 30
PAGE = 4096
UNLIMITED = resource.RLIM_INFINITY
KINDS = ("kills", "limits", "disks", "places")
PLACES = ("file", "below a file", "rights", "mount", "mount, empty")


# ---- what it ends in ---------------------------------------------------------------------------
def content(folder: Path) -> dict[str, str]:
    """Hash of every file, times left out; a file's name tells what it is."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(timeless(file)).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def timeless(file: Path) -> bytes:
    if file.name == "report.json":
        record = json.loads(file.read_text())
        for key in ("timings", "sha256"):
            del record[key]
        for name in ("table_history.parquet", "table.parquet"):  # may have a column of seconds
            record["files"].pop(name, None)
        return json.dumps(record).encode()
    if file.suffix == ".parquet":
        return pd.read_parquet(file).drop(columns="seconds", errors="ignore").to_csv().encode()
    if file.name == "metrics.jsonl":
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return json.dumps([{k: line[k] for k in line if k != "seconds"} for line in lines]).encode()
    return file.read_bytes()


def readable(job: Job, place: Path) -> list[Path]:
    """Folders in `place` that load as a result, however they are named."""
    found = []
    for folder in (place, *(p for p in place.rglob("*") if p.is_dir())):
        with contextlib.suppress(WeightspaceError):
            job.read(folder)
            found.append(folder)
    return found


# ---- lives -------------------------------------------------------------------------------------
def live(
    job: Job,
    given: Path,
    out: Path,
    *,
    dies_at: int = NEVER,
    count: Path | None = None,
    note: Path | None = None,
    before: Callable[[], None] | None = None,
) -> int:
    """Fork a process that runs the job; its id. It dies at touch `dies_at` of ``out.parent``.

    Args:
        count: file for the number of touches of a life that ends by itself.
        note: file for what a life says that is refused, and whether it had opened a model.
        before: what is done first, in the life.
    """
    child = os.fork()
    if child:
        return child
    seen, models, root = [0], [0], str(out.parent)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        names = [a for a in map(_path, arguments) if isinstance(a, str)]
        models[0] += event == "open" and any(_is_model(name, given) for name in names)
        removed = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # of a tree
        if removed or (event in TOUCHES and any(root in name for name in names)):
            seen[0] += 1
            if seen[0] == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 70
    try:
        if before is not None:
            before()
        sys.addaudithook(hook)
        if note is None:
            code = job.run(given, out)
        else:
            code, words = refused(job, given, out)
            resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
            note.write_text(json.dumps({"words": words, "models": models[0]}))
        if count is not None:
            count.write_text(str(seen[0]))
    finally:
        sys.stderr.flush()
        os._exit(code)


def refused(job: Job, given: Path, out: Path) -> tuple[int, str]:
    """Run a job; 1 for a refusal, and what it says."""
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        try:
            return job.run(given, out), words.getvalue()
        except OutputError as error:
            return 1, words.getvalue() + f"{error}\n"
        except Exception:  # noqa: BLE001 — what a user would see
            return 1, words.getvalue() + traceback.format_exc()


def at_most(size: int) -> Callable[[], None]:
    """A file can grow no more than to `size`, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, UNLIMITED))


def _is_model(name: str, given: Path) -> bool:
    return name.startswith(str(given)) and name.endswith("config.json")


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def ended(child: int) -> int:
    """Exit code; −9 for a killed process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(child: int, seconds: float) -> int:
    """Kill a process after some CPU time, unless it ends before."""
    gone = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, child, gone) is None:
        if time.clock_gettime((~child << 3) | 2) >= seconds:  # the process' own clock (Linux)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return ended(child)


@dataclass
class Tally:
    """One figure of a job: cases, problems and the CPU seconds of both."""

    count: int = 0
    problems: list[str] = field(default_factory=list)
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        begun = cpu_seconds()
        yield
        self.cpu_seconds += cpu_seconds() - begun


@dataclass
class Trial:
    """One job's reference, and what its disturbed runs did."""

    name: str
    given: Path
    place: Path
    touches: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.job = JOBS[self.name]
        self.found = {kind: Tally() for kind in KINDS}

    def reference(self) -> None:
        """The undisturbed run."""
        out, count = self.place / "whole" / "out", self.place / "touches"
        out.parent.mkdir(parents=True)
        begun = os.times()
        assert ended(live(self.job, self.given, out, count=count)) == 0, self.name
        self.seconds = os.times().children_user - begun.children_user
        self.touches, self.whole = int(count.read_text()), content(out.parent)
        self.sizes = sorted({p.stat().st_size for p in out.rglob("*") if p.is_file()} - {0})
        pages = [-(-p.stat().st_size // PAGE) for p in out.rglob("*") if p.is_file()]
        self.need, self.entries = PAGE * sum(pages), len(list(out.parent.rglob("*")))

    # ---- killed ----
    def kill(self, label: str, moment: float) -> None:
        """Killed at a touch (a whole number) or after some seconds, then run to the end."""
        out = self.place / label / "out"
        out.parent.mkdir(parents=True)
        at = moment if isinstance(moment, int) else NEVER
        child = live(self.job, self.given, out, dies_at=at)
        code = ended(child) if at < NEVER else killed_after(child, moment)
        tally = self.found["kills"]
        if code == -signal.SIGKILL:
            tally.count += 1
            tally.problems += self._loaded(f"{self.name}, {label}", out.parent)
        elif code or at < NEVER:
            tally.problems.append(f"{self.name}, {label}: ended by itself, exit code {code}")
        tally.problems += self._finish(label, out)

    # ---- no room ----
    def full(self, label: str, largest: int) -> None:
        """No file can grow beyond `largest`; then it can."""
        self._no_room("limits", label, None, at_most(largest), "File too large")

    def full_disk(self, label: str, options: str) -> None:
        """A small disk (options of tmpfs), which becomes larger."""
        self._no_room("disks", label, options, None, "No space left on device")

    def _no_room(
        self, kind: str, label: str, options: str | None, before: Any, happened: str
    ) -> None:
        place, note = self.place / label / "run", self.place / label / "said.json"
        out, name, tally = place / "out", f"{self.name}, {label}", self.found[kind]
        with disk(place, options):
            tally.count += 1
            code = ended(live(self.job, self.given, out, note=note, before=before))
            tally.problems += said_once(name, code, note, place, (happened, "ree space"))
            if readable(self.job, place):
                tally.problems.append(f"{name}: half a run loads")
            tally.problems += [f"{name}: left behind {p}" for p in hidden(place)]
            if options is not None:
                mount(place, LARGE)
            tally.problems += self._finish(label, out)

    # ---- read-only ----
    def read_only(self, label: str) -> None:
        """A place of one kind of `PLACES` that cannot be written; refused before any work."""
        place, note = self.place / label / "run", self.place / label / "said.json"
        out, name, tally = place / "out", f"{self.name}, {label}", self.found["places"]
        mounted = label.startswith("mount")
        with disk(place, "size=1m" if mounted else None):
            if label in ("file", "below a file"):
                out.write_text("mine")
            elif label != "mount":
                out.mkdir()
            if mounted:
                mount(place, "ro")
            if label == "rights":
                out.chmod(0o555)
            target = out / "below" if label in ("below a file", "rights") else out
            before, there = ordinary if label == "rights" else None, listed(place)
            tally.count += 1
            code = ended(live(self.job, self.given, target, note=note, before=before))
            tally.problems += said_once(name, code, note, place, ("Choose another",))
            if listed(place) != there:
                tally.problems.append(f"{name}: left {set(listed(place)) - set(there)}")
            if note.exists() and json.loads(note.read_text())["models"]:
                tally.problems.append(f"{name}: models were opened first")

    # ---- afterwards ----
    def _finish(self, label: str, out: Path) -> list[str]:
        """Run to the end; what is there then is what an undisturbed run leaves."""
        problems = []
        if self.job.again or out not in readable(self.job, out):
            code = ended(live(self.job, self.given, out))
            if code:
                problems.append(f"{self.name}, {label}: could not go on, exit code {code}")
        own = content(out.parent)
        differing = {k for k in self.whole if own.get(k) != self.whole[k]}
        if differing:
            problems.append(f"{self.name}, {label}: {sorted(differing)} are not the same")
        left = [k for k in content(out) if f"out/{k}" not in self.whole]
        left += [str(p.relative_to(out.parent)) for p in hidden(out.parent)]
        if left:
            problems.append(f"{self.name}, {label}: left behind {left}")
        return problems

    def _loaded(self, label: str, place: Path) -> list[str]:
        """What loads now is the finished run, whole."""
        problems = []
        for folder in readable(self.job, place):
            own = content(folder)
            wanted = {k[4:]: v for k, v in self.whole.items() if not k.startswith("out/training/")}
            if any(own.get(k) != v for k, v in wanted.items() if own.get(k) or k[0] != "."):
                problems.append(f"{label}: {folder.name} loads, and is not the whole run")
        return problems


def said_once(name: str, code: int, note: Path, place: Path, needed: tuple[str, ...]) -> list[str]:
    """A refusal: exit code 1 and one message, with the place and whatever else it needs."""
    if code != 1 or not note.exists():
        return [f"{name}: exit code {code}"]
    words = json.loads(note.read_text())["words"].strip()
    if "Traceback" in words or len(words.splitlines()) != 1:
        return [f"{name}: not one message: {words[-400:]}"]
    absent = [part for part in (str(place), *needed) if part not in words]
    return [f"{name}: does not say {absent}: {words[:400]}"] if absent else []


def hidden(place: Path) -> list[Path]:
    """What writers call what is not finished."""
    return [p for p in place.rglob("*") if p.name.endswith((".partial", ".tmp"))]


def listed(place: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in place.rglob("*")}


# ---- the script --------------------------------------------------------------------------------
def trials(plan: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    """Every job of a plan, each run in a folder of its own.

    Args:
        plan: ``seed``; ``mounts``, whether this process may; and by kind of `KINDS` the names of
            jobs, each with how many cases of it (0: all of them), see `run`.
    """
    before = cpu_seconds()
    given = ground(place / "ground")
    spent, found = cpu_seconds() - before, []
    for name in JOBS:
        asked = [kind for kind in KINDS if name in plan.get(kind, ())]
        if not asked:
            continue
        trial = Trial(name, given, place / name)
        with trial.found[asked[0]].timed():
            if asked != ["places"]:
                trial.reference()
        for kind in asked:
            with trial.found[kind].timed():
                draw = random.Random(f"{plan['seed']} {name}")
                run(trial, kind, draw, plan[kind][name], plan["mounts"])
        tallies = {kind: vars(trial.found[kind]) for kind in asked}
        found.append({"name": name, "touches": trial.touches, "found": tallies})
    next(iter(found[0]["found"].values()))["cpu_seconds"] += spent
    return found


def run(trial: Trial, kind: str, draw: random.Random, n: int, mounts: bool) -> None:
    """Cases of a kind. Killed: at about `n` touches spread over all, and at a third as many
    moments. Limits: the largest file is too large; then the least; all. Disks: of half of what is
    written; all: of several shares of it, and for few files."""
    if kind == "kills":
        step = max(1, trial.touches // n) if n else 1
        touches = range(1 + draw.randrange(step), trial.touches + 1, step)
        for at in touches:
            trial.kill(f"touch-{at}", at)
        for k in range(max(1, len(touches) // 3)):
            trial.kill(f"time-{k}", draw.uniform(0.05, 0.9) * trial.seconds)
    elif kind == "limits":
        sizes = sorted({trial.sizes[-1], *trial.sizes[: n - 1]}) if n else trial.sizes
        for size in sizes:
            least = size - max(1, size // 20)  # a record varies by the digits of its timings
            trial.full(f"full-{least}", least)
    elif kind == "disks":
        for share in (50,) if n else (5, 20, 35, 50, 65, 80, 95):
            pages = max(1, trial.need * share // 100 // PAGE)
            trial.full_disk(f"disk-{share}", f"size={pages * PAGE}")
        for files in () if n else (2, 3, 4, 6):  # and folders, the disk's own among them
            if files <= trial.entries:
                trial.full_disk(f"files-{files}", f"size=64m,nr_inodes={files}")
    else:
        for label in PLACES:
            if mounts or not label.startswith("mount"):
                trial.read_only(label)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worthwhile()  # asked once: every life inherits the answer, and what is imported here
    print(json.dumps(trials(json.loads(sys.argv[2]), Path(sys.argv[1]))))
