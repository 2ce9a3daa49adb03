"""An experiment as JSON, as a run's config.json holds it, and an experiment from JSON and the user's functions."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from grpo_jax.errors import UserError, one_line, shown
from grpo_jax.experiment.experiment import Experiment
from grpo_jax.experiment.overrides import override
from grpo_jax.experiment.requirements import Method

C = TypeVar("C")


def to_dict(value: Any) -> Any:
    """Returns a config as JSON-able data: functions by name, a task by its name, sizes and a digest of its data."""
    if hasattr(value, "train") and hasattr(value, "held_out"):
        splits = {split: list(map(dict, getattr(value, split))) for split in ("train", "held_out")}
        digest = hashlib.sha256(json.dumps(splits, sort_keys=True, default=str).encode()).hexdigest()[:16]
        origin = {"origin": to_dict(value.origin)} if getattr(value, "origin", None) else {}
        return {"name": value.name, **{k: len(v) for k, v in splits.items()}, "sha256": digest, **origin}
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    if isinstance(value, Method):
        kind = type(value)
        return {"name": value.name, "class": f"{kind.__module__}.{kind.__qualname__}", **to_dict(vars(value))}
    if isinstance(value, functools.partial):
        return {"function": to_dict(value.func), "args": to_dict(value.args), "keywords": to_dict(value.keywords)}
    if callable(value):
        return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', repr(value))}"
    return value


def jsonable(value: Any) -> Any:
    """`value` as JSON-able data: arrays as lists, numbers that are not finite as None, unknown types as text."""
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


def current_config(config: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The config that a run has now, as JSON: that of its config.json, with the changes that it was resumed with.

    Args:
      info: the content of its run.json.
    """
    now = copy.deepcopy(dict(config))
    for name, after in changes_of(info):
        *owners, key = name.split(".")
        place: Any = now
        for owner in owners:
            place = place.get(owner) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise UserError(
                f"the run's run.json is damaged, or was edited: it changes {shown(name)}, which is no field."
            )
        place[key] = after
    return now


def changes_of(info: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields that a run was resumed with in another form, with their new values, from its run.json."""
    for visit in info.get("resumed", ()):
        for name, change in visit.get("changes", {}).items():
            yield name, change[1]


def config_from(kind: type[C], recorded: Any) -> C:
    """A config, such as a `SamplingConfig`, from a run's record. Raises `UserError` for a record that was edited."""
    try:
        config = _from_json(recorded, kind)
    except TypeError as error:
        raise UserError(f"the run's config.json is damaged, or was edited: {one_line(error)}.") from None
    if not isinstance(config, kind):
        raise UserError(f"the run's config.json is damaged, or was edited: {shown(recorded)} is no {kind.__name__}.")
    return config


def changed_fields(before: Any, now: Any, path: str = "") -> dict[str, list[Any]]:
    """The fields, with dotted names, in which a config differs from a recorded one: name -> [before, now], as JSON.

    A field that the record lacks was added to the package since, and does not count.
    """
    if not (isinstance(before, Mapping) and dataclasses.is_dataclass(now)) or hasattr(now, "held_out"):
        after = jsonable(to_dict(now))
        return {} if before == after else {path: [before, after]}
    found: dict[str, list[Any]] = {}
    for field in dataclasses.fields(now):
        if field.name in before:
            name = f"{path}.{field.name}" if path else field.name
            found |= changed_fields(before[field.name], getattr(now, field.name), name)
    return found


def with_recorded_fields(
    experiment: Experiment, recorded: Mapping[str, Any], rename: Callable[[str], str] = lambda text: text
) -> Experiment | None:
    """The experiment with every field as a record has it; None if it is about another task or other functions.

    A record holds functions and data by name and digest alone. They come from `experiment`, and must be those that are
    named; all that is plain (numbers, texts, configs) comes from the record.

    Args:
      recorded: the config of a run, as JSON.
      rename: what the text of a JSON value is passed through before functions' names are compared.
    """

    def plain(value: Any) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", rename(json.dumps(value, sort_keys=True)))

    overrides: dict[str, Any] = {}
    for name, (before, now) in changed_fields(recorded, experiment).items():
        if plain(before) == plain(now):
            continue
        if name.split(".")[0] in ("task", "rewards"):
            return None
        owner, (*owners, key) = experiment, name.split(".")
        for each in owners:
            owner = getattr(owner, each)
        hint = get_type_hints(type(owner))[key]
        try:
            overrides[name] = _from_json(before, hint)
        except TypeError:
            return None
    try:
        return override(experiment, overrides) if overrides else experiment
    except UserError:
        return None


def _from_json(value: Any, hint: Any) -> Any:
    """A recorded value as a field of this type holds it. Raises `TypeError` for a function, which JSON only names."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    config = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    if isinstance(value, Mapping) and isinstance(config, type):
        hints = get_type_hints(config)
        return config(**{name: _from_json(item, hints[name]) for name, item in value.items() if name in hints})
    if isinstance(value, list):
        return tuple(value)
    if (isinstance(value, str) and config is not None) or (isinstance(value, Mapping) and "class" in value):
        raise TypeError(f"{value} names a function or a class")
    return value
