"""Other libraries' names for points of the forward pass, read as a `Space`.

Known are TransformerLens (``blocks.5.hook_resid_post``, ``blocks.5.attn.hook_z``), its Bridge
(``blocks.5.hook_out``), and Hugging Face module paths of a block or of the input of the two
matrices that write to the stream (``model.layers.5``, ``model.layers.5.self_attn.o_proj.input``).
A module path without ``.input`` or ``.output`` means its output, as SAELens reads it.
"""

from __future__ import annotations

import re

from mi_weightspace.core.space import Point, Space

_BLOCKS = r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)"
_O = r"\.(?:self_attn\.o_proj|attn\.c_proj|attn\.out_proj|attention\.dense)"
_OUT = r"\.mlp\.(?:down_proj|c_proj|fc_out|dense_4h_to_h)"
_PATTERNS: tuple[tuple[str, Point], ...] = (
    (r"blocks\.(\d+)\.hook_resid_pre", "resid_pre"),
    (r"blocks\.(\d+)\.hook_in", "resid_pre"),
    (r"blocks\.(\d+)\.hook_resid_mid", "resid_mid"),
    (r"blocks\.(\d+)\.hook_resid_post", "resid_post"),
    (r"blocks\.(\d+)\.hook_out", "resid_post"),
    (r"blocks\.(\d+)\.attn\.hook_z", "attn_z"),
    (r"blocks\.(\d+)\.attn\.o\.hook_in", "attn_z"),
    (r"blocks\.(\d+)\.attn\.hook_q", "attn_q"),
    (r"blocks\.(\d+)\.attn\.hook_k", "attn_k"),
    (r"blocks\.(\d+)\.attn\.hook_v", "attn_v"),
    (r"blocks\.(\d+)\.mlp\.hook_post", "mlp_hidden"),
    (r"blocks\.(\d+)\.mlp\.out\.hook_in", "mlp_hidden"),
    (_BLOCKS + r"\.input", "resid_pre"),
    (_BLOCKS + r"(?:\.output)?", "resid_post"),
    (_BLOCKS + _O + r"\.input", "attn_z"),
    (_BLOCKS + _OUT + r"\.input", "mlp_hidden"),
    *((rf"{point}\.(\d+)", point) for point in ("resid_pre", "resid_mid", "resid_post")),
)


def space_of_hook(name: str) -> Space | None:
    """The point a hook name means, or None where it is none of the known ones."""
    for pattern, point in _PATTERNS:
        found = re.fullmatch(pattern, name)
        if found is not None:
            return Space(point, int(found[1]))
    return None


def hook_of_space(space: Space) -> str:
    """TransformerLens' name of a point of the stream or of one of the two inner activations."""
    inner = {"attn_z": "attn.hook_z", "mlp_hidden": "mlp.hook_post"}
    return f"blocks.{space.layer}.{inner.get(space.point, f'hook_{space.point}')}"
