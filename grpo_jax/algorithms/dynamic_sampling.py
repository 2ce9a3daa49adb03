"""Groups without a signal, and what a step trains on instead (DAPO's dynamic sampling, 2503.14476, section 3.2).

A group whose rewards are all equal has no advantages, so it costs its sampling and teaches nothing. A step may play
further rounds of prompts and put the groups of theirs that do have a signal in the place of those that do not. Which
prompts these are, and their noise, follow from (seed, step) and the round, so a resumed run does the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Rollout, take_groups


@dataclass(frozen=True)
class Round:
    """What was played and scored at once: rewards and kept are [P, G]."""

    played: Rollout
    scores: Scores
    rewards: np.ndarray
    kept: np.ndarray

    def has_signal(self) -> np.ndarray:
        """[P] whether a group's kept rewards differ."""
        lowest = np.min(self.rewards, axis=1, where=self.kept, initial=np.inf)
        highest = np.max(self.rewards, axis=1, where=self.kept, initial=-np.inf)
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
    size = rounds[0].kept.shape[1]
    rows = [(number, p * size + g) for number, p in chosen for g in range(size)]
    scores = Scores(
        total=[rounds[number].scores.total[i] for number, i in rows],
        by_name={
            name: [rounds[number].scores.by_name[name][i] for number, i in rows] for name in rounds[0].scores.by_name
        },
        kept=[rounds[number].scores.kept[i] for number, i in rows],
        failures={name: sum(r.scores.failures[name] for r in rounds) for name in rounds[0].scores.failures},
        signal=[rounds[number].scores.signal[i] for number, i in rows],
    )
    return Round(
        take_groups([r.played for r in rounds], chosen),
        scores,
        np.stack([rounds[number].rewards[p] for number, p in chosen]),
        np.stack([rounds[number].kept[p] for number, p in chosen]),
    )
