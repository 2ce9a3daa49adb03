"""What every method reads: the policy, sampling, the optimizer, rewards, evaluation."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from grpo_jax.experiment.checked import Checked, Ranges

# Of a field that came after the first runs: at its default it does not count in a run's name, so that they are found.
ADDED_LATER = {"added_later": True}
# A field that a run's record has and its name does not count, because nothing follows from it.
NOT_IN_NAMES = {"not_in_names": True}
# The name of a model on the hub, such as Qwen/Qwen3-0.6B. A directory may look the same.
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
OnFailure = Literal["raise", "retry", "drop"]


@dataclass(frozen=True)
class ScratchConfig(Checked):
    """A from-scratch policy with one token per character of `alphabet` (plus begin, end and pad)."""

    alphabet: str = "abcdefghijklmnopqrstuvwxyz"
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4

    @property
    def num_parameters(self) -> int:
        """About how many parameters such a policy has."""
        return 12 * self.num_layers * self.hidden_size**2 + len(self.alphabet) * self.hidden_size

    def _ranges(self) -> Ranges:
        return dict(
            alphabet=(
                len(set(self.alphabet)) == len(self.alphabet) > 0 and not _has_surrogates(self.alphabet),
                "a non-empty string of distinct characters",
            ),
            hidden_size=(
                self.hidden_size > 0 and self.num_parameters <= 10**10,
                "positive, and with num_layers not so large that there are more than 10**10 parameters",
            ),
            num_layers=(self.num_layers > 0, "positive"),
            num_heads=(
                self.num_heads > 0 and self.hidden_size % (2 * self.num_heads) == 0,
                f"a number that divides hidden_size = {self.hidden_size} into heads of even size",
            ),
        )


def _has_surrogates(text: str) -> bool:
    """Whether a text has half of a pair of UTF-16, which no file can hold."""
    return any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True)
class LoRAConfig(Checked):
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
class PolicyConfig(Checked):
    """Where the policy's weights come from and which of them are trained.

    `source` is a Hugging Face directory or hub name, a `.gguf` file, `package:NAME` for a Python package that holds
    one, the directory of an earlier run, or `scratch`. Without `lora` all parameters are trained.

    `revision` is the branch, tag or commit of a model on the hub; None for its main branch. A run records the commit
    that it has loaded, and loads that one again when it is resumed or evaluated.

    `perturbation` multiplies every trained weight at the start by 1 + perturbation · z, with z from a standard normal
    that the seed names. 1e-6 changes little more than rounding does: a result that it turns over hangs on the last
    digit.
    """

    source: str = "scratch"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRAConfig | None = None
    scratch: ScratchConfig = ScratchConfig()
    perturbation: float = field(default=0.0, metadata=ADDED_LATER)
    revision: str | None = field(default=None, metadata=ADDED_LATER)

    def _ranges(self) -> Ranges:
        on_hub = HUB_NAME.fullmatch(self.source) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", self.revision or "")
        return dict(
            source=(bool(self.source), "a non-empty string"),
            revision=(
                self.revision is None or on_hub is not None,
                "a branch, tag or commit of a model on the hub, with source a name such as 'Qwen/Qwen3-0.6B'",
            ),
            perturbation=(0 <= self.perturbation < 1, "in [0, 1)"),
        )


@dataclass(frozen=True)
class SamplingConfig(Checked):
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
class OptimizerConfig(Checked):
    """AdamW after clipping by global norm. Weight decay spares norms and biases.

    An update whose gradient is not finite is skipped; `max_skipped_updates` of them in a row end the run.
    """

    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    max_skipped_updates: int = field(default=10, metadata=ADDED_LATER)

    def _ranges(self) -> Ranges:
        return dict(
            learning_rate=(self.learning_rate >= 0, "0 or above"),
            warmup_steps=(self.warmup_steps >= 0, "0 or above"),
            weight_decay=(self.weight_decay >= 0, "0 or above"),
            b1=(0 <= self.b1 < 1, "in [0, 1)"),
            b2=(0 <= self.b2 < 1, "in [0, 1)"),
            eps=(self.eps > 0, "positive"),
            max_grad_norm=(self.max_grad_norm is None or self.max_grad_norm > 0, "positive, or None for no clipping"),
            max_skipped_updates=(self.max_skipped_updates > 0, "positive"),
        )


@dataclass(frozen=True)
class RewardConfig(Checked):
    """How several rewards become one, and what happens when one of them fails.

    `combine`: the weighted `sum`, or `normalize_then_sum` (each reward standardised within its group first; GDPO, with
    `advantages.scale="whiten"`).
    `on_failure` covers an exception, a time-out, a NaN and a wrong length: `raise` ends the run, `retry` tries
    `retries` times and then raises, `drop` masks the completions out of their groups; past the share
    `max_failure_rate` of a step's completions a dropping run stops. `time_limit` is in seconds, per call.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    combine: Literal["sum", "normalize_then_sum"] = "sum"
    on_failure: OnFailure = "raise"
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
class EvaluationConfig(Checked):
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


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """Which of a run's checkpoints remain: all that one of these three fields asks for.

    `last` is how many of the newest. `best` is how many of the best by `metric`, which is the name of an evaluation's
    metric in metrics.jsonl, such as `evaluation/success` or `evaluation/train/reward`; the larger, the better, and of
    equal ones the earlier. Then every evaluation that is one of the best so far is saved, whatever `checkpoint_every`
    says. `every` keeps the checkpoint of each step that it divides, and saves it; 0 for none.
    """

    last: int = 2
    best: int = 0
    metric: str = "evaluation/success"
    every: int = 0

    def _ranges(self) -> Ranges:
        return dict(
            last=(self.last > 0, "positive: a run goes on from its newest checkpoint"),
            best=(self.best >= 0, "0 (none) or above"),
            metric=(
                self.metric.startswith("evaluation/"),
                "the name of an evaluation's metric, such as 'evaluation/success'",
            ),
            every=(self.every >= 0, "0 (none) or above"),
        )


