"""What completes prompts: the `Generator` protocol, and the policy on its devices as its implementation.

Rollouts, evaluations, the lab of rewards and the training loop ask for a generator. A generator of your own needs no
more than the methods of the protocol: a script of fixed answers in a test, or another engine that serves the policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.experiment import SamplingConfig, group_parts
from grpo_jax.policy import Policy
from grpo_jax.policy.lora import Model
from grpo_jax.policy.lora import split as split_params
from grpo_jax.policy.tokenizer import Tokenizer
from grpo_jax.policy.transformer import KeyValues, Params
from grpo_jax.rollout.prompts import PromptBatch
from grpo_jax.sampler import (
    DecodeState,
    Generation,
    Noise,
    Observation,
    Settings,
    continue_generation,
    generate,
)
from grpo_jax.sharding import Array, Replicas


class Generator(Protocol):
    """Completes prompts. Everything that goes in and comes out is on the host, and of the whole batch.

    Attributes:
      tokenizer: turns text into the token ids of prompts and observations, and generations into text.
      max_positions: how many tokens an episode may have, its prompt included.
      batch_multiple: evaluations ask for a multiple of so many prompts at once.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def batch_multiple(self) -> int: ...

    def generate(self, prompts: PromptBatch, noise: Noise, sampling: SamplingConfig) -> tuple[Generation, Any]:
        """Samples the first turn of every row.

        Args:
          prompts: P prompts.
          noise: the names of the rows' noise, `samples` [P, G]. The same names give the same tokens.
          sampling: temperature, truncation, and the longest turn T.

        Returns:
          NumPy arrays [P, G, T], and a state from which the episodes can be continued.
        """
        ...

    def continue_generation(
        self, state: Any, observation: Observation, noise: Noise, sampling: SamplingConfig, turns_left: int
    ) -> tuple[Generation, Any]:
        """Samples the next turn of the active rows. Only tasks of several turns need it.

        Args:
          state: what the turn before returned; it must not be used again.
          observation: the environment's answers, tokens [P, G, F].
          turns_left: how many turns may follow, this one included.
        """
        ...


def name_noise(seed: int, step: int, prompt_ids: Sequence[int], samples: Sequence[int]) -> Noise:
    """The noise of P prompts with G samples each, on the host."""
    ids = np.asarray(prompt_ids, np.int32)
    return Noise(np.int32(seed), np.int32(step), ids, np.tile(np.asarray(samples, np.int32), (len(ids), 1)))


class ActorState(NamedTuple):
    """A batch of an `Actor` between two turns.

    Attributes:
      decode: the decoder's state, placed.
      rows: which rows of the whole batch it holds.
      cache_size: places in the cache.
      cache_length: how many of them are filled.
      size: P and G of the whole batch.
    """

    decode: DecodeState
    rows: "ActiveRows"
    cache_size: int
    cache_length: int
    size: tuple[int, int]


