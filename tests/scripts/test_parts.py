"""The parts of the scripts, called in this process: what they count, compare and print, by hand."""

import importlib.util
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from grpo_jax import statistics
from grpo_jax.confidence import bounded_limits
from grpo_jax.errors import UserError
from grpo_jax.experiment import load_ablation, sources
from grpo_jax.research.reproduction import Cell, check

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as a dataclass needs
    spec.loader.exec_module(module)
    return module


FILE = """
from types import SimpleNamespace
from grpo_jax.experiment import *
task = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[{"prompt": "b"}], demonstrate=None)
answered = SimpleNamespace(name="answered", train=task.train, held_out=[], demonstrate=lambda example, rng: ["a"])
config = Experiment(task=task, rewards={"length": len}, warm_start={"steps": 3})
base = override(config, {"warm_start": None})
ablation = Ablation(base=base, arms={"a": {}, "b": {"loss.beta": 0.5}, "a too": {}}, seeds=(7, 4), metric="reward")
"""


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.py"
    path.write_text(FILE)
    return path


# run_ablation.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "options", "expected"),
    [
        ("0", [], ("a", [7], Path("runs/toy"), "steps")),
        ("1", ["--dir", "d"], ("b", [7], Path("d"), "steps")),
        ("3", ["--budget", "tokens"], ("b", [4], Path("runs/toy"), "tokens")),
    ],
)
def test_a_run_of_an_ablation_is_chosen_by_its_number(source, monkeypatch, number, options, expected):
    from grpo_jax.sweep import worker

    calls = []
    monkeypatch.setattr(worker, "run", lambda *arguments, budget: calls.append((*arguments, budget)))
    module = script("run_ablation")
    monkeypatch.setattr(module.common, "prepare_jax", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run_ablation.py", str(source), *options, number])
    module.main()
    assert calls == [(source, *expected)]


@pytest.mark.parametrize("number", [["4"], ["-1"], []])
def test_a_number_that_no_run_has_is_refused(source, monkeypatch, number):
    module = script("run_ablation")
    monkeypatch.setattr(sys, "argv", ["run_ablation.py", str(source), "--", *number])
    with pytest.raises(UserError, match=f"must be between 0 and 3, not {number[0] if number else None}"):
        module.main()


# reproduce_tables.py -------------------------------------------------------------------------------------------------


def test_the_rows_of_printed_tables_are_shown_and_news_is_told(monkeypatch, capsys):
    module = script("reproduce_tables")
    monkeypatch.setenv("COLUMNS", "120")
    cells = [
        Cell("T1", "one", "s", 0.5, "agrees", compute=lambda: 0.5, note="a note"),
        Cell("T2", "two", "s", 1.0, "agrees", compute=lambda: 1.23456789),
        Cell("T1", "three", "s", "many", "not run here", hardware="a TPU", command="train it"),
    ]
    asked = []
    monkeypatch.setattr(module, "load_manifests", lambda paths: asked.append(paths) or cells)
    monkeypatch.setattr(module.common, "prepare_jax", lambda: None)
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py"])
    assert module.main() == 1
    assert asked == [sorted((ROOT / "experiments" / "papers").glob("*.py"))]
    out, err = capsys.readouterr()
    assert err == "T2, two: disagrees, where agrees was expected\n"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows == [
        ["one", "0.5", "0.5", "agrees", "a note"],
        ["three", "many", "–", "not run here", "needs a TPU: train it."],
        ["two", "1", "1.23457", "disagrees", ""],
    ]
    assert out.index("T1") < out.index("three") < out.index("T2")
    monkeypatch.setattr(module, "load_manifests", lambda paths: asked.append(paths) or cells[:1])
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", "mine.py"])
    assert module.main() == 0 and asked[-1] == [Path("mine.py")]


def test_a_cell_that_is_not_computed_or_not_printed_says_what_it_is():
    gap = check(Cell("t", "c", "s", None, "not run here", compute=lambda: 3, note="A note."))
    assert (gap.ours, gap.note) == (3.0, "nothing is printed here to compare with. A note.")
    far = check(Cell("t", "c", "s", 5, "not run here", hardware="a TPU", note="A note."))
    assert far.note == "needs a TPU. A note." and not far.is_news
    assert far.to_dict() == {"table": "t", "cell": "c", "printed": 5, "ours": None, "verdict": "not run here",
                             "note": "needs a TPU. A note."}  # fmt: skip
    with pytest.raises(UserError, match="t, c: a computed number cannot be compared with the text 'many'"):
        check(Cell("t", "c", "s", "many", "agrees", compute=lambda: 3))
    edge = Cell("t", "c", "s", 1.0, "agrees", compute=lambda: 1.25, tolerance=0.25)
    assert check(edge).verdict == "agrees" and check(replace(edge, tolerance=0.2)).verdict == "disagrees"
    unexpected = check(replace(edge, tolerance=0.2, why="other")).to_dict()
    assert (
        unexpected["verdict"] == "disagrees: other"
        and check(replace(edge, why="other")).to_dict()["verdict"] == "agrees"
    )


# results.py ----------------------------------------------------------------------------------------------------------


def write_run(run: Path, *rewards: float, kind: str = "cpu", digest: str = "c0ffee") -> None:
    run.mkdir(parents=True)
    rows = [{"step": step, "reward": reward} for step, reward in enumerate(rewards)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {"processor": {"name": "Z80"}, "device": {"kind": kind}, "versions": {"jax": "9"}}
    (run / "run.json").write_text(json.dumps({**info, "package": {"digest": digest}}))


def test_a_page_records_the_last_value_of_every_run_under_its_arm_and_seed(source):
    results, ablation = script("results"), load_ablation(source)
    runs = {(run.arms[0], run.seed): run.key for run in ablation.runs()}
    for number, key in enumerate(runs.values()):
        write_run(Path("runs") / key, 9.0, number, kind="cpu" if number else "gpu")
    assert results.values(ablation, Path("runs")) == {
        arm: {str(seed): {"run": runs[first, seed], "value": value} for seed, value in ((7, v7), (4, v4))}
        for arm, first, v7, v4 in (("a", "a", 0.0, 2.0), ("b", "b", 1.0, 3.0), ("a too", "a", 0.0, 2.0))
    }
    one = {"processor": {"name": "Z80"}, "versions": {"jax": "9"}}
    assert results.made_by(ablation, Path("runs")) == {
        "package": "c0ffee", "machines": [{**one, "device": "gpu"}, {**one, "device": "cpu"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "end"),
    [({}, ""), ({"jobs": 3}, " --jobs 3"), ({"jobs": 3, "vectorize": True}, " --vectorize")],
)
def test_a_page_names_the_command_that_makes_it(options, end):
    results = script("results")
    how = {"jobs": 1, "vectorize": False, **options}
    own = results.Plan(results.ABLATIONS / "temperature.py", Path("r"), Path("p"), **how)
    assert (own.name, own.command()) == ("temperature", f"python scripts/results.py temperature{end}")
    other = results.Plan(Path("mine/toy.py"), Path("r"), Path("p"), **how)
    assert other.command() == f"python scripts/results.py mine/toy.py{end}"
    assert results.drawn("evaluation/success") == "success" and results.drawn("kl") == "kl"
    assert results.relative(ROOT / "scripts" / "x.py") == "scripts/x.py"
    assert results.relative(Path("/elsewhere/x.py")) == "/elsewhere/x.py"


def test_what_stands_below_the_mark_of_a_page(monkeypatch):
    from grpo_jax.statistics import layouts

    results = script("results")
    monkeypatch.setattr(layouts, "render", lambda table, layout: f"THE {layout} TABLE of {table.name}\n")

    def found(name: str, *values: float | None):
        rows = [SimpleNamespace(arm=arm, mean=None if value is None else SimpleNamespace(value=value))
                for arm, value in zip("ab", values, strict=True)]  # fmt: skip
        return SimpleNamespace(name=name, rows=rows)

    def runs(*values: float):
        return {arm: {"7": {"value": v}, "4": {"value": v + 1}} for arm, v in zip("ab", values, strict=True)}

    machine = {"processor": {"name": "Z80", "instructions": ["avx2", "sse"], "cores": 2},
               "versions": {"python": "3.11", "jax": "9", "jaxlib": "8"}}  # fmt: skip
    record = {
        "runs": {"as it is": runs(0.5, 0.25), "perturbed": runs(0.125, 0.75)}, "metric": "kl", "page": "toy",
        "command": "make it", "verdicts": {"as it is": {"a": "base", "b": "better"}, "perturbed": {"a": "x", "b": "y"}},
        "made": "today", "package": "c0ffee", "machines": [machine],
    }  # fmt: skip
    lines = results.below(record, {"as it is": found("plain", 0.5, None), "perturbed": found("other", 0.125, 0.75)})
    lines = lines.split("\n")
    assert lines[:6] == [
        "    make it",
        "",
        "![kl over the steps of training](toy.png)",
        "",
        "THE md TABLE of plain",
        "",
    ]
    assert "| a | 0.500 | 0.125 | base | x |" in lines and "| b | – | 0.750 | better | y |" in lines
    first, second = lines.index("Every seed, as it is:"), lines.index("Every seed, perturbed:")
    assert lines[first + 2 : first + 6] == [
        "| arm | 7 | 4 |", "|---|---|---|", "| a | 0.500 | 1.500 |", "| b | 0.250 | 1.250 |"]  # fmt: skip
    assert lines[second + 4] == "| a | 0.125 | 1.125 |"
    assert lines[-4:] == ["Made on today by training code `c0ffee`, on", "",
                          "- Z80 (avx2, sse), 2 cores for a run; Python 3.11, jax 9, jaxlib 8.", ""]  # fmt: skip


def test_a_page_is_stale_if_a_run_of_either_kind_has_another_name_or_the_code_is_another(source, tmp_path, capsys):
    results = script("results")

    def recorded(**changes) -> dict:
        kinds = {}
        for kind, overrides in results.KINDS.items():
            ablation = load_ablation(source, None, overrides)
            kinds[kind] = {arm: {str(run.seed): {"run": run.key} for run in ablation.runs() if arm in run.arms}
                           for arm in ablation.arms}  # fmt: skip
        python = ".".join(map(str, sys.version_info[:3]))
        machines = [{"versions": {"python": python}}]
        record = {"ablation": str(source), "runs": kinds, "machines": machines, "package": sources.package_digest()}
        return {**record, **changes}

    def reasons(record: dict) -> list[str]:
        (tmp_path / "page.json").write_text(json.dumps(record))
        return results.why_stale(tmp_path / "page.json")

    assert results.KINDS == {"as it is": [], "perturbed": ["policy.perturbation=1e-06"]}
    assert reasons(recorded()) == []
    assert results.check(tmp_path, None) == 0 and capsys.readouterr().out == "page: current\n"
    record = recorded()
    record["runs"]["perturbed"]["b"]["4"]["run"] = "x"
    del record["runs"]["perturbed"]["a"]
    assert reasons(record) == ["stale, the runs of a, b (perturbed) have other names now"]
    record = recorded(package="old")
    assert reasons(record) == [f"made by earlier training code (old, now {sources.package_digest()})"]
    (tmp_path / "other.json").write_text(json.dumps(recorded()))
    assert results.check(tmp_path, None) == 1 and results.check(tmp_path, ["other"]) == 0
    assert reasons(recorded(machines=[{"versions": {"python": "2.7.1"}}])) == [
        "can be checked with Python 2.7 only: a run's name counts compiled functions"]  # fmt: skip
    with pytest.raises(UserError, match="there is no page 'none' with a record in"):
        results.why_stale(tmp_path / "none.json")


# compare_methods.py --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("grpo", ["method=grpo", "seed=2", "x=1"]),
        ("rlhf", ["method=ppo", "seed=2", "x=1"]),
        ("dpo", ["method=dpo", "seed=2", "preferences.noise_level=0.1", "x=1"]),
        ("reward_model", ["method=reward_model", "seed=2", "preferences.noise_level=0.1", "x=1"]),
        ("sft", ["method=sft", "seed=2", "group_size=1", "x=1"]),
    ],
)
def test_the_assignments_of_a_method(method, expected):
    assert script("compare_methods").assignments_of(method, 2, ["x=1"]) == expected


def test_imitation_has_the_task_that_demonstrates_answers_and_others_the_files_own(source):
    module = script("compare_methods")
    source.write_text(FILE[: FILE.index("base =")])
    assert module.experiment_of("grpo", source, ["seed=2"], Path("runs"), 2).task.name == "toy"
    source.write_text(source.read_text().replace("demonstrate=None", "demonstrate=len"))
    found = module.experiment_of("sft", source, ["method=sft", "group_size=1"], Path("runs"), 2)
    assert (found.task.name, found.warm_start["task"].name, found.warm_start["steps"]) == ("answered", "toy", 3)
    none = module.experiment_of("sft", source, ["method=sft", "group_size=1", "warm_start=None"], Path("runs"), 2)
    assert none.warm_start is None


@pytest.mark.parametrize(
    ("method", "pairs", "labels", "rollouts", "passes"),
    [("grpo", None, 24, 24, 4), ("ppo", None, 24, 24, 6), ("rlhf", None, 0, 24, 7), ("dpo", (3, 2), 5, 24, 5),
     ("reward_model", (3, 2), 5, 24, 4), ("sft", None, 24, 0, 3), ("rft", None, 24, 24, 4)],
)  # fmt: skip
def test_what_a_run_cost(tmp_path, method, pairs, labels, rollouts, passes):
    """Two steps of 3 prompts and 4 completions; 500 tokens, 10 parameters."""
    after = {"success": 0.5, "success_low": 0.25, "success_high": 0.625}
    (tmp_path / "summary.json").write_text(json.dumps({"after": {"held_out": after}}))
    (tmp_path / "config.json").write_text(json.dumps({"prompts_per_step": 3, "group_size": 4}))
    (tmp_path / "cost.json").write_text(json.dumps({"parameters": 10, "peak_memory": 77}))
    rows = [{"step": 0, "evaluation/success": 0.0}]
    for step, (tokens, seconds) in enumerate(((200, 1.0), (500, 3.0))):
        rows.append({"step": step, "grad_norm": 1.0, "num_tokens": tokens, "step_time": seconds})
        if pairs:
            rows[-1]["preferences/pairs"] = pairs[step]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("compare_methods").costs(method, tmp_path) == {
        "success": 0.5, "noise": 0.1875, "labels": labels, "rollouts": rollouts, "tokens": 500,
        "flops": 2 * 10 * 500 * passes, "peak_memory": 77, "seconds": 2 * 2.0,
    }  # fmt: skip


def test_the_costs_of_stages_are_added_but_for_the_memory_and_the_score():
    stages = [{"success": 0.25, "noise": 0.5, "labels": 3, "peak_memory": 9, "seconds": 1.0},
              {"success": 0.75, "noise": 0.125, "labels": 4, "peak_memory": 5, "seconds": 2.0}]  # fmt: skip
    assert script("compare_methods").together(stages) == {
        "success": 0.75, "noise": 0.125, "labels": 7, "peak_memory": 9, "seconds": 3.0}  # fmt: skip


def test_methods_are_means_over_their_seeds_against_the_first():
    def seed(success: float, factor: float) -> dict:
        costs = {"labels": 1e3, "rollouts": 2e3, "tokens": 3e3, "flops": 4e12, "peak_memory": 5 * 2**20, "seconds": 6}
        return {"success": success, "noise": 0.1, **{name: cost * factor for name, cost in costs.items()}}

    text = script("compare_methods").table(
        {"grpo": [seed(0.25, 1), seed(0.5, 3)], "dpo": [seed(0.75, 1), seed(0.5, 1)]}
    )
    lines = text.splitlines()
    assert lines[0] == (
        "| method | success | against the first, in points | labels | rollouts | tokens | TFLOPs | peak MiB | seconds |"
    )
    base = statistics.mean([0.25, 0.5], (0, 1), noise=0.1)
    assert lines[2] == (
        f"| grpo | 37.5% [{base.low:.1%}, {base.high:.1%}] |  | 2,000 | 4,000 | 6,000 | 8.00 | 10 | 12 |"
    )
    paired = statistics.paired_difference([0.75, 0.5], [0.25, 0.5], (0, 1), noise=np.hypot(0.1, 0.1))
    cells = lines[3].split(" | ")
    assert cells[2] == (
        f"+25.0 [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}], p = 1.000: 2 seeds cannot show a difference "
        "(6 are needed)"
    )
    assert cells[3:] == ["1,000", "2,000", "3,000", "4.00", "5", "6 |"] and "quadrature" in lines[-1]


# interval_coverage.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    return script("interval_coverage")


ROWS = np.array([[0.2, 0.4, 0.9, 0.5], [0.9, 0.5, 0.4, 0.2], [0.1, 0.2, 0.3, 0.1]])


def test_intervals_of_means_are_those_of_their_names(coverage):
    low, high = coverage.gaffke(ROWS, (0, 1))
    assert np.allclose((low, high), bounded_limits(ROWS, (0, 1)))
    low, high = coverage.student(ROWS, (0, 1))
    expected = [tuple(stats.ttest_1samp(row, 0).confidence_interval(0.95)) for row in ROWS]
    assert np.allclose(np.stack([low, high], 1), expected)
    scaled_low, scaled_high = coverage.logit_student(10 * ROWS - 3, (-3, 7))
    low, high = coverage.logit_student(ROWS, (0, 1))
    assert np.allclose((scaled_low, scaled_high), (10 * low - 3, 10 * high - 3))
    mean, error = ROWS[0].mean(), ROWS[0].std(ddof=1) / 2
    half = stats.t.ppf(0.975, 3) * error / (mean * (1 - mean))
    odds = np.log(mean / (1 - mean))
    assert (low[0], high[0]) == pytest.approx((1 / (1 + np.exp(half - odds)), 1 / (1 + np.exp(-half - odds))))


def test_bootstrap_intervals_are_scipys(coverage):
    values = np.random.default_rng(0).gamma(2.0, size=(1, 25))
    for name, method in (("percentile", "percentile"), ("bca", "BCa")):
        low, high = getattr(coverage, name)(values, (0, 1))
        expected = stats.bootstrap((values[0],), np.mean, method=method, rng=np.random.default_rng(1))
        assert (low[0], high[0]) == pytest.approx(tuple(expected.confidence_interval), abs=0.06)


def test_intervals_of_success_by_hand(coverage):
    """Of four questions with shares .25 .75 .75 .25: p = .5, its variance is (1/12) / 4, so n = .25 / (1/48) = 12."""
    shares = np.array([[0.25, 0.75, 0.75, 0.25]])
    assert coverage.effective_samples(shares, 4)[0] == pytest.approx(12)
    assert coverage.effective_samples(np.array([[0.5]]), 4)[0] == 4
    assert coverage.effective_samples(np.array([[0.5, 0.5]]), 4)[0] == 2
    low, high = coverage.wilson(shares, 4)
    expected = stats.binomtest(6, 12).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))
    low, high = coverage.korn_graubard(np.array([[1.0, 0.0, 0.0, 0.0, 0.0]]), 1)
    p = 0.2
    n = coverage.effective_samples(np.array([[1.0, 0.0, 0.0, 0.0, 0.0]]), 1)[0]
    assert n == 5  # held at the number of samples: p (1 - p) / (.2 / 5) = 4, below the number of questions
    exact = stats.binomtest(1, 5).proportion_ci(method="exact")
    assert (low[0], high[0]) == pytest.approx((exact.low, exact.high)) and p == 1 / 5
    several = 12 * (stats.norm.ppf(0.975) / stats.t.ppf(0.975, 3)) ** 2
    low, _ = coverage.korn_graubard(shares, 4)
    assert low[0] == pytest.approx(stats.beta.ppf(0.025, several / 2, several / 2 + 1))
    assert (
        coverage.korn_graubard(np.zeros((1, 3)), 1)[0][0] == 0 and coverage.korn_graubard(np.ones((1, 3)), 1)[1][0] == 1
    )
    low, high = coverage.printed_success(np.array([[0.75]]), 4)
    assert (low[0], high[0]) == bounded_limits([1, 1, 1, 0])
    assert coverage.printed_success(shares, 4)[0][0] == bounded_limits(shares[0])[0]


