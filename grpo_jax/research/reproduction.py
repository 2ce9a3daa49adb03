"""The numbers in papers' tables, recomputed: the cells that a manifest declares, and whether our numbers agree."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grpo_jax.errors import UserError
from grpo_jax.experiment import run_file

Verdict = Literal["agrees", "disagrees", "not run here"]


@dataclass(frozen=True)
class Cell:
    """One printed number (or claim), and how to compute it.

    Attributes:
      table, cell: the names of the table and of the cell; `source` names the paper.
      printed: what is printed there; None if the cell is empty.
      expected: the known verdict; any other verdict is news.
      compute: computes our number, in the unit of `printed`; None if this machine cannot. Then `hardware` says what is
        needed and `command` how to run it.
      tolerance: the largest difference at which the two agree: half of the last printed digit, plus three standard
        errors of our number.
      why: for a disagreement, what is wrong and what the right value is.
      note: a remark for the reader.
    """

    table: str
    cell: str
    source: str
    printed: float | str | None
    expected: Verdict
    compute: Callable[[], float] | None = None
    tolerance: float = 0.0
    hardware: str = "any CPU, seconds"
    command: str = ""
    why: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if (self.compute is None) != (self.expected == "not run here" and self.printed is not None):
            raise UserError(
                f"{self.table}, {self.cell}: a cell is either computed or expected not to be run, one of the two."
            )
        if self.expected == "disagrees" and not self.why:
            raise UserError(f"{self.table}, {self.cell}: a disagreement must say why.")


@dataclass(frozen=True)
class Outcome:
    """A cell with our number (None if there is none), the verdict and a note."""

    cell: Cell
    ours: float | None
    verdict: Verdict
    note: str

    @property
    def is_news(self) -> bool:
        """Whether the verdict differs from the expected one."""
        return self.verdict != self.cell.expected

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON-able data; the verdict of a disagreement includes the reason."""
        why = self.cell.why if self.verdict == "disagrees" else ""
        return {
            "table": self.cell.table,
            "cell": self.cell.cell,
            "printed": self.cell.printed,
            "ours": None if self.ours is None else float(f"{self.ours:.6g}"),
            "verdict": f"{self.verdict}: {why}" if why else self.verdict,
            "note": self.note,
        }


def check(cell: Cell) -> Outcome:
    """Computes a cell's number, if this machine can, and compares it with the printed one."""
    if cell.compute is None:
        needs = f"needs {cell.hardware}" + (f": {cell.command}" if cell.command else "")
        return Outcome(cell, None, "not run here", f"{needs}. {cell.note}".strip())
    ours = float(cell.compute())
    if cell.printed is None:
        return Outcome(cell, ours, "not run here", f"nothing is printed here to compare with. {cell.note}".strip())
    if isinstance(cell.printed, str):
        raise UserError(
            f"{cell.table}, {cell.cell}: a computed number cannot be compared with the text {cell.printed!r}."
        )
    agrees = math.isclose(ours, cell.printed, rel_tol=0, abs_tol=cell.tolerance)
    return Outcome(cell, ours, "agrees" if agrees else "disagrees", cell.note)


def load_manifests(paths: Iterable[Path]) -> list[Cell]:
    """The `cells` of some manifest files, in order. Raises `UserError` for a file that defines none."""
    found: list[Cell] = []
    for path in paths:
        cells = getattr(run_file(path), "cells", None)
        if not isinstance(cells, list) or not all(isinstance(cell, Cell) for cell in cells):
            raise UserError(f"{path} declares no cells: it must define `cells`, a list of grpo_jax's Cell.")
        found += cells
    return found
