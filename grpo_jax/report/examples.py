"""The examples of saved completions, as the page shows them: what was asked, what was right, and what was said."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.report.completion_plots import Row
from grpo_jax.rewards import turns
from grpo_jax.rewards.wordle import guess_of
from grpo_jax.rewards.wordle_rules import feedback, is_word
from grpo_jax.runs.display import column_texts, visible
from grpo_jax.runs.files import read_json, read_rows

LONGEST, PROMPT = 2000, 300  # characters of a completion and of a prompt


def read_completions(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's completions, each with the place of its `example` in the split, and whether it is Wordle.

    In runs of the first versions the place follows from `prompt_id`, and rows have no columns.
    """
    task = read_json(run / "config.json").get("task") or {}
    size, name = task.get("train") or 0, str(task.get("name", ""))
    rows = []
    for row in read_rows(run / "completions.jsonl"):
        prompt_id = row.get("prompt_id")
        if "example" not in row and isinstance(prompt_id, int) and size:
            row["example"] = prompt_id % size
        rows.append(row | {"is_wordle": "wordle" in name.lower()})
    return rows


class Examples:
    """The different examples of some rows, numbered as they come.

    Examples are told apart by their place in the split, their columns and their prompt, and never by the prompt alone:
    all games of Wordle have the same one.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._shown: list[dict[str, Any]] = []

    def number(self, row: Row) -> int:
        """The number of a row's example."""
        columns = row.get("columns") or {}
        place = row.get("example", row.get("prompt_id"))
        key = json.dumps([place, row["prompt"], columns], sort_keys=True, default=repr)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            texts = [[printable(name), printable(text)] for name, text in column_texts(columns).items()]
            self._shown.append({"place": place, "prompt": prompt_text(row["prompt"]), "columns": texts})
        return self._numbers[key]

    def shown(self) -> list[dict[str, Any]]:
        """What the page says of each: `name`, `label` (longer, to choose by), and `columns` as [name, text].

        The name is the prompt if no other example has the same, and else the example's place in its split.
        """
        counts = Counter(each["prompt"] for each in self._shown)
        shown = []
        for number, each in enumerate(self._shown):
            prompt, columns = each["prompt"], each["columns"]
            name = (
                prompt
                if prompt and counts[prompt] == 1
                else f"example {number if each['place'] is None else each['place']}"
            )
            rest = ", ".join(f"{key} {text}" for key, text in columns) if name != prompt else ""
            label = " · ".join(filter(None, [name, rest, prompt if name != prompt and len(counts) > 1 else ""]))
            shown.append({"name": name, "label": label[:PROMPT], "columns": columns})
        return shown


def said(row: Row) -> str | list[list[str]]:
    """What a row says: the text of its one turn, or all turns, each with its role; cut to `LONGEST` characters."""
    given = transcript(row)
    if len(given) == 1:
        return _cut(printable(given[0][1]), LONGEST)
    left, found = LONGEST, []
    for role, text in given:
        shown = printable(text)
        found.append([role, _cut(shown, left)])
        left -= len(shown)
        if left <= 0:
            break
    return found


def transcript(row: Row) -> list[tuple[str, str]]:
    """The turns of a row, each with its role, "policy" or "environment", also of a row that has messages alone."""
    if row.get("turns"):
        return [(turn["role"], turn["text"]) for turn in row["turns"]]
    if isinstance(row["completion"], str):
        return [("policy", row["completion"])]
    roles = {"assistant": "policy"}
    return [(roles.get(m["role"], "environment"), m.get("content") or "") for m in row["completion"]]


def board(row: Row) -> list[list[str]] | None:
    """A Wordle board: each guess with its marks, "GYX…", or with no marks if the game does not accept it.

    None if the row is not of a Wordle task, or if its secret is not known.
    """
    secret = (row.get("columns") or {}).get("secret")
    if not row.get("is_wordle") or not isinstance(secret, str) or not is_word(secret):
        return None
    guesses = [guess_of(turn) for turn in turns(row["completion"])]
    return [[printable(_cut(g, 12)), feedback(g, secret) if is_word(g) else ""] for g in guesses]


def prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a prompt (of a chat, its last message), cut to 300 characters."""
    return printable(prompt if isinstance(prompt, str) else prompt[-1].get("content") or "")[:PROMPT]


def printable(text: str) -> str:
    """The text with control and invisible characters escaped, which could make a line look like another."""
    return "\n".join(visible(line).plain for line in text.split("\n"))


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"
