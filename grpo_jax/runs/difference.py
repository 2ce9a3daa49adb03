"""What two runs differ in, as their files say: config, conditions, metrics, completions, evaluations.

None of the user's code is run for that. `grpo_jax.runs.code_difference` compares the files of the user.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.experiment import Experiment, to_dict
from grpo_jax.runs.files import is_evaluation, read_rows

TIMES = ("step_time", "tokens_per_second")  # they differ whenever a step is made again
RELATIVE, ABSOLUTE = 1e-3, 1e-5  # what is within one of these may be rounding
# The order in which numbers are found: an evaluation is made before the step of its number.
WAY = (
    ("evaluation/",),
    ("prompt", "example", "columns", "sample"),
    ("completion", "turns", "tokens", "label", "completions/", "success", "num_", "dynamic_sampling/"),
    ("reward", "frac_", "preferences/"),
    ("advantage",),
    ("sampling/",),
    (),  # the loss and what else an update measures
    ("grad_norm",),
    ("learning_rate", "skipped_updates", "empty_updates"),
)
REST = WAY.index(())
# What a row of completions.jsonl says, in the same order.
ASPECTS = (
    ("prompt_id", "sample", "example", "prompt", "columns"),
    ("completion", "turns", "tokens", "label"),
    ("reward", "rewards"),
    ("advantage",),
)


class Absent:
    """The value of a name that one of two records does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


class Pair(NamedTuple):
    """Two values of one name that differ; `ABSENT` stands for a value that is not there."""

    name: str
    one: Any
    other: Any

    @property
    def relative(self) -> float | None:
        """The difference of two numbers over the larger of them; None for other values."""
        if not (_is_number(self.one) and _is_number(self.other)):
            return None
        return abs(self.one - self.other) / max(abs(self.one), abs(self.other))

    @property
    def is_near_zero(self) -> bool:
        """Whether the two are so small that even a large relative difference may be rounding, as of a mean of 0."""
        is_rate = self.name == "learning_rate"  # it is small, and no sum that cancels
        return not is_rate and (self.relative or 0.0) > RELATIVE and abs(self.one - self.other) <= ABSOLUTE

    @property
    def is_rounding(self) -> bool:
        """Whether the two may be one number, rounded in two ways. Whole numbers are exact, and so are texts."""
        if self.relative is None or (float(self.one).is_integer() and float(self.other).is_integer()):
            return False
        return self.relative <= RELATIVE or self.is_near_zero


class Parting(NamedTuple):
    """Where a number of two runs begins to differ.

    Attributes:
      pair: its name, and its values at the first step at which they differ.
      step: that step.
      num_differ, num_compared: in how many of the steps, of the evaluations, or of that step's completions it differs.
    """

    pair: Pair
    step: int
    num_differ: int
    num_compared: int


