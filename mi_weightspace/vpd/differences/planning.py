"""What decomposing a difference will cost, before any weight is loaded (vpd.md §10).

Beside what a decomposition of the matrices themselves costs, every masked pass forms ``x dW`` for
each update, and three copies of each decomposed matrix are kept: the last stage's (in the model),
the first stage's, and the difference of every stage. All other weights exist once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from mi_weightspace.models.checkpoint import read_config
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.planning import Plan, plan

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
    item = _ITEM[kind]
    entries = sum(s.d_out * s.d_in for s in found.sites)
    memory = dict(found.memory)
    memory["copies of the matrices"] = 4 * entries * n_stages
    memory["the first stage's matrices"] = item * entries
    if config.faithfulness.weight == 0:
        memory["remainders of faithfulness"] = 0
    work = dict(found.flops)
    if config.faithfulness.weight == 0:
        work["faithfulness"] = 0.0
    passes = sum(_passes(term) for term in config.reconstruction)
    tokens = found.batch * found.length
    work["products with the updates"] = 2.0 * entries * n_stages * passes * tokens
    own = {f.name: getattr(found, f.name) for f in fields(found)}
    own |= {"memory": memory, "flops": work, "model": found.model * item // 4}
    growth = sum(work.values()) / max(1.0, found.flops_per_step)
    own["total_flops"] = found.total_flops * growth
    made = DifferencePlan(**own, dtype=kind, n_stages=n_stages)
    return replace(made, saving=min(made.saving, sum(memory.values())))


def _passes(term: Any) -> float:
    """Products of one matrix' size a term makes: one a forward pass, one more a backward pass."""
    climbs = term.pgd_steps if term.source == "fresh_pgd" else 0
    climbs = term.n_warm if term.keeps_sources else climbs
    return 2.0 * (climbs + term.n_samples)


def _stored_dtype(model: Any) -> str:
    if isinstance(model, str | Path) and Path(model).is_dir():
        record = read_config(Path(model)) if (Path(model) / "config.json").is_file() else {}
        found = str(record.get("dtype") or record.get("torch_dtype") or "float32")
        return found if found in _ITEM else "float32"
    kind = getattr(model, "dtype", torch.float32)
    return str(kind).removeprefix("torch.")
