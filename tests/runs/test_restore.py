"""What a run's config.json says of its policy, its sampling and its method, without any of the user's code."""

import json

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, LoRAConfig, Method, PolicyConfig, SamplingConfig, ScratchConfig, to_dict
from grpo_jax.policy import load, merge
from grpo_jax.runs import restore
from grpo_jax.runs.files import jsonable
from grpo_jax.update import State

SCRATCH = ScratchConfig("abcd", hidden_size=16, num_layers=1, num_heads=2)


class Mine(Method):
    name = "mine"


def write(run_dir, **fields) -> Experiment:
    config = Experiment(**{"task": None, "rewards": {"length": len}, **fields})
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text("{}")
    (run_dir / "config.json").write_text(json.dumps(jsonable(to_dict(config))))
    return config


def test_the_sampling_and_the_method_of_a_run_are_read_from_its_config(tmp_path):
    sampling = SamplingConfig(temperature=0.5, top_k=7, max_tokens=9)
    write(tmp_path, sampling=sampling)
    assert restore.sampling_of(tmp_path) == sampling and restore.method_of_run(tmp_path) == "grpo"
    write(tmp_path, method=Mine())
    assert restore.method_of_run(str(tmp_path)) == "mine"


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=3, targets=("q", "v"))])
def test_the_policy_that_a_run_began_with_is_read_from_its_config(tmp_path, lora):
    policy = PolicyConfig(lora=lora, scratch=SCRATCH, dtype="bfloat16", perturbation=0.5)
    write(tmp_path, policy=policy, seed=6)
    assert restore._policy_of(tmp_path) == (policy, 6)


def test_a_run_without_a_checkpoint_and_a_directory_without_a_run_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"is not the directory of a run: there is no run.json in it\."):
        restore.restore_policy(tmp_path)
    write(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        restore.restore_policy(tmp_path / "run")
    assert str(caught.value) == (
        f"the run {str(tmp_path / 'run')!r} has no checkpoint yet, so there is no tuned policy in it."
    )
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"is not the directory of a run: its config.json cannot be read\."):
        restore.sampling_of(tmp_path / "run")


def test_the_policy_of_an_experiment_is_made_from_its_seed_its_dtype_and_its_perturbation():
    def weights(seed: int = 0, **fields) -> dict:
        config = Experiment(
            task=None, rewards={"length": len}, policy=PolicyConfig(scratch=SCRATCH, **fields), seed=seed
        )
        policy = restore.source_policy(config)
        return {path: np.asarray(x, np.float32) for path, x in merge(policy.params, policy.lora).items()}

    plain = load("scratch", dtype="float32", seed=4, scratch=SCRATCH).params
    found = weights(4)
    assert found.keys() == plain.keys()
    for path, x in plain.items():
        np.testing.assert_array_equal(found[path], x)
    path = max(plain, key=lambda name: plain[name].size)
    assert not np.array_equal(weights(5)[path], plain[path])
    perturbed = weights(4, perturbation=1e-3)[path]
    assert 0 < np.abs(perturbed - plain[path]).max() <= 1e-2 * np.abs(plain[path]).max()
    assert not np.array_equal(weights(4, dtype="bfloat16")[path], plain[path])


def test_a_checkpoint_holds_the_state_the_reference_and_the_counts_of_tokens():
    fields = {name: number for number, name in enumerate(State._fields)}
    counts = {"tokens_seen": 5, "tokens_sampled": 7, "skipped_in_a_row": 2}
    found = restore.checkpoint(State(**fields), "reference", **counts)
    assert found == {**fields, "reference": "reference", **counts}
    assert set(restore.OPTIONAL_LEAVES) == {"tokens_sampled", "skipped_in_a_row"}
