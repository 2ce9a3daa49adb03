"""What an experiment is: frozen dataclasses, loading one from a Python file, and typed overrides.

An experiment file exports `config = Experiment(...)`. Nothing here imports JAX, so a file loads at once and a typing
error in it costs nothing. Every value is checked against its annotation when the dataclass is made, so a config that
loads is a config whose fields have the types and ranges that they claim.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import re
import sys
import traceback
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import typeguard

from grpo_jax.errors import UserError
from grpo_jax.fingerprint import fingerprint

Ranges = dict[str, tuple[bool, str]]  # field -> (whether its value is in range, what it must be)


class _Checked:
    """A dataclass whose every field is checked against its annotation, and then against `_ranges`, when it is made."""

    def _ranges(self) -> Ranges:
        return {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            try:
                typeguard.check_type(value, hint)
            except typeguard.TypeCheckError:
                wanted = str(hint).replace("typing.", "") if not isinstance(hint, type) else hint.__name__
                raise UserError(f"{name}.{key} = {value!r} has the wrong type: it must be {wanted}.") from None
        for key, (holds, wanted) in self._ranges().items():
            if not holds:
                raise UserError(f"{name}.{key} = {getattr(self, key)!r} is out of range: it must be {wanted}.")


@dataclass(frozen=True)
class ScratchConfig(_Checked):
    """A from-scratch policy with one token per character of `alphabet` (plus begin, end and pad)."""

    alphabet: str = "abcdefghijklmnopqrstuvwxyz"
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4

    def _ranges(self) -> Ranges:
        return dict(
            alphabet=(len(set(self.alphabet)) == len(self.alphabet) > 0, "a non-empty string of distinct characters"),
            hidden_size=(self.hidden_size > 0, "positive"),
            num_layers=(self.num_layers > 0, "positive"),
            num_heads=(
                self.num_heads > 0 and self.hidden_size % (2 * self.num_heads) == 0,
                f"a number that divides hidden_size = {self.hidden_size} into heads of even size",
            ),
        )


@dataclass(frozen=True)
class LoRAConfig(_Checked):
    """Low-rank adapters (Hu et al. 2021, 2106.09685): W + alpha / rank * A @ B on the layers named in `targets`."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")

    def _ranges(self) -> Ranges:
        known = {"q", "k", "v", "o", "gate", "up", "down"}
        return dict(
            rank=(self.rank > 0, "positive"),
            targets=(bool(self.targets) and set(self.targets) <= known, f"a non-empty choice from {sorted(known)}"),
        )


@dataclass(frozen=True)
class PolicyConfig(_Checked):
    """Where the policy's weights come from and which of them are trained.

    `source` is a Hugging Face directory or hub name, a `.gguf` file, `package:NAME` for a Python package that holds
    one, the directory of an earlier run, or `scratch`. Without `lora` all parameters are trained.
    """

    source: str = "scratch"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRAConfig | None = None
    scratch: ScratchConfig = ScratchConfig()

    def _ranges(self) -> Ranges:
        return dict(source=(bool(self.source), "a non-empty string"))


