"""What the page shows of an example and an episode: columns, turns by role, boards; and which rows are one example."""

import json
from pathlib import Path

from grpo_jax.report.data import completions
from grpo_jax.report.examples import Examples, board, read_completions, said, transcript

TURNS = [
    {"role": "policy", "text": "<answer>eerie</answer>"},
    {"role": "environment", "text": "EERIE: Y X X X X."},
    {"role": "policy", "text": "robot"},
    {"role": "environment", "text": "That is no English word of 5 letters."},
    {"role": "policy", "text": "zzzzz"},
]


def row(**more) -> dict:
    made = {"step": 0, "prompt_id": 0, "example": 0, "prompt": "", "columns": {"secret": "REBUT"}, "completion": "a"}
    return made | {"rewards": {"won": 0.0}, "reward": 0.0, "advantage": 0.0} | more


def test_examples_with_the_same_prompt_are_told_apart_by_their_place_and_their_columns():
    rows = [row(), row(example=1), row(columns={"secret": "CRANE"}), row(prompt_id=8)]
    shown, _ = completions({"run": rows})
    assert [each[2] for each in shown["rows"]] == [0, 1, 2, 0]  # prompt 8 is example 0 once more
    assert [e["name"] for e in shown["examples"]] == ["example 0", "example 1", "example 0"]
    assert [e["label"] for e in shown["examples"]][1:] == ["example 1 · secret REBUT", "example 0 · secret CRANE"]
    assert shown["examples"][2]["columns"] == [["secret", "CRANE"]]


def test_an_example_is_called_by_its_prompt_if_no_other_has_it():
    examples = Examples()
    asked = [("2 + 2", 0), ("3 + 3", 1), ("3 + 3", 2)]
    assert [examples.number(row(prompt=prompt, example=place)) for prompt, place in asked] == [0, 1, 2]
    names = [(each["name"], each["label"]) for each in examples.shown()]
    assert names[0] == ("2 + 2", "2 + 2")
    assert names[2] == ("example 2", "example 2 · secret REBUT · 3 + 3")


def test_columns_are_shown_in_full_and_with_their_control_characters_escaped():
    examples = Examples()
    examples.number(row(columns={"context": "x" * 5000, "answer": [1, None], "name\x1b": "\u202eevil"}))
    [shown] = examples.shown()
    assert shown["columns"] == [["context", "x" * 5000], ["answer", "[1, null]"], ["name\\x1b", "\\u202eevil"]]


def test_turns_are_shown_in_their_order_with_their_roles():
    assert said(row(turns=TURNS)) == [[turn["role"], turn["text"]] for turn in TURNS]
    assert said(row(completion="once")) == "once"
    messages = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "no"}]
    assert transcript(row(completion=messages)) == [("policy", "A"), ("environment", "no")]  # of the first versions


def test_a_long_episode_is_cut_and_says_so():
    long = [{"role": "policy", "text": "a" * 1500}, {"role": "environment", "text": "b" * 1500}, TURNS[0]]
    first, second = said(row(turns=long))
    assert first == ["policy", "a" * 1500] and second == ["environment", "b" * 500 + "… (1500 characters)"]


def test_a_board_has_the_marks_of_the_rules_and_none_for_what_the_game_does_not_accept():
    """REBUT has one E and one R. Of EERIE the first E is elsewhere, the second is in its place and takes the only E."""
    messages = [{"role": {"policy": "assistant"}.get(t["role"], "user"), "content": t["text"]} for t in TURNS]
    played = row(completion=messages, is_wordle=True)
    assert board(played) == [["EERIE", "XGYXX"], ["ROBOT", "GXGXG"], ["ZZZZZ", ""]]


def test_only_wordle_with_a_known_secret_has_a_board():
    assert board(row(completion="robot")) is None
    assert board(row(completion="robot", is_wordle=True, columns={"secret": "QQQQQ"})) is None
    assert board(row(completion="robot", is_wordle=True, columns={})) is None
    [[word, marks]] = board(row(completion="I would rather not guess", is_wordle=True))
    assert (word, marks) == ("I WOULD RATH… (24 characters)", "")


def test_the_rows_of_the_first_versions_are_read(tmp_path):
    old = [{"prompt": "", "prompt_id": i, "completion": "robot"} for i in (1, 4, 7)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in old))
    (tmp_path / "config.json").write_text(json.dumps({"task": {"name": "wordle_six", "train": 3}}))
    rows = read_completions(tmp_path)
    assert [each["example"] for each in rows] == [1, 1, 1] and all(each["is_wordle"] for each in rows)
    examples = Examples()
    assert {examples.number(each) for each in rows} == {0} and board(rows[0]) is None
    assert read_completions(Path(tmp_path / "nowhere")) == []
