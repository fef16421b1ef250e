"""How an attention block's mean shift divides among its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.errors import DirectionError, PromptError
from mi_weightspace.core.shifts import DEAD_SHIFT, differences, mean_shift
from mi_weightspace.core.space import Space

if TYPE_CHECKING:
    import pandas as pd


def head_shares(
    activations: PairedActivations,
    contrast: str,
    layer: int,
    model: Any,
    *,
    gradient: Float[Tensor, " d_model"] | None = None,
) -> pd.DataFrame:
    """Signed share of every head in the shift its attention block writes.

    ``Δμ_h = W_O[h] (mean z_h(+) − mean z_h(−))`` with ``Δμ_attn = Σ_h Δμ_h``; the share
    ``⟨Δμ_h, Δμ_attn⟩ / ‖Δμ_attn‖²`` sums to 1 over heads, and is negative for a head that works
    against the others; norms of heads do not add up and are shown only beside it. All before a
    post-norm, where the family has one.

    Args:
        activations: harvested with the point ``attn_z.LAYER``.
        model: the `Lens` or `WeightSource` of the same stage.
        gradient: the readout margin's gradient in the stream at that position; adds the column
            ``along_gradient``, ``⟨Δμ_h, g⟩`` in units of the margin.

    Returns:
        One row a head: ``layer, head, share, norm`` (raw residual units).

    Raises:
        PromptError: ``attn_z`` was not captured, or the heads write no shift at all.
        DirectionError: a gradient of another width.
    """
    import pandas as pd

    point = Space("attn_z", layer)
    if point not in activations.points:
        raise PromptError(
            f"head shares at layer {layer}",
            given=f"activations without {point}",
            expected=f"the point {point} captured",
            remedy=f"harvest(..., points=[..., '{point}']).",
        )
    matrix = model.weight(model.sites(f"blocks.{layer}.attn.o")[0]).double()
    n_heads = int(model.shape.n_heads)
    values = activations.at(contrast, point)
    shift = mean_shift(differences(values)).reshape(n_heads, -1)
    written = torch.einsum("ohk,hk->ho", matrix.reshape(matrix.shape[0], n_heads, -1), shift)
    total = written.sum(0)
    if total.norm() <= DEAD_SHIFT * values.double().norm(dim=-1).mean() * matrix.norm():
        raise PromptError(
            f"contrast {contrast!r} at {point}",
            given="heads whose shifts cancel or vanish",
            expected="a shift written by the attention block",
            remedy="Shares of nothing are undefined; use another layer.",
        )
    frame = pd.DataFrame(
        {
            "layer": layer,
            "head": range(n_heads),
            "share": (written @ total / total.square().sum()).numpy(),
            "norm": written.norm(dim=-1).numpy(),
        }
    )
    if gradient is not None:
        if gradient.shape != total.shape:
            raise DirectionError(
                "gradient",
                given=f"shape {tuple(gradient.shape)}",
                expected=f"({total.shape[0]},), the width of the stream",
                remedy="Take the gradient with respect to the residual stream.",
            )
        frame["along_gradient"] = (written @ gradient.double()).numpy()
    return frame
