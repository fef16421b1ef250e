"""Decompose one matrix of a source: triplets, sizes, certificate, noise edge, rounding.

Adapters are decomposed exactly from their factors and have no rounding floor. Any `WeightSource` is
accepted: a checkpoint itself is decomposed the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import Components
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Side, Site
from mi_weightspace.models.rounding import RoundingFacts, edge_spread, flip_signs, judge, l1_size
from mi_weightspace.models.weights import Difference, Factors, WeightSource
from mi_weightspace.spectral.blocks import Blocks, block_rows
from mi_weightspace.spectral.dense import ONES, Dense, Gains, flop_done
from mi_weightspace.spectral.form import Formed, form, stored_dtype
from mi_weightspace.spectral.krylov import Triplets, blocks_of, leading_triplets, top_value

UNRESOLVED_ANGLE = 0.2
"""A first vector whose certified angle error exceeds this is called unresolved."""
BASE_VECTORS = 4
EDGE_MARGIN = 4.0
"""Tracy-Widom standard deviations between s₁ and the edge; pure noise exceeds it in 1 of 400."""
_CHUNK = 2**18


@dataclass(frozen=True)
class SvdSettings:
    """What decides the result for one matrix; part of a sweep's cache key.

    Attributes:
        rank: triplets kept.
        seed: of the sketches and the sign flips.
        fold_gains: decompose as the stream sees the matrix.
        compare_base: also find the earlier matrix's own leading vectors (doubles the cost).
        memory_limit: bytes of private memory a worker may reach, 0 for no limit; a matrix that
            would exceed it is formed in blocks of rows at every product. No part of the cache key:
            the answer is the same to rounding.
        device: where products of a matrix held whole run.
    """

    rank: int = 16
    seed: int = 0
    fold_gains: bool = True
    compare_base: bool = True
    memory_limit: int = field(default=0, repr=False, compare=False)
    device: str = "cpu"


def stream_side(site: Site) -> Side:
    """The side whose vectors live in the residual stream; the written one where both do."""
    return "write" if site.writes.is_stream or not site.reads.is_stream else "read"


def gains_of(source: WeightSource, site: Site) -> Gains:
    """Norm gains around a matrix, float32: with them it is as the stream sees it."""
    found = (source.read_gain(site), source.write_gain(site))
    return Gains(*(None if g is None or bool((g == 1).all()) else g.float().cpu() for g in found))


def factored_svd(factors: Factors, rank: int) -> Triplets:
    """Exact thin SVD of B A from the QR factors of both, float64 core (write side on the left)."""
    b, a = (f.double() for f in factors)
    left, left_core = torch.linalg.qr(b)
    right, right_core = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(left_core @ right_core.T)
    found = int((s > 1e-12 * s[:1]).sum()) if len(s) else 0
    k = min(rank, found)
    return Triplets(
        left=(left @ u[:, :k]).T.float().contiguous(),
        scale=s[:k].clone(),
        right=(vt[:k] @ right.T).float().contiguous(),
        residual=torch.zeros(k, dtype=torch.float64),
        following=float(s[k]) if k < found else 0.0,
        spectrum=s[:found],
    )


def factored_norm(factors: Factors) -> float:
    """``‖B A‖_F`` by the trace of ``(BᵀB)(A Aᵀ)``, float64."""
    b, a = (f.double() for f in factors)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def decompose(source: WeightSource, site: Site, settings: SvdSettings) -> Components:
    """The components of one matrix, with its facts (the columns of the svd table)."""
    factors = source.factors(site)
    if factors is not None:
        return _from_factors(source, site, factors, settings)
    begun = flop_done()
    before, after = _sides(source, site)
    formed, matrix = _formed(source, site, before, after, settings)
    if formed.fro == 0:
        return _empty(source, site)
    side = stream_side(site)
    seen = Dense(matrix, side, gains=gains_of(source, site) if settings.fold_gains else ONES)
    draw = generator(settings.seed, "svd", site.name)
    triplets = leading_triplets(matrix, settings.rank, generator=draw, side=side, gains=seen.gains)
    fro = seen.fro() if seen.gains.given else formed.fro
    edge = _null_edge(seen, site, settings)
    rounding = None
    if before is not None and after.dtype.is_floating_point:
        rounding = judge(
            before,
            after,
            fro=formed.fro,
            before_fro=formed.before_fro,
            mean_absolute=formed.mean_absolute,
            top=float(triplets.scale[0]),
            null_edge=edge,
        )
    facts = _facts(formed, fro, triplets, rounding, edge, site)
    if before is not None and settings.compare_base:
        facts |= _against_base(before, triplets, side, site, settings)
    facts["gflop"] = (flop_done() - begun) / 1e9
    return _components(source, site, triplets, facts, side, settings.fold_gains)


def _sides(source: WeightSource, site: Site) -> tuple[Tensor | None, Tensor]:
    """(before, after) as stored; before is None for a checkpoint by itself."""
    if isinstance(source, Difference):
        return source.before.stored(site), source.after.stored(site)
    return None, source.weight(site)


def _formed(
    source: WeightSource, site: Site, before: Tensor | None, after: Tensor, settings: SvdSettings
) -> tuple[Formed, Tensor | Blocks]:
    """Entry statistics, and the matrix to decompose: in memory where it fits."""
    old = after.new_zeros(()).expand(after.shape) if before is None else before
    rows = None
    if settings.memory_limit:
        shape, itemsize = (site.d_out, site.d_in), stored_dtype(old, after).itemsize
        rows = block_rows(shape, itemsize, settings.memory_limit, f"matrix {site.name}")
    formed = form(old, after, reuse=True, keep=rows is None)
    if isinstance(source, Difference):
        _refuse_non_finite(source, site, formed)
    if rows is not None:
        return formed, Blocks(before, after, rows)
    return formed, formed.matrix.to(settings.device)


def _null_edge(seen: Dense, site: Site, settings: SvdSettings) -> float:
    """s₁ with a random sign on every entry. A matrix in memory keeps them: it is read no more."""
    draw = generator(settings.seed, "null edge", site.name)
    if isinstance(seen.matrix, Blocks):
        seen = replace(seen, matrix=seen.matrix.flipped(settings.seed, site.name))
    else:
        flip_signs(seen.matrix, seed=settings.seed, name=site.name)
    return top_value(seen, generator=draw)


def _refuse_non_finite(source: Difference, site: Site, formed: Formed) -> None:
    """NaN and infinities survive into the norm; reading each side again names the tensor."""
    if not math.isfinite(formed.fro + formed.before_fro):
        for side in (source.before, source.after):
            side.weight(site)


def _facts(
    formed: Formed,
    fro: float,
    triplets: Triplets,
    rounding: RoundingFacts | None,
    edge: float,
    site: Site,
) -> dict[str, Any]:
    """Columns of the table; `fro` of the matrix with its gains."""
    m, n = site.d_out, site.d_in
    top = float(triplets.scale[0])
    noise = edge / (math.sqrt(m) + math.sqrt(n))
    block = blocks_of(triplets.scale, noise)
    size = block.count(0)
    certificate = triplets.certificate(0, size - 1)
    has_base = formed.before_fro > 0
    gram = None if triplets.spectrum is None else triplets.spectrum.square()
    return {
        "fro": formed.fro,
        "rel_fro": formed.fro / formed.before_fro if has_base else math.nan,
        "changed_fraction": formed.changed,
        "spectral": top,
        "stable_rank": (fro / top) ** 2,
        "participation_ratio": _participation(gram),
        "effective_rank": _effective(gram),
        "alpha_base": formed.inner / formed.before_fro**2 if has_base else math.nan,
        "null_edge": edge,
        "certificate": certificate,
        "subspace_k": size,
        "resolved": bool(certificate <= UNRESOLVED_ANGLE and clears(top, edge, m, n)),
        "dtype": rounding.dtype if rounding else str(formed.matrix.dtype).removeprefix("torch."),
        "rounding_flag": rounding.flag if rounding else "none",
        "rounding_floor": rounding.floor if rounding else 0.0,
        "rounding_noise_fro": rounding.noise_fro if rounding else 0.0,
        "l1_size": l1_size(formed.mean_absolute, m, n),
        "folded_fro": fro,
        "block": ",".join(map(str, block)),
    }


def clears(top: float, edge: float, m: int, n: int) -> bool:
    """Whether s₁ is above its noise edge, itself a draw, by more than two draws may differ."""
    return top > edge * (1 + EDGE_MARGIN * edge_spread(m, n))


def norm(matrix: Float[Tensor, "d_out d_in"]) -> float:
    """Frobenius norm without a copy of a large matrix; float64 across chunks of rows."""
    m, n = matrix.shape
    if m * n < 2**20:
        return float(matrix.double().norm())
    rows = max(1, _CHUNK // n)
    parts = (float(matrix[i : i + rows].float().norm()) for i in range(0, m, rows))
    return math.sqrt(sum(part**2 for part in parts))


def _participation(squares: Tensor | None) -> float:
    """``(Σ s²)² / Σ s⁴``; NaN where the spectrum is known in part only."""
    return math.nan if squares is None else float(squares.sum() ** 2 / squares.square().sum())


def _effective(squares: Tensor | None) -> float:
    """``exp(entropy of s²/Σ s²)``; NaN where the spectrum is known in part only."""
    if squares is None:
        return math.nan
    share = (squares / squares.sum()).clamp(min=1e-300)
    return float(torch.exp(-(share * share.log()).sum()))


def _against_base(
    before: Tensor, triplets: Triplets, side: Side, site: Site, settings: SvdSettings
) -> dict[str, Any]:
    """The largest |cos| of u₁ with the earlier matrix's own leading vectors."""
    draw = generator(settings.seed, "base", site.name)
    before = before.to(settings.device)
    own = leading_triplets(before, BASE_VECTORS, generator=draw, side=side)
    cosines = (own.left @ triplets.left[0]).abs()
    return {"base_cosine": float(cosines.max()) if len(own) else 0.0}


