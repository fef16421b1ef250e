"""What a decomposition will cost, before any weight is loaded: memory, FLOPs, disk, time.

FLOPs follow vpd.md §10, ``F_m + 6 P_ci + Σ_terms …`` per token, with F_m the frozen forward pass,
``F_c = Σ 2C(d_in + d_out)`` the components' share of it and P_ci the importance parameters: a loss
costs ``2F_m + 3F_c``, an ascent ``2F_m + 2F_c``, less what lies in front of the first masked
matrix; faithfulness ``6 Σ d_in d_out C`` a step. What the passes keep in memory is counted on a run
of shapes (`plan_trace`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mi_weightspace.core.errors import CheckpointError, ConfigError
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.arithmetic import fast_float32
from mi_weightspace.models.checkpoint import read_config, read_json
from mi_weightspace.models.grammar import ModelShape, shape_of
from mi_weightspace.vpd.config import ReconstructionConfig, VPDConfig
from mi_weightspace.vpd.losses import CHUNK
from mi_weightspace.vpd.plan_trace import Traced, kind_of, trace
from mi_weightspace.vpd.plan_work import flops, label
from mi_weightspace.vpd.sources import source_shape
from mi_weightspace.vpd.state import KEEP

if TYPE_CHECKING:
    import pandas as pd

EFFICIENCY = 0.35
"""Share of the measured matmul peak a step is assumed to reach, in the estimate of time. Measured
0.32 to 0.37 on one core at four layers, d = 128, C = 128, 8 × 64 tokens."""
SLACK = 0.3
"""Memory the allocator holds beyond live tensors, relative to them: blocks of a few hundred kB come
and go by the thousand, and the heap keeps holes. Measured with glibc at d = 128: 0.32; 0.06 where
every block is mapped by itself (``MALLOC_MMAP_THRESHOLD_=131072``)."""
PROBE_SIDE, PROBE_SECONDS = 384, 0.2


@dataclass(frozen=True)
class PlannedSite:
    """One matrix: its shape, its components, and what is to be said about their number."""

    name: str
    d_out: int
    d_in: int
    n_components: int
    note: str


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The cost of a run; `str` is what ``mi-weightspace vpd --plan`` prints.

    Attributes:
        memory: part -> bytes, alive together at the peak of a step, beyond the loaded model.
        model: bytes of the model itself in float32. saving: bytes a checkpoint's writing needs for
            a moment (instead of the activations). checkpoint: bytes of one on disk.
        flops: part -> floating-point operations of a step with every term on.
        total_flops: of the whole training (terms that start late counted from then on), warm-up
            included.
        peak: measured float32 (or bfloat16) matmul rate of this machine, FLOP/s.
        cache_per_row: bytes `speed.cache_clean` adds for every row of the token table (0: off).
        batch, length: of one process.
    """

    sites: tuple[PlannedSite, ...]
    memory: Mapping[str, int]
    model: int
    saving: int
    checkpoint: int
    flops: Mapping[str, float]
    total_flops: float
    peak: float
    batch: int
    length: int
    n_steps: int
    cache_per_row: int = 0

    @property
    def growth(self) -> int:
        """Bytes by which training raises the peak of the process, beyond the loaded model."""
        return max(sum(self.memory.values()), self.saving)

    @property
    def flops_per_step(self) -> float:
        return sum(self.flops.values())

    @property
    def flops_per_token(self) -> float:
        """Of a step, without faithfulness (which does not depend on the batch)."""
        tokens = self.batch * self.length
        return sum(v for k, v in self.flops.items() if k != "faithfulness") / tokens

    @property
    def seconds(self) -> float:
        """Estimated time of training, at `EFFICIENCY` of the measured peak."""
        return self.total_flops / (self.peak * EFFICIENCY)

    def to_pandas(self) -> pd.DataFrame:
        """One row a site."""
        import pandas as pd

        columns = ("site", "d_out", "d_in", "n_components", "note")
        rows = [(s.name, s.d_out, s.d_in, s.n_components, s.note) for s in self.sites]
        return pd.DataFrame(rows, columns=list(columns))

    def __str__(self) -> str:
        shapes: dict[tuple[str, int, int, int, str], int] = {}
        for s in self.sites:
            kind = s.name.split(".", 2)[-1]
            key = kind, s.d_out, s.d_in, s.n_components, s.note
            shapes[key] = shapes.get(key, 0) + 1
        lines = [
            f"{len(self.sites)} matrices, {sum(s.n_components for s in self.sites)} components"
        ]
        for (kind, d_out, d_in, count, note), n in shapes.items():
            lines.append(f"  {n} × {kind} {d_out}×{d_in}, C = {count}{note and f'; {note}'}")
        lines.append(
            f"peak memory: {_size(self.model)} model + {_size(self.growth)} training, of which"
        )
        lines += [f"  {_size(v):>9}  {k}" for k, v in self.memory.items() if v]
        if self.saving > sum(self.memory.values()):
            lines.append(f"  {_size(self.saving):>9}  while a checkpoint is written (decides)")
        if self.cache_per_row:
            lines.append(f"  and {_size(self.cache_per_row)} a row of tokens, for cache_clean")
        lines.append(f"disk: {_size(self.checkpoint)} a checkpoint, {KEEP} kept")
        lines.append(
            f"work: {self.flops_per_token:.3g} FLOP a token, {self.flops_per_step:.3g} a step of "
            f"{self.batch} × {self.length} tokens, {self.total_flops:.3g} in {self.n_steps} steps"
        )
        lines += [f"  {v / self.flops_per_step:8.0%}  {k}" for k, v in self.flops.items() if v]
        lines.append(
            f"time: about {_duration(self.seconds)} of training on this machine (estimate: "
            f"{EFFICIENCY:.0%} of the {self.peak / 1e9:.3g} GFLOP/s its matrix products reach "
            "now); evaluation comes on top"
        )
        return "\n".join(lines)

    __repr__ = __str__


