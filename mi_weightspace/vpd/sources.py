"""Mask sources and routing: uniform draws, persistent adversaries, pools of particles.

A source r ∈ [0, 1] becomes the mask ``m = g + (1−g) r`` of an importance g; the delta source d is a
mask itself. Every draw is a function of (seed, purpose, step): a resumed run needs no generator
state. Adversaries climb the *unweighted* term (vpd.md §4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.seeds import derive
from mi_weightspace.vpd.config import ReconstructionConfig, Routing, Scope
from mi_weightspace.vpd.distributed import average_, own_rows, world

Position = tuple[int, ...]
"""Leading shape of activations: (batch, tokens), or (batch,) without tokens."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of one purpose and step, on one device."""

    seed: int
    device: torch.device
    dtype: torch.dtype

    def generator(self, *names: str | int) -> torch.Generator:
        draw = torch.Generator(device=self.device)
        return draw.manual_seed(derive(self.seed, *names))

    def uniform(self, shape: Position, draw: torch.Generator, *, whole: bool = False) -> Tensor:
        """U[0, 1] of `shape`; leading dimension this process' rows, unless it is `whole`."""
        n = 1 if whole else world()
        value = torch.rand(
            (shape[0] * n, *shape[1:]), generator=draw, device=self.device, dtype=self.dtype
        )
        return value if whole else own_rows(value)


def draw_route(
    routing: Routing, pos: Position, sites: int, probability: float, draws: Draws, *names: str | int
) -> Bool[Tensor, "*pos S"] | None:
    """Which sites are masked where; None is all. ``uniform_k_subset``: k ~ U{1..S} at each
    position, then a uniform k-subset (ranks of noise)."""
    if routing in {"all", "layerwise"}:
        return None
    draw = draws.generator(*names, "route")
    noise = draws.uniform((*pos, sites), draw)
    if routing == "static_p":
        return noise < probability
    k = 1 + (draws.uniform((*pos, 1), draw) * sites).floor().clamp_max(sites - 1)
    return noise.argsort(-1).argsort(-1) < k


def source_shape(scope: Scope, pos: Position, repeat: int) -> Position:
    """Leading shape of a source shared over `scope`; the batch axis is this process'.

    Raises:
        ConfigError: `repeat` that does not divide the batch.
    """
    tokens = pos[1:]
    ones = tuple(1 for _ in tokens)
    if scope == "repeat" and pos[0] % repeat:
        raise ConfigError(
            "repeat",
            given=f"{repeat} rows for a batch of {pos[0]}",
            expected="a divisor of the batch size",
            remedy="Change repeat or batch_size.",
        )
    return {
        "c": (1, *ones),
        "bc": (pos[0], *ones),
        "sc": (1, *tokens),
        "bsc": pos,
        "repeat": (repeat, *tokens),
    }[scope]


def lifted(low: Float[Tensor, "*pos K"], source: Tensor) -> Float[Tensor, "*pos K"]:
    """``g + (1−g) r``: an importance of 1 pins the mask to 1, one of 0 leaves it free."""
    return torch.lerp(low, torch.ones((), dtype=low.dtype, device=low.device), source)


