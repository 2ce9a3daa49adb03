"""Signs that a run has learned nothing: each is said of the run that has it, and none of a healthy one."""

import json
from pathlib import Path

import pytest

from grpo_jax.report.diagnosis import diagnose

HEALTHY = {
    "reward": (0.2, 0.9),
    "frac_reward_zero_std": (0.1, 0.6),
    "success": (0.1, 0.8),
    "completions/clipped_ratio": (0.1, 0.0),
    "completions/mean_length": (4.0, 5.0),
    "entropy": (1.5, 0.3),
}


def write(run: Path, held_out: tuple[float, float] = (0.1, 0.7), prompt: object = "a", **changes: object) -> Path:
    """A run of eight steps whose metrics go evenly from one value to another."""
    metrics = HEALTHY | {name.replace("__", "/"): values for name, values in changes.items()}
    rows: list[dict] = [{"step": 0, "evaluation/success": held_out[0]}]
    for step in range(8):
        moved = {name: a + (b - a) * step / 7 for name, (a, b) in metrics.items()}
        rows.append({"step": step, "step_time": 1.0, **moved})
    rows.append({"step": 8, "evaluation/success": held_out[1]})
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "completions.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    return run


def test_a_healthy_run_has_no_sign(tmp_path):
    assert diagnose(write(tmp_path / "run")) == []
    assert diagnose(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # No reward at all, and rewards that differ between prompts alone.
        ({"reward": (0, 0), "frac_reward_zero_std": (1, 1), "success": (0, 0)}, "every completion earned 0)"),
        ({"reward": (0.1, 0.2), "frac_reward_zero_std": (1, 1), "success": (0, 0)}, "never within a group"),
        # The last two of eight steps are at 6/7 and 7/7 of the way: .9 + .1 * 6.5/7 = .993.
        ({"frac_reward_zero_std": (0.9, 1.0), "success": (0.1, 0.5)}, "In 99% of the last groups all"),
        ({"completions/clipped_ratio": (0.9, 1.0)}, "99% of the last completions were cut off by sampling.max_tokens"),
        ({"completions/mean_length": (4.0, 1.0)}, "have 1.2 tokens on average"),  # 4 - 3 * 6.5/7 = 1.21
        ({"entropy": (1.0, 4.0)}, "The entropy rose from 1.21 to 3.79 nats"),
    ],
)  # fmt: skip
def test_a_sign_is_said_with_its_number(tmp_path, changes, says):
    changes = {name.replace("/", "__"): values for name, values in changes.items()}
    [sign] = diagnose(write(tmp_path / "run", **changes))
    assert says in sign


def test_a_policy_that_is_always_right_has_not_collapsed(tmp_path):
    assert diagnose(write(tmp_path / "run", frac_reward_zero_std=(0.9, 1.0), success=(0.9, 1.0))) == []


def test_a_reward_that_grows_without_held_out_success_is_said(tmp_path):
    [sign] = diagnose(write(tmp_path / "run", (0.3, 0.25)))
    assert (
        "The training reward rose from 0.25 to 0.85, but held-out success did not (30.0% before, 25.0% after)" in sign
    )
    assert diagnose(write(tmp_path / "run", (0.3, 0.25), reward=(0.5, 0.5))) == []


def test_plain_prompts_for_a_chat_model_are_said(tmp_path):
    assert "prompts are plain text" in diagnose(write(tmp_path / "run"), has_chat_template=True)[0]
    assert diagnose(write(tmp_path / "run"), has_chat_template=False) == []
    chat = [{"role": "user", "content": "a"}]
    assert diagnose(write(tmp_path / "run", prompt=chat), has_chat_template=True) == []


def signs(run: Path, steps: list[dict], held_out: tuple[float, ...] = ()) -> list[str]:
    """The signs of a run with these steps, and with evaluations before them and after."""
    rows = [{"step": step, "step_time": 1.0, **metrics} for step, metrics in enumerate(steps)]
    rows = [{"step": 0, "evaluation/success": success} for success in held_out[:1]] + rows
    rows += [{"step": 99, "evaluation/success": success} for success in held_out[1:]]
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [sign.split(":")[0] for sign in diagnose(run)]


