"""Codes and activations of tokens, pooled by prompt as they stream past.

Codes stay sparse: what is kept grows with the latents that are active in a prompt, not with the
width of the dictionary or the number of tokens. The dense matrix is made once, on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.errors import PromptError
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.sae_codes import SparseCodes

DENSE_SHARE = 0.5
"""Share of the free memory the dense matrix of pooled codes may take."""
BLOCK = 1 << 18
"""Triples held in one tensor."""


@dataclass(eq=False)
class CodePool:
    """Pooled codes of one dictionary, (prompt, latent, value) triples.

    Attributes:
        largest: pool by the maximum over tokens (an inactive token counts as 0), else by the mean.
        alive: (d_sae,), which latents were active on any token.
    """

    d_sae: int
    largest: bool = False
    n_tokens: int = 0
    n_active: int = 0
    alive: Tensor = field(init=False)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    filled: int = 0

    def __post_init__(self) -> None:
        self.alive = torch.zeros(self.d_sae, dtype=torch.bool)

    def add(self, codes: SparseCodes, prompt: Int[Tensor, " m"], tokens: Int[Tensor, " n"]) -> None:
        """Add the tokens of one batch, all tokens of a prompt in one batch.

        Args:
            prompt: which prompt each token is of.
            tokens: number of tokens of every prompt (of all batches).
        """
        self.n_tokens += len(codes)
        self.n_active += int(codes.latent.shape[0])
        self.alive[codes.latent.cpu()] = True
        where = prompt[codes.token]
        key, value = where * self.d_sae + codes.latent, codes.value
        single = bool((tokens[prompt] == 1).all())
        if not single:
            key, slot, counts = torch.unique(key, return_inverse=True, return_counts=True)
            total = tokens[key // self.d_sae]
            if self.largest:
                pooled = value.new_full(key.shape, -torch.inf)
                pooled.scatter_reduce_(0, slot, value, "amax")
                value = torch.where(counts < total, pooled.clamp_min(0.0), pooled)
            else:
                value = value.new_zeros(key.shape).index_add_(0, slot, value) / total
        self._keep(key.cpu(), value.cpu())

    def _keep(self, key: Int[Tensor, " m"], value: Float[Tensor, " m"]) -> None:
        """Copy into blocks: small tensors that stay would leave holes between those that go."""
        while len(key):
            if not self.keys or self.filled == len(self.keys[-1]):
                self.keys.append(torch.empty(BLOCK, dtype=torch.long))
                self.values.append(torch.empty(BLOCK))
                self.filled = 0
            here = slice(self.filled, min(BLOCK, self.filled + len(key)))
            n = here.stop - here.start
            self.keys[-1][here], self.values[-1][here] = key[:n], value[:n]
            self.filled, key, value = here.stop, key[n:], value[n:]

    @property
    def n_kept(self) -> int:
        """Number of triples."""
        return max(0, len(self.keys) - 1) * BLOCK + self.filled

    @property
    def l0(self) -> float:
        return self.n_active / max(1, self.n_tokens)

    @property
    def dead_share(self) -> float:
        """Share of the latents that no token activated."""
        return 1 - float(self.alive.float().mean())

    def dense(self, n: int) -> Float[Tensor, "n d_sae"]:
        """The pooled codes of `n` prompts.

        Raises:
            PromptError: the matrix would not fit into memory.
        """
        import psutil

        if 4 * n * self.d_sae > DENSE_SHARE * psutil.virtual_memory().available:
            raise PromptError(
                f"pooled codes of {n} prompts",
                given=f"{4e-9 * n * self.d_sae:.1f} GB for {self.d_sae} latents",
                expected=f"at most {DENSE_SHARE:.0%} of the free memory",
                remedy="Read fewer prompts, or use a narrower SAE.",
            )
        out = torch.zeros(n * self.d_sae)
        for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            stop = BLOCK if i + 1 < len(self.keys) else self.filled
            out[key[:stop]] = value[:stop]
        return out.view(n, self.d_sae)


class Moments:
    """Fraction of variance unexplained over a stream of tokens, float64 sums."""

    def __init__(self, d: int) -> None:
        self.n, self.left = 0, 0.0
        self.square, self.total = 0.0, torch.zeros(d, dtype=torch.float64)

    def add(self, x: Float[Tensor, "m d"], rebuilt: Float[Tensor, "m d"]) -> None:
        self.n += x.shape[0]
        self.left += float((x - rebuilt).double().square().sum())
        self.square += float(x.double().square().sum())
        self.total += x.double().sum(0).cpu()

    @property
    def fvu(self) -> float:
        spread = self.square - float(self.total.square().sum()) / max(1, self.n)
        return self.left / max(spread, 1e-300)


class StagePool:
    """Everything read off one stage: dense, reconstructed, coded, and read by components.

    Args:
        tokens: (n,) how many tokens of each prompt are read.
        dictionaries: the SAE under ``sae`` and its rivals.
        centred: the mean over coordinates is taken out before encoding.
    """

    def __init__(
        self,
        tokens: Int[Tensor, " n"],
        dictionaries: Mapping[str, Sae],
        *,
        largest: bool = False,
        centred: bool = False,
    ) -> None:
        self.tokens, self.dictionaries, self.centred = tokens, dictionaries, centred
        sae = dictionaries["sae"]
        self.dense = torch.zeros(len(tokens), sae.d_in)
        self.rebuilt = torch.zeros(len(tokens), sae.d_in) if sae.reconstructs else None
        self.moments = Moments(sae.d_in)
        self.codes = {name: CodePool(own.d_sae, largest) for name, own in dictionaries.items()}
        self.components: dict[str, Tensor] = {}

    def add(self, x: Float[Tensor, "m d"], prompt: Int[Tensor, " m"]) -> None:
        """The tokens of one batch."""
        tokens = self.tokens.to(x.device)
        self._mean(self.dense, x, prompt)
        offset = x.mean(-1, keepdim=True) if self.centred else None
        seen = x if offset is None else x - offset
        for name, own in self.dictionaries.items():
            codes = own.encode_sparse(seen)
            self.codes[name].add(codes, prompt, tokens)
            if name == "sae" and self.rebuilt is not None:
                rebuilt = own.decode(codes)
                self.moments.add(seen, rebuilt)
                self._mean(self.rebuilt, rebuilt if offset is None else rebuilt + offset, prompt)

    def add_inner(self, name: str, inner: Float[Tensor, "m k"], prompt: Int[Tensor, " m"]) -> None:
        """Inner activations of handed-in components at the same tokens."""
        if name not in self.components:
            self.components[name] = torch.zeros(len(self.tokens), inner.shape[1])
        self._mean(self.components[name], inner, prompt)

    def _mean(
        self, into: Float[Tensor, "n w"], values: Float[Tensor, "m w"], prompt: Int[Tensor, " m"]
    ) -> None:
        weight = 1 / self.tokens.to(values.device)[prompt]
        into.index_add_(0, prompt.cpu(), (values * weight[:, None]).cpu())

    def facts(self) -> dict[str, float]:
        """``n_tokens, l0, dead_share, fvu``; the rivals' L0; the trained k and how far L0 is."""
        own, k = self.codes["sae"], self.dictionaries["sae"].metadata.trained_k
        found = {"n_tokens": float(own.n_tokens), "l0": own.l0, "dead_share": own.dead_share}
        if self.rebuilt is not None:
            found["fvu"] = self.moments.fvu
        if k:
            found |= {"trained_k": k, "l0_over_k": own.l0 / k}
        return found | {f"{name} l0": p.l0 for name, p in self.codes.items() if name != "sae"}