@dataclass(frozen=True)
class GuardConfig(Checked):
    """What a run does when its training goes wrong: `grpo_jax.guards` has the rules.

    A *spike* is an update whose `spike_metric` is above `spike_factor` times the median of the last `spike_window`
    steps (None: no such rule). The gradient norm is the one before clipping. `on_spike` says what follows: `skip` the
    update; `rollback` to the last checkpoint's policy and optimizer, and go on with the next step's prompts; `warn`; or
    `stop` before the update.

    A policy has *collapsed* when, for `patience` steps in a row, its `entropy` is below `min_entropy` nats per token,
    one text is more than the share `max_most_common_ratio` of a step's completions, or (`watch_signal`) no group has
    rewards that differ, though the policy is not always right. `on_collapse` says whether to `warn` or to `stop`.
    """

    spike_factor: float | None = None
    spike_metric: Literal["grad_norm", "loss"] = "grad_norm"
    spike_window: int = 20
    on_spike: Literal["skip", "rollback", "warn", "stop"] = "skip"
    min_entropy: float | None = None
    max_most_common_ratio: float | None = None
    watch_signal: bool = True
    patience: int = 20
    on_collapse: Literal["warn", "stop"] = "warn"

    def _ranges(self) -> Ranges:
        ratio = self.max_most_common_ratio
        return dict(
            spike_factor=(self.spike_factor is None or self.spike_factor > 1, "above 1, or None for no rule"),
            spike_window=(0 < self.spike_window <= 10**4, "between 1 and 10000 steps"),
            min_entropy=(self.min_entropy is None or self.min_entropy > 0, "positive, or None for no rule"),
            max_most_common_ratio=(ratio is None or 0 < ratio < 1, "above 0 and below 1, or None for no rule"),
            patience=(self.patience > 0, "positive"),
        )

    def inert(self) -> Iterator[tuple[str, str]]:
        """The fields that were set though no rule reads them, and why not."""
        default = GuardConfig()
        if self.spike_factor is None:
            for name in ("spike_metric", "spike_window", "on_spike"):
                if getattr(self, name) != getattr(default, name):
                    yield f"guards.{name}", "it is read with guards.spike_factor alone"
        if not self.watch_signal and self.min_entropy is None and self.max_most_common_ratio is None:
            for name in ("patience", "on_collapse"):
                if getattr(self, name) != getattr(default, name):
                    yield f"guards.{name}", "no rule about a collapse is on"
