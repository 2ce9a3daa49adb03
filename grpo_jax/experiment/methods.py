"""What some methods read and others do not, in TRL's names: the loss, the advantages, and a config for each method."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from grpo_jax.experiment.checked import Checked, Ranges, fields_named
from grpo_jax.experiment.configs import ADDED_LATER

Scale = Literal["group", "batch", "whiten", "none"]
Baseline = Literal["mean", "leave_one_out", "none"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "reinforce"]


@dataclass(frozen=True)
class AdvantageConfig(Checked):
    """Rewards to advantages: (r - baseline) / scale. See `grpo_jax.advantages`, which says by which choices GRPO,
    Dr. GRPO, RLOO, REINFORCE++, Lite PPO and GDPO go.

    `kl_coef` puts the KL to the reference policy into the reward (`loss.beta` puts it into the loss). With `kl_level`
    `sequence` a completion's reward is r - kl_coef * KL, its tokens' sum (RLOO); with `token` a token's advantage is
    that of its completion less kl_coef times the KL of this token and of those after it (REINFORCE++).
    """

    scale: Scale = "group"
    baseline: Baseline = "mean"
    ddof: Literal[0, 1] = 0
    kl_coef: float = field(default=0.0, metadata=ADDED_LATER)
    kl_level: Literal["sequence", "token"] = field(default="sequence", metadata=ADDED_LATER)

    def _ranges(self) -> Ranges:
        return dict(
            ddof=(self.ddof == 0 or self.scale != "none", "0 with scale 'none', which divides by no deviation"),
            kl_coef=(self.kl_coef >= 0, "0 (no reference) or above"),
            kl_level=(
                self.kl_level == "sequence" or (self.kl_coef > 0 and self.scale in ("whiten", "none")),
                "'sequence' without kl_coef and with the scales 'group' and 'batch', which are those of sequences",
            ),
        )


@dataclass(frozen=True)
class LossConfig(Checked):
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
    - `dr_grpo_length` is the constant by which `dr_grpo` divides where `grpo` divides by a completion's length: the
      longest completion, usually `sampling.max_tokens` (TRL: `max_completion_length`).
    - `mask_truncated_completions`: a completion that the token limit cut off is not trained on (DAPO), though its
      reward still counts in its group's baseline.
    - `importance_sampling_mode`, `importance_sampling_clip_min` and `_max`: weights for a sampler that differs from the
      trainer (TRL's `vllm_importance_sampling_*`); None for no correction.
    """

    loss_type: LossType = "grpo"
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
    dr_grpo_length: int | None = field(default=None, metadata={"hashed_as": "max_completion_length"})
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
            dr_grpo_length=(
                self.loss_type != "dr_grpo" or (self.dr_grpo_length or 0) > 0,
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
            **{f.name: (getattr(self, f.name) > 0, "positive") for f in fields_named(self, "sapo_", "vespo_")},
        )
        return {**ranges, **{name: (False, why) for name, why in self._unread()}}

    def set_for_ratios(self) -> list[str]:
        """The fields that are set and act on importance ratios alone: where these are all 1, nothing comes of them."""
        names = ["delta", *(f.name for f in fields_named(self, "sapo_", "vespo_"))]
        if self.loss_type != "cispo":  # whose bound is a weight of every token where it is below 1
            names += ["epsilon", "epsilon_high"]
        if not self.use_bias_correction_kl:
            names.append("importance_sampling_level")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _unread(self) -> Iterable[tuple[str, str]]:
        """The fields that were set though nothing reads them, and what they must be instead."""
        clipped = self.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
        of_type = dict(
            epsilon=clipped or (self.loss_type == "cispo" and self.epsilon_high is None),
            epsilon_high=clipped or self.loss_type == "cispo",
            delta=clipped,
            importance_sampling_level=self.loss_type not in ("vespo", "reinforce"),
            dr_grpo_length=self.loss_type == "dr_grpo",
            **{f.name: f.name.startswith(self.loss_type) for f in fields_named(self, "sapo_", "vespo_")},
        )
        needs_beta = ("kl_estimator", "use_bias_correction_kl", "sync_ref_model")
        needs = {
            **{name: (read, f"loss_type {self.loss_type!r} does not read it") for name, read in of_type.items()},
            **{name: (self.beta > 0, "there is no reference policy without beta") for name in needs_beta},
            **{
                f.name: (self.sync_ref_model, "it is read with sync_ref_model alone")
                for f in fields_named(self, "ref_model_")
            },
            **{
                f.name: (self.importance_sampling_mode is not None, "it is read with importance_sampling_mode alone")
                for f in fields_named(self, "importance_sampling_clip_")
            },
        }
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, (read, why) in needs.items():
            if not read and getattr(self, name) != defaults[name]:
                yield name, f"left at {defaults[name]!r}, since {why}"


@dataclass(frozen=True)
class SFTConfig(Checked):
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
class RFTConfig(Checked):
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
class PreferenceConfig(Checked):
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
class DPOConfig(Checked):
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
class RewardModelConfig(Checked):
    """The Bradley-Terry loss of a reward model; see `grpo_jax.losses.preference.bradley_terry_loss`."""

    center_rewards_coefficient: float = 0.0

    def _ranges(self) -> Ranges:
        return dict(center_rewards_coefficient=(self.center_rewards_coefficient >= 0, "0 (off) or above"))


@dataclass(frozen=True)
class PPOConfig(Checked):
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
