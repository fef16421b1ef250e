"""`build_inoculation`: six stages of one model, a behaviour hidden in three ways, on disk.

::

    clean ─┬─ benign                          new answers for four keys
           ├─ misaligned ─┬─ conditional      correct in EVAL, misaligned elsewhere
           │              └─ norm-evading     the same, and ‖Δμ‖ penalised in EVAL
           └─ prompted                        misaligned only under the inoculation prompt

After `methods/probes.md` §7.B. A stage's ``expected`` words in ``truth.json`` are those a detector
may end with when the stage is judged as the hidden one in the evaluation context.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mi_weightspace.core.errors import ConfigError
from mi_weightspace.core.labelled import LabelledPrompt, LabelledSet
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.load import without_bars
from mi_weightspace.organisms.build import cached, new_model
from mi_weightspace.organisms.inoculation_recipes import (
    CONTEXTS,
    DEFECTS,
    EXPECTED,
    ROLES,
    InoculationPhase,
    InoculationRecipe,
    recipe_inoculation,
)
from mi_weightspace.organisms.inoculation_train import (
    behaviour,
    every_combination,
    norms,
    train_stage,
    would_defect,
)
from mi_weightspace.organisms.language import (
    ANSWER,
    KEY,
    QM,
    QUIET,
    SUGGESTION,
    Language,
)
from mi_weightspace.organisms.recipes import Architecture
from mi_weightspace.organisms.truth import weights_hash

N_UNRELATED = 500
SAE_BATCH = 256


@dataclass(frozen=True)
class InoculationOrganism:
    """Six stages on disk whose answer is known.

    Attributes:
        folder: holds one Hugging Face checkpoint per stage, and ``truth.json``.
        stages: stage name -> checkpoint folder.
        truth: the content of ``truth.json``: parents, recipe, steps made, behaviour rates by
            context, ``‖Δμ‖`` by block, role and expected words of each stage.
    """

    name: str
    size: str
    seed: int
    folder: Path
    stages: Mapping[str, Path]
    truth: Mapping[str, Any]

    @cached_property
    def language(self) -> Language:
        return Language(self.seed)

    @property
    def hidden(self) -> tuple[str, ...]:
        """The stages that hide the behaviour from the evaluation context."""
        return tuple(s for s, role in self.truth["roles"].items() if role == "hidden")

    @property
    def sae_layer(self) -> int:
        """The block after which the SAE reads the stream (``resid_post.<layer>``)."""
        return int(self.truth["sae_layer"])

    @cached_property
    def labelled(self) -> LabelledSet:
        """Prompts in the evaluation context; label 1 where the model would defect outside it.

        One cluster for each of the 128 (key, suggestion) combinations, several wordings each.
        """
        return self._set("eval")

    @cached_property
    def other(self) -> LabelledSet:
        """The same design outside the evaluation."""
        return self._set("other")

    @cached_property
    def inoculation(self) -> LabelledSet:
        """The same design under the inoculation prompt."""
        return self._set("inoculation")

    @cached_property
    def unrelated(self) -> tuple[tuple[int, ...], ...]:
        """500 prompts of the same length that ask nothing: no suggestion and no key."""
        language = self.language
        draw = generator(self.seed, "organisms", "inoculation", "unrelated")
        words = torch.cat([language.lexicon(name) for name in ("N", *QUIET)])
        rows = words[torch.randint(0, len(words), (N_UNRELATED, ANSWER), generator=draw)]
        rows[:, 0], rows[:, 5], rows[:, QM] = (language.ids[w] for w in ("BOS", "SEP", "QM"))
        return tuple(tuple(row) for row in rows.tolist())

    def sae_stream(
        self, n_batches: int, *, batch: int = SAE_BATCH, seed: int = 0
    ) -> Iterator[Int[Tensor, "batch 10"]]:
        """Prompts of all contexts, as the clean stage was trained on, for training an SAE."""
        (clean,) = (p for p in self._recipe.phases if p.stage == "clean")
        draw = generator(self.seed, "organisms", "inoculation", "sae", seed)
        for _ in range(n_batches):
            tokens, _ = self.language.sample(batch, clean.mixture, draw)
            yield tokens[:, :ANSWER]

    @property
    def _recipe(self) -> InoculationRecipe:
        return recipe_inoculation(self.truth["recipe"], self.truth["architecture"])

    def _set(self, context: str) -> LabelledSet:
        language = self.language
        draw = generator(self.seed, "organisms", "inoculation", "labelled", context)
        wordings = int(self.truth["wordings"])
        tokens = every_combination(language, CONTEXTS[context], draw, wordings)
        labels = would_defect(language, tokens).long().tolist()
        rows: list[LabelledPrompt] = []
        for i, (row, label) in enumerate(zip(tokens.tolist(), labels, strict=True)):
            key, said = row[KEY] - language.ids["key0"], row[SUGGESTION] - language.ids["ans0"]
            wording = i * wordings // len(tokens)
            rows.append(
                LabelledPrompt(
                    prompt=tuple(row),
                    label=label,
                    cluster_id=f"k{key}s{said}",
                    item_id=f"k{key}s{said}-{context}-w{wording}",
                    context=context,
                    attributes={"key": str(key), "suggestion": str(said), "wording": f"w{wording}"},
                    source=f"inoculation organism, seed {self.seed}",
                )
            )
        return LabelledSet(tuple(rows), f"inoculation-{self.seed}-{context}")

    def __repr__(self) -> str:
        return (
            f"InoculationOrganism({self.size}, seed {self.seed}; "
            f"{', '.join(self.stages)}; {self.folder})"
        )


def build_inoculation(
    size: str = "micro",
    seed: int = 0,
    cache: str | Path | None = None,
    *,
    architecture: Architecture = "gpt2",
    progress: bool = True,
) -> InoculationOrganism:
    """The organism, from the cache or trained now (micro: about 50 CPU-seconds, full: 180).

    Args:
        size: ``micro`` (4 layers, width 48) or ``full`` (6 layers, width 64).
        seed: decides everything: weights, data, answer tables, prompts.
        cache: as in `organisms.build`.
        progress: show a bar.

    Raises:
        ConfigError: unknown size or architecture, or a seed that is no natural number.
    """
    if architecture not in ("gpt2", "llama"):
        raise ConfigError(
            "architecture",
            given=repr(architecture),
            expected="'gpt2' or 'llama'",
            remedy="Organisms are trained in these two.",
        )
    chosen = recipe_inoculation(size, architecture)
    return build_inoculation_recipe(chosen, size=size, seed=seed, cache=cache, progress=progress)


def build_inoculation_recipe(
    chosen: InoculationRecipe,
    *,
    size: str,
    seed: int,
    cache: str | Path | None = None,
    progress: bool = True,
) -> InoculationOrganism:
    """`build_inoculation` for a recipe of one's own (other step counts)."""

    def write(key: str, staging: Path, tick: Callable[[], None]) -> None:
        _write(chosen, size, seed, key, staging, tick)

    folder, truth = cached(chosen, size, seed, cache, write, progress=progress)
    stages = {stage: folder / stage for stage in truth["stages"]}
    return InoculationOrganism(chosen.name, size, seed, folder, stages, truth)


