"""One evaluation of the objective: faithfulness + minimality + the reconstruction terms.

A term is a mask source times a routing. Adversaries climb before the loss with components and
importances held, and once more on the gradient that the loss's own backward pass leaves on them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.vpd.config import ReconstructionConfig, VPDConfig
from mi_weightspace.vpd.distributed import average_
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.host import Clean
from mi_weightspace.vpd.importance import Importance, squash
from mi_weightspace.vpd.losses import (
    Frequencies,
    Target,
    faithfulness,
    hidden_distance,
    minimality,
)
from mi_weightspace.vpd.masked import Adjust, Masks
from mi_weightspace.vpd.sources import (
    Adversaries,
    Draws,
    Pool,
    Position,
    Sources,
    draw_route,
    over_batch,
    source_shape,
)


@dataclass(frozen=True, eq=False)
class Losses:
    """What one step computed.

    Attributes:
        total: what is minimised. terms: name -> detached unweighted value.
        frequencies: (K,) mean of ψ. low: (*pos, K) lower importances, detached.
        last: kept sources still owed their last ascent.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    frequencies: Float[Tensor, " K"]
    low: Float[Tensor, "*pos K"]
    last: list[Owed] = field(default_factory=list)

    def ascend(self, progress: float) -> None:
        """Pay the ascents owed; after the backward pass, whatever the optimisers have done."""
        for owed in self.last:
            owed.sources.ascend(owed.gradients(), progress)


@dataclass(frozen=True, eq=False)
class Owed:
    """The last ascent of a step.

    Attributes:
        weight: of the term in the total; the leaves' gradients after the backward pass are divided
            by it. early: the gradients, where a pass of their own has taken them.
    """

    sources: Sources | Pool
    weight: float
    early: list[Tensor] | None = None

    def gradients(self) -> list[Tensor]:
        if self.early is not None:
            return self.early
        found = []
        for leaf in self.sources.leaves:
            assert leaf.grad is not None, "the loss' backward pass did not reach the sources"
            found.append(leaf.grad / self.weight)
        return found


