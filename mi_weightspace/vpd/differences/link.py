"""What the parts of an update mean to a probe, and whether the behaviour needs them (vpd.md §9).

Two questions, never one for the other. *Geometry*: what a component writes along a direction ŵ of
the stream at each token, ``D_c(t) = g_c a_c ⟨u_c, ŵ⟩``, and its cosine beside random directions of
the update's own column space. *Cause*: what becomes of the probe's score and of the behaviour when
the component is reverted (its mask 0, every other mask and every remainder 1), beside random pieces
of the same update. A component is ``written here`` only where both say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import ConfigError, DirectionError
from mi_weightspace.core.report import Report
from mi_weightspace.core.stats import holm
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.vpd.data import prompt_ids
from mi_weightspace.vpd.differences.link_cause import Causes, Effect, Piece, ReadoutLike
from mi_weightspace.vpd.differences.link_geometry import Geometry, Stream, geometry

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mi_weightspace.vpd.differences.host import DifferenceHost
    from mi_weightspace.vpd.differences.result import DifferenceDecomposition

SHARE = 0.25
"""Part of the behaviour's change that a load-bearing component has to carry by itself."""
LEAST = 0.5
"""Nats by which the behaviour must have changed for the question to have an object."""
ALPHA = 0.05
LIVE = 0.01
"""Share of tokens, of either stream, on which a component must be important to be looked at."""
NO_READOUT = "No readout was given: whether the behaviour needs a component was not asked."


class LinkReport(Report):
    """A row per living component, stream side and direction; without directions per component.

    Columns: ``site`` (MATRIX@STAGE), ``matrix, stage, component, side, direction``; ``firing`` and
    ``firing_broad`` (share of tokens with importance above 0); ``cosine, p_cosine`` (two-sided,
    Holm over the rows), ``null_high`` (95 % of |cosine| of random directions), ``rank`` of the
    space they are drawn from; ``direct`` and ``direct_broad`` (mean over tokens) with ``_low,
    _high`` (95 %, over rows); ``score_change`` (what reverting takes from the probe's score, raw
    units), ``score_share`` of the whole update's, ``p_score``; ``behaviour_change`` (nats),
    ``behaviour_share, p_behaviour, p_controls``; ``others_largest`` (the largest behaviour change
    of another living component); ``verdict``. Table ``positions``: `direct` by token position.
    """

    kind: ClassVar[str] = "vpd-link"

    def plot(self) -> go.Figure:
        """Cosine against the behaviour's share, a point a row."""
        import plotly.express as px

        named = ["site", "component", "side", "direction"]
        return px.scatter(
            self.table[["cosine", "behaviour_share", "verdict", *named]],
            x="cosine",
            y="behaviour_share",
            color="verdict",
            hover_data=named,
            labels={
                "cosine": "cosine with the direction",
                "behaviour_share": "share of the behaviour's change lost when reverted",
            },
            template="plotly_white",
        )


@dataclass(frozen=True)
class LinkConfig:
    """How the link is judged.

    Attributes:
        n_directions: random directions of each null of cosines.
        n_pieces: random pieces of an update each component is compared with.
        share, least, alpha, live: see `SHARE`, `LEAST`, `ALPHA`, `LIVE`.
        batch_size: prompts a forward pass.
    """

    n_directions: int = 999
    n_pieces: int = 39
    share: float = SHARE
    least: float = LEAST
    alpha: float = ALPHA
    live: float = LIVE
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        most = max(1 / (self.n_directions + 1), 1 / (self.n_pieces + 1))
        if not (0 < self.share <= 1 and 0 < self.alpha < 1 and most <= self.alpha):
            raise ConfigError(
                "probe link",
                given=f"share {self.share}, alpha {self.alpha}, {self.n_directions} directions "
                f"and {self.n_pieces} pieces",
                expected="0 < share ≤ 1 and nulls large enough to reach alpha",
                remedy="Use more draws (19 at least for alpha = 0.05).",
            )


