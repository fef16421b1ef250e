"""The activation-weighted view of a whole lineage as one table (`spectral.weighted` per matrix)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mi_weightspace.core.direction import Direction
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.spectral.weighted import gather_inputs, weighted, without_massive


def weighted_table(
    lineage: Lineage,
    prompts: Sequence[str | tuple[int, ...]],
    sites: str | Sequence[str] | None = None,
    *,
    directions: Sequence[Direction] = (),
    rank: int = 8,
    max_rows: int = 2048,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """A data frame: what each step's change does to each writing matrix's output on data.

    One row per (stage, matrix). ``realised_fro`` is ``√E‖Dx‖²`` over the tokens of the prompts, run
    through the *earlier* stage; ``constant_share`` the part of its square that is the constant
    shift ``Dμ``; ``share_1`` the part along the first weighted direction. Where a direction lives
    in the space the matrix writes: its |cos| with that direction (``cosine_weighted``), with the
    first direction of the input-dependent part, and with ``Dμ``. Tokens of massive activation are
    dropped and counted.
    """
    import pandas as pd
    from rich.progress import track

    rows: list[dict[str, Any]] = []
    for earlier, later in lineage.steps:
        difference = lineage.diff(earlier, later)
        chosen = [
            s
            for s in difference.sites("blocks.*" if sites is None else sites)
            if s.writes.is_stream and bool((difference.weight(s) != 0).any())
        ]
        if not chosen:
            continue
        with lineage.opened(earlier) as lens:
            inputs = gather_inputs(lens, prompts, chosen, max_rows=max_rows, seed=seed)
        for site in track(chosen, f"on data {later}", disable=not progress, transient=True):
            kept, dropped = without_massive(inputs[site.name])
            found = weighted(difference, site, kept, rank=rank, seed=seed, null_edge=False)
            facts = found.components.facts
            own = next((d for d in directions if d.space.canonical == site.writes.canonical), None)
            cosines = found.cosines(own.pattern) if own is not None else {}
            rows.append(
                {
                    "stage": later,
                    "site": site.name,
                    "layer": math.nan if site.layer is None else site.layer,
                    "kind": site.kind,
                    "n_rows": facts["n_rows"],
                    "n_massive_dropped": dropped,
                    "realised_fro": facts["realised_fro"],
                    "share_1": facts["share_1"],
                    "share": facts["share"],
                    "constant_norm": facts["constant_norm"],
                    "constant_share": facts["constant_share"],
                    "direction": own.name if own is not None else "",
                    "cosine_weighted": cosines.get("write_1", math.nan),
                    "cosine_dependent": cosines.get("dependent_1", math.nan),
                    "cosine_constant": cosines.get("constant", math.nan),
                }
            )
    return pd.DataFrame(rows)
