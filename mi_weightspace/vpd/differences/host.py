"""A host whose decomposed matrices are *differences* between training stages.

The last stage is the host; at every decomposed matrix it computes the first stage's matrix plus the
masked updates of all stages,

    y = W̃_0 x + b̃_0 + Σ_k f_k(x, dW_k x),

where ``f_k`` is the engine's own masked function with dW_k in the place of the matrix and no bias.
All masks 0 is the first stage (wherever nothing else differs, bit for bit), all masks 1 the last.
Parameters that are not decomposed stay at the last stage's values: the model at m = d = 0 is then a
*carrier*, whose distance to the first stage is reported as unexplained (vpd.md §9).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.core.site import Site
from mi_weightspace.models.lens import Lens
from mi_weightspace.vpd.config import SpeedConfig
from mi_weightspace.vpd.differences.updates import Start, Update
from mi_weightspace.vpd.host import Clean, LensHost, Metric, ModuleHost
from mi_weightspace.vpd.masked import Adjust

Features = Literal["tuned", "tuned_and_change"]


class Outputs(Mapping[str, Tensor]):
    """Outputs of the whole updates, computed when asked for: training seldom does."""

    def __init__(self, updates: Mapping[str, Update], inputs: Mapping[str, Tensor]) -> None:
        self.updates, self.inputs = updates, inputs

    def __getitem__(self, name: str) -> Tensor:
        return whole_update(self.updates[name], self.inputs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)


def whole_update(update: Update, inner: Tensor) -> Tensor:
    """``dW x`` in the core's coordinates; for token ids, the change of their embeddings."""
    if not inner.is_floating_point():
        return F.embedding(inner, update.core.T)
    return update.whole(inner)


