"""A run killed anywhere and resumed ends in the same bits (SPEC 20–23).

Killing needs processes. One child process imports everything once and forks the lives that are
killed; run as a script, this file is that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vpd_problems as problems

from mi_weightspace.core.errors import ConfigError, OutputError
from mi_weightspace.models.arithmetic import worthwhile
from mi_weightspace.vpd import interrupt, state
from mi_weightspace.vpd import train as loop
from mi_weightspace.vpd.state import artefact_hash, latest
from mi_weightspace.vpd.train import METRICS, Trained, train

LIVES = 60
"""More lives than this mean that a run makes no progress."""


# ---- what is run -------------------------------------------------------------------------------
def toy_run(folder: Path | None, **options: Any) -> Trained:
    terms = [{"source": "uniform", "routing": "uniform_k_subset"}, *problems.KEPT.values()]
    config = problems.toy_config(reconstruction=terms, n_steps=20, checkpoint_every=2, log_every=3)
    return train(
        problems.toy_host(), problems.toy_stream(), config, folder=folder, progress=False, **options
    )


def gpt2_run(folder: Path | None, **options: Any) -> Trained:
    config = problems.gpt2_config(
        reconstruction=[
            {"source": "fresh_pgd", "routing": "all", "scope": "c"},
            problems.KEPT["bsc"] | {"hidden_weight": 0.1},
            problems.KEPT["pooled"],
        ],
        normalise="zero_mask",
        speed={"cache_clean": True},
    )
    return train(
        problems.gpt2_host(),
        problems.token_stream(),
        config,
        folder=folder,
        progress=False,
        **options,
    )


RUNS: dict[str, Callable[..., Trained]] = {"toy": toy_run, "gpt2": gpt2_run}


def ending(trained: Trained, folder: Path) -> dict[str, Any]:
    """The hash of everything trained, and the log without its times."""
    objective = trained.objective
    tensors = dict(objective.factors.named()) | dict(objective.importance.state_dict())
    for at, sources in objective.adversaries.kept.items():
        tensors |= {f"sources/{at}/{k}": v for k, v in sources.named().items()}
    assert objective.frequencies.average is not None
    tensors["frequencies"] = objective.frequencies.average
    log = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for record in log:
        record.pop("seconds")
    return {"hash": artefact_hash(tensors.items()), "log": log, "tensors": len(tensors)}


# ---- lives, and how they end -------------------------------------------------------------------
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(run: Callable[..., Trained], folder: Path, *, point: str | None = None) -> int:
    """Fork a process that runs (or continues) the run; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if point is not None:
            KILL_POINTS[point]()
        found = ending(run(folder, resume=True), folder)
        (folder / "ending.json").write_text(json.dumps(found))
        code = 0
    finally:
        os._exit(code)


