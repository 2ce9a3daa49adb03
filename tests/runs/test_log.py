"""What a run writes: whole, once, and whatever a model says; and what it shows."""

import contextlib
import io
import json
import os
import shutil
import struct
import subprocess
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment, SamplingConfig, code_folder, sources
from grpo_jax.runs import checkpoints
from grpo_jax.runs.files import changed_since
from grpo_jax.runs.log import RunLog, display_of

HOSTILE = "[bold]x[/bold] \x1b[31mred\x1b[0m \x07\r\u202eevil | <b>&#60;</b>\nnext"


@dataclass(frozen=True)
class Evaluation:
    """As much of `grpo_jax.evaluation.Evaluation` as a log needs."""

    success: float = 0.5
    success_low: float = 0.4
    success_high: float = 0.6
    reward: float = 0.55
    mean_length: float = 7.0
    mean_turns: float = 1.0
    split: str = "held_out"
    num_prompts: int = 128
    num_samples: int = 1
    temperature: float = 0.0
    pass_at_k: dict = field(default_factory=lambda: {1: 0.5})

    def to_dict(self) -> dict:
        return asdict(self)


def experiment(steps: int = 4) -> Experiment:
    task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[])
    return Experiment(task=task, rewards={"length": len}, steps=steps, seed=3)


def completions(text: str = "abc", prompts: int = 2, group: int = 2) -> list[dict]:
    return [
        {"prompt_id": p, "sample": g, "prompt": "say", "completion": text, "rewards": {"length": 1.0}}
        | {"reward": 1.0 + g, "advantage": g - 0.5, "tokens": 3}
        for p in range(prompts)
        for g in range(group)
    ]


