"""The groups of completions to score: sampled from a policy, or read from a file. Also reward functions by name."""

import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo_jax.algorithms.batches import schedule
from grpo_jax.errors import UserError, failure_of
from grpo_jax.experiment import Experiment
from grpo_jax.experiment.files import require_code_allowed
from grpo_jax.policy import Tokenizer
from grpo_jax.rewards import RewardFunction, turns
from grpo_jax.rewards.protocol import ARGUMENTS
from grpo_jax.rollout import Generator, encode_prompts, name_noise, plain, rollout
from grpo_jax.runs.files import read_rows
from grpo_jax.tasks import Example, Task

ROW_KEYS = (
    *("step", "prompt_id", "sample", "example", "prompt", "completion", "turns", "tokens", "label"),
    *("rewards", "reward", "advantage", "advantages"),
)
"""The parts of a saved row that are no columns."""


@dataclass(frozen=True)
class Groups:
    """P groups of G completions, the members of a group side by side.

    Attributes:
      label: where they come from, e.g. "temperature 0.7".
      arguments: the keyword arguments of reward functions: lists of P * G entries (see `Rollout.reward_arguments`).
      group_size: G.
      prompts: [P] the number of the prompt of each group; groups of the same prompt have the same number.
    """

    label: str
    arguments: Mapping[str, Sequence[Any]]
    group_size: int
    prompts: Sequence[int]

    def example(self, p: int) -> Example:
        """The example of group p."""
        columns = {key: values for key, values in self.arguments.items() if key not in ARGUMENTS}
        at = p * self.group_size
        return {"prompt": self.arguments["prompts"][at], **{key: values[at] for key, values in columns.items()}}


def sample_groups(
    generator: Generator, experiment: Experiment, *, temperatures: Sequence[float], num_prompts: int, num_groups: int
) -> list[Groups]:
    """Samples `num_groups` groups of each of `num_prompts` training prompts, at every temperature.

    Prompts and sampling noise are those of the first steps of training: at the experiment's own temperature and number
    of prompts, the first group of each prompt is the one that step 0 trains on.
    """
    task, size = experiment.task, experiment.group_size
    num_prompts = min(num_prompts, len(task.train))
    max_tokens = experiment.sampling.max_tokens
    prompts = encode_prompts(task, generator.tokenizer, generator.max_positions, max_tokens)
    indices, ids = schedule(experiment.seed, 0, num_prompts, len(task.train))
    batch = prompts.batch("train", indices)
    found = []
    for temperature in temperatures:
        sampling = replace(experiment.sampling, temperature=temperature)
        arguments: dict[str, list[Any]] = defaultdict(list)
        for group in range(num_groups):
            noise = name_noise(experiment.seed, 0, ids, range(group * size, (group + 1) * size))
            played = rollout(generator, task, batch, noise, sampling, experiment.reward.time_limit)
            for name, values in played.reward_arguments().items():
                arguments[name] += values
        found.append(Groups(f"temperature {temperature:g}", dict(arguments), size, ids * num_groups))
    return found


def read_groups(path: Path, experiment: Experiment, tokenizer: Tokenizer) -> Groups:
    """Reads saved completions, such as a run's `completions.jsonl`: JSON lines with `prompt` and `completion`.

    Rows with the same `step` and `prompt_id` are a group; if they have no `prompt_id`, those with the same step,
    prompt and columns. All groups must have the same size. The columns that rewards need come from the example of the
    task that has the row's prompt; if several have it, from the one that also has the row's `columns` (or columns of
    its own, as files of the first versions have them), its place `example`, or its `prompt_id`.

    Raises:
      UserError: if a row has no prompt or completion, if its example is not known, or if the groups' sizes differ.
    """
    if not path.is_file():
        raise UserError(f"there is no file of completions {str(path)!r}.")
    task = experiment.task
    examples: dict[str, dict[str, Example]] = defaultdict(dict)  # by prompt, each once
    for example in [*task.train, *task.held_out]:
        examples[_key(example["prompt"])][_key(example)] = example
    by_group: dict[Any, list[tuple[Example, Any]]] = defaultdict(list)
    for number, row in enumerate(read_rows(path, of_run=False), 1):
        if not {"prompt", "completion"} <= set(row):
            raise UserError(f"{path}:{number} lacks a prompt or a completion.")
        asked = _key([row["prompt"], row.get("example"), _columns(row)])
        by_group[_key([row.get("step"), row.get("prompt_id", asked)])].append(
            (_example(row, task, examples, f"{path}:{number}"), row["completion"])
        )
    sizes = sorted({len(rows) for rows in by_group.values()})
    if len(sizes) != 1 or sizes[0] < 2:
        raise UserError(
            f"{path} must hold groups of one size, at least 2, but has "
            f"{'no rows' if not sizes else f'groups of {sizes[0]} to {sizes[-1]} completions'}."
        )
    rows = [row for group in by_group.values() for row in group]
    columns = sorted({key for example, _ in rows for key in example} - {"prompt"})
    arguments = {
        "prompts": [example["prompt"] for example, _ in rows],
        "completions": [completion for _, completion in rows],
        "completion_ids": [_ids(completion, tokenizer) for _, completion in rows],
        **{key: [example.get(key) for example, _ in rows] for key in columns},
    }
    # Every group counts as one of its own prompt: the policy may have changed from one step to the next.
    return Groups(path.name, arguments, sizes[0], range(len(by_group)))


def _example(row: Mapping[str, Any], task: Task, examples: Mapping[str, Mapping[str, Example]], where: str) -> Example:
    """The task's example that a saved row belongs to."""
    columns = _columns(row)
    candidates = [
        example
        for example in examples.get(_key(row["prompt"]), {}).values()
        if all(plain(example[key]) == columns[key] for key in columns.keys() & example.keys())
    ]
    # Written by a run; for `prompt_id` see `schedule`.
    place = row["example"] if isinstance(row.get("example"), int) else row.get("prompt_id")
    if len(candidates) > 1 and isinstance(place, int):
        candidates = [task.train[place % len(task.train)]]
    if len(candidates) != 1:
        raise UserError(
            f"{where}: the prompt is that of {len(candidates) or 'no'} examples of {task.name}, so the columns that "
            "the rewards need are not known."
        )
    return candidates[0]


def _columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a saved row; of a file of the first versions, what is no other part of the row."""
    own = {key: value for key, value in row.items() if key not in ROW_KEYS}
    return row["columns"] if isinstance(row.get("columns"), Mapping) else own


def _key(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def _ids(completion: Any, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a saved text, for rewards that count tokens. The sampled ids may have been others."""
    return [i for turn in turns(completion) for i in tokenizer.encode(turn)]


def import_rewards(names: Iterable[str], folder: Path) -> dict[str, RewardFunction]:
    """The functions named `module:function`; a module may be in `folder`. Raises `UserError` if one is not found."""
    found: dict[str, RewardFunction] = {}
    sys.path.insert(0, str(folder.resolve()))
    try:
        for name in names:
            module, colon, function = name.partition(":")
            if not colon:
                raise UserError(f"--rewards {name!r} is not of the form module:function, e.g. rewards:exact.")
            require_code_allowed(module)
            try:
                reward = getattr(importlib.import_module(module), function, None)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # `sys.exit` in the module is a failure too
                raise UserError(f"--rewards {name!r}: {failure_of(error)}") from error
            if not callable(reward):
                raise UserError(f"--rewards {name!r}: the module {module} has no function {function!r}.")
            found[function if function not in found else name] = reward
    finally:
        sys.path.pop(0)
    return found
