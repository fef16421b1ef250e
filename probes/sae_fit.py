"""Does an SAE belong to this model and this point of it? Checked by name, by width and by what it
reconstructs, before any number is read off it.

A wrong hook name fails silently otherwise: the widths of all stream points agree, and codes of the
wrong point look like codes. So the reconstruction is measured (fraction of variance unexplained,
``FVU = Σ‖x − x̂‖² / Σ‖x − x̄‖²`` over all tokens but the first of each prompt), and where it is bad
the other stream points are tried: an SAE that fits another point far better is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import ConventionError, MismatchError, SiteError
from mi_weightspace.core.sae import Sae
from mi_weightspace.core.space import Space
from mi_weightspace.models.lens import Lens
from probes.sae_tokens import Ids, Prompts, stream, token_ids, token_spans

FVU_BOUND = 0.9
"""Largest FVU of a fitting SAE on the model it was trained on; 1 is what the mean alone leaves."""
SUSPECT = 0.02
"""From this FVU on the other points are tried: a neighbouring point may well leave only 0.2."""
BETTER = {False: 0.5, True: 0.2}
"""An SAE whose FVU elsewhere is below this share of its FVU here is refused; by whether the model
is a tuned one, which may have moved the stream."""
CHECK_TOKENS = 1_024
ELSEWHERE_TOKENS, ELSEWHERE_ELEMENTS = 256, 1 << 30
"""Tokens encoded at the other points, fewer where that exceeds so many pre-activations in all."""
LAYER_NORM = ("gpt2", "gptj", "gpt_neox", "olmo")
"""Families whose norm subtracts the mean over coordinates: there a centred stream is another."""


@dataclass(frozen=True)
class SaeFit:
    """An SAE placed in a model.

    Attributes:
        capture: name for ``Lens.run(capture=[…])``.
        centred: the mean over coordinates is taken out before encoding.
        fvu: on this model, or None where it was not measured (no prompts, a transcoder).
        n_tokens: tokens it was measured on.
        elsewhere: FVU at the other points tried.
        reservations: what a reader should know, in words.
    """

    capture: str
    centred: bool
    fvu: float | None = None
    n_tokens: int = 0
    elsewhere: Mapping[str, float] = field(default_factory=dict)
    reservations: tuple[str, ...] = ()


def check_fit(
    sae: Sae,
    lens: Lens,
    prompts: Prompts | None = None,
    *,
    base: Lens | None = None,
    tuned: bool = False,
    bound: float | None = FVU_BOUND,
) -> SaeFit:
    """Place an SAE in a model and measure how it reconstructs there.

    Args:
        prompts: what to measure on; None checks names and widths only.
        base: the model whose activations are subtracted, for an SAE of differences.
        tuned: this stage was trained after the model the SAE is for. A bad reconstruction is then
            a finding, not a mistake, unless another point is reconstructed far better.
        bound: largest FVU accepted where `tuned` is False; None accepts any, anywhere.

    Raises:
        SiteError: no hook name, an unknown one, or a point this model does not have.
        MismatchError: another width, a reconstruction worse than `bound`, another point that fits
            far better, or a difference SAE without `base` (and the reverse).
        ConventionError: an SAE of centred weights at a point where this cannot be undone.
    """
    if bool(sae.metadata.difference_of) != (base is not None):
        raise MismatchError(
            repr(sae),
            given="a base model" if base is not None else "one model",
            expected=f"activations of {sae.metadata.difference_of or 'one model'}",
            remedy="Pass base= for an SAE of differences, and only for one.",
        )
    capture = capture_of(sae, lens)
    width = width_of(capture, lens)
    if width != sae.d_in:
        raise MismatchError(
            repr(sae),
            given=f"d_in = {sae.d_in}",
            expected=f"{width}, the width of {capture} in this model",
            remedy="Use an SAE of this model size, or check its hook name.",
        )
    centred = _centred(sae, lens, capture)
    reservations = _names(sae, lens)
    if prompts is None:
        return SaeFit(capture, centred, reservations=tuple(reservations))
    ids = sampled(token_ids(lens, prompts))
    reservations += _tokens(sae, lens, ids)
    if not sae.reconstructs:
        return SaeFit(capture, centred, reservations=tuple(reservations))
    x = activations(lens, ids, [capture], base=base)[capture]
    fvu = fvu_of(sae, _seen(x, centred))
    elsewhere: dict[str, float] = {}
    if fvu > SUSPECT and sae.space is not None and sae.space.is_stream:
        elsewhere = _elsewhere(sae, lens, ids, capture, centred, base)
    if bound is not None:
        _refuse_misfit(sae, capture, fvu, elsewhere, tuned, bound)
    reservations = [
        f"{text}: FVU {fvu:.3g} there" if text.startswith("an SAE of") else text
        for text in reservations
    ]
    return SaeFit(capture, centred, fvu, x.shape[0], elsewhere, tuple(reservations))


def fvu_of(sae: Sae, x: Float[Tensor, "n d"]) -> float:
    """Fraction of the variance of `x` that the reconstruction leaves."""
    x = x.to(sae.W_enc.device)
    left = (x - sae.decode(sae.encode_sparse(x))).double().square().sum()
    return float(left / (x - x.mean(0)).double().square().sum().clamp_min(1e-300))


def activations(
    lens: Lens, ids: Sequence[Ids], names: Sequence[str], base: Lens | None = None
) -> dict[str, Float[Tensor, "m width"]]:
    """All tokens but the first of each prompt, in memory."""
    spans = token_spans(ids, "all_mean")
    parts = [taken.values for taken in stream(lens, ids, spans, names, base=base)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def sampled(ids: Sequence[Ids], budget: int = CHECK_TOKENS) -> list[Ids]:
    """Distinct prompts spread evenly over the set, about `budget` tokens of them."""
    distinct = list(dict.fromkeys(ids))
    mean = sum(map(len, distinct)) / len(distinct)
    wanted = min(len(distinct), max(2, round(budget / mean)))
    return [distinct[i * len(distinct) // wanted] for i in range(wanted)]


def _seen(x: Float[Tensor, "n d"], centred: bool) -> Float[Tensor, "n d"]:
    return x - x.mean(-1, keepdim=True) if centred else x


def _elsewhere(
    sae: Sae, lens: Lens, ids: Sequence[Ids], capture: str, centred: bool, base: Lens | None
) -> dict[str, float]:
    """FVU at the other stream points, and in the other convention where there is one."""
    names = list(dict.fromkeys([capture, *(p.canonical.name for p in lens.points())]))
    budget = min(ELSEWHERE_TOKENS, max(32, ELSEWHERE_ELEMENTS // (sae.d_sae * len(names))))
    found = activations(lens, sampled(ids, budget), names, base=base)
    out = {name: fvu_of(sae, _seen(x, centred)) for name, x in found.items() if name != capture}
    if lens.shape.family in LAYER_NORM:
        label = "raw" if centred else "centred"
        out[f"{capture}, {label}"] = fvu_of(sae, _seen(found[capture], not centred))
    return out


def _refuse_misfit(
    sae: Sae,
    capture: str,
    fvu: float,
    elsewhere: Mapping[str, float],
    tuned: bool,
    bound: float,
) -> None:
    best = min(elsewhere, key=lambda name: elsewhere[name], default="")
    if best and elsewhere[best] < min(BETTER[tuned] * fvu, bound):
        raise MismatchError(
            repr(sae),
            given=f"an FVU of {fvu:.3g} at {capture}, and of {elsewhere[best]:.3g} at {best}",
            expected="the best reconstruction at the point the SAE names",
            remedy="Its hook name (or convention) is probably wrong: correct it with "
            "sae.described(hook_name=…, convention=…).",
        )
    if fvu > bound and not tuned:
        raise MismatchError(
            repr(sae),
            given=f"an FVU of {fvu:.3g} at {capture} (1 is what the mean alone leaves)",
            expected=f"at most {bound}",
            remedy="Check that the SAE was trained on this model, at this point, with these "
            "tokens; fvu_bound=None reads it all the same.",
        )


# ---- by name -------------------------------------------------------------------------------
def capture_of(sae: Sae, lens: Lens) -> str:
    """Where the SAE reads, as a name this model captures.

    Raises:
        SiteError: see `check_fit`.
    """
    named = [n for n in (sae.metadata.hf_hook_name, sae.metadata.hook_name) if n]
    if not named:
        raise SiteError(
            repr(sae),
            given="no hook name in its metadata",
            expected="the point it was trained at",
            remedy="sae.described(hook_name='blocks.5.hook_resid_post').",
        )
    space = sae.space
    capture = space.name if space is not None else _site_capture(named, lens)
    if capture is None:
        raise SiteError(
            repr(sae),
            given=f"the hook name {named[0]!r}, which is no point known here",
            expected="a point of the stream, or the input or output of a matrix",
            remedy="sae.described(hook_name=…) with a TransformerLens, Bridge or module name.",
        )
    if space is not None and space.is_stream:
        exists = space in [point.canonical for point in lens.points()]
    else:
        site = site_of(capture)
        exists = site in {s.name for s in lens.sites()}
    if not exists:
        raise SiteError(
            repr(sae),
            given=f"the hook name {named[0]!r}",
            expected=f"a point of this {lens.shape.n_layers}-layer {lens.shape.family} model",
            remedy="Use the SAE of this model, or of one of its layers.",
        )
    return capture


_POINTS = {
    "attn_z": ("attn.o", "in"),
    "mlp_hidden": ("mlp.out", "in"),
    "attn_q": ("attn.q", "out"),
    "attn_k": ("attn.k", "out"),
    "attn_v": ("attn.v", "out"),
    "mlp_gate": ("mlp.gate", "out"),
    "mlp_in": ("mlp.in", "out"),
}


def site_of(capture: str) -> str:
    """The matrix a capture name that is no stream point belongs to."""
    if ":" in capture:
        return capture.partition(":")[0]
    space = Space.parse(capture)
    return f"blocks.{space.layer}.{_POINTS[space.point][0]}"


def width_of(capture: str, lens: Lens) -> int:
    """Width of what is captured."""
    if ":" not in capture and Space.parse(capture).is_stream:
        return lens.shape.d_model
    site = next(s for s in lens.sites() if s.name == site_of(capture))
    side = capture.partition(":")[2] or _POINTS[Space.parse(capture).point][1]
    return site.d_in if side == "in" else site.d_out


def _site_capture(names: Sequence[str], lens: Lens) -> str | None:
    """``SITE:in`` or ``SITE:out`` of a hook name, or None.

    Behind a post-norm ``hook_mlp_out`` is not the matrix's output, and ``hook_mlp_in`` and
    ``ln2.hook_normalized`` are not its input: such names are not guessed at.
    """
    table = lens.shape.table
    for name in names:
        found = re.fullmatch(r"blocks\.(\d+)\.(attn|mlp)\.(\w+)\.hook_(in|out)", name)
        if found:
            return f"blocks.{found[1]}.{found[2]}.{found[3]}:{found[4]}"
        for kind, hook in (("attn.o", "hook_attn_out"), ("mlp.out", "hook_mlp_out")):
            found = re.fullmatch(rf"blocks\.(\d+)\.{hook}", name)
            if found and table.post_norm(kind) is None:  # pyright: ignore[reportArgumentType]
                return f"blocks.{found[1]}.{kind}:out"
        stem, side = name, "out"
        if name.endswith((".input", ".output")):
            stem, side = name.rpartition(".")[0], name.rpartition(".")[2].removesuffix("put")
        layer = re.search(r"\.(\d+)\.", stem)
        if layer is None:
            continue
        for kind, part in table.parts.items():
            if part.fused is None and stem == part.module.format(L=layer[1]):
                return f"blocks.{layer[1]}.{kind}:{side}"
        norm = None if table.mlp_norm is None else table.mlp_norm.format(L=layer[1])
        if side == "out" and stem == norm and not lens.shape.parallel:
            return f"blocks.{layer[1]}.mlp.in:in"
        if stem == table.mlp.format(L=layer[1]):
            return f"blocks.{layer[1]}.mlp.{'in:in' if side == 'in' else 'out:out'}"
    return None


def _centred(sae: Sae, lens: Lens, capture: str) -> bool:
    """Whether activations of this raw model are centred before encoding.

    Centring the writing weights takes the mean over coordinates out of the stream and, the norm
    subtracting it anyway, changes nothing else; RMS norms do not, and TransformerLens then leaves
    the weights alone.
    """
    if sae.metadata.convention != "centred" or lens.shape.family not in LAYER_NORM:
        return False
    stream_point = ":" not in capture and Space.parse(capture).is_stream
    written = capture.endswith(("attn.o:out", "mlp.out:out"))
    if not (stream_point or written):
        raise ConventionError(
            repr(sae),
            given=f"training on centred weights, at {capture}",
            expected="raw weights, or a point of the stream",
            remedy="Use an SAE of the unprocessed model (from_pretrained_no_processing).",
        )
    return True


def _names(sae: Sae, lens: Lens) -> list[str]:
    own, here = sae.metadata.model_name, model_name(lens)
    found = []
    if own and own.rpartition("/")[2].lower() != here.rpartition("/")[2].lower():
        found.append(f"an SAE of {own} on {here or 'a model without a name'}")
    if sae.metadata.convention == "unknown" and lens.shape.family in LAYER_NORM:
        found.append("the SAE does not say whether it was trained on centred weights")
    return found


def _tokens(sae: Sae, lens: Lens, ids: Sequence[Ids]) -> list[str]:
    found, longest = [], max(map(len, ids))
    bos = getattr(lens.tokenizer, "bos_token_id", None)
    if sae.metadata.prepend_bos and bos is not None and any(row[0] != bos for row in ids):
        found.append("the SAE was trained behind a BOS token, which some prompts lack")
    if sae.metadata.context_size and longest > sae.metadata.context_size:
        found.append(
            f"prompts of {longest} tokens for an SAE trained on {sae.metadata.context_size}"
        )
    return found


def model_name(lens: Lens) -> str:
    """What the model calls itself: its hub id or folder, or an empty string."""
    for owner in (lens.root, lens.model):
        for config in (getattr(owner, "config", None), getattr(owner, "cfg", None)):
            for name in ("_name_or_path", "model_name"):
                found = getattr(config, name, None)
                if isinstance(found, str) and found:
                    return found
    return ""