def calls(owner: Any, name: str, number: int, act: Callable[..., Any]) -> None:
    """At the `number`-th call of `owner.name`, do `act` (given its arguments), then die."""
    original, seen = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            act(*args, **kwargs)
            die()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def cut_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    SAVE(tensors, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def cut_line(place: Path | None, record: dict[str, Any]) -> None:
    assert place is not None
    with (place / METRICS).open("a") as handle:
        handle.write(json.dumps(record)[:20])


def nothing(*_: Any, **__: Any) -> None:
    return None


SAVE, RENAME, RMTREE = state.save_tensors, Path.rename, shutil.rmtree
KILL_POINTS: dict[str, Callable[[], None]] = {
    "inside warm-up": lambda: calls(loop, "faithfulness", 5, nothing),
    "half of the sources written": lambda: calls(state, "save_tensors", 1, cut_file),
    "half of the shared file written": lambda: calls(state, "save_tensors", 4, cut_file),
    "checkpoint written, not named": lambda: calls(Path, "rename", 1, nothing),
    "checkpoint named, old one still there": lambda: calls(Path, "rename", 2, RENAME),
    "old one about to be removed": lambda: calls(state, "_remove", 1, nothing),
    "log about to be exchanged": lambda: calls(Path, "replace", 1, nothing),
    "half a line of the log": lambda: calls(loop, "_write_record", 3, cut_line),
    "after a line, before its checkpoint": lambda: calls(loop, "save_state", 1, nothing),
}


def cpu_seconds(process: int, since: float) -> float:
    """CPU time of another process by its clock (Linux: ``(~pid << 3) | 2``); else time passed."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:
        return time.monotonic() - since


def finished(process: int) -> bool:
    """Wait; whether it ended by itself (False: by SIGKILL)."""
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return True


def survived(process: int, seconds: float) -> bool:
    """Kill the process once it has used `seconds` of CPU; whether it ended before that."""
    since, exited = time.monotonic(), os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, process, exited) is None:
        if cpu_seconds(process, since) >= seconds:
            os.kill(process, signal.SIGKILL)
            break
        time.sleep(0.002)
    return finished(process)


def killed_run(run: Callable[..., Trained], folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Run, killed at random moments at least `kills` times; anew in other folders if it finishes
    before. What every finished run ended in, and one uninterrupted run's end."""
    draw = random.Random(seed)
    whole = folder / "whole"
    child = live(run, whole)
    used, since = 0.0, time.monotonic()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(OSError):
            used = max(used, cpu_seconds(child, since))
        time.sleep(0.002)
    assert finished(child)
    count, lives, ends = 0, 0, []
    while count < kills:
        place = folder / f"killed-{len(ends)}"
        while True:
            lives += 1
            assert lives < LIVES, "no progress"
            left = kills - count
            seconds = draw.uniform(0.05, 0.6) * used if left > 0 else float("inf")
            if survived(live(run, place), seconds):
                break
            count += 1
        ends.append(_ending_of(place))
    return {"whole": _ending_of(whole), "ends": ends, "kills": count}


def pointed_run(run: Callable[..., Trained], folder: Path) -> dict[str, Any]:
    """Killed at each of `KILL_POINTS` in turn, each life resuming the one before."""
    whole, place = folder / "whole", folder / "killed"
    assert finished(live(run, whole))
    for point in KILL_POINTS:
        assert not finished(live(run, place, point=point)), f"never reached: {point}"
    assert finished(live(run, place))
    left = sorted(p.name for p in place.iterdir() if p.name.startswith("."))
    return {"whole": _ending_of(whole), "ends": [_ending_of(place)], "left": left}


def _ending_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ending.json").read_text())


def in_child(folder: Path, kills: int, seed: int, *, points: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), str(kills), str(seed), str(int(points))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, kills: str, seed: str, points: str) -> None:
    torch.set_num_threads(1)
    worthwhile()  # asked once: every life inherits the answer, and what is imported here
    problems.gpt2_host()
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        found[name] = killed_run(run, Path(folder) / name, int(kills), int(seed))
    if int(points):
        found["points"] = pointed_run(toy_run, Path(folder) / "points")
    print(json.dumps(found))


