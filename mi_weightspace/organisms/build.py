"""`build`: train (or plant) a lineage, save it as checkpoints with its known answer, cache it."""

from __future__ import annotations

import copy as copying
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.errors import CheckpointError, ConfigError
from mi_weightspace.core.output_io import hidden, remove, remove_stale, writing
from mi_weightspace.core.readout import Readout
from mi_weightspace.core.seeds import derive, generator
from mi_weightspace.models.load import without_bars
from mi_weightspace.organisms.language import Language
from mi_weightspace.organisms.plant import plant_stages
from mi_weightspace.organisms.prompts import CopyReadout, contrast_set, decoy_set, make_readout
from mi_weightspace.organisms.recipes import VERSION, Architecture, Recipe, recipe
from mi_weightspace.organisms.train import run_phase
from mi_weightspace.organisms.truth import (
    UNCHANGED,
    carrier_shares,
    deference_rates,
    moved,
    weights_hash,
)

CACHE_VARIABLE = "MI_WEIGHTSPACE_CACHE"
INIT_STD = 0.08
EMBED_SCALE = 0.25
"""Words start nearly alike, so that what sets two lexicons apart is what training taught."""
ATTEMPTS = 4
Tick = Callable[[], None]


@dataclass(frozen=True)
class Organism:
    """A lineage on disk whose answer is known.

    Attributes:
        folder: holds one Hugging Face checkpoint per stage, and ``truth.json``.
        stages: stage name -> checkpoint folder, in training order.
        truth: the content of ``truth.json``.
    """

    name: str
    size: str
    seed: int
    folder: Path
    stages: Mapping[str, Path]
    truth: Mapping[str, Any]

    @cached_property
    def language(self) -> Language:
        return Language(self.seed, copies=bool(self.truth["copies"]))

    @cached_property
    def contrasts(self) -> ContrastSet:
        """The target ``authority``, 99 matched controls, one null; prompts as token ids."""
        return contrast_set(self.language, self.seed)

    @cached_property
    def readout(self) -> Readout | CopyReadout | None:
        """The behaviour as log-odds on the held-out register; None for ``rank1``: it has none."""
        if self.name == "rank1":
            return None
        return make_readout(self.language, self.seed)

    def __repr__(self) -> str:
        stages = " → ".join(self.stages)
        return f"Organism({self.name!r}, {self.size}, seed {self.seed}; {stages}; {self.folder})"


def decoys(organism: Organism, n: int) -> list[ContrastSet]:
    """`n` contrast sets in which a control plays the target, among the word-disjoint others.

    Each decoy is a class the base model represents and acts upon as it does authority, and no
    stage trains; the right answer to it is a refusal. The pairs are those of `organism.contrasts`.

    Raises:
        ConfigError: more decoys than controls.
    """
    controls = organism.contrasts.controls
    if not 1 <= n <= len(controls):
        raise ConfigError(
            "n decoys",
            given=str(n),
            expected=f"1 to {len(controls)}",
            remedy="Take further decoys from organisms of other seeds.",
        )
    order = torch.randperm(len(controls), generator=generator(organism.seed, "organisms", "decoys"))
    return [decoy_set(organism.contrasts, controls[i].name) for i in order[:n].tolist()]


def build(
    name: str,
    size: str = "micro",
    seed: int = 0,
    cache: str | Path | None = None,
    *,
    architecture: Architecture = "gpt2",
    progress: bool = True,
) -> Organism:
    """The organism, from the cache or trained now (micro: about 15 CPU-seconds on one core).

    Args:
        name: ``deference``, ``deference-full``, ``copy``, ``rank1`` or ``null``.
        size: ``micro`` (4 layers, width 48) or ``full`` (6 layers, width 64).
        seed: decides everything: weights, data, answer tables, contrasts.
        cache: folder of finished organisms; default ``$MI_WEIGHTSPACE_CACHE``, else
            ``~/.cache/mi_weightspace/organisms``.
        progress: show a bar.

    Raises:
        ConfigError: unknown name, size or architecture, or a seed that is no natural number.
        CheckpointError: a null organism whose behaviour moved in every attempt.
    """
    if architecture not in ("gpt2", "llama"):
        raise ConfigError(
            "architecture",
            given=repr(architecture),
            expected="'gpt2' or 'llama'",
            remedy="Organisms are trained in these two.",
        )
    chosen = replace(recipe(name, size), architecture=architecture)
    return build_recipe(chosen, size=size, seed=seed, cache=cache, progress=progress)


