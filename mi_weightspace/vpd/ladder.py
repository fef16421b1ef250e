"""PGD reconstruction at growing budgets: how far importances hold against shared worst masks.

Fresh sources of shape ``c`` (one number per subcomponent and one per site's remainder, shared by
all batch elements and positions) climb the reconstruction error by sign steps; what is reported is
the error at the *final* source. Sharing forces systematic defects rather than the interference of
one position (Bushnaq et al. 2026). The number means nothing without its budget, so every row has
it. Two ceilings stand beside it: the same attack where every importance is 0 (``pgd_free``: the
adversary owns every mask) and the all-zero mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.evaluate_stats import records, spread
from mi_weightspace.vpd.host import Clean
from mi_weightspace.vpd.importance import squash
from mi_weightspace.vpd.losses import Target
from mi_weightspace.vpd.masked import Masks
from mi_weightspace.vpd.objective import Objective
from mi_weightspace.vpd.sources import lifted

if TYPE_CHECKING:
    import pandas as pd

LADDER = (20, 40, 80, 160, 320, 640, 1280)
STEP_SIZE = 0.1
SHAPE = "c"


def run_masked(
    objective: Objective, clean: Clean, masks: Masks, *, only: tuple[str, ...] | None = None
) -> Tensor:
    """The host's output under masks in the host's own precision (training may use bfloat16)."""
    functions = objective.factors.functions(masks, train=False, only=only)
    return objective.factors.host.forward(clean, functions)


def importances(objective: Objective, clean: Clean) -> Float[Tensor, "*pos K"]:
    """Lower importances, without gradients."""
    with torch.no_grad():
        z = objective.importance(clean, objective.factors)
        return squash(z, objective.config.importance.leak)[0]


def first_sources(objective: Objective, seed: int, batch: int, init: int) -> tuple[Tensor, Tensor]:
    """``r (K,)`` and ``d (S,)`` ~ U[0, 1]: one draw per batch and init, whatever the budget."""
    draw = generator(seed, "ladder", batch, init)
    device, dtype = objective.factors.host.device, objective.draws.dtype
    r, d = (torch.rand(size, generator=draw).to(device, dtype) for size in objective.sizes)
    return r, d


def climb(
    objective: Objective,
    clean: Clean,
    low: Float[Tensor, "*pos K"],
    sources: tuple[Float[Tensor, " K"], Float[Tensor, " S"]],
    *,
    budgets: Sequence[int],
    step_size: float = STEP_SIZE,
) -> dict[int, float]:
    """Budget -> error after that many steps ``s ← clamp(s + η sign ∂L/∂s, 0, 1)``.

    With one start and one step size the first k steps of a long climb *are* the climb of budget k,
    so one trajectory serves all budgets; the forward pass that records one gives the next gradient.
    """
    target = Target.of(clean, objective.factors.host.metric)
    held, (r, d), last = low.detach(), sources, max(budgets)
    found: dict[int, float] = {}
    with torch.enable_grad():
        for step in range(last + 1):
            climbing = step < last
            r, d = (s.detach().requires_grad_(climbing) for s in (r, d))
            value = target.distance(run_masked(objective, clean, Masks(lifted(held, r), d)))
            if step in budgets:
                found[step] = float(value.detach())
            if climbing:
                slopes = torch.autograd.grad(value, [r, d])
                r, d = (
                    (s.detach() + step_size * slope.sign()).clamp(0, 1)
                    for s, slope in zip((r, d), slopes, strict=True)
                )
    return found


def ladder(
    objective: Objective,
    batches: Sequence[Tensor],
    *,
    budgets: Sequence[int] = LADDER,
    free_budgets: Sequence[int] = LADDER[:1],
    step_size: float = STEP_SIZE,
    n_inits: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Every single climb: ``attack, budget, batch, init, loss, zero, n``.

    Args:
        free_budgets: budgets at which the attack with all importances 0 is run too (none: ()).
        n_inits: starts per batch; `summarise` averages over them before it takes a median.

    Columns: `zero` is the error of the all-zero mask on that batch, `n` its positions.

    Raises:
        ConfigError: no budget, one below 1, or no batch.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    check_ladder(budgets, free_budgets, batches, n_inits)
    host, rows = objective.factors.host, []
    with host.prepared(objective.config.speed):
        bar = tqdm(batches, f"PGD to {max(budgets)} steps", disable=not progress, leave=False)
        for at, batch in enumerate(bar):
            clean = host.clean(batch.to(host.device))
            low = importances(objective, clean)
            base = {"batch": at, "zero": _zero(objective, clean), "n": low[..., 0].numel()}
            attacks: list[tuple[str, Tensor, Sequence[int]]] = [("pgd", low, budgets)]
            if free_budgets:
                attacks.append(("pgd_free", torch.zeros_like(low), free_budgets))
            for attack, held, steps in attacks:
                for init in range(n_inits):
                    start = first_sources(objective, seed, at, init)
                    found = climb(objective, clean, held, start, budgets=steps, step_size=step_size)
                    rows += [
                        {"attack": attack, "budget": k, "init": init, "loss": v, **base}
                        for k, v in found.items()
                    ]
    frame = pd.DataFrame(rows)
    frame["step_size"] = step_size
    return frame


def check_ladder(
    budgets: Sequence[int], free: Sequence[int], batches: Sequence[Tensor], n_inits: int
) -> None:
    """Refuse an empty or meaningless ladder before any work is done for it."""
    if not budgets or min([*budgets, *free]) < 1 or not batches or n_inits < 1:
        raise ConfigError(
            "PGD ladder",
            given=f"budgets {tuple(budgets)}, {tuple(free)} without importances, {len(batches)} "
            f"batches, {n_inits} starts",
            expected="positive budgets, at least one batch and one start",
            remedy=f"The published ladder is {LADDER}.",
        )


@torch.no_grad()
def _zero(objective: Objective, clean: Clean) -> float:
    zeros = torch.zeros(
        objective.sizes[0], device=objective.factors.host.device, dtype=objective.draws.dtype
    )
    target = Target.of(clean, objective.factors.host.metric)
    return float(target.distance(run_masked(objective, clean, Masks(zeros))))


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an attack and budget: median over batches of the mean over starts, and the range.

    Columns: ``attack, budget, step_size, shape, median, low, high, zero, of_zero, protection,
    n_batches, n_inits, n``. `low` and `high` are the smallest and largest batch; `zero` the median
    all-zero-mask error; `protection` = 1 − pgd/pgd_free at the same budget (NaN where not run).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    climbs = records(runs)
    for attack, budget in dict.fromkeys((r["attack"], r["budget"]) for r in climbs):
        own = [r for r in climbs if r["attack"] == attack and r["budget"] == budget]
        batches = {r["batch"]: r for r in own}
        losses = [np.mean([r["loss"] for r in own if r["batch"] == at]) for at in batches]
        found = spread(np.array(losses, dtype=np.float64))
        zero = float(np.median([r["zero"] for r in batches.values()]))
        rows.append(
            {
                "attack": attack,
                "budget": budget,
                "step_size": own[0]["step_size"],
                "shape": SHAPE,
                "median": found.value,
                "low": found.low,
                "high": found.high,
                "zero": zero,
                "of_zero": found.value / zero if zero > 0 else float("nan"),
                "n_batches": len(batches),
                "n_inits": len({r["init"] for r in own}),
                "n": sum(r["n"] for r in batches.values()),
            }
        )
    free = {row["budget"]: row["median"] for row in rows if row["attack"] == "pgd_free"}
    for row in rows:
        ceiling = free.get(row["budget"], float("nan"))
        attacked = row["attack"] == "pgd" and ceiling > 0
        row["protection"] = 1 - row["median"] / ceiling if attacked else float("nan")
    return pd.DataFrame(rows)


def ladder_sentence(summary: pd.DataFrame) -> str:
    """One line with everything the number needs: budget, shape, n, range and both ceilings."""
    own = sorted(records(summary, attack="pgd"), key=lambda r: r["budget"])
    if not own:
        return "PGD: not run"
    rungs = ", ".join(
        f"{r['budget']} steps {r['median']:.3g} [{r['low']:.3g}, {r['high']:.3g}]" for r in own
    )
    first = own[0]
    text = (
        f"PGD (sources shared over batch and positions, step {first['step_size']:g}, "
        f"{first['n_batches']} batches × {first['n_inits']} starts; median [range]): {rungs}; "
        f"all-zero mask {first['zero']:.3g}"
    )
    free = records(summary, attack="pgd_free")
    at = ", ".join(f"{r['budget']} steps {r['median']:.3g}" for r in free)
    return f"{text}; same attack without importances: {at}" if at else text
