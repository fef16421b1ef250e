"""Simulated activations of paired prompts for the p of mean shifts, probes and causal gates.

Pairs come two to a cluster and share half the variance of their difference with it; one coordinate
is four times louder than the others; every later point is the point before plus as much again.
Under the null the two sides of a pair are exchangeable, at every stage. *Planted*: the positive
side of one contrast moves along one direction, at all points.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import probes
from experiments.null_cells import unit_rows
from experiments.p_calibration_core import Case, Printed
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space

D, CLUSTERS, LOUD = 16, 12, 4.0
POINTS = tuple(Space("resid_post", i) for i in range(3))
SHIFT = 3.0
"""Of the plant; a coordinate's standard deviation within a class is about 1.2."""
N_FLIPS = 199


def contrasts(targets: int = 2, controls: int = 3) -> ContrastSet:
    pairs = tuple(Pair(f"item {i // 2}", f"+{i}", f"-{i}") for i in range(2 * CLUSTERS))
    names = [(f"target {i}", "target") for i in range(targets)]
    names += [(f"control {i}", "control") for i in range(controls)]
    return ContrastSet("simulated", tuple(Contrast(n, k, pairs) for n, k in names))  # pyright: ignore[reportArgumentType]


def _rows(g: torch.Generator) -> Tensor:
    """(2 · CLUSTERS, 2, D): pairs without a shift."""
    size = torch.ones(D).index_fill(0, torch.tensor([0]), LOUD)
    item = torch.randn(CLUSTERS, 1, 1, D, generator=g)
    shared = torch.randn(CLUSTERS, 1, 1, D, generator=g) * torch.tensor([0.5, -0.5])[:, None]
    own = torch.randn(CLUSTERS, 2, 2, D, generator=g) / math.sqrt(2)
    return ((item + shared + own) * size).flatten(0, 1)


def stage(
    contrasts_: ContrastSet, g: torch.Generator, name: str, shift: float
) -> PairedActivations:
    """Random activations of every contrast at every point; the first target moves by `shift`."""
    values: dict[tuple[str, str], Tensor] = {}
    along = unit_rows(torch.randn(D, generator=g))
    for i, contrast in enumerate(contrasts_):
        value = torch.zeros(2 * CLUSTERS, 2, D)
        for point in POINTS:
            value = value + _rows(g)
            if i == 0:
                value[:, 0] += shift * along
            values[contrast.name, point.name] = value
    return PairedActivations(name, name, contrasts_, "last", POINTS, values, {}, {})


# ---- mean shifts ---------------------------------------------------------------------------
def shift_draw(seed: int, index: int, planted: bool) -> dict[str, float]:
    """A sweep of two stages; the plant is a shift of the later stage alone."""
    g, who = generator(seed, "dmu", index), contrasts()
    before = stage(who, g, "before", 0.0)
    after = stage(who, g, "after", SHIFT * planted)
    report: Any = probes.dmu_sweep(
        {"before": before, "after": after},
        n_flips=N_FLIPS,
        n_bootstrap=LITTLE,
        denominators=("rel_norm",),
        seed=index,
        progress=False,
    )
    found = {}
    for name, frame in (("", report.table), ("did ", report.tables["did"])):
        own = frame[(frame["stage"] == "after") & (frame["contrast"] == "target 0")]
        found[f"{name}p"] = float(own["p"].iloc[1])
        found[f"{name}p_adjusted"] = float(own["p_adjusted"].min())
    order = report.tables["ordering"]
    order = order[order["stage"] == "after"]
    found["p_global"] = float(order.loc[order["contrast"] == "target 0", "p_global"].iloc[0])
    return found | {"p_holm": float(order["p_holm"].min())}


LITTLE = 20
"""Bootstrap draws of intervals that are not looked at here."""
_SIDES = "the two sides of whole clusters of pairs"
_SHIFT = f"a shift of {SHIFT:g} along one direction at each point (classes' sd there 1.2 and more)"
_TABLES = ("probes/dmu_tables.py",)


def _shift_case() -> Case:
    def one(key: str, where: str, family: str = "", decides: str = "", note: str = "") -> Printed:
        column = key.removeprefix("did ")
        return Printed(key, where, _TABLES, (column,), _SIDES, _SHIFT, family, decides, note)

    points = f"{len(POINTS)} points (max-T)"
    printed = (
        one("p", "dmu: p"),
        one("p_adjusted", "dmu: p_adjusted", points, "marks points in figures"),
        one("did p", "dmu, did: p", note="sides of the change between the stages"),
        one("did p_adjusted", "dmu, did: p_adjusted", points, "onset"),
        one("p_global", "dmu, ordering: p_global", points),
        one(
            "p_holm",
            "dmu, ordering: p_holm",
            f"{points} and 2 targets (Holm)",
            "axis-specific, not axis-specific",
        ),
    )
    sizes = f"d = {D}, {CLUSTERS} clusters of 2 pairs, {len(POINTS)} points, {N_FLIPS} flips"
    return Case("mean shifts", shift_draw, printed, sizes)


# ---- probes --------------------------------------------------------------------------------
def probe_draw(seed: int, index: int, planted: bool, *, method: Any) -> dict[str, float]:
    g = generator(seed, "probe", index)
    held = stage(contrasts(1, 1), g, "stage", PROBE_SHIFT * planted)
    bank: Any = probes.fit(
        held,
        method=method,
        n_permutations=N_FLIPS,
        n_bootstrap=LITTLE,
        seed=index,
        progress=False,
    )
    return {
        "p": float(bank.table["p"].iloc[1]),
        "p_adjusted": float(bank.table["p_adjusted"].min()),
    }


PROBE_SHIFT = 1.0
_PROBE = ("probes/defer.py",)


def _probe_case(method: str) -> Case:
    effect = f"a shift of {PROBE_SHIFT:g} along one direction at each point"
    printed = (
        Printed("p", f"probe ({method}): p", _PROBE, ("p",), _SIDES, effect),
        Printed(
            "p_adjusted",
            f"probe ({method}): p_adjusted",
            _PROBE,
            ("p_adjusted",),
            _SIDES,
            effect,
            f"{len(POINTS)} points (max-T)",
            "axis-specific, not axis-specific",
            "also that of lr" if method == "ridge" else "",
        ),
    )
    sizes = f"d = {D}, {CLUSTERS} clusters of 2 pairs, {len(POINTS)} points, {N_FLIPS} swaps"
    return Case(f"probe, {method}", partial(probe_draw, method=method), printed, sizes)


def cases() -> tuple[Case, ...]:
    return (_shift_case(), *(_probe_case(m) for m in ("dm", "lda", "ridge", "paired")))
