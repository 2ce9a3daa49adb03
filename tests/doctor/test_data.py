"""Checks of the task, each with what it must prove and what it must refute; nothing is compiled but advantages."""

import random
from dataclasses import replace
from typing import Any

import letters
import numpy as np
import pytest
from scripted import Scripted

from grpo_jax.doctor import Check, Subject, data, masks, rewards, text
from grpo_jax.errors import UserError
from grpo_jax.experiment import override
from grpo_jax.policy import Policy, load
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rollout import take_rows

ANSWERS = ["aaa", "ab", "b", "abcd"]  # with share_of_a: 1, 1/3, 0, 1/3; the last is cut off at three tokens
POLICY = load("scratch", scratch=letters.config.policy.scratch)


def subject_of(
    changes: dict[str, Any] | None = None, answer: Any = None, *, policy: Policy = POLICY, before: bool = False
) -> Subject:
    """A subject whose policy, moved or not, gives scripted answers."""
    subject = Subject(override(letters.config, changes or {}), policy, before)
    generator = Scripted(answer or (lambda prompt, sample: ANSWERS[sample % 4]))
    vars(subject).update(start_actor=generator, moved_actor=generator)
    return subject


def with_task(**changes: Any) -> dict[str, Any]:
    return {"task": replace(letters.task, **changes)}


def refuted(check: Check, words: str) -> None:
    assert (check.verdict, words in check.sentence) == ("refuted", True), check


# Splits and prompts ---------------------------------------------------------------------------------------------------


def test_splits_that_share_nothing_are_disjoint():
    check = data.splits_are_disjoint(subject_of(with_task(held_out=[{**letters.task.held_out[0]}])))
    assert (check.verdict, check.figures["shared"]) == ("proved", 0)


def test_examples_that_are_equal_in_both_splits_are_refuted():
    again = [{**letters.task.train[0]}, *letters.task.held_out]
    refuted(data.splits_are_disjoint(subject_of(with_task(held_out=again))), "1 of 5 held-out examples")


def test_an_overlap_that_nothing_is_evaluated_on_is_a_warning():
    changes = with_task(held_out=[{**letters.task.train[0]}]) | {"evaluation.splits": ("train",)}
    assert data.splits_are_disjoint(subject_of(changes)).verdict == "warning"


def test_a_task_that_is_evaluated_on_its_training_examples_says_so():
    check = data.splits_are_disjoint(subject_of(with_task(held_out=letters.task.train)))
    assert (check.verdict, check.measured) == ("warning", "6 of 6 shared") and "as the task declares" in check.sentence


def test_prompts_that_fit_are_counted_with_what_may_be_sampled():
    check = data.prompts_fit(subject_of())
    assert (check.verdict, check.figures["longest"], check.figures["new_tokens"]) == ("proved", 3, 3)


def test_a_prompt_that_does_not_fit_is_refuted():
    tight = replace(POLICY, config=replace(POLICY.config, max_positions=5))
    with pytest.raises(UserError, match="exceed the policy's context of 5"):
        data.prompts_fit(subject_of(policy=tight))


def test_all_completions_of_a_group_have_one_example():
    assert data.a_group_is_one_example(subject_of()).verdict == "proved"


def test_groups_that_mix_examples_are_refuted():
    subject = subject_of()
    first = subject.rollouts[0]
    vars(subject)["rollouts"] = [replace(first, examples=list(reversed(first.examples)))]
    refuted(data.a_group_is_one_example(subject), "not those of their examples")


def test_columns_that_differ_within_a_group_are_refuted():
    subject = subject_of()
    arguments = dict(subject.arguments)
    arguments["chosen"] = [str(i) for i in range(len(arguments["chosen"]))]
    vars(subject)["arguments"] = arguments
    refuted(data.a_group_is_one_example(subject), "completions of several examples")


# Seeds ----------------------------------------------------------------------------------------------------------------


def by_seed(generator: Scripted) -> None:
    """Has the scripted answers depend on the noise's names, as the sampler's do."""
    plain = Scripted.generate

    def generate(prompts: Any, noise: Any, sampling: Any) -> Any:
        rng = random.Random(f"{noise.seed} {noise.step}")
        said = {s: "".join(rng.choice("abcd") for _ in range(2)) for s in range(64)}
        return plain(Scripted(lambda prompt, sample: said[sample]), prompts, noise, sampling)

    generator.generate = generate  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["grpo", "ppo", "rft", "dpo", "sft", "reward_model"])
def test_a_seed_and_a_step_name_the_batch_of_every_method(method):
    subject = subject_of({"method": method})
    by_seed(subject.start_actor)
    assert data.seeds_name_the_batch(subject).verdict == "proved"


