"""Which of a policy's parameters are trained, and how they become the policy again."""

from dataclasses import dataclass

import jax.numpy as jnp

from grpo_jax.experiment import LoRAConfig
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.transformer import Params, Transformer, bind


@dataclass(frozen=True)
class Model:
    """How parameters become a policy: the architecture, its adapters, and the dtype it computes in."""

    config: ModelConfig
    lora: LoRAConfig | None = None
    dtype: str = "float32"

    def params(self, trainable: Params, frozen: Params) -> Params:
        """All parameters in the compute dtype: trained weights are float32 masters, adapters stay float32."""
        return {**frozen, **{k: v if ".lora_" in k else v.astype(self.dtype) for k, v in trainable.items()}}

    def bind(self, trainable: Params, frozen: Params) -> Transformer:
        """The module with these parameters."""
        return bind(self.config, self.params(trainable, frozen), self.lora)


def split(params: Params, lora: LoRAConfig | None) -> tuple[Params, Params]:
    """Parameters as (trainable, frozen): the adapters and the rest, or everything and nothing.

    What is trained is held in float32: an update of 1e-6 vanishes in the rounding of a bfloat16 weight.
    """
    trained = {k for k in params if lora is None or ".lora_" in k}
    trainable = {k: v.astype(jnp.float32) for k, v in params.items() if k in trained}
    return trainable, {k: v for k, v in params.items() if k not in trained}


def merge(params: Params, lora: LoRAConfig | None) -> Params:
    """Parameters without adapters: kernel + alpha / rank * a @ b, in the kernel's dtype."""
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
