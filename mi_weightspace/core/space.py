"""Which vector space a vector lives in.

A *point* is a place in the forward pass; a point and a layer make a `Space`. Directions and the
two sides of a weight matrix carry their Space, so that a cosine between vectors of different
spaces is an error and not a number.

Stream points of one block, in order: ``resid_pre.L`` (block input), ``resid_mid.L`` (after
attention; absent in parallel-block families), ``resid_post.L`` (block output, the same vector as
``resid_pre.L+1``). Each is taken *before* any norm: a matrix that reads the stream through a norm
has a read gain, which is never folded silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from mi_weightspace.core.errors import WeightspaceError

Point = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_z",
    "mlp_gate",
    "mlp_in",
    "mlp_hidden",
    "tokens",
    "logits",
]
STREAM_POINTS: tuple[Point, ...] = ("resid_pre", "resid_mid", "resid_post")
_GLOBAL_POINTS: tuple[Point, ...] = ("tokens", "logits")


@dataclass(frozen=True, order=True)
class Space:
    """A vector space of the forward pass; `layer` is None for ``tokens`` and ``logits``."""

    point: Point
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.point not in get_args(Point) or (self.layer is None) != (
            self.point in _GLOBAL_POINTS
        ):
            raise WeightspaceError(
                "Space",
                given=f"point={self.point!r}, layer={self.layer!r}",
                expected=f"one of {get_args(Point)}; a layer for all but {_GLOBAL_POINTS}",
                remedy="Write it as 'resid_post.5'.",
            )

    @property
    def name(self) -> str:
        return self.point if self.layer is None else f"{self.point}.{self.layer}"

    def __str__(self) -> str:
        return self.name

    @property
    def is_stream(self) -> bool:
        """Whether this is a point of the residual stream (width d_model)."""
        return self.point in STREAM_POINTS

    @property
    def canonical(self) -> Space:
        """``resid_pre.L`` (L>0) is the same vector as ``resid_post.L-1``; this is one name."""
        if self.point == "resid_pre" and self.layer:
            return Space("resid_post", self.layer - 1)
        return self

    @classmethod
    def parse(cls, name: str | Space) -> Space:
        """Read ``resid_post.5`` or TransformerLens's ``blocks.5.hook_resid_post``."""
        if isinstance(name, Space):
            return name
        hook = re.fullmatch(r"blocks\.([0-9]{1,6})\.(?:attn\.|mlp\.)?hook_(\w+)", name)
        if hook is not None:
            aliases = {
                "z": "attn_z",
                "q": "attn_q",
                "k": "attn_k",
                "v": "attn_v",
                "post": "mlp_hidden",
            }
            point = aliases.get(hook[2], hook[2])
            return cls(point, int(hook[1]))  # pyright: ignore[reportArgumentType]
        point, _, layer = name.partition(".")
        return cls(point, int(layer) if re.fullmatch("[0-9]{1,6}", layer) else None)  # pyright: ignore[reportArgumentType]
