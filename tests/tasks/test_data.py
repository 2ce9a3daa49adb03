"""Tasks from files and datasets: what becomes a prompt and a column, the splits, and what is said of bad data."""

import json
import sys
from types import SimpleNamespace

import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, load, load_ablation, sources, to_dict
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.tasks import Task, from_dataset

ROWS = [{"question": f"{n} + 1", "solution": n + 1, "level": n % 3} for n in range(20)]


def success(**_) -> list[bool]:
    return []


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(rows=ROWS, **more) -> Task:
    return Task.from_dataset(rows, **{"prompt": "question", "success": success} | more)


def contents(examples) -> list[str]:
    return [example["prompt"] for example in examples]


def test_a_row_becomes_a_prompt_and_columns(tmp_path):
    task = Task.from_jsonl(write(tmp_path / "sums.jsonl"), prompt="question", held_out=5, success=success)
    assert task.name == "sums" and (len(task.train), len(task.held_out)) == (15, 5)
    for example in [*task.train, *task.held_out]:
        n = int(example["prompt"].split()[0])
        assert example == {"prompt": f"{n} + 1", "solution": n + 1, "level": n % 3}
    assert task.origin == {"file": "sums.jsonl", "rows": 20, "held_out": 5, "seed": 0}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"columns": {"answer": "solution"}}, {"prompt": "0 + 1", "answer": 1}),
        ({"columns": ["level"]}, {"prompt": "0 + 1", "level": 0}),
        ({"columns": []}, {"prompt": "0 + 1"}),
        (
            {"columns": {"answer": lambda row: str(row["solution"])}, "prompt": "Level {level}: {question} = ?"},
            {"prompt": "Level 0: 0 + 1 = ?", "answer": "1"},
        ),
        ({"prompt": lambda row: row["question"][::-1], "columns": []}, {"prompt": "1 + 0"}),
        (
            {"system": "Add.", "columns": []},
            {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "0 + 1"}]},
        ),
        (
            {"system": "Add.", "columns": [], "prompt": lambda row: [{"role": "user", "content": "hi"}]},
            {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "hi"}]},
        ),
    ],
)
def test_prompts_and_columns_are_mapped(more, expected):
    assert made(held_out=ROWS[1:2], **more).train[0] == expected


def test_a_data_column_prompt_is_replaced_by_the_one_that_is_made():
    rows = [{"prompt": "cab", "n": 1}, {"prompt": "fed", "n": 2}]
    assert made(rows, prompt="Sort {prompt}", held_out=rows[:1]).train[1] == {"prompt": "Sort fed", "n": 2}


def test_held_out_rows_follow_from_content_and_seed_alone():
    task = made(held_out=0.25)
    assert len(task.held_out) == 5 and not set(contents(task.train)) & set(contents(task.held_out))
    assert sorted(contents([*task.train, *task.held_out])) == sorted(row["question"] for row in ROWS)
    assert contents(task.train) == [q for q in (r["question"] for r in ROWS) if q in contents(task.train)]
    assert contents(made(ROWS[::-1], held_out=0.25).held_out) == contents(task.held_out)
    assert contents(made(held_out=5).held_out) == contents(task.held_out)
    assert contents(made(held_out=0.25, seed=1).held_out) != contents(task.held_out)
    worded = made(held_out=0.25, prompt="What is {question}?").held_out
    assert contents(worded) == [f"What is {q}?" for q in contents(task.held_out)]


def test_rows_that_make_the_same_example_stay_together():
    rows = [{"question": "ab"[n % 2], "id": n} for n in range(10)]  # two examples, five rows each
    task = made(rows, columns=[], held_out=1)
    assert len(task.train) == len(task.held_out) == 5 and task.warnings() == []
    with pytest.raises(UserError, match="leaves nothing to train on"):
        made([{"question": "a", "id": n} for n in range(3)], columns=[], held_out=1)


def test_rows_that_make_the_same_example_are_held_out_whatever_their_order():
    # Eight examples of four rows each, all of other content: an example stands at the first of its rows' places.
    rows = [{"question": "abcdefgh"[n % 8], "id": n} for n in range(32)]
    orders = [rows, rows[::-1], rows[8:] + rows[:8], rows[24:] + rows[:24]]
    held_out = [sorted(contents(made(each, columns=[], held_out=8).held_out)) for each in orders]
    assert len(held_out[0]) == 8 and len(set(held_out[0])) == 2  # two examples, four rows each
    assert held_out == [held_out[0]] * 4


