"""A language model fine-tuned on the spot, in full and by LoRA, and each difference decomposed.

    python -m experiments.vpd_language_difference --preset paper --out runs/language_difference

Base: a model of documentation strings (`vpd_targets.docstrings`). Fine-tuning: the same strings in
a dialect that says ``yes`` for ``True``, ``no`` for ``False`` and ``nothing`` for ``None``; half of
every batch is ordinary text without these words, so that nothing else need change. *Behaviour*:
held-out rows in the dialect; *broad*: held-out rows without the words.

Asked for: both differences decomposed, converged by the run's own checks, every self-check PASS,
and cards on which the words can be read. What would refute it: L0 or the attacked error still
moving at the end, or components that fire where none of the words is due.

Under the output folder: ``base/``, ``full/``, ``lora/`` (checkpoints, the last a PEFT adapter),
``vpd_full/`` and ``vpd_lora/`` (run folders, resumable), ``cards.md``, ``report.html``. Run the
same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from experiments.vpd_targets import docstrings
from experiments.vpd_targets.common import cosine
from mi_weightspace.core.seeds import derive
from mi_weightspace.html_report import write_report
from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.differences.run import decompose_difference

Kind = Literal["full", "lora"]
KINDS: tuple[Kind, ...] = ("full", "lora")
DIALECT = {"True": "yes", "False": "no", "None": "nothing"}
WORDS = re.compile(r"\b(" + "|".join(DIALECT) + r")\b")
RANK = 4
TARGETS = ("c_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class LanguageDifferenceConfig:
    """Base model, fine-tuning and decomposition.

    Attributes:
        model: a preset of `vpd_targets.docstrings`.
        tuning_steps, tuning_rows: of AdamW, rows of each half of a batch; tuning_lr: peak, by kind.
        vpd: values over the library's defaults for differences, by kind; with ``faithfulness`` the
            components are asked to sum to the update.
        held_out: rows of each stream kept for evaluation. max_documents: of the text; None all.
    """

    model: str
    tuning_steps: int
    tuning_rows: int
    tuning_lr: dict[str, float]
    vpd: dict[str, dict[str, Any]]
    held_out: int
    max_documents: int | None
    evaluation: dict[str, Any]


COMMON: dict[str, Any] = {
    "sites": ("blocks.*",),
    "importance": {"kind": "layerwise_mlp", "hidden": (32,)},
    "minimality": {"weight": 1e-2, "frequency_weight": 1e-2},
    "importance_lr": 2e-3,
    "lr": 1e-3,
    "batch_size": 8,
    "log_every": 10,
}
PRESETS = {
    "toy": LanguageDifferenceConfig(
        model="toy",
        tuning_steps=30,
        tuning_rows=4,
        tuning_lr={"full": 3e-3, "lora": 1e-2},
        vpd={
            kind: COMMON | {"n_components": 2, "n_steps": 20, "batch_size": 4, "log_every": 2}
            for kind in KINDS
        },
        held_out=8,
        max_documents=150,
        evaluation={"budgets": (20,), "free_budgets": (20,), "n_pgd_batches": 1},
    ),
    "paper": LanguageDifferenceConfig(
        model="paper",
        tuning_steps=400,
        tuning_rows=8,
        tuning_lr={"full": 2e-4, "lora": 2e-3},
        vpd={
            "full": COMMON
            | {
                "n_components": 2 * RANK,
                "minimality": {"weight": 1e-2, "frequency_weight": 5e-3},
                "n_steps": 2_000,
            },
            "lora": COMMON | {"n_components": 2 * RANK, "lr": 3e-4, "n_steps": 2_500},
        },
        held_out=64,
        max_documents=None,
        evaluation={"budgets": (20, 40, 80), "free_budgets": (20,), "n_pgd_batches": 5},
    ),
}


# ---- text --------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Streams:
    """Rows of tokens: in the dialect with at least one of its words, and without any of them."""

    behaviour: Int[Tensor, "n length"]
    broad: Int[Tensor, "m length"]


def dialect(text: str) -> str:
    return WORDS.sub(lambda found: DIALECT[found.group()], text)


def streams(folder: Path, config: LanguageDifferenceConfig) -> dict[str, Streams]:
    """``train`` and ``held_out`` rows of both kinds, by whole documents."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = docstrings.PRESETS[config.model]
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "held_out": {}}
    for name, strings in docstrings.documents(config.max_documents).items():
        kept = docstrings.is_held_out(name, given.held_out)
        parts["held_out" if kept else "train"][name] = strings
    found = {}
    for part, docs in parts.items():
        spoken = {n: [dialect(s) for s in own if WORDS.search(s)] for n, own in docs.items()}
        plain = {n: [s for s in own if not WORDS.search(s)] for n, own in docs.items()}
        rows = docstrings.blocks(tokenizer, spoken, given.length)
        found[part] = Streams(
            _with_words(rows, tokenizer), docstrings.blocks(tokenizer, plain, given.length)
        )
    return found


