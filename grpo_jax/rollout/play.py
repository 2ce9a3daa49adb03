"""Plays episodes: a generator's turns, and the environment's answers between them."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import SamplingConfig
from grpo_jax.policy import Policy
from grpo_jax.policy.tokenizer import Messages, Tokenizer
from grpo_jax.rollout.episodes import Episode, Rollout, collect, shortest_length, single_turn
from grpo_jax.rollout.generator import Generator, make_actor, name_noise
from grpo_jax.rollout.prompts import PromptBatch, bucket, encode_prompts
from grpo_jax.sampler import Generation, Noise, Observation
from grpo_jax.sharding import up_to
from grpo_jax.tasks import Example, Task
from grpo_jax.tasks.calls import TIME_LIMIT, reply_of


def rollout(
    generator: Generator,
    task: Task,
    prompts: PromptBatch,
    noise: Noise,
    sampling: SamplingConfig,
    time_limit: float | None = TIME_LIMIT,
) -> Rollout:
    """Plays one episode for each row of a batch.

    Args:
      generator: what samples the policy's turns.
      task: its `reply` is the environment, where there are several turns.
      prompts: P prompts, a multiple of `generator.batch_multiple`.
      noise: the names of the rows' noise, G samples of each prompt (see `name_noise`).
      time_limit: of each call of the task's `reply`, in seconds; None for a person who answers.

    Raises:
      RunError: if the environment's replies leave no room for the next turn in the policy's context, or if the
        task's `reply` fails.
    """
    tokenizer = generator.tokenizer
    generation, state = generator.generate(prompts, noise, sampling)
    if task.reply is None or task.max_turns == 1:
        return single_turn(prompts, noise.prompt_ids, generation, tokenizer)
    episodes = [[Episode() for _ in samples] for samples in noise.samples]
    active = np.ones(noise.samples.shape, bool)
    for turns_left in reversed(range(task.max_turns)):
        _add_actions(generation, active, episodes, tokenizer)
        if turns_left == 0:
            break
        replies = _replies(task, prompts.examples, active, episodes, time_limit)
        active = np.vectorize(lambda text: text is not None, otypes=[bool])(replies)
        if not active.any():
            break
        observation = _add_observations(replies, active, episodes, tokenizer)
        longest = max(int(prompts.lengths[p]) + len(episodes[p][g].ids) for p, g in np.argwhere(active))
        if longest + sampling.max_tokens > (context := generator.max_positions):
            raise RunError(
                f"an episode of {task.name} has {longest} tokens before its turn {task.max_turns - turns_left + 1}, "
                f"which may take {sampling.max_tokens} more, but the policy's context is {context}: shorten the "
                "environment's replies, or lower sampling.max_tokens."
            )
        generation, state = generator.continue_generation(state, observation, noise, sampling, turns_left)
    return collect(prompts, noise.prompt_ids, episodes, shortest=shortest_length(sampling.max_tokens))


def _add_actions(
    generation: Generation, active: np.ndarray, episodes: list[list[Episode]], tokenizer: Tokenizer
) -> None:
    """Adds the active rows' turns to their episodes."""
    tokens, mask, logprobs, stopped = generation
    for p, g in np.argwhere(active):
        sampled = mask[p, g]
        ids = tokens[p, g][sampled].tolist()
        episodes[p][g].add_action(ids, logprobs[p, g][sampled].tolist(), tokenizer.decode(ids))
        episodes[p][g].ended = bool(stopped[p, g])


def _replies(
    task: Task, examples: Sequence[Example], active: np.ndarray, episodes: list[list[Episode]], time_limit: float | None
) -> np.ndarray:
    """The environment's answers [P, G], None for episodes that are over."""
    replies = np.full(active.shape, None, object)
    for p, g in np.argwhere(active):
        replies[p, g] = reply_of(task, examples[p], episodes[p][g].turns, time_limit)
    return replies


def _add_observations(
    replies: np.ndarray, active: np.ndarray, episodes: list[list[Episode]], tokenizer: Tokenizer
) -> Observation:
    """Adds the answers to the active rows' episodes, and returns them as right-padded ids [P, G, F] and lengths."""
    rows: dict[tuple[int, int], list[int]] = {}
    for p, g in np.argwhere(active):
        episode = episodes[p][g]
        # A turn that was cut off gets the stop token that it lacks, so that the context stays well formed.
        rows[p, g] = [*([] if episode.ended else tokenizer.stop_ids[:1]), *tokenizer.reply(replies[p, g])]
        episode.add_observation(rows[p, g], replies[p, g])
    tokens = np.zeros((*active.shape, bucket(max(map(len, rows.values())))), np.int32)
    lengths = np.zeros(active.shape, np.int32)
    for row, ids in rows.items():
        tokens[row][: len(ids)] = ids
        lengths[row] = len(ids)
    return Observation(tokens, lengths, active)


def sample_text(
    policy: Policy, prompts: Sequence[str | Messages], sampling: SamplingConfig, *, num_samples: int, seed: int
) -> list[list[str]]:
    """Completions of any prompts, `num_samples` texts for each.

    A completion is named by (seed, the place of its prompt, its own place), as in training.
    Raises `UserError` for a number of samples out of range, and for a prompt that leaves no room in the context.
    """
    if not prompts:
        return []
    task = Task("the prompts given", [{"prompt": prompt} for prompt in prompts], [], success=lambda **_: [])
    episodes = sample_episodes(policy, task, sampling, num_samples=num_samples, seed=seed)
    return [[episode.turns[0] for episode in group] for group in episodes]


def sample_episodes(
    policy: Policy,
    task: Task,
    sampling: SamplingConfig,
    *,
    num_samples: int,
    seed: int,
    time_limit: float | None = TIME_LIMIT,
) -> list[list[Episode]]:
    """Plays the training prompts of a task, of one turn or several: `num_samples` episodes for each.

    The noise is named as in `sample_text`; `time_limit` is that of `rollout`. Raises `UserError` as `sample_text` does,
    and `RunError` as `rollout` does.
    """
    if num_samples < 1:
        raise UserError(f"num_samples = {num_samples} is out of range: it must be positive.")
    num_prompts = len(task.train)
    max_positions = policy.config.max_positions
    encoded = encode_prompts(task, policy.require_tokenizer(), max_positions, sampling.max_tokens)
    replicas = up_to(num_prompts)
    places = range(-(-num_prompts // replicas.count) * replicas.count)
    # Filled up with repetitions, so that all devices have equally many.
    batch = encoded.batch("train", [place % num_prompts for place in places])
    noise = name_noise(seed, 0, places, range(num_samples))
    return rollout(make_actor(policy, replicas), task, batch, noise, sampling, time_limit).episodes[:num_prompts]
