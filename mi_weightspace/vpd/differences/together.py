"""Two methods about the same matrices: what the weights say, and what the masks say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.factors import matrix_of

if TYPE_CHECKING:
    import pandas as pd

EVIDENCE = ("direction", "cosine", "G", "p_G", "path_share", "verdict")


def together(parts: DifferenceDecomposition, evidence: pd.DataFrame) -> pd.DataFrame:
    """L0 of every update beside the evidence of `attribute_stages` or `project` for its matrix.

    Args:
        evidence: their table: ``stage, site`` and what of `EVIDENCE` it has. A matrix may have
            several rows (directions), or none; a stage without an update has L0 0.

    Columns: ``stage, site, l0, dense, alive, remainder``, then the evidence. L0 is the mean number
    of components needed at a position of the behaviour's stream; it is not evidence about the
    direction, nor is a cosine evidence about the behaviour: where both stand, read both.
    """
    import pandas as pd

    column = next(c for c in parts.table.columns if str(c).startswith("l0>"))
    rows = [
        {
            "stage": parts.stage_of(str(r["site"])),
            "site": matrix_of(str(r["site"])),
            "l0": float(r[column]),
            "dense": int(r["dense"]),
            "alive": int(r["alive_by_firing"]),
            "remainder": float(r["remainder"]),
        }
        for r in parts.table.to_dict("records")
        if r["site"] in parts.config["sites"]
    ]
    mine = pd.DataFrame(rows, columns=["stage", "site", "l0", "dense", "alive", "remainder"])
    kept = [c for c in EVIDENCE if c in evidence]
    return mine.merge(evidence[["stage", "site", *kept]], on=["stage", "site"], how="left")


def with_evidence(
    parts: DifferenceDecomposition, evidence: pd.DataFrame
) -> DifferenceDecomposition:
    """The decomposition with `together` as one of its tables."""
    if not len(parts):
        return parts
    tables = {**parts.tables, "together": together(parts, evidence)}
    return replace(parts, tables=tables).with_objective(parts.live)
