"""What every activation statistic asks first: which activations, which contrasts, which points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.shifts import check_same_prompts
from mi_weightspace.core.space import Space
from mi_weightspace.models.lineage import Lineage

DEFAULT_POSITION = "last"


@dataclass(frozen=True)
class Roles:
    """Contrast names by what they are for; `others` are nulls, shown but never judged."""

    targets: tuple[str, ...]
    controls: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def every(self) -> tuple[str, ...]:
        return self.targets + self.others + self.controls


def roles(contrasts: ContrastSet, target: str | None) -> Roles:
    """All targets of the set, or the one contrast named (which then is nobody's control).

    Raises:
        PromptError: no target, or a name the set does not hold.
    """
    targets = tuple(c.name for c in contrasts.targets)
    if target is not None:
        targets = (contrasts[target].name,)
    if not targets:
        raise PromptError(
            f"contrast set {contrasts.name!r}",
            given="no contrast of kind 'target'",
            expected="at least one",
            remedy="Mark a contrast as target, or pass target=NAME.",
        )
    controls = tuple(c.name for c in contrasts.controls if c.name not in targets)
    others = tuple(c.name for c in contrasts.of_kind("null") if c.name not in targets)
    return Roles(targets, controls, others)


def one_target(contrasts: ContrastSet, target: str | None) -> Roles:
    """`roles` where exactly one target is asked about.

    Raises:
        PromptError: several targets and no name.
    """
    found = roles(contrasts, target)
    if len(found.targets) > 1:
        raise PromptError(
            f"contrast set {contrasts.name!r}",
            given=f"{len(found.targets)} targets: {list(found.targets)[:12]}",
            expected="one target",
            remedy="Pass target=NAME; fit one bank for each.",
        )
    return found


def obtain(
    model: Any,
    contrasts: ContrastSet | None,
    *,
    points: Sequence[Space | str] | None,
    position: str | None,
    progress: bool,
) -> PairedActivations:
    """Activations as given, or harvested from anything `mi_weightspace.load` takes.

    Raises:
        PromptError: a model without prompts; other prompts or another position than the
            activations were taken with.
    """
    if isinstance(model, PairedActivations):
        check_given(model, contrasts, position)
        return model
    if contrasts is None:
        raise PromptError(
            "contrasts",
            given="none, with a model",
            expected="a ContrastSet to run the model on",
            remedy="Pass contrasts=...; only activations already harvested carry their own.",
        )
    from mi_weightspace.models.harvest import harvest
    from mi_weightspace.models.load import load

    return harvest(
        load(model),
        contrasts,
        points=points,
        position=position or DEFAULT_POSITION,
        progress=progress,
    )


def obtain_stages(
    stages: Mapping[str, PairedActivations] | Lineage,
    contrasts: ContrastSet | None,
    *,
    points: Sequence[Space | str] | None,
    position: str | None,
    progress: bool,
) -> dict[str, PairedActivations]:
    """Activations of every stage on identical prompts; one stage of a lineage in memory at a time.

    Raises:
        PromptError: no stage, a lineage without prompts, or stages that ran different prompts.
    """
    if isinstance(stages, Lineage):
        if contrasts is None:
            raise PromptError(
                "contrasts",
                given="none, with a lineage",
                expected="a ContrastSet to run every stage on",
                remedy="Pass contrasts=....",
            )
        from mi_weightspace.models.harvest import harvest

        found = {}
        for stage in stages.stages:
            with stages.opened(stage) as lens:
                found[stage] = harvest(
                    lens,
                    contrasts,
                    points=points,
                    position=position or DEFAULT_POSITION,
                    stage=stage,
                    progress=progress,
                )
        return found
    if not stages:
        raise PromptError(
            "stages",
            given="none",
            expected="at least one stage's activations, in training order",
            remedy="Pass {'base': activations, ...} or a Lineage.",
        )
    first = next(iter(stages.values()))
    for activations in stages.values():
        check_given(activations, contrasts, position)
        check_same_prompts(first, activations)
    return dict(stages)


def check_given(
    activations: PairedActivations, contrasts: ContrastSet | None, position: str | None
) -> None:
    own = activations.contrasts
    if contrasts is not None and contrasts.hash != own.hash:
        raise PromptError(
            "contrasts",
            given=f"prompts {contrasts.hash} beside activations of {own.hash}",
            expected="the prompts the activations were taken on",
            remedy="Leave contrasts out, or harvest again.",
        )
    if position is not None and position != activations.position:
        raise PromptError(
            "position",
            given=f"{position!r} beside activations pooled by {activations.position!r}",
            expected="the position the activations were taken at",
            remedy="Leave position out, or harvest again.",
        )


def pick_points(
    activations: PairedActivations, points: Sequence[Space | str] | None
) -> tuple[Space, ...]:
    """The points asked for, by default every captured stream point; all of one width.

    Raises:
        PromptError: a point that was not captured, none, or points of different widths.
    """
    held = {p.canonical: p for p in activations.points}
    wanted = [p for p in held if p.is_stream] if points is None else []
    for point in points or ():
        space = Space.parse(point).canonical
        if space not in held:
            raise PromptError(
                f"point {space}",
                given="activations that do not hold it",
                expected=f"one of {[str(p) for p in held][:12]}",
                remedy="Harvest with points=[...].",
            )
        wanted.append(space)
    name = activations.contrasts.contrasts[0].name
    widths = {activations.at(name, p).shape[-1] for p in wanted}
    if len(widths) != 1:
        raise PromptError(
            "points",
            given=f"points of widths {sorted(widths)}" if widths else "no stream point",
            expected="points of one width",
            remedy="Ask for stream points and other points separately.",
        )
    return tuple(wanted)


def stack(
    activations: PairedActivations,
    contrast: str,
    points: Sequence[Space],
    pairs: Sequence[int] | None = None,
) -> Float[Tensor, "points n 2 d"]:
    """Activations of one contrast at all points, optionally of some of its pairs."""
    values = torch.stack([activations.at(contrast, p) for p in points])
    return values if pairs is None else values[:, list(pairs)]
