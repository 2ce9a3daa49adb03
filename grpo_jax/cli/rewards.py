"""`grpo-jax rewards`: compares and attacks reward functions before any training."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Assignments, Inline, OptionalFile, OptionalInt, OptionalPath
from grpo_jax.errors import UserError
from grpo_jax.experiment import code_folder
from grpo_jax.text import on_line


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        others: Further reward functions to compare. Their modules may be in the folder of the experiment.
        completions: Saved completions (JSON lines, such as a run's completions.jsonl) instead of sampled ones.
        temperatures: Sampling temperatures. Default: the experiment's. Those of the first are the honest attempts.
        num_prompts: How many training prompts.
        num_groups: How many groups of each prompt. Default: enough for 32 groups in total.
        attack_budget: How many completions the search for an exploit may score, for each reward; 0 for no attacks.
        show: How many groups of each temperature are printed.
        run_dir: Where the results go. Default: runs/rewards-EXPERIMENT-DATE-TIME.
    """

    assignments: Assignments = ()
    others: Annotated[tuple[str, ...], arg(name="rewards", metavar="MODULE:FUNCTION", help_behavior_hint="")] = ()
    completions: OptionalFile = None
    temperatures: Annotated[tuple[float, ...], arg(metavar="T", help_behavior_hint="")] = ()
    num_prompts: int = 8
    num_groups: OptionalInt = None
    attack_budget: int = 20_000
    show: int = 1
    run_dir: OptionalPath = None

    def require_valid(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        counts = (self.num_prompts, self.num_groups or 1)
        if min(counts) < 1 or min(self.attack_budget, self.show, *self.temperatures) < 0:
            raise UserError(
                "--num-prompts and --num-groups must be positive; budget, temperatures and --show 0 or above."
            )


def rewards(
    source: Annotated[Positional[Path], arg(metavar="EXPERIMENT_OR_RUN", help="An experiment's file, or a run.")],
    /,
    *,
    options: Annotated[Options, Inline],
) -> None:
    """Score groups of completions under several rewards at once, before any training, and attack each reward."""
    options.require_valid()
    overrides = common.join(options.assignments)
    config = common.load_source(source, overrides)
    is_run = source.is_dir()
    run_dir = options.run_dir or Path("runs") / f"rewards-{source.resolve().stem}-{datetime.now():%Y%m%d-%H%M%S}"

    common.prepare_jax()
    from rich.console import Console

    from grpo_jax import training
    from grpo_jax.reward_lab import groups
    from grpo_jax.reward_lab import study as reward_study
    from grpo_jax.rollout import make_actor
    from grpo_jax.runs.log import RunLog
    from grpo_jax.runs.restore import restore_policy, source_policy
    from grpo_jax.sharding import Replicas

    extra = groups.import_rewards(options.others, code_folder(source) if is_run else source.parent)
    with RunLog(run_dir, config, source=None if is_run else source, overrides=overrides) as log:
        if options.completions is not None:
            policy = source_policy(config)
            sets = [groups.read_groups(options.completions, config, policy.require_tokenizer())]
        else:
            policy = restore_policy(source) if is_run else training.starting_policy(config, log)
            num_prompts = min(options.num_prompts, len(config.task.train))
            log.note(f"sampling groups of {config.group_size} for {num_prompts} prompts")
            sets = groups.sample_groups(
                make_actor(policy, Replicas()),
                config,
                temperatures=options.temperatures or (config.sampling.temperature,),
                num_prompts=num_prompts,
                num_groups=options.num_groups or -(-32 // num_prompts),
            )
        log.note("scoring and attacking")
        found = reward_study.study(sets, config, policy.require_tokenizer(), extra, budget=options.attack_budget)
        written = reward_study.save(found, run_dir)
    reward_study.show(found, Console(highlight=False), num_groups=options.show)
    for path in written:
        print(on_line(str(path)))
