"""What one component does, on one card: when it is important, what it reads and writes, what its
removal changes (vpd.md §8).

Everything is counted in one pass over the data; of contexts only a reservoir is kept (weighted by
importance, at most `PER_BATCH` a batch). Signs of a component are arbitrary one side at a time, so
readings are turned by the sign its inner activation has where it is important.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, PromptError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.card import Card, Context
from mi_weightspace.vpd.effects import ablation_effect, inner_activations, norms, passes
from mi_weightspace.vpd.factors import matrix_of
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.readings import (
    Names,
    extremes,
    lifted,
    rates,
    read_reading,
    write_reading,
)

WINDOW = 20
PER_BATCH = 5
STRONG = 0.1
LIVE = 1e-6
"""Mean importance above which a component counts as live."""


@dataclass(eq=False)
class _Totals:
    """Sums over positions of one site, (C,) each in float64."""

    n: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, g: Float[Tensor, "n C"], act: Float[Tensor, "n C"]) -> None:
        self.n += len(g)
        g, act = g.double(), act.double()
        found = {
            "importance": g.sum(0),
            "firings": (g > 0).double().sum(0),
            "strong": (g > STRONG).double().sum(0),
            "activation": act.sum(0),
            "weighted": (g * act).sum(0),
            "maximum": g.amax(0),
        }
        for key, value in found.items():
            if key not in self.sums:
                self.sums[key] = value
            elif key == "maximum":
                self.sums[key] = torch.maximum(self.sums[key], value)
            else:
                self.sums[key] += value

    def columns(self) -> dict[str, Tensor]:
        s, n = self.sums, self.n
        weight = torch.where(s["importance"] > 0, s["importance"], math.nan)
        return {
            "mean_importance": s["importance"] / n,
            "max_importance": s["maximum"],
            "density": s["firings"] / n,
            "strong": s["strong"] / n,
            "mean_activation": s["activation"] / n,
            "important_activation": s["weighted"] / weight,
        }


def component_table(objective: Objective, batches: Sequence[Tensor]) -> Any:
    """One row a component: norm, importance, density, mean ā, and ā where it is important.

    ``important_activation`` is Σ g ā / Σ g; its sign is what `rewrite` uses; NaN where g is 0
    everywhere.
    """
    import pandas as pd

    names = objective.factors.layout.names
    totals = {name: _Totals() for name in names}
    for clean, low in passes(objective, batches):
        for name, place in objective.factors.layout.slices().items():
            size = objective.factors.writes[name].detach().norm(dim=1)
            act = inner_activations(objective, clean, name) * size
            totals[name].add(low[..., place].flatten(0, -2), act.flatten(0, -2))
    frames = []
    for name in names:
        columns = {"norm": norms(objective, name), **totals[name].columns()}
        frame = pd.DataFrame({k: v.cpu().double().numpy() for k, v in columns.items()})
        frame.insert(0, "component", range(len(frame)))
        frame.insert(0, "site", name)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


# ---- cards -------------------------------------------------------------------------------------
@dataclass(eq=False)
class _Gathered:
    """What one component collects in the pass: a reservoir, and counts over the vocabulary."""

    keys: list[float] = field(default_factory=list)
    kept: list[tuple[Tensor, int, Tensor, Tensor]] = field(default_factory=list)
    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def offer(
        self,
        tokens: Int[Tensor, "b t"],
        g: Float[Tensor, "b t"],
        act: Float[Tensor, "b t"],
        draw: torch.Generator,
        size: int,
    ) -> None:
        """Weighted reservoir (Efraimidis & Spirakis): key = log(u) / g, the largest are kept."""
        noise = torch.rand(g.shape, generator=draw, dtype=torch.float64).clamp_min(1e-300)
        keys = torch.where(g > 0, noise.log() / g.double().cpu().clamp_min(1e-12), -math.inf)
        best, where = keys.flatten().topk(min(PER_BATCH, keys.numel()))
        for key, flat in zip(best.tolist(), where.tolist(), strict=True):
            if key == -math.inf or (len(self.keys) >= size and key <= min(self.keys)):
                continue
            row, t = divmod(flat, g.shape[1])
            part = slice(max(0, t - WINDOW), t + WINDOW + 1)
            window = (tokens[row, part], t - part.start, g[row, part], act[row, part])
            if len(self.keys) >= size:
                worst = self.keys.index(min(self.keys))
                del self.keys[worst], self.kept[worst]
            self.keys.append(key)
            self.kept.append(tuple(v.cpu().clone() if isinstance(v, Tensor) else v for v in window))  # pyright: ignore[reportArgumentType]

    def count(
        self, tokens: Tensor, fires: Bool[Tensor, "b t"], probabilities: Tensor | None
    ) -> None:
        if self.inputs is None or not bool(fires.any()):
            return
        self.inputs += torch.bincount(tokens[fires], minlength=len(self.inputs))
        if probabilities is not None and self.outputs is not None:
            self.outputs += probabilities[fires].double().sum(0)


def cards(
    objective: Objective,
    wanted: Mapping[str, Sequence[int]],
    batches: Sequence[Tensor],
    *,
    n_contexts: int = 10,
    n_tokens: int = 10,
    n_random: int = 3,
    seed: int = 0,
    unconverged: bool = False,
) -> list[Card]:
    """Cards of components, harvested in one pass (and 1 + `n_random` passes for each effect).

    Args:
        wanted: site -> components. batches: token ids (batch, tokens). n_contexts: size of the
            reservoir. n_tokens: length of the token lists. n_random: draws of other components.

    Raises:
        PromptError: the data are no tokens. ConfigError: no such site or component.
    """
    _check(objective, wanted, batches)
    vocab = _vocabulary(objective)
    slices = objective.factors.layout.slices()
    totals = {name: _Totals() for name in wanted}
    gathered = {(name, c): _Gathered() for name, own in wanted.items() for c in own}
    for one in gathered.values():
        one.inputs = torch.zeros(vocab, dtype=torch.long, device=batches[0].device)
        one.outputs = torch.zeros(vocab, dtype=torch.float64, device=batches[0].device)
    seen = torch.zeros(vocab, dtype=torch.long)
    predicted = torch.zeros(vocab, dtype=torch.float64)
    for number, (clean, low) in enumerate(passes(objective, batches)):
        tokens = clean.batch.cpu()
        probabilities = clean.output.float().softmax(-1).cpu()
        seen += torch.bincount(tokens.flatten(), minlength=vocab)
        predicted += probabilities.flatten(0, -2).double().sum(0)
        for name, own in wanted.items():
            size = objective.factors.writes[name].detach().norm(dim=1)
            g = low[..., slices[name]].cpu()
            act = (inner_activations(objective, clean, name) * size).cpu()
            totals[name].add(g.flatten(0, -2), act.flatten(0, -2))
            for c in own:
                draw = generator(seed, "reservoir", name, c, number)
                one = gathered[name, c]
                one.offer(tokens, g[..., c], act[..., c], draw, n_contexts)
                one.count(tokens, g[..., c] > 0, probabilities)
    marginals = seen, predicted / predicted.sum()
    found = []
    for name, own in wanted.items():
        columns = totals[name].columns()
        for c in own:
            one = gathered[name, c]
            numbers = {k: float(v[c]) for k, v in columns.items() if k != "max_importance"}
            card = Card(
                site=name,
                component=c,
                n_tokens=totals[name].n,
                norm=float(norms(objective, name)[c]),
                **numbers,
                **_words(objective, name, c, one, marginals, numbers, n_tokens),
                effect=None,
                unconverged=unconverged,
            )
            live = (columns["mean_importance"] > LIVE).nonzero().flatten().tolist()
            found.append(_with_effect(card, objective, batches, live, n_random, seed))
    return found


def _check(
    objective: Objective, wanted: Mapping[str, Sequence[int]], batches: Sequence[Tensor]
) -> None:
    if objective.factors.host.metric != "kl" or any(b.is_floating_point() for b in batches):
        raise PromptError(
            "data of a component's card",
            given=f"{batches[0].dtype} batches, measured by {objective.factors.host.metric}",
            expected="token ids of a language model",
            remedy="For toys, plot_factors and the table `components` show the components.",
        )
    sizes = dict(zip(objective.factors.layout.names, objective.factors.layout.sizes, strict=True))
    for name, own in wanted.items():
        if name not in sizes or any(not 0 <= c < sizes[name] for c in own):
            raise ConfigError(
                f"components of {name}",
                given=f"{list(own)[:6]}",
                expected=f"numbers below {sizes.get(name, 0)} at one of {list(sizes)[:6]}",
                remedy="`to_pandas('components')` lists them.",
            )


def _vocabulary(objective: Objective) -> int:
    lens: Any = getattr(objective.factors.host, "lens", None)
    assert lens is not None, "a language host without a lens"
    return int(lens.shape.vocab_size)


def _words(
    objective: Objective,
    name: str,
    c: int,
    one: _Gathered,
    marginals: tuple[Tensor, Tensor],
    numbers: Mapping[str, float],
    n: int,
) -> dict[str, Any]:
    """The parts of a card that are read as tokens."""
    lens: Any = objective.factors.host.lens  # pyright: ignore[reportAttributeAccessIssue]
    names = Names(lens.tokenizer)
    sign = -1.0 if numbers["important_activation"] < 0 else 1.0
    factors, matrix = objective.factors, matrix_of(name)
    own = (side[name][c : c + 1].detach() * sign for side in (factors.reads, factors.writes))
    reads, writes = factors.host.in_matrix(name, *own)
    write, read = write_reading(lens, matrix, writes[0]), read_reading(lens, matrix, reads[0])
    order = sorted(range(len(one.keys)), key=lambda i: -float(one.kept[i][2][one.kept[i][1]]))
    contexts = tuple(
        Context(tuple(names(int(i)) for i in tokens), at, tuple(g.tolist()), tuple(act.tolist()))
        for tokens, at, g, act in (one.kept[i] for i in order)
    )
    return {
        "contexts": contexts,
        "writes": extremes(write, names, n),
        "reads": extremes(read, names, n),
        "inputs": rates(one.inputs, marginals[0], names, n),
        "outputs": lifted(one.outputs, marginals[1], names, n),
    }


def _with_effect(
    card: Card,
    objective: Objective,
    batches: Sequence[Tensor],
    live: Sequence[int],
    n_random: int,
    seed: int,
) -> Card:
    if card.density == 0:
        return card
    found = ablation_effect(
        objective, card.site, [card.component], batches, live=live, n_random=n_random, seed=seed
    )
    return replace(card, effect=found)
