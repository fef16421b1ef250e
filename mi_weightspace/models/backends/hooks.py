"""What every backend shares: captures, stream edits and early stopping by torch hooks.

A backend says where its matrices live (`tap`, `_raw`, `_replacing`) and how to run (`_forward`);
hooks, edits, the edited handle and the fingerprint are here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_weightspace.core.errors import ArchitectureError, SiteError
from mi_weightspace.core.site import Site, select_sites
from mi_weightspace.core.space import Space
from mi_weightspace.models.backends.adjust import Rows, hooked, site_hooks
from mi_weightspace.models.backends.taps import (
    StopForward,
    StreamFunction,
    Tap,
    capturing,
    streaming,
)
from mi_weightspace.models.fingerprint import fingerprint
from mi_weightspace.models.grammar import ModelShape, sites_of
from mi_weightspace.models.lens import Edit, RunResult, SiteAdjustment, SiteFunction


@dataclass(eq=False)
class HookedLens(ABC):
    """A `Lens` whose captures and stream edits are torch hooks.

    Args:
        model: the user's object; left as it is after every call.
        tokenizer: a Hugging Face tokenizer, or None.
        edit: what every run of this handle carries; `weight` answers with the edited matrix.
    """

    model: Any
    tokenizer: Any = None
    edit: Edit | None = None
    convention: str = "raw"

    def __post_init__(self) -> None:
        self.shape: ModelShape = self._read_shape()
        self._sites = {site.name: site for site in sites_of(self.shape)}
        self._identity: tuple[int, str] | None = None
        self._evaluations = 0

    # ---- what a backend provides -----------------------------------------------------------
    @property
    @abstractmethod
    def root(self) -> nn.Module:
        """The module whose forward pass is run."""

    @abstractmethod
    def _read_shape(self) -> ModelShape: ...

    @abstractmethod
    def _raw(self, site: Site) -> Float[Tensor, "d_out d_in"]: ...

    @abstractmethod
    def _raw_bias(self, site: Site) -> Float[Tensor, " d_out"] | None: ...

    @abstractmethod
    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None: ...

    @abstractmethod
    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None: ...

    @abstractmethod
    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None: ...

    @abstractmethod
    def unembed(self) -> tuple[StreamFunction, Float[Tensor, "vocab d_model"]]:
        """The final norm and W_U; the logits are their product before any soft cap."""

    @abstractmethod
    def _forward(
        self, tokens: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens vocab"]: ...

    @abstractmethod
    def _resumed(
        self,
        layer: int,
        residual: Float[Tensor, "batch tokens d_model"],
        tokens: Int[Tensor, "batch tokens"],
        mask: Int[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The forward pass from the block `layer` on, nothing in front of it computed."""

    @abstractmethod
    def _site_tap(self, site: Site, side: Literal["in", "out"]) -> Tap: ...

    @abstractmethod
    def _stream_tap(self, space: Space) -> Tap | None:
        """A point of the residual stream, None where the model has no such point."""

    @abstractmethod
    def _replacing(
        self, functions: Mapping[str, SiteFunction]
    ) -> AbstractContextManager[None, bool | None]: ...

    @abstractmethod
    def _output(self, name: str) -> tuple[nn.Module, Rows | None]:
        """The module whose output is the site's, and which of its coordinates are (None: all)."""

    def embed_scale(self) -> float:
        """Factor between the embedding matrix's column and what the module returns."""
        return 1.0

    # ---- facts -----------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return next(self.root.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.root.parameters()).dtype

    @property
    def fingerprint(self) -> str:
        versions = [(p.data_ptr(), p._version) for p in self.root.parameters()]
        state = hash(tuple(versions))
        if self._identity is None or self._identity[0] != state:
            self._identity = state, fingerprint(self)
        return self._identity[1] + ("+edit" if self.edit is not None and self.edit.stream else "")

    def sites(self, select: str | Sequence[str] | None = None) -> list[Site]:
        return select_sites(self._sites.values(), select)

    def site(self, site: Site | str) -> Site:
        name = str(site)
        if name not in self._sites:
            select_sites(self._sites.values(), name)  # raises, naming the nearest
        return self._sites[name]

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        """The matrix in its own precision, canonical orientation."""
        name = str(site)
        if self.edit is not None and name in self.edit.weights:
            return self.edit.weights[name].detach()
        return self._raw(self.site(site))

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        return self.stored(site).to(torch.float32, copy=True)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        bias = self._raw_bias(self.site(site))
        return None if bias is None else bias.to(torch.float32, copy=True)

    def points(self) -> list[Space]:
        points = [Space("resid_pre", 0)]
        for layer in range(self.shape.n_layers):
            if not self.shape.parallel:
                points.append(Space("resid_mid", layer))
            points.append(Space("resid_post", layer))
        return points

    # ---- running ---------------------------------------------------------------------------
    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with evaluating(self.root):
            self._evaluations += 1
            try:
                yield
            finally:
                self._evaluations -= 1

    @contextmanager
    def written_attention(self) -> Iterator[None]:
        found = [getattr(module, "config", None) for module in self.root.modules()]
        configs: dict[int, Any] = {
            id(config): config for config in found if hasattr(config, "_attn_implementation")
        }
        before = [(config, config._attn_implementation) for config in configs.values()]
        try:
            for config in configs.values():
                config._attn_implementation = "eager"
            yield
        finally:
            for config, name in before:
                config._attn_implementation = name

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        start: tuple[int, Float[Tensor, "batch tokens d_model"]] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        if start is not None:
            self._check_start(tokens, *start)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with ExitStack() as stack:
            if not self._evaluations:
                stack.enter_context(evaluating(self.root))
            if self.edit is not None:
                stack.enter_context(self._edited(self.edit))
            if start is not None:
                return self._resumed(*start, tokens.to(self.device), mask)
            return self._forward(tokens.to(self.device), mask)

    def _check_start(self, tokens: Tensor, layer: int, residual: Tensor) -> None:
        expected = (*tokens.shape, self.shape.d_model)
        if not 0 <= layer < self.shape.n_layers or residual.shape != expected:
            raise SiteError(
                f"start of a forward pass at block {layer}",
                given=f"a residual of shape {tuple(residual.shape)}",
                expected=f"a block below {self.shape.n_layers} and shape {expected}",
                remedy="Capture `resid_pre.LAYER` on the same tokens.",
            )

    def run(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        capture: Sequence[str] = (),
        edit: Edit | None = None,
        logits: bool = True,
        grad: bool = False,
    ) -> RunResult:
        wanted = list(dict.fromkeys(capture))
        captured: dict[str, Tensor] = {}
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        left = [len(wanted)]

        def keep(name: str, value: Tensor) -> None:
            captured[name] = value
            left[0] -= 1
            if not logits and left[0] == 0:
                raise StopForward

        out: Tensor | None = None
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(evaluating(self.root))
            for change in (self.edit, edit):
                if change is not None:
                    stack.enter_context(self._edited(change))
            for name in wanted:
                stack.enter_context(capturing(self.tap(name), name, keep))
            try:
                out = self._forward(tokens.to(self.device), mask.to(self.device))
            except StopForward:
                out = None
        missing = [name for name in wanted if name not in captured]
        if missing:
            raise ArchitectureError(
                f"capture of {missing[0]!r} in this {self.shape.family} model",
                given="a module that the forward pass never calls",
                expected="every module of the family's table to run",
                remedy="Pass the object that runs the model (a TransformerBridge, not its parts).",
            )
        return RunResult(out if logits else None, captured)

    def tap(self, name: str) -> Tap:
        """Where a capture name is read.

        Raises:
            SiteError: a name that is neither a point of this model nor ``SITE:in``/``SITE:out``.
        """
        stem, colon, side = name.rpartition(":")
        if colon and side in {"in", "out"}:
            return self._site_tap(self.site(stem), side)  # pyright: ignore[reportArgumentType]
        space = Space.parse(name)
        found: Tap | None = None
        if space.layer is not None and 0 <= space.layer < self.shape.n_layers:
            if space.is_stream:
                found = self._stream_tap(space)
            elif space.point in _POINT_SITES:
                kind, where = _POINT_SITES[space.point]
                site = self._sites.get(f"blocks.{space.layer}.{kind}")
                found = None if site is None else self._site_tap(site, where)
        if found is None:
            raise SiteError(
                f"capture point {name!r}",
                given=f"no point of this {self.shape.n_layers}-layer {self.shape.family} model",
                expected="resid_pre.L, resid_mid.L, resid_post.L, attn_z.L, … or SITE:in",
                remedy="List the sites with `mi-weightspace sites MODEL`.",
            )
        return found

    # ---- changing --------------------------------------------------------------------------
    @contextmanager
    def replaced(self, functions: Mapping[str, SiteFunction]) -> Iterator[None]:
        for name in functions:
            self.site(name)
        with self._replacing(functions):
            yield

    def adjusted(
        self, functions: Mapping[str, SiteAdjustment]
    ) -> AbstractContextManager[None, bool | None]:
        for name in functions:
            self.site(name)
        return self._adjusting(functions)

    def _adjusting(
        self, functions: Mapping[str, SiteAdjustment]
    ) -> AbstractContextManager[None, bool | None]:
        return hooked(site_hooks((n, *self._output(n), f) for n, f in functions.items()))

    def with_edit(self, edit: Edit) -> HookedLens:
        if self.edit is not None:
            edit = combine(self.edit, edit)
        for name, matrix in edit.weights.items():
            self._check_edit(name, matrix)
        return replace(self, edit=edit)

    @contextmanager
    def _edited(self, edit: Edit) -> Iterator[None]:
        functions = {name: self._use_weight(name, w) for name, w in edit.weights.items()}
        with ExitStack() as stack:
            stack.enter_context(self.replaced(functions))
            for name, change in edit.stream.items():
                stack.enter_context(streaming(self.tap(name), change))
            yield

    def _check_edit(self, name: str, matrix: Tensor) -> None:
        site = self.site(name)
        if matrix.shape != (site.d_out, site.d_in):
            raise SiteError(
                f"edit of {name}",
                given=f"a matrix of shape {tuple(matrix.shape)}",
                expected=f"({site.d_out}, {site.d_in}), output by input",
                remedy="Transpose it, or pick the site it belongs to.",
            )

    def _use_weight(self, name: str, weight: Tensor) -> SiteFunction:
        self._check_edit(name, weight)
        bias = self._raw_bias(self.site(name))
        matrix = weight.to(self.device, self.dtype)
        if name == "embed":
            scale = self.embed_scale()
            return lambda ids: nn.functional.embedding(ids, matrix.T) * scale
        return lambda x: nn.functional.linear(x, matrix, bias)


