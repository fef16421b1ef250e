"""Sparse codes of tokens, held by what is active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
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
    def of_dense(cls, codes: Float[Tensor, "n d_sae"]) -> SparseCodes:
        """The entries that are not zero."""
        place, d_sae = where_true(codes != 0), codes.shape[1]
        return cls(row_offsets(place, *codes.shape), place % d_sae, codes.view(-1)[place], d_sae)

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


def row_offsets(place: Int[Tensor, " n_active"], n: int, d_sae: int) -> Int[Tensor, " n_plus_1"]:
    """Where each row begins in ascending places of a flattened (n, d_sae) matrix."""
    return torch.searchsorted(place, torch.arange(n + 1, device=place.device) * d_sae)


def where_true(mask: Bool[Tensor, "n d_sae"]) -> Int[Tensor, " n_active"]:
    """Places of the True entries of a flattened mask, ascending.

    Few are True: eight at a time are skipped, which halves the cost of looking.
    """
    flat = mask.reshape(-1)
    if flat.numel() % 8:
        return flat.nonzero().squeeze(1)
    words = flat.view(torch.int64)
    some = words.nonzero().squeeze(1)
    inner = words[some].view(torch.bool).nonzero().squeeze(1)
    return some[inner >> 3] * 8 + (inner & 7)