class Actor(NamedTuple):
    """A policy on its devices, as a generator. `trainable` and `frozen` are placed by `replicas`."""

    model: Model
    trainable: Params
    frozen: Params
    tokenizer: Tokenizer
    replicas: Replicas

    @property
    def max_positions(self) -> int:
        return self.model.config.max_positions

    @property
    def batch_multiple(self) -> int:
        return self.replicas.count

    def generate(self, prompts: PromptBatch, noise: Noise, sampling: SamplingConfig) -> tuple[Generation, ActorState]:
        """See `Generator.generate`."""
        settings = replace(settings_of(sampling, self.tokenizer), shared_prefix_length=prompts.shared_prefix_length)
        program, cached = _generate(self.model, settings, self.replicas), sampling.max_tokens - 1
        num_prompts, num_samples = size = noise.samples.shape[0], noise.samples.shape[1]
        rows = ActiveRows.of_batch(num_prompts, num_samples, self.replicas.count)
        split = self.replicas.split((prompts.ids[rows.prompt], prompts.lengths[rows.prompt]))
        own = Noise(noise.seed, noise.step, noise.prompt_ids[rows.prompt], rows.take(noise.samples))
        generation, state = program(self.trainable, self.frozen, *split, *self._noise(own, sampling))
        whole = Generation(*(rows.put(x, size) for x in self.replicas.gather(generation)))
        return whole, ActorState(state, rows, cached, cached, size)

    def continue_generation(
        self, state: ActorState, observation: Observation, noise: Noise, sampling: SamplingConfig, turns_left: int
    ) -> tuple[Generation, ActorState]:
        """See `Generator.continue_generation`. Rows whose episode is over leave the batch as soon as that halves it."""
        decode, rows = state.decode, state.rows
        chosen = compaction(np.asarray(rows.take(observation.active)), self.replicas.count)
        if chosen is not None:
            decode = _take_rows(self.replicas)(decode, *self.replicas.split(chosen))
            rows = rows.select(*chosen)
        here = Observation(*(rows.take(x) for x in observation))
        # A further turn feeds the cache the last token of the turn before, the observation, and its own but the last.
        needed = here.tokens.shape[-1] + sampling.max_tokens
        size, length = state.cache_size, state.cache_length + needed
        if length > size:
            size = state.cache_length + turns_left * needed
            decode = _grow_cache(size - state.cache_size, self.replicas)(decode)
        own = Noise(noise.seed, noise.step, noise.prompt_ids[rows.prompt], rows.take(noise.samples))
        program = _continue_generation(self.model, settings_of(sampling, self.tokenizer), self.replicas)
        generation, decode = program(
            self.trainable, self.frozen, decode, self.replicas.split(here), *self._noise(own, sampling)
        )
        whole = Generation(*(rows.put(x, state.size) for x in self.replicas.gather(generation)))
        return whole, ActorState(decode, rows, size, length, state.size)

    def _noise(self, noise: Noise, sampling: SamplingConfig) -> tuple[Any, ...]:
        """Noise, temperature and top-p as the compiled sampler takes them."""
        placed = Noise(
            *self.replicas.broadcast((noise.seed, noise.step)), *self.replicas.split((noise.prompt_ids, noise.samples))
        )
        return placed, *self.replicas.broadcast((np.float32(sampling.temperature), np.float32(sampling.top_p)))


def model_of(policy: Policy) -> Model:
    """How this policy's parameters become a module."""
    return Model(policy.config, policy.lora, str(policy.params["embed"].dtype))


def make_actor(policy: Policy, replicas: Replicas) -> Actor:
    """Places a policy. Raises `UserError` if it has no tokenizer."""
    tokenizer = policy.require_tokenizer()
    trainable, frozen = split_params(policy.params, policy.lora)
    return Actor(model_of(policy), replicas.replicate(trainable), replicas.replicate(frozen), tokenizer, replicas)


def settings_of(sampling: SamplingConfig, tokenizer: Tokenizer) -> Settings:
    """What the sampler is compiled for."""
    truncate = sampling.top_k > 0 or sampling.top_p < 1
    return Settings(sampling.max_tokens, tokenizer.stop_ids, tokenizer.pad_id, sampling.top_k, truncate)


