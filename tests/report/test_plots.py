"""The learning curve is drawn from what lies in the run directory, whatever of it is there."""

import itertools
import json
import tracemalloc
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from grpo_jax.errors import RunError, UserError
from grpo_jax.report import plots


def evaluation(step: int, success: float) -> dict:
    bounds = {"evaluation/success_low": success - 0.05, "evaluation/success_high": success + 0.05}
    return {"step": step, "evaluation/success": success, **bounds}


def training(step: int, reward: float) -> dict:
    return {
        "step": step,
        "reward": reward,
        "frac_reward_zero_std": 0.2,
        "completions/unique_fraction": 0.5,
        "entropy": 1.0,
    }


def write(run: Path, rows: list[dict]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was saved, with everything in it still to be asked for."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return lambda: figures[-1]


def texts(figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, axes._left_title])


def test_the_picture_shows_reward_success_control_references_and_collapse(tmp_path, drawn):
    rows = [training(step, step / 20) for step in range(20)]
    write(tmp_path, [evaluation(0, 0.1), *rows, evaluation(20, 0.7)])
    write(tmp_path / "control", [evaluation(0, 0.1), {"step": 0, "loss": 1.0}, evaluation(20, 0.3)])
    (tmp_path / "summary.json").write_text(json.dumps({"references": {"blind player": 0.05}}))
    path = plots.learning_curve(tmp_path)
    assert path == tmp_path / "learning_curve.png"
    assert matplotlib.image.imread(path).shape[2] == 4
    success, collapse = drawn().axes
    words = texts(drawn())
    for part in ("success 70%", "control 30%", "blind player 5%", "reward 0.9", "groups without signal 0.20"):
        assert part in words
    assert success.get_ylim()[1] > 1 and collapse.get_ylim()[0] == 0


def test_a_reward_beyond_one_has_a_panel_of_its_own(tmp_path, drawn):
    write(tmp_path, [training(0, -0.5), training(1, 2.0)])
    plots.learning_curve(tmp_path)
    assert len(drawn().axes) == 3 and "Training reward" in texts(drawn())


def test_a_warm_start_lies_left_of_the_first_step(tmp_path, drawn):
    write(tmp_path, [evaluation(0, 0.4), training(0, 0.4), evaluation(1, 0.5)])
    write(tmp_path / "warm_start", [evaluation(0, 0.0), evaluation(30, 0.4)])
    plots.learning_curve(tmp_path)
    assert "warm start" in texts(drawn())
    assert drawn().axes[0].get_xlim()[0] <= -30


def test_success_on_the_training_prompts_is_shown_beside_the_held_out_one(tmp_path, drawn):
    on_train = {"step": 5, "evaluation/train/success": 0.8, "evaluation/train/success_low": 0.7}
    write(tmp_path, [evaluation(5, 0.5), on_train | {"evaluation/train/success_high": 0.9}])
    plots.learning_curve(tmp_path)
    assert "success 50%" in texts(drawn()) and "on training prompts 80%" in texts(drawn())


def test_a_supervised_run_and_a_single_evaluation_are_enough(tmp_path, drawn):
    write(tmp_path, [{"step": 0, "loss": 1.0}, evaluation(1, 0.25)])
    plots.learning_curve(tmp_path)
    assert len(drawn().axes) == 1 and "success 25%" in texts(drawn())


def test_labels_never_overlap(tmp_path, drawn):
    write(tmp_path, [training(0, 0.5), evaluation(1, 0.5)])
    write(tmp_path / "control", [evaluation(1, 0.5)])
    (tmp_path / "summary.json").write_text(json.dumps({"references": {"a": 0.5, "b": 0.51}}))
    plots.learning_curve(tmp_path)
    figure = drawn()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))


def test_missing_values_are_left_out():
    found = plots.series([{"step": 0, "kl": 1.0}, {"step": 1, "kl": None}, {"step": 2}, {"step": 3, "kl": 4.0}], "kl")
    np.testing.assert_array_equal(found.steps, [0, 3])
    np.testing.assert_array_equal(found.values, [1.0, 4.0])
    np.testing.assert_array_equal(found.low, found.values)
    assert len(plots.series([], "kl")) == 0


def test_smoothing_keeps_a_constant_and_a_straight_line_inside_and_halves_noise():
    np.testing.assert_allclose(plots.smooth(np.full(9, 0.3), 2.0), 0.3)
    line = np.arange(41.0)
    np.testing.assert_allclose(plots.smooth(line, 2.0)[15:26], line[15:26], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=500)
    assert plots.smooth(noise, 2.0).std() < noise.std() / 2


def test_smoothing_a_long_run_needs_memory_for_its_steps_and_not_for_their_pairs():
    tracemalloc.start()
    plots.smooth(np.arange(20_000.0), 400.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 20_000 * 8  # all pairs have 20,000 * 20,000 * 8 bytes


def test_without_metrics_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl with a step in it"):
        plots.learning_curve(tmp_path)


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    write(tmp_path, [training(0, 0.5)])
    (tmp_path / "learning_curve.png").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*learning_curve.png: Is a directory\."):
        plots.learning_curve(tmp_path)
