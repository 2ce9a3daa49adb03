"""A run goes on with another number of devices: from the same parameters, and as it would have without the change."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import letters
import numpy as np
import pytest
from scripted import Scripted

from grpo_jax import training
from grpo_jax.experiment import Experiment, override
from grpo_jax.runs import checkpoints
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.runs.restore import source_policy

BASE = override(
    letters.config,
    {"method": "sft", "prompts_per_step": 8, "checkpoint_every": 1, "evaluation.num_prompts": 1},
)


def config(steps: int, devices: int) -> Experiment:
    return override(BASE, {"steps": steps, "devices": devices})


def run(run_dir: Path, experiment: Experiment) -> None:
    """Begins a run or goes on with it. What samples is a function, so that nothing but the update is compiled."""
    log = RunLog(run_dir, experiment, resume=True, display=display_of(experiment, quiet=True))
    training.run(experiment, log, lambda actor: Scripted(lambda prompt, sample: "aab"))


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def saved(run_dir: Path, step: int) -> dict[str, Any]:
    """Every array of a checkpoint, by name."""
    directory = run_dir / "checkpoints"
    metadata = checkpoints._metadata(checkpoints._arrays(directory, step))
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in metadata.items()}
    return checkpoints.restore(directory, like, step=step)[1]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Four steps on one device."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    run(run_dir, config(4, 1))
    return run_dir


def test_a_run_of_one_device_goes_on_with_four_and_eight_and_back_to_one(one, tmp_path):
    run_dir = tmp_path / "run"
    run(run_dir, config(1, 1))
    for done, devices in ((1, 4), (2, 8), (3, 1)):
        run(run_dir, config(done + 1, devices))
        assert checkpoints.latest_step(run_dir / "checkpoints") == done + 1
    np.testing.assert_allclose(losses(run_dir), losses(one), rtol=1e-5)
    for name, array in saved(run_dir, 4).items():
        np.testing.assert_allclose(array, saved(one, 4)[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_what_is_restored_is_what_was_saved_on_every_device(one, tmp_path, devices):
    run_dir = Path(shutil.copytree(one, tmp_path / "run"))
    experiment = config(4, devices)
    with RunLog(run_dir, experiment, resume=True, display=display_of(experiment, quiet=True)) as log:
        trainer = training.Trainer(experiment, source_policy(experiment), log)
        assert trainer.start.params == {}  # what was loaded is held once, on the devices
        assert trainer.load_checkpoint(run_dir / "checkpoints") == 4
        wanted = saved(one, 4)
        found = checkpoints._flatten(trainer.state._asdict())
        assert found.keys() <= wanted.keys() and len(found) > 10
        for name, placed in found.items():
            assert len(placed.addressable_shards) == devices
            for shard in placed.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data)[0], wanted[name])
