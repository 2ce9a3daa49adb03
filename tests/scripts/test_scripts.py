"""The scripts, each run in a small form as a process of its own."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import letters
import pytest

from grpo_jax.experiment import load_ablation
from grpo_jax.statistics import tables
from grpo_jax.statistics.plans import declared_plan

ROOT = Path(__file__).parents[2]
SMALL = ["steps=1", "checkpoint_every=1"]


def run_script(name: str, *arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess:
    """Runs a script in the current directory, and checks its exit status."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(autouse=True)
def experiment(tmp_path, monkeypatch) -> Path:
    """The toy experiment, in the current directory; its `answered` demonstrates right answers."""
    monkeypatch.chdir(tmp_path)
    answered = "\nfrom dataclasses import replace\nanswered = replace(task, demonstrate=lambda example, rng: ['aaa'])\n"
    Path("letters.py").write_text(Path(letters.__file__).read_text() + answered)
    return Path("letters.py")


# run_ablation.py and its SLURM array ---------------------------------------------------------------------------------


@pytest.fixture
def ablation(experiment) -> Path:
    path = Path("toy.py")
    path.write_text(
        experiment.read_text()
        + "from grpo_jax.experiment import Ablation, override\n"
        + 'base = override(config, {"steps": 1, "checkpoint_every": 1})\n'
        + 'ablation = Ablation(base=base, arms={"base": {}}, seeds=(0, 1))\n'
    )
    return path