# ---- SIGKILL -----------------------------------------------------------------------------------
def assert_same_end(found: dict[str, Any]) -> None:
    whole = found["whole"]
    assert whole["tensors"] > 10 and len(whole["log"]) > 5
    for end in found["ends"]:
        assert end["hash"] == whole["hash"]
        assert end["log"] == whole["log"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_child(tmp_path_factory.mktemp("killed"), 5, 0, points=True)


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments_ends_in_the_same_bits(killed: dict[str, Any], name: str) -> None:
    """SPEC 20: persistent (bsc, bc with a sigmoid), merged and pooled sources, running averages,
    cached clean passes; on a toy and on a language model."""
    assert killed[name]["kills"] >= 5
    assert_same_end(killed[name])


def test_killed_at_the_worst_moments_ends_in_the_same_bits(killed: dict[str, Any]) -> None:
    """SPEC 20, 21: inside warm-up, a checkpoint, a removal, the log; nothing is left behind."""
    found = killed["points"]
    assert_same_end(found)
    assert found["left"] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_kills(tmp_path: Path, seed: int) -> None:
    """SPEC 20, with at least 20 kills of each run."""
    for found in in_child(tmp_path, 20, seed, points=False).values():
        assert found["kills"] >= 20
        assert_same_end(found)


# ---- Ctrl-C ------------------------------------------------------------------------------------
@pytest.fixture
def heard() -> Iterator[None]:
    """Python's own handler of SIGINT, which a program started in the background does not get."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    """SPEC 22."""

    def at_six(record: dict[str, Any]) -> None:
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"after 7 of 20 steps.*resume=True"):
        toy_run(tmp_path / "stopped", on_log=at_six)
    newest = latest(tmp_path / "stopped")
    assert newest is not None and newest.name == "state-00000007"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = ending(toy_run(tmp_path / "stopped", resume=True), tmp_path / "stopped")
    whole = ending(toy_run(tmp_path / "whole"), tmp_path / "whole")
    assert resumed == whole


@pytest.mark.usefixtures("heard")
def test_ctrl_c_between_checkpoints_and_without_a_folder(tmp_path: Path) -> None:
    """SPEC 22: step 6 is no multiple of `checkpoint_every`, and is saved all the same."""
    config = problems.toy_config(checkpoint_every=100)

    def at_five(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    problem = problems.toy_host(), problems.toy_stream(), config
    with pytest.raises(KeyboardInterrupt):
        train(*problem, folder=tmp_path, progress=False, on_log=at_five)
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-00000006"]
    with pytest.raises(KeyboardInterrupt, match="nothing is kept"):
        train(*problem, progress=False, on_log=at_five)


@pytest.mark.usefixtures("heard")
def test_a_second_ctrl_c_does_not_wait() -> None:
    with interrupt.Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_programs_own_handler_is_kept() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.Interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ---- bad input ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy run with checkpoints at 9 and 12."""
    folder = tmp_path_factory.mktemp("run")
    train(
        problems.toy_host(),
        problems.toy_stream(),
        problems.toy_config(),
        folder=folder,
        progress=False,
    )
    assert sorted(p.name for p in folder.glob("state-*")) == ["state-00000009", "state-00000012"]
    return folder


def resume(folder: Path, host: Any = None, **changes: Any) -> Trained:
    config = problems.toy_config(**changes)
    given = host or problems.toy_host()
    return train(given, problems.toy_stream(), config, folder=folder, resume=True, progress=False)


def test_a_changed_configuration_is_refused_by_name(stopped: Path) -> None:
    """SPEC 23."""
    with pytest.raises(ConfigError, match=r"changed: lr, minimality\.weight\)"):
        resume(stopped, lr=0.5, minimality={"weight": 0.1})
    with pytest.raises(ConfigError, match=r"changed: reconstruction\.1\.lr\)"):
        terms = [{"source": "uniform", "routing": "all"}, problems.KEPT["bsc"] | {"lr": 0.1}]
        resume(stopped, reconstruction=terms)
    resume(stopped, log_every=4, checkpoint_every=5)  # decide nothing


def test_changed_weights_are_refused(stopped: Path) -> None:
    """SPEC 23."""
    host = problems.toy_host()
    with torch.no_grad():
        next(host.module.parameters())[0, 0] += 1e-3
    with pytest.raises(ConfigError, match="model of the run to resume"):
        resume(stopped, host)


def test_another_number_of_processes_is_refused(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPEC 23."""
    monkeypatch.setattr(state, "world", lambda: 2)
    with pytest.raises(ConfigError, match=r"number of processes.*got 2.*expected 1"):
        resume(stopped)


def test_another_arithmetic_is_refused(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SPEC 23: the bits depend on it."""
    now = state.worthwhile()
    monkeypatch.setattr(state, "worthwhile", lambda: not now)  # whatever was decided
    with pytest.raises(ConfigError, match=r"speed\.fast_float32"):
        resume(stopped)


def test_a_used_folder_is_refused_without_resume(stopped: Path) -> None:
    problem = problems.toy_host(), problems.toy_stream(), problems.toy_config()
    with pytest.raises(OutputError, match="resume=True"):
        train(*problem, folder=stopped, progress=False)


def test_a_finished_run_resumes_to_itself(stopped: Path) -> None:
    before = (stopped / METRICS).read_text()
    again = resume(stopped)
    assert (stopped / METRICS).read_text() == before
    assert [json.dumps(r) for r in again.history] == before.splitlines()


@pytest.mark.parametrize("name", ["state.json", "shared.safetensors", "sources-0.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(
    stopped: Path, tmp_path: Path, name: str, how: str
) -> None:
    """SPEC 21."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    whole = ending(resume(folder), folder)
    newest = folder / "state-00000012"
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if how == "cut":
        (newest / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(OutputError, match="state-00000012") as refused:
        resume(folder)
    assert "the one before it" in refused.value.remedy
    shutil.rmtree(newest)
    assert ending(resume(folder), folder) == whole


def test_leftovers_of_killed_writes_are_swept(stopped: Path, tmp_path: Path) -> None:
    """SPEC 21."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    shutil.rmtree(folder / "state-00000012")
    (folder / ".state-00000012.partial").mkdir()
    (folder / ".state-00000012.partial" / "shared.safetensors").write_text("half")
    (folder / ".state-00000003.old.partial").mkdir()
    resume(folder)
    assert not list(folder.glob(".state-*"))


if __name__ == "__main__":
    main(*sys.argv[1:])
