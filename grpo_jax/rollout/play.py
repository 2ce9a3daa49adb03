"""Plays episodes with a policy on its devices: the sampler, turn by turn, and the environment between the turns."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import sharding as devices
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import SamplingConfig
from grpo_jax.policy import Policy
from grpo_jax.policy.lora import Model
from grpo_jax.policy.lora import split as split_params
from grpo_jax.policy.tokenizer import Messages, Tokenizer
from grpo_jax.policy.transformer import KeyValues, Params
from grpo_jax.rollout.episodes import Episode, Rollout, collect
from grpo_jax.rollout.prompts import Prompts, bucket, encode_prompts
from grpo_jax.sampler.decode import Noise, Rows, Settings, Turn, first_turn, next_turn
from grpo_jax.tasks import Example, Task


class Actor(NamedTuple):
    """A policy on its devices: the parameters are replicated over `num_devices` (a leading axis of that size)."""

    model: Model
    trainable: Params
    frozen: Params
    tokenizer: Tokenizer
    num_devices: int


def model_of(policy: Policy) -> Model:
    """How this policy's parameters become a module."""
    return Model(policy.config, policy.lora, str(policy.params["embed"].dtype))


def make_actor(policy: Policy, num_devices: int) -> Actor:
    """Puts a policy on its devices. Raises `UserError` if it has no tokenizer."""
    tokenizer = policy.require_tokenizer()
    trainable, frozen = split_params(policy.params, policy.lora)
    model = model_of(policy)
    return Actor(
        model, devices.replicate(trainable, num_devices), devices.replicate(frozen, num_devices), tokenizer, num_devices
    )


def rollout(
    actor: Actor,
    task: Task,
    prompts: Prompts,
    split: str,
    indices: Sequence[int],
    prompt_ids: Sequence[int],
    samples: Sequence[int],
    config: SamplingConfig,
    *,
    seed: int,
    step: int,
) -> Rollout:
    """Plays one episode for each of the samples of each prompt.

    Args:
      indices: which examples of `split`, P of them, a multiple of `actor.num_devices`.
      prompt_ids, samples: the names of the rows' noise: an id for each prompt, and an index for each of its G rows.
      seed, step: the rest of that name.

    Raises:
      RunError: if the environment's replies leave no room for the next turn in the policy's context.
    """
    n, tokenizer = actor.num_devices, actor.tokenizer
    examples = [getattr(task, split)[i] for i in indices]
    ids, lengths = prompts.batch(split, indices)
    episodes = [[Episode() for _ in samples] for _ in indices]
    settings = Settings(
        config.max_tokens,
        tokenizer.stop_ids,
        tokenizer.pad_id,
        config.top_k,
        truncate=config.top_k > 0 or config.top_p < 1,
    )
    named = np.asarray(prompt_ids, np.int32), np.asarray(samples, np.int32)
    scalars = (np.int32(seed), np.int32(step), np.float32(config.temperature), np.float32(config.top_p))

    def noise(seats: Seats) -> tuple[Any, ...]:
        return *devices.shard((named[0][seats.prompt], named[1][seats.sample]), n), *scalars

    # Every turn but the first also feeds the cache the last token of the turn before, and a reply.
    slots = used = config.max_tokens - 1
    seats = Seats(np.arange(len(indices)), np.tile(np.arange(len(samples)), (len(indices), 1)))
    active = np.ones(seats.sample.shape, bool)
    play = _first_turn(actor.model, settings, slots, prompts.common, n)
    turn, rows = play(actor.trainable, actor.frozen, *devices.shard((ids, lengths), n), *noise(seats))
    for turns_left in reversed(range(task.max_turns)):
        _record(turn, seats, active, episodes, tokenizer)
        if turns_left == 0 or task.reply is None:
            break
        replies = _replies(task, examples, seats, active, episodes)
        active = np.vectorize(lambda text: text is not None, otypes=[bool])(replies)
        if not active.any():
            break
        chosen = compaction(active, n)
        if chosen is not None:
            rows = _taking(n)(rows, *chosen)
            seats, active, replies = seats.take(active, replies, chosen)
        reply, reply_lengths = _hear(replies, seats, episodes, tokenizer)
        playing = [(seats.prompt[p], seats.sample[p, g]) for p, g in np.argwhere(replies != None)]  # noqa: E711
        longest = max(int(lengths[p]) + len(episodes[p][g].ids) for p, g in playing)
        if longest + config.max_tokens > (context := actor.model.config.max_positions):
            raise RunError(
                f"an episode of {task.name} has {longest} tokens before its turn {task.max_turns - turns_left + 1}, "
                f"which may take {config.max_tokens} more, but the policy's context is {context}: shorten the "
                "environment's replies, or lower sampling.max_tokens."
            )
        needed = reply.shape[-1] + config.max_tokens
        if used + needed > slots:
            rows, slots = _growing(used + turns_left * needed - slots, n)(rows), used + turns_left * needed
        used += needed
        arguments = devices.shard((reply, reply_lengths, active, lengths[seats.prompt]), n)
        turn, rows = _next_turn(actor.model, settings, n)(
            actor.trainable, actor.frozen, rows, *arguments, *noise(seats)
        )
    return collect(examples, named[0], ids, lengths, episodes, shortest=min(config.max_tokens, 16))


