"""Gradient estimators against the true gradient, in games so small that every completion can be listed.

The policy is a table of logits, one row for every prompt and prefix. A completion ends with token 0 or at the horizon.
So the gradient of the expected reward is a finite sum. The mean and the variance of an estimator are finite sums too,
over every batch that can be sampled, weighted by its probability. The estimators are the framework's own advantages and
losses, not copies of them, or functions of the user's own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.advantages import compute_advantages
from grpo_jax.errors import UserError
from grpo_jax.experiment import AdvantageConfig, LossConfig
from grpo_jax.experiment.methods import Baseline, LossType, Scale
from grpo_jax.losses import LossInputs
from grpo_jax.losses.policy_gradient import apply_loss

MAX_BATCHES = 2_000_000  # the most batches that are listed


@dataclass(frozen=True)
class Game:
    """P prompts with N possible completions each, of up to T tokens out of V, after K possible prefixes.

    Attributes:
      tokens, prefixes, mask: [N, T] a completion's tokens, the number of the prefix that each follows, and where it has
        a token.
      logits: [P, K, V] of the policy whose gradient is estimated.
      behaviour: [P, K, V] logits of the policy that samples; the same array if the game is on-policy.
      rewards: [P, N].
    """

    tokens: np.ndarray
    prefixes: np.ndarray
    mask: np.ndarray
    logits: np.ndarray
    behaviour: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class Estimator:
    """How advantages are computed from rewards, and the loss from advantages: configs, or functions as an experiment
    takes them."""

    advantages: AdvantageConfig | Callable[..., Any]
    loss: LossConfig | Callable[..., Any]


@dataclass(frozen=True)
class Moments:
    """The mean [P, K, V] of an estimate, its standard error (0 if all batches were listed), and the total variance."""

    mean: np.ndarray
    error: np.ndarray
    variance: float


def completions(vocabulary: int, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every completion of up to `horizon` tokens: tokens, prefixes and mask [N, T], as in `Game`."""
    strings: list[tuple[int, ...]] = [()]
    for length in range(horizon):
        strings += [(*s, t) for s in strings if len(s) == length and 0 not in s for t in range(vocabulary)]
    prefix = {s: i for i, s in enumerate(s for s in strings if len(s) < horizon and 0 not in s)}
    ended = [s for s in strings if s not in prefix]
    tokens, prefixes, mask = (np.zeros((len(ended), horizon), int) for _ in range(3))
    for row, s in enumerate(ended):
        tokens[row, : len(s)], prefixes[row, : len(s)] = s, [prefix[s[:t]] for t in range(len(s))]
        mask[row, : len(s)] = 1
    return tokens, prefixes, mask.astype(bool)


def make_game(vocabulary: int, horizon: int, num_prompts: int, *, drift: float = 0.0, seed: int = 0) -> Game:
    """A game with a random policy. Right completions have reward 1, all others 0.

    Prompts differ in difficulty: random completions of prompt p = 0, 1, … are right until together they have a
    probability of about 0.5 ** (p + 1). `drift` is the standard deviation, in nats, of the difference between the
    behaviour's logits and the policy's.
    """
    rng = np.random.default_rng(seed)
    tokens, prefixes, mask = completions(vocabulary, horizon)
    logits = rng.normal(0, 0.7, (num_prompts, prefixes.max() + 1, vocabulary)).astype(np.float32)
    behaviour = (logits + drift * rng.normal(size=logits.shape)).astype(np.float32)
    game = Game(tokens, prefixes, mask, logits, behaviour, np.zeros((num_prompts, len(tokens)), np.float32))
    likely = np.exp(np.asarray(jnp.where(mask, token_logprobs(game, logits), 0).sum(-1)))
    rewards = game.rewards.copy()
    for p in range(num_prompts):
        chosen = np.zeros(len(tokens), bool)
        for n in rng.permutation(len(tokens)):
            chosen[n] = likely[p] @ chosen + likely[p, n] <= 0.5 ** (p + 1) + 0.05 or chosen[n]
        rewards[p, chosen] = 1.0
    return Game(tokens, prefixes, mask, logits, behaviour, rewards)


