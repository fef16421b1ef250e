"""Rank-one parts of a matrix: the answer of SVD, of LoRA factors and of VPD alike."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.site import Side, Site

Method = Literal["svd", "svd_activation_weighted", "lora", "vpd"]


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
