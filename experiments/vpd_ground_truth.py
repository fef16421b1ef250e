"""Does VPD find mechanisms that are known, and nothing where there is nothing?

    python -m experiments.vpd_ground_truth --target tms_5_2 --preset short --seeds 0:5 --out runs/gt

One row per seed: a fresh target (accepted by its own check), decomposed with the named preset of
`vpd_targets.presets`, scored against the truth that the target states. CPU seconds are of training
alone, `time.process_time` on one thread; the target's own training and the scores are not counted.
Every finished seed is a line of ``rows.jsonl``; an interrupted run goes on where it stopped.

Scores: target-CI errors at tolerances 0.1 and 0.2 summed over the sites with a stated pattern; the
lowest MMCS over sites with a frame; alive components; L0 (importance > 0.1 and > 0) on fresh data;
errors of the unmasked, importance-masked and attacked model in units of the all-zero mask's error.

`found`: whether there is a sparse answer at all. Not if the L0 of every site that matters is above
half of its rank, or if the importance-masked model misses more than `LOST` of the output; the row
states which.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.vpd_targets.catalogue import TARGETS, make_target
from experiments.vpd_targets.common import Target
from experiments.vpd_targets.presets import DECOMPOSITIONS
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.host import ModuleHost
from mi_weightspace.vpd.importance import squash
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.stream import SampledStream
from mi_weightspace.vpd.train import Trained, train, zero_mask_error
from mi_weightspace.vpd.truth import alive_counts, target_ci_error

N_EVALUATION = 4_096
PGD_STEPS, PGD_SIZE = 20, 0.1
LOST = 0.05
DENSE = 0.5  # of the rank


@dataclass(frozen=True)
class GroundTruthConfig:
    """Which target, decomposed how, on which seeds.

    Attributes:
        target_size: preset of the target; the decomposition's `preset` is apart.
        overrides: values of the decomposition's configuration that replace the preset's.
    """

    target: str
    preset: str = "short"
    target_size: Literal["toy", "paper"] = "toy"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    overrides: dict[str, Any] = field(default_factory=dict)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(config: GroundTruthConfig, out: Path | None = None, *, progress: bool = True) -> Any:
    """A table with one row per seed; seeds already in ``out/rows.jsonl`` are not run again."""
    import pandas as pd

    journal = None if out is None else out / "rows.jsonl"
    rows = whole_rows(journal)
    for seed in config.seeds:
        if any(row["seed"] == seed and row["config"] == described(config) for row in rows):
            continue
        row = run_seed(config, seed, progress=progress)
        rows.append(row)
        if journal is not None:
            journal.parent.mkdir(parents=True, exist_ok=True)
            with journal.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
    wanted = [r for r in rows if r["config"] == described(config) and r["seed"] in config.seeds]
    return pd.DataFrame(wanted).drop(columns="config")


def described(config: GroundTruthConfig) -> dict[str, Any]:
    """What decides a row, beside its seed; read back from JSON it compares equal."""
    values = DECOMPOSITIONS[config.target][config.preset] | config.overrides
    settings = make_config(values, config.target).model_dump(mode="json")
    return json.loads(
        json.dumps({"target": config.target, "size": config.target_size, "vpd": settings})
    )


def whole_rows(journal: Path | None) -> list[dict[str, Any]]:
    """Rows of a journal; a last line that an interruption cut short is left out."""
    if journal is None or not journal.exists():
        return []
    return [json.loads(line) for line in journal.read_text().split("\n")[:-1]]


def run_seed(config: GroundTruthConfig, seed: int, *, progress: bool = True) -> dict[str, Any]:
    with one_thread():
        start = time.process_time()
        target = make_target(config.target, config.target_size, seed)
        target_seconds = time.process_time() - start
        values = DECOMPOSITIONS[config.target][config.preset] | config.overrides | {"seed": seed}
        settings = make_config(values, config.target)
        host = ModuleHost(target.module, target.sites, metric=target.metric)
        stream = SampledStream(target.sample, settings.batch_size, seed)
        start = time.process_time()
        trained = train(host, stream, settings, progress=progress)
        seconds = time.process_time() - start
        row = score(target, trained, seed)
    return {
        "seed": seed,
        "accepted": target.accepted,
        "cpu_seconds": seconds,
        **row,
        "target_cpu_seconds": target_seconds,
        **{f"target/{name}": value for name, value in target.quality.items()},
        "config": described(config),
    }


@torch.no_grad()
def importances(trained: Trained, batch: Tensor) -> Tensor:
    """Lower importances (*pos, K)."""
    objective = trained.objective
    clean = objective.factors.host.clean(batch)
    z = objective.importance(clean, objective.factors)
    return squash(z, objective.config.importance.leak)[0]


def score(target: Target, trained: Trained, seed: int) -> dict[str, Any]:
    factors = trained.factors
    slices = factors.layout.slices()
    row: dict[str, Any] = {}
    if target.probe is not None and target.patterns:
        ci = importances(trained, target.probe)
        for tolerance in (0.1, 0.2):
            each = {
                site: target_ci_error(ci[:, slices[site]], pattern, tolerance).errors
                for site, pattern in target.patterns.items()
            }
            row[f"ci_error_{tolerance}"] = sum(each.values())
            row |= {f"ci_error_{tolerance}/{site}": n for site, n in each.items()}
    shapes = {
        site: target.geometry(site, factors.reads[site].detach(), factors.writes[site].detach())
        for site in target.frames
    }
    if shapes:
        row["mmcs"] = min(shape.mmcs for shape in shapes.values())
        row |= {f"mmcs/{site}": shape.mmcs for site, shape in shapes.items()}
        row |= {f"ml2r/{site}": shape.ml2r for site, shape in shapes.items()}
    batch = target.sample(N_EVALUATION, generator(seed, "vpd_ground_truth", "evaluation"))
    low = importances(trained, batch)
    for site, place in slices.items():
        g = low[..., place].flatten(0, -2)
        row[f"alive/{site}"], row[f"fires/{site}"] = alive_counts(g).counts
        row[f"l0_0.1/{site}"] = float((g > 0.1).sum(-1).double().mean())
        row[f"l0_0/{site}"] = float((g > 0).sum(-1).double().mean())
    row |= masked_errors(trained, batch, low, seed)
    row["found"], row["reason"] = verdict(target, trained, row)
    return row


def masked_errors(trained: Trained, batch: Tensor, low: Tensor, seed: int) -> dict[str, float]:
    """Unmasked, importance-masked and attacked, divided by the all-zero mask's error.

    The attack is the published one: one source per component and per remainder, shared over the
    batch, 20 sign steps of 0.1 from a uniform draw.
    """
    objective = trained.objective
    clean = objective.factors.host.clean(batch)
    zero = float(zero_mask_error(objective, clean))
    draw = generator(seed, "vpd_ground_truth", "pgd")
    r = torch.rand(objective.sizes[0], generator=draw)
    d = torch.rand(objective.sizes[1], generator=draw)
    for _ in range(PGD_STEPS):
        r.requires_grad_()
        d.requires_grad_()
        loss = distance(trained, clean, low + (1 - low) * r, d)
        up, down = torch.autograd.grad(loss, (r, d))
        r = (r.detach() + PGD_SIZE * up.sign()).clamp(0, 1)
        d = (d.detach() + PGD_SIZE * down.sign()).clamp(0, 1)
    with torch.no_grad():
        nothing = torch.zeros_like(d)
        return {
            "unmasked": float(distance(trained, clean, torch.ones_like(low), nothing)) / zero,
            "ci_masked": float(distance(trained, clean, low, nothing)) / zero,
            "pgd_20": float(distance(trained, clean, low + (1 - low) * r, d)) / zero,
        }


def distance(trained: Trained, clean: Any, m: Tensor, d: Tensor) -> Tensor:
    """The host's metric between its clean and its masked output."""
    from mi_weightspace.vpd.losses import Target as Output

    output = Output.of(clean, trained.factors.host.metric)
    masks = Masks(m, d.expand(*m.shape[:-1], -1))
    return output.distance(trained.objective.masked(clean, masks, train=False))


