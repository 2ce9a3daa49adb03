"""`Batch`: the arrays that one update is made from."""

from typing import Any, NamedTuple, overload

import jax

from grpo_jax.logprobs import Completions
from grpo_jax.sharding import Array


class Batch(NamedTuple):
    """One step's data: P prompts with G completions each, or the share of a device, a mini-batch or a micro-batch.

    In a share P counts its rows: whole groups, or parts of groups where they were split (`minibatches.Layout`).

    Attributes:
      prompts, lengths: right-padded ids [P, S] and lengths [P].
      tokens: [P, G, T] int32, everything after the prompt.
      valid: [P, G, T] bool, where `tokens` holds a token.
      mask: [P, G, T] bool, where that token is trained on.
      logprobs: [P, G, T] float32, the log-probabilities under the policy that sampled, 0 elsewhere.
      rewards: [P, G] float32, from which advantages are made.
      sample_mask: [P, G] bool, False where a completion does not count.

      What follows is there for some methods alone, or is found on the way:

      sampler_logprobs: [P, G, T] what the sampler reported, where `logprobs` were recomputed by the trainer.
      correction: [P, G, T] weights for a sampler that differs from the trainer.
      high_entropy: [P, G, T] bool, which tokens are in the whole batch's top quantile.
      advantages: [P, G], or [P, G, T] by token. They are those of the step's whole batch.
      values, returns: [P, G, T] the critic's values when the batch was sampled, and what it is to predict (PPO).
      segments: [P, 1, T] int32: rows are whole examples side by side, numbered from 1 (0: padding), and prompts are not
        read (packed SFT).

    For methods that learn from preferences, rows 2i and 2i + 1 of a group are chosen and rejected.
    """

    prompts: Array
    lengths: Array
    tokens: Array
    valid: Array
    mask: Array
    logprobs: Array
    rewards: Array
    sample_mask: Array
    sampler_logprobs: Array | None = None
    correction: Array | None = None
    high_entropy: Array | None = None
    advantages: Array | None = None
    values: Array | None = None
    returns: Array | None = None
    segments: Array | None = None

    @property
    def completions(self) -> Completions:
        """What the policy's forward pass needs of the batch."""
        return Completions(self.prompts, self.lengths, self.tokens, self.valid)


def micro_batches(tree: Any, count: int) -> Any:
    """Leaves [P, ...] to [count, P / count, ...]."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), tree)


@overload
def rows(x: Array) -> Array: ...
@overload
def rows(x: None) -> None: ...
def rows(x: Array | None) -> Array | None:
    """[P, G, T] to [P * G, T]."""
    return None if x is None else x.reshape(-1, x.shape[-1])
