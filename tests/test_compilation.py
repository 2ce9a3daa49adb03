"""What a run compiles, it compiles once: a second compilation of an update costs minutes on a large model."""

from pathlib import Path
from typing import Any

import jax
import letters
import numpy as np
import pytest

from grpo_jax.algorithms import StepContext
from grpo_jax.experiment import Experiment, override
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.runs.restore import source_policy
from grpo_jax.training import Trainer

SYNCED = {"loss.beta": 0.1, "loss.sync_ref_model": True, "loss.ref_model_sync_steps": 1}


@pytest.fixture
def compilations() -> Any:
    """Counts what is compiled from now on."""
    counted: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counted.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield counted
    jax.monitoring.clear_event_listeners()


def make_trainer(experiment: Experiment, log: RunLog) -> Trainer:
    return Trainer(experiment, source_policy(experiment), log)


GUARDED = {"guards.spike_factor": 1e9, "guards.spike_window": 1}


@pytest.mark.parametrize(
    "changes", [{}, SYNCED, {"method": "ppo"}, GUARDED], ids=["grpo", "a synced reference", "ppo", "a spike rule"]
)
def test_steps_after_the_first_compile_nothing(changes: dict[str, Any], tmp_path: Path, compilations: Any) -> None:
    experiment = override(letters.config, changes)
    with RunLog(tmp_path / "run", experiment, display=display_of(experiment, quiet=True)) as log:
        trainer = make_trainer(experiment, log)
        trainer.step(0)
        assert compilations
        compilations.clear()
        for step in (1, 2, 3):
            trainer.step(step)
        assert not compilations


@pytest.mark.parametrize(("alpha", "every"), [(1.0, 1), (0.25, 1), (0.25, 2)])
def test_the_reference_moves_after_the_step_that_it_is_to_move_after(alpha: float, every: int, tmp_path: Path) -> None:
    changes = {**SYNCED, "loss.ref_model_mixup_alpha": alpha, "loss.ref_model_sync_steps": every}
    experiment = override(letters.config, changes)
    with RunLog(tmp_path / "run", experiment, display=display_of(experiment, quiet=True)) as log:
        trainer = make_trainer(experiment, log)
        expected = jax.device_get(trainer.reference)
        for done in (1, 2):
            trainer.step(done - 1)
            now = jax.device_get(trainer.state.trainable)
            if done % every == 0:
                expected = {path: (1 - alpha) * expected[path] + alpha * now[path] for path in now}
            for path, value in jax.device_get(trainer.reference).items():
                np.testing.assert_allclose(value, expected[path], rtol=1e-6, atol=1e-7)


def test_the_actor_of_a_run_under_way_is_the_policy_as_it_is_now(tmp_path: Path) -> None:
    """Updates overwrite the arrays that they replace: a copy of the actor from before an update is of no use."""
    with RunLog(tmp_path / "run", letters.config, display=display_of(letters.config, quiet=True)) as log:
        trainer = make_trainer(letters.config, log)
        before = trainer.actor.trainable
        trainer.step(0)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        assert not any(x.is_deleted() for x in jax.tree.leaves((trainer.actor.trainable, trainer.actor.frozen)))
        context: StepContext = trainer.context()
        assert context.sample(1, [0, 1, 2, 3], range(4)).mask.any()
