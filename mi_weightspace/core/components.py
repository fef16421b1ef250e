"""Rank-one parts of a matrix: the answer of SVD, of LoRA factors and of VPD alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.monitor import (
    MARGIN,
    Bands,
    Measure,
    Ragged,
    Watch,
    calibrate,
    extremes,
)
from mi_weightspace.core.site import Side, Site

Method = Literal["svd", "svd_activation_weighted", "lora", "vpd"]
Where = Literal["site", "stream"]


@dataclass(frozen=True)
class SourceRef:
    """Where the matrix came from, so that it can be streamed again: paths and their hashes."""

    before: str
    after: str
    before_hash: str
    after_hash: str


@dataclass(frozen=True, eq=False)
class Components:
    """``sum_k scale_k · write_k read_kᵀ``, largest scale first.

    Attributes:
        read: (k, d_in), unit rows: the input-side vectors.
        write: (k, d_out), unit rows: the output-side vectors.
        scale: (k,), non-negative: singular values, or norms of the rank-one parts.
        stage: the training stage (``sft``) whose difference this is, or the stage itself.
        source: where to stream the matrix from again; None when it is gone.
        facts: numbers about the whole matrix (``fro``, ``rel_fro``, ``resolved``, …), as the
            `svd` table of the design lists them.
        index: (k,), the parts' own numbers where they came with some (components of a VPD); None
            where the order is all there is.
    """

    site: Site
    read: Float[Tensor, "k d_in"]
    write: Float[Tensor, "k d_out"]
    scale: Float[Tensor, " k"]
    method: Method = "svd"
    stage: str = ""
    source: SourceRef | None = None
    facts: dict[str, float | int | bool | str | None] = field(default_factory=dict)
    index: Int[Tensor, " k"] | None = None

    def __post_init__(self) -> None:
        k = self.scale.shape[0]
        assert self.read.shape == (k, self.site.d_in), (self.read.shape, k, self.site)
        assert self.write.shape == (k, self.site.d_out), (self.write.shape, k, self.site)

    def __len__(self) -> int:
        return int(self.scale.shape[0])

    def vectors(self, side: Side) -> Float[Tensor, "k d"]:
        return self.read if side == "read" else self.write

    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """The sum of the parts."""
        return torch.einsum("k,ko,ki->oi", self.scale, self.write, self.read)

    def top(self, k: int) -> Components:
        index = None if self.index is None else self.index[:k]
        return replace(
            self, read=self.read[:k], write=self.write[:k], scale=self.scale[:k], index=index
        )

    def watch(
        self,
        side: Side = "write",
        *,
        k: int | None = 20,
        where: Where = "site",
        measure: Measure = "projection",
    ) -> Watch:
        """The k largest parts' vectors of one side, with the place they are watched at.

        Args:
            k: None watches all; 20 as published.
            where: ``site``: the matrix's own input (``read``) or output (``write``);
                ``stream``: the space behind it, e.g. the stream after the block for a write side.
        """
        chosen = self if k is None else self.top(k)
        own = f"{self.site.name}:{'in' if side == 'read' else 'out'}"
        return Watch(
            self.site.name,
            side,
            own if where == "site" else self.site.space(side).canonical.name,
            chosen.vectors(side),
            tuple(range(len(chosen))) if chosen.index is None else tuple(chosen.index.tolist()),
            stage=self.stage,
            measure=measure,
        )

    def bands(
        self,
        activations: Ragged,
        *,
        side: Side = "write",
        k: int | None = 20,
        mask: Bool[Tensor, "n tokens"] | None = None,
        where: Where = "site",
        measure: Measure = "projection",
        margin: float = MARGIN,
    ) -> Bands:
        """Min-max bands of activations along the k largest parts (`core.monitor`).

        ``bands.check(others)`` then flags a harmless item with probability at most 2k/(n+1).

        Args:
            activations: of n calibration items, (n, d), (n, tokens, d) or one (tokens_i, d) each:
                inputs of the matrix for ``side="read"``, outputs (or the stream, as `where` says)
                for ``side="write"``.
            mask: True where a token counts. margin: widening, in widths of the band.

        Raises:
            DirectionError: activations of another width.
            PromptError: no item, an item without a token, or values that are not finite.
        """
        watched = self.watch(side, k=k, where=where, measure=measure)
        return calibrate([watched], [extremes(watched, activations, mask)], margin=margin)
