"""Reading a stage through an SAE against the least it can cost, and whether memory stays flat.

``python benchmarks/sae_encode.py [--rounds N] [--check]``. Llama-shaped random models, float32, one
thread, CPU seconds; every token but the first of each prompt is encoded, pooled and its
reconstruction scored (`probes.read_stage`, the SAE alone). The least it can cost is the model's
own forward pass to the same layer and one product of the same tokens with ``W_enc``, written into
a buffer that is already there. All parts take turns within a round, in an order that turns from
round to round; the throughput is the ratio of medians.

Memory: 100 batches through one call, resident size after each batch, against what the pooled codes
themselves take.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diff_vpd_scale import resident
from vpd_step import machine

from mi_weightspace.core.sae import CHUNK_ELEMENTS, Sae
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.backends.torch_hooks import TorchLens
from probes.sae import read_stage
from probes.sae_fit import activations, check_fit
from probes.sae_pool import StagePool

OUT = Path(__file__).parent / "results"
LENGTH, PER_BATCH, VOCAB, L0 = 64, 16, 2_048, 50
N_BATCHES = 4
ASKED = 0.9
"""Least throughput as a share of forward pass plus product, from `ASKED_FROM` on."""
ASKED_FROM = 512
"""Width of Pythia-70M (6 layers), the smallest model with published SAEs. What encoding adds is so
much a token and latent, which a narrower model's forward pass hides less well."""
MEMORY_BATCHES, EARLY = 100, 10
SLACK = 8e6
"""Bytes by which the allocator may drift over a hundred batches."""


@dataclass(frozen=True)
class Size:
    d: int
    layers: int
    d_sae: int

    @property
    def name(self) -> str:
        return f"d{self.d}_L{self.layers}_h{self.d_sae}"


SIZES = (Size(256, 4, 4_096), Size(512, 6, 8_192))
RULES = ("topk", "jumprelu", "gated")