def _with_words(rows: Int[Tensor, "n length"], tokenizer: Any) -> Int[Tensor, "k length"]:
    """The rows in which a word of the dialect stands."""
    pattern = re.compile(r"\b(" + "|".join(DIALECT.values()) + r")\b")
    texts = tokenizer.batch_decode(rows)
    return rows[[bool(pattern.search(text)) for text in texts]]


# ---- fine-tuning -------------------------------------------------------------------------------
def fine_tune(
    base: Path, kind: Kind, rows: Streams, config: LanguageDifferenceConfig, out: Path, seed: int
) -> None:
    """Save a checkpoint (``full``) or a PEFT adapter of rank `RANK` on every block matrix."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "language difference", "lora"))
            model = get_peft_model(
                model,
                LoraConfig(
                    r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), fan_in_fan_out=True
                ),
            )
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("transformer.h."))
    _train(model, rows, config, config.tuning_lr[kind], seed)
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial)
    for path in base.glob("tokenizer*"):
        (partial / path.name).write_bytes(path.read_bytes())
    partial.rename(out)


def _train(
    model: Any, rows: Streams, config: LanguageDifferenceConfig, lr: float, seed: int
) -> None:
    moving = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(moving, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    spoken = docstrings.epochs(len(rows.behaviour), config.tuning_rows, derive(seed, "dialect"))
    plain = docstrings.epochs(len(rows.broad), config.tuning_rows, derive(seed, "plain"))
    model.train()
    for step in range(config.tuning_steps):
        optimiser.param_groups[0]["lr"] = lr * cosine(step, config.tuning_steps, 0.05)
        batch = torch.cat([rows.behaviour[next(spoken)], rows.broad[next(plain)]])
        loss = docstrings.next_token_loss(model, batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimiser.step()
    model.eval()


# ---- run ---------------------------------------------------------------------------------------
def run(
    config: LanguageDifferenceConfig,
    out: Path,
    *,
    seed: int = 0,
    kinds: Sequence[Kind] = KINDS,
    progress: bool = True,
) -> dict[str, DifferenceDecomposition]:
    """Train, fine-tune and decompose; what is there already is not done again."""
    base = out / "base"
    if not base.exists():
        out.mkdir(parents=True, exist_ok=True)
        docstrings.build(docstrings.PRESETS[config.model], base, seed, progress=progress)
    rows = streams(base, config)
    found: dict[str, DifferenceDecomposition] = {}
    for kind in kinds:
        if not (out / kind).exists():
            fine_tune(base, kind, rows["train"], config, out / kind, seed)
        found[kind] = decompose_difference(
            {"base": str(base), kind: str(out / kind)},
            rows["train"].behaviour,
            config.vpd[kind] | {"seed": seed},
            broad=rows["train"].broad,
            regime="faithful" if "faithfulness" in config.vpd[kind] else "selective",
            held_out=rows["held_out"].behaviour[: config.held_out],
            held_out_broad=rows["held_out"].broad[: config.held_out],
            out=out / f"vpd_{kind}",
            resume=True,
            progress=progress,
            evaluation={**config.evaluation, "anchor": out / "anchor.json"},
        )
    page = out / "report.html"
    if len(found) == len(KINDS) and not page.exists():
        title = "VPD of two fine-tunings of one language model"
        write_report(list(found.values()), page, title=title)
    held_out = rows["held_out"].behaviour[: config.held_out]
    (out / "cards.md").write_text("\n\n".join(cards(found, held_out)))
    return found


def cards(found: dict[str, DifferenceDecomposition], tokens: Tensor, most: int = 4) -> list[str]:
    """Of each difference's components with the largest mean importance on the behaviour."""
    texts = []
    for kind, parts in found.items():
        texts.append(f"# {kind}")
        table = parts.to_pandas("components")
        top = table.sort_values("mean_importance", ascending=False).head(most)
        wanted: dict[str, list[int]] = {}
        for row in top.itertuples():
            wanted.setdefault(str(row.site), []).append(int(str(row.component)))
        texts += [str(card) for card in parts.cards(wanted, tokens)]
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="toy")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(PRESETS[options.preset], options.out, seed=options.seed, kinds=options.kinds)
    for kind, parts in found.items():
        print(f"\n{kind}\n{parts}")
        print(parts.tables["checks"][["name", "outcome", "number", "sentence"]].to_string())


if __name__ == "__main__":
    main()
