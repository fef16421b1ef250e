"""Comparisons over several decompositions of one frozen target, and scores against a known answer.

Glue over `truth`, which holds the definitions: agreement of seeds, splitting with capacity, and a
toy's stated pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import mi_weightspace.vpd.truth as truth
from mi_weightspace.core.errors import MismatchError
from mi_weightspace.vpd.evaluate import Evaluation
from mi_weightspace.vpd.evaluate_stats import records
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.ladder import importances
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import pandas as pd

ALIVE_ON_PROBE = 0.1


@torch.no_grad()
def compare_seeds(
    first: Factors,
    second: Factors,
    *,
    alive: tuple[Bool[Tensor, " K"], Bool[Tensor, " K"]] | None = None,
    at_init: tuple[Factors, Factors] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Do two runs find the same components? One row a site: `truth.seed_consistency`.

    Args:
        alive: which components count, of each run (default: all). Sites where a run has none
            alive give NaN.
        at_init: the runs' factors before training, for the baseline; the *same* components count
            there, so that numbers of candidates are equal. None draws Gaussian vectors.

    Columns: ``site, n_first, n_second, write, read, rank_one, init_write, init_read,
    init_rank_one``.

    Raises:
        MismatchError: the two runs are not of the same frozen matrices.
    """
    import pandas as pd

    _same_target(first, second)
    chosen = _all(first, second) if alive is None else alive
    rows = []
    for name in first.layout.names:
        parts = [_parts(f, name, a) for f, a in zip((first, second), chosen, strict=True)]
        row = {"site": name, "n_first": len(parts[0].read), "n_second": len(parts[1].read)}
        if min(row["n_first"], row["n_second"]):
            start = None
            if at_init is not None:
                one, other = (_parts(f, name, a) for f, a in zip(at_init, chosen, strict=True))
                start = one, other
            found = truth.seed_consistency(parts[0], parts[1], start, seed=seed)
            for prefix, values in (("", found.runs), ("init_", found.at_init)):
                for kind in ("write", "read", "rank_one"):
                    row[prefix + kind] = getattr(values, kind)
        rows.append(row)
    columns = ["site", "n_first", "n_second", "write", "read", "rank_one"]
    return pd.DataFrame(rows, columns=[*columns, "init_write", "init_read", "init_rank_one"])


@torch.no_grad()
def compare_capacities(
    runs: Sequence[tuple[Factors, Evaluation]], *, threshold: float = 0.5
) -> pd.DataFrame:
    """Does more capacity split components? One row a run and site, against the smallest run.

    Under no splitting the alive count stays flat as C grows, while L0 and reconstruction stay put,
    and few components of the smallest run have more than one match (|cos| of write vectors above
    `threshold`) in a larger one.

    Columns: ``site, n_components, alive_by_mean, alive_by_firing, l0, ci_of_zero`` (the last of the
    whole run), ``unmatched, single, split`` (shares; NaN for the smallest run itself).

    Raises:
        MismatchError: the runs are not of the same frozen matrices.
    """
    import pandas as pd

    ordered = sorted(runs, key=lambda run: run[0].layout.total)
    smallest, base = ordered[0]
    rows = []
    for at, (factors, evaluation) in enumerate(ordered):
        _same_target(smallest, factors)
        fires, mean = evaluation.alive.by_firing, evaluation.alive.by_mean
        headline = evaluation.facts["threshold"]
        l0 = {r["name"]: r["l0"] for r in records(evaluation.l0, level="site", threshold=headline)}
        for name, place in factors.layout.slices().items():
            row = {
                "site": name,
                "n_components": place.stop - place.start,
                "alive_by_mean": int(mean[place].sum()),
                "alive_by_firing": int(fires[place].sum()),
                "l0": l0[name],
                "ci_of_zero": evaluation.masking("ci", "of_zero"),
            }
            if at and bool(fires[place].any()):
                source = _parts(smallest, name, base.alive.by_firing)
                if len(source.write):
                    larger = _parts(factors, name, fires).write
                    found = truth.feature_splitting(source.write, larger, threshold)
                    row |= {k: getattr(found, k) for k in ("unmatched", "single", "split")}
            rows.append(row)
    columns = ["site", "n_components", "alive_by_mean", "alive_by_firing", "l0", "ci_of_zero"]
    return pd.DataFrame(rows, columns=[*columns, "unmatched", "single", "split"])


@torch.no_grad()
def toy_scores(
    objective: Objective,
    probe: Float[Tensor, "n_features d_in"],
    patterns: Mapping[str, truth.Identity | truth.Dense],
    *,
    tolerances: Sequence[float] = (0.1, 0.2),
) -> pd.DataFrame:
    """A toy's importances on one input per feature against its stated pattern, per site.

    Columns: ``site, tolerance, missing, spurious, errors``; ``alive`` (components above 0.1 on any
    probe); ``mmcs, ml2r`` where the pattern is one component per input feature of that very matrix
    (NaN elsewhere, and where the matrix has a zero column).
    """
    import pandas as pd

    factors = objective.factors
    with factors.host.prepared(objective.config.speed):
        low = importances(objective, factors.host.clean(probe.to(factors.host.device)))
    rows = []
    for name, place in factors.layout.slices().items():
        if name not in patterns:
            continue
        ci, pattern, weight = low[:, place].cpu(), patterns[name], factors.weights[name]
        mmcs = ml2r = float("nan")
        columns = bool((weight.norm(dim=0) > 0).all()) and weight.shape[1] == len(probe)
        if isinstance(pattern, truth.Identity) and columns:
            shape = truth.mmcs(factors.reads[name].cpu(), factors.writes[name].cpu(), weight.cpu())
            mmcs, ml2r = shape.mmcs, shape.ml2r
        for tolerance in tolerances:
            error = truth.target_ci_error(ci, pattern, tolerance)
            rows.append(
                {
                    "site": name,
                    "tolerance": tolerance,
                    "missing": error.missing,
                    "spurious": error.spurious,
                    "errors": error.errors,
                    "alive": int((ci.max(0).values > ALIVE_ON_PROBE).sum()),
                    "mmcs": mmcs,
                    "ml2r": ml2r,
                }
            )
    columns = ["site", "tolerance", "missing", "spurious", "errors", "alive", "mmcs", "ml2r"]
    return pd.DataFrame(rows, columns=columns)


def _parts(factors: Factors, name: str, alive: Bool[Tensor, " K"]) -> truth.Parts:
    """A site's alive components, but those with a zero vector: it has no cosine."""
    read, write = factors.reads[name].detach().cpu(), factors.writes[name].detach().cpu()
    own = alive[factors.layout.slices()[name]].cpu()
    return truth.Parts(read, write).only(own & (read.norm(dim=1) > 0) & (write.norm(dim=1) > 0))


def _all(first: Factors, second: Factors) -> tuple[Tensor, Tensor]:
    one, other = (torch.ones(f.layout.total, dtype=torch.bool) for f in (first, second))
    return one, other


def _same_target(first: Factors, second: Factors) -> None:
    names = first.layout.names, second.layout.names
    same = names[0] == names[1] and all(
        torch.equal(first.weights[n].cpu(), second.weights[n].cpu()) for n in names[0]
    )
    if not same:
        raise MismatchError(
            "decompositions to compare",
            given=f"{names[0]} and {names[1]}, with different matrices",
            expected="two decompositions of the same frozen matrices",
            remedy="Train both on one model and the same sites.",
        )
