"""A short identity of a set of weights, the same from disk and from a live model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mi_weightspace.core.site import Site

if TYPE_CHECKING:
    from mi_weightspace.models.grammar import ModelShape

N_SAMPLES = 257
"""Entries sampled from each matrix: enough to tell trained stages apart, cheap by mmap."""


def fingerprint(shape: ModelShape, sites: Iterable[Site], stored: Callable[[Site], Tensor]) -> str:
    """16 hex digits over the sizes and strided samples of every matrix, in float32.

    It tells checkpoints apart; it is not a proof of equality (a change that misses every sampled
    entry leaves it the same), so `no change` is decided on the differences themselves.
    """
    digest = hashlib.sha256(repr(shape).encode())
    for site in sites:
        matrix = stored(site)
        rows, columns = matrix.shape
        index = torch.arange(N_SAMPLES) * (rows * columns - 1) // (N_SAMPLES - 1)
        sample = matrix[index // columns, index % columns].to(torch.float32).cpu()
        digest.update(site.name.encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
