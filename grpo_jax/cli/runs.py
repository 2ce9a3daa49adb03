"""One run: `train`, `evaluate`, `sample`, `export`."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import (
    Assignments,
    Flag,
    OptionalFloat,
    OptionalInt,
    OptionalPath,
    OptionalText,
    Run,
    app,
)
from grpo_jax.errors import UserError, printable
from grpo_jax.experiment import Experiment, load, load_run


@app.command
def train(
    experiment: Annotated[Positional[Path], arg(metavar="EXPERIMENT.py", help="A file that defines `config`.")],
    /,
    *,
    assignments: Assignments = (),
    run_dir: OptionalPath = None,
    resume: Flag = False,
    quiet: Flag = False,
) -> None:
    """Train a policy as an experiment says, and show what became of it.

    Args:
        run_dir: Where the run's files go. Default: runs/EXPERIMENT-DATE-TIME.
        resume: Go on with the run in --run-dir from its last checkpoint.
        quiet: Show no progress and no tables, only the run directory.
    """
    overrides = common.join(assignments)
    config = load(experiment, overrides)
    if resume and (run_dir is None or not (run_dir / "run.json").is_file()):
        raise UserError("--resume needs the directory of the run to go on with: --run-dir DIR, with a run.json in it.")
    run_dir = run_dir or Path("runs") / f"{experiment.stem}-{datetime.now():%Y%m%d-%H%M%S}"

    common.prepare_jax()
    from grpo_jax import training
    from grpo_jax.report.plots import learning_curve

    try:
        result = training.train(config, run_dir, source=experiment, overrides=overrides, resume=resume, quiet=quiet)
    except KeyboardInterrupt:
        if (run_dir / "run.json").is_file():
            again = shlex.join([common.command(), "train", str(experiment), "--run-dir", str(run_dir), "--resume"])
            again += "".join(f" --set {shlex.quote(assignment)}" for assignment in overrides)
            print(f"What was learned is saved in {run_dir}; go on with: {again}", file=sys.stderr)
        raise
    picture = learning_curve(run_dir)
    if quiet:
        print(run_dir)
    else:
        _report(config, result, picture)


@app.command
def evaluate(
    source: Annotated[Positional[Path], arg(metavar="RUN_OR_EXPERIMENT", help="A run, or an experiment's file.")],
    /,
    *,
    assignments: Assignments = (),
    num_prompts: OptionalInt = None,
    num_samples: OptionalInt = None,
    temperature: OptionalFloat = None,
    split: Literal["held_out", "train"] = "held_out",
    against: Annotated[Path | None, arg(metavar="RUN_OR_EXPERIMENT", help_behavior_hint="")] = None,
    as_json: Annotated[Flag, arg(name="json")] = False,
) -> None:
    """Score a run's tuned policy, or the policy that an experiment starts from, on the held-out prompts.

    Args:
        num_prompts: How many prompts of the split.
        num_samples: Completions of each prompt; with several, pass@k is estimated.
        temperature: 0 is greedy.
        split: Which prompts.
        against: Another run or experiment, to be asked the same questions with the same noise, and compared in pairs.
        as_json: Print one JSON object and nothing else.
    """
    overrides = common.join(assignments)
    given = {"num_prompts": num_prompts, "num_samples": num_samples, "temperature": temperature}
    overrides += [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]
    config = load_run(source, overrides) if source.is_dir() else load(source, overrides)

    common.prepare_jax()
    from rich.console import Console

    from grpo_jax import evaluation
    from grpo_jax.runs import display, files

    results = {str(source): evaluation.evaluate(_policy_of(source, config), config, split)}
    if against is not None:
        other = load_run(against) if against.is_dir() else load(against)
        results[str(against)] = evaluation.evaluate(_policy_of(against, other), config, split)
    result = results[str(source)]
    if as_json:
        found = {"source": source, **result.to_dict()}
        if against is not None:
            found["against"] = {"source": against, **results[str(against)].to_dict()}
            found["difference"] = dataclasses.asdict(_difference(*results.values()))
        print(json.dumps(files.jsonable(found)))
        return
    console = Console(highlight=False)
    console.print(display.summary_table(results))
    if result.num_samples > 1:
        console.print(
            "   ".join(f"pass@{k} {value:.1%}" for k, value in sorted(result.pass_at_k.items())), soft_wrap=True
        )
    if against is not None:
        from grpo_jax.statistics import verdict

        found = _difference(*results.values())
        test = "McNemar" if result.num_samples == 1 else "sign-flip"
        print(
            f"difference in success {found.value:+.1%} [{found.low:+.1%}, {found.high:+.1%}], {test} p = "
            f"{found.p_value:.2g}: {verdict(found).replace('the baseline', str(against))}"
        )


def _policy_of(source: Path, config: Experiment) -> Any:
    """The tuned policy of a run, or the one that an experiment starts from."""
    from grpo_jax import training

    return training.restore(source)[1] if source.is_dir() else training.source_policy(config)


def _difference(result: Any, other: Any) -> Any:
    """The paired difference in success of two evaluations on the same questions; a question's samples are a cluster."""
    import numpy

    from grpo_jax.statistics import question_difference

    outcomes = [[record["success"] for record in r.records] for r in (result, other)]
    return question_difference(*(numpy.reshape(o, (-1, result.num_samples)) for o in outcomes))


