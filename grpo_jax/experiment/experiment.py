"""`Experiment`: one run, declared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.experiment.checked import Checked, Ranges
from grpo_jax.experiment.configs import EvaluationConfig, OptimizerConfig, PolicyConfig, RewardConfig, SamplingConfig
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
from grpo_jax.experiment.requirements import METHODS, Method, method_of


@dataclass(frozen=True)
class Experiment(Checked):
    """One run: a task, its rewards, a policy, and how the one is trained on the other.

    A step's groups whose rewards are all equal say nothing. `dynamic_sampling_rounds` is how many further rounds of
    prompts a step may play to replace them by groups that do (DAPO, 2503.14476); 0 for none.

    Training ends after `steps` steps, or before that with the step in which its `token_budget` of sampled tokens is
    used up (those that dynamic sampling throws away count too).

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
    steps: int = 100
    token_budget: int | None = None
    prompts_per_step: int = 8
    group_size: int = 8
    num_iterations: int = 1
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
    warm_start: Mapping[str, Any] | None = None
    control: Mapping[str, Any] | None = None

    def _ranges(self) -> Ranges:
        return dict(
            rewards=(
                bool(self.rewards) or not self.is_rewarded,
                f"at least one reward function for method {self.method_name!r}",
            ),
            steps=(self.steps >= 0, "0 or above"),
            token_budget=(
                self.token_budget is None or (self.token_budget > 0 and self.optimizer.schedule == "constant"),
                "None, or positive with optimizer.schedule 'constant', since no schedule can know the last step",
            ),
            prompts_per_step=(self.prompts_per_step > 0, "positive"),
            group_size=method_of(self.method).group_size_range(self),
            num_iterations=(
                self.num_iterations == 1 or (self.num_iterations > 0 and self.loss_config.loss_type != "reinforce"),
                "positive, and 1 for loss_type 'reinforce', which has no ratio to make up for a policy that has moved",
            ),
            dynamic_sampling_rounds=(self.dynamic_sampling_rounds >= 0, "0 (off) or above"),
            gradient_accumulation_steps=(
                self.gradient_accumulation_steps > 0 and self.prompts_per_step % self.gradient_accumulation_steps == 0,
                f"a number that divides prompts_per_step = {self.prompts_per_step}",
            ),
            seed=(0 <= self.seed < 2**31, "between 0 and 2**31 - 1"),
            devices=(self.devices is None or self.devices > 0, "positive, or None for all local devices"),
            checkpoint_every=(self.checkpoint_every > 0, "positive"),
        )

    @property
    def is_rewarded(self) -> bool:
        """Whether training itself needs reward functions (evaluation shows them where there are any)."""
        return method_of(self.method).needs_rewards(self)

    @property
    def method_name(self) -> str:
        """What the method is called."""
        return method_of(self.method).name

    @property
    def loss_config(self) -> LossConfig:
        """`loss`, or the defaults where that is a function, which has no options of its own."""
        return self.loss if isinstance(self.loss, LossConfig) else LossConfig()

    def __post_init__(self) -> None:
        if isinstance(self.method, str) and self.method not in METHODS:
            raise UserError(f"there is no method {self.method!r}{nearest(self.method, list(METHODS))}")
        super().__post_init__()
        if hasattr(self.task, "check"):
            self.task.check()
        for f in unread_fields(Experiment, self.method):
            if getattr(self, f.name) != f.default:
                raise UserError(f"Experiment.{f.name} is set, but method {self.method_name!r} does not read it.")
        method_of(self.method).check(self)
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
        loss = self.loss_config
        if self.policy.lora is not None and loss.sync_ref_model and loss.ref_model_mixup_alpha != 1:
            raise UserError(
                f"loss.ref_model_mixup_alpha = {loss.ref_model_mixup_alpha} mixes parameters, but a mixture of "
                "LoRA factors is not the mixture of their products: with policy.lora it must be 1 (a copy)."
            )
