"""Signs that a run has learned nothing, or not what was meant, from the files of the run.

Each sign is one sentence: what was seen, with its number, and where to look. What `grpo_jax.guards` said while the run
went on comes first. The end of `grpo-jax train` and the report show them. They are thresholds, not tests: a sign says
where to look, and no sign does not mean that all is well.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.guards import ALWAYS_RIGHT, NO_SIGNAL
from grpo_jax.runs.files import read_json, read_rows

EQUAL = 0.95  # the share of groups with equal rewards from which a run is said to have had no signal
CUT_OFF = 0.9  # the share of completions that the token limit cut off
EMPTY = 1.5  # tokens of a mean completion: the end alone is one
RANDOM = 1.5  # how many times its start the entropy may be at the end, and how many nats it must then be
RISE = 0.1  # of the range of the rewards that the run saw
Metrics = Sequence[Mapping[str, Any]]


def diagnose(run_dir: Path, *, has_chat_template: bool | None = None) -> list[str]:
    """The signs of a run, in the order in which they matter; an empty list for a run without any.

    Args:
      has_chat_template: whether the policy's tokenizer has a chat template; None if that is not known.
    """
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    steps = [row for row in rows if "step_time" in row]
    if not steps:
        return []
    of_signal = list(_of_signal(steps))
    warnings = read_json(run_dir / "run.json").get("warnings", ())
    # What was said while the run went on. Of its signal, the whole run says more.
    said = [each["message"] for each in warnings if not (of_signal and each["kind"] == "watch_signal")]
    found = [*said, *of_signal, *_of_completions(steps), *_of_entropy(steps), *_of_success(steps, rows)]
    if has_chat_template:
        first = next(read_rows(run_dir / "completions.jsonl"), None)
        if first is not None and isinstance(first["prompt"], str):
            found.append(
                "The policy's tokenizer has a chat template, but the prompts are plain text: a chat model answers "
                "better to [{'role': 'user', 'content': …}]."
            )
    return found


def _of_signal(steps: Metrics) -> Iterator[str]:
    """Rewards that are always the same, in the run or within its groups."""
    equal = _series(steps, "frac_reward_zero_std")
    rewards = _series(steps, "reward")
    if not len(equal):
        return
    if (equal == 1).all():
        same = f"every completion earned {rewards[0]:.3g}" if np.ptp(rewards) == 0 else "never within a group"
        yield f"No group had rewards that differ ({same}), so nothing was learned: {NO_SIGNAL}"
    elif (late := _late(equal)) >= EQUAL and _late(_series(steps, "success")) < ALWAYS_RIGHT:
        yield (
            f"In {late:.0%} of the last groups all rewards were equal, and the policy is not always right: it has "
            "collapsed, or the reward cannot tell its completions apart."
        )


def _of_completions(steps: Metrics) -> Iterator[str]:
    """Completions that are all cut off, or all empty."""
    if (cut := _late(_series(steps, "completions/clipped_ratio"))) >= CUT_OFF:
        yield f"{cut:.0%} of the last completions were cut off by sampling.max_tokens: they never came to their end."
    length = _series(steps, "completions/mean_length")
    if _late(length) < EMPTY <= length[:1].sum():
        yield f"The last completions have {_late(length):.1f} tokens on average: the policy has learned to say nothing."


def _of_entropy(steps: Metrics) -> Iterator[str]:
    """A policy that becomes random."""
    entropy = _series(steps, "entropy")
    if len(entropy) > 1 and _late(entropy) > RANDOM * max(_early(entropy), 1.0):
        yield (
            f"The entropy rose from {_early(entropy):.2f} to {_late(entropy):.2f} nats: the policy becomes random. A "
            "smaller learning rate or loss.entropy_coef, or a positive loss.beta, holds it."
        )


def _of_success(steps: Metrics, rows: Metrics) -> Iterator[str]:
    """A reward that grew without held-out success."""
    rewards, success = _series(steps, "reward"), "evaluation/success"
    held_out = [row for row in rows if row.get(success) is not None]
    if len(held_out) < 2 or not len(rewards):
        return
    before, after = held_out[0], held_out[-1]
    rise = _late(rewards) - _early(rewards)
    if rise > RISE * max(np.ptp(rewards), 1e-9) and rise > 0.02 and after[success] <= before[success]:
        yield (
            f"The training reward rose from {_early(rewards):.3g} to {_late(rewards):.3g}, but held-out success did "
            f"not ({before[success]:.1%} before, {after[success]:.1%} after): the policy learned what the reward pays "
            "for, which is not what counts as success, or it learned the training prompts by heart."
        )


def _series(steps: Metrics, name: str) -> np.ndarray:
    """The values of a metric, without those that are missing."""
    return np.array([row[name] for row in steps if row.get(name) is not None], np.float64)


def _late(values: np.ndarray) -> float:
    """The mean of the last quarter; NaN, which no comparison is true for, if there are no values."""
    return float(values[-max(len(values) // 4, 1) :].mean()) if len(values) else np.nan


def _early(values: np.ndarray) -> float:
    return _late(values[::-1])
