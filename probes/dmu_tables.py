"""From the shifts of a sweep to its tables and verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import holm
from mi_weightspace.core.verdict import Verdict, Word
from probes.gather import Roles
from probes.shift_stats import Change, Shift, interval

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05
MIN_CLUSTERS = 5
"""Below this no sign-flip p can reach 0.05 (2⁻⁵ = 0.031)."""
PEAK_SET = 0.90
_FLOOR = 1e-3
"""Bootstrap draws of a length below this share of the observed one count as this share."""


@dataclass(frozen=True, eq=False)
class Peak:
    """Largest point of one profile.

    Attributes:
        size, draws: its value and bootstrap draws of the maximum.
        index: the observed argmax; `likely`: the smallest set with 90 % of the bootstrap's.
        level, level_draws: root mean square over points, which no argmax selects.
    """

    size: float
    draws: Float[Tensor, " b"]
    index: int
    likely: tuple[int, ...]
    level: float
    level_draws: Float[Tensor, " b"]


@dataclass(eq=False)
class Sweep:
    """Shifts as they come in; per-point draws are reduced at once to keep memory flat."""

    stages: tuple[str, ...]
    who: Roles
    points: tuple[Space, ...]
    denominators: tuple[str, ...]
    contrasts: ContrastSet
    rows: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    peaks: dict[tuple[str, str, str], Peak] = field(default_factory=dict)
    global_p: dict[tuple[str, str], float] = field(default_factory=dict)
    n_clusters: dict[str, int] = field(default_factory=dict)

    def _head(self, contrast: str) -> dict[str, Any]:
        return {
            "contrast": contrast,
            "kind": "target" if contrast in self.who.targets else self.contrasts[contrast].kind,
            "is_control": contrast in self.who.controls,
        }

    def add(self, stage: str, contrast: str, shift: Shift) -> None:
        low, high = interval(shift.draws["rel_norm"])
        columns = {
            "delta_norm": shift.raw,
            "rel_delta": shift.value["rel_norm"],
            "ci_low": low,
            "ci_high": high,
            "p": shift.p,
            "p_adjusted": shift.p_adjusted,
            "raw_debiased": shift.raw_debiased,
            "snr": shift.snr,
            "rogue_share": shift.rogue,
        } | {name: shift.value[name] for name in self.denominators if name != "rel_norm"}
        for i, point in enumerate(self.points):
            row = {"stage": stage} | self._head(contrast)
            row |= {"layer": point.layer, "point": point.name}
            row |= {"n": shift.n, "n_clusters": shift.n_clusters}
            self.rows.append(row | {k: float(v[i]) for k, v in columns.items()})
        self.global_p[stage, contrast] = float(shift.p_adjusted.min())
        self.n_clusters[contrast] = shift.n_clusters
        for name in self.denominators:
            self.peaks[stage, contrast, name] = _peak(shift.value[name], shift.draws[name])

    def add_change(self, before: str, stage: str, contrast: str, change: Change) -> None:
        significant = change.p_adjusted <= ALPHA
        onset = int(significant.double().argmax()) if bool(significant.any()) else -1
        columns = {
            "did_norm": change.norm,
            "ci_low": change.low,
            "ci_high": change.high,
            "rel_did": change.relative,
            "p": change.p,
            "p_adjusted": change.p_adjusted,
        }
        n = len(self.contrasts[contrast])
        for i, point in enumerate(self.points):
            row = {"stage": stage, "previous": before} | self._head(contrast)
            row |= {"layer": point.layer, "point": point.name, "n": n, "onset": i == onset}
            self.changes.append(row | {k: float(v[i]) for k, v in columns.items()})


def _peak(value: Float[Tensor, " points"], draws: Float[Tensor, "b points"]) -> Peak:
    index = int(value.argmax())
    counts = torch.bincount(draws.argmax(1), minlength=len(value))
    order = counts.argsort(descending=True, stable=True)
    covered = counts[order].cumsum(0).double() / len(draws)
    likely = order[: int((covered < PEAK_SET).sum()) + 1]
    level = float(value.square().mean().sqrt())
    return Peak(
        float(value[index]),
        draws.max(1).values.clamp(min=_FLOOR * float(value[index])),
        index,
        tuple(sorted(likely.tolist())),
        level,
        draws.square().mean(1).sqrt().clamp(min=_FLOOR * level),
    )


def _log(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).clamp(min=1e-300).log()


def _around(observed: float, draws: Float[Tensor, " b"]) -> tuple[float, float]:
    """Percentile interval with the draws' median moved to the observed value.

    A maximum or a norm of resampled data lies above the data's own.
    """
    low, high = interval(draws - draws.median() + observed)
    return float(low), float(high)


# ---- tables --------------------------------------------------------------------------------
def tables(sweep: Sweep) -> dict[str, pd.DataFrame]:
    """``sweep, ordering, growth, did, peaks``."""
    import pandas as pd

    return {
        "sweep": _above_controls(pd.DataFrame(sweep.rows), "rel_delta"),
        "ordering": _ordering(sweep),
        "growth": _growth(sweep),
        "did": _did(sweep),
        "peaks": _peak_table(sweep),
    }


def _above_controls(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Whether a row exceeds every control (other than itself) of its stage and point."""
    import pandas as pd

    result = pd.Series(pd.NA, index=frame.index, dtype="boolean")
    for _, own in frame.groupby(["stage", "point"], sort=False):
        value = own[column].to_numpy(dtype=float)
        control = own["is_control"].to_numpy(dtype=bool)
        if not control.any():
            continue
        ranked = np.sort(np.where(control, np.nan_to_num(value, nan=-np.inf), -np.inf))
        top = np.full(len(own), ranked[-1])
        runner_up = ranked[-2] if len(ranked) > 1 else -np.inf
        top[control & (value == ranked[-1])] = runner_up
        if control.sum() == 1:  # the only control has no other to be compared with
            rows = own.index[~control]
            result.loc[rows] = value[~control] > top[~control]
            continue
        result.loc[own.index] = value > top
    return frame.assign(above_controls=result)


