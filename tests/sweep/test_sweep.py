"""A sweep: what it starts, what it leaves alone, how it ends, and that a killed one loses nothing.

Most tests put a stand-in in the place of the worker's process, which takes JAX seconds to start.
"""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import letters
import pytest
from rich.console import Console

import grpo_jax
from grpo_jax import sweep
from grpo_jax.cli.list_runs import run_files
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Ablation, load, load_ablation, override, read_run, sources, to_dict
from grpo_jax.sweep import processes, worker
from grpo_jax.sweep.progress import SweepProgress, latest_metrics
from grpo_jax.sweep.warm_starts import adopt_warm_start, find_warm_start

FILE = (
    Path(letters.__file__).read_text()
    + """
from grpo_jax.experiment import Ablation, override

base = override(config, {"steps": 30, "prompts_per_step": 2, "group_size": 2, "checkpoint_every": 5})
ablation = Ablation(base=base, arms={"base": {}, "slow": {"optimizer.learning_rate": 1e-4}}, seeds=(0, 1))
"""
)

STAND_IN = """
import json, pathlib, sys, time
order = json.loads(sys.argv[1])
from grpo_jax.experiment import load_ablation
for run in load_ablation(order["source"], order["budget"]).runs():
    if order["arm"] in run.arms and run.seed in order["seeds"]:
        directory = pathlib.Path(order["directory"]) / run.key
        directory.mkdir(exist_ok=True)
        with (directory / "calls").open("a") as calls:
            print(json.dumps({**order, "at": time.time()}), file=calls)
        if (order["arm"], run.seed) == ("slow", 0) and not (directory / "calls").read_text().count("\\n") > 1:
            print("error: it broke", file=sys.stderr)
            sys.exit(1)
        (directory / "metrics.jsonl").write_text('{"step": 3, "reward": 0.25}\\n')
        (directory / "run.json").write_text('{"status": "finished"}')
"""


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "letters.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def ablation(source) -> Ablation:
    return load_ablation(source)


@pytest.fixture
def stand_in(monkeypatch, tmp_path) -> None:
    path = tmp_path / "worker.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(processes, "WORKER", (sys.executable, str(path)))
    monkeypatch.setenv("PYTHONPATH", str(Path(grpo_jax.__file__).parents[1]))


def calls(directory: Path) -> dict[str, list[dict]]:
    return {
        path.parent.name: list(map(json.loads, path.read_text().splitlines())) for path in directory.glob("*/calls")
    }


def test_a_failed_run_does_not_end_the_rest_and_is_tried_again(source, ablation, stand_in, tmp_path):
    out, runs = io.StringIO(), tmp_path / "runs"
    with pytest.raises(RunError, match=r"1 of 4 runs failed \(slow seed 0\) and the others are finished"):
        sweep.sweep(source, ablation, runs, jobs=2, console=Console(file=out, width=200))
    keys = {(run.arms[0], run.seed): run.key for run in ablation.runs()}
    assert f"{keys['slow', 0]} failed: it broke" in out.getvalue()
    assert "slow  seed 1" in out.getvalue()
    assert {key: sweep.is_finished(runs / key) for key in keys.values()} == {
        key: key != keys["slow", 0] for key in keys.values()
    }
    sweep.sweep(source, ablation, runs, console=Console(file=out))  # the same command again
    assert {key: len(found) for key, found in calls(runs).items()} == {
        key: 2 if key == keys["slow", 0] else 1 for key in keys.values()
    }


def test_processes_that_run_together_share_the_cores(source, ablation, stand_in, tmp_path):
    with pytest.raises(RunError):
        sweep.sweep(source, ablation, tmp_path / "runs", jobs=2, console=Console(file=io.StringIO()))
    dealt = {tuple(call["cores"]) for found in calls(tmp_path / "runs").values() for call in found}
    available = sorted(os.sched_getaffinity(0))
    assert sorted(core for cores in dealt for core in cores) == available or len(available) == 1


