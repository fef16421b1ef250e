"""A short identity of a set of weights, the same from disk and from a live model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mi_weightspace.core.site import Site

if TYPE_CHECKING:
    from mi_weightspace.models.grammar import ModelShape

N_SAMPLES = 257
"""Entries sampled from each matrix: enough to tell trained stages apart, cheap by mmap."""


class _Weights(Protocol):
    @property
    def shape(self) -> ModelShape: ...
    def sites(self, select: str | Sequence[str] | None = None) -> list[Site]: ...
    def stored(self, site: Site | str) -> Tensor: ...
    def bias(self, site: Site | str) -> Tensor | None: ...
    def read_gain(self, site: Site | str) -> Tensor | None: ...
    def write_gain(self, site: Site | str) -> Tensor | None: ...


def fingerprint(source: _Weights) -> str:
    """16 hex digits over the sizes, every bias and norm gain, and samples of every matrix.

    A bias of zeros counts as none: some libraries fill one in.

    Strided samples, in float32, so a 13B checkpoint takes a second. It tells checkpoints apart;
    it is not a proof of equality (a change that misses every sampled entry leaves it the same),
    so `no change`, and whether a difference is an adapter's factors, are decided on the matrices.
    """
    # a HookedTransformer may be built for a shorter context than the checkpoint's
    digest = hashlib.sha256(repr(replace(source.shape, max_positions=0)).encode())
    for site in source.sites():
        matrix = source.stored(site)
        rows, columns = matrix.shape
        index = torch.arange(N_SAMPLES, device=matrix.device)
        index = index * (rows * columns - 1) // (N_SAMPLES - 1)
        _add(digest, site.name, matrix[index // columns, index % columns])
        bias = source.bias(site)
        _add(digest, "bias", None if bias is None or not bool(bias.any()) else bias)
        _add(digest, "read gain", source.read_gain(site))
        _add(digest, "write gain", source.write_gain(site))
    return digest.hexdigest()[:16]


def _add(digest: hashlib._Hash, name: str, values: Tensor | None) -> None:
    if values is not None:
        digest.update(name.encode())
        digest.update(values.detach().to(torch.float32).cpu().contiguous().numpy().tobytes())
