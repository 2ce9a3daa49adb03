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
from grpo_jax.rollout.prompts import Prompts, bucket, pad_prompts
from grpo_jax.tasks import Example, Task


@dataclass
class Episode:
    """One row's token sequence after its prompt: `trained` marks what the policy said; `turns` are its texts."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)
    ended: bool = False

    def say(self, ids: Sequence[int], logprobs: Sequence[float], text: str) -> None:
        """Appends a turn of the policy."""
        self.ids += ids
        self.trained += [True] * len(ids)
        self.logprobs += logprobs
        self.turns.append(text)

    def hear(self, ids: Sequence[int], text: str) -> None:
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

    def reward_arguments(self) -> dict[str, Any]:
        """What reward functions are called with, one entry per completion, the rows of a prompt side by side."""
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
    examples: Sequence[Example],
    prompt_ids: np.ndarray,
    prompts: np.ndarray,
    lengths: np.ndarray,
    episodes: list[list[Episode]],
    *,
    shortest: int,
) -> Rollout:
    """Episodes as arrays. T is a bucket no smaller than `shortest`, so that short completions share one shape."""
    longest = max(len(episode.ids) for group in episodes for episode in group)
    shape = (len(episodes), len(episodes[0]), shortest if longest <= shortest else bucket(longest))
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    valid, mask, ended = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape[:2], bool)
    for p, group in enumerate(episodes):
        for g, episode in enumerate(group):
            size = len(episode.ids)
            tokens[p, g, :size], valid[p, g, :size] = episode.ids, True
            mask[p, g, :size], logprobs[p, g, :size] = episode.trained, episode.logprobs
            ended[p, g] = episode.ended
    return Rollout(examples, prompt_ids, prompts, lengths, tokens, valid, mask, logprobs, ended, episodes)


def demonstrations(
    task: Task,
    prompts: Prompts,
    split: str,
    indices: Sequence[int],
    prompt_ids: Sequence[int],
    samples: Sequence[int],
    tokenizer: Tokenizer,
    *,
    seed: int,
    step: int,
) -> Rollout:
    """The same arrays from the task's demonstrations, for supervised fine-tuning; its log-probabilities are 0.

    Raises `UserError` for a demonstration that goes on when its episode is over.
    """
    examples = [getattr(task, split)[i] for i in indices]
    episodes = []
    for example, prompt_id in zip(examples, prompt_ids, strict=True):
        episodes.append([])
        for sample in samples:
            episode = Episode(ended=True)
            # Named as the sampler's noise is, so that a resumed run sees the same demonstrations.
            turns = task.demonstrate(example, random.Random(f"{seed} {step} {prompt_id} {sample}"))
            for turn in turns:
                if episode.turns:
                    text = None if task.reply is None else task.reply(example, episode.turns)
                    if text is None:
                        raise UserError(
                            f"a demonstration of {task.name} has {len(turns)} turns, but its episode is over after "
                            f"{len(episode.turns)}: {turns!r}."
                        )
                    episode.hear(tokenizer.reply(text), text)
                said = [*tokenizer.encode(turn), tokenizer.stop_ids[0]]
                episode.say(said, [0.0] * len(said), turn)
            episodes[-1].append(episode)
    ids, lengths = prompts.batch(split, indices)
    return collect(examples, np.asarray(prompt_ids, np.int32), ids, lengths, episodes, shortest=4)


def shown(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Rollout:
    """Completions of one turn that somebody else has made, each with its prompt, as ids: groups of one."""
    ids, lengths = pad_prompts(prompts)
    episodes = [[Episode(list(c), [True] * len(c), [0.0] * len(c), ended=True)] for c in completions]
    return collect([], np.arange(len(prompts), dtype=np.int32), ids, lengths, episodes, shortest=4)


def take_groups(rollouts: Sequence[Rollout], chosen: Sequence[tuple[int, int]]) -> Rollout:
    """One rollout of groups of several, given as (which rollout, which of its P prompts)."""
    size = max(played.prompts.shape[1] for played in rollouts)
    prompts = [np.pad(played.prompts, ((0, 0), (0, size - played.prompts.shape[1]))) for played in rollouts]
    return collect(
        [rollouts[r].examples[p] for r, p in chosen],
        np.array([rollouts[r].prompt_ids[p] for r, p in chosen], np.int32),
        np.stack([prompts[r][p] for r, p in chosen]),
        np.array([rollouts[r].lengths[p] for r, p in chosen], np.int32),
        [rollouts[r].episodes[p] for r, p in chosen],
        shortest=min(played.mask.shape[2] for played in rollouts),
    )


def take_rows(played: Rollout, order: np.ndarray) -> Rollout:
    """The same groups with their rows in another order, `order` [P, G]."""

    def take(x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    episodes = [[group[g] for g in places] for group, places in zip(played.episodes, order, strict=True)]
    arrays = {name: take(getattr(played, name)) for name in ("tokens", "valid", "mask", "logprobs", "ended")}
    return replace(played, episodes=episodes, **arrays)


def beside(rollouts: Sequence[Rollout]) -> Rollout:
    """Groups of the same prompts side by side: the first rollout's rows, then the second's, and so on."""
    first = rollouts[0]
    groups = [
        [e for group in of_prompt for e in group] for of_prompt in zip(*(r.episodes for r in rollouts), strict=True)
    ]
    return collect(first.examples, first.prompt_ids, first.prompts, first.lengths, groups, shortest=4)


def score_rollout(played: Rollout, experiment: Experiment) -> Scores:
    """The experiment's rewards of every episode, the rows of a prompt side by side (see `rewards.scoring.score`)."""
    config = experiment.reward
    arguments = played.reward_arguments()
    return score(
        experiment.rewards,
        config.weights,
        **{name: arguments.pop(name) for name in ("prompts", "completions", "completion_ids")},
        columns=arguments,
        combine=config.combine,
        group_size=played.mask.shape[1],
        on_failure=config.on_failure,
        retries=config.retries,
        time_limit=config.time_limit,
    )
