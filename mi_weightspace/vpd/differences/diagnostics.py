"""What partial reversions of the whole change do, where little changed and where much did.

All with g ≡ 0: what is attacked is the change, not the decomposition. A row of a batch is one
model: every number below is drawn once a row, and is the same at its positions.

* ``all_off``: the first stage (the carrier);
* ``R_path``: one t ∈ U[0, 1] for everything, the straight line between the two models;
* ``R_site``: one t per update; ``R_box``: one per subcomponent and per remainder;
* ``R_single``: one update wholly reverted, the worst of them.

Where everything off is harmless and one update off is not, training moved matrices in compensating
ways: importances there must stay up, and say nothing about where the behaviour lives (vpd.md §9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_weightspace.vpd.differences.attribution import off
from mi_weightspace.vpd.differences.unit import everything_off, per_position
from mi_weightspace.vpd.evaluate_stats import Interval, ratio, records
from mi_weightspace.vpd.host import Clean
from mi_weightspace.vpd.masked import Adjust, Masks
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import Draws

if TYPE_CHECKING:
    import pandas as pd

N_DRAWS = 4
MOST_BATCHES = 3
"""Of every stream: two passes an update and batch are run."""
MATTERS = 0.1
"""Units of K0 that reverting one update must cost on unchanged positions."""
FACTOR = 10.0
"""How many times what reverting everything costs there."""
SHARE = 0.25
"""Of all positions, that must be unchanged: where effects are many and small, some cancel by
chance, and choosing the positions where they did finds them."""
CHANGED, UNTOUCHED = "changed", "unchanged"
RANDOM = ("R_path", "R_site", "R_box")


@dataclass(frozen=True, eq=False)
class Reversions:
    """Errors to the last stage by row and position, (rows, positions) each.

    Attributes:
        all_off, random (means over draws, by name), alone_off and alone_on by update.
    """

    all_off: Float[Tensor, "rows positions"]
    random: Mapping[str, Float[Tensor, "rows positions"]]
    alone_off: Mapping[str, Float[Tensor, "rows positions"]]
    alone_on: Mapping[str, Float[Tensor, "rows positions"]]


@torch.no_grad()
def reversions(
    objective: Objective, batches: Sequence[Tensor], *, n_draws: int = N_DRAWS, seed: int = 0
) -> Reversions:
    """Everything `diagnose` and `whole_matrices` read, on these batches."""
    host = objective.factors.host
    draws = Draws(seed, host.device, objective.draws.dtype)
    found: dict[tuple[str, str], list[Tensor]] = {}

    def note(kind: str, name: str, clean: Clean, functions: Sequence[Mapping[str, Adjust]]) -> None:
        errors = [
            per_position(host.forward(clean, f), clean.output, host.metric) for f in functions
        ]
        mean = torch.stack(errors).mean(0)
        found.setdefault((kind, name), []).append(mean.reshape(len(mean), -1).double().cpu())

    with host.prepared(objective.config.speed):
        for at, batch in enumerate(batches):
            clean = host.clean(batch.to(host.device))
            nothing = everything_off(host)
            note("all_off", "", clean, [nothing])
            for kind in RANDOM:
                drawn = [_random(kind, objective, clean, draws, at, i) for i in range(n_draws)]
                note(kind, "", clean, drawn)
            for name in host.names:
                note("alone_off", name, clean, [{name: off}])
                others = {k: f for k, f in nothing.items() if k != name}
                note("alone_on", name, clean, [others])
    whole = {key: torch.cat(parts) for key, parts in found.items()}
    return Reversions(
        whole["all_off", ""],
        {kind: whole[kind, ""] for kind in RANDOM},
        {name: whole["alone_off", name] for name in host.names},
        {name: whole["alone_on", name] for name in host.names},
    )


def _random(
    kind: str, objective: Objective, clean: Clean, draws: Draws, at: int, i: int
) -> Mapping[str, Adjust]:
    factors = objective.factors
    ones = [1] * (clean.output.ndim - 2)
    draw = draws.generator("reversion", kind, at, i)

    def uniform(size: int) -> Tensor:
        shape = (len(clean.batch), *ones, size)
        return draws.uniform(shape, draw, whole=True)

    if kind == "R_box":
        masks = Masks(uniform(factors.layout.total), uniform(len(factors.layout.names)))
        return factors.functions(masks, train=False)
    t = uniform(1 if kind == "R_path" else len(factors.layout.names))
    names = enumerate(factors.layout.names)
    return {name: _times(t[..., k % t.shape[-1]].unsqueeze(-1)) for k, name in names}


def _times(t: Tensor) -> Adjust:
    return lambda _x, y: y * t.to(y.dtype)


# ---- tables --------------------------------------------------------------------------------
def subsets(
    found: Mapping[str, Reversions], epsilon: float
) -> dict[str, tuple[Reversions, Bool[Tensor, "rows positions"]]]:
    """Every stream, and of all together the positions with less than `epsilon` changed."""
    every = _joined(list(found.values()))
    chosen = {name: (r, torch.ones_like(r.all_off, dtype=torch.bool)) for name, r in found.items()}
    chosen[CHANGED] = every, every.all_off >= epsilon
    chosen[UNTOUCHED] = every, every.all_off < epsilon
    return chosen


def _joined(parts: Sequence[Reversions]) -> Reversions:
    def whole(field: str) -> dict[str, Tensor]:
        tables = [getattr(part, field) for part in parts]
        return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}

    return Reversions(
        torch.cat([part.all_off for part in parts]),
        whole("random"),
        whole("alone_off"),
        whole("alone_on"),
    )


def whole_matrices(
    found: Mapping[str, Reversions], stage_of: Mapping[str, str], k0: float, epsilon: float
) -> pd.DataFrame:
    """Each update alone, wholly on and wholly off.

    Columns: ``stream`` (or the ``changed`` or ``unchanged`` positions of all), ``site, stage``,
    ``alone`` (``on``: the others off; ``off``: the others on), ``value, low, high``, the same
    ``of_behaviour`` (K0 of the first stream, taken as exact) and ``of_own`` (of everything off on
    the same positions), ``n`` positions, ``n_units`` rows. 95 % intervals over rows.
    """
    import pandas as pd

    rows = []
    for stream, (own, chosen) in subsets(found, epsilon).items():
        for alone, table in (("on", own.alone_on), ("off", own.alone_off)):
            for name, errors in table.items():
                key = {"stream": stream, "site": name, "stage": stage_of[name], "alone": alone}
                rows.append(key | _numbers(errors, own.all_off, chosen, k0))
    return pd.DataFrame(rows)


def diagnose(
    found: Mapping[str, Reversions],
    k0: float,
    epsilon: float,
    *,
    n_draws: int = N_DRAWS,
) -> pd.DataFrame:
    """``all_off, R_path, R_site, R_box, R_single`` on every stream, changed, unchanged positions.

    Columns: ``stream, quantity, site`` (the worst update, of ``R_single``), the numbers of
    `whole_matrices`, ``share`` (of all positions measured that are in the subset), ``n_draws``.
    """
    import pandas as pd

    rows = []
    every = sum(r.all_off.numel() for r in found.values())
    for stream, (own, chosen) in subsets(found, epsilon).items():
        worst = max(own.alone_off, key=lambda name: float((own.alone_off[name] * chosen).sum()))
        tables = {"all_off": own.all_off, **own.random, "R_single": own.alone_off[worst]}
        for quantity, errors in tables.items():
            rows.append(
                {
                    "stream": stream,
                    "quantity": quantity,
                    "site": worst if quantity == "R_single" else None,
                    **_numbers(errors, own.all_off, chosen, k0),
                    "share": int(chosen.sum()) / every,
                    "n_draws": n_draws if quantity in own.random else 1,
                }
            )
    return pd.DataFrame(rows)


def _numbers(
    errors: Float[Tensor, "rows positions"],
    all_off: Float[Tensor, "rows positions"],
    chosen: Bool[Tensor, "rows positions"],
    k0: float,
) -> dict[str, Any]:
    above, zero, below = (
        (x.double() * chosen).sum(1).numpy() for x in (errors, all_off, torch.ones_like(all_off))
    )
    kept = below > 0
    above, zero, below = above[kept], zero[kept], below[kept]
    unit = np.ones_like(below)
    value = ratio(above, below, unit)
    own = ratio(above, zero, unit)
    return {
        "value": value.value,
        "low": value.low,
        "high": value.high,
        **dict(_named("of_behaviour", Interval(*(x / k0 for x in value)))),
        **dict(_named("of_own", own)),
        "n": int(below.sum()),
        "n_units": int(kept.sum()),
    }


def _named(name: str, value: Interval) -> Iterator[tuple[str, float]]:
    yield name, value.value
    yield f"{name}_low", value.low
    yield f"{name}_high", value.high


# ---- in words ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Compensation:
    """Whether matrices moved in compensating ways.

    Attributes:
        told: None where too few positions are unchanged to say. site: the worst update alone.
        all_off, single, single_low: in units of K0, on unchanged positions. share: of positions
            that are unchanged.
    """

    told: bool | None
    site: str
    all_off: float
    single: float
    single_low: float
    share: float

    def __str__(self) -> str:
        numbers = (
            f"everything {self.all_off:.2g} K0, {self.site} alone {self.single:.2g} K0, on the "
            f"{self.share:.0%} of positions that are unchanged"
        )
        if self.told is None:
            return (
                f"Compensating changes: cannot be told, only {self.share:.0%} of positions are "
                f"unchanged (at least {SHARE:.0%} needed); give broad text."
            )
        if self.told:
            return (
                "Reverting all is harmless, reverting one is not: compensating changes "
                f"({numbers}). Importances stay up there and do not say where the behaviour lives."
            )
        return (
            f"No sign of compensating changes: reverted, {numbers} (told from {MATTERS:g} K0 and "
            f"{FACTOR:g} times everything)."
        )


def compensation(diagnostics: pd.DataFrame) -> Compensation:
    """Read from the table of `diagnose`: on unchanged positions the lower end of ``R_single`` is at
    least `MATTERS` K0 and `FACTOR` times ``all_off``, and `SHARE` of positions are unchanged."""
    own = {r["quantity"]: r for r in records(diagnostics, stream=UNTOUCHED)}
    one, everything = own["R_single"], own["all_off"]
    single, low = one["of_behaviour"], one["of_behaviour_low"]
    told: bool | None = None
    if one["share"] >= SHARE:
        told = bool(low >= MATTERS and low >= FACTOR * everything["of_behaviour"])
    return Compensation(told, one["site"], everything["of_behaviour"], single, low, one["share"])
