"""Malformed data are made into a task that can be trained on, or refused in one sentence."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from malformed import answer, as_json, damaged, fuzz, mutated, odd_numbers, odd_texts, values

from grpo_jax.experiment import Experiment, to_dict
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.policy.gguf_tokenizer import from_gguf
from grpo_jax.rollout import encode_prompts
from grpo_jax.runs.files import json_line
from grpo_jax.tasks import Task

ROWS = [
    {"question": "1 + 1", "answer": 2, "tags": ["a", {"b": 1.5}]},
    {
        "question": [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2"}],
        "answer": 4,
        "tags": [],
    },
    {"question": "3 + 3", "answer": 6, "tags": None},
]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *map(chr, range(33, 127)), "Ġ"],
    "tokenizer.ggml.token_type": [3, *[1] * 95],
    "tokenizer.ggml.merges": [],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }}<|end|>{% endfor %}",
}
TOKENIZER = from_gguf(Path("x.gguf"), METADATA)()


def success(**_) -> list[bool]:
    return []


def use(task: Task) -> None:
    """What a run does with a task before its first step."""
    config = Experiment(task=task, rewards={"one": len})
    task.warnings()
    fingerprint(config)
    json_line(to_dict(config))
    encode_prompts(task, TOKENIZER, 10**6, 1)
    for row in (*task.train, *task.held_out):
        json_line(row).encode("utf-8")


class Mine:
    def __repr__(self) -> str:
        raise ValueError("two\nlines")


def circular() -> dict:
    row: dict = {"question": "a"}
    row["itself"] = row
    return row


def fails(row: dict) -> str:
    raise SystemExit("two\nlines")


ODD = [object(), Mine(), b"\xff", 1j, {1, 2}, len, circular(), {1: 2, "a": 3}, {("a", 1): 2}, [[]] * 3, ...]
odd = values | st.sampled_from(ODD)
prompts = odd_texts | st.sampled_from(
    ["question", "{question}", "{question[0]}", "{answer:%Y}", "{", "{}", "{0}", "{tags.b}", "{question!z}", "x{{",
     "{answer:9999999999}", "answer", fails, len, str, dict.popitem, lambda row: row["question"], lambda row: Mine()]
)  # fmt: skip
columns = odd | st.sampled_from(
    [None, [], ["answer"], ["nothing"], {"answer": "tags"}, {"a": fails}, {"prompts": "answer"}, [1], {1: "answer"}]
)
held_out = odd_numbers | odd | st.sampled_from([0.5, 1, 2, 0.0, 1.0, -1, 10, True, "test", "", ROWS[:1], {"x": 1}])
options = st.fixed_dictionaries(
    {"prompt": prompts},
    optional={
        "columns": columns,
        "held_out": held_out,
        "system": st.none() | odd_texts | odd,
        "limit": st.sampled_from([None, 1, 2, 10**9, 0, -1, True, 1.5, "2"]),
        "seed": odd,
        "name": odd,
        "max_turns": odd,
        "references": odd,
        "nothing": odd,
    },
)
CALM = {"prompt": "question", "held_out": 1}
asked = st.just(CALM) | options


def test_the_rows_themselves_are_a_task():
    task = Task.from_dataset(ROWS, success=success, **CALM)
    assert answer(lambda: use(task)) is None and len(task.train) == 2


def lines_of(rows: list) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


LINES = lines_of(ROWS)
HOSTILE = [
    b"[" * 100000,
    b'{"a":' * 100000,
    b'{"question": ' + b"9" * 5000 + b"}",
    b'{"question": "\\ud800"}',
    b"\xef\xbb\xbf" + LINES,
    b'{"question": NaN}',
    LINES.replace(b"\n", b"\r"),
    b"\0" * 100,
]
files = (
    damaged(LINES) | mutated(ROWS).filter(lambda rows: isinstance(rows, list)).map(lines_of) | st.sampled_from(HOSTILE)
)


@given(files, asked)
@example(HOSTILE[0], CALM)
@example(HOSTILE[1], CALM)
@example(HOSTILE[2] + b"\n" + LINES, CALM)
@example(HOSTILE[3] + b"\n" + LINES, CALM)
@fuzz(150)
def test_any_file_of_json_lines_is_made_into_a_task_or_refused(tmp_path_factory, content, options):
    path = tmp_path_factory.getbasetemp() / "strange.jsonl"
    path.write_bytes(content)
    answer(lambda: use(Task.from_jsonl(path, success=success, **options)))
    assert path.read_bytes() == content


odd_rows = st.lists(st.sampled_from([*ROWS, *ODD]) | odd, max_size=4) | mutated(ROWS)
datasets = odd_rows | st.dictionaries(st.sampled_from(["train", "test", ""]) | odd_texts, odd_rows, max_size=3) | odd


@given(datasets, asked)
@example([circular(), *ROWS], CALM)
@example([{"question": "a", "x": {1: 2, "a": 3}}, *ROWS], {**CALM, "columns": ["question"]})
@fuzz(150)
def test_any_dataset_is_made_into_a_task_or_refused(dataset, options):
    if isinstance(dataset, str):
        return  # a name on the hub
    answer(lambda: use(Task.from_dataset(dataset, success=success, **options)))


class Odd(Exception):
    """An error of another package, with a text of no line or of several."""


@given(odd_rows.filter(lambda rows: isinstance(rows, list)), asked, st.sampled_from(["", "\n", "two\nlines", None]))
@example([], CALM, "")
@fuzz(100)
def test_any_parquet_file_is_made_into_a_task_or_refused(tmp_path_factory, rows, options, fault):
    def read_table(file):
        if fault is not None:
            raise Odd(fault)
        return SimpleNamespace(to_batches=lambda: [SimpleNamespace(to_pylist=lambda: rows)])

    path = tmp_path_factory.getbasetemp() / "strange.parquet"
    path.write_bytes(b"PAR1")
    with pytest.MonkeyPatch.context() as patch:
        stub = SimpleNamespace(read_table=read_table)
        patch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=stub))
        patch.setitem(sys.modules, "pyarrow.parquet", stub)
        answer(lambda: use(Task.from_parquet(path, success=success, **options)))


names = st.sampled_from(["someone/sums", "sums", "", "/", "a\nb", "../x"]) | odd_texts
places = st.dictionaries(st.sampled_from(["split", "config", "revision"]), odd_texts | odd, max_size=3)


@given(names, datasets, asked, places, st.sampled_from(["", "two\nlines", None, None]))
@fuzz(100)
def test_any_dataset_of_the_hub_is_made_into_a_task_or_refused(name, rows, options, where, fault):
    def load_dataset(*_, **__):
        if fault is not None:
            raise Odd(fault)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        answer(lambda: use(Task.from_dataset(name, success=success, **options, **where)))
