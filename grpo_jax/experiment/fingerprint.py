"""A name for a configuration by what it says: equal configurations have equal fingerprints, in every process.

Functions count by their code (without its docstring), defaults and closures, so two lambdas differ when they do
different things. Functions and classes of the user also count by their files: the module that defines them, every
module of the user that it imports, and the data files that these read (see `grpo_jax.experiment.sources`). So a reward
whose helper or constant was edited is another reward. Libraries and this package do not count: a run's record names
their versions.
"""

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from grpo_jax.experiment.requirements import Method
from grpo_jax.experiment.sources import code_digest, is_users


def fingerprint(value: Any, *, files: bool = True) -> str:
    """Returns twelve hexadecimal digits that stand for `value`: dataclasses, containers, numbers, arrays, functions.

    Without `files` the files of functions and classes do not count, as in the names of runs of the first versions.
    """
    digest = hashlib.sha256()
    for part in _parts(value, (), files):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _parts(value: Any, inside: tuple[int, ...], files: bool) -> Iterator[str]:
    """The value as a stream of texts. `inside` holds what it is part of: a function may close over itself."""
    if id(value) in inside:
        yield "itself"
        return
    inside = (*inside, id(value))
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            yield f"{kind} {value!r}"
            return
        case np.ndarray():
            fields: Any = (str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest())
        case type() | types.ModuleType() | types.BuiltinFunctionType():
            if files and (code := code_digest(_file_of(value))) is not None:
                yield f"file {code}"
            yield f"{kind} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
            return
        case types.CodeType():
            fields = (value.co_code, value.co_consts, value.co_names)
        case types.FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            own = _without_docstring(value)
            fields = (value.__module__, value.__qualname__, own, value.__defaults__, value.__kwdefaults__, cells)
        case types.MethodType():
            fields = (value.__func__, value.__self__)
        case functools.partial():
            fields = (value.func, value.args, value.keywords)
        case Set():
            yield from (kind, *sorted(fingerprint(item, files=files) for item in value))
            return
        case Mapping():
            fields = sorted(value.items(), key=lambda item: repr(item[0]))
        case list() | tuple() | range():
            fields = value
        case _ if dataclasses.is_dataclass(value):
            counted = [field for field in dataclasses.fields(value) if not field.metadata.get("not_in_names")]
            items = [(field, getattr(value, field.name)) for field in counted]
            items = [(f, item) for f, item in items if not (f.metadata.get("added_later") and item == f.default)]
            fields = [(f.metadata.get("hashed_as", f.name), item) for f, item in items]  # a renamed field: its old name
        case Method():  # the user's own: an instance without fields is told apart by its code
            methods = {k: v for k, v in vars(type(value)).items() if isinstance(v, types.FunctionType)}
            fields = (vars(value), methods)
        case _ if hasattr(value, "__wrapped__"):  # a decorated function, such as functools.cache makes
            fields = (value.__wrapped__,)
        case _ if hasattr(value, "__dict__"):
            fields = vars(value)
        case _:
            yield f"{kind} {value!r}"
            return
    if files and (code := code_digest(_file_of(value))) is not None:
        yield f"file {code}"
    yield f"{kind} {len(fields)}"
    for item in fields.items() if isinstance(fields, Mapping) else fields:
        yield from _parts(item, inside, files)


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
