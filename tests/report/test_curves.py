"""Curves over seeds: the mean and its interval at the steps that all seeds have."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from grpo_jax.confidence import bounded_limits
from grpo_jax.errors import UserError
from grpo_jax.report.curves import metric_curves, seed_band, seed_curves
from grpo_jax.report.plots import Series


def line(*values: float, start: int = 0) -> Series:
    steps = np.arange(start, start + len(values), dtype=float)
    return Series(steps, np.array(values), np.array(values), np.array(values))


def write(run: Path, values: list[float], metric: str = "evaluation/success") -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, metric: v}) + "\n" for i, v in enumerate(values)))
    return run


def test_the_band_is_students_interval_at_the_steps_that_all_seeds_have():
    found = seed_band([line(0.0, 0.2, 0.5), line(0.4, 0.5, 0.9, start=1)])
    np.testing.assert_array_equal(found.steps, [1, 2])
    np.testing.assert_allclose(found.values, [0.3, 0.5])
    # Two seeds .2 apart: deviation .2 / sqrt(2), standard error .1, t(1 degree) = 12.706. The second step: no spread.
    np.testing.assert_allclose(found.high, [0.3 + 12.706 * 0.1, 0.5], rtol=1e-4)
    np.testing.assert_allclose(found.low, [0.3 - 12.706 * 0.1, 0.5], rtol=1e-4)


def test_the_band_of_a_rate_stays_within_0_and_1_and_includes_the_evaluations_own_interval():
    one, two, three = line(0.99, 0.9), line(0.98, 0.8), line(0.0, 0.1)
    found = seed_band([one, two, three], (0, 1))
    assert (found.low >= 0).all() and (found.high <= 1).all() and (found.low < found.values).all()
    np.testing.assert_allclose((found.low[0], found.high[0]), bounded_limits([0.99, 0.98, 0.0]))
    wide = [Series(c.steps, c.values, c.values - 0.1, c.values + 0.1) for c in (one, two, three)]
    wider = seed_band(wide, (0, 1))
    np.testing.assert_allclose(wider.values - wider.low, np.hypot(found.values - found.low, 0.1))


def test_one_seed_has_no_band_and_none_no_curve():
    one = seed_band([line(0.1, 0.2)])
    np.testing.assert_array_equal(one.low, one.high)
    assert len(seed_band([])) == 0


def test_what_varies_from_step_to_step_is_smoothed_and_evaluations_are_not(tmp_path):
    noisy = [0.0, 1.0] * 10
    (reward,) = metric_curves([write(tmp_path / "a", noisy, "reward")], "reward")
    (success,) = metric_curves([write(tmp_path / "b", noisy)], "evaluation/success")
    assert np.ptp(reward.values[3:-3]) < 0.6 and np.ptp(success.values) == 1


def test_a_line_and_a_label_for_each_arm_that_has_the_metric(tmp_path):
    arms = {"old": [write(tmp_path / "0", [0.1, 0.2]), write(tmp_path / "1", [0.1, 0.4])], "new": [tmp_path / "none"]}
    path = seed_curves(arms, "evaluation/success", tmp_path / "curves.png")
    assert matplotlib.image.imread(path).shape[2] == 4
    with pytest.raises(UserError, match="none of the runs has a metric 'entropy'"):
        seed_curves(arms, "entropy", tmp_path / "curves.png")


@pytest.mark.parametrize(("arms", "bands"), [(7, 7), (8, 0)])
def test_intervals_of_more_arms_than_colours_would_hide_one_another(arms, bands, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "fill_between", lambda *_, **__: drawn.append(1))
    runs = [write(tmp_path / str(seed), [0.1, 0.2 + 0.1 * seed]) for seed in range(2)]
    seed_curves(dict.fromkeys(map(str, range(arms)), runs), "evaluation/success", tmp_path / "curves.png")
    assert len(drawn) == bands
