"""Reading and writing the JSON files of a run directory; a file is written completely or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import records
from grpo_jax.experiment.recorded import changes_of, jsonable


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run directory; empty if it is missing or damaged, so that one bad run does not hide others."""
    try:
        return records.read(path)
    except (OSError, UserError):
        return {}


def assigned(info: Mapping[str, Any]) -> dict[str, Any]:
    """The assignments that a run began with, by field, from its run.json; `arm` and `budget` for a run of a sweep."""
    return dict(each.split("=", 1) for each in info.get("overrides", ()) if "=" in each)


def changed_since(info: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The fields of one section of the config, such as `sampling`, that a run was resumed with in another form."""
    return {name.partition(".")[2]: after for name, after in changes_of(info) if name.startswith(f"{section}.")}


CHECKS = {"metrics.jsonl": records.require_metrics, "completions.jsonl": records.require_completion}


def read_rows(path: Path, *, of_run: bool = True) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .jsonl file; none if there is no file. A last line that a crash has cut off is left out.

    Raises `UserError` for any other line that is not a JSON object, and, unless `of_run` is false, for a row of a run's
    metrics or completions that is not as a run writes it.
    """
    if not path.is_file():
        return
    check = CHECKS.get(path.name) if of_run else None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = records.parse(line)
            except ValueError:
                raise UserError(f"{path}:{number} is not a line of JSON.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is not a JSON object, which a row must be.")
            if check is not None:
                check(row, f"{path}:{number}")
            yield row


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics.jsonl is of an evaluation; else it is of a training step."""
    return any(name.startswith("evaluation/") for name in row)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """Appends rows to a .jsonl file, all or none: if the disk is full, the file is cut to its length before.

    Returns the lines, as they were written.
    """
    lines = [json_line(row).encode() for row in rows]
    data = b"".join(lines)
    with writing(path), path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            if path.is_file():
                file.truncate(start)
            raise
    return lines


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, completely or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the content of `path` in one step. If that fails, the old content stays and `RunError` is raised."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            sync(path.parent)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Returns when a file's content, or the names in a folder, are on the disk and outlast a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace_bytes(path: Path, before: bytes, after: bytes) -> None:
    """Replaces bytes of a file by as many others in their place, which takes no room on the disk; nothing if it cannot.

    Only for a full disk: a process that is killed meanwhile may leave a part of both.
    """
    assert len(before) == len(after)
    with suppress(OSError), path.open("r+b") as file:
        place = file.read().find(before)
        if place >= 0:
            file.seek(place)
            file.write(after)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the operating system while `path` is written into a `RunError` of one sentence."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}.") from error


def json_line(row: Mapping[str, Any]) -> str:
    """One line of a .jsonl file."""
    return json.dumps(jsonable(row)) + "\n"
