"""Directions on disk (``direction.safetensors``) and as plain functions for other libraries.

Keys: ``pattern`` (geometry) and, where fitted, ``filter`` (scoring), each ``(d,)`` for one
direction or ``(n, d)`` for several points of one model, ``scale`` beside them, and optionally
``mean, variance, pcs, control_patterns, control_filters`` with a further axis in the same way. All
in raw residual units. The safetensors header carries one JSON record: schema, and for each
direction its space, label, stage, model hash, prompts hash, position, method, weight convention,
fit statistics and control names. A bare file holding a single 1-D tensor is accepted when the
caller says which layer or space it lives in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mi_weightspace.core.direction import RAW_CONVENTION, Direction
from mi_weightspace.core.errors import ConventionError, DirectionError
from mi_weightspace.core.json_io import DamagedJson, take
from mi_weightspace.core.output_io import check_new_file, staged
from mi_weightspace.core.sealed_io import DamagedFile, load_sealed, save_sealed
from mi_weightspace.core.space import Space

SCHEMA = 1
_HEADER = "mi_weightspace.direction"
_ARRAYS = ("filter", "mean", "variance", "pcs", "control_patterns", "control_filters")
_TEXTS = ("label", "stage", "model_hash", "prompts_hash", "position", "method", "convention")


class HasShape(Protocol):
    """A `Lens` or a `WeightSource`: all that matters here is its shape (and its convention)."""

    @property
    def shape(self) -> Any: ...


# ---- saving --------------------------------------------------------------------------------
def save_direction(direction: Direction | Sequence[Direction], path: str | Path) -> Path:
    """Write one direction, or several of one width, to a safetensors file; returns its path.

    Raises:
        DirectionError: nothing to save, or directions of different widths or contents.
        OutputError: the file exists or its folder cannot be written.
    """
    single = isinstance(direction, Direction)
    rows = [direction] if isinstance(direction, Direction) else list(direction)
    _check_uniform(rows)
    target = Path(path)
    check_new_file(target, "direction file")
    tensors = {"pattern": torch.stack([r.pattern for r in rows])}
    tensors["scale"] = torch.tensor([r.scale for r in rows], dtype=torch.float32)
    for name in _ARRAYS:
        if getattr(rows[0], name) is not None:
            tensors[name] = torch.stack([getattr(r, name) for r in rows])
    arrays = {k: (v[0] if single else v).contiguous().clone() for k, v in tensors.items()}
    header = {"schema": SCHEMA, "directions": [_record(r) for r in rows]}
    with staged(target, "direction file") as partial:
        save_sealed(arrays, partial, _HEADER, header)
    return target


def _record(direction: Direction) -> dict[str, Any]:
    record: dict[str, Any] = {name: getattr(direction, name) for name in _TEXTS}
    record["space"] = direction.space.name
    record["fit"] = dict(direction.fit)
    record["control_names"] = list(direction.control_names)
    return record


def _check_uniform(rows: Sequence[Direction]) -> None:
    def contents(d: Direction) -> list[tuple[str, tuple[int, ...]]]:
        present = [(n, getattr(d, n)) for n in ("pattern", *_ARRAYS)]
        return [(n, tuple(t.shape)) for n, t in present if t is not None]

    if not rows or any(contents(r) != contents(rows[0]) for r in rows):
        raise DirectionError(
            "directions to save",
            given="none" if not rows else "directions with different widths or contents",
            expected="directions of one model, each with the same tensors",
            remedy="Save the others to a file of their own.",
        )


# ---- loading -------------------------------------------------------------------------------
def load_directions(
    path: str | Path, *, layer: int | None = None, space: str | Space | None = None
) -> list[Direction]:
    """Every direction of a file, in stored order.

    Args:
        layer, space: where a bare tensor lives (``layer`` means ``resid_post.layer``); for a file
            with a header they select.

    Raises:
        DirectionError: no such file, not safetensors, unknown keys, a vector that is zero,
            non-finite or of the wrong shape, or a space the file does not hold.
    """
    tensors, header = _read(Path(path))
    wanted = Space.parse(space) if space is not None else None
    if header is None:
        return [_bare(Path(path), tensors, layer, wanted)]
    try:
        found = _stored(tensors, header)
    except DamagedJson as error:
        raise DirectionError(
            f"direction file {path}",
            given=f"a header or tensors that are not as written ({error})",
            expected=f"a file written by save_direction, schema ≤ {SCHEMA}",
            remedy="Update mi-weightspace, or save the direction again.",
        ) from error
    chosen = [
        d
        for d in found
        if (wanted is None or d.space.canonical == wanted.canonical)
        and (layer is None or d.space.layer == layer)
    ]
    if not chosen:
        raise DirectionError(
            f"direction file {path}",
            given=f"layer={layer}, space={wanted}",
            expected=f"one of {[str(d.space) for d in found][:12]}",
            remedy="Pick a stored space, or fit a probe at that point.",
        )
    return chosen


def load_direction(
    path: str | Path, *, layer: int | None = None, space: str | Space | None = None
) -> Direction:
    """One direction of a file.

    Where a layer holds several points, ``resid_post`` is meant.

    Raises:
        DirectionError: as `load_directions`; or the file holds several and none was picked.
    """
    found = load_directions(path, layer=layer, space=space)
    if len(found) > 1 and layer is not None:
        post = [d for d in found if d.space.point == "resid_post"]
        found = post or found
    if len(found) > 1:
        raise DirectionError(
            f"direction file {path}",
            given=f"{len(found)} directions: {[str(d.space) for d in found][:12]}",
            expected="one",
            remedy="Pass layer= or space=, or use load_directions.",
        )
    return found[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    if not path.is_file():
        raise DirectionError(
            f"direction file {path}",
            given="no such file",
            expected="a safetensors file",
            remedy="Check the path; `mi-weightspace probe` writes direction.safetensors.",
        )
    try:
        return load_sealed(path, _HEADER)
    except DamagedFile as error:
        raise DirectionError(
            f"direction file {path}",
            given=str(error),
            expected="a readable safetensors file, as it was written",
            remedy="Save tensors with safetensors; .pt and .npy files are not read.",
        ) from error


def _stored(tensors: dict[str, Tensor], header: dict[str, Any]) -> list[Direction]:
    """The directions of a file with a header.

    Raises:
        DamagedJson: a newer schema, or entries and tensors that do not belong together.
    """
    records, schema = take(header, "directions", "list"), take(header, "schema", "whole")
    if schema > SCHEMA:
        raise DamagedJson(f"schema {schema}")
    if "pattern" not in tensors or not records:
        raise DamagedJson(f"the keys {sorted(tensors)[:12]} and {len(records)} directions")
    single = tensors["pattern"].ndim == 1
    rows = {name: value[None] if single else value for name, value in tensors.items()}
    for name, value in rows.items():
        if name not in ("pattern", "scale", *_ARRAYS) or value.is_complex():
            raise DamagedJson(f"a tensor {name!r} of {value.dtype}")
        if value.ndim < 1 or len(value) != len(records):
            raise DamagedJson(f"{name} of shape {tuple(value.shape)}, {len(records)} directions")
    if "scale" in rows and rows["scale"].ndim != 1:
        raise DamagedJson(f"scale of shape {tuple(rows['scale'].shape)}")
    return [_direction(rows, i, record) for i, record in enumerate(records)]


def _direction(rows: dict[str, Tensor], i: int, record: Any) -> Direction:
    if not isinstance(record, dict):
        raise DamagedJson(f"direction {i}, which is no object")
    fit = take(record, "fit", "object")
    for key, value in fit.items():
        if not isinstance(value, str | int | float):
            raise DamagedJson(f"fit[{key!r}]: {value!r}"[:120])
    arrays = {name: rows[name][i] for name in _ARRAYS if name in rows}
    return Direction(
        pattern=rows["pattern"][i],
        space=Space.parse(take(record, "space", "text")),
        scale=float(rows["scale"][i]) if "scale" in rows else 1.0,
        fit=fit,
        control_names=tuple(take(record, "control_names", "texts")),
        **arrays,
        **{name: take(record, name, "text") for name in _TEXTS},
    )


def _bare(
    path: Path, tensors: dict[str, Tensor], layer: int | None, space: Space | None
) -> Direction:
    if len(tensors) != 1 or next(iter(tensors.values())).ndim != 1:
        shapes = {k: tuple(v.shape) for k, v in list(tensors.items())[:8]}
        raise DirectionError(
            f"direction file {path}",
            given=f"tensors {shapes} without a direction header",
            expected="one 1-D tensor, or a file written by save_direction",
            remedy="Save the one vector alone, shape (d_model,).",
        )
    if space is None and layer is None:
        raise DirectionError(
            f"direction file {path}",
            given="a bare vector",
            expected="the layer or space it lives in",
            remedy="Pass --layer L (means resid_post.L) or space='resid_mid.L'.",
        )
    where = space if space is not None else Space("resid_post", layer)
    name, vector = next(iter(tensors.items()))
    return Direction(
        pattern=vector,
        space=where,
        label=path.stem if name in {"pattern", "direction", "vector"} else name,
        scale=float(vector.double().norm()),
        method="given",
    )


# ---- against a model -----------------------------------------------------------------------
def check_convention(direction: Direction, model: HasShape) -> None:
    """The direction lives in the basis of this model's weights.

    Norm folding and centring of the writing weights change the basis in which directions and
    weight differences live; a source without a ``convention`` of its own holds raw weights.

    Raises:
        ConventionError: another weight convention.
        DirectionError: another width, or a layer the model does not have.
    """
    own = getattr(model, "convention", RAW_CONVENTION)
    if direction.convention != own:
        raise ConventionError(
            f"direction {direction.name}",
            given=f"weight convention {direction.convention!r}",
            expected=f"the model's {own!r}",
            remedy="Fit the probe again on the unprocessed model.",
        )
    shape = model.shape
    if direction.space.is_stream and direction.width != shape.d_model:
        raise DirectionError(
            f"direction {direction.name}",
            given=f"width {direction.width}",
            expected=f"the model's d_model {shape.d_model}",
            remedy="The direction belongs to another model.",
        )
    if direction.space.layer is not None and direction.space.layer >= shape.n_layers:
        raise DirectionError(
            f"direction {direction.name}",
            given=f"layer {direction.space.layer}",
            expected=f"a layer below {shape.n_layers}",
            remedy="Layers count from 0.",
        )


# ---- export --------------------------------------------------------------------------------
def add_edit(
    direction: Direction, alpha: float, *, position: int | None = None
) -> Callable[[Tensor], Tensor]:
    """``x + alpha · scale · pattern`` on (batch, tokens, d); `position` None means every token."""
    step = alpha * direction.scale * direction.pattern

    def edit(value: Tensor) -> Tensor:
        addition = step.to(device=value.device, dtype=value.dtype)
        if position is None:
            return value + addition
        edited = value.clone()
        edited[:, position] = edited[:, position] + addition
        return edited

    return edit


def to_transformer_lens_hook(
    direction: Direction, alpha: float, *, position: int | None = None
) -> Callable[[Tensor, Any], Tensor]:
    """A TransformerLens hook ``(value, hook) -> value`` that steers by `add_edit`.

    Put it on ``hook_name(direction)``: ``model.run_with_hooks(x, fwd_hooks=[(name, hook)])``.
    """
    edit = add_edit(direction, alpha, position=position)

    def hook(value: Tensor, hook: Any = None) -> Tensor:
        return edit(value)

    return hook


def hook_name(direction: Direction) -> str:
    """TransformerLens's name of the direction's point, ``blocks.5.hook_resid_post``."""
    aliases = {"attn_z": "attn.hook_z", "mlp_hidden": "mlp.hook_post"}
    point = direction.space.point
    return f"blocks.{direction.space.layer}.{aliases.get(point, f'hook_{point}')}"


def to_nnsight(
    direction: Direction, alpha: float, *, position: int | None = None
) -> Callable[[Tensor], Tensor]:
    """A function of the hidden state for the inside of an nnsight trace: ``h[:] = steer(h)``."""
    return add_edit(direction, alpha, position=position)


def to_layer_dict(directions: Iterable[Direction], *, scaled: bool = False) -> dict[int, Tensor]:
    """``{layer: vector}`` of the ``resid_post`` directions, as steering tools take them.

    Raises:
        DirectionError: none of them lives at a ``resid_post``.
    """
    found = {
        int(d.space.layer or 0): (d.scale if scaled else 1.0) * d.pattern
        for d in directions
        if d.space.point == "resid_post"
    }
    if not found:
        raise DirectionError(
            "directions to export",
            given="no direction at a resid_post point",
            expected="at least one",
            remedy="Fit at resid_post points (the default).",
        )
    return found
