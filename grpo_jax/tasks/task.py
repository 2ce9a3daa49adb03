"""`Task`: what a policy is trained and evaluated on."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Required, TypedDict, Unpack

import grpo_jax.tasks.checks as checks
import grpo_jax.tasks.data as data
from grpo_jax.experiment.configs import NOT_IN_NAMES
from grpo_jax.tasks.data import Columns, MakePrompt

Example = Mapping[str, Any]
"""One prompt, under the key "prompt": a string, or a list of chat messages {"role", "content"}. Every other key is a
column that reward functions receive, e.g. the secret word."""

Success = Callable[..., list[bool]]
Demonstrate = Callable[[Example, random.Random], list[str]]
Reply = Callable[[Example, Sequence[str]], str | None]


class TaskFields(TypedDict, total=False):
    """The fields of a task that data do not hold: see `Task`."""

    name: str
    success: Required[Success]
    demonstrate: Demonstrate | None
    reply: Reply | None
    max_turns: int
    references: Mapping[str, float]


class DatasetFields(TaskFields, total=False):
    """The same, and which part of a dataset is read: see `Task.from_dataset`."""

    config: str | None
    split: str
    revision: str | None


@dataclass(frozen=True)
class Task:
    """A task that a policy is trained and evaluated on.

    Attributes:
      name: the name in logs and tables.
      train: the examples for training.
      held_out: the examples for evaluation only; disjoint from `train` unless the task says otherwise.
      success: the success that evaluation counts. It is called like a reward function and returns one bool per
        completion.
      demonstrate: returns the assistant's turns for an example, one string each, for supervised fine-tuning. None if
        the task has no demonstrations.
      reply: for several turns: returns the environment's next message after the assistant's turns so far, or None if
        the episode is over. A pure function. None for a task of a single turn.
      max_turns: the maximum number of the assistant's turns.
      references: success rates for comparison, e.g. of a player that ignores the feedback and of one that plays well.
      origin: where the examples were read from, for a run's record; None for examples that a program made. The name of
        a run counts the examples and not their origin.
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    success: Success
    demonstrate: Demonstrate | None = None
    reply: Reply | None = None
    max_turns: int = 1
    references: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, Any] | None = field(default=None, metadata=NOT_IN_NAMES)

    def check(self) -> None:
        """Raises `UserError` for a task that cannot be trained on; an experiment calls this when it is made."""
        checks.require_types(self)
        # An ablation makes many experiments of one task, and its examples are looked at once.
        seen = tuple(map(id, (self.train, self.held_out))), len(self.train), len(self.held_out)
        if getattr(self, "_checked", None) != seen:
            checks.check(self)
            object.__setattr__(self, "_checked", seen)

    def warnings(self) -> list[str]:
        """What is probably a mistake, a sentence each: held-out examples that are trained on too."""
        return checks.warnings(self)

    @classmethod
    def from_jsonl(
        cls,
        path: str | PathLike[str],
        *,
        prompt: MakePrompt = "prompt",
        columns: Columns = None,
        held_out: str | PathLike[str] | float = 0.1,
        system: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        **fields: Unpack[TaskFields],
    ) -> "Task":
        """Makes a task from a file with a JSON object in each line.

        A relative path is looked for beside the Python file that calls this, and then in the current directory.

        Args:
          path: the file.
          prompt: the name of a column, a format string such as "Question: {question}", or a function of a row that
            returns a string or chat messages.
          columns: which columns rewards receive: `{"answer": "solution"}` has them receive the data's `solution` as
            `answer`. In place of a column's name there may be a function of a row. A list of names keeps those. By
            default all columns are kept, but the one that `prompt` names.
          held_out: another file for the held-out examples; or how many of the rows are held out, as a fraction or as
            a number. These are chosen by their content and `seed`, so that neither the order of the rows nor the way
            in which the prompt is written matters. Rows that make the same example stay together.
          system: a system message before each prompt, which makes it a chat.
          limit: at most this many rows are read, the first ones; of a held-out file too.
          seed: see `held_out`.
          **fields: the other fields of the task: `success` (needed), `name` (by default the file's), and so on.

        Raises:
          UserError: for a file that is missing or has no rows, a line that is no JSON object, a column that does not
            exist, or a number of held-out rows that is out of range.
        """
        recipe = data.Recipe(prompt, columns, system, limit)
        data.check_fields(fields, known=TaskFields.__annotations__)
        return _make(cls, data.from_file(path, data.read_jsonl, recipe, held_out, seed), fields)

    @classmethod
    def from_parquet(
        cls,
        path: str | PathLike[str],
        *,
        prompt: MakePrompt = "prompt",
        columns: Columns = None,
        held_out: str | PathLike[str] | float = 0.1,
        system: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        **fields: Unpack[TaskFields],
    ) -> "Task":
        """Makes a task from a Parquet file; the arguments are those of `from_jsonl`.

        Raises:
          UserError: as `from_jsonl`, and if the package pyarrow is missing.
        """
        recipe = data.Recipe(prompt, columns, system, limit)
        data.check_fields(fields, known=TaskFields.__annotations__)
        return _make(cls, data.from_file(path, data.read_parquet, recipe, held_out, seed), fields)

    @classmethod
    def from_dataset(
        cls,
        dataset: str | Iterable[Mapping[str, Any]] | Mapping[str, Any],
        *,
        prompt: MakePrompt = "prompt",
        columns: Columns = None,
        held_out: str | float | Iterable[Mapping[str, Any]] = 0.1,
        system: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        **fields: Unpack[DatasetFields],
    ) -> "Task":
        """Makes a task from a dataset of the package `datasets`, from a dataset's name on the hub, or from any rows.

        The other arguments are those of `from_jsonl`. Among `fields` may be, too:

        - `split`: the split for training, "train" by default;
        - `config`: the configuration of a dataset on the hub, such as "main";
        - `revision`: its commit, tag or branch. Without one, the commit that was loaded is printed, to be written here.

        Args:
          dataset: a name on the hub; a dataset; its splits by name (a `DatasetDict`); or rows, such as a list of dicts.
          held_out: the name of another split, a dataset or rows; or a fraction or a number, as for `from_jsonl`.

        Raises:
          UserError: as `from_jsonl`; if there is no such split; for a name, if the package `datasets` is missing or
            cannot load it.
        """
        recipe = data.Recipe(prompt, columns, system, limit)
        data.check_fields(fields, known=DatasetFields.__annotations__)
        where = {key: value for key, value in fields.items() if key in data.WHERE}
        others = {key: value for key, value in fields.items() if key not in where}
        return _make(cls, data.from_dataset(dataset, where, recipe, held_out, seed), others)


def _make(kind: type[Task], loaded: data.Loaded, fields: Mapping[str, Any]) -> Task:
    """A task of the examples that were loaded and the other fields that were given."""
    given = {"name": loaded.name, **fields}
    return kind(train=loaded.train, held_out=loaded.held_out, origin=loaded.origin, **given)


from_dataset = Task.from_dataset

Task.__module__ = "grpo_jax.tasks"  # where it is public; the names of runs, made from it, depend on this
