"""Every target by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from experiments.vpd_targets import bilinear, control, induction, resid_mlp, tms
from experiments.vpd_targets.common import Target

MODULES: tuple[Any, ...] = (tms, resid_mlp, induction, bilinear, control)
TARGETS: dict[str, Any] = {name: module for module in MODULES for name in module.PRESETS}


def make_target(name: str, preset: Literal["toy", "paper"], seed: int) -> Target:
    """Train or build one target.

    Raises:
        KeyError: no such target.
    """
    build: Callable[..., Target] = TARGETS[name].target
    return build(TARGETS[name].PRESETS[name][preset], seed)