def test_what_a_cell_says_of_limits(coverage):
    limits = np.array([0.0, 0.5, 0.25, 0.5 + 1e-10]), np.array([0.4, 0.75, 0.5, 1.0])
    assert coverage.score(limits, 0.5) == (0.75, pytest.approx((0.4 + 0.25 + 0.25 + 0.5) / 4))
    assert coverage.cell(limits, 0.5) == "75.0% (0.35)"
    assert coverage.standard_error(95 * 5) == "1.0%"
    rows = [["a", "x (printed)", "y", "z (printed)"], ["1", "97.0% (1)", "3.0% (1)", "98.0% (1)"],
            ["2", "96.5% (1)", "2.0% (1)", "95.5% (1)"]]  # fmt: skip
    assert coverage.lowest(rows) == 95.5
    assert coverage.markdown([["a", "b"], ["1", "2"]]).splitlines() == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_repetitions_are_computed_in_chunks_and_kept_in_order(coverage, monkeypatch):
    monkeypatch.setattr(coverage, "CHUNK", 2)
    sizes = []

    def interval(rows):
        sizes.append(len(rows))
        return rows[:, 0], rows[:, 1]

    low, high = coverage.chunked(interval, np.arange(10.0).reshape(5, 2))
    assert (low.tolist(), high.tolist(), sizes) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9], [2, 2, 1])


