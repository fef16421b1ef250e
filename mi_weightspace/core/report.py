"""The base of every result: table, arrays, verdicts, provenance; saved atomically.

A run folder holds ``report.json`` (schema number, kind, config, versions, input hashes, verdicts,
hashes of the other files), ``arrays.safetensors``, ``table.parquet`` and one further
``table_NAME.parquet`` per extra table, and ``config.yaml``, which replays it. It is written under a
temporary name and renamed; a killed run leaves no folder that loads, and what it leaves goes with
the next run saved beside it (`output_io.stale`). Nothing is pickled.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mi_weightspace.core.errors import ConfigError, OutputError
from mi_weightspace.core.json_io import digest_of, is_plain_name
from mi_weightspace.core.output_io import check_place, staged
from mi_weightspace.core.report_record import check_files, read_files, read_record, verdicts_of
from mi_weightspace.core.sealed_io import SEAL, file_hash, save_tensors
from mi_weightspace.core.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor

SCHEMA = 1
_REGISTRY: dict[str, type[Report]] = {}
_PACKAGES = ("mi-weightspace", "torch", "transformers", "transformer_lens", "nnsight", "sae_lens")


def library_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """Base class; subclasses set `kind` and override `plot`.

    Attributes:
        table: tidy, one observation a row.
        tables: further tables by name.
        arrays: tensors by name.
        verdicts: every verdict with its evidence.
        config: the arguments that rerun it (plain JSON values).
        inputs: name -> hash of each model, prompt set and direction used.
        reservations: sentences that hold for the whole result.
        timings: seconds by step.
        versions: library versions.
    """

    kind: ClassVar[str] = "report"

    table: pd.DataFrame
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    reservations: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.kind not in _REGISTRY or _REGISTRY[cls.kind].__qualname__ == cls.__qualname__, (
            f"report kind {cls.kind!r} is taken by {_REGISTRY[cls.kind]}"
        )
        _REGISTRY[cls.kind] = cls

    # ---- reading ---------------------------------------------------------------------------
    def to_pandas(self, table: str | None = None) -> pd.DataFrame:
        """A copy of the main table (tidy, one observation a row), or of another by name.

        Raises:
            ConfigError: a name this report does not have.
        """
        if table is None:
            return self.table.copy()
        if table not in self.tables:
            raise ConfigError(
                f"table {table!r}",
                given="a name this report does not have",
                expected=f"one of {sorted(self.tables)}",
                remedy="to_pandas() without a name is the main table.",
            )
        return self.tables[table].copy()

    def plot(self) -> go.Figure:
        """A plotly figure; never shown by itself."""
        raise NotImplementedError(f"{type(self).__name__} has no figure")

    def summary(self) -> str:
        """At most ten lines: kind, size, verdicts, reservations."""
        lines = [f"{type(self).__name__}: {len(self.table)} rows"]
        lines += [f"  {verdict}" for verdict in self.verdicts[:6]]
        if len(self.verdicts) > 6:
            lines.append(f"  … {len(self.verdicts) - 6} more verdicts")
        lines += [f"  ! {text}" for text in self.reservations[: 9 - len(lines)]]
        return "\n".join(lines[:10])

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        body = f"<pre>{html.escape(self.summary())}</pre>"
        return body + self.table.head(20).to_html(index=False, escape=True, float_format="%.3g")

    # ---- files -----------------------------------------------------------------------------
    def save(self, folder: str | Path) -> Path:
        """Write the run folder; returns its path.

        Raises:
            OutputError: the folder already holds a run, holds other files, or cannot be written.
        """
        target = Path(folder)
        check_output(target)
        with staged(target, "output folder") as partial:
            partial.mkdir()
            self._write(partial)
        return target

    def _write(self, folder: Path) -> None:
        import yaml

        arrays = {k: v.detach().cpu().contiguous().clone() for k, v in self.arrays.items()}
        save_tensors(arrays, folder / "arrays.safetensors")
        self.table.to_parquet(folder / "table.parquet", index=False)
        for name, frame in self.tables.items():
            if not is_plain_name(f"table_{name}.parquet"):
                raise OutputError(
                    f"table {name!r}"[:120],
                    given="a name that no file can have",
                    expected="a plain name: it becomes table_NAME.parquet",
                    remedy="Rename the table.",
                )
            frame.to_parquet(folder / f"table_{name}.parquet", index=False)
        replay = {"kind": self.kind, "config": dict(self.config)}
        (folder / "config.yaml").write_text(yaml.safe_dump(replay, sort_keys=False))
        files = {p.name: file_hash(p) for p in sorted(folder.iterdir())}
        record = {
            "schema": SCHEMA,
            "kind": self.kind,
            "config": dict(self.config),
            "inputs": dict(self.inputs),
            "verdicts": [asdict(v) for v in self.verdicts],
            "reservations": list(self.reservations),
            "timings": dict(self.timings),
            "versions": dict(self.versions),
            "tables": sorted(self.tables),
            "files": files,
        }
        record[SEAL] = digest_of(record)
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=True)
        (folder / "report.json").write_text(text)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run folder back; equal to what was saved.

        Raises:
            OutputError: no run there, a hash that differs, another kind, or a newer schema.
        """
        report = load_report(folder)
        if not isinstance(report, cls):
            raise OutputError(
                f"run folder {folder}",
                given=f"a {report.kind!r} run",
                expected=f"a {cls.kind!r} run",
                remedy="Use mi_weightspace.load_report, which reads any kind.",
            )
        return report

    def equals(self, other: Report) -> bool:
        """Same kind, tables, arrays, verdicts, config, inputs and reservations."""
        import torch

        if type(self) is not type(other) or set(self.arrays) != set(other.arrays):
            return False
        same_arrays = all(torch.equal(self.arrays[k].cpu(), other.arrays[k]) for k in self.arrays)
        same_tables = set(self.tables) == set(other.tables) and all(
            same_frame(self.tables[k], other.tables[k]) for k in self.tables
        )
        return (
            same_arrays
            and same_tables
            and same_frame(self.table, other.table)
            and _plain(self) == _plain(other)
        )


