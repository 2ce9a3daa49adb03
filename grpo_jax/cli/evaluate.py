"""`grpo-jax evaluate`: scores a policy on held-out prompts, alone or against another one."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Assignments, Flag, Inline, OptionalFloat, OptionalInt, OptionalPath, OptionalStep
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment
from grpo_jax.text import on_line


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        num_prompts: How many prompts of the split.
        num_samples: Completions of each prompt; with several, pass@k is estimated.
        temperature: Sampling temperature; 0 is greedy.
        split: The prompts of which split.
        warm_start: Of an experiment, where it takes its warm start from: a run or a sweep that has finished the same
            one. Default: it is trained in a temporary place.
        against: Another run or experiment to compare with: same prompts, same sampling noise, paired by prompt.
        as_json: Print one JSON object and nothing else.
    """

    assignments: Assignments = ()
    num_prompts: OptionalInt = None
    num_samples: OptionalInt = None
    temperature: OptionalFloat = None
    split: Literal["held_out", "train"] = "held_out"
    step: OptionalStep = None
    warm_start: OptionalPath = None
    against: Annotated[Path | None, arg(metavar="RUN_OR_EXPERIMENT", help_behavior_hint="")] = None
    as_json: Annotated[Flag, arg(name="json")] = False

    def overrides(self) -> list[str]:
        """Everything that changes a field of the experiment, as assignments."""
        given = {"num_prompts": self.num_prompts, "num_samples": self.num_samples, "temperature": self.temperature}
        evaluation = [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]
        return common.join(self.assignments) + evaluation


def evaluate(
    source: Annotated[Positional[Path], arg(metavar="RUN_OR_EXPERIMENT", help="A run, or an experiment's file.")],
    /,
    *,
    options: Annotated[Options, Inline],
) -> None:
    """Score a run's tuned policy, or the policy that an experiment starts from, on the held-out prompts.

    An experiment with a warm start starts from that: see --warm-start.
    """
    common.require_run_for_step(source, options.step)
    config, against = common.load_source(source, options.overrides()), options.against

    if options.warm_start is not None and (common.is_run(source) or config.warm_start is None):
        raise UserError(f"--warm-start is for an experiment that has a warm start, and {str(source)!r} has none.")
    compared = [(source, config)]
    if against is not None:
        # Its own task and sampling, but evaluated in the same way and with the same noise, so that prompts are pairs.
        own = dataclasses.replace(common.load_source(against), evaluation=config.evaluation, seed=config.seed)
        _require_same_prompts(source, config, against, own, options.split)
        compared.append((against, own))

    common.prepare_jax()
    from grpo_jax import api

    results, starts = [], []
    for at, one in compared:
        if common.is_run(at):
            policy = common.tuned_policy(at, options.step if at is source else None)
        else:
            policy, start = api.start_of(one, warm_start=options.warm_start, quiet=options.as_json)
            starts.append(f"{at} starts from {start}.")
        results.append(api.evaluate(policy, one, split=options.split))
    result, other = results[0], results[1] if against is not None else None
    if options.as_json:
        _print_json(source, result, against, other, starts)
    else:
        _print_table(source, result, against, other)
        for sentence in starts:
            print(on_line(sentence))


def _require_same_prompts(source: Path, config: Experiment, against: Path, own: Experiment, split: str) -> None:
    """Raises `UserError` if two experiments do not ask the same, so that their outcomes are no pairs."""
    num = config.evaluation.num_prompts
    asked, others = ([dict(example) for example in getattr(one.task, split)[:num]] for one in (config, own))
    if asked != others:
        raise UserError(
            f"{str(source)!r} and {str(against)!r} are evaluated on different examples (tasks {config.task.name!r} and "
            f"{own.task.name!r}), so they cannot be compared example by example."
        )


def _difference(result: Any, other: Any) -> Any:
    """The paired difference in success of two evaluations on the same prompts; a prompt's samples are a cluster."""
    import numpy

    from grpo_jax.statistics import question_difference

    outcomes = [numpy.reshape([r["success"] for r in e.records], (-1, e.num_samples)) for e in (result, other)]
    if result.temperature == 0:  # greedy samples of a prompt are copies of one
        outcomes = [each[:, :1] for each in outcomes]
    return question_difference(outcomes[0], outcomes[1])


def _population(result: Any) -> tuple[str, str]:
    """What the pairs of a comparison are, and what the comparison is about."""
    from grpo_jax.statistics import FEW_QUESTIONS

    if result.num_prompts >= FEW_QUESTIONS or result.temperature == 0:
        return "prompts", "over prompts like these"
    these = "this prompt" if result.num_prompts == 1 else f"these {result.num_prompts} prompts"
    return "samples", f"over samples of {these}, not over other prompts"


def _print_json(source: Path, result: Any, against: Path | None, other: Any, starts: Sequence[str]) -> None:
    from grpo_jax.runs.files import jsonable

    found = {"source": source, **result.to_dict(), **({"starts": starts} if starts else {})}
    if other is not None:
        found["against"] = {"source": against, **other.to_dict()}
        found["difference"] = {**dataclasses.asdict(_difference(result, other)), "about": _population(result)[1]}
    print(json.dumps(jsonable(found)))


def _print_table(source: Path, result: Any, against: Path | None, other: Any) -> None:
    from rich.console import Console

    from grpo_jax.runs.display import summary_table

    console = Console(highlight=False)
    console.print(summary_table({str(source): result} | ({} if other is None else {str(against): other})))
    if result.num_samples > 1:
        console.print(
            "   ".join(f"pass@{k} {value:.1%}" for k, value in sorted(result.pass_at_k.items())), soft_wrap=True
        )
    if other is not None:
        print(on_line(_comparison(result, other, str(against))))


def _comparison(result: Any, other: Any, name: str) -> str:
    """A sentence on the difference in success to the policy called `name`."""
    from grpo_jax.statistics import verdict

    found, (unit, population) = _difference(result, other), _population(result)
    test = "McNemar" if result.temperature == 0 or result.num_samples == 1 or unit == "samples" else "sign-flip"
    value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
    p = "< .001" if found.p_value < 0.001 else f"= {found.p_value:.2g}"
    said = verdict(found, unit=unit).replace("the baseline", name)
    return f"difference in success {value} points [{low}, {high}], {test} p {p}: {said} ({population})"
