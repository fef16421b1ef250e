"""Which training stage wrote this behaviour's direction into which matrix, and how sure are we?

The face of the library. Names load on first use: importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_weightspace import organisms, vpd
    from mi_weightspace.core.components import Components
    from mi_weightspace.core.direction import Direction
    from mi_weightspace.core.report import Report, load_report
    from mi_weightspace.core.site import Site
    from mi_weightspace.core.space import Space
    from mi_weightspace.models import toy
    from mi_weightspace.models.lineage import Lineage, load_lineage
    from mi_weightspace.models.load import load
    from mi_weightspace.spectral.project import project
    from mi_weightspace.spectral.stages import attribute_stages
    from mi_weightspace.spectral.svd import svd

_HOME = {
    "load": "mi_weightspace.models.load",
    "load_lineage": "mi_weightspace.models.lineage",
    "svd": "mi_weightspace.spectral.svd",
    "project": "mi_weightspace.spectral.project",
    "attribute_stages": "mi_weightspace.spectral.stages",
    "load_report": "mi_weightspace.core.report",
    "Site": "mi_weightspace.core.site",
    "Space": "mi_weightspace.core.space",
    "Direction": "mi_weightspace.core.direction",
    "Components": "mi_weightspace.core.components",
    "Lineage": "mi_weightspace.models.lineage",
    "Report": "mi_weightspace.core.report",
}
_MODULES = {
    "organisms": "mi_weightspace.organisms",
    "toy": "mi_weightspace.models.toy",
    "vpd": "mi_weightspace.vpd",
}

__all__ = [
    "Components",
    "Direction",
    "Lineage",
    "Report",
    "Site",
    "Space",
    "attribute_stages",
    "load",
    "load_lineage",
    "load_report",
    "organisms",
    "project",
    "svd",
    "toy",
    "vpd",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
