"""What is measured of one (matrix, side, direction), before anything is judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import Components
from mi_weightspace.core.direction import Direction
from mi_weightspace.core.evidence import (
    LARGE,
    cosine,
    cosine_without,
    participation,
    projected_energy,
    row_energies,
    row_normalised,
    sign_cosine_p,
    sign_flip_ratio_p,
    sketched,
)
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Side, Site
from mi_weightspace.core.stats import isotropic_cosine_p, rank_p, sign_flips
from mi_weightspace.models.rounding import flip_signs
from mi_weightspace.models.weights import Difference, WeightSource
from mi_weightspace.spectral.decompose import UNRESOLVED_ANGLE, clears, folded
from mi_weightspace.spectral.form import form
from mi_weightspace.spectral.krylov import Dense, blocks_of, leading_triplets, top_value
from mi_weightspace.spectral.stage_evidence import StageEvidence

NAMED_ENERGY = 2 / 3
"""Components are named for a change when they hold this share of the change of the single pairs.

Of the pairs, not of their mean: where each item changes in its own way (copying what the item
says), one vector may hold the mean and still be no account of the change.
"""
N_REFERENCE = 199
MAY_PASS = 0.1
"""Rank p among a large matrix's controls up to which signs are flipped on the matrix itself."""


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
) -> None:
    """Fill the values of all rows of one matrix; the matrix is formed once."""
    parts = rows[0].parts
    for row in rows:
        _describe(row)
        _stage_values(row, evidence)
        _permutation(row, evidence)
    if source is None or not float(parts.facts.get("fro") or 0.0):  # pyright: ignore[reportArgumentType]
        return
    matrix = change(source, parts.site)
    if parts.facts.get("folded", True):
        matrix = folded(matrix, source, parts.site)
    for side in dict.fromkeys(row.side for row in rows):
        own = [row for row in rows if row.side == side]
        looked = _looked_at(matrix if side == "write" else matrix.T.contiguous(), own, n_null, seed)
        for row in own:
            _against(row, looked, n_null=n_null, seed=seed)
            _nuisances(row, looked.normed.left, unembedding_mean)
            _effect(row, looked.matrix, evidence)


class Looked(NamedTuple):
    """One side of a matrix, and what all directions there share.

    Attributes:
        matrix: (d, n), rows indexed by the directions' coordinates; `narrow` its sketch.
        energies: ``‖D_i‖²``.
        drawn: signs of the flips, for a large matrix; else each direction draws its own.
        ratios, projected: of every direction's vectors (`_vectors`), R and ``‖wᵀD‖²``.
    """

    matrix: Float[Tensor, "d n"]
    narrow: Float[Tensor, "d r"]
    energies: Float[Tensor, " d"]
    normed: Normalised
    drawn: Float[Tensor, "b d"] | None
    ratios: dict[int, Tensor]
    projected: dict[int, Tensor]


def _looked_at(matrix: Float[Tensor, "d n"], rows: Sequence[Row], n_null: int, seed: int) -> Looked:
    parts, side = rows[0].parts, rows[0].side
    name = f"{parts.site.name}/{side}"
    energies = row_energies(matrix)
    stacked = [_vectors(row.direction) for row in rows]
    counts = [len(vectors) for vectors in stacked]
    every = torch.cat(stacked)
    projected = projected_energy(matrix, every)  # one product for all directions and controls
    ratios = projected / (every.double().square() @ energies)
    drawn = None
    if matrix.numel() >= LARGE:
        draw_name = f"{parts.stage}/{name}"
        drawn = sign_flips(len(energies), n_null, seed=seed, name=draw_name).float()
    return Looked(
        matrix,
        sketched(matrix, seed=seed, name=name),
        energies,
        leading_normalised(matrix, energies, seed=seed, name=name),
        drawn,
        {id(row): own for row, own in zip(rows, ratios.split(counts), strict=True)},
        {id(row): own for row, own in zip(rows, projected.split(counts), strict=True)},
    )


def _vectors(direction: Direction) -> Float[Tensor, "k d"]:
    """Pattern, the vector that is ranked, and the controls it is ranked among."""
    first = direction.pattern if direction.filter is None else direction.filter
    ranked, controls = first, direction.control_filters
    if direction.filter is None or controls is None:
        ranked, controls = direction.pattern, direction.control_patterns
    rows = [direction.pattern[None], first[None], ranked[None]]
    return torch.cat(rows if controls is None else [*rows, controls])


