"""A direction of activation space: a pattern, where fitted a filter, and where it came from.

*Pattern* and *filter* differ (Haufe et al. 2014): the pattern says how the activations move when
the behaviour is present and is what geometry uses (cosines, steering, ablation); the filter is the
score's weight vector (for the LDA detector ``Σ⁻¹ Δμ``) and is what `R_lda` uses. A logistic
regression weight vector is never compared with a singular vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import DirectionError
from mi_weightspace.core.space import Space

RAW_CONVENTION = "raw"


@dataclass(frozen=True, eq=False)
class Direction:
    """One unit vector in a `Space`, positive towards label 1.

    Attributes:
        pattern: (d,) unit vector, raw residual units (no norm folded, nothing centred).
        space: where it lives.
        label: the behaviour's name, e.g. ``authority``.
        filter: (d,) unit vector of the LDA detector, or None.
        scale: norm of the class-mean shift before normalisation (raw residual units).
        stage: the stage whose activations gave it; ``model_hash`` its weights.
        prompts_hash, position, method, convention: provenance. `convention` is ``raw`` for
            unprocessed weights; anything else is refused against raw checkpoints.
        fit: fit statistics (``auroc``, ``auroc_low``, ``auroc_high``, ``n_clusters``, …).
        mean, variance: (d,) moments of the activations in this space (all classes pooled).
        pcs: (k, d) top principal directions of those activations, unit rows.
        control_patterns, control_filters: (n_controls, d) unit rows, the same quantities for each
            matched control contrast; `control_names` their names.
    """

    pattern: Float[Tensor, " d"]
    space: Space
    label: str = "direction"
    filter: Float[Tensor, " d"] | None = None
    scale: float = 1.0
    stage: str = ""
    model_hash: str = ""
    prompts_hash: str = ""
    position: str = ""
    method: str = "given"
    convention: str = RAW_CONVENTION
    fit: Mapping[str, float | int | str] = field(default_factory=dict)
    mean: Float[Tensor, " d"] | None = None
    variance: Float[Tensor, " d"] | None = None
    pcs: Float[Tensor, "k d"] | None = None
    control_patterns: Float[Tensor, "n_controls d"] | None = None
    control_filters: Float[Tensor, "n_controls d"] | None = None
    control_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", unit(self.pattern, f"direction {self.label!r}"))
        if self.filter is not None:
            filter_ = unit(self.filter, f"filter of direction {self.label!r}")
            object.__setattr__(self, "filter", filter_)
            if filter_.shape != self.pattern.shape:
                raise DirectionError(
                    f"direction {self.label!r}",
                    given=f"filter of width {filter_.shape[0]}",
                    expected=f"the pattern's width {self.width}",
                    remedy="Fit both on the same activations.",
                )
        for name in ("control_patterns", "control_filters", "pcs", "mean", "variance"):
            value = getattr(self, name)
            if value is not None:
                self._check_part(name, value)
        if not math.isfinite(self.scale):
            raise DirectionError(
                f"direction {self.label!r}, scale",
                given=str(self.scale),
                expected="a finite number",
                remedy="Check the fit: the activations may overflow.",
            )

    def _check_part(self, name: str, value: Tensor) -> None:
        """Moments, principal directions and controls: of the pattern's width, and finite."""
        n_axes = 1 if name in ("mean", "variance") else 2
        fits = value.ndim == n_axes and value.shape[-1] == self.width
        if not fits or not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise DirectionError(
                f"direction {self.label!r}, {name}",
                given="values that are not finite"
                if fits and value.is_floating_point()
                else f"shape {tuple(value.shape)}, {value.dtype}",
                expected=f"finite numbers, {n_axes}-D, of the pattern's width {self.width}",
                remedy="Fit the direction again on finite activations.",
            )

    @property
    def width(self) -> int:
        return int(self.pattern.shape[0])

    @property
    def name(self) -> str:
        return f"{self.label}@{self.space}"

    @property
    def n_controls(self) -> int:
        return 0 if self.control_patterns is None else int(self.control_patterns.shape[0])

    def __neg__(self) -> Direction:
        return replace(
            self, pattern=-self.pattern, filter=None if self.filter is None else -self.filter
        )

    def __repr__(self) -> str:
        return (
            f"Direction({self.name}, d={self.width}, method={self.method}, stage={self.stage!r}, "
            f"n_controls={self.n_controls})"
        )


def unit(vector: Tensor, subject: str) -> Float[Tensor, " d"]:
    """`vector` as a float32 unit vector.

    Raises:
        DirectionError: not 1-D, zero, or not finite.
    """
    flat = vector.detach().to(torch.float32)
    if flat.ndim != 1:
        raise DirectionError(
            subject,
            given=f"a tensor of shape {tuple(vector.shape)}",
            expected="one 1-D vector",
            remedy="Pick one row, or pass several directions as a list.",
        )
    norm = float(flat.to(torch.float64).norm())
    if not torch.isfinite(flat).all() or norm == 0.0:
        raise DirectionError(
            subject,
            given="a zero vector" if norm == 0.0 else "non-finite entries",
            expected="a finite, non-zero vector",
            remedy="Check the fit: the classes may coincide or the activations overflow.",
        )
    return flat / norm
