"""Tables of ablations, from run directories that are written here by hand."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_jax import cli
from grpo_jax.confidence import bounded_limits
from grpo_jax.errors import UserError
from grpo_jax.experiment import Ablation, Experiment, load_ablation, to_dict
from grpo_jax.experiment.fingerprint import fingerprint
from grpo_jax.statistics import layouts, tables
from grpo_jax.statistics.plans import declared_plan, stored_plan
from grpo_jax.sweep.processes import write_plan

TASK = SimpleNamespace(name="toy", train=[{"prompt": "a"}], held_out=[{"prompt": "b"}])
BASE = Experiment(task=TASK, rewards={"length": len}, prompts_per_step=2, group_size=3)
ABLATION = Ablation(
    base=BASE, arms={"base": {}, "a_b & c": {"loss.beta": 0.1}, "flat": {"group_size": 2}}, seeds=(0, 1, 2)
)
SUCCESS = {"base": [0.1, 0.2, 0.3], "a_b & c": [0.3, 0.41, 0.52], "flat": [0.3, 0.1, 0.2]}
COMMAND = "grpo-jax sweep toy.py"


def limits(values: list[float], bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounded_limits(values, bounds)
    return float(low), float(high)


def write_runs(directory: Path, ablation: Ablation = ABLATION, *, codes: dict[str, str] | None = None) -> None:
    for run in ablation.runs():
        run_dir = directory / run.key
        run_dir.mkdir()
        arm = run.arms[0]
        processor = {"name": "Zilog Z80", "instructions": ["avx2"], "cores": 2}
        info = {"status": "finished", "device": {"kind": "cpu"}, "processor": processor, "git": None}
        info |= {"package": {"digest": (codes or {}).get(arm, "c0ffee")}, "config_key": run.config_key}
        (run_dir / "run.json").write_text(json.dumps(info))
        (run_dir / "config.json").write_text(json.dumps(to_dict(run.config)))
        group = run.config.group_size
        rows = [
            {"step": 0, "evaluation/success": 0.0},
            {"step": 0, "reward": 0.5, "num_sampled_tokens": 8 * group},
            {"step": 1, "reward": 0.5, "num_sampled_tokens": 18 * group},
            {"step": 2, "evaluation/success": SUCCESS[arm][ablation.seeds.index(run.seed)]},
        ]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def collect(directory: Path, ablation: Ablation = ABLATION, **options) -> tables.Table:
    return tables.collect(declared_plan(ablation, COMMAND), directory, **options)


def test_arms_are_compared_with_the_baseline_seed_by_seed(tmp_path):
    write_runs(tmp_path)
    base, better, flat = collect(tmp_path).rows
    assert base.difference is None and (base.mean.value, base.iqm) == (pytest.approx(0.2), pytest.approx(0.2))
    assert (base.mean.low, base.mean.high) == pytest.approx(limits(SUCCESS["base"], (0, 1)))
    found = better.difference
    assert (found.low, found.high) == pytest.approx(limits([0.2, 0.21, 0.22], (-1, 1)))
    assert (found.value, better.better, found.p_value) == (pytest.approx(0.21), 17 / 18, 2 / 8)
    assert (found.adjusted_p, found.num_comparisons) == (4 / 8, 2)
    assert not flat.difference.is_shown
    assert (base.tokens, flat.tokens) == (54, 36)  # of a run's last step


@pytest.mark.parametrize("arm", ["base", "a_b & c"])
def test_pairs_have_the_same_seed_even_if_one_arm_lacks_its_first(tmp_path, arm):
    """The pairs are seeds 1 and 2: .41 - .2 = .21 and .52 - .3 = .22.

    Paired by their order instead, the differences would be .31 and .32, or .1 and .11.
    """
    write_runs(tmp_path)
    [first] = [run for run in ABLATION.runs() if run.arms == (arm,) and run.seed == 0]
    shutil.rmtree(tmp_path / first.key)
    difference = collect(tmp_path).rows[1].difference
    assert (difference.num_pairs, difference.value) == (2, pytest.approx((0.21 + 0.22) / 2))
    assert (difference.low, difference.high) == pytest.approx(limits([0.21, 0.22], (-1, 1)))


@pytest.mark.parametrize("earlier", [0.99, 0.01])
def test_the_value_of_a_run_is_its_last_evaluation_and_not_its_best_or_worst(tmp_path, earlier):
    write_runs(tmp_path)
    before = layouts.render(collect(tmp_path), "csv")
    for path in tmp_path.glob("*/metrics.jsonl"):
        first, *others = path.read_text().splitlines(keepends=True)
        evaluation = json.dumps({"step": 1, "evaluation/success": earlier}) + "\n"
        path.write_text("".join([first, others[0], evaluation, *others[1:]]))
    assert [row.mean.value for row in collect(tmp_path).rows] == pytest.approx([0.2, 0.41, 0.2])
    assert layouts.render(collect(tmp_path), "csv") == before


def test_tokens_that_a_run_did_not_count_are_unknown_and_not_none(tmp_path):
    write_runs(tmp_path)
    for path in tmp_path.glob("*/metrics.jsonl"):
        path.write_text(path.read_text().replace("num_sampled_tokens", "renamed"))
    assert " | – | baseline |" in layouts.render(collect(tmp_path), "md")
    assert layouts.render(collect(tmp_path), "csv").count(",nan") == 0


def test_markdown_says_who_won_and_what_made_it(tmp_path):
    write_runs(tmp_path)
    text = layouts.render(collect(tmp_path), "md")
    lines = text.splitlines()
    assert lines[2].startswith("| base | 3 | 0.200 [0.0")
    assert lines[2].endswith("] | 0.200 | – | – | – | 54 | baseline |")
    assert lines[3].endswith("| 0.94 | 0.500 | 54 | 3 seeds cannot show a difference (7 are needed) |")
    assert "Gaffke's" in lines[-1] and "corrected by Holm" in lines[-1]
    for note in (
        f"- command: `{COMMAND}`",
        "- code: `c0ffee`",
        "- seeds: `0, 1, 2`",
        "- budget: `equal steps`",
    ):
        assert note in lines
    assert f"- runs of flat: `{' '.join(run.key for run in ABLATION.runs() if run.arms == ('flat',))}`" in lines


def test_csv_holds_the_numbers(tmp_path):
    write_runs(tmp_path)
    table = collect(tmp_path)
    lines = layouts.render(table, "csv").splitlines()
    assert f"# command: {COMMAND}" in lines
    rows = list(csv.DictReader(io.StringIO("\n".join(line for line in lines if not line.startswith("#")))))
    assert [row["arm"] for row in rows] == list(ABLATION.arms)
    assert float(rows[1]["difference_low"]) == pytest.approx(table.rows[1].difference.low, rel=1e-5)
    assert rows[0]["difference"] == "" and rows[1]["verdict"] == "3 seeds cannot show a difference (7 are needed)"
    assert (rows[1]["p_value"], rows[1]["p_holm"]) == ("0.25", "0.5") and "iqm_low" not in rows[1]


def test_latex_uses_booktabs_and_escapes_names(tmp_path):
    write_runs(tmp_path)
    text = layouts.render(collect(tmp_path), "latex")
    assert r"\toprule" in text and r"\midrule" in text and r"\bottomrule" in text
    assert r"  {}a\_b \& c & 3 &" in text
    assert "% code: c0ffee" in text


def test_latex_compiles_whatever_the_arms_are_called(tmp_path, monkeypatch):
    """Brackets at a row's start, Greek letters, special characters. pdflatex makes the document, if it is there."""
    names = ["[a] 50 % & $x$ #1", "λ = 0.95, ε ~ Δ^2", "16 × 8 {b} \\c_d <e>"]
    arms = dict(zip(names, ABLATION.arms.values(), strict=True))
    monkeypatch.setattr(sys.modules[__name__], "SUCCESS", dict(zip(names, SUCCESS.values(), strict=True)))
    ablation = dataclasses.replace(ABLATION, arms=arms)
    write_runs(tmp_path, ablation)
    text = layouts.render(collect(tmp_path, ablation), "latex")
    assert r"{}[a] 50 \% \& \$x\$ \#1 &" in text
    assert r"{}$\lambda$ = 0.95, $\epsilon$ \textasciitilde{} $\Delta$\textasciicircum{}2 &" in text
    if shutil.which("pdflatex"):
        document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + text + "\\end{document}\n"
        (tmp_path / "page.tex").write_text(document)
        command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "page.tex"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert (tmp_path / "page.pdf").stat().st_size


