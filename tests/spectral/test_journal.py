"""Results survive SIGKILL, are never stale, and do not depend on who computed them."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import journal_job
from journal_job import Settings, decompose, difference

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import CheckpointError, ConfigError, MismatchError, OutputError
from mi_weightspace.models.backends.torch_hooks import TorchLens
from mi_weightspace.models.toy import save_tiny, tiny_model
from mi_weightspace.models.weights import Difference, ModuleSource
from mi_weightspace.spectral import journal
from mi_weightspace.spectral.journal import file_key, read, run_sites

N_LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("lineage")
    for seed, name in enumerate(("base", "sft")):
        save_tiny("llama", place / name, seed=seed, n_layers=N_LAYERS)
    return place


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def hashes(out: Path) -> dict[str, str]:
    files = sorted(out.glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def table(found: list[Components], path: Path) -> bytes:
    rows = [{"site": f.site.name, "s1": float(f.scale[0]), **f.facts} for f in found]
    pd.DataFrame(rows).to_parquet(path)
    return path.read_bytes()


def same(one: Components, two: Components) -> bool:
    tensors = all(torch.equal(getattr(one, n), getattr(two, n)) for n in ("read", "write", "scale"))
    names = ("site", "method", "stage", "source", "facts")
    return tensors and all(getattr(one, n) == getattr(two, n) for n in names)


def start(folder: Path, out: Path, log: Path, sleep: float) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    env = os.environ | {
        "JOURNAL_SLEEP": str(sleep),
        "JOURNAL_LOG": str(log),
        "OMP_NUM_THREADS": "1",
    }
    env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    command = [sys.executable, str(here / "journal_job.py"), str(folder), str(out), "2"]
    return subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL)


def wait_for(out: Path, n: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.safetensors"))) < n:
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(log: Path) -> list[tuple[str, str, int]]:
    """(matrix, threads, process) of every job begun."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(name, threads, int(pid)) for name, threads, pid in lines]


