"""One step of VPD: this library against the plain formulation, interleaved, on one core.

``python benchmarks/vpd_step.py [--rounds N] [--vocab N] [--check]``. A four-layer d = 128 model
(24 matrices, C = 128, importance transformer d = 128, batch 8 × 64). Every variant takes one step
a round, in an order that turns from round to round; ratios are within rounds. The losses of both
are compared at fixed parameters and draws first: a faster different step would not count.

The plain formulation runs at torch's defaults. Its last source gradient is a second backward pass
through the loss's own graph, as in the public reference; the variant that pays a forward pass for
it too is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
import vpd_plain
from torch import Tensor, nn
from vpd_plain import Given, MaskedLinear, PlainStep

from mi_weightspace.core.seeds import generator
from mi_weightspace.models.load import load
from mi_weightspace.vpd.config import SpeedConfig, VPDConfig, make_config
from mi_weightspace.vpd.host import LensHost
from mi_weightspace.vpd.state import RunState
from mi_weightspace.vpd.train import start, train_step

OUT = Path(__file__).parent / "results"
LIMITS = {"fp32": 1.9, "bf16": 2.2, "loss": 1e-5}
N_STEPS = 400
COMPARED_AT = 100
"""Step of the loss comparison: past the sources' warm-up, γ between its ends."""
WARMUP_ROUNDS = 2
FINAL_NORM = True
"""The library's importance transformer norms once more in front of its head; so does the plain."""


@dataclass(frozen=True)
class Size:
    """Shape of the problem."""

    layers: int = 4
    d: int = 128
    heads: int = 4
    vocab: int = 512
    components: int = 128
    batch: int = 8
    tokens: int = 64
    importance_d: int = 128
    importance_blocks: int = 2
    importance_heads: int = 4

    @property
    def wide(self) -> int:
        return 4 * self.d


def make_model(size: Size, device: str) -> Any:
    """GPT-2-shaped, random, float32, evaluation mode; no key-value cache."""
    config = transformers.GPT2Config(
        vocab_size=size.vocab,
        n_positions=size.tokens,
        n_embd=size.d,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=size.wide,
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config).float().eval()
    draw = generator(0, "vpd benchmark")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(0.15 * noise) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
    return model.to(device)


def settings(size: Size, speed: dict[str, bool], precision: str = "float32") -> VPDConfig:
    return make_config(
        {
            "sites": ["blocks.*"],
            "n_components": size.components,
            "allow_unfaithful": True,
            "n_steps": N_STEPS,
            "batch_size": size.batch,
            "importance": {
                "kind": "global_transformer",
                "d_model": size.importance_d,
                "n_blocks": size.importance_blocks,
                "n_heads": size.importance_heads,
                "d_mlp": 4 * size.importance_d,
            },
            "minimality": {"ema_half_life": None},
            "reconstruction": [
                {"source": "uniform", "routing": "uniform_k_subset", "weight": 0.5},
                {"source": "persistent", "routing": "all", "weight": 0.5, "n_warm": 2},
            ],
            "speed": speed,
            "precision": precision,
        }
    )


# ---- the two sides -----------------------------------------------------------------------------
@dataclass(eq=False)
class Ours:
    """The library's own training step, `train.train_step`."""

    size: Size
    config: VPDConfig
    device: str

    def __post_init__(self) -> None:
        self.host = LensHost(load(make_model(self.size, self.device)), self.config.sites)
        shape = (self.size.batch, self.size.tokens)
        first = torch.zeros(shape, dtype=torch.long, device=self.device)
        with self.host.prepared(self.config.speed):
            self.state: RunState = start(self.host, self.host.clean(first), self.config)
        self.state.step = COMPARED_AT

    def prepared(self) -> Any:
        return self.host.prepared(self.config.speed)

    def step(self, tokens: Tensor) -> None:
        train_step(self.state, self.host.clean(tokens))


