"""A language model trained on the spot, and all of its block matrices decomposed.

    python -m experiments.vpd_docstrings --preset paper --out runs/docstrings

Text: documentation strings of the running Python's standard library (`vpd_targets.docstrings`).
`paper`: four layers, d_model 128, 24 matrices, 10,000 steps of 8 rows of 64 tokens. Asked for:
unmasked KL at most 1 % and PGD-20 KL at most 10 % of the all-zero mask's, with L0 far below the
4,096 components. What would refute it: a ladder that climbs past that at 20 steps, or an L0 that is
still falling when the run ends (the self-checks then say ``unconverged``).

Everything is written under the output folder: ``model/``, ``vpd/`` (a run folder, resumable),
``report.html``. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mi_weightspace as mw
from experiments.vpd_targets import docstrings
from mi_weightspace.html_report import write_report
from mi_weightspace.vpd.config import make_config
from mi_weightspace.vpd.decomposition import Decomposition


@dataclass(frozen=True)
class DocstringsConfig:
    """Model (a preset of `vpd_targets.docstrings`), decomposition and its evaluation.

    Attributes:
        rows: held-out rows the decomposition is evaluated on. budgets: of the PGD ladder.
    """

    model: str
    vpd: dict[str, Any]
    rows: int
    budgets: tuple[int, ...]


PRESETS = {
    "toy": DocstringsConfig(
        "toy",
        {
            "sites": ("blocks.*",),
            "n_components": 32,
            "importance": {"kind": "layerwise_mlp", "hidden": (16,)},
            "n_steps": 20,
            "batch_size": 4,
            "warmup_steps": 50,
            "log_every": 2,
        },
        rows=8,
        budgets=(20,),
    ),
    "paper": DocstringsConfig(
        "paper",
        {
            "sites": ("blocks.*",),
            "n_components": {"blocks.*.attn.*": 128, "blocks.*.mlp.*": 256},
            "importance": {
                "kind": "global_transformer",
                "d_model": 128,
                "n_blocks": 2,
                "n_heads": 4,
                "d_mlp": 512,
            },
            "faithfulness": {"weight": 1e3},
            "minimality": {"weight": 2e-4, "frequency_weight": 1e-4},
            "warmup_steps": 400,
            "warmup_lr": 2e-3,
            "n_steps": 10_000,
            "batch_size": 8,
            "lr": 1e-3,
            "importance_lr": 1e-3,
            "log_every": 50,
        },
        rows=64,
        budgets=(20, 40, 80, 160, 320),
    ),
}


def run(
    config: DocstringsConfig, out: Path, *, seed: int = 0, progress: bool = True
) -> Decomposition:
    """Train the model, decompose it, evaluate; what is there already is not done again."""
    folder = out / "model"
    if not folder.exists():
        out.mkdir(parents=True, exist_ok=True)
        docstrings.build(docstrings.PRESETS[config.model], folder, seed, progress=progress)
    tokens = docstrings.load_tokens(folder)
    parts = mw.vpd.decompose(
        str(folder),
        tokens["train"],
        make_config(config.vpd | {"seed": seed}),
        held_out=tokens["held_out"][: config.rows],
        out=out / "vpd",
        resume=True,
        progress=progress,
        evaluation={"budgets": config.budgets},
    )
    if not (out / "report.html").exists():
        write_report([parts], out / "report.html", title="VPD of a language model of docstrings")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="toy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(run(PRESETS[options.preset], options.out, seed=options.seed))


if __name__ == "__main__":
    main()
