"""Project components onto directions, with the calibrated evidence beside every cosine.

Two situations (design §6). *Both stages can be run*: the stage gate and the site statistic G
decide. *Weights and a stored direction only*: R of the LDA direction ranked among the stored
control directions (max-T over every matrix of the sweep), with the row-normalised sign test; the
strongest word is then ``aligned``. Cosines, energies, and the isotropic, covariance-matched and
permutation nulls are description and never carry a verdict: their measured false-positive rates
under rogue-coordinate geometry are 62-100 %, 35-83 % and 23-83 %.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import Components, SourceRef
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.direction import RAW_CONVENTION, Direction
from mi_weightspace.core.errors import DirectionError, MismatchError, WeightspaceError
from mi_weightspace.core.report import Report
from mi_weightspace.core.site import Side
from mi_weightspace.core.verdict import Verdict, Word
from mi_weightspace.models.sources import open_path
from mi_weightspace.models.weights import Difference, WeightSource
from mi_weightspace.spectral.judge import effect_shares, judge, rank
from mi_weightspace.spectral.measure import Row, component_rows, measure
from mi_weightspace.spectral.stage_evidence import StageEvidence, stage_evidence
from mi_weightspace.spectral.svd import SvdReport

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from mi_weightspace.models.lineage import Lineage

_QUIET = (Word.NOT_SIGNIFICANT, Word.NO_CHANGE)


class ProjectionReport(Report):
    """One row per (stage, site, side, direction); table ``components`` one per component."""

    kind: ClassVar[str] = "project"

    def plot(self) -> go.Figure:
        """R of every judged matrix among its control contrasts (of |cosines| without controls)."""
        from mi_weightspace.core.figures import evidence_strip

        return evidence_strip(self.table, self.tables["controls"])


def directions_of(given: Direction | Sequence[Direction] | Any) -> list[Direction]:
    """A list of directions from one, several, or a fitted probe bank.

    Raises:
        DirectionError: nothing usable, or a direction of processed weights.
    """
    listed: Any = given.directions() if hasattr(given, "directions") else given  # pyright: ignore[reportAttributeAccessIssue]
    found = [listed] if isinstance(listed, Direction) else list(listed)
    if not found or not all(isinstance(d, Direction) for d in found):
        raise DirectionError(
            "directions",
            given=f"{type(given).__name__} {[type(d).__name__ for d in found][:3]}",
            expected="a Direction, several, or a fitted probe bank",
            remedy="Wrap a vector: Direction(vector, Space.parse('resid_post.5')).",
        )
    for direction in found:
        if direction.convention != RAW_CONVENTION:
            raise DirectionError(
                f"direction {direction.name}",
                given=f"weight convention {direction.convention!r}",
                expected=f"{RAW_CONVENTION!r}: folding and centring change the basis",
                remedy="Fit it on the unprocessed model.",
            )
    return found


def pairs_of(
    parts: Components, directions: Sequence[Direction]
) -> Iterator[tuple[Side, Direction]]:
    """Which directions judge which side of a matrix.

    Of several directions of one label, those at the very point the side reads or writes; a label
    with a single direction judges every stream side, at its own layer (``direction_layer``).

    Raises:
        DirectionError: a direction of another width than its space has in this model.
    """
    site = parts.site
    counts: dict[str, int] = {}
    for direction in directions:
        counts[direction.label] = counts.get(direction.label, 0) + 1
    for side in ("read", "write"):
        for direction in directions:
            exact = direction.space.canonical == site.space(side).canonical
            distant = (
                counts[direction.label] == 1
                and direction.space.is_stream
                and site.space(side).is_stream
            )
            if not (exact or distant):
                continue
            if direction.width != site.width(side):
                raise DirectionError(
                    f"direction {direction.name}",
                    given=f"width {direction.width}",
                    expected=f"{site.width(side)}, the width of {site.space(side)} in this model",
                    remedy="Use a direction fitted on this architecture.",
                )
            yield side, direction


def project(
    components: SvdReport | Components | Sequence[Components] | Sequence[SvdReport],
    directions: Direction | Sequence[Direction] | Any,
    lineage: Lineage | None = None,
    prompts: ContrastSet | None = None,
    *,
    target: str | None = None,
    evidence: StageEvidence | None = None,
    n_null: int = 999,
    alpha: float = 0.05,
    position: str = "last",
    seed: int = 0,
    progress: bool = True,
) -> ProjectionReport:
    """Where, in which matrix, a direction is written or read, and how sure that is.

    Args:
        components: of `svd` (one or several reports), a VPD `Decomposition`, or any `Components`.
        directions: one, several, or a probe bank. Cosines use the pattern, R_lda the filter.
        lineage, prompts: where both are given the stages are run and gate and G decide; `target`
            names the contrast asked about (default the only one).
        evidence: what `stage_evidence` returned before.
        n_null: sign flips of each null (999: p is a multiple of 0.001).
        alpha: level of every test.

    Raises:
        DirectionError: a wrong width, a processed convention, or no direction that fits a site.
        MismatchError: the checkpoints are not those that were decomposed.
    """
    from rich.progress import track

    start = time.perf_counter()
    wanted = directions_of(directions)
    reports, every = _components_of(components)
    if evidence is None and lineage is not None and prompts is not None:
        evidence = stage_evidence(
            lineage, prompts, target=target, position=position, progress=progress
        )
    sources = _Sources(reports, lineage)
    rows: list[Row] = []
    details: list[dict[str, Any]] = []
    for parts in track(every, "projecting", disable=not progress, transient=True):
        own = [Row(parts, side, d) for side, d in pairs_of(parts, wanted)]
        if own:
            source = sources(parts)
            mean = None if source is None else sources.unembedding_mean(parts.stage)
            ran = None if _own_weights(parts) else evidence
            measure(own, source, mean, ran, n_null=n_null, seed=seed, alpha=alpha)
            details += [detail for row in own for detail in component_rows(row)]
        rows += own
    if not rows:
        raise DirectionError(
            f"directions {[d.name for d in wanted][:4]}",
            given="spaces that no decomposed matrix reads or writes",
            expected=f"a space of {sorted({str(p.site.writes) for p in every})[:6]}",
            remedy="Decompose matrices next to the direction, or give one stream direction.",
        )
    rank(rows)
    effect_shares(rows)
    verdicts = [judge(row, evidence, alpha) for row in rows]
    return _report(rows, details, verdicts, evidence, sources, reports, n_null, alpha, seed, start)


def _components_of(given: Any) -> tuple[list[SvdReport], list[Components]]:
    items = [given] if isinstance(given, SvdReport | Components) else list(given)
    reports = [item for item in items if isinstance(item, SvdReport)]
    loose = [item for item in items if isinstance(item, Components)]
    return reports, [parts for report in reports for parts in report] + loose


class _Sources:
    """Finds the matrix behind components again: in the lineage, at hand, or from its paths."""

    def __init__(self, reports: Sequence[SvdReport], lineage: Lineage | None) -> None:
        self._live: dict[str, WeightSource] = {}
        self.missing: dict[str, str] = {}
        for report in reports:
            self._live |= report.live
        self._lineage: dict[str, WeightSource] = {}
        if lineage is not None:
            self._lineage = {after: lineage.diff(before, after) for before, after in lineage.steps}
        self._checked: set[tuple[str, SourceRef | None]] = set()
        self._unembedding: dict[str, Tensor] = {}

    def __call__(self, parts: Components) -> WeightSource | None:
        stage = parts.stage
        if _own_weights(parts):
            self.missing[stage] = "components of a model's own weights are no difference"
            return None
        if stage not in self._live and stage not in self.missing:
            found = self._lineage[stage] if stage in self._lineage else self._reopen(parts)
            if found is not None:
                self._live[stage] = found
        found = self._live.get(stage)
        if found is not None and (stage, parts.source) not in self._checked:
            _same_weights(found, parts.source)
            self._checked.add((stage, parts.source))
        return found

    def unembedding_mean(self, stage: str) -> Float[Tensor, " d_model"]:
        """Mean unembedding row of the stage before, a direction every logit shares."""
        if stage not in self._unembedding:
            source = self._live[stage]
            base = source.before if isinstance(source, Difference) else source
            self._unembedding[stage] = base.weight("unembed").mean(0).cpu()
        return self._unembedding[stage]

    def _reopen(self, parts: Components) -> WeightSource | None:
        ref = parts.source
        if ref is None:
            self.missing[parts.stage] = "the components carry no reference to their checkpoints"
            return None
        try:
            after = open_path(ref.after)
            return Difference(open_path(ref.before), after, parts.stage) if ref.before else after
        except WeightspaceError as error:
            self.missing[parts.stage] = f"the checkpoints are gone ({error.subject})"
            return None


def _own_weights(parts: Components) -> bool:
    """Components of a decomposed model: which stage wrote them is no question to them."""
    return parts.method == "vpd" and parts.source is None


def _same_weights(found: WeightSource, ref: SourceRef | None) -> None:
    """Refuse weights other than those that were decomposed.

    Raises:
        MismatchError: a fingerprint differs.
    """
    if ref is None:
        return
    pairs = [(found, ref.after_hash)]
    if isinstance(found, Difference):
        pairs = [(found.before, ref.before_hash), (found.after, ref.after_hash)]
    for source, expected in pairs:
        if source.fingerprint != expected:
            raise MismatchError(
                f"checkpoint {source.name}",
                given=f"fingerprint {source.fingerprint}",
                expected=f"{expected}, of the weights that were decomposed",
                remedy="The weights changed since: run svd again. Two stages need two names.",
            )


_COLUMNS = (
    "stage", "site", "layer", "kind", "side", "direction", "direction_layer", "verdict",
    "stage_gate_p", "G", "p_G", "written_share", "R", "R_lda", "p_sign", "p_row_normalised",
    "p_lda_rank", "n_controls", "p_adjusted", "alpha", "cosine", "cosine_row_normalised",
    "cosine_without_loud", "participation", "participation_direction", "energy_share",
    "effect_share", "subspace_energy", "did_cosine", "did_energy", "named_k", "fro", "rel_fro",
    "null_edge", "certificate", "resolved", "resolved_row_normalised", "subspace_k",
    "rounding_flag", "nuisance_cosine", "nuisance_name", "explained_by", "p_isotropic",
    "p_covariance", "p_permutation",
)  # fmt: skip


def _report(
    rows: Sequence[Row],
    details: list[dict[str, Any]],
    verdicts: Sequence[Verdict],
    evidence: StageEvidence | None,
    sources: _Sources,
    reports: Sequence[SvdReport],
    n_null: int,
    alpha: float,
    seed: int,
    start: float,
) -> ProjectionReport:
    import pandas as pd

    table = pd.DataFrame([row.values for row in rows])
    table = table.reindex(columns=list(_COLUMNS))
    loud = [v for v in verdicts if v.word not in _QUIET]
    kept = loud or _quiet_verdict(verdicts)
    directions = {row.direction.name: row.direction for row in rows}
    inputs = {s: r["after_hash"] for report in reports for s, r in report.config["sources"].items()}
    inputs |= {f"model of {n}": d.model_hash for n, d in directions.items() if d.model_hash}
    inputs |= {f"prompts of {n}": d.prompts_hash for n, d in directions.items() if d.prompts_hash}
    return ProjectionReport(
        table=table,
        tables={"components": pd.DataFrame(details), "controls": _control_table(rows)},
        verdicts=tuple(kept),
        config={"command": "project", "args": {"n_null": n_null, "alpha": alpha, "seed": seed}},
        inputs=inputs,
        reservations=tuple(_reservations(sources, directions, evidence)),
        timings={"project": time.perf_counter() - start},
    )


def _quiet_verdict(verdicts: Sequence[Verdict]) -> list[Verdict]:
    word = Word.NO_CHANGE if all(v.word == Word.NO_CHANGE for v in verdicts) else (
        Word.NOT_SIGNIFICANT
    )  # fmt: skip
    return [Verdict(word, "every matrix", {"n_rows": len(verdicts)})]


def _control_table(rows: Iterable[Row]) -> Any:
    """The ranked statistic of the target and of every control, for the evidence figure."""
    import pandas as pd

    found = []
    for row in rows:
        if row.ranked is None:
            continue
        names = ("", *(row.direction.control_names or map(str, range(row.direction.n_controls))))
        head = {c: row.values[c] for c in ("stage", "site", "layer", "side", "direction")}
        found += [
            head | {"control": name, "R_lda": value}
            for name, value in zip(names, row.ranked.tolist(), strict=True)
        ]
    columns = ["stage", "site", "layer", "side", "direction", "control", "R_lda"]
    return pd.DataFrame(found, columns=columns)


def _reservations(
    sources: _Sources, directions: Mapping[str, Direction], evidence: StageEvidence | None
) -> Iterator[str]:
    for stage, reason in sources.missing.items():
        yield f"{stage}: no evidence could be computed, {reason}."
    if evidence is None:
        yield "The stages were not run: the strongest word is `aligned`."
    if any(d.n_controls == 0 for d in directions.values()):
        yield "Directions without control contrasts: the strongest word is `controls missing`."
    if any(d.filter is None for d in directions.values()):
        yield "Directions without a filter: the pattern takes its place in the rank among controls."
