"""Evaluation and self-checks of a decomposition, as the parts of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.vpd.cards import component_table
from mi_weightspace.vpd.evaluate import Evaluation, evaluate
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.selfchecks import STAMPS, Check, check_table, converged, self_checks
from mi_weightspace.vpd.selfchecks_anchor import Anchor, run_anchor

if TYPE_CHECKING:
    import pandas as pd

BUDGETS = (20, 40, 80, 160)
"""Rungs of the PGD ladder by default; the published one goes to 1280 steps."""


@dataclass(frozen=True, eq=False)
class Assessment:
    """What a `Decomposition` stores of an evaluation; `table` has a row per site and a total."""

    table: pd.DataFrame
    tables: Mapping[str, pd.DataFrame]
    arrays: Mapping[str, Tensor]
    verdicts: tuple[Verdict, ...]
    reservations: tuple[str, ...]
    facts: dict[str, Any]


def assess(
    objective: Objective,
    history: pd.DataFrame,
    batches: Sequence[Tensor],
    options: Mapping[str, Any],
) -> Assessment:
    """Evaluate on held-out batches and check the run.

    Args:
        options: of `vpd.evaluate.evaluate`; and ``anchor``, for the check of that name: an
            `Anchor`, True to run one now (under 20 CPU-seconds), or a file that keeps it.
    """
    given = {"budgets": BUDGETS, **options}
    anchor = _anchor(given.pop("anchor", None), progress=bool(given.get("progress", True)))
    found = evaluate(objective, batches, **given)
    records: list[dict[str, Any]] = [
        {str(k): v for k, v in row.items() if v == v}  # a term that was not on yet has no value
        for row in history.to_dict("records")
    ]
    checks = self_checks(objective, records, found, anchor=anchor)
    failed = [c for c in checks if c.outcome == "FAIL" and c.name not in STAMPS]
    return Assessment(
        table=found.to_pandas(),
        tables={
            "checks": check_table(checks),
            "components": component_table(objective, batches),
            **found.tables(),
        },
        arrays=found.arrays(),
        verdicts=tuple(_verdicts(objective, found, checks)),
        reservations=tuple(f"Check {c.name} failed: {c.sentence}." for c in failed),
        facts=dict(found.facts),
    )


def _anchor(asked: Anchor | str | Path | bool | None, *, progress: bool) -> Anchor | None:
    if asked is None or asked is False or isinstance(asked, Anchor):
        return asked or None
    return run_anchor(None if asked is True else asked, progress=progress)


def _verdicts(
    objective: Objective, found: Evaluation, checks: Sequence[Check]
) -> Iterator[Verdict]:
    """`unconverged` where the end of the run is not settled; `not decomposable here` where C is
    below the rank of a matrix that the components were to sum to."""
    if not converged(checks):
        open_ = [c for c in checks if c.name in STAMPS and c.outcome != "PASS"]
        sentences = tuple(c.sentence for c in open_)
        yield Verdict(
            Word.UNCONVERGED, "decomposition", {c.name: c.number for c in open_}, sentences
        )
    if objective.config.faithfulness.weight == 0:
        return
    for row in found.sites.to_dict("records"):
        if not row["can_be_exact"]:
            evidence: dict[str, Any] = {
                "n_components": int(row["n_components"]),
                "rank": int(row["rank_bound"]),
            }
            text = "Fewer components than the rank: they cannot sum to the matrix."
            yield Verdict(Word.NOT_DECOMPOSABLE, str(row["site"]), evidence, (text,))
