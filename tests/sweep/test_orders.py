"""What the processes of a sweep are told, what is said of those that failed, and what its table reads; nothing runs."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import letters
import pytest
from rich.console import Console

from grpo_jax import sweep, training
from grpo_jax.errors import UserError
from grpo_jax.experiment import Ablation, Experiment, RewardConfig, SamplingConfig, load_ablation, override, sources
from grpo_jax.sweep import processes, vectorized, worker
from grpo_jax.sweep.progress import SweepProgress
from grpo_jax.sweep.stages import TAIL, latest_metrics
from grpo_jax.sweep.warm_starts import adopt_warm_start, warm_start_fingerprint

ABLATION = Ablation(
    base=letters.config, arms={"base": {}, "same": {}, "hot": {"sampling.temperature": 2.0}}, seeds=(5, 3), metric="kl"
)
FILE = Path(letters.__file__).read_text() + (
    "\nfrom grpo_jax.experiment import Ablation\n"
    'ablation = Ablation(base=config, arms={"base": {}, "hot": {"sampling.temperature": 2.0}}, seeds=(5, 3))\n'
)


class Process:
    """Stands in for a worker's process: it has ended with a status, and notes how it was started."""

    def __init__(self, arguments, **options):
        self.order, self.environment = json.loads(arguments[-1]), options["env"]
        self.arguments, self.options, self.returncode = arguments[:-1], options, 0
        self.stdin = SimpleNamespace(close=lambda: None)
        started.append(self)

    def poll(self):
        return self.returncode

    def wait(self):
        return self.returncode


started: list[Process] = []


@pytest.fixture(autouse=True)
def _processes(monkeypatch):
    started.clear()
    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.setattr(processes, "POLL", 0)


def finish(directory: Path, run, **info) -> Path:
    (directory / run.key).mkdir(parents=True, exist_ok=True)
    (directory / run.key / "run.json").write_text(json.dumps({"status": "finished", **info}))
    return directory / run.key


def launch(directory: Path, **fields):
    known = {"source": Path("a/toy.py"), "budget": "tokens", "overrides": ("steps=3",), "directory": directory}
    return processes._Launch(**{**known, "jobs": 1, "vectorize": False, **fields})


def test_a_process_is_told_which_runs_it_makes_from_what_and_where(tmp_path):
    runs = ABLATION.runs()
    job = processes._start(launch(tmp_path), [runs[1], runs[3]], [4, 6])
    assert job.process.order == {
        "source": "a/toy.py", "arm": "hot", "seeds": [5, 3], "budget": "tokens", "overrides": ["steps=3"],
        "directory": str(tmp_path), "cores": [4, 6], "vectorize": False,
    }  # fmt: skip
    assert (job.runs, job.cores, tuple(job.process.arguments)) == ([runs[1], runs[3]], [4, 6], processes.WORKER)
    assert processes.WORKER[1:] == ("-m", "grpo_jax.sweep.worker")
    assert job.process.options["stdout"].name == str(tmp_path / f"{runs[1].key}.log")
    assert job.process.options["start_new_session"] and job.process.options["stdin"] == processes.subprocess.PIPE


