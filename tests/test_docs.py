"""The tables of modules in the documentation say what `test_floors` checks."""

import re
from pathlib import Path

import pytest
from test_floors import FLOORS

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \|", re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_a_table_of_modules_has_every_module_on_its_floor(page):
    floors: list[set[str]] = [set() for _ in FLOORS]
    for number, modules in ROW.findall((ROOT / page).read_text()):
        floors[int(number)] |= {name.rstrip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", modules)}
    assert floors == [floor - {"__init__"} for floor in FLOORS]
