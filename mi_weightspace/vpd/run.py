"""`decompose`: a model and tokens in, a `Decomposition` out.

A run folder holds ``training/`` (checkpoints and ``metrics.jsonl``) from the first step on; the
report's own files join it at the end, ``report.json`` last, so that an interrupted run never loads
as a result. ``resume=True`` continues it, and reads a finished one back.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mi_weightspace.core.errors import ConfigError, OutputError
from mi_weightspace.core.output_io import writing
from mi_weightspace.core.report_record import is_run_file
from mi_weightspace.vpd.assemble import as_host, site_record, stored_arrays
from mi_weightspace.vpd.config import VPDConfig, make_config, read_config
from mi_weightspace.vpd.data import Data, prepare
from mi_weightspace.vpd.decomposition import Decomposition
from mi_weightspace.vpd.distributed import rank
from mi_weightspace.vpd.host import Host
from mi_weightspace.vpd.state import config_hash
from mi_weightspace.vpd.stream import Stream
from mi_weightspace.vpd.train import Trained, train

Kind = TypeVar("Kind", bound=Decomposition)
TRAINING = "training"
PARTIAL = ".report.partial"
WORDING = (
    "Importances are causal on these data, up to this adversary's budget; numbers of components "
    "are no numbers of mechanisms."
)


def decompose(
    model: Any,
    tokens: Any,
    config: VPDConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    held_out: Any = None,
    length: int = 64,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Decomposition:
    """Decompose matrices of a model into rank-one parts, evaluate and check the result.

    Args:
        model: whatever `mi_weightspace.load` takes (a folder, a Hugging Face, TransformerLens or
            nnsight object, a Lens), or a `Host`.
        tokens: ids (rows, tokens), as a tensor or lists; a file (`corpus.read_tokens`) or a list
            of texts, cut into rows of `length` tokens by the model's tokenizer; a `Stream`; for
            a toy its inputs (rows, features).
        config: a `VPDConfig`, its values, or the path of a YAML file.
        held_out: data of the same forms to evaluate on; default the last 5 % of the rows, which
            are then not trained on.
        out: run folder; with `resume` an interrupted run there continues, bit for bit.
        on_log: called with every record of the history.
        evaluation: options of `vpd.evaluate.evaluate` (budgets of the PGD ladder, thresholds, …);
            ``anchor=True`` also recovers a known answer with this code, as a check.
        record: plain values to store in the result's `config` (how a script would call it again).

    Raises:
        ConfigError: unknown or contradictory keys, C below the rank, a changed configuration or
            model on resume. PromptError: ids out of vocabulary, too little text. OutputError: a
            folder that already holds something. DivergedError: a loss that is not finite.
    """
    settings = as_config(config)
    place = None if out is None else Path(out)
    host = as_host(model, settings.sites, prefix=settings.speed.prefix)
    data = prepare(tokens, held_out, host, settings, length)
    finished = finished_run(Decomposition, place, settings, host, resume=resume)
    if finished is not None:
        return finished
    trained, seconds = trained_on(
        host, data.stream, settings, place, resume=resume, progress=progress, on_log=on_log
    )
    fields = bare(trained, data, seconds, record)
    parts = Decomposition(**fields).with_objective(trained.objective)
    options = {"progress": progress, **(evaluation or {})}
    parts = parts.assessed(data.batches, data.measured_on, **options)
    if place is not None and rank() == 0:
        join(parts, place)
    return parts


def trained_on(
    host: Host,
    stream: Stream,
    settings: VPDConfig,
    place: Path | None,
    *,
    resume: bool,
    progress: bool,
    on_log: Callable[[dict[str, Any]], None] | None,
) -> tuple[Trained, float]:
    """`train` into the run folder, frozen at the end; and its seconds."""
    start = time.perf_counter()
    trained = train(
        host,
        stream,
        settings,
        folder=None if place is None else place / TRAINING,
        resume=resume,
        progress=progress,
        on_log=on_log,
    )
    trained.factors.requires_grad_(False)
    trained.objective.importance.requires_grad_(False)
    return trained, time.perf_counter() - start


def as_config(given: VPDConfig | Mapping[str, Any] | str | Path | None) -> VPDConfig:
    if isinstance(given, VPDConfig):
        return given
    if isinstance(given, str | Path):
        return read_config(given)
    return make_config(dict(given or {}))


# ---- result --------------------------------------------------------------------------------
def bare(
    trained: Trained, data: Data, seconds: float, record: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of a trained decomposition's report before any evaluation."""
    import pandas as pd

    objective = trained.objective
    host, layout = objective.factors.host, objective.factors.layout
    counts = dict(zip(layout.names, layout.sizes, strict=True))
    notes = [*data.reservations, WORDING]
    kind = objective.config.importance
    if kind.kind.endswith("transformer") and not kind.causal:
        notes.append("The importance network reads later tokens: it explains, and cannot gate.")
    return dict[str, Any](
        table=pd.DataFrame({"site": list(counts), "n_components": list(counts.values())}),
        tables={"history": pd.DataFrame(list(trained.history))},
        arrays=stored_arrays(objective),
        config={
            **(record or {}),
            "command": "vpd",
            "vpd": objective.config.model_dump(mode="json"),
            "sites": {name: site_record(host, name, c) for name, c in counts.items()},
            "notes": notes,
        },
        inputs={"model": host.fingerprint, "tokens": data.digest},
        reservations=tuple(notes),
        timings={"training": seconds},
    )


