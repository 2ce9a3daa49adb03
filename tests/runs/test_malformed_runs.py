"""The directory of a run that was edited by hand, or damaged, is read or refused in one sentence, by every command."""

import io
import json
import shutil
from contextlib import chdir
from pathlib import Path

import letters
import pytest
from hypothesis import given
from hypothesis import strategies as st
from malformed import answer, as_json, damaged, fuzz, json_files, mutated, odd_texts
from rich.console import Console

from grpo_jax import cli
from grpo_jax.cli.train import _resumed
from grpo_jax.experiment import load, load_ablation, load_run, override
from grpo_jax.report import page
from grpo_jax.runs.log import RunLog
from grpo_jax.runs.restore import method_of_run, restore_policy, sampling_of
from grpo_jax.runs.run import Run
from grpo_jax.statistics.plans import declared_plan
from grpo_jax.statistics.tables import collect
from grpo_jax.sweep.processes import write_plan
from grpo_jax.sweep.progress import SweepProgress
from grpo_jax.training import run as train

NAMES = ("run.json", "config.json", "metrics.jsonl", "completions.jsonl", "summary.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of two steps with a control, whose record has everything that one can have: it was resumed with changes."""
    place = tmp_path_factory.mktemp("runs") / "run"
    source = place.parent / "toy.py"
    shutil.copyfile(letters.__file__, source)
    overrides = ["steps=1", "checkpoint_every=1", "evaluation.num_prompts=2", "control={'steps': 1}"]
    for resume, more in ((False, []), (True, ["steps=2", "sampling.top_k=3"])):
        config = load(source, [*overrides, *more])
        train(config, RunLog(place, config, source=source, overrides=more if resume else overrides, resume=resume))
    return place


@pytest.fixture
def copied(made, tmp_path_factory):
    """Copies of the run without its checkpoints, which no test here reads far enough to need, all in one place."""
    place = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(made, place, ignore=shutil.ignore_patterns("checkpoints", "events*"))
    (place / "checkpoints").symlink_to(made / "checkpoints")
    return place


def contents(made: Path, name: str) -> st.SearchStrategy[bytes]:
    """What may be in one of a run's files instead of what is."""
    text = (made / name).read_bytes()
    if name.endswith(".json"):
        return json_files(json.loads(text))
    rows = [json.loads(line) for line in text.splitlines()]
    lines = mutated(rows).filter(lambda rows: isinstance(rows, list))
    return lines.map(lambda rows: b"".join(as_json(row) + b"\n" for row in rows)) | damaged(text)


def read_everything(run: Path) -> None:
    """What the commands read of a run, each with its own answer, but for the policy."""
    found = Run(run)
    for name in ("status", "config", "metrics", "evaluations", "completions", "summary", "sampling", "first_prompt"):
        answer(lambda name=name: getattr(found, name))
    answer(lambda: load_run(run))
    answer(lambda: method_of_run(run))
    answer(lambda: sampling_of(run))
    answer(lambda: page.render(page.run_page(run)))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_edited_is_read_or_refused_in_one_sentence(made, copied, name, capsys):
    @given(contents(made, name))
    @fuzz(25)
    def check(content):
        (copied / name).write_bytes(content)
        before = {path: path.read_bytes() for path in copied.rglob("*.json*")}
        answer(lambda: read_everything(copied))
        assert cli.main(["list", str(copied.parent)]) == 0
        assert cli.main(["list", str(copied.parent), "--json"]) == 0
        assert cli.main(["report", str(copied), "--output", str(copied.parent / "page.html")]) in (0, 2)
        assert {path: path.read_bytes() for path in copied.rglob("*.json*")} == before

    check()
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out


@pytest.mark.parametrize("name", NAMES[:3])
def test_an_edited_run_is_resumed_or_refused_and_its_record_stays(made, copied, name):
    """What reads a run when it is resumed, up to the first step, which needs no other file than these."""
    config = override(load(made.parent / "toy.py", ["steps=2"]), {"checkpoint_every": 1})

    @given(contents(made, name))
    @fuzz(25)
    def check(content):
        (copied / name).write_bytes(content)
        answer(lambda: _resumed(made.parent / "toy.py", copied, [], accept_changes=True))
        refused = answer(lambda: RunLog(copied, config, source=made.parent / "toy.py", overrides=[], resume=True))
        if isinstance(refused, str):
            assert (copied / name).read_bytes() == content

    check()


def test_the_policy_of_an_edited_run_is_restored_or_refused(made, copied):
    @given(contents(made, "config.json"))
    @fuzz(6)
    def check(content):
        (copied / "config.json").write_bytes(content)
        answer(lambda: restore_policy(copied))

    check()


@pytest.mark.parametrize("damage", ["gone", "empty", "file", "cut"])
def test_a_damaged_checkpoint_is_refused_in_one_sentence(made, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(made, run)
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    if damage == "gone":
        shutil.rmtree(run / "checkpoints")
    elif damage == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif damage == "file":
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("a file")
    else:
        for path in newest.rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert isinstance(answer(lambda: restore_policy(run)), str)


@pytest.fixture(scope="module")
def swept(made, tmp_path_factory) -> Path:
    """The directory of a sweep of two arms, one run each, with its plan and its file."""
    place = tmp_path_factory.mktemp("sweep")
    text = (made.parent / "toy.py").read_text() + (
        "\nfrom grpo_jax.experiment import Ablation\n"
        "ablation = Ablation(config, {'base': {}, 'hot': {'sampling.temperature': 2.0}}, seeds=(0,), metric='reward')\n"
    )
    (place / "arms.py").write_text(text)
    ablation = load_ablation(place / "arms.py")
    write_plan(place / "sweep", ablation)
    for run in ablation.runs():
        shutil.copytree(made, place / "sweep" / run.key, ignore=shutil.ignore_patterns("checkpoints", "events*"))
    return place


@pytest.mark.parametrize("name", ["sweep.json", *NAMES[:-1]])
def test_a_sweep_that_was_edited_is_compared_or_refused_in_one_sentence(swept, tmp_path, name, capsys):
    place = tmp_path / "copy"
    shutil.copytree(swept, place)
    directory, arms = place / "sweep", place / "arms.py"
    ablation = load_ablation(arms)
    path = directory / (name if name == "sweep.json" else f"{ablation.runs()[1].key}/{name}")
    summaries = [{}, {"seconds": 3.0}]

    @given(contents(path.parent, name), st.sampled_from(summaries))
    @fuzz(6)
    def check(content, summary):
        path.write_bytes(content)
        (directory / ablation.runs()[0].key / "summary.json").write_text(json.dumps(summary))
        for command in (
            ["table", str(directory)],
            ["table", str(directory), "--format", "csv", "--allow-mixed"],
            ["table", str(directory), "--format", "latex", "--allow-mixed"],
            ["report", str(directory), "--output", str(place / "page.html")],
        ):
            assert answer(lambda command=command: cli.main(command)) in (0, 2)
        answer(lambda: collect(declared_plan(ablation, "sweep"), directory, allow_mixed=True))
        progress = SweepProgress(ablation.runs(), directory, "reward", Console(file=io.StringIO()))
        answer(lambda: progress.table({ablation.runs()[1].key}, set()))
        answer(lambda: write_plan(directory, ablation) or path.write_bytes(content))

    check()
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out


def test_the_pictures_of_an_edited_sweep_are_drawn_or_refused(swept, tmp_path, capsys):
    place = tmp_path / "sweep"
    shutil.copytree(swept / "sweep", place)

    @given(contents(place, "sweep.json"))
    @fuzz(4)
    def check(content):
        (place / "sweep.json").write_bytes(content)
        assert answer(lambda: cli.main(["report", str(place), "--pictures", "svg"])) in (0, 1, 2)

    check()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "config.json", "completions.jsonl"])