@pytest.mark.parametrize(
    ("fields", "cores", "memory", "flags"),
    [
        ({}, [1], None, "--old"),
        ({"jobs": 3}, [1], "0.300", "--old"),
        ({"jobs": 2, "vectorize": True}, [1], "0.450", "--xla_force_host_platform_device_count=1 --old"),
        ({"vectorize": True}, [1, 2, 3], None, "--xla_force_host_platform_device_count=2 --old"),  # two runs
    ],
)
def test_processes_share_an_accelerators_memory_and_a_vectorised_one_has_its_cores(
    tmp_path, monkeypatch, fields, cores, memory, flags
):
    monkeypatch.setenv("XLA_FLAGS", "--old")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    job = processes._start(launch(tmp_path, **fields), ABLATION.runs()[:2], cores)
    environment = job.process.environment
    assert (environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION"), environment["XLA_FLAGS"]) == (memory, flags)
    assert environment["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.2")
    job = processes._start(launch(tmp_path, **fields), ABLATION.runs()[:2], cores)
    assert job.process.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2"


def test_a_sweep_makes_what_is_not_finished_seed_by_seed_and_says_of_each_why_it_failed(tmp_path):
    runs = ABLATION.runs()
    finish(tmp_path, runs[1])
    finish(tmp_path, runs[2], status="running")
    out = io.StringIO()
    with pytest.raises(sweep.processes.RunError) as caught:
        sweep.sweep(Path("toy.py"), ABLATION, tmp_path, overrides=["a=b"], console=Console(file=out, width=200))
    assert [(p.order["arm"], p.order["seeds"]) for p in started] == [("base", [5]), ("base", [3]), ("hot", [3])]
    assert {(p.order["source"], p.order["budget"], *p.order["overrides"]) for p in started} == {
        ("toy.py", "steps", "a=b")
    }
    if hasattr(os, "sched_getaffinity"):  # one at a time, so each has all cores
        assert [p.order["cores"] for p in started] == [sorted(os.sched_getaffinity(0))] * 3
    assert str(caught.value) == (
        "3 of 4 runs failed (base = same seed 5, base = same seed 3, hot seed 3) and the others are finished: the same "
        "command tries the failed ones again."
    )
    why = "its process made a run of another name: was a file that the ablation uses edited meanwhile?"
    assert out.getvalue().splitlines()[-3:] == [f"{runs[i].key} failed: {why}" for i in (0, 2, 3)]
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "arms": ["base", "same", "hot"],
        "baseline": "base",
        "metric": "kl",
        "runs": [{"arms": list(run.arms), "seed": run.seed, "key": run.key} for run in runs],
    }


def test_a_sweep_that_is_finished_says_so_and_writes_nothing(tmp_path):
    for run in ABLATION.runs():
        finish(tmp_path, run)
    processes.write_plan(tmp_path, ABLATION)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = Console(file=io.StringIO(), width=200)
    sweep.sweep(Path("a/toy.py"), ABLATION, tmp_path, console=said)
    assert said.file.getvalue() == "all 4 runs are finished: there is nothing to do\n"
    assert not started and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_vectorised_sweep_has_one_process_for_the_seeds_of_each_arm_that_are_not_finished(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(vectorized, "require_vectorizable", lambda config: asked.append(config))
    runs = ABLATION.runs()
    finish(tmp_path, runs[0])
    with pytest.raises(sweep.processes.RunError, match="3 of 4 runs failed"):
        sweep.sweep(Path("t.py"), ABLATION, tmp_path, vectorize=True, console=Console(file=io.StringIO()))
    assert [(p.order["arm"], p.order["seeds"], p.order["vectorize"]) for p in started] == [
        ("hot", [5, 3], True), ("base", [3], True)]  # fmt: skip
    assert asked == [run.config for run in runs]
    started.clear()
    for run in runs:
        finish(tmp_path, run)
    sweep.sweep(Path("t.py"), ABLATION, tmp_path, console=Console(file=io.StringIO()))
    assert not started


def test_cores_are_dealt_in_turn_and_one_that_is_free_again_is_given_on(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 4}, raising=False)
    with pytest.raises(sweep.processes.RunError):
        sweep.sweep(Path("t.py"), ABLATION, tmp_path, jobs=2, console=Console(file=io.StringIO()))
    assert [p.order["cores"] for p in started] == [[2, 7], [4], [2, 7], [4]]
    started.clear()
    with pytest.raises(sweep.processes.RunError):
        sweep.sweep(Path("t.py"), ABLATION, tmp_path, jobs=4, console=Console(file=io.StringIO()))
    assert [p.order["cores"] for p in started] == [[2], [4], [7], [2, 4, 7]]


