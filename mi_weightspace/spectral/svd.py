"""Singular value decomposition of what a training stage changed, one matrix at a time.

For every matrix of a difference ``D = W_after − W_before``: sizes, the leading singular triplets by
block Krylov (`spectral.krylov`) with a certificate, the noise edge of the first singular value, and
what rounding to the storage precision does to all of it (`models.rounding`).

Vectors are as the residual stream sees them: a matrix behind a norm is ``D·diag(g)`` with the
*earlier* stage's gain, a matrix in front of a post-norm ``diag(g)·D`` (`fold_gains=False`: raw D).
A changed gain is no part of D; it has its own row in the ``vectors`` table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mi_weightspace.core.components import Components, SourceRef
from mi_weightspace.core.errors import ConfigError, SiteError
from mi_weightspace.core.report import Report
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.grammar import ModelShape, sites_of
from mi_weightspace.models.weights import Difference, WeightSource
from mi_weightspace.spectral.blocks import workers_within
from mi_weightspace.spectral.decompose import SvdSettings, decompose, stage_of
from mi_weightspace.spectral.journal import effective_jobs, run_sites

if TYPE_CHECKING:
    import plotly.graph_objects as go

Sources = WeightSource | Sequence[WeightSource]


class SvdReport(Report):
    """The components of every matrix asked for.

    Index it by site name (one stage) or by ``(stage, site name)``; iterate over `Components`.
    Table: a row per (stage, site, component). Table ``vectors``: norm gains and biases that
    changed. Arrays: ``{stage}/{site}/read | write | scale``.
    """

    kind: ClassVar[str] = "svd"
    live: ClassVar[Mapping[str, WeightSource]] = MappingProxyType({})

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(self.config["sources"])

    @property
    def stage(self) -> str:
        return self.stages[0]

    @property
    def components(self) -> list[Components]:
        """Rebuilt from arrays, table and config, so that a loaded report has them too."""
        shape = ModelShape(**self.config["shape"])
        sites = {site.name: site for site in sites_of(shape)}
        facts = {(f["stage"], f["site"]): f for f in self.tables["sites"].to_dict("records")}
        refs = self.config["sources"]
        found = []
        for (stage, name), row in facts.items():
            parts = {k: self.arrays[f"{stage}/{name}/{k}"] for k in ("read", "write", "scale")}
            ref = SourceRef(**refs[stage]) if refs[stage] else None
            own: dict[str, Any] = {k: v for k, v in row.items() if k not in ("stage", "site")}
            found.append(
                Components(
                    sites[name], **parts, method=row["method"], stage=stage, source=ref, facts=own
                )
            )
        return found

    def __iter__(self) -> Iterator[Components]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.tables["sites"])

    def __getitem__(self, key: str | tuple[str, str]) -> Components:
        """Components of a matrix.

        Raises:
            SiteError: a matrix that was not decomposed.
        """
        stage, name = key if isinstance(key, tuple) else (self.stage, key)
        for found in self.components:
            if (found.stage, found.site.name) == (stage, name):
                return found
        names = [f"{s}/{n}" for s, n in zip(*self._keys, strict=True)]
        raise SiteError(
            f"svd report, matrix {stage}/{name}",
            given="a matrix that was not decomposed",
            expected=f"one of {names[:6]}… ({len(names)} in all)",
            remedy="Decompose it: svd(..., sites=...).",
        )

    @property
    def _keys(self) -> tuple[list[str], list[str]]:
        table = self.tables["sites"]
        return list(table["stage"]), list(table["site"])

    def plot(self) -> go.Figure:
        """Relative size of every matrix's change over layers, the rounding noise dotted."""
        from mi_weightspace.core.figures import norms

        return norms(self.table, title="Relative size of each stage's change")


