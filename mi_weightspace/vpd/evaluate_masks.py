"""The maskings a decomposition is read under, and what one batch gives under each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.vpd.host import Clean
from mi_weightspace.vpd.ladder import importances
from mi_weightspace.vpd.losses import CHUNK, Target
from mi_weightspace.vpd.masked import Adjust, Masks
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import Draws, lifted

NEAR_ONE = 0.9
HIDDEN_UNDER = ("ci", "stoch")
MONITORS = ("ci", "rounded")
"""Maskings that must never be optimised: reconstruction under them is trivially driven to 0."""


def rounded_name(threshold: float) -> str:
    return f"rounded>{threshold:g}"


def masking_names(thresholds: Sequence[float]) -> tuple[str, ...]:
    rounded = (rounded_name(t) for t in thresholds)
    return ("ci", "unmasked", *rounded, "random", "zero", "stoch", "full", "delta_only")


def maskings(
    low: Float[Tensor, "*pos K"], n_sites: int, thresholds: Sequence[float], draws: Draws, at: int
) -> Iterator[tuple[str, Masks]]:
    """Name and masks, one at a time, for every name of `masking_names`.

    ``ci`` m=g; ``unmasked`` m=1; ``rounded>τ`` m=1[g>τ]; ``random`` m~U; ``zero`` m=0: the
    remainder off (d=0). ``stoch``: m=g+(1−g)r and d sampled. ``full``: m=d=1, the host itself.
    ``delta_only``: m=0, d=1.
    """
    k = low.shape[-1]
    ones, zeros = low.new_ones(k), low.new_zeros(k)
    all_delta = low.new_ones(n_sites)
    yield "ci", Masks(low)
    yield "unmasked", Masks(ones)
    for threshold in thresholds:
        yield rounded_name(threshold), Masks((low > threshold).to(low.dtype))
    draw = draws.generator("evaluate", "random", at)
    yield "random", Masks(draws.uniform(tuple(low.shape), draw, whole=True))
    yield "zero", Masks(zeros)
    draw = draws.generator("evaluate", "stoch", at)
    r = draws.uniform(tuple(low.shape), draw, whole=True)
    d = draws.uniform((*low.shape[:-1], n_sites), draw, whole=True)
    yield "stoch", Masks(lifted(low, r), d)
    yield "full", Masks(ones, all_delta)
    yield "delta_only", Masks(zeros, all_delta)


def next_token_ce(
    logits: Float[Tensor, "batch tokens vocab"], tokens: Int[Tensor, "batch tokens"]
) -> float:
    """Cross-entropy in nats of every token but the first of its row, given the ones before it."""
    flat = logits[:, :-1].flatten(0, 1)
    labels = tokens[:, 1:].flatten().to(flat.device)
    rows = max(1, CHUNK // flat.shape[-1])
    wide = torch.promote_types(flat.dtype, torch.float32)
    total = 0.0
    for q, y in zip(flat.split(rows), labels.split(rows), strict=True):
        q = q.to(wide)
        total += float((q.logsumexp(-1) - q.gather(1, y[:, None])[:, 0]).double().sum())
    return total / len(labels)


def predicts_tokens(clean: Clean, metric: str) -> bool:
    """Whether rows are token ids with one row of logits per token (and more than one token)."""
    return (
        metric == "kl"
        and clean.batch.ndim == 2
        and not clean.batch.is_floating_point()
        and clean.output.ndim == 3
        and clean.output.shape[:2] == clean.batch.shape
        and clean.batch.shape[1] > 1
    )


@dataclass(eq=False)
class BatchNumbers:
    """What one batch gave.

    Attributes:
        n, n_labels: positions, and next-token labels (0 without tokens).
        l0: threshold -> (S,) mean number of subcomponents above it.
        distance, ce: masking -> mean over positions and over labels. ce_target: of the host.
        hidden: masking -> site -> (squared error, elements, squared norm) of the site's output.
        identity: largest |output under ``full`` − the host's output|, and the host's largest
            |output|.
        ci_sum, firings, near_one: (K,) sums over positions of g, 1[g > 0], 1[g ≥ 0.9].
    """

    n: int
    n_labels: int
    l0: dict[float, Float[Tensor, " S"]]
    distance: dict[str, float]
    ce: dict[str, float]
    ce_target: float
    hidden: dict[str, dict[str, tuple[float, int, float]]]
    identity: tuple[float, float]
    ci_sum: Float[Tensor, " K"]
    firings: Int[Tensor, " K"]
    near_one: Int[Tensor, " K"]


@torch.no_grad()
def measure_batch(
    objective: Objective, clean: Clean, thresholds: Sequence[float], draws: Draws, at: int
) -> tuple[BatchNumbers, Float[Tensor, "*pos K"]]:
    """Importances once, then one forward pass a masking; the numbers and the importances."""
    layout, metric = objective.factors.layout, objective.factors.host.metric
    low = importances(objective, clean)
    flat = low.flatten(0, -2)
    target = Target.of(clean, metric)
    tokens = predicts_tokens(clean, metric)
    distance: dict[str, float] = {}
    ce: dict[str, float] = {}
    hidden: dict[str, dict[str, tuple[float, int, float]]] = {}
    identity = float("nan"), float("nan")
    for name, masks in maskings(low, len(layout.names), thresholds, draws, at):
        seen: dict[str, Tensor] = {}
        functions = objective.factors.functions(masks, train=False)
        if name in HIDDEN_UNDER:
            functions = {site: _noting(f, site, seen) for site, f in functions.items()}
        output = objective.factors.host.forward(clean, functions)
        distance[name] = float(target.distance(output))
        if tokens:
            ce[name] = next_token_ce(output, clean.batch)
        if name in HIDDEN_UNDER:
            hidden[name] = {site: _errors(y, clean.outputs[site]) for site, y in seen.items()}
        if name == "full":
            gap = (output.double() - clean.output.double()).abs().max()
            identity = float(gap), float(clean.output.double().abs().max())
    numbers = BatchNumbers(
        n=len(flat),
        n_labels=clean.batch[:, 1:].numel() if tokens else 0,
        l0={t: site_counts(flat > t, layout.sizes).double().mean(0).cpu() for t in thresholds},
        distance=distance,
        ce=ce,
        ce_target=next_token_ce(clean.output, clean.batch) if tokens else float("nan"),
        hidden=hidden,
        identity=identity,
        ci_sum=flat.double().sum(0).cpu(),
        firings=(flat > 0).sum(0).cpu(),
        near_one=(flat >= NEAR_ONE).sum(0).cpu(),
    )
    return numbers, low


def site_counts(on: Tensor, sizes: Sequence[int]) -> Int[Tensor, "*pos S"]:
    """How many of each site's components are on, per position."""
    return torch.stack([part.sum(-1) for part in on.split(list(sizes), dim=-1)], dim=-1)


def _errors(masked: Tensor, clean: Tensor) -> tuple[float, int, float]:
    target = clean.double()
    gap = (masked.double() - target).square().sum()
    return float(gap), masked.numel(), float(target.square().sum())


def _noting(function: Adjust, site: str, seen: dict[str, Tensor]) -> Adjust:
    def noted(x: Tensor, y: Tensor) -> Tensor:
        seen[site] = function(x, y)
        return seen[site]

    return noted
