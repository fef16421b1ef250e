"""Score `attribute_stages` on trained organisms with a known answer (claim 1, ground truth).

    python -m experiments.score_stage_attribution --seeds 0:20 --out runs/score --jobs 2

Seeds are declared on the command line before the run and every one is reported. Each seed trains
its organism (about 20 CPU-seconds at micro size), asks the question a user would ask, and compares
the answer with `truth.json`. Output: ``scores.csv`` (a row per organism and seed), ``decoys.csv``
(a row per decoy) and ``scores.md`` (the table of the README, with Clopper-Pearson intervals).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed

import mi_weightspace as mw
import probes
from mi_weightspace import organisms
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.seeds import numpy_generator
from mi_weightspace.core.stats import binomial_interval
from mi_weightspace.core.verdict import Word
from mi_weightspace.spectral.judge import WRITTEN_SHARE
from mi_weightspace.spectral.path import REST
from mi_weightspace.spectral.stage_evidence import harvest_stages, stage_evidence

ORGANISMS = ("deference", "deference-full", "copy", "null")
ALPHA = 0.05


def score_seed(name: str, seed: int, size: str, n_decoys: int) -> tuple[dict[str, Any], list[dict]]:
    """One organism, one seed: the answer beside the truth."""
    torch.set_num_threads(1)
    organism = organisms.build(name, size=size, seed=seed, progress=False)
    lineage = mw.Lineage(organism.stages)
    prompts = organism.contrasts
    # the path attribution is scored where more than one matrix was trained
    readout = organism.readout if "shares" in organism.truth else None
    acts, values = harvest_stages(lineage, prompts, readout=readout, progress=False)
    bank = probes.fit(
        acts["sft"], prompts, n_permutations=19, n_bootstrap=19, seed=seed, progress=False
    )
    evidence = stage_evidence(
        lineage, prompts, activations=acts, readout_values=values, progress=False
    )
    report = mw.attribute_stages(
        lineage,
        bank,
        prompts=prompts,
        readout=readout,
        evidence=evidence,
        updates=[
            mw.svd(lineage.diff(a, b), seed=seed, compare_base=False, progress=False)
            for a, b in lineage.steps
        ],
        n_null=199,
        seed=seed,
        progress=False,
    )
    row: dict[str, Any] = {"organism": name, "seed": seed, "size": size}
    row |= {f"readout_{s}": value for s, value in values.items()}
    row |= {"cpu_seconds": organism.truth["cpu_seconds"]}
    row |= {f"rate_{s}": rates["R4"] for s, rates in organism.truth["rates"].items()}
    row |= _words(report, organism.truth)
    row |= _carriers(report, organism.truth, seed)
    decoys = _decoys(organism, lineage, acts, seed, n_decoys) if n_decoys else []
    return row, decoys


def _words(report: mw.Report, truth: dict[str, Any]) -> dict[str, Any]:
    """Stage gate, sites named, onset."""
    stages = report.tables["stages"].set_index("stage")
    table = report.table
    written = table[table["verdict"] == Word.WRITTEN_HERE]
    named = {(r["stage"], r["site"]) for r in written.to_dict("records")}
    planted = {(truth.get("planted_stage"), s) for s in truth["planted_sites"]}
    result: dict[str, Any] = {
        "gate_p_sft": float(stages.loc["sft", "gate_p"]),
        "gate_p_relative_sft": float(stages.loc["sft", "gate_p_relative"]),
        "gate_p_relative_dpo": float(stages.loc["dpo", "gate_p_relative"]),
        "gate_p_dpo": float(stages.loc["dpo", "gate_p"]) if "dpo" in stages.index else np.nan,
        "onset": stages.loc["sft", "onset"],
        "named": "; ".join(sorted(f"{a}:{b}" for a, b in named)),
        "n_named": len(named),
        "n_significant": int(((table["p_G"] <= ALPHA) & (table["stage_gate_p"] <= ALPHA)).sum()),
        "named_without_share": "; ".join(
            sorted(
                {
                    f"{r['stage']}:{r['site']}"
                    for r in table.to_dict("records")
                    if r["p_G"] <= ALPHA and r["stage_gate_p"] <= ALPHA
                }
            )
        ),
        "n_single_component": int((written["named_k"] == 1).sum()),
        "n_named_other": len(named - planted),
        "verdict_sft": stages.loc["sft", "verdict"],
    }
    result["onset_right"] = bool(truth.get("onset")) and result["onset"] == truth.get("onset")
    result["planted_written"] = bool(planted) and planted <= named
    return result


def _carriers(report: mw.Report, truth: dict[str, Any], seed: int) -> dict[str, Any]:
    """Path attribution against each matrix's true share, beside its rivals."""
    if "shares" not in truth:
        return {}
    shares = {site: row["share"] for site, row in truth["shares"]["sites"].items()}
    carriers = set(truth["shares"]["carriers"])
    path = report.tables["path"].query("stage == 'sft'").set_index("site")["path_share"]
    path = path.drop(index=REST, errors="ignore")
    order = [s for s in shares if s in path.index]
    true = np.array([shares[s] for s in order])
    sign = np.sign(true[np.abs(true).argmax()])
    own = report.table[report.table["stage"] == "sft"]
    # a matrix that writes the stream is judged by what it writes
    table = own.sort_values("side", ascending=False).groupby("site").first().reindex(order)
    rng = numpy_generator(seed, "random site")
    rivals = {
        "path": path.reindex(order).to_numpy() * sign,
        "fro": _column(table, "fro"),
        "cosine": _column(table, "cosine").__abs__(),
        "R": _column(table, "R"),
        "effect_share": _column(table, "effect_share"),
        "random": rng.random(len(order)),
    }
    result: dict[str, Any] = {"n_carriers": len(carriers), "n_matrices": len(order)}
    for name, values in rivals.items():
        filled = np.nan_to_num(values, nan=-np.inf)
        result[f"first_{name}"] = order[int(filled.argmax())] in carriers
        ranks = pd.Series(values).corr(pd.Series(true * sign), method="spearman")
        result[f"spearman_{name}"] = float(ranks)
    named = [n.split(":")[1] for n in _words(report, truth)["named"].split("; ") if n]
    result["named_non_carrier"] = any(n not in carriers for n in named)
    return result


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    return table[name].to_numpy(dtype=float) if name in table else np.full(len(table), np.nan)


