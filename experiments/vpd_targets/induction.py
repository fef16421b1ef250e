"""A two-layer attention-only transformer trained on repeated random tokens (induction).

A sequence is a block of distinct random tokens, repeated until the sequence is full; the block
length is drawn per sequence, so that position alone does not say where to look. Every position from
the second occurrence on is predictable, from content only; the loss covers the others too, so that
the output there is defined (spread over tokens not yet seen). Position embeddings are added to the
inputs of q and k alone, so that they never travel through the residual stream.

Truth (Elhage et al. 2021): in layer 0 a head that attends to the previous token and copies it; in
layer 1 a head whose query is the current token and whose key is what layer 0 wrote (the token
before), so that it attends to what followed the last occurrence; `o` of layer 1 puts that token
out. `quality` measures both patterns. No biases, no norms, untied unembedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from experiments.vpd_targets.common import Target, cosine, frozen, linear
from mi_weightspace.core.seeds import derive, generator

INITIAL_SCALE = 0.8
REQUIRED = {"accuracy": 0.95, "previous": 0.6, "induction": 0.8}


@dataclass(frozen=True)
class InductionConfig:
    """Sizes, data law and training. `shortest`: of the repeated block."""

    vocab: int = 32
    d_model: int = 32
    length: int = 24
    shortest: int = 5
    steps: int = 1_500
    batch_size: int = 128
    lr: float = 6e-3

    @property
    def longest(self) -> int:
        return self.length // 2


PRESETS = {
    "induction": {
        "toy": InductionConfig(),
        "paper": InductionConfig(vocab=64, d_model=64, length=32, steps=4_000, lr=3e-3),
    }
}


class Attention(nn.Module):
    """One causal head; `x` carries no position, q and k see position."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(weight) for weight in weights)

    def pattern(
        self, x: Float[Tensor, "n t d"], position: Float[Tensor, "t d"]
    ) -> Float[Tensor, "n t t"]:
        placed = x + position
        scores = self.q(placed) @ self.k(placed).transpose(1, 2) * x.shape[-1] ** -0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def forward(
        self, x: Float[Tensor, "n t d"], position: Float[Tensor, "t d"]
    ) -> Float[Tensor, "n t d"]:
        return self.o(self.pattern(x, position) @ self.v(x))


class Induction(nn.Module):
    """Token ids -> logits."""

    def __init__(self, config: InductionConfig, draw: torch.Generator) -> None:
        super().__init__()

        def matrix(rows: int, columns: int) -> Tensor:
            scale = INITIAL_SCALE * columns**-0.5
            return torch.randn(rows, columns, generator=draw) * scale

        d = config.d_model
        self.embed = nn.Parameter(matrix(config.vocab, d) * d**0.5)
        self.position = nn.Parameter(matrix(config.length, d) * d**0.5)
        self.layers = nn.ModuleList(Attention([matrix(d, d) for _ in range(4)]) for _ in range(2))
        self.unembed = nn.Parameter(matrix(config.vocab, d))

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocab"]:
        x, position = self.embed[tokens], self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = x + layer(x, position)
        return x @ self.unembed.T

    @torch.no_grad()
    def patterns(self, tokens: Int[Tensor, "n t"]) -> list[Float[Tensor, "n t t"]]:
        x, position = self.embed[tokens], self.position[: tokens.shape[1]]
        found = []
        for layer in self.layers:
            assert isinstance(layer, Attention)
            found.append(layer.pattern(x, position))
            x = x + layer(x, position)
        return found


def sample(config: InductionConfig, batch: int, draw: torch.Generator) -> Int[Tensor, "batch t"]:
    return sample_with_block(config, batch, draw)[0]


def sample_with_block(
    config: InductionConfig, batch: int, draw: torch.Generator
) -> tuple[Int[Tensor, "batch t"], Int[Tensor, " batch"]]:
    """Sequences, and the block length of each."""
    tokens = torch.rand(batch, config.vocab, generator=draw).argsort(1)
    size = torch.randint(config.shortest, config.longest + 1, (batch,), generator=draw)
    index = torch.arange(config.length)[None] % size[:, None]
    return tokens.gather(1, index), size


def predictable(
    config: InductionConfig, size: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch t_minus_1"]:
    """Positions whose next token follows from an earlier occurrence of the current one."""
    return torch.arange(config.length - 1)[None] >= size[:, None]


def train(config: InductionConfig, seed: int) -> Induction:
    """AdamW on every next token, 5 % warm-up, cosine to 0. Deterministic in its seed."""
    draw = generator(seed, "vpd_targets", "induction")
    module = Induction(config, draw)
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warm = max(1, config.steps // 20)
    for step in range(config.steps):
        rate = min(1.0, (step + 1) / warm) * cosine(step, config.steps)
        optimiser.param_groups[0]["lr"] = config.lr * rate
        tokens = sample(config, config.batch_size, draw)
        logits = module(tokens)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
    frozen(module)
    return module


@torch.no_grad()
def quality(module: Induction, config: InductionConfig, seed: int) -> dict[str, float]:
    """Accuracy where the answer is known, cross-entropy (nats), and the two attention patterns.

    `previous`: layer 0's attention to the token before, at first occurrences (a key is only needed
    there: layer 1 may always look back to the first). `induction`: layer 1's attention to the
    tokens that followed earlier occurrences of the current one. `cross_entropy_first`: at first
    occurrences, where at best it is the entropy of the tokens still possible.
    """
    draw = generator(seed, "vpd_targets", "induction", "quality")
    tokens, size = sample_with_block(config, 2_000, draw)
    mask = predictable(config, size)
    logits = module(tokens)[:, :-1]
    answer = tokens[:, 1:]
    first, second = (p[:, :-1] for p in module.patterns(tokens))
    where = torch.arange(config.length)
    back = where[None, :-1, None] - where[None, None]  # query − key
    after = (back > 0) & ((back + 1) % size[:, None, None] == 0)
    return {
        "accuracy": float((logits.argmax(-1) == answer)[mask].double().mean()),
        "cross_entropy": float(F.cross_entropy(logits[mask], answer[mask])),
        "cross_entropy_first": float(F.cross_entropy(logits[~mask], answer[~mask])),
        "previous": float(first.diagonal(-1, 1, 2)[~mask[:, 1:]].mean()),
        "induction": float((second * after).sum(-1)[mask].mean()),
    }


def is_stated_circuit(found: dict[str, float]) -> bool:
    """With short blocks other circuits solve the task; only the stated one has a stated truth."""
    return all(found[name] >= least for name, least in REQUIRED.items())


def target(config: InductionConfig, seed: int, attempts: int = 8) -> Target:
    """The first of successive sub-seeds that learned the task by the stated circuit.

    Raises:
        RuntimeError: none of `attempts` did.
    """
    for attempt in range(attempts):
        module = train(config, derive(seed, "attempt", attempt))
        found = quality(module, config, seed)
        if is_stated_circuit(found):
            return _as_target(module, config, found | {"attempt": float(attempt)})
    raise RuntimeError(f"none of {attempts} sub-seeds learned the stated induction circuit")


def _as_target(module: Induction, config: InductionConfig, found: dict[str, float]) -> Target:
    sites = {f"layers.{i}.{part}": f"layers.{i}.{part}" for i in range(2) for part in "qkvo"}
    return Target(
        "induction",
        module,
        sites,
        lambda batch, draw: sample(config, batch, draw),
        "kl",
        quality=found,
    )
