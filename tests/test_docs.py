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


def test_every_module_is_on_one_page_of_the_reference():
    files = (ROOT / "grpo_jax").rglob("*.py")
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    pages = [page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)]
    assert sorted(shown) == sorted(modules - {"grpo_jax", "grpo_jax.errors"})