@pytest.mark.parametrize(
    ("status", "log", "reason"),
    [
        (1, "warning\nerror: it broke\n\n", "it broke"),
        (1, "Traceback\nValueError: error: no\n", "ValueError: error: no"),
        (3, "\n", "it ended with status 3"),
        (-15, "error: late", "killed by SIGTERM, see LOG"),
    ],
)
def test_why_a_process_ended(tmp_path, status, log, reason):
    first, second, *_ = ABLATION.runs()
    path = tmp_path / f"{first.key}.log"
    path.write_text(log)
    job = processes._Job([first, second], None, SimpleNamespace(returncode=status))
    assert processes._reason(job, tmp_path) == reason.replace("LOG", str(path))


@pytest.mark.parametrize(
    ("text", "finished"),
    [('{"status": "finished"}', True), ('{"status": "failed"}', False), ("{}", False), ("{", False)],
)
def test_only_a_run_that_came_to_its_end_is_finished(tmp_path, text, finished):
    (tmp_path / "run.json").write_text(text)
    assert sweep.is_finished(tmp_path) is finished and not sweep.is_finished(tmp_path / "none")


# Progress ------------------------------------------------------------------------------------------------------------


def table(ablation, directory: Path, under_way=(), failed=()) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=160)
    progress = SweepProgress(ablation.runs(), directory, ablation.metric, console)
    console.print(progress.table(set(under_way), set(failed)))
    lines = console.file.getvalue().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return [[lines[0].strip()], [cell.strip() for cell in lines[2].split("┃")[1:-1]], *rows]


def write_metrics(run_dir: Path, *rows: dict) -> None:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_shows_each_runs_status_steps_and_numbers(tmp_path):
    first, second, third, fourth = ABLATION.runs()
    write_metrics(finish(tmp_path, first), {"step": 3, "reward": 0.25, "kl": 0.5}, {"step": 4, "kl": 0.75})
    write_metrics(finish(tmp_path, second, status="running"), {"step": 1, "loss": 0.5, "reward": None})
    write_metrics(finish(tmp_path, third, status="running"), {"step": 0, "evaluation/success": 0.5})
    assert table(ABLATION, tmp_path, under_way={second.key}) == [
        ["1 of 4 runs finished"],
        ["arm", "seed", "run", "status", "step", "reward", "kl"],
        ["base = same", "5", first.key, "finished", "4/4", "0.250", "0.750"],
        ["hot", "5", second.key, "running", "2/4", "–", "–"],
        ["base = same", "3", third.key, "interrupted", "0/4", "–", "–"],
        ["hot", "3", fourth.key, "waiting", "0/4", "–", "–"],
    ]
    rows = table(ABLATION, tmp_path, under_way={fourth.key, first.key}, failed={fourth.key})
    assert [row[3] for row in rows[2:]] == ["running", "interrupted", "interrupted", "failed"]
    assert rows[0] == ["0 of 4 runs finished"]


def test_with_a_budget_of_tokens_no_number_of_steps_is_the_goal(tmp_path):
    ablation = replace(ABLATION, budget="tokens")
    write_metrics(finish(tmp_path, ablation.runs()[0]), {"step": 2, "reward": 1})
    assert table(ablation, tmp_path)[2][4:6] == ["3", "1.000"]


def test_a_line_is_printed_whenever_a_runs_status_changes(tmp_path):
    first, second, *_ = ABLATION.runs()
    console = Console(file=io.StringIO(), width=20)
    with SweepProgress(ABLATION.runs(), tmp_path, "kl", console) as progress:
        progress.show(set(), set())
        progress.show({first.key, second.key}, set())
        progress.show({first.key, second.key}, set())
        finish(tmp_path, first)
        progress.show({second.key}, set())
        progress.show(set(), {second.key})
    assert console.file.getvalue().splitlines() == [
        f"base = same  seed 5  {first.key}  running", f"hot  seed 5  {second.key}  running",
        f"base = same  seed 5  {first.key}  finished  (1 of 4 runs)", f"hot  seed 5  {second.key}  failed",
    ]  # fmt: skip