@app.command
def sample(
    source: Annotated[Positional[str], arg(metavar="RUN_OR_POLICY", help="A run, or any source of a policy.")],
    /,
    *,
    prompt: OptionalText = None,
    num: int = 4,
    temperature: OptionalFloat = None,
    max_tokens: OptionalInt = None,
    seed: int = 0,
    plain: Flag = False,
) -> None:
    """Talk to a run's tuned policy, or to any other.

    Args:
        prompt: What to say. Without it, prompts are read from the terminal until an empty line.
        num: How many completions.
        temperature: 0 is greedy. Default: what the run was trained with, else 1.
        max_tokens: The longest completion. Default: what the run was trained with, else 128.
        seed: The seed of the sampling noise.
        plain: Say nothing but the prompt. A run that was trained on chats is otherwise shown the turns that come before
            the question in its first training prompt, such as worked examples.
    """
    if prompt is None and not sys.stdin.isatty():
        raise UserError("there is no terminal to read prompts from: say --prompt TEXT.")
    common.prepare_jax()
    from grpo_jax import policy, rollout, training

    if (Path(source) / "run.json").is_file():
        config, tuned = training.restore(Path(source))
        example, sampling = config.task.train[0]["prompt"], config.sampling
        temperature = sampling.temperature if temperature is None else temperature
        max_tokens = max_tokens or sampling.max_tokens
    else:
        tuned, example = policy.load(source), None
    chat = isinstance(example, list) or (example is None and tuned.require_tokenizer().has_chat_template)
    lead = example[:-1] if isinstance(example, list) and not plain else []

    def answer(text: str, seed: int) -> None:
        asked = [*lead, {"role": "user", "content": text}] if chat else text
        [completions] = rollout.sample_text(
            tuned,
            [asked],
            temperature=1.0 if temperature is None else temperature,
            max_tokens=max_tokens or 128,
            num_samples=num,
            seed=seed,
        )
        for number, completion in enumerate(completions, 1):
            print(f"{number}: {printable(completion)}" if num > 1 else printable(completion))

    if prompt is not None:
        answer(prompt, seed)
        return
    while text := common.read_line():
        answer(text, seed)
        seed += 1


@app.command
def export(run: Run, directory: Annotated[Positional[Path], arg(metavar="DIR", help="A new directory.")], /) -> None:
    """Write a run's tuned policy, adapters merged, as a Hugging Face checkpoint directory."""
    common.require_run(run)
    common.prepare_jax()
    from grpo_jax import policy, training

    _, tuned = training.restore(run)
    policy.export(tuned, directory)
    print(directory)


def _report(config: Experiment, result: Any, picture: Path) -> None:
    """Prints what a training run came to, and the commands to go on."""
    from rich.console import Console

    from grpo_jax.runs.display import group_table, summary_table

    console = Console(highlight=False)
    console.print()
    if result.group_after:
        console.print(group_table({"before": result.group_before, "after": result.group_after}))
    control = f"control ({(config.control or {}).get('method', 'variant')})"
    for split, after in result.after.items():
        console.print(
            summary_table({"before": result.before[split], "after": after, control: result.control.get(split)})
        )
    run = shlex.quote(str(result.run_dir))
    print(f"trained in      {result.seconds:.0f} s")
    print(f"run directory   {run}")
    print(f"learning curve  {shlex.quote(str(picture))}")
    print(f"evaluate it     {common.command()} evaluate {run}")
    print(f"talk to it      {common.command()} sample {run} --prompt {_example_prompt(config.task.train[0]['prompt'])}")


def _example_prompt(prompt: str | Sequence[Mapping[str, str]]) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return shlex.quote(text) if len(text) < 60 and text.isprintable() else '"…"'
