"""One matrix at a time, from disk, from a live model, from an adapter, or as a difference.

A difference of two checkpoints is itself a `WeightSource`: everything that decomposes a matrix
decomposes what a training stage changed, with the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.components import SourceRef
from mi_weightspace.core.errors import CheckpointError, MismatchError, SiteError
from mi_weightspace.core.site import Site, select_sites
from mi_weightspace.models.checkpoint import (
    TensorFolder,
    read_config,
    refuse_non_finite,
    resolve,
)
from mi_weightspace.models.config_file import settings_of
from mi_weightspace.models.fingerprint import fingerprint
from mi_weightspace.models.grammar import (
    ModelShape,
    canonical,
    canonical_bias,
    part_of,
    shape_of,
    sites_of,
    stored_shape,
    wrong_shape,
)
from mi_weightspace.models.layout import (
    BUFFERS,
    Header,
    agree_layouts,
    bare,
    check_layers,
    check_vectors,
)

Factors = tuple[Float[Tensor, "d_out r"], Float[Tensor, "r d_in"]]
_FLOATS = frozenset({"F32", "BF16", "F16", "F64"})
_AGREED = (
    "family",
    "n_layers",
    "d_model",
    "vocab_size",
    "d_mlp",
    "n_heads",
    "n_kv_heads",
    "d_head",
    "parallel",
)


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

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        """Bias of the norm in front of the matrix, or None."""
        ...

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
        """One site by its exact name."""
        if isinstance(site, Site):
            return site
        found = self.sites(site)
        if len(found) != 1 or found[0].name != site:
            raise SiteError(
                f"site {site!r}",
                given=f"a pattern that matches {len(found)} sites",
                expected="the name of one site",
                remedy="Use .sites(pattern) to list them, then ask for each.",
            )
        return found[0]

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
        config = read_config(self.path)
        self.shape = shape_of(config, str(self.path / "config.json"))
        self.settings = settings_of(config)
        self._tensors = TensorFolder.open(self.path)
        self._fingerprint: str | None = None
        # what is wrong shows at opening, not in the middle of a sweep
        check_layers(self._tensors.headers, self.shape, self.name)
        for site in self.sites():
            self._check_header(site)
            check_vectors(site, self._vectors(site), self.shape, self.name)

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self)
        return self._fingerprint

    def _check_header(self, site: Site) -> None:
        key = self._key(site)
        found, dtype = self._tensors.headers[key]
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {key} of {self.name}",
                given=f"storage dtype {dtype}",
                expected="float32, bfloat16 or float16",
                remedy="Use the unquantised checkpoint: rounding hides what training changed.",
            )
        if found != stored_shape(site, self.shape):
            raise wrong_shape(site, found, self.shape, self.name)

    def _vectors(self, site: Site) -> dict[str, Header | None]:
        """Headers of the vectors around a matrix, by ``role:key``; None where there is none."""
        table, paths = self.shape.table, {"bias": part_of(site, self.shape).key(site.layer, "bias")}
        pre, post = table.pre_norm(site.kind), table.post_norm(site.kind)
        if pre is not None:
            paths |= {"pre": f"{pre}.weight", "shift": f"{pre}.bias"}
        if post is not None:
            paths |= {"post": f"{post}.weight"}
        found: dict[str, Header | None] = {}
        for role, path in paths.items():
            key = self._find(path.format(L=site.layer))
            name = path.format(L=site.layer) if key is None else key
            found[f"{role}:{name}"] = None if key is None else self._tensors.headers[key]
        return found

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the blocks' tensors by key, without the base model's prefix; no buffers."""
        blocks = bare(self.shape.table.blocks, self.shape.table) + "."
        named = {
            bare(key, self.shape.table): size for key, (size, _) in self._tensors.headers.items()
        }
        return {k: s for k, s in named.items() if k.startswith(blocks) and not k.endswith(BUFFERS)}

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
        return canonical(self._tensors.get(self._key(site)), site, self.shape)

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        site = self.site(site)
        matrix = refuse_non_finite(self.stored(site), self._key(site), self.name)
        return matrix.to(torch.float32, copy=True)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        site = self.site(site)
        key = self._find(part_of(site, self.shape).key(site.layer, "bias"))
        if key is None:
            return None
        return canonical_bias(self._finite(key), site, self.shape)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        return self._gain(self.shape.table.pre_norm(site.kind), site.layer)

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        site = self.site(site)
        path = self.shape.table.pre_norm(site.kind)
        key = None if path is None else self._find(path.format(L=site.layer) + ".bias")
        return None if key is None else self._finite(key)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        site = self.site(site)
        return self._gain(self.shape.table.post_norm(site.kind), site.layer)

    def _gain(self, path: str | None, layer: int | None) -> Tensor | None:
        key = None if path is None else self._find(path.format(L=layer) + ".weight")
        if key is None:
            return None
        return self._finite(key) + self.shape.table.gain_offset

    def _finite(self, key: str) -> Tensor:
        return refuse_non_finite(self._tensors.get(key), key, self.name).float()

    def extras(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that are no site's matrix (gains, biases, positions), float32, by module name."""
        owned = {self._key(site) for site in self.sites()}
        for key in sorted(self._tensors.where):
            if key not in owned and not key.endswith(BUFFERS):
                yield bare(key, self.shape.table), self._finite(key)


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
        return self._finite("bias", site)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self._finite("read_gain", site)

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self._finite("read_shift", site)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self._finite("write_gain", site)

    def _finite(self, what: str, site: Site | str) -> Tensor | None:
        found: Tensor | None = getattr(self.lens, what)(site)
        name = f"{site} {what.replace('_', ' ')}"
        return None if found is None else refuse_non_finite(found, name, self.name)


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
        after = self.after.weight(site)
        return after - self.before.weight(site).to(after.device)

    def factors(self, site: Site | str) -> Factors | None:
        """Factors of the difference where the two sides share their base matrix exactly.

        An adapter against its base gives (B, A); two adapters on one base give
        ``[B₁, −B₀] [A₁; A₀]``. Anything else gives None.
        """
        site = self.site(site)
        after, base_after = self.after.factors(site), _base(self.after)
        before, base_before = self.before.factors(site), _base(self.before)
        if (after is None and before is None) or not _same(base_before, base_after, site):
            return None
        if before is None:
            return after
        negative = (-before[0], before[1])
        if after is None:
            return negative
        if all(map(torch.equal, before, after)):  # exactly nothing, not the rounding of B A − B A
            return after[0][:, :0], after[1][:0]
        return torch.cat([after[0], negative[0]], 1), torch.cat([after[1], negative[1]], 0)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        before, after = self.before.bias(site), self.after.bias(site)
        return None if before is None or after is None else after - before

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        """The *earlier* stage's gain: one fixed gain for both, never a mixture."""
        return self.before.read_gain(site)

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self.before.read_shift(site)

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


def _base(source: WeightSource) -> WeightSource:
    return getattr(source, "base", source)


def _same(one: WeightSource, other: WeightSource, site: Site) -> bool:
    """Whether two sources hold the same matrix, entry by entry (one folder: trivially)."""
    if one is other:
        return True
    path = getattr(one, "path", None)
    if path is not None and path == getattr(other, "path", None):
        return True
    a, b = one.stored(site), other.stored(site)
    return a.dtype == b.dtype and torch.equal(a, b.to(a.device))


def agree(before: WeightSource, after: WeightSource) -> None:
    """Refuse two sources whose matrices do not correspond."""
    a, b = before.shape, after.shape
    for name in _AGREED:
        if getattr(a, name) != getattr(b, name):
            raise MismatchError(
                f"stages {before.name} and {after.name}",
                given=f"{name} {getattr(a, name)} and {getattr(b, name)}",
                expected="the same architecture, layer count, widths and vocabulary",
                remedy="Compare stages of one training run; a resized vocabulary must be cut back.",
            )
    held = [getattr(getattr(s, "base", s), "layout", None) for s in (before, after)]
    if held[0] is not None and held[1] is not None:
        agree_layouts(held[0](), held[1](), f"{before.name} and {after.name}")
