"""`Experiment`: one run, declared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
from grpo_jax.experiment.overrides import unread_fields, variant_of


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
    - `reward_model`: a reward model from preference pairs.

    What a method does not read (`METHODS`) must be left at its default; overriding `method` leaves it behind.
    `warm_start` and `control` are overrides of this experiment, as an ablation's arms are: the warm start is trained
    first and its policy is where this run begins; the control starts where this run started, is trained after it on
    the same prompts, and is evaluated on the same held-out prompts, so that its score can be shown beside this one.
    """

    task: Any
    rewards: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    policy: PolicyConfig = PolicyConfig()
    method: Literal["grpo", "ppo", "sft", "rft", "dpo", "reward_model"] = "grpo"
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
    advantages: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
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
                f"at least one reward function for method {self.method!r}",
            ),
            steps=(self.steps >= 0, "0 or above"),
            token_budget=(
                self.token_budget is None or (self.token_budget > 0 and self.optimizer.schedule == "constant"),
                "None, or positive with optimizer.schedule 'constant', since no schedule can know the last step",
            ),
            prompts_per_step=(self.prompts_per_step > 0, "positive"),
            group_size=self._group_size_range(),
            num_iterations=(
                self.num_iterations == 1 or (self.num_iterations > 0 and self.loss.loss_type != "reinforce"),
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
        pairs = self.method in ("dpo", "reward_model") and self.preferences.completions != "columns"
        return pairs or self.method in ("grpo", "ppo", "rft")

    def _group_size_range(self) -> tuple[bool, str]:
        size = self.group_size
        match self.method:
            case "grpo":
                return size > 1, "at least 2 for method 'grpo', since a group of one has no relative advantage"
            case "rft" if self.rft.select == "best":
                return size > 1, "at least 2 for method 'rft', which takes the best of a group"
            case "dpo" | "reward_model" if self.preferences.completions == "columns":
                return size == 2, "2 with preferences.completions 'columns': a chosen and a rejected completion"
            case "dpo" | "reward_model":
                return size > 0 and size % 2 == 0, f"even for method {self.method!r}, which compares two and two"
            case _:
                return size > 0, "positive"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_method()
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
        if self.policy.lora is not None and self.loss.sync_ref_model and self.loss.ref_model_mixup_alpha != 1:
            raise UserError(
                f"loss.ref_model_mixup_alpha = {self.loss.ref_model_mixup_alpha} mixes parameters, but a mixture of "
                "LoRA factors is not the mixture of their products: with policy.lora it must be 1 (a copy)."
            )
        if self.method == "grpo" and self.reward.combine == "normalize_then_sum" and self.advantages.scale == "group":
            raise UserError(
                "reward.combine = 'normalize_then_sum' has each reward scaled by its group, so that advantages.scale = "
                "'group' would undo it: it must be 'whiten' (GDPO), 'batch' or 'none'."
            )

    def _check_method(self) -> None:
        """What the method needs is there, and nothing is set that it does not read."""
        method = self.method
        for f in unread_fields(Experiment, method):
            if getattr(self, f.name) != f.default:
                raise UserError(f"Experiment.{f.name} is set, but method {method!r} does not read it.")
        if method == "ppo" and (self.loss.beta or self.loss.importance_sampling_mode):
            name = "beta" if self.loss.beta else "importance_sampling_mode"
            remedy = "its KL is ppo.kl_coef's" if self.loss.beta else "it knows no correction for another sampler"
            raise UserError(f"loss.{name} is set, but method 'ppo' does not read it: {remedy}.")
        task = getattr(self.task, "name", self.task)
        demonstrated = method in ("dpo", "reward_model") and self.preferences.completions == "demonstrations"
        if (method == "sft" or demonstrated) and getattr(self.task, "demonstrate", None) is None:
            what = "method 'sft'" if method == "sft" else "preferences.completions = 'demonstrations'"
            raise UserError(f"{what} needs demonstrations, but task {task!r} has no `demonstrate` function.")
        labelled = method in ("dpo", "reward_model") and self.preferences.completions == "columns"
        for split in ("train", "held_out") if method == "reward_model" else ("train",):
            if labelled and any(not {"chosen", "rejected"} <= set(e) for e in getattr(self.task, split)):
                raise UserError(
                    f"preferences.completions = 'columns' needs the columns 'chosen' and 'rejected', which not every "
                    f"{split} example of task {task!r} has."
                )
