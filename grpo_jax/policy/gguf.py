"""Reads GGUF files: the metadata as a Hugging Face config, and the dequantised tensors under Hugging Face names.

The `gguf` package dequantises the tensors. The header is parsed here, because the package's reader makes a NumPy array
of every token: it needs four seconds for a vocabulary that this parser reads in a tenth of a second.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import UserError, shown
from grpo_jax.experiment.checked import admits
from grpo_jax.policy.config import RopeConfig, inverse_frequencies
from grpo_jax.policy.hf_mapping import Tensor

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# The types of the fields of a config that are no integers.
_KINDS: dict[str, type] = {
    "attention.layer_norm_rms_epsilon": float,
    "rope.freq_base": float,
    "rope.scaling.factor": float,
    "rope.scaling.type": str,
}
_FAMILIES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# Llama 3.1's rotary scaling. GGUF stores it as a tensor of divisors instead of its four numbers. Llama 3.1, 3.2 and 3.3
# all have these three numbers; the fourth, `factor`, is the largest divisor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Gguf(NamedTuple):
    """A parsed file: its metadata by key, and its tensors by GGUF name, with axes in NumPy's order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _Damaged(ValueError):
    """A header that cannot be what a GGUF file begins with."""


class _Cursor:
    """Reads little-endian values from a buffer, one after the other.

    A length is compared with what is left of the file before anything is read or allocated.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def require(self, count: int, size: int = 1) -> None:
        """Raises `_Damaged` unless `count` values of at least `size` bytes are left."""
        if count * size > len(self.data) - self.at:
            raise _Damaged

    def numbers(self, kind: str, count: int = 1) -> tuple:
        self.require(count, struct.calcsize(f"<{kind}"))
        values = struct.unpack_from(f"<{count}{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{kind}")
        return values

    def string(self) -> str:
        (size,) = self.numbers("Q")
        self.require(size)
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise _Damaged
            return self.numbers(_SCALARS[kind])[0]
        (inner,), (count,) = self.numbers("I"), self.numbers("Q")
        if inner in _SCALARS:
            return list(self.numbers(_SCALARS[inner], count))
        if inner not in (_STRING, _ARRAY) or depth == 4:
            raise _Damaged
        self.require(count, 8)  # a string has its length, and an array its kind and its length
        return [self.value(inner, depth + 1) for _ in range(count)]


def parse(path: Path) -> Gguf:
    """Maps a GGUF file into memory and reads its header. Tensors are dequantised when they are read.

    Raises `UserError` if the file is not a GGUF file of version 2 or 3, if it is cut short, or if the `gguf` package is
    not installed.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    except ImportError:
        raise UserError(f"{path} can be read only with the package gguf: pip install 'grpo_jax[gguf]'.") from None
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: it does not begin with the four letters GGUF.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    cursor = _Cursor(data)
    cursor.at = 4
    try:
        version, num_tensors, num_keys = *cursor.numbers("I"), *cursor.numbers("Q", 2)
        if version not in (2, 3):
            raise UserError(f"{path} is a GGUF file of version {version}: only 2 and 3 (little-endian) can be read.")
        cursor.require(num_keys, 13)  # a name's length, a kind, and at least one byte
        cursor.require(num_tensors, 24)  # a name's length, a number of axes, a format, a place
        metadata = {cursor.string(): cursor.value(*cursor.numbers("I")) for _ in range(num_keys)}
        infos = []
        for _ in range(num_tensors):
            name, (num_axes,) = cursor.string(), cursor.numbers("I")
            if not 1 <= num_axes <= 4:
                raise _Damaged
            shape = cursor.numbers("Q", num_axes)[::-1]  # GGUF lists the fastest axis first
            infos.append((name, shape, *cursor.numbers("I"), *cursor.numbers("Q")))
    except (struct.error, _Damaged):
        raise UserError(f"{path} is cut short or damaged: its header cannot be read.") from None
    alignment = metadata.get("general.alignment", 32)
    if not admits(int, alignment) or not 1 <= alignment <= 2**20:
        raise UserError(f"{path} has general.alignment = {shown(alignment)}: it must be a number of bytes.")
    start = -(-cursor.at // alignment) * alignment

    def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(f"{path} has the tensor {shown(name)} in the unknown format {kind}.") from None
        block, size = GGML_QUANT_SIZES[quantization]
        if min(shape) < 1 or shape[-1] % block:
            raise UserError(f"{path} has the tensor {shown(name)} with shape {list(shape)}, which {kind} cannot have.")
        rows, width = shape[:-1], shape[-1] // block * size
        count = math.prod(rows) * width  # of Python's integers, which do not overflow
        if start + offset + count > len(data):
            raise UserError(f"{path} is cut short: the tensor {shown(name)} lies past its end.")

        def read() -> np.ndarray:
            raw = np.frombuffer(data, np.uint8, count, start + offset).reshape(*rows, width)
            try:
                return dequantize(raw, quantization)
            except NotImplementedError:
                raise UserError(
                    f"{path} has the tensor {shown(name)} in the format {quantization.name}, which the package gguf "
                    "cannot dequantise."
                ) from None

        return Tensor(shape, read)

    return Gguf(path, metadata, {name: tensor(name, *rest) for name, *rest in infos})


def hf_config(gguf: Gguf) -> dict[str, Any]:
    """Returns the file's metadata as the content of a `config.json`, for `config.from_hf`."""
    family = gguf.metadata.get("general.architecture")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise UserError(
            f"{gguf.path} has the architecture {shown(family)}: only {', '.join(_FAMILIES)} can be read from a GGUF "
            "file (other families can be loaded from a Hugging Face directory)."
        )

    def get(key: str, default: Any = None) -> Any:
        value = gguf.metadata.get(f"{family}.{key}", default)
        wanted = _KINDS.get(key, int)
        if value is not None and not (admits(wanted, value) and (wanted is str or 0 < value < 1e30)):
            raise UserError(f"{gguf.path} has {family}.{key} = {shown(value)}: it must be a {wanted.__name__} above 0.")
        return value

    embedding = gguf.tensors.get("token_embd.weight")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    if embedding is None or not heads or not hidden:
        raise UserError(f"{gguf.path} lacks token_embd.weight, {family}.attention.head_count or the embedding length.")
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden // heads))
    theta = get("rope.freq_base", 10000.0)
    return {
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        # GGUF stores it in float32. The shortest decimal that rounds to it is the value before the conversion.
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon", 1e-6)))),
        "rope_parameters": {"rope_theta": theta, **_rope_scaling(gguf, get, theta, head_dim)},
        "partial_rotary_factor": (get("rope.dimension_count") or head_dim) / (head_dim or 1),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }


def _rope_scaling(gguf: Gguf, get: Any, theta: float, head_dim: int) -> dict[str, Any]:
    kind = get("rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        divisors = gguf.tensors["rope_freqs.weight"].read()
        factor = float(divisors.max())
        if divisors.shape != (head_dim // 2,) or not (divisors >= 1).all() or factor > 1e6:
            raise UserError(f"{gguf.path} has rope_freqs of shape {list(divisors.shape)} that are no divisors.")
        rope = RopeConfig(theta, "llama3", factor, 1.0, 4.0, original_max_positions=8192)
        plain, stretched = (inverse_frequencies(r, head_dim) for r in (RopeConfig(theta), rope))
        if not np.allclose(plain / stretched, divisors, rtol=1e-3):
            raise UserError(f"{gguf.path} scales its rotary embeddings in a way that is not Llama 3's (rope_freqs).")
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    raise UserError(
        f"{gguf.path} has the rope scaling {kind!r}: only linear and Llama 3's can be read from a GGUF file."
    )


def hf_tensors(gguf: Gguf, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the file's tensors under Hugging Face names, with the rows of q and k in Hugging Face's order."""
    tensors = {}
    for name, tensor in gguf.tensors.items():
        if name == "rope_freqs.weight":
            continue  # it is read as part of the config
        *prefix, module, leaf = ["", *name.split(".")][-max(len(name.split(".")), 2) :]
        if len(name.split(".")) < 2 or (prefix[:1] == ["blk"] and len(prefix) < 2):
            raise UserError(f"{gguf.path} has the tensor {shown(name)}, which is the name of none.")
        if module in ("attn_q", "attn_k") and config["model_type"] == "llama":
            heads = config["num_attention_heads" if module == "attn_q" else "num_key_value_heads"]
            if tensor.shape[0] % (2 * heads):
                raise UserError(f"{gguf.path} has the tensor {shown(name)} with rows that are not of {heads} heads.")
            tensor = Tensor(tensor.shape, partial(_read_unpermuted, tensor, heads))
        if prefix[:1] == ["blk"] and module in _NAMES:
            name = f"model.layers.{prefix[1]}.{_NAMES[module]}.{leaf}"
        elif not prefix and module in _TOP_NAMES:
            name = f"{_TOP_NAMES[module]}.{leaf}"
        tensors[name] = tensor
    return tensors


def _read_unpermuted(tensor: Tensor, heads: int) -> np.ndarray:
    return unpermute(tensor.read(), heads)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of a Llama's q and k.

    llama.cpp rotates neighbouring rows (2 i, 2 i + 1) of a head together; Hugging Face rotates the rows (i, i + K / 2)
    together. A converted file therefore has each head's rows interleaved: [K / 2, 2] where Hugging Face has [2, K / 2].

    Args:
      weight: rows of all heads, [heads * K, ...].
      heads: number of heads.
    """
    grouped = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return grouped.swapaxes(1, 2).reshape(weight.shape)
