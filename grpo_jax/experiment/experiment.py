"""`Experiment`: one run, declared."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.errors import UserError, shown
from grpo_jax.experiment.checked import Checked, Range, Ranges
from grpo_jax.experiment.configs import (
    ADDED_LATER,
    NOT_IN_NAMES,
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
)
from grpo_jax.experiment.methods import (
    AdvantageConfig,
    DPOConfig,
    LossConfig,
    PPOConfig,
    PreferenceConfig,
    RewardModelConfig,
    RFTConfig,
    SFTConfig,
)
from grpo_jax.experiment.overrides import nearest, unread_fields, variant_of
from grpo_jax.experiment.requirements import METHODS, Method, group_parts, method_of


@dataclass(frozen=True)
class Experiment(Checked):
    """One run: a task, its rewards, a policy, and how the one is trained on the other.

    A step's groups whose rewards are all equal say nothing. `dynamic_sampling_rounds` is how many further rounds of
    prompts a step may play to replace them by groups that do (DAPO, 2503.14476); 0 for none.

    Training ends after `steps` steps; or, with `steps=None`, after `epochs` passes over the training examples, which
    need not be whole (`num_steps` says how many steps that are); or before that with the step in which its
    `token_budget` of sampled tokens is used up (those that dynamic sampling throws away count too).

    A step samples one batch and makes `num_iterations * num_minibatches` updates on it: it is cut into
    `num_minibatches` mini-batches of shuffled whole groups, and passed over `num_iterations` times in the same order.
    (TRL: `num_iterations`, and `steps_per_generation` over `gradient_accumulation_steps`; TRL shuffles single
    completions.) Advantages are those of the whole batch. From the second update on the policy is not the one that
    sampled. Each mini-batch goes through the devices in `gradient_accumulation_steps` micro-batches, which change
    nothing but memory. Groups are split where whole ones cannot be shared out (`group_parts`).

    `method` is one of

    - `grpo`: policy gradients from rewards relative to a group's, with all of `LossConfig`'s losses;
    - `ppo`: policy gradients from a critic's advantages, as in RLHF, against rewards or a reward model
      (`grpo_jax.reward_model.learned_reward`);
    - `sft`: imitation of `task.demonstrate` (`group_size` demonstrations for each prompt);
    - `rft`: imitation of the best of the policy's own completions;
    - `dpo`: a policy from preference pairs, without a reward model;
    - `reward_model`: a reward model from preference pairs;

    or a method of your own (`grpo_jax.algorithms.Algorithm`). What a method does not read (`Method.reads`) must be left
    at its default; overriding `method` leaves it behind.

    `loss` and `advantages` are configs, or functions of your own: `loss(inputs: LossInputs) -> (loss, metrics)`, see
    `grpo_jax.losses.inputs`, and `advantages(rewards, mask)`, see `grpo_jax.advantages.compute_advantages`.

    `warm_start` and `control` are overrides of this experiment, as an ablation's arms are: the warm start is trained
    first and its policy is where this run begins; the control starts where this run started, is trained after it on
    the same prompts, and is evaluated on the same held-out prompts, so that its score can be shown beside this one.
    """

    task: Any
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    policy: PolicyConfig = PolicyConfig()
    method: str | Method = "grpo"
    steps: int | None = 100
    epochs: float | None = field(default=None, metadata=ADDED_LATER)
    token_budget: int | None = None
    prompts_per_step: int = 8
    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = field(default=1, metadata=ADDED_LATER)
    dynamic_sampling_rounds: int = 0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0
    devices: int | None = None
    checkpoint_every: int = 100
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig = RewardConfig()
    advantages: AdvantageConfig | Callable[..., Any] = AdvantageConfig()
    loss: LossConfig | Callable[..., Any] = LossConfig()
    ppo: PPOConfig = PPOConfig()
    sft: SFTConfig = SFTConfig()
    rft: RFTConfig = RFTConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    dpo: DPOConfig = DPOConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = field(default=CheckpointConfig(), metadata=NOT_IN_NAMES)
    guards: GuardConfig = field(default=GuardConfig(), metadata=ADDED_LATER)
    warm_start: Mapping[str, Any] | None = None
    control: Mapping[str, Any] | None = None

    wide = frozenset({"steps", "token_budget"})

    def _ranges(self) -> Ranges:
        return dict(
            rewards=(
                bool(self.rewards) or not self.is_rewarded,
                f"at least one reward function for method {self.method_name!r}",
            ),
            steps=(
                (self.steps is None) == (self.epochs is not None) and (self.steps or 0) >= 0,
                "0 or above, or None with epochs, which then say when training ends",
            ),
            epochs=(self.epochs is None or self.epochs > 0, "positive, or None"),
            token_budget=(
                self.token_budget is None or (self.token_budget > 0 and self.optimizer.schedule == "constant"),
                "None, or positive with optimizer.schedule 'constant', since no schedule can know the last step",
            ),
            prompts_per_step=(self.prompts_per_step > 0, "positive"),
            group_size=method_of(self.method).group_size_range(self),
            num_iterations=_number_of_updates(self.num_iterations, self.loss_config),
            num_minibatches=_number_of_updates(self.num_minibatches, self.loss_config),
            dynamic_sampling_rounds=(0 <= self.dynamic_sampling_rounds <= 1000, "between 0 (off) and 1000"),
            gradient_accumulation_steps=(
                self.gradient_accumulation_steps > 0 and self._can_be_divided(),
                f"a number that, with num_minibatches = {self.num_minibatches}, divides the {self.prompts_per_step} "
                f"groups of {self.group_size} completions of a step into equal parts",
            ),
            seed=(0 <= self.seed < 2**31, "between 0 and 2**31 - 1"),
            devices=(self.devices is None or self.devices > 0, "positive, or None for all local devices"),
            checkpoint_every=(self.checkpoint_every > 0, "positive"),
        )

    def _can_be_divided(self) -> bool:
        counts = (self.prompts_per_step, self.group_size, self.num_minibatches)
        return min(counts) < 1 or self.group_parts(1) is not None  # other ranges refuse a count below 1

    @property
    def is_rewarded(self) -> bool:
        """Whether training itself needs reward functions (evaluation shows them where there are any)."""
        return method_of(self.method).needs_rewards(self)

    @property
    def method_name(self) -> str:
        """What the method is called."""
        return method_of(self.method).name

    @property
    def num_steps(self) -> int:
        """After how many steps training ends, if no token budget ends it before."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "checked when the experiment was made"
        return math.ceil(round(self.epochs * len(self.task.train) / self.prompts_per_step, 6))

    @property
    def updates_per_step(self) -> int:
        """How many updates are made on a step's batch."""
        return self.num_iterations * self.num_minibatches

    def group_parts(self, num_devices: int) -> int | None:
        """Into how many parts a group is split to be shared out over this many devices; None if nothing fits."""
        shares = num_devices * self.num_minibatches * self.gradient_accumulation_steps
        smallest = method_of(self.method).smallest_part(self)
        return group_parts(self.prompts_per_step, self.group_size, shares, smallest=smallest)

    @property
    def loss_config(self) -> LossConfig:
        """`loss`, or the defaults where that is a function, which has no options of its own."""
        return self.loss if isinstance(self.loss, LossConfig) else LossConfig()

    def _inert(self) -> Iterator[tuple[str, str]]:
        """The options that were set though nothing can come of them in this experiment, and why not."""
        if self.updates_per_step == 1 and self.policy.dtype == "float32":
            why = (
                "with one update for each batch (num_iterations * num_minibatches = 1) the policy is still the one "
                "that sampled, so that ratios are 1"
            )
            yield from ((f"loss.{name}", why) for name in self.loss_config.set_for_ratios())
            if self.ppo.cliprange_value != PPOConfig().cliprange_value:
                yield "ppo.cliprange_value", why
        if self.reward.retries != RewardConfig().retries and self.reward.on_failure != "retry":
            yield "reward.retries", "it is read with reward.on_failure 'retry' alone"
        if self.reward.max_failure_rate != RewardConfig().max_failure_rate and self.reward.on_failure != "drop":
            yield "reward.max_failure_rate", "it is read with reward.on_failure 'drop' alone"
        if self.checkpoints.best and not self.evaluation.every:
            yield "checkpoints.best", "with evaluation.every = 0 the policy is not evaluated while it is trained"
        if self.checkpoints.metric != CheckpointConfig().metric and not self.checkpoints.best:
            yield "checkpoints.metric", "it is read with checkpoints.best alone"
        yield from self.guards.inert()
        method = method_of(self.method)
        if self.guards.spike_metric == "loss" and "loss" in method.reads:
            yield "guards.spike_metric", "the loss of a policy gradient is about 0, and a multiple of it says nothing"
        for name in method.unwatched:
            if getattr(self.guards, name) is not None:
                yield f"guards.{name}", f"the steps of method {method.name!r} do not measure it"

    def __post_init__(self) -> None:
        if isinstance(self.method, str) and self.method not in METHODS:
            raise UserError(f"there is no method {shown(self.method)}{nearest(self.method, list(METHODS))}")
        super().__post_init__()
        if hasattr(self.task, "check"):
            self.task.check()
        for f in unread_fields(Experiment, self.method):
            if getattr(self, f.name) != f.default:
                raise UserError(f"Experiment.{f.name} is set, but method {self.method_name!r} does not read it.")
        method_of(self.method).check(self)
        for name, why in self._inert():
            raise UserError(f"{name} is set, but it cannot act here: {why}. Leave it at its default.")
        strangers = sorted(set(self.reward.weights) - set(self.rewards))
        if strangers:
            raise UserError(
                f"RewardConfig.weights names {strangers[0]!r}, which is no reward of this experiment: "
                f"it has {sorted(self.rewards)}."
            )
        for name in ("warm_start", "control"):
            if (variant := getattr(self, name)) is not None:
                try:
                    variant_of(self, variant)  # now, not when the run has come so far
                except UserError as error:
                    raise UserError(f"Experiment.{name}: {error}") from None
                except RecursionError:
                    raise UserError(f"Experiment.{name} holds variants in variants, too many to follow.") from None
        loss = self.loss_config
        if self.policy.lora is not None and loss.sync_ref_model and loss.ref_model_mixup_alpha != 1:
            raise UserError(
                f"loss.ref_model_mixup_alpha = {loss.ref_model_mixup_alpha} mixes parameters, but a mixture of "
                "LoRA factors is not the mixture of their products: with policy.lora it must be 1 (a copy)."
            )


def _number_of_updates(count: int, loss: LossConfig) -> Range:
    wanted = "positive, and 1 for loss_type 'reinforce', which has no ratio to make up for a policy that has moved"
    return count == 1 or (count > 0 and loss.loss_type != "reinforce"), wanted
