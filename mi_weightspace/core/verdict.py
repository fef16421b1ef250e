"""The words a verdict may use, and the evidence that gave the word (design §6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Word(StrEnum):
    WRITTEN_HERE = "written here"
    READ_HERE = "read here"
    STAGE_DISTRIBUTED = "stage wrote it, distributed"
    ALIGNED = "aligned"
    ALIGNED_NOT_SPECIFIC = "aligned, stage not specific"
    ALIGNED_NO_CONTROLS = "aligned, controls missing"
    ALIGNED_NUISANCE = "aligned but nuisance"
    NO_CHANGE = "no change"
    BELOW_FLOOR = "below rounding floor"
    NOT_SIGNIFICANT = "not significant"
    UNRESOLVED = "direction unresolved"
    UNDERPOWERED = "underpowered"
    AXIS_SPECIFIC = "axis-specific"
    NOT_AXIS_SPECIFIC = "not axis-specific"
    LOAD_BEARING = "load-bearing"
    NECESSARY_ONLY = "load-bearing, not shown sufficient"
    DETECTOR_ONLY = "detector only"
    GENERIC = "load-bearing, not specific"
    NOT_LOAD_BEARING = "not load-bearing"
    UNCONVERGED = "unconverged"
    NOT_DECOMPOSABLE = "not decomposable here"
    INSTRUMENT_TOO_WEAK = "INSTRUMENT TOO WEAK"
    PROMPT_OR_FINETUNING = "PROMPT OR FINETUNING, NOT MISALIGNMENT"
    NOT_DETECTED = "NOT DETECTED"
    NORM_NOT_DEFEATED = "NORM NOT DEFEATED"
    SAE_ADDS_NOTHING = "NORM DEFEATED, LINEAR PROBE NOT; SAE ADDS NOTHING"
    SAE_UNRESOLVED = "SAE DETECTS; ADVANTAGE UNRESOLVED"
    NON_LINEAR_CODE = "NON-LINEAR CODE; SAE IS ONE READOUT"
    SAE_ADVANTAGE = "SAE-SPECIFIC ADVANTAGE"


@dataclass(frozen=True)
class Verdict:
    """A word, the subject it is about, and the numbers that gave it.

    `subject` reads like ``sft / blocks.2.mlp.out / authority``; `reservations` are sentences.
    """

    word: Word
    subject: str
    evidence: dict[str, float | int | str | bool | None] = field(default_factory=dict)
    reservations: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.subject}: {self.word}"
