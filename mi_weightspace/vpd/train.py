"""The training loop (vpd.md §5): warm-up, schedules, clipping, log, checkpoints, resume.

Killed at any point and resumed, a run on a CPU ends in the same bits (SPEC.md, invariants 20–23).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm.auto import tqdm

from mi_weightspace.core.errors import DivergedError, OutputError
from mi_weightspace.core.output_io import writing
from mi_weightspace.models.arithmetic import decide
from mi_weightspace.vpd.cache import CleanBatches, clean_batches
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.distributed import (
    anywhere,
    average_,
    copy_from_first,
    global_mean,
    own_rows,
    rank,
)
from mi_weightspace.vpd.factors import Factors, initial_factors
from mi_weightspace.vpd.host import Clean, Host
from mi_weightspace.vpd.importance import make_importance
from mi_weightspace.vpd.interrupt import Interrupts
from mi_weightspace.vpd.losses import Target, faithfulness
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Losses, Objective
from mi_weightspace.vpd.state import (
    RunState,
    latest,
    read_record,
    restore_state,
    save_state,
    sweep,
)
from mi_weightspace.vpd.stream import Stream

SCALE_BATCHES = 8
"""Batches whose mean zero-mask error is the unit of reconstruction (`normalise`)."""
FIRING = 0.0
"""Threshold of the L0 shown during training."""
METRICS = "metrics.jsonl"
Log = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run.

    Attributes:
        history: one record a logged step, means over the `steps` since the one before: the terms,
            ``l0`` and ``l0/SITE``, ``grad_components``, ``grad_importance``; and ``seconds``.
    """

    objective: Objective
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def factors(self) -> Factors:
        return self.objective.factors


def train(
    host: Host,
    stream: Stream,
    config: VPDConfig,
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_log: Log | None = None,
) -> Trained:
    """Decompose the host's matrices.

    Args:
        folder: where checkpoints and ``metrics.jsonl`` go; None keeps nothing.
        resume: continue the newest checkpoint there (start afresh where there is none).
        on_log: called with every record of the history (a W&B logger, a live plot).

    Raises:
        ConfigError: C below the rank, counts that do not cover the sites, a changed configuration
            or model on resume. OutputError: a folder that holds a run, without `resume`.
        DivergedError: a loss or gradient that is not finite; the last checkpoint is kept.
        KeyboardInterrupt: Ctrl-C; the step under way is finished and saved first. A second Ctrl-C
            does not wait.
    """
    place = None if folder is None else Path(folder)
    _check_place(place, resume)
    found = latest(place) if place is not None and resume else None
    if found is not None and config.speed.fast_float32:
        # the same arithmetic, whatever this machine is busy with now
        decide(bool(read_record(found)["fast_float32"]))
    with host.prepared(config.speed):
        batches = clean_batches(host, stream, config)
        state, positions = _at_start(host, batches(0), config)
        if found is not None:
            restore_state(state, found, positions)
            if rank() == 0:  # a run killed behind its last step writes no checkpoint any more
                sweep(found.parent)
        else:
            warm_up(state.objective.factors, config, progress=progress)
            copy_from_first(_parameters(state.objective))
            state.objective.scale = measure_scale(state.objective, stream)
        history = _kept_history(place, state.step)
        for record in _steps(state, batches, place, progress):
            history.append(record)
            _write_record(place, record)
            if on_log is not None and rank() == 0:
                on_log(record)
    return Trained(state.objective, history)


def _parameters(objective: Objective) -> list[Tensor]:
    return [*objective.factors.parameters(), *objective.importance.parameters()]


def _at_start(host: Host, clean: Clean, config: VPDConfig) -> tuple[RunState, tuple[int, ...]]:
    """`start`, and the leading shape of a batch's activations."""
    x = clean.inputs[host.names[0]]
    leading = x.ndim - 1 if x.is_floating_point() else x.ndim
    return start(host, clean, config), tuple(x.shape[:leading])


def start(host: Host, clean: Clean, config: VPDConfig) -> RunState:
    """Factors, importance network and optimisers at step 0 (before any warm-up)."""
    factors = initial_factors(host, config)
    importance = make_importance(factors, clean, config.importance, config.seed)
    fused = config.speed.fused_optimiser
    components = torch.optim.AdamW(factors.parameters(), lr=config.lr, weight_decay=0, fused=fused)
    network = torch.optim.AdamW(
        importance.parameters(), lr=config.importance_lr, weight_decay=0, fused=fused
    )
    return RunState(Objective(factors, importance, config), components, network)