def _decoys(
    organism: Any, lineage: mw.Lineage, acts: dict[str, Any], seed: int, n: int
) -> list[dict[str, Any]]:
    """Word-disjoint, equally decodable control contrasts asked about as if they were the target."""
    return [
        {"organism": organism.name, "seed": seed} | _decoy(chosen, acts, lineage)
        for chosen in organisms.decoys(organism, n)
    ]


def _decoy(chosen: ContrastSet, acts: dict[str, Any], lineage: mw.Lineage) -> dict[str, Any]:
    """The decision rule itself: the stage gate and G, both at 5 %, and half of the change."""
    own = {stage: found.select(chosen) for stage, found in acts.items()}
    evidence = stage_evidence(lineage, chosen, activations=own, progress=False)
    passed = [k for k, gate in evidence.gates.items() if gate.p <= ALPHA]
    named = [
        key
        for key, p in evidence.p_g.items()
        if p <= ALPHA and key[0] in passed and evidence.written_share(*key) >= WRITTEN_SHARE
    ]
    return {
        "decoy": chosen.targets[0].name,
        "n_controls": evidence.n_controls,
        "accepted": bool(named),
        "gate_p": min(gate.p for gate in evidence.gates.values()),
        "p_G": min(evidence.p_g.values()),
    }


