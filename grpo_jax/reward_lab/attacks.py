"""Attacks on a reward: the highest reward of answers that ignore their prompt and are wrong.

A policy can find any answer that a reward pays well, and then it collapses onto that answer. The value of an attack is
its mean reward on the examples where it is wrong: a constant answer that happens to be right is no exploit. Attacks are
chosen on some examples of the task and judged on others, so that a lucky hit on one prompt does not count.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment
from grpo_jax.policy import Tokenizer
from grpo_jax.reward_lab.readings import score_variants
from grpo_jax.rewards import RewardFunction
from grpo_jax.rollout import Episode, completion
from grpo_jax.tasks import Example, Task
from grpo_jax.tasks.calls import reply_of, success_of

Answer = str | Callable[[Example], str]
"""The policy's text in every turn: always the same, or made from the example."""

Value = Callable[[Sequence[str]], np.ndarray]
"""The values [N] of constant answers [N]; nan for one that cannot be encoded or is always right."""

VOCABULARY, SYMBOLS = 512, 64  # the most answers, and the most characters or tokens, that attacks are made from
BATCH = 512  # completions per call of the rewards
NEIGHBOURS, STARTS = 64, 4  # of a search: texts scored together, and starting texts of each kind


@dataclass(frozen=True)
class Attack:
    """The best answer of a family against one variant of the reward.

    `text` is the answer (of an echo, that to the first example), `value` the mean reward over the examples on which it
    is wrong, and `success` the share of examples on which it is right.
    """

    family: str
    text: str
    value: float
    success: float


@dataclass(frozen=True)
class Honest:
    """The rewards [N] of honest attempts from one source under one variant."""

    source: str
    values: np.ndarray

    @property
    def mean(self) -> float:
        """The most that an attack may earn: if it earns more, a policy gains by replacing these attempts with it."""
        return float(self.values.mean()) if self.values.size else math.nan

    def is_beaten_by(self, value: float) -> bool:
        """Whether an attack with this value earns more than these attempts; false for nan."""
        return value > self.mean + 1e-9

    def share_below(self, value: float) -> float:
        """The share of these attempts that earn less than `value`."""
        return float((self.values < value - 1e-9).mean()) if self.values.size else math.nan


