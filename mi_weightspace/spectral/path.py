"""Path attribution: which matrices carry a behaviour from one stage to the next.

Integrated gradients (Sundararajan et al. 2017) of a behavioural readout F along the straight path
``W(t) = W_before + t D`` through all matrices at once: the share of a matrix is
``∫₀¹ ⟨∂F/∂W (W(t)), D⟩ dt``, here by Gauss-Legendre quadrature, one forward and backward pass a
node. Shares of the decomposable matrices add up to the change of F that they cause together;
everything else that differs (norm gains, biases, embeddings that cannot be swapped) is one further
row, measured and not integrated. The completeness error is printed.

The top matrices are then confirmed by single interventions: reverted alone in the later stage,
and added alone to the earlier one. Only a readout justifies the word ``carries``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.models.lens import Edit, Lens

if TYPE_CHECKING:
    from mi_weightspace.core.site import Site
    from mi_weightspace.models.weights import WeightSource

REST = "everything else"


class ReadoutLike(Protocol):
    """What is asked of `core.readout.Readout`: token ids with a mask, and a scalar of logits."""

    @property
    def name(self) -> str: ...

    def tokens(
        self, tokenizer: object
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]: ...

    def value(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, ""]: ...


@dataclass(frozen=True, eq=False)
class PathAttribution:
    """Shares of one step.

    Attributes:
        sites: names, then ``everything else``.
        share: (n_sites + 1,) in the readout's unit (log-odds); they add up to `change` but for
            `completeness_error`.
        revert, add: change of F when one matrix alone is put back in the later stage (sign such
            that a carrier is positive), or added alone to the earlier one; NaN where not run.
        before, after: F at the two stages.
        completeness_error: |Σ share − change| / |change|.
        n_nodes, n_prompts: quadrature nodes and prompts of the readout.
    """

    readout: str
    sites: tuple[str, ...]
    share: Float[Tensor, " n"]
    revert: Float[Tensor, " n"]
    add: Float[Tensor, " n"]
    before: float
    after: float
    completeness_error: float
    n_nodes: int
    n_prompts: int

    @property
    def change(self) -> float:
        return self.after - self.before


def read_value(lens: Lens, readout: ReadoutLike, *, edit: Edit | None = None) -> float:
    """F on a lens, with an optional edit; no gradient."""
    tokens, mask, last = readout.tokens(lens.tokenizer)
    run = lens.run(tokens, attention_mask=mask, edit=edit)
    assert run.logits is not None
    return float(readout.value(run.logits[torch.arange(len(last)), last]))


def _replacement(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.linear(
        x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )


def _gradient_node(
    lens: Lens,
    readout: ReadoutLike,
    sites: Sequence[Site],
    before: WeightSource,
    after: WeightSource,
    t: float,
) -> tuple[dict[str, float], float]:
    """⟨∂F/∂W, D⟩ of every site at one point of the path, and F there."""
    tokens, mask, last = readout.tokens(lens.tokenizer)
    leaves: dict[str, Tensor] = {}
    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    for site in sites:
        blended = torch.lerp(before.weight(site), after.weight(site), t).to(lens.device)
        leaves[site.name] = blended.requires_grad_()
        functions[site.name] = _replacement(blended, lens.bias(site))
    with lens.replaced(functions):
        run = lens.run(tokens, attention_mask=mask, grad=True)
    assert run.logits is not None
    value = readout.value(run.logits[torch.arange(len(last)), last])
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    shares: dict[str, float] = {}
    for site, gradient in zip(sites, gradients, strict=True):
        if gradient is None:
            shares[site.name] = 0.0
            continue
        difference = after.weight(site) - before.weight(site)
        shares[site.name] = float((gradient.cpu().double() * difference.double()).sum())
    return shares, float(value.detach())


def path_attribution(
    lens: Lens,
    before: WeightSource,
    after: WeightSource,
    readout: ReadoutLike,
    *,
    value_after: float,
    sites: Sequence[Site] | None = None,
    n_nodes: int = 8,
    progress: Callable[[float], None] | None = None,
) -> PathAttribution:
    """Integrated gradients of `readout` from `before` to `after` over all matrices.

    Args:
        lens: a live model of the *earlier* stage; left unchanged.
        before, after: the two stages' weights, streamed matrix by matrix.
        value_after: F of the later stage (from its own pass, so that both are never resident).
        sites: the matrices that move together; default: every block matrix and the unembedding.
        n_nodes: Gauss-Legendre nodes; raise it when the completeness error is large.
        progress: called with the share of nodes done.
    """
    moved = [s for s in (lens.sites() if sites is None else sites) if s.kind != "embed"]
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    totals = dict.fromkeys([s.name for s in moved], 0.0)
    for index, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        shares, _ = _gradient_node(lens, readout, moved, before, after, float(node + 1) / 2)
        for name, share in shares.items():
            totals[name] += float(weight) / 2 * share
        if progress is not None:
            progress((index + 1) / n_nodes)
    value_before = read_value(lens, readout)
    moved_all = Edit(weights={s.name: after.weight(s) for s in moved})
    value_sites = read_value(lens, readout, edit=moved_all)
    rest = value_after - value_sites
    names = (*totals, REST)
    share = torch.tensor([*totals.values(), rest], dtype=torch.float64)
    change = value_after - value_before
    error = abs(float(share.sum()) - change) / abs(change) if change else float("nan")
    blank = torch.full((len(names),), torch.nan, dtype=torch.float64)
    return PathAttribution(
        readout=readout.name,
        sites=names,
        share=share,
        revert=blank,
        add=blank.clone(),
        before=value_before,
        after=value_after,
        completeness_error=error,
        n_nodes=n_nodes,
        n_prompts=int(readout.tokens(lens.tokenizer)[0].shape[0]),
    )


def single_effects(
    lens: Lens, other: WeightSource, readout: ReadoutLike, sites: Sequence[str]
) -> Mapping[str, float]:
    """F with one matrix at a time taken from `other`, minus F of `lens` unchanged."""
    reference = read_value(lens, readout)
    named = {s.name: s for s in lens.sites()}
    return {
        name: read_value(lens, readout, edit=Edit(weights={name: other.weight(named[name])}))
        - reference
        for name in sites
    }