def test_the_distributions_have_the_means_that_they_are_said_to_have(coverage):
    rng = np.random.default_rng(0)
    for name, (sampler, truth) in {**coverage.OUTCOMES, **coverage.DIFFERENCES}.items():
        assert sampler(rng, (200, 500)).mean() == pytest.approx(truth, abs=0.006), name
    assert set(np.unique(coverage.two_values(0.9, 0.1, 0.25)(rng, (50, 50)))) == {0.1, 0.9}
    for alike in (0.0, 0.3):
        shares = coverage.outcomes_of(rng, (4000, 5), 8, 0.98, alike)
        assert shares.mean() == pytest.approx(0.98, abs=0.006)
    shares = coverage.outcomes_of(rng, (20_000, 1), 4, 0.5, 0.3)
    assert shares.var() == pytest.approx(0.25 / 4 * (1 + 3 * 0.3), rel=0.05)  # samples that are correlated


def test_the_designs_of_evaluations(coverage):
    designs = list(coverage.question_designs((1, 10)))
    assert [d for d in designs if d[0] == 1] == [(1, s, p, 0.0) for s in (1, 8) for p in (0.02, 0.5, 0.98)]
    assert (10, 8, 0.5, 0.3) in designs and (10, 1, 0.5, 0.3) not in designs and len(designs) == 6 + 9
    asked = [coverage.repetitions_of(q, s, 1000) for q, s in ((30, 8), (31, 8), (31, 1), (600, 8))]
    assert asked == [1000, 50, 1000, 50] and coverage.repetitions_of(31, 8, 5) == 1


