"""What one stage's activations and codes are on a labelled prompt set: pooled numbers, no model.

Rows are prompts, in the order of the labelled set they were read with; labels and clusters stay
with that set. Codes are encoded token by token and then pooled (never the code of a pooled vector).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.errors import MismatchError, PromptError
from mi_weightspace.core.space import Space

StageRole = Literal["clean", "benign", "open", "hidden"]
SAE, RANDOM_SAE, ROTATED_SAE = "sae", "random sae", "rotated sae"


@dataclass(frozen=True, eq=False)
class StageReadings:
    """Pooled activations of one stage, and what dictionaries make of them.

    Attributes:
        stage: name of the training stage.
        role: what it is in the comparison: ``clean`` (never trained to misbehave), ``benign``
            (trained as long, on harmless data), ``open`` (misbehaves openly), ``hidden``.
        dense: (n, d) pooled activations at `space`.
        space: where they were taken; None for activations of unknown origin.
        codes: name of a dictionary (``sae``, ``random sae``, ``rotated sae``) -> (n, d_sae).
        reconstruction: (n, d) pooled reconstruction by the SAE, or None.
        components: name of handed-in components -> (n, k) pooled activations of their read side.
        facts: ``n_tokens, l0, dead_share, fvu`` of the SAE on this stage, as far as known.
        model_hash, position: provenance.

    Raises:
        MismatchError: parts of different numbers of rows, or a reconstruction of another width.
        PromptError: fewer than two rows, or values that are not finite.
    """

    stage: str
    role: StageRole
    dense: Float[Tensor, "n d"]
    space: Space | None = None
    codes: Mapping[str, Float[Tensor, "n d_sae"]] = field(default_factory=dict)
    reconstruction: Float[Tensor, "n d"] | None = None
    components: Mapping[str, Float[Tensor, "n k"]] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    model_hash: str = ""
    position: str = ""

    def __post_init__(self) -> None:
        subject = f"readings of stage {self.stage!r}"
        if self.role not in get_args(StageRole):
            raise MismatchError(
                subject,
                given=f"role {self.role!r}",
                expected=f"one of {get_args(StageRole)}",
                remedy="Say what the stage is in the comparison.",
            )
        parts = self.parts()
        for name, part in parts.items():
            if part.ndim != 2 or part.shape[0] != len(self):
                raise MismatchError(
                    f"{subject}, {name}",
                    given=f"shape {tuple(part.shape)}",
                    expected=f"({len(self)}, width), one row a prompt",
                    remedy="Read every part on the same prompts, pooled over tokens.",
                )
            if not bool(torch.isfinite(part).all()):
                raise PromptError(
                    f"{subject}, {name}",
                    given="values that are not finite",
                    expected="finite activations",
                    remedy="Check the model's precision and the prompts.",
                )
        if self.reconstruction is not None and self.reconstruction.shape != self.dense.shape:
            raise MismatchError(
                f"{subject}, reconstruction",
                given=f"width {self.reconstruction.shape[1]}",
                expected=f"the activations' width {self.width}",
                remedy="Reconstruct the activations that were read (a transcoder does not).",
            )
        if len(self) < 2:
            raise PromptError(
                subject,
                given=f"{len(self)} row",
                expected="at least two prompts",
                remedy="Add prompts of both labels.",
            )

    def __len__(self) -> int:
        return int(self.dense.shape[0])

    @property
    def width(self) -> int:
        """d of the dense activations."""
        return int(self.dense.shape[1])

    def parts(self) -> dict[str, Tensor]:
        """Every tensor by a unique name: ``dense``, ``reconstruction``, codes, components."""
        found = {"dense": self.dense}
        if self.reconstruction is not None:
            found["reconstruction"] = self.reconstruction
        found |= {f"codes/{name}": part for name, part in self.codes.items()}
        return found | {f"components/{name}": part for name, part in self.components.items()}

    def rows(self, index: Int[Tensor, " m"] | Sequence[int]) -> StageReadings:
        """The readings of some of the prompts, in the order given."""
        keep = torch.as_tensor(index, dtype=torch.long)
        pooled = self.reconstruction
        return replace(
            self,
            dense=self.dense[keep],
            codes={name: part[keep] for name, part in self.codes.items()},
            reconstruction=None if pooled is None else pooled[keep],
            components={name: part[keep] for name, part in self.components.items()},
        )

    def check_same_design(self, other: StageReadings) -> None:
        """Both stages were read with the same prompts, dictionaries and place.

        Raises:
            MismatchError: otherwise.
        """
        for what, own, given in (
            ("prompts", len(self), len(other)),
            ("place", self.space, other.space),
            ("position", self.position, other.position),
            ("parts", _widths(self), _widths(other)),
        ):
            if own != given:
                raise MismatchError(
                    f"readings of stages {self.stage!r} and {other.stage!r}",
                    given=f"{what} {own} and {given}",
                    expected=f"the same {what} at both",
                    remedy="Read every stage with one labelled set, one SAE and one position.",
                )


def _widths(readings: StageReadings) -> dict[str, int]:
    return {name: int(part.shape[1]) for name, part in sorted(readings.parts().items())}
