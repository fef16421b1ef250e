"""Does VPD of a difference find what fine-tuning added, where that is known?

    python -m experiments.vpd_finetuned --preset faithful --seeds 0:5 --out runs/finetuned

The target is `vpd_targets.finetuned`: a base that computes 10 of 20 features, and the same model
fine-tuned to compute 5 more. One row per seed; all settings but the seed are those of the preset.

* ``faithful``: C = 20, the parts sum to the difference (its 21st to 24th singular values, which
  AdamW's elementwise steps leave, are below 2 % of the first: C is under the numerical rank, and
  the remainder is reported). What is asked: every new feature, alone in the input, makes one or two
  ``mlp_in`` components important (g > 0.1). Other features' counts stand beside it: fine-tuning
  moved what the base computed too, so they need not be 0.
* ``selective``: C = 5 and no faithfulness; the remainder is attacked like every mask. What is
  asked: PGD-20 in units of K0 at most a third of what the first five singular parts of both
  matrices leave, always on and with the remainder off. Those have no masks to attack; the column
  ``svd_5_attacked`` lets the attack have their remainder, which is the selective run's own
  definition, and is the larger of the two.

Sign ascent stops at the first corner it climbs into, and with two remainders there are few: the
column ``corner`` is the worst of all corners of the remainders' sources, importances as they are or
all 1, each shared over a batch. It is beside ``pgd_20`` because it can be the larger.

Errors are squared, in units of K0 (everything reverted), on `N_BATCHES` batches of the training
law that were not trained on. CPU seconds are of training alone, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.vpd_ground_truth import importances, one_thread, whole_rows
from experiments.vpd_targets.finetuned import FineTuned, FineTunedConfig, build
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.differences.toys import module_difference
from mi_weightspace.vpd.evaluate import evaluate
from mi_weightspace.vpd.evaluate_baselines import svd_factors
from mi_weightspace.vpd.evaluate_stats import records
from mi_weightspace.vpd.ladder import ladder, run_masked, summarise
from mi_weightspace.vpd.losses import Target
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.stream import SampledStream
from mi_weightspace.vpd.train import Trained, train
from mi_weightspace.vpd.truth import one_hot_probe

N_BATCHES, BATCH = 8, 512
PGD = (20, 160)
RANKS = (1, 5)
ON = 0.1
STAGE = "tuned"
BOUND_STEPS = 2_500
Values = dict[str, Any]


def settings(weight: float, n_components: int, **values: Any) -> Values:
    """vpd.md §7 and §9: the toy's own settings, reconstruction in units of K0."""
    return {
        "n_components": n_components,
        "init": "svd",
        "allow_unfaithful": True,
        "normalise": "zero_mask",
        "importance": {"kind": "layerwise_mlp", "hidden": (64,)},
        "faithfulness": {"form": "relative", "weight": 1.0},
        "minimality": {
            "weight": weight,
            "frequency_weight": 0.047 * weight,
            "ema_half_life": None,
            "gamma": (1.0, 0.02),
        },
        "reconstruction": (
            {"source": "uniform", "routing": "uniform_k_subset", "weight": 0.5},
            {"source": "persistent", "routing": "all", "scope": "bc", "weight": 0.5},
        ),
        "n_steps": 4_000,
        "batch_size": BATCH,
        "lr": 2e-3,
        "importance_lr": 2e-3,
        "log_every": 200,
    } | values


NOTHING = {"faithfulness": {"weight": 0.0}}
PRESETS: dict[str, Values] = {
    "faithful": settings(1e-2, 20),
    "selective": settings(1e-2, 5, **NOTHING),
}


@dataclass(frozen=True)
class FinetunedRunConfig:
    """Which preset on which seeds.

    Attributes:
        target: sizes and training of the two models. pull: of the fine-tuning towards the base.
        overrides: values of the decomposition's configuration that replace the preset's.
    """

    preset: str = "faithful"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    target: FineTunedConfig = field(default_factory=FineTunedConfig)
    pull: float = 0.0
    overrides: Values = field(default_factory=dict)


def run(config: FinetunedRunConfig, out: Path | None = None, *, progress: bool = True) -> Any:
    """A table with one row per seed; seeds already in ``out/rows.jsonl`` are not run again."""
    import pandas as pd

    journal = None if out is None else out / "rows.jsonl"
    rows = whole_rows(journal)
    for seed in config.seeds:
        if any(row["seed"] == seed and row["config"] == described(config) for row in rows):
            continue
        row = json.loads(json.dumps(run_seed(config, seed, progress=progress)))
        rows.append(row)
        if journal is not None:
            journal.parent.mkdir(parents=True, exist_ok=True)
            with journal.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
    wanted = [r for r in rows if r["config"] == described(config) and r["seed"] in config.seeds]
    return pd.DataFrame(wanted).drop(columns="config")


def described(config: FinetunedRunConfig) -> Values:
    """What decides a row, beside its seed; read back from JSON it compares equal."""
    found = make_config(PRESETS[config.preset] | config.overrides, config.preset)
    values = found.model_dump(mode="json", exclude={"log_every", "checkpoint_every", "seed"})
    kept = {"target": vars(config.target), "pull": config.pull, "vpd": values}
    return json.loads(json.dumps(kept))


