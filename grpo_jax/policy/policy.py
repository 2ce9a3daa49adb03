"""`Policy`: configuration, parameters and tokenizer; loading one, making one from scratch, and exporting it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from grpo_jax.policy.lora import merge, split
from grpo_jax.policy.tokenizer import CharacterTokenizer, Tokenizer
from grpo_jax.policy.transformer import Params


@dataclass(frozen=True)
class Policy:
    """A policy: a decoder's config, its parameters by dotted path, and its tokenizer.

    The parameters are not part of a module. Inside a pure function, `transformer.bind(policy.config, params,
    policy.lora)` returns the module with the given parameters.

    Attributes:
      config: the shape and the options of the decoder.
      params: its parameters, those of the adapters included.
      lora: the configuration of the adapters; None without adapters.
      make_tokenizer: makes the tokenizer; None if the source of the weights had none.
      commit: the commit of the hub that the weights are from; None if they are from elsewhere.
    """

    config: ModelConfig
    params: Params = field(repr=False)
    lora: LoRAConfig | None = None
    make_tokenizer: Callable[[], Tokenizer] | None = field(default=None, repr=False)
    commit: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, made at the first access; None if the source of the weights had none."""
        return None if self.make_tokenizer is None else self.make_tokenizer()

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises `UserError` if there is none."""
        if self.tokenizer is None:
            raise UserError(
                "this policy has no tokenizer, so it takes token ids but no text: there is no tokenizer.json where it "
                "was loaded from."
            )
        return self.tokenizer

    def logits(self, tokens: ArrayLike, mask: ArrayLike) -> jax.Array:
        """Computes the logits of the next token at every position, [B, S, V] float32.

        A row is computed as if its tokens with mask 0 did not exist. Padding on either side therefore changes nothing.
        The logits at tokens with mask 0 are meaningless. Under `jit` the ids are not checked.

        Args:
          tokens: token ids, [B, S].
          mask: 1 for the tokens of the row, 0 for padding, [B, S].

        Raises:
          UserError: if the shapes differ, or an id is not in the vocabulary.
        """
        traced = isinstance(tokens, jax.core.Tracer)
        tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
        if tokens.ndim != 2 or tokens.shape != mask.shape:
            raise UserError(
                f"tokens and mask must both have the shape [batch, length], but they have {list(tokens.shape)} and "
                f"{list(mask.shape)}."
            )
        if not traced and tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            raise UserError(f"tokens has an id outside the policy's vocabulary [0, {self.config.vocab_size}).")
        return _logits(self.config, self.lora, self.params, tokens, mask.astype(bool))


@partial(jax.jit, static_argnums=(0, 1))
def _logits(
    config: ModelConfig, lora: LoRAConfig | None, params: Params, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    model = transformer.bind(config, params, lora)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    rows = transformer.TokenRows(*(x[:, None] for x in (tokens, positions, mask)))  # [B, 1, S]
    hidden, _ = transformer.forward(model, rows)
    return model.logits(hidden[:, 0])


def export(policy: Policy, directory: str | Path) -> None:
    """Writes the policy to `directory` as a Hugging Face checkpoint that transformers can load. Adapters are merged.

    The directory appears only when it is complete. Raises `UserError` if it exists and is not empty.
    """
    weights.export(directory, policy.config, merge(policy.params, policy.lora), policy.tokenizer)


def load(
    source: str | Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    lora: LoRAConfig | None = None,
    scratch: ScratchConfig | None = None,
    revision: str | None = None,
) -> Policy:
    """Loads a policy, or makes a new one.

    Args:
      source: a Hugging Face directory or hub name, a `.gguf` file, `package:NAME` for a Python package that contains
        one, a run directory with an exported policy, or `scratch`. (`training` can also read a run's own checkpoint.)
      dtype: the dtype of the parameters, `float32` or `bfloat16`. Adapters are always float32.
      seed: the seed for random parameters: those of a policy from scratch, and the adapters.
      lora: adds adapters. They are the identity at first.
      scratch: the size and the alphabet of a policy from scratch; None for the defaults.
      revision: the branch, tag or commit of a model on the hub; None for its main branch.

    Raises:
      UserError: if the policy cannot be loaded. The message is one sentence.
    """
    if dtype not in weights.DTYPES:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(weights.DTYPES)}.")
    if str(source) == "scratch":
        scratch = scratch or ScratchConfig()
        config = from_scratch(scratch)
        params = transformer.initialise(config, seed, dtype=dtype, lora=lora)
        return Policy(config, params, lora, partial(CharacterTokenizer, scratch.alphabet))
    config, arrays, make_tokenizer, commit = weights.read(source, dtype, revision)
    params = {path: jnp.asarray(arrays.pop(path)) for path in list(arrays)}  # pop, so that two whole copies never exist
    if lora is not None:
        params |= fresh_adapters(config, lora, seed)
    # Cached, so that copies of the policy made by `dataclasses.replace` share one tokenizer.
    return Policy(config, params, lora, make_tokenizer and cache(make_tokenizer), commit)


def perturb(policy: Policy, scale: float, seed: int) -> Policy:
    """Multiplies every trained weight by 1 + scale · z, with z from a standard normal that the seed names.

    A weight in bfloat16 has eight bits, which a scale below 4e-3 seldom changes.
    """
    rng = np.random.default_rng([seed, 0x9E3779B9])  # not the numbers of another use of the seed
    trained, _ = split(policy.params, policy.lora)
    noisy = {
        path: (x * (1 + scale * rng.standard_normal(x.shape, np.float32))).astype(policy.params[path].dtype)
        for path, x in sorted(trained.items())
    }
    return replace(policy, params={path: noisy.get(path, x) for path, x in policy.params.items()})


def fresh_adapters(config: ModelConfig, lora: LoRAConfig, seed: int) -> Params:
    """Makes fresh adapters like those of `layers.Linear`.

    One draw makes all of them: fourteen draws would each compile for a second.
    """
    leaves = transformer.abstract(config, lora=lora)
    shapes = {path: leaf.shape for path, leaf in sorted(leaves.items()) if path.endswith(".lora_a")}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    noise = np.split(np.asarray(jax.random.normal(jax.random.key(seed), (int(ends[-1]),))), ends[:-1])
    params: Params = {path: jnp.zeros(leaf.shape) for path, leaf in leaves.items() if path.endswith(".lora_b")}
    for (path, shape), values in zip(shapes.items(), noise, strict=True):
        params[path] = jnp.asarray(values.reshape(shape) * np.float32(shape[-2] ** -0.5))
    return params
