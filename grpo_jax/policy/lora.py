"""LoRA adapters: which parameters are trained, how they are put back into the policy, and merging into the weights.

A policy without adapters is handled too: then all of its parameters are trained.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.transformer import Params, Transformer, bind


@dataclass(frozen=True)
class Model:
    """What is needed to build a policy from parameters: its architecture, its adapters and its compute dtype."""

    config: ModelConfig
    lora: LoRAConfig | None = None
    dtype: str = "float32"

    def params(self, trainable: Params, frozen: Params) -> Params:
        """Returns all parameters. Trainable weights are converted to the compute dtype; adapters stay float32."""
        return {**frozen, **{k: v if ".lora_" in k else v.astype(self.dtype) for k, v in trainable.items()}}

    def bind(self, trainable: Params, frozen: Params) -> Transformer:
        """Returns the module with these parameters."""
        return bind(self.config, self.params(trainable, frozen), self.lora)


def split(params: Params, lora: LoRAConfig | None) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen). With adapters, only they are trainable; otherwise everything is.

    Trainable parameters are converted to float32: an update of 1e-6 would be lost in the rounding of a bfloat16 weight.
    """
    trained = {k for k in params if lora is None or ".lora_" in k}
    trainable = {k: v.astype(jnp.float32) for k, v in params.items() if k in trained}
    return trainable, {k: v for k, v in params.items() if k not in trained}


def merge(params: Params, lora: LoRAConfig | None) -> Params:
    """Merges adapters into the kernels, kernel + alpha / rank * lora_a @ lora_b, in the dtype of the kernel."""
    merged = {path: value for path, value in params.items() if "lora_" not in path}
    if lora is None:
        return merged
    for path in params:
        if path.endswith(".lora_a"):
            a, b = params[path], params[path.removesuffix("lora_a") + "lora_b"]
            kernel = path.removesuffix("lora_a") + "kernel"
            added = jnp.einsum("...ir,...ro->...io", a, b) * (lora.alpha / lora.rank)
            merged[kernel] = (merged[kernel].astype(jnp.float32) + added).astype(merged[kernel].dtype)
    return merged
