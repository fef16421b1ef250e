"""One matrix at a time, from disk, from a live model, from an adapter, or as a difference.

A difference of two checkpoints is itself a `WeightSource`: everything that decomposes a matrix
decomposes what a training stage changed, with the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import SourceRef
from mi_weightspace.core.errors import CheckpointError, MismatchError
from mi_weightspace.core.site import Site, select_sites
from mi_weightspace.models.checkpoint import (
    TensorFolder,
    read_config,
    refuse_non_finite,
    resolve,
)
from mi_weightspace.models.fingerprint import fingerprint
from mi_weightspace.models.grammar import (
    ModelShape,
    canonical,
    canonical_bias,
    part_of,
    shape_of,
    sites_of,
)

Factors = tuple[Float[Tensor, "d_out r"], Float[Tensor, "r d_in"]]


@runtime_checkable
class WeightSource(Protocol):
    """Raw weights by Site. Matrices are (d_out, d_in)."""

    name: str
    shape: ModelShape

    @property
    def fingerprint(self) -> str: ...

    def sites(self, select: str | Sequence[str] | None = None) -> list[Site]: ...

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        """In storage precision, a view where possible."""
        ...

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        """A float32 copy.

        Raises:
            CheckpointError: NaN or infinite entries; the message names the tensor.
        """
        ...

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None: ...

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None: ...

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None: ...

    def factors(self, site: Site | str) -> Factors | None:
        """(B, A) with the matrix = B A where it is known to be low rank, else None."""
        ...


class _BySite:
    """Site look-up shared by the sources."""

    shape: ModelShape

    def sites(self, select: str | Sequence[str] | None = None) -> list[Site]:
        return select_sites(sites_of(self.shape), select)

    def site(self, site: Site | str) -> Site:
        return site if isinstance(site, Site) else self.sites(site)[0]

    def factors(self, site: Site | str) -> Factors | None:
        return None


@dataclass(eq=False)
class CheckpointSource(_BySite):
    """A safetensors folder or hub id, streamed tensor by tensor."""

    model: str | Path
    name: str = field(init=False)
    shape: ModelShape = field(init=False)

    def __post_init__(self) -> None:
        self.path = resolve(self.model)
        self.name = str(self.model)
        self.shape = shape_of(read_config(self.path))
        self._tensors = TensorFolder.open(self.path)
        self._fingerprint: str | None = None
        for site in self.sites():
            self._key(site)  # a missing tensor shows at opening, not in the middle of a sweep

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.shape, self.sites(), self.stored)
        return self._fingerprint

    def _find(self, key: str) -> str | None:
        """The key on disk, with or without the base model's prefix."""
        for prefix in self.shape.table.prefixes:
            for candidate in (prefix + key, key.removeprefix(prefix)):
                if candidate in self._tensors.where:
                    return candidate
        return None

    def _key(self, site: Site, leaf: str = "weight") -> str:
        part = part_of(site, self.shape)
        names = [part.key(site.layer, leaf), f"{part.module.format(L=site.layer)}.{leaf}"]
        if site.kind == "unembed" and self.shape.tied:
            names.append(f"{self.shape.table.embed}.{leaf}")
        for name in names:
            found = self._find(name)
            if found is not None:
                return found
        raise CheckpointError(
            f"checkpoint {self.name}",
            given=f"no tensor {names[0]!r} for site {site.name}",
            expected=f"the {self.shape.family} layout",
            remedy="The weights are incomplete, or of another architecture than config.json says.",
        )

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        site = self.site(site)
        key = self._key(site)
        tensor = self._tensors.get(key)
        if site.kind == "unembed" and part_of(site, self.shape).layout == "linear":
            return canonical(tensor, site, self.shape)  # tied: the embedding is (vocab, d) too
        return canonical(tensor, site, self.shape)

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        site = self.site(site)
        matrix = refuse_non_finite(self.stored(site), self._key(site), self.name)
        return matrix.to(torch.float32, copy=True)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        site = self.site(site)
        key = self._find(part_of(site, self.shape).key(site.layer, "bias"))
        if key is None:
            return None
        return canonical_bias(self._tensors.get(key).float(), site, self.shape)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        return self._gain(self.shape.table.pre_norm(site.kind), site.layer)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        site = self.site(site)
        return self._gain(self.shape.table.post_norm(site.kind), site.layer)

    def _gain(self, path: str | None, layer: int | None) -> Tensor | None:
        key = None if path is None else self._find(path.format(L=layer) + ".weight")
        if key is None:
            return None
        return self._tensors.get(key).float() + self.shape.table.gain_offset


@dataclass(eq=False)
class ModuleSource(_BySite):
    """A live model seen as weights: any `Lens`."""

    lens: Any
    name: str = "live model"

    def __post_init__(self) -> None:
        self.shape = self.lens.shape

    @property
    def fingerprint(self) -> str:
        return self.lens.fingerprint

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        return self.lens.stored(site) if hasattr(self.lens, "stored") else self.lens.weight(site)

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        return refuse_non_finite(self.lens.weight(site), str(site), self.name)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.lens.bias(site)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self.lens.read_gain(site)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.lens.write_gain(site)


@dataclass(eq=False)
class Difference(_BySite):
    """``after − before``, one matrix at a time, float32.

    Raises:
        MismatchError: the two have different architectures or sizes; the message names the first.
    """

    before: WeightSource
    after: WeightSource
    stage: str = ""

    def __post_init__(self) -> None:
        agree(self.before, self.after)
        self.shape = self.before.shape
        self.name = f"{self.after.name} − {self.before.name}"

    @property
    def fingerprint(self) -> str:
        return f"{self.after.fingerprint}-{self.before.fingerprint}"

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        return self.weight(site)

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        found = self.factors(site)
        if found is not None:
            return found[0] @ found[1]
        return self.after.weight(site).sub_(self.before.weight(site))

    def factors(self, site: Site | str) -> Factors | None:
        """The adapter's factors when `after` is an adapter on the very checkpoint `before`."""
        base = getattr(self.after, "base", None)
        if base is None or base.fingerprint != self.before.fingerprint:
            return None
        return self.after.factors(site)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        before, after = self.before.bias(site), self.after.bias(site)
        return None if before is None or after is None else after - before

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        """The *earlier* stage's gain: one fixed gain for both, never a mixture."""
        return self.before.read_gain(site)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.before.write_gain(site)

    @property
    def ref(self) -> SourceRef:
        return SourceRef(
            before=self.before.name,
            after=self.after.name,
            before_hash=self.before.fingerprint,
            after_hash=self.after.fingerprint,
        )


def agree(before: WeightSource, after: WeightSource) -> None:
    """Refuse two sources whose matrices do not correspond."""
    a, b = before.shape, after.shape
    for name in ("family", "n_layers", "d_model", "vocab_size", "d_mlp", "n_heads", "n_kv_heads"):
        if getattr(a, name) != getattr(b, name):
            raise MismatchError(
                f"stages {before.name} and {after.name}",
                given=f"{name} {getattr(a, name)} and {getattr(b, name)}",
                expected="the same architecture, layer count, widths and vocabulary",
                remedy="Compare stages of one training run; a resized vocabulary must be cut back.",
            )
