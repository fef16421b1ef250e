"""Probes of behaviours in activations: contrast data, mean-shift sweeps, linear probes.

Names load on first use: importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.bank import ProbeBank
    from probes.defer import fit
    from probes.dmu import DmuReport, dmu_sweep
    from probes.heads import head_shares

_HOME = {
    "DmuReport": "probes.dmu",
    "ProbeBank": "probes.bank",
    "dmu_sweep": "probes.dmu",
    "fit": "probes.defer",
    "head_shares": "probes.heads",
}

__all__ = ["DmuReport", "ProbeBank", "dmu_sweep", "fit", "head_shares"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
