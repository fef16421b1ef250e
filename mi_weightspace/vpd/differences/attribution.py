"""Which stage each token's behaviour is owed to: L0 per stage and exact Shapley values.

With v(S) = −KL(last ‖ the model with only the stages in S switched on), position by position, the
share of stage k is

    φ_k = Σ_{S ∌ k} |S|! (n−|S|−1)! / n! · (v(S ∪ k) − v(S)),

so that the shares sum to v(all) − v(none), which is KL(last ‖ first): all of what changed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from math import factorial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.vpd.differences.unit import per_position
from mi_weightspace.vpd.evaluate import THRESHOLDS, headline_threshold
from mi_weightspace.vpd.evaluate_stats import ratio
from mi_weightspace.vpd.host import Clean
from mi_weightspace.vpd.ladder import importances
from mi_weightspace.vpd.masked import Adjust, Masks
from mi_weightspace.vpd.objective import Objective

if TYPE_CHECKING:
    import pandas as pd

MOST_STAGES = 6
"""2^n models are run: exact values for this many stages, none beyond."""
NOTHING = "nothing"
UNCHANGED = 0.05
"""Share of K0 below which a token counts as unchanged."""
ATTACK_STEPS = 8
STEP = 0.25

Coalition = frozenset[str]


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """What each stage did at each token.

    Attributes:
        stages: those that changed a decomposed matrix, in training order.
        per_token: a row a position: ``row, position, token`` (ids only), ``kl`` = KL(last ‖ first)
            in nats, and for every stage ``shapley_STAGE`` (its updates wholly on or wholly off),
            ``low_STAGE, high_STAGE`` (the same under attack, see `attribute`; NaN where not asked
            for), ``components_STAGE`` (components alone, at their importances, remainders off),
            ``l0_STAGE``; ``l0`` of all; ``owed_to``, ``owed_to_components``: the stage with the
            largest share, or ``nothing`` where less than `epsilon` changed (or was recovered).
        epsilon: nats below which a token is unchanged. threshold: τ of L0.
    """

    stages: tuple[str, ...]
    per_token: pd.DataFrame
    epsilon: float
    threshold: float

    def to_pandas(self) -> pd.DataFrame:
        return self.per_token.copy()

    def summary(self) -> pd.DataFrame:
        """One row a stage, and one for ``nothing``.

        Columns: ``stage``; ``owed`` and ``owed_to_components``, shares of tokens; of the changed
        ones alone ``owed_of_changed``; ``share`` = Σφ/ΣKL with ``share_low, share_high``;
        ``components_share``; ``l0, l0_low, l0_high``; ``n`` tokens, ``n_changed``, ``n_rows``.
        Intervals are 95 %, over rows.
        """
        import pandas as pd

        table: dict[str, np.ndarray] = {str(c): v.to_numpy() for c, v in self.per_token.items()}
        changed = table["kl"] >= self.epsilon
        kl, ones = (self._by_row(v) for v in (table["kl"], np.ones_like(table["kl"])))
        rows = []
        for stage in (*self.stages, NOTHING):
            own = table["owed_to"] == stage
            row: dict[str, Any] = {
                "stage": stage,
                "owed": float(own.mean()),
                "owed_to_components": float((table["owed_to_components"] == stage).mean()),
                "owed_of_changed": float(own[changed].mean()) if changed.any() else float("nan"),
            }
            if stage != NOTHING:
                unit = np.ones_like(ones)
                found = ratio(self._by_row(table[f"shapley_{stage}"]), kl, unit)
                row |= {"share": found.value, "share_low": found.low, "share_high": found.high}
                parts = self._by_row(table[f"components_{stage}"])
                row["components_share"] = ratio(parts, kl, unit).value
                found = ratio(self._by_row(table[f"l0_{stage}"]), ones, unit)
                row |= {"l0": found.value, "l0_low": found.low, "l0_high": found.high}
            row |= {"n": len(changed), "n_changed": int(changed.sum()), "n_rows": len(ones)}
            rows.append(row)
        return pd.DataFrame(rows)

    def _by_row(self, values: Float[np.ndarray, " tokens"]) -> Float[np.ndarray, " rows"]:
        rows = self.per_token["row"].to_numpy(dtype=np.int64)
        return np.bincount(rows, values)

    def __repr__(self) -> str:
        owed = self.per_token["owed_to"].value_counts()
        parts = ", ".join(f"{s} {owed.get(s, 0)}" for s in (*self.stages, NOTHING))
        return f"Attribution of {len(self.per_token)} tokens: {parts}"


def attribute(
    objective: Objective,
    batches: Sequence[Tensor],
    *,
    epsilon: float,
    stages: Sequence[str] | None = None,
    threshold: float | None = None,
    attack_steps: int = ATTACK_STEPS,
) -> Attribution:
    """Shares of the stages at every position of `batches`.

    Under attack, what a stage that is off may keep is whatever its importances say does not matter:
    masks ``m = (1−g) r`` and ``d`` anywhere in [0, 1], one draw a position, the same in every
    coalition. Sign steps from r = d = 0 lower, then raise, the stage's summed share; the range met
    on the way is reported. It holds the share itself, and is what was found, not a bound.

    Args:
        objective: of a host with `updates`. epsilon: nats (or squared error).
        stages: order of the columns; default, order of first appearance.
        threshold: τ of L0; default, that of headlines.
        attack_steps: 0 leaves the interval out.

    Raises:
        ConfigError: more than `MOST_STAGES` stages, or stages without updates.
    """
    import pandas as pd

    host: Any = objective.factors.host
    players = _players(host, stages)
    tau = headline_threshold(THRESHOLDS, host.metric) if threshold is None else threshold
    found, first_row = [], 0
    with host.prepared(objective.config.speed):
        for batch in batches:
            clean = host.clean(batch.to(host.device))
            low = importances(objective, clean)
            game = Game(objective, clean, low, players)
            columns = game.columns(tau, attack_steps)
            found.append(_frame(columns, batch, first_row))
            first_row += len(batch)
    table = pd.concat(found, ignore_index=True)
    changed = table["kl"].to_numpy() >= epsilon
    table["owed_to"] = _owed(table, "shapley_", players, changed)
    recovered = table[[f"components_{s}" for s in players]].to_numpy().sum(1)
    table["owed_to_components"] = _owed(
        table, "components_", players, changed & (recovered >= epsilon)
    )
    return Attribution(players, table, float(epsilon), float(tau))


def stages_of(host: Any) -> tuple[str, ...]:
    """Stages with updates, in the order in which they appear."""
    return tuple(dict.fromkeys(update.stage for update in host.updates.values()))


def _players(host: Any, stages: Sequence[str] | None) -> tuple[str, ...]:
    own = stages_of(host)
    players = own if stages is None else tuple(s for s in stages if s in own)
    if set(players) != set(own) or len(players) > MOST_STAGES:
        raise ConfigError(
            "stages to attribute to",
            given=f"{list(stages or own)} of {list(own)}",
            expected=f"all stages with updates, at most {MOST_STAGES}: 2^n models are run",
            remedy="Decompose fewer stages at once: give a lineage of the checkpoints in question.",
        )
    return players


def shapley(
    values: Mapping[Coalition, Float[Tensor, "*pos"]], players: Sequence[str], player: str
) -> Float[Tensor, "*pos"]:
    """The exact Shapley value of a player, from the value of every coalition."""
    n, others = len(players), [p for p in players if p != player]
    terms = []
    for without in coalitions(others):
        weight = factorial(len(without)) * factorial(n - len(without) - 1) / factorial(n)
        terms.append(weight * (values[without | {player}] - values[without]))
    return torch.stack(terms).sum(0)


def coalitions(players: Sequence[str]) -> Iterator[Coalition]:
    """Every subset, the empty one first and the whole last."""
    sizes = (combinations(players, k) for k in range(len(players) + 1))
    return (frozenset(members) for members in chain.from_iterable(sizes))


def off(_x: Tensor, y: Tensor) -> Tensor:
    """An update whose masks are all 0."""
    return torch.zeros_like(y)


@dataclass(eq=False)
class Game:
    """The models of all coalitions of stages on one batch.

    Attributes:
        low: (*pos, K) lower importances. players: stages.
    """

    objective: Objective
    clean: Clean
    low: Float[Tensor, "*pos K"]
    players: tuple[str, ...]

    def __post_init__(self) -> None:
        host: Any = self.objective.factors.host
        self.host = host
        self.stage = {name: update.stage for name, update in host.updates.items()}

    def _absent(self, present: Coalition) -> tuple[str, ...]:
        return tuple(name for name, stage in self.stage.items() if stage not in present)

    def _value(self, functions: Mapping[str, Adjust]) -> Float[Tensor, "*pos"]:
        output = self.host.forward(self.clean, functions)
        return -per_position(output, self.clean.output, self.host.metric)

    def value(
        self, present: Coalition, kept: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "*pos"]:
        """v(S): the stages in S whole, the others off but for `kept` = (r, d)."""
        absent = self._absent(present)
        if not absent:
            return self.low.new_zeros(self.low.shape[:-1])
        if kept is None:
            return self._value(dict.fromkeys(absent, off))
        r, d = kept
        masks = Masks((1 - self.low) * r, d)
        return self._value(self.objective.factors.functions(masks, train=False, only=absent))

    @torch.no_grad()
    def components_value(self, present: Coalition) -> Float[Tensor, "*pos"]:
        """The same with, of the stages in S, the components alone at their importances."""
        functions = self.objective.factors.functions(Masks(self.low), train=False)
        return self._value(functions | dict.fromkeys(self._absent(present), off))

    def columns(self, threshold: float, attack_steps: int) -> dict[str, Float[Tensor, "*pos"]]:
        """What `Attribution.per_token` lists, but for the words."""
        every = list(coalitions(self.players))
        with torch.no_grad():
            whole = {s: self.value(s) for s in every}
            parts = {s: self.components_value(s) for s in every}
            counts = self._counts(threshold)
        found = {"kl": whole[frozenset(self.players)] - whole[frozenset()]}
        for stage in self.players:
            found[f"shapley_{stage}"] = shapley(whole, self.players, stage)
            low, high = self.range_of(stage, attack_steps)
            found[f"low_{stage}"], found[f"high_{stage}"] = low, high
            found[f"components_{stage}"] = shapley(parts, self.players, stage)
            found[f"l0_{stage}"] = counts[stage]
        found["l0"] = torch.stack(list(counts.values())).sum(0)
        return found

    def _counts(self, threshold: float) -> dict[str, Float[Tensor, "*pos"]]:
        on = (self.low > threshold).to(self.low.dtype)
        found = {stage: on.new_zeros(on.shape[:-1]) for stage in self.players}
        for name, place in self.objective.factors.layout.slices().items():
            found[self.stage[name]] += on[..., place].sum(-1)
        return found

    def range_of(self, stage: str, steps: int) -> tuple[Tensor, Tensor]:
        """Smallest and largest share of a stage met by `steps` sign steps each way."""
        if steps == 0:
            missing = self.low.new_full(self.low.shape[:-1], float("nan"))
            return missing, missing
        return self._climb(stage, steps, -1.0), self._climb(stage, steps, 1.0)

    def _climb(self, stage: str, steps: int, sign: float) -> Float[Tensor, "*pos"]:
        pos = self.low.shape[:-1]
        kept = [self.low.new_zeros((*pos, size)) for size in self.objective.sizes]
        extreme: Tensor | None = None
        with torch.enable_grad():
            for step in range(steps + 1):
                climbing = step < steps
                r, d = (leaf.detach().requires_grad_(climbing) for leaf in kept)
                values = {s: self.value(s, (r, d)) for s in coalitions(self.players)}
                share = shapley(values, self.players, stage)
                seen = sign * share.detach()
                extreme = seen if extreme is None else torch.maximum(extreme, seen)
                if climbing:
                    slopes = torch.autograd.grad(sign * share.sum(), [r, d])
                    kept = [
                        (leaf.detach() + STEP * slope.sign()).clamp(0, 1)
                        for leaf, slope in zip((r, d), slopes, strict=True)
                    ]
        assert extreme is not None
        return sign * extreme


# ---- as a table ----------------------------------------------------------------------------
def _frame(columns: Mapping[str, Tensor], batch: Tensor, first_row: int) -> pd.DataFrame:
    import pandas as pd

    shape = columns["kl"].shape
    rows = first_row + np.arange(shape[0])
    places = np.arange(int(np.prod(shape[1:])))
    table: dict[str, Any] = {
        "row": np.repeat(rows, len(places)),
        "position": np.tile(places, len(rows)),
    }
    if not batch.is_floating_point() and batch.shape == shape:
        table["token"] = batch.flatten().cpu().numpy()
    table |= {name: value.double().flatten().cpu().numpy() for name, value in columns.items()}
    return pd.DataFrame(table)


def _owed(
    table: pd.DataFrame, prefix: str, players: Sequence[str], counts: np.ndarray
) -> np.ndarray:
    shares = table[[f"{prefix}{s}" for s in players]].to_numpy()
    names = np.array(players, dtype=object)[shares.argmax(1)]
    return np.where(counts, names, NOTHING)
