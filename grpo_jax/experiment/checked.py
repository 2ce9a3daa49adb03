"""Dataclasses whose fields are checked when they are made: their types, and then their ranges."""

import dataclasses
from typing import Any, get_type_hints

import typeguard

from grpo_jax.errors import UserError

Range = tuple[bool, str]  # whether a value is in range, and what it must be
Ranges = dict[str, Range]  # by field


class Checked:
    """A dataclass whose every field is checked against its annotation, and then against `_ranges`, when it is made."""

    def _ranges(self) -> Ranges:
        return {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            try:
                typeguard.check_type(value, hint)
            except typeguard.TypeCheckError:
                wanted = str(hint).replace("typing.", "") if not isinstance(hint, type) else hint.__name__
                raise UserError(f"{name}.{key} = {value!r} has the wrong type: it must be {wanted}.") from None
        for key, (holds, wanted) in self._ranges().items():
            if not holds:
                raise UserError(f"{name}.{key} = {getattr(self, key)!r} is out of range: it must be {wanted}.")


def fields_named(config: Any, *prefixes: str) -> list[dataclasses.Field]:
    """The fields of a config whose names begin with one of the prefixes."""
    return [f for f in dataclasses.fields(config) if f.name.startswith(prefixes)]