# ---- run folder ----------------------------------------------------------------------------
def finished_run(
    kind: type[Kind], place: Path | None, config: VPDConfig, host: Host, *, resume: bool
) -> Kind | None:
    """The result that is there already (only with `resume`).

    Raises:
        OutputError: a folder that holds a run, or anything that is none.
        ConfigError: a run of another configuration.
    """
    if place is None or not place.exists():
        return None
    done = (place / "report.json").exists()
    foreign = [p.name for p in place.iterdir() if p.name not in {TRAINING, PARTIAL}]
    if (place / PARTIAL).is_dir():  # killed in `join`: the first files had moved
        foreign = [name for name in foreign if not is_run_file(name)]
    if (done and not resume) or (foreign and not done):
        raise OutputError(
            f"output folder {place}",
            given="a finished run" if done else f"other files ({foreign[:3]})",
            expected="a new or empty folder, or an interrupted run with resume=True (--resume)",
            remedy="Choose another --out; runs are never overwritten.",
        )
    if not done:
        return None
    if rank() == 0:  # killed in `join`: all files had moved
        shutil.rmtree(place / PARTIAL, ignore_errors=True)
    parts = kind.load(place)
    if config_hash(parts.settings) != config_hash(config):
        raise ConfigError(
            f"configuration of the run in {place}",
            given="another one than the finished run's",
            expected="what the run was made with",
            remedy="Choose another --out for another configuration.",
        )
    return parts.attach(host)


def join(parts: Decomposition, place: Path) -> None:
    """Move the report's files beside ``training/``; what makes it load comes last.

    Raises:
        OutputError: a folder that cannot be written, or a full disk.
    """
    staging = place / PARTIAL
    with writing(place, "output folder"):
        staging.mkdir(parents=True, exist_ok=True)
        for left in staging.iterdir():  # the folder itself says what the moved files are
            shutil.rmtree(left)
        try:
            parts.save(staging / "run")
        except OutputError:
            if not any(is_run_file(path.name) for path in place.iterdir()):
                staging.rmdir()  # nothing had moved
            raise
        files = sorted((staging / "run").iterdir(), key=lambda p: p.name == "report.json")
        for file in files:
            file.replace(place / file.name)
        shutil.rmtree(staging, ignore_errors=True)
