"""The few collectives of a multi-process run (`torchrun`, `accelerate launch`).

Without an initialised process group every function is the identity. Each process draws the random
numbers of the whole batch and takes its own rows, so that n processes compute what one process
with the n-fold batch computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> int:
    return dist.get_world_size() if active() else 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def own_rows(value: Tensor) -> Tensor:
    """This process' share of the leading dimension of the whole batch's tensor."""
    if not active():
        return value
    n = len(value) // world()
    return value[rank() * n : (rank() + 1) * n]


class _GlobalMean(torch.autograd.Function):
    """Mean over processes; the backward pass is the identity.

    Parameter gradients are averaged over processes afterwards, which supplies the 1/n.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value / world()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def global_mean(value: Tensor) -> Tensor:
    """The mean over processes of per-process means, gradient included."""
    if not active():
        return value
    out = _GlobalMean.apply(value)
    assert isinstance(out, Tensor)
    return out


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over processes."""
    if not active():
        return
    wanted = list(tensors)
    flat = torch.cat([t.flatten() for t in wanted])
    dist.all_reduce(flat)
    flat /= world()
    at = 0
    for tensor in wanted:
        tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()


def barrier() -> None:
    if active():
        dist.barrier()