def differences(one: Any, other: Any, name: str = "", separator: str = "/") -> list[Pair]:
    """The places at which two JSON values differ; the names of a place are joined by the separator."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found = []
        for key in dict.fromkeys([*one, *other]):
            place = f"{name}{separator}{key}" if name else str(key)
            found += differences(one.get(key, ABSENT), other.get(key, ABSENT), place, separator)
        return found
    return [] if _comparable(one) == _comparable(other) else [Pair(name, one, other)]


def row_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Pair]:
    """The values in which two rows of metrics.jsonl or completions.jsonl differ, times left out."""
    return [pair for pair in differences(one, other) if pair.name not in TIMES]


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Pair]:
    """The fields in which two recorded configs differ, with dotted names.

    A field that a record lacks was added to the package since, with a default that changes nothing.
    """
    defaults = {
        field.name: to_dict(field.default)
        for field in dataclasses.fields(Experiment)
        if field.default is not dataclasses.MISSING
    }
    return differences(_filled(one, defaults), _filled(other, defaults), separator=".")


def condition_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Pair]:
    """What differs in the versions, the processor, the devices and the training code of two runs.

    Args:
      one, other: the content of run.json, or what `record.conditions` says of this process.
    """
    found = [
        pair
        for name in ("versions", "device", "processor")
        for pair in differences(one.get(name) or {}, other.get(name) or {}, name, ".")
    ]
    package, other_package = one.get("package") or {}, other.get("package") or {}
    digests = differences(package.get("digest", ABSENT), other_package.get("digest", ABSENT), "training code")
    if digests:  # a commit that leaves the digest as it is changes no number
        digests += differences(_commit(package), _commit(other_package), "commit of grpo_jax")
    return digests + found


def visit_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Pair]:
    """In what the resumptions of two runs differ: from which step each went on, and what it changed."""
    texts = [[_visit(visit) for visit in info.get("resumed", ())] for info in (one, other)]
    pairs = enumerate(zip_longest(*texts, fillvalue=ABSENT), 1)
    return [Pair(f"resumption {number}", *visit) for number, visit in pairs if visit[0] != visit[1]]


def metric_partings(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[Parting]:
    """Where each metric of two runs begins to differ, at the steps that both have.

    They are in the order of the steps, and within a step in that in which it finds its numbers.

    Args:
      one, other: the rows of metrics.jsonl.
    """
    others = {_place(row): row for row in other}
    first: dict[str, tuple[Pair, int]] = {}
    compared: dict[str, int] = {}
    differing: dict[str, int] = {}
    for row in sorted((row for row in one if _place(row) in others), key=_place):
        pairs = {pair.name: pair for pair in row_differences(row, others[_place(row)])}
        for name in {*row, *others[_place(row)]}:
            compared[name] = compared.get(name, 0) + 1
        for name, pair in pairs.items():
            first.setdefault(name, (pair, row["step"]))
            differing[name] = differing.get(name, 0) + 1
    found = []
    for name, (pair, step) in first.items():
        found.append(Parting(pair, step, differing[name], compared[name]))
    return in_order(found)


def completion_partings(one: Path, other: Path) -> list[Parting]:
    """Where two runs' prompts, completions, rewards and advantages begin to differ.

    Each has one parting at most, with the first value that differs.

    Args:
      one, other: files of completions.
    """
    found: list[Parting] = []
    waiting = list(ASPECTS)
    for step, rows, others in _paired_steps(one, other):
        for aspect in list(waiting):
            parts = [[{key: row[key] for key in aspect if key in row} for row in each] for each in (rows, others)]
            pairs = [differences(row, there) for row, there in zip_longest(*parts, fillvalue={})]
            if any(pairs):
                place = next(place for place, each in enumerate(pairs) if each)
                first = pairs[place][0]
                named = first._replace(name=f"completion {place}: {first.name}")
                found.append(Parting(named, step, sum(map(bool, pairs)), len(pairs)))
                waiting.remove(aspect)
        if not waiting:
            break
    return in_order(found)


def in_order(partings: Iterable[Parting]) -> list[Parting]:
    """Partings by their step, and within a step in the order in which it finds its numbers."""
    return sorted(partings, key=lambda each: (each.step, rank(each.pair.name)))


def rank(name: str) -> int:
    """The place of a value in the order in which a step finds its numbers."""
    name = name.rpartition(": ")[2]
    return next((i for i, beginnings in enumerate(WAY) if name.startswith(beginnings)), REST)


def last_evaluations(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A run's last evaluation of each split: `held_out` or `train` -> its step and its values."""
    found: dict[str, dict[str, Any]] = {}
    for row in filter(is_evaluation, rows):
        split = "train" if _place(row)[2] else "held_out"
        prefix = "evaluation/train/" if split == "train" else "evaluation/"
        found[split] = {name.removeprefix(prefix): value for name, value in row.items()}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _comparable(value: Any) -> Any:
    """A value without the address in the name of a function, which is another one in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", value) if isinstance(value, str) else value


def _filled(config: Any, defaults: Any) -> Any:
    """A recorded config with the fields that it lacks, at their defaults."""
    if not (isinstance(config, Mapping) and isinstance(defaults, Mapping)):
        return config
    return {**defaults, **{name: _filled(value, defaults.get(name)) for name, value in config.items()}}


def _commit(package: Mapping[str, Any]) -> Any:
    commit = (package.get("git") or {}).get("commit")
    return ABSENT if commit is None else commit[:12]


def _visit(visit: Mapping[str, Any]) -> str:
    changes = [f"{name} {before} → {after}" for name, (before, after) in visit.get("changes", {}).items()]
    changes += ["its files changed"] if visit.get("code") else []
    return f"from step {visit.get('step', '?')}" + (f": {', '.join(changes)}" if changes else "")


def _place(row: Mapping[str, Any]) -> tuple[int, bool, bool]:
    """What a row of metrics.jsonl is about: an evaluation is of the policy before the step of its number."""
    return row["step"], not is_evaluation(row), any(name.startswith("evaluation/train/") for name in row)


def _by_step(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    for step, rows in groupby(read_rows(path), lambda row: row.get("step", 0)):
        yield step, list(rows)


def _paired_steps(one: Path, other: Path) -> Iterator[tuple[int, list[dict[str, Any]], list[dict[str, Any]]]]:
    """The rows of two files at each step that both have; their steps are in order."""
    others = _by_step(other)
    there = next(others, None)
    for step, rows in _by_step(one):
        while there is not None and there[0] < step:
            there = next(others, None)
        if there is not None and there[0] == step:
            yield step, rows, there[1]