def run_seed(config: FinetunedRunConfig, seed: int, *, progress: bool = True) -> Values:
    with one_thread():
        toy = build(seed, config.pull, config.target)
        values = PRESETS[config.preset] | config.overrides | {"seed": seed}
        host = module_difference(toy.base, toy.tuned, toy.sites, STAGE)
        chosen = make_config(values, config.preset)
        stream = SampledStream(toy.sample, chosen.batch_size, seed)
        start = time.process_time()
        trained = train(host, stream, chosen, progress=progress)
        seconds = time.process_time() - start
        draw = generator(seed, "vpd_finetuned", "evaluation")
        batches = [toy.sample(BATCH, draw) for _ in range(N_BATCHES)]
        row = {"seed": seed, "cpu_seconds": seconds}
        row |= features(toy, trained) | errors(trained, batches, seed, progress)
        ends = corners(trained, batches)
        row |= {"corner": max(ends.values()), "corner_at": max(ends, key=lambda k: ends[k])}
        row |= baselines(trained, batches, seed)
        row |= unchanged(toy, trained, seed)
    attacked = row[f"pgd_{PGD[0]}"]
    row |= {f"svd_{k}_over_pgd": row[f"svd_{k}"] / attacked for k in RANKS}
    row |= {"relative_change": toy.relative_change(), "corners": ends}
    return {**row, "config": described(config)}


# ---- what each feature needs -------------------------------------------------------------------
def features(toy: FineTuned, trained: Trained) -> Values:
    """Components with g > `ON` when one feature alone is at 0.75, by kind of feature."""
    low = importances(trained, one_hot_probe(toy.config.n_features))
    groups = {
        "new": list(toy.new_features),
        "base": list(toy.base_features),
        "idle": list(range(toy.new_features[-1] + 1, toy.config.n_features)),
    }
    row: Values = {}
    for name, place in trained.factors.layout.slices().items():
        counts = (low[:, place] > ON).sum(1)
        for group, members in groups.items():
            row[f"needs/{bare(name)}/{group}"] = counts[members].tolist()
    row["new_1_or_2"] = sum(n in {1, 2} for n in row["needs/mlp_in/new"])
    return row


def bare(name: str) -> str:
    return name.removesuffix(f"@{STAGE}")


# ---- errors in units of K0 ---------------------------------------------------------------------
def errors(trained: Trained, batches: Sequence[Tensor], seed: int, progress: bool) -> Values:
    found = evaluate(
        trained.objective,
        batches,
        budgets=PGD,
        free_budgets=PGD[:1],
        n_pgd_batches=len(batches),
        seed=seed,
        progress=progress,
    )
    row: Values = {"k0": found.masking("zero")}
    for name in ("full", "unmasked", "ci", "stoch", "delta_only"):
        row[name] = found.masking(name, "of_zero")
    for r in records(found.ladder):
        row[f"{r['attack']}_{r['budget']}"] = r["of_zero"]
    for r in records(found.sites):
        row[f"remainder/{bare(r['site'])}"] = r["remainder"]
    for threshold in (ON, 0.0):
        for r in records(found.l0, level="site", threshold=threshold):
            row[f"l0_{threshold:g}/{bare(r['name'])}"] = r["l0"]
        row[f"l0_{threshold:g}"] = found.total_l0(threshold)
    for r in records(found.baselines, baseline="svd"):
        row["svd_at_l0"] = r["of_zero"]
    return row


@torch.no_grad()
def corners(trained: Trained, batches: Sequence[Tensor]) -> dict[str, float]:
    """Errors at m ∈ {g, 1} and d ∈ {0, 1} of each site, in units of K0."""
    objective, host = trained.objective, trained.factors.host
    found: dict[str, float] = {}
    whole = 0.0
    for batch in batches:
        clean = host.clean(batch)
        low, target = importances(trained, batch), Target.of(clean, host.metric)
        off = torch.zeros_like(low)
        whole += float(target.distance(run_masked(objective, clean, Masks(off))))
        for name, m in (("g", low), ("1", torch.ones_like(low))):
            for ends in itertools.product((0.0, 1.0), repeat=objective.sizes[1]):
                output = run_masked(objective, clean, Masks(m, low.new_tensor(ends)))
                key = f"m={name}, d={ends}"
                found[key] = found.get(key, 0.0) + float(target.distance(output))
    return {key: value / whole for key, value in found.items()}


@torch.no_grad()
def always_on(trained: Trained, rank: int) -> Objective:
    """The first singular parts of both updates with every importance 1."""
    factors = trained.factors
    parts = svd_factors(factors, dict.fromkeys(factors.layout.names, rank))

    def importance(clean: Any, factors: Any) -> Tensor:
        return clean.output.new_ones(len(clean.batch), factors.layout.total)

    return Objective(parts, importance, trained.objective.config)  # pyright: ignore[reportArgumentType]