@dataclass(eq=False)
class Plain:
    """`vpd_plain` with the parameters of an `Ours`."""

    ours: Ours
    autocast: torch.dtype | None = None
    own_pass: bool = False
    plain: PlainStep = field(init=False)

    def __post_init__(self) -> None:
        ours, size = self.ours, self.ours.size
        factors = ours.state.objective.factors
        model = make_model(size, ours.device).requires_grad_(False)
        sites = {
            name: MaskedLinear(
                factors.weights[name],
                factors.biases[name],
                factors.reads[name].detach().T,
                factors.writes[name].detach(),
            ).to(ours.device)
            for name in factors.layout.names
        }
        install(model, sites)
        widths = sum(site.weight.shape[1] for site in sites.values())
        importance = vpd_plain.ImportanceTransformer(
            widths,
            factors.layout.total,
            size.importance_d,
            size.importance_blocks,
            size.importance_heads,
            4 * size.importance_d,
            final_norm=FINAL_NORM,
        ).to(ours.device)
        copy_importance(ours.state.objective.importance, importance)
        self.plain = PlainStep(
            model,
            sites,
            importance,
            vpd_plain.Weights(),
            (size.batch, size.tokens),
            autocast=self.autocast,
            own_pass=self.own_pass,
        )

    def prepared(self) -> ExitStack:
        return ExitStack()

    def step(self, tokens: Tensor) -> None:
        self.plain.step(tokens, vpd_plain.gamma_at(COMPARED_AT / (N_STEPS - 1)))


def install(model: Any, sites: dict[str, MaskedLinear]) -> None:
    for layer, block in enumerate(model.transformer.h):
        own = {name.split(".", 2)[2]: s for name, s in sites.items() if f".{layer}." in name}
        block.attn.c_attn = vpd_plain.Beside([own[f"attn.{x}"] for x in "qkv"])
        block.attn.c_proj, block.mlp.c_fc = own["attn.o"], own["mlp.in"]
        block.mlp.c_proj = own["mlp.out"]


def copy_importance(source: nn.Module, target: vpd_plain.ImportanceTransformer) -> None:
    given = {k.split(".", 2)[2]: v for k, v in source.state_dict().items()}
    state: dict[str, Tensor] = {}
    for key, value in given.items():
        stem, _, leaf = key.rpartition(".")
        if stem.endswith(".qkv"):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[f"{stem[:-3]}{part}.{leaf}"] = rows
            continue
        names = {"out": "o", "up": "mlp.0", "down": "mlp.2"}
        head, _, last = stem.rpartition(".")
        stem = f"{head}.{names[last]}" if last in names else stem
        state[f"{stem}.{leaf}"] = value
    target.load_state_dict(state)


# ---- are they the same step? -------------------------------------------------------------------
def compare(ours: Ours, plain: Plain, tokens: Tensor) -> dict[str, dict[str, float]]:
    """Terms of both at the same parameters, sources and draws; and the gradients' distance."""
    objective, step = ours.state.objective, COMPARED_AT
    layout, (uniform, kept) = objective.factors.layout, objective.config.reconstruction
    pos = (ours.size.batch, ours.size.tokens)
    r, d = objective._uniform(uniform, pos, step, "term0", 0)
    route = objective._route(0, uniform, pos, step, 0)
    assert route is not None
    sources = objective.adversaries.get(1, kept, pos, objective.sizes, objective.draws, fused=False)
    at = layout.slices()
    with torch.no_grad():
        for i, name in enumerate(layout.names):
            leaf = torch.cat(
                [sources.leaves[0][..., at[name]], sources.leaves[1][..., i : i + 1]], -1
            )
            plain.plain.sources[name].copy_(leaf)
    given = Given(
        {n: r[..., at[n]] for n in layout.names},
        {n: d[..., i] for i, n in enumerate(layout.names)},
        {n: route[..., i] for i, n in enumerate(layout.names)},
    )
    gamma = vpd_plain.gamma_at(step / (N_STEPS - 1))
    total, terms, _ = plain.plain.losses(tokens, gamma, given)
    total.backward()
    with ours.prepared():
        losses = objective(ours.host.clean(tokens), step)
        losses.total.backward()
    theirs = dict(zip(losses.terms, terms.values(), strict=True))
    found = {
        name: {"ours": float(value), "plain": float(theirs[name])}
        for name, value in losses.terms.items()
    }
    for row in found.values():
        row["relative difference"] = abs(row["ours"] - row["plain"]) / abs(row["plain"])
    found["gradient of the components"] = {"relative difference": _gradient_gap(objective, plain)}
    for leaf in [*objective.factors.parameters(), *objective.importance.parameters()]:
        leaf.grad = None
    losses.last.clear()
    return found


def _gradient_gap(objective: Any, plain: Plain) -> float:
    apart = size = 0.0
    for name, site in plain.plain.sites.items():
        read, write = objective.factors.reads[name].grad, objective.factors.writes[name].grad
        assert site.V.grad is not None and site.U.grad is not None
        pairs = ((read, site.V.grad.T), (write, site.U.grad))
        apart += sum(float((a - b).square().sum()) for a, b in pairs)
        size += sum(float(b.square().sum()) for _, b in pairs)
    return math.sqrt(apart / size)