_POINT_SITES: dict[str, tuple[str, Literal["in", "out"]]] = {
    "attn_z": ("attn.o", "in"),
    "mlp_hidden": ("mlp.out", "in"),
    "attn_q": ("attn.q", "out"),
    "attn_k": ("attn.k", "out"),
    "attn_v": ("attn.v", "out"),
    "mlp_gate": ("mlp.gate", "out"),
    "mlp_in": ("mlp.in", "out"),
}


def combine(first: Edit, second: Edit) -> Edit:
    """Both edits: a later matrix wins, stream functions of one point are composed."""
    stream = dict(first.stream)
    for name, change in second.stream.items():
        stream[name] = _then(stream[name], change) if name in stream else change
    return Edit(weights={**first.weights, **second.weights}, stream=stream)


def _then(first: StreamFunction, second: StreamFunction) -> StreamFunction:
    return lambda x: second(first(x))


def forward_arguments(tokens: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Arguments of a Hugging Face forward pass; positions are given where rows are left-padded.

    GPT-2 numbers positions from the first column, mask or not: without `position_ids` a
    left-padded prompt would be read from the wrong position on, in silence.
    """
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    if mask is not None and bool((mask[:, 0] == 0).any()):
        arguments["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return arguments


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Evaluation mode (dropout would make every number random); each module's own mode returns."""
    training = [module for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
