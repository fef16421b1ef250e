"""`decompose_difference`: stages and tokens in, a `DifferenceDecomposition` out (vpd.md §9)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.site import select_sites
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.grammar import sites_of
from mi_weightspace.models.lineage import Lineage
from mi_weightspace.models.weights import WeightSource
from mi_weightspace.vpd.config import VPDConfig, make_config, read_config
from mi_weightspace.vpd.data import HELD_OUT, Data, table_of
from mi_weightspace.vpd.differences.host import DifferenceHost, Features
from mi_weightspace.vpd.differences.result import DifferenceDecomposition
from mi_weightspace.vpd.differences.stages import Direction, as_lineage, directed
from mi_weightspace.vpd.differences.unit import (
    Unit,
    change_at_positions,
    refuse_unresolved,
    unexplained,
    unit_of,
)
from mi_weightspace.vpd.differences.updates import Update, starting_matrix, updates
from mi_weightspace.vpd.distributed import rank
from mi_weightspace.vpd.run import bare, finished_run, join, trained_on
from mi_weightspace.vpd.stream import MixedStream, Stream, TokenStream

Regime = Literal["selective", "faithful"]
BEHAVIOUR, BROAD = "behaviour", "broad"
DEFAULTS: dict[str, Any] = {
    "n_components": 16,
    "init": "svd",
    "normalise": "zero_mask",
    "minimality": {"weight": 1e-2, "frequency_weight": 5e-3},
}
"""Of `VPDConfig`; reconstruction is in units of K0, so the weight of minimality says which share of
the whole change an active component has to buy."""


def decompose_difference(
    stages: Any,
    behaviour: Any,
    config: VPDConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    broad: Any = None,
    held_out: Any = None,
    held_out_broad: Any = None,
    share: float = 0.5,
    regime: Regime = "selective",
    direction: Direction = "install",
    features: Features = "tuned",
    below_floor: bool = False,
    length: int = 64,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> DifferenceDecomposition:
    """Decompose what training changed into rank-one parts, and say which of them matter where.

    Args:
        stages: a `Lineage`, or a mapping of stage name -> checkpoint or model, in training order.
        behaviour: data on which the behaviour shows; broad: any other text, as the rest of every
            batch. Forms as in `decompose`; both must be rows of one length.
        config: as in `decompose`, over `DEFAULTS`.
        share: part of every batch that is behaviour, at least a half.
        regime: ``selective``: no faithfulness, the bulk of the update may stay in the remainder,
            which the adversary attacks; ``faithful``: C ≥ rank and the components sum to it.
        direction: ``install``: which pieces of the update make the last stage; ``remove``: with
            the stages reversed, which pieces have to be taken back to have the first again.
        features: what the importance network reads (`DifferenceHost`).
        below_floor: decompose updates that rounding alone explains too; never silently.
        held_out, held_out_broad: data to evaluate on; default the last 5 % of the rows.

    A result without sites, with the verdict ``no change``, is returned where the weights are equal.

    Raises:
        ConfigError: unknown keys, C below the rank in the faithful regime, a bad share.
        MismatchError: stages of different architectures or vocabularies.
        PromptError: too few rows, ids out of vocabulary, or a K0 that its own noise hides.
        OutputError: a folder that holds something.
    """
    if not 0.5 <= share <= 1:
        raise ConfigError(
            "share of behaviour",
            given=f"{share}",
            expected="0.5 to 1",
            remedy="Where the behaviour is rarer than that, its loss drowns in other changes.",
        )
    lineage = directed(as_lineage(stages), direction)
    settings = _settings(config, regime)
    place = None if out is None else Path(out)
    change = _change(lineage, settings, below_floor)
    plain = {
        **(record or {}),
        "stages": list(lineage.stages),
        "regime": regime,
        "direction": direction,
        "features": features,
        "share": share if broad is not None else 1.0,
        **change.described(),
    }
    if not change.kept:
        found = DifferenceDecomposition.without_sites(
            plain, change.verdicts(lineage), change.notes(), settings
        )
        if place is not None:
            found.save(place)
        return found
    host = change.host(lineage, features, prefix=settings.speed.prefix)
    given = (behaviour, held_out), None if broad is None else (broad, held_out_broad)
    parts = _parts(*given, host, settings, share, length)
    done = finished_run(DifferenceDecomposition, place, settings, host, resume=resume)
    if done is not None:
        return done
    plain |= _sizes(host, lineage, parts.batches, settings)
    trained, seconds = trained_on(
        host, parts.stream, settings, place, resume=resume, progress=progress, on_log=on_log
    )
    fields = bare(trained, parts.data(change.notes()), seconds, plain)
    result = DifferenceDecomposition.made(fields, host, change.verdicts(lineage), trained.objective)
    options = {"progress": progress, **(evaluation or {})}
    result = result.assessed_on(parts.batches, **options)
    if place is not None and rank() == 0:
        join(result, place)
    return result


def _sizes(
    host: DifferenceHost,
    lineage: Lineage,
    batches: Mapping[str, Sequence[Tensor]],
    settings: VPDConfig,
) -> dict[str, Any]:
    """K0 and what is not decomposed, on every stream; and where the weights came from.

    Raises:
        PromptError: a K0 of the behaviour that its own noise hides.
    """
    with host.prepared(settings.speed):
        units = {k: unit_of(change_at_positions(host, v)) for k, v in batches.items()}
        refuse_unresolved(units[BEHAVIOUR], BEHAVIOUR)
        with lineage.opened(lineage.stages[0]) as base:
            gaps = {k: unexplained(host, base, v) for k, v in batches.items()}
    refs = {after: asdict(lineage.diff(before, after).ref) for before, after in lineage.steps}
    return {
        "units": {k: _plain(u) for k, u in units.items()},
        "unexplained": {k: _plain(u) for k, u in gaps.items()},
        "sources": refs,
    }


@dataclass(frozen=True, eq=False)
class _Change:
    """The updates of a lineage, and which of them are decomposed."""

    found: tuple[Update, ...]
    kept: tuple[Update, ...]
    n_matrices: int
    sources: Mapping[str, WeightSource]

    def host(self, lineage: Lineage, features: Features, *, prefix: bool) -> DifferenceHost:
        first, last = lineage.stages[0], lineage.stages[-1]
        starts = {
            u.site.name: starting_matrix(self.sources[first], self.sources[last], u.site)
            for u in self.kept
        }
        return DifferenceHost(
            lineage.lens(last), self.kept, starts, features=features, prefix=prefix
        )

    def described(self) -> dict[str, Any]:
        return {
            "updates": {u.name: _described(u) for u in self.found},
            "left_out": [u.name for u in self.found if u not in self.kept],
        }

    def notes(self) -> tuple[str, ...]:
        return _about(self.found, self.kept)

    def verdicts(self, lineage: Lineage) -> tuple[Verdict, ...]:
        return _size_verdicts(self.found, self.kept, self.n_matrices, lineage)


def _change(lineage: Lineage, settings: VPDConfig, below_floor: bool) -> _Change:
    sources = {name: lineage.source(name) for name in lineage.stages}
    chosen = select_sites(sites_of(sources[lineage.stages[-1]].shape), settings.sites)
    found = tuple(updates(sources, chosen))
    kept = tuple(u for u in found if below_floor or u.facts.flag != "red")
    return _Change(found, kept, len(chosen), sources)


def _settings(config: Any, regime: Regime) -> VPDConfig:
    if isinstance(config, VPDConfig):
        given = config.model_dump(exclude_unset=True)
    elif isinstance(config, str | Path):
        given = read_config(config).model_dump(exclude_unset=True)
    else:
        given = dict(config or {})
    values = DEFAULTS | {"faithfulness": {"weight": 1.0 if regime == "faithful" else 0.0}} | given
    settings = make_config(values, "configuration of a difference")
    asked = settings.faithfulness.weight > 0
    if asked != (regime == "faithful"):
        raise ConfigError(
            "faithfulness.weight",
            given=f"{settings.faithfulness.weight:g} in the {regime} regime",
            expected="a positive weight with regime='faithful', 0 with 'selective'",
            remedy="Set regime=, or leave the weight out.",
        )
    return settings


# ---- data ----------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Parts:
    stream: Stream
    batches: dict[str, tuple[Tensor, ...]]
    digest: str
    notes: tuple[str, ...]

    def data(self, notes: Sequence[str]) -> Data:
        return Data(
            self.stream,
            self.batches[BEHAVIOUR],
            "held-out rows",
            self.digest,
            (*self.notes, *notes),
        )


def _parts(
    behaviour: tuple[Any, Any],
    broad: tuple[Any, Any] | None,
    host: DifferenceHost,
    settings: VPDConfig,
    share: float,
    length: int,
) -> _Parts:
    size = settings.batch_size
    first, kept = _split(*behaviour, host, length, size)
    tables, batches, notes = [first], {BEHAVIOUR: kept}, []
    n_first = size
    if broad is None:
        notes.append("No broad stream was given: nothing is said about other text.")
    else:
        rest, batches[BROAD] = _split(*broad, host, length, size)
        if rest.shape[1] != first.shape[1]:
            raise ConfigError(
                "lengths of the two streams",
                given=f"{first.shape[1]} and {rest.shape[1]} tokens",
                expected="rows of one length",
                remedy="Cut both to one length=.",
            )
        tables.append(rest)
        n_first = min(size - 1, math.ceil(share * size)) if share < 1 else size
    table = torch.cat(tables)
    stream = MixedStream(table, size, settings.seed, n_first=len(first), first_size=n_first)
    digest = hashlib.sha256(table.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
    return _Parts(stream, batches, digest, tuple(notes))


def _split(
    given: Any, held_out: Any, host: Any, length: int, size: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Rows to train on and held-out batches."""
    rows = given.tokens if isinstance(given, TokenStream) else table_of(given, host, length)
    if held_out is not None:
        return rows, tuple(table_of(held_out, host, length).split(size))
    n = max(size, math.ceil(HELD_OUT * len(rows)))
    if len(rows) < n + size:
        raise ConfigError(
            "tokens",
            given=f"{len(rows)} rows",
            expected=f"at least {n + size}: one batch to train on and one kept apart",
            remedy="Give more rows, a smaller batch_size, or held_out= data.",
        )
    return rows[:-n], tuple(rows[-n:].split(size))


