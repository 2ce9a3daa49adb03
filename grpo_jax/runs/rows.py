"""The rows of a run's log that belong to a checkpoint: all of steps 0 … done - 1, whole and in their order.

A checkpoint has a file `log.json` with the CRC-32 of what metrics.jsonl and completions.jsonl said of each step when it
was saved. A run goes on only from rows that have these checksums. What stands behind them was written after the
checkpoint: it is removed, and written again when the steps are made again. A checkpoint of an earlier version has no
`log.json`: then the rows must be readable, in order, and without a gap.

Two evaluations are not held to their checksums, because a run makes them again: that before step 0, each time it is
resumed, and that after the checkpoint's last step, if it is not what was saved.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.experiment import records
from grpo_jax.runs import checkpoints
from grpo_jax.runs.files import CHECKS, is_evaluation

LOG = "log.json"  # in the folder of each checkpoint
METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"

Checksums = dict[str, int]
"""The CRC-32 of a file's rows by their key (`key_of`); several rows with one key are taken together."""


@dataclass
class Kept:
    """The rows of one file with which a run goes on.

    Attributes:
      lines: the rows as they stand in the file.
      checksums: those of the lines.
      numbers: for each key the number of its first line.
      problem: what is wrong with the line behind them, after its number, if it does not belong there.
    """

    lines: list[bytes] = field(default_factory=list)
    checksums: Checksums = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    problem: str | None = None

    def add(self, number: int, line: bytes, key: str) -> None:
        """Takes the next line."""
        self.lines.append(line)
        self.numbers.setdefault(key, number)
        add_line(self.checksums, key, line)


@dataclass(frozen=True)
class KeptLog:
    """The rows with which a run goes on from a checkpoint.

    Attributes:
      step: that of the checkpoint.
      files: by the name of the file.
      is_evaluated: False if an evaluation after that step was not what was saved: they are left out, to be made again.
    """

    step: int
    files: dict[str, Kept]
    is_evaluated: bool = True


def key_of(row: Mapping[str, Any]) -> str:
    """What a row is called among its file's checksums: its step, and for an evaluation its split: `2 evaluation`."""
    if not is_evaluation(row):
        return str(row["step"])
    prefixes = [name.removesuffix("/success") for name in row if name.endswith("/success")]
    return f"{row['step']} {min(prefixes, key=len, default='evaluation')}"


def add_line(checksums: Checksums, key: str, line: bytes) -> None:
    """Adds a line to the checksum of its key."""
    checksums[key] = zlib.crc32(line, checksums.get(key, 0))


def kept_log(run_dir: Path) -> KeptLog:
    """The rows with which a run goes on from its newest checkpoint, or from step 0 where it has none.

    Raises:
      UserError: if the checkpoint is damaged, or if a row of the steps before it is missing or is not what was written,
        with the file and the line, and with the newest earlier checkpoint that the run can go on from.
    """
    directory = run_dir / "checkpoints"
    steps = checkpoints.kept_steps(directory)
    if not steps:
        return _kept_log(run_dir, 0)
    newest = steps[-1]
    checkpoints.require_whole(directory, newest)
    try:
        return _kept_log(run_dir, newest)
    except UserError as error:
        earlier = next((step for step in reversed(steps[:-1]) if _is_whole(run_dir, step)), None)
        remedy = "begin a new run elsewhere"
        if earlier is not None:
            newer = " and ".join(str(directory / str(step)) for step in steps if step > earlier)
            remedy = f"remove {newer} to go back to step {earlier}"
        raise UserError(
            f"{error}, though the run has a checkpoint of step {newest}: put the file back as it was, or {remedy}."
        ) from None


def _is_whole(run_dir: Path, step: int) -> bool:
    """Whether a run can go on from a checkpoint."""
    try:
        checkpoints.require_whole(run_dir / "checkpoints", step)
        _kept_log(run_dir, step)
    except UserError:
        return False
    return True