def test_the_newest_metrics_are_read_from_the_end_of_a_long_file(tmp_path):
    long = {"step": 0, "reward": 0.0, "text": "x" * TAIL}
    write_metrics(tmp_path, {"step": -1, "kl": 9.0}, long, {"step": 1, "reward": 0.5}, {"step": 2, "kl": 1.0})
    assert latest_metrics(tmp_path) == {"step": 2, "reward": 0.5, "kl": 1.0}
    assert latest_metrics(tmp_path / "none") == {}


# The worker ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    calls = []

    def run(config, log):
        options = {
            "source": log._source, "overrides": log._overrides, "resume": log.resume, "quiet": log.display.quiet,
        }  # fmt: skip
        calls.append((config, log.run_dir, options))
        log.run_dir.mkdir(exist_ok=True)

    monkeypatch.setattr(training, "run", run)
    return calls


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    return path


def test_a_worker_makes_its_arm_at_its_seeds_and_leaves_what_is_finished(source, tmp_path, trained):
    runs = {(run.arms[0], run.seed): run for run in load_ablation(source, "tokens", ["steps=6"]).runs()}
    directory = tmp_path / "runs"
    worker.run(source, "hot", [3, 5], directory, budget="tokens", overrides=["steps=6"])
    hot = [runs["hot", seed] for seed in (5, 3)]
    assert [(config.token_budget, config.seed, run_dir) for config, run_dir, _ in trained] == [
        (6 * 4 * 4 * 3, run.seed, directory / run.key) for run in hot
    ]
    assert [options for *_, options in trained] == [
        {
            "source": source,
            "overrides": ["arm=hot", "budget=tokens", f"seed={seed}", "steps=6"],
            "resume": False,
            "quiet": True,
        }
        for seed in (5, 3)
    ]
    trained.clear()
    finish(directory, hot[0])
    worker.run(source, "hot", [5, 3], directory, budget="tokens", overrides=["steps=6"])
    assert [(run_dir.name, options["resume"]) for _, run_dir, options in trained] == [(hot[1].key, True)]


def test_a_worker_writes_the_plan_of_its_sweep_only_if_there_is_none(source, tmp_path, trained):
    worker.run(source, "base", [5], tmp_path / "one", budget="steps")
    assert json.loads((tmp_path / "one" / "sweep.json").read_text()) == json.loads(
        json.dumps(processes.plan_of(load_ablation(source)))
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_text("{}")
    worker.run(source, "base", [5], tmp_path / "other", budget="steps")
    assert (tmp_path / "other" / "sweep.json").read_text() == "{}"


def test_a_worker_that_vectorises_makes_all_its_seeds_at_once(source, tmp_path, trained, monkeypatch):
    calls = []
    monkeypatch.setattr(vectorized, "train_seeds", lambda runs, **options: calls.append((runs, options)))
    runs = [run for run in load_ablation(source).runs() if run.arms == ("hot",)]
    worker.run(source, "hot", [3, 5], tmp_path, budget="steps", vectorize=True)
    expected = {tmp_path / run.key: (run.config, ["arm=hot", "budget=steps", f"seed={run.seed}"]) for run in runs}
    [(found, options)] = calls
    assert {path: overrides for path, (_, overrides) in found.items()} == {p: o for p, (_, o) in expected.items()}
    assert options == {"source": source} and not trained


def test_only_runs_of_the_same_seed_may_lend_their_warm_start(source, tmp_path, trained, monkeypatch):
    from grpo_jax.sweep import warm_starts

    asked = []
    monkeypatch.setattr(warm_starts, "adopt_warm_start", lambda *arguments: asked.append(arguments))
    runs = {(run.arms[0], run.seed): run.key for run in load_ablation(source).runs()}
    worker.run(source, "hot", [3], tmp_path, budget="steps")
    [(run_dir, config, others)] = asked
    assert (run_dir, config.seed, config.sampling.temperature) == (tmp_path / runs["hot", 3], 3, 2.0)
    assert [path for path, _ in others] == [tmp_path / runs["base", 3], tmp_path / runs["hot", 3]]
    assert [other.sampling.temperature for _, other in others] == [1.0, 2.0]


def test_an_order_is_carried_out_as_it_was_written(monkeypatch):
    calls, cores = [], []
    monkeypatch.setattr(worker, "run", lambda *arguments, **options: calls.append((arguments, options)))
    monkeypatch.setattr(worker, "_stop_with_the_sweep", lambda: None)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *arguments: cores.append(arguments), raising=False)
    order = {"source": "a.py", "arm": "hot", "seeds": [1, 2], "directory": "runs", "cores": [3], "budget": "tokens"}
    assert worker.main(json.dumps({**order, "vectorize": True, "overrides": ["x=1"]})) == 0
    assert calls == [
        ((Path("a.py"), "hot", [1, 2], Path("runs")), {"budget": "tokens", "vectorize": True, "overrides": ["x=1"]})
    ]
    assert cores == [(0, [3])]
    worker.main(json.dumps({**order, "cores": None, "vectorize": False, "overrides": []}))
    assert len(cores) == 1

    def fails(*_, **__):
        raise UserError("it is wrong")

    monkeypatch.setattr(worker, "run", fails)
    assert worker.main(json.dumps({**order, "vectorize": False, "overrides": []})) == 2