def token_logprobs(game: Game, logits: np.ndarray | jax.Array) -> jax.Array:
    """The log-probabilities [P, N, T] of the tokens of every completion."""
    return jax.nn.log_softmax(logits)[:, game.prefixes, game.tokens]


def probabilities(game: Game, logits: np.ndarray | jax.Array) -> jax.Array:
    """The probability of every completion, [P, N]."""
    return jnp.exp(jnp.where(game.mask, token_logprobs(game, logits), 0.0).sum(-1))


def true_gradient(game: Game, values: np.ndarray | None = None) -> np.ndarray:
    """The gradient [P, K, V] of the expected reward (or of other `values` [P, N]), averaged over the prompts."""
    values = game.rewards if values is None else values
    return np.asarray(jax.grad(lambda x: (probabilities(game, x) * values).sum(-1).mean())(jnp.asarray(game.logits)))


def estimates(game: Game, estimator: Estimator, chosen: np.ndarray) -> np.ndarray:
    """The estimator's gradients [M, P, K, V] on M batches of the completions `chosen` [M, P, G]."""
    rows = np.arange(len(game.rewards))[:, None]
    old = token_logprobs(game, game.behaviour)

    def objective(logits: jax.Array, batch: jax.Array) -> jax.Array:
        rewards, mask = jnp.asarray(game.rewards)[rows, batch], jnp.asarray(game.mask)[batch]
        advantages = compute_advantages(estimator.advantages, rewards, jnp.ones(rewards.shape, bool), token_mask=mask)
        advantages = advantages if advantages.ndim == 3 else advantages[..., None]

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(-1, x.shape[-1])

        inputs = LossInputs(
            logprobs=flat(token_logprobs(game, logits)[rows, batch]),
            old_logprobs=flat(old[rows, batch]),
            advantages=flat(jnp.broadcast_to(advantages, mask.shape)),
            mask=flat(mask),
            num_tokens=mask.sum(),
            num_sequences=mask.shape[0] * mask.shape[1],
            num_groups=mask.shape[0],
            group_size=mask.shape[1],
        )
        if not isinstance(estimator.loss, LossConfig):  # which need not say what it reads; the reference is the sampler
            entropy = -(jnp.exp(jax.nn.log_softmax(logits)) * jax.nn.log_softmax(logits)).sum(-1)[:, game.prefixes]
            sampled = inputs.old_logprobs
            inputs = inputs._replace(entropy=flat(entropy[rows, batch]), ref_logprobs=sampled, sampler_logprobs=sampled)
        return -apply_loss(estimator.loss, inputs)[0]

    gradient = jax.jit(
        lambda batches: jax.lax.map(
            lambda batch: jax.grad(objective)(jnp.asarray(game.logits), batch), batches, batch_size=2048
        )
    )
    return np.asarray(gradient(jnp.asarray(chosen)))


