"""Training that goes wrong, seen in a run's metrics: spikes of the gradient or the loss, and policies that collapse.

What a `Guard` knows are the metrics of the steps so far, which metrics.jsonl has too. A run that is resumed shows it
these rows again, and so decides what the uninterrupted run decides.

A spike is measured against the median of the last steps, which a spike among them hardly moves. OLMo-core's
`SkipStepOptimizer` skips such updates too; it counts standard deviations from a rolling mean of loss and gradient norm.
ZClip (2504.02507) clips them, by an exponential mean. Going back follows PaLM (2204.02311, section 5.1), which began
again from a checkpoint before the spike and left out the batches around it.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from grpo_jax.errors import RunError
from grpo_jax.experiment import Experiment, method_of

ALWAYS_RIGHT = 0.95  # from this share of successes on, groups whose rewards are equal are no sign of a collapse
NO_SIGNAL = "`grpo-jax rewards` shows which reward gives a signal."
MEASURED = {"min_entropy": "entropy", "max_most_common_ratio": "completions/most_common_ratio"}


class Alarm(NamedTuple):
    """What is wrong with the training.

    Attributes:
      step: the step that shows it.
      kind: `update` for one that was not made, `spike`, or the field of a rule about a collapse.
      message: one sentence.
      stopped_by: the field that has the run end after this step; empty for a warning.
    """

    step: int
    kind: str
    message: str
    stopped_by: str = ""


class Guard:
    """Sees the metrics of a run's steps in their order and says what is wrong with them, as `GuardConfig` declares."""

    def __init__(self, experiment: Experiment) -> None:
        self._config = experiment.guards
        self._watches_signal = self._config.watch_signal and method_of(experiment.method).needs_differences(experiment)
        self._recent: deque[float] = deque(maxlen=self._config.spike_window)
        self._in_a_row: Counter[str] = Counter()
        self._told: set[str] = set()

    @property
    def spike_limit(self) -> float | None:
        """Above which gradient norm or loss an update of the next step is a spike; None without such a rule.

        It is infinite until there are `spike_window` steps to compare with.
        """
        factor, window = self._config.spike_factor, self._config.spike_window
        if factor is None:
            return None
        return factor * statistics.median(self._recent) if len(self._recent) == window else math.inf

    def see(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Takes a step's metrics; a warning comes once for each rule, and what ends the run comes every time.

        Raises:
          RunError: if the steps lack the metric of a rule, as those of a method or loss of the user's own may.
        """
        for name, metric in MEASURED.items():
            if getattr(self._config, name) is not None and metric not in metrics:
                raise RunError(f"guards.{name} is set, but the steps of this run do not measure {metric!r}.")
        return self._take(step, metrics)

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Takes the metrics of steps that were made before the run was interrupted, as metrics.jsonl has them."""
        for row in rows:
            self._take(row["step"], row)

    def _take(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        alarms = [*self._spikes(step, metrics), *self._collapses(step, metrics)]
        value = _number(metrics, self._config.spike_metric)
        if 0 < value < math.inf:  # a step without a signal has no gradient, and is nothing to compare with
            self._recent.append(value)
        return alarms

    def _spikes(self, step: int, metrics: Mapping[str, Any]) -> Iterator[Alarm]:
        c = self._config
        if not metrics.get("spiked_updates") or (c.on_spike != "stop" and not self._first("spike")):
            return
        what = "gradient norm" if c.spike_metric == "grad_norm" else "loss"
        then = {
            "skip": "the update was not made",
            "rollback": f"the last {_number(metrics, 'rolled_back'):g} steps were undone",
            "warn": "the update was made all the same",
            "stop": "the update was not made",
        }[c.on_spike]
        yield Alarm(
            step,
            "spike",
            f"step {step}: the {what} was above {_number(metrics, 'spike_limit'):.4g}, {c.spike_factor:g} times the "
            f"median of the {c.spike_window} steps before (guards.spike_factor): {then}.",
            "guards.on_spike" if c.on_spike == "stop" else "",
        )

    def _collapses(self, step: int, metrics: Mapping[str, Any]) -> Iterator[Alarm]:
        c = self._config
        by = "guards.on_collapse" if c.on_collapse == "stop" else ""
        for name, (holds, sentence) in self._rules(metrics).items():
            self._in_a_row[name] = self._in_a_row[name] + 1 if holds else 0
            if self._in_a_row[name] >= c.patience and (by or self._first(name)):
                yield Alarm(step, name, f"step {step}: for {c.patience} steps {sentence}", by)

    def _rules(self, metrics: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
        """For each rule whether it finds a collapse in this step, and what is to be said then."""
        c, rules = self._config, {}
        if c.min_entropy is not None:
            entropy = math.nan if metrics.get("empty_updates") else _number(metrics, MEASURED["min_entropy"])
            rules["min_entropy"] = (
                entropy < c.min_entropy,
                f"the entropy was below guards.min_entropy = {c.min_entropy:g} nats (now {entropy:.3g}): the policy "
                "has collapsed. A smaller learning rate, or a positive loss.entropy_coef or loss.beta, holds it.",
            )
        if c.max_most_common_ratio is not None:
            share = _number(metrics, MEASURED["max_most_common_ratio"])
            rules["max_most_common_ratio"] = (
                share > c.max_most_common_ratio,
                f"one text was more than guards.max_most_common_ratio = {c.max_most_common_ratio:.0%} of a step's "
                f"completions (now {share:.0%}): the policy answers every prompt alike.",
            )
        if self._watches_signal:
            rules["watch_signal"] = (
                _number(metrics, "frac_reward_zero_std") == 1 and not _number(metrics, "success") >= ALWAYS_RIGHT,
                f"no group had rewards that differ, so nothing was learned: {NO_SIGNAL}",
            )
        return rules

    def _first(self, name: str) -> bool:
        """Whether something is to be told for the first time."""
        is_new = name not in self._told
        self._told.add(name)
        return is_new


def _number(metrics: Mapping[str, Any], name: str) -> float:
    """A metric; NaN, which no comparison is true for, where a file has null or nothing."""
    value = metrics.get(name)
    return math.nan if value is None else float(value)
