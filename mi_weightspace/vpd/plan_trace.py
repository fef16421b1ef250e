"""A run of shapes: the library's own forward passes on tensors without storage, bytes counted.

What a masked pass keeps for its backward pass depends on the architecture (which norms, which
activation, how attention is written) as much as on the decomposed matrices; running the model's
own code on `FakeTensor`s knows both, for the price of neither memory nor arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import ReconstructionConfig, VPDConfig
from mi_weightspace.vpd.factors import Factors, component_counts
from mi_weightspace.vpd.host import Clean, LensHost
from mi_weightspace.vpd.importance import Importance
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Objective


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages made within the context and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        real = given and not any(isinstance(t, FakeTensor) for t in given)
        if real or func.overloadpacket is torch.ops.aten.arange:
            with unset_fake_temporarily():  # index tables are small, and code looks at their values
                found = func(*args, **kwargs)
        else:
            found = func(*args, **kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return found

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = self._seen[storage] = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class Held:
    """Bytes a computation leaves alive, and what it needed on top of them for a moment."""

    kept: int
    scratch: int


@dataclass(frozen=True, eq=False)
class Traced:
    """What the run of shapes found, in bytes.

    Attributes:
        matrices: site -> (d_out, d_in). layers: site -> layer. counts: site -> components.
        model: the model's parameters and buffers.
        clean: a clean batch with its site inputs and outputs.
        importance_parameters: a number, not bytes. importance: the network's activations.
        passes: `kind_of` a term -> one masked pass with its output.
        first: first block a masked pass computes.
    """

    matrices: Mapping[str, tuple[int, int]]
    layers: Mapping[str, int | None]
    counts: Mapping[str, int]
    model: int
    clean: int
    importance_parameters: int
    importance: Held
    passes: Mapping[tuple[bool, bool], Held]
    first: int


def trace(hf_config: Any, config: VPDConfig, batch: int, length: int) -> Traced:
    """Run the passes of one step on shapes alone.

    Args:
        hf_config: the model's `PretrainedConfig`. batch, length: rows and tokens of one process.

    Raises:
        SiteError: a pattern that matches nothing. ConfigError: counts that do not cover the sites.
    """
    shapes, bytes_ = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    tokens = torch.zeros((batch, length), dtype=torch.long)  # real: padding is looked for in them
    with shapes, bytes_:
        host = LensHost(_lens(hf_config), config.sites, prefix=config.speed.prefix)
        model, counts = bytes_.live, component_counts(config, host.names)
    made: list[Any] = []
    with host.prepared(config.speed), shapes, bytes_:  # the switches try real numbers first
        clean_bytes = _held(bytes_, lambda: made.append(host.clean(tokens))).kept
        clean: Clean = made[0]
        objective = _objective(host, counts, clean, config)
        network = objective.importance
        found = _held(bytes_, lambda: made.append(network(clean, objective.factors)))
        kinds = {kind_of(term) for term in config.reconstruction}
        passes = {kind: _masked(bytes_, objective, clean, *kind) for kind in kinds}
    return Traced(
        {name: _shape(host, name) for name in host.names},
        host.layers,
        counts,
        model,
        clean_bytes,
        sum(p.numel() for p in network.parameters()),
        found,
        passes,
        0 if clean.start is None else min(v for v in host.layers.values() if v is not None),
    )


def kind_of(term: ReconstructionConfig) -> tuple[bool, bool]:
    """(its sources want gradients, it masks one site at a time)."""
    return term.source not in {"uniform", "binomial"}, term.routing == "layerwise"


def _lens(hf_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from mi_weightspace.models.backends.torch_hooks import TorchLens

    module = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    return TorchLens(module.eval(), None)


def _shape(host: LensHost, name: str) -> tuple[int, int]:
    site = host.site(name)
    assert site is not None
    return site.d_out, site.d_in


def _objective(
    host: LensHost, counts: Mapping[str, int], clean: Clean, config: VPDConfig
) -> Objective:
    reads, writes = {}, {}
    for name in host.names:
        d_out, d_in = _shape(host, name)
        reads[name] = torch.zeros(counts[name], d_in, requires_grad=True)
        writes[name] = torch.zeros(counts[name], d_out, requires_grad=True)
    seen: Any = host
    factors = Factors(seen, reads, writes)
    widths = {name: clean.features(name).shape[-1] for name in host.names}
    network = Importance(factors, widths, config.importance, generator(0, "plan"))
    return Objective(factors, network, config)


def _masked(
    bytes_: LiveBytes, objective: Objective, clean: Clean, climbed: bool, layerwise: bool
) -> Held:
    """One masked pass; of the layerwise ones the first, whose graph is the longest."""
    pos, (components, sites) = tuple(clean.batch.shape), objective.sizes
    masks = Masks(
        torch.zeros((*pos, components), requires_grad=True),
        torch.zeros((*pos, sites), requires_grad=climbed),
        None if layerwise else torch.zeros((*pos, sites), dtype=torch.bool),
        torch.zeros((*pos, components), requires_grad=climbed),
    )
    only = objective.factors.layout.names[:1] if layerwise else None
    return _held(bytes_, lambda: objective.masked(clean, masks, only=only))


def _held(bytes_: LiveBytes, compute: Callable[[], Any]) -> Held:
    before = bytes_.peak = bytes_.live
    result = compute()
    held = Held(bytes_.live - before, bytes_.peak - bytes_.live)
    del result
    return held
