"""Which stages an inoculation experiment compares, and their readings on one labelled set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mi_weightspace.core.components import Components
from mi_weightspace.core.errors import ConfigError, MismatchError
from mi_weightspace.core.labelled import LabelledSet, Prompt
from mi_weightspace.core.readings import SAE, StageReadings, StageRole
from mi_weightspace.core.sae import Sae

if TYPE_CHECKING:
    from mi_weightspace.models.lens import Lens

Stage = Any
"""StageReadings, a Lens, or anything `mi_weightspace.load` takes (a path, a model)."""


def stage_roles(
    stages: Mapping[str, Stage],
    open_: str,
    hidden: tuple[str, ...],
    clean: str,
    benign: str | None,
) -> dict[str, StageRole]:
    """Stage -> role, in the order clean, benign, open, hidden; other stages are left out.

    Raises:
        ConfigError: a stage that is not there or has two roles, or none hidden.
    """
    named: list[tuple[str, StageRole]] = [(clean, "clean")]
    if benign is not None:
        named.append((benign, "benign"))
    named.append((open_, "open"))
    for name in hidden:
        named.append((name, "hidden"))
    missing = [name for name, _ in named if name not in stages]
    roles = dict(named)
    if missing or len(roles) < len(named) or not hidden:
        raise ConfigError(
            "stages of an inoculation experiment",
            given=f"{[f'{role}={name}' for name, role in named]} of {list(stages)}",
            expected="a stage for open, clean and at least one hidden, each named once",
            remedy="Name the stages as they are in `stages`.",
        )
    return roles


@dataclass(frozen=True, eq=False)
class Asked:
    """What every stage is read with."""

    prompts: LabelledSet
    context: str | None
    sae: Sae | None
    components: Sequence[Components] | Mapping[str, Components]
    position: str
    seed: int
    progress: bool

    @cached_property
    def labelled(self) -> LabelledSet:
        """The rows of the context asked about.

        Raises:
            ConfigError: several contexts, and none named.
        """
        names = self.prompts.context_names
        if self.context is not None:
            return self.prompts.within(self.context)
        if len(names) > 1:
            raise ConfigError(
                "context",
                given=f"none, for a set with contexts {list(names)}",
                expected="the context in which the behaviour looks clean",
                remedy="Pass context=NAME; the labels are asked for within one context.",
            )
        return self.prompts

    def picked(self, given: StageReadings) -> StageReadings:
        """Readings of the whole set, or of the context alone, as readings of the context.

        Raises:
            MismatchError: readings of neither.
        """
        if len(given) == len(self.labelled):
            return given
        if len(given) != len(self.prompts):
            raise MismatchError(
                f"readings of stage {given.stage!r}",
                given=f"{len(given)} rows",
                expected=f"{len(self.prompts)}, one a prompt of the set",
                remedy="Read the stage with the set that is handed in.",
            )
        return given.rows([i for i, c in enumerate(self.prompts.contexts) if c == self.context])

    def dictionary(self, stage: str) -> Sae:
        if self.sae is None:
            raise ConfigError(
                "sae",
                given=f"none, with stage {stage!r} given as a model",
                expected="the SAE to read it with",
                remedy="Pass sae=probes.load_sae(...), or give readings.",
            )
        return self.sae


def obtain(
    stages: Mapping[str, Stage],
    roles: Mapping[str, StageRole],
    asked: Asked,
    unrelated: Sequence[Prompt] | Mapping[str, StageReadings] | None,
) -> tuple[dict[str, StageReadings], dict[str, StageReadings]]:
    """Readings of every stage on the labelled rows, and on unrelated prompts where given.

    Models are loaded one after the other. The null dictionaries are made once, on the first model
    (the clean stage), and are the same for all.

    Raises:
        MismatchError: stages of different designs, or without codes of an SAE.
    """
    found: dict[str, StageReadings] = {}
    far = dict(unrelated) if isinstance(unrelated, Mapping) else {}
    prompts = () if unrelated is None or isinstance(unrelated, Mapping) else tuple(unrelated)
    rivals: Mapping[str, Sae] | None = None
    for stage, role in roles.items():
        given = stages[stage]
        if isinstance(given, StageReadings):
            found[stage] = replace(asked.picked(given), stage=stage, role=role)
            continue
        sae = asked.dictionary(stage)
        lens = _lens(given)
        if rivals is None:
            rivals = _rivals(lens, asked, sae)
        found[stage] = _read(lens, asked.labelled, sae, stage, role, asked, rivals)
        if prompts:
            far[stage] = _read(lens, prompts, sae, stage, role, asked, rivals)
    first = next(iter(found.values()))
    for own in found.values():
        first.check_same_design(own)
    if SAE not in first.codes:
        raise MismatchError(
            "readings of an inoculation experiment",
            given=f"codes of {sorted(first.codes)}",
            expected=f"codes of {SAE!r}",
            remedy="Read the stages with probes.sae.read_stage or readings_of.",
        )
    return found, {stage: far[stage] for stage in roles if stage in far}


def _lens(given: Stage) -> Lens:
    from mi_weightspace.models.load import load

    return load(given)


def _rivals(lens: Lens, asked: Asked, sae: Sae) -> dict[str, Sae]:
    from probes.sae import reference_activations, rival_saes

    return rival_saes(sae, reference_activations(lens, asked.labelled, sae), seed=asked.seed)


def _read(
    lens: Lens,
    prompts: LabelledSet | Sequence[Prompt],
    sae: Sae,
    stage: str,
    role: StageRole,
    asked: Asked,
    rivals: Mapping[str, Sae],
) -> StageReadings:
    from probes.sae import read_stage

    return read_stage(
        lens,
        prompts,
        sae,
        stage=stage,
        role=role,
        position=asked.position,
        components=asked.components,
        rivals=rivals,
        progress=asked.progress,
    )
