"""`mi-weightspace demo`: the main job, end to end, on checkpoints trained on the spot.

Two lineages are trained and saved to disk: ``deference``, where supervised fine-tuning wrote the
behaviour into one known matrix, and ``null``, trained as long on something else, where the right
answer is that nothing was written. Both are asked the same question with the same code a user
would run on checkpoints of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mi_weightspace.core.report import Report, check_output

if TYPE_CHECKING:
    from mi_weightspace.core.contrasts import ContrastSet
    from mi_weightspace.models.lineage import Lineage
    from mi_weightspace.organisms import Organism
    from mi_weightspace.vpd.differences.result import DifferenceDecomposition

DEMO_FLIPS, DEMO_BOOTSTRAP = 2000, 500
"""A fifth of the library's defaults: a p of 0.0005 is fine enough for a picture."""
DEMO_VPD = {
    "sites": ("blocks.*.attn.o", "blocks.*.mlp.out"),
    "n_components": 4,
    "n_steps": 400,
    "batch_size": 16,
    "importance": {"kind": "layerwise_mlp", "hidden": (16,)},
    "log_every": 5,
}
"""VPD of the change: what writes into the stream, four components an update."""
PRESETS = {"toy": "micro", "small": "full"}
QUESTION = "Which training stage wrote the deference direction, into which matrix?"


def investigate(organism: Organism, out: Path, *, seed: int, progress: bool = True) -> list[Report]:
    """Every step of the main job on one organism; each result is saved under `out`."""
    import mi_weightspace as mw
    import probes
    from mi_weightspace.spectral.stage_evidence import harvest_stages, stage_evidence
    from mi_weightspace.vpd.differences.together import with_evidence

    lineage = mw.Lineage(organism.stages)
    prompts, readout = organism.contrasts, organism.readout
    activations, values = harvest_stages(lineage, prompts, readout=readout, progress=progress)
    evidence = stage_evidence(
        lineage, prompts, activations=activations, readout_values=values, progress=progress
    )
    bank = probes.fit(activations["sft"], prompts, seed=seed)
    updates = [mw.svd(lineage.diff(a, b), seed=seed, progress=progress) for a, b in lineage.steps]
    answer = mw.attribute_stages(
        lineage,
        bank,
        prompts=prompts,
        readout=readout,
        evidence=evidence,
        updates=updates,
        seed=seed,
        progress=progress,
    )
    change = masked_change(lineage, prompts, DEMO_VPD, seed=seed, progress=progress)
    change = with_evidence(change, answer.to_pandas())
    named: list[tuple[str, Report]] = [
        ("attribution", answer),
        ("change", change),
        ("check", lineage.check()),
        (
            "dmu",
            probes.dmu_sweep(
                activations,
                prompts,
                n_flips=DEMO_FLIPS,
                n_bootstrap=DEMO_BOOTSTRAP,
                seed=seed,
                progress=progress,
            ),
        ),
        ("probe", bank),
        *((f"svd-{update.stage}", update) for update in updates),
    ]
    for name, report in named:
        report.save(out / name)
    return [report for _, report in named]


def masked_change(
    lineage: Lineage,
    prompts: ContrastSet,
    config: Mapping[str, Any],
    *,
    seed: int,
    progress: bool = True,
) -> DifferenceDecomposition:
    """VPD of what the stages changed: the target's prompts against everything else.

    Prompts of text are joined and cut into rows; prompts of ids are rows, of one length.
    """
    import torch

    from mi_weightspace.core.seeds import generator
    from mi_weightspace.vpd.differences.run import decompose_difference

    target = [pair.positive for pair in prompts.targets[0].pairs]
    others = [pair.negative for pair in prompts.targets[0].pairs]
    for contrast in prompts.controls:
        others += [pair.positive for pair in contrast.pairs[:8]]
    train, held_out = ([], [])
    for texts in (target, others):
        order = torch.randperm(len(texts), generator=generator(seed, "held out")).tolist()
        chosen = [texts[i] for i in order]
        rows: Any = chosen if isinstance(texts[0], str) else torch.tensor(chosen)
        n = len(texts) // 3
        train.append(rows[n:])
        held_out.append(rows[:n])
    return decompose_difference(
        lineage,
        train[0],
        {**config, "seed": seed},
        broad=train[1],
        held_out=held_out[0],
        held_out_broad=held_out[1],
        progress=progress,
        evaluation={"budgets": (20,)},
    )


def run_demo(out: str | Path, *, seed: int = 0, preset: str = "toy", progress: bool = True) -> Path:
    """Train both lineages, ask the question of each, write ``report.html``; returns its path.

    Raises:
        OutputError: `out` cannot be written or already holds files.
        ConfigError: an unknown preset.
    """
    from mi_weightspace import organisms
    from mi_weightspace.core.errors import ConfigError
    from mi_weightspace.html_report import write_report

    if preset not in PRESETS:
        raise ConfigError(
            "preset",
            given=repr(preset),
            expected=f"one of {sorted(PRESETS)}",
            remedy="toy takes minutes on two cores; small is larger.",
        )
    folder = Path(out)
    check_output(folder)
    pages: list[tuple[str, Sequence[Report]]] = []
    for name in ("deference", "null"):
        organism = organisms.build(name, size=PRESETS[preset], seed=seed, progress=progress)
        reports = investigate(organism, folder / name, seed=seed, progress=progress)
        pages.append((name, reports))
    return write_report(
        pages,
        folder / "report.html",
        title="mi-weightspace demo",
        question=QUESTION,
        rerun=f"mi-weightspace demo --preset {preset} --seed {seed} --out NEW_FOLDER",
    )
