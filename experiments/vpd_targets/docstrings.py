"""A small language model trained on the spot on text that every Python installation has.

    python -m experiments.vpd_targets.docstrings --out runs/docstrings --preset paper

Text: the documentation strings of the running Python's own standard library, read from source
(nothing is imported), tests left out, each string once. A document is one top-level module; whole
documents are held out, so no block of tokens and no string is in both parts. Tokens: a byte-level
BPE trained on the training documents. Which strings there are depends on the Python version, which
is stored beside the model with everything else that decided the result (``training.json``).

The folder is written under another name and moved into place when complete: it is whole or absent.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from experiments.vpd_targets.common import cosine
from mi_weightspace.core.seeds import derive, generator

Shape = Literal["gpt2", "llama", "gpt_neox"]
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class LanguageConfig:
    """Text, sizes and training.

    Attributes:
        vocab: tokens of the BPE, the separator included.
        length: tokens of a block.
        held_out: share of documents, by a hash of their names.
        lr: peak, of AdamW (0.9, 0.98): linear warm-up over 5 % of the steps, cosine to 5 % of it.
        max_documents: first documents in order only (tests); None takes all.
    """

    family: Shape = "gpt2"
    vocab: int = 1_024
    length: int = 64
    held_out: float = 0.1
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 512
    steps: int = 6_000
    batch_size: int = 16
    lr: float = 1.5e-3
    weight_decay: float = 0.1
    max_documents: int | None = None


PRESETS = {
    "toy": LanguageConfig(
        vocab=512,
        length=32,
        n_layers=2,
        d_model=32,
        d_mlp=128,
        steps=150,
        batch_size=16,
        lr=1e-2,
        max_documents=24,
    ),
    "paper": LanguageConfig(),
}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents split into two parts, and the tokenizer of the first."""

    tokenizer: Any
    train: Int[Tensor, "n length"]
    held_out: Int[Tensor, "m length"]
    names: dict[str, list[str]]
    n_characters: dict[str, int]


def documents(max_documents: int | None = None) -> dict[str, list[str]]:
    """Top-level module -> its documentation strings, in order of path and line, each once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        if max_documents is not None and parts[0] not in found and len(found) >= max_documents:
            continue
        strings = [text for text in dict.fromkeys(docstrings_of(path)) if text not in seen]
        if strings:
            found.setdefault(parts[0], []).extend(strings)
            seen.update(strings)
    return found


def docstrings_of(path: Path) -> Iterator[str]:
    """Of the module, its classes and its functions, by line; nothing is imported."""
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:
        return  # templates of code generators are not Python
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and text.strip():
            yield text.strip()


def is_held_out(name: str, share: float) -> bool:
    """By the name alone, so that a version with other modules keeps the split of common ones."""
    return derive(0, "docstrings", name) / 2**63 < share


def build_corpus(config: LanguageConfig) -> Corpus:
    found = documents(config.max_documents)
    split = {
        "train": {n: s for n, s in found.items() if not is_held_out(n, config.held_out)},
        "held_out": {n: s for n, s in found.items() if is_held_out(n, config.held_out)},
    }
    if not all(split.values()):
        raise RuntimeError(
            f"{len(found)} documents leave {'training' if not split['train'] else 'held-out'} text "
            f"empty; take more of them (max_documents), or another share than {config.held_out}"
        )
    tokenizer = train_tokenizer([t for strings in split["train"].values() for t in strings], config)
    return Corpus(
        tokenizer,
        blocks(tokenizer, split["train"], config.length),
        blocks(tokenizer, split["held_out"], config.length),
        {part: list(docs) for part, docs in split.items()},
        {part: sum(len("".join(s)) for s in docs.values()) for part, docs in split.items()},
    )


def train_tokenizer(texts: list[str], config: LanguageConfig) -> Any:
    """A byte-level BPE: any text has tokens, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner: Any = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=config.vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=config.length,
    )


def blocks(tokenizer: Any, docs: dict[str, list[str]], length: int) -> Int[Tensor, "n length"]:
    """Strings behind separators, joined and cut; the incomplete last block is dropped."""
    inner, stop = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    ids: list[int] = []
    for strings in docs.values():
        for encoded in inner.encode_batch(strings):
            ids += [stop, *encoded.ids]
    n = len(ids) // length
    return torch.tensor(ids[: n * length], dtype=torch.long).view(n, length)


