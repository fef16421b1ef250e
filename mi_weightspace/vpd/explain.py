"""A gradient or a difference in terms of the components of an existing decomposition.

At one matrix, with alive components ``write_c read_cᵀ`` and an update G (d_out, d_in):

* *reweighted*: ``P = Σ_c s_c write_c read_cᵀ``, ridge least squares through the normal matrix
  ``(reads readsᵀ) ⊙ (writes writesᵀ)`` and right side ``diag(writes G readsᵀ)``; ``s_c`` is the
  relative change of component c (−1 removes it, 1 doubles it). Energy ``‖G‖² − ‖G − P‖²``.
* *rewired*: what of ``G − P`` reads along the span of the reads or writes into the span of the
  writes: known parts joined in another way (``within``: both; ``read``: known reads, new writes;
  ``write``: new reads, known writes).
* *new*: the rest, outside both spans.

The three energies sum to ``‖G‖²``. They mean nothing alone: many components span much of the space
of matrices, and whatever they span they "explain". So each stands beside the same fraction of
random matrices with G's singular values (uniformly random singular vectors). That null knows no
geometry: a few loud coordinates shared by components and update exceed it, so it describes and
gives no verdict.

Source: vpd.md §8; Bushnaq et al. 2026 §7.5 say that it is possible. Float64 throughout.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, MismatchError, SiteError
from mi_weightspace.core.report import Report
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.stats import rank_p
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.weights import WeightSource
from mi_weightspace.vpd.explain_basis import PARTS, WHOLE, Basis, spectrum_of

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Alive = Literal["mean", "firing", "all"]
_ALIVE_COLUMNS = {"mean": "alive_by_mean", "firing": "alive_by_firing"}

ISOTROPIC = (
    "Fractions are read against random matrices of equal spectrum, never alone: overcomplete "
    "components inflate them. The null is isotropic, so loud coordinates shared by components and "
    "update exceed it too."
)


class Parts(Protocol):
    """What is needed of a `Decomposition`."""

    @property
    def sites(self) -> tuple[str, ...]: ...
    @property
    def unconverged(self) -> bool: ...
    @property
    def tables(self) -> Mapping[str, pd.DataFrame]: ...
    @property
    def inputs(self) -> Mapping[str, str]: ...
    def read(self, site: str) -> Float[Tensor, "C d_in"]: ...
    def write(self, site: str) -> Float[Tensor, "C d_out"]: ...


class Explanation(Report):
    """Energy fractions of an update at every site, with their null.

    Table, one row per site and part: ``site, d_out, d_in, n_alive, read_rank, write_rank, fro,
    part, fraction, null_low, null_median, null_high, p, n_null``: the null's 5 %, 50 % and 95 %
    quantiles, and a one-sided p of at least so large a fraction (``new``: at most). Table
    ``components``: ``site, component, weight`` (s_c) and ``share`` (its part of ``reweighted``,
    negative where components undo one another).
    """

    kind: ClassVar[str] = "vpd_explain"

    def plot(self) -> go.Figure:
        """Fractions by site, each with the 5-95 % range of its null."""
        import plotly.graph_objects as go

        from mi_weightspace.core.figure_style import GREY, PALETTE, axis, blank, categories

        sites = list(dict.fromkeys(self.table["site"]))
        figure = blank("What an update does to known components", height=420)
        for i, part in enumerate(WHOLE):
            own = self.table[self.table["part"] == part]
            at = [j + 0.25 * (i - 1) for j in range(len(sites))]
            figure.add_bar(x=at, y=own["fraction"], width=0.22, name=part, marker_color=PALETTE[i])
            middle = own["null_median"]
            spread = {
                "type": "data",
                "array": own["null_high"] - middle,
                "arrayminus": middle - own["null_low"],
                "color": GREY,
            }
            figure.add_trace(
                go.Scatter(
                    x=at,
                    y=middle,
                    mode="markers",
                    marker={"color": GREY, "symbol": "line-ew-open", "size": 12},
                    error_y=spread,
                    name="random, equal spectrum",
                    showlegend=i == 0,
                )
            )
        figure.update_xaxes(**categories(sites), title_text=axis("matrix", "site"))
        return figure.update_yaxes(
            title_text=axis("energy of the update", "fraction"), range=[0, 1.02]
        )


# ---- the whole decomposition ---------------------------------------------------------------
def explain(
    parts: Parts,
    update: WeightSource | Mapping[str, Tensor] | Tensor,
    *,
    sites: Sequence[str] | None = None,
    alive: Alive | Mapping[str, Sequence[int]] = "mean",
    ridge: float = 1e-6,
    n_null: int = 99,
    seed: int = 0,
) -> Explanation:
    """Split an update of each decomposed matrix into reweighted, rewired and new energy.

    Args:
        update: a difference of two checkpoints, matrices (or gradients) by site, or one matrix
            where one site is asked for; each (d_out, d_in), as ``nn.Linear.weight.grad`` is.
        sites: which; default: every decomposed site that the update has.
        alive: which components count: mean importance > 1e-6, fires on the data it was evaluated
            on, all, or component numbers by site. All count where nothing was evaluated.
        ridge: added to the normal matrix of unit dyads.
        n_null: random matrices per site; with d = min(d_out, d_in), one costs about d³.

    Raises:
        SiteError: a site that was not decomposed, or none in common.
        MismatchError: a matrix of another shape, or with entries that are not finite.
        ConfigError: no null, a ridge below 1e-10, or no component alive.
    """
    import pandas as pd

    start = time.perf_counter()
    _check(n_null, ridge, alive)
    found = _matrices(parts, update, sites)
    rows: list[dict[str, Any]] = []
    components: list[pd.DataFrame] = []
    verdicts: list[Verdict] = []
    for name, matrix in found.items():
        if not bool(matrix.any()):
            verdicts.append(Verdict(Word.NO_CHANGE, name, {"fro": 0.0}))
            continue
        basis = Basis.of(parts.read(name), parts.write(name), _numbers(parts, name, alive), ridge)
        rows += _rows(name, basis, matrix, n_null, seed)
        components.append(_components(name, basis, matrix))
    empty = pd.DataFrame(columns=["site", "component", "weight", "share"])
    return Explanation(
        table=pd.DataFrame(rows, columns=None if rows else _COLUMNS),
        tables={"components": pd.concat(components, ignore_index=True) if components else empty},
        verdicts=tuple(verdicts),
        config={
            "sites": list(found),
            "alive": alive if isinstance(alive, str) else {k: list(v) for k, v in alive.items()},
            "ridge": ridge,
            "n_null": n_null,
            "seed": seed,
        },
        inputs={
            "update": _digest(update, found),
            **{f"decomposition {k}": v for k, v in parts.inputs.items()},
        },
        reservations=_reservations(parts, update, alive, rows),
        timings={"explain": time.perf_counter() - start},
    )


_COLUMNS = [
    "site",
    "d_out",
    "d_in",
    "n_alive",
    "read_rank",
    "write_rank",
    "fro",
    "part",
    "fraction",
    "null_low",
    "null_median",
    "null_high",
    "p",
    "n_null",
]


def _rows(
    name: str, basis: Basis, matrix: Float[Tensor, "d_out d_in"], n_null: int, seed: int
) -> list[dict[str, Any]]:
    observed, spectrum = basis.of_matrix(matrix), spectrum_of(matrix)
    draw = generator(seed, "explain", name)
    null = torch.stack([basis.of_random(spectrum, draw) for _ in range(n_null)])
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    quantiles = torch.quantile(null, levels, dim=0)
    more, less = rank_p(observed, null), rank_p(-observed, -null)
    return [
        {
            "site": name,
            "d_out": matrix.shape[0],
            "d_in": matrix.shape[1],
            "n_alive": len(basis.numbers),
            "read_rank": basis.read_basis.shape[1],
            "write_rank": basis.write_basis.shape[1],
            "fro": float(matrix.norm()),
            "part": part,
            "fraction": float(observed[i]),
            "null_low": float(quantiles[0, i]),
            "null_median": float(quantiles[1, i]),
            "null_high": float(quantiles[2, i]),
            "p": float((less if part == "new" else more)[i]),
            "n_null": n_null,
        }
        for i, part in enumerate(PARTS)
    ]


def _components(name: str, basis: Basis, matrix: Float[Tensor, "d_out d_in"]) -> pd.DataFrame:
    import pandas as pd

    found, inner, _ = basis.fit(basis.write_basis.T @ matrix @ basis.read_basis)
    return pd.DataFrame(
        {
            "site": name,
            "component": basis.numbers,
            "weight": (found / basis.sizes).numpy(),
            "share": (found * inner / matrix.square().sum()).numpy(),
        }
    )


def _numbers(parts: Parts, name: str, alive: Alive | Mapping[str, Sequence[int]]) -> list[int]:
    every = range(len(parts.read(name)))
    if not isinstance(alive, str):
        chosen = [int(c) for c in alive.get(name, every)]
    else:
        table = parts.tables.get("components")
        if alive == "all" or table is None:
            return list(every)
        own = table[(table["site"] == name) & table[_ALIVE_COLUMNS[alive]]]
        chosen = sorted(int(c) for c in own["component"])
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(every):
        raise ConfigError(
            f"alive components of {name}",
            given=f"{chosen[:8]}" if chosen else "none",
            expected=f"at least one, different numbers from 0 to {len(every) - 1}",
            remedy="Pass alive='all', or leave the site out with sites=.",
        )
    return chosen


def _matrices(
    parts: Parts,
    update: WeightSource | Mapping[str, Tensor] | Tensor,
    sites: Sequence[str] | None,
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """Float64 matrices of the sites asked for, checked."""
    wanted = list(parts.sites if sites is None else sites)
    if isinstance(update, Tensor):
        given: Any = dict.fromkeys(wanted[:1], update) if len(wanted) == 1 else {}
    elif isinstance(update, Mapping):
        given = update
        wanted = [s for s in wanted if s in given] if sites is None else wanted
    else:
        own = {site.name for site in update.sites()}
        given = {s: update.weight(s) for s in wanted if s in own}
        wanted = [s for s in wanted if s in given] if sites is None else wanted
    missing = [s for s in wanted if s not in given]
    if missing or not wanted:
        raise SiteError(
            "update",
            given=f"no matrix for {missing[:6]}" if missing else "no decomposed site",
            expected=f"matrices of {list(parts.sites)[:6]} by site name",
            remedy="Pass a mapping site -> matrix, or sites= with what there is.",
        )
    return {s: _checked(parts, s, given[s]) for s in wanted}


def _checked(parts: Parts, name: str, matrix: Tensor) -> Float[Tensor, "d_out d_in"]:
    expected = parts.write(name).shape[1], parts.read(name).shape[1]
    if tuple(matrix.shape) != expected or not bool(matrix.isfinite().all()):
        turned = tuple(matrix.shape) == expected[::-1]
        raise MismatchError(
            f"update of {name}",
            given=f"shape {tuple(matrix.shape)}"
            + ("" if tuple(matrix.shape) != expected else " with entries that are not finite"),
            expected=f"a finite matrix (d_out, d_in) = {expected}",
            remedy="Transpose it: (d_out, d_in) is nn.Linear's layout."
            if turned
            else "Give the difference or gradient of this very matrix.",
        )
    return matrix.detach().double().cpu()


def _check(n_null: int, ridge: float, alive: Alive | Mapping[str, Sequence[int]]) -> None:
    known = not isinstance(alive, str) or alive in get_args(Alive)
    if n_null < 1 or not ridge >= 1e-10 or not known:
        raise ConfigError(
            "explain",
            given=f"n_null={n_null}, ridge={ridge}, alive={alive!r}",
            expected=f"n_null ≥ 1, ridge ≥ 1e-10, alive of {get_args(Alive)} or numbers by site",
            remedy="The defaults are n_null=99, ridge=1e-6, alive='mean'.",
        )


def _reservations(
    parts: Parts, update: Any, alive: Any, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    notes = [ISOTROPIC]
    full = [
        r["site"]
        for r in rows
        if r["part"] == "new" and (r["read_rank"] == r["d_in"] or r["write_rank"] == r["d_out"])
    ]
    if full:
        notes.append(
            f"Nothing can be new at {', '.join(full[:6])}"
            + (f" and {len(full) - 6} more" if len(full) > 6 else "")
            + ": the components span that matrix's whole input or output space."
        )
    if isinstance(alive, str) and alive != "all" and "components" not in parts.tables:
        notes.append("The decomposition was not evaluated: all components count as alive.")
    if parts.unconverged:
        notes.append("The decomposition is unconverged; so are the components used here.")
    before = getattr(getattr(update, "before", None), "fingerprint", None)
    own = parts.inputs.get("model")
    if before is not None and own is not None and before != own:
        notes.append(
            "The difference does not start at the weights that were decomposed: "
            f"{before} against {own}."
        )
    return tuple(notes)


def _digest(update: Any, found: Mapping[str, Tensor]) -> str:
    known = getattr(update, "fingerprint", None)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256()
    for name, matrix in found.items():
        digest.update(name.encode())
        digest.update(matrix.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
