"""Examples from data: the rows of a file or of a dataset, made into prompts and columns, in two disjoint splits."""

import difflib
import hashlib
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError, failure_of, one_line, shown, warn
from grpo_jax.experiment.checked import admits
from grpo_jax.experiment.overrides import nearest
from grpo_jax.experiment.sources import calling_folder
from grpo_jax.tasks.checks import content

Row = Mapping[str, Any]
MakePrompt = str | Callable[[Row], Any]
"""A column's name, a format string of columns, or a function of a row."""
Columns = Mapping[str, str | Callable[[Row], Any]] | Sequence[str] | None
"""The columns that rewards receive: by the name that they get, by name alone, or (None) all."""
Located = Iterable[tuple[str, Row]]
"""Rows, each with a text that says where it is from."""

WHERE = ("config", "split", "revision")
"""The arguments that say which part of a dataset is read."""


@dataclass(frozen=True)
class Loaded:
    """What was read.

    Attributes:
      name: the name of the file or of the dataset.
      train, held_out: the examples, in disjoint splits.
      origin: where they are from.
    """

    name: str
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    origin: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a row becomes an example; see `Task.from_jsonl` for the arguments."""

    prompt: MakePrompt
    columns: Columns
    system: str | None
    limit: int | None

    def __post_init__(self) -> None:
        columns, limit = self.columns, self.limit
        by_name = isinstance(columns, Mapping) and all(isinstance(k, str) and _is_source(v) for k, v in columns.items())
        listed = admits(list[str] | tuple[str, ...] | None, columns)
        for name, holds, wanted in (
            ("prompt", _is_source(self.prompt), "a column's name, a format string or a function of a row"),
            ("columns", by_name or listed, "a list of names, or columns or functions of a row by name"),
            ("system", admits(str | None, self.system), "a text"),
            ("limit", limit is None or (admits(int, limit) and limit >= 1), "1 or above, or None for all rows"),
        ):
            if not holds:
                raise UserError(f"{name} = {shown(getattr(self, name))} is out of range: it must be {wanted}.")

    def examples(self, rows: Located, what: str) -> list[tuple[dict[str, Any], str]]:
        """The examples of rows, each with the content of its row. Raises `UserError` if there are no rows."""
        found = [(self.example(row, where), _content(row, where)) for where, row in islice(rows, self.limit)]
        if not found:
            raise UserError(f"{what} has no rows.")
        return found

    def example(self, row: Row, where: str) -> dict[str, Any]:
        """The example that a row becomes. Raises `UserError` for a column that the row does not have."""
        prompt, used = self._prompt(row, where)
        if self.system is not None:
            prompt = _with_system(prompt, self.system, where)
        if self.columns is None:
            return {"prompt": prompt} | {k: v for k, v in row.items() if k not in ("prompt", used)}
        named = self.columns if isinstance(self.columns, Mapping) else {name: name for name in self.columns}
        return {"prompt": prompt} | {name: _value(row, source, where, name) for name, source in named.items()}

    def _prompt(self, row: Row, where: str) -> tuple[Any, str | None]:
        """The prompt, and the column that it is, if it is one."""
        if not isinstance(self.prompt, str) or self.prompt in row:
            return _value(row, self.prompt, where, "prompt"), self.prompt if isinstance(self.prompt, str) else None
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            raise UserError(f"prompt = {shown(self.prompt)} is no format string: {error}.") from None
        if not fields:
            _value(row, self.prompt, where, "prompt")  # there is no such column, which this says
        for name in fields:
            _value(row, name.partition(".")[0].partition("[")[0], where, "prompt")
        try:
            return self.prompt.format_map(row), None
        except Exception as error:  # values have formats of their own
            raise UserError(
                f"{where}: prompt = {shown(self.prompt)} cannot be filled in: {failure_of(error)}."
            ) from None


def from_file(
    path: str | PathLike[str],
    read: Callable[[Path], Iterator[tuple[str, Row]]],
    recipe: Recipe,
    held_out: str | PathLike[str] | float,
    seed: int,
) -> Loaded:
    """The examples of a file, and of another one for the held-out split if `held_out` is a path."""
    found = find(path)
    rows = recipe.examples(read(found), str(path))
    origin: dict[str, Any] = {"file": found.name, "rows": len(rows)}
    if isinstance(held_out, (str, PathLike)):
        other = find(held_out)
        others = recipe.examples(read(other), str(held_out))
        origin |= {"held_out": other.name, "held_out_rows": len(others)}
        return Loaded(found.stem, [e for e, _ in rows], [e for e, _ in others], origin)
    train, kept = split(rows, held_out, seed)
    return Loaded(found.stem, train, kept, origin | {"held_out": held_out, "seed": seed})


def from_dataset(dataset: Any, where: Mapping[str, Any], recipe: Recipe, held_out: Any, seed: int) -> Loaded:
    """The examples of a dataset. `where` may hold its `config`, `split` and `revision`; see `Task.from_dataset`."""
    for key in where:
        if not admits(str | None, where[key]):
            raise UserError(f"{key} = {shown(where[key])} is no name: it must be a text.")
    split_name = where.get("split") or "train"
    origin: dict[str, Any] = {}
    name = "dataset"
    if isinstance(dataset, str):
        name, origin = dataset.rpartition("/")[2], {"dataset": dataset, **where}
        wanted = [split_name, *([held_out] if isinstance(held_out, str) else [])]
        dataset = load_from_hub(dataset, wanted, where)
        origin |= {"revision": where.get("revision"), "commit": _commit(dataset[split_name])}
        if origin["commit"] and where.get("revision") is None:
            warn(
                f"{origin['dataset']} was loaded as it is now. To have the same rows later, write "
                f"revision={origin['commit']!r}."
            )
    elif isinstance(where.get("revision") or where.get("config"), str):
        raise UserError(
            "revision and config are for a dataset's name on the hub, not for rows that are loaded already."
        )
    chosen = _split_of(dataset, split_name)
    rows = recipe.examples(_numbered(chosen, one_line(split_name, 60)), f"the split {shown(split_name)}")
    origin |= {"split": split_name, "rows": len(rows), **_identity(chosen)}
    if isinstance(held_out, (int, float)):
        train, kept = split(rows, held_out, seed)
        return Loaded(name, train, kept, origin | {"held_out": held_out, "seed": seed})
    given = isinstance(held_out, str)
    other = _split_of(dataset, held_out, needed=True) if given else held_out
    label = held_out if given else "held_out"
    others = recipe.examples(_numbered(other, one_line(label, 60)), f"the split {shown(label)}")
    origin |= {"held_out": label, "held_out_rows": len(others)}
    return Loaded(name, [e for e, _ in rows], [e for e, _ in others], origin)


def split(
    rows: Sequence[tuple[dict[str, Any], str]], held_out: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Splits examples, each with the content of its row, into those for training and those that are held out.

    Each row has a place that follows from its content and `seed`, and the first places are held out. So the split does
    not depend on the order of the rows. Equal examples stay together, so there may be a few held out more.

    Args:
      held_out: how many: a number, or a fraction between 0 and 1.

    Raises:
      UserError: if nothing is left for one of the two.
    """
    if not admits(int, seed):
        raise UserError(f"seed = {shown(seed)} is no seed: it must be a number.")
    is_fraction = isinstance(held_out, float)
    wanted = round(held_out * len(rows)) if is_fraction and 0 < held_out < 1 else held_out
    if isinstance(held_out, bool) or not isinstance(wanted, int) or not 0 < wanted < len(rows):
        raise UserError(
            f"held_out = {shown(held_out)} of {len(rows)} rows leaves a split empty: it must be a fraction between 0 "
            f"and 1 or a number from 1 to {len(rows) - 1}, or name the held-out examples themselves."
        )
    places: dict[str, str] = {}  # of each example, the first place that one of its rows has
    for example, row in rows:
        key, place = content(example), hashlib.sha256(f"{seed} {row}".encode()).hexdigest()
        places[key] = min(place, places.get(key, place))
    ranked = sorted(rows, key=lambda item: places[content(item[0])])
    last = places[content(ranked[wanted - 1][0])]
    kept = [example for example, _ in ranked if places[content(example)] <= last]
    train = [example for example, _ in rows if places[content(example)] > last]
    if not train:
        raise UserError(f"held_out = {held_out!r} leaves nothing to train on, because the rows make equal examples.")
    return train, kept


