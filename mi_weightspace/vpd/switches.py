"""Speed switches that concern the process or a host's modules, as contexts that leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mi_weightspace.models.arithmetic import fast_float32
from mi_weightspace.vpd.config import SpeedConfig

WRITTEN_OUT = frozenset({"NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"})
"""Modules that compute the tanh form of GELU from powers and sums."""
TOLERANCE = 1e-6
"""Absolute difference allowed between a written-out activation and torch's kernel, on [-8, 8]."""


@contextmanager
def switched(speed: SpeedConfig, root: nn.Module) -> Iterator[None]:
    """Within the context: float32 products, attention and activations as `speed` says."""
    on_cpu = next(root.parameters()).device.type == "cpu"
    with ExitStack() as stack:
        if speed.fast_float32 and on_cpu:
            stack.enter_context(fast_float32())
        if speed.written_attention and on_cpu:  # the importance network's; and any fused call left
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if speed.fused_activations:
            stack.enter_context(fused_activations(root))
        yield


@contextmanager
def fused_activations(root: nn.Module) -> Iterator[int]:
    """Within the context, written-out tanh GELUs under `root` run as one kernel each.

    Yields how many. A module is exchanged only if it agrees with the kernel to `TOLERANCE`, so one
    that merely shares a name is left alone.
    """
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    expected = _fused(x)
    found: list[nn.Module] = []
    for module in root.modules():
        if type(module).__name__ in WRITTEN_OUT and "forward" not in module.__dict__:
            with torch.no_grad():
                same = bool(((module(x) - expected).abs() <= TOLERANCE).all())
            if same:
                found.append(module)
    for module in found:
        module.forward = _fused
    try:
        yield len(found)
    finally:
        for module in found:
            del module.forward


def _fused(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return F.gelu(x, approximate="tanh")
