"""Which detectors stand beside each other, and what each of them reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.labelled import Prompt
from mi_weightspace.core.readings import RANDOM_SAE, ROTATED_SAE, SAE, StageReadings
from probes.detectors import (
    PENALTIES,
    TEN,
    WIDTHS,
    Detector,
    logistic,
    mean_difference,
    principal_logistic,
    selected_logistic,
    shrunk_discriminant,
)
from probes.detectors_nonlinear import RIDGES, STEPS, kernel_ridge, small_network

NORM = "‖Δμ‖"
PRIMARY = "sae top-k"
"""The row that speaks for the dictionary: its number of latents is tuned like everything else."""
_FEW, _SOME = 19, 99

DETECTORS: tuple[Detector, ...] = (
    Detector("text", "text", "text", logistic, PENALTIES),
    Detector("dm", "linear", "dense", mean_difference),
    Detector("lda", "linear", "dense", shrunk_discriminant),
    Detector("lr", "linear", "dense", logistic, PENALTIES),
    Detector("pca-k + lr", "linear", "dense", principal_logistic, WIDTHS),
    Detector("top-k raw", "linear", "dense", selected_logistic, WIDTHS, _FEW),
    Detector("sae top-10", "sae", f"codes/{SAE}", selected_logistic, TEN, _SOME),
    Detector(PRIMARY, "sae", f"codes/{SAE}", selected_logistic, WIDTHS, _SOME),
    Detector(
        "random sae top-k", "null sae", f"codes/{RANDOM_SAE}", selected_logistic, WIDTHS, _FEW
    ),
    Detector(
        "rotated sae top-k", "null sae", f"codes/{ROTATED_SAE}", selected_logistic, WIDTHS, _FEW
    ),
    Detector("lr on reconstruction", "sae parts", "reconstruction", logistic, PENALTIES, _SOME),
    Detector("lr on error", "sae parts", "error", logistic, PENALTIES, _SOME),
    Detector("rbf", "non-linear", "dense", kernel_ridge, RIDGES, 199, retuned=True),
    Detector("mlp", "non-linear", "dense", small_network, STEPS, _FEW),
)
"""Every detector of the comparison but the norm, which is no classifier (`probes.detection`)."""
SHARED_NULL = ("dm", "lda", "lr", "pca-k + lr")
"""Dense linear detectors judged together, by the maximum over them under the same labellings."""
STAGE_TASK = ("dm", "lr", "sae top-10", PRIMARY, "rbf")


def parts_read(
    readings: StageReadings, text: Float[Tensor, "n vocab"] | None
) -> dict[str, Float[Tensor, "n d"]]:
    """What detectors can read of a stage, float64: its parts, the text, and the SAE's error."""
    found = {name: part.double() for name, part in readings.parts().items()}
    if readings.reconstruction is not None:
        found["error"] = found["dense"] - found["reconstruction"]
    if text is not None:
        found["text"] = text.double()
    return found


def detectors_for(parts: Iterable[str]) -> tuple[Detector, ...]:
    """The detectors whose part is there; one more for each set of handed-in components."""
    names = list(parts)
    given = [n for n in names if n.startswith("components/")]
    extra = [
        Detector(n.removeprefix("components/"), "handed in", n, logistic, PENALTIES, _SOME)
        for n in given
    ]
    return (*(d for d in DETECTORS if d.part in names), *extra)


def token_counts(
    prompts: Sequence[Prompt], ids: Mapping[Prompt, Sequence[int]] | None = None
) -> Float[Tensor, "n vocab"]:
    """Bag of words (of token ids, where prompts are ids): what can be told from the text alone.

    Args:
        ids: token ids of each prompt, to count these in place of words.
    """
    units = [_units(p if ids is None else tuple(ids[p])) for p in prompts]
    vocabulary = {u: i for i, u in enumerate(sorted({u for row in units for u in row}))}
    counts = torch.zeros(len(units), max(1, len(vocabulary)))
    for row, own in enumerate(units):
        for unit, times in Counter(own).items():
            counts[row, vocabulary[unit]] = times
    return counts


def _units(prompt: Prompt) -> list[str]:
    if isinstance(prompt, str):
        return re.findall(r"\w+|[^\w\s]", prompt.lower())
    return [str(i) for i in prompt]
