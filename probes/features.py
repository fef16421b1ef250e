"""The latents that speak: where they fire, and where their decoder rows point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.direction import Direction
from mi_weightspace.core.errors import DirectionError
from mi_weightspace.core.evidence import cosine
from mi_weightspace.core.labelled import LabelledSet
from mi_weightspace.core.readings import SAE, StageReadings
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.space import Space

if TYPE_CHECKING:
    import pandas as pd

N_CONTEXTS = 5
_SHOWN = 160


def decoder_directions(
    sae: Sae,
    latents: Sequence[int],
    *,
    space: Space | str | None = None,
    stage: str = "",
    model_hash: str = "",
    position: str = "",
) -> list[Direction]:
    """Decoder rows as directions, e.g. for `mi_weightspace.project`.

    Patterns without controls or a filter: geometry can be shown, `written here` never follows.

    Args:
        space: where the SAE writes; default the point it reads.

    Raises:
        DirectionError: a latent the SAE does not have, a row of zeros, or no known space.
    """
    where = sae.space if space is None else Space.parse(space)
    outside = [i for i in latents if not 0 <= i < sae.d_sae]
    if outside or where is None:
        raise DirectionError(
            "decoder directions",
            given=f"latents {outside[:5]}" if outside else "an SAE of an unknown hook point",
            expected=f"latents 0 to {sae.d_sae - 1}, and the space they are decoded into",
            remedy="Pass space='resid_post.L', and latents of this SAE.",
        )
    return [
        Direction(
            sae.W_dec[i],
            where,
            label=f"latent {i}",
            scale=float(sae.W_dec[i].double().norm()),
            stage=stage,
            model_hash=model_hash,
            position=position,
            method="sae decoder",
        )
        for i in latents
    ]


def top_contexts(
    latents: Sequence[int],
    readings: Mapping[str, StageReadings],
    labelled: LabelledSet,
    *,
    n: int = N_CONTEXTS,
) -> pd.DataFrame:
    """The prompts on which each latent is largest, at every stage; latents that never fire: none.

    Columns ``latent, stage, rank, activation, label, cluster, item, prompt``.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for latent in latents:
        for stage, own in readings.items():
            values = own.codes[SAE][:, latent]
            for rank, i in enumerate(values.argsort(descending=True, stable=True)[:n].tolist()):
                if float(values[i]) <= 0:
                    break
                row = labelled.rows[i]
                rows.append(
                    {
                        "latent": int(latent),
                        "stage": stage,
                        "rank": rank,
                        "activation": float(values[i]),
                        "label": row.label,
                        "cluster": row.cluster_id,
                        "item": row.item_id,
                        "prompt": shown(row.prompt),
                    }
                )
    columns = ["latent", "stage", "rank", "activation", "label", "cluster", "item", "prompt"]
    return pd.DataFrame(rows, columns=columns)


def shown(prompt: str | tuple[int, ...]) -> str:
    """A prompt as one short line of text."""
    text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    text = text.replace("\n", "⏎")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def shift_cosines(
    sae: Sae,
    latents: Sequence[int],
    readings: Mapping[str, StageReadings],
    labels: Int[Tensor, " n"],
) -> dict[str, list[float]]:
    """Signed cosine of each decoder row with each stage's mean shift; NaN for a transcoder."""
    found: dict[str, list[float]] = {}
    for stage, own in readings.items():
        if sae.d_out != own.width or not sae.reconstructs:
            found[stage] = [float("nan")] * len(latents)
            continue
        shift = class_shift(own.dense, labels)
        rows = sae.W_dec[torch.as_tensor(latents, dtype=torch.long)].double()
        found[stage] = [
            cosine(row, shift) * (1.0 if float(row @ shift) >= 0 else -1.0) for row in rows
        ]
    return found


def class_shift(dense: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, " d"]:
    """Mean of label 1 less mean of label 0, float64."""
    wide = dense.double()
    return wide[labels > 0].mean(0) - wide[labels == 0].mean(0)
