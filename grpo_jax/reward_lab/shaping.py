"""Groups whose spread is shaping alone: nobody is right in them, and still their rewards differ.

A length penalty or a format reward is meant to shape answers that are right. In a group that is all wrong it is all
that differs. GRPO compares the members of a group alone, and by default it divides by the group's standard
deviation, so there the penalty moves the policy as much as the outcome does elsewhere.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from grpo_jax.experiment import RewardConfig

ROUNDING = 1e-6  # of the largest reward: what differs by less is equal


@dataclass(frozen=True)
class Shaping:
    """The groups of one set whose spread is shaping alone.

    Attributes:
      num_groups: how many groups the set has.
      no_success: in how many the total differs though no completion succeeds.
      no_outcome: in how many it differs though no completion earns more of `outcome` than the least that occurs.
      flagged: in how many one of the two is so.
      outcome: the name of the outcome's reward: the one of the largest weight, and of several such the first.
      causes: for each reward in how many flagged groups it causes the most of the spread, the most frequent first.
    """

    num_groups: int
    no_success: int
    no_outcome: int
    flagged: int
    outcome: str
    causes: dict[str, int]

    @property
    def share(self) -> float:
        """The flagged groups among all."""
        return self.flagged / self.num_groups if self.num_groups else 0.0


def find_shaping(
    rewards: Mapping[str, np.ndarray], total: np.ndarray, success: np.ndarray, config: RewardConfig
) -> Shaping:
    """Finds the groups whose spread is shaping alone.

    Args:
      rewards: the experiment's rewards by name, each [P, G]; nan where one does not apply.
      total: their combination [P, G], as it is trained on; nan for a completion that is dropped.
      success: [P, G] bool, what the task counts as success.
    """
    weights = {name: config.weights.get(name, 1.0) for name in rewards}
    outcome = max(weights, key=lambda name: weights[name])
    least = np.nanmin(rewards[outcome]) if not np.isnan(rewards[outcome]).all() else np.nan
    differs = _spread(total) > ROUNDING * np.nanmax(np.abs(total), initial=0.0)
    earns = (rewards[outcome] > least + ROUNDING * abs(least)).any(1)
    no_success, no_outcome = differs & ~success.any(1), differs & ~earns
    flagged = no_success | no_outcome
    spreads = np.stack([abs(weights[name]) * _standardized(values, config) for name, values in rewards.items()])
    names = list(rewards)
    causes = Counter(names[place] for place in spreads[:, flagged].argmax(0))
    return Shaping(
        len(total),
        int(no_success.sum()),
        int(no_outcome.sum()),
        int(flagged.sum()),
        outcome,
        dict(causes.most_common()),
    )


def sentence(found: Shaping, label: str) -> str | None:
    """What was found in a set of groups, and what to do about it; None if nothing was.

    Args:
      label: where the groups come from, such as "temperature 1".
    """
    if not found.flagged:
        return None
    counted = ", ".join(f"{name} in {number}" for name, number in found.causes.items())
    why = f"no completion succeeds in {found.no_success}"
    if found.no_outcome:
        why += f", none earns more of {found.outcome} than the least in {found.no_outcome}"
    seen = (
        f"{label}: the spread of {found.flagged} of {found.num_groups} groups ({found.share:.0%}) is shaping alone "
        f"({why}). It comes from {counted}: there the policy learns that alone."
    )
    others = [name for name in found.causes if name != found.outcome]
    if not others:
        return (
            f"{seen} Look whether more of {found.outcome} leads to success: what its credit for wrong answers can be "
            "earned with, the attacks show."
        )
    return (
        f"{seen} Pay {' and '.join(others)} only where the answer is right, such as by a factor of {found.outcome}. "
        "A smaller weight does not help while advantages are divided by the group's standard deviation "
        '(advantages.scale="none" or "batch" keeps it small).'
    )


def _spread(values: np.ndarray) -> np.ndarray:
    """The largest less the smallest value of each row [P], without nan; 0 for a row of nan."""
    known = ~np.isnan(values)
    high, low = np.where(known, values, -np.inf).max(1), np.where(known, values, np.inf).min(1)
    return np.where(known.any(1), high - low, 0.0)


def _standardized(values: np.ndarray, config: RewardConfig) -> np.ndarray:
    """How much a reward spreads within each group [P]: in `normalize_then_sum` equally much wherever it differs."""
    spread = _spread(values)
    return (spread > 0).astype(float) if config.combine == "normalize_then_sum" else spread
