"""Files of a run directory: always whole, always JSON, even if the disk is full."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import recorded
from grpo_jax.runs import files


@given(st.text() | st.floats() | st.lists(st.floats()) | st.dictionaries(st.text(), st.floats()))
def test_anything_becomes_strict_json(value):
    json.loads(json.dumps(recorded.jsonable({"value": value})), parse_constant=pytest.fail)


def test_arrays_and_paths_become_json():
    assert recorded.jsonable({1: np.arange(2), "p": Path("a"), "n": np.float32("inf")}) == {
        "1": [0, 1],
        "p": "a",
        "n": None,
    }


def test_a_config_is_that_of_the_beginning_with_the_changes_of_every_visit():
    begun = {"steps": 1, "loss": {"beta": 0.0, "epsilon": 0.2}}
    visits = [{"changes": {"steps": [1, 3], "loss.beta": [0.0, 0.1]}}, {"changes": {"steps": [3, 5]}}, {}]
    assert recorded.current_config(begun, {"resumed": visits}) == {"steps": 5, "loss": {"beta": 0.1, "epsilon": 0.2}}
    assert begun["loss"]["beta"] == 0.0 and recorded.current_config(begun, {}) == begun


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not a line of JSON"):
        list(files.read_rows(tmp_path / "metrics.jsonl"))


def test_a_full_disk_leaves_no_half_written_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    files.append_rows(path, [{"step": 0}])
    opened = Path.open

    def full(self, *arguments, **options):
        file = opened(self, *arguments, **options)

        class Full:  # writes three bytes, then nothing more
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                if file.tell() > 12:
                    raise OSError(28, "No space left on device")
                return file.write(data[:3])

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match="No space left"):
        files.append_rows(path, [{"step": 1}])
    monkeypatch.undo()
    assert path.read_text() == '{"step": 0}\n'


def test_what_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    files.write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*run.json: No space left on device\."):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_numbers_keep_their_kind_and_what_is_not_finite_is_none():
    value = {
        "b": True,
        "i": 3,
        "f": 0.5,
        "inf": float("-inf"),
        "t": (1, [float("nan")]),
        "a": np.array([[1.5], [np.inf]]),
    }
    assert files.jsonable(value) == {"b": True, "i": 3, "f": 0.5, "inf": None, "t": [1, [None]], "a": [[1.5], [None]]}
    assert files.jsonable(True) is True and files.jsonable(None) is None
    assert files.json_line({"step": 1, "x": np.float32(0.5)}) == '{"step": 1, "x": 0.5}\n'


def test_a_missing_and_a_damaged_file_are_empty(tmp_path):
    assert files.read_json(tmp_path / "none.json") == {} == files.read_json(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "good.json").write_text('{"a": "é"}', encoding="utf-8")
    assert files.read_json(tmp_path / "bad.json") == {} and files.read_json(tmp_path / "good.json") == {"a": "é"}


def test_assignments_are_read_by_field_and_the_last_one_wins():
    info = {"overrides": ["arm=a=b", "seed=1", "seed=2", "nothing"]}
    assert files.assigned(info) == {"arm": "a=b", "seed": "2"} and files.assigned({}) == {}


def test_what_a_section_was_resumed_with_is_of_that_section_alone():
    visits = [{"changes": {"sampling.top_k": [0, 4], "steps": [1, 2]}}, {"changes": {"sampling.temperature": [1, 2]}},
              {"changes": {"sampling.top_k": [4, 5], "sampling_x.top_p": [1, 2]}}, {}]  # fmt: skip
    assert files.changed_since({"resumed": visits}, "sampling") == {"top_k": 5, "temperature": 2}
    assert files.changed_since({}, "sampling") == {}


def test_rows_are_appended_in_order_and_a_last_line_without_its_end_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert list(files.read_rows(path)) == []
    files.append_rows(path, [{"a": 1}, {"a": "é"}])
    files.append_rows(path, [])
    files.append_rows(path, [{"a": None}])
    assert list(files.read_rows(path)) == [{"a": 1}, {"a": "é"}, {"a": None}]
    with path.open("a") as file:
        file.write('{"a": 4}')
    assert [row["a"] for row in files.read_rows(path)] == [1, "é", None]


def test_a_file_is_written_as_it_is_read(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1.0, float("nan")]})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "é": [\n    1.0,\n    null\n  ]\n}\n'
    files.write_text(tmp_path / "b", "one")
    files.write_text(tmp_path / "b", "two\ud800")
    assert (tmp_path / "b").read_text() == "two\\ud800" and sorted(os.listdir(tmp_path)) == ["a.json", "b"]
