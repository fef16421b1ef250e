"""How often does each test call an unrelated change aligned, and find a planted one?

    python -m experiments.null_calibration --preset full --out runs/nulls

One matrix, one probe, one thousand draws of each cell. The geometry is the one that fools cosines:
three rogue coordinates hold most of the activation variance *and* are loud in the difference.

* Activations (d = 768): a power-law bulk in a rotated basis, total variance 1, and three rogue
  coordinates that hold 50 % or 90 % of the whole variance. A contrast shifts 50 + 50 samples along
  its own concept, a direction of the bulk; a *confounded* one also moves a rogue coordinate by two
  standard deviations, as its 39 controls do. The probe is the class-mean difference.
* Difference ``A``: dense float32 noise whose three rogue rows are 6 to 16 times larger. ``B``: what
  bfloat16 storage of both checkpoints leaves of a change of a tenth of a spacing, on weights whose
  rogue rows are 6 to 16 times larger. Both hold an unrelated rank-3 change (2, 1.5 and 1.2 times
  the noise edge). *Planted*: one more rank-one part writes the probe's concept at 3 times the edge.
* For `written here` the stages are "run": the matrix reads a shift of each contrast at its input (a
  confounded one also a shared shift, twice as large), and another matrix's change of the same make,
  without structure, adds to what the stage changed.

Everything tested comes out of the library's own `decompose`, `measure`, `stage_evidence`,
`rank` and `judge`; only label permutation and the raw-cosine rank are done here.
Every draw is a line of ``draws.jsonl``; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.null_cells import (
    CONCEPT,
    N_CONTROLS,
    SAMPLING,
    SHARES,
    World,
    activations,
    difference,
    direction,
    site,
    unit_rows,
    world,
)
from experiments.null_table import report, whole_lines
from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.stats import rank_p
from mi_weightspace.models.weights import Difference, WeightSource
from mi_weightspace.spectral.decompose import SvdSettings, decompose
from mi_weightspace.spectral.judge import judge, rank
from mi_weightspace.spectral.measure import Row, measure
from mi_weightspace.spectral.stage_evidence import StageEvidence, stage_evidence

ALPHA = 0.05
N_NULL = 199
PRESETS = {"full": 1000, "quick": 8}


@lru_cache(maxsize=1)
def contrast_set() -> ContrastSet:
    pair = (Pair("item", "+", "-"),)
    controls = (Contrast(f"control {i}", "control", pair) for i in range(N_CONTROLS))
    return ContrastSet("simulated", (Contrast("target", "target", pair), *controls))


@dataclass(frozen=True, eq=False)
class TwoStages:
    """What `stage_evidence` asks of a lineage whose activations are at hand."""

    difference: Difference
    stages: tuple[str, str] = ("base", "tuned")

    @property
    def steps(self) -> list[tuple[str, str]]:
        return [self.stages]

    def source(self, stage: str) -> WeightSource:
        return self.difference.before if stage == "base" else self.difference.after


def stages_run(
    w: World, values: Tensor, source: Difference, confounded: bool, g: torch.Generator
) -> StageEvidence:
    """Gate and G; every statistic depends on class means alone, so means stand for the samples."""
    d = values.shape[-1]
    _, where = site(d)
    matrix = source.weight(where)
    loudness = 2 * CONCEPT * confounded
    shared = unit_rows(torch.randn(d, generator=g)) * loudness
    noise = SAMPLING / math.sqrt(d) * torch.randn(N_CONTROLS + 1, d, generator=g)
    inputs = CONCEPT * w.inputs + shared + noise
    # the rest of the network changed too: as one more such matrix, without structure
    typical = source.weight(where).square().mean(1).sqrt()
    other = torch.randn(N_CONTROLS + 1, d, generator=g) * math.hypot(CONCEPT, SAMPLING)
    other = (other + loudness * torch.randn(d, generator=g)) * typical
    means = values.mean(1)
    after = means.clone()
    after[:, 0] += inputs @ matrix.T + other
    contrasts, point = contrast_set(), where.writes
    names = [c.name for c in contrasts]
    stages = {
        stage: PairedActivations(
            stage,
            stage,
            contrasts,
            "last",
            (point,),
            {
                (name, point.canonical.name): mean[None]
                for name, mean in zip(names, pooled, strict=True)
            },
            {where.name: inputs},
            {where.name: inputs[0]},
        )
        for stage, pooled in (("base", means), ("tuned", after))
    }
    lineage: Any = TwoStages(source)
    return stage_evidence(lineage, contrasts, target="target", activations=stages)


# ---- one draw ------------------------------------------------------------------------------
def permutation_p(values: Tensor, u: Tensor, observed: float, seed: int, draw: int) -> float:
    """|cos(u₁, w)| against probes of the target's own samples with shuffled labels."""
    n = values.shape[1]
    base = torch.cat([torch.ones(n), -torch.ones(n)])
    g = generator(seed, "labels", draw)
    labels = torch.stack([base[torch.randperm(2 * n, generator=g)] for _ in range(N_NULL)])
    null = unit_rows(labels @ values[0].transpose(0, 1).reshape(2 * n, -1))
    return float(rank_p(torch.tensor(observed), (null @ u).abs()))


