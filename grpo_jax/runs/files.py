"""Files of a run directory: written whole or not at all, and read back with a torn last line left out."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_jax.errors import RunError, UserError


def jsonable(value: Any) -> Any:
    """Returns `value` as JSON-able data: arrays as lists, numbers that are not finite as None, the unknown as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's and JAX's arrays and scalars
        return jsonable(value.tolist())
    return str(value)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a .jsonl file, none if there is no file, and without a last line that a crash has cut off."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                raise UserError(f"{path}:{number} is not a line of JSON.") from None


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to a .jsonl file, all or none: what does not fit on the disk whole is taken back."""
    data = "".join(map(json_line, rows)).encode()
    with writing(path), path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            if path.is_file():
                file.truncate(start)
            raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step; if that fails, what was there stays and a `RunError` says why."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says while `path` is written into a `RunError` of one sentence."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}.") from error


def json_line(row: Mapping[str, Any]) -> str:
    """Returns one line of a .jsonl file."""
    return json.dumps(jsonable(row)) + "\n"