def _ordering(sweep: Sweep) -> pd.DataFrame:
    """``log(target peak) − log(largest control peak)`` with a joint bootstrap interval."""
    import pandas as pd

    rows = []
    for stage in sweep.stages:
        p = torch.tensor([sweep.global_p[stage, t] for t in sweep.who.targets])
        adjusted = dict(zip(sweep.who.targets, holm(p.double()).tolist(), strict=True))
        for name in sweep.denominators:
            rivals = {c: sweep.peaks[stage, c, name] for c in sweep.who.controls}
            for target in sweep.who.targets:
                own = sweep.peaks[stage, target, name]
                row = {"stage": stage, "contrast": target, "denominator": name}
                row |= {"peak_point": sweep.points[own.index].name, "peak": own.size}
                row |= _margin(own, rivals)
                row |= {"p_global": sweep.global_p[stage, target], "p_holm": adjusted[target]}
                rows.append(row)
    return pd.DataFrame(rows)


def _margin(own: Peak, rivals: Mapping[str, Peak]) -> dict[str, Any]:
    if not rivals:
        nothing = dict.fromkeys(("control_peak", "margin", "ci_low", "ci_high"), float("nan"))
        return {"control": "", **nothing, "result": "UNRESOLVED"}
    strongest = max(rivals, key=lambda c: rivals[c].size)
    ceiling = torch.stack([r.draws for r in rivals.values()]).max(0).values
    margin = float(_log(own.size) - _log(rivals[strongest].size))
    low, high = _around(margin, _log(own.draws) - _log(ceiling))
    result = "PASS" if low > 0 else "FAIL" if high < 0 else "UNRESOLVED"
    return {
        "control": strongest,
        "control_peak": rivals[strongest].size,
        "margin": margin,
        "ci_low": low,
        "ci_high": high,
        "result": result,
    }


def _growth(sweep: Sweep) -> pd.DataFrame:
    """Log growth of the target since the first stage beyond that of the controls' RMS."""
    import pandas as pd

    def controls(stage: str, name: str) -> tuple[float, Tensor]:
        peaks = [sweep.peaks[stage, c, name] for c in sweep.who.controls]
        square = torch.stack([p.level_draws for p in peaks]).square().mean(0)
        return float(np.mean([p.level**2 for p in peaks]) ** 0.5), square.sqrt()

    columns = ["stage", "since", "contrast", "denominator", "growth", "control_growth", "excess"]
    rows, base = [], sweep.stages[0]
    for stage in sweep.stages[1:] if sweep.who.controls else ():
        for name in sweep.denominators:
            (then, then_draws), (now, now_draws) = controls(base, name), controls(stage, name)
            for target in sweep.who.targets:
                old, new = sweep.peaks[base, target, name], sweep.peaks[stage, target, name]
                own = float(_log(new.level) - _log(old.level))
                theirs = float(_log(now) - _log(then))
                draws = _log(new.level_draws) - _log(old.level_draws)
                draws = draws - _log(now_draws) + _log(then_draws)
                low, high = _around(own - theirs, draws)
                values = [stage, base, target, name, own, theirs, own - theirs]
                rows.append(
                    dict(zip(columns, values, strict=True)) | {"ci_low": low, "ci_high": high}
                )
    return pd.DataFrame(rows, columns=[*columns, "ci_low", "ci_high"])