def test_a_process_that_was_killed_says_by_what(source, ablation, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "WORKER", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    out = io.StringIO()
    with pytest.raises(RunError, match="4 of 4 runs failed"):
        sweep.sweep(source, ablation, tmp_path, console=Console(file=out, width=200))
    assert "failed: killed by SIGKILL" in out.getvalue()


def test_no_jobs_is_a_mistake(source, ablation, tmp_path):
    with pytest.raises(UserError, match="--jobs 0 is out of range"):
        sweep.sweep(source, ablation, tmp_path, jobs=0)


def test_the_progress_reads_the_runs_files(ablation, tmp_path):
    first, second, *_ = ablation.runs()
    run_dir = tmp_path / first.key
    run_dir.mkdir()
    (run_dir / "run.json").write_text('{"status": "running"}')
    rows = [{"step": 0, "evaluation/success": 0.5}, {"step": 9, "reward": 0.25}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "rew')
    assert latest_metrics(run_dir) == {"step": 9, "reward": 0.25, "evaluation/success": 0.5}
    console = Console(file=io.StringIO(), width=120)
    console.print(
        SweepProgress(ablation.runs(), tmp_path, "evaluation/success", console).table({first.key}, {second.key})
    )
    [row] = [line for line in console.file.getvalue().splitlines() if first.key in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "base", "0", first.key, "running", "10/30", "0.250", "0.500",
    ]  # fmt: skip
    assert "failed" in console.file.getvalue() and "0 of 4 runs finished" in console.file.getvalue()


def test_a_sweep_killed_in_the_middle_and_gone_on_with_is_one_left_alone(source, tmp_path):
    """Its orphan saves its last step and ends; what goes on waits for it, and ends as an undisturbed run does."""
    source.write_text(FILE + 'ablation = Ablation(base=base, arms={"base": {}}, seeds=(0,))\n')
    [run] = load_ablation(source).runs()
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    command = ["from grpo_jax.cli import main; main()", "sweep", str(source), "--dir", str(killed)]
    environment = os.environ | {"PYTHONPATH": str(Path(grpo_jax.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", *command], stdout=subprocess.DEVNULL, env=environment)
    metrics = killed / run.key / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("reward_std") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    worker.run(source, "base", [0], alone, budget="steps")
    worker.run(source, "base", [0], killed, budget="steps")
    assert json.loads((killed / run.key / "run.json").read_text())["resumed"]
    summaries = [json.loads((d / run.key / "summary.json").read_text())["after"] for d in (alone, killed)]
    assert summaries[0] == summaries[1]
    texts = [(d / run.key / "completions.jsonl").read_text() for d in (alone, killed)]
    assert texts[0] == texts[1]


def test_a_run_of_a_sweep_can_be_restored(source, tmp_path):
    from grpo_jax.experiment import load_run
    from grpo_jax.runs.restore import restore_policy

    source.write_text(
        FILE
        + textwrap.dedent("""
        ablation = Ablation(base=override(base, {"steps": 1}), arms={"base": {}, "hot": {"sampling.temperature": 2.0}})
    """)
    )
    [run] = [run for run in load_ablation(source).runs() if run.arms == ("hot",) and run.seed == 3]
    worker.run(source, "hot", [3], tmp_path, budget="steps")
    config, _ = load_run(tmp_path / run.key), restore_policy(tmp_path / run.key)
    assert (config.sampling.temperature, config.seed) == (2.0, 3)


def test_a_run_records_the_budget_that_it_was_given(source, tmp_path, monkeypatch):
    def begin(config, log):
        with log:
            pass

    monkeypatch.setattr("grpo_jax.training.run", begin)
    worker.run(source, "slow", [1], tmp_path, budget="tokens")
    [run] = [run for run in load_ablation(source, "tokens").runs() if run.arms == ("slow",) and run.seed == 1]
    assert run.config.token_budget == 30 * 2 * 2 * 3  # steps x prompts x group x max_tokens; the file's budget is steps
    assert to_dict(load(source, read_run(tmp_path / run.key)["overrides"])) == to_dict(run.config)
    link = tmp_path / "tensorboard" / "slow seed 1"
    assert link.resolve() == (tmp_path / run.key).resolve() and len(list(run_files(tmp_path))) == 1


@pytest.mark.parametrize(("digest", "is_adopted"), [(sources.package_digest(), True), ("c0ffee", False)])
def test_a_warm_start_that_other_code_has_made_is_left_alone(ablation, tmp_path, digest, is_adopted):
    config = override(ablation.base, {"warm_start": {"steps": 3}})
    other = tmp_path / "other"
    (other / "warm_start").mkdir(parents=True)
    info = {"status": "finished", "package": {"digest": digest}}
    (other / "warm_start" / "run.json").write_text(json.dumps(info))
    adopt_warm_start(tmp_path / "run", config, [(other, config)])
    assert (tmp_path / "run" / "warm_start" / "run.json").exists() == is_adopted


def test_arms_share_a_warm_start_that_they_would_have_made_themselves(source, tmp_path):
    source.write_text(
        FILE
        + textwrap.dedent("""
        from dataclasses import replace
        task = replace(task, demonstrate=lambda example, rng: [rng.choice("abc") * 3])
        base = override(base, {"task": task, "steps": 2, "warm_start": {"method": "sft", "steps": 3}})
        arms = {"base": {}, "hot": {"sampling.temperature": 2.0}, "long": {"warm_start.steps": 4}}
        ablation = Ablation(base=base, arms=arms, seeds=(0,))
    """)
    )
    base, hot, long = load_ablation(source).runs()
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    for arm in ("base", "hot", "long"):
        worker.run(source, arm, [0], shared, budget="steps")
    worker.run(source, "hot", [0], alone, budget="steps")
    metrics = {
        run.arms[0]: (shared / run.key / "warm_start" / "metrics.jsonl").read_text() for run in (base, hot, long)
    }
    assert metrics["hot"] == metrics["base"]  # down to the seconds that its steps took: it is the same warm start
    assert len(metrics["long"].splitlines()) == 4
    # An experiment finds the one that it would make, however it is evaluated; none was made at another seed.
    evaluated = override(long.config, {"evaluation.num_prompts": 1})
    assert find_warm_start(evaluated, shared) == find_warm_start(evaluated, shared / long.key)
    assert find_warm_start(evaluated, shared) == shared / long.key / "warm_start"
    assert find_warm_start(hot.config, shared / hot.key / "warm_start") == shared / hot.key / "warm_start"
    with pytest.raises(UserError, match=r"holds no finished warm start that this experiment would make .* of 3 that"):
        find_warm_start(override(long.config, {"seed": 7}), shared)
    for name in ("completions.jsonl", "config.json"):
        assert (shared / hot.key / name).read_text() == (alone / hot.key / name).read_text()
    assert not json.loads((shared / hot.key / "run.json").read_text()).get("resumed")
