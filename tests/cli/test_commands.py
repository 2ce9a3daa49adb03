"""What each command passes on and prints, with the rooms behind it replaced; no program is compiled."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import letters
import pytest

from grpo_jax import cli
from grpo_jax.cli import common, list_runs, which_method
from grpo_jax.cli.commands import COMMANDS
from grpo_jax.cli.fields import rows, sections
from grpo_jax.cli.train import _example_prompt, _resumed
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, LoRAConfig, PolicyConfig, load, load_ablation, sources
from grpo_jax.statistics import layouts, tables

FILE = """
from types import SimpleNamespace
from grpo_jax.experiment import *

def length(*, completions, **columns):
    return [float(len(c)) for c in completions]

rows = [{"prompt": str(i)} for i in range(5)]
task = SimpleNamespace(name="toy", train=rows, held_out=rows)
config = Experiment(task=task, rewards={"length": length}, sampling=SamplingConfig(temperature=0.7))
ablation = Ablation(base=config, arms={"base": {}, "hot": {"sampling.temperature": 2.0}}, seeds=(5, 3))
"""


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "prepare_jax", lambda **_: None)
    monkeypatch.setattr(common, "command", lambda: "grpo-jax")
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def plain(source) -> Path:
    """The same file without an ablation, so that it holds one experiment."""
    source.write_text(FILE[: FILE.index("ablation =")])
    return source


def message(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# sweep and table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "how", "end"),
    [
        ([], {"jobs": 1, "vectorize": False, "overrides": []}, "--dir runs/toy"),
        (["--jobs", "3", "--vectorize", "--dir", "my runs"], {"jobs": 3, "vectorize": True, "overrides": []},
         "--dir 'my runs'"),
        (["--budget", "tokens", "--set", "loss.beta=0.5", "--set", "steps=9"],
         {"jobs": 1, "vectorize": False, "overrides": ["loss.beta=0.5", "steps=9"]},
         "--dir runs/toy --budget tokens --set loss.beta=0.5 steps=9"),
    ],
)  # fmt: skip
def test_sweep_makes_the_runs_of_the_file_and_says_how_to_compare_them(source, monkeypatch, capsys, options, how, end):
    calls = []
    monkeypatch.setattr("grpo_jax.sweep.sweep", lambda *arguments, **rest: calls.append((arguments, rest)))
    assert cli.main(["sweep", str(source), *options]) == 0
    [((path, ablation, directory), rest)] = calls
    assert (path, rest) == (source, how)
    assert directory == Path("my runs" if "--dir" in options else "runs/toy")
    assert ablation.budget == ("tokens" if "--budget" in options else "steps")
    assert (ablation.base.loss.beta, ablation.base.steps) == ((0.5, 9) if how["overrides"] else (0.0, 100))
    assert capsys.readouterr().out == f"compare the arms  grpo-jax table {source} {end}\n"


def test_table_reads_the_runs_of_the_file_as_its_options_say(source, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(tables, "collect", lambda *a, **rest: calls.append((a, rest)) or "found")
    monkeypatch.setattr(layouts, "render", lambda *arguments: calls.append(arguments) or "the table\n")
    assert cli.main(["table", str(source)]) == 0
    ((plan, directory), rest), rendered = calls
    assert (plan.metric, plan.budget, directory) == ("evaluation/success", "steps", Path("runs/toy"))
    assert plan.command == f"grpo-jax sweep {source} --dir runs/toy"
    assert rest == {"allow_mixed": False, "margin": None}
    assert rendered == ("found", "md", layouts.Style(layouts.COLUMNS, False))
    assert capsys.readouterr().out == "the table\n"
    calls.clear()
    options = ["--dir", "d", "--budget", "tokens", "--set", "steps=9", "--metric", "reward", "--format", "csv"]
    options += ["--columns", "mean", "arm", "--percent", "--margin", "0.25", "--allow-mixed"]
    assert cli.main(["table", str(source), *options]) == 0
    ((plan, directory), rest), rendered = calls
    assert (plan.metric, plan.budget, directory) == ("reward", "tokens", Path("d"))
    assert [run.key for run in plan.runs] == [run.key for run in load_ablation(source, "tokens", ["steps=9"]).runs()]
    assert plan.command == f"grpo-jax sweep {source} --dir d --budget tokens --set steps=9"
    assert rest == {"allow_mixed": True, "margin": 0.25}
    assert rendered == ("found", "csv", layouts.Style(("mean", "arm"), True))


# report --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "directory"), [("toy.py", "runs/toy"), ("runs/a.b", "runs/a.b")])
def test_report_is_about_the_sweep_of_a_file_or_about_a_directory(source, monkeypatch, capsys, given, directory):
    from grpo_jax.report import page

    calls = []
    monkeypatch.setattr(page, "report", lambda *arguments, **_: calls.append(arguments) or Path("page.html"))
    monkeypatch.setattr(page, "draw", lambda *arguments: calls.append(arguments) or [Path("a.svg"), Path("b.svg")])
    assert cli.main(["report", given]) == 0
    assert calls == [(Path(directory), None)] and capsys.readouterr().out == "page.html\n"
    assert cli.main(["report", given, "--output", "o.html", "--pictures", "svg"]) == 0
    assert calls[1:] == [(Path(directory), Path("o.html")), (Path(directory), "svg")]
    assert capsys.readouterr().out.split() == ["page.html", "a.svg", "b.svg"]


# rewards -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch):
    """Stands in for the rooms behind `grpo-jax rewards`, and notes how they are called."""
    from grpo_jax import rollout, training
    from grpo_jax.reward_lab import groups, study
    from grpo_jax.runs import restore

    lab = SimpleNamespace(calls={})
    policy = SimpleNamespace(require_tokenizer=lambda: "tokenizer")

    def note(name, result):
        def call(*arguments, **options):
            lab.calls[name] = (arguments, options)
            return result

        return call

    for module, name, result in (
        (groups, "import_rewards", {"extra": len}), (groups, "sample_groups", ["sampled"]),
        (groups, "read_groups", "read"), (study, "study", "found"), (study, "save", [Path("a.md"), Path("b.json")]),
        (study, "show", None), (training, "starting_policy", policy), (rollout, "make_actor", "actor"),
        (restore, "restore_policy", policy), (restore, "source_policy", policy),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, note(name, result))
    return lab


def test_rewards_samples_groups_of_the_policy_that_the_experiment_starts_from(plain, lab, capsys):
    assert cli.main(["rewards", str(plain), "--run-dir", "r", "--set", "group_size=4"]) == 0
    (actor, config), how = lab.calls["sample_groups"]
    assert (actor, config.group_size) == ("actor", 4)
    assert how == {"temperatures": (0.7,), "num_prompts": 5, "num_groups": 7}  # of 5 training prompts; 32 / 5 = 6.4
    assert lab.calls["starting_policy"][0][0] == config
    assert lab.calls["import_rewards"][0] == ((), plain.parent)
    (sets, studied, tokenizer, extra), options = lab.calls["study"]
    assert (sets, studied, tokenizer, options) == (["sampled"], config, "tokenizer", {"budget": 20_000})
    assert extra == {"extra": len} and lab.calls["save"][0] == ("found", Path("r"))
    assert (lab.calls["show"][0][0], lab.calls["show"][1]) == ("found", {"num_groups": 1})
    assert capsys.readouterr().out.splitlines()[-2:] == ["a.md", "b.json"]
    info = json.loads(Path("r/run.json").read_text())
    assert (info["source"], info["overrides"]) == (str(plain), ["group_size=4"])


def test_rewards_takes_its_numbers_from_its_options(plain, lab):
    options = ["--num-prompts", "2", "--temperatures", "0", "1.5", "--num-groups", "3", "--attack-budget", "0"]
    options += ["--show", "0", "--rewards", "my:reward", "--run-dir", "r"]
    assert cli.main(["rewards", str(plain), *options]) == 0
    assert lab.calls["sample_groups"][1] == {"temperatures": (0.0, 1.5), "num_prompts": 2, "num_groups": 3}
    assert lab.calls["study"][1] == {"budget": 0} and lab.calls["show"][1] == {"num_groups": 0}
    assert lab.calls["import_rewards"][0][0] == ("my:reward",)


def test_rewards_reads_completions_that_are_saved_or_restores_a_runs_policy(plain, lab):
    Path("saved.jsonl").write_text("")
    assert cli.main(["rewards", str(plain), "--completions", "saved.jsonl", "--run-dir", "r"]) == 0
    (path, config, tokenizer), _ = lab.calls["read_groups"]
    assert (path, tokenizer) == (Path("saved.jsonl"), "tokenizer") and "sample_groups" not in lab.calls
    assert lab.calls["source_policy"][0] == (config,) and lab.calls["study"][0][0] == ["read"]
    run = Path("run")
    run.mkdir()
    (run / "run.json").write_text('{"source": null, "overrides": ["seed=4"]}')
    (run / "experiment.py").write_text(plain.read_text())
    assert cli.main(["rewards", "run", "--run-dir", "r2"]) == 0
    assert lab.calls["restore_policy"][0] == (run,) and lab.calls["sample_groups"][0][1].seed == 4
    assert lab.calls["import_rewards"][0] == ((), run)
    assert json.loads(Path("r2/run.json").read_text())["source"] is None
    assert cli.main(["rewards", str(plain)]) == 0
    assert [path.name[:13] for path in Path("runs").iterdir()] == ["rewards-toy-2"]
    os.chdir(run)
    assert cli.main(["rewards", "."]) == 0
    assert [path.name[:13] for path in Path("runs").iterdir()] == ["rewards-run-2"]


@pytest.mark.parametrize(
    "options",
    [["--num-prompts", "0"], ["--num-groups", "-1"], ["--attack-budget", "-1"], ["--show", "-1"],
     ["--temperatures", "0.5", "-1"]],
)  # fmt: skip
def test_rewards_refuses_numbers_that_are_out_of_range(plain, lab, capsys, options):
    assert cli.main(["rewards", str(plain), *options]) == 2
    assert "--num-prompts and --num-groups must be positive; budget, temp" in capsys.readouterr().err


# train ---------------------------------------------------------------------------------------------------------------


def run_of(source: Path, run: Path, **info) -> Path:
    """A run of a file as it is now, as far as resuming it needs one."""
    load(source)
    sources.copy(source, run / "code")
    code = {"directory": "code", **sources.describe(source)}
    (run / "run.json").write_text(json.dumps({"source": str(source), "overrides": ["seed=4"], "code": code, **info}))
    return run


def test_a_run_goes_on_with_the_assignments_that_it_has_had_and_then_new_ones(plain, tmp_path):
    visits = [{"overrides": ["steps=7", "loss.beta=0.5"], "code": None}]
    run = run_of(plain, tmp_path / "run", resumed=visits)
    config = _resumed(plain, run, ["steps=9"], accept_changes=False)
    assert (config.seed, config.steps, config.loss.beta) == (4, 9, 0.5)
    own = _resumed(run / "code" / "toy.py", run, [], accept_changes=False)
    assert (own.seed, own.steps) == (4, 7)


def test_a_file_that_has_changed_is_refused_with_both_ways_out_or_accepted(plain, tmp_path):
    run = run_of(plain, tmp_path / "my run")
    plain.write_text(plain.read_text().replace("float(len(c))", "0.5 * len(c)"))
    assert message(lambda: _resumed(plain, run, [], accept_changes=False)) == (
        f"toy.py changed since {str(run)!r} was made. To go on with the run's own copy, name it: train "
        f"'{run}/code/toy.py' …; to go on with the files as they are now, add --accept-changes."
    )
    config = _resumed(plain, run, [], accept_changes=True)
    assert config.rewards["length"](completions=["ab"]) == [1.0]


def test_a_run_of_the_first_versions_has_a_copy_of_its_file_alone(plain, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"source": str(plain), "overrides": []}))
    assert _resumed(plain, run, [], accept_changes=False).seed == 0  # there is no copy to compare with
    (run / "experiment.py").write_text(plain.read_text())
    assert _resumed(plain, run, ["seed=2"], accept_changes=False).seed == 2
    (run / "experiment.py").write_text("other")
    said = message(lambda: _resumed(plain, run, [], accept_changes=False))
    assert said.startswith("toy.py changed since ") and f"train {run / 'experiment.py'} …" in said


def test_accepting_changes_is_for_resuming(plain, capsys):
    assert cli.main(["train", str(plain), "--accept-changes"]) == 2
    assert capsys.readouterr().err == "error: --accept-changes is for --resume.\n"


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [("2 + 3?", "'2 + 3?'"), ("word", "word"), ("x" * 59, "x" * 59), ("x" * 60, '"…"'), ("a\nb", '"…"'),
     ([{"content": "first"}, {"content": "last"}], "last")],
)  # fmt: skip
def test_the_prompt_of_an_example_is_quoted_and_none_that_is_long(prompt, shown):
    assert _example_prompt(prompt) == shown


# list, fields, init and the rest -------------------------------------------------------------------------------------


def write_run(path: Path, *metrics: dict, info: dict | None = None, config: dict | None = None, at: int = 0) -> None:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(info or {}))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    os.utime(path / "run.json", (at, at))


def test_what_is_known_of_a_run(tmp_path):
    rows_of_it = [{"step": 0, "evaluation/success": 0.25}, {"step": 0, "step_time": 1.0}, {"step": 1, "step_time": 1.0},
                  {"step": 2, "evaluation/success": 0.5}, {"step": 2, "loss": 1.0}]  # fmt: skip
    info = {"status": "finished", "seed": 3, "started": "then", "overrides": ["arm=hot"], "resumed": []}
    write_run(tmp_path / "a", *rows_of_it, info=info, config={"method": {"name": "mine"}, "steps": 9})
    assert list_runs.describe(tmp_path / "a") == {
        "run": str(tmp_path / "a"), "arm": "hot", "seed": 3, "method": "mine", "steps": 2, "planned_steps": 9,
        "success": 0.5, "status": "finished", "started": "then",
    }  # fmt: skip
    write_run(tmp_path / "b")
    assert list_runs.describe(tmp_path / "b") == {
        "run": str(tmp_path / "b"), "arm": None, "seed": None, "method": "?", "steps": 0, "planned_steps": None,
        "success": None, "status": "?", "started": None,
    }  # fmt: skip


def test_runs_are_found_to_the_depth_of_a_sweep_and_listed_from_the_oldest(tmp_path, capsys):
    for at, name in enumerate(("sweep/new", "old", "sweep/mid", "old/control", "control", "a/b/deep")):
        write_run(tmp_path / "runs" / name, at={"old": 1, "sweep/mid": 2, "control": 3}.get(name, 9 + at))
    assert cli.main(["list", str(tmp_path / "runs"), "--json"]) == 0
    found = [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()]
    assert [os.path.relpath(run, tmp_path / "runs") for run in found] == ["old", "sweep/mid", "control", "sweep/new"]
    assert cli.main(["list", str(tmp_path / "runs" / "old")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2  # the header, and the run itself without its control
    (tmp_path / "none").mkdir()
    assert cli.main(["list", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'none'}\n"


@pytest.mark.parametrize(("width", "is_wide"), [(109, False), (110, True)])
def test_a_wide_terminal_shows_the_method_and_the_time_too(tmp_path, capsys, monkeypatch, width, is_wide):
    monkeypatch.setenv("COLUMNS", str(width))
    write_run(tmp_path / "a", info={"started": "2026-01-02T03:04:05"}, config={"steps": 3, "method": "dpo"})
    assert cli.main(["list", str(tmp_path)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    wanted = ["run", "arm", "seed", "steps", "success", "status", *["method", "started"] * is_wide]
    assert header.split() == wanted
    assert line.split() == ["a", "–", "None", "0/3", "–", "?", *["dpo", "2026-01-02", "03:04"] * is_wide]


def test_the_sections_of_an_experiment_are_its_configs_and_theirs():
    found = dict(sections())
    assert found[""] is Experiment and found["policy"] is PolicyConfig and found["policy.lora"] is LoRAConfig
    assert list(found)[:3] == ["", "policy", "sampling"] and "task" not in found and "control" not in found


def test_the_rows_of_a_section_name_each_field_with_its_type_and_default():
    found = {name: (kind, default) for name, kind, default in rows(PolicyConfig, "policy", dict(sections()))}
    assert found["policy.source"] == ("str", "'scratch'") and "policy.scratch" not in found
    assert found["policy.lora"] == ("LoRAConfig | None", "None")
    top = {name: (kind, default) for name, kind, default in rows(Experiment, "", dict(sections()))}
    assert top["task"] == ("Any", "needed") and top["rewards"] == ("Mapping[str, Callable[..., Any]]", "{}")
    assert top["steps"] == ("int | None", "100") and "sampling" not in top


def test_init_writes_three_files_and_leaves_a_directory_with_any_of_them(source, tmp_path, capsys):
    assert cli.main(["init", "new"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "new/rewards.py", "new/experiment.py", "new/ablation.py",
        "train it          grpo-jax train new/experiment.py",
        "compare rewards   grpo-jax sweep new/ablation.py --jobs 2",
        "then              grpo-jax table new/ablation.py --format latex",
    ]  # fmt: skip
    assert sorted(path.name for path in Path("new").iterdir()) == ["ablation.py", "experiment.py", "rewards.py"]
    Path("part").mkdir()
    Path("part/ablation.py").write_text("mine")
    assert cli.main(["init", "part"]) == 2
    assert "'part/ablation.py' is there already" in capsys.readouterr().err and len(list(Path("part").iterdir())) == 1
    Path("file").write_text("")
    assert cli.main(["init", "file/x"]) == 2
    assert "cannot make the directory 'file/x': Not a directory." in capsys.readouterr().err


def test_the_commands_are_in_the_order_of_help_and_read_from_the_command_line(monkeypatch, capsys):
    expected = "init train evaluate sample export rewards sweep table report list fields advise"
    assert [name for name in COMMANDS if name in expected.split()] == expected.split()
    monkeypatch.setattr(sys, "argv", ["grpo-jax", "fields", "nonsense"])
    assert cli.main() == 2 and "there is no section 'nonsense'" in capsys.readouterr().err


def test_assignments_stay_in_their_order():
    assert common.join((("a=1", "b=2"), (), ("a=3",))) == ["a=1", "b=2", "a=3"] and common.join(()) == []


def test_a_source_is_a_run_or_a_file_and_has_its_overrides(plain, tmp_path):
    run = run_of(plain, tmp_path / "run")
    assert common.load_source(plain, ["steps=3"]).steps == 3 and common.load_source(plain).seed == 0
    assert common.load_source(run, ["steps=3"]).steps == 3 and common.load_source(run).seed == 4


def test_the_command_is_named_as_it_can_be_called(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/" + name if name == "grpo-jax" else None)
    assert common.command() == "grpo-jax"
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv" / "bin" / "grpo-jax")])
    assert common.command() == ".venv/bin/grpo-jax"


def test_the_environment_of_jax_is_set_where_the_user_has_not(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HOME": "/home/me", "TOKENIZERS_PARALLELISM": "true"})
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", "/home/me"))
    common.prepare_jax()
    assert os.environ == {
        "HOME": "/home/me",
        "TOKENIZERS_PARALLELISM": "true",
        "JAX_COMPILATION_CACHE_DIR": "/home/me/.cache/grpo_jax/xla",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    monkeypatch.setattr(os, "environ", {})
    common.prepare_jax()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


# advise --------------------------------------------------------------------------------------------------------------


def test_questions_are_asked_until_an_answer_is_one_of_the_choices(source, monkeypatch, capsys):
    answers = iter(["maybe", " NO ", "both", "many", "300", "yes", "yes"])
    asked = []
    monkeypatch.setattr(which_method.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(builtins, "input", lambda question: asked.append(question) or next(answers))
    assert cli.main(["advise"]) == 0
    assert asked[0] == asked[1] == "Can a program say how good an answer is? [yes/no] "
    assert asked[3] == asked[4] == "How many labels are there (of both: how many comparisons)? [a number] "
    assert len(asked) == 7
    assert capsys.readouterr().out == (
        "method   dpo\nwhy      300 comparisons are too few for a reward model that can be optimised against. DPO "
        "learns from them directly, without sampling.\nstart    grpo-jax train experiments/methods/backwards.py --set "
        "method=dpo\n"
    )

    def ends(_):
        raise EOFError

    monkeypatch.setattr(builtins, "input", ends)
    assert cli.main(["advise", "--verifiable", "yes", "--labels", "both"]) == 2
    assert capsys.readouterr().err == "error: the question was not answered: say --num-labels N.\n"


def test_several_methods_are_named_in_order_and_the_first_is_started_with(source, capsys):
    options = ["--verifiable", "no", "--labels", "comparisons", "--num-labels", "6000", "--reasoning", "yes"]
    assert cli.main(["advise", *options, "--solves-some", "no"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "method   reward_model, then ppo" and lines[1].startswith("why      6000 comparisons can train")
    assert lines[2] == "start    grpo-jax train experiments/methods/backwards.py --set method=reward_model"
    options = ["--verifiable", "no", "--labels", "demonstrations", "--num-labels", "1", "--solves-some", "yes"]
    for reasoning in ("yes", "no"):
        assert cli.main(["advise", *options, "--reasoning", reasoning]) == 0
        shown = "The demonstrations should show the reasoning as well." in capsys.readouterr().out
        assert shown == (reasoning == "yes")


# A newcomer's mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train adir", "'adir' is a directory, where the Python file of an experiment is needed."),
        ("sweep adir", "'adir' is a directory, where the Python file of an experiment is needed."),
        ("train imports.py", "imports.py:2: ModuleNotFoundError: No module named 'nothere'"),
        ("report nope", "there is no directory 'nope' with a run or with the runs of a sweep."),
        ("table adir", "'adir' is not the directory of a sweep: there is no sweep.json in it."),
        ("evaluate plain.py --warm-start adir", "--warm-start is for an experiment that has a warm start, and "),
        ("fields nope", "there is no section 'nope'; it must be one of policy, "),
    ],
)  # fmt: skip
def test_a_newcomers_mistake_is_one_sentence(tmp_path, monkeypatch, capsys, command, sentence):
    monkeypatch.chdir(tmp_path)
    Path("adir").mkdir()
    Path("imports.py").write_text("import os\nimport nothere\n")
    Path("plain.py").write_text(Path(letters.__file__).read_text())
    assert cli.main(command.split()) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {sentence}")


def test_a_platform_that_is_not_there_is_one_sentence(tmp_path):
    shutil.copy(letters.__file__, tmp_path / "plain.py")
    code = "import sys; from grpo_jax.cli import main; sys.exit(main(['evaluate', 'plain.py']))"
    environment = {**os.environ, "JAX_PLATFORMS": "rocm"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: JAX finds no device with JAX_PLATFORMS='rocm': ")
