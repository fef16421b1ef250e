"""SAEs in and out of SAELens. The only file that names that library; it loads on first use.

A local folder needs no SAELens at all (`probes.sae_disk`). The published experiment of
inoculation and SAE features most likely used `SEED_EXPERIMENT`: Gemma Scope 2 on Gemma 3 1B (the
only size with a layer 13), layer 13, 16k latents, jumprelu. With the weights at hand::

    sae = probes.load_sae(SEED_EXPERIMENT)           # hook blocks.13.hook_resid_post
    lens = mw.load("google/gemma-3-1b-it")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import CheckpointError, ConfigError
from mi_weightspace.core.sae import Sae
from probes.sae_disk import BATCH_TOPK, config_of, read_folder, sae_of, write_folder

SEED_EXPERIMENT = "gemma-scope-2-1b-it-res:layer_13_width_16k_l0_medium"
"""``release:id`` of Gemma Scope 2: gemma-3-1b-it, residual stream after block 13, 16,384 latents,
L0 about 60. Its siblings end in ``l0_small`` (20) and ``l0_big`` (150)."""
TRAINABLE = ("standard", "gated", "topk", "abstopk", "jumprelu", *BATCH_TOPK, "matching_pursuit")


def load_sae(source: Any) -> Sae:
    """An SAE from wherever it is, in float32 on the CPU.

    Args:
        source: a folder saved by SAELens; ``"release:sae_id"`` of its registry (or
            ``"owner/repo:folder"``), which needs SAELens and the network or its cache; a live
            SAELens object, in training or not; an `Sae` (returned as it is).

    Raises:
        CheckpointError: what is wrong with the file, the name or the object, and its remedy.
        MismatchError: tensors whose shapes disagree, or that are not finite.
    """
    if isinstance(source, Sae):
        return source
    if isinstance(source, str | Path):
        if Path(source).is_dir() or isinstance(source, Path) or ":" not in source:
            return read_folder(source)
        release, _, sae_id = source.partition(":")
        return from_release(release, sae_id)
    if any(cls.__module__.partition(".")[0] == "sae_lens" for cls in type(source).__mro__):
        return from_object(source, f"{type(source).__name__} object")
    raise CheckpointError(
        f"SAE of type {type(source).__name__}",
        given="an object that is none of SAELens'",
        expected="a folder, 'release:sae_id', a SAELens object or an Sae",
        remedy="Save it in SAELens' format, or build an Sae from its tensors.",
    )


def save_sae(sae: Sae, folder: str | Path) -> Path:
    """Write a folder that SAELens' ``SAE.load_from_disk`` and `load_sae` both read."""
    return write_folder(sae, folder)


def sae_lens() -> Any:
    """The library.

    Raises:
        CheckpointError: it cannot be imported.
    """
    try:
        import sae_lens as library
    except ImportError as error:
        raise CheckpointError(
            "SAELens",
            given=f"a failed import ({error})",
            expected="the package sae_lens, which needs transformer_lens below 4",
            remedy="Install mi-weightspace[sae], or save the SAE to a folder once and give that.",
        ) from error
    return library


def from_release(release: str, sae_id: str) -> Sae:
    """An SAE of SAELens' registry.

    Raises:
        CheckpointError: no SAELens, an unknown release or id, or no network and nothing cached.
    """
    library = sae_lens()
    try:
        found = library.SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"SAE {release}:{sae_id}",
            given=f"{type(error).__name__}: {error}",
            expected="a release and id of SAELens' registry, reachable or in the local cache",
            remedy="Check the name, the network and the licence of the repository; a folder "
            "copied from another machine is read without either.",
        ) from error
    return from_object(found, f"{release}:{sae_id}")


def from_object(found: Any, source: str) -> Sae:
    """A live SAELens object, in training or not; its weights are copied."""
    tensors = {name: value.detach().clone() for name, value in found.state_dict().items()}
    found.process_state_dict_for_saving(tensors)
    own = {name: value.cpu() for name, value in tensors.items()}
    return sae_of(found.cfg.to_dict(), own, source)


def to_saelens(sae: Sae) -> Any:
    """The same as a SAELens object, for its tools.

    Raises:
        CheckpointError: SAELens cannot be imported.
    """
    library = sae_lens()
    made = library.SAE.from_dict(config_of(sae))
    made.load_state_dict({name: value.clone() for name, value in sae.saved_tensors().items()})
    return made


def trainer_for(
    architecture: str,
    options: Mapping[str, Any],
    *,
    samples: int,
    batch: int,
    lr: float,
    seed: int,
    device: torch.device,
    mean: Float[Tensor, " d_in"],
    scale: float,
) -> Any:
    """A fresh `SAETrainer` whose SAE starts at the data's mean; the global generator is untouched.

    Args:
        options: fields of SAELens' training configuration (``d_in``, ``d_sae``, ``k``, …).
        scale: what activations are multiplied by; folded into the weights after training.

    Raises:
        ConfigError: an architecture SAELens does not train, or that is not supported here.
        CheckpointError: SAELens cannot be imported.
    """
    if architecture not in TRAINABLE:
        raise ConfigError(
            "architecture",
            given=repr(architecture),
            expected=f"one of {sorted(TRAINABLE)}",
            remedy="The default, 'topk', needs no penalty to be tuned.",
        )
    sae_lens()
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class

    made, settings = get_sae_training_class(architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae = made(settings(**options)).to(device)
    with torch.no_grad():
        sae.b_dec.copy_(mean.to(sae.b_dec) * scale)
    steps = samples // batch
    config = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=batch,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=steps // 20 if steps >= 40 else 0,
        lr_decay_steps=steps // 5,
        device=str(device),
        dead_feature_window=max(1, steps // 10),
        feature_sampling_window=steps + 1,
    )
    trainer = SAETrainer(config, sae, iter(()))
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def trained(trainer: Any, source: str, **metadata: Any) -> Sae:
    """The SAE of a trainer that is done, its scaling folded into the weights."""
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.activation_scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    trainer.sae.eval()
    return from_object(trainer.sae, source).described(**metadata)