def test_a_generator_with_noise_of_its_own_is_refuted():
    rng = random.Random(0)
    refuted(data.seeds_name_the_batch(subject_of(answer=lambda prompt, sample: rng.choice("abcd"))), "differ in tokens")


def test_a_generator_that_ignores_the_seed_is_refuted():
    task = with_task(train=letters.task.train[:1])
    refuted(data.seeds_name_the_batch(subject_of(task)), "another seed makes the same batch")


def test_greedy_sampling_of_one_prompt_is_a_warning():
    changes = with_task(train=letters.task.train[:1]) | {"sampling.temperature": 0.0}
    assert data.seeds_name_the_batch(subject_of(changes)).verdict == "warning"


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"method": "sft"}, {"method": "sft", "sft.packing": True, "sft.max_length": 16}]
)
def test_stop_tokens_are_trained_on(changes):
    check = masks.stop_tokens_end_and_are_trained(subject_of(changes))
    assert check.verdict == "proved" and check.figures["stop_tokens_of_a_batch"] > 0


def test_a_mask_without_the_stop_tokens_is_refuted():
    subject = subject_of()
    batch = subject.train_batch.batch
    cut = replace(subject.train_batch, batch=batch._replace(mask=batch.mask & (batch.tokens != 2)))
    vars(subject)["train_batch"] = cut
    refuted(masks.stop_tokens_end_and_are_trained(subject), "8 of the 8 stop tokens of a batch are not trained on")
    refuted(masks.only_the_policys_tokens_are_trained(subject), "8 train on tokens that the policy did not write")


def test_a_completion_that_goes_on_after_its_stop_token_is_refuted():
    subject = subject_of()
    episode = subject.rollouts[0].episodes[0][2]
    episode.ids, episode.trained = [4, 2, 3], [True] * 3
    refuted(masks.stop_tokens_end_and_are_trained(subject), "1 turn that goes on after a stop token")


def test_a_completion_that_is_taken_for_ended_is_refuted():
    subject = subject_of()
    subject.rollouts[0].episodes[0][3].ended = True
    refuted(masks.stop_tokens_end_and_are_trained(subject), "1 completion wrongly taken")


def test_completions_that_never_end_are_a_warning():
    assert masks.stop_tokens_end_and_are_trained(subject_of(answer=lambda *_: "aaaa")).verdict == "warning"


def test_only_what_the_policy_wrote_is_trained_on():
    check = masks.only_the_policys_tokens_are_trained(subject_of())
    assert check.verdict == "proved" and check.figures["trained_tokens"] == 4 * 11


def test_completions_in_another_order_than_their_episodes_are_refuted():
    subject = subject_of()
    rollout = subject.train_batch.rollout
    mixed = take_rows(rollout, np.array([[1, 0, 2, 3]] * 4))
    vars(subject)["train_batch"] = replace(subject.train_batch, rollout=replace(mixed, tokens=rollout.tokens))
    refuted(masks.only_the_policys_tokens_are_trained(subject), "hold other tokens")


def test_packed_rows_have_no_episodes():
    packed = {"method": "sft", "sft.packing": True, "sft.max_length": 16}
    assert masks.only_the_policys_tokens_are_trained(subject_of(packed)).verdict == "not applicable"


# Rewards --------------------------------------------------------------------------------------------------------------


def rewarding(reward: Any, **changes: Any) -> Subject:
    return subject_of({"rewards": {"mine": reward}, **changes})


def test_a_reward_of_the_completion_alone_is_deterministic_finite_and_harmless():
    subject = subject_of()
    found = [rewards.rewards_are_deterministic, rewards.rewards_are_finite, rewards.rewards_leave_arguments_alone]
    assert [check(subject).verdict for check in found] == ["proved"] * 3
    assert rewards.rewards_are_finite(subject).figures["ranges"] == {"share_of_a": [0.0, 1.0]}


def test_a_reward_with_a_random_number_is_refuted():
    rng = random.Random(0)
    refuted(
        rewards.rewards_are_deterministic(rewarding(lambda *, completions, **_: [rng.random() for _ in completions])),
        "'mine' gives",
    )


def test_a_reward_that_depends_on_the_place_is_refuted():
    subject = rewarding(lambda *, completions, **_: [float(i) for i in range(len(completions))])
    refuted(rewards.rewards_are_deterministic(subject), "in another order")


def test_a_success_that_changes_is_refuted():
    rng = random.Random(0)
    task = with_task(success=lambda *, completions, **_: [rng.random() < 0.5 for _ in completions])
    refuted(rewards.rewards_are_deterministic(subject_of(task)), "'success' gives")