def test_the_table_of_means_has_a_row_for_each_distribution_and_number_of_seeds(coverage, monkeypatch):
    asked = []

    def sampler(rng, shape):
        asked.append((shape, rng.random()))
        return np.tile(np.arange(float(shape[1])), (shape[0], 1))

    def whole(rows, bounds):
        asked.append(bounds)
        return rows.min(1), rows.max(1)

    monkeypatch.setattr(coverage, "OF_MEANS", {"one": whole, "other": lambda rows, bounds: (rows[:, 0], rows[:, 0])})
    monkeypatch.setattr(coverage, "SEEDS", (3, 5))
    found = list(coverage.means_table({"x": (sampler, 3.0)}, (0, 9), 7))
    assert found == [["values", "seeds", "one", "other"], ["x", "3", "0.0% (2)", "0.0% (0)"],
                     ["x", "5", "100.0% (4)", "0.0% (0)"]]  # fmt: skip
    draws = [np.random.default_rng(n).random() for n in (3, 5)]
    assert asked == [((7, 3), draws[0]), (0, 9), ((7, 5), draws[1]), (0, 9)]


def test_the_table_of_calls_has_student_the_test_and_both(coverage, monkeypatch):
    """Of 40 repetitions two are tested. Eight equal differences are shown by the test, not by the interval."""
    spread = 1e-3 * np.arange(8)
    rows = {"small": 0.1 + spread, "large": 0.9 - spread, "none": np.tile([0.5, -0.5], 4)}
    monkeypatch.setattr(coverage, "SEEDS", (8,))
    sources_of = {name: (lambda *_, row=row: np.tile(row, (40, 1)), 0.0) for name, row in rows.items()}
    monkeypatch.setattr(coverage, "DIFFERENCES", sources_of)
    assert list(coverage.calls_table(40)) == [
        ["differences", "seeds", "Student's interval excludes 0", "p ≤ .05", "the verdict"],
        ["small", "8", "100.0%", "100.0%", "0.0%"],
        ["large", "8", "100.0%", "100.0%", "100.0%"],
        ["none", "8", "0.0%", "0.0%", "0.0%"],
    ]


