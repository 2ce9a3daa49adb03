"""The page: it loads nothing, agrees with the run's files, and is safe from hostile completions."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from grpo_jax import cli
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, LossConfig, to_dict
from grpo_jax.report.data import completions, defaults, differences, flat
from grpo_jax.report.page import ablation_page, read_sweep, render, report, run_page
from grpo_jax.tasks import Task

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[31m"
TASK = Task("toy <b>", [{"prompt": "p"}], [{"prompt": "p"}], success=lambda **_: [])


def evaluation(step: int, success: float) -> dict:
    values = {"success": success, "success_low": success - 0.1, "success_high": success + 0.1, "reward": success}
    values |= {"num_prompts": 8, "num_samples": 1, "temperature": 0.0, "mean_length": 5.0}
    return {"step": step, **{f"evaluation/{name}": value for name, value in values.items()}}


def make_run(run: Path, *, after: float = 0.7, status: str = "finished", beta: float = 0.04, text: str = "ok") -> Path:
    run.mkdir(parents=True)
    config = Experiment(task=TASK, rewards={"length": len}, steps=3, loss=LossConfig(beta=beta))
    training = [{"step": s, "reward": s / 3, "entropy": 1.0, "kl": None, "success": s / 3} for s in range(3)]
    rows = [evaluation(0, 0.1), *training, evaluation(3, after)]
    said = [
        {"step": s, "prompt_id": 0, "sample": g, "prompt": "p", "completion": text, "rewards": {"length": 0.5}}
        | {"reward": 0.5 * g, "advantage": g - 0.5, "tokens": 2}
        for s in range(3)
        for g in range(2)
    ]
    info = {"status": status, "started": "today", "seed": 0, "command": "grpo-jax train <x>", "git": None}
    (run / "run.json").write_text(json.dumps(info))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    (run / "summary.json").write_text(json.dumps({"references": {"blind": 0.05}}))
    for name, lines in (("metrics", rows), ("completions", said)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


ABLATION = """
from grpo_jax.experiment import Ablation, Experiment
from grpo_jax.tasks import Task

def length(*, completions, **_):
    return [float(len(c)) for c in completions]

task = Task("toy", [{"prompt": "p"}], [{"prompt": "p"}], success=length)
base = Experiment(task=task, rewards={"length": length}, steps=3)
ablation = Ablation(base, arms={"new": {"loss.beta": 0.1}, "old": {}}, seeds=range(4), baseline="old")
"""


def make_sweep(directory: Path) -> Path:
    """Three seeds of two arms; of the fourth, only the old one has begun."""
    for seed, (old, new) in enumerate([(0.4, 0.6), (0.5, 0.72), (0.45, 0.66), (0.5, None)]):
        for arm, after in (("old", old), ("new", new)):
            if after is None:
                continue
            beta, status = 0.0 if arm == "old" else 0.1, "finished" if seed < 3 else "running"
            run = make_run(directory / f"{arm}{seed}", after=after, beta=beta, text=f"{arm} {seed}", status=status)
            info = json.loads((run / "run.json").read_text())
            overrides = {"overrides": [f"arm={arm}", "budget=steps", f"seed={seed}"], "seed": seed}
            (run / "run.json").write_text(json.dumps(info | overrides))
            (run / "experiment.py").write_text(ABLATION)
    return directory


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_completions_are_text_and_never_markup(tmp_path):
    html = report(make_run(tmp_path / "run", text=HOSTILE)).read_text()
    assert html.count("<script") == html.count("</script>") == 2 and "<img" not in html
    said = data_of(html)["completions"]["rows"][0][3]
    assert said == HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    assert "toy &lt;b&gt;" in html and "grpo-jax train &lt;x&gt;" in html


def test_the_page_loads_nothing_and_lets_only_its_own_script_run(tmp_path):
    html = report(make_run(tmp_path / "run")).read_text()
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert not re.search(r"(src|href)=|url\(|@import|fetch\(", html)


def test_a_run_shows_its_evaluations_curves_completions_and_config(tmp_path):
    run = make_run(tmp_path / "run")
    make_run(run / "control", after=0.3)
    page = run_page(run)
    (table,) = page["scores"]
    assert [row["name"] for row in table["rows"]] == ["before", "after 3 updates", "control"]
    assert table["rows"][1]["cells"][:2] == ["70.0 %", "60.0 – 80.0 %"]
    # The intervals go from 0 to 0.8, so the axis has all of [0, 1], and 5 % of that at either end for whole dots:
    # 0.6, 0.8 and 0.7 are 0.65, 0.85 and 0.75 of 1.1 away from its left end.
    assert table["rows"][1]["place"] == {"low": 59.09, "width": 18.18, "value": 68.18}
    assert table["ends"] == ["0 %", "100 %"]
    charts = {chart["title"]: chart for chart in page["data"]["charts"]}
    assert [s["name"] for s in charts["Success"]["series"]] == [
        "held-out success",
        "control",
        "of the training samples",
    ]
    assert charts["Success"]["rules"] == [{"name": "blind", "value": 0.05}]
    assert charts["Training reward"]["series"][0]["y"] == [0.0, 0.33333, 0.66667]
    assert "kl" not in page["data"]["metrics"]  # None at every step
    assert ["loss.beta", "0.0", "0.04"] in page["difference"]["rows"]
    assert not any(row[0] == "group_size" for row in page["difference"]["rows"])


def test_axes_are_those_of_the_data_and_every_cell_names_its_column_for_a_phone(tmp_path):
    """Success of at most 4 % (its reference is 5 %) is drawn on 0 to 5 %, with an edge of 5 % of that at either end."""
    run = make_run(tmp_path / "run")
    rows = [evaluation(step, success) for step, success in ((0, 0.01), (3, 0.04))]
    for row in rows:
        row |= {f"evaluation/success_{end}": row["evaluation/success"] for end in ("low", "high")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = run_page(run)
    [success] = [chart for chart in page["data"]["charts"] if chart["title"] == "Success"]
    assert success["range"] == pytest.approx([-0.0025, 0.0525])
    assert page["scores"][0]["ends"] == ["0 %", "4.2 %"]
    html = render(page)
    assert [f'data-column="{name}"' in html for name in page["scores"][0]["columns"]] == [True] * 4


def test_a_warm_start_ends_at_step_0_where_the_run_begins(tmp_path):
    run = make_run(tmp_path / "run")
    make_run(run / "warm_start", after=0.3)
    charts = {chart["title"]: chart for chart in run_page(run)["data"]["charts"]}
    curves = {curve["name"]: curve for curve in charts["Success"]["series"]}
    assert curves["warm start"]["x"] == [-3, 0]  # its evaluations were at 0 and 3
    assert curves["warm start"]["y"] == [0.1, 0.3]
    assert curves["held-out success"]["x"] == [0, 3]


def test_a_run_that_failed_or_has_just_started_has_a_page_too(tmp_path):
    run = make_run(tmp_path / "run", status="failed")
    for name in ("metrics.jsonl", "completions.jsonl", "summary.json"):
        (run / name).unlink()
    page = run_page(run)
    assert page["warnings"] == ["The run is failed."] and page["scores"] == [] and page["data"]["charts"] == []
    assert "The run is failed." in render(page)


def test_the_page_of_a_run_that_was_stopped_says_by_what(tmp_path):
    run = make_run(tmp_path / "run", status="stopped")
    info = json.loads((run / "run.json").read_text())
    stop = {"steps": 2, "by": "Enough", "reason": "0.9 is reached"}
    (run / "run.json").write_text(json.dumps(info | {"stop": stop}))
    assert run_page(run)["warnings"][0] == "The callback Enough stopped the run after 2 steps: 0.9 is reached."


def test_an_ablation_compares_its_arms_by_seed_and_names_what_is_missing(tmp_path):
    directory = make_sweep(tmp_path / "sweep")
    page = ablation_page(directory, read_sweep(directory))
    (table,) = page["scores"]
    new, old = table["rows"]
    assert (old["note"], new["note"]) == ("the baseline", "3 seeds cannot show a difference (6 are needed)")
    assert new["cells"][:2] == ["3", "0.660"] and new["cells"][3].startswith("+0.210 [−0.")
    assert "Gaffke's" in table["note"] and "added in quadrature" in table["note"]
    assert page["warnings"] == ["old, seed 3 is running.", "new, seed 3 has not begun."]
    assert ["loss.beta", "0.0", "0.1"] in page["difference"]["rows"]
    chart = page["data"]["charts"][0]
    assert chart["title"] == "evaluation/success" and [s["name"] for s in chart["series"]] == ["new", "old"]
    assert min(chart["series"][0]["low"]) >= 0 and max(chart["series"][0]["high"]) <= 1
    assert "old, seed 0" in page["data"]["completions"]["runs"]


def test_the_page_pairs_runs_of_the_same_seed(tmp_path):
    """Without new's seed 0 the pairs are .72 - .5 and .66 - .45, whose mean is .215; by their order it would be .24."""
    directory = make_sweep(tmp_path / "sweep")
    shutil.rmtree(directory / "new0")
    new, _ = ablation_page(directory, read_sweep(directory))["scores"][0]["rows"]
    assert new["cells"][0] == "2" and new["cells"][3].startswith("+0.215 [")