def test_a_reward_that_is_not_finite_is_refuted_or_dropped():
    def sometimes(*, completions, **_):
        return [float("nan") if "b" in completion else 1.0 for completion in completions]

    with pytest.raises(UserError, match="nan"):
        rewards.rewards_are_finite(rewarding(sometimes))
    dropping = {"reward.on_failure": "drop", "reward.max_failure_rate": 0.5}
    refuted(rewards.rewards_are_finite(rewarding(sometimes, **dropping)), "'mine' fails on 48 of 64 completions")
    dropping["reward.max_failure_rate"] = 0.9
    assert rewards.rewards_are_finite(rewarding(sometimes, **dropping)).verdict == "warning"


def test_a_reward_that_applies_nowhere_is_refuted():
    refuted(rewards.rewards_are_finite(rewarding(lambda *, completions, **_: [None] * len(completions))), "no reward")


def test_a_reward_that_sorts_its_arguments_is_refuted():
    def sorting(*, completions, **_):
        completions.sort()
        return [1.0 for _ in completions]

    refuted(rewards.rewards_leave_arguments_alone(rewarding(sorting)), "'mine' changes its arguments")


def test_groups_with_signal_are_counted_with_an_interval():
    check = rewards.rewards_differ_within_groups(subject_of())
    assert (check.verdict, check.figures["with_signal"], check.figures["groups"]) == ("proved", 16, 16)
    assert check.figures["low"] == pytest.approx(0.794, abs=1e-3)  # Clopper and Pearson: .025 ** (1 / 16)


@pytest.mark.parametrize("method", ["grpo", "ppo", "rft", "dpo"])
def test_a_reward_that_is_the_same_for_all_has_no_gradient(method):
    subject = rewarding(lambda *, completions, **_: [1.0 for _ in completions], method=method)
    refuted(rewards.rewards_differ_within_groups(subject), "there is no gradient")


def test_a_threshold_that_nothing_reaches_has_no_gradient():
    subject = subject_of({"method": "rft", "rft.select": "threshold", "rft.threshold": 2.0})
    refuted(rewards.rewards_differ_within_groups(subject), "there is no gradient")


def test_a_critic_needs_no_difference_within_a_group():
    by_prompt = rewarding(lambda *, prompts, **_: [float(len(prompt)) for prompt in prompts], method="ppo")
    assert rewards.rewards_differ_within_groups(by_prompt).verdict == "proved"


def test_pairs_of_demonstrations_are_what_a_preference_method_learns_from():
    changes = {"method": "dpo", "preferences.completions": "demonstrations"}
    check = rewards.rewards_differ_within_groups(subject_of(changes, lambda *_: "b"))
    assert check.verdict == "refuted"  # both demonstrations have two a's


def test_the_signal_before_a_warm_start_is_a_warning_and_without_rewards_there_is_none():
    assert rewards.rewards_differ_within_groups(subject_of(before=True)).verdict == "warning"
    assert rewards.rewards_differ_within_groups(subject_of({"method": "sft"})).verdict == "not applicable"


# Decoding -------------------------------------------------------------------------------------------------------------


def test_completions_that_decode_to_themselves_survive():
    assert text.completions_survive_decoding(subject_of()).verdict == "proved"


def test_a_completion_that_encodes_to_other_ids_is_a_warning():
    subject = subject_of()
    subject.rollouts[0].episodes[0][0].ids[0] = 1  # the begin token, which no text has
    subject.rollouts[0].episodes[0][0].turns[0] = "aa"
    check = text.completions_survive_decoding(subject)
    assert (check.verdict, check.figures["other_ids"]) == ("warning", 1)


def test_a_text_that_is_not_that_of_the_ids_is_refuted():
    subject = subject_of()
    subject.rollouts[0].episodes[0][0].turns[0] = "bbb"
    refuted(text.completions_survive_decoding(subject), "the texts of 1 of 64 completions are not those of their ids")


def test_tokenizers_without_a_template_have_no_round_trip():
    assert text.chat_template_round_trip(subject_of()).verdict == "not applicable"
    assert text.one_begin_token(subject_of()).verdict == "proved"


class Doubling(CharacterTokenizer):
    """Puts its begin token twice, as a template and a tokenizer that both add it."""

    def render(self, prompt: Any) -> list[int]:
        return [1, *super().render(prompt)]


def test_two_begin_tokens_are_refuted():
    policy = replace(POLICY, make_tokenizer=lambda: Doubling("abcd"))
    refuted(text.one_begin_token(subject_of(policy=policy)), "6 of 6 prompts begin with two begin tokens")
