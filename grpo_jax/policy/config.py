"""The config of a decoder, read from a Hugging Face `config.json` and written back to one.

`ModelConfig` has all options that change a logit and no others. An option that changes the numbers and is not
implemented is an error and is never ignored. So a policy that loads computes what its config asks for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from grpo_jax.errors import UserError, shown
from grpo_jax.experiment import ScratchConfig
from grpo_jax.policy.hf_fields import LARGEST, check_fields
from grpo_jax.policy.rope import RopeConfig, inverse_frequencies, rope_from_hf, rope_to_hf

__all__ = ["Activation", "ModelConfig", "RopeConfig", "from_hf", "from_scratch", "inverse_frequencies", "to_hf"]

Activation = Literal["silu", "gelu_tanh", "gelu"]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}

# The values that transformers assumes for missing keys of a config.json. Sizes have no default, except for Gemma 3,
# whose published configs leave them out.
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, **_QWEN},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, **_QWEN},
    "gemma2": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        **_GEMMA,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        **_GEMMA,
    },
}


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the options of a decoder. Hashable, so it can be a static argument of a jitted function.

    Attributes:
      vocab_size: number of token ids, V.
      hidden_size: size of the hidden states, D.
      intermediate_size: size of the MLP, F.
      num_layers: number of layers, L.
      num_heads: number of query heads, H.
      num_kv_heads: number of key/value heads, N; a divisor of `num_heads`.
      head_dim: size of a head, K.
      max_positions: the context length that the weights were made for. It is not enforced.
      family: transformers' `model_type`, for export.
      norm_eps: added to the mean square in every RMS norm.
      activation: the activation of the gated MLP, `down(activation(gate(x)) * up(x))`.
      rope: rotary embedding of the layers with full attention, and of sliding layers if `local_rope` is None.
      local_rope: rotary embedding of sliding layers if it is a different one (Gemma 3).
      sliding_window: number of positions that a token in a sliding layer attends to, its own included; None if no layer
        slides.
      sliding_layers: for each layer, whether it slides.
      qkv_bias, o_bias, mlp_bias: whether q, k and v, o, and the MLP have biases.
      qk_norm: an RMS norm over each head of q and k, before the rotation (Qwen 3, Gemma 3).
      post_norms: RMS norms after attention and after the MLP, before the residual sum (Gemma 2 and 3).
      norm_offset: a norm multiplies by `norm_offset + scale` (Gemma: 1).
      embed_scale: factor of the embedding (Gemma: sqrt(hidden_size)).
      attention_softcap: c in `c * tanh(scores / c)`, applied before the mask; None for no cap.
      final_softcap: the same for the logits.
      query_scale: factor of q·k.
      tied: the output head is the transposed embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    family: str = "llama"
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    query_scale: float = 1.0
    tied: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads = {self.num_heads} is not a multiple of num_key_value_heads = "
                f"{self.num_kv_heads}, so the query heads cannot be divided evenly among the key/value heads."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim = {self.head_dim} is odd, but rotary embeddings need an even number.")
        if len(self.sliding_layers) != self.num_layers:
            raise UserError(
                f"layer_types has {len(self.sliding_layers)} layers, but num_hidden_layers = {self.num_layers}."
            )


def from_scratch(scratch: ScratchConfig) -> ModelConfig:
    """Returns the config of a small Llama from scratch: one token per character, and pad, begin and end (0, 1, 2)."""
    head_dim = scratch.hidden_size // scratch.num_heads
    return ModelConfig(
        vocab_size=len(scratch.alphabet) + 3,
        hidden_size=scratch.hidden_size,
        intermediate_size=4 * scratch.hidden_size,
        num_layers=scratch.num_layers,
        num_heads=scratch.num_heads,
        num_kv_heads=scratch.num_heads,
        head_dim=head_dim,
        max_positions=2048,
        sliding_layers=(False,) * scratch.num_layers,
        query_scale=head_dim**-0.5,
        tied=True,
    )


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads the content of a Hugging Face `config.json`, with the keys of transformers 5 or of older versions.

    Raises `UserError` for an unknown `model_type`, a missing or malformed size, and any option that changes the numbers
    and is not implemented here.
    """
    config = dict(config)
    if config.get("model_type") == "gemma3":  # the multimodal wrapper, of which only the text part is read
        text_config = config.get("text_config") or {}
        if not isinstance(text_config, Mapping):
            raise UserError(f"config.json has text_config = {shown(text_config)}: it must be an object with names.")
        inner = dict(text_config)
        for key in ("tie_word_embeddings", "quantization_config"):
            if key in config:
                inner.setdefault(key, config[key])
        config = {**inner, "model_type": "gemma3_text"}
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise UserError(f"config.json has model_type {shown(family)}, which is none of {', '.join(_DEFAULTS)}.")
    check_fields(config)
    if config.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config: quantised Hugging Face checkpoints cannot be read. Use the "
            "unquantised checkpoint (or a GGUF file, which is dequantised)."
        )
    if config.get("use_bidirectional_attention"):
        raise UserError("config.json has use_bidirectional_attention: true, but a policy is causal.")
    gemma = family.startswith("gemma")
    given = {**_DEFAULTS[family], **{k: v for k, v in config.items() if v is not None or k in _NULLABLE}}
    num_layers, num_heads = _positive(given, "num_hidden_layers"), _positive(given, "num_attention_heads")
    hidden_size = _positive(given, "hidden_size")
    if config.get("num_key_value_heads", num_heads) is None:
        given["num_key_value_heads"] = num_heads
    given.setdefault("num_key_value_heads", num_heads)
    given.setdefault("head_dim", hidden_size // num_heads)
    head_dim = _positive(given, "head_dim")
    activation = given["hidden_activation"] if gemma else given.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json has activation {activation!r}, which is none of {', '.join(_ACTIVATIONS)}.")
    window, sliding = _sliding(family, given, num_layers)
    max_positions = _positive(given, "max_position_embeddings")
    rope, local_rope = rope_from_hf(given)
    attention_bias = bool(given.get("attention_bias", False))
    return ModelConfig(
        vocab_size=_positive(given, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(given, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_positive(given, "num_key_value_heads"),
        head_dim=head_dim,
        max_positions=max_positions,
        family=family,
        norm_eps=float(given.get("rms_norm_eps", 1e-6)),
        activation=_ACTIVATIONS[activation],
        rope=rope,
        local_rope=local_rope if any(sliding) else None,
        sliding_window=window,
        sliding_layers=sliding,
        qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
        o_bias=family not in ("qwen2", "mistral") and attention_bias,
        mlp_bias=family == "llama" and bool(given.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=hidden_size**0.5 if gemma else 1.0,
        # Gemma 3's config has attn_logit_softcapping too, but transformers never applies it
        attention_softcap=given["attn_logit_softcapping"] if family == "gemma2" else None,
        final_softcap=given.get("final_logit_softcapping") if gemma else None,
        query_scale=float(given["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        tied=bool(given.get("tie_word_embeddings", False)),
    )


# Keys for which null is a value, not a missing key.
_NULLABLE = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    most = LARGEST.get(key, 2**24)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        found = f"{key} = {shown(value)}" if key in config else f"no {key}"
        bound = f" of at most {most}" if isinstance(value, int) and value > most else ""
        raise UserError(
            f"config.json of model_type {config['model_type']!r} has {found}: it must be a positive integer{bound}."
        )
    return value


def _sliding(family: str, config: Mapping[str, Any], num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Returns the sliding window, and for each layer whether it has the window."""
    window = None if family == "llama" else config["sliding_window"]
    if family.startswith("qwen") and not config["use_sliding_window"]:
        window = None
    types = config.get("layer_types") if family not in ("llama", "mistral") else None
    if types is not None:
        strange = sorted(set(types) - {"full_attention", "sliding_attention"})
        if strange:
            raise UserError(f"config.json has layer type {strange[0]!r}: only full and sliding attention can be read.")
        sliding = tuple(kind == "sliding_attention" for kind in types)
    elif family.startswith("gemma"):
        pattern = 2 if family == "gemma2" else config["sliding_window_pattern"]
        sliding = tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    else:
        first = config["max_window_layers"] if family.startswith("qwen") else 0
        sliding = tuple(window is not None and layer >= first for layer in range(num_layers))
    if not any(sliding):
        return None, sliding
    if not isinstance(window, int) or window <= 0:
        raise UserError(f"config.json has layers with sliding attention, but sliding_window = {window!r}.")
    return window, sliding


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of a `config.json` from which `from_hf` and transformers read the same decoder.

    Rotary embeddings are written with the keys of transformers 5 and with the older keys. Without the older keys,
    transformers 4 would silently use its defaults.
    """
    gemma, qwen = config.family.startswith("gemma"), config.family.startswith("qwen")
    written: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation" if gemma else "hidden_act": _HF_ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tied,
        **rope_to_hf(config.rope, config.local_rope, per_layer_type=config.family == "gemma3_text"),
    }
    if config.family in ("llama", "qwen3") or gemma:
        written["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        written["mlp_bias"] = config.mlp_bias
    else:
        written["sliding_window"] = config.sliding_window
    if qwen:
        written["use_sliding_window"] = config.sliding_window is not None
        written["max_window_layers"] = config.num_layers - sum(config.sliding_layers)
    if qwen or gemma:
        written["layer_types"] = ["sliding_attention" if s else "full_attention" for s in config.sliding_layers]
    if gemma:
        scalar = config.query_scale**-2
        written["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar
        written["attn_logit_softcapping"] = config.attention_softcap
        written["final_logit_softcapping"] = config.final_softcap
    return written
