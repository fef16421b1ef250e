"""Probes of behaviours in activations: contrast data, mean-shift sweeps, linear probes.

Names load on first use: importing this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.activations import from_cache, prompt_list
    from probes.bank import ProbeBank
    from probes.datasets_io import load_contrasts, to_jsonl
    from probes.defer import fit
    from probes.dmu import DmuReport, dmu_sweep
    from probes.features import decoder_directions
    from probes.gate_interventions import orthogonalised
    from probes.gate_report import GateReport
    from probes.gates import gate
    from probes.heads import head_shares
    from probes.inoculation_report import InoculationReport
    from probes.inoculation_verdict import published_detection
    from probes.inoculations import InoculationSettings, inoculation
    from probes.labelled_io import load_labelled
    from probes.labelling import confounds, two_sets
    from probes.prompt_audit import AuditReport, audit
    from probes.prompts import as_chat, builtin
    from probes.readout import FlipReport, flip_rate, option_margin
    from probes.sae import read_stage
    from probes.sae_io import load_sae
    from probes.sae_train import train_diff_sae, train_sae

_HOME = {
    "AuditReport": "probes.prompt_audit",
    "DmuReport": "probes.dmu",
    "FlipReport": "probes.readout",
    "GateReport": "probes.gate_report",
    "InoculationReport": "probes.inoculation_report",
    "InoculationSettings": "probes.inoculations",
    "ProbeBank": "probes.bank",
    "as_chat": "probes.prompts",
    "audit": "probes.prompt_audit",
    "builtin": "probes.prompts",
    "confounds": "probes.labelling",
    "decoder_directions": "probes.features",
    "dmu_sweep": "probes.dmu",
    "fit": "probes.defer",
    "flip_rate": "probes.readout",
    "from_cache": "probes.activations",
    "gate": "probes.gates",
    "head_shares": "probes.heads",
    "inoculation": "probes.inoculations",
    "load_contrasts": "probes.datasets_io",
    "load_labelled": "probes.labelled_io",
    "load_sae": "probes.sae_io",
    "option_margin": "probes.readout",
    "orthogonalised": "probes.gate_interventions",
    "prompt_list": "probes.activations",
    "published_detection": "probes.inoculation_verdict",
    "read_stage": "probes.sae",
    "to_jsonl": "probes.datasets_io",
    "train_diff_sae": "probes.sae_train",
    "train_sae": "probes.sae_train",
    "two_sets": "probes.labelling",
}

__all__ = [
    "AuditReport",
    "DmuReport",
    "FlipReport",
    "GateReport",
    "InoculationReport",
    "InoculationSettings",
    "ProbeBank",
    "as_chat",
    "audit",
    "builtin",
    "confounds",
    "decoder_directions",
    "dmu_sweep",
    "fit",
    "flip_rate",
    "from_cache",
    "gate",
    "head_shares",
    "inoculation",
    "load_contrasts",
    "load_labelled",
    "load_sae",
    "option_margin",
    "orthogonalised",
    "prompt_list",
    "published_detection",
    "read_stage",
    "to_jsonl",
    "train_diff_sae",
    "train_sae",
    "two_sets",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