def test_a_killed_sweep_loses_one_matrix_per_worker(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole process group killed, then run to the end: the same bytes, nothing done twice."""
    whole = journal_job.sweep(folder, tmp_path / "reference", 1)
    reference = hashes(tmp_path / "reference")
    assert len(reference) == len(whole) == 7 * N_LAYERS + 2
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(folder, out, log, 0.1)
    wait_for(out, 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = hashes(out)
    assert 6 <= len(done) < len(reference)
    assert done.items() <= reference.items()
    assert len(started(log)) - len(done) <= 2, "two workers, one matrix each"
    assert {threads for _, threads, _ in started(log)} == {"1"}

    log.unlink()
    monkeypatch.setenv("JOURNAL_LOG", str(log))
    again = journal_job.sweep(folder, out, 1)
    assert hashes(out) == reference
    assert len(started(log)) == len(reference) - len(done)
    assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    assert table(whole, tmp_path / "a.parquet") == table(again, tmp_path / "b.parquet")


@pytest.mark.slow
def test_repeated_kills_of_workers(folder: Path, tmp_path: Path) -> None:
    """One worker killed: the sweep stops with an error, keeps its results and can go on."""
    journal_job.sweep(folder, tmp_path / "reference", 1)
    reference = hashes(tmp_path / "reference")
    out, log = tmp_path / "out", tmp_path / "log"
    done: dict[str, str] = {}
    for _ in range(3):
        log.unlink(missing_ok=True)
        process = start(folder, out, log, 0.15)
        wait_for(out, len(done) + 4, process)
        worker = started(log)[-1][2]
        assert worker != process.pid
        psutil.Process(worker).send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
        now = hashes(out)
        assert done.items() < now.items() <= reference.items()
        assert len(started(log)) - (len(now) - len(done)) <= 2
        done = now
    process = start(folder, out, log, 0.0)
    assert process.wait(120) == 0
    assert hashes(out) == reference


@pytest.mark.quick
def test_results_come_back_whole_and_in_order(folder: Path, tmp_path: Path) -> None:
    source = difference(folder)
    keys = [(source, site) for site in source.sites("blocks.0.*")]
    memory = run_sites(decompose, keys, Settings(), progress=False)
    stored = run_sites(decompose, keys, Settings(), folder=tmp_path, progress=False)
    assert [parts.site.name for parts in memory] == [site.name for _, site in keys]
    assert all(same(a, b) for a, b in zip(memory, stored, strict=True))
    assert memory[0].facts["edge"] == float("inf")
    assert memory[0].source is not None


@pytest.mark.quick
def test_workers_used_again_after_a_change_of_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [(difference(folder), site) for site in difference(folder).sites("blocks.*.mlp.*")]
    for name in ("one", "two"):  # the second time the same processes
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        run_sites(decompose, keys, Settings(), n_jobs=2, folder="kept", progress=False)
        assert len(hashes(tmp_path / name / "kept")) == len(keys)


def test_what_is_there_is_not_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = difference(folder)
    keys = [(source, site) for site in source.sites("blocks.0.*")]
    monkeypatch.setenv("JOURNAL_LOG", str(tmp_path / "log"))

    def runs(settings: Settings = Settings()) -> int:  # noqa: B008
        (tmp_path / "log").write_text("")
        run_sites(decompose, keys, settings, folder=tmp_path / "out", progress=False)
        return len((tmp_path / "log").read_text().splitlines())

    assert [runs(), runs()] == [7, 0]
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    assert runs() == 1
    assert [runs(Settings(rank=2)), runs(Settings(rank=2)), runs()] == [7, 0, 0]


@pytest.mark.quick
def test_largest_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = difference(folder)
    monkeypatch.setenv("JOURNAL_LOG", str(tmp_path / "log"))
    keys = [(source, site) for site in source.sites()]
    run_sites(decompose, keys, Settings(), progress=False)
    order = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    sizes = {site.name: site.d_out * site.d_in for _, site in keys}
    assert [sizes[n] for n in order] == sorted(sizes.values(), reverse=True)


@pytest.mark.quick
def test_shards_cover_everything_once(folder: Path, tmp_path: Path) -> None:
    source = difference(folder)
    keys = [(source, site) for site in source.sites()]
    seen: list[str] = []
    for i in range(3):
        found = run_sites(
            decompose, keys, Settings(), shard=(i, 3), folder=tmp_path, progress=False
        )
        assert len(found) in (12, 13)
        assert len(list(tmp_path.glob("*.safetensors"))) == len(seen) + len(found)
        seen += [parts.site.name for parts in found]
    assert sorted(seen) == sorted(site.name for _, site in keys)
    for shard in ((3, 3), (-1, 3), (0, 0)):
        with pytest.raises(ConfigError, match="shard"):
            run_sites(decompose, keys, Settings(), shard=shard, progress=False)


@pytest.mark.quick
def test_names_change_with_everything_that_decides_the_result(folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "sft")):
        save_tiny("llama", tmp_path / name, seed=seed, n_layers=N_LAYERS)
    source = difference(tmp_path)
    sites = source.sites()
    base = file_key(decompose, source, sites[3], Settings())
    assert file_key(decompose, difference(tmp_path), sites[3], Settings()) == base
    others = [
        file_key(decompose, source, sites[4], Settings()),
        file_key(decompose, source, sites[3], Settings(rank=4)),
        file_key(decompose, difference(tmp_path, "dpo"), sites[3], Settings()),
        file_key(decompose, Difference(source.after, source.before, "sft"), sites[3], Settings()),
        file_key(journal_job.sweep, source, sites[3], Settings()),  # pyright: ignore[reportArgumentType]
    ]
    # one entry that no sample of the fingerprint sees, saved under the same name
    from safetensors.torch import load_file, save_file

    file = tmp_path / "sft" / "model.safetensors"
    tensors = load_file(file)
    old = difference(tmp_path).after.fingerprint
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] += 1
    save_file(tensors, file, {"format": "pt"})
    assert difference(tmp_path).after.fingerprint == old
    others.append(file_key(decompose, difference(tmp_path), sites[3], Settings()))
    assert len({base, *others}) == len(others) + 1


@pytest.mark.quick
def test_live_models_are_told_apart_entry_by_entry(tmp_path: Path) -> None:
    models = [tiny_model("llama", seed=s) for s in (0, 1)]

    def keys() -> list[str]:
        before, after = (
            ModuleSource(TorchLens(m), name) for m, name in zip(models, "ab", strict=True)
        )
        source = Difference(before, after, stage="sft")
        return [file_key(decompose, source, s, Settings()) for s in source.sites("blocks.1.mlp.*")]

    first = keys()
    assert keys() == first
    with torch.no_grad():
        models[1].model.layers[1].mlp.down_proj.weight[3, 4] += 1
    changed = [a != b for a, b in zip(first, keys(), strict=True)]
    assert sum(changed) >= 1


def test_workers_and_threads_give_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = difference(folder)
    keys = [(source, site) for site in source.sites("blocks.0.*")]
    alone = run_sites(decompose, keys, Settings(), progress=False)
    processes = run_sites(decompose, keys, Settings(), n_jobs=2, progress=False)
    live = [
        ModuleSource(TorchLens(tiny_model("llama", seed=s, n_layers=5)), str(s)) for s in (0, 1)
    ]
    held = Difference(live[0], live[1], stage="sft")
    torch.set_num_threads(2)
    monkeypatch.setenv("JOURNAL_LOG", str(tmp_path / "log"))
    threads = run_sites(
        decompose, [(held, site) for _, site in keys], Settings(), n_jobs=2, progress=False
    )
    assert {t for _, t, _ in started(tmp_path / "log")} == {"1"}
    assert {pid for _, _, pid in started(tmp_path / "log")} == {os.getpid()}
    assert torch.get_num_threads() == 2
    for a, b, c in zip(alone, processes, threads, strict=True):
        assert same(a, b)
        assert torch.equal(a.write, c.write)
    with pytest.raises(CheckpointError, match="Train again"):
        run_sites(decompose, keys, Settings(fail_at=keys[2][1].name), n_jobs=2, progress=False)


@pytest.mark.quick
def test_damaged_results_are_refused(folder: Path, tmp_path: Path) -> None:
    source = difference(folder)
    keys = [(source, site) for site in source.sites("blocks.0.mlp.*")]
    run_sites(decompose, keys, Settings(), folder=tmp_path, progress=False)
    file = tmp_path / f"{file_key(decompose, *keys[0], Settings())}.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(OutputError, match="Delete the file"):
        run_sites(decompose, keys, Settings(), folder=tmp_path, progress=False)
    with pytest.raises(OutputError, match="Delete the file"):
        read(tmp_path / "absent.safetensors", keys[0][1])


@pytest.mark.quick
def test_a_reader_never_sees_half_a_result(folder: Path, tmp_path: Path) -> None:
    source = difference(folder)
    site = source.sites("blocks.0.mlp.out")[0]
    file = tmp_path / "result.safetensors"
    journal.write(file, decompose(source, site, Settings(rank=2)))
    old = file.read_bytes()
    with file.open("rb") as reader:
        journal.write(file, decompose(source, site, Settings(rank=3)))
        assert reader.read() == old
    assert file.read_bytes() != old
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.quick
def test_only_old_temporaries_are_removed(folder: Path, tmp_path: Path) -> None:
    old, recent = tmp_path / ".a-1.tmp", tmp_path / ".a-2.tmp"
    for file in (old, recent):
        file.write_text("half")
    long_ago = time.time() - 2 * journal._STALE_SECONDS
    os.utime(old, (long_ago, long_ago))
    run_sites(decompose, [], Settings(), folder=tmp_path, progress=False)
    assert (old.exists(), recent.exists()) == (False, True)


@pytest.mark.quick
def test_refusals_cross_processes() -> None:
    error = MismatchError("stages", given="a", expected="b", remedy="c")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is MismatchError
    assert str(back) == str(error)
    assert (back.subject, back.given, back.expected, back.remedy) == ("stages", "a", "b", "c")
