"""A simulated causal gate: a readout that is linear in the stream, and directions to take out.

`probes.gate_numbers.measure`, its nulls, `judge` and `detection` are the product's; only the model
is replaced, by ``log-odds = x · r``. The contrast has 16 pairs at width 12, its sides 1.5 apart
along one direction, and pairs differ from each other along every direction.

*One of the null's own*: the direction is one more in which the pairs differ (the deciding null is
then exact). *Decoy*: the direction is the contrast's own fitted mean shift, which decodes
perfectly, and the readout does not read the true one. *Planted*: the readout reads that shift.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import probes
from experiments.null_cells import unit_rows
from experiments.p_calibration_core import Case, Printed
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.shifts import differences, mean_shift
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import cluster_weights
from probes.gate_interventions import Change, Intervened, Outcome, Subspaces
from probes.gate_judge import judge
from probes.gate_nulls import REFERENCES, null_subspaces, of_controls, of_direction
from probes.gate_numbers import DECIDING, detection, measure
from probes.gate_prompts import FRAME, NEUTRAL, Rows
from probes.gates import GateSettings

D, PAIRS, N_NULL, N_REFERENCE, N_CONTROLS = 12, 16, 99, 39, 39
APART, READS = 1.5, 1.5
SETTINGS = GateSettings(
    alphas=(0.5, 1.0),
    interventions=("mean_ablate", "add"),
    ablation="mean_ablate",
    positions="last",
    onward=False,
    rank=1,
    n_null=N_NULL,
    n_reference=N_REFERENCE,
    n_bootstrap=50,
    n_controls=N_CONTROLS,
    seed=0,
)


class LinearModel(Intervened):
    """What `measure` asks of an intervened model, for log-odds linear in the stream."""

    def __init__(self, values: Tensor, readout: Tensor) -> None:
        n = len(values)
        blank = torch.zeros(2 * n, 1, dtype=torch.long)
        self.rows = Rows(
            tokens=blank,
            mask=blank + 1,
            last=blank[:, 0],
            yes=blank,
            no=blank - 1,
            pair=torch.arange(n).repeat_interleave(2),
            side=torch.tensor([FRAME, NEUTRAL]).repeat(n),
            partner=torch.tensor([1, -1]).repeat(n) + torch.arange(2 * n),
            shared=blank[:, 0] + 1,
            groups=tuple(map(str, range(n))),
        )
        self._x, self._readout = values.flatten(0, 1).float(), readout
        self._aim = values[:, NEUTRAL].mean(0).float()
        self.base = self._answers(self._x[None])

    def run(self, change: Change, subspaces: Subspaces, rows: Tensor | None = None) -> Outcome:
        x = self._x if rows is None else self._x[rows]
        if change.operation == "add":
            return self._answers(x + change.amount * subspaces.steer[:, None])
        along = torch.einsum("rd,nkd->nrk", self._aim - x, subspaces.basis)
        return self._answers(x + torch.einsum("nrk,nkd->nrd", along, subspaces.basis))

    def _answers(self, x: Tensor) -> Outcome:
        odds = (x @ self._readout).double()
        nothing = torch.zeros_like(odds)
        return Outcome(odds, nothing, nothing, nothing)


def gate_draw(seed: int, index: int, planted: bool, *, decoy: bool) -> dict[str, float]:
    g = generator(seed, "gate", index)
    true = unit_rows(torch.randn(D, generator=g))
    scale = 0.3 + torch.rand(D, generator=g)
    values = torch.randn(PAIRS, 2, D, generator=g) * scale
    values[:, FRAME] += APART * true
    away = torch.randn(D, generator=g)
    away = unit_rows(away - (away @ true) * true)
    fitted = mean_shift(differences(values))
    fresh = torch.randn(PAIRS, generator=g).double() @ (differences(values) - fitted)
    readout = READS * (true if planted else away)
    pattern = fitted if planted or decoy else fresh
    groups = {"observed": of_direction(pattern, values, 1)}
    for kind in (DECIDING, *REFERENCES):
        draws = N_NULL if kind == DECIDING else N_REFERENCE
        groups[kind] = null_subspaces(kind, values, draws, rank=1, seed=index)
    others = (
        unit_rows(torch.randn(N_CONTROLS, 1, 1, D, generator=g)) * torch.tensor([1.0, 0.0])[:, None]
        + torch.randn(N_CONTROLS, PAIRS, 2, D, generator=g) * scale
    )
    groups["controls"] = of_controls({str(i): v for i, v in enumerate(others)}, 1)
    clusters = [str(i) for i in range(PAIRS)]
    weights = cluster_weights(clusters, SETTINGS.n_bootstrap, seed=index)
    tests = SETTINGS.tests(APART)
    model = LinearModel(values, readout)
    found = measure(
        model, None, groups, tests, SETTINGS.ablation, weights, seed=index, progress=False
    )
    return _numbers(found, pattern, values, clusters, index)


def _numbers(
    found: object, pattern: Tensor, values: Tensor, clusters: list[str], index: int
) -> dict[str, float]:
    table, facts = found.table, found.facts  # pyright: ignore[reportAttributeAccessIssue]
    rows = table.to_dict("records")
    given = Direction(pattern.float(), Space("resid_post", 0))
    _, p_detection = detection(values, given, clusters, in_sample=False, seed=index)
    known = {
        "ablation": SETTINGS.ablation,
        "n_clusters": PAIRS,
        "n_null": N_NULL,
        "detects": p_detection <= 0.05,
    }
    verdict = judge(rows, facts | known, "pair_residual", "simulated")
    ablation = next(
        r for r in rows if r["intervention"] == "mean_ablate" and r["prompts"] == "frame"
    )
    adds = [r for r in rows if r["intervention"] == "add" and r["scale"] == "probability"]
    steering = verdict.evidence["p_steering"]
    references = {f"{n}_p": float(ablation[f"{n}_p"]) for n in (*REFERENCES, "controls")}
    return references | {
        "p": float(ablation["p"]),
        "p_adjusted": min(float(r["p_adjusted"]) for r in adds),
        "p_steering": math.nan if steering is None else float(steering),
        "p_detection": p_detection,
        "causal": float(verdict.evidence["gate"] not in ("PASS", "PASS*")),
    }


# ---- detection -----------------------------------------------------------------------------
def detection_draw(seed: int, index: int, planted: bool, *, own: bool) -> dict[str, float]:
    """Pairs without a shift (planted: with one), and a direction from elsewhere or from them."""
    g = generator(seed, "detection", index)
    values = torch.randn(PAIRS, 2, D, generator=g)
    true = unit_rows(torch.randn(D, generator=g))
    values[:, FRAME] += DETECTED * planted * true
    point = Space("resid_post", 0)
    direction = Direction(true, point)
    pairs = tuple(Pair(f"item {i}", "+", "-") for i in range(PAIRS))
    clusters = [pair.cluster_id for pair in pairs]
    if own:
        prompts = ContrastSet("simulated", (Contrast("target", "target", pairs),))
        stored = {("target", point.name): values}
        held = PairedActivations("stage", "", prompts, "last", (point,), stored, {}, {})
        settings = {"n_permutations": 199, "n_bootstrap": 20, "progress": False}
        direction = probes.fit(held, seed=index, **settings).direction()  # pyright: ignore[reportArgumentType]
    _, p = detection(values, direction, clusters, in_sample=own, seed=index)
    return {"p_detection": p}


DETECTED = 1.0
_GATE = tuple(f"probes/{name}.py" for name in ("gate_numbers", "gate_judge", "gates"))


def _gate_case(decoy: bool) -> Case:
    null = (
        "none exactly: the true shift is not read, its estimate from 16 pairs a little"
        if decoy
        else "the direction and those in which pairs differ"
    )
    effect = f"the readout reads the shift, {READS:g} nats a unit, {APART:g} units"
    kind = "decoy" if decoy else "one of the null's own"

    def one(
        key: str, where: str, family: str = "", decides: str = "", *, note: str = "",
        columns: tuple[str, ...] | None = None,
    ) -> Printed:  # fmt: skip
        said = "; ".join(filter(None, [kind, note]))
        names = (key,) if columns is None else columns
        return Printed(key, where, _GATE, names, null, effect, family, decides, said)

    signs = "2 alphas, both signs (max-T)"
    printed = (
        one("p", "gate: p of the ablation; verdict: p_ablation", "", "load-bearing",
            columns=("p", "p_ablation"), note="the verdict asks for p ≤ 1 % and an effect of 5 "
            "points or twice its standard error"),
        one("p_adjusted", "gate: p_adjusted of steering", signs, note="feeds p_steering"),
        one("p_steering", "gate, verdict: p_steering", signs, "load-bearing",
            note="the larger of both signs at the best alpha"),
        one("causal", "gate, verdict: `load-bearing` or `necessary only`",
            "every test and floor", "load-bearing", columns=()),
        *(
            one(f"{name}_p", f"gate: {name}_p of the ablation")
            for name in (*REFERENCES, "controls")
        ),
    )  # fmt: skip
    sizes = f"d = {D}, {PAIRS} pairs, {N_NULL} null directions, {N_REFERENCE} of each reference"
    return Case(
        f"gate, {kind}",
        lambda seed, index, planted: gate_draw(seed, index, planted, decoy=decoy),
        printed,
        sizes,
    )


def _detection_case(own: bool) -> Case:
    where = "a direction fitted on the same pairs" if own else "a direction from elsewhere"
    effect = f"a shift of {DETECTED:g} sd along the direction"
    printed = Printed(
        "p_detection", f"gate, verdict: p_detection, {where}", _GATE, ("p_detection",),
        "the two sides of clusters of pairs", effect, "", "detector only", "",
    )  # fmt: skip
    return Case(
        f"detection, {where}",
        lambda seed, index, planted: detection_draw(seed, index, planted, own=own),
        (printed,),
        f"d = {D}, {PAIRS} pairs, 999 flips",
    )


def cases() -> tuple[Case, ...]:
    gates = (_gate_case(decoy) for decoy in (False, True))
    return (*gates, *(_detection_case(own) for own in (False, True)))