# Warm starts ---------------------------------------------------------------------------------------------------------

OFFLINE = override(letters.config, {"warm_start": {"method": "sft", "steps": 3}})
ONLINE = override(letters.config, {"warm_start": {"steps": 3}})


def other_reward(*, completions, **_):
    return [1.0 for _ in completions]


def changed(config: Experiment, **fields) -> bool:
    return warm_start_fingerprint(override(config, fields)) != warm_start_fingerprint(config)


def test_a_warm_start_is_named_by_what_it_depends_on():
    assert warm_start_fingerprint(letters.config) is None
    for fields, offline, online in (
        ({"seed": 1}, True, True),
        ({"warm_start": {"method": "sft", "steps": 4}}, True, True),
        ({"steps": 9}, False, False),  # the warm start names its own
        ({"optimizer.learning_rate": 0.5}, True, True),
        ({"rewards": {"share_of_a": other_reward}}, False, True),
        ({"reward": RewardConfig(weights={"share_of_a": 2.0})}, False, True),
        ({"sampling": SamplingConfig(max_tokens=3, temperature=0.5)}, False, True),
        ({"sampling": SamplingConfig(max_tokens=2)}, True, True),
        ({"evaluation.num_samples": 5}, False, True),
        ({"control": {"steps": 1}}, False, False),
    ):
        assert (changed(OFFLINE, **fields), changed(ONLINE, **fields)) == (offline, online), fields


def test_a_warm_start_is_adopted_from_the_first_run_that_has_finished_the_same(tmp_path):
    def lend(name: str, status: str = "finished") -> Path:
        (tmp_path / name / "warm_start").mkdir(parents=True)
        info = {"status": status, "package": {"digest": sources.package_digest()}}
        (tmp_path / name / "warm_start" / "run.json").write_text(json.dumps(info))
        (tmp_path / name / "warm_start" / "mark").write_text(name)
        (tmp_path / name / "run.json").write_text("{}")
        return tmp_path / name

    longer = override(OFFLINE, {"warm_start": {"method": "sft", "steps": 4}})
    others = [(lend("unlike"), longer), (lend("going on", "running"), OFFLINE), (tmp_path / "none", OFFLINE)]
    adopt_warm_start(tmp_path / "run", OFFLINE, others)
    assert not (tmp_path / "run").exists()
    others += [(lend("first"), OFFLINE), (lend("second"), OFFLINE)]
    adopt_warm_start(tmp_path / "plain", letters.config, [(tmp_path / "first", letters.config)])
    assert not (tmp_path / "plain").exists()
    adopt_warm_start(tmp_path / "run", OFFLINE, others)
    assert (tmp_path / "run" / "warm_start" / "mark").read_text() == "first"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["warm_start"]  # nothing else of the run
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "begun").mkdir()
    adopt_warm_start(tmp_path / "begun", OFFLINE, others)
    assert not list((tmp_path / "begun").iterdir())
