"""A sweep over matrices that survives being killed, on one machine or many.

Each finished matrix is one safetensors file in a folder, written under a temporary name, synced and
moved into place: a file that is there is whole. A rerun computes what is missing, nothing else, so
a killed worker costs at most the matrix it was on. The name of a file is a hash of everything that
decides its content: the matrix, both sources (sizes, times and headers of their files and samples
of their weights), the job, its settings and the versions. Stale results are never reused; copying a
checkpoint counts as changing it.

There is no scheduler. Processes come from joblib, whose backend is exchangeable
(``joblib.parallel_config("dask")``); several machines that share a folder each take a shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mi_weightspace.core.components import Components, SourceRef
from mi_weightspace.core.errors import ConfigError, OutputError
from mi_weightspace.core.json_io import DamagedJson, take
from mi_weightspace.core.output_io import writing
from mi_weightspace.core.sealed_io import DamagedFile, load_sealed, save_sealed
from mi_weightspace.core.site import Site
from mi_weightspace.models.lora import AdapterSource
from mi_weightspace.models.weights import CheckpointSource, Difference, WeightSource

Job = Callable[[WeightSource, Site, Any], Components]
"""``job(source, site, settings)``; importable, so that a worker process can find it."""
Key = tuple[WeightSource, Site]
Recipe = tuple[Any, ...]
"""How a worker opens a source again: names and paths, never tensors."""
_HEADER = "components"
_STALE_SECONDS = 24 * 3600


def run_sites(
    job: Job,
    keys: Sequence[Key],
    settings: object,
    *,
    n_jobs: int = 1,
    shard: tuple[int, int] = (0, 1),
    folder: str | Path | None = None,
    progress: bool = True,
) -> list[Components]:
    """The job's result for each (source, matrix), in the order of `keys`.

    Args:
        settings: passed to the job; its `repr` is part of the file name, so use a frozen dataclass.
        n_jobs: workers, as joblib counts them, one thread each; 1 runs in this process with its own
            threads. Sources held in memory are shared with threads, files are opened by processes.
        shard: ``(i, n)``, 0 ≤ i < n: every n-th matrix, largest first, starting at the i-th. Only
            these are returned; ``(0, 1)`` on the same folder then collects everything.
        folder: where results are kept; None keeps nothing.

    Raises:
        ConfigError: a shard that is not one of n.
        OutputError: a result file that cannot be read, or a folder that cannot be written.
        Whatever the job raises.
    """
    own = _shard(keys, shard)
    if folder is None:
        found = dict(_run(job, [(k, keys[k], None) for k in own], settings, n_jobs, progress))
        return [found[k] for k in sorted(own)]
    place = Path(folder).absolute()  # workers that are used again keep their own directory
    with writing(place, "journal"):
        place.mkdir(parents=True, exist_ok=True)
    _sweep_temporaries(place)
    paths = {k: place / f"{file_key(job, *keys[k], settings)}.safetensors" for k in own}
    missing = [(k, keys[k], paths[k]) for k in own if not paths[k].exists()]
    for _ in _run(job, missing, settings, n_jobs, progress):
        pass
    return [read(paths[k], keys[k][1]) for k in sorted(own)]


def effective_jobs(jobs: int) -> int:
    """Workers that joblib would start (−1: one a processor)."""
    from joblib import effective_n_jobs

    return max(1, int(effective_n_jobs(jobs)))


def file_key(job: Job, source: WeightSource, site: Site, settings: object) -> str:
    """40 hex digits over what decides the result."""
    parts = [
        f"{getattr(job, '__module__', '')}.{getattr(job, '__qualname__', repr(job))}",
        repr(site),
        identity(source),
        repr(settings),
        version("mi-weightspace"),
        torch.__version__,
    ]
    if recipe(source) is None:  # samples cannot tell two live models apart for certain
        parts.append(_content(source, site))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def identity(source: WeightSource) -> str:
    """What tells a source from every other: its stage, samples of its weights, its files."""
    if isinstance(source, Difference):
        return f"{source.stage}({identity(source.before)} -> {identity(source.after)})"
    files = ""
    if isinstance(source, AdapterSource):
        files = _files(source.folder) + identity(source.base)
    elif isinstance(source, CheckpointSource):
        files = _files(source.path)
    return f"{source.name}:{source.fingerprint}:{files}"


def _files(folder: Path) -> str:
    """Sizes, times and headers of the weight files, and the configuration."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
        with file.open("rb") as handle:
            if file.suffix == ".json":
                digest.update(handle.read())
            else:
                digest.update(handle.read(int.from_bytes(handle.read(8), "little")))
    return digest.hexdigest()


def _content(source: WeightSource, site: Site) -> str:
    sides = (source.before, source.after) if isinstance(source, Difference) else (source,)
    digest = hashlib.sha256()
    for side in sides:
        stored = side.stored(site).detach().cpu().contiguous()
        digest.update(str(stored.dtype).encode())
        digest.update(stored.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, parts: Components) -> None:
    """Put a result in place, whole or not at all.

    Raises:
        OutputError: a folder that cannot be written, or a full disk.
    """
    meta = {
        "stage": parts.stage,
        "method": parts.method,
        "source": None if parts.source is None else asdict(parts.source),
        "facts": parts.facts,
    }
    tensors = {name: getattr(parts, name).contiguous() for name in ("read", "write", "scale")}
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with writing(path.parent, "journal"):
            save_sealed(tensors, temporary, _HEADER, meta)
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read(path: Path, site: Site) -> Components:
    """A result as it was written.

    Raises:
        OutputError: a file that is missing, damaged or not a result for this matrix.
    """
    try:
        tensors, meta = load_sealed(path, _HEADER)
        if meta is None:
            raise DamagedJson("no header of a result")
        return _components(tensors, meta, site)
    except (DamagedFile, DamagedJson) as error:
        raise OutputError(
            f"result {path}",
            given=f"a file that cannot be read ({error})",
            expected=f"the result of {site}",
            remedy="Delete the file and run again: only this matrix is computed anew.",
        ) from error


