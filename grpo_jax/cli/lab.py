"""Many runs, and rewards before any run: `sweep`, `table`, `rewards`, `report`."""

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Assignments, Flag, OptionalInt, OptionalPath, app
from grpo_jax.errors import UserError
from grpo_jax.experiment import Budget, load, load_ablation, load_run

AblationFile = Annotated[Positional[Path], arg(metavar="ABLATION.py", help="A file that defines `ablation`.")]
OptionalBudget = Annotated[Budget | None, arg(help_behavior_hint="")]


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
    common.prepare_jax()
    from grpo_jax import sweep

    directory = directory or Path("runs") / ablation.stem
    sweep.sweep(ablation, planned, directory, jobs=jobs, vectorize=vectorize)
    again = shlex.join([common.command(), "table", str(ablation), "--dir", str(directory)])
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
    from grpo_jax.statistics import tables

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
    overrides = common.join(assignments)
    config = load_run(source, overrides) if source.is_dir() else load(source, overrides)
    run_dir = run_dir or Path("runs") / f"rewards-{source.resolve().stem}-{datetime.now():%Y%m%d-%H%M%S}"

    common.prepare_jax()
    from rich.console import Console

    from grpo_jax import training
    from grpo_jax.reward_lab import groups
    from grpo_jax.reward_lab import study as reward_study
    from grpo_jax.runs import log as logs

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
    from grpo_jax.report import page as pages

    directory = Path("runs") / source.stem if source.suffix == ".py" else source
    print(pages.report(directory, output))
    if pictures:
        for path in pages.draw(directory):
            print(path)