def test_an_ablation_is_made_run_by_run(ablation):
    assert run_script("run_ablation.py", ablation, "--count").stdout == "2\n"
    run_script("run_ablation.py", ablation, 0, "--dir", "runs")
    if shutil.which("bash"):  # as a task of a SLURM array, which starts the project's own Python
        Path(".venv/bin").mkdir(parents=True)
        Path(".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        Path(".venv/bin/python").chmod(0o755)
        Path("scripts").symlink_to(ROOT / "scripts")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": "1"}
        command = ["bash", "scripts/ablation_array.sh", str(ablation), "--dir", "runs"]
        subprocess.run(command, check=True, env=environment)
    else:
        run_script("run_ablation.py", ablation, 1, "--dir", "runs")
    [row] = tables.collect(declared_plan(load_ablation(ablation), ""), Path("runs")).rows
    assert row.seeds == 2

    metrics = sorted(Path("runs").glob("*/metrics.jsonl"))
    before = [path.read_bytes() for path in metrics]
    run_script("run_ablation.py", ablation, 0, "--dir", "runs")  # finished, so nothing is run again
    assert [path.read_bytes() for path in metrics] == before


def test_a_run_that_an_ablation_does_not_have_is_a_mistake(ablation):
    assert run_script("run_ablation.py", ablation, 2, status=2).stderr == (
        "error: the number of a run must be between 0 and 1, not 2.\n"
    )
    assert "there is no experiment file" in run_script("run_ablation.py", "nowhere.py", 0, status=2).stderr


# compare_methods.py --------------------------------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| \n").split(" | ")]


def test_methods_are_compared_by_what_they_score_and_cost(experiment):
    options = ["--methods", "grpo", "rlhf", "sft", "--seeds", "1", "--runs", "runs", "--set", *SMALL]
    done = run_script("compare_methods.py", experiment, *options, "--output", "methods.md")
    table, explanation = done.stdout.split("\n\n")
    head, _, *lines = table.splitlines()
    found = {row[0]: dict(zip(cells(head), row, strict=True)) for row in map(cells, lines)}
    assert list(found) == ["grpo", "rlhf", "sft"]
    for method, run in (("grpo", "grpo-0"), ("rlhf", "rlhf-0"), ("sft", "sft-0")):
        summary = json.loads(Path("runs", run, "summary.json").read_text())
        assert found[method]["success"].startswith(f"{summary['after']['held_out']['success']:.1%} [")
    # One step of 4 prompts: 4 x 4 completions for GRPO, as many for the reward model and for PPO each, none for SFT.
    assert [found[method]["rollouts"] for method in found] == ["16", "32", "0"]
    assert found["grpo"]["labels"] == "16" and found["sft"]["labels"] == "4"
    against = found["sft"]["against the first, in points"]
    assert re.fullmatch(r"[+-][\d.]+ \[-[\d.]+, \+[\d.]+\], p = 1\.000: (1 seed cannot|no difference) .*", against)
    assert "Gaffke's" in explanation and "Holm" in explanation
    assert done.stderr.splitlines()[:2] == ["grpo, seed 0", "reward_model, seed 0"]
    assert Path("methods.md").read_text().startswith(done.stdout)

    assert Path("methods.md").read_text().endswith("1 seeds, outside of a git repository.\n")
    again = run_script("compare_methods.py", experiment, *options)  # everything is there
    assert (again.stdout, again.stderr) == (done.stdout, "")


def test_a_method_that_fails_ends_the_comparison_with_one_sentence(experiment):
    options = ["--methods", "grpo", "--seeds", "1", "--runs", "runs", "--set", "stepz=1"]
    lines = run_script("compare_methods.py", experiment, *options, status=1).stderr.splitlines()
    assert lines[1].startswith("error: 'stepz' is not a field")
    assert lines[2] == "error: grpo, seed 0 ended with exit status 2."


# estimator_bench.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 200])
def test_the_estimators_are_measured_against_the_exact_gradient(samples):
    sizes = ["--vocabulary", 2, "--horizon", 1, "--prompts", 1, "--group-size", 2, "--samples", samples]
    done = run_script("estimator_bench.py", "--out", "bench", *sizes)
    with Path("bench/estimator_bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    games = list(dict.fromkeys(row["game"] for row in rows))
    assert games == ["on policy", "sampler drifted by 0.5"]
    assert len(rows) == 2 * len({row["estimator"] for row in rows}) > 20
    [rloo] = [row for row in rows if row["estimator"] == "RLOO" and row["game"] == "on policy"]
    error = float(rloo["scale error"])  # 1.96 standard errors; 0 if every batch was listed
    assert (error > 0) == (samples > 0)
    assert float(rloo["scale"]) == pytest.approx(1, abs=2 * error + 1e-5)  # RLOO is unbiased
    written = Path("bench/estimator_bench.md").read_text()
    assert "### On policy" in written and f"| RLOO | {float(rloo['scale']):.3f} " in written
    assert Path("bench/estimator_bench.png").stat().st_size > 1000
    assert re.search(r"on policy: expected reward of each prompt \[0\.\d+\]", done.stderr)


def test_too_many_batches_to_list_are_a_mistake():
    options = ["--out", "bench", "--vocabulary", 4, "--horizon", 4, "--group-size", 8]
    done = run_script("estimator_bench.py", *options, status=2)
    assert done.stderr.startswith("error: there are ") and "sample them instead" in done.stderr


# reproduce_tables.py -------------------------------------------------------------------------------------------------


def test_the_articles_numbers_are_printed_with_their_verdicts():
    done = run_script("reproduce_tables.py", ROOT / "experiments" / "papers" / "article.py", "--json")
    rows = json.loads(done.stdout)
    assert done.stderr == ""  # every verdict is the expected one
    [row] = [row for row in rows if row["cell"] == "reward[0] FOUND"]
    assert (row["printed"], row["ours"], row["verdict"]) == (0.8, 0.8, "agrees")
    assert sum(row["verdict"].startswith("disagrees: ") for row in rows) == 10


def test_a_manifest_that_is_not_there_is_a_mistake():
    done = run_script("reproduce_tables.py", "nowhere.py", status=2)
    assert done.stderr == "error: there is no experiment file 'nowhere.py'.\n"


# results.py ----------------------------------------------------------------------------------------------------------


def test_a_page_of_results_records_every_seed_and_says_when_it_is_stale(ablation):
    """Two arms that are alike share a run, and one more is made from perturbed weights."""
    ablation.write_text(
        ablation.read_text().replace('{"base": {}}, seeds=(0, 1)', '{"base": {}, "again": {}}, seeds=(0,)')
    )
    make = [ablation, "--output", "pages", "--dir", "runs"]
    run_script("results.py", *make)
    record = json.loads(Path("pages/toy.json").read_text())
    runs = {kind: record["runs"][kind]["base"]["0"] for kind in ("as it is", "perturbed")}
    for run in runs.values():
        rows = [json.loads(line) for line in (Path("runs") / run["run"] / "metrics.jsonl").read_text().splitlines()]
        assert [row["evaluation/success"] for row in rows if "evaluation/success" in row][-1] == run["value"]
    config = json.loads((Path("runs") / runs["perturbed"]["run"] / "config.json").read_text())
    assert config["policy"]["perturbation"] == 1e-6 and runs["as it is"]["run"] != runs["perturbed"]["run"]
    assert record["runs"]["as it is"]["again"] == record["runs"]["as it is"]["base"]
    [machine] = record["machines"]
    assert machine["processor"]["name"] and machine["processor"]["cores"] and machine["versions"]["jaxlib"]

    page = Path("pages/toy.md")
    assert f"| base | {runs['as it is']['value']:.3f} |" in page.read_text() and Path("pages/toy.png").stat().st_size
    # What is written above the mark stays, and what is finished is not run again.
    page.write_text(page.read_text().replace("# toy", "# Toy\n\nA finding."))
    started = [json.loads(path.read_text())["started"] for path in sorted(Path("runs").glob("*/run.json"))]
    run_script("results.py", *make)
    assert page.read_text().startswith("# Toy\n\nA finding.\n\n<!-- made by")
    assert started == [json.loads(path.read_text())["started"] for path in sorted(Path("runs").glob("*/run.json"))]

    assert run_script("results.py", "--check", "--output", "pages").stdout == "toy: current\n"
    ablation.write_text(ablation.read_text().replace('{"steps": 1,', '{"steps": 2,'))
    assert (
        "toy: stale, the runs of again, base (as it is)"
        in run_script("results.py", "--check", "--output", "pages", status=1).stdout
    )
    record["package"] = "another"
    Path("pages/toy.json").write_text(json.dumps(record))
    said = run_script("results.py", "--check", "toy", "--output", "pages", status=1).stdout
    assert "made by earlier training code (another, now" in said


def test_every_page_of_results_has_the_runs_of_todays_files():
    """Its experiments say what it says that they do: their runs have the names that the page lists."""
    spec = importlib.util.spec_from_file_location("results", ROOT / "scripts" / "results.py")
    results = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = results  # as a dataclass needs
    spec.loader.exec_module(results)
    pages = sorted(results.PAGES.glob("*.json"))
    assert pages
    for page in pages:
        assert not [reason for reason in results.why_stale(page) if reason.startswith("stale")], page.stem


# interval_coverage.py ------------------------------------------------------------------------------------------------


def test_the_printed_intervals_cover_and_students_does_not():
    options = ["--repetitions", "300", "--questions", "1", "10"]
    assert run_script("interval_coverage.py", *options, "--output", "coverage.md").stdout == ""
    text = Path("coverage.md").read_text()
    assert "    python " in text and "from 300 repetitions" in text
    means = [cells(line) for line in text.splitlines() if line.startswith("| .99, but 0 once in ten | ")]
    assert [row[1] for row in means[:4]] == ["3", "5", "10", "20"]
    coverage = [[float(cell.split("%")[0]) for cell in row[2:]] for row in means[:4]]
    assert min(row[0] for row in coverage) >= 94 and coverage[0][1] < 35
    lowest = float(re.search(r"Its lowest coverage\non this page is ([\d.]+) %", text)[1])
    assert lowest > 93  # the standard error is 1.3 points
    assert text.count("\n## ") == 7


# soak.py and kill.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def soak(monkeypatch):
    """The module of `scripts/soak.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import soak as module

    yield module
    for name in ("soak", "children"):
        sys.modules.pop(name, None)


def test_the_growth_is_that_within_processes_whatever_they_begin_with(soak):
    """Two processes grow by 2 MiB in 100 steps, from 300 and from 500 MiB; the first 200 steps of each do not count."""
    warm_up = [soak.Sample("a", 0, 100.0, 8), soak.Sample("b", 400, 900.0, 8)]
    samples = [
        soak.Sample(name, first + step, start + step / 50, 8)
        for name, first, start in (("a", 0, 300.0), ("b", 400, 500.0))
        for step in (200, 300, 400)
    ]
    assert soak.slope([*warm_up, *samples], "memory") == pytest.approx((0.02, 0.02, 0.02))
    assert soak.slope([*warm_up, *samples], "files") == pytest.approx((0.0, 0.0, 0.0))


def test_processes_that_grow_differently_make_the_interval_wide(soak):
    """Slopes of 0 and .04 over the same steps: the mean is .02, and two processes bound it to t(.975, 1) * .02."""
    samples = [
        soak.Sample(name, step, slope * step, 8)
        for name, slope in (("a", 0.0), ("b", 0.04))
        for step in (0, 200, 300, 400)
    ]
    value, low, high = soak.slope(samples, "memory")
    assert value == pytest.approx(0.02)
    assert (low, high) == pytest.approx((0.02 - 12.706 * 0.02, 0.02 + 12.706 * 0.02), rel=1e-4)


def test_the_first_row_that_differs_from_the_undisturbed_run_is_named_and_times_are_not_compared(soak, tmp_path):
    for name, losses in (("one", (1.0, 2.0)), ("other", (1.0, 2.5))):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": loss, "step_time": hash(name)} for step, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert soak.children.difference(tmp_path / "one", tmp_path / "other") == f"{tmp_path / 'one/metrics.jsonl'}:2"


def test_a_killed_run_is_gone_on_with_and_compared(tmp_path):
    done = run_script("kill.py", "--targets", "sft", "--kills", 1, "--output", tmp_path / "table.md")
    assert "| sft |" in done.stdout and "1 kills, seed 0; runs that went wrong: 0." in done.stdout
    assert (tmp_path / "table.md").read_text() == done.stdout
