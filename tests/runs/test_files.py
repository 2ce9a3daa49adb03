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