def single_turn(
    examples: Sequence[Example],
    prompt_ids: np.ndarray,
    prompts: np.ndarray,
    lengths: np.ndarray,
    turn: Turn,
    tokenizer: Tokenizer,
) -> Rollout:
    """The episodes of P prompts whose only turn [P, G, T] was sampled elsewhere, as `rollout` returns them."""
    num_prompts, num_samples, max_tokens = turn.tokens.shape
    episodes = [[Episode() for _ in range(num_samples)] for _ in range(num_prompts)]
    seats = Seats(np.arange(num_prompts), np.tile(np.arange(num_samples), (num_prompts, 1)))
    _record(devices.shard(turn, 1), seats, np.ones((num_prompts, num_samples), bool), episodes, tokenizer)
    return collect(examples, prompt_ids, prompts, lengths, episodes, shortest=min(max_tokens, 16))


def sample_text(
    policy: Policy,
    prompts: Sequence[str | Messages],
    *,
    temperature: float,
    max_tokens: int,
    num_samples: int,
    seed: int,
) -> list[list[str]]:
    """Completions of any prompts, `num_samples` texts for each. Temperature 0 is greedy.

    A completion is named by (seed, the place of its prompt, its own place), as in training.
    Raises `UserError` for a setting out of range, and for a prompt that leaves no room in the policy's context.
    """
    if num_samples < 1:
        raise UserError(f"num_samples = {num_samples} is out of range: it must be positive.")
    if not prompts:
        return []
    sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
    task = Task("what was asked", [{"prompt": prompt} for prompt in prompts], [], success=lambda **_: [])
    encoded = encode_prompts(task, policy.require_tokenizer(), policy.config.max_positions, max_tokens)
    n = min(jax.local_device_count(), len(prompts))
    places = range(-(-len(prompts) // n) * n)
    indices = [place % len(prompts) for place in places]  # filled up with repetitions, so that the devices share alike
    played = rollout(
        make_actor(policy, n), task, encoded, "train", indices, places, range(num_samples), sampling, seed=seed, step=0
    )
    return [[episode.turns[0] for episode in group] for group in played.episodes[: len(prompts)]]


class Seats(NamedTuple):
    """Which row of the whole batch sits where in the batch on the devices, which shrinks as episodes end.

    prompt [P'] and sample [P', G'] are indices into the whole batch of P prompts and G samples.
    """

    prompt: np.ndarray
    sample: np.ndarray

    def take(
        self, active: np.ndarray, replies: np.ndarray, chosen: tuple[np.ndarray, np.ndarray]
    ) -> tuple["Seats", np.ndarray, np.ndarray]:
        """These seats, `active` and `replies` [P', G'] after a compaction (see `compaction`)."""
        prompt, sample = chosen
        per_device = len(self.prompt) // len(prompt)
        prompt = (prompt + per_device * np.arange(len(prompt))[:, None]).reshape(-1)
        sample = sample.reshape(len(prompt), -1)
        rows = (prompt[:, None], sample)
        return Seats(self.prompt[prompt], self.sample[rows]), active[rows], replies[rows]


def compaction(active: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which rows to keep when at least half of the batch on the devices can go, or None.

    Each device keeps its own prompts. Sizes are powers of two, so that few shapes are compiled.

    Args:
      active: [P, G] bool, the rows that go on, on n devices of P / n prompts each.

    Returns:
      Indices of prompts [n, P'] within each device, and of their rows [n, P', G'].
    """
    by_device = active.reshape(n, -1, active.shape[1])
    num_prompts = min(_power_of_two(by_device.any(-1).sum(-1).max()), by_device.shape[1])
    num_rows = min(_power_of_two(active.sum(-1).max()), active.shape[1])
    if 2 * n * num_prompts * num_rows > active.size:
        return None
    prompt = np.argsort(~by_device.any(-1), axis=1, kind="stable")[:, :num_prompts]
    rows = np.take_along_axis(by_device, prompt[..., None], axis=1)
    return prompt, np.argsort(~rows, axis=-1, kind="stable")[..., :num_rows]


def _power_of_two(n: int) -> int:
    return 1 << (int(n) - 1).bit_length()


@lru_cache(maxsize=64)
def _first_turn(model: Model, settings: Settings, slots: int, common: int, n: int) -> Any:
    def play(trainable, frozen, prompts, lengths, prompt_ids, samples, seed, step, temperature, top_p):
        noise = Noise(seed, step, prompt_ids, samples)
        policy = model.bind(trainable, frozen)
        options = {"settings": settings, "slots": slots, "common": common}
        return first_turn(policy, prompts, lengths, noise, temperature, top_p, **options)

    return devices.parallel(play, n, in_axes=(0,) * 6 + (None,) * 4)


@lru_cache(maxsize=64)
def _next_turn(model: Model, settings: Settings, n: int) -> Any:
    def play(
        trainable,
        frozen,
        rows,
        reply,
        reply_lengths,
        active,
        lengths,
        prompt_ids,
        samples,
        seed,
        step,
        temperature,
        top_p,
    ):
        noise = Noise(seed, step, prompt_ids, samples)
        policy = model.bind(trainable, frozen)
        return next_turn(
            policy, rows, reply, reply_lengths, active, lengths, noise, temperature, top_p, settings=settings
        )

    return devices.parallel(play, n, in_axes=(0,) * 9 + (None,) * 4, donate=(2,))


@lru_cache(maxsize=64)
def _taking(n: int) -> Any:
    """Keeps the prompts [P'] and their rows [P', G'] of `Rows`."""

    def take(rows: Rows, prompt: jax.Array, sample: jax.Array) -> Rows:
        prefix = jax.tree.map(lambda x: x[prompt], rows.prefix)
        cache, position, token = jax.tree.map(
            lambda x: x[prompt[:, None], sample], (rows.cache, rows.position, rows.token)
        )
        return Rows(prefix, cache, rows.slot, position, token)

    return devices.parallel(take, n)


@lru_cache(maxsize=64)
def _growing(extra: int, n: int) -> Any:
    """Adds empty cache slots to `Rows`."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])

    def grow(rows: Rows) -> Rows:
        k, v = jax.tree.map(lambda x: pad(x, 3), (rows.cache.k, rows.cache.v))
        return rows._replace(cache=KeyValues(k, v, pad(rows.cache.positions, 2), pad(rows.cache.valid, 2)))

    return devices.parallel(grow, n)


def _record(turn: Turn, seats: Seats, active: np.ndarray, episodes: list[list[Episode]], tokenizer: Tokenizer) -> None:
    """Writes what the active rows said into their episodes."""
    tokens, mask, logprobs, stopped = devices.unshard(jax.device_get(turn))
    for p, g in np.argwhere(active):
        episode = episodes[seats.prompt[p]][seats.sample[p, g]]
        said = tokens[p, g][mask[p, g]].tolist()
        episode.say(said, logprobs[p, g][mask[p, g]].tolist(), tokenizer.decode(said))
        episode.ended = bool(stopped[p, g])


def _replies(
    task: Task, examples: Sequence[Example], seats: Seats, active: np.ndarray, episodes: list[list[Episode]]
) -> np.ndarray:
    """The environment's answers [P', G'], None for episodes that are over."""
    replies = np.full(active.shape, None, object)
    for p, g in np.argwhere(active):
        index = seats.prompt[p]
        replies[p, g] = task.reply(examples[index], episodes[index][seats.sample[p, g]].turns)
    return replies


def _hear(
    replies: np.ndarray, seats: Seats, episodes: list[list[Episode]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the answers into the episodes, and returns them as right-padded ids [P', G', F] and lengths."""
    heard: dict[tuple[int, int], list[int]] = {}
    for p, g in np.argwhere(replies != None):  # noqa: E711 - elementwise
        episode = episodes[seats.prompt[p]][seats.sample[p, g]]
        # A turn that was cut off gets the stop token that it lacks, so that the context stays well formed.
        heard[p, g] = [*([] if episode.ended else tokenizer.stop_ids[:1]), *tokenizer.reply(replies[p, g])]
        episode.hear(heard[p, g], replies[p, g])
    reply = np.zeros((*replies.shape, bucket(max(map(len, heard.values())))), np.int32)
    lengths = np.zeros(replies.shape, np.int32)
    for seat, ids in heard.items():
        reply[seat][: len(ids)] = ids
        lengths[seat] = len(ids)
    return reply, lengths
