"""A two-matrix toy changed by several stages, and the same written out in loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.differences.host import ModuleDifferenceHost
from mi_weightspace.vpd.differences.updates import Start, Update, UpdateFacts
from mi_weightspace.vpd.factors import Factors
from mi_weightspace.vpd.objective import Objective

D_IN, D_HIDDEN, D_OUT, COUNT = 4, 5, 3, 2
FACTS = UpdateFacts(1.0, 1.0, 1.0, 1, 1.0, 0.0, "float64", "none")


@dataclass(frozen=True, eq=False)
class Toy:
    """Attributes:
    matrices: one pair (inner, outer) a stage, the first stage first.
    """

    objective: Objective
    matrices: tuple[tuple[Tensor, Tensor], ...]
    stages: tuple[str, ...]
    linear: bool

    def inputs(self, rows: int, seed: int = 0) -> Tensor:
        draw = generator(seed, "toy inputs")
        return torch.randn(rows, D_IN, generator=draw, dtype=torch.float64)

    def plain(self, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        h = x @ inner.T
        return (h if self.linear else h.relu()) @ outer.T

    def last(self, x: Tensor) -> Tensor:
        return self.plain(x, *self.matrices[-1])

    def error(self, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        """Squared error to the last stage, one number a row."""
        return (self.plain(x, inner, outer) - self.last(x)).square().mean(-1)

    def matrix(self, side: int, weights: Mapping[str, Tensor]) -> Tensor:
        """A matrix of the first stage plus what `weights` says of every update of that side."""
        whole = self.matrices[0][side].clone()
        for at, stage in enumerate(self.stages):
            name = f"{('inner', 'outer')[side]}@{stage}"
            part = weights.get(name)
            if part is None:
                part = self.matrices[at + 1][side] - self.matrices[at][side]
            whole = whole + part
        return whole

    def masked_update(self, name: str, m: Tensor, d: float) -> Tensor:
        """write diag(m) read + d Δ as a matrix."""
        factors = self.objective.factors
        read, write = factors.reads[name].detach(), factors.writes[name].detach()
        delta = factors.weights[name] - write.T @ read
        return write.T @ torch.diag(m) @ read + d * delta

    def masked_error(self, x: Tensor, m: Mapping[str, Tensor], d: Mapping[str, Tensor]) -> Tensor:
        """Row by row; m[name] (rows, C), d[name] (rows,); updates not named are whole."""
        found = []
        for i in range(len(x)):
            weights = {n: self.masked_update(n, m[n][i], float(d[n][i])) for n in m}
            pair = [self.matrix(side, weights) for side in (0, 1)]
            found.append(self.error(x[i : i + 1], *pair))
        return torch.cat(found)


def toy(
    stages: Sequence[str] = ("sft", "dpo"),
    *,
    seed: int = 0,
    size: float = 0.5,
    spread: float = 0.3,
    linear: bool = False,
    matrices: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Toy:
    """Random changes of both matrices by every stage, random factors, importances that depend on
    the input (some exactly 0 or 1). `size` of the changes, `spread` of what components write."""
    draw = generator(seed, "difference toy", len(stages))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    if matrices is None:
        given = [(random(D_HIDDEN, D_IN), random(D_OUT, D_HIDDEN))]
        for _ in stages:
            inner, outer = given[-1]
            change = size * random(D_HIDDEN, D_IN), size * random(D_OUT, D_HIDDEN)
            given.append((inner + change[0], outer + change[1]))
        matrices = given
    found = [*matrices]
    middle = nn.Identity() if linear else nn.ReLU()
    shapes = [w.shape for w in found[-1]]
    module = nn.Sequential(
        nn.Linear(shapes[0][1], shapes[0][0], bias=False),
        middle,
        nn.Linear(shapes[1][1], shapes[1][0], bias=False),
    ).double()
    module.load_state_dict({"0.weight": found[-1][0], "2.weight": found[-1][1]})
    updates = []
    for side, matrix in enumerate(("inner", "outer")):
        for at, stage in enumerate(stages):
            change = found[at + 1][side] - found[at][side]
            if bool(change.any()):
                updates.append(Update(_site(matrix, change), stage, change, FACTS))
    starts = {m: Start(found[0][side], None) for side, m in enumerate(("inner", "outer"))}
    host = ModuleDifferenceHost(module, {"inner": "0", "outer": "2"}, updates, starts)
    reads = {n: random(COUNT, host.weight(n).shape[1]) for n in host.names}
    writes = {n: spread * random(COUNT, host.weight(n).shape[0]) for n in host.names}
    config = make_config({"n_components": COUNT, "importance": {"kind": "vector_mlp"}})
    factors = Factors(host, reads, writes)
    mixing = random(found[0][0].shape[1], factors.layout.total)

    def importance(clean: Any, _factors: Factors) -> Tensor:
        return clean.batch @ mixing + 0.3

    objective = Objective(factors, importance, config)  # pyright: ignore[reportArgumentType]
    return Toy(objective, tuple(found), tuple(stages), linear)


def importances_of(problem: Toy, x: Tensor) -> dict[str, Tensor]:
    """g by site, read from the objective's own (stub) network."""
    z = problem.objective.importance(
        problem.objective.factors.host.clean(x), problem.objective.factors
    )
    places = problem.objective.factors.layout.slices()
    return {name: z.clamp(0, 1)[:, place] for name, place in places.items()}


def _site(name: str, matrix: Tensor) -> Site:
    d_out, d_in = matrix.shape
    return Site(name, "mlp.in", None, d_out, d_in, Space("mlp_in", 0), Space("mlp_hidden", 0))
