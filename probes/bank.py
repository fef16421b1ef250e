"""A fitted probe at every stream point: scores, directions with their controls, provenance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.direction_io import save_direction
from mi_weightspace.core.errors import DirectionError
from mi_weightspace.core.report import Report
from mi_weightspace.core.space import Space

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

DIRECTION_FILE = "direction.safetensors"
_STATISTICS = (
    "n",
    "n_clusters",
    "auroc",
    "auroc_low",
    "auroc_high",
    "within_pair",
    "p",
    "p_adjusted",
    "heldout_register_auroc",
    "heldout_register_auroc_low",
    "heldout_register_auroc_high",
    "specificity",
)


class ProbeBank(Report):
    """One linear probe a stream point, for one contrast at one stage.

    Table, one row a point in forward order: ``point, layer, contrast, method, n, n_clusters`` (of
    the fit), leave-cluster-out ``auroc, within_pair`` with 95 % cluster-bootstrap bounds,
    permutation ``p`` and ``p_adjusted`` (maximum over points), ``heldout_register_*`` (the
    headline: registers that took no part in the fit) and ``heldout_item_*``, ``specificity`` (mean
    ``|AUROC − 0.5|`` of the probe on the controls, 0 is specific) and ``specificity_max``,
    ``recall_at_1_fpr`` (recall of positives at 1 % false positives on the controls' prompts),
    ``separation`` (leave-cluster-out class gap over within-class sd) and ``heldout_separation``,
    ``chosen``. A point where both sides carry the same vector has no probe and empty scores.
    Tables: ``controls`` (the probe's score on each control) and ``choice`` (the point picked on
    inner folds with its score on outer folds).
    Arrays, one row for each point of ``config["points"]``: ``pattern, filter, scale, bias,
    filter_norm, mean, variance, pcs, control_patterns, control_filters``.
    """

    kind: ClassVar[str] = "probe"

    # ---- directions ------------------------------------------------------------------------
    @property
    def points(self) -> tuple[Space, ...]:
        """The points that have a probe."""
        return tuple(Space.parse(name) for name in self.config["points"])

    @property
    def best_point(self) -> Space:
        """Picked by leave-cluster-out score; its unbiased score is in the table ``choice``."""
        return Space.parse(self.config["best_point"])

    @property
    def best_layer(self) -> int:
        return int(self.best_point.layer or 0)

    def direction(self, *, point: Space | str | None = None, layer: int | None = None) -> Direction:
        """The direction at a point; at a layer ``resid_post`` is meant; default `best_point`.

        Raises:
            DirectionError: both given, or no probe there.
        """
        if point is not None and layer is not None:
            raise DirectionError(
                "probe bank",
                given=f"point={point} and layer={layer}",
                expected="one of the two",
                remedy="A point names its layer already.",
            )
        if layer is not None:
            point = Space("resid_post", layer)
        space = self.best_point if point is None else Space.parse(point).canonical
        return self._direction(self._index(space))

    def directions(self) -> list[Direction]:
        """One direction for every point with a probe, in forward order."""
        return [self._direction(i) for i in range(len(self.points))]

    def _index(self, space: Space) -> int:
        if space not in self.points:
            raise DirectionError(
                f"probe bank of {self.config['target']!r}",
                given=f"the point {space}",
                expected=f"one of {[str(p) for p in self.points][:12]}",
                remedy="Points where both sides carry the same vector have no direction.",
            )
        return self.points.index(space)

    def _direction(self, i: int) -> Direction:
        space = self.points[i]
        row = self.table[self.table["point"] == space.name].iloc[0]
        fit: dict[str, Any] = {name: row[name].item() for name in _STATISTICS}
        fit["bias"] = float(self.arrays["bias"][i] / self.arrays["filter_norm"][i])
        names = tuple(self.config["controls"])
        optional = ("control_patterns", "control_filters")
        return Direction(
            pattern=self.arrays["pattern"][i],
            space=space,
            label=self.config["target"],
            filter=self.arrays["filter"][i],
            scale=float(self.arrays["scale"][i]),
            stage=self.config["stage"],
            model_hash=self.inputs["model"],
            prompts_hash=self.inputs["prompts"],
            position=self.config["position"],
            method=self.config["method"],
            convention=self.config["convention"],
            fit=fit,
            mean=self.arrays["mean"][i],
            variance=self.arrays["variance"][i],
            pcs=self.arrays["pcs"][i],
            control_names=names,
            **{k: self.arrays[k][i] for k in optional if names},
        )

    def scores(
        self, values: Float[Tensor, "*batch d"], *, point: Space | str | None = None
    ) -> Float[Tensor, "*batch"]:
        """Probe score of activations at a point (default `best_point`).

        The training class means score +1 and -1 (log-odds for ``lr``).
        """
        i = self._index(self.best_point if point is None else Space.parse(point).canonical)
        raw = values.double() @ self.arrays["filter"][i].double()
        return raw * self.arrays["filter_norm"][i] + self.arrays["bias"][i]

    # ---- files and figures -----------------------------------------------------------------
    def save_directions(self, path: str | Path) -> Path:
        """Write every direction to one safetensors file; see `core.direction_io`."""
        return save_direction(self.directions(), path)

    def _write(self, folder: Path) -> None:
        if "pattern" in self.arrays:
            self.save_directions(folder / DIRECTION_FILE)
        super()._write(folder)

    def plot(self) -> go.Figure:
        """Leave-cluster-out and held-out-register AUROC by point, with intervals."""
        from mi_weightspace.core.figures import Line, profile

        table: pd.DataFrame = self.table.dropna(subset=["auroc"])
        names = list(table["point"])
        x = list(range(len(names)))
        hollow = ~(table["p_adjusted"] <= 0.05)
        lines = [
            Line(
                "leave-cluster-out",
                x,
                table["auroc"],
                table["auroc_low"],
                table["auroc_high"],
                hollow=hollow,
            )
        ]
        if bool(table["heldout_register_auroc"].notna().any()):
            low, high = (table[f"heldout_register_auroc_{side}"] for side in ("low", "high"))
            lines.append(Line("held-out register", x, table["heldout_register_auroc"], low, high))
        return profile(
            lines,
            title=f"Probe of {self.config['target']}: {self.config['method']}, "
            f"{int(table['n_clusters'].iloc[0])} clusters; hollow points are not significant",
            name="AUROC",
            unit="ratio",
            x_title=("stream point", "in forward order"),
            x_labels=names,
            reference=("chance", 0.5),
        )


def unit_rows(rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Float32 unit rows; a zero row stays zero."""
    norms = rows.double().norm(dim=-1, keepdim=True)
    return (rows / torch.where(norms > 0, norms, 1.0)).float()


def principal_rows(rows: Sequence[Float[Tensor, "m d"]], k: int) -> Float[Tensor, "points k d"]:
    """Top principal directions at each point, unit rows, as many as every point has."""
    found = []
    for value in rows:
        wide = value.double() - value.double().mean(0)
        energy, vectors = torch.linalg.eigh(wide @ wide.T)
        energy, vectors = energy.flip(0), vectors.flip(1)
        rank = int((energy > 1e-10 * energy[0].clamp(min=1e-300)).sum())
        top = min(k, rank, value.shape[1])
        found.append((vectors[:, :top] / energy[:top].sqrt()).T @ wide)
    least = min(len(f) for f in found)
    return torch.stack([f[:least] for f in found]).float()
