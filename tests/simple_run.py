"""Runs whose sampler and update are simple functions, for tests of a run's files: little is compiled."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import Scripted

from grpo_jax import training
from grpo_jax.runs.restore import restore_policy
from grpo_jax.update import State, UpdateOutput

TIMES = {"step_time", "tokens_per_second"}


def _update(*_: Any) -> Any:
    """An update by the mean reward of the batch."""

    def update(state: State, frozen: Any, reference: Any, batch: Any, first: Any) -> tuple[State, UpdateOutput]:
        reward = jax.lax.pmean(batch.rewards.mean(), "replicas")
        moved = jax.tree.map(lambda x: 0.5 * x + reward, state.trainable)
        counts = {"skipped_updates": jnp.int32(0), "empty_updates": jnp.int32(0)}
        return state._replace(trainable=moved), UpdateOutput({"grad_norm": reward, **counts})

    return update


def _answer(prompt: str, sample: int) -> str:
    return "abcd"[sample % 4] + prompt[:2]


@contextmanager
def simple_training() -> Iterator[None]:
    """Training, by the command or from Python, is simple meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grpo_jax.training.trainer.make_update", _update)
        patch.setattr(training, "run", partial(training.run, make_generator=lambda actor: Scripted(_answer)))
        patch.setattr("grpo_jax.report.plots.learning_curve", lambda run_dir: run_dir / "learning_curve.png")
        yield


def lines(run: Path, name: str) -> list[bytes]:
    return (run / name).read_bytes().splitlines(keepends=True)


def timeless(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics without what a clock says."""
    rows = [json.loads(line) for line in lines(run, "metrics.jsonl")]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(run: Path, other: Path) -> None:
    """Metrics, completions and the final parameters agree to the last bit."""
    assert timeless(run) == timeless(other)
    assert lines(run, "completions.jsonl") == lines(other, "completions.jsonl")
    one, two = restore_policy(run).params, restore_policy(other).params
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[path], two[path]) for path in two)