def every_batch(game: Game, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every batch of P groups, [M, P, G], and their probabilities [M]. The order within a group does not matter.

    Raises:
      UserError: if there are more than `MAX_BATCHES`.
    """
    num_prompts, size = game.rewards.shape
    count = math.comb(size + group_size - 1, group_size) ** num_prompts
    if count > MAX_BATCHES:
        raise UserError(f"there are {count:,} batches to list, more than {MAX_BATCHES:,}: sample them instead.")
    groups = np.array(list(combinations_with_replacement(range(size), group_size)))
    orders = np.array(
        [math.factorial(group_size) / np.prod([math.factorial(n) for n in np.bincount(g)]) for g in groups]
    )
    sampled = np.asarray(probabilities(game, game.behaviour), np.float64)
    weights = [orders * np.prod(p[groups], axis=1) for p in sampled]  # [P] arrays over groups
    places = np.array(list(product(range(len(groups)), repeat=num_prompts)))
    return groups[places], np.prod([w[places[:, p]] for p, w in enumerate(weights)], axis=0)


def exact_moments(game: Game, estimator: Estimator, group_size: int) -> Moments:
    """The mean and variance of an estimator over every batch that can be sampled."""
    chosen, weights = every_batch(game, group_size)
    values = estimates(game, estimator, chosen).astype(np.float64)
    mean = np.tensordot(weights, values, 1)
    return Moments(mean, np.zeros_like(mean), float(weights @ ((values - mean) ** 2).reshape(len(values), -1).sum(-1)))


def sampled_moments(game: Game, estimator: Estimator, group_size: int, *, samples: int, seed: int = 0) -> Moments:
    """The mean and variance of an estimator over `samples` random batches."""
    rng = np.random.default_rng(seed)
    sampled = np.asarray(probabilities(game, game.behaviour), np.float64)
    chosen = np.stack(
        [rng.choice(len(p), size=(samples, group_size), p=p / p.sum()) for p in sampled], axis=1
    )  # [M, P, G]
    values = estimates(game, estimator, chosen).astype(np.float64)
    spread = values.var(axis=0, ddof=1)
    return Moments(values.mean(axis=0), np.sqrt(spread / samples), float(spread.sum()))


def compare(game: Game, moments: Moments) -> dict[str, float]:
    """An estimator compared with the true gradient.

    `scale` is the factor c for which c * truth is nearest to the mean estimate; it only changes the step size. `bias`
    is the rest, |mean / c - truth| / |truth|. `noise` is the standard deviation of an estimate, divided by the norm of
    its mean. `length` says how much faster mean / c makes completions longer than the truth does: the inner product of
    (mean / c - truth) and the gradient of the expected length, divided by the norms of the truth and of that gradient.
    `weight p` is prompt p's own factor, divided by c.
    """
    truth, mean = true_gradient(game).astype(np.float64), moments.mean
    lengths = true_gradient(game, np.broadcast_to(game.mask.sum(-1), game.rewards.shape)).astype(np.float64)
    size = np.linalg.norm
    scale = float((mean * truth).sum() / (truth**2).sum())
    excess = mean / scale - truth
    return {
        "scale": scale,
        "scale error": 1.96 * float(size(moments.error * truth) / (truth**2).sum()),
        "bias": float(size(excess) / size(truth)),
        "bias error": 1.96 * float(size(moments.error) / abs(scale) / size(truth)),
        "noise": math.sqrt(moments.variance) / float(size(mean)),
        "length": float((excess * lengths).sum() / (size(truth) * size(lengths))),
        **{f"weight {p}": float((mean[p] * truth[p]).sum() / (truth[p] ** 2).sum() / scale) for p in range(len(truth))},
    }


def family(horizon: int) -> Mapping[str, Estimator]:
    """The estimators of the literature, by name.

    `bnpo` is not listed because it equals `dapo`, nor is GDPO: with one reward it equals REINFORCE++-baseline.
    """

    def of(scale: Scale, baseline: Baseline, loss_type: LossType, **fields: Any) -> Estimator:
        return Estimator(AdvantageConfig(scale=scale, baseline=baseline), LossConfig(loss_type=loss_type, **fields))

    sequence = dict(importance_sampling_level="sequence")
    return {
        "REINFORCE, no baseline": of("none", "none", "reinforce"),
        "REINFORCE, group mean": of("none", "mean", "reinforce"),
        "RLOO": of("none", "leave_one_out", "reinforce"),
        "REINFORCE++": of("whiten", "none", "reinforce"),
        "REINFORCE++-baseline": of("whiten", "mean", "reinforce"),
        "Dr. GRPO": of("none", "mean", "dr_grpo", dr_grpo_length=horizon),
        "GRPO": of("group", "mean", "grpo"),
        "GRPO, delta 1.3": of("group", "mean", "grpo", delta=1.3),
        "DAPO": of("group", "mean", "dapo", epsilon_high=0.28),
        "Lite PPO": of("batch", "mean", "dapo"),
        "GSPO": of("group", "mean", "grpo", **sequence),
        "LUSPO": of("group", "mean", "luspo", **sequence),
        "CISPO": of("group", "mean", "cispo", epsilon_high=5.0),
        "SAPO": of("group", "mean", "sapo"),
        "VESPO": of("group", "mean", "vespo"),
    }
