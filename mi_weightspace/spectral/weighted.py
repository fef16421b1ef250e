"""The singular value decomposition of a change as it is realised on data.

A change D of a matrix moves its output by ``D x`` on an input x. With N inputs as the rows of X and
``M = XᵀX/N``, the SVD of ``D M^{1/2}`` (equally of ``D Xᵀ/√N``) is the best rank-k description of
that movement in mean square (Eckart-Young in the metric of M). The raw SVD is the case of white
inputs: it also counts changes on inputs that never occur, all rounding noise among them.

M splits into ``μμᵀ + Σ``: ``D μ`` is the constant shift the change adds on average text, ``D Σ Dᵀ``
the part that depends on the input. Neither M nor ``D Xᵀ`` is formed; block Krylov runs on the
products with X and D. First order only: this is the change of the matrix's own output at fixed
input, not the model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import ConfigError, MismatchError, PromptError
from mi_weightspace.core.readout import encode, pad
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.models.harvest import memory_tokens
from mi_weightspace.models.lens import Lens
from mi_weightspace.models.rounding import flip_signs
from mi_weightspace.models.weights import Factors, WeightSource
from mi_weightspace.spectral.dense import Dense, Operator
from mi_weightspace.spectral.krylov import (
    Triplets,
    block_krylov,
    blocks_of,
    exact_svd,
    is_small,
    top_value,
)

MAX_ROWS = 4096
UNRESOLVED_ANGLE = 0.2
"""A first vector whose certified angle error exceeds this is called unresolved."""
_EXACT_ENERGY = 2e10
_PROBES = 64


@dataclass(frozen=True, eq=False)
class Product:
    """``B A`` by its factors, never multiplied out."""

    b: Float[Tensor, "m r"]
    a: Float[Tensor, "r n"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def times(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "m c"]:
        return self.b @ (self.a @ x)

    def left_times(self, y: Float[Tensor, "c m"]) -> Float[Tensor, "c n"]:
        return (y @ self.b) @ self.a


@dataclass(frozen=True, eq=False)
class OnData:
    """``change Xᵀ/√N``, by products: the change's output on each input.

    Attributes:
        change: (d_out, d_in).
        inputs: (N, d_in) float32, one row for each token.
    """

    change: Operator
    inputs: Float[Tensor, "rows d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape[0], self.inputs.shape[0]

    def times(self, x: Float[Tensor, "rows c"]) -> Float[Tensor, "d_out c"]:
        mixed = Dense(self.inputs, "read").times(x)
        return self.change.times(mixed / math.sqrt(self.shape[1]))

    def left_times(self, y: Float[Tensor, "c d_out"]) -> Float[Tensor, "c rows"]:
        functional = self.change.left_times(y) / math.sqrt(self.shape[1])
        return Dense(self.inputs, "write").times(functional.T.contiguous()).T


@dataclass(frozen=True, eq=False)
class Weighted:
    """A change as realised on data, whole and without its constant part.

    Attributes:
        components: rank-one parts ``u_k (Dᵀu_k)ᵀ`` with u_k the left singular vectors of
            ``D M^{1/2}``, so that their sum is ``U Uᵀ D``. In the order of the realised change:
            `scale`, the norm of the part itself, need not decrease, and the read vectors are not
            orthogonal. Facts: see `weighted`.
        dependent: the same of ``D Σ^{1/2}``.
        realised, dependent_realised: (k,) singular values: root mean square output along u_k.
        constant: (d_out,) ``D μ``.
    """

    components: Components
    dependent: Components
    realised: Float[Tensor, " k"]
    dependent_realised: Float[Tensor, " k"]
    constant: Float[Tensor, " d_out"]

    def cosines(self, direction: Float[Tensor, " d_out"]) -> dict[str, float]:
        """Cosine of a direction with the first write vectors (|cos|) and with the constant shift.

        The constant shift has a sign of its own, singular vectors do not. NaN where there is no
        vector.

        Raises:
            MismatchError: another width.
        """
        direction = direction.double().flatten()
        width = self.constant.shape[0]
        if direction.shape[0] != width or not float(direction.norm()) > 0:
            raise MismatchError(
                f"direction for {self.components.site}",
                given=f"width {direction.shape[0]}, norm {float(direction.norm()):.3g}",
                expected=f"a non-zero vector of width {width}",
                remedy="Use a direction of the space this matrix writes.",
            )

        def cosine(vectors: Tensor) -> float:
            if len(vectors) == 0 or not float(vectors[0].norm()) > 0:
                return math.nan
            own = vectors[0].double()
            return float(own @ direction / own.norm() / direction.norm())

        return {
            "write_1": abs(cosine(self.components.write)),
            "dependent_1": abs(cosine(self.dependent.write)),
            "constant": cosine(self.constant[None]),
        }


def weighted(
    source: WeightSource,
    site: Site | str,
    inputs: Float[Tensor, "rows d_in"] | Lens,
    *,
    prompts: Sequence[str | tuple[int, ...]] | None = None,
    rank: int = 16,
    seed: int = 0,
    fold_gains: bool = True,
    null_edge: bool = True,
) -> Weighted:
    """Leading directions of what a change does to a matrix's output on given inputs.

    Args:
        source: a `Difference`, or any weights.
        inputs: the matrix's own inputs (after its norm), a row for each token, as `gather_inputs`
            gives them; or a live model (the *earlier* stage), run on `prompts`.
        fold_gains: write vectors behind a post-norm, and read vectors before a pre-norm, as the
            stream sees them (the earlier stage's gains).
        null_edge: also decompose the change with random entry signs.

    The components' facts: ``realised_fro`` (``√E‖Dx‖²``), ``realised_1``, ``share_1`` and ``share``
    (of ``E‖Dx‖²``, by the first and by all parts), ``constant_norm``, ``constant_share``,
    ``n_rows``, ``largest_row_share`` (of ``Σ‖x‖²``: near 1 where one token owns M),
    ``null_edge``, ``certificate``, ``subspace_k``, ``resolved``, ``estimated`` (whether the total
    is a stochastic estimate, to about 2 %).

    Raises:
        MismatchError: inputs of another width. PromptError: fewer than two rows, non-finite
        inputs, or a model without prompts. ConfigError: a rank below 1.
    """
    if rank < 1:
        raise ConfigError("rank", given=str(rank), expected="at least 1", remedy="rank=16.")
    site = _site(source, site)
    x = _inputs(site, inputs, prompts, seed)
    change, flipped = _change(source, site, seed, fold_gains, null_edge)
    gain = source.read_gain(site) if fold_gains else None
    mean = x.mean(0)
    constant = change.times(mean[:, None])[:, 0]
    shared: dict[str, Any] = {
        "n_rows": len(x),
        "largest_row_share": float((x.square().sum(1) / x.square().sum().clamp(min=1e-30)).max()),
        "constant_norm": float(constant.norm()),
        "folded": fold_gains,
    }
    parts: list[Components] = []
    values: list[Tensor] = []
    for name, rows in (("all", x), ("dependent", x - mean)):
        operator = OnData(change, rows)
        found = _triplets(operator, rank, generator(seed, "weighted", name, site.name))
        total, estimated = _energy(operator, found, seed, site.name)
        edge = 0.0
        if flipped is not None:
            draw = generator(seed, "weighted edge", name, site.name)
            edge = top_value(OnData(flipped, rows), generator=draw)
        facts = shared | _facts(found, total, edge, operator.shape) | {"estimated": estimated}
        parts.append(_components(source, site, found, change, gain, facts))
        values.append(found.scale)
    energy = float(parts[0].facts["realised_fro"] or 0.0) ** 2  # pyright: ignore[reportArgumentType]
    parts[0].facts["constant_share"] = float(constant.norm()) ** 2 / energy if energy else math.nan
    return Weighted(parts[0], parts[1], values[0], values[1], constant)


def captured(
    write: Float[Tensor, "k d_out"],
    change: Float[Tensor, "d_out d_in"],
    inputs: Float[Tensor, "rows d_in"],
) -> float:
    """Share of the output change on `inputs`, held out from the fit, in the span of `write`."""
    basis = torch.linalg.qr(write.double().T)[0]
    inside = total = 0.0
    for rows in inputs.split(1024):
        moved = rows.double() @ change.double().T
        inside += float((moved @ basis).square().sum())
        total += float(moved.square().sum())
    return inside / total if total > 0 else math.nan


def without_massive(
    inputs: Float[Tensor, "rows d_in"], ratio: float = 100.0
) -> tuple[Float[Tensor, "kept d_in"], int]:
    """Rows whose squared norm is at most `ratio` times the median one, and how many were dropped.

    A few tokens may carry activations so large (Sun et al. 2024, arXiv:2402.17762) that they alone
    make up M.
    """
    size = inputs.double().square().sum(1)
    keep = size <= ratio * size.median()
    return inputs[keep], int((~keep).sum())


def gather_inputs(
    lens: Lens,
    prompts: Sequence[str | tuple[int, ...]],
    sites: Sequence[Site | str],
    *,
    max_rows: int = MAX_ROWS,
    drop_first: bool = True,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Float[Tensor, "rows d_in"]]:
    """Inputs of matrices on every token of the prompts, or on `max_rows` tokens drawn at random.

    The same tokens for every matrix, in the order of the prompts, float32 on the CPU. The first
    token of a prompt, where massive activations sit, is left out unless asked for.

    Raises:
        PromptError: no tokens to gather, text without a tokenizer.
    """
    from rich.progress import track

    ids = [encode(prompt, lens.tokenizer, "prompts of gather_inputs") for prompt in prompts]
    start = int(drop_first)
    tokens = [(p, t) for p, row in enumerate(ids) for t in range(start, len(row))]
    if not tokens or max_rows < 1:
        raise PromptError(
            "prompts of gather_inputs",
            given=f"{len(ids)} prompts with {len(tokens)} tokens to read, max_rows={max_rows}",
            expected="at least one token after the first",
            remedy="Give longer prompts, or drop_first=False.",
        )
    if len(tokens) > max_rows:
        order = torch.randperm(len(tokens), generator=generator(seed, "gather_inputs"))
        tokens = [tokens[i] for i in sorted(order[:max_rows].tolist())]
    names = [f"{site}:in" for site in sites]
    rows: dict[str, list[Tensor]] = {str(site): [] for site in sites}
    wanted: dict[int, list[int]] = {}
    for p, t in tokens:
        wanted.setdefault(p, []).append(t)
    limit = batch_tokens or memory_tokens(lens, max(map(len, ids)), names)
    batches = list(_batches(ids, list(wanted), limit))
    for batch in track(batches, "inputs", disable=not progress, transient=True):
        padded, mask, _ = pad([ids[p] for p in batch])
        run = lens.run(padded, attention_mask=mask, capture=names, logits=False)
        for site, name in zip(rows, names, strict=True):
            value = run.captured[name]
            rows[site] += [value[i, wanted[p]].float().cpu() for i, p in enumerate(batch)]
    return {site: torch.cat(parts) for site, parts in rows.items()}


def _batches(ids: list[list[int]], prompts: list[int], limit: int) -> Iterator[list[int]]:
    """Consecutive prompts whose padded size stays within the limit (one prompt at least)."""
    batch: list[int] = []
    for p in prompts:
        longest = max([len(ids[q]) for q in [*batch, p]])
        if batch and longest * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(p)
    if batch:
        yield batch


def _site(source: WeightSource, site: Site | str) -> Site:
    if isinstance(site, Site):
        return site
    return source.sites([site])[0]


def _inputs(
    site: Site,
    inputs: Float[Tensor, "rows d_in"] | Lens,
    prompts: Sequence[str | tuple[int, ...]] | None,
    seed: int,
) -> Float[Tensor, "rows d_in"]:
    if not isinstance(inputs, Tensor):
        if prompts is None:
            raise PromptError(
                f"inputs of {site}",
                given="a model and no prompts",
                expected="prompts to run it on",
                remedy="Pass prompts=, or a tensor from gather_inputs.",
            )
        inputs = gather_inputs(inputs, prompts, [site], seed=seed)[site.name]
    if inputs.ndim != 2 or inputs.shape[1] != site.d_in:
        raise MismatchError(
            f"inputs of {site}",
            given=f"shape {tuple(inputs.shape)}",
            expected=f"(rows, {site.d_in})",
            remedy=f"Capture '{site}:in' and flatten batch and tokens.",
        )
    if len(inputs) < 2 or not bool(inputs.isfinite().all()):
        raise PromptError(
            f"inputs of {site}",
            given=f"{len(inputs)} rows, {int((~inputs.isfinite()).sum())} entries not finite",
            expected="at least two finite rows",
            remedy="Gather the inputs of more tokens.",
        )
    return inputs.detach().float().cpu().contiguous()


def _change(
    source: WeightSource, site: Site, seed: int, fold: bool, null: bool
) -> tuple[Operator, Operator | None]:
    """The change as a map from the matrix's own input, and its sign-flipped null.

    Factors have no entry-wise noise, hence no null.
    """
    gain = source.write_gain(site) if fold else None
    column = 1.0 if gain is None else gain.detach().float().cpu()[:, None]
    factors: Factors | None = source.factors(site)
    if factors is not None:
        b, a = (f.detach().float().cpu() for f in factors)
        return Product(column * b, a), None
    matrix = source.weight(site).detach().cpu() * column
    if not null:
        return Dense(matrix), None
    flipped = matrix.clone()
    flip_signs(flipped, seed=seed, name=site.name)
    return Dense(matrix), Dense(flipped)


def _triplets(operator: OnData, rank: int, draw: torch.Generator) -> Triplets:
    m, n = operator.shape
    if is_small(m, n):
        return exact_svd(operator.times(torch.eye(n)), rank)
    return block_krylov(operator, rank, generator=draw)


def _energy(operator: OnData, found: Triplets, seed: int, name: str) -> tuple[float, bool]:
    """``‖D Xᵀ‖²/N``, and whether it is an estimate.

    Large ones: the found part exactly, the rest by Hutchinson on the complement (Hutch++, Meyer
    et al. 2021, arXiv:2010.09649).
    """
    (m, n), width = operator.shape, operator.inputs.shape[1]
    if m * n * width <= _EXACT_ENERGY:
        moved = (operator.change.times(rows.T).double() for rows in operator.inputs.split(1024))
        return float(sum(float(part.square().sum()) for part in moved)) / n, False
    probe = torch.randn(n, _PROBES, generator=generator(seed, "energy", name))
    rest = operator.times(probe)
    rest = rest - found.left.T @ (found.left @ rest)
    return float(found.scale.square().sum() + rest.double().square().sum() / _PROBES), True


def _facts(found: Triplets, total: float, edge: float, shape: tuple[int, int]) -> dict[str, Any]:
    if len(found) == 0:
        return {"realised_fro": math.sqrt(total), "realised_1": 0.0, "share_1": math.nan,
                "share": math.nan, "null_edge": edge, "certificate": math.inf, "subspace_k": 0,
                "resolved": False}  # fmt: skip
    noise = edge / (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    size = blocks_of(found.scale, noise).count(0)
    certificate = found.certificate(0, size - 1)
    squares = found.scale.square()
    total = max(total, float(squares.sum()))
    return {
        "realised_fro": math.sqrt(total),
        "realised_1": float(found.scale[0]),
        "share_1": float(squares[0]) / total,
        "share": float(squares.sum()) / total,
        "null_edge": edge,
        "certificate": certificate,
        "subspace_k": size,
        "resolved": bool(certificate <= UNRESOLVED_ANGLE and float(found.scale[0]) > edge),
    }


def _components(
    source: WeightSource,
    site: Site,
    found: Triplets,
    change: Operator,
    gain: Float[Tensor, " d_in"] | None,
    facts: dict[str, Any],
) -> Components:
    """Rank-one parts ``u (Dᵀu)ᵀ``, each turned so that u's largest entry is positive."""
    write = found.left
    largest = write.gather(1, write.abs().argmax(1, keepdim=True)) if len(write) else write[:, :1]
    write = write * torch.where(largest < 0, -1.0, 1.0)
    read = change.left_times(write)
    if gain is not None:
        read = read * gain.detach().float().cpu()
    scale = read.norm(dim=1)
    return Components(
        site,
        read / scale.clamp(min=1e-30)[:, None],
        write,
        scale,
        method="svd_activation_weighted",
        stage=getattr(source, "stage", "") or source.name,
        source=getattr(source, "ref", None),
        facts=facts,
    )
