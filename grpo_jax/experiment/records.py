"""The files of a run's directory, checked when they are read: what is in them was perhaps edited by hand.

A schema is an annotation, a dictionary of schemas by key (a key that ends in "?" may be missing; further keys are not
looked at), a list with the schema of its entries, or a tuple of schemas of which one must fit.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from grpo_jax.errors import UserError, shown
from grpo_jax.experiment.checked import admits

Number = int | float
LARGEST = 1e300  # beyond, the sums of means and deviations overflow
_MESSAGE = {"role": str, "content?": str | None}
_CODE = {"directory": str, "entry?": str, "paths?": list[str], "files?": dict[str, str]}
_VISIT = {"overrides?": list[str], "step?": int, "changes?": dict[str, list[Any]], "code?": (None, _CODE)}

RUN: dict[str, Any] = {
    "status?": str,
    "seed?": int,
    "source?": str | None,
    "overrides?": list[str],
    "by_program?": bool,
    "resumed?": [_VISIT],
    "code?": (None, _CODE),
    "git?": (None, {"commit": str, "dirty?": bool}),
    "package?": (None, {"digest": str}),
    "device?": {"kind": str, "count?": int},
    "processor?": (None, {"name": str, "instructions": list[str], "cores": int | None}),
    "versions?": dict[str, str | None],
    "policy_commit?": str | None,
    "stop?": (None, {"steps": int, "by": str, "reason": str}),
    "warnings?": [{"kind": str, "message": str}],
    **dict.fromkeys(("started?", "finished?", "command?", "error?", "key?", "config_key?"), str | None),
}
CONFIG: dict[str, Any] = {
    "seed?": int,
    "method?": (str, {"name": str}),
    "task?": (None, {"name?": str, "train?": int | None, "held_out?": int | None}),
    "policy?": {"lora?": (None, dict[str, Any]), "scratch?": dict[str, Any]},
    "sampling?": dict[str, Any],
    "steps?": int | None,
}
SUMMARY: dict[str, Any] = {"references?": dict[str, Number], "seconds?": Number | None}
PLAN: dict[str, Any] = {
    "arms": list[str],
    "runs": [{"key": str, "arms": list[str], "seed": int}],
    "metric": str,
    "baseline": str,
}
COMPLETION: dict[str, Any] = {
    "step?": int,
    "prompt?": (str, [_MESSAGE]),
    "completion?": (str, [_MESSAGE]),
    "rewards?": dict[str, Number | None],
    "reward?": Number | None,
    "advantage?": Number | None,
    "columns?": dict[str, Any] | None,
    "turns?": (None, [{"role": str, "text": str}]),
}
SCHEMAS = {"run.json": RUN, "config.json": CONFIG, "summary.json": SUMMARY, "sweep.json": PLAN}


def parse(text: str) -> Any:
    """JSON as a run's directory has it. Raises `ValueError` for what is none, for NaN, for what is nested too deep."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read(path: Path) -> dict[str, Any]:
    """The content of one of the JSON files of a run or a sweep.

    Raises:
      FileNotFoundError: if there is none.
      UserError: if it cannot be read, or if its content is not what such a file has.
    """
    try:
        content = parse(path.read_text("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        place = str(path.parent)
        raise UserError(f"{place!r} is not the directory of a run: its {path.name} cannot be read.") from None
    require(content, SCHEMAS.get(path.name, {}), str(path))
    if path.name == "run.json":
        _require_inside(content, str(path))
        _require_changes(content, str(path))
    if path.name == "sweep.json":
        _require_plan(content, str(path))
    return content


def require(content: Any, schema: Any, where: str) -> None:
    """Raises `UserError` for the first place at which the content of a file differs from its schema."""
    for place, value, wanted in _problems(content, schema, ""):
        what = f"{place} = {shown(value)}" if place else shown(value)
        raise UserError(f"{where} is damaged, or was edited: it has {what}, which must be {wanted}.")


def needed(content: Mapping[str, Any], name: str, where: object) -> Any:
    """What a file says under a name. Raises `UserError` if that is missing."""
    if name not in content:
        raise UserError(f"{where} is damaged, or was edited: it has no {name!r}.")
    return content[name]


def require_metrics(row: Any, where: str) -> None:
    """The same for a row of metrics.jsonl: a step, and numbers by name."""
    require(row, {"step": int}, where)
    for name, value in row.items():
        if not admits(Number | None, value) or (value is not None and abs(value) > LARGEST):
            raise UserError(f"{where} is damaged, or was edited: {shown(name)} = {shown(value)} is no finite number.")
    require_step(row, where)


def require_completion(row: Any, where: str) -> None:
    """The same for a row of completions.jsonl."""
    require(row, COMPLETION, where)
    if row.get("prompt") == []:
        raise UserError(f"{where} is damaged, or was edited: its prompt has no message.")
    for name, value in (row.get("rewards") or {}).items() | {
        ("reward", row.get("reward")),
        ("advantage", row.get("advantage")),
    }:
        if value is not None and abs(value) > LARGEST:
            raise UserError(f"{where} is damaged, or was edited: {shown(name)} = {shown(value)} is no finite number.")
    require_step(row, where)


def require_step(row: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` for a step that no run has."""
    if not 0 <= row.get("step", 0) < 2**53:
        raise UserError(f"{where} is damaged, or was edited: step = {shown(row['step'])} is no step of a run.")


def _problems(value: Any, schema: Any, place: str) -> Iterator[tuple[str, Any, str]]:
    """The places at which a value differs from a schema, each with what is there and what must be."""
    if isinstance(schema, tuple):
        found = [list(_problems(value, each, place)) for each in schema]
        if all(found):
            yield max(found, key=lambda problems: len(problems[0][0]))[0]  # that of the schema which fits best
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield place, value, "a list"
            return
        for index, item in enumerate(value):
            yield from _problems(item, schema[0], f"{place}[{index}]")
    elif isinstance(schema, dict):
        if not isinstance(value, dict):
            yield place, value, "an object with names"
            return
        for name, each in schema.items():
            key = name.removesuffix("?")
            inner = f"{place}.{key}" if place else key
            if key in value:
                yield from _problems(value[key], each, inner)
            elif key == name:
                yield place, value, f"an object with {key!r}"
    elif not (value is None if schema is None else admits(schema, value)):
        yield place, value, "null" if schema is None else str(getattr(schema, "__name__", schema))


def _require_changes(info: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` for a change of a resumed run that is not a value before and a value since."""
    for visit in info.get("resumed", ()):
        for name, change in visit.get("changes", {}).items():
            if len(change) != 2:
                raise UserError(
                    f"{where} is damaged, or was edited: {shown(name)} has {shown(change)} for a change, which must be "
                    "two values."
                )


def _require_inside(info: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` if a run says that its files are elsewhere than in its directory."""
    for code in (info.get("code"), *(visit.get("code") for visit in info.get("resumed", ()))):
        for path in () if code is None else (code["directory"], code.get("entry", "."), *code.get("paths", ())):
            if "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise UserError(f"{where} is damaged, or was edited: {shown(path)} is no place in the run's directory.")


def _require_plan(plan: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` if the plan of a sweep names an arm that it does not have, or a run outside of the sweep."""
    arms, pairs = plan["arms"], [(arm, run["seed"]) for run in plan["runs"] for arm in run["arms"]]
    strangers = [arm for arm in (plan["baseline"], *(arm for arm, _ in pairs)) if arm not in arms]
    outside = [run["key"] for run in plan["runs"] if not re.fullmatch(r"[\w-]+", run["key"])]
    twice = [pair for pair, count in Counter(pairs).items() if count > 1] or [a for a in arms if arms.count(a) > 1]
    for found, what in ((strangers, "is no arm of it"), (outside, "names no run"), (twice, "is there twice")):
        if found:
            raise UserError(f"{where} is damaged, or was edited: {shown(found[0])} {what}.")
