"""Sparse autoencoders as tensors: encode, decode, and the two null dictionaries.

No library is named here (`probes.sae_io` reads and writes theirs). Row vectors throughout:
``f = rule(x W_enc + b_enc)``, ``x̂ = f W_dec + b_dec`` (matching pursuit: `core.sae_pursuit`). The
rules are those of SAELens 6.54, checked against it to 1e-6 for every architecture it trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_weightspace.core.errors import ConfigError, MismatchError
from mi_weightspace.core.hook_names import space_of_hook
from mi_weightspace.core.sae_codes import SparseCodes, row_offsets, where_true
from mi_weightspace.core.sae_parts import (
    RULES,
    Rule,
    SaeMetadata,
    blank_biases,
    check_parts,
    check_stops,
    level_of,
    needed,
)
from mi_weightspace.core.sae_pursuit import Stops, pursue, stops_for
from mi_weightspace.core.seeds import generator
from mi_weightspace.core.space import Space

CHUNK_ELEMENTS = 1 << 22
"""Pre-activations held at once while encoding sparsely (16 MiB in float32)."""
GROUPS = 2
"""Groups per k whose maxima bound the k-th largest pre-activation from below."""
LEVEL_ELEMENTS = 1 << 24
"""Pre-activations looked at when a threshold is set for a given L0."""


@dataclass(frozen=True, eq=False)
class Sae:
    """One dictionary.

    Attributes:
        W_enc, b_enc: (d_in, d_sae), (d_sae,); a gated SAE has `b_gate`, `b_mag`, `r_mag` instead
            of `b_enc`.
        W_dec, b_dec: (d_sae, d_out), (d_out,); d_out = d_in but for transcoders.
        threshold: (d_sae,) of ``jumprelu``; k of ``topk`` and ``abstopk``.
        W_skip: (d_out, d_in) of skip transcoders; no part of `encode` or `decode`.
        apply_b_dec_to_input: ``x − b_dec`` is encoded.
        rescale_acts_by_decoder_norm: top-k sees (and returns) pre-activations times the decoder's
            row norms; decoding divides by them.
        residual_threshold, max_iterations, stop_on_duplicate_support: when ``matching_pursuit``
            stops: a residual of smaller norm (0: no such stop), so many steps (None: d_in), a step
            without a new latent. Its `W_enc` is `W_dec` transposed; `b_dec` is added only where it
            was taken away.

    Raises:
        MismatchError: an unknown architecture, missing or misshapen tensors, non-finite values, a
            k out of range; the subject names the tensor.
    """

    architecture: str
    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    b_enc: Float[Tensor, " d_sae"] | None = None
    threshold: Float[Tensor, " d_sae"] | None = None
    b_gate: Float[Tensor, " d_sae"] | None = None
    b_mag: Float[Tensor, " d_sae"] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = False
    rescale_acts_by_decoder_norm: bool = False
    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True
    metadata: SaeMetadata = field(default_factory=SaeMetadata)

    def __post_init__(self) -> None:
        check_parts(self.architecture, self.tensors(), self.k, self.metadata.source)
        check_stops(self.residual_threshold, self.max_iterations, self.metadata.source)

    def __repr__(self) -> str:
        where = self.metadata.hook_name or self.metadata.hf_hook_name or "an unnamed point"
        return f"Sae({self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}, at {where})"

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_sae(self) -> int:
        return int(self.W_enc.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.W_dec.shape[1])

    @property
    def rule(self) -> Rule:
        return RULES[self.architecture]

    @property
    def reconstructs(self) -> bool:
        """Whether it decodes into the space it reads (a transcoder does not)."""
        return "transcoder" not in self.architecture

    @property
    def space(self) -> Space | None:
        """Where it reads, or None where the metadata does not name a known point."""
        for name in (self.metadata.hf_hook_name, self.metadata.hook_name):
            found = space_of_hook(name) if name else None
            if found is not None:
                return found.canonical
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it has, by name."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def saved_tensors(self) -> dict[str, Tensor]:
        """Those a file holds: a tied encoder is left out."""
        wanted = (*needed(self.architecture), "W_skip")
        return {name: value for name, value in self.tensors().items() if name in wanted}

    def to(self, device: torch.device | str) -> Sae:
        """The same on another device; itself where it is there already."""
        if self.W_enc.device == torch.device(device):
            return self
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    def described(self, **changes: Any) -> Sae:
        """With other metadata, e.g. ``described(convention="centred")``."""
        return replace(self, metadata=replace(self.metadata, **changes))

    # ---- forward ---------------------------------------------------------------------------
    @cached_property
    def _row_norm(self) -> Float[Tensor, " d_sae"]:
        return self.W_dec.norm(dim=-1)

    def _input(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_in"]:
        if x.shape[-1] != self.d_in:
            raise MismatchError(
                f"activations given to {self!r}",
                given=f"width {x.shape[-1]}",
                expected=f"width {self.d_in}",
                remedy="Read the point the SAE was trained at.",
            )
        x = x.to(self.W_enc.dtype)
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def _activate(
        self, x: Float[Tensor, "*n d_in"]
    ) -> tuple[Float[Tensor, "*n d_sae"], Bool[Tensor, "*n d_sae"]]:
        """(values, which count) of the rules that look at each latent by itself."""
        product = self._input(x) @ self.W_enc
        if self.rule == "gated":
            assert self.b_gate is not None and self.b_mag is not None and self.r_mag is not None
            magnitude = product * self.r_mag.exp() + self.b_mag
            return magnitude, (product + self.b_gate > 0) & (magnitude > 0)
        assert self.b_enc is not None
        pre = product.add_(self.b_enc)
        if self.rule == "relu":
            return pre, pre > 0
        assert self.threshold is not None
        return pre, pre > self.threshold.clamp_min(0.0)

    def _top(
        self, x: Float[Tensor, "*n d_in"]
    ) -> tuple[Float[Tensor, "*n k"], Int[Tensor, "*n k"]]:
        """Values and latents of the top-k rules."""
        assert self.b_enc is not None and self.k is not None
        pre = (self._input(x) @ self.W_enc).add_(self.b_enc)
        if self.rescale_acts_by_decoder_norm:
            pre = pre.mul_(self._row_norm)
        if self.rule == "abstopk":
            index = pre.abs().topk(self.k, dim=-1, sorted=False).indices
            return pre.gather(-1, index), index
        found = pre.topk(self.k, dim=-1, sorted=False)
        return found.values.relu(), found.indices

    @property
    def _stops(self) -> Stops:
        steps = self.d_in if self.max_iterations is None else self.max_iterations
        return Stops(steps, self.residual_threshold, self.stop_on_duplicate_support)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_sae"]:
        """Codes, dense.

        Raises:
            MismatchError: activations of another width.
        """
        if self.rule in ("topk", "abstopk"):
            value, index = self._top(x)
            out = value.new_zeros(*value.shape[:-1], self.d_sae)
            return out.scatter_(-1, index, value)
        if self.rule == "pursuit":
            codes = pursue(self._input(x).reshape(-1, self.d_in), self.W_dec, self._stops)
            return codes.view(*x.shape[:-1], self.d_sae)
        value, active = self._activate(x)
        return torch.where(active, value, torch.zeros_like(value))

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "n d_in"]) -> SparseCodes:
        """Codes of n tokens as (offsets, latent, value): memory by what is active.

        At most `CHUNK_ELEMENTS` products exist at a time, in one buffer. One comparison finds the
        few entries that may be active, a little generously; the rule itself is applied to those.
        """
        rows = min(max(1, CHUNK_ELEMENTS // self.d_sae), max(1, x.shape[0]))
        if self.rule == "pursuit":
            found = (pursue(part, self.W_dec, self._stops) for part in self._input(x).split(rows))
            return SparseCodes.join([SparseCodes.of_dense(codes) for codes in found], self.d_sae)
        buffer = torch.empty(rows, self.d_sae, dtype=self.W_enc.dtype, device=self.W_enc.device)
        pick = self._largest if self.rule in ("topk", "abstopk") else self._above
        parts = []
        for part in self._input(x).split(rows):
            parts.append(pick(torch.mm(part, self.W_enc, out=buffer[: len(part)])))
        return SparseCodes.join(parts, self.d_sae)

    @cached_property
    def _cut(self) -> Float[Tensor, " d_sae"]:
        """Products below this cannot be active; the slack covers the rounding of the sums."""
        bias = self.b_gate if self.rule == "gated" else self.b_enc
        assert bias is not None
        floor = torch.zeros_like(bias)
        if self.threshold is not None:
            floor = self.threshold.clamp_min(0.0)
        return floor - bias - 1e-5 * (floor + bias.abs())

    def _above(self, product: Float[Tensor, "n d_sae"]) -> SparseCodes:
        place = where_true(product > self._cut)
        latent = place % self.d_sae
        value = product.view(-1)[place]
        if self.rule == "gated":
            assert self.b_gate is not None and self.b_mag is not None and self.r_mag is not None
            active = value + self.b_gate[latent] > 0
            value = value * self.r_mag.exp()[latent] + self.b_mag[latent]
            active &= value > 0
        else:
            assert self.b_enc is not None
            value = value + self.b_enc[latent]
            active = value > (0.0 if self.threshold is None else self._floor[latent])
        place, latent, value = place[active], latent[active], value[active]
        return SparseCodes(row_offsets(place, *product.shape), latent, value, self.d_sae)

    @cached_property
    def _floor(self) -> Float[Tensor, " d_sae"]:
        assert self.threshold is not None
        return self.threshold.clamp_min(0.0)

    def _largest(self, product: Float[Tensor, "n d_sae"]) -> SparseCodes:
        """The k largest of each row.

        The k-th largest of some groups' maxima is at most the k-th largest of the row, so what
        reaches it holds the top k; sorting is left to those few.
        """
        assert self.b_enc is not None and self.k is not None
        pre = product.add_(self.b_enc)
        if self.rescale_acts_by_decoder_norm:
            pre = pre.mul_(self._row_norm)
        size = pre.abs() if self.rule == "abstopk" else pre
        n, groups = pre.shape[0], GROUPS * self.k
        deep = self.d_sae // groups
        if deep < 2:
            index = size.topk(self.k, dim=1, sorted=False).indices
        else:
            peaks = size[:, : deep * groups].view(n, deep, groups).amax(1)
            cut = peaks.topk(self.k, dim=1, sorted=False).values.amin(1, keepdim=True)
            place = where_true(size >= cut)
            offsets = row_offsets(place, n, self.d_sae)
            counts = offsets.diff()
            column = torch.arange(len(place), device=place.device)
            column = column - offsets[:-1].repeat_interleave(counts)
            row = place // self.d_sae
            few = size.new_full((n, int(counts.max())), -torch.inf)
            few[row, column] = size.view(-1)[place]
            chosen = few.topk(self.k, dim=1, sorted=False).indices
            index = place[offsets[:-1, None] + chosen] % self.d_sae
        value = pre.gather(1, index)
        active = value != 0 if self.rule == "abstopk" else value > 0
        return SparseCodes.of(active.sum(1), index[active], value[active], self.d_sae)

    @torch.no_grad()
    def decode(self, codes: Float[Tensor, "*n d_sae"] | SparseCodes) -> Float[Tensor, "*n d_out"]:
        """Reconstruction (of a transcoder: its output without the skip)."""
        if self.rescale_acts_by_decoder_norm:
            codes = codes * (1 / self._row_norm)
        if isinstance(codes, SparseCodes):
            return codes.times(self.W_dec) + self._offset
        return codes @ self.W_dec + self._offset

    @property
    def _offset(self) -> Float[Tensor, " d_out"]:
        """What no active latent decodes to."""
        if self.rule == "pursuit" and not self.apply_b_dec_to_input:
            return torch.zeros_like(self.b_dec)
        return self.b_dec

    # ---- L0 --------------------------------------------------------------------------------
    def l0(self, x: Float[Tensor, "n d_in"]) -> float:
        """Mean number of active latents a token."""
        return self.encode_sparse(x).l0

    @torch.no_grad()
    def with_l0(self, x: Float[Tensor, "n d_in"], l0: float) -> Sae:
        """The same dictionary with one number moved so that its L0 on `x` is `l0`.

        Top-k rules take k = round(l0); a pursuit the `max_iterations` that come nearest, and no
        other stop where those end it too soon. Otherwise every threshold rises by one amount (a
        bias falls by it where the rule has no threshold): the amount that leaves ``n·l0``
        pre-activations above.

        Raises:
            ConfigError: an `l0` that is not between 0 and d_sae.
        """
        if not 0 < l0 < self.d_sae:
            raise ConfigError(
                "l0",
                given=repr(l0),
                expected=f"a number between 0 and d_sae = {self.d_sae}",
                remedy="Give the mean number of active latents a token.",
            )
        if self.rule in ("topk", "abstopk"):
            return replace(self, k=max(1, round(l0)))
        rows = max(1, LEVEL_ELEMENTS // self.d_sae)
        x = x[:: max(1, -(-x.shape[0] // rows))]
        if self.rule == "pursuit":
            return replace(self, **stops_for(self._input(x), self.W_dec, self._stops, l0))
        if self.rule == "gated":
            return self._gated_with_l0(x, l0)
        assert self.b_enc is not None
        margin = self._input(x) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            floor = self.threshold.clamp_min(0.0)
            level = level_of(margin - floor, l0)
            if level >= 0:
                return replace(self, threshold=floor + level)
            return replace(self, b_enc=self.b_enc - level)
        return replace(self, b_enc=self.b_enc - level_of(margin, l0))

    def _gated_with_l0(self, x: Float[Tensor, "n d_in"], l0: float) -> Sae:
        assert self.b_gate is not None and self.b_mag is not None and self.r_mag is not None
        product = self._input(x) @ self.W_enc
        gate, magnitude = product + self.b_gate, product * self.r_mag.exp() + self.b_mag
        level = level_of(gate.masked_fill(magnitude <= 0, -torch.inf), l0)
        if level >= 0:
            return replace(self, b_gate=self.b_gate - level)
        # no gate opens a latent whose magnitude is not positive: both biases rise
        level = level_of(torch.minimum(gate, magnitude), l0)
        return replace(self, b_gate=self.b_gate - level, b_mag=self.b_mag - level)

    # ---- nulls -----------------------------------------------------------------------------
    @torch.no_grad()
    def rotated(self, seed: int, x: Float[Tensor, "n d_in"] | None = None) -> Sae:
        """The trained dictionary turned by a random rotation about the activations' centre.

        ``rotated.encode(c + (x−c) Qᵀ) = encode(x)`` for every x, so all that is left of training is
        the dictionary's own geometry. The centre c is the mean of `x`, else `b_dec`.

        Args:
            x: activations on which the L0 is then matched to this SAE's (rules without a k); None
                leaves thresholds as they are.
        """
        draw = generator(seed, "rotated sae", self.d_in)
        q, r = torch.linalg.qr(torch.randn(self.d_in, self.d_in, generator=draw))
        q = (q * r.diagonal().sign()).to(self.W_enc)
        centre = self._centre(x)
        changes: dict[str, Any] = {"W_enc": q @ self.W_enc, "W_skip": None}
        if self.reconstructs:
            changes |= {"W_dec": self.W_dec @ q.T, "b_dec": centre + (self._offset - centre) @ q.T}
        if self.rule == "pursuit":  # tied to the last bit; what a turn adds goes through b_dec
            changes |= {"W_enc": changes["W_dec"].T, "apply_b_dec_to_input": True}
        elif not self.apply_b_dec_to_input:
            moved = (centre - centre @ q) @ self.W_enc
            changes |= self._shifted(moved)
        turned = replace(self, **changes)
        if x is None or self.rule in ("topk", "abstopk"):
            return turned
        return turned.with_l0(x, self.l0(x))

    def _shifted(self, moved: Float[Tensor, " d_sae"]) -> dict[str, Tensor]:
        """Biases after adding `moved` to every pre-activation."""
        if self.rule == "gated":
            assert self.b_gate is not None and self.b_mag is not None and self.r_mag is not None
            return {"b_gate": self.b_gate + moved, "b_mag": self.b_mag + moved * self.r_mag.exp()}
        assert self.b_enc is not None
        return {"b_enc": self.b_enc + moved}

    def _centre(self, x: Float[Tensor, "n d_in"] | None) -> Float[Tensor, " d_in"]:
        if x is not None:
            return x.to(self.W_enc).mean(0)
        return self._offset if self.reconstructs else self.b_dec.new_zeros(self.d_in)

    @torch.no_grad()
    def randomised(
        self, seed: int, *, l0: float | None = None, x: Float[Tensor, "n d_in"] | None = None
    ) -> Sae:
        """A dictionary of random unit rows (tied) with this one's width, rule and L0.

        Args:
            l0: mean number of active latents to match; default: this SAE's k, or its L0 on `x`.
            x: activations the threshold is set on. Rules without a k need them; without, the
                random dictionary takes the round(l0) largest latents of each token instead (a
                pursuit takes so many steps).

        Raises:
            ConfigError: neither a k, nor `l0`, nor activations.
        """
        if l0 is None:
            l0 = float(self.k) if self.k is not None else None if x is None else self.l0(x)
        if l0 is None:
            raise ConfigError(
                f"random dictionary like {self!r}",
                given="a rule without k, and neither l0= nor activations",
                expected="the number of active latents to match",
                remedy="Pass the activations the SAE is read on.",
            )
        draw = generator(seed, "random sae", self.d_in, self.d_sae)
        rows = torch.randn(self.d_sae, self.d_in, generator=draw).to(self.W_enc)
        rows = rows / rows.norm(dim=1, keepdim=True)
        out = rows
        if not self.reconstructs:
            out = torch.randn(self.d_sae, self.d_out, generator=draw).to(self.W_enc)
            out = out / out.norm(dim=1, keepdim=True)
        centre = self._centre(x)
        seen = centre - self.b_dec if self.apply_b_dec_to_input else centre
        parts: dict[str, Any] = blank_biases(self.rule, -(rows @ seen))
        if self.rule == "pursuit":  # the centre is taken away in the input
            parts = {"apply_b_dec_to_input": True, "b_dec": centre}
        drawn = replace(self, W_enc=rows.T, W_dec=out, W_skip=None, **parts)
        if x is None and self.rule == "pursuit":
            return replace(drawn, max_iterations=max(1, round(l0)))
        if x is None and self.rule not in ("topk", "abstopk"):
            parts = {"architecture": "topk", "threshold": None, "b_gate": None}
            parts |= {"b_mag": None, "r_mag": None, "k": max(1, round(l0))}
            return replace(drawn, b_enc=-(rows @ seen), **parts)
        return drawn.with_l0(rows.new_zeros(1, self.d_in) if x is None else x, l0)


__all__ = ["Sae", "SaeMetadata"]