@dataclass(frozen=True)
class SamplingConfig(_Checked):
    """How completions are drawn. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 keep the whole vocabulary.

    `max_tokens` bounds one assistant turn. `max_logprob_difference` is the bound of the log-probability contract past
    which a run stops (None: 0.01 for float32, 1.0 for bfloat16, whose rounding alone reaches tenths).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 16
    max_logprob_difference: float | None = None

    def _ranges(self) -> Ranges:
        return dict(
            temperature=(self.temperature >= 0, "0 (greedy) or above"),
            top_k=(self.top_k >= 0, "0 (off) or above"),
            top_p=(0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            max_tokens=(self.max_tokens > 0, "positive"),
            max_logprob_difference=(
                self.max_logprob_difference is None or self.max_logprob_difference > 0,
                "positive, or None for the dtype's own bound",
            ),
        )

    def logprob_bound(self, dtype: str) -> float:
        """The largest gap in nats between the sampler's and the trainer's log-probability of a token."""
        own = {"float32": 1e-2, "bfloat16": 1.0}[dtype]
        return own if self.max_logprob_difference is None else self.max_logprob_difference


@dataclass(frozen=True)
class AdvantageConfig(_Checked):
    """Rewards to advantages: (r - baseline) / scale. See `grpo_jax.advantages.group_advantages`, which says by which
    choices GRPO, Dr. GRPO, RLOO, REINFORCE++, Lite PPO and GDPO go."""

    scale: Literal["group", "batch", "whiten", "none"] = "group"
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    ddof: Literal[0, 1] = 0


@dataclass(frozen=True)
class LossConfig(_Checked):
    """The policy-gradient loss, in TRL's names. See `grpo_jax.losses.policy_gradient`.

    What a loss does not read must be left at its default: it is an error, not ignored.

    - `importance_sampling_level`: ratios per token, or per sequence (GSPO; LUSPO as published).
    - `epsilon`, `epsilon_high` (None: `epsilon`), `delta`: the bounds of the ratio, around 1; `delta` (None: none) is
      the largest ratio of a bad token. For `cispo`, `epsilon_high` is the largest weight itself: ScaleRL has 5.0, and
      TRL's default, `epsilon`, is hardly what anyone wants.
    - `beta` weighs the KL to the reference policy; at 0 the reference is never computed. `use_bias_correction_kl`
      multiplies it by the importance ratio (TRL does by default; GRPO's paper does not).
    - `sync_ref_model`: the reference, else frozen where training began, becomes alpha * policy + (1 - alpha) *
      reference every `ref_model_sync_steps` steps (TR-DPO, 2404.09656), alpha being `ref_model_mixup_alpha`; 1 copies.
    - `entropy_coef` adds an entropy bonus; `top_entropy_quantile` trains on the most uncertain tokens alone.
    - `max_completion_length` is the constant denominator of `dr_grpo`.
    - `mask_truncated_completions`: a completion that the token limit cut off is not trained on (DAPO), though its
      reward still counts in its group's baseline.
    - `importance_sampling_mode`, `importance_sampling_clip_min` and `_max`: weights for a sampler that differs from the
      trainer (TRL's `vllm_importance_sampling_*`); None for no correction.
    """

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "reinforce"] = "grpo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    max_completion_length: int | None = None
    mask_truncated_completions: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None = (
        None
    )
    importance_sampling_clip_max: float | None = 3.0
    importance_sampling_clip_min: float | None = None

    def _ranges(self) -> Ranges:
        lowest, highest = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        ranges: Ranges = dict(
            epsilon=(0 <= self.epsilon <= 1, "between 0 and 1"),
            epsilon_high=((self.epsilon_high or 0) >= 0, "0 or above"),
            delta=(self.delta is None or self.delta > 0, "positive, or None for no bound"),
            beta=(self.beta >= 0, "0 (no reference) or above"),
            ref_model_mixup_alpha=(0 < self.ref_model_mixup_alpha <= 1, "above 0 and at most 1 (a copy)"),
            ref_model_sync_steps=(self.ref_model_sync_steps > 0, "positive"),
            top_entropy_quantile=(0 <= self.top_entropy_quantile <= 1, "between 0 and 1 (all tokens)"),
            max_completion_length=(
                self.loss_type != "dr_grpo" or (self.max_completion_length or 0) > 0,
                "a positive number for loss_type 'dr_grpo' (usually sampling.max_tokens)",
            ),
            importance_sampling_mode=(
                self.loss_type != "vespo" or not (self.importance_sampling_mode or "").startswith("sequence"),
                "'token_truncate', 'token_mask' or None for loss_type 'vespo', which multiplies the tokens' weights",
            ),
            importance_sampling_clip_max=(highest is None or highest > 0, "positive, or None for no bound"),
            importance_sampling_clip_min=(
                lowest is None or 0 <= lowest <= (float("inf") if highest is None else highest),
                "between 0 and importance_sampling_clip_max, or None for no bound",
            ),
            **{f.name: (getattr(self, f.name) > 0, "positive") for f in _fields(self, "sapo_", "vespo_")},
        )
        return {**ranges, **{name: (False, why) for name, why in self._unread()}}

    def _unread(self) -> Iterable[tuple[str, str]]:
        """The fields that were set though nothing reads them, and what they must be instead."""
        clipped = self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
        of_type = dict(
            epsilon=clipped or (self.loss_type == "cispo" and self.epsilon_high is None),
            epsilon_high=clipped or self.loss_type == "cispo",
            delta=clipped,
            importance_sampling_level=self.loss_type not in ("vespo", "reinforce"),
            max_completion_length=self.loss_type == "dr_grpo",
            **{f.name: f.name.startswith(self.loss_type) for f in _fields(self, "sapo_", "vespo_")},
        )
        needs_beta = ("kl_estimator", "use_bias_correction_kl", "sync_ref_model")
        needs = {
            **{name: (read, f"loss_type {self.loss_type!r} does not read it") for name, read in of_type.items()},
            **{name: (self.beta > 0, "there is no reference policy without beta") for name in needs_beta},
            **{
                f.name: (self.sync_ref_model, "it is read with sync_ref_model alone")
                for f in _fields(self, "ref_model_")
            },
            **{
                f.name: (self.importance_sampling_mode is not None, "it is read with importance_sampling_mode alone")
                for f in _fields(self, "importance_sampling_clip_")
            },
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, (read, why) in needs.items():
            if not read and getattr(self, name) != defaults[name]:
                yield name, f"left at {defaults[name]!r}, since {why}"


def _fields(config: Any, *prefixes: str) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(config) if f.name.startswith(prefixes)]


@dataclass(frozen=True)
class SFTConfig(_Checked):
    """Supervised fine-tuning on `task.demonstrate`. The loss is a mean over tokens.

    - `packing`: whole examples share rows of `max_length` tokens, so that hardly any token is padding. They do not see
      each other. Without it the prompt is computed once per group.
    - `completion_only_loss`: the prompt's tokens are context and not learned.
    """

    packing: bool = False
    max_length: int | None = None
    completion_only_loss: bool = True

    def _ranges(self) -> Ranges:
        if self.packing:
            return dict(max_length=((self.max_length or 0) > 1, "the length of a packed row in tokens"))
        return dict(max_length=(self.max_length is None, "None without packing, which alone reads it"))


@dataclass(frozen=True)
class RFTConfig(_Checked):
    """Rejection-sampling fine-tuning: SFT on the best of the policy's own completions.

    - `select`: the `best` of each group of unequal rewards (RAFT, 2304.06767), the earliest where several are; or all
      whose reward is `threshold` or more (RFT, 2308.01825).
    - `samples_from`: the `policy` as it is, or as it was at the `start` of this run.
    """

    select: Literal["best", "threshold"] = "best"
    threshold: float | None = None
    samples_from: Literal["policy", "start"] = "policy"

    def _ranges(self) -> Ranges:
        wanted = "a reward for select 'threshold'" if self.select == "threshold" else "None for select 'best'"
        return dict(threshold=((self.threshold is None) == (self.select == "best"), wanted))


@dataclass(frozen=True)
class PreferenceConfig(_Checked):
    """Where preference pairs come from, and how good their labels are.

    - `completions`: what is compared. `start`: two and two of a group of completions, sampled from the policy at the
      start of this run; `demonstrations`: likewise, of `task.demonstrate`. The rewards label them. `columns`: the
      columns `chosen` and `rejected` of the examples, which are labelled already.
    - `label_noise` and `noise_level`: `flip` gives the wrong label with the probability `noise_level`; `bradley_terry`
      prefers a to b with the probability sigmoid((r_a - r_b) / noise_level). Without noise the higher reward is
      preferred. Equal rewards give no pair.
    - `epoch_steps`: from then on the pairs of the first steps return, in their order; None: every step has new ones.
      The number of labels that a run costs is that of its first `epoch_steps` steps.
    """

    completions: Literal["start", "demonstrations", "columns"] = "start"
    label_noise: Literal["flip", "bradley_terry"] = "flip"
    noise_level: float = 0.0
    epoch_steps: int | None = None

    def _ranges(self) -> Ranges:
        flip, labelled = self.label_noise == "flip", self.completions == "columns"
        return dict(
            label_noise=(flip or not labelled, "left as it is for columns, which are labelled already"),
            noise_level=(
                self.noise_level == 0 or (self.noise_level > 0 and not labelled and (not flip or self.noise_level < 1)),
                "0 (none), or else positive, below 1 for label_noise 'flip', and not with columns",
            ),
            epoch_steps=(self.epoch_steps is None or self.epoch_steps > 0, "positive, or None"),
        )


@dataclass(frozen=True)
class DPOConfig(_Checked):
    """The loss on preference pairs, in TRL's names; see `grpo_jax.losses.preference`."""

    beta: float = 0.1
    loss_type: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0

    def _ranges(self) -> Ranges:
        highest = {"sigmoid": 0.5, "robust": 0.49999, "ipo": 0.0}[self.loss_type]
        wanted = {"sigmoid": "between 0 and 0.5", "robust": "0 or above and below 0.5", "ipo": "0, not read by 'ipo'"}
        return dict(
            beta=(self.beta > 0, "positive"),
            label_smoothing=(0 <= self.label_smoothing <= highest, wanted[self.loss_type]),
        )


@dataclass(frozen=True)
class RewardModelConfig(_Checked):
    """The Bradley-Terry loss of a reward model; see `grpo_jax.losses.preference.bradley_terry_loss`."""

    center_rewards_coefficient: float = 0.0

    def _ranges(self) -> Ranges:
        return dict(center_rewards_coefficient=(self.center_rewards_coefficient >= 0, "0 (off) or above"))


@dataclass(frozen=True)
class PPOConfig(_Checked):
    """What PPO adds to `LossConfig`'s surrogate: a critic on the policy's trunk, and the KL in the reward.

    See `grpo_jax.losses.value`. `cliprange_value` None: the critic's loss is not clipped. `whiten_advantages`: they
    get mean 0 and standard deviation 1 over the batch's tokens.
    """

    gamma: float = 1.0
    lam: float = 0.95
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    kl_coef: float = 0.05
    whiten_advantages: bool = True

    def _ranges(self) -> Ranges:
        return dict(
            gamma=(0 <= self.gamma <= 1, "between 0 and 1"),
            lam=(0 <= self.lam <= 1, "between 0 and 1"),
            cliprange_value=(self.cliprange_value is None or self.cliprange_value > 0, "positive, or None for none"),
            vf_coef=(self.vf_coef > 0, "positive: without its loss the critic learns nothing"),
            kl_coef=(self.kl_coef >= 0, "0 (no reference) or above"),
        )


@dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """AdamW after clipping by global norm. Weight decay spares norms and biases."""

    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0

    def _ranges(self) -> Ranges:
        return dict(
            learning_rate=(self.learning_rate >= 0, "0 or above"),
            warmup_steps=(self.warmup_steps >= 0, "0 or above"),
            weight_decay=(self.weight_decay >= 0, "0 or above"),
            b1=(0 <= self.b1 < 1, "in [0, 1)"),
            b2=(0 <= self.b2 < 1, "in [0, 1)"),
            eps=(self.eps > 0, "positive"),
            max_grad_norm=(self.max_grad_norm is None or self.max_grad_norm > 0, "positive, or None for no clipping"),
        )


@dataclass(frozen=True)
class RewardConfig(_Checked):
    """How several rewards become one, and what happens when one of them fails.

    `combine`: the weighted `sum`, or `normalize_then_sum` (each reward standardised within its group first; GDPO, with
    `advantages.scale="whiten"`).
    `on_failure` covers an exception, a time-out, a NaN and a wrong length: `raise` ends the run, `retry` tries
    `retries` times and then raises, `drop` masks the completions out of their groups; past the share
    `max_failure_rate` of a step's completions a dropping run stops. `time_limit` is in seconds, per call.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    combine: Literal["sum", "normalize_then_sum"] = "sum"
    on_failure: Literal["raise", "retry", "drop"] = "raise"
    retries: int = 2
    max_failure_rate: float = 0.5
    time_limit: float = 60.0

    def _ranges(self) -> Ranges:
        return dict(
            retries=(self.retries >= 0, "0 or above"),
            max_failure_rate=(0 <= self.max_failure_rate <= 1, "between 0 and 1"),
            time_limit=(self.time_limit > 0, "positive"),
        )


@dataclass(frozen=True)
class EvaluationConfig(_Checked):
    """The evaluation before and after training, and every `every` steps (0: only before and after).

    The first `num_prompts` prompts of each split (fewer if it has fewer), `num_samples` completions each, sampled
    `batch_size` at once. The sampling noise is the same each time, so that differences are paired.
    """

    splits: tuple[Literal["held_out", "train"], ...] = ("held_out",)
    num_prompts: int = 128
    num_samples: int = 1
    temperature: float = 0.0
    every: int = 0
    batch_size: int = 64

    def _ranges(self) -> Ranges:
        return dict(
            splits=(bool(self.splits), "at least one of 'held_out' and 'train'"),
            num_prompts=(self.num_prompts > 0, "positive"),
            num_samples=(self.num_samples > 0, "positive"),
            temperature=(self.temperature >= 0, "0 (greedy) or above"),
            every=(self.every >= 0, "0 (only before and after) or above"),
            batch_size=(self.batch_size > 0, "positive (completions sampled at once)"),
        )


METHODS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("loss", "advantages", "dynamic_sampling_rounds"),
    "ppo": ("loss", "ppo"),
    "sft": ("sft",),
    "rft": ("rft",),
    "dpo": ("dpo", "preferences"),
    "reward_model": ("reward_model", "preferences"),
}
"""The methods, and which of an experiment's fields each reads that not all of them do."""


@dataclass(frozen=True)
class Experiment(_Checked):
    """One run: a task, its rewards, a policy, and how the one is trained on the other.

    A step's groups whose rewards are all equal say nothing. `dynamic_sampling_rounds` is how many further rounds of
    prompts a step may play to replace them by groups that do (DAPO, 2503.14476); 0 for none.

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
        for f in _unread_fields(method):
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


def _unread_fields(method: str) -> list[dataclasses.Field]:
    """The fields of `Experiment` that this method does not read, though another does."""
    unread = {name for fields in METHODS.values() for name in fields} - set(METHODS[method])
    return [f for f in dataclasses.fields(Experiment) if f.name in unread]


Budget = Literal["steps", "tokens"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of an ablation: the arms that it stands for, its seed, its resolved config, and the config's hash."""

    arms: tuple[str, ...]
    seed: int
    config: Experiment
    key: str


@dataclass(frozen=True)
class Ablation(_Checked):
    """One experiment under several variations, at several seeds.

    Arms are overrides of `base`, as in `{"article": {}, "strict": {"rewards": {"strict": partial_credit_strict}}}`. At
    equal seeds they share their prompts and the names of their sampling noise (DESIGN §3), so they are compared seed by
    seed, each with `baseline` (None: the first arm).

    `metric` is a name in `metrics.jsonl`; its last value is what a run came to. `budget` is what the arms have in
    common: `steps` as many updates as the base; `tokens` as many sampled tokens as the base has room for, that is
    steps × prompts × group size × turns × `max_tokens`, from which each arm's steps follow.
    """

    base: Experiment
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = range(5)
    metric: str = "evaluation/success"
    baseline: str | None = None
    budget: Budget = "steps"

    def _ranges(self) -> Ranges:
        return dict(
            arms=(bool(self.arms), "at least one arm, {name: overrides}"),
            seeds=(0 < len(self.seeds) == len(set(self.seeds)), "at least one seed, each once"),
            baseline=(self.baseline is None or self.baseline in self.arms, f"None or one of {sorted(self.arms)}"),
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm, overrides in self.arms.items():
            for field_of_sweep, instead in (
                ("seed", "`seeds`"),
                ("steps", "`budget`, which gives every arm its steps"),
            ):
                if field_of_sweep in overrides:
                    raise UserError(f"arm {arm!r} sets {field_of_sweep!r}: that is for the ablation's {instead}.")
            try:
                self.experiment(arm, self.seeds[0])
            except UserError as error:
                raise UserError(f"arm {arm!r}: {error}") from None

    @property
    def baseline_arm(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms)) if self.baseline is None else self.baseline

    def experiment(self, arm: str, seed: int) -> Experiment:
        """The resolved config of an arm at a seed."""
        config = override(self.base, {**self.arms[arm], "seed": seed})
        if self.budget == "steps":
            return config
        return override(config, {"steps": round(self.base.steps * _room(self.base) / _room(config)) or 1})

    def runs(self) -> list[PlannedRun]:
        """Every run, seed by seed so that what is finished first can be compared; arms that are alike share one."""
        planned: dict[str, PlannedRun] = {}
        for seed in self.seeds:
            for arm in self.arms:
                config = self.experiment(arm, seed)
                key = fingerprint(config)
                earlier = planned[key].arms if key in planned else ()
                planned[key] = PlannedRun((*earlier, arm), seed, config, key)
        return list(planned.values())


def _room(config: Experiment) -> int:
    """The most tokens that one step may sample."""
    turns = getattr(config.task, "max_turns", 1)
    return config.prompts_per_step * config.group_size * turns * config.sampling.max_tokens


def override(config: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """Returns `config` with dotted fields replaced, e.g. `{"loss.beta": 0.04, "method": "sft"}`.

    A variant made this way inherits everything else, so a control follows whatever its experiment was overridden with;
    but a variant of another `method` leaves behind the fields that this method does not read.
    Raises `UserError` for an unknown field (suggesting the nearest) and for a value of the wrong type.
    """
    changes = [(path.split("."), value, path) for path, value in overrides.items()]
    method = overrides.get("method")
    if method in METHODS and method != config.method:
        given = {keys[0] for keys, *_ in changes}
        left = [([f.name], f.default, f.name) for f in _unread_fields(method) if f.name not in given]
        changes = [*left, *changes]
    return _replace(config, changes)


def _replace(config: Any, changes: Sequence[tuple[list[str], Any, str]]) -> Any:
    """Sets (keys, value, dotted path) at once, so that fields whose ranges depend on each other come in any order."""
    if isinstance(config, Mapping):  # reward weights, or the overrides of a variant: the last one that is named wins
        named = {".".join(keys): value for keys, value, _ in changes}
        return {k: v for k, v in config.items() if k not in named} | named
    if not dataclasses.is_dataclass(config):
        raise UserError(f"{changes[0][2]!r} is not a field: {type(config).__name__} has no fields of its own.")
    names = [f.name for f in dataclasses.fields(config)]
    for (key, *_), _, path in changes:
        if key not in names:
            raise UserError(f"{path!r} is not a field: {type(config).__name__} has no {key!r}{_nearest(key, names)}")
    new = {key: value for (key, *rest), value, _ in changes if not rest}
    for key in dict.fromkeys(keys[0] for keys, *_ in changes if len(keys) > 1):
        further = [(keys[1:], value, path) for keys, value, path in changes if keys[0] == key and len(keys) > 1]
        inner = new.get(key, getattr(config, key))
        if inner is None:
            rest, _, path = further[0]
            raise UserError(f"{path!r} cannot be set: {path.removesuffix('.' + '.'.join(rest))} is None here.")
        new[key] = _replace(inner, further)
    return dataclasses.replace(config, **new)


def parse_overrides(config: Experiment, assignments: Iterable[str]) -> dict[str, Any]:
    """Turns `path=text` assignments from the command line into typed overrides of `config`.

    The text is read as a Python literal (`1e-4`, `None`, `("q", "v")`; `true` and `false` too) where the field's type
    admits that, and as a string otherwise.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} is not of the form field=value, e.g. loss.beta=0.04.")
        literal = {"true": True, "false": False, "none": None}.get(text.lower(), text)
        try:
            literal = literal_eval(text)
        except (ValueError, SyntaxError):
            pass
        overrides[path] = literal if _admits(config, path.split("."), literal) else text
    override(config, overrides)
    return overrides


def _admits(config: Any, keys: Sequence[str], value: Any) -> bool:
    """Whether the annotation of the field that the keys lead to admits the value; True where there is none."""
    *owners, name = keys
    for owner in owners:
        config = getattr(config, owner, None)
    hint = get_type_hints(type(config)).get(name) if dataclasses.is_dataclass(config) else None
    try:
        typeguard.check_type(value, Any if hint is None else hint)
    except typeguard.TypeCheckError:
        return False
    return True


def load(path: str | Path, assignments: Iterable[str] = ()) -> Experiment:
    """Runs the Python file at `path` and returns its `config`, overridden by `field=value` assignments.

    Of a file that exports an `ablation`, one arm is meant: `arm=NAME` among the assignments (and `budget=…`, where
    another one than the file's is wanted).
    Raises `UserError` if the file is missing, fails, or exports no `Experiment` named `config`.
    """
    module, assignments = run_file(path), list(assignments)
    config, ablation = getattr(module, "config", None), getattr(module, "ablation", None)
    if isinstance(ablation, Ablation):
        given = dict(a.split("=", 1) for a in assignments if a.startswith(("arm=", "budget=")))
        if given.get("arm") not in ablation.arms:
            raise UserError(f"{path} holds an ablation; choose one of its arms: --set arm={'|'.join(ablation.arms)}.")
        if "budget" in given:
            ablation = dataclasses.replace(ablation, budget=given["budget"])
        config = ablation.experiment(given["arm"], ablation.base.seed)
        assignments = [a for a in assignments if not a.startswith(("arm=", "budget="))]
    if not isinstance(config, Experiment):
        raise UserError(f"{path} exports no experiment: it must define `config = grpo_jax.experiment.Experiment(...)`.")
    return override(config, parse_overrides(config, assignments))


def load_ablation(path: str | Path, budget: Budget | None = None) -> Ablation:
    """Runs the Python file at `path` and returns its `ablation`, with another budget where one is given.

    Raises `UserError` if the file is missing, fails, or exports no `Ablation` named `ablation`.
    """
    ablation = getattr(run_file(path), "ablation", None)
    if not isinstance(ablation, Ablation):
        raise UserError(
            f"{path} exports no ablation: it must define `ablation = grpo_jax.experiment.Ablation(base=…, arms=…)`."
        )
    return ablation if budget is None else dataclasses.replace(ablation, budget=budget)


def load_run(run_dir: str | Path, assignments: Iterable[str] = ()) -> Experiment:
    """The experiment of a run, with the overrides that the run had and then those of `assignments`.

    The warm start and the control of a run are runs too, whose experiment is a variant of their parent's.
    Raises `UserError` if the directory holds no run.
    """
    run_dir = Path(run_dir)
    try:
        info = json.loads((run_dir / "run.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{str(run_dir)!r} is not the directory of a run: there is no run.json in it.") from None
    except (OSError, ValueError):
        raise UserError(f"{str(run_dir)!r} is not the directory of a run: its run.json cannot be read.") from None
    name = run_dir.resolve().name
    if name in ("warm_start", "control") and not (run_dir / "experiment.py").exists():
        parent = load_run(run_dir.resolve().parent)
        config = variant_of(parent, getattr(parent, name) or {})
        return override(config, parse_overrides(config, assignments))
    if info["source"]:
        sys.path.append(str(Path(info["source"]).parent))  # what lay beside the experiment's file may still be there
    return load(run_dir / "experiment.py", [*info["overrides"], *assignments])


def variant_of(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """The experiment with overrides, and without a warm start or control of its own unless they are among them."""
    return override(dataclasses.replace(experiment, warm_start=None, control=None), overrides)


def run_file(path: str | Path) -> Any:
    """Executes a Python file as a module and returns it; its own mistakes become one-sentence `UserError`s."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no experiment file {str(path)!r}.")
    spec = importlib.util.spec_from_file_location(f"grpo_jax_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file: an experiment file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # so that an experiment may import a file that lies beside it
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"{_where(path, error)}: {error}") from None
    except TypeError as error:
        raise UserError(f"{_where(path, error)}: {_explain(error)}") from error
    except Exception as error:
        raise UserError(f"{_where(path, error)}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def _where(path: Path, error: Exception) -> str:
    """The last line of `path` itself in the error's traceback, as `file:line`."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _explain(error: TypeError) -> str:
    """An unknown keyword of one of this module's dataclasses, with the nearest name that exists."""
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    known = globals().get(unknown[1]) if unknown else None
    if unknown is None or not dataclasses.is_dataclass(known):
        return f"TypeError: {error}"
    names = [f.name for f in dataclasses.fields(known)]
    return f"{unknown[1]} has no field {unknown[2]!r}{_nearest(unknown[2], names)}"


def _nearest(key: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(names)}."


def to_dict(value: Any) -> Any:
    """Returns a config as JSON-able data: functions by name, a task by its name, sizes and a digest of its data."""
    if hasattr(value, "train") and hasattr(value, "held_out"):
        splits = {split: list(map(dict, getattr(value, split))) for split in ("train", "held_out")}
        digest = hashlib.sha256(json.dumps(splits, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return {"name": value.name, **{k: len(v) for k, v in splits.items()}, "sha256": digest}
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    if callable(value):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', repr(value))}"
    return value
