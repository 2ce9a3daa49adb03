"""How far runs are and how long a sweep still takes, worked by hand."""

import io
import json
from datetime import datetime
from pathlib import Path

import letters
import pytest
from rich.console import Console

from grpo_jax.experiment import Ablation, Experiment, override
from grpo_jax.sweep.progress import SweepProgress
from grpo_jax.sweep.stages import (
    CONTROL,
    TRAINING,
    WARM_START,
    Stage,
    current,
    overhead_of,
    pace_of,
    seconds_left,
    stages_of,
    sweep_seconds_left,
    time_text,
)

WARM = {"method": "sft", "steps": 100, "group_size": 1}


def write_steps(directory: Path, num: int, seconds: float, status: str = "running", **more: float) -> None:
    """The files of a run (or of its warm start) that has made `num` steps of some seconds each."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "step_time": seconds, "reward": 0.5, **more} for step in range(num)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "run.json").write_text(json.dumps({"status": status}))


@pytest.fixture
def config() -> Experiment:
    return override(letters.config, {"steps": 30, "warm_start": WARM})


def test_a_run_is_in_its_warm_start_until_that_is_finished(config, tmp_path):
    assert current(stages_of(tmp_path, config)) == Stage(WARM_START, 0, 100)
    write_steps(tmp_path / "warm_start", 40, 0.5)
    assert stages_of(tmp_path, config) == [Stage(WARM_START, 40, 100, 0.5), Stage(TRAINING, 0, 30)]
    write_steps(tmp_path / "warm_start", 100, 0.5, "finished")
    write_steps(tmp_path, 10, 2.0)
    assert current(stages_of(tmp_path, config)) == Stage(TRAINING, 10, 30, 2.0)


def test_a_control_follows_the_training(tmp_path):
    config = override(letters.config, {"steps": 3, "control": {"method": "sft"}})
    write_steps(tmp_path, 3, 2.0)
    assert current(stages_of(tmp_path, config)) == Stage(CONTROL, 0, 3)


def test_a_run_with_a_budget_of_tokens_is_measured_in_tokens(tmp_path):
    """It has sampled 250 of 1,000 tokens, at 50 tokens a second: 15 s are left."""
    config = override(letters.config, {"token_budget": 1000})
    write_steps(tmp_path, 2, 2.5, num_sampled_tokens=250, tokens_per_second=50.0)
    stages = stages_of(tmp_path, config)
    assert stages == [Stage(TRAINING, 250, 1000, 0.02)]
    assert seconds_left(stages, {}, None) == 15


def test_the_time_left_of_a_run_counts_each_part_at_its_own_pace():
    """60 steps of 0.5 s and 30 of 2 s are 90 s. The whole is 100 * 0.5 + 30 * 2 = 110 s of steps."""
    stages = [Stage(WARM_START, 40, 100, 0.5), Stage(TRAINING, 0, 30)]
    assert seconds_left(stages, {}, None) is None  # nobody has made a training step yet
    pace = pace_of([[Stage(TRAINING, 3, 30, 1.0)], [Stage(TRAINING, 9, 30, 3.0)], stages])
    assert pace == {WARM_START: 0.5, TRAINING: 2.0}
    assert seconds_left(stages, pace, None) == 90
    # A finished run took 220 s, twice its steps: it compiled and evaluated. So will this one.
    assert seconds_left(stages, pace, 220.0) == 180
    assert seconds_left([Stage(TRAINING, 0, 30)], {}, 220.0) == 220


def test_before_any_run_is_finished_a_run_that_has_not_begun_needs_what_others_needed_beside_their_steps(tmp_path):
    """A run began 50 s ago and has made 10 steps of 2 s: 30 s went elsewhere. It has 20 steps of 2 s left."""
    config = override(letters.config, {"steps": 30})
    write_steps(tmp_path, 10, 2.0)
    info = {"status": "running", "started": "2026-01-02T03:04:00+00:00"}
    (tmp_path / "run.json").write_text(json.dumps(info))
    stages, now = stages_of(tmp_path, config), datetime.fromisoformat("2026-01-02T03:04:50+00:00")
    overhead = overhead_of(tmp_path, stages, now)
    assert overhead == 30
    assert seconds_left(stages, {}, None, overhead) == 40
    assert seconds_left([Stage(TRAINING, 0, 30)], pace_of([stages]), None, overhead) == 30 * 2 + 30
    (tmp_path / "run.json").write_text(json.dumps(info | {"resumed": [{}]}))
    assert overhead_of(tmp_path, stages, now) is None  # nobody knows how long it lay still


def test_a_sweep_takes_at_least_its_longest_run_and_at_least_its_sum_over_the_jobs():
    assert sweep_seconds_left([30.0, 30.0, 60.0], 1) == 120
    assert sweep_seconds_left([30.0, 30.0, 60.0], 2) == 60
    assert sweep_seconds_left([10.0, 10.0, 60.0], 2) == 60
    assert sweep_seconds_left([10.0, None], 1) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (720, "12 min"), (12000, "3 h 20 min"), (100_000, "28 h")]
)
def test_a_time_has_two_units_at_most(seconds, text):
    assert time_text(seconds) == text


def test_the_board_shows_the_warm_start_and_the_time_left(config, tmp_path):
    """Of four runs one is finished after 300 s, one is in its training (10 of 30 steps of 2 s), one in its warm start.

    The steps of a run are 100 * 0.5 s + 30 * 2 s = 110 s. Left are 40 s, 60 * 0.5 + 60 = 90 s and 110 s, that is 240 of
    330 s for three runs of 300 s: 240 / 110 * 300 = 655 s, with two jobs 327 s, which is 5 min.
    """
    arms = {"base": {}, "slow": {"optimizer.learning_rate": 1e-4}}
    runs = Ablation(base=config, arms=arms, seeds=(0, 1)).runs()
    first, second, third, _ = (tmp_path / run.key for run in runs)
    for directory in (first, second):
        write_steps(directory / "warm_start", 100, 0.5, "finished")
    write_steps(first, 30, 2.0, "finished")
    (first / "summary.json").write_text('{"seconds": 300}')
    write_steps(second, 10, 2.0)
    write_steps(third / "warm_start", 40, 0.5)
    console = Console(file=io.StringIO(), width=120)
    progress = SweepProgress(runs, tmp_path, "evaluation/success", console, jobs=2)
    under_way = {runs[1].key, runs[2].key}
    console.print(progress.table(under_way, set()))
    shown = console.file.getvalue()
    assert "1 of 4 runs finished, about 5 min left" in shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert [(row[3], row[4]) for row in cells] == [
        ("finished", "30/30"), ("running", "10/30"), ("warm start", "40/100"), ("waiting", "0/30"),
    ]  # fmt: skip
    alone = SweepProgress(runs, tmp_path, "evaluation/success", console, jobs=1)
    assert alone.time_left(under_way, set()) == pytest.approx(240 / 110 * 300)
    # In one program, the runs of an arm end together: the slower seed of each arm counts, here 110 and 90 (of 110) s.
    pairs = [runs[::2], runs[1::2]]
    together = SweepProgress(runs, tmp_path, "evaluation/success", console, together=pairs)
    assert together.time_left(under_way, set()) == pytest.approx((90 + 110) / 110 * 300)
    assert together.time_left(set(), set()) is None
