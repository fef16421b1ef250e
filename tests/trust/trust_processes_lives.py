"""Runs that are killed, each in a forked process of its own; as a script, the process that forks.

A life dies by SIGKILL at its n-th touch of the folder it writes to (open, rename, remove, mkdir:
Python's audit events), before the operation, or after some CPU time. What the next life with
``--resume`` ends in is compared with an undisturbed run, byte by byte, times left out.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import mi_weightspace as mw
import probes
from mi_weightspace.cli import main as command_line
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.errors import OutputError, WeightspaceError
from mi_weightspace.models import toy
from mi_weightspace.models.arithmetic import worthwhile
from mi_weightspace.models.backends.torch_hooks import TorchLens
from probes.sae_disk import read_folder
from probes.sae_train import train_sae

TOUCHES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
NEVER = 1 << 30
VPD_SETTINGS = """\
n_components: 32
n_steps: 6
batch_size: 2
warmup_steps: 2
log_every: 1
checkpoint_every: 2
importance: {hidden: [8]}
"""


# ---- what is run -------------------------------------------------------------------------------
def ground(folder: Path) -> Path:
    """Tiny checkpoints, prompts and tokens."""
    for seed, stage in enumerate(("base", "sft")):
        toy.save_tiny("llama", folder / stage, seed=seed)
    toy.save_tiny("gpt2", folder / "gpt2", seed=0)
    draw = random.Random(0)

    def contrast(name: str, kind: Any) -> Contrast:
        def text() -> str:
            return " ".join(f"word{draw.randrange(40)}" for _ in range(4)) + " word1 word2"

        pairs = (Pair(f"i{i}", text(), text(), wording_id=f"v{i % 2}") for i in range(8))
        return Contrast(name, kind, tuple(pairs))

    contrasts = (contrast("target", "target"), *(contrast(f"c{i}", "control") for i in range(3)))
    probes.to_jsonl(ContrastSet("set", contrasts), folder / "prompts.jsonl")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(4, 300, (12, 8)))
    (folder / "vpd.yaml").write_text(VPD_SETTINGS)
    return folder


def said(*arguments: object) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return command_line([str(a) for a in arguments])


def sweep(given: Path, out: Path) -> int:
    sites = "blocks.*.mlp.*"
    return said("svd", given / "base", given / "sft", "--sites", sites, "--rank", 3, "--resume",
                "--quiet", "--out", out)  # fmt: skip


def probe(given: Path, out: Path) -> int:
    return said("probe", given / "base", "--prompts", given / "prompts.jsonl", "--quiet",
                "--out", out)  # fmt: skip


def vpd(given: Path, out: Path) -> int:
    return said("vpd", given / "gpt2", "--tokens", given / "ids.npy", "--sites", "blocks.1.attn.v",
                "--ladder", 2, "--config", given / "vpd.yaml", "--quiet", "--resume",
                "--out", out)  # fmt: skip


def sae(given: Path, out: Path) -> int:
    lens = TorchLens(toy.tiny_model("llama"), None)
    draw = torch.Generator().manual_seed(5)
    ids = [tuple(torch.randint(20, 60, (9,), generator=draw).tolist()) for _ in range(40)]
    train_sae(lens, ids, "resid_post.1", d_sae=48, steps=30, batch=64, checkpoint_every=6,
              folder=out, resume=True, progress=False)  # fmt: skip
    return 0


def loaded_report(out: Path) -> object:
    return mw.load_report(out)


@dataclass(frozen=True)
class Job:
    """Something to kill.

    Attributes:
        run: (ground, output folder) -> exit code; goes on with what is in the folder.
        read: loads a finished folder; refuses any other.
    """

    run: Callable[[Path, Path], int]
    read: Callable[[Path], object]


JOBS = {
    "sweep": Job(sweep, loaded_report),
    "probe": Job(probe, loaded_report),
    "sae": Job(sae, read_folder),
    "vpd": Job(vpd, loaded_report),
}


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
        record["files"].pop("table_history.parquet", None)  # has a column of seconds
        return json.dumps(record).encode()
    if file.name == "table_history.parquet":
        return pd.read_parquet(file).drop(columns="seconds").to_csv().encode()
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
    largest: int | None = None,
    count: Path | None = None,
) -> int:
    """Fork a process that runs the job; its id. It dies at touch `dies_at` of ``out.parent``.

    Args:
        largest: bytes at which a file can grow no more, as on a full disk (``RLIMIT_FSIZE``); what
            the life says is then in ``out.parent.parent / "said"``, which may be larger.
        count: file for the number of touches of a life that ends by itself.
    """
    child = os.fork()
    if child:
        return child
    seen, root = [0], str(out.parent)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        inside = any(isinstance(a, str) and root in a for a in map(_path, arguments))
        removed = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # of a tree
        if removed or (event in TOUCHES and inside):
            seen[0] += 1
            if seen[0] == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    code, words = 70, io.StringIO()
    try:
        sys.addaudithook(hook)
        if largest is not None:
            free = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, free[1]))
            with contextlib.redirect_stderr(words):
                code = refused(job, given, out)
            resource.setrlimit(resource.RLIMIT_FSIZE, free)
            (out.parent.parent / "said").write_text(words.getvalue())
        else:
            code = job.run(given, out)
        if count is not None:
            count.write_text(str(seen[0]))
    finally:
        sys.stderr.flush()
        os._exit(code)


def refused(job: Job, given: Path, out: Path) -> int:
    """Run a job; 1 for a refusal, whose words go to stderr."""
    try:
        return job.run(given, out)
    except OutputError as error:
        sys.stderr.write(f"{error}\n")
        return 1


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
class Trial:
    """One job's reference, and what its killed runs did.

    Attributes:
        kills: lives that were killed.
        problems: everything that was not as it must be.
    """

    name: str
    given: Path
    place: Path
    kills: int = 0
    touches: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.job, self.problems = JOBS[self.name], list[str]()
        out, count = self.place / "whole" / "out", self.place / "touches"
        out.parent.mkdir(parents=True)
        begun = os.times()
        assert ended(live(self.job, self.given, out, count=count)) == 0
        spent = os.times()
        self.seconds = spent.children_user - begun.children_user
        self.touches, self.whole = int(count.read_text()), content(out.parent)

    def one(self, label: str, moment: float) -> None:
        """Killed at a touch (a whole number) or after some seconds, then run to the end."""
        out = self.place / label / "out"
        out.parent.mkdir(parents=True)
        at = moment if isinstance(moment, int) else NEVER
        child = live(self.job, self.given, out, dies_at=at)
        code = ended(child) if at < NEVER else killed_after(child, moment)
        if code == -signal.SIGKILL:
            self.kills += 1
            self._check(f"{self.name}, {label}", out.parent)
        elif code or at < NEVER:
            self.problems.append(f"{self.name}, {label}: ended by itself, exit code {code}")
        self._finish(label, out)

    def full(self, label: str, largest: int, place: Path | None = None) -> None:
        """A disk that is full, then not any more: a refusal that names place and remedy."""
        out = self.place / label / "run" / "out" if place is None else place
        if place is None:
            out.parent.mkdir(parents=True)
        code = ended(live(self.job, self.given, out, largest=largest))
        note = out.parent.parent / "said"
        words = note.read_text() if note.exists() else ""
        self.kills += 1
        name = f"{self.name}, {label}"
        if code != 1 or "Traceback" in words:
            self.problems.append(f"{name}: exit code {code}, {words[-300:]}")
        elif str(out.parent) not in words or "free space" not in words:
            self.problems.append(f"{name}: does not say where or what to do: {words[:300]}")
        if readable(self.job, out.parent):
            self.problems.append(f"{name}: half a run loads")
        hidden = (".partial", ".tmp")
        left = [p for p in out.parent.rglob("*") if p.is_file() and p.name.endswith(hidden)]
        if left:
            self.problems.append(f"{name}: left behind {left}")
        self._finish(label, out)

    def _finish(self, label: str, out: Path) -> None:
        """Run to the end; what is there then is what an undisturbed run leaves."""
        if not self._done(out):
            code = ended(live(self.job, self.given, out))
            if code:
                self.problems.append(f"{self.name}, {label}: could not go on, exit code {code}")
        differing = {k for k in self.whole if content(out.parent).get(k) != self.whole[k]}
        if differing:
            self.problems.append(f"{self.name}, {label}: {sorted(differing)} are not the same")
        left = [k for k in content(out) if k not in {name[4:] for name in self.whole}]
        if left:
            self.problems.append(f"{self.name}, {label}: left behind {left}")

    def _done(self, out: Path) -> bool:
        return out in readable(self.job, out) and self.name not in {"sae", "vpd"}

    def _check(self, label: str, place: Path) -> None:
        """What loads now is the finished run, whole."""
        for folder in readable(self.job, place):
            own = content(folder)
            wanted = {k[4:]: v for k, v in self.whole.items() if not k.startswith("out/training/")}
            if any(own.get(k) != v for k, v in wanted.items() if own.get(k) or k[0] != "."):
                self.problems.append(f"{label}: {folder.name} loads, and is not the whole run")


def trials(names: list[str], place: Path, *, each: int, seed: int) -> list[dict[str, Any]]:
    """About `each` runs killed at touches spread over all of them (0: every one), and a third as
    many at moments; and two full disks (0: one for each size of file). Every run has a folder of
    its own."""
    given = ground(place / "ground")
    found = []
    for name in names:
        trial, draw = Trial(name, given, place / name), random.Random(f"{seed} {name}")
        step = max(1, trial.touches // each) if each else 1
        touches = range(1 + draw.randrange(step), trial.touches + 1, step)
        for at in touches:
            trial.one(f"touch-{at}", at)
        for k in range(max(1, len(touches) // 3)):
            trial.one(f"time-{k}", draw.uniform(0.05, 0.9) * trial.seconds)
        kills, killed = trial.kills, list(trial.problems)
        out = place / name / "whole" / "out"
        sizes = sorted({p.stat().st_size for p in out.rglob("*") if p.is_file()} - {0})
        for size in [sizes[0], sizes[-1]] if each else sizes:
            trial.full(f"full-{size - 1}", size - 1)
        found.append({"name": name, "touches": trial.touches, "seconds": trial.seconds,
                      "kills": kills, "problems": killed, "full": trial.kills - kills,
                      "full_problems": trial.problems[len(killed):]})  # fmt: skip
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    worthwhile()  # asked once: every life inherits the answer, and what is imported here
    folder, jobs, n_each, first_seed = sys.argv[1:]
    print(json.dumps(trials(jobs.split(","), Path(folder), each=int(n_each), seed=int(first_seed))))
