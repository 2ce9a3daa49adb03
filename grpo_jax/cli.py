"""The command `grpo-jax`. JAX is imported inside the commands, so that help and mistakes in a config cost no time.

Exit status: 0 for success, 1 for a run that failed, 2 for a mistake in the usage or a config, 130 for Ctrl-C.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Budget, Experiment, load, load_ablation, load_run

Assignments = Annotated[
    UseAppendAction[tuple[tuple[str, ...], ...]],
    arg(
        name="set",
        metavar="FIELD=VALUE …",
        help="Overrides of the experiment's fields, e.g. loss.beta=0.04.",
        help_behavior_hint="",
    ),
]
Run = Annotated[Positional[Path], arg(metavar="RUN", help="The directory of a run.")]
OptionalPath = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="T", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]

AblationFile = Annotated[Positional[Path], arg(metavar="ABLATION.py", help="A file that defines `ablation`.")]
OptionalBudget = Annotated[Budget | None, arg(help_behavior_hint="")]

app = tyro.extras.SubcommandApp()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status; a `UserError` is one sentence on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a run
    try:
        app.cli(
            prog="grpo-jax",
            description="Fine-tune language models with GRPO in pure JAX.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except UserError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


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
    overrides = _join(assignments)
    config = load(experiment, overrides)
    if resume and (run_dir is None or not (run_dir / "run.json").is_file()):
        raise UserError("--resume needs the directory of the run to go on with: --run-dir DIR, with a run.json in it.")
    run_dir = run_dir or Path("runs") / f"{experiment.stem}-{datetime.now():%Y%m%d-%H%M%S}"

    _prepare_jax()
    from grpo_jax import training
    from grpo_jax.analysis.plots import learning_curve

    try:
        result = training.train(config, run_dir, source=experiment, overrides=overrides, resume=resume, quiet=quiet)
    except KeyboardInterrupt:
        if (run_dir / "run.json").is_file():
            again = shlex.join([_command(), "train", str(experiment), "--run-dir", str(run_dir), "--resume"])
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
    as_json: Annotated[Flag, arg(name="json")] = False,
) -> None:
    """Score a run's tuned policy, or the policy that an experiment starts from, on the held-out prompts.

    Args:
        num_prompts: How many prompts of the split.
        num_samples: Completions of each prompt; with several, pass@k is estimated.
        temperature: 0 is greedy.
        split: Which prompts.
        as_json: Print one JSON object and nothing else.
    """
    overrides = _join(assignments)
    given = {"num_prompts": num_prompts, "num_samples": num_samples, "temperature": temperature}
    overrides += [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]
    config = load_run(source, overrides) if source.is_dir() else load(source, overrides)

    _prepare_jax()
    from rich.console import Console

    from grpo_jax import evaluation, logs, policy, training

    if source.is_dir():
        _, tuned = training.restore(source)
    else:
        settings = config.policy
        tuned = policy.load(settings.source, dtype=settings.dtype, seed=config.seed, scratch=settings.scratch)
    result = evaluation.evaluate(tuned, config, split)
    if as_json:
        print(json.dumps(logs.jsonable({"source": source, **result.to_dict()})))
        return
    console = Console(highlight=False)
    console.print(logs.summary_table({str(source): result}))
    if result.num_samples > 1:
        console.print(
            "   ".join(f"pass@{k} {value:.1%}" for k, value in sorted(result.pass_at_k.items())), soft_wrap=True
        )


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
    _prepare_jax()
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
            print(f"{number}: {_printable(completion)}" if num > 1 else _printable(completion))

    if prompt is not None:
        answer(prompt, seed)
        return
    while text := _read_line():
        answer(text, seed)
        seed += 1


@app.command
def export(run: Run, directory: Annotated[Positional[Path], arg(metavar="DIR", help="A new directory.")], /) -> None:
    """Write a run's tuned policy, adapters merged, as a Hugging Face checkpoint directory."""
    _require_run(run)
    _prepare_jax()
    from grpo_jax import policy, training

    _, tuned = training.restore(run)
    policy.export(tuned, directory)
    print(directory)


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
    from grpo_jax.advice import QUESTIONS, Situation
    from grpo_jax.advice import advise as advice_for

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
        chosen = "" if advice.experiment != "experiments/methods/pound.py" else f" --set method={first}"
        print(f"start    {_command()} train {advice.experiment}{chosen}")


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