def test_the_policy_of_an_edited_run_is_asked_exported_and_evaluated_or_refused(made, copied, name, capsys):
    @given(contents(made, name))
    @fuzz(2)
    def check(content):
        (copied / name).write_bytes(content)
        shutil.rmtree(copied.parent / "new", ignore_errors=True)
        for command in (
            ["sample", str(copied), "--prompt", "b", "--num", "1", "--max-tokens", "2"],
            ["export", str(copied), str(copied.parent / "new")],
            ["evaluate", str(copied), "--num-prompts", "1", "--num-samples", "1", "--json"],
            ["rewards", str(copied), "--completions", str(copied / "completions.jsonl"), "--attack-budget", "0"],
        ):
            with chdir(copied.parent):
                assert answer(lambda command=command: cli.main(command)) in (0, 1, 2)

    check()
    assert "Traceback" not in capsys.readouterr().err


COMMANDS = ("list", "fields", "table", "report", "evaluate", "export", "sample", "rewards", "train", "sweep", "nothing")
arguments = st.lists(odd_texts | st.sampled_from(["--json", "--set", "--dir", "-1", "a.b=1", "a run"]), max_size=3)


@given(st.sampled_from(COMMANDS), arguments)
@fuzz(25)
def test_any_arguments_of_a_command_are_carried_out_or_refused(tmp_path_factory, command, arguments):
    place = tmp_path_factory.getbasetemp() / "empty"
    place.mkdir(exist_ok=True)
    with chdir(place):
        try:
            status = answer(lambda: cli.main([command, *arguments]))
        except SystemExit as usage:  # of tyro, which has said what is wrong
            status = usage.code
        assert status in (0, 2)
        assert list(place.iterdir()) == []
