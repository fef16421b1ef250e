"""Simulated updates for the p of VPD reports, and items for the bands of a watch.

*Explain*: an update of random singular vectors beside 4 components, width 10; *rogue*: two loud
coordinates are shared by update and components. *Link*: an update of width 16 and rank 8, and
readouts linear in what it writes for one input; the product's own `Causes.effect` draws and
reverts the random pieces, `geometry` the random directions, `Judged` makes the columns. Null A: a
component is one more random piece ``dW x xᵀ``. Null B: it is the update's leading singular part,
and the behaviour reads a random direction. *Bands*: 5 vectors, as many calibration items as
`items_needed` asks for 5 %, one new item.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from experiments.null_cells import unit_rows
from experiments.p_calibration_core import ALPHA, Case, Printed
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.monitor import Watch, calibrate, extremes, items_needed
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import holm
from mi_weightspace.vpd.differences.link import Judged, LinkConfig
from mi_weightspace.vpd.differences.link_cause import Causes, Effect, Piece
from mi_weightspace.vpd.differences.link_geometry import geometry
from mi_weightspace.vpd.differences.updates import Update, UpdateFacts
from mi_weightspace.vpd.explain import explain

D, RANK, N_COMPONENTS = 16, 8, 4
POINT = Space("resid_post", 0)
SITE = Site("blocks.0.mlp.out", "mlp.out", 0, D, D, Space("mlp_hidden", 0), POINT)
NAME = f"{SITE.name}@tuned"
SETTINGS = LinkConfig(n_directions=99, n_pieces=39)
N_CONTROLS = 39
DIRECTION = Direction(torch.eye(D)[0], POINT, label="direction")


# ---- explain -------------------------------------------------------------------------------
class Parts:
    """Components of one site, as `explain` asks for them."""

    sites, unconverged = ("blocks.0.mlp.out",), False
    tables: Mapping[str, Any] = {}
    inputs: Mapping[str, str] = {}

    def __init__(self, reads: Tensor, writes: Tensor) -> None:
        self._reads, self._writes = reads, writes

    def read(self, site: str) -> Tensor:
        return self._reads

    def write(self, site: str) -> Tensor:
        return self._writes


def explain_draw(seed: int, index: int, planted: bool, *, rogue: bool) -> dict[str, float]:
    g, d = generator(seed, "explain", index), 10
    loud = torch.ones(d).index_fill(0, torch.tensor([0, 1]), 8.0 if rogue else 1.0)
    reads, writes = (torch.randn(N_COMPONENTS, d, generator=g) * loud for _ in range(2))
    update = torch.randn(d, d, generator=g) * loud[:, None] * loud
    if planted:
        own = torch.einsum("co,ci->oi", writes, reads)
        update += own * float(update.norm() / own.norm())
    report = explain(Parts(reads, writes), update, n_null=39, seed=index)
    p = dict(zip(report.table["part"], report.table["p"], strict=True))
    return {"reweighted": float(p["reweighted"]), "new": float(p["new"])}


# ---- link ----------------------------------------------------------------------------------
class LinearCauses(Causes):
    """Reversions in a model whose readouts are linear in what one update writes for one input."""

    def __init__(self, core: Tensor, x: Tensor, readouts: Tensor) -> None:
        self.host: Any = SimpleNamespace(updates={NAME: SimpleNamespace(core=core)}, scales={})
        self.points = {DIRECTION.name: POINT.name}
        self._core, self._x, self._readouts = core, x, readouts
        self._spaces = {}
        self.last = self._values({}, controls=True)
        nothing = {NAME: lambda _x, y: torch.zeros_like(y)}
        self.whole = self._taken(self._values(nothing, controls=True))

    def _values(self, functions: Mapping[str, Any], *, controls: bool) -> Effect:
        del controls
        written = (self._core @ self._x)[None]
        for function in functions.values():
            written = function(self._x[None], written)
        found = (self._readouts @ written[0]).tolist()
        scores = {DIRECTION.name: float(DIRECTION.pattern @ written[0])}
        return Effect(found[0], tuple(found[1:]), scores)


def _core(g: torch.Generator) -> Tensor:
    frames = [torch.linalg.qr(torch.randn(D, RANK, generator=g))[0] for _ in range(2)]
    return frames[0] @ torch.diag(0.5 + torch.rand(RANK, generator=g)) @ frames[1].T


def link_draw(seed: int, index: int, planted: bool, *, singular: bool) -> dict[str, float]:
    """The plant is a part of size 4 from the input to the direction, which the behaviour reads."""
    g = generator(seed, "link", index)
    core, x = _core(g), unit_rows(torch.randn(D, generator=g)) * 4
    readouts = unit_rows(torch.randn(1 + N_CONTROLS, D, generator=g)) * 4
    w = DIRECTION.pattern
    if planted:
        core = core + 4 * w[:, None] * x / x.norm()
        readouts[0] = 4 * w
        piece = Piece(NAME, x / x.norm(), 4 * w)
    elif singular:
        u, s, vh = torch.linalg.svd(core)
        piece = Piece(NAME, vh[0], s[0] * u[:, 0])
    else:
        read = unit_rows(_in_row_space(core, g))
        piece = Piece(NAME, read, core @ read)
    causes = LinearCauses(core, x, readouts)
    effect = causes.effect(piece, SETTINGS.n_pieces, index)
    judged = Judged(SETTINGS, True, causes.whole)
    row = judged.columns({(NAME, 0): effect}, (NAME, 0)) | judged.score(effect, DIRECTION.name)
    whole = judged.p_whole
    return {
        "p_behaviour": float(row["p_behaviour"]),
        "p_controls": float(row["p_controls"]),
        "p_score": float(row["p_score"]),
        "p_whole": math.nan if whole is None else whole,
        "bears": float(not row["bears"]),
    }


def _in_row_space(core: Tensor, g: torch.Generator) -> Tensor:
    space = torch.linalg.svd(core)[2][:RANK]
    return torch.randn(RANK, generator=g) @ space


def cosine_draw(seed: int, index: int, planted: bool) -> dict[str, float]:
    """Components drawn from the update's column space; planted: the first lies at 30° to ŵ."""
    g = generator(seed, "cosine", index)
    core = _core(g)
    space = torch.linalg.svd(core)[0][:, :RANK]
    along = space @ (space.T @ DIRECTION.pattern)
    writes = torch.randn(N_COMPONENTS, RANK, generator=g) @ space.T
    if planted:
        own = unit_rows(writes[0] - (writes[0] @ along) / (along @ along) * along)
        writes[0] = math.cos(math.pi / 6) * unit_rows(along) + 0.5 * own
    facts = UpdateFacts(1.0, 1.0, 1.0, RANK, 1.0, 0.0, "float32", "none")
    host = SimpleNamespace(updates={NAME: Update(SITE, "tuned", core, facts)}, scales={})
    parts: Any = SimpleNamespace(host=host, arrays={}, write=lambda _: writes)
    found = [
        geometry(parts, NAME, c, [DIRECTION], [], SETTINGS.n_directions, index)[0].p
        for c in range(N_COMPONENTS)
    ]
    return {"p_cosine": float(holm(torch.tensor(found, dtype=torch.float64)).min())}