def find(path: str | PathLike[str]) -> Path:
    """A file beside the user's Python file that is being executed, or in the current directory.

    Raises `UserError` if there is none.
    """
    folder = calling_folder()
    places = [folder / path] if folder is not None else []
    for place in [*places, Path(path)]:
        if place.is_file():
            return place
    folders = dict.fromkeys([str(folder)] * (folder is not None) + [str(Path.cwd())])
    looked = "" if Path(path).is_absolute() else f" in {' or '.join(folders)}"
    raise UserError(f"there is no data file {fspath(path)!r}{looked}.")


def read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a file of JSON lines, each with its line. Raises `UserError` for a line that is no JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number} is not a line of JSON: {_reason(error)}.") from None
            if not isinstance(row, dict):
                raise UserError(f'{path}:{number} must be a JSON object, such as {{"question": …}}.')
            yield f"{path}:{number}", row


def _reason(error: Exception) -> str:
    """Why Python's parser of JSON has refused a line."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is nested too deep" if isinstance(error, RecursionError) else "it has a number of too many digits"


def read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a Parquet file. Raises `UserError` if pyarrow is missing or cannot read the file."""
    parquet = _require("pyarrow.parquet", "a Parquet file", "pyarrow")
    # Opened here, because what pyarrow opens itself is not seen, and would be no file of the experiment.
    with path.open("rb") as file:
        try:
            table = parquet.read_table(file)
        except Exception as error:  # pyarrow's own kinds
            raise UserError(f"{path} cannot be read as Parquet: {failure_of(error)}.") from None
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    yield from _numbered(rows, str(path))