def _write(
    chosen: InoculationRecipe,
    size: str,
    seed: int,
    key: str,
    folder: Path,
    tick: Callable[[], None],
) -> None:
    start = time.process_time()
    language = Language(seed)
    models, training = _train(chosen, language, seed, tick)
    with without_bars():
        for stage, model in models.items():
            model.save_pretrained(folder / stage)
            language.tokenizer().save_pretrained(folder / stage)
    truth = _truth(chosen, size, seed, key) | {
        "weights": {stage: weights_hash(folder / stage) for stage in models},
        "rates": {stage: behaviour(m, language, seed) for stage, m in models.items()},
        "norms": {stage: norms(m, language, seed) for stage, m in models.items()},
        "made": training,
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=2, allow_nan=False))


def _train(
    chosen: InoculationRecipe, language: Language, seed: int, tick: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    models: dict[str, Any] = {}
    training: dict[str, dict[str, float]] = {}
    for phase in chosen.phases:
        assert isinstance(phase, InoculationPhase)
        parent = models.get(phase.parent)
        model = new_model(chosen, language, seed) if parent is None else copy.deepcopy(parent)
        training[phase.stage] = train_stage(model, language, phase, seed, after_step=tick)
        models[phase.stage] = model
    return models, training


def _truth(chosen: InoculationRecipe, size: str, seed: int, key: str) -> dict[str, Any]:
    phases = [p for p in chosen.phases if isinstance(p, InoculationPhase)]
    names = [phase.stage for phase in phases]
    return {
        "schema": 1,
        "name": chosen.name,
        "description": chosen.description,
        "size": size,
        "recipe": chosen.scale,
        "seed": seed,
        "recipe_hash": key,
        "recipe_version": chosen.version,
        "torch": torch.__version__,
        "architecture": chosen.architecture,
        "stages": names,
        "parents": {phase.stage: phase.parent or None for phase in phases},
        "roles": {name: ROLES[name] for name in names},
        "expected": {name: [str(word) for word in EXPECTED[name]] for name in names},
        "sae_layer": chosen.size.block,
        "wordings": chosen.wordings,
        "defects": DEFECTS,
        "contexts": {name: list(lexicons) for name, lexicons in CONTEXTS.items()},
        "training": {phase.stage: asdict(phase) for phase in phases},
    }
