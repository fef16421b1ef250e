"""What is measured of one (matrix, side, direction), before anything is judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import Components
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.evidence import cosine, cosine_without, cosines, participation
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import SIDES, Side
from mi_weightspace.core.stats import isotropic_cosine_p, rank_p, sign_flips
from mi_weightspace.models.weights import WeightSource
from mi_weightspace.spectral.face import Face, Nulls, faces
from mi_weightspace.spectral.stage_evidence import StageEvidence

NAMED_ENERGY = 2 / 3
"""Components are named for a change when they hold this share of the change of the single pairs.

Of the pairs, not of their mean: where each item changes in its own way (copying what the item
says), one vector may hold the mean and still be no account of the change.
"""
N_REFERENCE = 199


@dataclass(eq=False)
class Row:
    """One (stage, site, side, direction) under judgement."""

    parts: Components
    side: Side
    direction: Direction
    values: dict[str, Any] = field(default_factory=dict)
    ranked: Tensor | None = None  # statistic ranked: R of the target, then of each control


def measure(
    rows: Sequence[Row],
    source: WeightSource | None,
    unembedding_mean: Tensor | None,
    evidence: StageEvidence | None,
    *,
    n_null: int,
    seed: int,
    alpha: float = 0.05,
) -> None:
    """Fill the values of all rows of one matrix; the matrix is formed once.

    Args:
        alpha: level of the tests; decides no value, only what no verdict can ask for.
    """
    parts = rows[0].parts
    for row in rows:
        _describe(row)
        _stage_values(row, evidence)
        _permutation(row, evidence)
    if source is None or not float(parts.facts.get("fro") or 0.0):  # pyright: ignore[reportArgumentType]
        return
    fold = bool(parts.facts.get("folded", True))
    sides = faces(source, parts.site, fold=fold, seed=seed, stage=parts.stage)
    for side in SIDES:
        own = [row for row in rows if row.side == side]
        if not own:
            continue
        face = sides(side)
        _against(own, face, n_null=n_null, seed=seed, alpha=alpha)
        for row in own:
            _nuisances(row, face.left, unembedding_mean)
            _effect(row, face, evidence)


def _vectors(direction: Direction) -> Float[Tensor, "k d"]:
    """Pattern, the vector that is ranked, and the controls it is ranked among."""
    first = direction.pattern if direction.filter is None else direction.filter
    ranked, controls = first, direction.control_filters
    if direction.filter is None or controls is None:
        ranked, controls = direction.pattern, direction.control_patterns
    rows = [direction.pattern[None], first[None], ranked[None]]
    return torch.cat(rows if controls is None else [*rows, controls])


def _describe(row: Row) -> None:
    """What needs the components only."""
    parts, direction = row.parts, row.direction
    vectors = parts.vectors(row.side)
    layer = direction.space.layer
    row.values |= {
        "stage": parts.stage,
        "site": parts.site.name,
        "layer": math.nan if parts.site.layer is None else parts.site.layer,
        "kind": parts.site.kind,
        "side": row.side,
        "direction": direction.name,
        "direction_layer": math.nan if layer is None else layer,
        "n_controls": direction.n_controls,
        **{k: parts.facts.get(k, math.nan) for k in ("fro", "rel_fro", "null_edge", "certificate")},
        "resolved": bool(parts.facts.get("resolved", False)),
        "subspace_k": int(parts.facts.get("subspace_k", 1) or 0),  # pyright: ignore[reportArgumentType]
        "rounding_flag": parts.facts.get("rounding_flag", "none"),
    }
    if len(parts) == 0:
        return
    u, w = vectors[0], direction.pattern
    value = cosine(u, w)
    row.values |= {
        "cosine": value,
        "cosine_without_loud": cosine_without(u, w, direction.variance),
        "participation": participation(u),
        "participation_direction": participation(w),
        "subspace_energy": _held(parts, vectors, w),
        "p_isotropic": float(isotropic_cosine_p(torch.tensor([value]), direction.width)[0]),
        "p_covariance": _covariance_p(u, w, direction, row),
    }


def _held(parts: Components, vectors: Tensor, w: Tensor) -> float:
    """Share of w in the vectors' span; VPD's vectors are not orthogonal, so it has none to add."""
    if parts.method == "vpd":
        return math.nan
    return float((vectors.double() @ w.double()).square().sum())


def _covariance_p(u: Tensor, w: Tensor, direction: Direction, row: Row) -> float:
    """Reference only: |cos| of u₁ with draws of N(0, diag(activation variance))."""
    if direction.variance is None:
        return math.nan
    draw = generator(0, "covariance", row.parts.site.name, row.side)
    null = torch.randn(N_REFERENCE, len(w), generator=draw) * direction.variance.sqrt()
    null = null / null.norm(dim=1, keepdim=True)
    return float(rank_p((u @ w).abs(), (null @ u).abs()))


def _permutation(row: Row, evidence: StageEvidence | None) -> None:
    """Reference only: |cos| of u₁ with class-mean shifts whose sides were swapped pair by pair."""
    if evidence is None or row.parts.stage not in evidence.activations or len(row.parts) == 0:
        return
    found = evidence.activations[row.parts.stage]
    if row.direction.space.canonical not in {p.canonical for p in found.points}:
        return
    pairs = found.differences(evidence.target, row.direction.space)
    if not bool(pairs.any()):
        return
    u = row.parts.vectors(row.side)[0]
    name = f"permutation/{row.parts.site.name}/{row.side}"
    null = sign_flips(len(pairs), N_REFERENCE, seed=0, name=name) @ pairs.double()
    cosines = (null @ u.double()).abs() / null.norm(dim=1).clamp(min=1e-300)
    observed = torch.tensor(row.values["cosine"], dtype=torch.float64)
    row.values["p_permutation"] = float(rank_p(observed, cosines))


def _stage_values(row: Row, evidence: StageEvidence | None) -> None:
    """Gate and G of the stage, and the vector whose writing is in question."""
    key = (row.parts.stage, row.parts.site.name)
    if evidence is None or row.parts.stage not in evidence.gates:
        return
    row.values["stage_gate_p"] = evidence.gates[row.parts.stage].p
    if row.side == "write" and key in evidence.g:
        row.values |= {"G": evidence.g[key], "p_G": evidence.p_g[key]}
        row.values["written_share"] = evidence.written_share(*key)
        row.values |= _named(row, evidence)


def _named(row: Row, evidence: StageEvidence) -> dict[str, Any]:
    """Cosine of u₁ with the stage's change DiD, and how many components hold the pairs' change.

    ``named_k``: 1 where one component may be named, k for a subspace, 0 where none holds it.
    """
    stages = list(evidence.activations)
    before = evidence.activations[stages[stages.index(row.parts.stage) - 1]]
    after = evidence.activations[row.parts.stage]
    point = row.parts.site.writes
    pairs = (
        after.differences(evidence.target, point).double()
        - before.differences(evidence.target, point).double()
    )
    did = pairs.mean(0)
    if not float(did.norm()) or len(row.parts) == 0:
        return {}
    held = (pairs @ row.parts.write.double().T).square().sum(0).cumsum(0) / pairs.square().sum()
    block = [int(b) for b in str(row.parts.facts.get("block") or "").split(",") if b]
    block = block or list(range(len(held)))
    # inside a block of near-equal singular values no single vector is identified
    ends = [k for k in range(1, len(held) + 1) if k == len(held) or block[k] != block[k - 1]]
    reached = [k for k in ends if float(held[k - 1]) >= NAMED_ENERGY]
    return {
        "did_cosine": cosine(row.parts.write[0], did),
        "did_energy": float(held[-1]),
        "named_k": reached[0] if reached else 0,
    }


def _against(rows: Sequence[Row], face: Face, *, n_null: int, seed: int, alpha: float) -> None:
    """R, its sign-flip null, the row-normalised sign test, and what is ranked among controls."""
    stacked = [_vectors(row.direction) for row in rows]
    counts = [len(vectors) for vectors in stacked]
    projected = face.projected(torch.cat(stacked))  # one product for all directions and controls
    ratios = projected / (torch.cat(stacked).double().square() @ face.energies)
    whole = float(face.energies.sum())
    nulls = [
        Nulls(n_null, seed, f"{r.parts.stage}/{r.parts.site.name}/{r.side}/{r.direction.name}")
        for r in rows
    ]
    p_cosines = face.cosine_ps([row.direction.pattern for row in rows], nulls)
    parts = zip(ratios.split(counts), projected.split(counts), strict=True)
    for row, null, p_cosine, (own, energy) in zip(rows, nulls, p_cosines, parts, strict=True):
        ranked = own[2:] if len(own) > 3 else None
        # a verdict asks whether the sign test's vector is resolved only where both tests pass;
        # the rank over all matrices that it reads is never below this one
        open_still = ranked is None or float(rank_p(ranked[0], ranked[1:])) <= alpha
        needed = "G" in row.values or (open_still and p_cosine <= alpha)
        row.values |= {
            "R": float(own[0]),
            "p_sign": face.flip_p(row.direction.pattern, null, decides=ranked is None),
            "cosine_row_normalised": cosine(face.left, row.direction.pattern),
            "p_row_normalised": p_cosine,
            "resolved_row_normalised": face.resolved(needed=needed),
            "energy_share": float(energy[0]) / whole,
        }
        if row.direction.filter is not None:
            row.values["R_lda"] = float(own[1])
        row.ranked = ranked


def _nuisances(
    row: Row, normed: Float[Tensor, " d"], unembedding_mean: Float[Tensor, " d_model"] | None
) -> None:
    """The nuisance nearest to u₁, and whether one explains the vector the sign test is about.

    The test asks about the row-normalised matrix and the probe's filter, so the veto does: a
    nuisance explains the match where it is nearer to that matrix's first vector than the filter.
    Asked of u₁ of D itself, nuisances win nearly always under rogue coordinates, planted or not.
    """
    direction = row.direction
    if len(row.parts) == 0:
        return
    u = row.parts.vectors(row.side)[0]
    named: list[tuple[str, Tensor]] = []
    if direction.mean is not None:
        named.append(("activation mean", direction.mean))
    if direction.pcs is not None:
        named += [(f"activation pc {i}", pc) for i, pc in enumerate(direction.pcs)]
    if direction.space.is_stream and unembedding_mean is not None:
        named.append(("unembedding mean", unembedding_mean))
    names = direction.control_names or tuple(map(str, range(direction.n_controls)))
    for rows, what in ((direction.control_patterns, ""), (direction.control_filters, " (filter)")):
        if rows is not None:
            named += [(f"control {n}{what}", v) for n, v in zip(names, rows, strict=True)]
    if not named:
        return
    vectors = torch.stack([vector.float() for _, vector in named])
    sizes, tested = cosines(vectors, u), cosines(vectors, normed)
    best, nearest = int(sizes.argmax()), int(tested.argmax())
    own = direction.pattern if direction.filter is None else direction.filter
    row.values |= {
        "nuisance_cosine": float(sizes[best]),
        "nuisance_name": named[best][0],
        "explained_by": named[nearest][0] if float(tested[nearest]) > cosine(normed, own) else "",
    }


def _effect(row: Row, face: Face, evidence: StageEvidence | None) -> None:
    """``wᵀ D Δh``: what the matrix's change writes along w for the target's own input shift."""
    if evidence is None or row.side != "write" or row.parts.stage not in evidence.gates:
        return
    stages = list(evidence.activations)
    after = evidence.activations[row.parts.stage]
    before = evidence.activations[stages[stages.index(row.parts.stage) - 1]]
    site = row.parts.site.name
    if site not in after.site_shift:
        return
    index = [c.name for c in after.contrasts].index(evidence.target)
    shift = (before.site_shift[site][index] + after.site_shift[site][index]) / 2
    row.values["effect"] = float(row.direction.pattern @ face.written(shift.float()))


def component_rows(row: Row) -> Iterator[dict[str, Any]]:
    parts = row.parts
    held, overlap = 0.0, parts.method == "vpd"  # energies add up in orthogonal directions only
    for k, vector in enumerate(parts.vectors(row.side)):
        value = cosine(vector, row.direction.pattern)
        held += value**2
        yield {
            **{c: row.values[c] for c in ("stage", "site", "side", "direction")},
            "component": k if parts.index is None else int(parts.index[k]),
            "singular_value": float(parts.scale[k]),
            "cosine": value,
            "cosine_filter": math.nan
            if row.direction.filter is None
            else cosine(vector, row.direction.filter),
            "cumulative_energy": math.nan if overlap else held,
            "chance_energy": math.nan if overlap else (k + 1) / len(vector),
        }