def screen(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def shown(renderable) -> str:
    console = screen()
    console.print(renderable)
    return console.file.getvalue()


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(run_dir: Path) -> list[Event]:
    """Parses TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found = []
    for path in sorted(run_dir.glob("events.out.tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    """As TensorBoard reads them: a session's start hides what was logged at its step and later."""
    found: dict[int, float] = {}
    for event in events(run_dir):
        if event.session_log.status:
            found = {step: value for step, value in found.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == tag and value.HasField("simple_value"):
                found[event.step] = value.simple_value
    return found


def open_log(run_dir: Path, **options) -> RunLog:
    shown = options.pop("experiment", experiment())
    display = display_of(
        shown, **{"quiet": True} | {k: options.pop(k) for k in ("quiet", "console", "title") if k in options}
    )
    return RunLog(run_dir, shown, display=display, **options)


# The directory -------------------------------------------------------------------------------------------------------


def test_a_run_directory_explains_the_run(tmp_path):
    source = tmp_path / "toy.py"
    source.write_text("config = ...")
    run = tmp_path / "runs" / "a"
    with open_log(run, source=source, overrides=["seed=3"]):
        during = json.loads((run / "run.json").read_text())
    after = json.loads((run / "run.json").read_text())
    assert (during["status"], during["finished"]) == ("running", None)
    assert after["status"] == "finished" and after["finished"] >= after["started"]
    assert (after["source"], after["overrides"], after["seed"]) == (str(source), ["seed=3"], 3)
    assert {"python", "jax", "jaxlib", "flax", "optax", "transformers", "grpo_jax"} <= set(after["versions"])
    assert after["device"]["platform"] == "cpu"
    assert (run / "code" / "toy.py").read_text() == "config = ..."
    assert (after["code"]["entry"], list(after["code"]["files"])) == ("toy.py", ["toy.py"])
    assert json.loads((run / "config.json").read_text())["steps"] == 4


def test_the_commit_of_the_experiments_repository_is_recorded_and_whether_it_is_dirty(tmp_path):
    source = tmp_path / "toy.py"
    source.write_text("config = 1")
    with open_log(tmp_path / "a", source=source):
        pass
    assert json.loads((tmp_path / "a" / "run.json").read_text())["git"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "toy.py"], ["commit", "-qm", "one"]):
        subprocess.run(git + arguments, check=True)
    for name, text in (("clean", "config = 1"), ("dirty", "config = 2")):
        source.write_text(text)
        with open_log(tmp_path / name, source=source):
            pass
        recorded = json.loads((tmp_path / name / "run.json").read_text())["git"]
        assert len(recorded["commit"]) == 40 and recorded["dirty"] == (name == "dirty")


@pytest.mark.parametrize(
    ("error", "made", "kept"),
    [
        (UserError("a prompt is too long"), [], False),
        (UserError("a prompt is too long"), ["metrics.jsonl"], True),  # something was done
        (UserError("a prompt is too long"), ["warm_start"], True),
        (RunError("a reward failed"), [], True),  # it is a run that failed, not one that was refused
        (KeyboardInterrupt(), [], True),
    ],
)
def test_a_run_that_is_refused_before_it_begins_leaves_no_directory(tmp_path, error, made, kept):
    run_dir = tmp_path / "run"
    with pytest.raises(type(error)), open_log(run_dir):
        for name in made:
            (run_dir / name).mkdir()
        raise error
    assert run_dir.exists() == kept
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(UserError), open_log(own):
        raise UserError("refused")
    assert own.exists()  # a directory that was there before stays


def test_a_directory_with_a_run_in_it_is_not_touched(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="is not empty: choose another with --run-dir, or add --resume"):
        open_log(tmp_path).__enter__()
    assert os.listdir(tmp_path) == ["precious"]


def killed_at_start(run_dir: Path, *names: str) -> None:
    """The directory of a run that was killed before it had written run.json."""
    run_dir.mkdir()
    for name in names:
        if "code" in name or name == "warm_start":
            (run_dir / name).mkdir()
            (run_dir / name / "half.py").write_text("x =")
        else:
            (run_dir / name).write_text("{")


@pytest.mark.parametrize(
    "names",
    [
        (),
        (".lock",),
        (".lock", ".code.part"),
        (".lock", "code"),
        (".lock", "code", ".config.json.part"),
        (".lock", "code", "config.json"),
        (".lock", "code", "config.json", ".run.json.part"),
        ("warm_start",),  # of a sweep
        ("slurm-7.out", "train.log"),  # what a scheduler writes
    ],
)
def test_resume_begins_a_run_where_there_is_none_or_one_that_was_killed_at_its_start(tmp_path, names):
    run_dir, source = tmp_path / "run", tmp_path / "toy.py"
    killed_at_start(run_dir, *names)
    source.write_text("config = 1\n")
    with RunLog(run_dir, experiment(), source=source, resume=True, display=display_of(experiment(), quiet=True)) as log:
        log.step(0, {"reward": 1.0})
    info = json.loads((run_dir / "run.json").read_text())
    assert info["status"] == "finished" and "resumed" not in info
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 4
    assert [path.name for path in (run_dir / "code").iterdir()] == ["toy.py"]  # nothing of the half-written copy
    assert not list(run_dir.glob(".*part")) and rows(run_dir / "metrics.jsonl") == [{"step": 0, "reward": 1.0}]


def test_resume_begins_a_run_in_a_new_directory_too(tmp_path):
    with open_log(tmp_path / "new" / "run", resume=True):
        pass
    assert json.loads((tmp_path / "new" / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "thesis.tex"])
def test_resume_refuses_a_directory_without_a_run_that_holds_something_else(tmp_path, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=f"holds no run.json but other files, such as '{name}'"):
        open_log(tmp_path, resume=True).__enter__()
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "x"


def test_a_run_that_goes_on_in_another_process_is_refused_and_left_as_it_is(tmp_path):
    with open_log(tmp_path / "run") as log:
        log.step(0, {"reward": 1.0})
        before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file()}
        with pytest.raises(UserError, match="is being written by process"):
            open_log(tmp_path / "run", resume=True).__enter__()
        assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*") if path.is_file()} == before
    with open_log(tmp_path / "run", resume=True):  # and then it is free
        pass


def test_what_can_be_written_of_the_end_is_written_and_the_first_failure_is_raised(tmp_path, monkeypatch):
    told = []
    watch = SimpleNamespace(on_end=lambda event: told.append(event.status))

    def full(path, value):
        raise RunError(f"cannot write {path}: No space left on device.")

    log = RunLog(tmp_path / "run", experiment(), display=display_of(experiment(), quiet=True), callbacks=[watch])
    with pytest.raises(RunError, match="No space left"), log:
        log.step(0, {"reward": 1.0})
        monkeypatch.setattr("grpo_jax.runs.log.write_json", full)
    assert told == ["finished"]
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"] == "failed" and info["seed"] == 3  # changed in its place: that takes no room
    monkeypatch.undo()
    with open_log(tmp_path / "run", resume=True):  # the lock is free
        pass


