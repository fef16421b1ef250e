"""Score VPD of checkpoint differences on organisms with a known answer (beside SVD's rankings).

    python -m experiments.score_diff_vpd --seeds 400:410 --out runs/diff_vpd

Seeds are declared on the command line before the run and every one is reported. Each cell trains
its organism, decomposes base → sft → dpo jointly with the organism's preset (the same for every
seed), links the components to the planted direction or a fitted probe and to the behaviour, and
compares with `truth.json`. Every cell is kept in a file: an interrupted run goes on where it was.
Output: ``cells/*.json``, ``scores.csv`` and ``scores.md`` (with Clopper-Pearson intervals).

Rows are cut to the ten tokens up to QM, where the answer is decided. *Behaviour*: register
sentences; *broad*: neutral and control sentences. A *behaviour token* is the QM of a register
prompt where the stages differ by at least 5 % of K0.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor

import probes
from mi_weightspace import organisms
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space
from mi_weightspace.core.stats import binomial_interval
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.organisms.language import LOUD, QM, QUIET, REGISTERS, Language, Mixture
from mi_weightspace.organisms.prompts import heldout_prompts
from mi_weightspace.organisms.recipes import BASE_RATES, TAUGHT
from mi_weightspace.vpd.differences.link import LinkConfig, LinkReport, link
from mi_weightspace.vpd.differences.link_cause import Causes, Piece
from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.differences.run import decompose_difference
from mi_weightspace.vpd.differences.unit import per_position, unit_of

ORGANISMS = ("deference", "deference-full", "rank1", "null")
N_TRAIN, N_HELD_OUT, N_CONTROL = 2048, 128, 64
LENGTH = QM + 1
COMMON: dict[str, Any] = {
    "sites": ("blocks.*",),
    "n_components": 4,
    "batch_size": 16,
    "n_steps": 400,
    "importance": {"kind": "layerwise_mlp", "hidden": (16,)},
    "importance_lr": 2e-3,
    "log_every": 10,
}
PRESETS: dict[str, dict[str, Any]] = {
    "deference": COMMON,
    "deference-full": COMMON | {"sites": ("*",)},
    # what is planted dwarfs the noise: an active component has to buy a tenth of K0, and the exact
    # start need not be moved far
    "rank1": COMMON
    | {"n_steps": 300, "lr": 2e-4, "minimality": {"weight": 0.1, "frequency_weight": 0.02}},
    "null": COMMON,
}
EVALUATION: dict[str, Any] = {"budgets": (20,), "free_budgets": (20,), "n_pgd_batches": 2}


# ---- one cell ------------------------------------------------------------------------------
def score_cell(
    name: str, seed: int, size: str = "micro", changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One organism, one seed: the answer beside the truth. `changes`: of the preset, for tests."""
    torch.set_num_threads(1)
    organism = organisms.build(name, size=size, seed=seed, progress=False)
    start = time.process_time()
    lineage = Lineage(dict(organism.stages))
    rows = streams(organism.language, seed)
    parts = decompose_difference(
        lineage,
        rows["behaviour"],
        PRESETS[name] | {"seed": seed} | (changes or {}),
        broad=rows["broad"],
        held_out=rows["behaviour_held_out"],
        held_out_broad=rows["broad_held_out"],
        evaluation=EVALUATION,
        progress=False,
    )
    trained = time.process_time() - start
    behaviour, broad = rows["behaviour_held_out"], rows["broad_held_out"]
    direction = direction_of(organism, lineage, seed)
    found = link(
        parts,
        direction,
        behaviour,
        readout=organism.readout,
        controls=() if name == "rank1" else controls(organism.language, seed),
        broad=broad,
        config=LinkConfig(seed=seed),
    )
    cell: dict[str, Any] = {"organism": name, "seed": seed, "size": size}
    cell |= _sizes(parts) | _stages(parts, behaviour, broad)
    cell |= _components(found, organism.truth)
    if name == "rank1":
        cell |= _planted(parts, found, behaviour)
    if organism.readout is not None:
        cell |= _rankings(parts, found, organism, direction)
    cell |= {"cpu_training": trained, "cpu_all": time.process_time() - start}
    return cell | {"components": json.loads(found.table.to_json(orient="records"))}


