"""Dataclasses whose fields are checked when they are made: their types, and then their ranges."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

import typeguard

from grpo_jax.errors import UserError, shown

Range = tuple[bool, str]  # whether a value is in range, and what it must be
Ranges = dict[str, Range]  # by field


# The sizes of a float32 other than 0: XLA takes what is smaller for 0, and what is larger for infinity.
SMALLEST, LARGEST = 1.1754944e-38, 3.4028235e38
MOST = 2**31 - 1  # JAX counts in int32


def admits(hint: Any, value: Any) -> bool:
    """Whether an annotation admits a value, every entry of its mappings and sequences included.

    True and False are numbers to Python. Here they are not: `steps=True` is a mistake.
    """
    if isinstance(value, bool) and hint is not Any and bool not in (hint, *get_args(hint)):
        return False
    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except (typeguard.TypeCheckError, RecursionError):
        return False
    return True


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a field: itself, or those of its mapping or sequence."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)):
            yield number


class Checked:
    """A dataclass whose every field is checked against its annotation, and then against `_ranges`, when it is made.

    Every number must be one that arrays hold: a float must be finite in float32 and not so small that it is 0 there,
    and an integer must be an int32, unless its field is in `wide`.
    """

    wide = frozenset[str]()  # fields that only Python counts with: they have at most 53 bits

    def _ranges(self) -> Ranges:
        return {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        for key, hint in get_type_hints(type(self)).items():
            value = getattr(self, key)
            if not admits(hint, value):
                wanted = str(hint).replace("typing.", "") if not isinstance(hint, type) else hint.__name__
                raise UserError(f"{name}.{key} = {shown(value)} has the wrong type: it must be {wanted}.")
            is_float = {float, Mapping[str, float]} & {hint, *get_args(hint)}
            if is_float and not all(x == 0 or SMALLEST <= abs(x) <= LARGEST for x in _numbers(value)):
                wanted = "finite in float32: 0, or between 1.2e-38 and 3.4e38 in size"
                raise UserError(f"{name}.{key} = {shown(value)} is out of range: it must be {wanted}.")
        for key, (holds, wanted) in self._ranges().items():
            if not holds:
                raise UserError(f"{name}.{key} = {shown(getattr(self, key))} is out of range: it must be {wanted}.")
        for key, value in vars(self).items():
            most = 2**53 if key in self.wide else MOST
            if isinstance(value, int) and abs(value) > most:
                raise UserError(f"{name}.{key} = {shown(value)} is out of range: it must be at most {most}.")


def fields_named(config: Any, *prefixes: str) -> list[dataclasses.Field]:
    """The fields of a config whose names begin with one of the prefixes."""
    return [f for f in dataclasses.fields(config) if f.name.startswith(prefixes)]
