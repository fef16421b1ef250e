"""Vectors of a component read as tokens, and how its firings go with the tokens of the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIN_COUNT = 2
"""Firings on a token below which its rate is not listed."""
MIN_PMI = 1e-3
"""Nats: a component that fires everywhere goes with no token in particular."""
MIN_SHARE = 1e-4
"""Share of the probability predicted at firings below which a token is not listed."""


@dataclass(frozen=True)
class TokenRate:
    """How a component goes with a token.

    Attributes:
        count: firings on it. precision: share of the token's positions that fire; recall: share of
            firings on this token; pmi: log P(token | fires) / P(token), nats.
    """

    token: str
    count: int
    precision: float
    recall: float
    pmi: float


class Names:
    """Token ids as text; ``#id`` where there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        return f"#{token}" if self.tokenizer is None else str(self.tokenizer.decode([token]))


def write_reading(
    lens: Any, site: str, write: Float[Tensor, " d_out"]
) -> Float[Tensor, " vocab"] | None:
    """What a write vector adds to the logits through the final norm's gain, all other layers
    skipped, less its mean over the vocabulary (softmax does not see it); None off the stream."""
    found = lens.sites(site)[0]
    if found.kind == "unembed":
        return (write - write.mean()).cpu()
    if not found.writes.is_stream:
        return None
    gain = lens.write_gain(found)
    vector = write.float() if gain is None else write.float() * gain
    norm, unembedding = lens.unembed()
    vector = vector - vector.mean() if centres(norm, vector) else vector
    gain = lens.read_gain("unembed")
    logits = unembedding @ (vector if gain is None else vector * gain)
    return (logits - logits.mean()).cpu()


def read_reading(
    lens: Any, site: str, read: Float[Tensor, " d_in"]
) -> Float[Tensor, " vocab"] | None:
    """Cosine of a read vector (with the gain in front of it) and each token's embedding, less the
    mean embedding; of the embedding itself, its own column; None off the stream."""
    found = lens.sites(site)[0]
    if found.kind == "embed":
        return read.cpu()
    if not found.reads.is_stream:
        return None
    gain = lens.read_gain(found)
    vector = read.float() if gain is None else read.float() * gain
    table = lens.weight("embed")
    table = table - table.mean(1, keepdim=True)
    cosines = (vector @ table) / (table.norm(dim=0) * vector.norm()).clamp_min(1e-30)
    return cosines.cpu()


def centres(norm: Callable[[Tensor], Tensor], like: Float[Tensor, " d"]) -> bool:
    """Whether a norm subtracts the mean of its input (asked of its behaviour, not of its name)."""
    probe = torch.linspace(-1, 1, len(like), device=like.device)[None, None]
    with torch.no_grad():
        return torch.allclose(norm(probe), norm(probe + 1.0), atol=1e-4)


def extremes(scores: Tensor | None, names: Names, n: int) -> tuple[tuple[str, float], ...]:
    """The n highest, then the n lowest."""
    if scores is None:
        return ()
    n = min(n, len(scores) // 2)
    order = scores.argsort(descending=True)
    chosen = [*order[:n].tolist(), *order[len(order) - n :].tolist()]
    return tuple((names(i), float(scores[i])) for i in chosen)


def rates(
    counts: Tensor | None, seen: Int[Tensor, " vocab"], names: Names, n: int
) -> tuple[TokenRate, ...]:
    if counts is None or not bool(counts.any()):
        return ()
    total, firings = int(seen.sum()), int(counts.sum())
    found = []
    for i in counts.nonzero().flatten().tolist():
        k = int(counts[i])
        if k >= MIN_COUNT:
            pmi = math.log(k / firings) - math.log(int(seen[i]) / total)
            if pmi > MIN_PMI:
                found.append(TokenRate(names(i), k, k / int(seen[i]), k / firings, pmi))
    return tuple(sorted(found, key=lambda r: (-r.pmi, -r.count))[:n])


def lifted(
    mass: Tensor | None, base: Float[Tensor, " vocab"], names: Names, n: int
) -> tuple[tuple[str, float], ...]:
    """Tokens whose predicted probability at firings is most above its average, (token, PMI)."""
    if mass is None or float(mass.sum()) <= 0:
        return ()
    share = mass / mass.sum()
    pmi = torch.where(share > MIN_SHARE, (share / base.clamp_min(1e-300)).log(), -math.inf)
    order = pmi.argsort(descending=True)[:n].tolist()
    return tuple((names(i), float(pmi[i])) for i in order if float(pmi[i]) > MIN_PMI)