EQUAL, SUCCESS, CUT = "frac_reward_zero_std", "success", "completions/clipped_ratio"


@pytest.mark.parametrize(
    ("steps", "held_out", "said"),
    [
        # Of eight steps, the last two count.
        ([{EQUAL: 0.0, SUCCESS: 0.5, "reward": 0}] * 6 + [{EQUAL: 0.95, SUCCESS: 0.5}] * 2, (), ["In 95% of the last"]),
        ([{EQUAL: 0.0, SUCCESS: 0.5, "reward": 0}] * 6 + [{EQUAL: 0.94, SUCCESS: 0.5}] * 2, (), []),
        ([{EQUAL: 0.0, SUCCESS: 0.5, "reward": 0}] * 6 + [{EQUAL: 0.95, SUCCESS: 0.95}] * 2, (), []),
        ([{EQUAL: 1.0, "reward": 2.5}], (), ["No group had rewards that differ (every completion earned 2.5)"]),
        ([{EQUAL: 1.0, "reward": 2.5}, {EQUAL: 0.9, "reward": 2.5}], (), []),  # without success nothing is said
        ([{CUT: 0.0}] * 3 + [{CUT: 0.9}], (), ["90% of the last completions were cut off by sampling.max_tokens"]),
        ([{CUT: 1.0}] * 3 + [{CUT: 0.89}], (), []),
        ([{"completions/mean_length": 1.5}] * 3 + [{"completions/mean_length": 1.25}], (),
         ["The last completions have 1.2 tokens on average"]),
        ([{"completions/mean_length": 1.4}] * 3 + [{"completions/mean_length": 1.25}], (), []),  # it began like that
        ([{"completions/mean_length": 9}] * 3 + [{"completions/mean_length": 1.5}], (), []),
        ([{"entropy": 2.0}, {"entropy": 3.1}], (), ["The entropy rose from 2.00 to 3.10 nats"]),
        ([{"entropy": 2.0}, {"entropy": 3.0}], (), []),
        ([{"entropy": 0.1}, {"entropy": 1.4}], (), []),  # less than 1.5 nats are not random
        ([{"entropy": 0.1}, {"entropy": 1.6}], (), ["The entropy rose from 0.10 to 1.60 nats"]),
        ([{"reward": 0.0}, {"reward": 0.5}], (0.25, 0.25), ["The training reward rose from 0 to 0.5, but held-out"]),
        ([{"reward": 0.0}, {"reward": 0.5}], (0.25, 0.9, 0.2), ["The training reward rose from 0 to 0.5, but"]),
        ([{"reward": 0.0}, {"reward": 0.5}], (0.25, 0.26), []),
        ([{"reward": 0.0}, {"reward": 0.5}], (0.25,), []),
        ([{"reward": 0.0}, {"reward": 0.02}], (0.25, 0.2), []),
        ([{"reward": 0.0}, {"reward": 9.0}, {"reward": 0.9}], (0.25, 0.2), []),  # a tenth of the range
        ([{"reward": 0.0}, {"reward": 9.0}, {"reward": 0.95}], (0.25, 0.2), ["The training reward rose from 0 to"]),
    ],
)  # fmt: skip
def test_where_a_sign_begins(tmp_path, steps, held_out, said):
    found = signs(tmp_path / "run", steps, held_out)
    assert len(found) == len(said) and all(sign.startswith(part) for sign, part in zip(found, said, strict=True))


def test_signs_come_in_the_order_in_which_they_matter(tmp_path):
    first = {EQUAL: 1.0, "reward": 0.0, CUT: 1.0, "completions/mean_length": 5.0, "entropy": 0.5}
    last = first | {"reward": 1.0, "completions/mean_length": 1.0, "entropy": 5.0}
    write(tmp_path / "run")
    found = signs(tmp_path / "run", [first, last], (0.5, 0.5))
    assert [sign.split()[0] for sign in found] == ["No", "100%", "The", "The", "The"]
    assert [sign.split()[1] for sign in found[2:]] == ["last", "entropy", "training"]
