"""The policy's forward pass on a batch, and the scalar head that some methods train on the policy's last layer."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from grpo_jax.algorithms.batch import Batch
from grpo_jax.logprobs import completion_hidden, packed_logprobs, token_logprobs
from grpo_jax.policy.lora import Model
from grpo_jax.policy.transformer import Params, Transformer
from grpo_jax.sharding import Array

HEAD = ("value_head.kernel", "value_head.bias")


def new_head(size: int) -> Params:
    """A linear head [D] -> scalar that starts at 0: PPO's critic, or the reward of a reward model."""
    return {HEAD[0]: jnp.zeros(size), HEAD[1]: jnp.zeros(())}


def head_values(hidden: Array, params: Params) -> Array:
    """The head's float32 values [...] of hidden states [..., D]."""
    return hidden.astype(jnp.float32) @ params[HEAD[0]] + params[HEAD[1]]


class Forward(NamedTuple):
    """The forward pass as objectives call it: (trainable, frozen, batch) -> arrays.

    Attributes:
      logprobs: log-probabilities and entropies [P, G, T].
      logprobs_and_values: these, and the head's values [P, G, T] of the states in which the tokens were sampled.
      scores: the head's value [P, G] of each whole completion.
    """

    logprobs: Callable[[Params, Params, Batch], tuple[Array, Array]]
    logprobs_and_values: Callable[[Params, Params, Batch], tuple[Array, Array, Array]]
    scores: Callable[[Params, Params, Batch], Array]


def make_forward(model: Model, shared_prefix_length: int, *, temperature: float = 1.0, remat: bool = False) -> Forward:
    """Builds the forward pass of a batch whose prompts share `shared_prefix_length` leading tokens."""

    def hidden_of(
        trainable: Params, frozen: Params, batch: Batch, *, after_last: bool = False
    ) -> tuple[Transformer, Array]:
        bound = model.bind(trainable, frozen)
        hidden = completion_hidden(
            bound, batch.completions, shared_prefix_length=shared_prefix_length, remat=remat, after_last=after_last
        )
        return bound, hidden

    def logprobs(trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Array]:
        if batch.segments is not None:
            bound = model.bind(trainable, frozen)
            return packed_logprobs(bound, batch.tokens, batch.segments, temperature=temperature, remat=remat)
        bound, hidden = hidden_of(trainable, frozen, batch)
        return token_logprobs(bound, hidden, batch.tokens, temperature=temperature)

    def logprobs_and_values(trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Array, Array]:
        bound, hidden = hidden_of(trainable, frozen, batch)
        return *token_logprobs(bound, hidden, batch.tokens, temperature=temperature), head_values(hidden, trainable)

    def scores(trainable: Params, frozen: Params, batch: Batch) -> Array:
        _, hidden = hidden_of(trainable, frozen, batch, after_last=True)
        last = batch.valid.sum(axis=-1)[..., None]  # the state after this many tokens is that after the last of them
        return jnp.take_along_axis(head_values(hidden, trainable), last, axis=-1)[..., 0]

    return Forward(logprobs, logprobs_and_values, scores)