def streams(language: Language, seed: int) -> dict[str, Tensor]:
    """Behaviour and broad rows up to QM, to train on and apart."""
    rates = BASE_RATES | dict.fromkeys(REGISTERS, TAUGHT)
    mixtures = {
        "behaviour": Mixture(dict.fromkeys(REGISTERS, 1.0), rates),
        "broad": Mixture({"N": 4.0} | dict.fromkeys(LOUD + QUIET, 1.0), BASE_RATES),
    }
    found = {}
    for stream, mixture in mixtures.items():
        for part, n in (("", N_TRAIN), ("_held_out", N_HELD_OUT)):
            draw = generator(seed, "score diff vpd", stream, part)
            found[stream + part] = language.sample(n, mixture, draw)[0][:, :LENGTH].contiguous()
    return found


def direction_of(organism: organisms.Organism, lineage: Lineage, seed: int) -> Direction:
    """The planted write where one was planted, else a probe fitted where the stream ends up."""
    shape = lineage.source(lineage.stages[0]).shape
    if organism.name == "rank1":
        layer = int(organism.truth["planted_sites"][0].split(".")[1])
        planted = torch.tensor(organism.truth["direction"])
        return Direction(planted, Space("resid_post", layer), "planted")
    target = ContrastSet(organism.contrasts.name, organism.contrasts.targets)
    sites = organism.truth["planted_sites"]
    layer = int(sites[0].split(".")[1]) if sites and sites[0] != "*" else shape.n_layers - 1
    with lineage.opened("sft") as lens:
        bank = probes.fit(
            lens, target, n_permutations=19, n_bootstrap=19, seed=seed, progress=False
        )
    return bank.direction(point=f"resid_post.{layer}")


def controls(language: Language, seed: int) -> tuple[Readout, ...]:
    """The same question about every loud class: does it give its own answer?"""
    found = []
    for name in LOUD:
        draw = generator(seed, "score diff vpd", "control", name)
        prompts = heldout_prompts(language, N_CONTROL, draw, name)
        answer = language.ids[f"ALT{name[1:]}"]
        rows = tuple(tuple(row) for row in prompts.tolist())
        found.append(Readout(f"{name} gives its answer", rows, (answer,)))
    return tuple(found)


# ---- what is measured ----------------------------------------------------------------------
def _sizes(parts: DifferenceDecomposition) -> dict[str, Any]:
    ladder = parts.tables["ladder"]
    pgd = ladder[(ladder["attack"] == "pgd") & (ladder["budget"] == 20)]
    l0 = parts.table[parts.table["site"] == "total"]
    return {
        "k0": parts.config["units"]["behaviour"]["value"],
        "unexplained": parts.config["unexplained"]["behaviour"]["value"],
        "pgd_of_k0": float(pgd["of_zero"].iloc[0]) if len(pgd) else float("nan"),
        "l0": float(l0["l0>0"].iloc[0]) if len(l0) else float("nan"),
        "unconverged": parts.unconverged,
    }


def _stages(parts: DifferenceDecomposition, behaviour: Tensor, broad: Tensor) -> dict[str, Any]:
    """Which stage the behaviour tokens are owed to, and L0 of each stage on either stream."""
    found: dict[str, Any] = {}
    for stream, tokens in (("behaviour", behaviour), ("broad", broad)):
        table = parts.attribution(tokens, attack_steps=0, batch_size=N_HELD_OUT).per_token
        at_end = table[table["position"] == QM]
        changed = at_end[at_end["owed_to"] != "nothing"]
        found[f"changed_{stream}"] = len(changed) / len(at_end)
        for stage in parts.stages[1:]:
            own = (changed["owed_to"] == stage).mean() if len(changed) else float("nan")
            found[f"owed_{stage}_{stream}"] = float(own)
            found[f"l0_{stage}_{stream}"] = float(table[f"l0_{stage}"].mean())
            found[f"l0_{stage}_{stream}_at_QM"] = float(at_end[f"l0_{stage}"].mean())
            still = table[table["owed_to"] == "nothing"]
            found[f"l0_{stage}_{stream}_unchanged"] = float(still[f"l0_{stage}"].mean())
    return found