def link(
    parts: DifferenceDecomposition,
    directions: Direction | Sequence[Direction],
    behaviour: Any,
    *,
    readout: ReadoutLike | None = None,
    controls: Sequence[ReadoutLike] = (),
    broad: Any = None,
    config: LinkConfig | None = None,
) -> LinkReport:
    """Join the components of an update to directions and to a behaviour.

    Args:
        parts: with its model at hand. directions: of the residual stream; the pattern is used for
            geometry, the filter for the score. May be empty: the causal column alone.
        behaviour, broad: tokens, as for `importances`.
        readout: the behaviour (`core.readout.Readout`). controls: the same question about other
            things; the behaviour's change, and a component's part in it, must exceed theirs.

    Without a readout the strongest word is ``aligned``; the score is then taken at the last token
    of the behaviour rows.

    Raises:
        DirectionError: a direction of another space than the stream, or of another width.
        ConfigError: a decomposition without its model, or draws too few for the level asked for.
    """
    settings, host = config or LinkConfig(), cast("DifferenceHost", parts.host)
    listed = [directions] if isinstance(directions, Direction) else list(directions)
    _check(listed, host)
    streams = [Stream.of(parts, behaviour)] + ([] if broad is None else [Stream.of(parts, broad)])
    living = _living(parts, streams, settings.live)
    causes = Causes(
        host,
        listed,
        readout,
        tuple(controls),
        prompt_ids(behaviour, host),
        settings.batch_size,
    )
    judged = Judged(settings, readout is not None, causes.whole)
    effects = {
        (site, c): causes.effect(_piece(parts, site, c), settings.n_pieces, settings.seed)
        for site, c in living
    }
    rows, positions = [], []
    for site, c in living:
        head = _head(parts, site, c, streams) | judged.columns(effects, (site, c))
        found = geometry(parts, site, c, listed, streams, settings.n_directions, settings.seed)
        if not found:
            rows.append(head | {"side": "", "direction": ""})
        for one in found:
            rows.append(head | _row(one) | judged.score(effects[site, c], one.direction))
            positions += _positions(site, c, one)
    return _report(rows, positions, judged, settings, parts, listed)


def _check(directions: Sequence[Direction], host: DifferenceHost) -> None:
    width = host.lens.shape.d_model
    for direction in directions:
        if not direction.space.is_stream or direction.width != width:
            raise DirectionError(
                f"direction {direction.name}",
                given=f"width {direction.width} at {direction.space}",
                expected=f"a direction of the residual stream, width {width}",
                remedy="Fit it at resid_post.LAYER of this model.",
            )


def _living(
    parts: DifferenceDecomposition, streams: Sequence[Stream], least: float
) -> list[tuple[str, int]]:
    """Components that are important on enough tokens of some stream, in model order."""
    found = []
    for site in parts.sites:
        firing = torch.stack([(s.low[site] > 0).double().mean((0, 1)) for s in streams]).amax(0)
        found += [(site, c) for c in (firing >= least).nonzero().flatten().tolist()]
    return found


def _piece(parts: DifferenceDecomposition, site: str, c: int) -> Piece:
    """A component in the coordinates in which its update is decomposed."""
    factors = parts.objective.factors
    return Piece(site, factors.reads[site][c].detach(), factors.writes[site][c].detach())


def _head(
    parts: DifferenceDecomposition, site: str, c: int, streams: Sequence[Stream]
) -> dict[str, Any]:
    update = parts.config["updates"][site]
    found: dict[str, Any] = {
        "site": site,
        "matrix": update["matrix"],
        "stage": update["stage"],
        "component": c,
    }
    for stream, name in zip(streams, ("firing", "firing_broad"), strict=False):
        found[name] = float((stream.low[site][..., c] > 0).double().mean())
    return found


def _row(found: Geometry) -> dict[str, Any]:
    row: dict[str, Any] = {
        "side": found.side,
        "direction": found.direction,
        "cosine": found.cosine,
        "p_cosine": found.p,
        "null_high": found.null_high,
        "rank": found.rank,
    }
    for direct, name in zip(found.direct, ("direct", "direct_broad"), strict=False):
        row |= {name: direct.value, f"{name}_low": direct.low, f"{name}_high": direct.high}
    return row


def _positions(site: str, c: int, found: Geometry) -> list[dict[str, Any]]:
    return [
        {
            "site": site,
            "component": c,
            "side": found.side,
            "direction": found.direction,
            "stream": stream,
            "position": at,
            "direct": value,
        }
        for stream, direct in zip(("behaviour", "broad"), found.direct, strict=False)
        for at, value in enumerate(direct.by_position)
    ]


