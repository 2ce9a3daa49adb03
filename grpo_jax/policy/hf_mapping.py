"""Which tensor of a checkpoint becomes which parameter, and the one routine that checks and assembles them.

A checkpoint's tensors carry Hugging Face names, one per layer, with torch's [out, in] matrices; parameters are stacked
over layers, with [in, out] kernels. Every source of weights comes through `assemble`, so a missing, misshapen or
unexpected tensor is reported in the same way whatever the file was.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.transformer import abstract


class Tensor(NamedTuple):
    """A tensor of a checkpoint that has not been read yet; `read` returns it with this shape."""

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
    """The Hugging Face names of the tensors that make up the parameter at `path`: one, or one for each layer."""
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


def wanted(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint of this decoder, by Hugging Face name."""
    shapes = {}
    for path, leaf in abstract(config).items():
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        for name in tensor_names(config, path):
            shapes[name] = shape[::-1] if is_transposed(path) else shape
    return shapes


def assemble(config: ModelConfig, tensors: Mapping[str, Tensor], dtype: np.dtype, where: str) -> dict[str, np.ndarray]:
    """Checks `tensors` against the config, then reads them into stacked parameters of `dtype`, one at a time.

    `where` names the checkpoint in errors. Raises `UserError` before anything is read if a tensor is missing,
    misshapen or unexpected.
    """
    _check(wanted(config), tensors, config.family, where)
    params = {}
    for path, leaf in abstract(config).items():
        value = np.empty(leaf.shape, dtype)
        targets = value if is_stacked(path) else value[None]
        for name, target in zip(tensor_names(config, path), targets, strict=True):
            tensor = tensors[name].read()
            target[...] = tensor.T if is_transposed(path) else tensor
        params[path] = value
    return params


def _check(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], family: str, where: str) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{where} lacks the tensor {name!r}, which its config calls for with shape {list(shape)}.")
        if tensors[name].shape != shape:
            raise UserError(
                f"{where} has the tensor {name!r} with shape {list(tensors[name].shape)}, but its config calls for "
                f"{list(shape)}."
            )
    strangers = sorted(set(tensors) - set(shapes))
    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise UserError(
            f"{where} has the tensor {strangers[0]!r}{more} with shape {list(tensors[strangers[0]].shape)}, which a "
            f"{family} decoder of this config has no place for."
        )


def disassemble(config: ModelConfig, params: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `assemble` would read these parameters from.

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
