"""``config.json`` of a checkpoint as a configuration object: every size checked before it is used.

A configuration decides how much is built, so a size that no model has is refused before any
library sees it; what the library then refuses is told with the file's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mi_weightspace.core.errors import CheckpointError

MOST_LAYERS = 10_000
MOST = 2**31 - 1
_SIZES = (
    "num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "vocab_size",
    "max_position_embeddings", "n_positions", "rotary_dim",
)  # fmt: skip
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "n_inner", "rotary_dim"}
SETTINGS = (
    "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "rope_theta", "rope_parameters", "rope_scaling", "rotary_pct",
    "rotary_dim", "partial_rotary_factor", "sliding_window", "layer_types",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
    "scale_attn_weights", "tie_word_embeddings",
)  # fmt: skip
"""What decides the function of a model and is in no tensor."""
_FLAGS = ("tie_word_embeddings", "use_parallel_residual", "attention_bias", "mlp_bias")


def config_of(family: str, fields: Mapping[str, Any], where: str) -> Any:
    """The library's configuration object of one family.

    Args:
        fields: of ``config.json``, without ``model_type``.
        where: the file, for messages.

    Raises:
        CheckpointError: a size that is no positive whole number, a flag that is none, or whatever
            the library refuses; names the file and the key.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    for key in _SIZES:
        if key in fields and not (fields[key] is None and key in _MAY_BE_NULL):
            check_size(key, fields[key], where)
    for key in _FLAGS:
        if key in fields and not isinstance(fields[key], bool):
            raise refusal(where, key, fields[key], "true or false")
    heads, width = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads and width and not fields.get("head_dim") and width % heads:
        raise refusal(where, "hidden_size", width, f"a multiple of num_attention_heads = {heads}")
    try:
        return AutoConfig.for_model(family, **fields)
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise _unusable(where, error) from error
    except ZeroDivisionError as error:
        raise _unusable(where, error) from error


def check_size(key: str, value: Any, where: str) -> None:
    """Refuse what is no size of a model.

    Raises:
        CheckpointError: not a whole number from 1 to `MOST` (`MOST_LAYERS` for layers).
    """
    most = MOST_LAYERS if key in {"num_hidden_layers", "n_layer", "n_layers"} else MOST
    if type(value) is not int or not 1 <= value <= most:
        raise refusal(where, key, value, f"a whole number from 1 to {most:,}")


def settings_of(fields: Mapping[str, Any]) -> dict[str, str]:
    """`SETTINGS` that a ``config.json`` has, each as JSON text."""
    return {k: json.dumps(fields[k], sort_keys=True) for k in SETTINGS if k in fields}


def refusal(where: str, key: str, value: Any, expected: str) -> CheckpointError:
    written = repr(value)
    return CheckpointError(
        f"{where}, {key}",
        given=written if len(written) <= 80 else written[:80] + " …",
        expected=expected,
        remedy="Copy config.json of the model these weights belong to.",
    )


def _unusable(where: str, error: Exception) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CheckpointError(
        where,
        given=f"a configuration that is not usable ({type(error).__name__}: {' '.join(lines)})",
        expected="the configuration written by save_pretrained",
        remedy="Copy config.json of the model these weights belong to.",
    )