def warm_up(factors: Factors, config: VPDConfig, *, progress: bool = True) -> None:
    """`n_warmup` steps of AdamW on faithfulness alone; its optimiser is thrown away."""
    if config.n_warmup == 0:
        return
    optimiser = torch.optim.AdamW(factors.parameters(), lr=config.warmup_lr, weight_decay=0)
    for _ in tqdm(
        range(config.n_warmup), "faithfulness warm-up", disable=not progress, leave=False
    ):
        loss = faithfulness(factors, config.faithfulness)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def measure_scale(objective: Objective, stream: Stream) -> float:
    """Mean error of the all-zero mask over the first batches, or 1 (`config.normalise`)."""
    if objective.config.normalise == "none":
        return 1.0
    host, values = objective.factors.host, []
    for step in range(SCALE_BATCHES):
        clean = host.clean(own_rows(stream.batch(step)).to(host.device))
        values.append(zero_mask_error(objective, clean))
    scale = float(global_mean(torch.stack(values).mean()))
    if not (math.isfinite(scale) and scale > 0):
        raise DivergedError(
            "error of the all-zero mask",
            given=f"{scale}",
            expected="a positive number: with every component off the output must change",
            remedy="These matrices do not matter on this data; choose other sites or data.",
        )
    return scale


@torch.no_grad()
def zero_mask_error(objective: Objective, clean: Clean) -> Tensor:
    """The metric with every component and every remainder off."""
    x = clean.inputs[objective.factors.layout.names[0]]
    zeros = torch.zeros(objective.sizes[0], device=x.device, dtype=objective.draws.dtype)
    target = Target.of(clean, objective.factors.host.metric)
    return target.distance(objective.masked(clean, Masks(zeros), train=False))


def train_step(state: RunState, clean: Clean) -> tuple[Losses, dict[str, float]]:
    """One step: losses, one backward pass, clip, both optimisers, the last ascents.

    Raises:
        DivergedError: something not finite; nothing has been changed then.
    """
    objective, config = state.objective, state.objective.config
    losses = objective(clean, state.step)
    state.components.zero_grad(set_to_none=True)
    state.importance.zero_grad(set_to_none=True)
    losses.total.backward()
    factors = objective.factors.parameters()
    network = list(objective.importance.parameters())
    total = losses.total.detach().clone()
    average_([total, *(p.grad for p in [*factors, *network] if p.grad is not None)])
    norms = {"grad_components": _norm(factors), "grad_importance": _norm(network)}
    if not all(map(math.isfinite, [float(total), *norms.values()])):
        raise _diverged(objective, losses, norms, state.step)
    _clip(factors, config.clip, norms["grad_components"])
    _clip(network, config.importance_clip, norms["grad_importance"])
    factor = _cosine(state.step, config)
    state.components.param_groups[0]["lr"] = config.lr * factor
    state.importance.param_groups[0]["lr"] = config.importance_lr * factor
    state.components.step()
    state.importance.step()
    losses.ascend((state.step + 1) / config.n_steps)
    state.step += 1
    return replace(losses, total=total), norms


def _norm(parameters: Sequence[Tensor]) -> float:
    return float(get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _clip(parameters: Sequence[Tensor], bound: float | None, norm: float) -> None:
    """``g ← g · min(1, c / (‖g‖ + 1e-6))``."""
    if bound is not None:
        clip_grads_with_norm_(parameters, bound, torch.tensor(norm))


def _cosine(step: int, config: VPDConfig) -> float:
    """1 at the first step, `lr_end` at the last."""
    progress = step / max(1, config.n_steps - 1)
    return config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))


def _diverged(
    objective: Objective, losses: Losses, norms: dict[str, float], step: int
) -> DivergedError:
    terms = [k for k, v in losses.terms.items() if not math.isfinite(float(v))]
    terms += [k for k, v in norms.items() if not math.isfinite(v)]
    site = _first_site(objective, losses) or "no single one (components and importances are finite)"
    return DivergedError(
        f"step {step}",
        given=f"{', '.join(terms)} not finite; first site concerned: {site}",
        expected="finite losses and gradients",
        remedy="Lower lr or set clip; the last checkpoint on disk is from before and can be "
        "resumed.",
    )


def _first_site(objective: Objective, losses: Losses) -> str | None:
    """Where components or importances are not finite; else, where gradients are not."""
    factors = objective.factors
    places = factors.layout.slices()
    for name, place in places.items():
        if not _finite(factors.reads[name], factors.writes[name], losses.low[..., place]):
            return name
    for name in places:
        if not _finite(factors.reads[name].grad, factors.writes[name].grad):
            return name
    return None


