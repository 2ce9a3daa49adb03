"""What run.json says of how a run began and was resumed, value by value."""

import hashlib
import json
import os
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, LossConfig, Method, OptimizerConfig, PolicyConfig, sources, to_dict
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.runs import checkpoints, record


def experiment(**fields) -> Experiment:
    task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[])
    return Experiment(**{"task": task, "rewards": {"length": len}, "steps": 4, "seed": 3, **fields})


def begin(run_dir: Path, config: Experiment, source: Path | None = None) -> dict:
    """A run that has begun, with its record on the disk."""
    run_dir.mkdir(exist_ok=True)
    info = record.begin_run(run_dir, config, source, ["steps=4"])
    (run_dir / "run.json").write_text(json.dumps(info))
    return info


def go_on(run_dir: Path, config: Experiment, source: Path | None = None, overrides: tuple[str, ...] = ()) -> dict:
    info = record.continue_run(run_dir, config, source, overrides)
    (run_dir / "run.json").write_text(json.dumps(info))
    return info


def test_a_run_that_a_program_began_has_a_record_without_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo-jax", "train", "my file.py"])
    config = experiment()
    info = begin(tmp_path, config)
    started = info.pop("started")
    assert started == max(started, "2020") and len(started) == len("2020-01-01T00:00:00+00:00")
    assert info == {
        "status": "running",
        "finished": None,
        "source": None,
        "overrides": ["steps=4"],
        "by_program": False,
        "command": "grpo-jax train 'my file.py'",
        "seed": 3,
        "key": fingerprint(config),
        "config_key": fingerprint(config, files=False),
        "config_sha256": hashlib.sha256((tmp_path / "config.json").read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: record._version(name) for name in record.PACKAGES},
        },
        "platform": platform.platform(),
        "device": info["device"],
        "processor": record.processor(),
        "git": None,
        "package": {"digest": sources.package_digest(), "git": info["package"]["git"]},
        "code": None,
    }
    assert info["versions"]["jax"] == jax.__version__ and info["versions"]["numpy"] == np.__version__
    assert info["device"]["kind"] == jax.devices()[0].device_kind
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(to_dict(config)))
    assert record._version("a-package-of-no-such-name") is None


def test_the_names_of_a_run_with_a_reward_of_the_users_differ_with_and_without_files(tmp_path):
    info = begin(tmp_path, experiment(rewards={"r": lambda **_: 1}))
    assert info["key"] != info["config_key"]


def test_the_package_has_a_commit_only_outside_of_site_packages(monkeypatch):
    monkeypatch.setattr(record, "_git", lambda folder: {"commit": str(folder), "dirty": False})
    assert record._git_of_package() == {"commit": str(sources.PACKAGE), "dirty": False}
    monkeypatch.setattr(sources, "PACKAGE", Path("/x/site-packages/grpo_jax"))
    assert record._git_of_package() is None


CPU = """processor\t: 0
model name\t: Zilog Z80
flags\t\t: fpu avx2 sse avx512f

processor\t: 1
model name\t: Other
flags\t\t: avx512_bf16
"""


@pytest.mark.parametrize(
    ("text", "name", "instructions"),
    [
        (CPU, "Zilog Z80", ["avx512f", "avx2"]),  # of the first core, the widest first
        ("Features\t: fp asimd\n", platform.processor() or platform.machine(), ["asimd"]),
        ("", platform.processor() or platform.machine(), []),
    ],
)
def test_the_processor_is_named_with_its_widest_instructions(monkeypatch, text, name, instructions):
    monkeypatch.setattr(Path, "read_text", lambda self, *a: text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--flag")
    assert record.processor() == {"name": name, "instructions": instructions, "cores": 3, "xla_flags": "--flag"}


def test_a_visit_says_from_which_step_by_which_command_and_with_what(tmp_path, monkeypatch):
    begun = begin(tmp_path, experiment())
    monkeypatch.setattr(sys, "argv", ["grpo-jax", "train", "--resume"])
    info = go_on(tmp_path, experiment(), None, ("seed=3",))
    (visit,) = info["resumed"]
    assert visit.pop("started") >= begun["started"]
    assert visit == {
        "step": 0, "overrides": ["seed=3"], "command": shlex.join(sys.argv), "changes": {}, "code": None,
        "package": sources.package_digest(),
    }  # fmt: skip
    assert {name: value for name, value in info.items() if name != "resumed"} == begun
    checkpoints.save(tmp_path / "checkpoints", 2, {"x": np.ones(1)})
    checkpoints.save(tmp_path / "checkpoints", 3, {"x": np.ones(1)})
    assert [visit["step"] for visit in go_on(tmp_path, experiment())["resumed"]] == [0, 3]


def test_a_change_is_against_the_config_that_the_run_had_last(tmp_path):
    begin(tmp_path, experiment())
    first = experiment(steps=9, loss=LossConfig(beta=0.5))
    changes = [go_on(tmp_path, config)["resumed"][-1]["changes"] for config in (first, first, experiment())]
    forth = {"steps": [4, 9], "loss.beta": [0.0, 0.5]}
    assert changes == [forth, {}, {name: [after, before] for name, (before, after) in forth.items()}]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seed": 5}, "was begun with seed = 3, and cannot go on with 5: start another run with another --run-dir."),
        ({"policy": PolicyConfig(dtype="bfloat16")}, "was begun with policy.dtype = float32, and cannot go on with"),
        ({"method": "rft"}, "was begun with method = grpo, and cannot go on with rft"),
        ({"warm_start": {"steps": 1}}, "was begun with warm_start = None, and cannot go on with {'steps': 1}"),
    ],
)
def test_what_checkpoints_were_made_from_cannot_change(tmp_path, fields, says):
    begin(tmp_path, experiment())
    with pytest.raises(UserError) as caught:
        record.continue_run(tmp_path, experiment(**fields), None, [])
    assert str(caught.value).startswith(f"{str(tmp_path)!r} {says}")
    assert "resumed" not in json.loads((tmp_path / "run.json").read_text())


