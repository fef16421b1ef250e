"""Activations the user already has, as `PairedActivations`: nothing is run or loaded.

Rows are in the order of `prompt_list`: contrast by contrast, pair by pair, the positive side
first. Run your own `run_with_cache` on those prompts and hand the cache over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_weightspace.core.activations import PairedActivations
from mi_weightspace.core.contrasts import ContrastSet
from mi_weightspace.core.errors import ProcessedWeightsError, PromptError, WeightspaceError
from mi_weightspace.core.space import Space

POSITIONS = ("last", "all_mean", "first_k")
FIRST_K = 5


def prompt_list(contrasts: ContrastSet) -> list[str | tuple[int, ...]]:
    """Every prompt, in the order `from_cache` expects its rows: + and − of each pair in turn."""
    return [
        side
        for contrast in contrasts
        for pair in contrast.pairs
        for side in (pair.positive, pair.negative)
    ]


def from_cache(
    cache: Any,
    contrasts: ContrastSet,
    *,
    stage: str,
    position: str = "last",
    lengths: Int[Tensor, " rows"] | Sequence[int] | None = None,
    points: Sequence[str | Space] | None = None,
    model_hash: str = "",
    convention: str = "raw",
) -> PairedActivations:
    """Paired activations from a cache or tensors, in any of three shapes.

    With n pairs in all contrasts together: (2n, tokens, d) right-padded, pooled here; (2n, d); or
    (n, 2, d), positive first. The last two are taken as pooled already.

    Args:
        cache: a TransformerLens `ActivationCache`, a dict from names (``blocks.5.hook_resid_post``
            or ``resid_post.5``) to tensors or saved nnsight values (a tuple counts as its first
            member), or a list of these, one for each batch of rows.
        position: pooling rule, ``last``, ``all_mean`` or ``first_k``; the first token is left out
            of the means.
        lengths: tokens of each prompt without padding; needed for the first shape unless the
            contrasts are token ids.
        points: what to keep; default every residual-stream point found.
        convention: how the model's weights were processed; ``raw`` if not at all.

    Raises:
        PromptError: no stream points, a missing point, a shape or row count that does not fit the
            contrasts, missing lengths, an unknown position, values that are not finite.
        ProcessedWeightsError: a cache of a model with folded norms, given as ``raw``.
    """
    batches = list(cache) if isinstance(cache, list | tuple) else [cache]
    for batch in batches:
        _check_processing(batch, convention)
    pooled = {
        space.name: _pool(
            torch.cat(parts) if len(parts) > 1 else parts[0], space, contrasts, position, lengths
        )
        for space, parts in _select(batches, points).items()
    }
    values: dict[tuple[str, str], Float[Tensor, "n 2 d"]] = {}
    for name, value in pooled.items():
        start = 0
        for contrast in contrasts:
            values[contrast.name, name] = value[start : start + len(contrast)]
            start += len(contrast)
    return PairedActivations(
        stage=stage,
        model_hash=model_hash,
        contrasts=contrasts,
        position=position,
        points=tuple(Space.parse(name) for name in pooled),
        values=values,
        site_shift={},
        site_mean={},
        convention=convention,
    )


def _check_processing(batch: Any, convention: str) -> None:
    config = getattr(getattr(batch, "model", None), "cfg", None)
    norm = getattr(config, "normalization_type", None)
    if convention == "raw" and norm in ("LNPre", "RMSPre"):
        raise ProcessedWeightsError(
            "cache",
            given=f"activations of a model with {norm}: norm gains folded into its weights",
            expected="activations of the raw model",
            remedy="Load it with from_pretrained_no_processing, or name the convention.",
        )


def _select(batches: Sequence[Any], points: Sequence[str | Space] | None) -> dict[Space, list]:
    """Tensors of each point, one for each batch, in forward order."""
    tables = [_table(batch) for batch in batches]
    named: dict[Space, str] = {}
    for name in tables[0]:
        space = _space(name)
        if space is not None:
            named.setdefault(space, name)
    if points is None:
        wanted = [space for space in named if space.is_stream]
    else:
        wanted = [Space.parse(point).canonical for point in points]
    missing = [s for s in wanted if any(named.get(s) not in table for table in tables)]
    if missing or not wanted:
        raise PromptError(
            "cache",
            given=f"nothing for {[s.name for s in missing[:8]]}"
            if missing
            else f"no residual-stream point among {sorted(map(str, tables[0]))[:8]}",
            expected="names such as 'blocks.5.hook_resid_post' or 'resid_post.5' in every batch",
            remedy="Cache those points, or rename the keys.",
        )
    order = ("resid_pre", "resid_mid", "resid_post")

    def depth(space: Space) -> tuple[int, int, str]:
        rank = order.index(space.point) if space.point in order else len(order)
        return (-1 if space.layer is None else space.layer, rank, space.point)

    return {
        space: [_tensor(table[named[space]], space) for table in tables]
        for space in sorted(wanted, key=depth)
    }


def _table(batch: Any) -> Mapping[str, Any]:
    inner = getattr(batch, "cache_dict", batch)
    if not isinstance(inner, Mapping) or not inner:
        raise PromptError(
            "cache",
            given=f"a {type(batch).__name__}" if not isinstance(inner, Mapping) else "nothing",
            expected="an ActivationCache, or a dict from point names to tensors",
            remedy="For nnsight, collect the saved values in a dict by name.",
        )
    return {getattr(key, "name", key): value for key, value in inner.items()}


def _space(name: Any) -> Space | None:
    """The space a key names; a cache holds much else."""
    try:
        return Space.parse(name).canonical
    except WeightspaceError:
        return None


def _tensor(value: Any, space: Space) -> Tensor:
    found = getattr(value, "value", value)
    if isinstance(found, tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise PromptError(
            f"cache at {space}",
            given=f"a {type(found).__name__}",
            expected="a tensor",
            remedy="Save the value inside the trace and hand over what was saved.",
        )
    found = found.detach().float().cpu()
    return found.flatten(2) if found.ndim == 4 else found  # heads side by side, as W_O reads them


def _pool(
    value: Tensor,
    space: Space,
    contrasts: ContrastSet,
    position: str,
    lengths: Tensor | Sequence[int] | None,
) -> Float[Tensor, "n 2 d"]:
    n = sum(len(contrast) for contrast in contrasts)
    if value.ndim == 3 and value.shape[:2] == (n, 2):
        return value
    if value.ndim == 2 and len(value) == 2 * n:
        return value.reshape(n, 2, -1)
    if value.ndim != 3 or len(value) != 2 * n:
        raise PromptError(
            f"activations at {space}",
            given=f"shape {tuple(value.shape)}",
            expected=f"({2 * n}, tokens, d), ({2 * n}, d) or ({n}, 2, d) for {n} pairs",
            remedy="Run the prompts of probes.prompt_list(contrasts), in that order, with a batch "
            "dimension.",
        )
    span = _spans(_lengths(lengths, contrasts, value.shape[1], space), value.shape[1], position)
    weights = span / span.sum(1, keepdim=True)
    return torch.einsum("btd,bt->bd", value.masked_fill(~span[..., None], 0.0), weights).reshape(
        n, 2, -1
    )


def _lengths(
    lengths: Tensor | Sequence[int] | None, contrasts: ContrastSet, columns: int, space: Space
) -> Int[Tensor, " rows"]:
    prompts = prompt_list(contrasts)
    if lengths is None:
        known = [len(prompt) for prompt in prompts if not isinstance(prompt, str)]
        if len(known) < len(prompts):
            raise PromptError(
                f"activations at {space}",
                given="padded rows of text prompts without lengths",
                expected="the number of tokens of each prompt",
                remedy="Pass lengths=attention_mask.sum(1).",
            )
        lengths = known
    found = torch.as_tensor(lengths).long().cpu()
    if found.shape != (len(prompts),) or int(found.min()) < 1 or int(found.max()) > columns:
        raise PromptError(
            f"lengths of the activations at {space}",
            given=f"shape {tuple(found.shape)}, largest {int(found.max()) if found.numel() else 0}",
            expected=f"{len(prompts)} lengths from 1 to {columns}",
            remedy="Give one length a row; keep the batches in the order of the prompts.",
        )
    return found


def _spans(lengths: Int[Tensor, " rows"], columns: int, position: str) -> Tensor:
    """(rows, columns) bool: the tokens that are averaged."""
    at = torch.arange(columns)[None]
    end = lengths[:, None]
    first = (end > 1).long()  # the first token's activation is an attention sink
    if position == "last":
        return at == end - 1
    if position == "all_mean":
        return (at >= first) & (at < end)
    if position == "first_k":
        return (at >= first) & (at < end.clamp(max=FIRST_K + 1))
    raise PromptError(
        "position",
        given=repr(position),
        expected=f"one of {list(POSITIONS)}",
        remedy="Pool other positions yourself and pass (n, 2, d), or use models.harvest.",
    )