def _from_factors(
    source: WeightSource, site: Site, factors: Factors, settings: SvdSettings
) -> Components:
    b, a = (f.float() for f in factors)
    base = source.before if isinstance(source, Difference) else getattr(source, "base", None)
    if settings.fold_gains:
        b, a = _fold_factors(source, site, b, a)
    triplets = factored_svd((b, a), settings.rank)
    if len(triplets) == 0:
        return _empty(source, site)
    squares = triplets.spectrum
    assert squares is not None
    squares = squares.square()
    raw = factored_norm(factors)
    # the adapter's parts take milliseconds; the base matrix is read only where it is compared
    before_fro = math.nan
    if base is not None and settings.compare_base:
        before_fro = norm(base.stored(site))
        if not math.isfinite(before_fro):
            base.weight(site)  # refuses, naming the tensor
    block = blocks_of(triplets.scale)
    certificate = triplets.certificate(0, block.count(0) - 1)
    facts = {
        "fro": raw,
        "rel_fro": raw / before_fro if before_fro > 0 else math.nan,
        "changed_fraction": 1.0,
        "spectral": float(triplets.scale[0]),
        "stable_rank": float(squares.sum() / squares[0]),
        "participation_ratio": _participation(squares),
        "effective_rank": _effective(squares),
        "alpha_base": math.nan,
        "null_edge": 0.0,
        "certificate": certificate,
        "subspace_k": block.count(0),
        "resolved": certificate <= UNRESOLVED_ANGLE,
        "dtype": "factored",
        "rounding_flag": "none",
        "rounding_floor": 0.0,
        "rounding_noise_fro": 0.0,
        "l1_size": math.nan,
        "folded_fro": float(squares.sum().sqrt()),
        "block": ",".join(map(str, block)),
    }
    fold = settings.fold_gains
    return _components(source, site, triplets, facts, "write", fold, method="lora")


