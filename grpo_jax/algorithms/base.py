"""The protocol of a training method: what its steps train on, and its loss.

A step goes through an `Algorithm` in this order (`grpo_jax.training` is the loop, `grpo_jax.update` the update):

    make_batch       StepContext, step -> TrainBatch          on the host: prompts, completions, rewards as arrays
    before_updates   Batch -> Batch, metrics                  on the devices, once a step: what its updates share
                     (the loop cuts the batch into mini-batches here: `grpo_jax.algorithms.minibatches`)
    prepare          Batch -> Batch, totals                   each update, one device's share: what belongs to all of it
    loss             Batch, totals -> loss, metrics           each micro-batch; summed over micro-batches and devices

A method of your own is a subclass of `Algorithm` in the experiment's file, `Experiment(method=MyMethod())`. A subclass
of one of the six (`grpo_jax.algorithms.GRPO`, …) can change a single part of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import numpy as np

from grpo_jax.algorithms.batch import Batch
from grpo_jax.algorithms.forward import Forward, make_forward
from grpo_jax.errors import RunError
from grpo_jax.evaluation import Evaluation, evaluate_generator
from grpo_jax.experiment import Experiment, Method
from grpo_jax.policy.lora import Model
from grpo_jax.policy.transformer import Params
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Generator, Prompts, Rollout, Split, name_noise, rollout, score_rollout
from grpo_jax.sharding import Array

Metrics = dict[str, Array]
Totals = dict[str, Array]
Tree = TypeVar("Tree")  # an array or a tree of them


@dataclass(frozen=True)
class StepContext:
    """What a step's batch is made from.

    Attributes:
      experiment: the experiment.
      prompts: its prompts as tokens.
      generator: the policy as it is now.
      start: the policy as it was when training began; None if the method does not keep it.
      reference_kl: of a batch on the host, log p - log p_reference [P, G, T] of its tokens, p being the policy as it is
        now; None if the method keeps no reference.
    """

    experiment: Experiment
    prompts: Prompts
    generator: Generator
    start: Generator | None = None
    reference_kl: Callable[[Batch], np.ndarray] | None = None

    def sample(
        self,
        step: int,
        indices: Sequence[int],
        prompt_ids: Sequence[int],
        *,
        split: Split = "train",
        samples: Sequence[int] | None = None,
        from_start: bool = False,
    ) -> Rollout:
        """Samples a group of episodes for each of these prompts.

        Args:
          step, prompt_ids, samples: name the noise; by default the samples are 0 to group_size - 1.
          indices: which examples of the split, P of them.
          from_start: sample from the policy as it was when training began.
        """
        config = self.experiment
        generator = self.start if from_start else self.generator
        assert generator is not None, "the method's `needs_reference` must say that it samples from the start"
        noise = name_noise(config.seed, step, prompt_ids, range(config.group_size) if samples is None else samples)
        prompts = self.prompts.batch(split, indices)
        return rollout(generator, config.task, prompts, noise, config.sampling, config.reward.time_limit)

    def score(self, episodes: Rollout, step: int) -> Scores:
        """The rewards of a rollout. Raises `RunError` past `reward.max_failure_rate`."""
        scores = score_rollout(episodes, self.experiment)
        total, limit = len(scores.total), self.experiment.reward.max_failure_rate
        for name, failed in scores.failures.items():
            if failed > limit * total:
                raise RunError(
                    f"reward {name!r} failed on {failed} of the {total} completions of step {step}, above "
                    f"reward.max_failure_rate = {limit:g}."
                )
        return scores


@dataclass(frozen=True)
class TrainBatch:
    """What a step trains on.

    Attributes:
      batch: the arrays, on the host.
      rollout: the episodes that the batch is made of; None where rows hold several.
      tokens: how many tokens were read or written to make it, prompts once for each completion.
      new_tokens: how many of them the policy sampled, or was shown as its own.
      metrics: the step's metrics so far.
      rows: a row per completion for `completions.jsonl`, without advantages; none for demonstrations.
      histograms: arrays to histogram.
    """

    batch: Batch
    rollout: Rollout | None
    tokens: int
    new_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)

    def with_advantages(self, advantages: Array) -> "TrainBatch":
        """The same with advantages, also in its rows and histograms.

        Args:
          advantages: [P, G] or, by token, [P, G, T], of which a row has the mean over its active tokens.
        """
        batch = self.batch._replace(advantages=advantages)
        if advantages.ndim == 3:
            mask = batch.mask & batch.sample_mask[..., None]
            advantages = np.where(mask, advantages, 0).sum(-1) / np.maximum(mask.sum(-1), 1)
        rows = [{**row, "advantage": float(a)} for row, a in zip(self.rows, advantages.reshape(-1), strict=True)]
        counted = np.asarray(advantages[batch.sample_mask])
        return replace(self, batch=batch, rows=rows, histograms={**self.histograms, "advantages": counted})


class Setup(NamedTuple):
    """What an objective is built from.

    Attributes:
      model: how parameters become the policy.
      experiment: the experiment.
      shared_prefix_length: how many leading tokens all prompts share.
      axis_name: the mapped axis over which a batch extends; None for none.
    """

    model: Model
    experiment: Experiment
    shared_prefix_length: int
    axis_name: str | None

    def forward(self, *, temperature: float = 1.0) -> Forward:
        """The policy's forward pass on a batch, at a temperature."""
        remat = self.experiment.gradient_checkpointing
        return make_forward(self.model, self.shared_prefix_length, temperature=temperature, remat=remat)

    def total(self, x: Tree) -> Tree:
        """The sum over the mapped axis, of an array or of a tree of them."""
        return self.across(jax.lax.psum, x)

    def across(self, collective: Callable[[Tree, str], Tree], x: Tree) -> Tree:
        """A reduction over all devices, such as `jax.lax.pmax`."""
        return x if self.axis_name is None else collective(x, self.axis_name)