def _components(found: LinkReport, truth: dict[str, Any]) -> dict[str, Any]:
    table = found.table
    if not len(table):
        return {"n_living": 0, "n_bearing": 0, "bearing": "", "n_bearing_dpo": 0, "top": ""}
    single = table.drop_duplicates(["site", "component"])
    bearing = single[single["bears"]]
    top = single.loc[single["behaviour_share"].fillna(-np.inf).idxmax()]
    written = table[table["verdict"] == "written here"]
    true = set(truth.get("shares", {}).get("carriers", truth["planted_sites"]))
    return {
        "n_living": len(single),
        "living": "; ".join(f"{r.site}:{r.component}" for r in single.itertuples()),
        "behaviour_change": found.config["behaviour_change"],
        "p_behaviour": found.config["p_behaviour_among_controls"],
        "n_bearing": len(bearing),
        "bearing": "; ".join(f"{r.site}:{r.component}" for r in bearing.itertuples()),
        "n_bearing_dpo": int((bearing["stage"] == "dpo").sum()),
        "n_bearing_elsewhere": int((~bearing["matrix"].isin(true)).sum()),
        "top": top["site"],
        "top_share": float(top["behaviour_share"]),
        "top_right": bool(top["matrix"] in true and top["stage"] == "sft"),
        "written": "; ".join(f"{r.site}:{r.component}" for r in written.itertuples()),
    } | _direct_at_the_end(found, top)


def _direct_at_the_end(found: LinkReport, top: pd.Series) -> dict[str, float]:
    """What the component with the largest effect writes along the direction at QM."""
    table = found.tables["positions"]
    own = table[(table["site"] == top["site"]) & (table["component"] == top["component"])]
    own = own[(own["position"] == QM) & (own["side"] == "write")].set_index("stream")["direct"]
    return {f"direct_{stream}_at_QM": float(value) for stream, value in own.items()}


def _planted(
    parts: DifferenceDecomposition, found: LinkReport, behaviour: Tensor
) -> dict[str, Any]:
    """The one component beside the planted write, and what is left of K0 without it."""
    writes = found.table[found.table["side"] == "write"]
    if not len(writes):
        return {"cosine": float("nan"), "reverted_of_k0": float("nan")}
    best = writes.loc[writes["score_share"].abs().idxmax()]
    host: Any = parts.host
    site, c = str(best["site"]), int(best["component"])
    factors = parts.objective.factors
    piece = Piece(site, factors.reads[site][c].detach(), factors.writes[site][c].detach())
    with torch.no_grad():
        clean = host.clean(behaviour)
        output = host.forward(clean, {site: piece.removed(None)})
        left = unit_of(per_position(output, clean.output, "kl")).value
    return {
        "cosine": abs(float(best["cosine"])),
        "planted_found": site,
        "reverted_of_k0": left / parts.config["units"]["behaviour"]["value"],
    }


def _rankings(
    parts: DifferenceDecomposition,
    found: LinkReport,
    organism: organisms.Organism,
    direction: Direction,
) -> dict[str, Any]:
    """Matrices of SFT ranked by their components' effect, and by what SVD gives."""
    host: Any = parts.host
    sites = [name for name in parts.sites if parts.stage_of(name) == "sft"]
    table = found.table.drop_duplicates(["site", "component"]) if len(found.table) else None
    causes = Causes(host, [], organism.readout, (), torch.empty(0, 1), 256)
    scores: dict[str, list[float]] = {"vpd": [], "fro": [], "svd_cosine": [], "svd_effect": []}
    for site in sites:
        update = host.updates[site]
        own = [] if table is None else table[table["site"] == site]["behaviour_share"].tolist()
        scores["vpd"].append(float(sum(own)))
        scores["fro"].append(update.facts.fro)
        u, s, vh = torch.linalg.svd(update.core, full_matrices=False)
        top = Piece(site, vh[0], u[:, 0] * s[0])
        effect = causes.effect(top, 1, 0).behaviour
        scores["svd_effect"].append(effect / causes.whole.behaviour)
        writes = update.site.writes.is_stream
        side = u[:, 0] if writes else vh[0][: update.site.d_in] * _gain(parts, site)
        fits = update.site.reads.is_stream or writes
        cosine = abs(float(direction.pattern @ side / side.norm())) if fits else 0.0
        scores["svd_cosine"].append(cosine)
    return _against_truth(scores, sites, organism.truth)


def _gain(parts: DifferenceDecomposition, site: str) -> Tensor:
    return parts.arrays.get(f"{site}/read_gain", torch.ones(()))


def _against_truth(
    scores: dict[str, list[float]], sites: list[str], truth: dict[str, Any]
) -> dict[str, Any]:
    matrices = [site.partition("@")[0] for site in sites]
    carriers = set(truth.get("shares", {}).get("carriers", truth["planted_sites"]))
    found: dict[str, Any] = {}
    for name, values in scores.items():
        found[f"first_{name}"] = matrices[int(np.argmax(values))] in carriers
        if "shares" in truth:
            known = [truth["shares"]["sites"][m]["share"] for m in matrices]
            found[f"spearman_{name}"] = float(
                pd.Series(values).corr(pd.Series(known), method="spearman")
            )
    return found


