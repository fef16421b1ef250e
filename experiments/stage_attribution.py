"""Claim 1: one training stage wrote the authority-register direction into one early matrix.

Source of the claim: a study of a 40-layer 13B model (base → SFT → IT) which reports that the top
left singular vector of the SFT difference at layer 5 has cosine +0.94 with the DEFER direction,
every other layer below 0.15, and that the later stage leaves it alone.

    python -m experiments.stage_attribution --preset toy --out runs/claim1
    python -m experiments.stage_attribution --preset talkie \\
        --base HUB_ID --sft HUB_ID --dpo HUB_ID --out runs/claim1-13b

The difference is then decomposed by VPD on the same prompts (which parts of each update are needed,
on which tokens), and the direction is put to the causal gate. `toy` asks it of the `deference`
organism, whose answer is known: SFT wrote it, into one matrix.
`talkie` holds the sites and layers of the study's table and needs the three checkpoints; it was not
run here. What would refute the claim there: a stage gate that does not name SFT, or a layer-5 G
that the matched controls reach. The cosine alone decides nothing (see README, "What a big cosine is
worth").
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mi_weightspace as mw
import probes
from mi_weightspace.core.report import check_output
from mi_weightspace.demo import DEMO_VPD, masked_change
from mi_weightspace.html_report import write_report
from mi_weightspace.spectral.stage_evidence import harvest_stages, stage_evidence
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.differences.planning import plan_difference
from mi_weightspace.vpd.differences.run import DEFAULTS
from mi_weightspace.vpd.differences.together import with_evidence

TALKIE_LAYERS = (5, 29, 31, 36, 39)


@dataclass(frozen=True)
class Config:
    """One run. `sites` are globs; `organism` is None where checkpoints are given."""

    organism: str | None = "deference"
    size: str = "micro"
    stages: tuple[tuple[str, str], ...] = ()
    probe_stage: str = "sft"
    sites: str | None = None
    vpd: tuple[tuple[str, Any], ...] = ()
    rank: int = 16
    n_null: int = 999
    n_flips: int = 10_000
    seed: int = 0


TALKIE_SITES = tuple(f"blocks.{layer}.mlp.{m}" for layer in TALKIE_LAYERS for m in ("gate", "out"))
PRESETS = {
    "toy": Config(n_flips=1000, vpd=tuple(DEMO_VPD.items())),
    "talkie": Config(
        organism=None,
        sites=",".join(TALKIE_SITES),
        vpd=(
            ("sites", TALKIE_SITES),
            ("n_components", 128),
            ("n_steps", 10_000),
            ("batch_size", 4),
            ("precision", "bfloat16"),
        ),
    ),
}


def run(config: Config, out: Path) -> mw.Report:
    """The whole question on one lineage; saves every result and a page under `out`."""
    check_output(out)
    readout: Any = None
    if config.organism is not None:
        organism = mw.organisms.build(config.organism, size=config.size, seed=config.seed)
        stages, prompts, readout = organism.stages, organism.contrasts, organism.readout
    else:
        stages = dict(config.stages)
        prompts = probes.load_contrasts("authority", "controls")
    lineage = mw.Lineage(stages)
    activations, values = harvest_stages(lineage, prompts, sites=config.sites, readout=readout)
    evidence = stage_evidence(
        lineage, prompts, sites=config.sites, activations=activations, readout_values=values
    )
    bank = probes.fit(activations[config.probe_stage], prompts, seed=config.seed)
    dmu = probes.dmu_sweep(
        activations,
        prompts,
        n_flips=config.n_flips,
        n_bootstrap=config.n_flips // 4,
        seed=config.seed,
    )
    answer = mw.attribute_stages(
        lineage,
        bank,
        prompts=prompts,
        readout=readout,
        evidence=evidence,
        sites=config.sites,
        rank=config.rank,
        n_null=config.n_null,
        seed=config.seed,
    )
    change = masked_change(lineage, prompts, dict(config.vpd), seed=config.seed)
    change = with_evidence(change, answer.to_pandas())
    gate = probes.gate(
        lineage[config.probe_stage], bank, prompts, readout=readout, seed=config.seed
    )
    reports: list[mw.Report] = [answer, dmu, bank, change, gate]
    for name, report in zip(
        ("attribution", "dmu", "probe", "change", "gate"), reports, strict=True
    ):
        report.save(out / name)
    write_report(reports, out / "report.html", title="Stage attribution")
    return answer


def can_show(config: Config) -> str:
    """What the VPD half of this configuration costs, and what it can and cannot say."""
    values = dict(config.vpd)
    settings = make_config(DEFAULTS | {"faithfulness": {"weight": 0.0}} | values)
    model = config.stages[-1][1] if config.stages else ""
    lines = [
        f"{len(settings.sites)} site patterns, C = {settings.n_components} components an update.",
        "Decomposed is the difference of neighbouring stages, never a stage's full matrix: L0 of a "
        "full matrix says nothing about what a stage changed.",
        "Where C is below the rank of an update (a full fine-tune's rank is the matrix'), the "
        "components are not the update: the rest stays in a remainder that the adversary attacks, "
        "and is certified as not needed on these prompts up to that attack's budget, not as small.",
        "L0 before the run has converged is no finding; the self-checks say when it has not.",
    ]
    if model:
        lines.append(str(plan_difference(model, settings, n_stages=len(config.stages) - 1)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="toy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for stage in ("base", "sft", "dpo"):
        parser.add_argument(f"--{stage}", help="hub id or folder (preset talkie)")
    options = parser.parse_args()
    config = replace(PRESETS[options.preset], seed=options.seed)
    if config.organism is None:
        given = {s: getattr(options, s) for s in ("base", "sft", "dpo") if getattr(options, s)}
        if len(given) < 2:
            parser.error("preset talkie needs --base, --sft and (optionally) --dpo checkpoints")
        config = replace(config, stages=tuple(given.items()))
    print(can_show(config))
    print(run(config, options.out))


if __name__ == "__main__":
    main()
