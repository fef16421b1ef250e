"""Did this stage change the contrast, and did this matrix write the change? (both stages run)

Notation, per contrast and stream point: ``Δμ`` is the mean positive-minus-negative shift of a
stage, ``DiD = Δμ_after − Δμ_before`` on identical prompts.

*Stage gate*: the change ``max_points ‖DiD‖`` and the relative change
``max_points ‖DiD‖/‖Δμ_before‖`` are each ranked among matched control contrasts, and the larger p
counts. Either alone can be had for nothing: a target that was louder than its controls before
training changes more in absolute terms, one that was quieter changes more relative to its size.
Only a change that stands out both ways is the stage's.

*Site statistic* of a matrix that writes the stream with difference D and whose input shifts by Δh:
``G = (D Δh · DiD) / (‖DiD‖ ‖Δμ_before‖)``, the part of the stage's change along DiD that this
matrix writes at fixed input, in units of the shift before. Ranked by max-T: the target's G at one
site against each control's largest G over every site of every stage in the sweep; and, for the
same reason, the same without the denominator ``‖Δμ_before‖``: the larger p counts. ``Δh`` is the
mean of the two stages' input shifts, for which ``D Δh`` plus ``W̄ (Δh_after − Δh_before)``, with W̄
the mean matrix, is exactly the change of the written shift.

A matrix may stand out against the controls and yet write little of the change: G over the stage's
relative DiD says how much (`judge.WRITTEN_SHARE`).

Both are ranks under exchangeability of the target with its controls: they need controls generated
like the target, and say nothing of a matrix that only passes the change on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.shifts import DEAD_SHIFT, check_same_prompts
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import rank_p


@dataclass(frozen=True, eq=False)
class StageGate:
    """The stage gate of one step, for one target.

    Attributes:
        stage: the later stage of the step.
        relative_did: (n_points,) ‖DiD‖/‖Δμ_before‖ of the target; NaN where it has no shift.
        control_did: (n_controls, n_points) the same for the controls.
        statistic: the largest relative DiD over points.
        p_relative, p_absolute: ranks among the controls of that, and of the largest ‖DiD‖.
        p: the larger of the two.
        onset: the first point whose relative DiD exceeds every control's, or None.
    """

    stage: str
    points: tuple[Space, ...]
    relative_did: Float[Tensor, " n_points"]
    control_did: Float[Tensor, "n_controls n_points"]
    statistic: float
    p_relative: float
    p_absolute: float
    onset: Space | None

    @property
    def p(self) -> float:
        return max(self.p_relative, self.p_absolute)

    @property
    def n_controls(self) -> int:
        return int(self.control_did.shape[0])


def mean_shifts(
    activations: PairedActivations, contrasts: Sequence[str], point: Space
) -> Float[Tensor, "n_contrasts d"]:
    """Δμ of each contrast at one point, float64."""
    return torch.stack(
        [activations.differences(name, point).double().mean(0) for name in contrasts]
    )


def mean_norm(activations: PairedActivations, point: Space) -> float:
    first = activations.contrasts.contrasts[0].name
    return float(activations.at(first, point).double().norm(dim=-1).mean())


def change_sizes(
    before: PairedActivations, after: PairedActivations, contrasts: Sequence[str], point: Space
) -> tuple[Float[Tensor, " n_contrasts"], Float[Tensor, " n_contrasts"]]:
    """‖DiD‖ and ‖DiD‖ / ‖Δμ_before‖ of each contrast at one point; NaN where there was no shift."""
    shift_before = mean_shifts(before, contrasts, point)
    change = (mean_shifts(after, contrasts, point) - shift_before).norm(dim=-1)
    size = shift_before.norm(dim=-1)
    dead = size <= DEAD_SHIFT * mean_norm(before, point)
    return change, torch.where(dead, torch.nan, change / size.clamp(min=1e-30))


def control_names(activations: PairedActivations, target: str) -> tuple[str, ...]:
    """The contrasts a target is ranked among: every control of its set but itself.

    Other targets are left out: the registers of one behaviour move together, so ranking one among
    the others would hide all of them.

    Raises:
        PromptError: when the set holds no control.
    """
    names = tuple(c.name for c in activations.contrasts.controls if c.name != target)
    if not names:
        raise PromptError(
            f"contrast set {activations.contrasts.name!r}",
            given="no control contrast",
            expected="matched controls: at least 19 for a rank p of 0.05, 39 shipped",
            remedy="Add controls generated with the target's n, template and wordings.",
        )
    return names


def stage_gate(
    before: PairedActivations, after: PairedActivations, target: str, *, stage: str = ""
) -> StageGate:
    """Rank the target's DiD and relative DiD, maximised over stream points, among the controls'.

    Raises:
        PromptError: no control, or stages harvested on different prompts or positions.
    """
    check_same_prompts(before, after)
    names = (target, *control_names(before, target))
    points = tuple(p for p in before.points if p.is_stream)
    sizes = [change_sizes(before, after, names, p) for p in points]
    change, relative = (torch.stack(columns, dim=1) for columns in zip(*sizes, strict=True))
    filled = torch.nan_to_num(relative, nan=0.0)
    peaks, largest = filled.max(dim=1).values, change.max(dim=1).values
    above = torch.nonzero(filled[0] > filled[1:].max(dim=0).values).flatten().tolist()
    return StageGate(
        stage=stage or after.stage,
        points=points,
        relative_did=relative[0],
        control_did=relative[1:],
        statistic=float(peaks[0]),
        p_relative=float(rank_p(peaks[0], peaks[1:])),
        p_absolute=float(rank_p(largest[0], largest[1:])),
        onset=points[above[0]] if above else None,
    )


def site_statistic(
    difference: Float[Tensor, "d_out d_in"],
    site: Site,
    before: PairedActivations,
    after: PairedActivations,
    contrasts: Sequence[str],
) -> tuple[Float[Tensor, " n_contrasts"], Float[Tensor, " n_contrasts"]]:
    """G of one matrix for each contrast, and G ‖Δμ_before‖.

    Both are 0 where the contrast has no shift before or no change.

    Args:
        difference: D, with a post-norm's gain already multiplied into its rows.
    """
    order = [c.name for c in before.contrasts]
    rows = torch.tensor([order.index(name) for name in contrasts])
    input_shift = (before.site_shift[site.name] + after.site_shift[site.name])[rows] / 2
    written = input_shift.to(difference.dtype) @ difference.T
    point = site.writes
    shift_before = mean_shifts(before, contrasts, point)
    did = mean_shifts(after, contrasts, point) - shift_before
    size, change = shift_before.norm(dim=-1), did.norm(dim=-1)
    live = (size > DEAD_SHIFT * mean_norm(before, point)) & (change > 0)
    projected = (written.double() * did).sum(-1) / change.clamp(min=1e-30)
    projected = torch.where(live, projected, 0.0)
    return projected / torch.where(live, size, 1.0), projected


def site_p(
    observed: Float[Tensor, " n_sites"], controls: Float[Tensor, "n_controls n_sites"]
) -> Float[Tensor, " n_sites"]:
    """Max-T rank p of the target's G at each site; columns span every site of every stage."""
    largest = controls.max(dim=1).values
    return rank_p(observed, largest[:, None].expand_as(controls))