def plan(model: Any, config: VPDConfig, *, batch: int | None = None, length: int = 64) -> Plan:
    """Cost of `decompose(model, tokens of rows of `length`, config)` on one process.

    Args:
        model: checkpoint folder or hub id (only ``config.json`` is read), a `Lens` on one, or a
            Hugging Face model.
        batch: rows a process; default `config.batch_size`.

    Raises:
        CheckpointError: no such folder or configuration. ArchitectureError: an unknown family.
        SiteError: a pattern that matches nothing. ConfigError: counts that do not cover the sites,
            rows longer than the model reads, a model whose configuration cannot be found.
    """
    hf_config = _configuration(model)
    shape = shape_of(hf_config)
    if length > shape.max_positions:
        raise ConfigError(
            "length",
            given=f"{length} tokens",
            expected=f"at most {shape.max_positions}, which this model reads",
            remedy="Plan for shorter rows.",
        )
    batch = config.batch_size if batch is None else batch
    found = trace(hf_config, config, batch, length)
    memory, saving, checkpoint = _memory(found, config, shape, batch, length)
    work = flops(found, config, shape, batch, length)
    total = sum(v * _share_of_run(k, config) for k, v in work.items()) * config.n_steps
    total += work["faithfulness"] * config.n_warmup
    return Plan(
        tuple(
            PlannedSite(name, *found.matrices[name], count, _note(found, name, config))
            for name, count in found.counts.items()
        ),
        memory,
        found.model,
        saving,
        checkpoint,
        work,
        total,
        matmul_peak(config),
        batch,
        length,
        config.n_steps,
        found.clean // batch if config.speed.cache_clean else 0,
    )


def _note(found: Traced, name: str, config: VPDConfig) -> str:
    rank = min(found.matrices[name])
    if found.counts[name] >= rank:
        return ""
    if config.faithfulness.weight == 0 or config.allow_unfaithful:
        return f"below rank ≤ {rank}: cannot be faithful where the rank is above C"
    return f"below rank ≤ {rank}: refused where the rank is above C"


# ---- the model's configuration -------------------------------------------------------------
def _configuration(model: Any) -> Any:
    from transformers import AutoConfig

    if isinstance(model, str | Path):
        record = _config_record(model)
        shape_of(record)  # refuses unknown families
        return AutoConfig.for_model(**record)
    if hasattr(model, "path"):
        return _configuration(model.path)
    root = getattr(model, "root", model)
    modules = root.modules() if isinstance(root, torch.nn.Module) else ()
    for module in modules:
        found = getattr(module, "config", None)
        if hasattr(found, "model_type"):
            return found
    raise ConfigError(
        "model to plan for",
        given=f"a {type(getattr(model, 'model', model)).__name__} without a Hugging Face "
        "configuration",
        expected="a checkpoint folder, a hub id, or a model made from one",
        remedy="Pass the folder or hub id the model was loaded from.",
    )