Prepare = Callable[[Params, Params, Batch], tuple[Batch, Totals]]
Loss = Callable[[Params, Params, Params | None, Batch, Totals], tuple[Array, tuple[Metrics, Array]]]
BeforeUpdates = Callable[[Params, Params, Params | None, Batch], tuple[Batch, Metrics]]


class Objective(NamedTuple):
    """An algorithm's loss, as functions of one device's share of a batch.

    Attributes:
      prepare: (trainable, frozen, batch) -> (batch, totals), of an update's whole share, before it is cut into
        micro-batches: `totals` are the counts of the whole update, not of this share.
      loss: (trainable, frozen, reference, batch, totals) -> (loss, (metrics, logprobs [P, G, T])) of a micro-batch. The
        loss and the metrics are summed over devices and micro-batches.
      before_updates: (trainable, frozen, reference, batch) -> (batch, metrics), once for a batch that is updated on
        several times; None for nothing.
    """

    prepare: Prepare
    loss: Loss
    before_updates: BeforeUpdates | None = None


class Algorithm(Method, ABC):
    """A training method.

    Attributes:
      on_policy: whether the policy samples its batches itself, so that the log-probability contract holds for them.
      has_head: whether it trains a scalar head on the policy's last hidden state (`forward.new_head`).
    """

    on_policy: ClassVar[bool] = False
    has_head: ClassVar[bool] = False

    def needs_reference(self, experiment: Experiment) -> bool:
        """Whether the policy that training begins with is needed later on: as a reference, or to sample from it."""
        return False

    @abstractmethod
    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        """What a step trains on. It follows from (seed, step) and the policy alone, so a resumed run has the same."""

    @abstractmethod
    def make_objective(self, setup: Setup) -> Objective:
        """The loss."""

    def evaluate(self, context: StepContext, split: Split) -> Evaluation:
        """Scores the policy as it is now on a split of the task."""
        return evaluate_generator(context.generator, context.prompts, context.experiment, split)

    def sample_group(self, context: StepContext) -> list[dict[str, Any]]:
        """One group of a held-out prompt with its rewards and advantages, to be shown; none where nothing has any."""
        return []
