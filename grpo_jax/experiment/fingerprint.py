"""A name for a configuration by what it says: equal configurations have equal fingerprints, in every process.

Functions count by their code (without its docstring), defaults and closures, so two lambdas differ when they do
different things. Functions and classes of the user also count by their files: the module that defines them, every
module of the user that it imports, and the data files that these read (see `grpo_jax.experiment.sources`). So a reward
whose helper or constant was edited is another reward. Libraries and this package do not count: a run's record names
their versions.

An object of another kind counts by what pickle would save of it: a random generator by its state, an array by its
numbers, an instance by its attributes or by what its `__getstate__` returns. What pickle refuses, such as a lock or a
generator, would have another name in every process, and is refused.
"""

import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import UserError, one_line, shown
from grpo_jax.experiment.requirements import Method
from grpo_jax.experiment.sources import code_digest, is_users

# The `repr` of these says all that they are.
PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, np.generic, np.dtype),
    *(decimal.Decimal, fractions.Fraction, pathlib.PurePath, datetime.date, datetime.time, datetime.timedelta),
)
BOUND = (types.BuiltinFunctionType, types.MethodWrapperType)  # functions in C, and methods in C of an object
CUT = 200  # characters after which the `repr` of a regular expression is cut


class _Parts(NamedTuple):
    """What a value is made of: where each part stands in it, as a message says that, and the part."""

    kind: str
    parts: list[tuple[str, Any]]


def fingerprint(value: Any, *, files: bool = True) -> str:
    """Returns twelve hexadecimal digits that stand for `value`: dataclasses, containers, numbers, arrays, functions.

    Without `files` the files of functions and classes do not count, as in the names of runs of the first versions.

    Raises:
      UserError: for what would have another name in every process, and for what is nested too deep.
    """
    return _digest(value, (), files, "")


def fingerprint_or_none(value: Any, *, files: bool = True) -> str | None:
    """The same, and None for what is refused: a single run needs no name, the runs of a sweep do."""
    try:
        return fingerprint(value, files=files)
    except UserError:
        return None


def _digest(value: Any, inside: tuple[int, ...], files: bool, place: str) -> str:
    digest = hashlib.sha256()
    try:
        for text in _texts(value, inside, files, place):
            digest.update(text.encode() + b"\0")
    except RecursionError:
        raise UserError(f"{_first(place)} is nested too deep for a name of the run to be made of it.") from None
    return digest.hexdigest()[:12]


def _texts(value: Any, inside: tuple[int, ...], files: bool, place: str) -> Iterator[str]:
    """The value as a stream of texts.

    Args:
      inside: what it is part of, by `id`, since a function may close over itself.
      place: where it stands in the config.
    """
    if isinstance(value, _Parts):
        yield f"{value.kind} {len(value.parts)}"
        for where, part in value.parts:
            yield from _texts(part, inside, files, place + where)
        return
    if id(value) in inside:
        yield "itself"
        return
    inside = (*inside, id(value))
    kind = _kind(value)
    if _is_plain(value):
        yield f"{kind} {value!r}"
    elif isinstance(value, (type, types.ModuleType, *BOUND)):
        yield from _file(value, files)
        yield f"{kind} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        owner = getattr(value, "__self__", None) if isinstance(value, BOUND) else None
        if not isinstance(owner, (types.NoneType, type, types.ModuleType)):
            yield from _texts(owner, inside, files, place)
    elif isinstance(value, Set):
        yield from (kind, *sorted(_digest(item, inside, files, place) for item in value))
    else:
        parts = _Parts(kind, list(_parts(value, place)))
        yield from _file(value, files)
        yield from _texts(parts, inside, files, place)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_plain(value: Any) -> bool:
    """Whether the `repr` of a value says all that it is."""
    return isinstance(value, PLAIN) or (isinstance(value, re.Pattern) and len(repr(value.pattern)) <= CUT)


