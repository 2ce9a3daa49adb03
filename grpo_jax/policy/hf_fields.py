"""The fields of a Hugging Face `config.json` that are read: types and ranges, checked before anything is computed.

A size is bounded by what no model comes near, so that a damaged one is refused before memory is taken for it.
"""

from collections.abc import Mapping
from typing import Any

from grpo_jax.errors import UserError, shown
from grpo_jax.experiment.checked import admits

LARGEST = {"num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 2**16}
"""The largest sizes; all others are at most 2**24."""

_FLAGS = (
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "use_sliding_window",
    "truncate",
)
_TEXTS = ("hidden_act", "hidden_activation", "rope_type", "type")
_COUNTS = (
    "sliding_window",
    "sliding_window_pattern",
    "max_window_layers",
    "original_max_position_embeddings",
)
_POSITIVE = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
_ROPE = ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention")


def check_fields(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raises `UserError` for the first field of a `config.json`, or of its rotary embeddings, that is out of range.

    null stands for the default. Fields that are not read are not looked at.
    """

    def refuse(name: str, wanted: str) -> None:
        raise UserError(f"{where} has {name} = {shown(config[name])}: it must be {wanted}.")

    for name in (name for name in config if config[name] is not None):
        value = config[name]
        if name in _FLAGS and not isinstance(value, bool):
            refuse(name, "true or false")
        if name in _TEXTS and not isinstance(value, str):
            refuse(name, "a name")
        least = 0 if name == "max_window_layers" else 1
        if name in _COUNTS and not (admits(int, value) and least <= value <= 2**31 - 1):
            refuse(name, f"a number from {least} to 2**31 - 1")
        if name in _POSITIVE and not (admits(float, value) and 1e-30 <= value <= 1e30):
            refuse(name, "a positive number of float32")
        if name in ("mscale", "mscale_all_dim") and not (admits(float, value) and 0 <= value <= 1e6):
            refuse(name, "0 or a positive number")
        if name == "layer_types" and not admits(list[str], value):
            refuse(name, "a list of names")
        if name in _ROPE:
            if not isinstance(value, dict):
                refuse(name, "an object with names")
            check_fields(value, f"{where}, {name},")
