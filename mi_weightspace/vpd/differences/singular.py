"""Are the top singular parts of an update load-bearing? Each is taken away alone, and kept alone.

The largest part of a change need not be the part that acts: its read vector may lie where no
activation goes, or its write vector where nothing reads (vpd.md §9). Size is printed beside what
reverting it costs, in units of K0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.verdict import Word
from mi_weightspace.vpd.differences.attribution import off
from mi_weightspace.vpd.differences.unit import everything_off, per_position
from mi_weightspace.vpd.evaluate_stats import ratio, records
from mi_weightspace.vpd.masked import Adjust
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import pandas as pd

_Key = tuple[str, int, str]
_EVERYTHING: _Key = ("", -1, "everything")
N_SINGULAR = 2
MOST_BATCHES = 3
LITTLE, MATTERS = 0.1, 0.1
"""A part bears no load where reverting it costs less than `LITTLE` of what reverting its whole
update does; asked of updates whose reversion costs at least `MATTERS` K0."""


@torch.no_grad()
def singular_parts(
    objective: Objective, batches: Sequence[Tensor], *, n_parts: int = N_SINGULAR
) -> pd.DataFrame:
    """One row an update and part, on the behaviour stream.

    Columns: ``site, part`` (0 the largest), ``value`` (singular value), ``energy`` (share of the
    update's squared norm), ``update`` (reverting the whole update), ``reverted`` (this part alone
    reverted), ``kept`` (all of the update but this part reverted), in units of K0 on these batches,
    each with ``_low`` and ``_high`` (95 % over rows), ``verdict``, ``n`` positions, ``n_units``.
    ``verdict``: `load-bearing`, `not load-bearing`, or empty for updates that matter too little.
    """
    import pandas as pd

    host = objective.factors.host
    vectors = {
        name: torch.linalg.svd(host.weight(name), full_matrices=False) for name in host.names
    }
    parts: dict[_Key, list[Tensor]] = {}
    n = 0
    with host.prepared(objective.config.speed):
        for batch in batches[:MOST_BATCHES]:
            clean = host.clean(batch.to(host.device))
            n += clean.output[..., 0].numel()
            for key, functions in _reversions(host, vectors, n_parts):
                error = per_position(host.forward(clean, functions), clean.output, host.metric)
                parts.setdefault(key, []).append(error.reshape(len(error), -1).mean(1).cpu())
    errors = {key: torch.cat(own).double().numpy() for key, own in parts.items()}
    unit = errors[_EVERYTHING]
    numbers = {key: ratio(own, unit, np.ones_like(unit)) for key, own in errors.items()}
    rows = []
    for name, (_, values, _) in vectors.items():
        energies = values.double().square()
        for i in range(min(n_parts, len(values))):
            row: dict[str, Any] = {
                "site": name,
                "part": i,
                "value": float(values[i]),
                "energy": float(energies[i] / energies.sum()),
            }
            for kind, at in (("update", -1), ("reverted", i), ("kept", i)):
                own = numbers[name, at, kind]
                row |= {kind: own.value, f"{kind}_low": own.low, f"{kind}_high": own.high}
            rows.append(row | {"verdict": _word(row), "n": n, "n_units": len(unit)})
    return pd.DataFrame(rows)


def idle_tops(table: pd.DataFrame) -> str | None:
    """In words: the updates that matter and whose largest singular part does not."""
    idle = records(table, part=0, verdict=Word.NOT_LOAD_BEARING.value)
    if not idle:
        return None
    named = ", ".join(
        f"{r['site']} ({r['energy']:.0%} of its energy; reverting it {r['reverted']:.2g} K0, the "
        f"update {r['update']:.2g} K0)"
        for r in idle[:4]
    )
    return (
        f"Top singular part not load-bearing: {named}{' …' if len(idle) > 4 else ''}. The largest "
        "part of a change is not the part that acts."
    )


def _reversions(
    host: Any, vectors: Mapping[str, tuple[Tensor, Tensor, Tensor]], n_parts: int
) -> Iterator[tuple[_Key, Mapping[str, Adjust]]]:
    yield _EVERYTHING, everything_off(host)
    for name, (u, _, _) in vectors.items():
        yield (name, -1, "update"), {name: off}
        for i in range(min(n_parts, u.shape[1])):
            for kind, function in _around(u[:, i]):
                yield (name, i, kind), {name: function}


def _around(u: Float[Tensor, " rows"]) -> Iterator[tuple[str, Adjust]]:
    """Without ``σ u vᵀ``, and it alone: both act on what the update writes."""

    def part(y: Tensor) -> Tensor:
        own = u.to(y.dtype)
        return (y @ own)[..., None] * own

    yield "reverted", lambda _x, y: y - part(y)
    yield "kept", lambda _x, y: part(y)


def _word(row: Mapping[str, float]) -> str:
    if not row["update_low"] >= MATTERS:
        return ""
    idle = row["reverted_high"] < LITTLE * row["update"]
    return (Word.NOT_LOAD_BEARING if idle else Word.LOAD_BEARING).value
