"""Did this stage change the contrast, and did this matrix write the change? (both stages run)

Notation, per contrast and stream point: ``Δμ`` is the mean positive-minus-negative shift of a
stage, ``DiD = Δμ_after − Δμ_before`` on identical prompts.

*Stage gate*: ``max_points ‖DiD‖ / ‖Δμ_before‖``, ranked among matched control contrasts. The
denominator matters: a target is louder than its controls before training too, and an unnormalised
shift then always ranks first.

*Site statistic* of a matrix that writes the stream with difference D and whose input shifts by Δh:
``G = (D Δh · DiD) / (‖DiD‖ ‖Δμ_before‖)``, the part of the stage's change along DiD that this
matrix writes at fixed input, in units of the shift before. Ranked by max-T: the target's G at one
site against each control's largest G over every site of every stage in the sweep. ``Δh`` is the
mean of the two stages' input shifts, for which ``D Δh`` plus ``W̄ (Δh_after − Δh_before)``, with W̄
the mean matrix, is exactly the change of the written shift.

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
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import rank_p

DEAD_SHIFT = 1e-5
"""A shift below this share of the activations' norm is no shift (identical tokens, float noise)."""


@dataclass(frozen=True, eq=False)
class StageGate:
    """The stage gate of one step, for one target.

    Attributes:
        stage: the later stage of the step.
        relative_did: (n_points,) ‖DiD‖/‖Δμ_before‖ of the target; NaN where it has no shift.
        control_did: (n_controls, n_points) the same for the controls.
        statistic, p: the maximum over points and its rank among the controls' maxima.
        onset: the first point whose relative DiD exceeds every control's, or None.
    """

    stage: str
    points: tuple[Space, ...]
    relative_did: Float[Tensor, " n_points"]
    control_did: Float[Tensor, "n_controls n_points"]
    statistic: float
    p: float
    onset: Space | None

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


def relative_did(
    before: PairedActivations, after: PairedActivations, contrasts: Sequence[str], point: Space
) -> Float[Tensor, " n_contrasts"]:
    """‖DiD‖ / ‖Δμ_before‖ of each contrast at one point; NaN where there is no shift before."""
    shift_before = mean_shifts(before, contrasts, point)
    change = (mean_shifts(after, contrasts, point) - shift_before).norm(dim=-1)
    size = shift_before.norm(dim=-1)
    dead = size <= DEAD_SHIFT * mean_norm(before, point)
    return torch.where(dead, torch.nan, change / size.clamp(min=1e-30))


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
    """Rank the target's relative DiD, maximised over stream points, among the controls'."""
    names = (target, *control_names(before, target))
    points = tuple(p for p in before.points if p.is_stream)
    values = torch.stack([relative_did(before, after, names, p) for p in points], dim=1)
    peaks = torch.nan_to_num(values, nan=0.0).max(dim=1).values
    ceiling = torch.nan_to_num(values[1:], nan=0.0).max(dim=0).values
    above = torch.nonzero(torch.nan_to_num(values[0], nan=0.0) > ceiling).flatten().tolist()
    return StageGate(
        stage=stage or after.stage,
        points=points,
        relative_did=values[0],
        control_did=values[1:],
        statistic=float(peaks[0]),
        p=float(rank_p(peaks[0], peaks[1:])),
        onset=points[above[0]] if above else None,
    )


def site_statistic(
    difference: Float[Tensor, "d_out d_in"],
    site: Site,
    before: PairedActivations,
    after: PairedActivations,
    contrasts: Sequence[str],
) -> Float[Tensor, " n_contrasts"]:
    """G of one matrix for each contrast (0 where the contrast has no shift before or no change).

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
    scale = did.norm(dim=-1) * shift_before.norm(dim=-1)
    live = (shift_before.norm(dim=-1) > DEAD_SHIFT * mean_norm(before, point)) & (scale > 0)
    projected = (written.double() * did).sum(-1)
    return torch.where(live, projected / scale.clamp(min=1e-30), 0.0)


def site_p(
    observed: Float[Tensor, " n_sites"], controls: Float[Tensor, "n_controls n_sites"]
) -> Float[Tensor, " n_sites"]:
    """Max-T rank p of the target's G at each site; columns span every site of every stage."""
    largest = controls.max(dim=1).values
    return rank_p(observed, largest[:, None].expand_as(controls))