# ---- bands ---------------------------------------------------------------------------------
def band_draw(seed: int, index: int, planted: bool) -> dict[str, float]:
    """0 where the new item is flagged: the promise is a rate of at most 5 %."""
    g, t = generator(seed, "bands", index), 5
    vectors = unit_rows(torch.randn(t, D, generator=g))
    watch = Watch(SITE.name, "write", f"{SITE.name}:out", vectors, tuple(range(t)))
    n = items_needed(t, ALPHA)
    items = torch.randn(n + 1, 1, D, generator=g) + 0.5 * torch.randn(n + 1, 6, D, generator=g)
    new = items[-1:] + 6 * planted * vectors[0]
    bands = calibrate([watch], [extremes(watch, items[:-1])], margin=0.0)
    return {"flagged": float(not bool(bands.check(new).flagged[0]))}


# ---- what is printed -----------------------------------------------------------------------
def _explain_case(rogue: bool) -> Case:
    null, effect = "the singular vectors of the update", "half of the update is a sum of components"
    kind = "two loud coordinates in update and components" if rogue else ""
    printed = tuple(
        Printed(part, f"vpd_explain: p of `{part}`", ("mi_weightspace/vpd/explain.py",), ("p",),
                null, effect, note=kind)
        for part in ("reweighted", "new")
    )  # fmt: skip
    return Case(
        f"explain, {'rogue' if rogue else 'plain'}",
        lambda seed, index, planted: explain_draw(seed, index, planted, rogue=rogue),
        printed,
        f"d = 10, {N_COMPONENTS} components, 39 random matrices",
    )


_LINK = ("mi_weightspace/vpd/differences/link.py",)


def _link_case(singular: bool) -> Case:
    null = "the component and random pieces of the update"
    if singular:
        null = "the behaviour's direction: random, the component the leading singular part"
    readouts = "the behaviour's readout and its controls'"
    effect = "a part that writes most of the behaviour's change"

    def one(key: str, where: str, null: str, decides: str = "", columns: bool = True) -> Printed:
        names = ("p_behaviour_among_controls", "p_controls") if key == "p_whole" else (key,)
        shown = names if columns else ()
        return Printed(key, f"vpd-link: {where}", _LINK, shown, null, effect, "", decides)

    printed = (
        one("p_behaviour", "p_behaviour", null, "load-bearing, with the next"),
        one("p_controls", "p_controls", readouts, "load-bearing, with p_behaviour"),
        one("p_whole", "p_behaviour_among_controls", readouts, "load-bearing"),
        one("p_score", "p_score", null, "written here, with all others"),
        one("bears", "the word `load-bearing`", f"{null}; {readouts}", "load-bearing", False),
    )
    return Case(
        f"link, {'singular part' if singular else 'random piece'}",
        lambda seed, index, planted: link_draw(seed, index, planted, singular=singular),
        printed,
        f"d = {D}, rank {RANK}, {SETTINGS.n_pieces} pieces, {N_CONTROLS} control readouts",
    )


def _cosine_case() -> Case:
    printed = Printed(
        "p_cosine", "vpd-link: p_cosine", _LINK, ("p_cosine",),
        "directions of the update's column space", "30° from the nearest of that space to ŵ",
        f"{N_COMPONENTS} components (Holm)", "aligned",
    )  # fmt: skip
    sizes = f"d = {D}, rank {RANK}, {SETTINGS.n_directions} directions"
    return Case("link, cosine", cosine_draw, (printed,), sizes)


def _band_case() -> Case:
    printed = Printed(
        "flagged", "watch: flagged, at a bound of 5 %", (), (),
        "a new item and the calibration items", "6 sd along one vector",
        "5 vectors, two sides", "flagged", "a promised rate, not a p",
    )  # fmt: skip
    return Case(
        "bands", band_draw, (printed,), f"d = {D}, 5 vectors, {items_needed(5, ALPHA)} items"
    )


def cases() -> tuple[Case, ...]:
    explained = (_explain_case(rogue) for rogue in (False, True))
    links = (_link_case(singular) for singular in (False, True))
    return (*explained, *links, _cosine_case(), _band_case())