def test_a_table_shows_the_columns_and_the_metric_that_are_asked_for_and_shares_as_percent(tmp_path, capsys):
    source, runs = tmp_path / "toy.py", tmp_path / "runs"
    source.write_text(FILE)
    runs.mkdir()
    write_runs(runs, load_ablation(source))
    command = ["table", str(source), "--dir", str(runs)]
    assert cli.main([*command, "--columns", "arm", "mean", "difference", "--percent"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| arm | evaluation/success, % [95 %] | difference, points [95 %] |"
    assert lines[2].startswith("| base | 20.0 [") and lines[3].split(" | ")[2].startswith("+0.0 [")
    assert cli.main([*command, "--percent", "--columns", "verdict", "--margin", "0.9"]) == 0
    assert capsys.readouterr().out.splitlines()[3] == "| the same as the baseline within ±90 points |"
    assert cli.main([*command, "--metric", "reward", "--columns", "arm", "mean"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "| base | 0.500 [–] |"
    assert cli.main([*command, "--metric", "reward", "--percent"]) == 2
    assert "'reward' is no share, so --percent cannot show it." in capsys.readouterr().err
    assert cli.main([*command, "--columns", "arm", "verdit"]) == 2
    assert "a table has no column 'verdit'; did you mean 'verdict'?" in capsys.readouterr().err
    assert cli.main([*command, "--metric", "rewrad"]) == 2
    assert "has no metric 'rewrad'; it has evaluation/success," in capsys.readouterr().err


MANY = dataclasses.replace(ABLATION, seeds=range(8))
MANY_SUCCESS = {"base": [0.1] * 8, "a_b & c": [0.9] * 8, "flat": [0.1 + 0.01 * seed for seed in range(8)]}


def write_many(directory: Path, monkeypatch, **noise: float) -> None:
    """Eight seeds; with `half`, each evaluation has an interval of that half width."""
    monkeypatch.setattr(sys.modules[__name__], "SUCCESS", MANY_SUCCESS)
    write_runs(directory, MANY)
    for path in directory.glob("*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if noise:
            name, value = "evaluation/success", rows[-1]["evaluation/success"]
            rows[-1] |= {f"{name}_low": value - noise["half"], f"{name}_high": value + noise["half"]}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_clear_difference_is_called_and_one_that_a_collapse_could_undo_is_not(tmp_path, monkeypatch):
    write_many(tmp_path, monkeypatch)
    lines = layouts.render(collect(tmp_path, MANY), "md").splitlines()
    assert lines[3].endswith("| better than the baseline |")
    assert lines[4].endswith("| higher at 7 of 8 seeds; the mean is not shown to be |")
    assert "quadrature" not in lines[-1]


def test_the_evaluations_own_intervals_widen_those_of_the_table(tmp_path, monkeypatch):
    write_many(tmp_path, monkeypatch, half=0.1)
    table = collect(tmp_path, MANY)
    base, better, _ = table.rows
    low, high = bounded_limits([0.1] * 8)
    assert base.mean.high == pytest.approx(0.1 + math.hypot(high - 0.1, 0.1))
    assert base.mean.low == pytest.approx(max(0.1 - math.hypot(0.1 - low, 0.1), 0))
    low, _ = bounded_limits([0.8] * 8, (-1, 1))
    assert better.difference.low == pytest.approx(0.8 - math.hypot(0.8 - low, math.hypot(0.1, 0.1)))
    assert "quadrature" in layouts.render(table, "md")


def test_arms_are_the_same_only_within_a_margin(tmp_path, monkeypatch):
    write_many(tmp_path, monkeypatch)
    table = collect(tmp_path, MANY, margin=0.5)
    assert [layouts.render(table, "csv").splitlines()[-1 - i].split(",")[-1] for i in range(3)] == [
        "the same as the baseline within ±0.5", "better than the baseline", "baseline"]  # fmt: skip
    assert (
        r"$\pm$0.5" in layouts.render(table, "latex") and "within ±0.5" in layouts.render(table, "md").splitlines()[-1]
    )
    assert "the same" not in layouts.render(collect(tmp_path, MANY), "md")
    with pytest.raises(UserError, match="the margin must be above 0, not 0"):
        collect(tmp_path, MANY, margin=0.0)


def test_a_reward_has_students_interval_and_the_table_says_so(tmp_path):
    write_runs(tmp_path)
    for number, path in enumerate(sorted(tmp_path.glob("*/metrics.jsonl"))):
        path.write_text(path.read_text().replace('"reward": 0.5', f'"reward": {number / 3}'))
    ablation = dataclasses.replace(ABLATION, metric="reward")
    table = collect(tmp_path, ablation)
    values = [runs.mean for runs in table.rows]
    assert all(mean.high > 1 or mean.low < 0 for mean in values)
    text = layouts.render(table, "md")
    assert "Student's" in text and "Gaffke" not in text
    for layout, mark in (("csv", "#"), ("latex", "%")):
        assert f"{mark} explanation: Intervals: 95 %, over seeds; Student's" in layouts.render(table, layout)


def test_the_same_directories_give_the_same_bytes(tmp_path):
    write_runs(tmp_path)
    for layout in ("md", "csv", "latex"):
        assert layouts.render(collect(tmp_path), layout) == layouts.render(collect(tmp_path), layout)


def test_runs_of_two_versions_of_the_code_are_mixed_only_if_that_is_allowed(tmp_path):
    write_runs(tmp_path, codes={"flat": "decade"})
    with pytest.raises(UserError, match="the code of flat seed 0 is decade, that of base seed 0 c0ffee"):
        collect(tmp_path)
    assert ("code", "c0ffee, decade") in collect(tmp_path, allow_mixed=True).notes


FILE = """
from grpo_jax.experiment import Ablation, Experiment
from grpo_jax.tasks import Task

task = Task("toy", [{"prompt": "a"}], [{"prompt": "b"}], success=lambda **_: [])
base = Experiment(task=task, rewards={"length": len}, prompts_per_step=2, group_size=3)
ablation = Ablation(base, arms={"base": {}, "flat": {"group_size": 2}}, seeds=(0, 1, 2))
"""


def test_runs_of_the_same_configs_by_other_code_of_the_user_are_compared_only_with_allow_mixed(tmp_path):
    """Their directories have other names: they are found by the name of the config alone."""
    write_runs(tmp_path)
    for run in ABLATION.runs():
        (tmp_path / run.key).rename(tmp_path / f"old{run.key}")
    with pytest.raises(UserError, match=r"none of the 9 runs .* is finished \(other code has made 9 of them"):
        collect(tmp_path)
    assert [row.seeds for row in collect(tmp_path, allow_mixed=True).rows] == [3, 3, 3]
    write_runs(tmp_path)
    assert [row.seeds for row in collect(tmp_path).rows] == [3, 3, 3]
    shutil.rmtree(tmp_path / ABLATION.runs()[0].key)
    assert collect(tmp_path).missing[0].endswith("made by other code")


def test_only_a_finished_run_of_the_same_config_stands_for_one_that_other_code_has_made(tmp_path):
    """Of base's seed 0 there is one by other code, of flat's seed 1 an unfinished one, of flat's seed 2 none."""
    write_runs(tmp_path)
    runs = {(run.arms[0], run.seed): run for run in ABLATION.runs()}
    for seed, arm in ((0, "base"), (1, "flat")):
        (tmp_path / runs[arm, seed].key).rename(tmp_path / f"old{seed}")
    shutil.rmtree(tmp_path / runs["flat", 2].key)
    info = json.loads((tmp_path / "old1" / "run.json").read_text())
    (tmp_path / "old1" / "run.json").write_text(json.dumps(info | {"status": "running"}))
    table = collect(tmp_path)
    base, flat = (f"base seed 0 ({runs['base', 0].key})", [f"flat seed {s} ({runs['flat', s].key})" for s in (1, 2)])
    assert table.missing == [f"{base}: made by other code", f"{flat[0]}: not run", f"{flat[1]}: not run"]
    table = collect(tmp_path, allow_mixed=True)
    assert table.missing == [f"{flat[0]}: not run", f"{flat[1]}: not run"]
    assert [(row.seeds, row.mean.value) for row in table.rows] == [
        (3, pytest.approx(0.2)), (3, pytest.approx(0.41)), (1, pytest.approx(0.3))]  # fmt: skip


def test_how_many_runs_other_code_has_made_is_said_also_of_the_first_versions(tmp_path):
    """Those named a run by its config alone, and run.json had no `config_key`."""
    (tmp_path / "toy.py").write_text(FILE)
    ablation, runs = load_ablation(tmp_path / "toy.py"), tmp_path / "runs"
    runs.mkdir()
    write_runs(runs, ablation)
    for number, run in enumerate(ablation.runs()):
        path = runs / run.key / "run.json"
        info = json.loads(path.read_text())
        del info["config_key"]
        path.write_text(json.dumps(info))
        assert run.key != run.config_key
        if number < 2:
            (runs / run.key).rename(runs / run.config_key)
        else:
            shutil.rmtree(runs / run.key)
    with pytest.raises(UserError) as caught:
        collect(runs, ablation)
    assert str(caught.value) == (
        f"none of the 6 runs in {str(runs)!r} is finished (other code has made 2 of them, which --allow-mixed "
        f"compares): run `{COMMAND}` first."
    )
    assert [row.seeds for row in collect(runs, ablation, allow_mixed=True).rows] == [1, 1]


def test_a_run_that_was_trained_on_other_data_than_the_file_describes_is_refused(tmp_path):
    write_runs(tmp_path)
    path = tmp_path / ABLATION.runs()[1].key / "config.json"
    config = json.loads(path.read_text())
    config["task"]["sha256"] = "0" * 16
    path.write_text(json.dumps(config))
    for allow in (False, True):
        with pytest.raises(UserError, match="was trained on other data than its ablation's file now describes"):
            collect(tmp_path, allow_mixed=allow)


def test_a_run_whose_files_changed_on_resumption_is_refused_at_the_first_such_step(tmp_path):
    write_runs(tmp_path)
    path = tmp_path / ABLATION.runs()[2].key / "run.json"
    code = {"directory": "code-2", "entry": "toy.py", "paths": ["."], "files": {}}
    visits = [{"step": 3, "changes": {}, "code": code}, {"step": 5, "changes": {"steps": [1, 2]}, "code": None}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": visits}))
    with pytest.raises(UserError, match=r"resumed with another config or other files at step 3: it is compared only"):
        collect(tmp_path)


def edit_info(directory: Path, edits: dict[int, dict]) -> None:
    """Changes the run.json of the runs with these numbers."""
    for number, run in enumerate(ABLATION.runs()):
        path = directory / run.key / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edits.get(number, {})))


def test_the_notes_name_the_machines_the_runs_and_the_budget(tmp_path):
    write_runs(tmp_path)
    wide = {"name": "Apple M9", "instructions": ["avx512f", "avx2"], "cores": 4}
    edit_info(tmp_path, {0: {"processor": wide}, 4: {"device": {"kind": "TPU v9"}}, 5: {"processor": None}})
    table = collect(tmp_path)
    keys = [run.key for run in ABLATION.runs()]
    assert table.notes == [
        ("command", COMMAND),
        ("code", "c0ffee"),
        ("machine", "Apple M9 (avx512f, avx2), 4 cores; TPU v9; Zilog Z80 (avx2), 2 cores; cpu"),
        ("seeds", "0, 1, 2"),
        ("budget", "equal steps"),
        ("config", fingerprint(keys)),
        *((f"runs of {arm}", " ".join(keys[number::3])) for number, arm in enumerate(ABLATION.arms)),
    ]
    tokens = dataclasses.replace(ABLATION, budget="tokens")
    (tmp_path / "tokens").mkdir()
    write_runs(tmp_path / "tokens", tokens)
    assert ("budget", "equal tokens") in collect(tmp_path / "tokens", tokens).notes


def test_the_code_of_the_first_versions_is_their_commit(tmp_path):
    write_runs(tmp_path)
    edit_info(tmp_path, {number: {"package": None, "git": {"commit": "abc", "dirty": False}} for number in range(9)})
    assert ("code", "abc") in collect(tmp_path).notes
    edit_info(tmp_path, {0: {"git": {"commit": "abc", "dirty": True}}, 1: {"git": None}})
    with pytest.raises(
        UserError, match=r"the code of a_b & c seed 0 is none \(outside of a git repository\), that of "
    ):
        collect(tmp_path)
    found = dict(collect(tmp_path, allow_mixed=True).notes)["code"]
    assert found == "abc, abc with uncommitted changes, none (outside of a git repository)"


def test_an_evaluations_interval_is_of_the_last_row_with_the_metric_and_half_of_its_width(tmp_path, monkeypatch):
    """One run of base alone has an interval, of width .3: the mean of the arm's three half widths is .05."""
    write_runs(tmp_path)
    assert not collect(tmp_path).has_noise
    path = tmp_path / ABLATION.runs()[0].key / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    interval = {"evaluation/success_low": 0.0, "evaluation/success_high": 0.3}
    rows[0] |= {"evaluation/success_low": -9.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:-1], rows[-1] | interval]))
    table = collect(tmp_path)
    _, high = limits(SUCCESS["base"], (0, 1))
    assert table.has_noise and table.rows[0].mean.high == pytest.approx(0.2 + math.hypot(high - 0.2, 0.05))
    assert table.rows[2].mean.high == pytest.approx(limits(SUCCESS["flat"], (0, 1))[1])


def test_the_last_value_of_a_run_is_that_of_the_last_row_that_has_one(tmp_path):
    rows = [{"step": 0, "reward": 1.0}, {"step": 1, "reward": 2}, {"step": 2, "reward": None}, {"step": 3, "kl": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tables.last_value(tmp_path, "reward") == 2.0
    with pytest.raises(UserError) as caught:
        tables.last_value(tmp_path, "loss")
    assert str(caught.value) == f"{str(tmp_path)!r} has no metric 'loss'; it has kl, reward."


def test_the_baseline_is_the_arm_that_the_ablation_names(tmp_path):
    """Seed by seed, base - flat is -.2, .1 and .1; of the nine pairs of runs base is higher in 3 and equal in 3."""
    write_runs(tmp_path)
    base, better, flat = collect(tmp_path, dataclasses.replace(ABLATION, baseline="flat")).rows
    assert flat.difference is None and base.difference.value == pytest.approx(0.0, abs=1e-12)
    assert (base.difference.num_higher, base.difference.num_lower, base.better) == (2, 1, (3 + 3 / 2) / 9)
    assert better.difference.value == pytest.approx(0.41 - 0.2) and better.better == 17 / 18


def test_a_run_that_is_not_finished_is_named_with_its_status_and_its_arms(tmp_path):
    alike = dataclasses.replace(ABLATION, arms={"base": {}, "again": {}, "flat": {"group_size": 2}})
    write_runs(tmp_path, alike)
    first = alike.runs()[0]
    (tmp_path / first.key / "run.json").write_text('{"status": "interrupted", "error": null}')
    table = collect(tmp_path, alike)
    assert table.missing == [f"base = again seed 0 ({first.key}): interrupted"]
    assert [row.seeds for row in table.rows] == [2, 2, 3]
    assert (table.metric, table.baseline, table.margin) == ("evaluation/success", "base", None)


def test_a_run_that_was_resumed_with_changes_is_compared_only_with_allow_mixed(tmp_path):
    write_runs(tmp_path)
    path = tmp_path / ABLATION.runs()[0].key / "run.json"
    same = {"step": 1, "changes": {}, "code": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": [same]}))
    assert collect(tmp_path).rows[0].seeds == 3
    changed = {"step": 2, "changes": {"loss.beta": [0.0, 0.1]}, "code": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": [same, changed]}))
    with pytest.raises(UserError, match="resumed with another config or other files at step 2"):
        collect(tmp_path)
    assert collect(tmp_path, allow_mixed=True).rows[0].seeds == 3


def test_the_command_compares_runs_of_two_versions_of_the_code_only_with_allow_mixed(tmp_path, capsys):
    source, runs = tmp_path / "toy.py", tmp_path / "runs"
    source.write_text(FILE)
    runs.mkdir()
    write_runs(runs, load_ablation(source), codes={"flat": "decade"})
    assert cli.main(["table", str(source), "--dir", str(runs)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: the code of flat seed 0 is decade, that of base seed 0 c0ffee: they are compared only with "
        "--allow-mixed.\n"
    )
    assert cli.main(["table", str(source), "--dir", str(runs), "--allow-mixed"]) == 0
    out = capsys.readouterr().out
    assert "- code: `c0ffee, decade`" in out and out.startswith("| arm | seeds | evaluation/success [95 %]")
    assert cli.main(["table", str(source), "--dir", str(runs), "--allow-mixed", "--margin", "0.9"]) == 0
    assert "the 90 % interval is within ±0.9" in capsys.readouterr().out


def test_arms_with_other_held_out_data_are_mixed_only_if_that_is_allowed(tmp_path):
    other = SimpleNamespace(name="toy", train=TASK.train, held_out=[{"prompt": "z"}])
    ablation = dataclasses.replace(ABLATION, arms={"base": {}, "flat": {"task": other}})
    write_runs(tmp_path, ablation)
    with pytest.raises(UserError, match="the held-out data of flat seed 0"):
        collect(tmp_path, ablation)
    assert len(collect(tmp_path, ablation, allow_mixed=True).rows) == 2


def test_arms_may_differ_in_what_they_are_trained_on(tmp_path):
    fewer = SimpleNamespace(name="toy", train=[{"prompt": "c"}], held_out=TASK.held_out)
    ablation = dataclasses.replace(ABLATION, arms={"base": {}, "flat": {"task": fewer}})
    write_runs(tmp_path, ablation)
    assert len(collect(tmp_path, ablation).rows) == 2


def test_missing_and_failed_runs_are_named_and_only_finished_seeds_are_paired(tmp_path):
    write_runs(tmp_path)
    keys = {(run.arms[0], run.seed): run.key for run in ABLATION.runs()}
    (tmp_path / keys["flat", 1] / "run.json").write_text('{"status": "failed", "error": "no reward today"}')
    (tmp_path / keys["flat", 2] / "run.json").unlink()
    table = collect(tmp_path)
    assert table.missing == [
        f"flat seed 1 ({keys['flat', 1]}): failed: no reward today",
        f"flat seed 2 ({keys['flat', 2]}): not run",
    ]
    assert (table.rows[2].seeds, table.rows[2].difference.num_pairs) == (1, 1)
    assert "1 seed cannot show a difference" in layouts.render(table, "md").splitlines()[4]
    assert f"- missing: flat seed 2 ({keys['flat', 2]}): not run" in layouts.render(table, "md")
    assert "% missing: flat seed 1" in layouts.render(table, "latex")


def test_an_arm_without_a_finished_run_stays_in_the_table(tmp_path):
    write_runs(tmp_path)
    for run in ABLATION.runs():
        if run.arms == ("base",):
            (tmp_path / run.key / "run.json").unlink()
    text = layouts.render(collect(tmp_path), "md")
    assert "| base | 0 | – | – | – | – | – | – | no finished run |" in text
    assert "no pair with the baseline" in text


def test_arms_that_are_alike_share_their_runs_and_each_has_a_row(tmp_path):
    alike = dataclasses.replace(ABLATION, arms={"base": {}, "again": {}, "flat": {"group_size": 2}})
    write_runs(tmp_path, alike)
    table = collect(tmp_path, alike)
    base, again, flat = table.rows
    assert [row.seeds for row in table.rows] == [3, 3, 3] and table.missing == []
    assert again.mean == base.mean and again.mean.value == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert (again.difference.value, again.tokens, flat.tokens) == (0, 54, 36)


def test_no_runs_and_no_such_metric_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=rf"none of the 9 runs .* is finished: run `{COMMAND}` first"):
        collect(tmp_path)
    write_runs(tmp_path)
    with pytest.raises(UserError, match=r"has no metric 'evaluation/sucess'; it has .*evaluation/success"):
        collect(tmp_path, dataclasses.replace(ABLATION, metric="evaluation/sucess"))


# Of a directory alone -------------------------------------------------------------------------------------------------


def test_the_table_of_a_sweeps_directory_is_that_of_its_file(tmp_path):
    write_runs(tmp_path)
    write_plan(tmp_path, ABLATION)
    first = ABLATION.runs()[0]
    path = tmp_path / first.key / "run.json"
    info = json.loads(path.read_text()) | {"source": "toy.py", "overrides": ["arm=base", "budget=steps", "steps=100"]}
    path.write_text(json.dumps(info))
    found, declared = tables.collect(stored_plan(tmp_path), tmp_path), collect(tmp_path)
    assert (found.rows, found.metric, found.baseline) == (declared.rows, declared.metric, declared.baseline)
    command = f"grpo-jax sweep toy.py --dir {tmp_path} --budget steps --set steps=100"
    assert found.notes == [("command", command), *declared.notes[1:]]

    shutil.rmtree(tmp_path / first.key)
    assert tables.collect(stored_plan(tmp_path), tmp_path).missing == [f"base seed 0 ({first.key}): not run"]


def test_arms_whose_data_differ_are_compared_from_a_directory_only_where_that_is_allowed(tmp_path):
    write_runs(tmp_path)
    write_plan(tmp_path, ABLATION)
    path = tmp_path / ABLATION.runs()[-1].key / "config.json"
    path.write_text(path.read_text().replace('"toy"', '"another"'))
    with pytest.raises(UserError, match=r"the data of flat seed 2 is .* compared only with --allow-mixed"):
        tables.collect(stored_plan(tmp_path), tmp_path)
    assert tables.collect(stored_plan(tmp_path), tmp_path, allow_mixed=True).rows[2].seeds == 3


PLAN = json.dumps(
    {"arms": ["a", "b"], "baseline": "a", "metric": "m",
     "runs": [{"arms": [arm], "seed": 0, "key": key} for arm, key in (("a", "k1"), ("b", "k2"))]}
)  # fmt: skip


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "is not the directory of a sweep: there is no sweep.json in it"),
        ({"sweep.json": "{}"}, "it has {}, which must be an object with 'arms'"),
        ({"sweep.json": PLAN}, "no run of the sweep in .* has begun"),
        ({"sweep.json": PLAN.replace('"baseline": "a"', '"baseline": "c"')}, "'c' is no arm of it"),
        ({"sweep.json": PLAN.replace("k1", "../k1")}, r"'\.\./k1' names no run"),
        ({"sweep.json": PLAN.replace('["b"]', '["a"]')}, r"\('a', 0\) is there twice"),
    ],
)
def test_a_directory_without_the_plan_of_a_sweep_is_one_sentence(tmp_path, capsys, files, sentence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["table", str(tmp_path)]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert re.search(sentence, said), said
    assert cli.main(["table", str(tmp_path), "--budget", "steps"]) == 2
    assert "are for an ablation's file" in capsys.readouterr().err