def new_model(config: LanguageConfig, n_tokens: int, seed: int) -> Any:
    """A random Hugging Face model of the family, untied, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": n_tokens,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.length,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if config.family == "gpt2":
        shape |= {"n_inner": config.d_mlp, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        shape["intermediate_size"] = config.d_mlp
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "docstrings", "init"))
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.family, **shape))


def logits(model: Any, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocab"]:
    return model(input_ids=tokens, use_cache=False).logits


def next_token_loss(model: Any, tokens: Int[Tensor, "n t"]) -> Float[Tensor, ""]:
    return F.cross_entropy(logits(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_language_model(
    config: LanguageConfig, corpus: Corpus, seed: int = 0, *, progress: bool = True
) -> tuple[Any, list[dict[str, float]]]:
    """The model after training, and its loss curve (nats; mean of each fiftieth of the run).

    Batches are drawn epoch by epoch from a local generator: on one thread count, a function of the
    seed.
    """
    from rich.progress import track

    model = new_model(config, len(corpus.tokenizer), seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
        lr=config.lr,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    order = epochs(len(corpus.train), config.batch_size, seed)
    warm, window = max(1, config.steps // 20), max(1, config.steps // 50)
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    model.train()
    for step in track(range(config.steps), "training", disable=not progress):
        rate = min(1.0, (step + 1) / warm) * cosine(step, config.steps, 0.05)
        for group in optimiser.param_groups:
            group["lr"] = config.lr * rate
        loss = next_token_loss(model, corpus.train[next(order)])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent.append(float(loss.detach()))
        if len(recent) == window or step == config.steps - 1:
            curve.append({"step": step + 1.0, "loss": sum(recent) / len(recent)})
            recent.clear()
    return model.eval(), curve


def epochs(n: int, batch_size: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """Endless batches of row numbers; every row once an epoch, in a fresh order."""
    draw = generator(seed, "docstrings", "batches")
    rows = torch.empty(0, dtype=torch.long)
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(n, generator=draw)])
        yield rows[:batch_size]
        rows = rows[batch_size:]


@torch.no_grad()
def held_out_loss(model: Any, tokens: Int[Tensor, "n t"], batch_size: int = 64) -> float:
    """Mean next-token cross-entropy, nats."""
    total = sum(
        float(next_token_loss(model, part)) * len(part) for part in tokens.split(batch_size)
    )
    return total / len(tokens)


def unigram_loss(train: Tensor, held_out: Tensor, vocab: int) -> float:
    """Cross-entropy of the training frequencies (plus one) on the held-out next tokens, nats."""
    counts = torch.bincount(train.flatten(), minlength=vocab).double() + 1
    return float(-(counts / counts.sum()).log()[held_out[:, 1:].flatten()].mean())


def build(config: LanguageConfig, out: Path, seed: int = 0, *, progress: bool = True) -> dict:
    """Train and save model, tokenizer, both parts' tokens and ``training.json`` under `out`.

    Raises:
        FileExistsError: `out` exists.
    """
    from safetensors.torch import save_file

    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or choose another folder")
    start, cpu = time.perf_counter(), time.process_time()
    corpus = build_corpus(config)
    model, curve = train_language_model(config, corpus, seed, progress=progress)
    vocab = len(corpus.tokenizer)
    facts = {
        "config": asdict(config),
        "seed": seed,
        "python": platform.python_version(),
        "documents": corpus.names,
        "characters": corpus.n_characters,
        "tokens": {"train": corpus.train.numel(), "held_out": corpus.held_out.numel()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": held_out_loss(model, corpus.held_out),
        "train_loss": held_out_loss(model, corpus.train[: len(corpus.held_out)]),
        "unigram_loss": unigram_loss(corpus.train, corpus.held_out, vocab),
        "uniform_loss": math.log(vocab),
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "curve": curve,
    }
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    corpus.tokenizer.save_pretrained(partial)
    save_file(
        {"train": corpus.train.int(), "held_out": corpus.held_out.int()},
        partial / "tokens.safetensors",
    )
    (partial / "training.json").write_text(json.dumps(facts, indent=1))
    partial.rename(out)
    return facts


def load_tokens(folder: Path) -> dict[str, Int[Tensor, "n t"]]:
    """The blocks that `build` saved: ``train`` and ``held_out``."""
    from safetensors.torch import load_file

    tokens = load_file(folder / "tokens.safetensors")
    return {part: rows.long() for part, rows in tokens.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="toy")
    parser.add_argument("--family", choices=("gpt2", "llama", "gpt_neox"), default="gpt2")
    parser.add_argument("--steps", type=int, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = replace(PRESETS[args.preset], family=args.family)
    if args.steps:
        config = replace(config, steps=args.steps)
    if args.out.exists():
        parser.error(f"--out {args.out} exists")
    facts = build(config, args.out, args.seed)
    for name in ("held_out_loss", "train_loss", "unigram_loss", "uniform_loss", "wall_seconds"):
        print(f"{name}: {facts[name]:.3f}")


if __name__ == "__main__":
    main()
