"""Pictures of completions: what they show against rows made by hand."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.report.completion_plots import (
    advantage_map,
    advantages_by_group,
    group_picture,
    histogram_over_time,
    reward_histograms,
)


def row(step: int, reward: float | None, *, prompt_id: int = 0, advantage: float | None = 0.0, text: str = "a") -> dict:
    return {"step": step, "prompt_id": prompt_id, "reward": reward, "advantage": advantage, "completion": text}


@pytest.fixture
def run(tmp_path) -> Path:
    rows = [row(s, r, advantage=r - 0.5, text=f"$x_{{ {r} \x1b[0m") for s in range(3) for r in (0.0, 0.5, 1.0, 0.5)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_rewards_are_counted_by_step_and_level():
    rows = [row(0, 0.0), row(0, 0.0), row(0, 0.5), row(0, None), row(1, 0.5), row(1, 1.0)]
    steps, levels, shares, mean = histogram_over_time(rows)
    np.testing.assert_array_equal(steps, [0, 1, 2])
    np.testing.assert_allclose(levels, [-0.25, 0.25, 0.75, 1.25])
    np.testing.assert_allclose(shares, [[2 / 3, 1 / 3, 0], [0, 1 / 2, 1 / 2]])
    np.testing.assert_allclose(mean, [0.5 / 3, 0.75])


def test_many_rewards_fall_into_equal_spans_and_long_runs_into_spans_of_steps():
    rows = [row(s, s / 1000) for s in range(1000)]
    steps, levels, shares, _ = histogram_over_time(rows)
    assert len(steps) == 201 and len(levels) == 25
    np.testing.assert_allclose(shares.sum(1), 1)


def test_advantages_are_sorted_in_their_group():
    rows = [row(0, 1, advantage=a, prompt_id=p) for p, a in ((0, 1.0), (0, -1.0), (1, 0.5), (0, 0.0), (1, -0.5))]
    found = advantages_by_group(rows)
    np.testing.assert_array_equal(found, [[-1, 0, 1], [-0.5, 0.5, np.nan]])


def test_every_picture_is_drawn(run):
    for path in (reward_histograms(run), advantage_map(run), group_picture(run, 1)):
        assert matplotlib.image.imread(path).shape[2] == 4


def test_what_is_not_there_is_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match="no completions of step 9"):
        group_picture(run, 9)
    with pytest.raises(UserError, match="holds no completions"):
        reward_histograms(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no completion of the run has a reward"):
        histogram_over_time([row(0, None)])
