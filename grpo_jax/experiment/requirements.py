"""What each training method asks of an experiment: the fields that it reads, and what must be there for it.

This is the half of a method that is checked when a config is made, and so without JAX. The other half, how the method
trains, is `grpo_jax.algorithms`. A method of the user's own is a subclass of `grpo_jax.algorithms.Algorithm`, which has
both halves, and is passed as `Experiment(method=MyMethod())`.
"""

import math
from collections.abc import Mapping
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.experiment.checked import Range


class Method:
    """A training method, as a config knows it.

    Attributes:
      name: what it is called in messages.
      reads: the fields of an experiment that it reads and that not all methods read.
      is_offline: whether it trains on the task's own data alone, so that neither rewards nor how completions are
        sampled change its result.
      unwatched: the fields of `GuardConfig` whose metric its steps do not have.
    """

    name: str = ""
    reads: tuple[str, ...] = ()
    is_offline: bool = False
    unwatched: tuple[str, ...] = ()

    def needs_rewards(self, experiment: Any) -> bool:
        """Whether training itself calls reward functions. (Evaluation shows them where there are any.)"""
        return False

    def needs_differences(self, experiment: Any) -> bool:
        """Whether a group whose rewards are all equal teaches nothing."""
        return False

    def group_size_range(self, experiment: Any) -> Range:
        """Whether `experiment.group_size` is in range, and what it must be."""
        return experiment.group_size > 0, "positive"

    def smallest_part(self, experiment: Any) -> int:
        """How many neighbouring completions of a group its loss needs side by side.

        A group may be split into parts of a multiple of this over devices, mini-batches and micro-batches. By default
        groups stay whole.
        """
        return int(experiment.group_size)

    def check(self, experiment: Any) -> None:
        """Raises `UserError` if the experiment lacks what the method needs, or sets what it does not read."""


class GRPO(Method):
    name = "grpo"
    reads = ("loss", "advantages", "dynamic_sampling_rounds")

    def needs_rewards(self, experiment: Any) -> bool:
        return True

    def needs_differences(self, experiment: Any) -> bool:
        how = experiment.advantages
        return experiment.group_size > 1 and not callable(how) and how.baseline != "none"

    def group_size_range(self, experiment: Any) -> Range:
        how = experiment.advantages
        if callable(how) or (how.baseline == "none" and how.scale != "group"):  # what a single completion can have
            return super().group_size_range(experiment)
        wanted = (
            "at least 2 for method 'grpo', since a group of one has no relative advantage (1 needs advantages.baseline "
            "'none' with scale 'whiten', 'batch' or 'none')"
        )
        return experiment.group_size > 1, wanted

    def smallest_part(self, experiment: Any) -> int:
        return _part_of_loss(experiment)

    def check(self, experiment: Any) -> None:
        if experiment.dynamic_sampling_rounds and experiment.group_size == 1:
            raise UserError(
                "dynamic_sampling_rounds looks for groups whose rewards differ, and those of a group of one never do: "
                "it must be 0 with group_size = 1."
            )
        scale = getattr(experiment.advantages, "scale", None)
        if experiment.reward.combine == "normalize_then_sum" and scale == "group":
            raise UserError(
                "reward.combine = 'normalize_then_sum' has each reward scaled by its group, so that advantages.scale = "
                "'group' would undo it: it must be 'whiten' (GDPO), 'batch' or 'none'."
            )


class PPO(Method):
    name = "ppo"
    reads = ("loss", "ppo")

    def needs_rewards(self, experiment: Any) -> bool:
        return True

    def check(self, experiment: Any) -> None:
        loss = experiment.loss_config
        if loss.beta or loss.importance_sampling_mode:
            name = "beta" if loss.beta else "importance_sampling_mode"
            remedy = "its KL is ppo.kl_coef's" if loss.beta else "it knows no correction for another sampler"
            raise UserError(f"loss.{name} is set, but method 'ppo' does not read it: {remedy}.")

    def smallest_part(self, experiment: Any) -> int:
        return _part_of_loss(experiment)


