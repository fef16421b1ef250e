"""Is the grammar table true of this model? ``y = W x + b`` at every site's input and output."""

from __future__ import annotations

import torch

from mi_weightspace.core.errors import ArchitectureError
from mi_weightspace.core.seeds import generator
from mi_weightspace.models.lens import Lens

TOLERANCE = 1e-5
"""Largest |y − (Wx + b)| relative to max |y|, in float32; scaled by epsilon for others."""


def site_errors(lens: Lens, *, seed: int = 0, n_tokens: int = 7) -> dict[str, float]:
    """Site name -> largest relative error of the linear map, on random tokens.

    The embedding is checked as a look-up: its output is the token's column, up to a fixed factor.
    """
    tokens = torch.randint(
        0, lens.shape.vocab_size, (1, n_tokens), generator=generator(seed, "site check")
    )
    sites = [s for s in lens.sites() if s.kind != "embed"]
    names = [f"{s.name}:{side}" for s in sites for side in ("in", "out")]
    captured = lens.run(tokens, capture=names).captured
    errors: dict[str, float] = {}
    for site in sites:
        x, y = captured[f"{site.name}:in"], captured[f"{site.name}:out"]
        bias = lens.bias(site)
        weight = lens.weight(site).to(x.device)
        offset = None if bias is None else bias.to(x.device)
        expected = torch.nn.functional.linear(x.float(), weight, offset)
        scale = max(float(y.abs().max()), 1e-12)
        errors[site.name] = float((expected - y.float()).abs().max()) / scale
    return errors


def verify_sites(lens: Lens) -> None:
    """Refuse a model its table does not describe.

    Raises:
        ArchitectureError: naming the worst site and its error.
    """
    epsilon = torch.finfo(lens.dtype).eps / torch.finfo(torch.float32).eps
    worst, error = max(site_errors(lens).items(), key=lambda item: item[1])
    if not error <= TOLERANCE * epsilon:
        raise ArchitectureError(
            f"site {worst} of this {lens.shape.family} model",
            given=f"an output that differs from W x + b by {error:.2g} of its size",
            expected=f"at most {TOLERANCE * epsilon:.2g}",
            remedy="The model deviates from its family's table "
            "(custom code? a wrapped module? a hook that changes an output?); verify=False skips "
            "this check.",
        )
