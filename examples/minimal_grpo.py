"""GRPO in one file: a policy from scratch learns to spell three letters backwards, from rewards alone.

The answer to `abc` is `cba`. The reward is the share of the letters that stand in their place. The policy is a small
transformer with random weights. It never sees an answer. A step of GRPO (https://arxiv.org/abs/2402.03300) is:

1. Sampling: the policy completes P prompts, G times each (the G completions of a prompt are a group).
2. Rewards: a function scores each completion.
3. Advantages: A = (reward - mean of its group) / standard deviation of its group.
4. Updates: AdamW on the clipped surrogate loss, a few times on the same batch. The gradient is clipped by global norm.

For a prompt q and a completion of tokens o_1, ..., o_n, sampled from pi_old, the loss of the policy pi is

    w_t  = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)                        the importance ratio of token t
    loss = -mean over completions of 1/n sum_t min(w_t A, clip(w_t, 1 - epsilon, 1 + epsilon) A)

The framework computes the same numbers (tests/examples/test_minimal_grpo.py). This file leaves out the KV cache and the
shared prefix, micro-batches, several devices and turns, the KL to a reference policy, evaluations, and checkpoints.

    python examples/minimal_grpo.py    # about a minute on two CPU cores
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.policy import load

Array = jax.Array
Params = dict[str, Array]
LogitsOf = Callable[[Params, Array], Array]  # parameters, rows of tokens [N, L] -> logits of the next tokens [N, L, V]


@dataclass(frozen=True)
class Settings:
    """P is `prompts_per_step`, which must divide the number of words; G is `group_size`; T is `max_tokens`."""

    letters: str = "abcdefgh"
    word_length: int = 3
    max_tokens: int = 4  # the letters, and the token that ends the completion
    prompts_per_step: int = 16
    group_size: int = 16
    updates_per_batch: int = 2
    temperature: float = 1.0
    epsilon: float = 0.2
    learning_rate: float = 1e-3
    max_grad_norm: float = 1.0
    seed: int = 0


class Batch(NamedTuple):
    """What updates learn from. `mask` is True for the tokens up to and including the stop token."""

    prompts: Array  # [P, S]
    tokens: Array  # [P, G, T]
    mask: Array  # [P, G, T]
    old_logprobs: Array  # [P, G, T]
    advantages: Array  # [P, G]


class Step(NamedTuple):
    """What `train` yields after each step, rewards [P, G]. Loss and gradient norm are those of the last update."""

    words: list[str]
    completions: list[list[str]]
    rewards: np.ndarray
    batch: Batch
    loss: float
    grad_norm: float
    params: Params


def reward(completion: str, answer: str) -> float:
    """The share of the letters that stand in their place, of the longer of the two strings."""
    return sum(a == b for a, b in zip(completion, answer, strict=False)) / max(len(completion), len(answer))


def schedule(settings: Settings, step: int, num_words: int) -> np.ndarray:
    """Which words a step trains on, [P]. Each epoch has all words once, in an order named by (seed, epoch)."""
    epoch, first = divmod(step * settings.prompts_per_step, num_words)
    order = np.random.default_rng([settings.seed, epoch]).permutation(num_words)
    return order[first : first + settings.prompts_per_step]


def uniform_numbers(settings: Settings, step: Array, prompt_ids: Array) -> Array:
    """A number in [0, 1) for each token, [P, G, T], named by (seed, step, prompt id, sample index, position)."""
    step_key = jax.random.fold_in(jax.random.key(settings.seed), step)

    def one_number(prompt_id: Array, sample_index: Array, position: Array) -> Array:
        row_key = jax.random.fold_in(jax.random.fold_in(step_key, prompt_id), sample_index)
        return jax.random.uniform(jax.random.fold_in(row_key, position))

    samples, positions = jnp.arange(settings.group_size)[:, None], jnp.arange(settings.max_tokens)
    return jnp.vectorize(one_number)(prompt_ids[:, None, None], samples, positions)


def inverse_cdf(logits: Array, u: Array) -> Array:
    """The first token [N] at which the cumulative softmax of the logits [N, V] exceeds u [N]."""
    cumulative = jnp.cumsum(jnp.exp(logits - logits.max(-1, keepdims=True)), axis=-1)
    return jnp.argmax(cumulative > u[:, None] * cumulative[:, -1:], axis=-1)


def logprobs_of(logits: Array, tokens: Array, temperature: float) -> Array:
    """The log-probabilities [...] of tokens [...] under the softmax of logits [..., V] / temperature."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits / temperature), tokens[..., None], axis=-1)[..., 0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def sample(
    settings: Settings, logits_of: LogitsOf, stop_id: int, params: Params, prompts: Array, step: Array, ids: Array
) -> tuple[Array, Array, Array]:
    """Completes each prompt [P, S] G times. Returns tokens, mask and log-probabilities, [P, G, T] each."""
    (p, s), g, t = prompts.shape, settings.group_size, settings.max_tokens
    u = uniform_numbers(settings, step, ids).reshape(p * g, t)
    rows = jnp.pad(jnp.repeat(prompts, g, axis=0), ((0, 0), (0, t)))  # [P * G, S + T]
    alive, masks, logprobs = jnp.ones(p * g, bool), [], []
    for i in range(t):  # attention is causal, so the zeros that stand behind the row so far change nothing
        logits = logits_of(params, rows)[:, s + i - 1]
        tokens = jnp.where(alive, inverse_cdf(logits / settings.temperature, u[:, i]), 0)
        masks.append(alive)
        logprobs.append(jnp.where(alive, logprobs_of(logits, tokens, settings.temperature), 0.0))
        rows, alive = rows.at[:, s + i].set(tokens), alive & (tokens != stop_id)
    return tuple(x.reshape(p, g, t) for x in (rows[:, s:], jnp.stack(masks, 1), jnp.stack(logprobs, 1)))