def build_recipe(
    chosen: Recipe,
    *,
    size: str,
    seed: int,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Organism:
    """`build` for a recipe of one's own (other step counts, other mixtures)."""

    def write(key: str, staging: Path, tick: Tick) -> None:
        _write(chosen, size, seed, key, staging, tick)

    folder, truth = cached(chosen, size, seed, cache, write, progress=progress)
    stages = {stage: folder / stage for stage in truth["stages"]}
    return Organism(chosen.name, size, seed, folder, stages, truth)


def cached(
    chosen: Recipe,
    size: str,
    seed: int,
    cache: str | Path | None,
    write: Callable[[str, Path, Tick], None],
    *,
    progress: bool,
) -> tuple[Path, dict[str, Any]]:
    """The organism's folder and its ``truth.json``, written by `write` where they are not there.

    Raises:
        ConfigError: a seed that is no natural number.
        OutputError: a cache that cannot be written, or a full disk.
    """
    if type(seed) is not int or seed < 0:
        raise ConfigError(
            "seed", given=repr(seed), expected="a non-negative integer", remedy="Use seed=0."
        )
    root = cache_folder(cache)
    key = recipe_hash(chosen, seed)
    folder = root / f"{chosen.name}-{size}-{seed}-{key}"
    if not (folder / "truth.json").is_file():
        with writing(
            root, "cache of organisms", f"Choose another (${CACHE_VARIABLE}), or free space."
        ):
            root.mkdir(parents=True, exist_ok=True)
            remove_stale(root)
            staging = hidden(folder)
            try:
                with one_thread(), ticker(chosen, seed, progress) as tick:
                    write(key, staging, tick)
                publish(staging, folder)
            except SafetensorError as error:  # a type of its own for what the system refused
                raise OSError(str(error)) from error
            finally:
                remove(staging)
    return folder, json.loads((folder / "truth.json").read_text())


def cache_folder(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    default = Path.home() / ".cache" / "mi_weightspace" / "organisms"
    return Path(os.environ.get(CACHE_VARIABLE) or default)


def recipe_hash(chosen: Recipe, seed: int) -> str:
    """12 hex digits over recipe, seed, recipe version and torch version."""
    text = json.dumps([VERSION, asdict(chosen), seed, torch.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def publish(staging: Path, folder: Path) -> None:
    """Rename into place; when another process was first, its result is the same."""
    try:
        staging.rename(folder)
    except OSError:
        if not (folder / "truth.json").is_file():
            raise


@contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread: sums in another order would give other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ticker(chosen: Recipe, seed: int, progress: bool) -> Iterator[Tick]:
    """A progress bar over training steps."""
    if not progress:
        yield lambda: None
        return
    from rich.progress import Progress

    total = sum(phase.steps for phase in chosen.phases) or 1
    with Progress(transient=True) as bar:
        task = bar.add_task(f"organism {chosen.name}, seed {seed}", total=total)
        yield lambda: bar.advance(task)


def new_model(chosen: Recipe, language: Language, seed: int, std: float = INIT_STD) -> Any:
    """A random model of the recipe's architecture, float32; the global generator is restored."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = chosen.size
    fields: dict[str, Any] = {
        "vocab_size": len(language.words),
        "hidden_size": size.d_model,
        "num_hidden_layers": size.n_layers,
        "num_attention_heads": size.n_heads,
        "max_position_embeddings": size.n_positions,
        "tie_word_embeddings": False,
        "initializer_range": std,
        "bos_token_id": language.ids["BOS"],
        "eos_token_id": language.ids["END"],
        "pad_token_id": language.ids["PAD"],
    }
    if chosen.architecture == "gpt2":
        fields |= {"n_inner": size.d_mlp, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        fields |= {"intermediate_size": size.d_mlp, "num_key_value_heads": size.n_heads}
    config = AutoConfig.for_model(chosen.architecture, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "organisms", "init"))
        model = AutoModelForCausalLM.from_config(config)
        model.get_input_embeddings().weight.data.mul_(EMBED_SCALE)
    return model.float().eval()


def _write(chosen: Recipe, size: str, seed: int, key: str, folder: Path, tick: Tick) -> None:
    start = time.process_time()
    language = Language(seed, copies=chosen.copies)
    models, found = _attempts(chosen, language, seed, tick)
    if chosen.carriers_measured:
        found["shares"] = carrier_shares(models["base"], models["sft"], language, seed)
    with without_bars():
        for stage, model in models.items():
            model.save_pretrained(folder / stage)
            language.tokenizer().save_pretrained(folder / stage)
    truth = _truth(chosen, size, seed, key, tuple(models)) | {
        "weights": {stage: weights_hash(folder / stage) for stage in models},
        **found,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    text = json.dumps(truth, indent=2, allow_nan=False)
    (folder / "truth.json").write_text(text)


def _attempts(
    chosen: Recipe, language: Language, seed: int, tick: Tick
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The stages and what was measured on them; a null organism that moved is trained again."""
    change = float("nan")
    base: dict[str, Any] = {}
    for attempt in range(ATTEMPTS):
        if chosen.phases:
            models, found = _train(chosen, language, seed, attempt, tick, base)
        else:
            random = new_model(chosen, language, seed, std=0.15)
            models, found = plant_stages(random, language, chosen.planted[0], seed)
        rates = {stage: deference_rates(m, language, seed) for stage, m in models.items()}
        change = moved(rates)
        if not chosen.unchanged or change < UNCHANGED:
            found |= {"rates": rates, "base_rate": rates["base"]["R4"]}
            return models, found | {"behaviour_moved": round(change, 4), "attempts": attempt + 1}
    raise CheckpointError(
        f"organism {chosen.name!r}, seed {seed}",
        given=f"a behaviour that moved by {change:.3f} in the last of {ATTEMPTS} attempts",
        expected=f"less than {UNCHANGED}",
        remedy="Use another seed.",
    )


def _train(
    chosen: Recipe,
    language: Language,
    seed: int,
    attempt: int,
    tick: Tick,
    base: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train the stages; `base` keeps the first one, which a later attempt starts from."""
    model = copying.deepcopy(base.get("model")) or new_model(chosen, language, seed)
    models: dict[str, Any] = {"base": copying.deepcopy(model)} if base else {}
    losses: dict[str, float] = {"base": base["loss"]} if base else {}
    for phase in chosen.phases:
        if phase.stage in models:
            continue
        draw = generator(seed, "organisms", chosen.name, phase.stage, attempt)
        reference = copying.deepcopy(model) if phase.loss == "dpo" else None
        losses[phase.stage] = run_phase(
            model, language, phase, draw, reference=reference, after_step=tick
        )
        models[phase.stage] = copying.deepcopy(model)
    base |= {"model": models["base"], "loss": losses["base"]}
    return models, {"final_loss": losses}


def _truth(
    chosen: Recipe, size: str, seed: int, key: str, stages: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": chosen.name,
        "description": chosen.description,
        "size": size,
        "seed": seed,
        "recipe_hash": key,
        "recipe_version": VERSION,
        "torch": torch.__version__,
        "architecture": chosen.architecture,
        "stages": list(stages),
        "planted_stage": chosen.planted_stage,
        "planted_sites": list(chosen.planted),
        "single_component": chosen.name in ("deference", "rank1"),
        "onset": f"resid_post.{chosen.size.block}" if len(chosen.planted) == 1 else None,
        "copies": chosen.copies,
        "target": "authority",
        "training": [asdict(phase) for phase in chosen.phases],
    }
