"""The narrow protocol every method sees a live model through, and `load`, which makes one.

No method knows which library runs the forward pass; a backend is one file in `backends/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space

if TYPE_CHECKING:
    from mi_weightspace.models.grammar import ModelShape

Backend = Literal["torch", "transformer_lens", "nnsight"]
SiteFunction = Callable[[Float[Tensor, "*batch d_in"]], Float[Tensor, "*batch d_out"]]
"""Replaces a matrix *and its bias*: receives the site's input, returns the site's output."""

SiteAdjustment = Callable[
    [Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_out"]], Float[Tensor, "*batch d_out"]
]
"""Changes what a matrix returned: receives the site's input and the host's own output."""


@dataclass(frozen=True)
class Edit:
    """A change of a model, as a value.

    Attributes:
        weights: site name -> the matrix to use instead, (d_out, d_in).
        stream: stream point name -> function of the whole activation (batch, tokens, d_model).
    """

    weights: Mapping[str, Float[Tensor, "d_out d_in"]] = field(default_factory=dict)
    stream: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RunResult:
    """Logits (None when the run stopped early) and captured tensors, each (batch, tokens, d)."""

    logits: Float[Tensor, "batch tokens vocab"] | None
    captured: Mapping[str, Float[Tensor, "batch tokens d"]]


class Lens(Protocol):
    """A live model. The wrapped object is never left changed.

    Attributes:
        shape: family, layer count, widths, vocabulary (`models.grammar.ModelShape`).
        tokenizer: a Hugging Face tokenizer, or None (then only token ids are accepted).
        fingerprint: hash of configuration and raw weights.
        convention: ``raw`` (processed weights are refused at construction).
        device, dtype: of the parameters.
        model: the user's own object.
    """

    @property
    def shape(self) -> ModelShape: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def convention(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def model(self) -> Any: ...

    @property
    def root(self) -> nn.Module:
        """The torch module whose forward pass is run."""
        ...

    def sites(self, select: str | Sequence[str] | None = None) -> list[Site]: ...

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        """A float32 copy of the raw matrix."""
        ...

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        """The matrix in its own precision."""
        ...

    def embed_scale(self) -> float:
        """Factor between the embedding matrix's column and what the module returns."""
        ...

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None: ...

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        """Gain of the norm feeding the matrix (offset applied), or None."""
        ...

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        """Bias of the norm feeding the matrix, or None."""
        ...

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        """Gain of the post-norm between the matrix and the stream, or None."""
        ...

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
        """One forward pass.

        Args:
            capture: Space names (``resid_post.3``, ``attn_z.1``, ``mlp_hidden.2``) or
                ``SITE:in`` / ``SITE:out`` for the matrix's own input and output.
            logits: False lets the run stop after the last captured point.
            grad: keep the autograd graph (default: `torch.no_grad`).
        """
        ...

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        start: tuple[int, Float[Tensor, "batch tokens d_model"]] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits alone, for training loops: gradients as the caller's mode says.

        The modules' modes are checked at every call unless it is made within `evaluation`.

        Args:
            start: (layer, what enters that block, as captured at ``resid_pre.LAYER`` on the same
                tokens). The embeddings and the blocks in front are not computed; the logits are
                those of the whole pass, bit for bit.

        Raises:
            SiteError: a start outside the model, or a residual of another shape.
            ArchitectureError: a model that cannot be started in the middle.
        """
        ...

    def evaluation(self) -> AbstractContextManager[None]:
        """Within the context the model is in evaluation mode, checked once, on entering."""
        ...

    def written_attention(self) -> AbstractContextManager[None]:
        """Within the context attention is written out: matrix products and a softmax.

        Equal to the default up to rounding. Alone it is no faster; under
        `arithmetic.fast_float32` it is, and the fused kernel is slower there than without.
        """
        ...

    def replaced(self, functions: Mapping[str, SiteFunction]) -> AbstractContextManager[None]:
        """Within the context, each named site computes its function; gradients flow."""
        ...

    def adjusted(self, functions: Mapping[str, SiteAdjustment]) -> AbstractContextManager[None]:
        """Within the context each named site's output (bias included) is ``f(x, y_host)``.

        `x` is the site's input (token ids for ``embed``) and `y_host` what the host's own module
        returned, bit for bit: an edited host's where an edit or `replaced` is active, an outer
        function's where contexts are nested. Sites fused with these keep their rows; the user's
        own hooks come after. Gradients flow into what `f` closes over and through both arguments.

        Raises:
            SiteError: an unknown site, or (when run) a value that is not of `y_host`'s shape.
        """
        ...

    def with_edit(self, edit: Edit) -> Lens:
        """A handle whose runs carry the edit; this one is unchanged."""
        ...

    def points(self) -> list[Space]:
        """Stream points in forward order, each once: ``resid_pre.0``, then mid and post."""
        ...