def test_the_tables_of_evaluations_have_a_row_for_each_design(coverage, monkeypatch):
    monkeypatch.setattr(coverage, "OF_SUCCESS", {"x": lambda shares, samples: (shares.min(1), shares.min(1) + samples)})
    found = list(coverage.success_table((1, 40), 20))
    assert found[0] == ["questions", "samples", "success", "correlation", "x"]
    assert [row[:4] for row in found[1:]] == [
        [f"{q}", f"{s}", f"{p:g}", f"{a:g}"] for q, s, p, a in coverage.question_designs((1, 40))]  # fmt: skip
    assert {row[1]: row[4].split("(")[1] for row in found[1:]} == {"1": "1)", "8": "8)"}
    differences = list(coverage.question_table((1, 12), 20))
    designs = [row[:4] for row in differences[1:]]
    assert ["1", "8", "0.5", "0"] in designs and not [row for row in designs if row[:2] == ["1", "1"]]
    assert len(differences[1]) == 6 and designs[-1] == ["12", "8", "0.98", "0.3"]
    shared = list(coverage.shared_prompts_table(20))
    assert [row[0] for row in shared] == ["seeds", "3", "5", "10", "20"]
    alone, wide = (float(cell.split("(")[1][:-1]) for cell in shared[-1][1:])
    assert wide > alone
    monkeypatch.setattr(coverage, "SEEDS", (4,))
    monkeypatch.setattr(coverage, "OUTCOMES", {"same": (lambda rng, shape: np.full(shape, 0.5), 0.5)})
    assert list(coverage.iqm_table(10)) == [["values", "4 seeds"], ["same", "100.0%"]]


