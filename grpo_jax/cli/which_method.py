"""Which method? The questions that decide it, and the answer with its reason and the experiment to start from.

The chart, read from the top; the first line that holds decides:

    answers can be checked by a program, and the policy is right now and then    grpo
    answers can be checked by a program, but the policy is never right:
        there are demonstrations                                                 sft, then grpo
        there are none                                                           make the task easier first
    there are comparisons (which of two answers is better):
        new completions can be sampled in training, and there are thousands      reward_model, then ppo or grpo
        otherwise                                                                dpo
    there are demonstrations                                                     sft
    neither                                                                      collect one of them first

It says what the literature and `experiments/methods/` make likely, not what is certain: the comparison is one command.
"""

from dataclasses import dataclass
from typing import Literal

Labels = Literal["none", "demonstrations", "comparisons", "both"]


@dataclass(frozen=True)
class Situation:
    """What is known about a task.

    Attributes:
      verifiable: whether a program can say how good an answer is.
      labels: what people (or a better model) have labelled: answers to imitate, comparisons of two answers.
      num_labels: how many of them there are.
      reasoning: whether answers get better when the policy thinks before it answers.
      solves_some: whether the policy, sampled a dozen times, is right at least now and then.
    """

    verifiable: bool
    labels: Labels = "none"
    num_labels: int = 0
    reasoning: bool = False
    solves_some: bool = True


@dataclass(frozen=True)
class Advice:
    """Methods in the order in which to run them, why, and the experiment's file to start from (None: none fits)."""

    methods: tuple[str, ...]
    why: str
    experiment: str | None


QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "verifiable": ("Can a program say how good an answer is?", ("yes", "no")),
    "labels": ("What has been labelled?", ("none", "demonstrations", "comparisons", "both")),
    "num_labels": ("How many labels are there?", ()),
    "reasoning": ("Do answers get better when the policy thinks before it answers?", ("yes", "no")),
    "solves_some": ("Sampled a dozen times, is the policy right at least now and then?", ("yes", "no")),
}
"""The questions by field of `Situation`, with the answers to choose from (none: a number)."""

ENOUGH_COMPARISONS = 5_000  # a rule of thumb: below it, optimising a reward model soon finds its mistakes


def advise(situation: Situation) -> Advice:
    """The method for a situation, by the chart above."""
    s = situation
    demonstrated, compared = s.labels in ("demonstrations", "both"), s.labels in ("comparisons", "both")
    if s.verifiable and s.solves_some:
        thinking = " It also discovers how to reason, which no demonstration has to show." if s.reasoning else ""
        return Advice(
            ("grpo",),
            "a program can score answers and the policy is sometimes right, so groups of its own answers have a signal "
            f"and nothing needs labels or a critic.{thinking}",
            "experiments/quickstart.py",
        )
    if s.verifiable and demonstrated:
        return Advice(
            ("sft", "grpo"),
            "a program can score answers but the policy is never right, so every group would have equal rewards: "
            "imitate the demonstrations until some samples succeed, then go on from the reward.",
            "experiments/wordle/pound.py",
        )
    if compared:
        if s.num_labels >= ENOUGH_COMPARISONS:
            return Advice(
                ("reward_model", "ppo"),
                f"{s.num_labels} comparisons can train a reward model that also judges answers nobody has compared, "
                "and the policy can then be trained on its own samples; `dpo` on the same pairs is the cheaper rival.",
                "experiments/methods/backwards.py",
            )
        return Advice(
            ("dpo",),
            f"{s.num_labels} comparisons are too few for a reward model that withstands being optimised; DPO learns "
            "from them directly, without sampling.",
            "experiments/methods/backwards.py",
        )
    if s.verifiable:
        return Advice(
            (),
            "a program can score answers but the policy is never right and there is nothing to imitate: give partial "
            "credit, start with easier examples, or write some demonstrations.",
            None,
        )
    if demonstrated:
        caveat = " Let them show the reasoning as well." if s.reasoning else ""
        return Advice(
            ("sft",),
            f"there are {s.num_labels} answers to imitate and no way to say how good another one is.{caveat}",
            "experiments/methods/backwards.py",
        )
    return Advice((), "nothing says which answers are good: write a check, demonstrations, or comparisons first.", None)
