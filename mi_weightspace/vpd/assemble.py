"""Between live objects and what a report stores of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from mi_weightspace.core.seeds import generator
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.vpd.config import VPDConfig
from mi_weightspace.vpd.factors import Factors, matrix_of
from mi_weightspace.vpd.host import Host, LensHost
from mi_weightspace.vpd.importance import Importance
from mi_weightspace.vpd.objective import Objective


def as_host(model: Any, select: Sequence[str], *, prefix: bool) -> Host:
    """A Host as it is; anything else through `mi_weightspace.load`."""
    if hasattr(type(model), "clean") and hasattr(type(model), "prepared"):
        return model
    from mi_weightspace.models.load import load

    host: Any = LensHost(load(model), tuple(select), prefix=prefix)
    return host


def rebuilt(arrays: Mapping[str, Tensor], config: VPDConfig, host: Host) -> Objective:
    """Factors and importance network from stored arrays, frozen, on the host's device."""
    reads, writes = (
        {n: arrays[f"{n}/{side}"].to(host.device) for n in host.names} for side in ("read", "write")
    )
    factors = Factors(host, reads, writes)
    widths = {n: host.width(n) for n in host.names}
    network = Importance(factors, widths, config.importance, generator(config.seed, "importance"))
    prefix = "importance/"
    stored = {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}
    network.load_state_dict(stored)
    network.to(device=host.device, dtype=host.dtype).requires_grad_(False)
    return Objective(factors, network, config)


def stored_arrays(objective: Objective) -> dict[str, Tensor]:
    """What a decomposition keeps: factors, gains beside them, importance network."""
    factors, found = objective.factors, {}
    for name in factors.layout.names:
        found[f"{name}/read"] = factors.reads[name].detach().cpu().clone()
        found[f"{name}/write"] = factors.writes[name].detach().cpu().clone()
    found |= gains(factors.host, factors.layout.names)
    for name, value in objective.importance.state_dict().items():
        found[f"importance/{name}"] = value.detach().cpu().clone()
    return found


def gains(host: Host, names: Sequence[str]) -> dict[str, Tensor]:
    """Norm gains in front of and behind each matrix, where the host is a language model."""
    lens = getattr(host, "lens", None)
    found: dict[str, Tensor] = {}
    if lens is None:
        return found
    for name in names:
        matrix = matrix_of(name)
        for side, gain in (("read", lens.read_gain(matrix)), ("write", lens.write_gain(matrix))):
            if gain is not None:
                found[f"{name}/{side}_gain"] = gain.detach().cpu().clone()
    return found


def site_record(host: Host, name: str, n_components: int) -> dict[str, Any]:
    """What `config["sites"]` keeps of a site."""
    site, (d_out, d_in) = host.site(name), host.weight(name).shape
    record: Any = None if site is None else asdict(site)
    sizes = {"n_components": n_components, "d_out": d_out, "d_in": d_in}
    return {**sizes, "layer": host.layers[name], "site": record}


def site_of(record: Mapping[str, Any]) -> Site:
    spaces = {side: Space(**record[side]) for side in ("reads", "writes")}
    return Site(**{**record, **spaces})