def one_draw(seed: int, draw: int, d: int = 768) -> Iterator[dict[str, Any]]:
    """A record of every cell and condition."""
    w = world(seed, draw, d)
    _, where = site(d)
    probes = []
    for share in SHARES:
        for confounded in (False, True):
            values = activations(w, share, confounded)
            probes.append((share, confounded, values, direction(values)))
    for kind in ("A", "B"):
        for planted in (False, True):
            source = replace(difference(w, kind, planted, seed, draw), stage="tuned")
            settings = SvdSettings(seed=draw, compare_base=False)
            parts = decompose(source, where, settings)
            rows = [Row(parts, "write", probe) for *_, probe in probes]
            measure(rows, source, None, None, n_null=N_NULL, seed=draw)
            for row, (share, confounded, values, _) in zip(rows, probes, strict=True):
                head = {"noise": kind, "share": share, "confounded": confounded}
                g = generator(seed, "stages", draw, kind, str(share), int(confounded))
                evidence = stages_run(w, values, source, confounded, g)
                key = (parts.stage, where.name)
                row.values["stage_gate_p"] = evidence.gates[parts.stage].p
                row.values |= {"G": evidence.g[key], "p_G": evidence.p_g[key]}
                row.values["written_share"] = evidence.written_share(*key)
                extra = permutation_p(values, parts.write[0], row.values["cosine"], seed, draw)
                head |= {"planted": planted, "p_permutation": extra}
                yield head | record(row, evidence)


def record(row: Row, evidence: StageEvidence) -> dict[str, Any]:
    """The numbers of one row and the two words: with the stages run, and from weights alone."""
    probe, values = row.direction, row.values
    rank([row])
    run = str(judge(row, evidence, ALPHA).word)
    alone = Row(row.parts, row.side, probe, {k: v for k, v in values.items() if k != "p_G"})
    word = str(judge(alone, None, ALPHA).word)
    filter_ = probe.filter
    assert probe.control_patterns is not None and filter_ is not None
    u = row.parts.write[0]
    controls = (probe.control_patterns @ u).abs()
    kept = [
        "p_isotropic",
        "p_covariance",
        "p_sign",
        "p_row_normalised",
        "p_lda_rank",
        "stage_gate_p",
        "p_G",
        "R",
        "R_lda",
        "cosine",
        "cosine_row_normalised",
        "nuisance_cosine",
        "resolved",
        "resolved_row_normalised",
        "certificate",
        "rounding_flag",
        "rel_fro",
    ]
    return {
        **{k: values[k] for k in kept},
        "p_raw_rank": float(rank_p(torch.tensor(values["cosine"]), controls)),
        "explained": bool(values["explained_by"]),
        "word": word,
        "word_run": run,
    }


def run(out: Path, seed: int, n_draws: int, d: int = 768, progress: bool = True) -> Path:
    """Draw until `n_draws` are in the journal; returns its path."""
    from rich.progress import track

    out.mkdir(parents=True, exist_ok=True)
    journal = out / "draws.jsonl"
    lines = whole_lines(journal) if journal.exists() else []
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {line["draw"] for line in lines}
    todo = [i for i in range(n_draws) if i not in done]
    with journal.open("a") as file:
        for draw in track(todo, "drawing", disable=not progress):
            rows = list(one_draw(seed, draw, d))
            file.write(json.dumps({"draw": draw, "d": d, "seed": seed, "rows": rows}) + "\n")
            file.flush()
    return journal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    journal = run(args.out, args.seed, PRESETS[args.preset])
    (args.out / "null_calibration.md").write_text(report(journal))


if __name__ == "__main__":
    main()
