"""What is decomposed: matrices inside a frozen model, and a way to run it with them masked.

`LensHost` wraps any live language model a `Lens` can see; `ModuleHost` any torch module whose sites
are linear layers (toys). Nothing above this file knows which one it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.core.errors import ConfigError, SiteError
from mi_weightspace.core.site import Site
from mi_weightspace.models.lens import Lens
from mi_weightspace.vpd.config import SpeedConfig
from mi_weightspace.vpd.masked import Adjust
from mi_weightspace.vpd.switches import switched

Metric = Literal["kl", "mse"]


@dataclass(frozen=True, eq=False)
class Clean:
    """One batch through the untouched host, without gradients.

    Attributes:
        batch: what was run, (batch, tokens) ids or (batch, features).
        inputs: site -> its input, (*pos, d_in); token ids for ``embed``.
        outputs: site -> its output, (*pos, d_out).
        output: logits (*pos, vocab) or prediction (*pos, d).
        start: the residual stream before the first decomposed block, or None.
        seen: site -> what an importance network reads there, where that is not `inputs`.
    """

    batch: Tensor
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    output: Tensor
    start: Tensor | None = None
    seen: Mapping[str, Tensor] | None = None

    def features(self, name: str) -> Tensor:
        """What an importance network reads at a site: its input, an embedding's output."""
        if self.seen is not None:
            return self.seen[name]
        x = self.inputs[name]
        return x if x.is_floating_point() else self.outputs[name]

    def select(self, rows: Tensor) -> Clean:
        """The same for some rows of the batch (repetitions allowed)."""
        return replace(
            self,
            batch=self.batch[rows],
            inputs={k: v[rows] for k, v in self.inputs.items()},
            outputs={k: v[rows] for k, v in self.outputs.items()},
            output=self.output[rows],
            start=None if self.start is None else self.start[rows],
            seen=None if self.seen is None else {k: v[rows] for k, v in self.seen.items()},
        )

    def tiled(self, times: int) -> Clean:
        """The batch `times` over, for `Host.forward`: nothing but what that reads is repeated."""

        def tile(x: Tensor) -> Tensor:
            return x.repeat(times, *[1] * (x.ndim - 1))

        start = None if self.start is None else tile(self.start)
        return replace(self, batch=tile(self.batch), start=start)