def test_a_run_whose_directory_has_vanished_fails_with_a_sentence(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*run"), open_log(tmp_path / "run") as log:
        log.step(0, {"reward": 1.0})
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), open_log(tmp_path / "other"):  # what went wrong first is what is told
        shutil.rmtree(tmp_path / "other")
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (ValueError("no luck"), "failed"), (None, "finished")]
)
def test_the_status_says_how_a_run_ended(tmp_path, error, status):
    try:
        with open_log(tmp_path) as log:
            log.step(0, {"reward": 1.0})
            if error is not None:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["status"] == status and info["finished"]
    assert info.get("error") == ("no luck" if status == "failed" else None)


# Records -------------------------------------------------------------------------------------------------------------


def test_a_step_and_an_evaluation_are_on_disk_at_once(tmp_path):
    with open_log(tmp_path) as log:
        log.evaluation(0, Evaluation())
        log.step(0, {"reward": np.float32(0.5), "kl": float("nan")}, completions(), {"rewards": np.array([1.0, 2.0])})
        evaluated, step = rows(tmp_path / "metrics.jsonl")
        assert step == {"step": 0, "reward": 0.5, "kl": None}  # JSON has no nan
        assert evaluated["evaluation/success_low"] == 0.4 and evaluated["evaluation/pass_at_k/1"] == 0.5
        written = rows(tmp_path / "completions.jsonl")
        assert len(written) == 4 and written[3] | {"step": 0} == completions()[3] | {"step": 0}
        assert scalars(tmp_path, "reward") == {0: 0.5} and scalars(tmp_path, "kl") == {}
        assert scalars(tmp_path, "evaluation/success") == {0: 0.5}


def test_an_evaluation_of_another_split_does_not_pass_for_a_held_out_one(tmp_path):
    with open_log(tmp_path) as log:
        log.evaluation(2, Evaluation(split="train"))
    [row] = rows(tmp_path / "metrics.jsonl")
    assert row["evaluation/train/success"] == 0.5 and "evaluation/success" not in row


def test_histograms_leave_out_what_is_not_finite(tmp_path):
    arrays = {"rewards": np.array([[1.0, np.nan], [3.0, np.inf]]), "lengths": np.array([np.nan]), "same": np.ones(5)}
    with open_log(tmp_path) as log:
        log.step(0, {}, None, arrays)
    found = {v.tag: v.histo for e in events(tmp_path) for v in e.summary.value if v.HasField("histo")}
    assert set(found) == {"rewards", "same"}
    assert (found["rewards"].min, found["rewards"].max, found["rewards"].num) == (1.0, 3.0, 2)