def _finite(*tensors: Tensor | None) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def _steps(
    state: RunState, batches: CleanBatches, place: Path | None, progress: bool
) -> Iterator[dict[str, Any]]:
    config, device = state.objective.config, state.objective.factors.host.device
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        bar = stack.enter_context(
            tqdm(
                total=config.n_steps,
                initial=state.step,
                desc="VPD",
                disable=not progress or rank() != 0,
                smoothing=0.05,
            )
        )
        window = Window(state.objective)
        while state.step < config.n_steps:
            step = state.step
            window.add(*train_step(state, batches(step)))
            bar.update()
            last = state.step == config.n_steps
            if step % config.log_every == 0 or last:
                record = window.record(step)
                window = Window(state.objective)
                bar.set_postfix_str(_shown(record))
                yield record
            stopped = anywhere(interrupts.asked, device)
            due = state.step % config.checkpoint_every == 0
            if place is not None and (due or last or stopped):
                save_state(state, place)
            if due:  # a resumed run starts its window here, so this one does too
                window = Window(state.objective)
            if stopped:
                raise KeyboardInterrupt(_stopped(state, place))


def _stopped(state: RunState, place: Path | None) -> str:
    done = f"stopped after {state.step} of {state.objective.config.n_steps} steps"
    if place is None:
        return f"{done}; nothing is kept without an output folder"
    return f"{done}; saved in {place}. Continue with resume=True (--resume)."


class Window:
    """Means over the steps since the last record: one batch's L0 is too noisy to see a drift in."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.count, self.start = objective, 0, time.perf_counter()
        self.terms: dict[str, list[Tensor]] = {}
        self.norms: dict[str, float] = {}
        self.firing: Tensor | None = None

    def add(self, losses: Losses, norms: dict[str, float]) -> None:
        self.count += 1
        firing = (losses.low > FIRING).flatten(0, -2).float().mean(0)
        self.firing = firing if self.firing is None else self.firing + firing
        for name, value in {"total": losses.total.detach(), **losses.terms}.items():
            self.terms.setdefault(name, []).append(value)
        for name, norm in norms.items():
            self.norms[name] = self.norms.get(name, 0.0) + norm

    def record(self, step: int) -> dict[str, Any]:
        assert self.firing is not None, "a record of no steps"
        firing = global_mean(self.firing / self.count)
        per_site = {
            f"l0/{name}": float(firing[place].sum())
            for name, place in self.objective.factors.layout.slices().items()
        }
        return {
            "step": step,
            "steps": self.count,
            **{k: float(global_mean(torch.stack(v).mean())) for k, v in self.terms.items()},
            "l0": sum(per_site.values()),
            **per_site,
            **{name: norm / self.count for name, norm in self.norms.items()},
            "seconds": time.perf_counter() - self.start,
        }


def _shown(record: dict[str, Any]) -> str:
    shown = [f"L0 {record['l0']:.1f}"]
    shown += [f"{k.split('.', 2)[2]} {v:.3g}" for k, v in record.items() if k[:5] == "recon"]
    return ", ".join(shown)


# ---- the run folder ------------------------------------------------------------------------
def _check_place(place: Path | None, resume: bool) -> None:
    if place is None or resume or not place.exists():
        if place is not None:
            with writing(place, "output folder"):
                place.mkdir(parents=True, exist_ok=True)
        return
    if any(place.iterdir()):
        raise OutputError(
            f"output folder {place}",
            given="files of an earlier run",
            expected="a new or empty folder",
            remedy="Choose another folder, or continue that run with resume=True (--resume).",
        )


def _kept_history(place: Path | None, step: int) -> list[dict[str, Any]]:
    """The logged records before `step`; later lines came from a run that was killed after it."""
    path = None if place is None else place / METRICS
    if path is None or not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the line a kill cut short
            break
        if record["step"] < step:
            kept.append(record)
    if rank() == 0:  # by exchange: a kill in the middle must not lose the lines
        staging = path.with_name(f".{METRICS}.partial")
        with writing(path.parent, "output folder"):
            staging.write_text("".join(json.dumps(record) + "\n" for record in kept))
            staging.replace(path)
    return kept


def _write_record(place: Path | None, record: dict[str, Any]) -> None:
    if place is None or rank() != 0:
        return
    with writing(place, "output folder"), (place / METRICS).open("a") as handle:
        handle.write(json.dumps(record) + "\n")
