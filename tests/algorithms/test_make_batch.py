"""What each method trains on in a step, worked by hand from scripted completions."""

from dataclasses import replace
from typing import Any

import letters
import numpy as np
import pytest
from scripted import Scripted, context_of

from grpo_jax.algorithms import DPO, GRPO, RFT, TrainBatch, algorithm_of
from grpo_jax.algorithms.batches import schedule
from grpo_jax.algorithms.pairs import labelled_pairs
from grpo_jax.experiment import Experiment, override

ANSWERS = ["aaa", "ab", "b", "abcd"]  # with share_of_a: 1, 1/3, 0, 1/3; the last is cut off at three tokens


def length(*, completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def made(overrides: dict[str, Any], step: int = 0, answers: Any = ANSWERS) -> tuple[TrainBatch, Scripted]:
    """The batch of a step whose samples 0 to 3 are the answers, and the generator that gave them."""
    config = override(letters.config, {"sampling.max_tokens": 3, **overrides})
    generator = Scripted((lambda prompt, sample: answers[sample % 4]) if isinstance(answers, list) else answers)
    return algorithm_of(config).make_batch(context_of(config, generator), step), generator


def test_a_batch_holds_what_was_sampled_and_its_rewards() -> None:
    train_batch, generator = made({})
    batch = train_batch.batch
    stop = generator.tokenizer.stop_ids[0]
    a, b, c = generator.tokenizer.encode("abc")
    assert batch.tokens[0].tolist() == [[a, a, a], [a, b, stop], [b, stop, 0], [a, b, c]]
    assert batch.mask[0].tolist() == [[True] * 3, [True] * 3, [True, True, False], [True] * 3]
    np.testing.assert_allclose(batch.rewards, np.tile([1, 1 / 3, 0, 1 / 3], (4, 1)), rtol=1e-6)
    assert batch.sample_mask.all() and train_batch.new_tokens == 4 * 11
    assert [row["completion"] for row in train_batch.rows[:4]] == ["aaa", "ab", "b", "abc"]


def test_completions_that_were_cut_off_are_masked_and_the_others_are_not() -> None:
    batch = made({"loss.mask_truncated_completions": True})[0].batch
    assert batch.mask.any(-1)[0].tolist() == [False, True, True, False]  # "aaa" and "abc" have no stop token
    np.testing.assert_allclose(batch.rewards[0], [1, 1 / 3, 0, 1 / 3], rtol=1e-6)  # they still count in the baseline


def test_normalize_then_sum_reaches_what_advantages_are_made_from() -> None:
    rewards = {"share_of_a": letters.share_of_a, "length": length}
    options = {"rewards": rewards, "reward.combine": "normalize_then_sum", "advantages.scale": "none"}
    train_batch, _ = made({**options, "reward.weights": {"length": 2.0}})
    shares, lengths = np.array([1, 1 / 3, 0, 1 / 3]), np.array([3.0, 2.0, 1.0, 3.0])
    expected = (shares - shares.mean()) / shares.std() + 2 * (lengths - lengths.mean()) / lengths.std()
    np.testing.assert_allclose(train_batch.batch.rewards, np.tile(expected, (4, 1)), rtol=1e-5)
    assert train_batch.metrics["reward"] == pytest.approx(np.mean(shares + 2 * lengths))  # reported as it was paid


def test_refilling_rounds_take_the_prompts_after_the_last_step() -> None:
    config = override(letters.config, {"dynamic_sampling_rounds": 2, "steps": 5})
    train_batch, generator = made({"dynamic_sampling_rounds": 2, "steps": 5}, step=1, answers=lambda prompt, g: "b")
    assert train_batch.metrics["dynamic_sampling/rounds"] == 2  # no group ever has a signal
    # Rounds 1 and 2 of step 1 of 5 have the prompts that steps 6 and 11 would have.
    for (prompts, _, _), step in zip(generator.calls, (1, 6, 11), strict=True):
        indices, _ = schedule(config.seed, step, 4, len(config.task.train))
        assert [e["prompt"] for e in prompts.examples] == [config.task.train[i]["prompt"] for i in indices]


def test_tokens_of_groups_that_were_replaced_count_as_sampled() -> None:
    train_batch, _ = made({"dynamic_sampling_rounds": 2}, answers=lambda prompt, sample: "b")
    # 3 rounds of 4 prompts with 4 samples each, of the two tokens "b" and its end; one round is trained on.
    assert train_batch.new_tokens == 3 * 4 * 4 * 2 == 3 * train_batch.batch.mask.sum()


@pytest.mark.parametrize(
    "options",
    [{"method": "rft", "rft.samples_from": "start"}, {"method": "dpo"}, {"method": "reward_model"}],
)
def test_what_learns_from_the_start_does_not_ask_the_policy_of_now(options: dict[str, Any]) -> None:
    config = override(letters.config, options)
    now, start = Scripted(lambda prompt, sample: "b"), Scripted(lambda prompt, sample: ANSWERS[sample])
    algorithm_of(config).make_batch(replace(context_of(config, now), start=start), 0)
    assert (len(now.calls), len(start.calls)) == (0, 1)


@pytest.mark.parametrize(
    ("answers", "imitated"),
    [(ANSWERS, [True, False, False, False]), (["ab"] * 4, [False] * 4), (["ab", "b", "ab", "c"], [True] + [False] * 3)],
)
def test_rft_imitates_the_first_best_of_a_group_and_none_of_equal_rewards(answers: list[str], imitated: list[bool]):
    train_batch, _ = made({"method": "rft"}, answers=answers)
    assert train_batch.batch.sample_mask.tolist() == [imitated] * 4
    assert train_batch.metrics["frac_imitated"] == np.mean(imitated)


def test_dpo_puts_the_chosen_completion_first_and_does_not_train_on_ties() -> None:
    batch = made({"method": "dpo"}, answers=["b", "aaa", "ab", "ac"])[0].batch  # 0 < 1; 1/3 = 1/3
    a, b = Scripted(lambda *_: "").tokenizer.encode("ab")
    assert batch.tokens[:, :2, 0].tolist() == [[a, b]] * 4
    assert batch.sample_mask.tolist() == [[True, True, False, False]] * 4


def test_each_completion_of_a_pair_is_logged_with_its_own_reward_and_label() -> None:
    rows = made({"method": "dpo"}, answers=["b", "aaa", "ab", "cc"])[0].rows  # of each prompt: 0 < 1 and 1/3 > 0
    logged = [(row["completion"], row["reward"], row["rewards"]["share_of_a"], row["label"]) for row in rows]
    first = [("aaa", 1, 1, "chosen"), ("b", 0, 0, "rejected")]
    second = [("ab", 1 / 3, 1 / 3, "chosen"), ("cc", 0, 0, "rejected")]
    assert logged == [*first, *second] * 4


def test_after_epoch_steps_the_same_pairs_come_again() -> None:
    named = []
    for step in (0, 1, 2, 3):
        [(_, noise, _)] = made({"method": "dpo", "preferences.epoch_steps": 2}, step=step)[1].calls
        named.append((int(noise.step), noise.prompt_ids.tolist()))
    assert named[2:] == named[:2] and [step for step, _ in named] == [0, 1, 0, 1]


def test_label_noise_is_named_by_the_step() -> None:
    config = override(letters.config, {"method": "dpo", "group_size": 64, "preferences.noise_level": 0.5})
    context = context_of(config, Scripted(lambda prompt, sample: "aaa" if sample % 2 else "b"))

    def flipped(step: int) -> list[list[bool]]:
        return labelled_pairs(context, "train", [0, 1], [0, 1], step, range(64)).flipped.tolist()

    assert flipped(3) == flipped(3) != flipped(4)
    assert 0.2 < np.mean(flipped(3)) < 0.8


def test_every_method_says_whether_it_needs_the_policy_of_the_start() -> None:
    def needs(**overrides: Any) -> bool:
        config = override(letters.config, {key.replace("__", "."): value for key, value in overrides.items()})
        return algorithm_of(config).needs_reference(config)

    assert not needs() and needs(loss__beta=0.1)
    assert needs(method="ppo") and not needs(method="ppo", ppo__kl_coef=0.0)
    assert not needs(method="sft")
    assert not needs(method="rft") and needs(method="rft", rft__samples_from="start")
    assert needs(method="dpo") and needs(method="dpo", preferences__completions="demonstrations")
    assert needs(method="reward_model")
    assert not needs(method="reward_model", preferences__completions="demonstrations")


class Shortest(GRPO):
    """GRPO that trains on no completion longer than two tokens."""

    name = "shortest"

    def make_batch(self, context: Any, step: int) -> TrainBatch:
        train_batch = super().make_batch(context, step)
        short = train_batch.batch.mask.sum(-1) <= 2
        return replace(train_batch, batch=train_batch.batch._replace(sample_mask=short))


def test_a_method_of_ones_own_is_an_object_in_the_experiment() -> None:
    config: Experiment = override(letters.config, {"method": Shortest(), "sampling.max_tokens": 3})
    assert config.method_name == "shortest"
    batch = algorithm_of(config).make_batch(context_of(config, Scripted(lambda p, g: ANSWERS[g])), 0).batch
    assert batch.sample_mask.tolist() == [[False, False, True, False]] * 4
    assert isinstance(algorithm_of(override(config, {"method": "dpo"})), DPO)
    assert isinstance(algorithm_of(override(config, {"method": "rft"})), RFT)