def test_changed_files_are_copied_to_a_folder_of_the_visit_and_the_same_files_are_not(tmp_path):
    source, run = tmp_path / "toy.py", tmp_path / "run"
    for visit, text in enumerate(("x = 1", "x = 1", "x = 2")):
        source.write_text(text)
        sources.record(source)
        info = begin(run, experiment(), source) if not visit else go_on(run, experiment(), source)
    assert info["code"]["directory"] == "code" and info["source"] == str(source)
    assert [visit["code"] and visit["code"]["directory"] for visit in info["resumed"]] == [None, "code-3"]
    assert (run / "code" / "toy.py").read_text() == "x = 1" and (run / "code-3" / "toy.py").read_text() == "x = 2"
    assert info["resumed"][1]["code"]["entry"] == "toy.py"
    assert go_on(run, experiment())["resumed"][-1]["code"] is None  # by a program, which has no file


def test_the_fields_that_differ_are_named_with_what_they_were_and_are():
    config = experiment(optimizer=OptimizerConfig(b1=0.5), rewards={"length": max})
    recorded = json.loads(json.dumps(to_dict(experiment())))
    found = record.changed_fields(recorded, config)
    assert found == {
        "optimizer.b1": [OptimizerConfig().b1, 0.5],
        "rewards": [{"length": "builtins.len"}, {"length": "builtins.max"}],
    }
    del recorded["optimizer"]["b1"], recorded["rewards"]
    assert record.changed_fields(recorded, config) == {}  # fields that came later
    other = replace(config, task=SimpleNamespace(name="toy", train=[], held_out=[]))
    (change,) = record.changed_fields(recorded, other).items()
    assert change[0] == "task" and [side["train"] for side in change[1]] == [1, 0]
    recorded["policy"]["lora"] = {"rank": 4}
    assert record.changed_fields(recorded, config) == {"policy.lora": [{"rank": 4}, None]}


def test_a_method_of_the_users_own_that_has_other_fields_is_another():
    class Mine(Method):
        name = "mine"

        def __init__(self, strength: int) -> None:
            self.strength = strength

    recorded = json.loads(json.dumps(to_dict(experiment(method=Mine(1)))))
    assert record.changed_fields(recorded, experiment(method=Mine(1))) == {}
    (name,) = record.changed_fields(recorded, experiment(method=Mine(2)))
    assert name == "method"


# Certificates --------------------------------------------------------------------------------------------------------


def certify(run_dir: Path, config: Experiment) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / record.CERTIFICATE).write_text(json.dumps({"key": fingerprint(config)}))


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_that_holds_a_certificate_alone_can_be_written_to(tmp_path, resume):
    certify(tmp_path, experiment())
    record.require_place(tmp_path, resume=resume)
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=r"not empty|notes\.md"):
        record.require_place(tmp_path, resume=resume)


def test_a_certificate_of_another_experiment_is_named_and_one_of_this_is_not(tmp_path):
    assert record.certificate_note(tmp_path, experiment()) is None
    certify(tmp_path, experiment())
    assert record.certificate_note(tmp_path, experiment()) is None
    note = record.certificate_note(tmp_path, experiment(seed=4))
    assert note is not None and "certificate.json is about another config" in note
    (tmp_path / record.CERTIFICATE).write_text("{")
    assert record.certificate_note(tmp_path, experiment()) is not None


def test_a_change_without_two_values_is_refused_where_the_record_is_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"resumed": [{"changes": {"steps": [2]}}]}))
    with pytest.raises(UserError, match=r"run.json is damaged, or was edited: 'steps' has \[2\] for a change"):
        record.read_run(tmp_path)
