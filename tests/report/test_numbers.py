"""The numbers of pages and plots: which row, which run and which column each of them comes from."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from grpo_jax import statistics
from grpo_jax.errors import UserError
from grpo_jax.report import curves, data, page, plots
from grpo_jax.report.completion_plots import (
    advantage_map,
    advantages_by_group,
    completion_rows,
    group_picture,
    histogram_over_time,
    reward_histograms,
)
from grpo_jax.report.plots import BLUE, GREEN, GREY, ORANGE, Series


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(step: int, success: float, prefix: str = "evaluation", **more: float) -> dict:
    values = {"success": success, "success_low": success - 0.1, "success_high": success + 0.05, "reward": 0.5}
    values |= {"num_prompts": 8, "num_samples": 1, "temperature": 0.0, "mean_length": 5.25, **more}
    return {"step": step, **{f"{prefix}/{name}": value for name, value in values.items()}}


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return lambda: figures[-1]


def series_of(*values: float, low: float = 0.0, high: float = 0.0, start: int = 0) -> Series:
    found = np.array(values)
    return Series(np.arange(start, start + len(values), dtype=float), found, found - low, found + high)


# The page of a run ---------------------------------------------------------------------------------------------------


def test_a_curve_has_bounds_only_where_they_differ_and_a_smooth_line_only_where_it_is_asked_for():
    plain = data.curve("a", series_of(1.0, 2.0), 3)
    assert plain == {"name": "a", "colour": 3, "style": "line", "x": [0.0, 1.0], "y": [1.0, 2.0]}
    assert data.curve("a", series_of(1.0), 0, "points") | {"style": ""} == {
        "name": "a", "colour": 0, "style": "", "x": [0.0], "y": [1.0], "low": [1.0], "high": [1.0]}  # fmt: skip
    wide = data.curve("b", series_of(0.123456789, low=0.1, high=0.2), 1, smoothed=True)
    assert (wide["y"], wide["low"], wide["high"], wide["smooth"]) == ([0.12346], [0.023457], [0.32346], [0.12346])


def test_the_main_plots_of_a_run_are_made_of_the_metrics_with_these_names(tmp_path):
    run = tmp_path / "run"
    training = [
        {"step": s, "reward": 0.1, "success": 0.2, "entropy": 1.0, "frac_reward_zero_std": 0.25, "kl": 3.0,
         "completions/unique_fraction": 0.75, "rewards/one/mean": 0.3, "rewards/two/mean": 0.4, "rewards/two/std": 0.9}
        for s in range(2)
    ]  # fmt: skip
    rows = [evaluation(0, 0.1), evaluation(0, 0.15, "evaluation/train"), *training, evaluation(2, 0.7)]
    write(run / "metrics.jsonl", rows)
    write(run / "control" / "metrics.jsonl", [evaluation(0, 0.1), evaluation(5, 0.3)])
    write(run / "warm_start" / "metrics.jsonl", [evaluation(0, 0.0), evaluation(4, 0.1)])
    charts, metrics = data.run_charts(run, {"blind": 0.05, "perfect": 0.9})
    assert [chart["title"] for chart in charts] == ["Success", "Training reward", "Signs of collapse", "Entropy (nats)"]
    success = {curve["name"]: (curve["x"], curve["y"], curve["colour"]) for curve in charts[0]["series"]}
    assert success == {
        "held-out success": ([0, 2], [0.1, 0.7], 0), "on training prompts": ([0], [0.15], 4),
        "warm start": ([-4, 0], [0.0, 0.1], 5), "control": ([5], [0.3], 1),
        "of the training samples": ([0, 1], [0.2, 0.2], 2),
    }  # fmt: skip
    control = next(curve for curve in charts[0]["series"] if curve["name"] == "control")
    assert (control["low"], control["high"]) == ([0.2], [0.35])
    assert charts[0]["percent"] and charts[2]["percent"] and not charts[1]["percent"]
    assert charts[0]["rules"] == [{"name": "blind", "value": 0.05}, {"name": "perfect", "value": 0.9}]
    lines = [{curve["name"]: (curve["y"][0], curve["colour"]) for curve in chart["series"]} for chart in charts[1:]]
    assert lines == [
        {"reward": (0.1, 2), "one": (0.3, 3), "two": (0.4, 4)},
        {"groups without signal": (0.25, 2), "unique completions": (0.75, 3)},
        {"entropy": (1.0, 2)},
    ]
    assert "evaluation/success" in metrics and "evaluation/success_low" not in metrics and "step" not in metrics
    assert "evaluation/num_prompts" not in metrics and metrics["kl"]["series"][0]["y"] == [3.0, 3.0]
    assert "smooth" in metrics["kl"]["series"][0] and "smooth" not in metrics["evaluation/success"]["series"][0]


def test_a_single_reward_is_the_total_and_is_drawn_once(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 0, "reward": 0.5, "rewards/only/mean": 0.5}])
    charts, _ = data.run_charts(tmp_path, {})
    assert [(chart["title"], [curve["name"] for curve in chart["series"]]) for chart in charts] == [
        ("Training reward", ["reward"])]  # fmt: skip


def test_the_score_table_is_of_the_first_and_the_last_evaluation_and_the_controls_last(tmp_path):
    rows = [evaluation(0, 0.25), {"step": 0, "reward": 1.0}, evaluation(2, 0.9), evaluation(4, 0.5, reward=None)]
    write(tmp_path / "metrics.jsonl", [*rows, evaluation(4, 0.75, "evaluation/train", num_samples=4, temperature=0.5)])
    write(tmp_path / "control" / "metrics.jsonl", [evaluation(0, 0.9), evaluation(3, 0.375)])
    found = page._score_table(tmp_path, "held_out")
    assert (found["title"], found["columns"][:2]) == ("Evaluation on held-out prompts", ["success", "95 % interval"])
    assert [(row["name"], row["cells"]) for row in found["rows"]] == [
        ("before", ["25.0 %", "15.0 – 30.0 %", "0.500", "5.2"]),
        ("after 4 updates", ["50.0 %", "40.0 – 55.0 %", "–", "5.2"]),
        ("control", ["37.5 %", "27.5 – 42.5 %", "0.500", "5.2"]),
    ]
    # The values reach from .15, which is near 0, to .55: the axis goes from 0 to .55 and a twentieth beyond, .605 long.
    assert found["rows"][0]["place"] == {"low": 29.34, "width": 24.79, "value": 45.87}
    assert found["note"].startswith("8 prompts × 1 sample, greedy. The intervals treat the prompts as a random sample")
    train = page._score_table(tmp_path, "train")
    assert [row["name"] for row in train["rows"]] == ["before"] and train["rows"][0]["cells"][0] == "75.0 %"
    assert train["title"] == "Evaluation on train prompts"
    assert train["note"].startswith("8 prompts × 4 samples, temperature 0.5.")
    write(tmp_path / "one" / "metrics.jsonl", [evaluation(0, 0.25, num_prompts=1)])
    one = page._score_table(tmp_path / "one", "held_out")["note"]
    assert one == "1 prompt × 1 sample, greedy. The intervals are about further samples of this prompt, not about " + (
        "other prompts."
    )
    assert page._score_table(tmp_path / "one", "train") is None


def test_the_facts_of_a_run_are_its_status_its_task_its_machine_and_its_commit():
    info = {"status": "finished", "started": "today", "seed": 0, "versions": {"jax": "9"},
            "device": {"count": 2, "kind": "TPU"}, "git": {"commit": "0123456789abcdef", "dirty": True}}  # fmt: skip
    config = {"task": {"name": "toy"}, "method": "grpo"}
    assert page._facts(info, config) == [
        "finished · started today · seed 0",
        "task toy · method grpo · 2 × TPU · jax 9 · commit 0123456789ab with changes",
    ]
    info["git"]["dirty"] = False
    assert page._facts(info, config)[1].endswith("commit 0123456789ab")
    assert page._facts({}, {}) == ["", "? × unknown device · no commit known"]


def test_a_run_that_failed_or_was_resumed_with_changes_says_so():
    assert page._unfinished({"status": "finished"}) == [] and page._unfinished({}) == ["The run is unknown."]
    assert page._unfinished({"status": "failed", "error": "no luck"}) == ["The run is failed. no luck"]
    visits = [{"step": 3, "changes": {"steps": [4, 9]}, "code": {"directory": "code-2"}}, {"step": 5, "changes": {}}]
    assert page._changes({"resumed": visits}) == [
        "Since step 3, steps was 4, and is 9.",
        "Since step 3, the run uses edited files: they are in code-2/.",
    ]
    assert page._changes({}) == []


@pytest.mark.parametrize(
    ("place", "expected"),
    [((5.0, 4.0, 7.0, 0.0, 10.0), (40, 30, 50)), ((5.0, -np.inf, np.inf, 0.0, 10.0), (0, 100, 50)),
     ((3.0, 2.0, 4.0, 2.0, 6.0), (0, 50, 25)), ((0.5, 0.5, 0.5, 0.5, 0.5), (0, 0, 0))],
)  # fmt: skip
def test_the_place_of_an_interval_is_in_percent_of_the_whole(place, expected):
    low, width, value = expected
    assert page._place(*place) == {"low": low, "width": width, "value": value}


def test_an_interval_is_written_with_its_signs_and_without_limits_if_there_are_none():
    found, none = statistics.Estimate(0.25, -0.5, 1.0), statistics.Estimate(0.25, -np.inf, np.inf)
    assert page._interval(found, signed=True) == "+0.250 [−0.500, +1.000]"
    assert page._interval(found, bounds=True) == "−0.500 – 1.000"
    assert (page._interval(none, signed=True), page._interval(none, bounds=True)) == ("+0.250", "–")


# The page of a sweep -------------------------------------------------------------------------------------------------


def make_sweep(directory: Path, values: dict[tuple[str, int], float | None], **plan: object) -> page.Sweep:
    """A sweep of arms and seeds; a value of None is a run that has not begun."""
    runs = []
    for (arm, seed), value in values.items():
        runs.append({"arms": [arm], "seed": seed, "key": f"{arm}-{seed}"})
        if value is not None:
            write(directory / f"{arm}-{seed}" / "metrics.jsonl", [evaluation(0, 0.0), evaluation(3, value)])
            (directory / f"{arm}-{seed}" / "run.json").write_text('{"status": "finished"}')
            (directory / f"{arm}-{seed}" / "config.json").write_text('{"method": "grpo"}')
    arms = list(dict.fromkeys(arm for arm, _ in values))
    whole = {"arms": arms, "baseline": "old", "metric": "evaluation/success", "runs": runs, **plan}
    (directory / "sweep.json").write_text(json.dumps(whole))
    return page.read_sweep(directory)


def test_a_sweep_is_read_from_its_plan(tmp_path):
    values = {("new", 4): 0.5, ("old", 4): 0.25, ("new", 2): 0.75, ("old", 2): None, ("late", 2): None}
    found = make_sweep(tmp_path, values)
    assert found == page.Sweep(
        {"new": [tmp_path / "new-4", tmp_path / "new-2"], "old": [tmp_path / "old-4"]}, "evaluation/success", "old",
        {tmp_path / "new-4": 4, tmp_path / "old-4": 4, tmp_path / "new-2": 2},
        ["old, seed 2 has not begun.", "late, seed 2 has not begun."],
    )  # fmt: skip
    assert make_sweep(tmp_path, {("new", 4): 0.5}, arms=["gone", "new"], baseline="gone").baseline == "new"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"^no run of this sweep has begun\.$"):
        make_sweep(tmp_path / "none", {("old", 4): None})


def test_the_table_of_arms_pairs_by_seed_and_draws_on_the_range_of_the_metric(tmp_path):
    """Of the seeds 4 and 2 that both have, new is higher by .5 and .25; old alone has seed 7."""
    values = {("new", 4): 0.75, ("new", 2): 0.5, ("old", 7): 0.9, ("old", 2): 0.25, ("old", 4): 0.25}
    sweep = make_sweep(tmp_path, values)
    assert page._final(sweep.arms["old"], sweep)[7] == statistics.Score(0.9, pytest.approx(0.075))
    table = page._arm_table(sweep)
    new, old = table["rows"]
    assert (new["cells"][:2], old["cells"][:2]) == (["2", "0.625"], ["3", "0.467"])
    assert new["cells"][3].startswith("+0.375 [") and old["cells"][3] == "–" and old["note"] == "the baseline"
    assert new["note"] == "2 seeds cannot show a difference (6 are needed)"
    assert (old["place"]["value"], new["place"]["value"]) == (46.97, 61.36)  # .05 more, of an axis of 1.1
    assert table["title"] == "evaluation/success at the end"
    (tmp_path / "new-4" / "run.json").write_text('{"status": "running"}')
    (tmp_path / "new-2" / "run.json").write_text('{"status": "failed"}')
    assert page._arm_table(sweep)["rows"][0] == {
        "name": "new", "note": "no seed is finished", "cells": ["0", "–", "–", "–"], "place": None}  # fmt: skip


def test_the_curves_of_a_sweep_have_a_line_for_each_arm_that_has_the_metric(tmp_path):
    sweep = make_sweep(tmp_path, {("new", 4): 0.5, ("old", 4): 0.25, ("old", 2): 0.75})
    write(tmp_path / "old-4" / "metrics.jsonl", [{"step": s, "kl": 1.0, "reward": s} for s in range(500)])
    charts, bands = data.arm_charts(sweep.arms, "kl")
    assert [chart["title"] for chart in charts] == ["kl", "reward"] and "evaluation/num_prompts" not in bands
    assert [(curve["name"], curve["colour"]) for curve in bands["evaluation/success"]["series"]] == [
        ("new", 0), ("old", 1)]  # fmt: skip
    assert bands["evaluation/success"]["series"][1]["y"] == [0.0, 0.75] and not charts[0]["percent"]
    (kl,) = bands["kl"]["series"]
    assert (kl["name"], kl["colour"], len(kl["x"]), kl["x"][0], kl["x"][-1]) == ("old", 1, 200, 0, 499)
    charts, _ = data.arm_charts(sweep.arms, "evaluation/success")
    assert charts[0]["percent"] and charts[0]["title"] == "evaluation/success"


# Heat maps and completions -------------------------------------------------------------------------------------------


def row(step: int, reward: float | None, *, prompt: int = 0, advantage: float | None = 0.0, text: str = "a") -> dict:
    return {"step": step, "prompt_id": prompt, "prompt": f"p{prompt}", "reward": reward, "advantage": advantage,
            "completion": text, "rewards": {"r": reward}}  # fmt: skip


def test_heat_maps_have_the_shares_of_each_step_and_the_sorted_advantages_of_each_group():
    rows = [row(0, 0.0, advantage=-1.0), row(0, 1.0, advantage=1.0), row(0, 1.0, advantage=0.0),
            row(1, 1.0, prompt=1), row(1, 1.0, prompt=1), row(1, 1.0, prompt=1)]  # fmt: skip
    rewards, advantages = data.heat_maps(rows)
    assert rewards["columns"] == [0, 1, 2] and rewards["rows"] == [-0.5, 0.5, 1.5]
    np.testing.assert_allclose(rewards["cells"], np.sqrt([[1 / 3, 2 / 3], [0, 1]]), rtol=1e-4)
    assert rewards["labels"]["columns"] == ["step 0: mean 0.667", "step 1: mean 1.000"]
    assert rewards["labels"]["rows"] == ["reward 0", "reward 1"]
    assert rewards["labels"]["cells"] == [["33.3%", "66.7%"], ["0.0%", "100.0%"]]
    assert advantages["labels"]["cells"] == [
        ["advantage -1.00", "advantage +0.00", "advantage +1.00"], ["advantage +0.00"] * 3]  # fmt: skip
    np.testing.assert_allclose(advantages["cells"], [[-1, 0, 1], [0, 0, 0]])
    assert "50.0% of 2 groups have no signal" in advantages["note"]
    assert advantages["columns"] == [0, 1, 2] and advantages["rows"] == [0, 1, 2, 3]
    assert advantages["labels"]["columns"] == ["group 1", "group 2"]
    assert advantages["labels"]["rows"][2] == "completion 3 of 3"
    assert data.heat_maps([row(0, None)]) == []


def test_completions_are_listed_with_their_run_step_prompt_rewards_and_advantage():
    first = [row(0, 0.5, text="x", advantage=1.0), row(2, None, prompt=1, text="y") | {"rewards": {"q": 3.0}}]
    shown, note = data.completions({"one": first, "two": [row(1, 0.25, prompt=1)]})
    assert shown == {
        "runs": ["one", "two"], "rewards": ["r", "q"],
        "examples": [{"name": "p0", "label": "p0", "columns": []}, {"name": "p1", "label": "p1", "columns": []}],
        "rows": [[0, 0, 0, "x", 0.5, 1.0, [0.5, None], None], [0, 2, 1, "y", None, 0.0, [None, 3.0], None],
                 [1, 1, 1, "a", 0.25, 0.0, [0.25, None], None]],
    }  # fmt: skip
    assert note == "Completions of all 3 steps of 2 runs."
    assert data.completions({})[1] == "Completions of all 0 steps."
    cut = data.completions({"one": [row(0, 0.0, text="z" * 2001)]})[0]["rows"][0][3]
    assert cut == "z" * 2000 + "… (2001 characters)"
    chat = row(0, 0.0) | {"prompt": [{"content": "first"}, {"content": "l" * 400}]}
    chat["completion"] = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    told, _ = data.completions({"one": [chat]})
    assert told["examples"][0]["name"] == "l" * 300 and told["rows"][0][3] == [["policy", "a"], ["policy", "b"]]


def test_configs_are_flat_and_their_differences_in_the_order_of_their_names():
    assert data.flat({"a": 1, "b": {"c": {}, "d": {"e": None}}}) == {"a": 1, "b.c": {}, "b.d.e": None}
    columns = {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3, "c": "z"}}
    assert data.differences(columns) == [["b", "2", "3"], ["c", "–", '"z"']]


# Pictures ------------------------------------------------------------------------------------------------------------


def test_long_runs_fall_into_spans_and_an_empty_span_has_no_mean():
    steps, _, shares, mean = histogram_over_time([row(0, 0.0), row(2, 1.0), row(2, 0.0), row(2, 0.0)])
    np.testing.assert_array_equal(steps, [0, 1, 2, 3])
    np.testing.assert_allclose(shares, [[1, 0], [0, 0], [2 / 3, 1 / 3]])
    np.testing.assert_allclose(mean, [0, np.nan, 1 / 3])
    _, levels, _, _ = histogram_over_time([row(0, 0.5)])
    np.testing.assert_allclose(levels, [0.45, 0.55])


def test_groups_are_of_a_step_and_a_prompt_and_a_missing_advantage_is_none():
    rows = [row(0, 1, advantage=None), row(0, 1, advantage=-2.0), row(1, 1, advantage=3.0), row(0, 1, prompt=1)]
    np.testing.assert_array_equal(advantages_by_group(rows), [[-2, 0], [3, np.nan], [0, np.nan]])


def test_the_picture_of_a_group_ranks_and_counts_its_completions(tmp_path, drawn):
    rows = [row(3, 0.0, advantage=-0.5, text="bad"), row(3, 1.0, advantage=0.5, text="good"),
            row(3, 1.0, advantage=0.5, text="good"), row(3, 0.5, text="so"), row(3, 9.0, prompt=1, text="other"),
            row(2, 7.0, text="earlier")]  # fmt: skip
    write(tmp_path / "completions.jsonl", rows)
    assert group_picture(tmp_path, 3) == tmp_path / "group_3.png"
    (axes,) = drawn().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["good ×2", "so", "bad"]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 0.5, 0.0]
    colours = [tuple(bar.get_facecolor()) for bar in axes.patches]
    assert colours == [to_rgba(colour) for colour in (GREEN, GREY, ORANGE)]
    assert [text.get_text() for text in axes.texts] == [" +0.50", " +0.00", " -0.50"]
    assert axes.get_title("left") == "Step 3: 4 completions"
    group_picture(tmp_path, 3, 1, "svg")
    assert [label.get_text() for label in drawn().axes[0].get_yticklabels()] == ["other"]
    with pytest.raises(UserError, match="has no completions of step 3, prompt 4"):
        group_picture(tmp_path, 3, 4)


def test_a_large_group_shows_its_best_and_its_worst(tmp_path, drawn):
    write(tmp_path / "completions.jsonl", [row(0, float(i), text=f"c{i}") for i in range(30)])
    group_picture(tmp_path, 0)
    names = [label.get_text() for label in drawn().axes[0].get_yticklabels()]
    assert names == [f"c{i}" for i in [*range(29, 17, -1), *range(11, -1, -1)]]
    assert drawn().axes[0].get_title("left") == "Step 0: 30 completions, 30 different; the best and the worst 12"


def test_the_maps_of_completions_are_drawn_from_all_rows(tmp_path, drawn):
    rows = [row(0, 0.0, advantage=-2.0), row(0, 1.0, advantage=2.0), row(1, 1.0), row(1, 1.0)]
    write(tmp_path / "completions.jsonl", rows)
    assert completion_rows(tmp_path) == rows
    assert advantage_map(tmp_path, "pdf") == tmp_path / "advantage_map.pdf"
    axes = drawn().axes[0]
    assert axes.get_title("left") == "Advantages by group (50% without signal)"
    np.testing.assert_array_equal(axes.images[0].get_array(), [[-2, 0], [2, 0]])
    assert reward_histograms(tmp_path, "svg") == tmp_path / "reward_histograms.svg"
    axes = drawn().axes[0]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.5, 0.5], [1.5, 1.0]])
    np.testing.assert_allclose(axes.collections[0].get_array(), [[0.5, 0.0], [0.5, 1.0]])


def test_a_series_has_its_own_bounds_and_the_value_where_a_row_lacks_them():
    rows = [{"step": 1, "m": 0.5, "m_low": 0.25, "m_high": 0.75}, {"step": 2, "m": 0.0, "m_low": None}, {"m_low": 3}]
    found = plots.series(rows, "m")
    np.testing.assert_array_equal(found.steps, [1, 2])
    np.testing.assert_array_equal([found.values, found.low, found.high], [[0.5, 0], [0.25, 0], [0.75, 0]])


def test_smoothing_weighs_neighbours_by_their_distance():
    e = np.exp(-0.5)
    np.testing.assert_allclose(plots.smooth(np.array([1.0, 0.0]), 1.0), [1 / (1 + e), e / (1 + e)])
    wide = np.exp(-0.5 / 4)
    np.testing.assert_allclose(plots.smooth(np.array([0.0, 1.0]), 2.0), [wide / (1 + wide), 1 / (1 + wide)])


def test_the_learning_curve_draws_every_point_with_its_interval_at_its_place(tmp_path, monkeypatch, drawn):
    bars = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, spread, **style: bars.append((x, y, spread, style)))
    write(
        tmp_path / "metrics.jsonl", [evaluation(0, 0.25), evaluation(10, 0.75), evaluation(8, 0.5, "evaluation/train")]
    )
    write(tmp_path / "control" / "metrics.jsonl", [evaluation(0, 0.9), evaluation(20, 0.375)])
    write(tmp_path / "warm_start" / "metrics.jsonl", [evaluation(0, 0.0), evaluation(4, 0.125)])
    assert plots.learning_curve(str(tmp_path), "svg") == tmp_path / "learning_curve.svg"
    found = [(list(x), list(y), style["color"]) for x, y, _, style in bars]
    assert found == [
        ([-4, 0], [0.0, 0.125], GREY), ([8], [0.5], BLUE), ([0, 10], [0.25, 0.75], BLUE),
        ([20 + 0.02 * 20], [0.375], ORANGE),
    ]  # fmt: skip
    np.testing.assert_allclose(bars[2][2], [[0.1, 0.1], [0.05, 0.05]])
    assert [style.get("markerfacecolor") for *_, style in bars] == [None, "white", None, None]
    texts = [text.get_text() for text in drawn().axes[0].texts]
    assert texts == ["warm start", "control 38%", "on training prompts 50%", "success 75%"]
    assert drawn().axes[0].get_title("left") == "Held-out success"


@pytest.mark.parametrize(("rewards", "panels"), [((0.0, 1.0), 1), ((-0.01, 1.0), 2), ((0.0, 1.01), 2)])
def test_a_reward_shares_the_panel_of_success_if_it_is_between_0_and_1(tmp_path, drawn, rewards, panels):
    write(tmp_path / "metrics.jsonl", [{"step": i, "reward": reward} for i, reward in enumerate(rewards)])
    plots.learning_curve(tmp_path)
    titles = [axes.get_title("left") for axes in drawn().axes]
    assert titles == (
        ["Held-out success and training reward"] if panels == 1 else ["Held-out success", "Training reward"]
    )


def test_the_label_of_a_smoothed_curve_is_its_end(tmp_path, drawn):
    write(tmp_path / "metrics.jsonl", [{"step": i, "reward": 0.5, "entropy": 2.0, "frac_reward_zero_std": 0.25,
                                        "completions/unique_fraction": 0.75} for i in range(3)])  # fmt: skip
    plots.learning_curve(tmp_path)
    texts = [text.get_text() for axes in drawn().axes for text in axes.texts]
    assert texts == ["reward 0.50", "groups without signal 0.25", "unique completions 0.75", "entropy (nats) 2.00"]


def test_the_curves_of_arms_are_labelled_with_their_end_and_their_seeds(tmp_path, drawn):
    for name, values in {"a0": (0.0, 0.5), "a1": (0.5, 0.75), "b0": (0.125, 0.25)}.items():
        rows = [{"step": 5 * i, "success": value} for i, value in enumerate(values)]
        write(tmp_path / name / "metrics.jsonl", [{**one, "evaluation/success": one.pop("success")} for one in rows])
    arms = {"a": [tmp_path / "a0", tmp_path / "a1"], "b": [tmp_path / "b0"], "c": [tmp_path / "none"]}
    path = curves.seed_curves(arms, "evaluation/success", tmp_path / "x.png")
    (axes,) = drawn().axes
    assert path == tmp_path / "x.png"
    assert [text.get_text() for text in axes.texts] == ["b 0.25 (n = 1)", "a 0.625 (n = 2)"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0.25], [5, 0.625]])
    assert [line.get_color() for line in axes.lines] == [BLUE, ORANGE]
    assert axes.get_title("left") == "evaluation/success: mean over seeds, 95 % interval"


def test_each_curve_of_a_band_is_taken_at_the_steps_that_all_have():
    one, two = series_of(0.0, 0.5, 1.0), series_of(0.25, 0.75, 0.75, low=0.2, high=0.1, start=1)
    found = curves.seed_band([one, two], (0, 1))
    np.testing.assert_array_equal(found.steps, [1, 2])
    np.testing.assert_allclose(found.values, [(0.5 + 0.25) / 2, (1.0 + 0.75) / 2])
    expected = statistics.mean([0.5, 0.25], (0, 1), noise=(0 + 0.15) / 2)
    np.testing.assert_allclose((found.low[0], found.high[0]), (expected.low, expected.high))


ABLATION = """
from grpo_jax.experiment import Ablation, Experiment
from grpo_jax.tasks import Task