def test_tensorboards_hparams_tab_gets_the_fields_of_the_config_and_how_the_run_ended(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    with open_log(tmp_path) as log:
        log.step(0, {"reward": 1.0})
    with open_log(tmp_path / "failed") as log, contextlib.suppress(RunError):
        log.step(0, {"reward": 1.0})
        raise RunError("no")
    tagged = {v.tag: v.metadata.plugin_data for e in events(tmp_path) for v in e.summary.value if "hparams" in v.tag}
    assert set(tagged) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert {data.plugin_name for data in tagged.values()} == {"hparams"}
    start, end = (HParamsPluginData.FromString(data.content) for data in tagged.values())
    fields = start.session_start_info.hparams
    assert (fields["seed"].number_value, fields["sampling.temperature"].number_value) == (3, 1)
    assert (fields["method"].string_value, fields["policy.lora"].string_value) == ("grpo", "None")
    assert fields["gradient_checkpointing"].HasField("bool_value")
    assert end.session_end_info.status == 1  # STATUS_SUCCESS


def test_sample_texts_come_now_and_then_and_hold_no_markup_of_the_models(tmp_path):
    with open_log(tmp_path, experiment=experiment(steps=60)) as log:
        for step in range(60):
            log.step(step, {}, completions(HOSTILE))
    tagged = [(e.step, v) for e in events(tmp_path) for v in e.summary.value if v.tag.startswith("completions")]
    texts = {step: value.tensor.string_val[0].decode() for step, value in tagged}
    assert sorted(texts) == list(range(0, 60, 3))
    assert texts[0].splitlines()[2:4] == ["| completion | reward | advantage |", "|---|---|---|"]
    assert len(texts[0].splitlines()) == 4 + 2  # one prompt's group of two
    for part in ("<b>", "[bold]", "\x1b", " | &#60"):
        assert part not in texts[0]


# Resuming ------------------------------------------------------------------------------------------------------------


def save(log: RunLog, step: int) -> None:
    checkpoints.save(log.run_dir / "checkpoints", step, {"x": np.ones(1)}, files=log.seal())


def interrupted_run(run_dir: Path) -> None:
    """Steps 0 to 4 with an evaluation before step 0, 2 and 4; the last checkpoint is the one of step 2."""
    with pytest.raises(KeyboardInterrupt), open_log(run_dir) as log:
        for step in range(5):
            if step % 2 == 0:
                log.evaluation(step, Evaluation(success=step / 10))
            if step == 2:
                save(log, step)
            log.step(step, {"reward": float(step)}, completions())
        raise KeyboardInterrupt


def test_a_resumed_run_repeats_nothing(tmp_path):
    interrupted_run(tmp_path)
    with open_log(tmp_path, resume=True, overrides=["steps=4"]) as log:
        log.step(2, {"reward": 20.0}, completions())
        log.step(3, {"reward": 30.0}, completions())
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["reward"] for row in metrics if "reward" in row] == [0.0, 1.0, 20.0, 30.0]
    assert [row["step"] for row in metrics if "evaluation/success" in row] == [0, 2]
    assert [row["step"] for row in rows(tmp_path / "completions.jsonl")] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert scalars(tmp_path, "reward") == {0: 0.0, 1: 1.0, 2: 20.0, 3: 30.0}
    assert scalars(tmp_path, "evaluation/success") == pytest.approx({0: 0.0, 2: 0.2})
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["status"] == "finished" and info["resumed"][0]["overrides"] == ["steps=4"]


def test_an_evaluation_that_is_made_again_replaces_the_first_and_nothing_else(tmp_path):
    interrupted_run(tmp_path)
    with open_log(tmp_path, resume=True) as log:
        log.evaluation(0, Evaluation(success=0.7))  # before the run finds its checkpoint
        log.evaluation(2, Evaluation(success=0.9))
        log.evaluation(2, Evaluation(success=0.8, split="train"))
        log.step(2, {"reward": 20.0})
        log.evaluation(3, Evaluation(success=1.0))
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["evaluation/success"] for row in metrics if "evaluation/success" in row] == [0.7, 0.9, 1.0]
    assert [row["reward"] for row in metrics if "reward" in row] == [0.0, 1.0, 20.0]
    assert sum("evaluation/train/success" in row for row in metrics) == 1
    assert [row["step"] for row in metrics] == sorted(row["step"] for row in metrics)