def load_from_hub(name: str, splits: Sequence[str], where: Mapping[str, Any]) -> dict[str, Any]:
    """Some splits of a dataset on the hub. Raises `UserError` if `datasets` is missing or cannot load it."""
    datasets = _require("datasets", "a dataset on the hub", "datasets")
    try:
        return {
            each: datasets.load_dataset(name, where.get("config"), split=each, revision=where.get("revision"))
            for each in splits
        }
    except Exception as error:  # the hub's, the network's and the loader's own kinds
        raise UserError(f"the dataset {shown(name)} cannot be loaded: {failure_of(error)}.") from None


def check_fields(fields: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises `UserError` for a field that a task does not have, and if `success` is missing."""
    names = sorted(known)
    for name in fields:
        if name not in names:
            raise UserError(f"a task from data has no argument {name!r}{nearest(name, names)}")
    if "success" not in fields:
        raise UserError("a task from data needs success=…, a function that returns one bool for each completion.")


def _require(module: str, what: str, package: str) -> Any:
    """A package that is needed for this alone. Raises `UserError` with the line that installs it."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} needs the package {package}: pip install {package}") from None


def _split_of(dataset: Any, name: str, *, needed: bool = False) -> Any:
    """A split of several; the dataset itself if it is one, unless a split is needed."""
    if isinstance(dataset, Mapping):
        if name not in dataset:
            raise UserError(
                f"the dataset has no split {shown(name)}{nearest(name, [one_line(each, 60) for each in dataset])}"
            )
        return dataset[name]
    if needed:
        raise UserError(f"held_out = {shown(name)} names a split, but the dataset that was given is a single one.")
    return dataset


def _numbered(rows: Any, what: str) -> Iterator[tuple[str, Row]]:
    """Rows with their numbers, counted from 0. Raises `UserError` for a row that is none."""
    try:
        numbered = enumerate(rows)
    except TypeError:
        raise UserError(
            f"{what} = {shown(rows)} has no rows: it must be a dataset, or rows such as a list of dicts."
        ) from None
    for number, row in numbered:
        if not isinstance(row, Mapping):
            raise UserError(f"{what} row {number} is of type {type(row).__name__}: a row must be a dict of columns.")
        yield f"{what} row {number}", row


def _identity(dataset: Any) -> dict[str, str]:
    """The fingerprint that the package `datasets` gives to what it has loaded."""
    found = getattr(dataset, "_fingerprint", None)
    return {"fingerprint": str(found)} if found else {}


def _commit(dataset: Any) -> str | None:
    """The commit of the hub that a dataset was loaded from, from the addresses of its files."""
    files = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [match[1] for name in files if (match := re.search(r"@([0-9a-f]{40})/", str(name)))]
    return found[0] if found else None


def _value(row: Row, source: str | Callable[[Row], Any], where: str, name: str) -> Any:
    """A column of a row, or what a function makes of the row."""
    if isinstance(source, str):
        if source not in row:
            close = difflib.get_close_matches(source, [each for each in row if isinstance(each, str)], n=1, cutoff=0.5)
            hint = f" (did you mean {shown(close[0])}?)" if close else ""
            raise UserError(f"{where} has no column {shown(source)} for {shown(name)}{hint}: it has {_names(row)}.")
        return row[source]
    try:
        return source(row)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's function, which may even exit
        raise UserError(
            f"{where}: the function for {shown(name)} failed with {failure_of(error)}; the columns are {_names(row)}."
        ) from error


def _is_source(value: Any) -> bool:
    return isinstance(value, str) or callable(value)


def _names(row: Row) -> str:
    """The names of a row's columns, as a sentence has them."""
    return one_line(", ".join(shown(name) for name in row), 500) or "none"


def _content(row: Row, where: str) -> str:
    """The content of a row. Raises `UserError` for one that has none, as it holds itself, say."""
    try:
        return content(row)
    except Exception as error:  # of JSON, or of the repr of a value
        raise UserError(f"{where} cannot be written as JSON: {failure_of(error)}.") from None


def _with_system(prompt: Any, system: str, where: str) -> list[Any]:
    """A prompt as a chat that begins with a system message."""
    messages = [{"role": "user", "content": prompt}] if not isinstance(prompt, (list, tuple)) else list(prompt)
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise UserError(f"{where}: system = {shown(system)} was given, but the prompt has a system message already.")
    return [{"role": "system", "content": system}, *messages]