# ---- time --------------------------------------------------------------------------------------
def switches() -> dict[str, dict[str, bool]]:
    """Speed settings by name: none, each alone, the defaults."""
    fields = SpeedConfig.model_fields
    off = dict.fromkeys(fields, False)
    idle = {"prefix", "cache_clean", "compile_importance"}  # nothing to skip or to reuse here
    alone = {f"ours, {name} alone": off | {name: True} for name in fields if name not in idle}
    # the fused attention kernel is slow under the other product library: the two go together
    pair = off | {"fast_float32": True, "written_attention": True}
    alone["ours, fast_float32 with written_attention"] = pair
    return {"ours, all switches off": off, **alone, "**ours**": {}}


def variants(size: Size, device: str) -> dict[str, Ours | Plain]:
    base = Ours(size, settings(size, {}), device)
    made: dict[str, Ours | Plain] = {
        "**plain formulation**": Plain(base),
        "plain, source gradient by its own forward and backward": Plain(base, own_pass=True),
        "plain, bf16 autocast": Plain(base, autocast=torch.bfloat16),
    }
    for name, speed in switches().items():
        made[name] = Ours(size, settings(size, speed), device)
    made["**ours, bf16**"] = Ours(size, settings(size, {}, "bfloat16"), device)
    return made


def clock(device: str) -> Callable[[], tuple[float, float]]:
    def now() -> tuple[float, float]:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.process_time(), time.perf_counter()

    return now


def measure(
    made: dict[str, Ours | Plain], rounds: int, size: Size, device: str
) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of every variant in every round, after `WARMUP_ROUNDS` unmeasured."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    now, names = clock(device), list(made)
    for r in range(rounds + WARMUP_ROUNDS):
        draw = generator(r, "tokens")
        tokens = torch.randint(size.vocab, (size.batch, size.tokens), generator=draw).to(device)
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            with made[name].prepared():
                begin = now()
                made[name].step(tokens)
                end = now()
            if r >= WARMUP_ROUNDS:
                times[name].append((end[0] - begin[0], end[1] - begin[1]))
    return times


def peak_flops() -> float:
    """fp32 products of the core, FLOP a second: the better of torch's two libraries."""
    a, b = (torch.randn(2048, 2048, generator=generator(i, "peak")) for i in range(2))
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    best = 0.0
    for value in ("ieee", "bf16"):
        if setting is not None:
            setting.fp32_precision = value
        for _ in range(5):
            begin = time.process_time()
            torch.matmul(a, b)
            best = max(best, 2 * 2048**3 / (time.process_time() - begin))
    if setting is not None:
        setting.fp32_precision = "none"
    return best


def flops(size: Size) -> dict[str, float]:
    per_layer = 4 * 2 * size.d + 2 * (size.d + size.wide)
    inputs = size.layers * (5 * size.d + size.wide)
    d = size.importance_d
    total = 6 * size.layers * size.components
    importance = (inputs + 1) * d + (d + 1) * total
    importance += size.importance_blocks * (4 * d * d + 8 * d * d + 5 * d)
    frozen = size.layers * (4 * size.d**2 + 2 * size.d * size.wide)
    found = vpd_plain.flops_per_token(
        frozen=frozen,
        components=size.layers * size.components * per_layer,
        importance=importance,
        n_warm=2,
        head=size.d * size.vocab,
        attention=4 * size.tokens * size.d * size.layers,
    )
    found["step"] = found["total"] * size.batch * size.tokens + 6 * frozen * size.components
    return found


# ---- report ------------------------------------------------------------------------------------
@dataclass
class Row:
    name: str
    ms: float
    ratio: float
    low: float
    high: float
    wall_ms: float
    share: float | None


def table(times: dict[str, list[tuple[float, float]]], work: float, peak: float) -> list[Row]:
    base = times["**plain formulation**"]
    rows = []
    for name, seconds in times.items():
        ratios = [b[0] / s[0] for b, s in zip(base, seconds, strict=True)]
        ms = 1000 * statistics.median(s[0] for s in seconds)
        wall = 1000 * statistics.median(s[1] for s in seconds)
        share = work / (ms / 1000) / peak if "bf16" not in name else None
        rows.append(Row(name, ms, statistics.median(ratios), min(ratios), max(ratios), wall, share))
    return rows


