"""An ordered chain of training stages, checked to be one."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch

from mi_weightspace.core.errors import MismatchError
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.lens import Backend, Lens
from mi_weightspace.models.load import load
from mi_weightspace.models.sources import open_path
from mi_weightspace.models.weights import Difference, ModuleSource, WeightSource, agree


class CheckReport(Report):
    """What `mi-weightspace check` shows: one row per stage."""

    kind: ClassVar[str] = "check"


class Lineage:
    """Stages in training order. Models are opened when asked for, one at a time.

    Args:
        stages: name -> folder, hub id, adapter folder, or an object the user has loaded.
        backend: what runs a stage given by path.

    Raises:
        MismatchError: fewer than two stages, or stages that differ in architecture, widths, layer
            count or vocabulary.
        CheckpointError: as the folders deserve.
    """

    def __init__(self, stages: Mapping[str, Any], *, backend: Backend = "torch") -> None:
        if len(stages) < 2:
            raise MismatchError(
                "lineage",
                given=f"{len(stages)} stage",
                expected="at least two stages, in training order",
                remedy="load_lineage(base=..., sft=...).",
            )
        self._models = dict(stages)
        self.backend: Backend = backend
        self._sources = {name: source_of(model) for name, model in stages.items()}
        for before, after in self.steps:
            agree(self._sources[before], self._sources[after])

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._models)

    @property
    def steps(self) -> list[tuple[str, str]]:
        """Neighbouring (earlier, later) pairs."""
        names = self.stages
        return list(pairwise(names))

    def source(self, stage: str) -> WeightSource:
        return self._sources[self._known(stage)]

    def diff(self, before: str, after: str) -> Difference:
        return Difference(self.source(before), self.source(after), stage=after)

    @contextmanager
    def opened(self, stage: str) -> Iterator[Lens]:
        """The stage as a live model, released at the end: two are never resident at once."""
        lens: Lens | None = self[stage]
        assert lens is not None
        try:
            yield lens
        finally:
            lens = None
            gc.collect()

    def __getitem__(self, stage: str) -> Lens:
        """The stage as a live model; the caller decides how long it stays in memory."""
        return load(self._models[self._known(stage)], backend=self.backend)

    def _known(self, stage: str) -> str:
        if stage not in self._models:
            raise MismatchError(
                f"stage {stage!r}",
                given="a stage this lineage does not have",
                expected=f"one of {list(self.stages)}",
                remedy="Use a name given to load_lineage.",
            )
        return stage

    def __repr__(self) -> str:
        shape = self.source(self.stages[0]).shape
        return f"Lineage({' → '.join(self.stages)}; {shape.family}, {shape.n_layers} layers)"

    def check(self) -> CheckReport:
        """Agreement of the stages as a table, with a verdict for each step."""
        return check_stages(self._sources, self._models)


def source_of(model: Any) -> WeightSource:
    """The weights of a path, a `WeightSource`, or any live model."""
    if isinstance(model, str | Path):
        return open_path(model)
    if hasattr(type(model), "factors"):
        return model
    return ModuleSource(load(model))


def load_lineage(*, backend: Backend = "torch", **stages: Any) -> Lineage:
    """``load_lineage(base=..., sft=..., dpo=...)``: keyword order is training order."""
    return Lineage(stages, backend=backend)


def check_stages(
    sources: Mapping[str, WeightSource], models: Mapping[str, Any] | None = None
) -> CheckReport:
    """Certify checkpoints: every matrix read once, finite, compared with the stage before."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    reservations: list[str] = []
    previous: WeightSource | None = None
    for name, source in sources.items():
        row = _facts(name, source, (models or {}).get(name)) | _change(previous, source)
        if previous is not None and row["changed_matrices"] == 0:
            verdicts.append(Verdict(Word.NO_CHANGE, name, {"n_matrices": row["n_matrices"]}))
        rows.append(row)
        previous = source
    for key in ("dtype", "tokenizer"):
        found = sorted({row[key] for row in rows if row[key]})
        if len(found) > 1:
            reservations.append(f"The stages differ in {key}: {', '.join(found)}.")
    return CheckReport(
        table=pd.DataFrame(rows),
        verdicts=tuple(verdicts),
        inputs={name: source.fingerprint for name, source in sources.items()},
        reservations=tuple(reservations),
    )


def _facts(name: str, source: WeightSource, model: Any) -> dict[str, Any]:
    shape = source.shape
    sites = source.sites()
    return {
        "stage": name,
        "model": source.name,
        "family": shape.family,
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "vocab_size": shape.vocab_size,
        "dtype": str(source.stored(sites[0]).dtype).removeprefix("torch."),
        "n_matrices": len(sites),
        "parameters_in_matrices": sum(s.d_out * s.d_in for s in sites),
        "tokenizer": tokenizer_hash(model),
        "fingerprint": source.fingerprint,
    }


def _change(before: WeightSource | None, after: WeightSource) -> dict[str, Any]:
    """How many matrices differ, and by how much; reading each also proves it finite."""
    squared, reference, changed = 0.0, 0.0, 0
    for site in after.sites():
        weight = after.weight(site)
        if before is None:
            continue
        old = before.weight(site)
        difference = weight.sub_(old)
        size = float(difference.double().square().sum())
        changed += size > 0
        squared += size
        reference += float(old.double().square().sum())
    relative = float("nan") if before is None else (squared / max(reference, 1e-300)) ** 0.5
    return {"finite": True, "changed_matrices": changed, "relative_change": relative}


def tokenizer_hash(model: Any) -> str:
    """12 hex digits of a folder's ``tokenizer.json``, empty where there is none."""
    import hashlib

    if not isinstance(model, str | Path):
        return ""
    file = Path(model) / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else ""


def memory_of(source: WeightSource, dtype: torch.dtype, sites: Sequence[Any]) -> int:
    """Bytes of the given sites' matrices in `dtype`."""
    return sum(s.d_out * s.d_in for s in sites) * torch.empty(0, dtype=dtype).element_size()
