"""Train a small SAE on the spot, on a model's own activations or on the difference of two stages.

The loop steps SAELens' `SAETrainer` (loss, optimiser, schedules and dead-latent bookkeeping are
its own); what is added is the stream of activations, checkpoints without pickles, and a run that
continues where it was broken off with the very same result. Every batch is a function of the seed
and the step, so nothing but the trainer's state is saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    OutputError,
    PromptError,
)
from mi_weightspace.core.hook_names import hook_of_space
from mi_weightspace.core.json_io import DamagedJson, parse_json, take
from mi_weightspace.core.output_io import writing
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.seeds import derive
from mi_weightspace.core.space import Space
from mi_weightspace.models.lens import Lens
from probes.sae_disk import BATCH_TOPK, CFG, read_folder, write_folder
from probes.sae_fit import model_name
from probes.sae_io import trained, trainer_for
from probes.sae_state import STATE, check_record, restore, save
from probes.sae_stream import Activations
from probes.sae_tokens import Ids, Prompts, token_ids

RECORD = "training.json"
K = 16
LEVEL_TOKENS = 4_096
"""Tokens on which the threshold of a batch-top-k SAE is set to the k it was trained with."""


@dataclass(frozen=True)
class SaeSettings:
    """How a small SAE is trained.

    Attributes:
        architecture: any that SAELens trains.
        k: active latents a token, of the top-k architectures (default `K`); of
            ``matching_pursuit`` the most iterations.
        l1: sparsity coefficient of ``standard`` and ``gated``, L0 coefficient of ``jumprelu``
            (default 1). Activations are centred and scaled to norm √d first, so that neither it
            nor `lr` depends on the model's units.
        batch: tokens a step; fewer where the prompts have fewer.
        checkpoint_every: steps between checkpoints, where there is a folder.
        options: further fields of SAELens' training configuration.
    """

    d_sae: int
    architecture: str = "topk"
    k: int | None = None
    l1: float | None = None
    steps: int = 1_500
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0
    checkpoint_every: int = 250
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("d_sae", "steps", "batch", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "at least 1")
        if not 0 < self.lr < 1:
            raise _bad("lr", self.lr, "between 0 and 1")
        counted = "topk" in self.architecture or self.architecture == "matching_pursuit"
        if self.k is not None and not (counted and 0 < self.k < self.d_sae):
            raise _bad("k", self.k, "between 1 and d_sae, for a top-k architecture or a pursuit")
        if self.l1 is not None and (counted or self.l1 < 0):
            raise _bad("l1", self.l1, "not negative, for an architecture without k")

    def fields(self, d_in: int) -> dict[str, Any]:
        """SAELens' configuration."""
        own: dict[str, Any] = {"d_in": d_in, "d_sae": self.d_sae}
        k = min(K, self.d_sae // 2) if self.k is None else self.k
        if self.architecture == "matching_pursuit":
            own |= {"max_iterations": max(1, k), "decoder_init_norm": 1.0}
        elif "topk" in self.architecture:
            own["k"] = float(k) if self.architecture in BATCH_TOPK else k
        elif self.architecture in ("standard", "gated"):
            own["l1_coefficient"] = 1.0 if self.l1 is None else self.l1
        elif self.architecture == "jumprelu":
            own["l0_coefficient"] = 1.0 if self.l1 is None else self.l1
        if self.architecture == BATCH_TOPK[1]:
            own["matryoshka_widths"] = [self.d_sae // 4, self.d_sae // 2, self.d_sae]
        return own | dict(self.options)


def train_sae(
    lens: Lens,
    prompts: Prompts,
    point: str | Space,
    *,
    d_sae: int,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Sae:
    """An SAE of the model's own activations at one point, every token but the first of a prompt.

    Args:
        point: ``resid_post.5`` or another `Space`.
        folder: where checkpoints go, and the SAE in SAELens' format at the end. Ctrl-C, or a kill,
            costs at most ``checkpoint_every`` steps.
        resume: continue (or read) what is in `folder`; the result is that of the unbroken run.
        settings: see `SaeSettings` (``k``, ``l1``, ``architecture``, ``steps``, ``lr``, …).

    Raises:
        CheckpointError: SAELens cannot be imported, or a damaged checkpoint.
        ConfigError: settings out of range, or other ones than the run to be continued has.
        PromptError: prompts this model cannot read, or too few tokens.
        OutputError: a folder that holds a run, without `resume`.
        DivergedError: the loss left the finite numbers.
    """
    options = SaeSettings(d_sae, **settings)
    return _train(lens, None, prompts, point, options, folder, resume, progress)


def train_diff_sae(
    base: Lens,
    tuned: Lens,
    prompts: Prompts,
    point: str | Space,
    *,
    d_sae: int,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Sae:
    """The same on ``tuned − base``, token by token; read it with ``read_stage(…, base=base)``.

    Raises:
        PromptError: the two do not differ on these prompts; and see `train_sae`.
    """
    options = SaeSettings(d_sae, **settings)
    return _train(tuned, base, prompts, point, options, folder, resume, progress)


def _train(
    lens: Lens,
    base: Lens | None,
    prompts: Prompts,
    point: str | Space,
    settings: SaeSettings,
    folder: str | Path | None,
    resume: bool,
    progress: bool,
) -> Sae:
    target = None if folder is None else Path(folder)
    ids, space = token_ids(lens, prompts), Space.parse(point).canonical
    record = _record(settings, lens, base, ids, space)
    if target is not None and _finished(target, resume, record):
        return read_folder(target)
    source = Activations(lens, base, ids, space.name, settings.batch, settings.seed)
    first = source.chunk(0)
    trainer = _trainer(settings, source, first)
    _loop(trainer, source, settings, target, record, f"SAE at {space}", progress)
    sae = trained(
        trainer,
        f"trained at {space}",
        hook_name=hook_of_space(space),
        model_name=model_name(lens),
        convention="raw",
        difference_of="" if base is None else f"{_label(lens)} − {_label(base)}",
    )
    if settings.architecture in BATCH_TOPK:
        # the threshold saved is a slow running mean: far too low after a short training
        sae = sae.with_l0(first[:LEVEL_TOKENS].cpu(), float(trainer.sae.cfg.k))
    if target is not None:
        write_folder(sae, target)
        (target / STATE).unlink(missing_ok=True)
    return sae


def _trainer(settings: SaeSettings, source: Activations, first: Float[Tensor, "m d"]) -> Any:
    """The trainer, its SAE at the mean of the first chunk, in units of the spread about it."""
    mean = first.mean(0)
    spread = float((first - mean).norm(dim=1).mean())
    if spread <= 1e-6 * float(first.norm(dim=1).mean()):
        raise PromptError(
            f"activations at {source.name}",
            given="one and the same vector at every token",
            expected="activations (or differences) that vary",
            remedy="Check that the two stages differ, or give other prompts.",
        )
    return trainer_for(
        settings.architecture,
        settings.fields(first.shape[1]),
        samples=settings.steps * source.batch,
        batch=source.batch,
        lr=settings.lr,
        seed=derive(settings.seed, "sae init"),
        device=first.device,
        mean=mean,
        scale=first.shape[1] ** 0.5 / spread,
    )


def _loop(
    trainer: Any,
    source: Activations,
    settings: SaeSettings,
    folder: Path | None,
    record: Mapping[str, Any],
    label: str,
    progress: bool,
) -> None:
    from rich.progress import track

    start = 0 if folder is None else restore(trainer, folder / STATE, record)
    for step in track(range(start, settings.steps), label, disable=not progress, transient=True):
        out = trainer.step(source.at(step))
        trainer.n_training_steps += 1
        if not bool(torch.isfinite(out.loss)):
            raise DivergedError(
                "SAE training",
                given=f"a loss that is not finite at step {step}",
                expected="a finite loss",
                remedy="Lower lr" + ("." if folder is None else f"; {folder} has a checkpoint."),
            )
        if folder is not None and (step + 1) % settings.checkpoint_every == 0:
            save(trainer, folder / STATE, record)


def _finished(folder: Path, resume: bool, record: Mapping[str, Any]) -> bool:
    """Open a run folder; whether the run in it is done."""
    if not resume and folder.exists() and any(folder.iterdir()):
        raise OutputError(
            f"output folder {folder}",
            given="a folder that is not empty",
            expected="a new folder, or resume=True",
            remedy="Choose another folder, or continue the run in it.",
        )
    with writing(folder, "output folder"):
        folder.mkdir(parents=True, exist_ok=True)
    note = folder / RECORD
    if (folder / CFG).exists() and note.exists():
        try:
            found = take({"run": parse_json(note.read_bytes())}, "run", "object")
        except DamagedJson as error:
            raise CheckpointError(
                str(note),
                given=f"no record of a run ({error})",
                expected="the one written by train_sae",
                remedy="Remove the folder and train again.",
            ) from error
        check_record(found, record, str(note))
        (folder / STATE).unlink(missing_ok=True)  # of a run killed behind its last step
        return True
    with writing(folder, "output folder"):
        note.write_text(json.dumps(record, indent=2))
    return False


def _record(
    settings: SaeSettings, lens: Lens, base: Lens | None, ids: Sequence[Ids], space: Space
) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    own = {name: value for name, value in vars(settings).items() if name != "checkpoint_every"}
    return json.loads(
        json.dumps(
            {
                **own,
                "options": dict(settings.options),
                "point": space.name,
                "model": lens.fingerprint,
                "base": None if base is None else base.fingerprint,
                "prompts": hashlib.sha256(repr(list(ids)).encode()).hexdigest()[:16],
            }
        )
    )


def _label(lens: Lens) -> str:
    return model_name(lens) or lens.fingerprint


def _bad(name: str, given: Any, expected: str) -> ConfigError:
    return ConfigError(
        name, given=repr(given), expected=expected, remedy="See probes.sae_train.SaeSettings."
    )
