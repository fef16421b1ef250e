"""An ordered chain of training stages, checked to be one."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mi_weightspace.core.errors import MismatchError
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.checkpoint import read_json
from mi_weightspace.models.config_file import SETTINGS
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
        backend: what runs a stage given by path; `device` and `dtype` are where and how.

    Raises:
        MismatchError: fewer than two stages, or stages that differ in architecture, widths, layer
            count or vocabulary.
        CheckpointError: as the folders deserve.
    """

    def __init__(
        self,
        stages: Mapping[str, Any],
        *,
        backend: Backend = "torch",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(stages) < 2:
            raise MismatchError(
                "lineage",
                given=f"{len(stages)} stage",
                expected="at least two stages, in training order",
                remedy="load_lineage(base=..., sft=...).",
            )
        self.backend: Backend = backend
        self.placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self._sources = {name: open_source(model, name) for name, model in stages.items()}
        for before, after in self.steps:
            agree(self._sources[before], self._sources[after])

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self._sources)

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
        """The stage as a live model; its memory is given back at the end.

        A stage loaded here is emptied on leaving (its parameters move to the meta device), even
        where the caller still holds the handle: two stages are never resident at once. An object
        of the user's own is left as it is.
        """
        lens = self.lens(stage)
        try:
            yield lens
        finally:
            if not isinstance(self._sources[stage], ModuleSource):
                torch.nn.Module.to(getattr(lens, "root", lens.model), "meta")
            del lens
            gc.collect()

    def lens(self, stage: str) -> Lens:
        """The stage as a live model; the caller decides how long it stays in memory."""
        source = self._sources[self._known(stage)]
        if isinstance(source, ModuleSource):
            return source.lens
        return load(source, backend=self.backend, **self.placed)

    def __getitem__(self, stage: str) -> Lens:
        return self.lens(stage)

    def _known(self, stage: str) -> str:
        if stage not in self._sources:
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

    @property
    def reservations(self) -> tuple[str, ...]:
        """Sentences that hold for every comparison of these stages."""
        return reservations_of(self._sources)

    def check(self) -> CheckReport:
        """Agreement of the stages as a table, with a verdict for each step."""
        return check_stages(self._sources)