def length(*, completions, **_):
    return [float(len(c)) for c in completions]

task = Task("toy", [{"prompt": "p"}], [{"prompt": "p"}], success=length)
base = Experiment(task=task, rewards={"length": length}, steps=3)
ablation = Ablation(base, arms={"new": {"loss.beta": 0.1}, "old": {}}, seeds=(3, 1), baseline="old", metric="kl")
"""


def test_a_sweep_of_the_first_versions_is_found_by_the_arms_and_seeds_of_its_runs(tmp_path):
    for arm, seed in (("new", 1), ("old", 3), ("old", 1)):
        write(tmp_path / f"{arm}{seed}" / "metrics.jsonl", [])
        info = {"overrides": [f"arm={arm}", "budget=tokens", f"seed={seed}"], "seed": seed, "source": None}
        (tmp_path / f"{arm}{seed}" / "run.json").write_text(json.dumps(info))
        (tmp_path / f"{arm}{seed}" / "experiment.py").write_text(ABLATION)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"overrides": []}')
    found = page.read_sweep(tmp_path)
    assert found.arms == {"old": [tmp_path / "old3", tmp_path / "old1"], "new": [tmp_path / "new1"]}
    assert list(found.arms) == ["new", "old"] and found.seeds[tmp_path / "old3"] == 3
    assert (found.metric, found.baseline, found.missing) == ("kl", "old", ["new, seed 3 has not begun."])


def test_the_plots_of_a_directory_are_those_of_a_run_or_of_a_sweep(tmp_path, drawn):
    run = tmp_path / "run"
    write(run / "metrics.jsonl", [evaluation(0, 0.5), {"step": 0, "reward": 0.5}])
    (run / "run.json").write_text("{}")
    assert page.draw(run, "svg") == [run / "learning_curve.svg"]
    write(run / "completions.jsonl", [row(2, 0.5), row(2, 1.0), row(7, 0.5), row(5, 0.5)])
    names = ["learning_curve", "reward_histograms", "advantage_map", "group_2", "group_5"]
    assert page.draw(run) == [run / f"{name}.png" for name in names]
    sweep = tmp_path / "sweep"
    make_sweep(sweep, {("new", 4): 0.5, ("old", 4): 0.25})
    assert page.draw(sweep, "pdf") == [sweep / "evaluation_success.pdf"]
    write(sweep / "old-4" / "metrics.jsonl", [evaluation(0, 0.5), {"step": 0, "reward": 0.5}])
    assert page.draw(sweep) == [sweep / "evaluation_success.png", sweep / "reward.png"]


def test_the_page_of_a_sweep_names_its_runs_what_differs_and_what_is_not_finished(tmp_path):
    sweep = make_sweep(tmp_path, {("new", 4): 0.5, ("old", 4): 0.25, ("old", 2): 0.75})
    for name, config in (("new-4", {"a": 1, "seed": 4}), ("old-4", {"a": 2, "seed": 4}), ("old-2", {"a": 9})):
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "method": "grpo"}))
    write(tmp_path / "old-2" / "completions.jsonl", [row(0, 0.5)])
    (tmp_path / "new-4" / "run.json").write_text('{"status": "failed"}')
    found = page.ablation_page(tmp_path, sweep)
    counted, made = found["facts"]
    assert counted == "2 arms, 3 runs, compared by evaluation/success"
    assert made == "method grpo · ? × unknown device · no commit known"
    assert found["warnings"] == ["new, seed 4 is failed."] and found["title"] == f"Ablation {tmp_path.name}"
    assert found["difference"] == {
        "title": "Config: what differs from the baseline (old)", "columns": ["old", "new"], "rows": [["a", "2", "1"]],
    }  # fmt: skip
    assert found["data"]["completions"]["runs"] == ["old, seed 2"] and found["command"] is None
    assert json.loads(found["configs"]["the config of new"])["a"] == 1


def test_the_page_goes_to_the_directory_or_to_a_file_or_folder_of_choice(tmp_path):
    run = tmp_path / "run"
    write(run / "metrics.jsonl", [evaluation(0, 0.5)])
    (run / "run.json").write_text('{"status": "finished"}')
    (run / "config.json").write_text('{"method": "grpo"}')
    assert page.report(run) == run / "report.html"
    assert page.report(run, tmp_path / "x.html") == tmp_path / "x.html"
    assert page.report(run, tmp_path) == tmp_path / "report.html"
    assert all("grpo" in path.read_text() for path in (run / "report.html", tmp_path / "x.html"))
