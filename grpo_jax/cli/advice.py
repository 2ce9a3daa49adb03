"""Which method: `advise`."""

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

from tyro.conf import arg

from grpo_jax.cli import common
from grpo_jax.cli.common import OptionalInt, app
from grpo_jax.errors import UserError

YesNo = Annotated[Literal["yes", "no"] | None, arg(help_behavior_hint="")]


@app.command
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
    """Say which method fits a task, why, and which experiment to start from. What is not said is asked.

    Args:
        verifiable: Can a program say how good an answer is?
        labels: What has been labelled: answers to imitate, or comparisons of two answers.
        num_labels: How many labels there are.
        reasoning: Do answers get better when the policy thinks before it answers?
        solves_some: Is the policy right at least now and then, when it is sampled a dozen times?
    """
    from grpo_jax.cli.which_method import QUESTIONS, Situation
    from grpo_jax.cli.which_method import advise as advice_for

    given = {
        "verifiable": verifiable, "labels": labels, "num_labels": num_labels, "reasoning": reasoning,
        "solves_some": solves_some,
    }  # fmt: skip
    if given["labels"] == "none":
        given["num_labels"] = given["num_labels"] or 0
    for name, (question, choices) in QUESTIONS.items():
        if given[name] is None and not (name == "num_labels" and given["labels"] == "none"):
            given[name] = _ask(name, question, choices)
    answers = {name: value == "yes" if value in ("yes", "no") else value for name, value in given.items()}
    advice = advice_for(Situation(**{**answers, "num_labels": int(given["num_labels"] or 0)}))
    print(f"method   {', then '.join(advice.methods) or 'none yet'}")
    print(f"why      {advice.why}")
    if advice.experiment:
        first = advice.methods[0]
        chosen = "" if advice.experiment != "experiments/methods/backwards.py" else f" --set method={first}"
        print(f"start    {common.command()} train {advice.experiment}{chosen}")


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