def _parts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """What a value is made of, and where each part stands in it."""
    match value:
        case np.ndarray():
            numbers = value.tolist() if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()
            yield from _unnamed(str(value.dtype), value.shape, numbers)
        case types.CodeType():
            yield from _unnamed(value.co_code, value.co_consts, value.co_names)
        case types.FunctionType():
            yield from _unnamed(value.__module__, value.__qualname__, _without_docstring(value))
            yield from ((" default", value.__defaults__), (" default", value.__kwdefaults__))
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            yield "", _Parts("builtins.list", [(f" variable {name}", _content(cell)) for name, cell in cells])
        case types.MethodType():
            yield from _unnamed(value.__func__, value.__self__)
        case functools.partial():
            yield from (("", value.func), (" argument", value.args), (" argument", value.keywords))
        case Mapping():
            for key, item in sorted(value.items(), key=lambda item: _order(item[0], place)):
                yield _pair(key, item, f"[{shown(key)}]")
        case list() | tuple() | range():
            yield from ((f"[{index}]", item) for index, item in enumerate(value))
        case _ if dataclasses.is_dataclass(value):
            counted = [field for field in dataclasses.fields(value) if not field.metadata.get("not_in_names")]
            items = [(field, getattr(value, field.name)) for field in counted]
            items = [(f, item) for f, item in items if not (f.metadata.get("added_later") and item == f.default)]
            for f, item in items:  # a renamed field counts by its old name
                yield _pair(f.metadata.get("hashed_as", f.name), item, f".{f.name}")
        case Method():  # the user's own: an instance without fields is told apart by its code
            methods = {k: v for k, v in vars(type(value)).items() if isinstance(v, types.FunctionType)}
            yield from _unnamed(vars(value), methods)
        case enum.Enum():
            yield from _attributes(vars(value))
        case _ if hasattr(value, "__wrapped__"):  # a decorated function, such as functools.cache makes
            yield "", value.__wrapped__
        case _:
            yield from _saved(value, place)


def _unnamed(*parts: Any) -> Iterator[tuple[str, Any]]:
    return (("", part) for part in parts)


def _pair(key: Any, item: Any, where: str) -> tuple[str, _Parts]:
    """An entry of a dictionary, or a field and its value."""
    return "", _Parts("builtins.tuple", [("", key), (where, item)])


def _attributes(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return (_pair(name, item, f".{name}") for name, item in values.items())


def _content(cell: types.CellType) -> Any:
    """What a variable of a closure holds; the cell itself, which is refused, where nothing has been assigned to it."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _order(key: Any, place: str) -> str:
    """By what the entries of a dictionary are sorted: by their keys, as Python writes them where that is always so."""
    plain = key if isinstance(key, tuple) else (key,)
    return repr(key) if all(map(_is_plain, plain)) else _digest(key, (), False, place)


def _saved(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The parts of an object that pickle would save, which are its attributes unless its class says otherwise.

    Raises `UserError` for one that pickle refuses.
    """
    try:
        if type(value) is object:
            raise TypeError("nothing tells it from another one")
        reduce = copyreg.dispatch_table.get(type(value))
        saved = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(saved, str):  # the name of a global variable
            yield "", saved
            return
        function, arguments, state, items, entries = (*saved, None, None, None)[:5]
        items, entries = list(items or ()), list(entries or ())
    except Exception as error:  # whatever a user's own `__getstate__` raises
        raise UserError(
            f"{_first(place)} is of type {_kind(value)}, which would give the run another name in every process "
            f"({one_line(error, 100)}): make it inside of the function that needs it, or leave it out of what its "
            "owner's `__getstate__` returns."
        ) from None
    is_plain = function in (copyreg.__newobj__, type(value)) and arguments in ((), (type(value),))  # type: ignore[attr-defined]
    states = state if isinstance(state, tuple) and len(state) == 2 else (state, None)  # attributes, and those in slots
    if is_plain and not items and not entries and all(isinstance(each, dict | None) for each in states):
        yield from _attributes({name: item for each in states for name, item in (each or {}).items()})
    else:
        yield from _unnamed(f"{function.__module__}.{function.__qualname__}", arguments, state, items, entries)


def _first(place: str) -> str:
    """A place in a config at the start of a sentence."""
    return place.removeprefix(".") or "the value"


def _file(value: Any, files: bool) -> Iterator[str]:
    """What the user's file counts as that defines a value; nothing for what a library defines."""
    if files and (code := code_digest(_file_of(value))) is not None:
        yield f"file {code}"


def _without_docstring(function: types.FunctionType) -> types.CodeType:
    """The code of a function; its docstring, which is the first constant, is left out."""
    code = function.__code__
    if function.__doc__ is None or code.co_consts[:1] != (function.__doc__,):
        return code
    return code.replace(co_consts=(None, *code.co_consts[1:]))


def _file_of(value: Any) -> str:
    """The file that defines a function, a class, a module, or the class of an object; empty if there is none."""
    if isinstance(value, types.FunctionType):
        return value.__code__.co_filename
    if not isinstance(value, types.ModuleType):
        kind = value if isinstance(value, type) else type(value)
        methods = [item.__code__.co_filename for item in vars(kind).values() if isinstance(item, types.FunctionType)]
        if own := [file for file in methods if is_users(file)]:
            return own[0]  # not by its module's name, which the files of two runs may share
        value = sys.modules.get(kind.__module__)
    return getattr(value, "__file__", None) or ""
