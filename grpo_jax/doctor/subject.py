"""`Subject`: an experiment and its policy as the checks look at them.

Everything is made on a small form of the experiment: its own task, sampling, method and loss, with few prompts and
groups of at most `GROUP_SIZE` completions. Nothing of what training uses is changed: the parameters are copies.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from grpo_jax.algorithms import Algorithm, Setup, StepContext, TrainBatch, algorithm_of
from grpo_jax.algorithms.batches import schedule
from grpo_jax.algorithms.forward import new_head
from grpo_jax.algorithms.grpo import make_reference_kl
from grpo_jax.experiment import Experiment
from grpo_jax.policy import Policy, Tokenizer, perturb
from grpo_jax.policy.lora import split
from grpo_jax.policy.transformer import Params
from grpo_jax.rewards import RewardFunction
from grpo_jax.rollout import Actor, Prompts, Rollout, encode_prompts, join_groups, make_actor
from grpo_jax.sharding import Replicas

PROMPTS, GROUP_SIZE = 4, 4  # of a small batch, which all checks share, so that the sampler is compiled once
ROUNDS, LARGEST_GROUP = 4, 64  # of the groups whose rewards are looked at
SAMPLING_SECONDS = 20.0  # after which no further round of groups is sampled
MOVED, MOVED_FACTOR = 1e-2, 1e-2  # how far the policy is moved off its start


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Attributes:
      experiment: the user's experiment.
      policy: the policy that its training begins with.
      before_warm_start: whether that is so only once a warm start has trained it.
      found: what checks have compiled and found, for those after them.
    """

    experiment: Experiment
    policy: Policy
    before_warm_start: bool = False
    found: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def algorithm(self) -> Algorithm:
        """How the experiment's method trains."""
        return algorithm_of(self.experiment)

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's tokenizer."""
        return self.policy.require_tokenizer()

    @property
    def dtype(self) -> str:
        """The dtype that the policy computes in."""
        return str(self.policy.params["embed"].dtype)

    @cached_property
    def prompts(self) -> Prompts:
        """All prompts of the task as tokens. Raises `UserError` for one that does not fit."""
        max_positions, max_tokens = self.policy.config.max_positions, self.experiment.sampling.max_tokens
        return encode_prompts(self.experiment.task, self.tokenizer, max_positions, max_tokens)

    @cached_property
    def small(self) -> Experiment:
        """The experiment with a small batch, and a made-up reward in the place of its own.

        With the experiment's own rewards the gradient of such a batch may be 0, of which nothing can be learned.
        """
        config = self.experiment
        threshold = config.rft.threshold
        reward = replace(config.reward, weights={})
        return replace(
            config,
            rewards={"made_up": made_up(0.0 if threshold is None else threshold - 0.5)},
            reward=reward,
            prompts_per_step=PROMPTS,
            group_size=min(config.group_size, GROUP_SIZE),
            gradient_accumulation_steps=PROMPTS,
            num_minibatches=1,
            num_iterations=1 if config.updates_per_step == 1 else 2,  # some options need more than one update
            devices=1,
            warm_start=None,
            control=None,
        )

    @cached_property
    def moved(self) -> Policy:
        """The policy a little away from its start.

        There adapters act, the policy differs from its reference, and no gradient is 0 by symmetry.
        """
        policy = perturb(self.policy, MOVED_FACTOR, self.experiment.seed)
        rng = np.random.default_rng(0)
        adapters = {
            path: x + MOVED * rng.standard_normal(x.shape, np.float32)
            for path, x in sorted(policy.params.items())
            if path.endswith(".lora_b")
        }
        return replace(policy, params={**policy.params, **adapters})

    def trainable_of(self, policy: Policy) -> Params:
        """What is trained of a policy, with the method's head, if it has one, off its start of 0."""
        trainable = split(policy.params, policy.lora)[0]
        if self.algorithm.has_head:
            rng = np.random.default_rng(1)
            head = new_head(policy.config.hidden_size)
            trainable |= {path: x + MOVED * rng.standard_normal(x.shape, np.float32) for path, x in head.items()}
        return trainable

    @cached_property
    def start_actor(self) -> Actor:
        """The policy that training begins with, on one device."""
        return make_actor(self.policy, Replicas())

    @cached_property
    def moved_actor(self) -> Actor:
        """The moved policy, on one device."""
        trainable, _ = split(self.moved.params, self.moved.lora)
        return self.start_actor._replace(trainable=Replicas().replicate(trainable))

    @property
    def reference(self) -> Params | None:
        """What is trained of the reference policy; None where the method needs none."""
        return self.trainable_of(self.policy) if self.algorithm.needs_reference(self.small) else None

    def setup(self, experiment: Experiment, replicas: Replicas) -> Setup:
        """What an objective and an update are built from."""
        return Setup(self.start_actor.model, experiment, self.prompts.shared_prefix_length, replicas.axis_name)

    def context(self, experiment: Experiment) -> StepContext:
        """What batches of a small experiment are made from: the moved policy, and the policy as it starts."""
        return StepContext(experiment, self.prompts, self.moved_actor, self.start_actor, self._reference_kl)

    def _reference_kl(self, batch: Any) -> np.ndarray:
        """See `StepContext.reference_kl`."""
        replicas, reference = Replicas(), self.reference
        assert reference is not None, "`needs_reference` says that it is kept"
        program = replicas.compile(make_reference_kl(self.setup(self.small, replicas)))
        trainable, frozen = replicas.replicate(self.trainable_of(self.moved)), self.start_actor.frozen
        found = program(trainable, replicas.replicate(reference), frozen, replicas.split(batch))
        return np.asarray(replicas.gather(found))

    @cached_property
    def train_batch(self) -> TrainBatch:
        """A small batch as the method makes it, of the moved policy and the made-up reward."""
        return self.make_batch(self.small)

    def make_batch(self, experiment: Experiment) -> TrainBatch:
        """The batch of step 0 of a small experiment."""
        return self.algorithm.make_batch(self.context(experiment), 0)

    def sample(self, step: int, samples: Sequence[int], *, moved: bool = False) -> Rollout:
        """Small groups of a step's prompts, from the policy as it starts or from the moved one."""
        indices, ids = schedule(self.small.seed, step, PROMPTS, len(self.small.task.train))
        return self.context(self.small).sample(step, indices, ids, samples=samples, from_start=not moved)

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Groups of the first steps' prompts, of the experiment's own size (up to `LARGEST_GROUP`), from the start.

        There are `ROUNDS` of them, or fewer where they take long.
        """
        small, found = self.small.group_size, []
        size = min(self.experiment.group_size, LARGEST_GROUP) // small * small
        for step in range(ROUNDS):
            began = time.monotonic()
            parts = [self.sample(step, range(start, start + small)) for start in range(0, size, small)]
            found.append(parts[0] if len(parts) == 1 else join_groups(parts))
            if step and time.monotonic() - began > SAMPLING_SECONDS / ROUNDS:  # the first round is compiled, too
                break
        return found

    @cached_property
    def arguments(self) -> Mapping[str, list[Any]]:
        """The keyword arguments of reward functions for all groups of `rollouts`."""
        return arguments_of(self.rollouts)


def arguments_of(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """The keyword arguments of reward functions for the groups of several rollouts, one after another."""
    each = [rollout.reward_arguments() for rollout in rollouts]
    return {name: [value for arguments in each for value in arguments[name]] for name in each[0]}


def made_up(offset: float) -> RewardFunction:
    """A reward that differs between neighbours, so that every group has a signal and every pair a label."""

    def reward(*, completions: Sequence[Any], **columns: Any) -> list[float]:
        return [offset + i % 2 + 0.25 * (i % 3) for i in range(len(completions))]

    return reward
