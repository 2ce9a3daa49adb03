"""`grpo-jax fields`: every field of an experiment, with its type, its default and what it is for."""

import dataclasses
import inspect
import typing
from collections.abc import Collection, Iterator
from typing import Annotated, Any

from tyro.conf import Positional, arg

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment
from grpo_jax.experiment.overrides import nearest


def fields(
    section: Annotated[Positional[str], arg(metavar="SECTION", help="One section, such as loss or sampling.")] = "",
    /,
) -> None:
    """List every field of an experiment, as --set takes it: its type, its default, and what its section is for."""
    from rich.console import Console
    from rich.table import Table

    found = dict(sections())
    if section and section not in found:
        raise UserError(f"there is no section {section!r}{nearest(section, [name for name in found if name])}")
    console = Console(highlight=False, markup=False)
    for name, config in found.items():
        if section in ("", name):
            console.print(f"{name or 'experiment'}: {config.__name__}", style="bold")
            paragraphs = inspect.cleandoc(config.__doc__ or "").split("\n\n")
            console.print("\n".join(text if text.startswith("-") else " ".join(text.split()) for text in paragraphs))
            table = Table(box=None, header_style="dim")
            for column in ("field", "type", "default"):
                table.add_column(column, overflow="fold")
            for row in rows(config, name, found):
                table.add_row(*row)
            console.print(table)
            console.print()


def sections() -> Iterator[tuple[str, Any]]:
    """The experiment itself (named by an empty text), its configs and theirs, by their dotted names."""
    yield "", Experiment
    waiting: list[tuple[str, Any]] = [("", Experiment)]
    while waiting:
        path, config = waiting.pop(0)
        for field in dataclasses.fields(config):
            hint = typing.get_type_hints(config)[field.name]
            for kind in typing.get_args(hint) or (hint,):
                if dataclasses.is_dataclass(kind):
                    name = f"{path}.{field.name}" if path else field.name
                    yield name, kind
                    waiting.append((name, kind))


def rows(config: Any, path: str, nested: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Dotted name, type and default of each field that is no config itself; `nested` names those that are."""
    for field in dataclasses.fields(config):
        name = f"{path}.{field.name}" if path else field.name
        if name in nested and field.default is not None:
            continue
        hint = inspect.formatannotation(typing.get_type_hints(config)[field.name]).replace("typing.", "")
        for module in ("collections.abc.", "grpo_jax.experiment.configs.", "grpo_jax.experiment.methods."):
            hint = hint.replace(module, "")
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default_factory() if callable(field.default_factory) else field.default
        yield name, hint, "needed" if missing else repr(default)
