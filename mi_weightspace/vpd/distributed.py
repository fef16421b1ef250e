"""The few collectives of a multi-process run (`torchrun`).

Without an initialised process group every function is the identity. Each process draws the random
numbers of the whole batch and takes its own rows, so that n processes compute what one process
with the n-fold batch computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def setup() -> torch.device:
    """Join the processes `torchrun` has started, as its environment variables say.

    nccl where CUDA is there (one device a process), else gloo. One process alone joins nothing.
    Returns the device of this process. Calling it again is harmless.
    """
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not active():
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def finish() -> None:
    """Leave the processes joined by `setup`."""
    if active():
        dist.destroy_process_group()


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


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Every process gets the values of process 0."""
    if active():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if not active():
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value > 0)


def barrier() -> None:
    if active():
        dist.barrier()
