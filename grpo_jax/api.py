"""The functions of `import grpo_jax`: train, evaluate, sample, and read a run.

The commands `grpo-jax train`, `evaluate` and `sample` do the same with the same functions. JAX is imported when one of
them is called, so that `import grpo_jax` takes no time.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo_jax import experiment as configs
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, NotWhileLoading, SamplingConfig, load, source_of, sources
from grpo_jax.runs.run import Run

if TYPE_CHECKING:
    from grpo_jax.evaluation import Evaluation
    from grpo_jax.policy import Policy
    from grpo_jax.rollout import Actor, Generator
    from grpo_jax.runs.result import Result

Source = Run | str | Path
"""A run: as `load_run` returns it, or its directory."""


def train(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    callbacks: Sequence[Any] = (),
    resume: bool = False,
    quiet: bool = False,
    make_generator: "Callable[[Actor], Generator] | None" = None,
) -> "Result":
    """Runs an experiment: its warm start, the training itself, and its control.

    The run's directory is that of a run of `grpo-jax train`: all commands can read it. Of an experiment that a file or
    a script declares, it holds copies of the user's code, so that it can be evaluated later. Of one that a notebook
    declares it holds the config alone; to evaluate it, pass the experiment again.

    Called by a file that a command is loading for its experiment, it trains nothing and ends the loading.

    Args:
      run_dir: a new directory; with `resume`, that of the run to go on with.
      callbacks: objects with any of the methods of `Callback`, which are told of steps and evaluations.
      resume: go on from the run's last checkpoint; begin if there is none. Of a run that has finished with this very
        experiment nothing is done or written, and no callback is told: what it came to is read from its directory,
        without the records of its evaluations and without the groups.
      quiet: show no progress.
      make_generator: what samples completions, from the policy as it is: by default the policy itself.

    Raises:
      UserError: for what the config or the task gets wrong. RunError: when the run fails (a reward, a callback, a full
        disk, a broken log-probability contract). KeyboardInterrupt: on Ctrl-C, after the step under way was saved; on
        SIGTERM `Terminated`, which ends a script with the status 143.
    """
    if sources.is_loading_me():
        raise NotWhileLoading(experiment)
    from grpo_jax import training
    from grpo_jax.runs.log import RunLog, display_of
    from grpo_jax.runs.result import read_result

    display = display_of(experiment, quiet=quiet)
    if resume and (run := _run_of(run_dir)) is not None and run.is_done(experiment):
        display.note(f"{run_dir} is finished: there is nothing to do")
        return read_result(run)
    log = RunLog(
        run_dir,
        experiment,
        source=source_of(experiment),
        overrides=None,
        resume=resume,
        display=display,
        callbacks=callbacks,
    )
    return training.run(experiment, log) if make_generator is None else training.run(experiment, log, make_generator)


def evaluate(
    source: "Source | Experiment | Policy",
    experiment: Experiment | None = None,
    *,
    split: Literal["held_out", "train"] = "held_out",
    num_prompts: int | None = None,
    num_samples: int | None = None,
    temperature: float | None = None,
) -> "Evaluation":
    """Scores a policy on a split of a task: success and reward, with 95 % intervals.

    Args:
      source: a run, whose tuned policy is scored; an experiment or its file, of which the policy is scored that its
        training begins with (a warm start is trained for it); or a policy.
      experiment: what it is scored on. Needed for a policy, and for a run whose own experiment is in no file.
      num_prompts, num_samples, temperature: instead of those of `experiment.evaluation`; temperature 0 is greedy.

    Raises:
      UserError: if the run's experiment cannot be loaded and none is given, or if a number is out of range.
    """
    if isinstance(source, (Experiment, str, Path, Run)):
        experiment = experiment or _experiment_of(source)
    elif experiment is None:
        raise UserError("evaluate(policy) needs to know on what: evaluate(policy, experiment).")
    given: dict[str, Any] = {"num_prompts": num_prompts, "num_samples": num_samples, "temperature": temperature}
    how = replace(experiment.evaluation, **{name: value for name, value in given.items() if value is not None})
    from grpo_jax import evaluation

    return evaluation.evaluate(_policy_of(source), replace(experiment, evaluation=how), split)


def sample(
    source: "Source | Policy",
    prompts: "str | Sequence[Any]",
    *,
    num_samples: int = 1,
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    plain: bool = False,
) -> list[list[str]]:
    """Completions of prompts: `num_samples` texts for each.

    Args:
      source: a run; a policy; or where one is, as `PolicyConfig.source` names it.
      prompts: a prompt or several, each a text or the messages of a chat.
      temperature, max_tokens: those of the run's training by default, else 1 and 128, as far as the policy's context
        has room after each prompt; temperature 0 is greedy.
      seed: names the sampling noise.
      plain: give the policy the text alone. By default, a policy that was trained on chats gets a text as a question,
        with the turns that stand around the question in the run's first training prompt, such as worked examples.
    """
    from grpo_jax import rollout

    run = _run_of(source)
    policy = _policy_of(source)
    example = None if run is None else run.first_prompt
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    asked = [ask(policy, prompt, example, plain=plain) if isinstance(prompt, str) else prompt for prompt in given]
    how = sampling_for(
        policy, asked, None if run is None else run.sampling, temperature=temperature, max_tokens=max_tokens
    )
    return rollout.sample_text(policy, asked, how, num_samples=num_samples, seed=seed)


def room(policy: "Policy", prompt: Any) -> int:
    """How many tokens a policy's context has left after a prompt."""
    return policy.config.max_positions - len(policy.require_tokenizer().render(prompt))