# ---- all cells -----------------------------------------------------------------------------
def kept_cell(name: str, seed: int, size: str, out: Path) -> dict[str, Any]:
    """`score_cell`, its result kept in a file."""
    file = out / "cells" / f"{name}-{size}-{seed}.json"
    if not file.is_file():
        found = score_cell(name, seed, size)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found, default=float))
        partial.replace(file)
    return json.loads(file.read_text())


def rate(hits: pd.Series) -> str:
    k, n = int(hits.sum()), len(hits)
    low, high = binomial_interval(k, n)
    return f"{k}/{n} [{low:.2f}, {high:.2f}]"


def summarise(scores: pd.DataFrame) -> str:
    """The README's table."""
    lines = ["| organism | question | right | asked for |", "|---|---|---|---|"]

    def add(organism: str, question: str, hits: pd.Series, asked: str) -> None:
        lines.append(f"| {organism} | {question} | {rate(hits)} | {asked} |")

    def number(organism: str, question: str, values: pd.Series, asked: str = "–") -> None:
        middle = f"{values.median():.3g} [{values.min():.3g}, {values.max():.3g}]"
        lines.append(f"| {organism} | {question}, median [range] | {middle} | {asked} |")

    for name, rows in scores.groupby("organism", sort=False):
        organism = str(name)
        if name == "deference":
            owed = rows["owed_sft_behaviour"]
            add(organism, "≥ 95 % of behaviour tokens owed to SFT", owed >= 0.95, "≥ 8/10")
            number(organism, "share of behaviour tokens owed to SFT", owed)
            for stream in ("behaviour", "broad", "broad_unchanged"):
                number(organism, f"L0 of SFT, {stream}", rows[f"l0_sft_{stream}"])
            add(organism, "planted matrix carries most", rows["top_right"].eq(True), "≥ 8/10")
            add(organism, "no DPO component blamed", rows["n_bearing_dpo"] == 0, "≥ 8/10")
        if name == "deference-full":
            right = (rows["n_bearing"] > 0) & (rows["n_bearing_elsewhere"] == 0)
            add(organism, "load-bearing components all in true carriers", right, "≥ 8/10")
        if name in ("deference", "deference-full"):
            for rival in ("vpd", "svd_effect", "svd_cosine", "fro"):
                add(organism, f"{rival} ranks a carrier first", rows[f"first_{rival}"] == 1, "–")
                if f"spearman_{rival}" in rows and rows[f"spearman_{rival}"].notna().any():
                    number(organism, f"Spearman, {rival}", rows[f"spearman_{rival}"])
        if name == "rank1":
            add(organism, "one component alive", rows["n_living"] == 1, "10/10")
            add(organism, "|cosine| with the planted write ≥ .99", rows["cosine"] >= 0.99, "10/10")
            add(organism, "reverting it takes ≥ 95 % of K0", rows["reverted_of_k0"] >= 0.95, "–")
            number(organism, "share of K0 that reverting takes", rows["reverted_of_k0"], "≥ .95")
        if name == "null":
            add(
                organism,
                "the behaviour is put down to no component",
                rows["n_bearing"] == 0,
                "≥ 9/10",
            )
        number(organism, "PGD-20 / K0", rows["pgd_of_k0"])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", default="400:410", help="FIRST:END, declared beforehand")
    parser.add_argument("--organisms", default=",".join(ORGANISMS))
    parser.add_argument("--size", default="micro")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    jobs = [(n, s) for s in range(first, end) for n in options.organisms.split(",")]
    cells = Parallel(n_jobs=options.jobs, verbose=5)(
        delayed(kept_cell)(n, s, options.size, options.out) for n, s in jobs
    )
    scores = pd.DataFrame([{k: v for k, v in c.items() if k != "components"} for c in cells])
    scores.to_csv(options.out / "scores.csv", index=False)
    text = summarise(scores)
    (options.out / "scores.md").write_text(text + "\n")
    run = vars(options) | {"out": str(options.out), "presets": PRESETS, "evaluation": EVALUATION}
    (options.out / "run.json").write_text(json.dumps(run))
    print(text)


if __name__ == "__main__":
    main()