def _fold_factors(source: WeightSource, site: Site, b: Tensor, a: Tensor) -> Factors:
    read, write = source.read_gain(site), source.write_gain(site)
    a = a if read is None else a * read.float()
    b = b if write is None else write.float()[:, None] * b
    return b, a


def _empty(source: WeightSource, site: Site) -> Components:
    facts = {
        "fro": 0.0, "rel_fro": 0.0, "changed_fraction": 0.0, "spectral": 0.0,
        "stable_rank": math.nan, "resolved": False, "rounding_flag": "none",
        "rounding_floor": 0.0, "null_edge": 0.0, "certificate": math.inf, "subspace_k": 0,
        "folded_fro": 0.0, "block": "",
    }  # fmt: skip
    return Components(
        site,
        torch.zeros(0, site.d_in),
        torch.zeros(0, site.d_out),
        torch.zeros(0),
        stage=stage_of(source),
        source=getattr(source, "ref", None),
        facts=facts,
    )


def _components(
    source: WeightSource,
    site: Site,
    triplets: Triplets,
    facts: dict[str, Any],
    side: Side,
    fold: bool,
    method: Any = "svd",
) -> Components:
    """Triplets as components, each turned so that the stream side's largest entry is positive."""
    left, right = triplets.left, triplets.right
    largest = left.gather(1, left.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    left, right = left * sign, right * sign
    right = right / right.norm(dim=1, keepdim=True).clamp(min=1e-30)
    write, read = (left, right) if side == "write" else (right, left)
    residual = triplets.residual / triplets.scale.clamp(min=1e-300) ** 2
    facts = facts | {"residual": [float(r) for r in residual], "folded": fold}
    return Components(
        site,
        read,
        write,
        triplets.scale.float(),
        method=method,
        stage=stage_of(source),
        source=getattr(source, "ref", None),
        facts=facts,
    )


def stage_of(source: WeightSource) -> str:
    return getattr(source, "stage", "") or source.name
