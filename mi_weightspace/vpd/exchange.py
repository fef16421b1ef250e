"""Components trained elsewhere: ``{module}.V`` (d_in, C) and ``{module}.U`` (C, d_out) per module.

Upstream writes ``y = x W``, so its matrix is ours transposed, its V our reads and its U our writes,
whatever the module stores (`nn.Linear`, Conv1D, or an embedding, whose d_in is the vocabulary).
A module that holds several matrices (fused QKV, gate and up) becomes one site each: the same reads
and the rows of U that are its own; a component that writes nothing there is left out. Going out,
the sites of a fused module are put side by side with zeros elsewhere, and the file says which is
whose.

Module paths are the Hugging Face ones of the family's table, with or without the model's prefix,
with dots or (as in a torch ParameterDict) dashes; leaves such as ``attn.q_proj`` or ``mlp.c_fc``
and our own site names are understood too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import CheckpointError, ConfigError, SiteError
from mi_weightspace.core.json_io import DamagedJson, parse_json, take
from mi_weightspace.core.site import Site
from mi_weightspace.models.grammar import module_path, part_of, row_index
from mi_weightspace.models.lens import Lens
from mi_weightspace.vpd.assemble import gains, site_record
from mi_weightspace.vpd.decomposition import Decomposition
from mi_weightspace.vpd.host import Host, LensHost

PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
OWNERS = "mi_weightspace.sites"
"""Header key of an exported file: module -> {site: [first, last component + 1]}."""
IMPORTED = (
    "Imported components: neither trained nor evaluated here, and without an importance network."
)
_LEAVES: dict[str, str] = {
    "q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o",
    "out_proj": "attn.o", "gate_proj": "mlp.gate", "up_proj": "mlp.in", "c_fc": "mlp.in",
    "fc_in": "mlp.in", "down_proj": "mlp.out", "fc_out": "mlp.out",
}  # fmt: skip
_WRAPPERS = re.compile(r"^(?:_?components\.|model\.|_orig_mod\.|target_model\.)+")


@dataclass(frozen=True, eq=False)
class Factor:
    """V and U of one module, and which components belong to which site (None: not said)."""

    v: Float[Tensor, "d_in C"]
    u: Float[Tensor, "C d_out"]
    owners: Mapping[str, Sequence[int]] | None = None


def import_components(
    weights: str | Path | Mapping[str, Tensor], model: Any, *, name: str = ""
) -> Decomposition:
    """A decomposition from component weights trained elsewhere.

    It projects (``mw.project(parts[site], direction)``), edits and exports; importances and cards
    need a network that was trained with it. Table: per site the number of components and
    ``remainder`` = ‖W − ΣVU‖²/‖W‖² against this model's matrix: near 1, it is another model's.

    Args:
        weights: a safetensors file, or tensors by name. model: whatever `mi_weightspace.load`
            takes.

    Raises:
        CheckpointError: a pickle file, an unreadable one, a V without its U, wrong shapes, values
            not finite. SiteError: a module that is no matrix of this model.
    """
    import pandas as pd

    from mi_weightspace.models.load import load

    lens = load(model)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module, factor in _factors(*_tensors(weights)).items():
        for site in sites_of_module(module, lens):
            if site.name in found:
                raise _twice(module, site)
            own = _site_factors(module, factor, site, lens)
            if len(own[0]):  # nothing of a fused module may have been decomposed for this one
                found[site.name] = own
    if not found:
        raise CheckpointError(
            "component weights",
            given="no tensor named MODULE.V or MODULE.U",
            expected="V (d_in, C) and U (C, d_out) for each module",
            remedy="Pass the state of the components, not of the model.",
        )
    host: Any = LensHost(lens, tuple(found))
    counts = {n: len(found[n][0]) for n in host.names}
    arrays = {f"{n}/{side}": found[n][i] for n in host.names for i, side in enumerate(_SIDES)}
    rows = [_row(host, n, *found[n]) for n in host.names]
    where = name or (str(weights) if isinstance(weights, str | Path) else "tensors")
    parts = Decomposition(
        table=pd.DataFrame(rows),
        arrays={**arrays, **gains(host, host.names)},
        config={
            "command": "vpd import",
            "sites": {n: site_record(host, n, c) for n, c in counts.items()},
            "imported_from": where,
            "notes": [IMPORTED],
        },
        inputs={"model": host.fingerprint},
        reservations=(IMPORTED,),
    )
    return parts.with_objective(None, host)


_SIDES = ("read", "write")


def export_components(
    parts: Decomposition, model: Any, path: str | Path | None = None
) -> dict[str, Tensor]:
    """``{module}.V`` and ``{module}.U`` of every site, under the model's own module paths.

    Args:
        path: a safetensors file to write too; it also says which component is whose in fused
            modules, so that `import_components` reads back exactly what was written.

    Raises:
        ConfigError: the file exists.
    """
    from mi_weightspace.models.load import load

    lens = load(model)
    by_module: dict[str, list[Site]] = {}
    for name in parts.sites:
        site = lens.sites(name)[0]
        by_module.setdefault(module_path(site, lens.shape), []).append(site)
    tensors: dict[str, Tensor] = {}
    owners: dict[str, dict[str, list[int]]] = {}
    for module, sites in by_module.items():
        v = torch.cat([parts.read(s.name) for s in sites]).T.contiguous()
        u = torch.cat([_placed(parts.write(s.name), s, lens) for s in sites])
        tensors |= {f"{module}.V": v, f"{module}.U": u}
        ends = torch.tensor([len(parts.read(s.name)) for s in sites]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        owners[module] = {s.name: [a, b] for s, a, b in zip(sites, starts, ends, strict=True)}
    if path is not None:
        _write(Path(path), tensors, owners)
    return tensors


def _write(path: Path, tensors: dict[str, Tensor], owners: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    if path.exists():
        raise ConfigError(
            f"file {path}",
            given="a file that exists",
            expected="a new file name",
            remedy="Choose another name; nothing is overwritten.",
        )
    save_file(tensors, path, metadata={OWNERS: json.dumps(owners)})


def _placed(write: Tensor, site: Site, lens: Lens) -> Float[Tensor, "C d_module"]:
    """Write vectors in the coordinates of the whole (possibly fused) module."""
    rows = row_index(site, lens.shape)
    if rows is None:
        return write
    width = (lens.shape.n_heads + 2 * lens.shape.n_kv_heads) * lens.shape.d_head
    if part_of(site, lens.shape).fused == "gate_up":
        width = 2 * lens.shape.d_mlp
    out = write.new_zeros(len(write), width)
    out[:, rows] = write
    return out


# ---- reading -------------------------------------------------------------------------------
def _tensors(
    weights: str | Path | Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], dict[str, dict[str, list[int]]]]:
    if not isinstance(weights, str | Path):
        return weights, {}
    from safetensors import SafetensorError, safe_open

    path = Path(weights)
    if path.suffix.lower() in PICKLED or _looks_pickled(path):
        raise CheckpointError(
            f"component weights {path}",
            given="a pickle file, which can run any code when it is read",
            expected="a safetensors file",
            remedy="Where you trust it: safetensors.torch.save_file(torch.load(path, "
            "weights_only=True), 'components.safetensors'), and pass that.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            return (
                {k: file.get_tensor(k) for k in file.keys()},  # noqa: SIM118 (not a dict)
                _owners(parse_json(header.get(OWNERS, "{}"))),
            )
    except (OSError, SafetensorError, DamagedJson) as error:
        raise CheckpointError(
            f"component weights {path}",
            given=f"{type(error).__name__}: {error}",
            expected="a complete safetensors file",
            remedy="Check the path; copy the file again.",
        ) from error


def _owners(record: Any) -> dict[str, dict[str, list[int]]]:
    """Raises:
    DamagedJson: anything but rows by site by module.
    """
    owners = take({"owners": record}, "owners", "object")
    for module in owners:
        for site in take(owners, module, "object"):
            take(owners[module], site, "wholes")
    return owners


def _looks_pickled(path: Path) -> bool:
    """A zip archive or a bare pickle; a safetensors header of that length begins alike, but its
    ninth byte opens the JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return (head[:2] == b"PK" or head[:1] == b"\x80") and head[8:] != b"{"


