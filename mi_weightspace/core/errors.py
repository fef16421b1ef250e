"""Refusals. Each names the object, what was given, what was expected, and the remedy."""

from __future__ import annotations


class WeightspaceError(ValueError):
    """Base of every refusal of this library; the command line turns it into exit code 1.

    Args:
        subject: the object refused (a path, a site, a prompt set, an argument name).
        given: what was found.
        expected: what would have been accepted.
        remedy: what the user can do about it.
    """

    def __init__(self, subject: str, *, given: str, expected: str, remedy: str) -> None:
        self.subject, self.given, self.expected, self.remedy = subject, given, expected, remedy
        super().__init__(f"{subject}: got {given}; expected {expected}. {remedy}")

    def __reduce__(self) -> tuple[object, ...]:
        """Refusals raised in a worker process reach the parent whole."""
        return _rebuild, (type(self), self.subject, self.given, self.expected, self.remedy)


def _rebuild(
    kind: type[WeightspaceError], subject: str, given: str, expected: str, remedy: str
) -> WeightspaceError:
    return kind(subject, given=given, expected=expected, remedy=remedy)


class CheckpointError(WeightspaceError):
    """A checkpoint that is missing, truncated, non-finite, quantised or in a refused format."""


class ProcessedWeightsError(WeightspaceError):
    """Folded, centred or refactored weights: their difference is not the difference trained."""


class MismatchError(WeightspaceError):
    """Two stages that cannot be compared: architecture, shapes, vocabulary, tokenizer."""


class ArchitectureError(WeightspaceError):
    """A model whose family has no grammar table, or whose table fails its behaviour check."""


class SiteError(WeightspaceError):
    """A site name or pattern that matches nothing."""


class PromptError(WeightspaceError):
    """Prompts that cannot carry the asked statistic."""


class DirectionError(WeightspaceError):
    """A direction of the wrong width, zero, non-finite, or in another space."""


class ConventionError(WeightspaceError):
    """A stored direction or probe used on a model of another weight convention."""


class OutputError(WeightspaceError):
    """An output folder that cannot be written, already holds a run, or fails its hashes."""


class ConfigError(WeightspaceError):
    """A configuration value that is out of range or contradicts another."""


class DivergedError(WeightspaceError):
    """Training that left the finite numbers; the last checkpoint is kept."""
