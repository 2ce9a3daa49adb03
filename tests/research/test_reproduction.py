"""Printed numbers against ours: verdicts, what is news, and the article's manifest against the article."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.errors import UserError
from grpo_jax.research.reproduction import Cell, check, load_manifests

ROOT = Path(__file__).parents[2]
ARTICLE = ROOT / "experiments" / "papers" / "article.py"


def cell(printed, ours, expected="agrees", **more) -> Cell:
    return Cell("t", "c", "source", printed, expected, compute=lambda: ours, tolerance=0.005, **more)


@pytest.mark.parametrize(("ours", "verdict"), [(0.784, "agrees"), (0.776, "agrees"), (0.786, "disagrees")])
def test_a_number_agrees_within_half_of_its_last_digit(ours, verdict):
    outcome = check(cell(0.78, ours))
    assert outcome.verdict == verdict
    assert outcome.is_news == (verdict != "agrees")


def test_a_disagreement_says_why():
    row = check(cell(0.78, 0.5, "disagrees", why="it is of another group")).to_dict()
    assert row == {
        "table": "t", "cell": "c", "printed": 0.78, "ours": 0.5,
        "verdict": "disagrees: it is of another group", "note": "",
    }  # fmt: skip
    with pytest.raises(UserError, match="must say why"):
        cell(0.78, 0.5, "disagrees")


def test_what_cannot_be_run_is_listed_with_what_it_needs():
    outcome = check(Cell("t", "c", "source", 50, "not run here", hardware="8 GPUs", command="train it"))
    assert (outcome.ours, outcome.verdict, outcome.note) == (None, "not run here", "needs 8 GPUs: train it.")
    with pytest.raises(UserError, match="one of the two"):
        Cell("t", "c", "source", 50, "agrees")


def test_a_gap_in_the_table_gets_our_number_and_no_verdict():
    outcome = check(cell(None, 0.39, "not run here"))
    assert (outcome.ours, outcome.verdict, outcome.is_news) == (0.39, "not run here", False)


def test_every_number_of_the_article_is_a_cell():
    article = json.loads((ROOT / "tests" / "golden" / "article.json").read_text())
    printed = {
        table: [c.printed for c in load_manifests([ARTICLE]) if c.table == table and "claim" not in c.cell]
        for table in ("group_of_eight", "three_step_figure", "temperature_figure")
    }
    for table in ("group_of_eight", "three_step_figure"):
        pairs = zip(article[table]["reward"], article[table]["advantage"], strict=True)
        assert printed[table] == [value for pair in pairs for value in pair]
    rows = [zip(row["reward"], row["advantage"], strict=True) for row in article["temperature_figure"]]
    assert printed["temperature_figure"] == [value for row in rows for pair in row for value in pair]


def test_the_article_has_the_verdicts_that_are_committed():
    outcomes = [check(c) for c in load_manifests([ARTICLE])]
    assert not [o.cell.cell for o in outcomes if o.is_news]
    disagrees = [(o.cell.table, o.cell.cell) for o in outcomes if o.verdict == "disagrees"]
    assert disagrees == [
        *(("three_step_figure", name) for name in ("advantage[0] A", "advantage[1] B", "reward[2] C",
                                                   "advantage[2] C", "advantage[3] D")),
        *(("temperature_figure", f"temperature {name}") for name in (
            "0.7 advantage[0] FOUND", "0.7 advantage[2] WORD",
            "1.3 advantage[0] GROUND", "1.3 advantage[1] SPIND", "1.3 advantage[2] FINDS")),
    ]  # fmt: skip


def test_the_script_ends_with_1_when_a_verdict_is_news(tmp_path):
    manifest = tmp_path / "manifest.py"
    manifest.write_text(
        "from grpo_jax.research.reproduction import Cell\n"
        "cells = [Cell('t', 'a', 's', 1.0, 'agrees', compute=lambda: 1.0),\n"
        "         Cell('t', 'b', 's', 1.0, 'agrees', compute=lambda: 2.0)]\n"
    )
    command = [sys.executable, str(ROOT / "scripts" / "reproduce_tables.py"), str(manifest), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert [(row["cell"], row["ours"], row["verdict"]) for row in json.loads(done.stdout)] == [
        ("a", 1.0, "agrees"), ("b", 2.0, "disagrees"),
    ]  # fmt: skip
    assert done.stderr == "t, b: disagrees, where agrees was expected\n"


def test_a_manifest_without_cells_is_a_mistake(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="declares no cells"):
        load_manifests([tmp_path / "empty.py"])
