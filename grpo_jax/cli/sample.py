"""`grpo-jax sample`: prints what a policy answers, in one turn or in several."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from grpo_jax.cli import common
from grpo_jax.cli.common import Flag, Inline, OptionalFloat, OptionalInt, OptionalStep, OptionalText
from grpo_jax.errors import UserError, printable
from grpo_jax.experiment import SamplingConfig, load_run
from grpo_jax.experiment.files import is_code_allowed
from grpo_jax.tasks import Example, Task

Replies = Literal["environment", "person", "nobody"]
MAX_TURNS = 8  # of a conversation, where no task says how many
LOOKED_AT = 256  # completions of a run that are looked at to find out whether its task has several turns


@dataclass(frozen=True)
class Options:
    """The options of the command.

    Attributes:
        prompt: The prompt; it may be empty. Without it, a run whose task has several turns plays an example of its
            task, and otherwise prompts are read from the terminal until an empty line.
        example: Ask the task's held-out prompt of this number, counted from 0.
        num: How many completions, or games. Default: 4, and 1 if a person replies.
        temperature: Sampling temperature; 0 is greedy. Default: that of the run's training, else 1.
        max_tokens: The most tokens of a turn. Default: that of the run's training, else 128.
        seed: The seed of the sampling noise.
        plain: Give the policy the prompt alone. By default, a run that was trained on chats also gets the turns that
            stand around the question in its first training prompt, such as worked examples.
        replies: Who answers the policy's turns: the task's environment, a person (you), or nobody. Default: the
            environment, if the task has one and the prompt is one of the task's.
        turns: The most turns of the policy. Default: the task's; with a person and no such task, 8.
    """

    prompt: OptionalText = None
    example: OptionalInt = None
    num: OptionalInt = None
    temperature: OptionalFloat = None
    max_tokens: OptionalInt = None
    seed: int = 0
    plain: Flag = False
    step: OptionalStep = None
    replies: Annotated[Replies | None, arg(help_behavior_hint="")] = None
    turns: OptionalInt = None

    def require_possible(self, source: str) -> None:
        """Raises `UserError` for options that contradict each other or the source."""
        common.require_run_for_step(source, self.step)
        if self.prompt is not None and self.example is not None:
            raise UserError("--prompt and --example both say what is asked: give one of them.")
        if not common.is_run(source) and (self.example is not None or self.replies == "environment"):
            option = "--replies environment" if self.example is None else "--example"
            raise UserError(f"{option} needs a task, and {source!r} is not the directory of a run.")
        if self.replies == "person" and (self.num or 1) > 1:
            raise UserError(f"--num {self.num} is for games with an environment: a person answers one at a time.")
        if self.turns is not None and self.turns < 1:
            raise UserError(f"--turns {self.turns} is out of range: it must be positive.")


@dataclass(frozen=True)
class _Speaker:
    """A policy and how it is asked: `sampling` and `first_prompt` are those of its training, None where not known."""

    policy: Any
    sampling: SamplingConfig | None
    first_prompt: Any
    options: Options

    def asked(self, text: str) -> Any:
        """The prompt for a text: a chat with the turns around the question in training, or the text itself."""
        from grpo_jax import api

        return api.ask(self.policy, text, self.first_prompt, plain=self.options.plain)

    def how(self, prompt: Any) -> SamplingConfig:
        """How a prompt is answered: as the options say, or as in training, as far as the context allows."""
        from grpo_jax import api

        options = self.options
        return api.sampling_for(
            self.policy, [prompt], self.sampling, temperature=options.temperature, max_tokens=options.max_tokens
        )

    def print_answers(self, prompt: Any, seed: int) -> None:
        """Prints completions of one turn."""
        from grpo_jax import rollout

        num = 4 if self.options.num is None else self.options.num
        [completions] = rollout.sample_text(self.policy, [prompt], self.how(prompt), num_samples=num, seed=seed)
        for number, completion in enumerate(completions, 1):
            print(f"{number}: {printable(completion)}" if num > 1 else printable(completion))

    def print_games(self, task: Task, example: Example) -> None:
        """Prints episodes of an example, in which the task's environment answers."""
        from grpo_jax import rollout

        num = 4 if self.options.num is None else self.options.num
        game = replace(task, train=[example], max_turns=self.options.turns or task.max_turns)
        how = self.how(example["prompt"])
        [episodes] = rollout.sample_episodes(self.policy, game, how, num_samples=num, seed=self.options.seed)
        for number, episode in enumerate(episodes, 1):
            head = f"{number}: " if num > 1 else ""
            for place, line in enumerate(_transcript(episode.turns, episode.replies)):
                print(f"{head if place == 0 else ' ' * len(head)}{line}")

    def read_reply(self) -> str | None:
        """What a person replies; None for an empty line. What the policy's tokenizer cannot read is asked again."""
        while text := _read_line("user: "):
            if not sys.stdin.isatty():
                print(printable(text))  # so that the transcript is whole where nobody has typed
            try:
                self.policy.require_tokenizer().reply(text)
            except UserError as error:
                print(printable(str(error)), file=sys.stderr)
            else:
                return text
        return None

    def talk(self, prompt: Any, task: Task | None) -> None:
        """Prints the policy's turns as they come, and reads the answers of a person, until an empty line."""
        from grpo_jax import api, rollout

        how, printed = self.how(prompt), 0

        def reply(_: Example, turns: Sequence[str]) -> str | None:
            nonlocal printed
            print(*_transcript(turns[-1:]), sep="\n", flush=True)
            printed = len(turns)
            return self.read_reply()

        fitting = max(api.room(self.policy, prompt) // how.max_tokens, 1)
        turns = self.options.turns or min(task.max_turns if task else MAX_TURNS, fitting)
        game = Task("the conversation", [{"prompt": prompt}], [], lambda **_: [], reply=reply, max_turns=turns)
        [[episode]] = rollout.sample_episodes(
            self.policy, game, how, num_samples=1, seed=self.options.seed, time_limit=None
        )
        for line in _transcript(episode.turns[printed:]):
            print(line)


def sample(
    source: Annotated[Positional[str], arg(metavar="RUN_OR_POLICY", help="A run, or any source of a policy.")],
    /,
    *,
    options: Annotated[Options, Inline],
) -> None:
    """Sample completions of a prompt from a run's tuned policy, or from any other policy; of games, whole games."""
    options.require_possible(source)
    task, example = _task_of(Path(source), options)
    if options.prompt is None and example is None and not sys.stdin.isatty():
        raise UserError("there is no terminal to read prompts from: say --prompt TEXT.")
    replies = options.replies or _replies_by_default(task, example)
    if replies == "environment":
        _require_environment(task, example)
    common.prepare_jax()
    speaker = _speaker(source, options)
    if replies == "environment":
        assert task is not None and example is not None
        speaker.print_games(task, example)
        return
    if task is not None and example is None and options.replies is None:
        print(
            "The prompt is none of the task's, so its environment cannot answer: this is the first turn alone. "
            "With --replies person you answer.",
            file=sys.stderr,
        )
    text = options.prompt
    if text is None and example is None and replies == "person":
        text = _read_line("user: ")
    if replies == "person":
        speaker.talk(example["prompt"] if example is not None else speaker.asked(text or ""), task)
    elif example is not None or text is not None:
        speaker.print_answers(example["prompt"] if example is not None else speaker.asked(text or ""), options.seed)
    else:
        seed = options.seed
        while text := _read_line("> "):
            speaker.print_answers(speaker.asked(text), seed)
            seed += 1


def _task_of(run_dir: Path, options: Options) -> tuple[Task | None, Example | None]:
    """The task of a run and the example that is asked, each None where there is none or it is not needed.

    The user's code is run only if an example is asked for, or if the run's task has several turns.
    """
    if not common.is_run(run_dir):
        return None, None
    wanted = options.example is not None or options.replies == "environment"
    if not wanted and not _has_several_turns(run_dir):
        return None, None
    if not wanted and options.replies == "nobody" and options.prompt is not None:
        return None, None
    if not wanted and not is_code_allowed():
        print("--no-code: the task's environment is not run, so this is the first turn alone.", file=sys.stderr)
        return None, None
    task = load_run(run_dir).task
    if options.prompt is not None:
        examples = [*task.held_out, *task.train]
        return task, next((each for each in examples if _question(each["prompt"]) == options.prompt), None)
    number = options.example or 0
    if not 0 <= number < len(task.held_out):
        raise UserError(f"--example {number} is out of range: {task.name} has {len(task.held_out)} held-out prompts.")
    return task, task.held_out[number]


def _replies_by_default(task: Task | None, example: Example | None) -> Replies:
    """The environment where the task has one that knows the example; else nobody."""
    has_environment = task is not None and task.reply is not None and task.max_turns > 1
    return "environment" if has_environment and example is not None else "nobody"


def _require_environment(task: Task | None, example: Example | None) -> None:
    """Raises `UserError` if no environment can answer."""
    assert task is not None
    if task.reply is None:
        raise UserError(f"--replies environment: the task {task.name} has a single turn and no environment.")
    if example is None:
        raise UserError(
            f"--replies environment: the prompt is none of those of {task.name}, so its environment does not know what "
            "to answer. Choose one with --example N, or answer yourself with --replies person."
        )


def _speaker(source: str, options: Options) -> _Speaker:
    """The policy of a run with the settings of its training, or any other policy."""
    from grpo_jax import policy
    from grpo_jax.runs.run import Run

    if not common.is_run(source):
        return _Speaker(policy.load(source), None, None, options)
    run = Run(source)
    return _Speaker(common.tuned_policy(run.run_dir, options.step), run.sampling, run.first_prompt, options)


def _has_several_turns(run_dir: Path) -> bool:
    """Whether an environment has answered in any of a run's first completions."""
    from grpo_jax.runs.files import read_rows

    for row in islice(read_rows(run_dir / "completions.jsonl"), LOOKED_AT):
        completion = row.get("completion")
        if isinstance(completion, list) and any(message["role"] != "assistant" for message in completion):
            return True
    return False


def _question(prompt: Any) -> str:
    """The text of a prompt; of a chat, the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    return next((message.get("content") or "" for message in reversed(prompt) if message["role"] == "user"), "")


def _transcript(turns: Sequence[str], replies: Sequence[str] = ()) -> list[str]:
    """The turns of a game and the replies between them, a line for each, by role."""
    lines = []
    for place, turn in enumerate(turns):
        lines.append(f"assistant: {printable(turn)}")
        if place < len(replies):
            lines.append(f"user: {printable(replies[place])}")
    return lines


def _read_line(mark: str) -> str:
    """A line from the terminal; empty at the end of the input."""
    try:
        return input(mark).strip()
    except EOFError:
        return ""
