"""The rank-one subcomponents of every site, their initialisation, and the remainder.

A site owns ``read (C, d_in)`` and ``write (C, d_out)``; subcomponent c is ``write_c read_cᵀ`` and
the remainder ``Δ = W − writeᵀ read`` makes the parts sum to W exactly (vpd.md §1).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, SiteError
from mi_weightspace.core.seeds import generator
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.host import Host
from mi_weightspace.vpd.masked import Adjust, Layout, Masks, adjustments

SMALL = 1e-2
"""Standard deviation of surplus reads, relative to a unit vector, under the exact inits."""


class Factors:
    """Trainable reads and writes of a host's sites.

    Attributes:
        layout: site order and sizes. reads, writes: site -> leaf tensors.
        weights: site -> the matrix they stand for, (d_out, d_in).
    """

    def __init__(
        self,
        host: Host,
        reads: Mapping[str, Tensor],
        writes: Mapping[str, Tensor],
    ) -> None:
        self.host = host
        self.reads = {name: reads[name] for name in host.names}
        self.writes = {name: writes[name] for name in host.names}
        self.layout = Layout(host.names, tuple(len(self.reads[n]) for n in host.names))
        self.weights = {name: host.weight(name) for name in host.names}
        self.biases = {name: host.bias(name) for name in host.names}
        for name in host.names:
            d_out, d_in = self.weights[name].shape
            c = len(self.reads[name])
            assert self.reads[name].shape == (c, d_in), (name, self.reads[name].shape)
            assert self.writes[name].shape == (c, d_out), (name, self.writes[name].shape)

    def parameters(self) -> list[Tensor]:
        return [*self.reads.values(), *self.writes.values()]

    def requires_grad_(self, wanted: bool) -> Factors:
        for parameter in self.parameters():
            parameter.requires_grad_(wanted)
        return self

    def remainder(self, name: str) -> Float[Tensor, "d_out d_in"]:
        return self.weights[name] - self.writes[name].T @ self.reads[name]

    def functions(
        self, masks: Masks, *, train: bool = True, only: tuple[str, ...] | None = None
    ) -> dict[str, Adjust]:
        """Adjustments for `Host.forward`; ``train=False`` lets no gradient reach the factors."""
        reads, writes = self.reads, self.writes
        if not train:
            reads = {n: v.detach() for n, v in reads.items()}
            writes = {n: v.detach() for n, v in writes.items()}
        return adjustments(self.layout, reads, writes, self.biases, self.host.scales, masks, only)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.layout.names:
            yield f"read/{name}", self.reads[name]
            yield f"write/{name}", self.writes[name]


def component_counts(config: VPDConfig, names: tuple[str, ...]) -> dict[str, int]:
    """Subcomponents of each site.

    Raises:
        ConfigError: a glob that matches no site, or a site without a number.
    """
    given = config.n_components
    if isinstance(given, int):
        return dict.fromkeys(names, given)
    counts: dict[str, int] = {}
    for glob, count in given.items():
        found = [n for n in names if any(fnmatch.fnmatchcase(x, glob) for x in (n, matrix_of(n)))]
        if not found:
            raise _counts_error(f"{glob!r}, which matches no site", names)
        for name in found:
            counts.setdefault(name, count)
    missing = [name for name in names if name not in counts]
    if missing:
        raise _counts_error(f"no number for {missing[:4]}", names)
    return {name: counts[name] for name in names}


def matrix_of(name: str) -> str:
    """The matrix of a site: an update is named ``MATRIX@STAGE``."""
    return name.partition("@")[0]


def _counts_error(given: str, names: tuple[str, ...]) -> ConfigError:
    return ConfigError(
        "n_components",
        given=given,
        expected=f"globs that cover the sites {list(names[:4])}… exactly",
        remedy="Give one number for all sites, or end the mapping with '*'.",
    )


def initial_factors(host: Host, config: VPDConfig) -> Factors:
    """Factors at step 0 (`config.init`), reproducible from `config.seed`.

    Raises:
        ConfigError: C below the rank of a matrix without `allow_unfaithful` (the sum of the
            components could not equal the matrix), or counts that do not cover the sites.
        SiteError: a matrix of zeros.
    """
    counts = component_counts(config, host.names)
    reads: dict[str, Tensor] = {}
    writes: dict[str, Tensor] = {}
    for name in host.names:
        weight = host.weight(name)
        if not bool(weight.any()):
            raise SiteError(
                f"site {name}",
                given="a matrix of zeros",
                expected="a matrix that does something: its error is measured relative to its norm",
                remedy="Leave this site out.",
            )
        if config.faithfulness.weight > 0 and not config.allow_unfaithful:
            _check_rank(name, weight, counts[name])
        draw = generator(config.seed, "init", name)
        read, write = _INITS[config.init](weight, counts[name], draw, _faces_output(name))
        reads[name] = read.to(host.dtype).contiguous().requires_grad_()
        writes[name] = write.to(host.dtype).contiguous().requires_grad_()
    return Factors(host, reads, writes)


def _check_rank(name: str, weight: Tensor, count: int) -> None:
    if count >= min(weight.shape):
        return
    rank = int(torch.linalg.matrix_rank(weight))
    if count < rank:
        raise ConfigError(
            f"n_components at {name}",
            given=f"{count}",
            expected=f"at least {rank}, the rank of this {tuple(weight.shape)} matrix: fewer "
            "rank-one parts cannot sum to it",
            remedy="Raise n_components, or set allow_unfaithful=True (--allow-unfaithful); the "
            "report then says that the decomposition cannot be faithful.",
        )


def _faces_output(name: str) -> bool:
    """Whether the nonlinearity is on the output side (q, k, v, gate, in) or the input side."""
    return not matrix_of(name).endswith(("attn.o", "mlp.out", "mlp_out", "embed", "linear2"))


def _random(weight: Tensor, count: int, draw: torch.Generator, _: bool) -> tuple[Tensor, Tensor]:
    d_out, d_in = weight.shape
    read = torch.randn(count, d_in, generator=draw) / d_in**0.5
    write = torch.randn(count, d_out, generator=draw) / count**0.5
    return read.to(weight.device), write.to(weight.device)


def _svd(weight: Tensor, count: int, draw: torch.Generator, _: bool) -> tuple[Tensor, Tensor]:
    """√S on both sides; surplus components read a small random vector and write nothing."""
    d_out, d_in = weight.shape
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    k = min(count, len(s))
    root = s[:k].sqrt()
    read = torch.randn(count, d_in, generator=draw).to(weight) * (SMALL / d_in**0.5)
    write = weight.new_zeros(count, d_out)
    read[:k], write[:k] = root[:, None] * vh[:k], root[:, None] * u[:, :k].T
    return read, write


def _aligned(
    weight: Tensor, count: int, draw: torch.Generator, faces_output: bool
) -> tuple[Tensor, Tensor]:
    """One component per coordinate that faces a nonlinearity; a surplus splits coordinates.

    A split gives its pieces disjoint supports of the coordinate's vector, so the sum stays exact.
    """
    rows = weight if faces_output else weight.T  # rows: the vector of each facing coordinate
    n, width = rows.shape
    order = torch.randperm(n, generator=draw)
    coordinates = [int(order[i % n]) for i in range(count)]
    shares: dict[int, int] = {}
    for coordinate in coordinates:
        shares[coordinate] = shares.get(coordinate, 0) + 1
    owner = {
        c: torch.randint(k, (width,), generator=draw).to(weight.device) for c, k in shares.items()
    }
    vectors, axes = weight.new_zeros(count, width), weight.new_zeros(count, n)
    used: dict[int, int] = {}
    for i, coordinate in enumerate(coordinates):
        piece = used.get(coordinate, 0)
        used[coordinate] = piece + 1
        vectors[i] = torch.where(owner[coordinate] == piece, rows[coordinate], 0.0)
        axes[i, coordinate] = 1.0
    return (vectors, axes) if faces_output else (axes, vectors)


_INITS = {"random": _random, "svd": _svd, "aligned": _aligned}
