"""Mini-batches: which completions share one, what is updated on it, and that the devices change nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import letters
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.algorithms import Batch
from grpo_jax.algorithms.minibatches import lay_out, minibatch, shared_out
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, group_parts, override
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.sharding import Replicas
from grpo_jax.training import Trainer, starting_policy, train
from grpo_jax.update import metrics_of


def numbered(num_prompts: int, group_size: int) -> Batch:
    """A batch whose tokens say which completion they are of, and whose prompts say which prompt they are."""
    number = np.arange(num_prompts * group_size).reshape(num_prompts, group_size, 1)
    full, prompt = np.ones(number.shape, bool), np.arange(num_prompts)
    return Batch(prompt[:, None], prompt, number, full, full, number * 1.0, number[..., 0] * 1.0, full[..., 0])


def changed(**changes: Any) -> Experiment:
    return override(letters.config, {key.replace("__", "."): value for key, value in changes.items()})


def members(config: Experiment, batch: Batch, step: int, replicas: Replicas) -> list[set[int]]:
    """The completions of each mini-batch, as the devices have them."""
    tokens, m = lay_out(config, batch, step, replicas).split(batch).tokens, config.num_minibatches
    pieces = tokens.reshape(replicas.count, m, -1)
    return [set(pieces[:, i].flat) for i in range(m)]


def test_groups_stay_whole_where_they_can_be_shared_out_and_else_have_as_few_parts_as_possible():
    assert group_parts(8, 4, 2) == 1
    assert group_parts(1, 128, 8) == 8  # one prompt on eight devices: 16 completions each
    assert group_parts(6, 4, 4) == 2  # 12 halves, 3 for each share
    assert group_parts(6, 4, 4, smallest=2) == 2
    assert group_parts(6, 4, 4, smallest=4) is None  # a loss that needs whole groups
    assert group_parts(3, 5, 2) is None


@given(shape=st.sampled_from([(4, 4), (2, 8), (8, 2), (1, 16)]), m=st.sampled_from([1, 2, 4]), step=st.integers(0, 9))
def test_which_completions_share_a_mini_batch_does_not_depend_on_devices_or_micro_batches(shape, m, step):
    batch = numbered(*shape)
    found = []
    for count, micro in ((1, 1), (2, 1), (4, 1), (1, 4), (2, 2)):
        config = changed(
            prompts_per_step=shape[0], group_size=shape[1], num_minibatches=m, gradient_accumulation_steps=micro
        )
        found.append(members(config, batch, step, Replicas(count)))
    assert all(other == found[0] for other in found)
    assert sorted(n for piece in found[0] for n in piece) == list(range(16))  # every completion once
    assert {len(piece) for piece in found[0]} == {16 // m}


def test_mini_batches_are_shuffled_anew_at_every_step_and_seed():
    batch, config = numbered(8, 2), changed(prompts_per_step=8, group_size=2, num_minibatches=4)
    of_steps = [members(config, batch, step, Replicas(1)) for step in (0, 1)]
    other_seed = members(override(config, {"seed": 5}), batch, 0, Replicas(1))
    assert of_steps[0] != of_steps[1] and of_steps[0] != other_seed
    assert of_steps[0] == members(config, batch, 0, Replicas(1))
    for piece in of_steps[0]:  # whole groups: with completion 2p comes 2p + 1
        assert {n ^ 1 for n in piece} == piece


@pytest.mark.parametrize(("count", "m"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_what_the_devices_find_comes_back_to_its_completion(count, m):
    batch, config = numbered(2, 8), changed(prompts_per_step=2, group_size=8, num_minibatches=m)
    layout = lay_out(config, batch, 3, Replicas(count))
    placed = layout.split(batch)
    np.testing.assert_array_equal(layout.gather(placed.tokens), batch.tokens)
    # Each part of a group keeps its prompt.
    assert np.asarray(placed.prompts[..., 0] == placed.tokens[..., 0, 0] // 8).all()
    first = jax.tree.map(lambda x: np.stack([minibatch(x[d], 0, m) for d in range(count)]), placed.tokens)
    expected = np.where(np.isin(batch.tokens, first), batch.tokens, 0)
    np.testing.assert_array_equal(layout.gather_first(first), expected)


def test_batches_that_cannot_be_shared_out_are_refused_before_training(tmp_path):
    config = changed(prompts_per_step=3, group_size=5, devices=2)
    with pytest.raises(
        UserError, match=r"3 groups of 5 completions cannot be shared equally by 2 devices .* multiple of 2"
    ):
        shared_out(config)
    with pytest.raises(UserError, match="cannot be shared equally"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()  # nor is anything left of a run that was refused
    config = changed(prompts_per_step=8, group_size=1, method="sft", devices=4, gradient_accumulation_steps=1)
    assert shared_out(config).count == 4
    config = changed(prompts_per_step=12, group_size=1, method="sft", devices=4, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"by 4 devices in 1 mini-batch\(es\) of 2 micro-batch\(es\): .* multiple of 8"):
        shared_out(config)
    own_loss = changed(prompts_per_step=1, group_size=8, devices=8, loss=lambda inputs: (inputs.logprobs, {}))
    with pytest.raises(UserError, match="1 groups of 8 completions cannot be shared equally by 8 devices"):
        shared_out(own_loss)  # it may compare the completions of a group
    assert shared_out(changed(prompts_per_step=1, group_size=8, devices=8)).count == 8


def test_the_metrics_of_a_step_are_means_over_its_last_pass():
    def output(loss: float, gap: float, skipped: int, empty: int) -> dict[str, Any]:
        counts = {"skipped_updates": np.int32(skipped), "empty_updates": np.int32(empty)}
        return {"loss": np.float32(loss), "sampling/gap": np.float32(gap), **counts}

    outputs = [output(9, 0.5, 0, 0), output(8, 1.5, 0, 1), output(2, 2.5, 0, 0), output(4, 3.5, 1, 1)]
    counts = {"skipped_updates": 1.0, "empty_updates": 2.0}  # the last value; how many of all four
    assert metrics_of(outputs, 2) == {"loss": 3.0, "sampling/gap": 0.5, **counts}
    counts = {"skipped_updates": 0.0, "empty_updates": 0.0}
    assert metrics_of(outputs[:1], 1) == {"loss": 9.0, "sampling/gap": 0.5, **counts}


def completions(run_dir: Path) -> list[tuple[str, float, float]]:
    rows = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    return [(row["completion"], row["reward"], row["advantage"]) for row in rows]


MANY = {"num_minibatches": 2, "num_iterations": 2, "steps": 1, "optimizer.schedule": "linear"}


def test_a_step_makes_an_update_on_each_mini_batch_in_each_pass(tmp_path: Path) -> None:
    config = override(letters.config, MANY)
    with RunLog(tmp_path / "run", config, display=display_of(config, quiet=True)) as log:
        trainer = Trainer(config, starting_policy(config, log), log)
        batch = trainer.algorithm.make_batch(trainer.context(), 0).batch
        state, flags = trainer.state, []
        update = trainer.update
        order = np.random.default_rng([config.seed, 0, 1]).permutation(4)  # of the 4 groups: two to each mini-batch
        pieces = [jax.tree.map(lambda x, i=i: x[order[2 * i : 2 * i + 2]], batch) for i in range(2)]
        by_hand = jax.tree.map(lambda x: x.copy(), state)
        for i, piece in enumerate([*pieces, *pieces]):
            first = np.array([i == 0])
            by_hand, _ = update(by_hand, trainer._actor.frozen, None, trainer.replicas.split(piece), first)

        def counted(*arguments: Any) -> Any:
            flags.append(bool(arguments[-1][0]))
            return update(*arguments)

        trainer.__dict__["update"] = counted
        trainer.step(0)
    assert flags == [True, False, False, False]
    for path, value in trainer.state.trainable.items():
        np.testing.assert_array_equal(value, by_hand.trainable[path])
    [row] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["learning_rate"] == pytest.approx(1e-2 * 1 / 4)  # the last of four updates, falling to 0


@pytest.mark.parametrize(
    "changes", [MANY, {"prompts_per_step": 1, "group_size": 16, "steps": 2}], ids=["mini-batches", "one group"]
)
def test_a_run_is_the_same_on_one_device_and_on_eight(tmp_path: Path, changes: dict[str, Any]) -> None:
    results = [
        train(override(letters.config, {**changes, "group_size": 16, "devices": n}), tmp_path / str(n), quiet=True)
        for n in (1, 8)
    ]
    one, eight = (completions(tmp_path / str(n)) for n in (1, 8))
    assert [row[:2] for row in one] == [row[:2] for row in eight]
    np.testing.assert_allclose([row[2] for row in one], [row[2] for row in eight], atol=1e-6)
    for path, value in results[0].policy.params.items():
        np.testing.assert_allclose(value, results[1].policy.params[path], atol=2e-5)


def test_epochs_say_how_many_steps_there_are() -> None:
    # Six examples, four a step: two passes are 12 examples, three steps; half a pass is 3 examples, one step.
    assert changed(steps=None, epochs=2).num_steps == 3
    assert changed(steps=None, epochs=0.5).num_steps == 1
    assert changed(steps=7).num_steps == 7
    for changes in (dict(epochs=2), dict(steps=None), dict(steps=None, epochs=0)):
        with pytest.raises(UserError, match=r"Experiment\.(steps|epochs) = .* must be"):
            changed(**changes)


INERT: dict[str, Callable[[], Experiment]] = {
    r"loss.epsilon_high is set, but it cannot act here: with one update": lambda: changed(loss__epsilon_high=0.28),
    r"loss.importance_sampling_level is set, but": lambda: changed(loss__importance_sampling_level="sequence"),
    r"ppo.cliprange_value is set, but": lambda: changed(method="ppo", ppo__cliprange_value=0.5),
    r"reward.retries is set, but .* 'retry' alone": lambda: changed(reward__retries=5),
    r"reward.max_failure_rate is set, but .* 'drop' alone": lambda: changed(reward__max_failure_rate=0.1),
    r"AdvantageConfig.ddof = 1 is out of range: it must be 0 with scale 'none'": lambda: changed(
        advantages__scale="none", advantages__ddof=1
    ),
    r"num_minibatches = 2 .* 1 for loss_type 'reinforce'": lambda: changed(
        loss__loss_type="reinforce", num_minibatches=2
    ),
    r"dynamic_sampling_rounds .* must be 0 with group_size = 1": lambda: changed(
        group_size=1, advantages__baseline="none", advantages__scale="whiten", dynamic_sampling_rounds=1
    ),
    r"group_size = 1 is out of range: it must be at least 2": lambda: changed(group_size=1, advantages__scale="none"),
}


@pytest.mark.parametrize("says", INERT)
def test_an_option_that_cannot_act_is_an_error(says: str) -> None:
    with pytest.raises(UserError, match=says):
        INERT[says]()


def test_the_same_options_are_taken_where_they_act() -> None:
    changed(loss__epsilon_high=0.28, num_minibatches=2)
    changed(loss__epsilon_high=0.28, num_iterations=2)
    changed(loss__epsilon_high=0.28, policy__dtype="bfloat16")  # whose rounding moves ratios
    changed(loss__loss_type="cispo", loss__epsilon_high=5.0)  # a bound of the weight of every token
    changed(group_size=1, advantages__baseline="none", advantages__scale="whiten")


def metrics_rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "grad_norm" in row]


def test_the_kl_in_the_reward_is_to_the_policy_that_training_began_with(tmp_path: Path) -> None:
    changes = {
        "steps": 2, "seed": 1, "prompts_per_step": 8, "group_size": 1, "advantages.scale": "whiten",
        "advantages.baseline": "none", "advantages.kl_coef": 50.0, "advantages.kl_level": "token",
    }  # fmt: skip
    for n in (1, 4):
        train(override(letters.config, {**changes, "devices": n}), tmp_path / str(n), quiet=True)
    first, second = metrics_rows(tmp_path / "1")
    assert (first["kl"], first["objective/kl"]) == (0, 0)  # nothing has been trained yet
    assert abs(second["kl"]) > 1e-4
    assert second["objective/kl"] == pytest.approx(second["kl"] * second["completions/mean_length"], rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "1" / "completions.jsonl").read_text().splitlines()]
    # Without a KL a completion's tokens all have its reward, scaled over all tokens.
    by_token = np.repeat([row["reward"] for row in rows[:8]], [row["tokens"] for row in rows[:8]])
    expected = [(row["reward"] - by_token.mean()) / by_token.std() for row in rows]
    advantages = [row["advantage"] for row in rows]
    np.testing.assert_allclose(advantages[:8], expected[:8], rtol=1e-5)
    on_four = completions(tmp_path / "4")
    assert [row[0] for row in on_four] == [row["completion"] for row in rows]
    np.testing.assert_allclose([row[2] for row in on_four], advantages, atol=1e-3)