def lens_of(size: Size) -> TorchLens:
    config = transformers.LlamaConfig(
        hidden_size=size.d,
        intermediate_size=32 * round(size.d * 8 / 3 / 32),
        num_hidden_layers=size.layers,
        num_attention_heads=size.d // 32,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TorchLens(transformers.LlamaForCausalLM(config).float().eval(), None)


def prompts(n_batches: int) -> list[tuple[int, ...]]:
    draw = generator(0, "prompts")
    rows = torch.randint(VOCAB, (n_batches * PER_BATCH, LENGTH), generator=draw)
    return [tuple(row) for row in rows.tolist()]


def sae_of(size: Size, rule: str, x: torch.Tensor) -> Sae:
    draw = generator(0, "sae", rule)
    rows = torch.randn(size.d_sae, size.d, generator=draw)
    rows /= rows.norm(dim=1, keepdim=True)
    zero = torch.zeros(size.d_sae)
    parts: dict[str, Any] = {"b_enc": zero}
    if rule == "gated":
        parts = {"b_gate": zero, "b_mag": zero, "r_mag": zero}
    if rule == "jumprelu":
        parts["threshold"] = zero
    if rule == "topk":
        parts["k"] = L0
    sae = Sae(rule, rows.T.contiguous(), rows, x.mean(0), apply_b_dec_to_input=True, **parts)
    return sae.described(hook_name=f"blocks.{size.layers - 1}.hook_resid_post").with_l0(x, L0)


class Case:
    """One size and rule, its parts ready to be timed."""

    def __init__(self, size: Size, rule: str, lens: TorchLens) -> None:
        self.size, self.rule, self.lens, self.ids = size, rule, lens, prompts(N_BATCHES)
        point = f"resid_post.{size.layers - 1}"
        x = activations(lens, self.ids, [point])[point]
        self.sae = sae_of(size, rule, x[:1_024])
        self.tokens = torch.tensor(self.ids).split(PER_BATCH)
        self.x = x.split(PER_BATCH * (LENGTH - 1))
        self.buffer = torch.empty(max(1, CHUNK_ELEMENTS // size.d_sae), size.d_sae)

    @torch.no_grad()
    def forward(self) -> None:
        for tokens in self.tokens:
            self.lens.model.model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)

    @torch.no_grad()
    def product(self) -> None:
        for x in self.x:
            for part in x.split(len(self.buffer)):
                torch.mm(part, self.sae.W_enc, out=self.buffer[: len(part)])

    def read(self, *, rivals: dict[str, Sae] | None = None) -> Any:
        return read_stage(
            self.lens,
            self.ids,
            self.sae,
            position="all_mean",
            rivals=rivals or {},
            fvu_bound=None,
            batch_tokens=PER_BATCH * LENGTH,
            progress=False,
        )


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for size in SIZES:
        lens = lens_of(size)
        cases = {rule: Case(size, rule, lens) for rule in RULES}
        first = cases[RULES[0]]
        jobs: dict[str, Callable[[], Any]] = {"forward": first.forward, "product": first.product}
        jobs |= {rule: case.read for rule, case in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in jobs}
        names = list(jobs)
        for r in range(rounds + 1):  # the first round warms up
            turn = r % len(names)
            for name in names[turn:] + names[:turn]:
                begin = time.process_time()
                jobs[name]()
                if r:
                    times[name].append(time.process_time() - begin)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows += [row_of(case, medians) for case in cases.values()]
    return rows


def row_of(case: Case, medians: dict[str, float]) -> dict[str, Any]:
    size, facts = case.size, case.read().facts
    begin = time.process_time()
    check_fit(case.sae, case.lens, case.ids, bound=None)
    return {
        "size": size.name,
        "d": size.d,
        "layers": size.layers,
        "d_sae": size.d_sae,
        "rule": case.rule,
        "tokens": facts["n_tokens"],
        "l0": facts["l0"],
        "forward": medians["forward"],
        "product": medians["product"],
        "read": medians[case.rule],
        "check": time.process_time() - begin,
        "throughput": (medians["forward"] + medians["product"]) / medians[case.rule],
    }


# ---- memory ------------------------------------------------------------------------------------
def memory() -> dict[str, float]:
    """Resident bytes after each of `MEMORY_BATCHES` batches, and what is kept on purpose."""
    size = SIZES[0]
    case = Case(size, "jumprelu", lens_of(size))
    case.read()  # kernels and buffers are there before the measurement begins
    case.ids, seen, kept = prompts(MEMORY_BATCHES), [], []
    add = StagePool.add

    def noting(self: StagePool, x: torch.Tensor, prompt: torch.Tensor) -> None:
        add(self, x, prompt)
        kept.append(12 * self.codes["sae"].n_kept)
        gc.collect()
        seen.append(resident("VmRSS"))

    StagePool.add = noting
    case.read()
    assert len(seen) == MEMORY_BATCHES, len(seen)
    early, late = max(seen[:EARLY]), max(seen[-EARLY:])
    return {
        "batches": float(len(seen)),
        "tokens": float(len(case.ids) * (LENGTH - 1)),
        "early": early,
        "late": late,
        "kept": float(kept[-1] - kept[EARLY - 1]),
        "dense_codes_would_be": 4.0 * len(case.ids) * (LENGTH - 1) * size.d_sae,
    }


def flat(record: dict[str, float]) -> bool:
    return record["late"] - record["early"] <= record["kept"] + SLACK


# ---- report ------------------------------------------------------------------------------------
def markdown(record: dict[str, Any]) -> str:
    own = record["memory"]
    lines = [
        "# Harvest and encoding of an SAE",
        "",
        f"Llama-shaped, random; {N_BATCHES} batches of {PER_BATCH} × {LENGTH} tokens, float32, one "
        f"thread; CPU ms, median of {record['rounds']} interleaved rounds. `read_stage` encodes, "
        "pools and scores the reconstruction of every token but the first of each prompt; beside "
        "it the bare forward pass to that layer, and the bare product with `W_enc`. The check "
        "that the SAE fits the model is paid once a stage. "
        f"{ASKED:.0%} is asked from d = {ASKED_FROM} on. "
        f"Load average at the end {record['load']:.1f}.",
        "",
        ", ".join(f"{k} {v}" for k, v in record["machine"].items()),
        "",
        "| d | layers | d_sae | rule | L0 | forward | product | read_stage | "
        "throughput | check, once |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in record["rows"]:
        times = " | ".join(f"{1e3 * r[name]:.0f}" for name in ("forward", "product", "read"))
        lines.append(
            f"| {r['d']} | {r['layers']} | {r['d_sae']} | {r['rule']} | {r['l0']:.0f} | {times} | "
            f"{r['throughput']:.0%} | {1e3 * r['check']:.0f} |"
        )
    grown = own["late"] - own["early"]
    lines += [
        "",
        f"Memory over {own['batches']:.0f} batches ({own['tokens']:,.0f} tokens): resident "
        f"{own['early'] / 1e6:.1f} MB at most in the first {EARLY}, {own['late'] / 1e6:.1f} MB in "
        f"the last {EARLY}: {grown / 1e6:+.1f} MB, of which the pooled codes themselves are "
        f"{own['kept'] / 1e6:.1f} MB. Dense codes of the tokens would be "
        f"{own['dense_codes_would_be'] / 1e6:,.0f} MB.",
        "",
        "| GPU | throughput |",
        "|---|---|",
        f"| any | {record['gpu']} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="fail below the throughput asked")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory()))
        return 0
    rows = measure(options.rounds)
    command = [sys.executable, __file__, "--memory"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    record = {
        "machine": machine(),
        "rounds": options.rounds,
        "rows": rows,
        "memory": json.loads(said.stdout.splitlines()[-1]),
        "gpu": "not measured",
        "load": os.getloadavg()[0],
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "sae_encode.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    (OUT / "sae_encode.md").write_text(text)
    print(text)
    worst = min(r["throughput"] for r in rows if r["d"] >= ASKED_FROM)
    steady = flat(record["memory"])
    print(f"least throughput {worst:.0%}, asked {ASKED:.0%} from d = {ASKED_FROM} on")
    print(f"memory flat: {steady}")
    return int(options.check and (worst < ASKED or not steady))


if __name__ == "__main__":
    sys.exit(main())