# ---- words ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judged:
    """The causal columns, and the word a row gets.

    Attributes:
        whole: what reverting the whole update does.
    """

    settings: LinkConfig
    asked: bool
    whole: Effect
    notes: list[str] = field(default_factory=list)

    @property
    def p_whole(self) -> float | None:
        """Rank of the behaviour's change among the controls'."""
        own, others = self.whole.behaviour, self.whole.controls
        return _rank(own, others) if others else None

    @property
    def changed(self) -> bool:
        """Whether there is a change of behaviour to carry."""
        if not self.asked or abs(self.whole.behaviour) < self.settings.least:
            return False
        return self.p_whole is None or self.p_whole <= self.settings.alpha

    def columns(
        self, effects: Mapping[tuple[str, int], Effect], key: tuple[str, int]
    ) -> dict[str, Any]:
        nothing = float("nan")
        names = ("change", "share", "others")
        if not self.asked:
            return {f"behaviour_{n}": nothing for n in names[:2]} | {
                "p_behaviour": nothing,
                "p_controls": nothing,
                "others_largest": nothing,
                "bears": False,
            }
        own, sign = effects[key], 1.0 if self.whole.behaviour >= 0 else -1.0
        others = [sign * e.behaviour for k, e in effects.items() if k != key]
        p = _rank(sign * own.behaviour, [sign * x for x in own.pieces], signed=True)
        # each in the direction of its own change: signed by the behaviour's alone, a control would
        # be as likely against it as along it, and the rank half as large as it should be
        along = [
            x if whole >= 0 else -x
            for x, whole in zip(own.controls, self.whole.controls, strict=True)
        ]
        p_controls = _rank(sign * own.behaviour, along, signed=True) if along else nothing
        share = own.behaviour / self.whole.behaviour if self.whole.behaviour else nothing
        alpha = self.settings.alpha
        bears = (
            self.changed
            and share >= self.settings.share
            and p <= alpha
            and not p_controls > alpha  # NaN where there are none
        )
        return {
            "behaviour_change": own.behaviour,
            "behaviour_share": share,
            "p_behaviour": p,
            "p_controls": p_controls,
            "others_largest": max(others, default=nothing),
            "bears": bears,
        }

    def score(self, own: Effect, direction: str) -> dict[str, Any]:
        value, whole = own.scores[direction], self.whole.scores[direction]
        return {
            "score_change": value,
            "score_share": value / whole if whole else float("nan"),
            "p_score": _rank(value, own.piece_scores[direction]),
        }

    def word(self, row: Mapping[str, Any]) -> Word:
        aligned = row.get("p_cosine", 1.0) <= self.settings.alpha
        if not row["bears"]:
            return Word.ALIGNED if aligned else Word.NOT_LOAD_BEARING
        # a direction that is aligned but whose score the component does not move is not its meaning
        if aligned and row["p_score"] <= self.settings.alpha:
            return Word.WRITTEN_HERE if row["side"] == "write" else Word.READ_HERE
        return Word.LOAD_BEARING


def _rank(own: float, others: Sequence[float], *, signed: bool = False) -> float:
    """(1 + #{others as large}) / (n + 1); by magnitude unless `signed`."""
    size = (lambda x: x) if signed else abs
    return (1 + sum(size(x) >= size(own) for x in others)) / (len(others) + 1)


def _report(
    rows: list[dict[str, Any]],
    positions: list[dict[str, Any]],
    judged: Judged,
    settings: LinkConfig,
    parts: DifferenceDecomposition,
    directions: Sequence[Direction],
) -> LinkReport:
    import pandas as pd

    if directions and rows:
        adjusted = holm(torch.tensor([r.get("p_cosine", 1.0) for r in rows]).double())
        for row, p in zip(rows, adjusted.tolist(), strict=True):
            if "p_cosine" in row:
                row["p_cosine"] = p
    for row in rows:
        row["verdict"] = str(judged.word(row))
    verdicts = tuple(_verdict(row) for row in rows)
    table: pd.DataFrame = pd.DataFrame(rows)
    return LinkReport(
        table=table,
        tables={"positions": pd.DataFrame(positions)},
        verdicts=(*_behaviour_verdict(judged), *verdicts),
        config={
            "command": "link",
            **vars(settings),
            "behaviour_change": judged.whole.behaviour,
            "p_behaviour_among_controls": judged.p_whole,
            "score_change": dict(judged.whole.scores),
            "n_controls": len(judged.whole.controls),
            "directions": [d.name for d in directions],
        },
        inputs={"model": str(parts.inputs.get("model", ""))},
        reservations=_reservations(judged, rows, parts),
    )


def _behaviour_verdict(judged: Judged) -> tuple[Verdict, ...]:
    if not judged.asked or judged.changed:
        return ()
    numbers = {"change": judged.whole.behaviour, "p_controls": judged.p_whole}
    why = "The behaviour asked about did not change, or not more than the controls did."
    return (Verdict(Word.NO_CHANGE, "behaviour", numbers, (why,)),)


def _verdict(row: Mapping[str, Any]) -> Verdict:
    subject = f"{row['site']} / {row['component']}"
    if row["direction"]:
        subject += f" / {row['side']} / {row['direction']}"
    names = ("cosine", "p_cosine", "score_share", "p_score", "behaviour_share", "p_behaviour")
    numbers = {n: row[n] for n in names if n in row}
    return Verdict(Word(row["verdict"]), subject, numbers)


def _reservations(
    judged: Judged, rows: Sequence[Mapping[str, Any]], parts: DifferenceDecomposition
) -> tuple[str, ...]:
    found = []
    if not judged.asked:
        found.append(NO_READOUT)
    if not rows:
        found.append("No component is important on these tokens.")
    if judged.asked and not judged.whole.controls:
        found.append("No control readouts: whether only this behaviour is borne was not asked.")
    if parts.unconverged:
        found.append("The decomposition says of itself that it has not converged.")
    return tuple(found)