class _Algebra:
    """From masked functions of updates to functions of matrices; shared by both hosts."""

    updates: Mapping[str, Update]
    starts: Mapping[str, Start]
    scales: Mapping[str, float]

    def in_matrix(self, name: str, read: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        update = self.updates[name]
        return update.full_read(read), update.full_write(write)

    def of_matrices(self, functions: Mapping[str, Adjust]) -> dict[str, Callable[[Tensor], Tensor]]:
        """A function ``x -> y`` for every matrix with a masked update."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        for matrix, own in self._by_matrix.items():
            if any(update.name in functions for update in own):
                found[matrix] = self._of_matrix(matrix, own, functions)
        return found

    @property
    def _by_matrix(self) -> dict[str, list[Update]]:
        grouped: dict[str, list[Update]] = {}
        for update in self.updates.values():
            grouped.setdefault(update.site.name, []).append(update)
        return grouped

    def _of_matrix(
        self, matrix: str, own: Sequence[Update], functions: Mapping[str, Adjust]
    ) -> Callable[[Tensor], Tensor]:
        start, scale = self.starts[matrix], self.scales.get(own[0].name)

        def run(x: Tensor) -> Tensor:
            if scale is not None:
                y = F.embedding(x, start.weight.T) * scale
            else:
                y = F.linear(x, start.weight, start.bias)
            for update in own:
                inner = x if scale is not None else update.inner(x)
                full = whole_update(update, inner) * (1.0 if scale is None else scale)
                function = functions.get(update.name)
                change = full if function is None else function(inner, full)
                y = y + update.outer(change).to(y.dtype)
            return y

        return run

    def _placed(
        self, starts: Mapping[str, Start], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Start]:
        def moved(x: Tensor) -> Tensor:
            return x.detach().to(device, dtype)

        return {
            name: Start(moved(s.weight), None if s.bias is None else moved(s.bias))
            for name, s in starts.items()
        }

    def _fingerprint(self, last: str) -> str:
        digest = hashlib.sha256(last.encode())
        for update in self.updates.values():
            digest.update(update.name.encode())
            digest.update(update.core.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()[:16]


class DifferenceHost(_Algebra):
    """Updates of a language model's matrices (`updates.updates`), the last stage at hand.

    Args:
        lens: the last stage; never changed. updates: in model order, stages in training order.
        starts: matrix -> what the first stage computes there.
        features: what the importance network reads at a site: the last stage's input there, or
            that and its change since the first stage (one more forward pass a batch).

    Attributes:
        names: ``MATRIX@STAGE``.
    """

    metric: Metric = "kl"
    adds_updates: bool = True

    def __init__(
        self,
        lens: Lens,
        updates: Sequence[Update],
        starts: Mapping[str, Start],
        *,
        features: Features = "tuned",
        prefix: bool = True,
    ) -> None:
        matrices = list(dict.fromkeys(u.site.name for u in updates))
        self.inner = LensHost(lens, matrices, prefix=prefix)
        self.lens, self.features = lens, features
        self.dtype = self.inner.dtype
        self.updates = {u.name: u.to(lens.device, self.dtype, lens.dtype) for u in updates}
        self.starts = self._placed(starts, lens.device, lens.dtype)
        self.names = tuple(self.updates)
        self.layers: Mapping[str, int | None] = {n: u.site.layer for n, u in self.updates.items()}
        scale = self.inner.scales
        self.scales: Mapping[str, float] = {
            n: scale[u.site.name] for n, u in self.updates.items() if u.site.name in scale
        }

    @property
    def device(self) -> torch.device:
        return self.lens.device

    @property
    def fingerprint(self) -> str:
        return self._fingerprint(f"{self.lens.fingerprint} {self.features}")

    def site(self, name: str) -> Site | None:
        return self.updates[name].site

    def width(self, name: str) -> int:
        width = self.inner.width(self.updates[name].site.name)
        return 2 * width if self.features == "tuned_and_change" else width

    def weight(self, name: str) -> Float[Tensor, "rows columns"]:
        return self.updates[name].core

    def bias(self, name: str) -> Float[Tensor, " rows"] | None:
        """None: a change of the bias is a column of the matrix."""
        return None

    def clean(self, batch: Tensor) -> Clean:
        """The last stage's own pass; `inputs` are what the updates' cores read."""
        last = self.inner.clean(batch)
        beside: dict[str, Tensor] = {}
        if self.features == "tuned_and_change":
            beside = self._first_inputs(last)
        inputs, seen = {}, {}
        for name, update in self.updates.items():
            matrix = update.site.name
            x = last.inputs[matrix]
            inputs[name] = x if name in self.scales else update.inner(x)
            seen[name] = last.features(matrix)
            if matrix in beside:
                seen[name] = torch.cat([seen[name], seen[name] - beside[matrix]], dim=-1)
        outputs = Outputs(self.updates, inputs)
        return replace(last, inputs=inputs, outputs=outputs, seen=seen)

    @torch.no_grad()
    def _first_inputs(self, last: Clean) -> dict[str, Tensor]:
        """What the importance network reads of the carrier: its inputs (embeddings: outputs)."""
        found: dict[str, Tensor] = {}
        nothing = {name: lambda _x, y: torch.zeros_like(y) for name in self.names}
        reverted = self.of_matrices(nothing)

        def noting(matrix: str, function: Callable[[Tensor], Tensor]) -> Callable:
            def noted(x: Tensor) -> Tensor:
                y = function(x)
                found[matrix] = x if x.is_floating_point() else y
                return y

            return noted

        with self.lens.replaced({m: noting(m, f) for m, f in reverted.items()}):
            self.lens.forward(last.batch, start=self.inner.start_of(last))
        return found

    def forward(self, clean: Clean, functions: Mapping[str, Adjust]) -> Tensor:
        with self.lens.replaced(self.of_matrices(functions)):
            return self.lens.forward(clean.batch, start=self.inner.start_of(clean))

    @contextmanager
    def prepared(self, speed: SpeedConfig) -> Iterator[None]:
        with self.inner.prepared(speed):
            yield


class ModuleDifferenceHost(_Algebra):
    """The same over two torch modules of one shape (toys).

    Args:
        last: the fine-tuned module, called as ``last(batch)``. sites: site name -> path of its
            `nn.Linear`. updates, starts: as `toys.module_difference` makes them.
    """

    metric: Metric = "mse"
    adds_updates: bool = True

    def __init__(
        self,
        last: nn.Module,
        sites: Mapping[str, str],
        updates: Sequence[Update],
        starts: Mapping[str, Start],
    ) -> None:
        self.inner = ModuleHost(last, sites)
        self.dtype = self.inner.dtype
        self.updates = {u.name: u.to(self.inner.device, self.dtype, self.dtype) for u in updates}
        self.starts = self._placed(starts, self.inner.device, self.dtype)
        self.names = tuple(self.updates)
        self.layers: Mapping[str, int | None] = dict.fromkeys(self.names)
        self.scales: Mapping[str, float] = {}

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def fingerprint(self) -> str:
        return self._fingerprint(self.inner.fingerprint)

    def site(self, name: str) -> Site | None:
        return None

    def width(self, name: str) -> int:
        return self.inner.width(self.updates[name].site.name)

    def weight(self, name: str) -> Float[Tensor, "rows columns"]:
        return self.updates[name].core

    def bias(self, name: str) -> Float[Tensor, " rows"] | None:
        return None

    def clean(self, batch: Tensor) -> Clean:
        last = self.inner.clean(batch)
        inputs = {n: u.inner(last.inputs[u.site.name]) for n, u in self.updates.items()}
        seen = {n: last.inputs[u.site.name] for n, u in self.updates.items()}
        return replace(last, inputs=inputs, outputs=Outputs(self.updates, inputs), seen=seen)

    def forward(self, clean: Clean, functions: Mapping[str, Adjust]) -> Tensor:
        reverted = self.of_matrices(functions)
        own: dict[str, Adjust] = {m: lambda x, _y, f=f: f(x) for m, f in reverted.items()}
        return self.inner.forward(clean, own)

    @contextmanager
    def prepared(self, speed: SpeedConfig) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.inner.prepared(speed))
            yield
