"""The policy of a run at one of its checkpoints."""

import json
from pathlib import Path

import jax
import letters
import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import to_dict
from grpo_jax.runs import checkpoints
from grpo_jax.runs.restore import restore_policy, source_policy


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with the checkpoints of steps 20 and 40: its start times 2 and times 4."""
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(letters.config)))
    params = source_policy(letters.config).params
    for step, scale in ((20, 2.0), (40, 4.0)):
        checkpoints.save(tmp_path / "checkpoints", step, {"trainable": jax.tree.map(lambda x, s=scale: s * x, params)})
    return tmp_path


@pytest.mark.parametrize(("step", "scale"), [(None, 4.0), (20, 2.0), (40, 4.0)])
def test_the_policy_is_that_of_the_step_that_is_asked_for_and_else_the_newest(run, step, scale):
    start = source_policy(letters.config).params
    for name, values in restore_policy(run, step).params.items():
        np.testing.assert_array_equal(values, scale * np.asarray(start[name]))


def test_a_step_that_is_not_kept_lists_those_that_are(run):
    with pytest.raises(UserError, match="keeps no checkpoint of step 30: it keeps those of step 20 and 40"):
        restore_policy(run, 30)
