"""Checks of the reward functions, on completions of the policy that training begins with."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.advantages import compute_advantages
from grpo_jax.algorithms import GRPO, PPO, RFT, algorithm_of
from grpo_jax.algorithms.batches import reward_arrays, schedule
from grpo_jax.algorithms.rft import select
from grpo_jax.confidence import bounded_limits
from grpo_jax.doctor.check import Check, count, not_applicable, verified
from grpo_jax.doctor.subject import ROUNDS, Subject, arguments_of
from grpo_jax.experiment import Experiment
from grpo_jax.rewards.scoring import LARGEST, Scores, score
from grpo_jax.rollout import demonstrations, name_noise
from grpo_jax.sharding import Array
from grpo_jax.tasks.calls import success_of
from grpo_jax.tasks.checks import content

SUCCESS = "success"  # of the task, which evaluation counts


def rewards_are_deterministic(subject: Subject) -> Check:
    """The same completions have the same rewards and success when they are scored again, and in the reversed order."""
    arguments = subject.arguments
    backwards = _values(subject, {name: values[::-1] for name, values in arguments.items()})
    changed = {}
    for name, values in _values(subject, arguments).items():
        pairs = zip(values, _again(subject).values[name], backwards[name][::-1], strict=True)
        changed[name] = sum(not (_same(value, again) and _same(value, back)) for value, again, back in pairs)
    total, worst = len(arguments["completions"]), max(changed, key=lambda name: changed[name])
    figures = {"completions": total, "changed": changed}
    sentence = (
        f"{worst!r} gives {count(changed[worst], 'completion')} another value when they are scored again or in "
        "another order: it must depend on the completion alone, so look for random numbers, sets, or state."
    )
    return verified(not changed[worst], f"{changed[worst]} of {total} change", "0", sentence, figures)


def rewards_are_finite(subject: Subject) -> Check:
    """Every reward returns a finite number or None for every completion."""
    experiment = subject.experiment
    if not experiment.rewards:
        return not_applicable("the experiment has no reward functions.")
    scores = _scores(subject)
    total, known = len(scores.total), [value for value in scores.total if not math.isnan(value)]
    failed = {name: n for name, n in scores.failures.items() if n}
    ranges = {name: _range(values) for name, values in scores.by_name.items()}
    figures = {"completions": total, "failures": failed, "ranges": ranges, "scored": len(known)}
    measured = f"{min(known):g} to {max(known):g}" if known else "none"
    bound = f"±{LARGEST:.0e}"
    if failed:
        name = max(failed, key=lambda name: failed[name])
        sentence = f"{name!r} fails on {failed[name]} of {count(total, 'completion')}, which are dropped."
        above = failed[name] > experiment.reward.max_failure_rate * total
        return Check("refuted" if above else "warning", measured, bound, sentence, figures)
    return verified(bool(known), measured, bound, "no reward applies to any of the completions.", figures)


def rewards_leave_arguments_alone(subject: Subject) -> Check:
    """No reward, nor the task's success, changes the lists and the examples that it is given."""
    changed, functions = _again(subject).changed, len(_again(subject).values)
    figures = {"functions": functions, "changed": changed}
    sentence = (
        f"{', '.join(map(repr, changed))} changes its arguments, so that the next function is given other completions: "
        "copy a list before it is sorted or extended."
    )
    return verified(not changed, f"{len(changed)} of {functions} do", "0", sentence, figures)


def rewards_differ_within_groups(subject: Subject) -> Check:
    """There are groups from whose rewards the method learns something, at the experiment's temperature.

    The interval is Clopper and Pearson's, of the share among prompts like these.
    """
    experiment = subject.experiment
    if not experiment.is_rewarded:
        return not_applicable(f"method {experiment.method_name!r} trains without rewards here.")
    signals = _signals(subject)
    share = float(np.mean(signals))
    low, high = (float(limit) for limit in bounded_limits(signals.astype(float)))
    figures = {"groups": len(signals), "with_signal": int(signals.sum()), "share": share, "low": low, "high": high}
    measured = f"{int(signals.sum())} of {len(signals)} [{low:.0%}, {high:.0%}]"
    if subject.before_warm_start:
        sentence = (
            "this is the policy before its warm start, which was not trained: name a run that has finished the same "
            "warm start with --warm-start (train … --set steps=0 makes one)."
        )
        return Check("warning", measured, "at least 1", sentence, figures)
    if not signals.any():
        sentence = (
            "no group has rewards from which the method learns anything, so that there is no gradient: make the reward "
            "finer or the task easier, raise the temperature, or begin with a warm start."
        )
        return Check("refuted", measured, "at least 1", sentence, figures)
    return Check("proved", measured, "at least 1", figures=figures)