def two_threads(size: Size, rounds: int) -> dict[str, float]:
    """Wall time of one thread over that of two, for the plain step and ours.

    Empty where other programs keep a core busy: a second thread then only waits for the first.
    """
    if (os.cpu_count() or 1) - os.getloadavg()[0] < 0.5:  # this program itself counts one
        return {}
    made = variants(size, "cpu")
    made = {k: v for k, v in made.items() if k.startswith("**")}
    wall: dict[int, dict[str, float]] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = measure(made, rounds, size, "cpu")
        wall[threads] = {k: statistics.median(t[1] for t in v) for k, v in times.items()}
    torch.set_num_threads(1)
    return {name: wall[1][name] / wall[2][name] for name in made}


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((x.split(":")[1].strip() for x in lines.splitlines() if "model name" in x), "")
    return {
        "processor": model or platform.processor(),
        "wide": "AVX-512" if "avx512f" in lines else "no AVX-512",
        "amx": "yes" if "amx_tile" in lines else "no",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def markdown(record: dict[str, Any]) -> str:
    who, size = record["machine"], record["size"]
    lines = [
        "# One VPD step",
        "",
        f"{size['layers']} layers, d = {size['d']}, {6 * size['layers']} matrices, "
        f"C = {size['components']}, vocabulary {size['vocab']}, batch {size['batch']} × "
        f"{size['tokens']}, importance transformer d = {size['importance_d']}. "
        f"{record['rounds']} interleaved rounds, one thread.",
        "",
        ", ".join(f"{k} {v}" for k, v in who.items()),
        "",
        f"Work: {record['flops']['step'] / 1e9:.1f} GFLOP a step "
        f"({record['flops']['total'] / 1e6:.1f} MFLOP a token); fp32 products of this core reach "
        f"{record['peak'] / 1e9:.0f} GFLOP/s.",
        "",
        "| variant | CPU ms (median) | plain / variant: median (range) | wall ms | of fp32 peak |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        share = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
        lines.append(
            f"| {row['name']} | {row['ms']:.0f} | {row['ratio']:.2f} "
            f"({row['low']:.2f}–{row['high']:.2f}) | {row['wall_ms']:.0f} | {share} |"
        )
    gains = [f"{k.strip('*')} {v:.2f}×" for k, v in record["two_threads"].items()]
    told = f"{', '.join(gains)} of one" if gains else "not measured (the cores were not free)"
    lines += ["", f"Two threads, wall: {told}. Load average at the end {record['load']:.1f}."]
    lines += ["", "GPU: " + record["gpu"], "", "Losses at fixed parameters, sources and draws:", ""]
    lines += ["| term | ours | plain | relative difference |", "|---|---|---|---|"]
    for name, row in record["equal"].items():
        values = [f"{row[k]:.8g}" if k in row else "" for k in ("ours", "plain")]
        lines.append(f"| {name} | {' | '.join(values)} | {row['relative difference']:.1e} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--check", action="store_true", help="fail where a limit is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = Size(vocab=options.vocab)
    draw = generator(0, "compared")
    tokens = torch.randint(size.vocab, (size.batch, size.tokens), generator=draw)
    ours = Ours(size, settings(size, {}), "cpu")
    equal = compare(ours, Plain(ours), tokens)
    times = measure(variants(size, "cpu"), options.rounds, size, "cpu")
    work, peak = flops(size), peak_flops()
    rows = table(times, work["step"], peak)
    record = {
        "machine": machine(),
        "size": vars(size),
        "rounds": options.rounds,
        "rows": [vars(row) for row in rows],
        "flops": work,
        "peak": peak,
        "equal": equal,
        "two_threads": two_threads(size, max(3, options.rounds // 2)),
        "gpu": "not measured",
        "load": os.getloadavg()[0],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "vpd_step.json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    (OUT / "vpd_step.md").write_text(text)
    print(text)
    ratio = {row.name: row.ratio for row in rows}
    worst = max(row["relative difference"] for k, row in equal.items() if "gradient" not in k)
    ok = ratio["**ours**"] >= LIMITS["fp32"] and ratio["**ours, bf16**"] >= LIMITS["bf16"]
    ok = ok and worst <= LIMITS["loss"]
    print(f"limits {LIMITS}: {'met' if ok else 'missed'}")
    return int(options.check and not ok)


if __name__ == "__main__":
    sys.exit(main())