# estimator_bench.py, benchmark.py, docs_docstrings.py ----------------------------------------------------------------


def test_the_row_of_an_estimator_has_errors_where_batches_were_sampled(tmp_path, capsys):
    bench = script("estimator_bench")
    row = {"game": "on policy", "estimator": "X", "scale": 0.5, "scale error": 0.01, "bias": -0.0, "bias error": 0.02,
           "noise": 3.456, "length": -0.00001, "weight 0": 0.25, "weight 1": 0.75}  # fmt: skip
    options = bench.Options(tmp_path)
    assert bench.cells(row, options) == ["X", "0.500", "0.000", "3.46", "+0.000", "0.25 : 0.75"]
    sampled = bench.Options(tmp_path, samples=9)
    assert bench.cells(row, sampled)[1:3] == ["0.500 ± 0.010", "0.000 ± 0.020"]
    text = bench.show([row, {**row, "game": "other", "estimator": "Y"}], options)
    assert text.splitlines() == [
        "### On policy", "", "| estimator | scale | bias | noise | length | weights of the prompts |",
        "|---|---|---|---|---|---|", "| X | 0.500 | 0.000 | 3.46 | +0.000 | 0.25 : 0.75 |", "", "### Other", "",
        "| estimator | scale | bias | noise | length | weights of the prompts |", "|---|---|---|---|---|---|",
        "| Y | 0.500 | 0.000 | 3.46 | +0.000 | 0.25 : 0.75 |",
    ]  # fmt: skip
    (tmp_path / "mine.py").write_text("def loss(inputs):\n    return 0.0, {}\nx = 1\n")
    found = bench.own_estimator(f"{tmp_path / 'mine.py'}:loss")
    assert list(found) == ["loss"] and found["loss"].loss(None) == (0.0, {})
    with pytest.raises(UserError, match="has no function 'x'"):
        bench.own_estimator(f"{tmp_path / 'mine.py'}:x")
    with pytest.raises(UserError, match="is not of the form FILE"):
        bench.own_estimator("mine.py")