class Again(NamedTuple):
    """What each function returned when it was called again, by itself, and which of them changed their arguments."""

    values: dict[str, list[float]]
    changed: list[str]


def _again(subject: Subject) -> Again:
    if "again" not in subject.found:
        values: dict[str, list[float]] = {}
        changed = []
        for name in (*subject.experiment.rewards, SUCCESS):
            arguments = copy.deepcopy(dict(subject.arguments))
            before = content(arguments)
            values[name] = _values_of(subject, arguments, [name])[name]
            if content(arguments) != before:
                changed.append(name)
        subject.found["again"] = Again(values, changed)
    found: Again = subject.found["again"]
    return found


def _scores(subject: Subject) -> Scores:
    """The rewards of all completions, as training scores them."""
    if "scores" not in subject.found:
        arguments = copy.deepcopy(dict(subject.arguments))  # a reward that changes them must not spoil other checks
        experiment = subject.experiment
        subject.found["scores"] = score(experiment.rewards, arguments, experiment.reward, group_size=_size(subject))
    found: Scores = subject.found["scores"]
    return found


def _signals(subject: Subject) -> np.ndarray:
    """[P] whether the method learns something from each group."""
    experiment = subject.experiment
    scores, size = _scores(subject), _size(subject)
    if "preferences" in subject.algorithm.reads and experiment.preferences.completions == "demonstrations":
        size = experiment.group_size
        scores = score(experiment.rewards, _demonstrated(subject), experiment.reward, group_size=size)
    return signals_of(experiment, *reward_arrays(scores, (len(scores.total) // size, size)))


def signals_of(experiment: Experiment, rewards: np.ndarray, sample_mask: np.ndarray) -> np.ndarray:
    """[P] whether a method learns something from the rewards [P, G] of each group."""
    algorithm = algorithm_of(experiment)
    if isinstance(algorithm, GRPO):
        how = experiment.advantages
        found: Array = compute_advantages(
            how if callable(how) else replace(how, kl_coef=0.0, kl_level="sequence"),
            rewards,
            sample_mask,
            token_mask=sample_mask[..., None],
        )
        return np.array(np.asarray(found).reshape(len(rewards), -1).any(axis=1))
    if isinstance(algorithm, RFT):
        return np.array(select(rewards, sample_mask, experiment.rft).any(axis=1))
    known = rewards[sample_mask]
    if isinstance(algorithm, PPO):  # a critic compares with all that it has seen, not with the group
        return np.full(len(rewards), bool(known.size) and bool(np.ptp(known) > 0))
    lowest = np.min(rewards, axis=1, where=sample_mask, initial=np.inf)
    highest = np.max(rewards, axis=1, where=sample_mask, initial=-np.inf)
    return np.asarray(highest > lowest)


def _demonstrated(subject: Subject) -> Mapping[str, Sequence[Any]]:
    """The arguments of rewards for demonstrations, in groups of the experiment's own size."""
    shown, small, task = [], subject.small, subject.experiment.task
    for step in range(ROUNDS):
        indices, ids = schedule(small.seed, step, small.prompts_per_step, len(task.train))
        noise = name_noise(small.seed, step, ids, range(subject.experiment.group_size))
        prompts = subject.prompts.batch("train", indices)
        shown.append(demonstrations(task, prompts, noise, subject.tokenizer, subject.experiment.reward.time_limit))
    return arguments_of(shown)


def _values(subject: Subject, arguments: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    """The values of each reward and of the task's success, by name."""
    return _values_of(subject, copy.deepcopy(dict(arguments)), [*subject.experiment.rewards, SUCCESS])


def _values_of(
    subject: Subject, arguments: Mapping[str, Sequence[Any]], names: Sequence[str]
) -> dict[str, list[float]]:
    experiment = subject.experiment
    rewards = {name: reward for name, reward in experiment.rewards.items() if name in names}
    found = score(rewards, arguments, replace(experiment.reward, weights={}), group_size=_size(subject)).by_name
    if SUCCESS in names:
        success = success_of(experiment.task, arguments, experiment.reward.time_limit)
        found = {**found, SUCCESS: [float(value) for value in success]}
    return found


def _size(subject: Subject) -> int:
    return int(subject.rollouts[0].mask.shape[1])


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _range(values: Sequence[float]) -> list[float]:
    known = [value for value in values if not math.isnan(value)]
    return [min(known), max(known)] if known else []
