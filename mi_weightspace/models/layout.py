"""Does a checkpoint hold what its configuration says: every layer the same tensors, none beyond.

Everything here reads headers, no data. A vector that is absent would pass for one that the
architecture does not have (no bias, no gain), so presence is checked before anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mi_weightspace.core.errors import CheckpointError, MismatchError
from mi_weightspace.core.site import Site
from mi_weightspace.models.families import Family
from mi_weightspace.models.grammar import ModelShape, part_of, stored_shape

Header = tuple[tuple[int, ...], str]
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".masked_bias", ".inv_freq")
"""Ends of keys that hold no weight: masks and frequencies some libraries save."""
_GAINLESS = frozenset({"olmo"})
"""Families whose norms have no weights."""
_SHIFTED = frozenset({"gpt2", "gptj", "gpt_neox"})
"""Families whose norms always have a bias."""


def bare(key: str, table: Family) -> str:
    """A key without the base model's prefix, with which some libraries save and others do not."""
    prefixes = [p for p in table.prefixes if p]
    prefix = next((p for p in prefixes if key.startswith(p)), "")
    return key.removeprefix(prefix)


def check_layers(headers: Mapping[str, Header], shape: ModelShape, where: str) -> None:
    """Every layer holds the same tensors in the same shapes, and there are `n_layers` of them.

    Raises:
        CheckpointError: a layer beyond the configuration's, or one that lacks what another has.
    """
    rule = re.compile(re.escape(bare(shape.table.blocks, shape.table)) + r"\.(\d+)\.(.+)")
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, (size, _) in headers.items():
        found = rule.fullmatch(bare(key, shape.table))
        if found is None or key.endswith(BUFFERS):
            continue
        if int(found[1]) >= shape.n_layers:
            raise _refusal(
                key, where, "a layer that config.json does not have", f"{shape.n_layers} layers"
            )
        layers.setdefault(int(found[1]), {})[found[2]] = size
    every = {name: size for own in layers.values() for name, size in own.items()}
    for layer in range(shape.n_layers):
        own = layers.get(layer, {})
        for name, size in every.items():
            key = f"{shape.table.blocks}.{layer}.{name}"
            if name not in own:
                raise _refusal(key, where, "no such tensor", "what the other layers have")
            if own[name] != size:
                raise _refusal(key, where, f"shape {own[name]}", f"{size}, as in other layers")


def check_vectors(
    site: Site, found: Mapping[str, Header | None], shape: ModelShape, where: str
) -> None:
    """Biases and norm gains around one matrix: sizes, and gains that must be there.

    Args:
        found: ``bias``, ``pre`` and ``post`` (norm gains), ``shift`` (the pre-norm's bias) where
            the family has them -> key and header; None where the file has no such tensor.

    Raises:
        CheckpointError: a missing gain, or a vector of another length.
    """
    part = part_of(site, shape)
    rows = stored_shape(site, shape)[0 if part.layout == "linear" else 1]
    for key, header in found.items():
        what, _, name = key.partition(":")
        if header is None:
            gain = what in {"pre", "post"} and shape.family not in _GAINLESS
            if gain or (what == "shift" and shape.family in _SHIFTED):
                raise _refusal(name, where, "no such tensor", f"the {shape.family} layout")
            continue
        wanted = (rows,) if what == "bias" else (shape.d_model,)
        if header[0] != wanted:
            raise _refusal(name, where, f"shape {header[0]}", f"{wanted} by the configuration")


def agree_layouts(
    before: Mapping[str, tuple[int, ...]], after: Mapping[str, tuple[int, ...]], stages: str
) -> None:
    """Two checkpoints hold the same tensors in their blocks, and nothing in two sizes.

    Raises:
        MismatchError: names the first tensor that differs.
    """
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if one == other:
            continue
        raise MismatchError(
            f"stages {stages}, tensor {key}",
            given=f"{one or 'nothing'} and {other or 'nothing'}",
            expected="the same tensors in the same shapes",
            remedy="Compare stages of one training run: a bias or norm that only one has is "
            "another architecture.",
        )


def _refusal(key: str, where: str, given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {key} of {where}",
        given=given,
        expected=expected,
        remedy="The weights are incomplete, or belong to another model than config.json says.",
    )
