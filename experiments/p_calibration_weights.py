"""Simulated sweeps for the p of `project` and of stage attribution.

The geometry is that of `experiments.null_cells`, at width 192: 39 controls, 50 pairs a contrast, a
probe fitted on the target. Three matrices write the stream one after the other; each holds an
unrelated rank-3 change and noise, and passes its own input shift on; the rest of the network
changed as one more such matrix without structure. *Plain*: activations with a power-law bulk,
noise of equal rows. *Rogue*: three coordinates hold 90 % of the activations' variance, the
contrasts all move one of them, and their rows are 6 to 16 times louder in the difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments.null_calibration import TwoStages
from experiments.null_cells import (
    CONCEPT,
    N_CONTROLS,
    N_SAMPLES,
    NOISE_STD,
    PLANTED,
    UNRELATED,
    WEIGHT_STD,
    World,
    activations,
    direction,
    unit_rows,
    world,
)
from experiments.p_calibration_core import ALPHA, Case, Printed
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.models.grammar import ModelShape, shape_of
from mi_weightspace.models.weights import Difference
from mi_weightspace.spectral.decompose import SvdSettings, decompose
from mi_weightspace.spectral.judge import judge, rank
from mi_weightspace.spectral.measure import Row, measure
from mi_weightspace.spectral.stage_evidence import StageEvidence, stage_evidence

D, LAYERS, N_NULL = 192, 3, 199
SHARE = 0.9
WRITER = 1
"""The matrix that writes the plant; under the null the one whose single p is counted."""


@dataclass(eq=False)
class Stack:
    """Matrices of one stage in memory as a `WeightSource`."""

    name: str
    shape: ModelShape
    matrices: tuple[Tensor, ...]

    @property
    def fingerprint(self) -> str:
        return self.name

    def stored(self, site: Site | str) -> Tensor:
        return self.matrices[int(str(site).split(".")[1])]

    weight = stored

    def bias(self, site: Site | str) -> None:
        return None

    read_gain = read_shift = write_gain = factors = bias

    def sites(self, select: Any = None) -> list[Site]:
        return list(_sites())


@lru_cache(maxsize=1)
def _shape() -> ModelShape:
    config = {"model_type": "gpt2", "n_layer": LAYERS, "n_embd": D, "n_head": 4}
    return shape_of(config | {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0})


@lru_cache(maxsize=1)
def _sites() -> tuple[Site, ...]:
    empty = Stack("empty", _shape(), ())
    source = Difference(empty, empty)
    return tuple(source.site(f"blocks.{i}.attn.o") for i in range(LAYERS))


@lru_cache(maxsize=1)
def _contrasts() -> ContrastSet:
    pairs = tuple(Pair(f"item {i}", "+", "-") for i in range(N_SAMPLES))
    controls = (Contrast(f"control {i}", "control", pairs) for i in range(N_CONTROLS))
    return ContrastSet("simulated", (Contrast("target", "target", pairs), *controls))


def _difference(w: World, planted: bool, g: torch.Generator) -> Difference:
    edge = NOISE_STD * 2 * math.sqrt(D)
    before, after = [], []
    for layer in range(LAYERS):
        base = torch.randn(D, D, generator=g) * WEIGHT_STD
        left, right = (unit_rows(torch.randn(len(UNRELATED), D, generator=g)) for _ in range(2))
        change = edge * (left.T * torch.tensor(UNRELATED)) @ right
        change += NOISE_STD * w.gains[:, None] * torch.randn(D, D, generator=g)
        if planted and layer == WRITER:
            change += PLANTED * edge * w.concepts[0][:, None] * w.inputs[0]
        before.append(base)
        after.append(base + change)
    one, other = Stack("before", _shape(), tuple(before)), Stack("after", _shape(), tuple(after))
    return Difference(one, other, stage="tuned")


def _stages(
    w: World, values: Tensor, source: Difference, loudness: float, g: torch.Generator
) -> StageEvidence:
    """Both stages on the same prompts; the later one adds what the matrices changed of it."""
    contrasts, sites = _contrasts(), _sites()
    values = values.clone()
    typical = source.weight(sites[0]).square().mean(1).sqrt()
    size = (N_CONTROLS + 1, D)
    other = torch.randn(size, generator=g) * CONCEPT + loudness * torch.randn(D, generator=g)
    added = other * typical
    inputs, after, before = {}, {}, {}
    for site in sites:
        shared = unit_rows(torch.randn(D, generator=g)) * loudness
        noise = 0.2 / math.sqrt(D) * torch.randn(size, generator=g)
        inputs[site.name] = CONCEPT * w.inputs + shared + noise
        added = added + inputs[site.name] @ source.weight(site).T
        later = values.clone()
        later[:, :, 0] += added[:, None]
        for i, contrast in enumerate(contrasts):
            before[contrast.name, site.writes.canonical.name] = values[i]
            after[contrast.name, site.writes.canonical.name] = later[i]
    points = tuple(site.writes for site in sites)
    means = {name: shift.mean(0) for name, shift in inputs.items()}
    found = {
        stage: PairedActivations(stage, stage, contrasts, "last", points, own, inputs, means)
        for stage, own in (("base", before), ("tuned", after))
    }
    lineage: Any = TwoStages(source)
    return stage_evidence(lineage, contrasts, target="target", activations=found)


def sweep_draw(seed: int, index: int, planted: bool, *, rogue: bool) -> dict[str, float]:
    """Every p of one sweep; `w` and the probe are the same with and without the plant."""
    w = world(seed, index, D)
    values = activations(w, SHARE, confounded=True)
    if not rogue:
        w = replace(w, gains=torch.ones(D))
        values = w.samples.clone()
        values[:, :, 0] += CONCEPT * w.concepts[:, None]
    g = generator(seed, "sweep", index, int(rogue))
    source = _difference(w, planted, g)
    probe = direction(values)
    evidence = _stages(w, values, source, 2 * CONCEPT * rogue, g)
    rows = []
    for site in _sites():
        parts = decompose(source, site, SvdSettings(seed=index, compare_base=False))
        rows.append(Row(parts, "write", probe))
        measure(rows[-1:], source, None, evidence, n_null=N_NULL, seed=index)
    rank(rows)
    return _numbers(rows, evidence)


def _numbers(rows: list[Row], evidence: StageEvidence) -> dict[str, float]:
    """Single p of the writer; the smallest over the matrices of those that are adjusted."""
    run = [str(judge(row, evidence, ALPHA).word) for row in rows]
    adjusted_run = [float(row.values["p_adjusted"]) for row in rows]
    own = rows[WRITER].values
    found = {
        name: float(own[name])
        for name in ("p_sign", "p_row_normalised", "p_isotropic", "p_covariance", "p_permutation")
    }
    alone = [
        Row(r.parts, r.side, r.direction, {k: v for k, v in r.values.items() if k != "p_G"})
        for r in rows
    ]
    words = [str(judge(row, None, ALPHA).word) for row in alone]
    gate = evidence.gates["tuned"]
    return found | {
        "p_lda_rank": min(float(row.values["p_lda_rank"]) for row in rows),
        "p_G": min(float(row.values["p_G"]) for row in rows),
        "p_adjusted run": min(adjusted_run),
        "p_adjusted alone": min(float(row.values["p_adjusted"]) for row in alone),
        "gate_p": gate.p,
        "gate_p_relative": gate.p_relative,
        "gate_p_absolute": gate.p_absolute,
        "aligned": float("aligned" not in words),
        "written here": float("written here" not in run),
    }


_TWIN = "the target contrast with its 39 controls"
_SIGNS = "signs of the rows of D"
_CONCEPT = "a rank-one part along the concept, 3 × the noise edge"
_PROJECT = tuple(f"mi_weightspace/spectral/{name}.py" for name in ("measure", "judge", "project"))
_STAGES = ("mi_weightspace/spectral/stages.py", *_PROJECT)
_SITES = "3 matrices (max-T)"


def _printed(rogue: bool) -> tuple[Printed, ...]:
    here = "rogue coordinates" if rogue else "plain coordinates"
    more = "1000 draws and another width: null_calibration.md" if rogue else ""

    def one(
        key: str,
        where: str,
        null: str,
        *,
        sources: tuple[str, ...] = _PROJECT,
        columns: tuple[str, ...] | None = None,
        family: str = "",
        decides: str = "",
        note: str = "",
    ) -> Printed:
        names = (key,) if columns is None else columns
        said = "; ".join(filter(None, [here, note, more]))
        return Printed(key, where, sources, names, null, _CONCEPT, family, decides, said)

    both = "project, attribution: "
    return (
        one("p_sign", both + "p_sign", _SIGNS, decides="aligned, controls missing"),
        one("p_row_normalised", both + "p_row_normalised", _SIGNS, decides="aligned"),
        one(
            "p_lda_rank",
            both + "p_lda_rank",
            _TWIN,
            family=_SITES,
            decides="aligned",
        ),
        one(
            "p_adjusted alone",
            both + "p_adjusted, weights alone",
            _TWIN,
            columns=("p_adjusted",),
            family=_SITES,
            note="equals p_lda_rank",
        ),
        one(
            "aligned",
            both + "the word `aligned`",
            f"{_TWIN}; {_SIGNS}",
            columns=(),
            family="3 matrices, every test and veto",
            decides="aligned",
        ),
        one("p_G", both + "p_G", _TWIN, family=_SITES, decides="written here"),
        one(
            "p_adjusted run",
            both + "p_adjusted, stages run",
            _TWIN,
            columns=("p_adjusted",),
            family=_SITES,
            note="equals p_G",
        ),
        one(
            "gate_p",
            both + "stage_gate_p; attribution, stages: gate_p",
            _TWIN,
            sources=_STAGES,
            columns=("gate_p", "stage_gate_p"),
            family="3 stream points (max-T)",
            decides="written here, stage wrote it",
            note="the larger of the next two",
        ),
        one(
            "gate_p_relative",
            "attribution, stages: gate_p_relative",
            _TWIN,
            sources=_STAGES,
            family="3 stream points (max-T)",
        ),
        one(
            "gate_p_absolute",
            "attribution, stages: gate_p_absolute",
            _TWIN,
            sources=_STAGES,
            family="3 stream points (max-T)",
        ),
        one(
            "written here",
            both + "the word `written here`",
            _TWIN,
            columns=(),
            family="3 matrices, every test and veto",
            decides="written here",
        ),
        one("p_isotropic", both + "p_isotropic", "a uniformly random direction"),
        one("p_covariance", both + "p_covariance", "draws of N(0, diag of activation variance)"),
        one("p_permutation", both + "p_permutation", "sides of the pairs"),
    )


def cases() -> tuple[Case, ...]:
    sizes = f"d = {D}, {LAYERS} matrices, {N_CONTROLS} controls, {N_SAMPLES} pairs, {N_NULL} flips"
    return tuple(
        Case(
            f"sweep, {'rogue' if rogue else 'plain'}",
            lambda seed, index, planted, rogue=rogue: sweep_draw(seed, index, planted, rogue=rogue),
            _printed(rogue),
            sizes,
        )
        for rogue in (False, True)
    )