_REGISTRY[Report.kind] = Report


def same_frame(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Equal column by column (`DataFrame.equals` also compares how columns are stored together)."""
    return list(one.columns) == list(other.columns) and all(
        one[name].equals(other[name]) for name in one.columns
    )


def _plain(report: Report) -> str:
    record = [
        [asdict(v) for v in report.verdicts],
        dict(report.config),
        dict(report.inputs),
        list(report.reservations),
    ]
    return json.dumps(record, sort_keys=True)


def check_output(target: Path) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        OutputError: a folder that holds anything, or a place that cannot be written.
    """
    there = check_place(target, "output folder")
    if there and (not target.is_dir() or any(target.iterdir())):
        what = "a folder that already holds a run" if (target / "report.json").exists() else "taken"
        raise OutputError(
            f"output folder {target}",
            given=what,
            expected="a new or empty folder",
            remedy="Choose another --out; runs are never overwritten.",
        )


def load_report(folder: str | Path) -> Report:
    """Read any run folder; its kind decides the class.

    Raises:
        OutputError: no run there, a missing or altered file, or an unknown kind or schema.
    """
    path = Path(folder)
    record = read_record(path)
    if record["schema"] > SCHEMA or record["kind"] not in _known_kinds():
        raise OutputError(
            f"run folder {path}",
            given=f"kind {record['kind']!r}, schema {record['schema']}",
            expected=f"a kind of {sorted(_REGISTRY)}, schema ≤ {SCHEMA}",
            remedy="Update mi-weightspace.",
        )
    check_files(path, record)
    table, tables, arrays = read_files(path, record)
    return _REGISTRY[record["kind"]](
        table=table,
        tables=tables,
        arrays=arrays,
        verdicts=verdicts_of(record),
        config=record["config"],
        inputs=record["inputs"],
        reservations=tuple(record["reservations"]),
        timings=record["timings"],
        versions=record["versions"],
    )


def _known_kinds() -> dict[str, type[Report]]:
    """Kinds register when their module is imported; import those this distribution ships."""
    import importlib

    for module in REPORT_MODULES:
        importlib.import_module(module)
    return _REGISTRY


REPORT_MODULES: tuple[str, ...] = (
    "mi_weightspace.models.lineage",
    "mi_weightspace.spectral.svd",
    "mi_weightspace.spectral.project",
    "mi_weightspace.spectral.stages",
    "mi_weightspace.vpd.decomposition",
    "mi_weightspace.vpd.differences.link",
    "mi_weightspace.vpd.differences.result",
    "mi_weightspace.vpd.explain",
    "probes.bank",
    "probes.dmu",
    "probes.gate_report",
    "probes.inoculation_report",
    "probes.prompt_audit",
    "probes.readout",
)
"""Modules that define Report subclasses, by name: `core` never imports upward in code."""
