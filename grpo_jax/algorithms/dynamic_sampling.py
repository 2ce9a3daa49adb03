"""Dynamic sampling (DAPO, 2503.14476, section 3.2): groups without a signal are replaced by others.

A group whose rewards are all equal has no advantages: it costs its sampling and teaches nothing. A step may sample
further rounds of prompts, and put their groups that do have a signal in the place of those that do not. Which prompts
these are, and their noise, follow from (seed, step) and the round, so a resumed run does the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.algorithms.base import StepContext
from grpo_jax.algorithms.batches import reward_arrays, schedule
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Rollout, take_groups


@dataclass(frozen=True)
class Round:
    """What was sampled and scored at once: rewards and sample_mask are [P, G]."""

    rollout: Rollout
    scores: Scores
    rewards: np.ndarray
    sample_mask: np.ndarray

    def has_signal(self) -> np.ndarray:
        """[P] whether the rewards of a group's completions that count differ."""
        lowest = np.min(self.rewards, axis=1, where=self.sample_mask, initial=np.inf)
        highest = np.max(self.rewards, axis=1, where=self.sample_mask, initial=-np.inf)
        return highest > lowest


def choose(signals: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Which group to train on in each of the P places, as (round, place in the round).

    A group of the first round that has a signal keeps its place. The others' places go, in order, to the groups with a
    signal of the later rounds; where these run out, the group without a signal stays.

    Args:
      signals: [P] for each round, whether its groups have a signal.
    """
    spare = iter([(number, int(p)) for number in range(1, len(signals)) for p in np.flatnonzero(signals[number])])
    return [(0, p) if signal else next(spare, (0, p)) for p, signal in enumerate(signals[0])]


def combine(rounds: Sequence[Round]) -> Round:
    """The step's groups, chosen among those of all rounds. With a single round that round as it is."""
    if len(rounds) == 1:
        return rounds[0]
    chosen = choose([r.has_signal() for r in rounds])
    size = rounds[0].sample_mask.shape[1]
    rows = [(number, p * size + g) for number, p in chosen for g in range(size)]
    scores = Scores(
        total=[rounds[number].scores.total[i] for number, i in rows],
        by_name={
            name: [rounds[number].scores.by_name[name][i] for number, i in rows] for name in rounds[0].scores.by_name
        },
        sample_mask=[rounds[number].scores.sample_mask[i] for number, i in rows],
        failures={name: sum(r.scores.failures[name] for r in rounds) for name in rounds[0].scores.failures},
        advantage_rewards=[rounds[number].scores.advantage_rewards[i] for number, i in rows],
    )
    return Round(
        take_groups([r.rollout for r in rounds], chosen),
        scores,
        np.stack([rounds[number].rewards[p] for number, p in chosen]),
        np.stack([rounds[number].sample_mask[p] for number, p in chosen]),
    )


def sample_rounds(context: StepContext, step: int) -> list[Round]:
    """Samples and scores the step's prompts, and further rounds while some groups have no signal and rounds are left.

    A further round's prompts are those to which the schedule would come after the last step, so that the first round
    of every step has the same prompts with and without dynamic sampling.
    """
    config = context.experiment
    size, num_examples = config.prompts_per_step, len(config.task.train)
    occurred: Counter[int] = Counter()
    rounds: list[Round] = []
    for number in range(config.dynamic_sampling_rounds + 1):
        place = step + number * config.num_steps
        rollout = context.sample(step, *schedule(config.seed, place, size, num_examples, occurred=occurred))
        scores = context.score(rollout, step)
        rounds.append(Round(rollout, scores, *reward_arrays(scores, rollout.mask.shape[:2])))
        if sum(int(r.has_signal().sum()) for r in rounds) >= size:
            break
    return rounds