class ActiveRows(NamedTuple):
    """Which rows of the whole batch are still on the devices: that batch shrinks as episodes end.

    prompt [P'] and sample [P', G'] are indices into the whole batch of P prompts and G samples.
    """

    prompt: np.ndarray
    sample: np.ndarray

    @classmethod
    def of_batch(cls, num_prompts: int, num_samples: int, num_shares: int) -> "ActiveRows":
        """All rows of a batch, its groups split where they could not be shared out equally."""
        parts = group_parts(num_prompts, num_samples, num_shares)
        assert parts is not None, f"{num_prompts} groups of {num_samples} cannot be shared by {num_shares} devices"
        samples = np.arange(num_samples).reshape(parts, -1)
        return cls(np.repeat(np.arange(num_prompts), parts), np.tile(samples, (num_prompts, 1)))

    def take(self, x: Array) -> Array:
        """[P, G, …] of the whole batch to [P', G', …] of these rows."""
        return x[self.prompt[:, None], self.sample]

    def put(self, x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """[P', G', …] of these rows to [P, G, …] of the whole batch, with zeros for the rows that have left."""
        whole = np.zeros((*size, *x.shape[2:]), x.dtype)
        whole[self.prompt[:, None], self.sample] = x
        return whole

    def select(self, prompt: np.ndarray, sample: np.ndarray) -> "ActiveRows":
        """The rows that a compaction keeps (see `compaction`)."""
        return ActiveRows(self.prompt[prompt], self.sample[prompt[:, None], sample])


def compaction(active: np.ndarray, num_shares: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which rows to keep when at least half of the batch on the devices can go, or None.

    Each device keeps its own prompts. Sizes are powers of two, so that few shapes are compiled.

    Args:
      active: [P, G] bool, the rows that go on.
      num_shares: into how many equal shares of neighbouring prompts the batch is split.

    Returns:
      Indices of prompts [P'], those of the same share side by side, and of their rows [P', G'].
    """
    shares = active.reshape(num_shares, -1, active.shape[1])
    num_prompts = min(_power_of_two(shares.any(-1).sum(-1).max()), shares.shape[1])
    num_rows = min(_power_of_two(active.sum(-1).max()), active.shape[1])
    if 2 * num_shares * num_prompts * num_rows > active.size:
        return None
    within = np.argsort(~shares.any(-1), axis=1, kind="stable")[:, :num_prompts]
    prompt = (within + shares.shape[1] * np.arange(num_shares)[:, None]).reshape(-1)
    return prompt, np.argsort(~active[prompt], axis=-1, kind="stable")[:, :num_rows]


def _power_of_two(n: int) -> int:
    return 1 << (int(n) - 1).bit_length()


@lru_cache(maxsize=64)
def _generate(model: Model, settings: Settings, replicas: Replicas) -> Callable[..., Any]:
    def program(
        trainable: Params,
        frozen: Params,
        prompts: Array,
        lengths: Array,
        noise: Noise,
        temperature: Array,
        top_p: Array,
    ) -> tuple[Generation, DecodeState]:
        return generate(model.bind(trainable, frozen), prompts, lengths, noise, temperature, top_p, settings)

    return replicas.compile(program)


@lru_cache(maxsize=64)
def _continue_generation(model: Model, settings: Settings, replicas: Replicas) -> Callable[..., Any]:
    def program(
        trainable: Params,
        frozen: Params,
        state: DecodeState,
        observation: Observation,
        noise: Noise,
        temperature: Array,
        top_p: Array,
    ) -> tuple[Generation, DecodeState]:
        policy = model.bind(trainable, frozen)
        return continue_generation(policy, state, observation, noise, temperature, top_p, settings)

    return replicas.compile(program, donate=(2,))


@lru_cache(maxsize=64)
def _take_rows(replicas: Replicas) -> Callable[..., Any]:
    """Keeps the prompts [P'] and their rows [P', G'] of a `DecodeState`."""

    def program(state: DecodeState, prompt: Array, sample: Array) -> DecodeState:
        prompt = prompt % len(state.prompt_lengths)  # indices into the whole batch become those into this share
        prefix, prompt_lengths = jax.tree.map(lambda x: x[prompt], (state.prefix, state.prompt_lengths))
        cache, position, token = jax.tree.map(
            lambda x: x[prompt[:, None], sample], (state.cache, state.position, state.token)
        )
        return DecodeState(prefix, prompt_lengths, cache, state.cache_length, position, token)

    return replicas.compile(program)


@lru_cache(maxsize=64)
def _grow_cache(extra: int, replicas: Replicas) -> Callable[..., Any]:
    """Adds empty places to the cache of a `DecodeState`."""

    def pad(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

    def program(state: DecodeState) -> DecodeState:
        k, v = jax.tree.map(lambda x: pad(x, 3), (state.cache.k, state.cache.v))
        return state._replace(cache=KeyValues(k, v, pad(state.cache.positions, 2), pad(state.cache.valid, 2)))

    return replicas.compile(program)
