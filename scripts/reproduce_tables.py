#!/usr/bin/env python
"""Recomputes the tables that the manifests in experiments/papers declare: printed | ours | verdict.

    python scripts/reproduce_tables.py                    every manifest
    python scripts/reproduce_tables.py experiments/papers/article.py --json

A verdict is `agrees`, `disagrees` with why, or `not run here` with the hardware that it needs. Exit status 1 when a
verdict is not the one that its manifest expects, 2 for a manifest that cannot be read.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from grpo_jax.cli import common
from grpo_jax.errors import UserError
from grpo_jax.research.reproduction import Outcome, check, load_manifests

MANIFESTS = Path(__file__).resolve().parents[1] / "experiments" / "papers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifests", type=Path, nargs="*", help="default: every file in experiments/papers")
    parser.add_argument("--json", action="store_true", help="print a list of objects and nothing else")
    options = parser.parse_args()
    common.prepare_jax()
    try:
        cells = load_manifests(options.manifests or sorted(MANIFESTS.glob("*.py")))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes = [check(cell) for cell in cells]
    if options.json:
        print(json.dumps([outcome.to_dict() for outcome in outcomes], indent=2, ensure_ascii=False))
    else:
        show(outcomes)
    news = [outcome for outcome in outcomes if outcome.is_news]
    for outcome in news:
        cell = outcome.cell
        print(f"{cell.table}, {cell.cell}: {outcome.verdict}, where {cell.expected} was expected", file=sys.stderr)
    return 1 if news else 0


def show(outcomes: list[Outcome]) -> None:
    """Prints one table for each of the papers' tables."""
    console = Console(highlight=False, markup=False)
    for name in dict.fromkeys(outcome.cell.table for outcome in outcomes):
        table = Table(title=name, title_justify="left")
        for column in ("cell", "printed", "ours", "verdict", "note"):
            table.add_column(column, justify="right" if column in ("printed", "ours") else "left", overflow="fold")
        for outcome in (outcome for outcome in outcomes if outcome.cell.table == name):
            row = outcome.to_dict()
            table.add_row(*(text(row[str(column.header)]) for column in table.columns), style="red" * outcome.is_news)
        console.print(table)


def text(value: float | str | None) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
