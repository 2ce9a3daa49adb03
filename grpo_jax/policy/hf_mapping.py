"""The mapping between the tensors of a Hugging Face checkpoint and the policy's parameters.

A checkpoint has one tensor per layer, under Hugging Face names, with torch's [out, in] matrices. The parameters are
stacked over layers, with [in, out] kernels. Every source of weights is read through `assemble`, so a missing, misshapen
or unexpected tensor is reported in the same way for every file format.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.transformer import abstract


class Tensor(NamedTuple):
    """A tensor of a checkpoint that has not been read yet. `read` returns it, with this shape."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


_LAYER_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
}
_NORMS = {"mlp_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def tensor_names(config: ModelConfig, path: str) -> list[str]:
    """Returns the Hugging Face names of the tensors that form the parameter at `path`: one, or one for each layer."""
    whole = {"embed": "model.embed_tokens.weight", "norm.scale": "model.norm.weight", "head.kernel": "lm_head.weight"}
    if path in whole:
        return [whole[path]]
    _, module, leaf = path.split(".")
    names = _LAYER_NAMES | (_FOUR_NORMS if config.post_norms else _NORMS)
    kind = "bias" if leaf == "bias" else "weight"
    return [f"model.layers.{layer}.{names[module]}.{kind}" for layer in range(config.num_layers)]


def is_transposed(path: str) -> bool:
    """Whether the parameter is the transpose of its tensors."""
    return path.endswith(".kernel")


def is_stacked(path: str) -> bool:
    """Whether the parameter has a leading axis of layers."""
    return path.startswith("layers.")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that a checkpoint of this decoder must have, by Hugging Face name."""
    shapes = {}
    for path, leaf in abstract(config).items():
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        for name in tensor_names(config, path):
            shapes[name] = shape[::-1] if is_transposed(path) else shape
    return shapes


def assemble(config: ModelConfig, tensors: Mapping[str, Tensor], dtype: np.dtype, where: str) -> dict[str, np.ndarray]:
    """Checks `tensors` against the config, then reads them one at a time into stacked parameters of `dtype`.

    `where` is the name of the checkpoint in error messages. Raises `UserError` before anything is read if a tensor is
    missing, misshapen or unexpected, and when it is read if it holds what is no finite number of `dtype`.
    """
    _check(tensor_shapes(config), tensors, config.family, where)
    params = {}
    for path, leaf in abstract(config).items():
        value = np.empty(leaf.shape, dtype)
        targets = value if is_stacked(path) else value[None]
        for name, target in zip(tensor_names(config, path), targets, strict=True):
            tensor = tensors[name].read()
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
                target[...] = tensor.T if is_transposed(path) else tensor
            if not is_finite(target):
                raise UserError(f"{where} has a NaN or an infinite number in the tensor {name!r}: the file is damaged.")
        params[path] = value
    return params


def is_finite(values: np.ndarray) -> bool:
    """Whether all numbers of a float32 or bfloat16 array are finite."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values).all())
    # bfloat16 has the exponent in the bits 7 to 14, which are all 1 for infinity and NaN. NumPy's own test is slow.
    bits = np.ascontiguousarray(values).view(np.uint16)
    return not bool(((bits & 0x7F80) == 0x7F80).any())


def _check(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], family: str, where: str) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{where} lacks the tensor {name!r}, which its config calls for with shape {list(shape)}.")
        if tensors[name].shape != shape:
            raise UserError(
                f"{where} has the tensor {name!r} with shape {list(tensors[name].shape)}, but its config calls for "
                f"{list(shape)}."
            )
    unexpected = sorted(set(tensors) - set(shapes))
    if unexpected:
        more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
        raise UserError(
            f"{where} has the unexpected tensor {unexpected[0]!r}{more} with shape "
            f"{list(tensors[unexpected[0]].shape)}: a {family} decoder of this config has no such tensor."
        )


def disassemble(config: ModelConfig, params: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors from which `assemble` reads these parameters: the inverse of `assemble`.

    Raises `UserError` if the parameters do not fit the config.
    """
    shapes = {path: leaf.shape for path, leaf in abstract(config).items()}
    if {path: tuple(value.shape) for path, value in params.items()} != shapes:
        odd = sorted(
            path for path in {*params, *shapes} if path not in params or tuple(params[path].shape) != shapes.get(path)
        )
        raise UserError(
            f"the parameters do not fit the policy's config: {odd[0]!r} is missing, misshapen or unexpected."
        )
    for path, value in params.items():
        names = tensor_names(config, path)
        for layer, name in enumerate(names):

            def read(value: np.ndarray = value, layer: int = layer, path: str = path) -> np.ndarray:
                tensor = np.asarray(value[layer] if is_stacked(path) else value)
                return np.ascontiguousarray(tensor.T if is_transposed(path) else tensor)

            shape = shapes[path][1:] if is_stacked(path) else shapes[path]
            yield name, Tensor(shape[::-1] if is_transposed(path) else shape, read)
