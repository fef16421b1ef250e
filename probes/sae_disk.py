"""SAELens' disk format, read and written without SAELens: works beside TransformerLens 4.

A folder holds ``cfg.json`` and ``sae_weights.safetensors``. Configurations written before SAELens
6 keep everything at the top level; they are read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mi_weightspace.core.errors import CheckpointError
from mi_weightspace.core.json_io import DamagedJson, parse_json, take
from mi_weightspace.core.output_io import writing
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.sae_parts import RULES, Convention, SaeMetadata, needed
from mi_weightspace.core.sealed_io import DamagedFile, file_hash, load_sealed, save_tensors

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
HASHES = "mi_weightspace_hashes.json"
"""Beside the two files of a folder written here: their SHA-256. SAELens does not know it."""
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
STOPS = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
"""Entries of a matching pursuit."""
_WHY_NOT = {
    "temporal": "its codes depend on earlier tokens",
}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "activation_fn_str": "activation_fn",
}
_REFUSED = {"normalize_activations": ("none", False, None), "reshape_activations": ("none", None)}


def read_folder(folder: str | Path) -> Sae:
    """An SAE saved by SAELens (or by `write_folder`), float32.

    Raises:
        CheckpointError: a missing, damaged or incomplete file, an architecture or an input
            normalisation that is not supported; names the file and the key.
        MismatchError: tensors whose shapes disagree, or that are not finite.
    """
    folder = Path(folder)
    for name in (CFG, WEIGHTS):
        if not (folder / name).is_file():
            raise _refusal(
                folder / name,
                given="no such file",
                expected=f"a folder with {CFG} and {WEIGHTS}",
                remedy="Save the SAE with SAELens' save_inference_model, or give release:id.",
            )
    _check_hashes(folder)
    try:
        config = parse_json((folder / CFG).read_bytes(), unique=True)
    except (DamagedJson, OSError) as error:
        raise _refusal(folder / CFG, given=f"no JSON ({error})", expected="SAELens' cfg") from error
    if not isinstance(config, dict):
        raise _refusal(folder / CFG, given=type(config).__name__, expected="a JSON object")
    try:
        tensors, _ = load_sealed(folder / WEIGHTS, "")
    except DamagedFile as error:
        raise _refusal(
            folder / WEIGHTS, given=f"a damaged file ({error})", expected="safetensors"
        ) from error
    _check_config(config, folder / CFG)
    return sae_of(config, tensors, str(folder))


def _check_hashes(folder: Path) -> None:
    """A folder written here is read as it was written, or not at all."""
    file = folder / HASHES
    if not file.is_file():
        return
    try:
        record = take({"files": parse_json(file.read_bytes())}, "files", "object")
        wanted = {name: take(record, name, "text") for name in (CFG, WEIGHTS)}
    except (DamagedJson, OSError) as error:
        raise _refusal(file, given=f"no record of hashes ({error})", expected="one") from error
    for name, digest in wanted.items():
        if file_hash(folder / name) != digest:
            raise _refusal(
                folder / name,
                given="a file that was altered since it was written",
                expected=f"the SHA-256 {digest[:12]}… of {HASHES}",
                remedy=f"Copy the folder again; where the change is yours, delete {HASHES}.",
            )


_TEXT = ("architecture", "hook_name", "hf_hook_name", "hook_name_out", "model_name",
         "difference_of", "training_architecture", "hook_point", "activation_fn",
         "activation_fn_str")  # fmt: skip
_FLAG = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "prepend_bos",
         "stop_on_duplicate_support")  # fmt: skip
_OBJECT = ("metadata", "training_architecture_details", "activation_fn_kwargs",
           "model_from_pretrained_kwargs")  # fmt: skip


def _check_config(config: Mapping[str, Any], where: Path) -> None:
    """Every entry that is read is of its kind; null stands for an absent one."""
    kinds = dict.fromkeys(_TEXT, str) | dict.fromkeys(_FLAG, bool) | dict.fromkeys(_OBJECT, dict)
    metadata = config.get("metadata")
    for record in (config, metadata if isinstance(metadata, dict) else {}):
        for key, kind in kinds.items():
            value = record.get(key)
            if value is not None and not isinstance(value, kind):
                raise _refusal(where, key, given=repr(value)[:80], expected=f"a {kind.__name__}")
        for key in ("training_architecture_details", "activation_fn_kwargs"):
            k = (record.get(key) or {}).get("k")
            if k is not None and (type(k) not in (int, float) or not 0 < k < 2**31):
                raise _refusal(where, f"{key}.k", given=repr(k)[:80], expected="a number")
    for key, kinds in (("residual_threshold", (int, float)), ("max_iterations", (int,))):
        value = config.get(key)
        if value is not None and type(value) not in kinds:
            raise _refusal(where, key, given=repr(value)[:80], expected=f"a {kinds[-1].__name__}")


def sae_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Sae:
    """From SAELens' configuration and state dict (of inference, or of a training checkpoint)."""
    settings, own = _settings(config), dict(tensors)
    where = Path(source) / CFG
    architecture = settings["architecture"]
    if architecture not in RULES and architecture not in BATCH_TOPK:
        why = _WHY_NOT.get(architecture, "its rule is not known here")
        raise _refusal(
            where,
            "architecture",
            given=f"{architecture!r}: {why}",
            expected=f"one of {sorted(RULES)} (batch-top-k and Matryoshka are saved as jumprelu)",
            remedy="Use an SAE that encodes each token by itself.",
        )
    for key, allowed in _REFUSED.items():
        if settings.get(key) not in allowed:
            raise _refusal(
                where,
                key,
                given=repr(settings[key]),
                expected="'none'",
                remedy="Fold it into the weights first (SAELens: fold_activation_norm_scaling_"
                "factor, fold_activation_whitening), or use another SAE.",
            )
    architecture, settings, own = _as_inference(architecture, settings, own)
    _drop_scaling(own, Path(source) / WEIGHTS)
    _check_keys(architecture, own, settings, Path(source))
    own = {name: value.to(torch.float32) for name, value in own.items()}
    return Sae(
        architecture,
        **({"W_enc": own["W_dec"].mT} if RULES[architecture] == "pursuit" else {}),
        **own,
        k=settings.get("k") if "topk" in architecture else None,
        apply_b_dec_to_input=bool(settings.get("apply_b_dec_to_input", True))
        and "transcoder" not in architecture,
        rescale_acts_by_decoder_norm="topk" in architecture
        and bool(settings.get("rescale_acts_by_decoder_norm", False)),
        **{name: settings[name] for name in STOPS if settings.get(name) is not None},
        metadata=_metadata(settings.get("metadata") or {}, source),
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the layout of SAELens 6."""
    if "metadata" in config and "architecture" in config:
        return dict(config)
    old = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    old.setdefault("architecture", "standard")
    kwargs = old.get("activation_fn_kwargs") or {}
    if old.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        old |= {"architecture": "topk", "k": kwargs["k"]}
    hook_z = "hook_z" in (old.get("hook_name") or "")
    old.setdefault("reshape_activations", "hook_z" if hook_z else "none")
    if old.get("normalize_activations") is True:
        old["normalize_activations"] = "expected_average_only_in"
    old.setdefault("prepend_bos", True)
    return {**old, "metadata": old}


def _as_inference(
    architecture: str, settings: dict[str, Any], own: dict[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Training checkpoints of batch-top-k as the jumprelu SAE they are used as."""
    if "log_threshold" in own:
        own["threshold"] = own.pop("log_threshold").exp()
    if architecture not in BATCH_TOPK:
        return architecture, settings, own
    if settings.get("rescale_acts_by_decoder_norm", True) and {"W_dec", "W_enc", "b_enc"} <= {*own}:
        norm = own["W_dec"].norm(dim=-1).clamp(min=1e-8)
        own |= {"W_enc": own["W_enc"] * norm, "b_enc": own["b_enc"] * norm}
        own["W_dec"] = own["W_dec"] / norm[:, None]
    if "topk_threshold" in own and "b_enc" in own:
        threshold = own.pop("topk_threshold").item()
        own["threshold"] = torch.ones_like(own["b_enc"]) * threshold
    metadata = dict(settings.get("metadata") or {})
    metadata.setdefault("training_architecture", architecture)
    metadata.setdefault("training_architecture_details", {"k": settings.get("k")})
    return "jumprelu", {**settings, "metadata": metadata}, own


def _drop_scaling(own: dict[str, Tensor], where: Path) -> None:
    """Files of an older SAELens carry a factor of ones; any other would change the codes."""
    for key in ("scaling_factor", "finetuning_scaling_factor"):
        factor = own.pop(key, None)
        if factor is not None and not bool(torch.allclose(factor, torch.ones_like(factor))):
            raise _refusal(where, key, given="factors that are not one", expected="none, or ones")


def _check_keys(
    architecture: str, own: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path
) -> None:
    wanted = needed(architecture)
    allowed = {*wanted, *(("W_skip",) if "skip" in architecture else ())}
    for key in wanted:
        if key not in own:
            raise _refusal(
                folder / WEIGHTS, key, given="no such tensor", expected=f"the tensors {wanted}"
            )
    unknown = sorted({*own} - allowed)
    if unknown:
        raise _refusal(
            folder / WEIGHTS,
            unknown[0],
            given=f"a tensor that {architecture} SAEs do not have",
            expected=f"the tensors {sorted(allowed)}",
        )
    k = settings.get("k")
    if "topk" in architecture and type(k) is not int:
        raise _refusal(folder / CFG, "k", given=repr(k), expected="a whole number")
    encoder = own["W_enc"].shape if "W_enc" in own else own["W_dec"].shape[::-1]
    if len(encoder) != 2:
        raise _refusal(
            folder / WEIGHTS, "W_enc, W_dec", given=f"shape {tuple(encoder)}", expected="matrices"
        )
    for key, size in zip(("d_in", "d_sae"), encoder, strict=True):
        if settings.get(key) not in (None, size):
            raise _refusal(
                folder / CFG,
                key,
                given=repr(settings[key]),
                expected=f"{size}, as the weights have",
            )


def _metadata(record: Mapping[str, Any], source: str) -> SaeMetadata:
    details = record.get("training_architecture_details") or {}
    trained = record.get("training_architecture") or ""
    k = details.get("k") if trained in BATCH_TOPK else None
    length = record.get("context_size")
    return SaeMetadata(
        hook_name=record.get("hook_name") or "",
        hf_hook_name=record.get("hf_hook_name") or "",
        hook_name_out=record.get("hook_name_out") or "",
        model_name=record.get("model_name") or "",
        prepend_bos=record.get("prepend_bos"),
        context_size=length if isinstance(length, int) and length > 0 else None,
        convention=_convention(record.get("model_from_pretrained_kwargs")),
        trained_k=None if k is None else float(k),
        trained_architecture=trained,
        difference_of=record.get("difference_of") or "",
        source=source,
    )


def _convention(kwargs: Any) -> Convention:
    """SAELens loads without processing, unless its keyword arguments ask for some."""
    if not isinstance(kwargs, Mapping):
        return "unknown"
    return "centred" if kwargs.get("center_writing_weights") else "raw"


def config_of(sae: Sae) -> dict[str, Any]:
    """SAELens' configuration of an SAE."""
    own = sae.metadata
    record: dict[str, Any] = {
        name: getattr(own, name)
        for name in ("hook_name", "hf_hook_name", "hook_name_out", "model_name", "difference_of")
        if getattr(own, name)
    }
    for name in ("prepend_bos", "context_size"):
        if getattr(own, name) is not None:
            record[name] = getattr(own, name)
    if own.convention != "unknown":
        centred = {"center_writing_weights": True} if own.convention == "centred" else {}
        record["model_from_pretrained_kwargs"] = centred
    if own.trained_architecture:
        record["training_architecture"] = own.trained_architecture
        record["training_architecture_details"] = {"k": own.trained_k}
    config: dict[str, Any] = {
        "architecture": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"} | record,
    }
    if sae.rule in ("topk", "abstopk"):
        config["k"] = sae.k
        config["rescale_acts_by_decoder_norm"] = sae.rescale_acts_by_decoder_norm
    if sae.rule == "pursuit":
        config |= {name: getattr(sae, name) for name in STOPS}
    if not sae.reconstructs:
        config["d_out"] = sae.d_out
    return config


def write_folder(sae: Sae, folder: str | Path) -> Path:
    """Write the folder SAELens' ``SAE.load_from_disk`` reads; without its last file, `CFG`, it
    loads nowhere, and every file appears whole.

    Raises:
        OutputError: a place that cannot be written.
    """
    folder = Path(folder)
    with writing(folder, "SAE folder"):
        _write(sae, folder)
    return folder


def _write(sae: Sae, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    staged = {name: folder / f".{name}.partial" for name in (WEIGHTS, HASHES, CFG)}
    try:
        own = sae.saved_tensors()
        save_tensors({k: v.contiguous().cpu() for k, v in own.items()}, staged[WEIGHTS])
        staged[CFG].write_text(json.dumps(config_of(sae), indent=2))
        hashes = {name: file_hash(staged[name]) for name in (CFG, WEIGHTS)}
        staged[HASHES].write_text(json.dumps(hashes, indent=2))
        (folder / CFG).unlink(missing_ok=True)  # of an SAE that stood here before
        for name, partial in staged.items():
            partial.rename(folder / name)
    finally:
        for partial in staged.values():
            partial.unlink(missing_ok=True)


def _refusal(
    file: Path,
    key: str = "",
    *,
    given: str,
    expected: str,
    remedy: str = "Save the SAE again with SAELens, or download it again.",
) -> CheckpointError:
    subject = f"{file}, {key}" if key else str(file)
    return CheckpointError(subject, given=given, expected=expected, remedy=remedy)
