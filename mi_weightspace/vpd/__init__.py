"""VPD: adversarial parameter decomposition of a model's own matrices (vpd.md).

    config = vpd.Config(sites=("blocks.*.mlp.*",), n_components=512)
    parts = vpd.decompose(model, tokens, config)

Names load on first use: importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_weightspace.vpd.card import Card
    from mi_weightspace.vpd.config import VPDConfig as Config
    from mi_weightspace.vpd.config import read_config
    from mi_weightspace.vpd.decomposition import Decomposition
    from mi_weightspace.vpd.differences.host import DifferenceHost, ModuleDifferenceHost
    from mi_weightspace.vpd.differences.result import DifferenceDecomposition
    from mi_weightspace.vpd.differences.run import decompose_difference
    from mi_weightspace.vpd.exchange import export_components, import_components
    from mi_weightspace.vpd.host import LensHost, ModuleHost
    from mi_weightspace.vpd.planning import plan
    from mi_weightspace.vpd.run import decompose

_HOME = {
    "Config": ("config", "VPDConfig"),
    "read_config": ("config", "read_config"),
    "decompose": ("run", "decompose"),
    "Decomposition": ("decomposition", "Decomposition"),
    "Card": ("card", "Card"),
    "decompose_difference": ("differences.run", "decompose_difference"),
    "DifferenceDecomposition": ("differences.result", "DifferenceDecomposition"),
    "DifferenceHost": ("differences.host", "DifferenceHost"),
    "ModuleDifferenceHost": ("differences.host", "ModuleDifferenceHost"),
    "export_components": ("exchange", "export_components"),
    "import_components": ("exchange", "import_components"),
    "LensHost": ("host", "LensHost"),
    "ModuleHost": ("host", "ModuleHost"),
    "plan": ("planning", "plan"),
}

__all__ = [
    "Card",
    "Config",
    "Decomposition",
    "DifferenceDecomposition",
    "DifferenceHost",
    "LensHost",
    "ModuleDifferenceHost",
    "ModuleHost",
    "decompose",
    "decompose_difference",
    "export_components",
    "import_components",
    "plan",
    "read_config",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, attribute = _HOME[name]
        return getattr(import_module(f"mi_weightspace.vpd.{module}"), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