class Host(Protocol):
    """A frozen model with named matrices.

    Attributes:
        names: sites in model order.
        metric: ``kl`` for logits, ``mse`` for predictions.
        dtype: of components and losses (float32; float64 where the model is).
        scales: factor of an embedding module, for the sites that take token ids.
        layers: site -> layer, None outside the blocks.
        adds_updates: whether a site is a change, added to what an earlier matrix computes.
    """

    names: tuple[str, ...]
    metric: Metric
    dtype: torch.dtype
    scales: Mapping[str, float]
    layers: Mapping[str, int | None]
    adds_updates: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def fingerprint(self) -> str: ...
    def site(self, name: str) -> Site | None: ...
    def width(self, name: str) -> int:
        """Of what an importance network reads at the site (`Clean.features`)."""
        ...

    def weight(self, name: str) -> Float[Tensor, "d_out d_in"]: ...
    def bias(self, name: str) -> Float[Tensor, " d_out"] | None: ...
    def in_matrix(self, name: str, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (C, d) as the matrix itself reads and writes them: `weight` may be a core."""
        ...

    def clean(self, batch: Tensor) -> Clean: ...
    def forward(self, clean: Clean, functions: Mapping[str, Adjust]) -> Tensor:
        """The output with each named site adjusted; gradients flow."""
        ...

    def prepared(self, speed: SpeedConfig) -> Any:
        """Context of a training loop: evaluation mode and the switches that concern the host."""
        ...


class _Recorder:
    """An adjustment that changes nothing and keeps what it saw."""

    def __init__(self, name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.inputs[self.name], self.outputs[self.name] = x.detach(), y.detach()
        return y


@dataclass(eq=False)
class ModuleHost:
    """A host over any torch module.

    Args:
        module: called as ``module(batch)``; its parameters are not changed.
        sites: site name -> path of an `nn.Linear` inside it, in the order wanted.
        metric: how two outputs are compared.

    Raises:
        SiteError: a path that is no `nn.Linear` with a matrix.
    """

    module: nn.Module
    sites: Mapping[str, str]
    metric: Metric = "mse"
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = tuple(self.sites)
        self.adds_updates = False
        self.layers: Mapping[str, int | None] = dict.fromkeys(self.names)
        self._linears: dict[str, nn.Module] = {}
        for name, path in self.sites.items():
            try:
                linear = self.module.get_submodule(path)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise SiteError(
                    f"site {name!r} of {type(self.module).__name__}",
                    given=f"{type(linear).__name__} at {path!r}",
                    expected="an nn.Linear",
                    remedy="Only matrices can be decomposed; name the path of a linear layer.",
                )
            self._linears[name] = linear
        parameter = next(self.module.parameters())
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()[:16]

    def site(self, name: str) -> Site | None:
        return None

    def width(self, name: str) -> int:
        matrix: Any = self._linears[name].weight
        return matrix.shape[1]

    def weight(self, name: str) -> Float[Tensor, "d_out d_in"]:
        matrix: Any = self._linears[name].weight
        return matrix.detach().to(self.dtype, copy=True)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        bias: Any = self._linears[name].bias
        return None if bias is None else bias.detach().to(self.dtype)

    def in_matrix(self, name: str, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        return read, write

    def clean(self, batch: Tensor) -> Clean:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with torch.no_grad():
            out = self._run(batch, {n: _Recorder(n, inputs, outputs) for n in self.names})
        return Clean(batch, inputs, outputs, out)

    def forward(self, clean: Clean, functions: Mapping[str, Adjust]) -> Tensor:
        return self._run(clean.batch, functions)

    def _run(self, batch: Tensor, functions: Mapping[str, Adjust]) -> Tensor:
        with ExitStack() as stack:
            for name, function in functions.items():
                handle = self._linears[name].register_forward_hook(
                    lambda _m, args, y, f=function: f(args[0], y)
                )
                stack.callback(handle.remove)
            return self.module(batch.to(self.device))

    @contextmanager
    def prepared(self, speed: SpeedConfig) -> Iterator[None]:
        training = self.module.training
        self.module.eval()
        with _frozen(self.module), switched(speed, self.module):
            try:
                yield
            finally:
                self.module.train(training)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within the context no parameter of the host asks for a gradient."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@dataclass(eq=False)
class LensHost:
    """A host over a live language model.

    Args:
        lens: any backend. select: globs over its sites. prefix: start masked forwards at the
            first decomposed block (exact; skips what no mask can change).

    Raises:
        SiteError: a pattern that matches nothing. ConfigError: the handle carries an edit of a
            decomposed matrix.
    """

    lens: Lens
    select: Sequence[str] | str | None = None
    prefix: bool = True
    metric: Metric = "kl"

    def __post_init__(self) -> None:
        self._sites = {site.name: site for site in self.lens.sites(self.select)}
        self.names = tuple(self._sites)
        self.adds_updates = False
        self.layers: Mapping[str, int | None] = {n: s.layer for n, s in self._sites.items()}
        self.dtype = torch.float64 if self.lens.dtype == torch.float64 else torch.float32
        edit = getattr(self.lens, "edit", None)
        if edit is not None and set(edit.weights) & set(self.names):
            raise ConfigError(
                "model to decompose",
                given=f"a handle that edits {sorted(set(edit.weights) & set(self.names))[:3]}",
                expected="a model whose own matrices are the ones to decompose",
                remedy="Decompose the unedited model, or save the edited one and load it.",
            )
        self.scales: dict[str, float] = {}
        if "embed" in self._sites:
            self.scales["embed"] = self.lens.embed_scale()
        layers = [layer for layer in self.layers.values() if layer is not None]
        outside = any(s.kind == "embed" for s in self._sites.values())
        self._first = min(layers) if layers and not outside and min(layers) > 0 else None
        self._skips = self.prefix

    @property
    def device(self) -> torch.device:
        return self.lens.device

    @property
    def fingerprint(self) -> str:
        return self.lens.fingerprint

    def site(self, name: str) -> Site | None:
        return self._sites[name]

    def width(self, name: str) -> int:
        site = self._sites[name]
        return site.d_out if name in self.scales else site.d_in

    def weight(self, name: str) -> Float[Tensor, "d_out d_in"]:
        if self.dtype == torch.float64:
            return self.lens.stored(name).to(torch.float64, copy=True)
        return self.lens.weight(name)

    def bias(self, name: str) -> Float[Tensor, " d_out"] | None:
        bias = self.lens.bias(name)
        return None if bias is None else bias.to(self.dtype)

    def in_matrix(self, name: str, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        return read, write

    def clean(self, batch: Tensor) -> Clean:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        recorders = {n: _Recorder(n, inputs, outputs) for n in self.names}
        first = f"resid_pre.{self._first}" if self._skips and self._first is not None else None
        with torch.no_grad(), self.lens.adjusted(recorders):
            if first is None:
                return Clean(batch, inputs, outputs, self.lens.forward(batch))
            result = self.lens.run(batch, capture=(first,))
        assert result.logits is not None
        return Clean(batch, inputs, outputs, result.logits, result.captured[first])

    def forward(self, clean: Clean, functions: Mapping[str, Adjust]) -> Tensor:
        with self.lens.adjusted(functions):
            return self.lens.forward(clean.batch, start=self.start_of(clean))

    def start_of(self, clean: Clean) -> tuple[int, Tensor] | None:
        """Where a masked pass of this batch begins (`Lens.forward`), None for the beginning."""
        if clean.start is None or self._first is None:
            return None
        return self._first, clean.start

    @contextmanager
    def prepared(self, speed: SpeedConfig) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.lens.evaluation())
            stack.enter_context(_frozen(self.lens.root))
            stack.enter_context(switched(speed, self.lens.root))
            if speed.written_attention and self.device.type == "cpu":
                stack.enter_context(self.lens.written_attention())
            self._skips = self.prefix and speed.prefix
            try:
                yield
            finally:
                self._skips = self.prefix
