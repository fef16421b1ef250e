"""PEFT LoRA adapters as factored weight sources: never merged, so no rounding floor.

``ΔW = s · B A`` with ``s = lora_alpha / r`` (``lora_alpha / √r`` for rsLoRA), in the orientation of
the adapted module; adapters on Conv1D modules (``fan_in_fan_out``) are transposed, adapters on
fused matrices are cut into the sites' own rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import CheckpointError, MismatchError
from mi_weightspace.core.site import Site
from mi_weightspace.models.checkpoint import read_json, refuse_non_finite
from mi_weightspace.models.grammar import (
    ModelShape,
    module_path,
    part_of,
    row_index,
    stored_shape,
)
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
        self.folder = Path(self.folder)
        self.shape: ModelShape = self.base.shape
        self.name = str(self.folder)
        self.config = _read(self.folder)
        found = _load_factors(self.folder, self.config)
        self._factors: dict[str, Factors] = {}
        for site in self.sites():
            path = module_path(site, self.shape)
            disk = part_of(site, self.shape).key(site.layer).removesuffix(".weight")
            for name in {path, disk} & set(found):
                self._factors[path] = found.pop(name)
            if path in self._factors:
                self._check(site, self._factors[path])
        if found:
            raise CheckpointError(
                f"adapter {self.folder}",
                given=f"factors for {min(found)!r}",
                expected=f"modules of the base model {self.base.name} ({self.shape.family})",
                remedy="Use the base model the adapter was trained on.",
            )

    def _check(self, site: Site, factors: Factors) -> None:
        whole = stored_shape(site, self.shape)
        rows = whole[0] if part_of(site, self.shape).layout == "linear" else whole[1]
        given = (factors[0].shape[0], factors[1].shape[1])
        if given != (rows, site.d_in):
            raise MismatchError(
                f"adapter {self.folder}, module {module_path(site, self.shape)}",
                given=f"factors of a {given} matrix",
                expected=f"({rows}, {site.d_in}) as in the base model {self.base.name}",
                remedy="Use the base model the adapter was trained on.",
            )

    @classmethod
    def open(cls, folder: str | Path, base: CheckpointSource | None = None) -> AdapterSource:
        """Open an adapter folder; its base is the one its configuration names, unless given.

        Raises:
            CheckpointError: no base given and none named, or whatever is wrong with either folder.
        """
        path = Path(folder)
        if base is None:
            named = _read(path).get("base_model_name_or_path")
            if not named:
                raise CheckpointError(
                    f"adapter {path}",
                    given="no base_model_name_or_path (it was trained on a model in memory)",
                    expected="the folder or hub id of the base model",
                    remedy="Use AdapterSource.open(FOLDER, base=CheckpointSource(BASE)), or write "
                    "the base's path into adapter_config.json.",
                )
            base = CheckpointSource(named)
        return cls(base, path)

    @property
    def path(self) -> Path:
        """The adapter's folder."""
        return self.folder

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
        """The base's own tensor where no adapter sits, else the float32 sum (it is on no disk)."""
        site = self.site(site)
        if not self.factors(site)[0].shape[1]:
            return self.base.stored(site)
        return self.weight(site)

    def weight(self, site: Site | str) -> Float[Tensor, "d_out d_in"]:
        b, a = self.factors(site)
        return self.base.weight(site).addmm_(b, a)

    def extras(self) -> Iterator[tuple[str, Tensor]]:
        return self.base.extras()

    def bias(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.base.bias(site)

    def read_gain(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self.base.read_gain(site)

    def read_shift(self, site: Site | str) -> Float[Tensor, " d_in"] | None:
        return self.base.read_shift(site)

    def write_gain(self, site: Site | str) -> Float[Tensor, " d_out"] | None:
        return self.base.write_gain(site)


_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # pissa, olora, corda, loftq and lora_ga also change the base's own matrix
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


def _read(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, refused where the change is not plain low rank."""
    config = read_json(folder / "adapter_config.json", "a folder written by peft")
    odd = [key for key, good in _PLAIN.items() if config.get(key, good[0]) not in (None, *good)]
    odd += [key for key in _UNSUPPORTED if config.get(key)]
    if odd:
        raise CheckpointError(
            f"adapter {folder}",
            given=f"{odd[0]} = {config[odd[0]]!r}",
            expected="a plain LoRA or rsLoRA adapter (no DoRA, no fully trained modules)",
            remedy="Merge it with peft's merge_and_unload(), save, and compare checkpoints.",
        )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise CheckpointError(
            f"adapter {folder}",
            given=f"lora_alpha = {config.get('lora_alpha')!r}",
            expected="a number: the scale of the product is lora_alpha / r",
            remedy="Copy adapter_config.json again.",
        )
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """peft's rule: the first pattern that matches the end of the module's path decides."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(own, config["lora_alpha"])
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
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(
                f"adapter {folder}, module {module}",
                given=f"factors {sorted((k, tuple(v.shape)) for k, v in pair.items())}",
                expected="lora_A (r, in) and lora_B (out, r) of one rank",
                remedy="The file is incomplete; copy or save the adapter again.",
            )
        scale = _scale(config, module, pair["A"].shape[0])
        # lora_A is (r, in) and lora_B (out, r) also under fan_in_fan_out: peft transposes the
        # product, not the factors, when it adds it to a Conv1D weight
        factors[module] = (pair["B"] * scale, pair["A"])
    return factors