def test_the_benchmark_compares_trees_by_their_largest_entry_and_repeats_prompts():
    import jax.numpy as jnp

    from grpo_jax.sampler import Noise

    benchmark = script("benchmark")
    one = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([10.0])}
    other = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([8.0])}
    assert benchmark.worst_difference(one, other) == pytest.approx(0.5)  # 2 of 4, and 2 of 8
    noise = Noise(jnp.int32(0), jnp.int32(0), jnp.array([5, 6]), jnp.array([[0, 1], [0, 1]]))
    rows = benchmark.noise_of_rows(noise, 2)
    assert rows.prompt_ids.tolist() == [5, 5, 6, 6] and rows.samples.tolist() == [[0], [1], [0], [1]]


def test_the_benchmark_prints_medians_and_their_ratios_to_the_first(monkeypatch):
    """The first way takes 1, 5 and 2 s, the second 4, 3 and 9 s: medians of 2 and 4."""
    benchmark = script("benchmark")
    ends, now = iter([1.0, 4.0, 5.0, 3.0, 2.0, 9.0]), [0.0, False]

    def clock() -> float:
        now[0] += next(ends) if now[1] else 0.0
        now[1] = not now[1]
        return now[0]

    console = Console(file=io.StringIO(), width=120)
    monkeypatch.setattr(benchmark, "console", console)
    monkeypatch.setattr(benchmark.time, "perf_counter", clock)
    found = benchmark.compare("a title", {"one": (lambda x: x + 1, (1.0,)), "two": (lambda x: x * 3, (2.0,))}, 3)
    assert {name: float(value) for name, value in found.items()} == {"one": 2.0, "two": 6.0}
    lines = [line.split("│")[1:4] for line in console.file.getvalue().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["one", "2,000.00 ms", "1.00"], ["two", "4,000.00 ms", "2.00"]]  # fmt: skip


def test_an_entry_of_several_names_becomes_one_for_each(monkeypatch):
    stand_in = types.ModuleType("griffe")
    stand_in.Extension = stand_in.Object = object
    monkeypatch.setitem(sys.modules, "griffe", stand_in)
    text = "A, b: not an entry.\n\nArgs:\n  x, y: both\n    and more.\n  z: one.\nReturns:\n  a, b: no entry either."
    assert script("docs_docstrings").split_entries(text).split("\n") == [
        "A, b: not an entry.", "", "Args:", "  x: both", "    and more.", "  y: both", "    and more.", "  z: one.",
        "Returns:", "  a, b: no entry either.",
    ]  # fmt: skip