@dataclass(eq=False)
class Objective:
    """The terms of `config` over a host's factors.

    Attributes:
        scale: reconstruction is divided by it (the error of the all-zero mask, or 1).
    """

    factors: Factors
    importance: Importance
    config: VPDConfig
    scale: float = 1.0
    adversaries: Adversaries = field(default_factory=Adversaries)
    frequencies: Frequencies = field(default_factory=Frequencies)

    def __post_init__(self) -> None:
        host = self.factors.host
        self.draws = Draws(self.config.seed, host.device, host.dtype)
        self.sizes = self.factors.layout.total, len(self.factors.layout.names)

    # ---- running with masks ----------------------------------------------------------------
    def masked(
        self,
        clean: Clean,
        masks: Masks,
        *,
        train: bool = True,
        only: tuple[str, ...] | None = None,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The host's output under masks; `seen` collects the masked outputs of the sites."""
        functions = self.factors.functions(masks, train=train, only=only)
        if seen is not None:
            functions = {name: _noting(f, name, seen) for name, f in functions.items()}
        with self._precision(clean.batch.device):
            return self.factors.host.forward(clean, functions)

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        if self.config.precision == "bfloat16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()

    # ---- the objective ---------------------------------------------------------------------
    def __call__(self, clean: Clean, step: int) -> Losses:
        """All terms on one batch at one step; kept sources are moved by their warm-up ascents."""
        config, n = self.config, self.config.n_steps
        progress = step / max(1, n - 1)
        z = self.importance(clean, self.factors)
        low, up = squash(z, config.importance.leak)
        target = Target.of(clean, self.factors.host.metric)
        faith = faithfulness(self.factors, config.faithfulness)
        penalty, frequencies = minimality(up, config.minimality, progress, self.frequencies)
        total = config.faithfulness.weight * faith + penalty
        terms = {"faithfulness": faith.detach(), "minimality": penalty.detach()}
        active = {
            at: term
            for at, term in enumerate(config.reconstruction)
            if step >= round(term.start_fraction * n)
        }
        trials = {
            at: self._trials(at, term, clean, target, low, step) for at, term in active.items()
        }
        measured = self._measured(active, trials, clean, target)
        last: list[Owed] = []
        for at, term in active.items():
            value, hidden = measured[at]
            total = total + (term.weight / self.scale) * value
            terms[f"reconstruction.{at}.{term.source}"] = value.detach()
            if hidden is not None:
                total = total + term.hidden_weight * hidden
                terms[f"hidden.{at}.{term.source}"] = hidden.detach()
            if term.keeps_sources:
                last.append(self._owed(at, term, value, hidden))
        return Losses(total, terms, frequencies, low.detach(), last)

    def _trials(
        self,
        at: int,
        term: ReconstructionConfig,
        clean: Clean,
        target: Target,
        low: Tensor,
        step: int,
    ) -> list[Masks]:
        """The masks whose mean distance is the term; adversaries have climbed then."""
        if term.source == "fresh_pgd":
            return [self._fresh_pgd(at, term, clean, target, low, step)]
        if term.keeps_sources:
            return [self._adversarial(at, term, clean, target, low, step)]
        pos, found = tuple(low.shape[:-1]), []
        for sample in range(term.n_samples):
            route = self._route(at, term, pos, step, sample)
            r, d = self._uniform(term, pos, step, f"term{at}", sample)
            found.append(Masks(low, d, route, r))
        return found

    def _measured(
        self,
        active: dict[int, ReconstructionConfig],
        trials: dict[int, list[Masks]],
        clean: Clean,
        target: Target,
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Unweighted value and hidden-activation rider of every term."""
        found: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        joint = [at for at, term in active.items() if term.routing != "layerwise"]
        if self.config.speed.joint_forward and sum(len(trials[at]) for at in joint) > 1:
            found = self._joint({at: active[at] for at in joint}, trials, clean, target)
        for at, term in active.items():
            if at not in found:
                found[at] = [self._value(term, clean, target, masks) for masks in trials[at]]
        measured: dict[int, tuple[Tensor, Tensor | None]] = {}
        for at, pairs in found.items():
            hiddens = [hidden for _, hidden in pairs if hidden is not None]
            hidden = torch.stack(hiddens).mean() if hiddens else None
            measured[at] = torch.stack([value for value, _ in pairs]).mean(), hidden
        return measured

    def _joint(
        self,
        terms: dict[int, ReconstructionConfig],
        trials: dict[int, list[Masks]],
        clean: Clean,
        target: Target,
    ) -> dict[int, list[tuple[Tensor, Tensor | None]]]:
        """`_value` of every trial from one forward pass over the batch repeated."""
        every = [masks for at in terms for masks in trials[at]]
        riders = any(term.hidden_weight > 0 for term in terms.values())
        seen: dict[str, Tensor] | None = {} if riders else None
        output = self.masked(clean.tiled(len(every)), _end_to_end(every, self.sizes[1]), seen=seen)
        size, at_row = len(clean.batch), 0
        found: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        for at, term in terms.items():
            found[at] = []
            for _ in trials[at]:
                place = slice(at_row, at_row + size)
                at_row += size
                hidden = None
                if seen is not None and term.hidden_weight > 0:
                    own = {name: value[place] for name, value in seen.items()}
                    hidden = hidden_distance(own, clean.outputs)
                found[at].append((target.distance(output[place]), hidden))
        return found

    def _value(
        self,
        term: ReconstructionConfig,
        clean: Clean,
        target: Target,
        masks: Masks,
        *,
        train: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """The distance under masks (layerwise: its mean over one site at a time)."""
        if term.routing == "layerwise":
            found = [
                target.distance(self.masked(clean, masks, train=train, only=(name,)))
                for name in self.factors.layout.names
            ]
            return torch.stack(found).mean(), None
        if term.hidden_weight == 0 or not train:
            return target.distance(self.masked(clean, masks, train=train)), None
        seen: dict[str, Tensor] = {}
        value = target.distance(self.masked(clean, masks, seen=seen))
        return value, hidden_distance(seen, clean.outputs)

    # ---- sources ---------------------------------------------------------------------------
    def _route(
        self, at: int, term: ReconstructionConfig, pos: Position, step: int, sample: int = 0
    ) -> Tensor | None:
        return draw_route(
            term.routing,
            pos,
            self.sizes[1],
            term.probability,
            self.draws,
            f"term{at}",
            step,
            sample,
        )

    def _uniform(
        self, term: ReconstructionConfig, pos: Position, step: int, *names: str | int
    ) -> tuple[Tensor, Tensor]:
        draw = self.draws.generator(*names, "source", step)
        r = self.draws.uniform((*pos, self.sizes[0]), draw)
        d = self.draws.uniform((*pos, self.sizes[1]), draw)
        return (r.round(), d.round()) if term.source == "binomial" else (r, d)

    def _fresh_pgd(
        self,
        at: int,
        term: ReconstructionConfig,
        clean: Clean,
        target: Target,
        low: Tensor,
        step: int,
    ) -> Masks:
        """Sign ascent from a fresh draw; routing is drawn once for all ascents and the loss."""
        pos = tuple(low.shape[:-1])
        route = self._route(at, term, pos, step)
        draw = self.draws.generator(f"term{at}", "source", step)
        shape = source_shape(term.scope, pos, term.repeat)
        whole = term.scope in {"c", "sc", "repeat"}
        r, d = (self.draws.uniform((*shape, k), draw, whole=whole) for k in self.sizes)
        held = low.detach()
        for _ in range(term.pgd_steps):
            r, d = r.requires_grad_(), d.requires_grad_()
            masks = Masks(held, over_batch(d, term, pos[0]), route, over_batch(r, term, pos[0]))
            value, _hidden = self._value(term, clean, target, masks, train=False)
            gradients = torch.autograd.grad(value, [r, d])
            if whole:
                average_(gradients)
            r, d = (
                (leaf.detach() + term.pgd_step_size * grad.sign()).clamp(0, 1)
                for leaf, grad in zip((r, d), gradients, strict=True)
            )
        return Masks(low, over_batch(d, term, pos[0]), route, over_batch(r, term, pos[0]))

    def _adversarial(
        self,
        at: int,
        term: ReconstructionConfig,
        clean: Clean,
        target: Target,
        low: Tensor,
        step: int,
    ) -> Masks:
        """The warm-up ascents of a kept source, then its masks for the loss."""
        pos = tuple(low.shape[:-1])
        fused = self.config.speed.fused_optimiser
        sources = self.adversaries.get(at, term, pos, self.sizes, self.draws, fused=fused)
        progress = (step + 1) / self.config.n_steps
        held = low.detach()
        route = None if term.routing == "all" else self._route(at, term, pos, step)

        def attack(g: Tensor, routed: Tensor | None) -> Masks:
            r, d = sources.values(step)
            return Masks(g, d, routed, r)

        for _ in range(term.n_warm):  # every site, every row: the adversary sees the whole model
            value, _h = self._value(term, clean, target, attack(held, None), train=False)
            sources.ascend(list(torch.autograd.grad(value, sources.leaves)), progress)
        masks = attack(low, route)
        if term.adversarial_fraction < 1:
            return self._merged(at, term, low, masks, step)
        return masks

    def _owed(
        self, at: int, term: ReconstructionConfig, value: Tensor, hidden: Tensor | None
    ) -> Owed:
        """The last ascent; a pass of its own where the total's gradient holds a rider's too."""
        sources, early = self.adversaries.kept[at], None
        if hidden is not None or not self.config.speed.single_backward:
            early = list(torch.autograd.grad(value, sources.leaves, retain_graph=True))
        return Owed(sources, term.weight / self.scale, early)

    def _merged(
        self, at: int, term: ReconstructionConfig, low: Tensor, attacked: Masks, step: int
    ) -> Masks:
        """Each batch element adversarial with `adversarial_fraction`, else uniform on a subset."""
        pos = tuple(low.shape[:-1])
        draw = self.draws.generator(f"term{at}", "merge", step)
        bits = self.draws.uniform((pos[0], *[1] * len(pos)), draw) < term.adversarial_fraction
        r, d = self._uniform(term, pos, step, f"term{at}")
        subset = draw_route(
            "uniform_k_subset", pos, self.sizes[1], 1.0, self.draws, f"term{at}", step, 0
        )
        assert attacked.delta is not None and attacked.source is not None and subset is not None
        everywhere = torch.ones_like(subset) if attacked.route is None else attacked.route
        chosen = bits.to(low.dtype)  # lerp by 0 or 1 is exact, and much faster than a selection
        return Masks(
            low,
            torch.lerp(d, attacked.delta.expand_as(d), chosen),
            torch.where(bits, everywhere, subset),
            torch.lerp(r, attacked.source.expand_as(r), chosen),
        )


def _end_to_end(trials: list[Masks], sites: int) -> Masks:
    """Masks of one batch each, as those of the batches end to end."""
    pos = trials[0].component.shape[:-1]

    def joined(parts: list[Tensor | None]) -> Tensor:
        wide = [p.expand(*pos, p.shape[-1]) for p in parts if p is not None]
        assert len(wide) == len(parts)
        return torch.cat(wide)

    routes: list[Tensor | None] = [m.route for m in trials]
    if any(route is not None for route in routes):
        everywhere = trials[0].component.new_ones(*pos, sites, dtype=torch.bool)
        routes = [everywhere if route is None else route for route in routes]
    return Masks(
        joined([m.component for m in trials]),
        joined([m.delta for m in trials]),
        None if routes[0] is None else joined(routes),
        joined([m.source for m in trials]),
    )


def _noting(function: Adjust, name: str, seen: dict[str, Tensor]) -> Adjust:
    def noted(x: Tensor, y: Tensor) -> Tensor:
        seen[name] = function(x, y)
        return seen[name]

    return noted