@app.command
def sweep(
    ablation: AblationFile,
    /,
    *,
    jobs: int = 1,
    directory: Annotated[OptionalPath, arg(name="dir")] = None,
    budget: OptionalBudget = None,
    vectorize: Flag = False,
) -> None:
    """Run every arm of an ablation at every seed; the same command goes on with what is not finished.

    Args:
        jobs: How many runs at a time, each in a process of its own.
        directory: Where the runs' directories go. Default: runs/ABLATION.
        budget: Hold the arms to equal steps or equal sampled tokens, instead of what the file says.
        vectorize: Train all seeds of an arm in one compiled program (policies from scratch, rewards with a JAX form).
    """
    planned = load_ablation(ablation, budget)
    _prepare_jax()
    from grpo_jax import sweep

    directory = directory or Path("runs") / ablation.stem
    sweep.sweep(ablation, planned, directory, jobs=jobs, vectorize=vectorize)
    again = shlex.join([_command(), "table", str(ablation), "--dir", str(directory)])
    print(f"compare the arms  {again}" + (f" --budget {budget}" if budget else ""))


@app.command
def table(
    ablation: AblationFile,
    /,
    *,
    directory: Annotated[OptionalPath, arg(name="dir")] = None,
    budget: OptionalBudget = None,
    layout: Annotated[Literal["md", "csv", "latex"], arg(name="format")] = "md",
    allow_mixed: Flag = False,
) -> None:
    """Compare the arms of an ablation, seed by seed, from the runs that `grpo-jax sweep` made.

    Args:
        directory: Where the runs' directories are. Default: runs/ABLATION.
        budget: The budget that the sweep was given, if it was given one.
        layout: Markdown, comma-separated values, or LaTeX for the package booktabs.
        allow_mixed: Compare runs of different commits or data all the same.
    """
    from grpo_jax.analysis import tables

    planned = load_ablation(ablation, budget)
    directory = directory or Path("runs") / ablation.stem
    command = ["grpo-jax", "sweep", str(ablation), "--dir", str(directory), *(["--budget", budget] if budget else [])]
    found = tables.collect(planned, directory, command=shlex.join(command), allow_mixed=allow_mixed)
    print(tables.render(found, layout), end="")