def over_batch(source: Tensor, config: ReconstructionConfig, batch: int) -> Tensor:
    """A source as the masks of a whole batch see it: `repeat` rows are used in turn."""
    if config.scope != "repeat":
        return source
    return source.repeat(batch // config.repeat, *[1] * (source.ndim - 1))


class Sources:
    """An adversary's r (*scope, K) and d (*scope, S), kept across steps with their own Adam.

    Bias-corrected Adam *ascent*, ε outside the root, then a clamp to [0, 1]; or, with `sigmoid`, no
    clamp on logits. Shared scopes average their gradients over processes and start alike.
    """

    def __init__(
        self,
        config: ReconstructionConfig,
        pos: Position,
        sizes: tuple[int, int],
        draws: Draws,
        name: str,
        *,
        fused: bool = True,
    ) -> None:
        self.config, self.shared = config, config.scope in {"c", "sc", "repeat"}
        shape = source_shape(config.scope, pos, config.repeat)
        draw = draws.generator(name, "sources")
        self.leaves = [
            self._initial((*shape, size), draws, draw).requires_grad_() for size in sizes
        ]
        self.optimiser = torch.optim.Adam(
            self.leaves, lr=config.lr, betas=config.betas, eps=1e-8, maximize=True, fused=fused
        )
        self.batch = pos[0]

    def _initial(self, shape: Position, draws: Draws, draw: torch.Generator) -> Tensor:
        if self.config.sigmoid:
            n = 1 if self.shared else world()
            full = (shape[0] * n, *shape[1:])
            value = torch.randn(full, generator=draw, device=draws.device, dtype=draws.dtype)
            return (value if self.shared else own_rows(value)).clone()
        return draws.uniform(shape, draw, whole=self.shared).clone()

    def values(self, step: int) -> tuple[Tensor, Tensor]:
        """r and d as masks see them, differentiable in the leaves."""
        found = [leaf.sigmoid() if self.config.sigmoid else leaf for leaf in self.leaves]
        r, d = (over_batch(v, self.config, self.batch) for v in found)
        return r, d

    def ascend(self, grads: list[Tensor], progress: float) -> None:
        """One Adam step up; `progress` sets the learning rate's linear warm-up."""
        warm = self.config.lr_warmup
        self.optimiser.param_groups[0]["lr"] = self.config.lr * min(
            1.0, progress / warm if warm > 0 else 1.0
        )
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad.detach()
        wanted = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        if self.shared:
            average_(wanted)
        elif world() > 1:  # of the mean over every process' rows, not over this one's
            for grad in wanted:
                grad /= world()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if not self.config.sigmoid:
            with torch.no_grad():
                for leaf in self.leaves:
                    leaf.clamp_(0, 1)

    def named(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""
        found: dict[str, Tensor] = {}
        for i, leaf in enumerate(self.leaves):
            found[f"value/{i}"] = leaf.detach()
            for key, value in self.optimiser.state.get(leaf, {}).items():
                found[f"{key}/{i}"] = value
        return found

    def restore(self, named: Mapping[str, Tensor]) -> None:
        for i, leaf in enumerate(self.leaves):
            with torch.no_grad():
                leaf.copy_(named[f"value/{i}"])
            state = {k[: -len(f"/{i}")]: v.clone() for k, v in named.items() if k.endswith(f"/{i}")}
            state.pop("value")
            if state:
                self.optimiser.state[leaf] = state


class Pool:
    """Particles of each batch index; one is drawn a step and used at every position.

    Storage is batch · particles · (K + S), whatever the number of tokens. The Adam counter is kept
    per particle: a particle rests while others are drawn.
    """

    def __init__(
        self,
        config: ReconstructionConfig,
        pos: Position,
        sizes: tuple[int, int],
        draws: Draws,
        name: str,
        *,
        fused: bool = True,
    ) -> None:
        del fused  # a gather and a scatter: there is no fused form
        self.config, self.draws, self.name = config, draws, name
        self.batch, self.ones = pos[0], tuple(1 for _ in pos[1:])
        self.sizes = sizes
        draw = draws.generator(name, "sources")
        shape = (pos[0], config.particles, sum(sizes))
        self.state: dict[str, Tensor] = {
            "value": draws.uniform(shape, draw).clone(),
            "exp_avg": torch.zeros(shape, device=draws.device, dtype=draws.dtype),
            "exp_avg_sq": torch.zeros(shape, device=draws.device, dtype=draws.dtype),
            "step": torch.zeros(shape[:2], device=draws.device, dtype=draws.dtype),
        }
        self.leaves: list[Tensor] = []
        self.chosen: Any = None

    def values(self, step: int) -> tuple[Tensor, Tensor]:
        draw = self.draws.generator(self.name, "particle", step)
        index = self.draws.uniform((self.batch,), draw) * self.config.particles
        rows = torch.arange(self.batch, device=self.draws.device)
        self.chosen = rows, index.long().clamp_max(self.config.particles - 1)
        value = self.state["value"][self.chosen].view(self.batch, *self.ones, -1)
        self.leaves = [v.clone().requires_grad_() for v in value.split(list(self.sizes), dim=-1)]
        return self.leaves[0], self.leaves[1]

    def ascend(self, grads: list[Tensor], progress: float) -> None:
        grad = torch.cat(grads, dim=-1).reshape(self.batch, -1) / world()
        warm, (b1, b2) = self.config.lr_warmup, self.config.betas
        lr = self.config.lr * min(1.0, progress / warm if warm > 0 else 1.0)
        old = {key: value[self.chosen] for key, value in self.state.items()}
        count = old["step"] + 1
        first = torch.lerp(old["exp_avg"], grad, 1 - b1)
        second = old["exp_avg_sq"] * b2 + (1 - b2) * grad.square()
        root = (second / (1 - b2**count)[:, None]).sqrt() + 1e-8
        value = (old["value"] + lr * first / (1 - b1**count)[:, None] / root).clamp(0, 1)
        new = {"value": value, "exp_avg": first, "exp_avg_sq": second, "step": count}
        for key, tensor in new.items():
            self.state[key][self.chosen] = tensor

    def named(self) -> dict[str, Tensor]:
        return dict(self.state)

    def restore(self, named: Mapping[str, Tensor]) -> None:
        for key in self.state:
            self.state[key] = named[key].clone()


@dataclass
class Adversaries:
    """The kept sources of an objective, by index of their term."""

    kept: dict[int, Sources | Pool] = field(default_factory=dict)

    def get(
        self,
        at: int,
        config: ReconstructionConfig,
        pos: Position,
        sizes: tuple[int, int],
        draws: Draws,
        *,
        fused: bool,
    ) -> Sources | Pool:
        if at not in self.kept:
            make = Pool if config.source == "pooled" else Sources
            self.kept[at] = make(config, pos, sizes, draws, f"term{at}", fused=fused)
        return self.kept[at]