def test_a_run_that_is_still_going_does_not_count_among_the_seeds_of_its_arm(tmp_path):
    """Old's finished seeds came to .4, .5 and .45, whose mean is .45; with the .5 of its fourth it would be .4625."""
    directory = make_sweep(tmp_path / "sweep")
    _, old = ablation_page(directory, read_sweep(directory))["scores"][0]["rows"]
    assert old["cells"][:2] == ["3", "0.450"]


def test_a_long_run_is_thinned_by_steps_with_the_first_and_the_last():
    rows = [
        {"step": s, "prompt": "p", "completion": "a", "rewards": {}, "reward": 0.0, "advantage": 0.0}
        for s in range(1000)
        for _ in range(10)
    ]
    shown, note = completions({"run": rows})
    steps = sorted({row[1] for row in shown["rows"]})
    assert (steps[0], steps[-1], len(steps)) == (0, 999, 300) and len(shown["rows"]) == 3000
    assert note == "Completions of 300 of 1000 steps."


def test_differences_of_configs_are_in_the_names_that_set_takes():
    one, two = flat({"a": {"b": 1, "c": 2}, "d": None}), flat({"a": {"b": 1, "c": 3}, "d": {"e": 0}})
    assert differences({"one": one, "two": two}) == [["a.c", "2", "3"], ["d.e", "–", "0"]]
    assert differences({"one": one, "two": two}, ignore=["d", "d.e", "a.c"]) == []
    assert defaults()["loss.beta"] == 0.0 and defaults()["group_size"] == 8 and "task" not in defaults()


def test_the_command_writes_the_page_and_the_pictures(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert cli.main(["report", str(run), "--pictures", "png"]) == 0
    written = [Path(line).name for line in capsys.readouterr().out.split()]
    assert written[:4] == ["report.html", "learning_curve.png", "reward_histograms.png", "advantage_map.png"]
    assert cli.main(["report", str(make_sweep(tmp_path / "sweep")), "--pictures", "pdf"]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == [
        "report.html", "evaluation_success.pdf", "reward.pdf",
    ]  # fmt: skip


def test_a_directory_of_neither_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="neither a run nor a sweep"):
        report(tmp_path)