def baselines(trained: Trained, batches: Sequence[Tensor], seed: int) -> Values:
    """``svd_k``: k singular parts of each matrix, the remainder off; ``_attacked``: left to PGD."""
    row: Values = {}
    host = trained.factors.host
    for rank in RANKS:
        objective = always_on(trained, rank)
        apart = whole = 0.0
        with torch.no_grad():
            for batch in batches:
                clean = host.clean(batch)
                target = Target.of(clean, host.metric)
                masks = batch.new_ones(objective.sizes[0])
                apart += float(target.distance(run_masked(objective, clean, Masks(masks))))
                off = torch.zeros_like(masks)
                whole += float(target.distance(run_masked(objective, clean, Masks(off))))
        row[f"svd_{rank}"] = apart / whole
        climbs = ladder(
            objective, batches, budgets=PGD[:1], free_budgets=(), seed=seed, progress=False
        )
        row[f"svd_{rank}_attacked"] = records(summarise(climbs))[0]["of_zero"]
    return row


@torch.no_grad()
def unchanged(toy: FineTuned, trained: Trained, seed: int) -> Values:
    """L0 (g > `ON`) on inputs without the new features: the floor that nothing was taught at."""
    draw = generator(seed, "vpd_finetuned", "unchanged")
    low = importances(trained, toy.without_new(N_BATCHES * BATCH, draw))
    return {
        f"floor/{bare(name)}": float((low[:, place] > ON).sum(1).double().mean())
        for name, place in trained.factors.layout.slices().items()
    }


# ---- what five parts can do --------------------------------------------------------------------
def bounds(seed: int, rank: int, config: FineTunedConfig | None = None) -> Values:
    """Worst corner of the remainders, in units of K0, with `rank` parts of each matrix always on.

    ``svd``: the first singular parts. ``trained``: parts trained for nothing but a small worst
    corner (a soft maximum). An adversary may switch every component on (m = 1), so no decomposition
    into `rank` components can have a smaller worst corner than the best such parts (which the
    training may miss by a little).
    """
    with one_thread():
        toy = build(seed, 0.0, config)
        parts: list[tuple[Tensor, Tensor]] = []
        for site in toy.sites:
            u, s, vh = torch.linalg.svd(toy.change(site))
            root = s[:rank].sqrt()
            parts.append((u[:, :rank] * root, root[:, None] * vh[:rank]))
        draw = generator(seed, "vpd_finetuned", "bounds")
        with torch.no_grad():
            found = {"svd": float(_corner_errors(toy, parts, toy.sample(8 * BATCH, draw)).max())}
        leaves = [x.clone().requires_grad_() for pair in parts for x in pair]
        optimiser = torch.optim.AdamW(leaves, lr=3e-3, weight_decay=0.0)
        moving = list(zip(leaves[::2], leaves[1::2], strict=True))
        for step in range(BOUND_STEPS):
            left = 1 - step / BOUND_STEPS
            optimiser.param_groups[0]["lr"] = 3e-3 * left
            errors = _corner_errors(toy, moving, toy.sample(BATCH, draw))
            sharpness = 20 / max(left, 0.05)
            loss = (sharpness * errors).logsumexp(0) / sharpness
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            last = _corner_errors(toy, moving, toy.sample(8 * BATCH, draw))
    return {"seed": seed, "rank": rank, **found, "trained": float(last.max())}


def _corner_errors(toy: FineTuned, parts: Sequence[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """(4,) errors at d ∈ {0, 1}² with the parts on, over the error of the base."""
    wanted = toy.tuned(x)
    found = []
    for ends in itertools.product((0.0, 1.0), repeat=len(parts)):
        moved = {}
        for (site, path), (write, read), d in zip(toy.sites.items(), parts, ends, strict=True):
            start, kept = toy.base.get_parameter(f"{path}.weight"), write @ read
            moved[f"{path}.weight"] = start + kept + d * (toy.change(site) - kept)
        found.append((torch.func.functional_call(toy.base, moved, x) - wanted).square().mean())
    return torch.stack(found) / (toy.base(x) - wanted).square().mean()


# ---- report ------------------------------------------------------------------------------------
def shown(table: Any) -> Any:
    """One column a seed, lists and numbers short enough to read."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(map(str, value))
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return table.drop(columns="corners", errors="ignore").map(text).set_index("seed").T


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="faithful")
    parser.add_argument("--seeds", default="0:5", help="first:end")
    parser.add_argument("--pull", type=float, default=0.0, help="of fine-tuning towards the base")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuned"))
    parser.add_argument("--bounds", type=int, metavar="RANK", help="`bounds` instead of a run")
    args = parser.parse_args()
    first, end = (int(part) for part in args.seeds.split(":"))
    if args.bounds:
        for seed in range(first, end):
            print(json.dumps(bounds(seed, args.bounds)), flush=True)
        return
    config = FinetunedRunConfig(args.preset, tuple(range(first, end)), pull=args.pull)
    table = run(config, args.out)
    table.to_json(args.out / f"{args.preset}.json", orient="records", indent=1)
    text = shown(table)
    text.to_csv(args.out / f"{args.preset}.csv")
    print(text.to_string())


if __name__ == "__main__":
    main()