def _components(tensors: dict[str, Tensor], meta: dict[str, Any], site: Site) -> Components:
    """Raises:
    DamagedJson: entries and tensors that are no components of the matrix.
    """
    k = len(tensors["scale"]) if "scale" in tensors and tensors["scale"].ndim == 1 else -1
    for name, size in {"read": (k, site.d_in), "write": (k, site.d_out), "scale": (k,)}.items():
        value = tensors.get(name)
        if value is None or tuple(value.shape) != size or not bool(torch.isfinite(value).all()):
            raise DamagedJson(f"the tensor {name}")
    facts = take(meta, "facts", "object")
    ref = meta.get("source")
    if ref is not None:
        ref = take(meta, "source", "object")
        fields = {f: take(ref, f, "text") for f in SourceRef.__dataclass_fields__}
        ref = SourceRef(**fields)
    return Components(
        site,
        **{name: tensors[name] for name in ("read", "write", "scale")},
        method=take(meta, "method", "text"),
        stage=take(meta, "stage", "text"),
        source=ref,
        facts=facts,
    )


def recipe(source: WeightSource) -> Recipe | None:
    """How to open the source in another process; None for one that lives in memory."""
    if isinstance(source, Difference):
        before, after = recipe(source.before), recipe(source.after)
        return before and after and ("difference", before, after, source.stage)
    if isinstance(source, AdapterSource):
        return "adapter", recipe(source.base), str(source.folder)
    if isinstance(source, CheckpointSource):
        return "checkpoint", str(source.model)
    return None


@lru_cache(maxsize=16)
def opened(how: Recipe) -> WeightSource:
    """A source by its recipe, opened once in each process."""
    kind, *rest = how
    if kind == "difference":
        return Difference(opened(rest[0]), opened(rest[1]), stage=rest[2])
    if kind == "adapter":
        base = opened(rest[0])
        assert isinstance(base, CheckpointSource)
        return AdapterSource(base, Path(rest[1]))
    return CheckpointSource(rest[0])


def _shard(keys: Sequence[Key], shard: tuple[int, int]) -> list[int]:
    """Indices of this shard, largest matrix first; ties in the order given."""
    i, n = shard
    if not 0 <= i < n:
        raise ConfigError(
            "shard",
            given=f"{i}/{n}",
            expected="i/n with 0 ≤ i < n",
            remedy="The shards of three machines are 0/3, 1/3 and 2/3.",
        )
    largest = sorted(range(len(keys)), key=lambda k: -keys[k][1].d_out * keys[k][1].d_in)
    return largest[i::n]


def _run(
    job: Job,
    tasks: Sequence[tuple[int, Key, Path | None]],
    settings: object,
    n_jobs: int,
    progress: bool,
) -> Iterator[tuple[int, Components]]:
    """Results as they finish (those that went into files come back without vectors)."""
    from mi_weightspace.spectral.progress import sweep_progress

    sizes = {k: bytes_of(source, site) for k, (source, site), _ in tasks}
    label = getattr(job, "__name__", "sweep")
    with sweep_progress(label, len(tasks), sum(sizes.values()), shown=progress) as step:
        for k, parts in _results(job, tasks, settings, n_jobs):
            yield k, parts
            gflop = parts.facts.get("gflop", 0.0)
            step(sizes[k], gflop if isinstance(gflop, float) else 0.0)


def bytes_of(source: WeightSource, site: Site) -> int:
    """Bytes of a matrix in storage, of both sides of a difference; 4 an entry in memory."""
    if isinstance(source, Difference):
        return bytes_of(source.before, site) + bytes_of(source.after, site)
    if isinstance(source, CheckpointSource):
        return source.stored(site).nbytes
    return 4 * site.d_out * site.d_in


def _results(
    job: Job, tasks: Sequence[tuple[int, Key, Path | None]], settings: object, n_jobs: int
) -> Iterator[tuple[int, Components]]:
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    if not tasks:
        return
    if n_jobs == 1:
        for k, (source, site), path in tasks:
            yield _one(job, k, source, site, settings, path, False)
        return
    threads = any(recipe(source) is None for _, (source, _), _ in tasks)
    prefer = "threads" if threads else "processes"
    backend: Any = get_active_backend(prefer=prefer)[0]
    order = "generator_unordered" if backend.supports_return_generator else "list"
    calls = (
        delayed(_one)(job, k, recipe(source) or source, site, settings, path, True)
        for k, (source, site), path in tasks
    )
    before = torch.get_num_threads()
    try:
        results: Any = Parallel(n_jobs=n_jobs, prefer=prefer, return_as=order)(calls)
        yield from results
    finally:
        torch.set_num_threads(before)


def _one(
    job: Job,
    k: int,
    source: WeightSource | Recipe,
    site: Site,
    settings: object,
    path: Path | None,
    worker: bool,
) -> tuple[int, Components]:
    if worker:
        torch.set_num_threads(1)  # threads do not inherit the setting of the one that made them
    if isinstance(source, tuple):
        source = opened(source)
    parts = job(source, site, settings)
    if path is None:
        return k, parts
    write(path, parts)
    return k, parts.top(0)


def _sweep_temporaries(folder: Path) -> None:
    """Remove what killed writers left; another machine may be writing the recent ones."""
    for file in folder.glob(".*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:
            continue  # its writer, or another machine, was faster
