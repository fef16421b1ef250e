"""The causal gate: does the model *use* a direction, or can it only be read there?

A probe's score says that a difference can be decoded; registers are decodable at AUROC 1 before
any stage wires them to behaviour. `gate` takes the direction out of the stream, puts it in, and
asks whether the behaviour follows, more than it follows directions in which the contrast's own
pairs differ, and more than anything else follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.contrasts import Contrast, ContrastSet, Pair, Split
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.shifts import differences, mean_shift
from mi_weightspace.core.stats import cluster_weights
from mi_weightspace.models.harvest import harvest
from mi_weightspace.models.lens import Lens
from mi_weightspace.models.load import load
from probes.bank import ProbeBank
from probes.gate_interventions import (
    OPERATIONS,
    Change,
    Intervened,
    Operation,
    Subspaces,
    check_direction,
)
from probes.gate_judge import DETECTION_P, Protocol, judge
from probes.gate_nulls import REFERENCES, empty, null_subspaces, of_controls, of_direction
from probes.gate_numbers import DECIDING, Measured, Test, detection, measure, tests_of
from probes.gate_prompts import (
    FRAME,
    NEUTRAL,
    POSITIONS,
    Positions,
    Rows,
    control_rows,
    controls_of,
    target_rows,
)
from probes.gate_report import GateReport, check_protocol
from probes.gather import one_target

ALPHAS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
INTERVENTIONS: tuple[Operation, ...] = ("mean_ablate", "project_out", "swap", "add")
PER_CONTROL = 4
_POOLING = {"last": "last", "suffix": "suffix_mean", "all": "all_mean"}


@dataclass(frozen=True)
class GateSettings:
    """What is done and how often; see `gate`."""

    alphas: tuple[float, ...]
    interventions: tuple[Operation, ...]
    ablation: Operation
    positions: Positions
    onward: bool
    rank: int
    n_null: int
    n_reference: int
    n_bootstrap: int
    n_controls: int
    seed: int

    def check(self, protocol: str) -> None:
        """Refuse what cannot be run.

        Raises:
            ConfigError: settings out of range.
        """
        check_protocol(protocol)
        _among("interventions", self.interventions, OPERATIONS)
        _among("positions", (self.positions,), POSITIONS)
        _among("ablation", (self.ablation,), [o for o in self.interventions if o != "add"])
        least = min(self.n_null, self.n_reference, self.n_bootstrap, self.rank)
        bad = not self.alphas or not all(math.isfinite(a) and a > 0 for a in self.alphas)
        if least < 1 or self.n_controls < 0 or bad:
            raise ConfigError(
                "causal gate",
                given=f"alphas={self.alphas}, n_null={self.n_null}, "
                f"n_reference={self.n_reference}, n_bootstrap={self.n_bootstrap}, "
                f"rank={self.rank}, n_controls={self.n_controls}",
                expected="positive alphas (both signs are run), draws and rank",
                remedy=f"The defaults are alphas={ALPHAS}, n_null=199, rank=1.",
            )

    def tests(self, scale: float) -> list[Test]:
        """Every intervention on the prompts it is asked on."""
        found: list[tuple[Change, float]] = []
        for operation in self.interventions:
            if operation != "add":
                found.append((Change(operation), math.nan))
                continue
            sizes = [sign * a for a in self.alphas for sign in (1, -1)]
            found += [(Change("add", alpha * scale), alpha) for alpha in sizes]
        return tests_of(found, self.ablation)


def _among(name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    if not given or not set(given) <= set(allowed):
        raise ConfigError(
            name,
            given=", ".join(map(repr, given)) or "nothing",
            expected=f"some of {list(allowed)}",
            remedy="The default is " + {"positions": "'last'.", "ablation": "'mean_ablate'."}.get(
                name, f"{INTERVENTIONS}."
            ),
        )  # fmt: skip


def gate(
    model: Any,
    direction: Direction | ProbeBank,
    contrasts: Contrast | ContrastSet,
    *,
    readout: Readout | None = None,
    target: str | None = None,
    splits: Sequence[Split] | None = None,
    alphas: Sequence[float] | None = None,
    interventions: Sequence[Operation] = INTERVENTIONS,
    ablation: Operation = "mean_ablate",
    positions: Positions = "last",
    onward: bool = False,
    rank: int = 1,
    scale: float | None = None,
    n_null: int = 199,
    n_reference: int = 49,
    n_bootstrap: int = 2000,
    n_controls: int = 24,
    protocol: Protocol = "pair_residual",
    other_model: bool = False,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> GateReport:
    """Intervene along a direction and judge what the behaviour does.

    Args:
        model: a Lens or anything `mi_weightspace.load` takes.
        direction: at a stream point; of a `ProbeBank`, the one at its chosen point.
        contrasts: the pairs whose behaviour is asked about, and the controls.
        readout: tokens to compare after every prompt (its own prompts are not run); default each
            pair's own: the pushed continuation against the other options, or all other tokens.
        target: the contrast, where the set has several.
        splits: pairs to use; default all.
        alphas: sizes of ``add``, in units of `scale`, default `ALPHAS`; both signs are run.
        ablation: the one that decides; ``mean_ablate`` sets the projection to the neutral mean.
        positions: tokens changed: the ``last``, the ``suffix`` both sides share, or ``all``.
        onward: at every later block's output too.
        rank: above 1, the span of the top right singular vectors of the paired differences is
            ablated, against null subspaces of the same rank; steering stays along `direction`.
        scale: length of one alpha, raw residual units; default the direction's own, or the
            contrast's mean shift along it where it was not fitted.
        n_null, n_reference: draws of the deciding null and of each reference null.
        n_controls: control contrasts used.
        protocol: ``v1.1`` judges as the earlier gate did; see `probes.gate_judge`.
        other_model: accept a direction fitted on other weights (an earlier stage, say).

    Raises:
        DirectionError: another width or model, or no point of the stream.
        PromptError: no pair with a readout, or continuations that are not one token.
        ConfigError: settings out of range.
    """
    started = time.perf_counter()
    asked = GateSettings(
        alphas=tuple(map(float, ALPHAS if alphas is None else alphas)),
        interventions=tuple(interventions),
        ablation=ablation,
        positions=positions,
        onward=onward,
        rank=rank,
        n_null=n_null,
        n_reference=n_reference,
        n_bootstrap=n_bootstrap,
        n_controls=n_controls,
        seed=seed,
    )
    asked.check(protocol)
    lens = load(model, tokenizer=tokenizer)
    chosen = direction.direction() if isinstance(direction, ProbeBank) else direction
    check_direction(chosen, lens, other_model=other_model)
    bench = _Bench(lens, chosen, contrasts, target, asked, tokenizer or lens.tokenizer)
    bench.encode(readout, splits)
    extra = {
        "scale": bench.length(scale),
        "splits": None if splits is None else list(splits),
        "readout": None if readout is None else readout.name,
    }
    found = bench.run(extra["scale"], progress)
    return bench.report(found, protocol, extra, time.perf_counter() - started)


class _Bench:
    """One direction, one model, one contrast: the parts of a gate in the order they are made."""

    def __init__(
        self,
        lens: Lens,
        direction: Direction,
        contrasts: Contrast | ContrastSet,
        target: str | None,
        asked: GateSettings,
        tokenizer: Any,
    ) -> None:
        if isinstance(contrasts, Contrast):
            contrasts, target = ContrastSet(contrasts.name, (contrasts,)), contrasts.name
        self.lens, self.direction, self.contrasts = lens, direction, contrasts
        self.asked, self.tokenizer = asked, tokenizer
        self.target = contrasts[one_target(contrasts, target).targets[0]]
        self.controls = controls_of(contrasts, self.target.name)[: asked.n_controls]
        on = "" if self.target.name == direction.label else f"on {self.target.name}"
        self.subject = " / ".join(filter(None, [direction.stage, direction.name, on]))

    def encode(self, readout: Readout | None, splits: Sequence[Split] | None) -> None:
        """Run the unchanged model on every prompt."""
        asked = self.asked
        rows, self.pairs = target_rows(
            self.lens, self.target, readout=readout, splits=splits, tokenizer=self.tokenizer
        )
        most = max(1, min(len(self.pairs) - 1, self.direction.width))
        if asked.rank > most:
            raise ConfigError(
                "rank",
                given=str(asked.rank),
                expected=f"at most {most}, with {len(self.pairs)} pairs",
                remedy="Use a smaller rank, or more pairs.",
            )
        other = control_rows(
            self.lens, self.controls, per_control=PER_CONTROL, tokenizer=self.tokenizer
        )
        where: dict[str, Any] = {
            "positions": asked.positions,
            "onward": asked.onward,
            "behaviour": rows.behaviour(),
        }
        space = self.direction.space
        self.on_target = Intervened(self.lens, rows, space, **where)
        self.on_control = None
        if other is not None:
            self.on_control = Intervened(self.lens, other, space, mean=self.on_target.mean, **where)
        self.values = paired(rows, self.on_target.pooled)

    def length(self, scale: float | None) -> float:
        """Of one alpha: as given, the direction's own, or the contrast's mean shift along it."""
        if scale is None and self.direction.method != "given":
            scale = self.direction.scale
        if scale is None:
            shift = mean_shift(differences(self.values))
            scale = abs(float(shift @ self.direction.pattern.double()))
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(
                "scale",
                given=f"{scale:g}",
                expected="a positive length in residual units",
                remedy="Pass scale=, the length one alpha stands for.",
            )
        return scale

    def groups(self) -> dict[str, Subspaces]:
        """The direction first, the deciding null second, then the references."""
        asked, rank = self.asked, self.asked.rank
        found = {"observed": of_direction(self.direction.pattern, self.values, rank)}
        for kind in (DECIDING, *REFERENCES):
            draws = asked.n_null if kind == DECIDING else asked.n_reference
            found[kind] = null_subspaces(kind, self.values, draws, rank=rank, seed=asked.seed)
        found["controls"] = self._control_subspaces()
        return found

    def _control_subspaces(self) -> Subspaces:
        space, rank = self.direction.space.canonical, self.asked.rank
        if not self.controls:
            return empty(rank, self.direction.width)
        held = harvest(
            self.lens,
            ContrastSet("controls", self.controls),
            points=[space],
            position=_POOLING[self.asked.positions],
            progress=False,
        )
        return of_controls({c.name: held.at(c.name, space) for c in self.controls}, rank)

    def run(self, length: float, progress: bool) -> Measured:
        asked = self.asked
        weights = cluster_weights(
            [p.cluster_id for p in self.pairs], asked.n_bootstrap, seed=asked.seed, name="gate"
        )
        return measure(
            self.on_target,
            self.on_control,
            self.groups(),
            asked.tests(length),
            asked.ablation,
            weights,
            seed=asked.seed,
            progress=progress,
        )

    @property
    def in_sample(self) -> bool:
        """Whether the direction is of this contrast and these pairs are those that fit it."""
        own = self.direction.label == self.target.name
        return own and any(p.split == "fit" for p in self.pairs)

    @property
    def held_out_p(self) -> float:
        """What the direction's fit stored; NaN for one given without."""
        return float(self.direction.fit.get("p_adjusted", math.nan))

    def facts(self) -> dict[str, Any]:
        """Sizes of the run, and whether the direction tells the two sides apart at all."""
        clusters = [p.cluster_id for p in self.pairs]
        known = self.held_out_p
        score, p = detection(
            self.values, self.direction, clusters, in_sample=self.in_sample, seed=self.asked.seed
        )
        detects = p <= DETECTION_P or known <= DETECTION_P
        return {
            "ablation": self.asked.ablation,
            "n": len(self.pairs),
            "n_clusters": len(set(clusters)),
            "n_null": self.asked.n_null if len(self.pairs) > self.asked.rank else 0,
            "auroc": score,
            "p_detection": p,
            "detects": bool(detects),
        }

    def report(
        self, found: Measured, protocol: Protocol, extra: dict[str, Any], seconds: float
    ) -> GateReport:
        chosen = self.direction
        facts = self.facts() | found.facts
        records: Any = found.table.to_dict("records")
        settings = asdict(self.asked) | {
            "target": self.target.name,
            "direction": chosen.name,
            "stage": chosen.stage,
            "protocol": protocol,
        }
        return GateReport(
            table=found.table,
            tables={"pairs": pair_table(self.pairs, found), "controls": found.controls},
            arrays=found.arrays,
            verdicts=(judge(records, facts, protocol, self.subject),),
            config={k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()} | extra,
            inputs={
                "model": self.lens.fingerprint,
                "prompts": self.contrasts.hash,
                "direction": chosen.model_hash or "given",
            },
            reservations=self.reservations(),
            timings={"gate": seconds},
        )

    def reservations(self) -> tuple[str, ...]:
        found = []
        other = self.direction.model_hash
        if other and other != self.lens.fingerprint:
            found.append(
                f"The direction was fitted on other weights (stage {self.direction.stage!r})."
            )
        if self.in_sample and math.isnan(self.held_out_p):
            found.append(
                "`p_detection` is of pairs the direction may have been fitted on; no held-out p is "
                "stored with it, so noise passes too."
            )
        if not self.controls:
            found.append("No control contrasts: specificity rests on side effects alone.")
        if self.asked.rank > 1:
            found.append(
                f"What is ablated is the span of the top {self.asked.rank} singular vectors of the "
                "paired differences; what is added is the direction."
            )
        if len({p.wording_id for p in self.pairs}) == 1 and len(self.pairs) > 1:
            found.append("One wording: nothing is known of other ways to say it.")
        return tuple(found)


def paired(rows: Rows, pooled: Float[Tensor, "rows d"]) -> Float[Tensor, "n 2 d"]:
    """Activations of the pairs, positive first, their option orders averaged."""
    sides = [rows.of(side) for side in (FRAME, NEUTRAL)]
    return torch.stack([rows.per_pair(pooled[i].T, i).T for i in sides], dim=1)


def pair_table(pairs: Sequence[Pair], found: Measured) -> Any:
    import pandas as pd

    frame = pd.DataFrame(
        [(p.item_id, p.wording_id, p.register, p.split) for p in pairs],
        columns=pd.Index(["item_id", "wording_id", "register", "split"]),
    )
    for name, values in found.pairs.items():
        frame[name] = values.numpy()
    return frame