def _factors(
    tensors: Mapping[str, Tensor], owners: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, Factor]:
    """Module path -> its pair; other tensors (importance networks) are passed over."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stem, dot, leaf = key.rpartition(".")
        if dot and leaf in {"V", "U"}:
            pairs.setdefault(stem, {})[leaf] = value.detach().float()
    found: dict[str, Factor] = {}
    for module, pair in pairs.items():
        if set(pair) != {"V", "U"}:
            raise CheckpointError(
                f"components of {module}",
                given=f"only {sorted(pair)}",
                expected="V (d_in, C) and U (C, d_out)",
                remedy="The file is incomplete: export it again.",
            )
        v, u = pair["V"], pair["U"]
        if v.ndim != 2 or u.ndim != 2 or v.shape[1] != u.shape[0]:
            raise CheckpointError(
                f"components of {module}",
                given=f"V {tuple(v.shape)} and U {tuple(u.shape)}",
                expected="V (d_in, C) and U (C, d_out) with the same C",
                remedy="Transpose the one that is turned.",
            )
        for leaf, value in (("V", v), ("U", u)):
            if not bool(value.isfinite().all()):
                raise CheckpointError(
                    f"{leaf} of {module}",
                    given="values that are not finite",
                    expected="finite component weights",
                    remedy="The run that made them diverged; take an earlier checkpoint of it.",
                )
        found[module] = Factor(v, u, owners.get(module))
    return found


def sites_of_module(module: str, lens: Lens) -> list[Site]:
    """The sites a module path holds.

    Raises:
        SiteError: a path that is no matrix of this model; the message offers near ones.
    """
    import difflib

    every = lens.sites()
    by_name = {s.name: [s] for s in every}
    by_path: dict[str, list[Site]] = {}
    for site in every:
        by_path.setdefault(module_path(site, lens.shape), []).append(site)
    wanted = module if module in by_path or module in by_name else module.replace("-", ".")
    short = _WRAPPERS.sub("", wanted)
    stems = {wanted, short, *(f"{p}{short}" for p in ("model.", *lens.shape.table.prefixes))}
    for stem in stems:
        if stem in by_name or stem in by_path:
            return by_name.get(stem) or by_path[stem]
    leaf = re.search(r"(?:^|\.)(\d+)\.(?:\w+\.)?(\w+)$", wanted)
    if leaf is not None and leaf[2] in _LEAVES:
        name = f"blocks.{leaf[1]}.{_LEAVES[leaf[2]]}"
        if name in by_name:
            return by_name[name]
    near = difflib.get_close_matches(wanted, [*by_path, *by_name], n=3, cutoff=0.3)
    raise SiteError(
        f"module {module!r}",
        given="a path that is no matrix of this model",
        expected=f"a module such as {near or list(by_path)[:3]}",
        remedy="Load the model these components were trained on; or rename the tensors.",
    )


def _site_factors(
    module: str, factor: Factor, site: Site, lens: Lens
) -> tuple[Float[Tensor, "C d_in"], Float[Tensor, "C d_out"]]:
    """Reads and writes of one site, checked against its shape."""
    v, u = factor.v, factor.u
    rows = row_index(site, lens.shape)
    if rows is not None and u.shape[1] != site.d_out and int(rows.max()) < u.shape[1]:
        u = u[:, rows]
        if factor.owners is not None:
            first, last = factor.owners.get(site.name, (0, 0))
            kept = torch.arange(first, last)
        else:
            kept = u.any(1).nonzero().flatten()
        v, u = v[:, kept], u[kept]
    if (v.shape[0], u.shape[1]) != (site.d_in, site.d_out):
        turned = (v.shape[0], u.shape[1]) == (site.d_out, site.d_in)
        raise CheckpointError(
            f"components of {module}, site {site.name}",
            given=f"V {tuple(v.shape)} and U {tuple(u.shape)}",
            expected=f"V ({site.d_in}, C) and U (C, {site.d_out})",
            remedy="V is the input side: exchange the two, transposed."
            if turned
            else "Load the model these components were trained on.",
        )
    return v.T.contiguous(), u.contiguous()


def _row(host: Host, name: str, read: Tensor, write: Tensor) -> dict[str, Any]:
    weight = host.weight(name).double().cpu()
    left = (weight - write.double().T @ read.double()).square().sum()
    energy = float(weight.square().sum())
    return {
        "site": name,
        "layer": host.layers[name],
        "n_components": len(read),
        "remainder": float(left) / energy if energy > 0 else float("nan"),
    }


def _twice(module: str, site: Site) -> CheckpointError:
    return CheckpointError(
        f"components of {module}",
        given=f"a second set for {site.name}",
        expected="one V and U per matrix",
        remedy="Remove one of the two spellings from the file.",
    )