def group_advantages(rewards: Array) -> Array:
    """(r - mean) / standard deviation of each group's rewards [P, G]; 0 where all rewards of a group are equal."""
    rise = rewards - rewards.min(axis=1, keepdims=True)  # exactly 0 for equal rewards, whose mean may be rounded
    centred, deviation = rise - rise.mean(axis=1, keepdims=True), rise.std(axis=1, keepdims=True)
    return jnp.where(deviation > 0, centred / jnp.where(deviation > 0, deviation, 1), 0)


def loss_of(params: Params, settings: Settings, logits_of: LogitsOf, batch: Batch) -> Array:
    """The clipped surrogate loss, a scalar: the mean over completions of the mean over their tokens."""
    p, g, t = batch.tokens.shape
    rows = jnp.concatenate([jnp.repeat(batch.prompts, g, axis=0), batch.tokens.reshape(p * g, t)], axis=1)
    logits = logits_of(params, rows)[:, -t - 1 : -1].reshape(p, g, t, -1)  # a token is predicted one place before it
    logprobs = logprobs_of(logits, batch.tokens, settings.temperature)
    ratio = jnp.exp(jnp.where(batch.mask, logprobs - batch.old_logprobs, 0.0))
    clipped = jnp.clip(ratio, 1 - settings.epsilon, 1 + settings.epsilon)
    advantages = batch.advantages[..., None]
    surrogate = jnp.where(batch.mask, jnp.minimum(ratio * advantages, clipped * advantages), 0.0)
    return -(surrogate.sum(-1) / batch.mask.sum(-1)).mean()


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(settings.max_grad_norm)
    return optax.chain(clip, optax.adamw(settings.learning_rate, weight_decay=0.0))


@partial(jax.jit, static_argnums=(0, 1))
def update(settings: Settings, logits_of: LogitsOf, params: Params, state: Any, batch: Batch) -> tuple[Any, ...]:
    """One update. Returns parameters, optimizer state, loss, and the norm of the gradient before it is clipped."""
    loss, gradient = jax.value_and_grad(loss_of)(params, settings, logits_of, batch)
    changes, state = make_optimizer(settings).update(gradient, state, params)
    return optax.apply_updates(params, changes), state, loss, optax.global_norm(gradient)


def train(settings: Settings, steps: int) -> Iterator[Step]:
    """GRPO: yields what each step has done."""
    policy = load("scratch", seed=settings.seed)
    tokenizer = policy.require_tokenizer()
    words = ["".join(letters) for letters in itertools.product(settings.letters, repeat=settings.word_length)]
    params, state = policy.params, make_optimizer(settings).init(policy.params)

    def logits_of(params: Params, rows: Array) -> Array:
        return replace(policy, params=params).logits(rows, jnp.ones_like(rows))

    for step in range(steps):
        ids = schedule(settings, step, len(words))
        chosen = [words[i] for i in ids]
        prompts = jnp.array([tokenizer.render(word) for word in chosen])
        tokens, mask, logprobs = sample(settings, logits_of, tokenizer.stop_ids[0], params, prompts, step, ids)
        completions = [[tokenizer.decode(row) for row in group] for group in np.asarray(tokens)]
        rewards = np.array([[reward(c, w[::-1]) for c in group] for w, group in zip(chosen, completions, strict=True)])
        batch = Batch(prompts, tokens, mask, logprobs, group_advantages(jnp.float32(rewards)))
        for _ in range(settings.updates_per_batch):
            params, state, loss, norm = update(settings, logits_of, params, state, batch)
        yield Step(chosen, completions, rewards, batch, float(loss), float(norm), params)


def main(steps: int = 300, every: int = 20) -> list[float]:
    """Trains, prints a line every few steps, and returns the mean reward of each step."""
    means = []
    for number, step in enumerate(train(Settings(), steps)):
        means.append(float(step.rewards.mean()))
        if number % every == 0 or number == steps - 1:
            right, example = np.mean(step.rewards == 1), f"{step.words[0]} -> {step.completions[0][0]}"
            print(f"step {number:3d}  reward {means[-1]:.3f}  right {right:4.0%}  {example}", flush=True)
    return means


if __name__ == "__main__":
    main()