@app.command
def rewards(
    source: Annotated[Positional[Path], arg(metavar="EXPERIMENT_OR_RUN", help="An experiment's file, or a run.")],
    /,
    *,
    assignments: Assignments = (),
    others: Annotated[tuple[str, ...], arg(name="rewards", metavar="MODULE:FUNCTION", help_behavior_hint="")] = (),
    completions: OptionalPath = None,
    temperatures: Annotated[tuple[float, ...], arg(metavar="T", help_behavior_hint="")] = (),
    num_prompts: int = 8,
    num_groups: OptionalInt = None,
    attack_budget: int = 20_000,
    show: int = 1,
    run_dir: OptionalPath = None,
) -> None:
    """Score groups of completions under several rewards at once, before any training, and attack each reward.

    Args:
        others: Further reward functions to compare; their modules may lie beside the experiment.
        completions: Saved completions (JSON lines, such as a run's completions.jsonl) instead of sampled ones.
        temperatures: Where to sample. Default: the experiment's own. Honest attempts are those of the first.
        num_prompts: How many training prompts.
        num_groups: Groups of each prompt. Default: as many as make 32 groups in all.
        attack_budget: How many completions the search for a blind answer scores for each reward; 0 attacks nothing.
        show: How many groups of each set are printed.
        run_dir: Where the figures go. Default: runs/rewards-EXPERIMENT-DATE-TIME.
    """
    if min(num_prompts, num_groups or 1) < 1 or min(attack_budget, show) < 0 or min(temperatures, default=0) < 0:
        raise UserError("--num-prompts and --num-groups must be positive; budget, temperatures and --show 0 or above.")
    overrides = _join(assignments)
    config = load_run(source, overrides) if source.is_dir() else load(source, overrides)
    run_dir = run_dir or Path("runs") / f"rewards-{source.resolve().stem}-{datetime.now():%Y%m%d-%H%M%S}"

    _prepare_jax()
    from rich.console import Console

    from grpo_jax import logs, training
    from grpo_jax.analysis import groups, reward_study

    extra = groups.import_rewards(others, source if source.is_dir() else source.parent)
    with logs.RunLog(run_dir, config, source=None if source.is_dir() else source, overrides=overrides) as log:
        if completions is not None:
            policy = training.source_policy(config)
            sets = [groups.read_groups(completions, config, policy.require_tokenizer())]
        else:
            policy = training.restore(source)[1] if source.is_dir() else training.starting_policy(config, log)
            num_prompts = min(num_prompts, len(config.task.train))
            log.note(f"sampling groups of {config.group_size} for {num_prompts} prompts")
            sets = groups.sample_groups(
                policy,
                config,
                temperatures=temperatures or (config.sampling.temperature,),
                num_prompts=num_prompts,
                num_groups=num_groups or -(-32 // num_prompts),
            )
        log.note("scoring and attacking")
        found = reward_study.study(sets, config, policy.require_tokenizer(), extra, budget=attack_budget)
        written = reward_study.save(found, run_dir)
    reward_study.show(found, Console(highlight=False), num_groups=show)
    for path in written:
        print(path)


@app.command
def report(
    source: Annotated[
        Positional[Path],
        arg(metavar="RUN_OR_ABLATION", help="The directory of a run or a sweep, or an ablation's file."),
    ],
    /,
    *,
    output: OptionalPath = None,
    pictures: Flag = False,
) -> None:
    """Write one self-contained HTML page about a run or an ablation.

    Args:
        output: Where the page goes. Default: report.html in the directory, which is runs/ABLATION for a file.
        pictures: Also draw its plots as PNG files, in the directory.
    """
    from grpo_jax.analysis import report as pages

    directory = Path("runs") / source.stem if source.suffix == ".py" else source
    print(pages.report(directory, output))
    if pictures:
        for path in pages.draw(directory):
            print(path)


def _report(config: Experiment, result: Any, picture: Path) -> None:
    """Prints what a training run came to, and the commands to go on."""
    from rich.console import Console

    from grpo_jax.logs import group_table, summary_table

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
    print(f"evaluate it     {_command()} evaluate {run}")
    print(f"talk to it      {_command()} sample {run} --prompt {_example_prompt(config.task.train[0]['prompt'])}")


def _command() -> str:
    """How to call this command again: in an environment that is not activated, by its path."""
    return "grpo-jax" if shutil.which("grpo-jax") else os.path.relpath(sys.argv[0])


def _example_prompt(prompt: str | Sequence[Mapping[str, str]]) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return shlex.quote(text) if len(text) < 60 and text.isprintable() else '"…"'


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _require_run(directory: Path) -> None:
    if not (directory / "run.json").is_file():
        raise UserError(f"{str(directory)!r} is not the directory of a run: there is no run.json in it.")


def _join(assignments: Sequence[Sequence[str]]) -> list[str]:
    return [assignment for group in assignments for assignment in group]


def _printable(text: str) -> str:
    """What a model says may reach the terminal, its escape sequences may not; newlines stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _prepare_jax() -> None:
    """Sets what JAX and transformers read when they are imported; what the user has set stays.

    JAX's persistent compilation cache is on, so that a second run starts in seconds.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "grpo_jax", "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # that there is no PyTorch is as it should be
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn at every process that a reward starts


if __name__ == "__main__":
    sys.exit(main())
