"""PEFT LoRA adapters as factored weight sources: never merged, so no rounding floor.

``ΔW = s · B A`` with ``s = lora_alpha / r`` (``lora_alpha / √r`` for rsLoRA), in the orientation of
the adapted module; adapters on Conv1D modules (``fan_in_fan_out``) are transposed, adapters on
fused matrices are cut into the sites' own rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import CheckpointError
from mi_weightspace.core.site import Site
from mi_weightspace.models.checkpoint import refuse_non_finite
from mi_weightspace.models.grammar import ModelShape, module_path, row_index
from mi_weightspace.models.weights import CheckpointSource, Factors, _BySite

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight$")


@dataclass(eq=False)
class AdapterSource(_BySite):
    """A base checkpoint with a LoRA adapter on it.

    `weight` is the base's matrix plus the product, in float32; `factors` gives (B, A), scaled.
    """

    base: CheckpointSource
    folder: Path
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.shape: ModelShape = self.base.shape
        self.name = str(self.folder)
        self.config = _read(self.folder)
        self._factors = _load_factors(self.folder, self.config)
        known = {module_path(site, self.shape) for site in self.sites()}
        stray = sorted(set(self._factors) - known)
        if stray:
            raise CheckpointError(
                f"adapter {self.folder}",
                given=f"factors for {stray[0]!r}",
                expected=f"modules of the base model {self.base.name} ({self.shape.family})",
                remedy="Use the base model the adapter was trained on.",
            )

    @classmethod
    def open(cls, folder: str | Path, base: CheckpointSource | None = None) -> AdapterSource:
        """Open an adapter folder; its base is the one its configuration names, unless given."""
        path = Path(folder)
        if base is None:
            base = CheckpointSource(_read(path)["base_model_name_or_path"])
        return cls(base, path)

    @property
    def fingerprint(self) -> str:
        import hashlib

        with (self.folder / WEIGHTS).open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return f"{self.base.fingerprint}+{own}"

    def factors(self, site: Site | str) -> Factors:
        """(B (d_out, r), A (r, d_in)), scaled; r = 0 for a matrix without an adapter."""
        site = self.site(site)
        found = self._factors.get(module_path(site, self.shape))
        if found is None or site.kind == "embed":
            return torch.zeros(site.d_out, 0), torch.zeros(0, site.d_in)
        b, a = found
        rows = row_index(site, self.shape)
        return (b if rows is None else b[rows]), a

    def stored(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        return self.weight(site)

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        b, a = self.factors(site)
        return self.base.weight(site).addmm_(b, a)

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.base.bias(site)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self.base.read_gain(site)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.base.write_gain(site)


def _read(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, refused where the change is not plain low rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    refusals = {
        "peft_type": config.get("peft_type", "LORA") != "LORA",
        "use_dora": bool(config.get("use_dora")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "bias": config.get("bias", "none") != "none",
    }
    for key, refused in refusals.items():
        if refused:
            raise CheckpointError(
                f"adapter {folder}",
                given=f"{key} = {config.get(key)!r}",
                expected="a plain LoRA or rsLoRA adapter (no DoRA, no fully trained modules)",
                remedy="Merge it with peft's merge_and_unload(), save, and compare checkpoints.",
            )
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _load_factors(folder: Path, config: Mapping[str, Any]) -> dict[str, Factors]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        tensors = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(
            f"adapter {folder}",
            given=f"no readable {WEIGHTS} ({error})",
            expected="a folder written by peft's save_pretrained (safetensors)",
            remedy="Save the adapter again with safe_serialization=True.",
        ) from error
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise CheckpointError(
                f"adapter {folder}",
                given=f"tensor {key!r}",
                expected="lora_A and lora_B weights only",
                remedy="Merge it with peft's merge_and_unload(), save, and compare checkpoints.",
            )
        checked = refuse_non_finite(tensor, key, str(folder)).float()
        halves.setdefault(match[1], {})[match[2]] = checked
    factors: dict[str, Factors] = {}
    for module, pair in halves.items():
        scale = _scale(config, module, pair["A"].shape[0])
        # lora_A is (r, in) and lora_B (out, r) also under fan_in_fan_out: peft transposes the
        # product, not the factors, when it adds it to a Conv1D weight
        factors[module] = (pair["B"] * scale, pair["A"])
    return factors