class SFT(Method):
    name = "sft"
    reads = ("sft",)
    is_offline = True
    unwatched = ("min_entropy", "max_most_common_ratio")

    def smallest_part(self, experiment: Any) -> int:
        return 1

    def check(self, experiment: Any) -> None:
        _require_demonstrations(experiment, "method 'sft'")


class RFT(Method):
    name = "rft"
    reads = ("rft",)
    unwatched = ("min_entropy",)

    def needs_rewards(self, experiment: Any) -> bool:
        return True

    def needs_differences(self, experiment: Any) -> bool:
        return bool(experiment.rft.select == "best")

    def group_size_range(self, experiment: Any) -> Range:
        if experiment.rft.select == "best":
            return experiment.group_size > 1, "at least 2 for method 'rft', which takes the best of a group"
        return super().group_size_range(experiment)

    def smallest_part(self, experiment: Any) -> int:
        return 1


class _Preferences(Method):
    """What DPO and the reward model have in common: they compare completions two and two."""

    splits: tuple[str, ...] = ("train",)  # those of which pairs are made
    unwatched = ("min_entropy", "max_most_common_ratio")

    def needs_rewards(self, experiment: Any) -> bool:
        return experiment.preferences.completions != "columns"

    def needs_differences(self, experiment: Any) -> bool:
        return self.needs_rewards(experiment)

    def group_size_range(self, experiment: Any) -> Range:
        size = experiment.group_size
        if experiment.preferences.completions == "columns":
            return size == 2, "2 with preferences.completions 'columns': a chosen and a rejected completion"
        return size > 0 and size % 2 == 0, f"even for method {self.name!r}, which compares two and two"

    def smallest_part(self, experiment: Any) -> int:
        return 2

    def check(self, experiment: Any) -> None:
        if experiment.preferences.completions == "demonstrations":
            _require_demonstrations(experiment, "preferences.completions = 'demonstrations'")
        if experiment.preferences.completions != "columns":
            return
        for split in self.splits:
            if any(not {"chosen", "rejected"} <= set(e) for e in getattr(experiment.task, split)):
                raise UserError(
                    f"preferences.completions = 'columns' needs the columns 'chosen' and 'rejected', which not every "
                    f"{split} example of task {_task_name(experiment)!r} has."
                )


class DPO(_Preferences):
    name = "dpo"
    reads = ("dpo", "preferences")


class RewardModel(_Preferences):
    name = "reward_model"
    reads = ("reward_model", "preferences")
    splits = ("train", "held_out")  # it is evaluated on pairs, too


def _part_of_loss(experiment: Any) -> int:
    """The losses of `LossConfig` are of single completions; the user's own function may compare those of a group."""
    return int(experiment.group_size) if callable(experiment.loss) else 1


def group_parts(num_prompts: int, group_size: int, shares: int, *, smallest: int = 1) -> int | None:
    """Into how many parts to split every group, so that all parts can be dealt out in equal shares: as few as possible.

    Args:
      num_prompts, group_size: P groups of G completions.
      shares: into how many equal shares (devices, mini-batches, micro-batches) P * parts must go.
      smallest: completions that must stay side by side (`Method.smallest_part`).

    Returns:
      The number of parts, 1 for whole groups; None if nothing fits.
    """
    parts = math.lcm(num_prompts, shares) // num_prompts
    return parts if group_size % (parts * smallest) == 0 else None


def _task_name(experiment: Any) -> Any:
    return getattr(experiment.task, "name", experiment.task)


def _require_demonstrations(experiment: Any, what: str) -> None:
    if getattr(experiment.task, "demonstrate", None) is None:
        raise UserError(
            f"{what} needs demonstrations, but task {_task_name(experiment)!r} has no `demonstrate` function."
        )


METHODS: Mapping[str, Method] = {m.name: m for m in (GRPO(), PPO(), SFT(), RFT(), DPO(), RewardModel())}
"""The methods that a config may name."""


def method_of(method: str | Method) -> Method:
    """The method that a config names, or the user's own."""
    return METHODS[method] if isinstance(method, str) else method