def _kept_log(run_dir: Path, done: int) -> KeptLog:
    """The rows that belong to the first `done` steps.

    Raises `UserError`, with a sentence that has no end yet, if they are not all there as they were written.
    """
    files = {name: find(run_dir / name, done) for name, find in ((METRICS, _metrics), (COMPLETIONS, _completions))}
    text = checkpoints.read_file(run_dir / "checkpoints", done, LOG) if done else None
    if text is None:
        if done:
            _require_steps(run_dir, done, files)
        return KeptLog(done, files)
    saved: dict[str, Checksums] = json.loads(text)
    for name, kept in files.items():
        _compare(run_dir / name, done, kept.checksums, saved[name], kept)
    last, kept = {key for key in saved[METRICS] if _is_after(key, done)}, files[METRICS]
    evaluated = {key for key in kept.checksums if _is_after(key, done)}
    is_evaluated = last == evaluated and all(saved[METRICS][key] == kept.checksums[key] for key in last)
    if not is_evaluated:
        whole = {key: crc for key, crc in kept.checksums.items() if key not in evaluated}
        files[METRICS] = Kept(kept.lines[: len(kept.lines) - len(evaluated)], whole)
    return KeptLog(done, files, is_evaluated)


def _is_after(key: str, done: int) -> bool:
    """Whether a key is that of an evaluation after `done` steps."""
    return key.startswith(f"{done} ")


def _require_steps(run_dir: Path, done: int, files: Mapping[str, Kept]) -> None:
    """Raises `UserError` if the rows of the first `done` steps are not there, as far as that can be seen in them."""
    for name, kept in files.items():
        lacks = done - sum(key.isdecimal() for key in kept.checksums) if name == METRICS else 0
        if kept.problem is not None and (lacks or name == COMPLETIONS):
            raise UserError(f"{run_dir / name}:{kept.problem}")
        if lacks:
            raise UserError(f"{run_dir / name} lacks step {done - lacks}")


def _compare(path: Path, done: int, found: Checksums, saved: Checksums, kept: Kept) -> None:
    """Raises `UserError` for the first rows that are not those whose checksums a checkpoint has."""
    for key in sorted(saved.keys() | found.keys(), key=lambda key: (int(key.split()[0]), key.isdecimal())):
        if _is_after(key, 0) or _is_after(key, done) or saved.get(key) == found.get(key):
            continue
        what = f"step {key}" if key.isdecimal() else f"the evaluation after step {key.split()[0]}"
        if key in found:
            raise UserError(f"{path}:{kept.numbers[key]} is not what the run wrote of {what}")
        raise UserError(f"{path}:{kept.problem}" if kept.problem else f"{path} lacks {what}")


def _rows(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any], str | None]]:
    """Each line of a file, with its number, its row, and what is wrong with it; none if there is no file."""
    if not path.exists():
        return
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = records.parse(line.decode())
            CHECKS[path.name](row, "")
            records.needed(row, "step", "")
        except (ValueError, UserError):
            yield number, line, {}, f"{number} is no row of a run"
        else:
            yield number, line, row, None if line.endswith(b"\n") else f"{number} is cut off"


def _metrics(path: Path, done: int) -> Kept:
    """The rows of the first `done` steps in metrics.jsonl, with the evaluations before and after each of them."""
    kept, step = Kept(), 0
    for number, line, row, problem in _rows(path):
        kept.problem = problem
        if problem is None and row["step"] != step:
            kept.problem = f"{number} is of step {row['step']}, where step {step} must follow"
        elif is_evaluation(row) and key_of(row) in kept.checksums:
            kept.problem = f"{number} repeats an evaluation"
        if kept.problem is not None or (step == done and not is_evaluation(row)):
            break
        kept.add(number, line, key_of(row))
        step += not is_evaluation(row)
    return kept


def _completions(path: Path, done: int) -> Kept:
    """The rows of the first `done` steps in completions.jsonl."""
    kept, step = Kept(), 0
    for number, line, row, problem in _rows(path):
        kept.problem = problem
        if problem is None and row["step"] < step:
            kept.problem = f"{number} is of step {row['step']}, where step {step} or a later one must follow"
        if kept.problem is not None or row["step"] >= done:
            break
        step = row["step"]
        kept.add(number, line, str(step))
    return kept