# ---- words ---------------------------------------------------------------------------------
def _described(update: Update) -> dict[str, Any]:
    facts = update.facts
    return {
        "matrix": update.site.name,
        "stage": update.stage,
        "biased": update.biased,
        "low_rank": update.left is not None,
        "fro": facts.fro,
        "relative": facts.relative,
        "top": facts.top,
        "rank": facts.rank,
        "changed_fraction": facts.changed_fraction,
        "edge": facts.edge,
        "storage": facts.storage,
        "flag": facts.flag,
    }


def _plain(unit: Unit) -> dict[str, float | int]:
    return {
        "value": unit.value,
        "low": unit.low,
        "high": unit.high,
        "n": unit.n,
        "n_rows": unit.n_rows,
    }


def _about(found: Sequence[Update], kept: Sequence[Update]) -> tuple[str, ...]:
    notes = []
    amber = [u.name for u in kept if u.facts.flag == "amber"]
    if amber:
        notes.append(
            f"Small against the storage precision: {', '.join(amber[:6])}"
            f"{' …' if len(amber) > 6 else ''}; norms and ranks there are unreliable."
        )
    lost = [u.name for u in found if u not in kept]
    if lost:
        notes.append(f"Left out, below the rounding floor: {', '.join(lost[:6])}.")
    red = [u.name for u in kept if u.facts.flag == "red"]
    if red:
        notes.append(f"Below the rounding floor and decomposed all the same: {', '.join(red[:6])}.")
    return tuple(notes)


def _size_verdicts(
    found: Sequence[Update], kept: Sequence[Update], n_matrices: int, lineage: Lineage
) -> tuple[Verdict, ...]:
    verdicts = [
        Verdict(
            Word.BELOW_FLOOR,
            u.name,
            {"top": u.facts.top, "edge": u.facts.edge},
            ("Not decomposed.",),
        )
        for u in found
        if u not in kept
    ]
    if not found:
        subject = " → ".join(lineage.stages)
        verdicts.append(Verdict(Word.NO_CHANGE, subject, {"n_matrices": n_matrices}))
    return tuple(verdicts)
