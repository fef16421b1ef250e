"""How a decomposed change is measured: on each stream apart, in units of K0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import pandas as pd


def measure_streams(
    objective: Objective,
    streams: Mapping[str, Sequence[Tensor]],
    options: Mapping[str, Any],
    found: Mapping[str, pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """Tables beside those of `evaluate` on the first stream."""
    return {}