@pytest.mark.parametrize("held_out", [0, 20, -1, 0.0, 1.0, 0.001, 2.5, True])
def test_a_split_cannot_be_empty(held_out):
    with pytest.raises(UserError, match=r"of 20 rows leaves a split empty: .* a number from 1 to 19"):
        made(held_out=held_out)


def test_another_file_or_another_split_may_be_held_out(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:15]), write(tmp_path / "b.jsonl", ROWS[15:])
    options = {"prompt": "question", "success": success, "limit": 4}
    task = Task.from_jsonl(tmp_path / "a.jsonl", held_out=tmp_path / "b.jsonl", **options)
    assert contents(task.train) == ["0 + 1", "1 + 1", "2 + 1", "3 + 1"]
    assert contents(task.held_out) == ["15 + 1", "16 + 1", "17 + 1", "18 + 1"]
    splits = {"train": ROWS[:15], "test": ROWS[15:]}
    other = from_dataset(splits, held_out="test", **options)
    assert (other.train, other.held_out) == (task.train, task.held_out)
    with pytest.raises(UserError, match="has no split 'tset'; did you mean 'test'"):
        made(splits, held_out="tset")
    with pytest.raises(UserError, match="names a split, but the dataset that was given is a single one"):
        made(held_out="test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x", ', r"x\.jsonl:3 is not a line of JSON: Expecting property name"),
        ('"x"', r"x\.jsonl:3 must be a JSON object"),
        ('{"qestion": "x"}', r"x\.jsonl:3 has no column 'question' for 'prompt' \(did you mean 'qestion'\?\): it has"),
        ("\udcff", r"x\.jsonl:3 is not a line of JSON: it is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    text = f'{{"question": "a"}}\n\n{line}\n'
    (tmp_path / "x.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        Task.from_jsonl(tmp_path / "x.jsonl", prompt="question", success=success)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"columns": {"answer": "solutoin"}},
            r"no column 'solutoin' for 'answer' \(did you mean 'solution'\?\): it has",
        ),
        ({"prompt": "Q: {qestion}"}, r"no column 'qestion' for 'prompt' \(did you mean 'question'\?\)"),
        ({"prompt": "zzz"}, r"row 0 has no column 'zzz' for 'prompt': it has 'question', 'solution', 'level'"),
        ({"prompt": "{question"}, "is no format string"),
        ({"prompt": "{level:%Y}"}, r"row 0: prompt = '{level:%Y}' cannot be filled in"),
        (
            {"prompt": lambda row: row["x"]},
            "row 0: the function for 'prompt' failed with KeyError: 'x'; the columns are",
        ),
        ({"limit": 0}, "limit = 0 is out of range"),
        ({"revision": "main"}, "revision and config are for a dataset's name on the hub"),
        ({"succes": len}, "no argument 'succes'; did you mean 'success'"),
        ({"revison": "v1"}, "no argument 'revison'; did you mean 'revision'"),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_sentence(more, message):
    with pytest.raises(UserError, match=message):
        made(**more)


def test_a_task_needs_success_rows_and_a_file(tmp_path):
    with pytest.raises(UserError, match="needs success="):
        Task.from_dataset(ROWS, prompt="question")
    with pytest.raises(UserError, match="has no rows"):
        made([])
    with pytest.raises(UserError, match="row 0 is of type str: a row must be a dict of columns"):
        made(["x"])
    with pytest.raises(UserError, match=r"there is no data file 'nothing\.jsonl' in .*tests"):
        Task.from_jsonl("nothing.jsonl", success=success)
    with pytest.raises(UserError, match="the prompt has a system message already"):
        made(prompt=lambda row: [{"role": "system", "content": "x"}], system="y")


EXPERIMENT = """
from grpo_jax.experiment import Ablation, Experiment
from grpo_jax.tasks import Task

def one(*, completions, **columns):
    return [1.0 for _ in completions]

task = Task.from_{kind}("sums.{kind}", prompt="question", success=one)
config = Experiment(task=task, rewards={{"one": one}})
ablation = Ablation(config, arms={{"base": {{}}, "more": {{"loss.beta": 0.1}}}}, seeds=range(1))
"""


class Parquet(SimpleNamespace):
    """As much of `pyarrow.parquet` as is used, for files that hold JSON."""

    @staticmethod
    def read_table(file):
        assert not isinstance(file, (str, bytes)), "pyarrow must not open the file itself: nobody would see it"
        batch = SimpleNamespace(to_pylist=lambda: [json.loads(line) for line in lines])
        lines = file.read().splitlines()
        return SimpleNamespace(to_batches=lambda: [batch])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_file_counts_in_the_names_of_runs_and_is_copied(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(parquet=Parquet()))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", Parquet())
    (tmp_path / "toy.py").write_text(EXPERIMENT.format(kind=kind))
    data = write(tmp_path / f"sums.{kind}")
    before = load_ablation(tmp_path / "toy.py").runs()[0].key
    assert load_ablation(tmp_path / "toy.py").runs()[0].key == before
    assert data.name in sources.describe(tmp_path / "toy.py")["files"]
    sources.copy(tmp_path / "toy.py", tmp_path / "copy")
    write(data, [row | {"level": 9} for row in ROWS])
    assert load_ablation(tmp_path / "toy.py").runs()[0].key != before
    copied = load(
        tmp_path / "copy" / "toy.py", ["arm=base"]
    )  # a relative path is looked for beside the file that has it
    assert {example["level"] for example in copied.task.train} == {0, 1, 2}


def test_where_examples_came_from_is_recorded_and_does_not_name_a_run(tmp_path):
    read = Task.from_jsonl(write(tmp_path / "a.jsonl"), prompt="question", success=success, name="toy")
    same = Task("toy", read.train, read.held_out, success)
    assert fingerprint(read) == fingerprint(same) and read.origin != same.origin
    config = Experiment(task=read, rewards={"one": len})
    assert to_dict(config)["task"]["origin"] == {"file": "a.jsonl", "rows": 20, "held_out": 0.1, "seed": 0}
    assert "origin" not in to_dict(Experiment(task=same, rewards={"one": len}))["task"]


@pytest.mark.parametrize(
    ("module", "call", "line"),
    [
        ("pyarrow.parquet", lambda path: Task.from_parquet(path, success=success), "pip install pyarrow"),
        ("datasets", lambda path: Task.from_dataset("someone/sums", success=success), "pip install datasets"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_line_that_installs_it(tmp_path, module, call, line, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=line):
        call(write(tmp_path / "x.parquet"))


def hub(monkeypatch, commit="0123456789" * 4) -> list:
    """A `datasets` whose hub has one dataset; returns what was asked for."""
    calls = []

    class Rows(list):
        info = SimpleNamespace(download_checksums={f"hf://datasets/someone/sums@{commit}/train.parquet": {}})
        _fingerprint = "abc"

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split, revision))
        if name != "someone/sums":
            raise FileNotFoundError("no such dataset")
        return Rows(ROWS[:15] if split == "train" else ROWS[15:])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_dataset_of_the_hub_is_loaded_at_its_revision_and_recorded(monkeypatch, capsys):
    calls = hub(monkeypatch)
    options = {"prompt": "question", "success": success, "held_out": "test", "config": "main"}
    task = Task.from_dataset("someone/sums", revision="v1", **options)
    assert calls == [("someone/sums", "main", "train", "v1"), ("someone/sums", "main", "test", "v1")]
    assert (task.name, len(task.train), len(task.held_out)) == ("sums", 15, 5)
    assert task.origin == {
        "dataset": "someone/sums", "config": "main", "revision": "v1", "commit": "0123456789" * 4,
        "split": "train", "rows": 15, "fingerprint": "abc", "held_out": "test", "held_out_rows": 5,
    }  # fmt: skip
    assert capsys.readouterr().err == ""
    Task.from_dataset("someone/sums", **options)
    assert f"write revision={'0123456789' * 4!r}" in capsys.readouterr().err
    with pytest.raises(UserError, match="'someone/x' cannot be loaded: FileNotFoundError: no such dataset"):
        Task.from_dataset("someone/x", **options)


def test_a_real_parquet_file_is_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "sums.parquet")
    task = Task.from_parquet(tmp_path / "sums.parquet", prompt="question", success=success)
    assert (task.train, task.held_out) == (made().train, made().held_out)
    (tmp_path / "bad.parquet").write_bytes(b"not Parquet")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as Parquet"):
        Task.from_parquet(tmp_path / "bad.parquet", success=success)


def test_a_real_dataset_in_memory_is_read():
    datasets = pytest.importorskip("datasets")
    task = made(datasets.Dataset.from_list(ROWS))
    assert (task.train, task.held_out) == (made().train, made().held_out)
    assert task.origin["fingerprint"]