def svd(
    source: Sources,
    sites: str | Sequence[str] | None = None,
    rank: int = 16,
    *,
    seed: int = 0,
    fold_gains: bool = True,
    compare_base: bool = True,
    jobs: int = 1,
    shard: tuple[int, int] = (0, 1),
    journal: str | Path | None = None,
    memory_limit: float | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> SvdReport:
    """Leading singular triplets of every matrix of a difference (or of a checkpoint).

    Args:
        source: a `Difference`, any `WeightSource`, or several of one architecture.
        sites: globs; default every matrix of the blocks.
        rank: triplets kept for each matrix.
        fold_gains: decompose the matrix as the stream sees it (see the module's text).
        compare_base: compare u₁ with the earlier matrix's own leading vectors.
        jobs, shard, journal: processes; ``(i, n)``: do every n-th matrix only; a folder in which
            finished matrices are kept, so that an interrupted sweep resumes.
        memory_limit: GB of private memory (pages of the checkpoints' files do not count) that all
            workers together may take. Fewer workers run where it does not suffice for all, and a
            matrix beyond one worker's share is formed in blocks of rows in every pass: the same
            answer to rounding, slower.
        device: where the products run (``cuda``); reading and forming stay on the processor.

    Raises:
        ConfigError: a rank below 1. SiteError: no matrix matches. CheckpointError: NaN or
        infinities, the tensor named.
    """
    if rank < 1:
        raise ConfigError("rank", given=str(rank), expected="at least 1", remedy="rank=16.")
    sources = list(source) if isinstance(source, Sequence) else [source]
    stages = [stage_of(s) for s in sources]
    if len(set(stages)) != len(stages):
        raise ConfigError(
            "stages of svd",
            given=f"{stages}",
            expected="different names",
            remedy="Give each Difference a stage= of its own.",
        )
    start = time.perf_counter()
    chosen = sources[0].sites("blocks.*" if sites is None else sites)
    share = 0
    if memory_limit is not None:
        jobs, share = workers_within(1e9 * memory_limit, effective_jobs(jobs), chosen)
    settings = SvdSettings(rank, seed, fold_gains, compare_base, share, known_device(device))
    keys = [(s, site) for s in sources for site in chosen]
    found = run_sites(
        decompose, keys, settings, n_jobs=jobs, shard=shard, folder=journal, progress=progress
    )
    config = {
        "command": "svd",
        "shape": asdict(sources[0].shape),
        "sources": {name: _ref(s) for name, s in zip(stages, sources, strict=True)},
        "args": {
            "sites": sites if sites is None or isinstance(sites, str) else list(sites),
            "rank": rank,
            "seed": seed,
            "fold_gains": fold_gains,
            "compare_base": compare_base,
        },
    }
    vectors = [row for s, name in zip(sources, stages, strict=True) for row in _vectors(s, name)]
    report = report_of(found, config, vectors)
    report.timings["svd"] = time.perf_counter() - start  # pyright: ignore[reportIndexIssue]
    # the sources stay at hand in this session; a saved report finds them again by their paths
    object.__setattr__(report, "live", dict(zip(stages, sources, strict=True)))
    return report


def known_device(name: str) -> str:
    """The device's name.

    Raises:
        ConfigError: no such device, or none here.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(
            "device",
            given=repr(name),
            expected="cpu, or a device of this machine",
            remedy="device='cpu' (--device cpu), or install a torch build for the device.",
        ) from error
    return name


def _ref(source: WeightSource) -> dict[str, str]:
    ref = getattr(source, "ref", None)
    if ref is not None:
        return asdict(ref)
    return {"before": "", "after": source.name, "before_hash": "", "after_hash": source.fingerprint}


_SITE_COLUMNS = ("stage", "site", "layer", "kind", "d_out", "d_in")


def report_of(
    found: Sequence[Components],
    config: Mapping[str, Any],
    vectors: Sequence[dict[str, Any]] = (),
) -> SvdReport:
    """Tables, arrays and verdicts of finished components."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    sites: list[dict[str, Any]] = []
    arrays: dict[str, Tensor] = {}
    for parts in found:
        own, residual = dict(parts.facts), parts.facts.get("residual", [])
        own.pop("residual", None)
        head = _head(parts)
        # a journal keeps facts in another order: columns must not depend on it
        sites.append(head | {"method": parts.method} | {k: own[k] for k in sorted(own)})
        arrays |= {
            f"{parts.stage}/{parts.site.name}/{k}": getattr(parts, k)
            for k in ("read", "write", "scale")
        }
        shared = head | {k: own.get(k, math.nan) for k in _SHARED}
        rows += _component_rows(shared, parts, residual)  # pyright: ignore[reportArgumentType]
    table = pd.DataFrame(sites)
    return SvdReport(
        table=pd.DataFrame(rows),
        tables={"sites": table, "vectors": pd.DataFrame(vectors, columns=list(_VECTOR_COLUMNS))},
        arrays=arrays,
        verdicts=tuple(_verdicts(table)),
        config=dict(config),
        inputs={s: r["after_hash"] for s, r in config["sources"].items()},
        reservations=tuple(_reservations(table)),
        timings={},
    )


CONVERGED = 0.02
"""``‖D Dᵀu − s²u‖ / s²`` up to which a triplet counts as found: s is then right within 1 %."""
_SHARED = (
    "fro", "rel_fro", "rounding_floor", "rounding_flag", "changed_fraction", "spectral",
    "stable_rank", "null_edge", "certificate", "resolved", "subspace_k",
)  # fmt: skip


def _head(parts: Components) -> dict[str, Any]:
    site = parts.site
    layer = math.nan if site.layer is None else site.layer
    values = (parts.stage, site.name, layer, site.kind, site.d_out, site.d_in)
    return dict(zip(_SITE_COLUMNS, values, strict=True))


def _component_rows(
    shared: dict[str, Any], parts: Components, residual: Sequence[float]
) -> list[dict[str, Any]]:
    if len(parts) == 0:
        empty = {"component": 0, "singular_value": 0.0, "energy": 0.0, "residual": 0.0}
        return [shared | empty | {"converged": True, "above_floor": False}]
    total = float(parts.facts["folded_fro"] or 0.0) ** 2  # pyright: ignore[reportArgumentType]
    floor = float(parts.facts["rounding_floor"] or 0.0)  # pyright: ignore[reportArgumentType]
    return [
        shared
        | {
            "component": k,
            "singular_value": value,
            "energy": value**2 / total,
            "residual": residual[k],
            "converged": residual[k] <= CONVERGED,
            "above_floor": value > floor,
        }
        for k, value in enumerate(parts.scale.tolist())
    ]


def _verdicts(sites: Any) -> Iterator[Verdict]:
    """`no change` for a stage without any; else the stage's flags counted."""
    for stage, own in sites.groupby("stage", sort=False):
        if not (own["fro"] > 0).any():
            yield Verdict(Word.NO_CHANGE, str(stage), {"n_matrices": len(own)})
        elif (own["rounding_flag"] == "red").sum() == (own["fro"] > 0).sum():
            yield Verdict(Word.BELOW_FLOOR, str(stage), {"n_matrices": len(own)})


def _reservations(sites: Any) -> Iterator[str]:
    for stage, own in sites.groupby("stage", sort=False):
        for flag, text in (
            ("amber", "norms, ranks and shares are unreliable (rounding to the stored precision)"),
            ("red", "nothing is readable below the rounding floor"),
        ):
            n = int((own["rounding_flag"] == flag).sum())
            if n:
                yield f"{stage}: {text} in {n} of {len(own)} matrices."


_VECTOR_COLUMNS = ("stage", "name", "norm_before", "norm_change", "relative_change")


def _vectors(source: WeightSource, stage: str) -> Iterator[dict[str, Any]]:
    """Norm gains and biases that changed: they are no part of any matrix."""
    from mi_weightspace.models.lineage import vectors_of

    if not isinstance(source, Difference):
        return
    before, after = vectors_of(source.before), vectors_of(source.after)
    for name in sorted(before.keys() & after.keys()):
        old, new = before[name].double().cpu(), after[name].double().cpu()
        if old.shape == new.shape and not torch.equal(old, new):
            size, change = float(old.norm()), float((new - old).norm())
            relative = change / size if size > 0 else math.inf
            yield dict(zip(_VECTOR_COLUMNS, (stage, name, size, change, relative), strict=True))
