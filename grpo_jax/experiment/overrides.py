"""Variations of an experiment: dotted fields replaced, by a program or from the command line."""

import dataclasses
import difflib
import warnings
from ast import literal_eval
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from grpo_jax.errors import UserError, shown
from grpo_jax.experiment.checked import admits
from grpo_jax.experiment.requirements import METHODS, Method, method_of

if TYPE_CHECKING:
    from grpo_jax.experiment.experiment import Experiment


def override(config: "Experiment", overrides: Mapping[str, Any]) -> "Experiment":
    """Returns `config` with dotted fields replaced, e.g. `{"loss.beta": 0.04, "method": "sft"}`.

    A variant made this way inherits everything else, so a control follows whatever its experiment was overridden with;
    but a variant of another `method` leaves behind the fields that this method does not read. A field of a config that
    is None here switches it on: `policy.lora.rank` adds LoRA with this rank, and its defaults otherwise.
    Raises `UserError` for an unknown field (suggesting the nearest) and for a value of the wrong type.
    """
    changes = [(path.split("."), value, path) for path, value in overrides.items()]
    method: Any = overrides.get("method")
    if (
        isinstance(method, (Method, str))
        and (isinstance(method, Method) or method in METHODS)
        and method != config.method
    ):
        given = {keys[0] for keys, *_ in changes}
        left = [([f.name], f.default, f.name) for f in unread_fields(type(config), method) if f.name not in given]
        if "guards" not in overrides:
            left += [(["guards", name], None, f"guards.{name}") for name in method_of(method).unwatched]
        changes = [*left, *changes]
    return _replace(config, changes)


def _replace(config: Any, changes: Sequence[tuple[list[str], Any, str]]) -> Any:
    """Sets (keys, value, dotted path) at once, so that fields whose ranges depend on each other come in any order."""
    if isinstance(config, Mapping):  # reward weights, or the overrides of a variant: the last one that is named wins
        named = {".".join(keys): value for keys, value, _ in changes}
        return {k: v for k, v in config.items() if k not in named} | named
    if not dataclasses.is_dataclass(config):
        raise UserError(f"{shown(changes[0][2])} is not a field: {type(config).__name__} has no fields of its own.")
    names = [f.name for f in dataclasses.fields(config)]
    for (key, *_), _, path in changes:
        if key not in names:
            missing = f"{shown(path)} is not a field: {type(config).__name__} has no {shown(key)}"
            raise UserError(f"{missing}{nearest(key, names)}")
    new = {key: value for (key, *rest), value, _ in changes if not rest}
    for key in dict.fromkeys(keys[0] for keys, *_ in changes if len(keys) > 1):
        further = [(keys[1:], value, path) for keys, value, path in changes if keys[0] == key and len(keys) > 1]
        inner = new.get(key, getattr(config, key))
        if inner is None and (kind := _optional_config(type(config), key)) is not None:
            inner = kind()
        if inner is None:
            rest, value, path = further[0]
            owner, example = path.removesuffix("." + ".".join(rest)), {".".join(rest): value}
            raise UserError(
                f"{shown(path)} cannot be set: {owner} is None here; set it whole, {owner}={shown(example)}."
            )
        new[key] = _replace(inner, further)
    assert not isinstance(config, type), "a field holds a config, not its class"
    return dataclasses.replace(config, **new)


def _optional_config(owner: type, key: str) -> Any:
    """The dataclass of a field that is such a config or None, as `policy.lora` is; None for another field."""
    kinds = get_args(get_type_hints(owner).get(key))
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind) and type(None) in kinds), None)


def parse_overrides(config: "Experiment", assignments: Iterable[str]) -> dict[str, Any]:
    """Turns `path=text` assignments from the command line into typed overrides of `config`.

    The text is read as a Python literal (`1e-4`, `None`, `("q", "v")`; `true` and `false` too) where the field's type
    admits that, and as a string otherwise.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {shown(assignment)} is not of the form field=value, e.g. loss.beta=0.04.")
        literal = _literal(text)
        overrides[path] = literal if _admits(config, path.split("."), literal) else text
    override(config, overrides)
    return overrides


def _literal(text: str) -> Any:
    """The value of a Python literal; the text itself where it is none."""
    literal = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escape sequences in what is perhaps no Python at all
            return literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all of which a text can cause
        return literal


def _admits(config: Any, keys: Sequence[str], value: Any) -> bool:
    """Whether the annotation of the field that the keys lead to admits the value; True where there is none."""
    *owners, name = keys
    for owner in owners:
        inner = getattr(config, owner, None) if dataclasses.is_dataclass(config) else None
        if inner is None and dataclasses.is_dataclass(config):
            inner = _optional_config(type(config), owner)
        config = inner
    kind = config if isinstance(config, type) else type(config)
    hint = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return hint is None or admits(hint, value)


def variant_of(experiment: "Experiment", overrides: Mapping[str, Any]) -> "Experiment":
    """The experiment with overrides, and without a warm start or control of its own unless they are among them."""
    return override(dataclasses.replace(experiment, warm_start=None, control=None), overrides)


def nearest(key: str, names: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: the nearest that exists, or all of them."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it must be one of {', '.join(names)}."


def unread_fields(experiment: type, method: str | Method) -> list[dataclasses.Field]:
    """The fields of an experiment that this method does not read, though another does."""
    unread = {name for other in METHODS.values() for name in other.reads} - set(method_of(method).reads)
    return [f for f in dataclasses.fields(experiment) if f.name in unread]
