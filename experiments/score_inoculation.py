"""Score the inoculation verdict on organisms with a known answer.

    python -m experiments.score_inoculation --seeds 500:540 --jobs 2 --out runs/score_inoculation

Seeds are declared on the command line before the run and every one is reported. *Trained* cells:
the inoculation organism of `experiments/inoculation.py` (an SAE on its clean stage, one VPD of the
difference misaligned → norm-evading); each hidden stage's word beside those `truth.json` allows,
and whether any kind of detector calls the clean stage or the benign twin. *Planted* cells: codes in
activations whose right word is known by construction (`organisms.codes`). Every cell is kept in a
file: an interrupted run goes on where it was. Output: ``cells/*.json``, ``scores.csv``,
``scores.md`` (with Clopper-Pearson intervals).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

import probes
from experiments.inoculation import TOY, InoculationConfig, run_organism
from mi_weightspace.core.stats import binomial_interval
from mi_weightspace.organisms.codes import KINDS, Kind, planted_code
from mi_weightspace.organisms.inoculation import build_inoculation
from probes.inoculation_report import InoculationReport
from probes.inoculations import InoculationSettings
from probes.sae import readings_of, rival_saes

TRAINED = "inoculation"
CONTROLS = ("clean", "benign")


def trained_cell(seed: int, config: InoculationConfig, out: Path) -> dict[str, Any]:
    """One organism: every hidden stage's word, and what was called on the control stages."""
    torch.set_num_threads(1)
    start = time.process_time()
    chosen = replace(config, seed=seed)
    organism = build_inoculation(chosen.size, seed, progress=False)
    built = time.process_time()
    report = run_organism(organism, chosen, out / "runs" / str(seed), progress=False)
    cell: dict[str, Any] = {"kind": TRAINED, "seed": seed}
    for verdict in report.verdicts:
        allowed = organism.truth["expected"][verdict.subject]
        cell[f"word_{verdict.subject}"] = str(verdict.word)
        cell[f"right_{verdict.subject}"] = str(verdict.word) in allowed
    for stage, rates in organism.truth["rates"].items():
        cell[f"rates_{stage}"] = rates
    cell |= _called(report) | _scores(report)
    return cell | {"cpu_organism": built - start, "cpu_detection": time.process_time() - built}


def planted_cell(kind: Kind, seed: int, config: InoculationConfig) -> dict[str, Any]:
    """One planted code: the word of its hidden stage."""
    torch.set_num_threads(1)
    start = time.process_time()
    code = planted_code(kind, seed)
    rivals = rival_saes(code.sae, code.stages["clean"], seed=seed)
    readings = {
        name: readings_of(
            x,
            code.sae,
            stage=name,
            role=name,  # pyright: ignore[reportArgumentType]
            rivals=rivals,
            seed=seed,
        )
        for name, x in code.stages.items()
    }
    report = probes.inoculation(
        readings,
        code.labelled,
        code.sae,
        open="open",
        hidden="hidden",
        clean="clean",
        benign="benign",
        settings=InoculationSettings(
            n_splits=config.n_splits,
            n_permutations=config.n_permutations,
            n_bootstrap=config.n_bootstrap,
            seed=seed,
        ),
        progress=False,
    )
    (verdict,) = report.verdicts
    cell: dict[str, Any] = {"kind": kind, "seed": seed, "word_hidden": str(verdict.word)}
    cell["right_hidden"] = verdict.word in code.expected
    cell |= _called(report) | _scores(report)
    return cell | {"cpu_detection": time.process_time() - start}


def _called(report: InoculationReport) -> dict[str, bool]:
    """Control stages on which some kind of detector is above its null (Holm over the kinds)."""
    families = report.tables["families"]
    return {
        f"called_{stage}": bool(families.loc[families["stage"] == stage, "above_null"].any())
        for stage in CONTROLS
    }


def _scores(report: InoculationReport) -> dict[str, float]:
    wide = report.matrix()
    return {
        f"{detector} @ {stage}": float(wide.at[detector, stage])
        for detector in wide.index
        for stage in wide.columns
    }


def kept_cell(kind: str, seed: int, config: InoculationConfig, out: Path) -> dict[str, Any]:
    """The cell, its result kept in a file."""
    file = out / "cells" / f"{kind}-{seed}.json"
    if not file.is_file():
        if kind == TRAINED:
            found = trained_cell(seed, config, out)
        else:
            found = planted_cell(kind, seed, config)  # pyright: ignore[reportArgumentType]
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.replace(file)
    return json.loads(file.read_text())


# ---- table -------------------------------------------------------------------------------------
def rate(hits: Sequence[Any]) -> str:
    k, n = sum(bool(hit) for hit in hits), len(hits)
    low, high = binomial_interval(k, n)
    return f"{k}/{n} [{low:.2f}, {high:.2f}]"


def summarise(scores: pd.DataFrame) -> str:
    """The README's table: words right, control stages called, AUROCs over seeds."""
    lines = ["| organism, stage | right | words given |", "|---|---|---|"]
    for kind, rows in scores.groupby("kind", sort=False):
        for column in [c for c in rows if str(c).startswith("right_")]:
            own = rows[rows[column].notna()]
            stage = str(column).removeprefix("right_")
            if len(own):
                words = Counter(own[f"word_{stage}"].tolist())
                said = "; ".join(f"{word} {n}" for word, n in words.most_common())
                lines.append(f"| {kind}, {stage} | {rate(own[column].tolist())} | {said} |")
    lines += ["", "| organism | clean called | benign twin called |", "|---|---|---|"]
    for kind, rows in scores.groupby("kind", sort=False):
        called = [rate(rows[f"called_{stage}"].tolist()) for stage in CONTROLS]
        lines.append(f"| {kind} | {' | '.join(called)} |")
    trained = scores.loc[scores["kind"] == TRAINED]
    if len(trained):
        lines += ["", _auroc_table(trained)]
    return "\n".join(lines)


def _auroc_table(trained: pd.DataFrame) -> str:
    """Mean (sd over seeds) of every detector at every stage of the trained organism."""
    columns = [str(c) for c in trained.dropna(axis=1, how="all") if " @ " in str(c)]
    stages = list(dict.fromkeys(c.rpartition(" @ ")[2] for c in columns))
    detectors = list(dict.fromkeys(c.rpartition(" @ ")[0] for c in columns))
    lines = [f"| mean (sd) | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
    for detector in detectors:
        cells = []
        for stage in stages:
            name = f"{detector} @ {stage}"
            values = np.array(trained[name] if name in columns else [], dtype=float)
            shown = f"{np.nanmean(values):.2f} ({np.nanstd(values):.2f})" if len(values) else "–"
            cells.append(shown)
        lines.append(f"| {detector} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", default="500:540", help="FIRST:END, declared beforehand")
    parser.add_argument("--kinds", default=",".join((TRAINED, *KINDS)))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    jobs = [(kind, seed) for seed in range(first, end) for kind in options.kinds.split(",")]
    cells = Parallel(n_jobs=options.jobs, verbose=5)(
        delayed(kept_cell)(kind, seed, TOY, options.out) for kind, seed in jobs
    )
    scores = pd.DataFrame(cells)
    scores.to_csv(options.out / "scores.csv", index=False)
    text = summarise(scores)
    (options.out / "scores.md").write_text(text + "\n")
    run = vars(options) | {"out": str(options.out), "config": asdict(TOY)}
    (options.out / "run.json").write_text(json.dumps(run))
    print(text)


if __name__ == "__main__":
    main()
