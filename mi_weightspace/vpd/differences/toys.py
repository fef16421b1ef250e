"""A difference host over two torch modules of one shape, for models small enough to know."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_weightspace.core.errors import MismatchError, SiteError
from mi_weightspace.core.site import Site
from mi_weightspace.core.space import Space
from mi_weightspace.vpd.differences.host import ModuleDifferenceHost
from mi_weightspace.vpd.differences.updates import Start, Update, UpdateFacts


def module_difference(
    base: nn.Module, tuned: nn.Module, sites: Mapping[str, str], stage: str = "tuned"
) -> ModuleDifferenceHost:
    """The host of what changed between two modules at some of their linear layers.

    Every other parameter stays at the tuned module's value. A change of a layer's bias is one more
    column of its update. Layers that did not change are left out.

    Args:
        sites: name -> path of an `nn.Linear`, the same in both.

    Raises:
        SiteError: a path that is no `nn.Linear` in one of them, or not one layer changed.
        MismatchError: matrices of different shapes, or a bias in one of the two alone.
    """
    found, starts, changed = [], {}, {}
    for name, path in sites.items():
        before, after = _linear(base, name, path), _linear(tuned, name, path)
        _same_form(name, before, after)
        core = (after.weight - before.weight).detach()
        bias = None if before.bias is None else (after.bias - before.bias).detach()
        biased = bias is not None and bool(bias.any())
        if not biased and not bool(core.any()):
            continue
        facts = _facts(before.weight.detach(), core)
        if bias is not None and biased:
            core = torch.cat([core, bias[:, None]], dim=1)
        found.append(Update(_site(name, after), stage, core, facts, biased=biased))
        old = None if before.bias is None else before.bias.detach()
        starts[name], changed[name] = Start(before.weight.detach(), old), path
    if not found:
        raise SiteError(
            f"sites {list(sites)}",
            given="two modules whose layers there are equal",
            expected="at least one layer that differs",
            remedy="There is no change to decompose; check which modules were passed.",
        )
    return ModuleDifferenceHost(tuned, changed, found, starts)


def _linear(module: nn.Module, name: str, path: str) -> nn.Linear:
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise SiteError(
            f"site {name!r} of {type(module).__name__}",
            given=f"{type(layer).__name__} at {path!r}",
            expected="an nn.Linear",
            remedy="Only matrices can be decomposed; name the path of a linear layer.",
        )
    return layer


def _same_form(name: str, before: nn.Linear, after: nn.Linear) -> None:
    shapes = tuple(before.weight.shape), tuple(after.weight.shape)
    if shapes[0] != shapes[1] or (before.bias is None) != (after.bias is None):
        kinds = ["no bias" if layer.bias is None else "a bias" for layer in (before, after)]
        raise MismatchError(
            f"site {name!r}",
            given=f"{shapes[0]} with {kinds[0]} and {shapes[1]} with {kinds[1]}",
            expected="the same layer in both modules",
            remedy="A difference is defined between two states of one architecture.",
        )


def _facts(before: Float[Tensor, "d_out d_in"], change: Float[Tensor, "d_out d_in"]) -> UpdateFacts:
    """Sizes; neither module was rounded to a storage grid, so the edge is 0."""
    values = torch.linalg.svdvals(change)
    fro, base = float(change.norm()), float(before.norm())
    tolerance = float(values[0]) * max(change.shape) * torch.finfo(change.dtype).eps
    return UpdateFacts(
        fro=fro,
        relative=fro / base if base > 0 else float("inf"),
        top=float(values[0]),
        rank=int((values > tolerance).sum()),
        changed_fraction=float((change != 0).double().mean()),
        edge=0.0,
        storage=str(change.dtype).removeprefix("torch."),
        flag="none",
    )


def _site(name: str, layer: nn.Linear) -> Site:
    # a toy has no residual stream to speak of: any kind that writes to its own space will do
    d_out, d_in = layer.weight.shape
    return Site(name, "mlp.in", None, d_out, d_in, Space("mlp_in", 0), Space("mlp_hidden", 0))