def test_resuming_a_finished_run_changes_nothing_but_its_last_evaluation(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(4):
            log.step(step, {"reward": float(step)})
        save(log, 4)
        log.evaluation(4, Evaluation(success=0.1))
    with open_log(tmp_path, resume=True) as log:
        log.evaluation(4, Evaluation(success=0.2))
    metrics = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert metrics[-1]["evaluation/success"] == 0.2


def test_the_log_is_on_the_disk_when_a_checkpoint_gets_what_it_knows_of_it(tmp_path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr("grpo_jax.runs.log.sync", synced.append)
    with open_log(tmp_path / "run") as log:
        log.evaluation(0, Evaluation())
        log.step(0, {"reward": 1.0}, completions())
        [text] = log.seal().values()
    assert {path.name for path in synced} == {"metrics.jsonl", "completions.jsonl", "run"}
    known = json.loads(text)
    assert list(known["metrics.jsonl"]) == ["0 evaluation", "0"]
    assert known["completions.jsonl"] == {"0": zlib.crc32((tmp_path / "run" / "completions.jsonl").read_bytes())}


def test_a_line_that_a_crash_cut_off_is_dropped_on_resuming(tmp_path):
    interrupted_run(tmp_path)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 5, "rew')
    with open_log(tmp_path, resume=True) as log:
        log.step(2, {"reward": 5.0})
    assert rows(tmp_path / "metrics.jsonl")[-1] == {"step": 2, "reward": 5.0}
    assert len(rows(tmp_path / "completions.jsonl")) == 2 * 4


def test_resuming_from_the_copy_in_the_run_directory_keeps_it(tmp_path):
    source = tmp_path / "toy.py"
    source.write_text("config = 1")
    run = tmp_path / "run"
    for options in ({"source": source}, {"source": run / "code" / "toy.py", "resume": True}):
        with open_log(run, **options):
            pass
    assert (run / "code" / "toy.py").read_text() == "config = 1" and not list(run.glob("code-*"))


def test_going_back_to_files_that_a_run_had_before_is_a_change_too(tmp_path):
    source, run = tmp_path / "toy.py", tmp_path / "run"
    for visit, number in enumerate((1, 2, 1, 1)):
        source.write_text(f"config = {number}")
        sources.record(source)
        with open_log(run, source=source, resume=visit > 0):
            pass
        assert (code_folder(run) / "toy.py").read_text() == f"config = {number}"
    visits = json.loads((run / "run.json").read_text())["resumed"]
    assert [visit["code"] and visit["code"]["directory"] for visit in visits] == ["code-2", "code-3", None]


def test_what_a_section_was_resumed_with_is_its_last_value(tmp_path):
    for visit, temperature in enumerate((1.0, 0.5, 0.25)):
        config = replace(experiment(), sampling=SamplingConfig(temperature=temperature))
        with RunLog(tmp_path, config, resume=visit > 0, display=display_of(config, quiet=True)):
            pass
        later = changed_since(json.loads((tmp_path / "run.json").read_text()), "sampling")
        assert later == ({"temperature": temperature} if visit else {})
    assert changed_since(json.loads((tmp_path / "run.json").read_text()), "optimizer") == {}


def test_a_visit_says_what_has_changed_and_where_it_writes(tmp_path):
    def visit(**options) -> list[str]:
        console = screen()
        with open_log(tmp_path / "run", quiet=False, console=console, **options):
            pass
        return console.file.getvalue().splitlines()

    assert visit() == [f"writing to {tmp_path / 'run'}"]
    changed = replace(experiment(), steps=9, group_size=3)
    assert visit(experiment=changed, resume=True) == [
        f"writing to {tmp_path / 'run'}",
        "changed since the run began: steps was 4, and is 9 from here on",
        "changed since the run began: group_size was 8, and is 3 from here on",
    ]
    assert visit(experiment=experiment(), resume=True, title="control") == [
        "control: changed since the run began: steps was 9, and is 4 from here on",
        "control: changed since the run began: group_size was 3, and is 8 from here on",
    ]


def test_a_run_that_is_resumed_is_running_again_until_it_ends(tmp_path):
    interrupted_run(tmp_path)
    with open_log(tmp_path, resume=True) as log:
        info = json.loads((tmp_path / "run.json").read_text())
        assert (info["status"], info["finished"]) == ("running", None)
        log.step(2, {"reward": 1.0})
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "warm_start").mkdir()  # one that was given to a run that has not begun
    with open_log(tmp_path / "other", resume=True):
        pass
    assert "resumed" not in json.loads((tmp_path / "other" / "run.json").read_text())


def test_an_evaluation_of_another_split_is_replaced_by_one_of_that_split_alone(tmp_path):
    with open_log(tmp_path) as log:
        for step in range(2):
            log.step(step, {"reward": 1.0})
        log.evaluation(2, Evaluation(success=0.1))
        log.evaluation(2, Evaluation(success=0.2, split="train"))
        for step in range(2, 4):
            log.step(step, {"reward": 1.0})
        log.evaluation(4, Evaluation(success=0.3, split="train"))
        save(log, 4)
    with open_log(tmp_path, resume=True) as log:
        log.evaluation(2, Evaluation(success=0.9, split="train"))
    found = [(row["step"], row.get("evaluation/success"), row.get("evaluation/train/success"))
             for row in rows(tmp_path / "metrics.jsonl") if "reward" not in row]  # fmt: skip
    assert sorted(found, key=str) == sorted([(2, 0.1, None), (2, None, 0.9), (4, None, 0.3)], key=str)


def test_what_an_evaluation_says_of_itself_is_logged_under_its_split(tmp_path):
    with open_log(tmp_path) as log:
        log.evaluation(3, Evaluation(split="train", pass_at_k={1: 0.5, 4: 0.75}))
    expected = {f"evaluation/train/{name}": value for name, value in asdict(Evaluation()).items()}
    del expected["evaluation/train/split"], expected["evaluation/train/pass_at_k"]
    expected |= {"step": 3, "evaluation/train/pass_at_k/1": 0.5, "evaluation/train/pass_at_k/4": 0.75}
    assert rows(tmp_path / "metrics.jsonl") == [expected]
    assert scalars(tmp_path, "evaluation/train/pass_at_k/4") == {3: 0.75} and scalars(tmp_path, "step") == {}


def test_a_summary_is_what_it_was_given_and_the_directory_is_the_runs(tmp_path):
    with open_log(tmp_path) as log:
        log.summary({"after": 0.5, "control": None, "nan": float("nan")})
        assert log.run_dir == tmp_path
    assert json.loads((tmp_path / "summary.json").read_text()) == {"after": 0.5, "control": None, "nan": None}


def test_the_display_gets_the_step_its_metrics_and_the_first_prompts_group(tmp_path):
    shown = []
    display = SimpleNamespace(
        title="", note=lambda message: None, close=lambda: shown.append("closed"),
        update=lambda *arguments: shown.append(arguments), evaluation=lambda *arguments: shown.append(arguments),
    )  # fmt: skip
    found = Evaluation()
    with RunLog(tmp_path, experiment(), display=display) as log:
        log.step(2, {"reward": 1.0}, [row | {"prompt_id": row["prompt_id"] + 5} for row in completions()])
        log.evaluation(3, found)
        log.step(3, {"reward": 2.0})
    (step, metrics, group), evaluated, bare, closed = shown
    assert (step, metrics, [(row["prompt_id"], row["sample"]) for row in group]) == (
        2,
        {"reward": 1.0},
        [(5, 0), (5, 1)],
    )
    assert evaluated == (3, found) and bare == (3, {"reward": 2.0}, []) and closed == "closed"


def test_a_runs_display_has_its_steps_or_its_budget():
    plain = display_of(experiment(steps=7), title="control")
    assert (plain.total, plain.token_budget, plain.title, plain.quiet) == (7, None, "control", False)
    budgeted = display_of(replace(experiment(steps=7), token_budget=90), quiet=True)
    assert (budgeted.total, budgeted.token_budget, budgeted.title, budgeted.quiet) == (7, 90, "", True)


# When the disk is full -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    sentence = r"^cannot write .*metrics.jsonl: No space left on device\.$"
    with pytest.raises(RunError, match=sentence), open_log(tmp_path) as log:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        log.step(0, {"reward": 1.0})
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_events_that_cannot_be_written_are_one_sentence_about_the_run(tmp_path, monkeypatch):
    close = EventsWriter.close

    def full(self):
        close(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "close", full)
    with pytest.raises(RunError) as caught, open_log(tmp_path) as log:
        log.step(0, {"reward": 1.0})
    assert str(caught.value) == f"cannot write {tmp_path}: No space left on device."
    with pytest.raises(RuntimeError, match="the real reason"), open_log(tmp_path / "other") as log:
        log.step(0, {"reward": 1.0})
        raise RuntimeError("the real reason")


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^cannot write .*: Not a directory\.$"):
        open_log(tmp_path / "file" / "run").__enter__()


def test_the_first_failure_is_told_even_if_its_status_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="the real reason"), open_log(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")
        raise ValueError("the real reason")


# The display ---------------------------------------------------------------------------------------------------------


def test_runs_one_after_the_other_inside_another_each_have_their_display(tmp_path):
    console = screen(terminal=True)
    with open_log(tmp_path, quiet=False, console=console) as outer:
        for title in ("warm start", "control"):
            with open_log(tmp_path / title, quiet=False, console=console, title=title) as inner:
                for step in range(4):
                    inner.step(step, {"loss": 1.0})
            if title == "warm start":
                for step in range(4):
                    outer.step(step, {"reward": 1.0})
    assert all(part in console.file.getvalue() for part in ("warm start", "control", "training", "loss 1.000"))


def test_a_quiet_run_shows_nothing(tmp_path):
    console = screen()
    with open_log(tmp_path, console=console) as log:
        log.note("hello")
        log.evaluation(0, Evaluation())
        log.step(0, {"reward": 1.0}, completions())
    assert console.file.getvalue() == ""