def stage_names(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, numbered where two agree."""
    names = [Path(m).name or m for m in models]
    return [n if names.count(n) == 1 else f"{i}-{n}" for i, n in enumerate(names)]


def open_source(model: Any, name: str = "live model") -> WeightSource:
    """The weights of a path, a `WeightSource` (as it is), or any live model.

    Args:
        name: what a live model is called in tables and messages.
    """
    if isinstance(model, str | Path):
        return open_path(model)
    if hasattr(type(model), "factors"):
        return model
    return ModuleSource(load(model), name=name)


def load_lineage(
    *,
    backend: Backend = "torch",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **stages: Any,
) -> Lineage:
    """``load_lineage(base=..., sft=..., dpo=...)``: keyword order is training order."""
    return Lineage(stages, backend=backend, device=device, dtype=dtype)


def reservations_of(sources: Mapping[str, WeightSource]) -> tuple[str, ...]:
    """What the stages differ in without being refused: precision, tokenizer, settings.

    Settings (activation, norm epsilon, rotary base, …) are compared where both folders say them.
    """
    facts = {"storage precision": dtype_of, "tokenizer": tokenizer_hash}
    facts |= {key: partial(setting, key) for key in SETTINGS}
    found: list[str] = []
    for what, read in facts.items():
        values = {name: read(source) for name, source in sources.items()}
        if len({v for v in values.values() if v}) > 1:
            listed = ", ".join(f"{name} {value or 'unknown'}" for name, value in values.items())
            found.append(f"The stages differ in {what}: {listed}.")
    return tuple(found)


def setting(key: str, source: WeightSource) -> str:
    """One setting of a source's config.json; empty where it has none."""
    base = getattr(source, "base", source)
    return getattr(base, "settings", {}).get(key, "")


def check_stages(sources: Mapping[str, WeightSource]) -> CheckReport:
    """Certify checkpoints: every tensor read once, finite, compared with the stage before.

    Raises:
        CheckpointError: a tensor that is not finite, named.
    """
    import pandas as pd
    from rich.progress import track

    rows: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    previous: WeightSource | None = None
    for name, source in track(sources.items(), "checking stages", transient=True):
        row = _facts(name, source) | _change(previous, source)
        if row["same_as_previous"]:
            counts = {"n_matrices": row["n_matrices"], "n_vectors": row["n_vectors"]}
            verdicts.append(Verdict(Word.NO_CHANGE, name, counts))
        rows.append(row)
        previous = source
    return CheckReport(
        table=pd.DataFrame(rows),
        verdicts=tuple(verdicts),
        inputs={name: source.fingerprint for name, source in sources.items()},
        reservations=reservations_of(sources),
        config={"models": {name: source.name for name, source in sources.items()}},
    )


def _facts(name: str, source: WeightSource) -> dict[str, Any]:
    shape = source.shape
    sites = source.sites()
    n_parameters = sum(s.d_out * s.d_in for s in sites if not (shape.tied and s.kind == "unembed"))
    return {
        "stage": name,
        "model": source.name,
        "family": shape.family,
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "vocab_size": shape.vocab_size,
        "dtype": dtype_of(source),
        "n_matrices": len(sites),
        "n_parameters": n_parameters,
        "tokenizer": tokenizer_hash(source),
        "fingerprint": source.fingerprint,
    }


def _change(before: WeightSource | None, after: WeightSource) -> dict[str, Any]:
    """How many tensors differ, and by how much; reading each also proves it finite.

    A matrix is compared as a `Difference`, so an adapter that did not land counts as no change.
    """
    squared, reference, changed = 0.0, 0.0, 0
    difference = None if before is None else Difference(before, after)
    for site in after.sites():
        after_weight = after.weight(site)  # read in any case: it must be finite
        if difference is None:
            continue
        size = float(difference.weight(site).double().square().sum())
        changed += size > 0
        squared += size
        reference += float(after_weight.double().square().sum())
    own = vectors_of(after)
    if before is None:
        return {
            "finite": True,
            "n_vectors": len(own),
            "changed_matrices": 0,
            "changed_vectors": 0,
            "relative_change": float("nan"),
            "same_as_previous": False,
        }
    old = vectors_of(before)
    moved = [k for k in own.keys() & old.keys() if not torch.equal(own[k].cpu(), old[k].cpu())]
    return {
        "finite": True,
        "n_vectors": len(own),
        "changed_matrices": changed,
        "changed_vectors": len(moved),
        "relative_change": (squared / max(reference, 1e-300)) ** 0.5,
        "same_as_previous": not changed and not moved,
    }


def vectors_of(source: WeightSource) -> dict[str, Tensor]:
    """Everything trained that is no site's matrix: norm gains, biases, position embeddings.

    Sources on disk list all of them; a live model those its Lens knows (biases and gains).
    """
    found: dict[str, Tensor] = {}
    for site in source.sites():
        for what in ("bias", "read_gain", "write_gain"):
            vector = getattr(source, what)(site)
            if vector is not None:
                found[f"{site.name} {what}"] = vector
    extras = getattr(source, "extras", None)
    return found if extras is None else found | dict(extras())


def dtype_of(source: WeightSource) -> str:
    """Storage precisions of the matrices, e.g. ``bfloat16``; an adapter has its base's."""
    stored = getattr(source, "base", source)
    found = {str(stored.stored(site).dtype).removeprefix("torch.") for site in stored.sites()}
    return "+".join(sorted(found))


def tokenizer_hash(source: WeightSource) -> str:
    """12 hex digits of the vocabulary, merges and added tokens; empty where there is none."""
    record: Mapping[str, Any] | None = None
    folders = [getattr(s, "path", None) for s in (source, getattr(source, "base", None))]
    for folder in folders:
        if record is None and folder is not None and (folder / "tokenizer.json").is_file():
            record = read_json(folder / "tokenizer.json", "a tokenizer saved by transformers")
    tokenizer = getattr(getattr(source, "lens", None), "tokenizer", None)
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is not None:
        record = json.loads(inner.to_str())
    if record is None:
        return ""
    model = record.get("model") or {}
    added = [(token.get("id"), token.get("content")) for token in record.get("added_tokens") or ()]
    text = json.dumps(
        [model.get("vocab"), model.get("merges"), added], sort_keys=True, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]
