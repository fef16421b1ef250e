"""Sparse codes of tokens, held by what is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseCodes:
    """Codes of n tokens in compressed rows.

    Attributes:
        offsets: (n + 1,), where each token's entries begin and end.
        latent, value: (n_active,).
        d_sae: width of the dictionary.
    """

    offsets: Int[Tensor, " n_plus_1"]
    latent: Int[Tensor, " n_active"]
    value: Float[Tensor, " n_active"]
    d_sae: int

    def __len__(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @classmethod
    def of(
        cls,
        counts: Int[Tensor, " n"],
        latent: Int[Tensor, " n_active"],
        value: Float[Tensor, " n_active"],
        d_sae: int,
    ) -> SparseCodes:
        """From the number of entries of each token."""
        return cls(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), latent, value, d_sae)

    @classmethod
    def join(cls, parts: Sequence[SparseCodes], d_sae: int) -> SparseCodes:
        """The tokens of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls.of(
            torch.cat([part.counts for part in parts]),
            torch.cat([part.latent for part in parts]),
            torch.cat([part.value for part in parts]),
            d_sae,
        )

    @property
    def counts(self) -> Int[Tensor, " n"]:
        return self.offsets.diff()

    @property
    def l0(self) -> float:
        """Mean number of active latents a token."""
        return self.latent.shape[0] / max(1, len(self))

    @property
    def token(self) -> Int[Tensor, " n_active"]:
        """Which token each entry belongs to."""
        rows = torch.arange(len(self), device=self.latent.device)
        return rows.repeat_interleave(self.counts)

    def __mul__(self, factor: Float[Tensor, " d_sae"]) -> SparseCodes:
        """Every latent times its own factor."""
        return replace(self, value=self.value * factor[self.latent])

    def times(self, matrix: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "n d_out"]:
        """The product with a matrix; only rows of active latents are read."""
        if not len(self.latent):
            return matrix.new_zeros(len(self), matrix.shape[1])
        return torch.nn.functional.embedding_bag(
            self.latent,
            matrix,
            self.offsets,
            mode="sum",
            per_sample_weights=self.value,
            include_last_offset=True,
        )

    def dense(self) -> Float[Tensor, "n d_sae"]:
        out = self.value.new_zeros(len(self), self.d_sae)
        out[self.token, self.latent] = self.value
        return out
