"""An experiment from its beginning to its end: the warm start, the training itself, and the control."""

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax

from grpo_jax.errors import RunError
from grpo_jax.evaluation import Evaluation
from grpo_jax.experiment import Experiment, variant_of
from grpo_jax.memory import out_of_memory_explained, require_memory_for_scratch
from grpo_jax.policy import Policy
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.runs.restore import source_policy
from grpo_jax.runs.result import Result, summarize
from grpo_jax.runs.signals import terminable
from grpo_jax.training.trainer import OWN_SAMPLER, MakeGenerator, Trainer


def train(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    source: Path | None = None,
    overrides: Iterable[str] = (),
    resume: bool = False,
    quiet: bool = False,
    make_generator: MakeGenerator = OWN_SAMPLER,
) -> Result:
    """Runs an experiment: its warm start, the training itself, and its control, each with a run directory.

    Args:
      run_dir: where everything is written; with `resume`, the run that is continued.
      source, overrides: the experiment's file and the assignments that changed it, for the record.
      make_generator: what samples completions, from the policy as it is: by default the policy itself.

    Raises:
      UserError: for what the config or the task gets wrong. RunError: when the run fails (a reward, a full disk, a
        broken log-probability contract). KeyboardInterrupt: on Ctrl-C, after the step under way has been saved
        (`Terminated`, one of these, on SIGTERM).
    """
    display = display_of(experiment, quiet=quiet)
    log = RunLog(run_dir, experiment, source=source, overrides=overrides, resume=resume, display=display)
    return run(experiment, log, make_generator)


def run(experiment: Experiment, log: RunLog, make_generator: MakeGenerator = OWN_SAMPLER) -> Result:
    """The same with a log of the caller's own, which says where it is written, who is told, and whether it goes on."""
    began = time.monotonic()
    run_dir, resume, quiet = log.run_dir, log.resume, log.display.quiet
    with terminable(), log, out_of_memory_explained() as plans:
        start = starting_policy(experiment, log, resume=resume)
        trainer = Trainer(experiment, start, log, make_generator)
        # The trainer has copied what it trains. Only a control needs the start again, and the host holds it until then.
        start = replace(start, params={} if experiment.control is None else jax.device_get(start.params))
        plans.append(trainer.plan)
        before, group_before = trainer.evaluate(0), trainer.sample_group()
        done = trainer.fit(resume=resume)
        # A callback that stops the run at an evaluation has it evaluated already.
        stopped_at, last = trainer.last_evaluation
        after = last if log.stop is not None and stopped_at == done else trainer.evaluate(done)
        group_after = trainer.sample_group()
        control: dict[str, Evaluation] = {}
        if experiment.control is not None:
            variant, control_dir = variant_of(experiment, experiment.control), run_dir / "control"
            display = display_of(variant, title="control", quiet=quiet)
            with RunLog(control_dir, variant, resume=True, display=display) as control_log:
                control_log.starts_from(start.commit)
                other = Trainer(variant, start, control_log, make_generator)
                if log.stop is not None:  # as many steps as the run itself made
                    other.last_step = min(done, variant.num_steps)
                control = other.evaluate(other.fit(resume=True))
        seconds = time.monotonic() - began
        result = Result(run_dir, trainer.policy(), before, after, control, group_before, group_after, seconds, log.stop)
        log.summary(summarize(result, experiment), result)
    return result


def starting_policy(experiment: Experiment, log: RunLog, *, resume: bool = False) -> Policy:
    """The policy that the training begins with: the config's source, trained by the warm start where there is one."""
    if experiment.warm_start is None:
        if experiment.policy.source != "scratch":
            log.note(f"loading {experiment.policy.source}")
        require_memory_for_scratch(experiment)
        policy = source_policy(experiment, log.policy_commit)
    else:
        variant, warm_dir = variant_of(experiment, experiment.warm_start), log.run_dir / "warm_start"
        display = display_of(variant, title="warm start", quiet=log.display.quiet)
        with RunLog(warm_dir, variant, resume=resume, display=display) as warm_log:
            trainer = Trainer(variant, starting_policy(variant, warm_log, resume=resume), warm_log)
            trainer.fit(resume=resume)
        if warm_log.stop is not None:
            raise RunError(f"the warm start was stopped: {warm_log.stop.reason}")
        policy = trainer.policy()
    log.starts_from(policy.commit)
    return policy