def change(source: WeightSource, site: Site) -> Float[Tensor, "d_out d_in"]:
    """The matrix under judgement: float32, but a large bfloat16 difference as it was decomposed.

    Products of the latter are bfloat16 too: R is then good to 1e-3. The next call of this thread
    overwrites it.
    """
    large = site.d_out * site.d_in >= LARGE
    if large and isinstance(source, Difference) and source.factors(site) is None:
        return form(source.before.stored(site), source.after.stored(site), reuse=True).matrix
    return source.weight(site).cpu()


class Normalised(NamedTuple):
    """First left vector of a row-normalised matrix, which the sign test is about.

    `resolved`: it is certified and above the edge of the same matrix with random entry signs.
    """

    left: Float[Tensor, " d"]
    resolved: bool


def leading_normalised(
    matrix: Float[Tensor, "d n"],
    energies: Float[Tensor, " d"] | None = None,
    *,
    seed: int,
    name: str,
) -> Normalised:
    """Of ``diag(1/‖D_i‖) D``; `energies`: the ``‖D_i‖²`` where they are at hand."""
    if matrix.numel() < LARGE:
        matrix = matrix.float()
    normed = row_normalised(matrix, energies)
    found = leading_triplets(normed, 4, generator=generator(seed, "row normalised", name))
    flip_signs(normed, seed=seed, name=f"row normalised {name}")
    edge = top_value(Dense(normed), generator=generator(seed, "row normalised edge", name))
    noise = edge / (math.sqrt(normed.shape[0]) + math.sqrt(normed.shape[1]))
    last = blocks_of(found.scale, noise).count(0) - 1
    certified = found.certificate(0, last) <= UNRESOLVED_ANGLE
    above = clears(float(found.scale[0]), edge, *normed.shape)
    return Normalised(found.left[0], bool(certified and above))


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


def _against(row: Row, looked: Looked, *, n_null: int, seed: int) -> None:
    """R, its sign-flip null, the row-normalised sign test, and what is ranked among controls."""
    direction, normed = row.direction, looked.normed
    name = f"{row.parts.stage}/{row.parts.site.name}/{row.side}/{direction.name}"
    flips: dict[str, Any] = {"n_null": n_null, "seed": seed, "name": name}
    pattern, ratios = direction.pattern, looked.ratios[id(row)]
    # only where the rank among controls may pass does the sign test decide anything
    whole = looked.drawn is None or len(ratios) < 4
    whole = whole or float(rank_p(ratios[2], ratios[3:])) <= MAY_PASS
    flipped = looked.matrix if whole else looked.narrow
    drawn = None if whole else looked.drawn
    row.values |= {
        "R": float(ratios[0]),
        "p_sign": sign_flip_ratio_p(flipped, pattern, **flips, drawn=drawn),
        "cosine_row_normalised": cosine(normed.left, pattern),
        "p_row_normalised": sign_cosine_p(normed.left, pattern, **flips, drawn=looked.drawn),
        "resolved_row_normalised": normed.resolved,
        "energy_share": float(looked.projected[id(row)][0] / looked.energies.sum()),
    }
    if direction.filter is not None:
        row.values["R_lda"] = float(ratios[1])
    if len(ratios) > 3:
        row.ranked = ratios[2:]


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
    sizes = [cosine(u, vector) for _, vector in named]
    best = max(range(len(sizes)), key=sizes.__getitem__)
    tested = [cosine(normed, vector) for _, vector in named]
    nearest = max(range(len(tested)), key=tested.__getitem__)
    own = direction.pattern if direction.filter is None else direction.filter
    row.values |= {
        "nuisance_cosine": sizes[best],
        "nuisance_name": named[best][0],
        "explained_by": named[nearest][0] if tested[nearest] > cosine(normed, own) else "",
    }


def _effect(row: Row, matrix: Float[Tensor, "d n"], evidence: StageEvidence | None) -> None:
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
    row.values["effect"] = float(row.direction.pattern @ (matrix @ shift.to(matrix.dtype)).float())


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