def sampling_for(
    policy: "Policy",
    prompts: Sequence[Any],
    training: SamplingConfig | None = None,
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> SamplingConfig:
    """How prompts are answered: as it is said, else as in training, as far as the context has room after each prompt.

    Args:
      training: how the policy's training sampled; None where that is not known: then at temperature 1, 128 tokens.
    """
    training = SamplingConfig(max_tokens=128) if training is None else training
    if max_tokens is None:
        max_tokens = max(min([training.max_tokens, *(room(policy, prompt) for prompt in prompts)]), 1)
    return SamplingConfig(
        temperature=training.temperature if temperature is None else temperature, max_tokens=max_tokens
    )


def ask(policy: "Policy", text: str, first_prompt: Any = None, *, plain: bool = False) -> Any:
    """The prompt for a text: a chat for a policy that knows chats, or the text itself.

    Args:
      first_prompt: the first prompt of the policy's training, where it is known: its turns around the question stand
        around this one too, if it is a chat.
      plain: without those turns.
    """
    user = {"role": "user", "content": text}
    if not isinstance(first_prompt, list):
        is_chat = first_prompt is None and policy.require_tokenizer().has_chat_template
        return [user] if is_chat else text
    questions = [i for i, message in enumerate(first_prompt) if message["role"] == "user"]
    if plain or not questions:
        return [user]
    # What stands behind the question is the beginning of the assistant's turn, which the policy goes on with.
    return [*first_prompt[: questions[-1]], user, *first_prompt[questions[-1] + 1 :]]


def start_of(experiment: Experiment, *, warm_start: Path | None = None, quiet: bool = True) -> "tuple[Policy, str]":
    """The policy that an experiment's training begins with, and where it came from: the end of a sentence.

    Args:
      warm_start: a run or a sweep that has finished the same warm start; None to train it in a temporary place.
      quiet: show no progress of that.
    """
    from grpo_jax.runs.restore import restore_policy, source_policy

    if experiment.warm_start is None:
        name = "a policy from scratch" if experiment.policy.source == "scratch" else experiment.policy.source
        return source_policy(experiment), name
    if warm_start is not None:
        from grpo_jax.sweep.warm_starts import find_warm_start

        found = find_warm_start(experiment, warm_start)
        return restore_policy(found), f"the warm start in {found}"

    from grpo_jax import training
    from grpo_jax.runs.log import RunLog, display_of

    display = display_of(experiment, title="start", quiet=quiet)
    with (
        tempfile.TemporaryDirectory() as place,
        RunLog(Path(place) / "start", experiment, source=source_of(experiment), display=display) as log,
    ):
        policy = training.starting_policy(experiment, log)
        return policy, "its warm start, which was trained for this in a temporary place"


def load_run(run_dir: str | Path) -> Run:
    """A run's directory, to read: its config, metrics, evaluations, completions, summary, status and policy.

    Raises:
      UserError: if the directory holds no run.
    """
    return Run(run_dir)


def _run_of(source: Any) -> Run | None:
    """The run that a source names, if it names one."""
    if isinstance(source, (str, Path)):
        return Run(source) if (Path(source) / "run.json").is_file() else None
    return source if isinstance(source, Run) else None


def _experiment_of(source: Any) -> Experiment:
    """The experiment that a source names."""
    if isinstance(source, Experiment):
        return source
    if isinstance(source, Run):
        return source.experiment
    return configs.load_run(source) if Path(source).is_dir() else load(source)


def _policy_of(source: Any) -> Any:
    """The policy that a source names: a run's tuned one, or the one that an experiment starts from."""
    from grpo_jax import policy
    from grpo_jax.runs import restore

    if isinstance(source, Run):
        return source.policy
    if isinstance(source, Experiment):
        return start_of(source)[0]
    if not isinstance(source, (str, Path)):
        return source
    if (Path(source) / "run.json").is_file():
        return restore.restore_policy(source)
    return start_of(load(source))[0] if Path(source).suffix == ".py" else policy.load(str(source))