def kept_seed(name: str, seed: int, size: str, n_decoys: int, out: Path) -> tuple[Any, Any]:
    """`score_seed`, its result kept in a file: an interrupted run goes on where it was."""
    file = out / "seeds" / f"{name}-{size}-{seed}.json"
    if not file.is_file():
        found = score_seed(name, seed, size, n_decoys)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found, default=float))
        partial.replace(file)
    return tuple(json.loads(file.read_text()))


def rate(k: int, n: int) -> str:
    low, high = binomial_interval(k, n)
    return f"{k}/{n} [{low:.2f}, {high:.2f}]"


def summarise(scores: pd.DataFrame, decoys: pd.DataFrame) -> str:
    """The README's table."""
    lines = ["| organism | question | right | asked for |", "|---|---|---|---|"]

    def add(organism: str, question: str, hits: pd.Series, asked: str) -> None:
        lines.append(f"| {organism} | {question} | {rate(int(hits.sum()), len(hits))} | {asked} |")

    for name, rows in scores.groupby("organism", sort=False):
        n = len(rows)
        if name == "deference":
            add(name, "stage gate names SFT", rows.gate_p_sft <= ALPHA, "≥ 19/20")
            add(name, "stage gate does not name DPO", rows.gate_p_dpo > ALPHA, "≥ 18/20")
            add(name, "planted site `written here`", rows.planted_written, "≥ 16/20")
            add(name, "no other site of any stage", rows.n_named_other == 0, "≥ 18/20")
            add(name, "onset point right", rows.onset_right, "≥ 18/20")
        elif name == "deference-full":
            add(name, "path attribution ranks a carrier first", rows.first_path, "≥ 18/20")
            add(name, "names no non-carrier", ~rows.named_non_carrier.astype(bool), "≥ 18/20")
            for rival in ("fro", "cosine", "R", "effect_share", "random"):
                add(name, f"rival: argmax of {rival}", rows[f"first_{rival}"], "–")
            for rival in ("path", "fro", "cosine", "R", "effect_share", "random"):
                median = rows[f"spearman_{rival}"].median()
                asked = "≥ .6" if rival == "path" else "–"
                lines.append(
                    f"| {name} | median Spearman, {rival} | {median:.2f} (n={n}) | {asked} |"
                )
        elif name == "copy":
            add(name, "no single component named", rows.n_single_component == 0, "≥ 18/20")
            add(name, "stage gate names SFT", rows.gate_p_sft <= ALPHA, "–")
        elif name == "null":
            add(name, "no `written here` at all", rows.n_named == 0, "≥ 18/20")
            add(
                name,
                "stage gate names no stage",
                (rows.gate_p_sft > ALPHA) & (rows.gate_p_dpo > ALPHA),
                "–",
            )
    if len(decoys):
        add("decoys", "refused", ~decoys.accepted.astype(bool), "≥ 95 % of ≥ 200")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", default="0:20", help="FIRST:END, declared beforehand")
    parser.add_argument("--organisms", default=",".join(ORGANISMS))
    parser.add_argument("--size", default="micro")
    parser.add_argument("--decoys", type=int, default=12, help="decoys per deference seed")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    jobs = [(n, s) for s in range(first, end) for n in options.organisms.split(",")]
    results = Parallel(n_jobs=options.jobs, verbose=5)(
        delayed(kept_seed)(
            n, s, options.size, options.decoys if n == "deference" else 0, options.out
        )
        for n, s in jobs
    )
    scores = pd.DataFrame([row for row, _ in results])
    decoys = pd.DataFrame([d for _, rows in results for d in rows])
    options.out.mkdir(parents=True, exist_ok=True)
    scores.to_csv(options.out / "scores.csv", index=False)
    decoys.to_csv(options.out / "decoys.csv", index=False)
    text = summarise(scores, decoys)
    (options.out / "scores.md").write_text(text + "\n")
    (options.out / "run.json").write_text(json.dumps(vars(options) | {"out": str(options.out)}))
    print(text)


if __name__ == "__main__":
    main()
