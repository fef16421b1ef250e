"""What an SAE says of itself, the rules there are, and the checks of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mi_weightspace.core.errors import MismatchError

Convention = Literal["raw", "centred", "unknown"]
Rule = Literal["relu", "gated", "topk", "abstopk", "jumprelu", "pursuit"]
RULES: dict[str, Rule] = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "abstopk": "abstopk",
    "jumprelu": "jumprelu",
    "matching_pursuit": "pursuit",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""Activation rule of each architecture. Batch-top-k and Matryoshka SAEs are saved, and used, as
``jumprelu``."""


@dataclass(frozen=True)
class SaeMetadata:
    """What the SAE says of itself; empty or None where it does not.

    Attributes:
        hook_name: where it reads (TransformerLens, Bridge or Hugging Face module name).
        hf_hook_name: the same as a Hugging Face module path, which wins where both are given.
        hook_name_out: where a transcoder writes.
        model_name: the model whose activations it was trained on.
        convention: weights of that model: ``raw``; ``centred`` (mean over coordinates taken out of
            the stream, TransformerLens' ``center_writing_weights``); ``unknown``.
        trained_k: the k of batch-top-k training; its ``jumprelu`` threshold is a slow running mean.
        trained_architecture: architecture in training, where inference uses another.
        difference_of: names of the two models, for an SAE of activation differences.
        source: file, release or object it came from.
    """

    hook_name: str = ""
    hf_hook_name: str = ""
    hook_name_out: str = ""
    model_name: str = ""
    prepend_bos: bool | None = None
    context_size: int | None = None
    convention: Convention = "unknown"
    trained_k: float | None = None
    trained_architecture: str = ""
    difference_of: str = ""
    source: str = ""


_EXPECTED: Mapping[Rule, tuple[str, ...]] = {
    "relu": ("b_enc",),
    "topk": ("b_enc",),
    "abstopk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "pursuit": (),
}


def needed(architecture: str) -> tuple[str, ...]:
    """Names of the tensors an architecture is saved by; a tied encoder is no tensor of its own."""
    rule = RULES[architecture]
    encoder = () if rule == "pursuit" else ("W_enc",)
    return (*encoder, "W_dec", "b_dec", *_EXPECTED[rule])


def check_parts(
    architecture: str, tensors: Mapping[str, Tensor], k: int | None, source: str = ""
) -> None:
    """Architecture, presence, shapes, finite values, k.

    Raises:
        MismatchError: the subject names `source` and the part that is wrong.
    """
    source = source or "SAE"
    if architecture not in RULES:
        raise _refusal(source, "architecture", repr(architecture), f"one of {sorted(RULES)}")
    for name in ("W_enc", *needed(architecture)):
        if name not in tensors:
            raise _refusal(source, name, "nothing", f"a tensor, as {architecture} SAEs have")
    shapes = {name: tuple(tensors[name].shape) for name in ("W_enc", "W_dec")}
    if any(len(shape) != 2 for shape in shapes.values()):
        raise _refusal(source, "W_enc and W_dec", f"shapes {shapes}", "two matrices")
    d_in, d_sae = shapes["W_enc"]
    d_out = shapes["W_dec"][1] if "transcoder" in architecture else d_in
    expected = {"W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    expected |= {name: (d_sae,) for names in _EXPECTED.values() for name in names}
    for name, value in tensors.items():
        if name in expected and tuple(value.shape) != expected[name]:
            given = f"shape {tuple(value.shape)}"
            raise _refusal(source, name, given, f"shape {expected[name]}, with W_enc's widths")
        if not bool(torch.isfinite(value).all()):
            raise _refusal(source, name, "values that are not finite", "finite weights")
    if RULES[architecture] in ("topk", "abstopk") and not (k and 0 < k <= d_sae):
        raise _refusal(source, "k", repr(k), f"between 1 and d_sae = {d_sae}")
    if RULES[architecture] == "pursuit" and not torch.equal(tensors["W_enc"], tensors["W_dec"].T):
        raise _refusal(source, "W_enc", "a matrix of its own", "the transpose of W_dec")


def check_stops(residual_threshold: float, max_iterations: int | None, source: str = "") -> None:
    """Stopping rules of a pursuit.

    Raises:
        MismatchError: no finite threshold, or fewer iterations than one.
    """
    source = source or "SAE"
    if not math.isfinite(residual_threshold):
        given = repr(residual_threshold)
        raise _refusal(source, "residual_threshold", given, "a finite number (0: no such stop)")
    if max_iterations is not None and max_iterations < 1:
        raise _refusal(source, "max_iterations", repr(max_iterations), "None, or at least 1")


def _refusal(source: str, key: str, given: str, expected: str) -> MismatchError:
    return MismatchError(
        f"{source}, {key}",
        given=given,
        expected=expected,
        remedy="Save the SAE again, or load it from its release.",
    )


def blank_biases(rule: Rule, bias: Float[Tensor, " d_sae"]) -> dict[str, Tensor]:
    """A rule's parameters with `bias` added to every pre-activation and nothing else."""
    zero = torch.zeros_like(bias)
    if rule == "pursuit":  # it has none
        return {}
    if rule == "gated":
        return {"b_gate": bias, "b_mag": bias, "r_mag": zero}
    return {"b_enc": bias, "threshold": zero} if rule == "jumprelu" else {"b_enc": bias}


def level_of(margin: Float[Tensor, "n d_sae"], l0: float) -> float:
    """The value that ``round(n·l0)`` margins exceed, half-way to the next."""
    count = min(max(1, round(margin.shape[0] * l0)), margin.numel() - 1)
    high, low = margin.flatten().topk(count + 1).values[-2:].tolist()
    return (low + high) / 2