@dataclass(frozen=True)
class Target:
    """The rewards that are attacked: those of an experiment and the `extra` ones."""

    experiment: Experiment
    extra: Mapping[str, RewardFunction]
    tokenizer: Tokenizer

    @property
    def task(self) -> Task:
        return self.experiment.task

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Rewards [N, E] by variant, and success [N, E], of N answers to each of E examples.

        nan where a reward fails or does not apply, and for an answer that the tokenizer cannot encode, which no policy
        could sample.
        """
        shape = (len(answers), len(examples))
        rewards: dict[str, np.ndarray] = {}
        success = np.zeros(shape, bool)
        rows = max(BATCH // len(examples), 1)
        for start in range(0, len(answers), rows):
            episodes = [
                (i, e, episode)
                for i, answer in enumerate(answers[start : start + rows], start)
                for e, example in enumerate(examples)
                if (episode := self._episode(answer, example)) is not None
            ]
            if not episodes:
                continue
            where = tuple(np.array([(i, e) for i, e, _ in episodes]).T)
            arguments = _arguments([examples[e] for _, e, _ in episodes], [episode for *_, episode in episodes])
            scores = score_variants(arguments, 1, self.experiment, self.extra, on_failure="drop")
            for name, values in scores.items():
                rewards.setdefault(name, np.full(shape, math.nan))[where] = values
            success[where] = success_of(self.task, arguments, self.experiment.reward.time_limit)
        return rewards, success

    def _episode(self, answer: Answer, example: Example) -> Episode | None:
        """An episode in which the policy gives `answer` in every turn; None if the answer cannot be encoded."""
        text, episode = answer if isinstance(answer, str) else answer(example), Episode()
        try:
            ids = [*self.tokenizer.encode(text), *self.tokenizer.stop_ids[:1]]
        except UserError:
            return None
        for turn in range(self.task.max_turns):
            episode.add_action(ids, [0.0] * len(ids), text)
            if turn + 1 == self.task.max_turns:
                break
            heard = reply_of(self.task, example, episode.turns, self.experiment.reward.time_limit)
            if heard is None:
                break
            episode.add_observation([], heard)
        return episode


def wrong_value(rewards: np.ndarray, success: np.ndarray) -> np.ndarray:
    """The mean of rewards [N, E] over the examples on which each answer is wrong -> [N]; nan where there is none."""
    counts = ~success & ~np.isnan(rewards)
    total = np.where(counts, rewards, 0.0).sum(1)
    return np.where(counts.any(1), total / np.maximum(counts.sum(1), 1), math.nan)


@dataclass(frozen=True)
class AttackConfig:
    """What the attacks may use.

    Attributes:
      search_on, judge_on: the examples that a family's best answer is chosen on, and those that it is judged on.
      demonstrations, completions: honest answers. The characters and the starting texts of the search come from them.
      max_tokens: the longest answer that the policy can give in a turn.
      budget: how many completions the search may score for each variant.
    """

    search_on: Sequence[Example]
    judge_on: Sequence[Example]
    demonstrations: Sequence[str]
    completions: Sequence[str]
    max_tokens: int
    budget: int
    seed: int = 0


def attack(target: Target, variants: Sequence[str], config: AttackConfig) -> dict[str, list[Attack]]:
    """The best attack of each family on each variant, judged on `config.judge_on`."""
    rng = random.Random(config.seed)
    honest = [*config.demonstrations, *config.completions]
    vocabulary = list(dict.fromkeys(honest))
    symbols = [s for s, _ in Counter("".join(honest)).most_common(SYMBOLS)]
    shown = config.demonstrations or config.completions
    candidates = families(vocabulary, shown, symbols, target.tokenizer, config.max_tokens)
    scored: dict[str, tuple[dict[str, np.ndarray], np.ndarray]] = {
        family: target.score(answers, config.search_on) for family, answers in candidates.items() if answers
    }
    found: dict[str, list[Attack]] = {}
    for name in variants:
        best: dict[str, Answer] = {}
        for family, (rewards, success) in scored.items():
            values = wrong_value(rewards[name], success) if name in rewards else np.array([math.nan])
            if not np.isnan(values).all():
                best[family] = candidates[family][int(np.nanargmax(values))]

        def value(texts: Sequence[str], name: str = name) -> np.ndarray:
            rewards, success = target.score(texts, config.search_on)
            return wrong_value(rewards[name], success) if name in rewards else np.full(len(texts), math.nan)

        starts = _starts(best.values(), vocabulary, symbols, rng)
        text = search(value, starts, symbols, max(config.budget // len(config.search_on), 1), rng)
        if text is not None:
            best["best constant found"] = text
        found[name] = [_judge(target, name, family, answer, config.judge_on) for family, answer in best.items()]
    return found


def families(
    vocabulary: Sequence[str], demonstrations: Sequence[str], symbols: Sequence[str], tokenizer: Tokenizer, limit: int
) -> dict[str, list[Answer]]:
    """The answers to try, by family: each alone, and inside the template that all demonstrations share, if any.

    Args:
      vocabulary: honest answers, which are given here whatever the prompt is.
      demonstrations: honest answers, from which the template is read.
      symbols: characters to repeat.
      limit: the most tokens of an answer.
    """
    prefix, suffix = template(demonstrations)
    middles = [len(text) - len(prefix) - len(suffix) for text in demonstrations] or [1]
    length = sorted(middles)[len(middles) // 2]
    ids = list(dict.fromkeys(i for text in vocabulary for i in tokenizer.encode(text)))[:SYMBOLS]
    room = max(limit - len(tokenizer.encode(prefix)) - len(tokenizer.encode(suffix)) - 1, 1)
    repeated = [tokenizer.decode([i] * room) for i in ids]

    def framed(texts: Iterable[str]) -> list[Answer]:
        texts = list(texts)
        return list(dict.fromkeys([*texts, *(prefix + text + suffix for text in texts)]))

    def echo(frame: Callable[[str], str], whole: bool) -> Answer:
        return lambda example: frame(_prompt_text(example["prompt"], whole))

    return {
        "empty": framed(["", " "]),
        "echoed prompt": [
            echo(frame, whole) for whole in (False, True) for frame in (str, lambda text: prefix + text + suffix)
        ],
        "repeated letter": framed(symbol * length for symbol in symbols if not symbol.isspace()),
        "repeated token": framed(repeated),
        "over-long": [text * times for text in vocabulary[:SYMBOLS] for times in (2, max(limit, 2))],
        "honest, but blind": list(vocabulary[:VOCABULARY]),
    }


def template(texts: Sequence[str]) -> tuple[str, str]:
    """The longest beginning and the longest end that all texts share, such as tags around an answer.

    Both are empty if there are fewer than two different texts.
    """
    texts = list(dict.fromkeys(texts))
    if len(texts) < 2:
        return "", ""
    prefix = _shared_start(texts)
    return prefix, _shared_start([text[len(prefix) :][::-1] for text in texts])[::-1]


def search(value: Value, starts: Iterable[str], symbols: Sequence[str], budget: int, rng: random.Random) -> str | None:
    """Hill climbing from each start, one after the other.

    Returns the best of at most `budget` texts that are tried; None if the value of all of them is nan.

    A step replaces or removes one character. The neighbours are scored in random order, `NEIGHBOURS` at a time, and the
    step goes to the best of the first such batch with an improvement: a text has hundreds of neighbours, and scoring
    all of them would take most of the budget.
    """
    best, best_value = None, -math.inf

    def best_of(texts: Sequence[str]) -> tuple[str, float]:
        nonlocal budget
        texts = texts[:budget]
        budget -= len(texts)
        values = np.nan_to_num(value(texts), nan=-math.inf)
        top = int(np.argmax(values))
        return texts[top], float(values[top])

    for start in starts:
        if budget <= 0:
            break
        text, current = best_of([start])
        improved = True
        while improved and budget > 0:
            improved = False
            near = neighbours(text, symbols)
            rng.shuffle(near)
            for first in range(0, len(near), NEIGHBOURS):
                if budget <= 0:
                    break
                other, other_value = best_of(near[first : first + NEIGHBOURS])
                if other_value > current:
                    text, current, improved = other, other_value, True
                    break
        if current > best_value:
            best, best_value = text, current
    return best


def neighbours(text: str, symbols: Sequence[str]) -> list[str]:
    """All texts that differ from `text` in one character, or have one character less."""
    places = range(len(text))
    replaced = [text[:i] + symbol + text[i + 1 :] for i in places for symbol in symbols if symbol != text[i]]
    return replaced + [text[:i] + text[i + 1 :] for i in places]


def warning(variant: str, attacks: Sequence[Attack], honest: Sequence[Honest]) -> str | None:
    """One sentence on the attacks that earn more than the honest attempts of some source; None if there are none."""
    known = [source for source in honest if source.values.size]
    over = [attack for attack in attacks if any(source.is_beaten_by(attack.value) for source in known)]
    if not over:
        return None
    over = sorted(over, key=lambda attack: -attack.value)
    found = ", ".join(f"{attack.value:.3f} for {_short(attack.text)} ({attack.family})" for attack in over)
    means = " and ".join(f"{source.mean:.3f} ({source.source})" for source in known)
    return (
        f"{variant} pays answers that ignore the prompt and are wrong {found}; honest attempts earn {means} on average."
    )


def _judge(target: Target, variant: str, family: str, answer: Answer, examples: Sequence[Example]) -> Attack:
    rewards, success = target.score([answer], examples)
    value = wrong_value(rewards[variant], success)[0] if variant in rewards else math.nan
    text = answer if isinstance(answer, str) else answer(examples[0])
    return Attack(family, text, float(value), float(success.mean()))


def _starts(
    answers: Iterable[Answer], vocabulary: Sequence[str], symbols: Sequence[str], rng: random.Random
) -> list[str]:
    """Where a search begins: the best answers so far, some honest ones, and random texts of the same lengths."""
    known = [answer for answer in answers if isinstance(answer, str)]
    some = rng.sample(vocabulary, min(STARTS, len(vocabulary)))
    noise = ["".join(rng.choices(symbols, k=len(text))) for text in some] if symbols else []
    return list(dict.fromkeys([*known, *some, *noise]))


def _arguments(examples: Sequence[Example], episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """The keyword arguments of the rewards, for one episode of each of the examples."""
    columns = sorted({key for example in examples for key in example} - {"prompt"})
    return {
        "prompts": [example["prompt"] for example in examples],
        "completions": [completion(*pair) for pair in zip(examples, episodes, strict=True)],
        "completion_ids": [[i for i, trained in zip(e.ids, e.trained, strict=True) if trained] for e in episodes],
        **{key: [example.get(key) for example in examples] for key in columns},
    }


def _prompt_text(prompt: str | Sequence[Mapping[str, str]], whole: bool) -> str:
    """The text of a prompt; of a chat, its last message, or all of them if `whole`."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in (prompt if whole else prompt[-1:]))


def _shared_start(texts: Sequence[str]) -> str:
    """The longest beginning that all texts share."""
    columns = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    return "".join(first for first, *_ in columns)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
