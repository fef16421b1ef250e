"""What decomposing a difference will cost, before any weight is loaded (vpd.md §10).

Beside what a decomposition of the matrices themselves costs, with d = d_in d_out entries of a
decomposed matrix and K stages:

* every masked pass forms ``dW x`` (2 K d a token), and its backward pass the same again wherever a
  matrix in front is masked too;
* the importance network reads a matrix' input once for each of its K updates;
* copies of a matrix: the last stage's (in the model), the first stage's in the model's precision,
  and K differences in float32, again in the model's precision where that is another. All other
  weights exist once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from mi_weightspace.models.checkpoint import read_config
from mi_weightspace.vpd.config import ReconstructionConfig, VPDConfig
from mi_weightspace.vpd.plan_work import label
from mi_weightspace.vpd.planning import Plan, PlannedSite, plan

ACCELERATOR = 80e9
"""Bytes of the accelerator the sentence about fitting is made for."""
ACCELERATOR_FLOPS = 989e12
"""Dense bfloat16 peak of an H100 SXM, from its data sheet; not measured here."""
ACCELERATOR_SHARE = 0.25
"""Share of that peak a step is assumed to reach: thin products (C ≪ d) are bound by memory."""
_ACTIVATIONS = ("graph of", "clean batch", "gradient of the logits")
_ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, eq=False, repr=False)
class DifferencePlan(Plan):
    """A `Plan` whose model is kept in `dtype`, and whose sites are differences of `n_stages`."""

    dtype: str = "float32"
    n_stages: int = 1

    @property
    def on_accelerator(self) -> int:
        """Bytes on a device: activations in the model's precision, no slack of a CPU's heap."""
        parts = dict(self.memory)
        parts.pop("slack of the allocator", None)
        share = _ITEM[self.dtype] / 4
        scaled = sum(v * share for k, v in parts.items() if k.startswith(_ACTIVATIONS))
        return int(self.model + scaled) + sum(
            v for k, v in parts.items() if not k.startswith(_ACTIVATIONS)
        )

    @property
    def tokens_per_second(self) -> float:
        """On an accelerator of `ACCELERATOR_FLOPS`, at an assumed `ACCELERATOR_SHARE` of them."""
        tokens = self.batch * self.length
        return ACCELERATOR_FLOPS * ACCELERATOR_SHARE / (self.flops_per_step / tokens)

    def __str__(self) -> str:
        fits = "fits" if self.on_accelerator <= ACCELERATOR else "does not fit"
        return "\n".join(
            [
                f"differences of {self.n_stages} stage{'s' if self.n_stages > 1 else ''}, taken as "
                f"dense (an adapter costs less); model in {self.dtype}",
                super().__str__(),
                f"one accelerator of {ACCELERATOR / 1e9:.0f} GB: {fits}, "
                f"{self.on_accelerator / 1e9:.3g} GB with activations in {self.dtype}",
                f"there about {self.tokens_per_second:,.0f} tokens a second (estimate, not "
                f"measured: {ACCELERATOR_SHARE:.0%} of {ACCELERATOR_FLOPS / 1e12:.0f} TFLOP/s)",
            ]
        )

    __repr__ = __str__


def plan_difference(
    model: Any,
    config: VPDConfig,
    *,
    n_stages: int = 1,
    batch: int | None = None,
    length: int = 64,
    dtype: str | None = None,
) -> DifferencePlan:
    """Cost of `decompose_difference` on one process.

    Args:
        model: any of the stages; as for `planning.plan`.
        n_stages: updates of each matrix. dtype: of the model in memory; default: as stored.

    Raises:
        As `planning.plan`.
    """
    counts = config.n_components
    many = (
        counts * n_stages
        if isinstance(counts, int)
        else {glob: n * n_stages for glob, n in counts.items()}
    )
    found = plan(
        model, config.model_copy(update={"n_components": many}), batch=batch, length=length
    )
    kind = _stored_dtype(model) if dtype is None else dtype
    wider = _wider_network(found.sites, config, n_stages)
    memory = _memory(found, config, n_stages, _ITEM[kind], wider)
    work = _work(found, config, n_stages, wider)
    checkpoint = found.checkpoint + 3 * 4 * wider
    own = {f.name: getattr(found, f.name) for f in fields(found)}
    own |= {"memory": memory, "flops": work, "model": found.model * _ITEM[kind] // 4}
    growth = sum(work.values()) / max(1.0, found.flops_per_step)
    own |= {"total_flops": found.total_flops * growth, "checkpoint": checkpoint}
    own["saving"] = min(found.saving + 9 * 4 * wider, sum(memory.values()))
    return DifferencePlan(**own, dtype=kind, n_stages=n_stages)


def _entries(sites: Sequence[PlannedSite]) -> int:
    return sum(s.d_out * s.d_in for s in sites)


# ---- work ----------------------------------------------------------------------------------
def _work(found: Plan, config: VPDConfig, n_stages: int, wider: int) -> dict[str, float]:
    """Operations of a step by part: those of the matrices themselves, and what updates add."""
    tokens = found.batch * found.length
    work = dict(found.flops)
    work["importance network"] += 6.0 * wider * tokens
    products = [s for s in found.sites if s.name != "embed"]  # an embedding's update is looked up
    forward = 2.0 * _entries(products) * n_stages
    both = forward + 2.0 * _entries([s for s in products if not _leads(s, found.sites)]) * n_stages
    total = 0.0
    for at, term in enumerate(config.reconstruction):
        if term.routing == "layerwise":  # one update masked at a time, and nothing in front of it
            total += forward * n_stages * term.n_samples
            work[f"{label(at, term)}: loss"] = _one_at_a_time(
                work[f"{label(at, term)}: loss"], found, term, n_stages
            )
        else:
            total += both * (_climbs(term) + term.n_samples)
    work["products with the updates"] = total * tokens
    return work


def _climbs(term: ReconstructionConfig) -> int:
    if term.source == "fresh_pgd":
        return term.pgd_steps
    return term.n_warm if term.keeps_sources else 0


def _one_at_a_time(planned: float, found: Plan, term: ReconstructionConfig, n_stages: int) -> float:
    """A pass for every update instead of one for every matrix with the components of all."""
    parts = sum(
        2 * s.n_components * ((0 if s.name == "embed" else 2 * s.d_in) + 3 * s.d_out)
        for s in found.sites
    )
    tokens = found.batch * found.length
    return n_stages * planned - (n_stages - 1) * parts * tokens * term.n_samples


_READS_WITH = {"attn.k": "attn.q", "attn.v": "attn.q", "mlp.in": "mlp.gate"}


def _leads(site: PlannedSite, sites: Sequence[PlannedSite]) -> bool:
    """Whether no masked matrix stands in front, so that no gradient reaches its input."""

    def place(name: str) -> tuple[str, ...]:
        *block, group, kind = name.rsplit(".", 2) if "." in name else (name, "")
        together = _READS_WITH.get(f"{group}.{kind}", f"{group}.{kind}")
        return *block, together

    return place(site.name) == place(sites[0].name)


# ---- memory --------------------------------------------------------------------------------
def _memory(found: Plan, config: VPDConfig, n_stages: int, item: int, wider: int) -> dict[str, int]:
    """Parts alive at the peak of a step, in bytes; `item`: of a number of the model."""
    entries, tokens = _entries(found.sites), found.batch * found.length
    memory = dict(found.memory)
    slack = memory.pop("slack of the allocator")
    share = slack / max(1, sum(memory.values()))
    again = 0 if item == 4 else item
    memory["copies of the matrices"] = (4 + again) * entries * n_stages
    memory["the first stage's matrices"] = item * entries
    memory["remainders of faithfulness"] *= n_stages
    memory["importance network"] += 4 * wider
    memory["moments of the optimisers"] += 8 * wider
    memory["gradients"] += 4 * wider
    # every update's own output is kept where the remainder's source wants a gradient
    outputs = 4 * tokens * sum(s.d_out for s in found.sites) * (n_stages - 1)
    for at, term in enumerate(config.reconstruction):
        name = f"graph of {label(at, term)}"
        if term.routing == "layerwise":
            memory[name] *= n_stages
        elif term.source not in {"uniform", "binomial"}:
            memory[name] += outputs
    memory["slack of the allocator"] = int(share * sum(memory.values()))
    return memory


def _wider_network(sites: Sequence[PlannedSite], config: VPDConfig, n_stages: int) -> int:
    """Parameters the importance network has beyond one that reads every matrix once."""
    network = config.importance
    read = sum(s.d_out if s.name == "embed" else s.d_in for s in sites)
    if network.kind in {"component_mlp", "vector_mlp"}:
        return 0  # a network a component, whichever update it is of
    if network.kind.endswith("transformer"):
        return (n_stages - 1) * read * network.d_model
    first = (n_stages - 1) * read * network.hidden[0]
    if network.kind == "global_mlp":
        return first
    inner = sum(a * b for a, b in zip(network.hidden[:-1], network.hidden[1:], strict=True))
    return first + (n_stages - 1) * len(sites) * (inner + sum(network.hidden))


def _stored_dtype(model: Any) -> str:
    if isinstance(model, str | Path) and Path(model).is_dir():
        record = read_config(Path(model)) if (Path(model) / "config.json").is_file() else {}
        found = str(record.get("dtype") or record.get("torch_dtype") or "float32")
        return found if found in _ITEM else "float32"
    kind = getattr(model, "dtype", torch.float32)
    return str(kind).removeprefix("torch.")
