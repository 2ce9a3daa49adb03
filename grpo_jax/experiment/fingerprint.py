"""A name for a configuration by what it says: equal configurations have equal fingerprints, in every process.

Functions count by their code, defaults and closures, so two lambdas differ when they do different things, and a reward
that was edited is another reward. What a function calls does not count: that is what a run's commit is for.
"""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from grpo_jax.experiment.requirements import Method


def fingerprint(value: Any) -> str:
    """Returns twelve hexadecimal digits that stand for `value`: dataclasses, containers, numbers, arrays, functions."""
    digest = hashlib.sha256()
    for part in _parts(value, ()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _parts(value: Any, inside: tuple[int, ...]) -> Iterator[str]:
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
            yield f"{kind} {getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
            return
        case types.CodeType():
            fields = (value.co_code, value.co_consts, value.co_names)
        case types.FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            fields = (value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__)
            fields = (*fields, cells)
        case types.MethodType():
            fields = (value.__func__, value.__self__)
        case functools.partial():
            fields = (value.func, value.args, value.keywords)
        case Set():
            yield from (kind, *sorted(fingerprint(item) for item in value))
            return
        case Mapping():
            fields = sorted(value.items(), key=lambda item: repr(item[0]))
        case list() | tuple() | range():
            fields = value
        case _ if dataclasses.is_dataclass(value):
            fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        case Method():  # the user's own: an instance without fields is told apart by its code
            code = {k: v for k, v in vars(type(value)).items() if isinstance(v, types.FunctionType)}
            fields = (vars(value), code)
        case _ if hasattr(value, "__wrapped__"):  # a decorated function, such as functools.cache makes
            fields = (value.__wrapped__,)
        case _ if hasattr(value, "__dict__"):
            fields = vars(value)
        case _:
            yield f"{kind} {value!r}"
            return
    yield f"{kind} {len(fields)}"
    for item in fields.items() if isinstance(fields, Mapping) else fields:
        yield from _parts(item, inside)