def _config_record(model: str | Path) -> dict[str, Any]:
    """``config.json`` of a folder, adapter folder or hub id; no weight is downloaded."""
    path = Path(model).expanduser()
    if path.is_dir():
        adapter = path / "adapter_config.json"
        if adapter.is_file() and not (path / "config.json").is_file():
            record = read_json(adapter, "a PEFT adapter folder")
            return _config_record(str(record.get("base_model_name_or_path", "")))
        return read_config(path)
    if path.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        return read_config(path)  # says what is wrong
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_config(Path(hf_hub_download(str(model), "config.json")).parent)
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"model {str(model)!r}",
            given=f"no local folder of that name, and the hub answered: {type(error).__name__}",
            expected="a local folder (save_pretrained) or a reachable hub id",
            remedy="Check the name, the network and your access token.",
        ) from error


# ---- memory --------------------------------------------------------------------------------
def _memory(
    found: Traced, config: VPDConfig, shape: ModelShape, batch: int, length: int
) -> tuple[dict[str, int], int, int]:
    """(parts alive at the peak of a step, what saving needs, one checkpoint), in bytes."""
    n, k = batch * length, sum(found.counts.values())
    entries = sum(d_out * d_in for d_out, d_in in found.matrices.values())
    factors = 4 * sum(c * sum(found.matrices[name]) for name, c in found.counts.items())
    network = 4 * found.importance_parameters
    importances = 4 * n * k
    logits = 4 * n * shape.vocab_size
    sources = sum(_kept(t, (batch, length), k + len(found.counts)) for t in config.reconstruction)
    memory = {
        "copies of the matrices": 4 * entries,
        "components": factors,
        "importance network": network,
        "moments of the optimisers": 2 * (factors + network),
        "gradients": factors + network,
        "kept sources, their moments and gradients": 4 * sources,
        "clean batch: site inputs and outputs, logits": found.clean,
        "importance network's activations": found.importance.kept + found.importance.scratch,
        "importances (lower, upper, the last step's)": 3 * importances,
        "remainders of faithfulness": 4 * entries,
    }
    for at, term in enumerate(config.reconstruction):
        memory[f"graph of {label(at, term)}"] = _graph(found, term, importances)
    if config.speed.joint_forward:  # masks end to end are copies
        trials = sum(t.n_samples for t in config.reconstruction if t.routing != "layerwise")
        memory["masks of the joint forward"] = 2 * trials * importances
    memory["gradient of the logits"] = logits + 8 * min(CHUNK, logits // 4)
    memory["slack of the allocator"] = int(SLACK * sum(memory.values()))
    checkpoint = 3 * (factors + network) + 3 * sources
    fixed = 4 * entries + 3 * (factors + network) + 3 * sources + found.clean + importances
    return memory, fixed + 2 * checkpoint, checkpoint


def _kept(term: ReconstructionConfig, pos: tuple[int, int], width: int) -> int:
    """Bytes of one copy of a term's kept sources."""
    if term.source == "pooled":
        return 4 * pos[0] * term.particles * width
    if term.source != "persistent":
        return 0
    return 4 * math.prod(source_shape(term.scope, pos, term.repeat)) * width


def _graph(found: Traced, term: ReconstructionConfig, importances: int) -> int:
    """What a term's forward passes keep until the backward pass, with its draws."""
    one = found.passes[kind_of(term)]
    fresh = 0 if term.keeps_sources and term.adversarial_fraction == 1 else importances
    draws = 2 * fresh if term.adversarial_fraction < 1 else fresh
    times = term.n_samples * (len(found.counts) if term.routing == "layerwise" else 1)
    return times * one.kept + one.scratch + term.n_samples * draws


def _share_of_run(part: str, config: VPDConfig) -> float:
    for at, term in enumerate(config.reconstruction):
        if part.startswith(f"{label(at, term)}:"):
            return 1 - term.start_fraction
    return 1.0


def matmul_peak(config: VPDConfig) -> float:
    """FLOP/s of a square matrix product as this run would do it, the best of many."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    a = torch.randn(PROBE_SIDE, PROBE_SIDE, generator=generator(0, "plan")).to(dtype)
    best, start = math.inf, time.perf_counter()
    with fast_float32() if config.speed.fast_float32 else nullcontext():
        while time.perf_counter() - start < PROBE_SECONDS or best == math.inf:
            before = time.perf_counter()
            _ = a @ a
            best = min(best, time.perf_counter() - before)
    return 2 * PROBE_SIDE**3 / best


def _size(number: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
