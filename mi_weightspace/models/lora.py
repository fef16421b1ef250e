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
from mi_weightspace.models.config_file import MOST
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
        self._check_every_layer()
        if found:
            raise CheckpointError(
                f"adapter {self.folder}",
                given=f"factors for {min(found)!r}",
                expected=f"modules of the base model {self.base.name} ({self.shape.family})",
                remedy="Use the base model the adapter was trained on.",
            )

    def _check_every_layer(self) -> None:
        """Without a choice of layers, a module with factors has them in every layer.

        A missing pair would pass for a module that was not trained.
        """
        targets = self.config.get("target_modules")
        chosen = any(self.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
        if chosen or not isinstance(targets, list) or any(re.search(r"\.\d", t) for t in targets):
            return
        blocks = [(site.kind, module_path(site, self.shape)) for site in self.sites("blocks.*")]
        adapted = {kind for kind, path in blocks if path in self._factors}
        for kind, path in blocks:
            if kind in adapted and path not in self._factors:
                raise _odd_targets(self.folder, path, "no factors", "what the other layers have")

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
            if not isinstance(named, str) or not named:
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
    _check_numbers(folder, config)
    return config


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    """Ranks and scales, of the adapter and of single modules."""
    numbers: dict[str, Any] = {key: config.get(key) for key in ("lora_alpha", "r")}
    for pattern in ("alpha_pattern", "rank_pattern"):
        own = config.get(pattern) or {}
        if not isinstance(own, dict):
            raise _odd_config(folder, pattern, own, "an object of module patterns")
        for key, value in own.items():
            numbers[f"{pattern}[{key!r}]"] = value
            try:
                re.compile(key)
            except re.error as error:
                expected = f"a regular expression ({error})"
                raise _odd_config(folder, pattern, key, expected) from error
    for key, value in numbers.items():
        whole = key == "r" or key.startswith("rank_pattern")
        if whole and (type(value) is not int or not 1 <= value <= MOST):
            raise _odd_config(folder, key, value, "a rank: a whole number from 1")
        if type(value) not in (int, float) or not 0 < abs(value) < float("inf"):
            expected = "a finite number that is not 0: the product is scaled by lora_alpha / r"
            raise _odd_config(folder, key, value, expected)
    if not isinstance(config.get("use_rslora") or False, bool):
        raise _odd_config(folder, "use_rslora", config["use_rslora"], "true or false")


def _odd_config(folder: Path, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"adapter {folder}, adapter_config.json, {key}",
        given=f"{key} = {value!r}"[:120],
        expected=expected,
        remedy="Copy adapter_config.json again.",
    )


def _own(config: Mapping[str, Any], what: str, module: str, default: Any) -> Any:
    """peft's rule: the first pattern that matches the end of the module's path decides."""
    patterns: Mapping[str, Any] = config.get(what) or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(own, default)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _own(config, "alpha_pattern", module, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _load_factors(folder: Path, config: Mapping[str, Any]) -> dict[str, Factors]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():  # a pipe would be waited for
        raise _no_factors(folder, "no such file")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _no_factors(folder, str(error)) from error
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
        matrices = set(pair) == {"A", "B"} and all(half.ndim == 2 for half in pair.values())
        if not matrices or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(
                f"adapter {folder}, module {module}",
                given=f"factors {sorted((k, tuple(v.shape)) for k, v in pair.items())}",
                expected="lora_A (r, in) and lora_B (out, r) of one rank",
                remedy="The file is incomplete; copy or save the adapter again.",
            )
        rank = _own(config, "rank_pattern", module, config["r"])
        if pair["A"].shape[0] != rank:
            raise CheckpointError(
                f"adapter {folder}, module {module}",
                given=f"factors of rank {pair['A'].shape[0]}",
                expected=f"r = {rank} by adapter_config.json",
                remedy="The file and the configuration are of different saves; copy both again.",
            )
        scale = _scale(config, module, pair["A"].shape[0])
        # lora_A is (r, in) and lora_B (out, r) also under fan_in_fan_out: peft transposes the
        # product, not the factors, when it adds it to a Conv1D weight
        factors[module] = (pair["B"] * scale, pair["A"])
    _check_targets(folder, config, factors)
    return factors


def _no_factors(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"adapter {folder}",
        given=f"no readable {WEIGHTS} ({why})",
        expected="a folder written by peft's save_pretrained (safetensors)",
        remedy="Save the adapter again with safe_serialization=True.",
    )


def _check_targets(folder: Path, config: Mapping[str, Any], factors: Mapping[str, Factors]) -> None:
    """There are factors, and every module that has some is a target."""
    if not factors:
        raise _odd_targets(folder, WEIGHTS, "no factors", "lora_A and lora_B weights")
    targets = config.get("target_modules")
    if isinstance(targets, list) and all(isinstance(t, str) for t in targets):
        for module in factors:
            if not any(module == t or module.endswith(f".{t}") for t in targets):
                raise _odd_targets(folder, module, "factors", f"target_modules {targets}")
    elif targets is not None and not isinstance(targets, str):
        raise _odd_config(folder, "target_modules", targets, "a list of names, or a pattern")


def _odd_targets(folder: Path, name: str, given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"adapter {folder}, {name}",
        given=given,
        expected=expected,
        remedy="The file is incomplete or of another save; copy or save the adapter again.",
    )