def verdict(target: Target, trained: Trained, row: dict[str, Any]) -> tuple[bool, str]:
    """Whether a sparse answer was found, and why (not)."""
    if row["ci_masked"] > LOST:
        return False, f"the important parts alone lose {row['ci_masked']:.0%} of the output"
    shares = {}
    for site in target.sites:
        rank = int(torch.linalg.matrix_rank(target.weight(site)))
        if row[f"alive/{site}"]:
            shares[site] = row[f"l0_0.1/{site}"] / rank
    if not shares:
        return False, "no component is ever important"
    if min(shares.values()) > DENSE:
        worst = ", ".join(f"{site} {share:.0%}" for site, share in shares.items())
        return False, f"inputs need most of the rank at every site in use: {worst}"
    sparse = ", ".join(f"{s} {v:.0%}" for s, v in shares.items() if v <= DENSE)
    return True, f"an input needs a small share of the rank: {sparse}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--preset", default="short", help="of vpd_targets.presets")
    parser.add_argument("--size", choices=("toy", "paper"), default="toy", help="of the target")
    parser.add_argument("--seeds", default="0:5", help="first:end")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.preset not in DECOMPOSITIONS[args.target]:
        parser.error(f"--preset {args.preset}: {args.target} has {[*DECOMPOSITIONS[args.target]]}")
    first, end = (int(part) for part in args.seeds.split(":"))
    config = GroundTruthConfig(args.target, args.preset, args.size, tuple(range(first, end)))
    table = run(config, args.out)
    table.to_csv(args.out / f"{args.target}_{args.preset}.csv", index=False)
    print(table.T.to_string())


if __name__ == "__main__":
    main()