def _did(sweep: Sweep) -> pd.DataFrame:
    import pandas as pd

    if sweep.changes:
        return _above_controls(pd.DataFrame(sweep.changes), "rel_did")
    columns = ["stage", "previous", "contrast", "kind", "is_control", "layer", "point", "n"]
    more = ["onset", "did_norm", "ci_low", "ci_high", "rel_did", "p", "p_adjusted"]
    return pd.DataFrame(columns=[*columns, *more, "above_controls"])


# ---- peaks ---------------------------------------------------------------------------------
def _peak_table(sweep: Sweep) -> pd.DataFrame:
    import pandas as pd

    n_layers = 1 + max(p.layer or 0 for p in sweep.points)
    rows = []
    for i, stage in enumerate(sweep.stages):
        for contrast in sweep.who.every:
            before = sweep.stages[i - 1] if i else None
            moved = relocated(sweep, before, stage, contrast) if before else None
            for name in sweep.denominators:
                peak = sweep.peaks[stage, contrast, name]
                point = sweep.points[peak.index]
                depth = 0.0 if point.point == "resid_pre" else ((point.layer or 0) + 1) / n_layers
                step = float("nan")
                if before is not None:
                    step = float(peak.index - sweep.peaks[before, contrast, name].index)
                row = {"stage": stage} | sweep._head(contrast) | {"denominator": name}
                row |= {"peak_point": point.name, "peak_layer": point.layer, "depth": depth}
                row |= {"likely_points": ", ".join(sweep.points[j].name for j in peak.likely)}
                rows.append(row | {"moved_points": step, "relocated": moved})
    frame = pd.DataFrame(rows)
    frame["relocated"] = frame["relocated"].astype("boolean")
    return frame


def relocated(sweep: Sweep, before: str, stage: str, contrast: str) -> bool:
    """Bootstrap sets disjoint under two denominators, and few controls' peaks moved the same way.

    Few: the contrast's rank among the controls by signed movement is at most 5 %, or the first
    place where there are fewer than 19 of them.
    """
    disjoint = 0
    for name in sweep.denominators:
        old, new = sweep.peaks[before, contrast, name], sweep.peaks[stage, contrast, name]
        step = new.index - old.index
        if step == 0 or set(old.likely) & set(new.likely):
            continue
        others = [c for c in sweep.who.controls if c != contrast]
        steps = [
            sweep.peaks[stage, c, name].index - sweep.peaks[before, c, name].index for c in others
        ]
        alike = sum(s * np.sign(step) >= abs(step) for s in steps)
        disjoint += bool((1 + alike) / (1 + len(others)) <= max(ALPHA, 1 / (1 + len(others))))
    return disjoint >= 2


# ---- verdicts ------------------------------------------------------------------------------
def verdicts(sweep: Sweep, ordering: pd.DataFrame) -> tuple[Verdict, ...]:
    """One for each stage and target, under ``rel_norm``; other denominators may add a doubt."""
    found = []
    for key, rows in ordering.groupby(["stage", "contrast"], sort=False):
        stage, target = key  # pyright: ignore[reportGeneralTypeIssues]
        row = rows[rows["denominator"] == "rel_norm"].iloc[0]
        evidence = {
            "peak": float(row["peak"]),
            "peak_point": str(row["peak_point"]),
            "p_holm": float(row["p_holm"]),
            "margin": float(row["margin"]),
            "n_clusters": sweep.n_clusters[str(target)],
            "n_controls": len(sweep.who.controls),
        }
        if evidence["n_clusters"] < MIN_CLUSTERS:
            word = Word.UNDERPOWERED
        elif not row["p_holm"] <= ALPHA:
            word = Word.NOT_SIGNIFICANT
        elif not sweep.who.controls:
            word = Word.ALIGNED_NO_CONTROLS
        else:
            word = _ORDER_WORDS[str(row["result"])]
        others = rows.loc[rows["result"] != row["result"], "denominator"]
        doubts = ()
        if word in {Word.AXIS_SPECIFIC, Word.NOT_AXIS_SPECIFIC} and len(others):
            doubts = (f"Does not hold under the denominator {', '.join(others)}.",)
        found.append(Verdict(word, f"{stage} / {target}", evidence, doubts))
    return tuple(found)


_ORDER_WORDS = {
    "PASS": Word.AXIS_SPECIFIC,
    "FAIL": Word.NOT_AXIS_SPECIFIC,
    "UNRESOLVED": Word.UNDERPOWERED,
}
