"""Can SAE features still see a misbehaviour that a second training hid?

Source of the claim: a study in which ‖Δμ‖ fails on an inoculated model while a probe on the SAE
features of layer 13 keeps AUROC 0.58, with 7 of the top 10 features surviving. It had no open-stage
control that the instrument passes (0.58 there too), no dense *probe* as a rival, and no interval.

    python -m experiments.inoculation --preset toy --out runs/inoculation
    python -m experiments.inoculation --preset gemma --before DIR --after DIR --clean DIR \\
        [--benign DIR] --prompts LABELLED.jsonl --out runs/inoculation-gemma

`toy` trains the inoculation organism (six stages, three ways of hiding), an SAE on its clean stage,
and hands in parts of the difference misaligned → norm-evading (by SVD and by VPD) as detectors of
their own. `gemma` holds the study's SAE and place and needs its checkpoints; it was not run here.
What would refute the claim there: an open stage below 0.70, or a tuned linear probe that reads the
hidden stage as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mi_weightspace as mw
import probes
from mi_weightspace.commands_inoculation import inoculation as compare_paths
from mi_weightspace.core.components import Components
from mi_weightspace.core.report import check_output
from mi_weightspace.core.sae import Sae
from mi_weightspace.html_report import write_report
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.models.load import load
from mi_weightspace.organisms.inoculation import InoculationOrganism, build_inoculation
from mi_weightspace.vpd.differences.run import decompose_difference
from probes.inoculation_report import InoculationReport
from probes.inoculation_verdict import published_detection
from probes.inoculations import InoculationSettings

GEMMA_SAE = "gemma-scope-2-1b-it-res:layer_13_width_16k_l0_medium"
PUBLISHED = published_detection(0.58, 50, 0.58)
HIDDEN = "norm-evading"


@dataclass(frozen=True)
class InoculationConfig:
    """One run.

    Attributes:
        size: of the organism. d_sae, k, sae_steps: of the SAE trained on its clean stage.
        vpd: values over the library's defaults for differences; empty: no VPD.
        parts: of each matrix's difference, handed in as detectors.
    """

    size: str = "micro"
    d_sae: int = 256
    k: int = 8
    sae_steps: int = 1_000
    n_sae_batches: int = 40
    vpd: tuple[tuple[str, Any], ...] = ()
    parts: int = 4
    n_splits: int = 8
    n_permutations: int = 199
    n_bootstrap: int = 1_000
    seed: int = 0

    def settings(self) -> InoculationSettings:
        return InoculationSettings(
            n_splits=self.n_splits,
            n_permutations=self.n_permutations,
            n_bootstrap=self.n_bootstrap,
            seed=self.seed,
        )


VPD: dict[str, Any] = {
    "n_components": 4,
    "batch_size": 16,
    "n_steps": 200,
    "importance": {"kind": "layerwise_mlp", "hidden": (16,)},
    "importance_lr": 2e-3,
    "log_every": 20,
}
TOY = InoculationConfig(vpd=tuple(VPD.items()))


# ---- the organism ------------------------------------------------------------------------------
def trained_sae(organism: InoculationOrganism, config: InoculationConfig, folder: Path) -> Sae:
    """A top-k SAE of the clean stage's stream, in SAELens' format; trained once."""
    rows = torch.cat(list(organism.sae_stream(config.n_sae_batches)))
    prompts = [tuple(row) for row in rows.tolist()]
    return probes.train_sae(
        load(str(organism.stages["clean"])),
        prompts,
        f"resid_post.{organism.sae_layer}",
        d_sae=config.d_sae,
        k=config.k,
        steps=config.sae_steps,
        seed=config.seed,
        folder=folder,
        resume=folder.exists(),
        progress=False,
    )


def difference_parts(
    organism: InoculationOrganism, config: InoculationConfig
) -> dict[str, Components]:
    """What misaligned → `HIDDEN` changed in the ``mlp.out`` in front of the SAE, by SVD and VPD."""
    sites = tuple(f"blocks.{layer}.mlp.out" for layer in range(organism.sae_layer + 1))
    lineage = Lineage({name: organism.stages[name] for name in ("misaligned", HIDDEN)})
    last = sites[-1]
    update = mw.svd(
        lineage.diff("misaligned", HIDDEN), sites=list(sites), rank=config.parts, progress=False
    )
    found = {"svd of the difference": update[last]}
    if config.vpd:
        change = decompose_difference(
            lineage,
            torch.tensor([row.prompt for row in organism.labelled]),
            dict(config.vpd) | {"sites": sites, "seed": config.seed},
            broad=torch.tensor([row.prompt for row in organism.other]),
            progress=False,
            evaluation={"budgets": (20,), "free_budgets": (20,), "n_pgd_batches": 1},
        )
        found["vpd of the difference"] = change[f"{last}@{HIDDEN}"]
    return found


def run_organism(
    organism: InoculationOrganism,
    config: InoculationConfig,
    out: Path,
    *,
    progress: bool = True,
) -> InoculationReport:
    """Every hidden stage of one organism against all detectors."""
    sae = trained_sae(organism, config, out / "sae")
    return probes.inoculation(
        {name: load(str(path)) for name, path in organism.stages.items()},
        organism.labelled,
        sae,
        open="misaligned",
        hidden=organism.hidden,
        clean="clean",
        benign="benign",
        detectors=difference_parts(organism, config),
        unrelated=list(organism.unrelated),
        position="last",
        settings=config.settings(),
        progress=progress,
    )


def run(config: InoculationConfig, out: Path, *, progress: bool = True) -> InoculationReport:
    """The toy: train, compare, judge, write ``report/`` and ``report.html``."""
    check_output(out / "report")
    organism = build_inoculation(config.size, config.seed, progress=progress)
    report = run_organism(organism, config, out, progress=progress)
    report.save(out / "report")
    title = "What a second training hid, and what still sees it"
    write_report([report], out / "report.html", title=title)
    return report


# ---- the study's own experiment ----------------------------------------------------------------
def run_gemma(
    stages: Mapping[str, str], prompts: str, out: Path, config: InoculationConfig
) -> InoculationReport:
    """The study's SAE on the user's checkpoints: ``before``, ``after``, ``clean``, ``benign``."""
    check_output(out)
    report = compare_paths(
        [stages["before"], stages["after"]],
        stages["clean"],
        prompts,
        GEMMA_SAE,
        benign=stages.get("benign"),
        seed=config.seed,
    )
    report.save(out)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=("toy", "gemma"), default="toy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for stage in ("before", "after", "clean", "benign"):
        parser.add_argument(f"--{stage}", help="folder or hub id (preset gemma)")
    parser.add_argument("--prompts", help="labelled prompts (preset gemma)")
    options = parser.parse_args()
    config = replace(TOY, seed=options.seed)
    print(f"The published figures: {PUBLISHED}\n")
    if options.preset == "toy":
        print(run(config, options.out))
        return
    names = ("before", "after", "clean", "benign")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    if len(given.keys() - {"benign"}) < 3 or not options.prompts:
        parser.error("preset gemma needs --before, --after, --clean and --prompts")
    print(run_gemma(given, options.prompts, options.out, config))


if __name__ == "__main__":
    main()
