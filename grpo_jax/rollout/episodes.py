"""Episodes, and batches of them as the arrays that an update takes."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment
from grpo_jax.policy.tokenizer import Tokenizer
from grpo_jax.rewards.scoring import Scores, score
from grpo_jax.rollout.prompts import PromptBatch, bucket, pad_prompts
from grpo_jax.sampler import Generation, Noise
from grpo_jax.sharding import Array
from grpo_jax.tasks import Example, Task
from grpo_jax.tasks.calls import TIME_LIMIT, demonstration_of, reply_of


@dataclass
class Episode:
    """One row's token sequence after its prompt.

    Attributes:
      ids: every token, the policy's and the environment's.
      trained: for each token, whether the policy sampled it (and is trained on it).
      logprobs: what the sampler reported for it; 0 for the environment's tokens.
      turns, replies: the texts of the policy's turns and of the environment's answers.
      ended: False if the token limit cut off the last turn.
    """

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    ended: bool = False

    def add_action(self, ids: Sequence[int], logprobs: Sequence[float], text: str) -> None:
        """Appends a turn of the policy."""
        self.ids += ids
        self.trained += [True] * len(ids)
        self.logprobs += logprobs
        self.turns.append(text)

    def add_observation(self, ids: Sequence[int], text: str) -> None:
        """Appends an answer of the environment."""
        self.ids += ids
        self.trained += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.replies.append(text)


@dataclass(frozen=True)
class Rollout:
    """The episodes of one batch, P prompts with G rows each, as the arrays that an update takes.

    Attributes:
      examples: the P examples, and `prompt_ids` their ids, by which their noise is named.
      prompts, lengths: right-padded ids [P, S] int32, and lengths [P] int32.
      tokens: [P, G, T] int32, everything after the prompt: sampled tokens and the environment's.
      valid: [P, G, T] bool, where `tokens` holds a token.
      mask: [P, G, T] bool, where that token was sampled (and is trained on).
      logprobs: [P, G, T] float32, what the sampler reported; 0 elsewhere.
      ended: [P, G] bool, False where the last turn was cut off by the token limit.
      episodes: P lists of G episodes.
      indices: the places of the P examples in their split; empty for prompts that no task has.
    """

    examples: Sequence[Example]
    prompt_ids: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    valid: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    ended: np.ndarray
    episodes: list[list[Episode]]
    indices: Sequence[int] = ()

    def reward_arguments(self) -> dict[str, Any]:
        """The keyword arguments of reward functions: one entry per completion, the rows of a prompt side by side."""
        rows = [(example, e) for example, group in zip(self.examples, self.episodes, strict=True) for e in group]
        columns = {key for example in self.examples for key in example} - {"prompt"}
        return {
            "prompts": [example["prompt"] for example, _ in rows],
            "completions": [completion(example, episode) for example, episode in rows],
            "completion_ids": [[i for i, trained in zip(e.ids, e.trained, strict=True) if trained] for _, e in rows],
            **{key: [example.get(key) for example, _ in rows] for key in sorted(columns)},
        }


def completion(example: Example, episode: Episode) -> str | list[dict[str, str]]:
    """An episode as reward functions see it: a string, or messages for a chat prompt or an episode of several turns."""
    if isinstance(example["prompt"], str) and not episode.replies and len(episode.turns) == 1:
        return episode.turns[0]
    messages = []
    for i, turn in enumerate(episode.turns):
        messages.append({"role": "assistant", "content": turn})
        if i < len(episode.replies):
            messages.append({"role": "user", "content": episode.replies[i]})
    return messages


def collect(
    prompts: PromptBatch, prompt_ids: Sequence[int] | Array, episodes: list[list[Episode]], *, shortest: int
) -> Rollout:
    """Episodes as arrays. T is a bucket no smaller than `shortest`, so that short completions share one shape."""
    longest = max(len(episode.ids) for group in episodes for episode in group)
    shape = (len(episodes), len(episodes[0]), padded_length(longest, shortest))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    valid, mask, ended = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape[:2], bool)
    for p, group in enumerate(episodes):
        for g, episode in enumerate(group):
            size = len(episode.ids)
            tokens[p, g, :size], valid[p, g, :size] = episode.ids, True
            mask[p, g, :size], logprobs[p, g, :size] = episode.trained, episode.logprobs
            ended[p, g] = episode.ended
    names = np.asarray(prompt_ids, np.int32)
    arrays = (prompts.ids, prompts.lengths, tokens, valid, mask, logprobs, ended)
    return Rollout(prompts.examples, names, *arrays, episodes, prompts.indices)


def single_turn(
    prompts: PromptBatch, prompt_ids: Sequence[int] | Array, generation: Generation, tokenizer: Tokenizer
) -> Rollout:
    """Episodes of one turn: the sampler's arrays [P, G, T] (on the host) become the update's, padded to a bucket."""
    tokens, mask, logprobs, ended = (np.asarray(x) for x in generation)
    size = padded_length(int(mask.sum(-1).max()), shortest_length(mask.shape[2]))

    def fit(x: np.ndarray) -> np.ndarray:
        return np.pad(x[..., :size], [(0, 0), (0, 0), (0, max(size - x.shape[-1], 0))])

    tokens, mask, logprobs = fit(np.where(mask, tokens, 0)), fit(mask), fit(logprobs)
    episodes: list[list[Episode]] = []
    for rows in zip(tokens, mask, logprobs, ended, strict=True):
        episodes.append([])
        for ids, sampled, values, stopped in zip(*rows, strict=True):
            episode = Episode(ended=bool(stopped))
            kept = ids[sampled].tolist()
            episode.add_action(kept, values[sampled].tolist(), tokenizer.decode(kept))
            episodes[-1].append(episode)
    names = np.asarray(prompt_ids, np.int32)
    arrays = (prompts.ids, prompts.lengths, tokens, mask, mask, logprobs, ended)
    return Rollout(prompts.examples, names, *arrays, episodes, prompts.indices)


def shortest_length(max_tokens: int) -> int:
    """The least T of a sampled batch."""
    return min(max_tokens, 16)


def padded_length(longest: int, shortest: int) -> int:
    """T for completions of up to `longest` tokens: `shortest`, or a bucket above it."""
    return shortest if longest <= shortest else bucket(longest)


def demonstrations(
    task: Task, prompts: PromptBatch, noise: Noise, tokenizer: Tokenizer, time_limit: float = TIME_LIMIT
) -> Rollout:
    """The same arrays from the task's demonstrations, for supervised fine-tuning; their log-probabilities are 0.

    Args:
      noise: names each demonstration, as it names what is sampled, so a resumed run sees the same ones.
      time_limit: of each call of the task's functions, in seconds.

    Raises:
      UserError: for a demonstration that goes on after its episode is over. RunError: if a function of the task fails.
    """
    episodes: list[list[Episode]] = []
    for example, prompt_id, samples in zip(prompts.examples, noise.prompt_ids, noise.samples, strict=True):
        episodes.append([])
        for sample in samples:
            episode = Episode(ended=True)
            generator = random.Random(f"{noise.seed} {noise.step} {prompt_id} {sample}")
            turns = demonstration_of(task, example, generator, time_limit)
            for turn in turns:
                if episode.turns:
                    text = reply_of(task, example, episode.turns, time_limit)
                    if text is None:
                        raise UserError(
                            f"a demonstration of {task.name} has {len(turns)} turns, but its episode is over after "
                            f"{len(episode.turns)}: {turns!r}."
                        )
                    episode.add_observation(tokenizer.reply(text), text)
                ids = [*tokenizer.encode(turn), tokenizer.stop_ids[0]]
                episode.add_action(ids, [0.0] * len(ids), turn)
            episodes[-1].append(episode)
    return collect(prompts, noise.prompt_ids, episodes, shortest=4)


def from_completions(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Rollout:
    """Completions of one turn from elsewhere, each with its own prompt, all as token ids: groups of one."""
    ids, lengths = pad_prompts(prompts)
    episodes = [[Episode(list(c), [True] * len(c), [0.0] * len(c), ended=True)] for c in completions]
    return collect(PromptBatch([], ids, lengths), range(len(prompts)), episodes, shortest=4)


def take_groups(rollouts: Sequence[Rollout], chosen: Sequence[tuple[int, int]]) -> Rollout:
    """One rollout of groups from several, given as (which rollout, which of its P prompts)."""
    size = max(rollout.prompts.shape[1] for rollout in rollouts)
    ids = [np.pad(rollout.prompts, ((0, 0), (0, size - rollout.prompts.shape[1]))) for rollout in rollouts]
    prompts = PromptBatch(
        [rollouts[r].examples[p] for r, p in chosen],
        np.stack([ids[r][p] for r, p in chosen]),
        np.array([rollouts[r].lengths[p] for r, p in chosen], np.int32),
        indices=[rollouts[r].indices[p] for r, p in chosen if len(rollouts[r].indices)],
    )
    return collect(
        prompts,
        [rollouts[r].prompt_ids[p] for r, p in chosen],
        [rollouts[r].episodes[p] for r, p in chosen],
        shortest=min(rollout.mask.shape[2] for rollout in rollouts),
    )


def take_rows(rollout: Rollout, order: np.ndarray) -> Rollout:
    """The same groups with their rows in another order, `order` [P, G]."""

    def take(x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    episodes = [[group[g] for g in places] for group, places in zip(rollout.episodes, order, strict=True)]
    names = ("tokens", "valid", "mask", "logprobs", "ended")
    arrays: dict[str, Any] = {name: take(getattr(rollout, name)) for name in names}
    return replace(rollout, episodes=episodes, **arrays)


def join_groups(rollouts: Sequence[Rollout]) -> Rollout:
    """Larger groups of the same prompts: the first rollout's rows, then the second's, and so on."""
    first = rollouts[0]
    groups = [
        [e for group in of_prompt for e in group] for of_prompt in zip(*(r.episodes for r in rollouts), strict=True)
    ]
    prompts = PromptBatch(first.examples, first.prompts, first.lengths, indices=first.indices)
    return collect(prompts, first.prompt_ids, groups, shortest=4)


def score_rollout(rollout: Rollout, experiment: Experiment) -> Scores:
    """The experiment's rewards of every episode, the rows of a prompt side by side (see `rewards.scoring.score`)."""
    arguments = rollout.reward_arguments()
    return score(experiment.rewards, arguments, experiment.reward, group_size=rollout.mask.shape[1])
