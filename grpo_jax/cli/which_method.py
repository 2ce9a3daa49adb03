"""The command `advise`: which method fits a task, why, and which experiment to start from.

`CHART` is the whole decision. It is read from the top: the first line whose condition holds gives the advice. The same
lines are printed in docs/which_method.md. They say what the literature and `experiments/methods/` make likely, not what
is certain; `scripts/compare_methods.py` measures it for a given experiment.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from grpo_jax.cli import common
from grpo_jax.cli.common import OptionalInt
from grpo_jax.errors import UserError

ENOUGH_COMPARISONS = 5_000  # a rule of thumb: with fewer, optimising a reward model soon exploits its mistakes
METHODS = "experiments/methods/backwards.py"  # the experiment that every method can train


@dataclass(frozen=True)
class Situation:
    """What is known about a task.

    Attributes:
      verifiable: whether a program can say how good an answer is.
      labels: what people (or a better model) have labelled: answers to imitate, comparisons of two answers.
      num_labels: how many of them there are; of `both`, how many comparisons. With 0 of them there are none.
      reasoning: whether answers get better when the policy thinks before it answers.
      solves_some: whether the policy is right at least now and then, when it is sampled a dozen times.
    """

    verifiable: bool
    labels: Literal["none", "demonstrations", "comparisons", "both"] = "none"
    num_labels: int = 0
    reasoning: bool = False
    solves_some: bool = True

    @property
    def has_demonstrations(self) -> bool:
        return self.labels == "both" or (self.labels == "demonstrations" and self.num_labels > 0)

    @property
    def has_comparisons(self) -> bool:
        return self.labels in ("comparisons", "both") and self.num_labels > 0


@dataclass(frozen=True)
class Line:
    """One line of the chart.

    Attributes:
      condition, holds: when the line applies, in words and as a function.
      methods: what to run, in this order; empty if no method fits yet.
      why: the reason; `{num_labels}` stands for that field of the situation.
      experiment: the file to start from; None if no method fits yet.
      if_reasoning: added to the reason where thinking before answering helps.
    """

    condition: str
    holds: Callable[[Situation], bool]
    methods: tuple[str, ...]
    why: str
    experiment: str | None = None
    if_reasoning: str = ""


CHART = (
    Line(
        "A program can score answers, and the policy is sometimes right",
        lambda s: s.verifiable and s.solves_some,
        ("grpo",),
        "a program can score answers and the policy is sometimes right, so its own answers earn different rewards. "
        "Neither labels nor a critic are needed.",
        "experiments/quickstart.py",
        if_reasoning=" GRPO also discovers how to reason; no demonstration has to show it.",
    ),
    Line(
        "A program can score answers, and there are demonstrations",
        lambda s: s.verifiable and s.has_demonstrations,
        ("sft", "grpo"),
        "a program can score answers but the policy is never right, so all answers of a group would earn the same: "
        "imitate the demonstrations until some samples succeed, then train on the reward.",
        "experiments/wordle/pound.py",
    ),
    Line(
        "A program can score answers",
        lambda s: s.verifiable,
        (),
        "a program can score answers but the policy is never right, and there are no right answers to imitate. Make "
        "the task easier first: give partial credit, start with easier examples, or collect some demonstrations. "
        "Right answers among compared ones are demonstrations too.",
    ),
    Line(
        f"There are at least {ENOUGH_COMPARISONS:,} comparisons of two answers",
        lambda s: s.has_comparisons and s.num_labels >= ENOUGH_COMPARISONS,
        ("reward_model", "ppo"),
        "{num_labels} comparisons can train a reward model, which also judges answers that nobody has compared. The "
        "policy is then trained on its own samples, with `ppo` or with `grpo`. `dpo` on the same pairs is cheaper.",
        METHODS,
    ),
    Line(
        "There are fewer comparisons",
        lambda s: s.has_comparisons,
        ("dpo",),
        "{num_labels} comparisons are too few for a reward model that can be optimised against. DPO learns from them "
        "directly, without sampling.",
        METHODS,
    ),
    Line(
        "There are demonstrations",
        lambda s: s.has_demonstrations,
        ("sft",),
        "there are answers to imitate, and nothing says how good any other answer is.",
        METHODS,
        if_reasoning=" The demonstrations should show the reasoning as well.",
    ),
    Line(
        "Otherwise",
        lambda s: True,
        (),
        "nothing says which answers are good: write a check, demonstrations or comparisons first.",
    ),
)

QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "verifiable": ("Can a program say how good an answer is?", ("yes", "no")),
    "labels": ("What has been labelled?", ("none", "demonstrations", "comparisons", "both")),
    "num_labels": ("How many labels are there (of both: how many comparisons)?", ()),
    "reasoning": ("Do answers get better when the policy thinks before it answers?", ("yes", "no")),
    "solves_some": ("Sampled a dozen times, is the policy right at least now and then?", ("yes", "no")),
}
"""The questions by field of `Situation`, with the answers to choose from (none: a number)."""

YesNo = Annotated[Literal["yes", "no"] | None, arg(help_behavior_hint="")]


def line_for(situation: Situation) -> Line:
    """The first line of the chart that holds for a situation."""
    return next(line for line in CHART if line.holds(situation))


def advise(
    *,
    verifiable: YesNo = None,
    labels: Annotated[
        Literal["none", "demonstrations", "comparisons", "both"] | None, arg(help_behavior_hint="")
    ] = None,
    num_labels: OptionalInt = None,
    reasoning: YesNo = None,
    solves_some: YesNo = None,
) -> None:
    """Say which method fits a task, why, and which experiment to start from. Asks for what no option says.

    Args:
        verifiable: Can a program say how good an answer is?
        labels: What has been labelled: answers to imitate, or comparisons of two answers.
        num_labels: How many labels there are; of both, how many comparisons.
        reasoning: Do answers get better when the policy thinks before it answers?
        solves_some: Is the policy right at least now and then, when it is sampled a dozen times?
    """
    given: dict[str, Any] = {
        "verifiable": verifiable, "labels": labels, "num_labels": num_labels, "reasoning": reasoning,
        "solves_some": solves_some,
    }  # fmt: skip
    for name, (question, choices) in QUESTIONS.items():
        if name == "num_labels" and given["labels"] == "none":
            given[name] = 0
        elif given[name] is None:
            given[name] = _ask(name, question, choices)
    answers = {name: value == "yes" if value in ("yes", "no") else value for name, value in given.items()}
    situation = Situation(**{**answers, "num_labels": int(answers["num_labels"])})
    line = line_for(situation)
    why = line.why + line.if_reasoning * situation.reasoning
    print(f"method   {', then '.join(line.methods) or 'none yet'}")
    print(f"why      {why.format(**dataclasses.asdict(situation))}")
    if line.experiment:
        chosen = f" --set method={line.methods[0]}" if line.experiment == METHODS else ""
        print(f"start    {common.command()} train {line.experiment}{chosen}")


def _ask(name: str, question: str, choices: Sequence[str]) -> str:
    """The answer to a question, asked until it is one of the choices (a number where there are none)."""
    option = f"--{name.replace('_', '-')}"
    if not sys.stdin.isatty():
        raise UserError(f"there is no terminal to ask on: say {option} {'|'.join(choices) or 'N'}.")
    while True:
        try:
            answer = input(f"{question} [{'/'.join(choices) or 'a number'}] ").strip().lower()
        except EOFError:
            raise UserError(f"the question was not answered: say {option} {'|'.join(choices) or 'N'}.") from None
        if answer in choices or (not choices and answer.isdigit()):
            return answer
