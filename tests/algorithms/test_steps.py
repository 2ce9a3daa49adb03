"""A step's batch of each method, whole: which completions it trains on, its counts, metrics, rows and histograms."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import letters
import numpy as np
import pytest
from scripted import Scripted, Talker, context_of

from grpo_jax.algorithms import GRPO, TrainBatch, algorithm_of
from grpo_jax.algorithms.batches import schedule
from grpo_jax.algorithms.pairs import labelled_pairs
from grpo_jax.errors import RunError
from grpo_jax.evaluation import NOISE_STEP
from grpo_jax.experiment import override

TRAIN = [example["prompt"] for example in letters.task.train]  # b c d bc cd db, of 2 and 3 tokens with the begin token
ANSWERS = ["aaa", "ab", "b", "abcd"]  # with share_of_a: 1, 1/3, 0, 1/3; the last is cut off at three tokens


def made(overrides: dict[str, Any], step: int = 0, answer: Any = None) -> tuple[TrainBatch, Scripted]:
    config = override(letters.config, overrides)
    generator = Scripted(answer or (lambda prompt, sample: ANSWERS[sample % 4]))
    return algorithm_of(config).make_batch(context_of(config, generator), step), generator


def scheduled(step: int, *, further: tuple[int, ...] = ()) -> tuple[list[int], list[int]]:
    """Examples and their names, of a step and of the further rounds that are at other steps' places."""
    occurred: Counter[int] = Counter()
    rounds = [schedule(0, place, 4, len(TRAIN), occurred=occurred) for place in (step, *further)]
    return [index for indices, _ in rounds for index in indices], [name for _, ids in rounds for name in ids]


# GRPO and PPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "ppo", "rft"])
def test_a_step_has_the_prompts_that_are_scheduled_for_it_and_their_names(method: str) -> None:
    train_batch, generator = made({"method": method}, step=4)  # 6 examples in steps of 4: epoch 2 ends in step 4
    indices, ids = scheduled(4)
    [(prompts, noise, _)] = generator.calls
    assert [example["prompt"] for example in prompts.examples] == [TRAIN[i] for i in indices]
    assert (int(noise.step), noise.prompt_ids.tolist()) == (4, ids)
    assert train_batch.rollout is not None and train_batch.rollout.prompt_ids.tolist() == ids
    assert [row["prompt_id"] for row in train_batch.rows[::4]] == ids


def test_a_step_counts_what_it_read_and_wrote() -> None:
    train_batch, _ = made({})
    indices, _ = scheduled(0)
    read = 4 * sum(1 + len(TRAIN[i]) for i in indices)
    assert (train_batch.tokens, train_batch.new_tokens) == (read + 4 * 11, 4 * 11)  # 3, 3, 2 and 3 tokens
    metrics = train_batch.metrics
    assert metrics["success"] == 1 / 4  # two a's: "aaa"
    assert metrics["reward"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 3) / 4)
    assert metrics["completions/clipped_ratio"] == 1 / 2 and metrics["completions/mean_length"] == 11 / 4
    assert not any(name.startswith("dynamic_sampling/") for name in metrics)
    assert train_batch.histograms["rewards"].tolist() == pytest.approx([1, 1 / 3, 0, 1 / 3] * 4)
    assert train_batch.histograms["completion_lengths"].tolist() == [[3, 3, 2, 3]] * 4


def test_a_completion_that_was_dropped_is_in_no_histogram_and_in_no_mean() -> None:
    def leaky(*, completions: list[str], **columns: Any) -> list[float]:
        return [math.nan if completion == "b" else float(len(completion)) for completion in completions]

    train_batch, _ = made({"rewards": {"leaky": leaky}, "reward.on_failure": "drop"})
    assert train_batch.batch.sample_mask.tolist() == [[True, True, False, True]] * 4
    assert train_batch.histograms["rewards"].tolist() == [3, 2, 3] * 4
    assert (train_batch.metrics["reward"], train_batch.metrics["frac_dropped"]) == (pytest.approx(8 / 3), 1 / 4)


def by_round(prompt: str, sample: int) -> str:
    """Groups of "b", "c" and "d" have no signal, those of the longer prompts have."""
    return "b" if len(prompt) == 1 else ANSWERS[sample]


def test_groups_of_a_further_round_bring_all_that_is_theirs() -> None:
    step = next(s for s in range(9) if 0 < sum(len(TRAIN[i]) == 1 for i in scheduled(s)[0]) < 3)
    changes = {"dynamic_sampling_rounds": 3, "steps": 5}
    train_batch, generator = made(changes, step=step, answer=by_round)
    places, ids = scheduled(step, further=(step + 5, step + 10, step + 15))
    rounds = len(generator.calls)
    signals = [len(TRAIN[i]) > 1 for i in places[: 4 * rounds]]
    assert sum(signals) >= 4 > sum(signals[: 4 * (rounds - 1)]) and rounds > 1  # it stopped as soon as there were four
    assert [noise.prompt_ids.tolist() for _, noise, _ in generator.calls] == [
        ids[4 * r : 4 * r + 4] for r in range(rounds)
    ]
    assert {int(noise.step) for _, noise, _ in generator.calls} == {step}
    later = iter([place for place in range(4, 4 * rounds) if signals[place]])
    chosen = [place if signals[place] else next(later) for place in range(4)]
    rows = train_batch.rows
    assert [row["prompt_id"] for row in rows] == [ids[place] for place in chosen for _ in range(4)]
    assert [row["prompt"] for row in rows[::4]] == [TRAIN[places[place]] for place in chosen]
    assert [row["completion"] for row in rows] == ["aaa", "ab", "b", "abc"] * 4
    assert [row["reward"] for row in rows] == pytest.approx([1, 1 / 3, 0, 1 / 3] * 4)
    assert [row["rewards"]["share_of_a"] for row in rows] == [row["reward"] for row in rows]
    np.testing.assert_allclose(train_batch.batch.rewards, [[1, 1 / 3, 0, 1 / 3]] * 4, rtol=1e-6)
    assert train_batch.batch.sample_mask.all()
    metrics, first = train_batch.metrics, sum(signals[:4])
    assert metrics["dynamic_sampling/rounds"] == rounds - 1 and metrics["dynamic_sampling/groups_with_signal"] == 4
    # What is reported of the completions is of the first round alone, what they cost is of all.
    assert metrics["frac_reward_zero_std"] == (4 - first) / 4
    assert metrics["reward"] == pytest.approx(first * (5 / 3) / 4 / 4) and metrics["success"] == first / 16
    new = 4 * (2 * (4 * rounds - sum(signals))) + 11 * sum(signals)
    read = 4 * sum(1 + len(TRAIN[i]) for i in places[: 4 * rounds])
    assert (train_batch.new_tokens, train_batch.tokens) == (new, read + new)
    assert train_batch.histograms["rewards"].tolist() == pytest.approx([1, 1 / 3, 0, 1 / 3] * 4)


def test_no_further_round_is_sampled_where_the_first_has_a_signal_everywhere() -> None:
    train_batch, generator = made({"dynamic_sampling_rounds": 3})
    assert len(generator.calls) == 1 and train_batch.metrics["dynamic_sampling/rounds"] == 0
    assert train_batch.metrics["dynamic_sampling/groups_with_signal"] == 4


@pytest.mark.parametrize("scale", ["none", "group"])
def test_the_group_that_is_shown_is_the_first_held_out_prompts(scale: str) -> None:
    config = override(letters.config, {"advantages.scale": scale, "seed": 3, "prompts_per_step": 6})
    generator = Scripted(lambda prompt, sample: ANSWERS[sample] if prompt == "bd" else "dd")
    rows = GRPO().sample_group(context_of(config, generator))
    [(prompts, noise, sampling)] = generator.calls
    # As many prompts as a step has, four of them held out.
    assert [e["prompt"] for e in prompts.examples] == ["bd", "cb", "dc", "b", "bd", "cb"]
    assert (int(noise.seed), int(noise.step), noise.prompt_ids.tolist()) == (3, NOISE_STEP, [0, 1, 2, 3, 4, 5])
    assert noise.samples.shape == (6, 4) and sampling == config.sampling
    assert [(row["prompt"], row["prompt_id"], row["sample"]) for row in rows] == [("bd", 0, g) for g in range(4)]
    assert [row["completion"] for row in rows] == ["aaa", "ab", "b", "abc"]
    paid = np.array([1, 1 / 3, 0, 1 / 3])
    assert [row["reward"] for row in rows] == pytest.approx(paid.tolist())
    expected = (paid - paid.mean()) / (paid.std() if scale == "group" else 1)
    assert [row["advantage"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_shown_advantage_by_token_is_the_mean_over_its_completions_tokens() -> None:
    def by_place(rewards: Any, mask: Any, token_mask: Any) -> Any:
        return rewards[..., None] * token_mask * np.arange(1, 1 + token_mask.shape[-1])

    config = override(letters.config, {"advantages": by_place, "sampling.max_tokens": 6})
    rows = GRPO().sample_group(context_of(config, Scripted(lambda p, sample: ["aaa", "a", "b", "bbbba"][sample])))
    # With the end 4, 2, 2 and 6 tokens, whose places are 2.5, 1.5, 1.5 and 3.5 on average.
    assert [row["advantage"] for row in rows] == pytest.approx([1 * 2.5, 1 / 3 * 1.5, 0, 1 / 3 * 3.5])


@pytest.mark.parametrize("method", ["grpo", "rft"])
def test_what_the_environment_says_is_read_and_not_written(method: str) -> None:
    task = replace(letters.task, reply=lambda example, turns: "cc", max_turns=2)
    config = override(letters.config, {"task": task, "method": method})
    talker = Talker(lambda prompt, sample: "a" if sample < 10 else "bb")
    train_batch = algorithm_of(config).make_batch(context_of(config, talker), 0)
    read = 4 * sum(1 + len(TRAIN[i]) for i in scheduled(0)[0])
    # "a" and its end, "cc" from the environment, "bb" and its end: five of seven tokens are the policy's.
    assert (train_batch.new_tokens, train_batch.tokens) == (16 * 5, read + 16 * 7)
    assert train_batch.histograms["completion_lengths"].tolist() == [[5] * 4] * 4
    assert train_batch.metrics["completions/mean_length"] == 5 and train_batch.rows[0]["tokens"] == 5
    assert train_batch.batch.valid.sum() == 16 * 7 and train_batch.batch.mask.sum() == 16 * 5


# Imitation ------------------------------------------------------------------------------------------------------------


def test_rft_reports_all_completions_and_marks_those_that_it_imitates() -> None:
    train_batch, _ = made({"method": "rft"})
    indices, _ = scheduled(0)
    read = 4 * sum(1 + len(TRAIN[i]) for i in indices)
    assert (train_batch.tokens, train_batch.new_tokens) == (read + 44, 44)
    assert [row["imitated"] for row in train_batch.rows] == [True, False, False, False] * 4
    assert [row["completion"] for row in train_batch.rows[:4]] == ["aaa", "ab", "b", "abc"]
    assert train_batch.metrics["reward"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 3) / 4)
    assert train_batch.metrics["frac_dropped"] == 0 and train_batch.metrics["success"] == 1 / 4
    assert train_batch.histograms["rewards"].tolist() == pytest.approx([1, 1 / 3, 0, 1 / 3] * 4)
    assert train_batch.histograms["completion_lengths"].tolist() == [[3, 3, 2, 3]] * 4
    np.testing.assert_allclose(train_batch.batch.rewards, [[1, 1 / 3, 0, 1 / 3]] * 4, rtol=1e-6)


def test_rft_imitates_at_the_threshold_and_nothing_that_was_dropped() -> None:
    # A dropped completion has the reward 0 in the arrays, which here is as good as any.
    def half(*, completions: list[str], **columns: Any) -> list[float]:
        return [{"aaa": math.nan, "ab": -0.5, "b": 0.0}.get(completion, -0.75) for completion in completions]

    options = {"rewards": {"half": half}, "reward.on_failure": "drop"}
    train_batch, _ = made({"method": "rft", "rft.select": "threshold", "rft.threshold": -0.5, **options})
    assert train_batch.batch.sample_mask.tolist() == [[False, True, True, False]] * 4
    assert train_batch.metrics["frac_imitated"] == 1 / 2 and train_batch.metrics["frac_dropped"] == 1 / 4
    best, _ = made({"method": "rft", **options})
    assert best.batch.sample_mask.tolist() == [[False, False, True, False]] * 4  # the best of those that count


def sft(step: int = 0, **overrides: Any) -> TrainBatch:
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    train_batch, generator = made({"method": "sft", "group_size": 2, **changes}, step=step)
    assert not generator.calls  # nothing is sampled
    return train_batch


def test_sft_shows_the_scheduled_prompts_demonstrations() -> None:
    train_batch = sft(step=3)
    indices, ids = scheduled(3)
    assert train_batch.rollout is not None and train_batch.rollout.prompt_ids.tolist() == ids
    prompts = [e["prompt"] for e in train_batch.rollout.examples]
    assert prompts == [TRAIN[i] for i in indices]
    assert train_batch.batch.mask.sum(-1).tolist() == [[4, 4]] * 4  # "aab" or "aba" and the end
    assert train_batch.new_tokens == 4 * 2 * 4 and train_batch.rows == [] and train_batch.metrics == {}
    assert train_batch.tokens == 2 * sum(1 + len(prompt) for prompt in prompts) + 32


def test_demonstrations_are_named_by_seed_and_step_too() -> None:
    def said(**options: Any) -> list[list[list[str]]]:
        rollout = sft(group_size=16, **options).rollout
        assert rollout is not None
        return [[episode.turns for episode in group] for group in rollout.episodes]

    assert said() == said() and said(seed=1) != said()
    one = replace(letters.task, train=letters.task.train[:1])  # of the same name in every step
    shown = said(task=one)
    assert shown != said(task=one, step=3) and shown[0] != shown[1]  # and another name in each of a step's places


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("completion_only", [False, True])
def test_whole_examples_are_prompt_and_completion_in_one_row(packing: bool, completion_only: bool) -> None:
    options = {"sft.completion_only_loss": completion_only, "sft.packing": packing}
    if packing:
        options["sft.max_length"] = 14
    train_batch = sft(**options)
    if completion_only and not packing:
        assert train_batch.rollout is not None and not train_batch.metrics
        return
    batch, (indices, _) = train_batch.batch, scheduled(0)
    assert train_batch.rollout is None and batch.segments is not None
    tokenizer = Scripted(lambda *_: "").tokenizer
    found = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            place = batch.segments[row, 0] == segment
            found.append((batch.tokens[row, 0][place].tolist(), batch.mask[row, 0][place].tolist()))
    assert len(found) == 8
    starts = [tokenizer.render(TRAIN[i]) for i in indices for _ in range(2)]
    for start, (ids, learned) in zip(sorted(starts), sorted(found), strict=True):
        assert ids[: len(start)] == start and tokenizer.decode(ids[len(start) :]) in ("aab", "aba") and ids[-1] == 2
        assert learned == [False] + [not completion_only] * (len(start) - 1) + [True] * 4
    assert batch.tokens.shape[-1] == (14 if packing else 8)  # the longest has 3 + 4 tokens, whose bucket is 8
    assert train_batch.metrics["packing/efficiency"] == sum(len(ids) for ids, _ in found) / batch.tokens.size
    assert (train_batch.tokens, train_batch.new_tokens) == (sum(len(ids) for ids, _ in found), 32)


def test_what_the_environment_says_is_shown_and_not_learned() -> None:
    task = replace(letters.task, reply=lambda e, turns: "cc", max_turns=2, demonstrate=lambda e, rng: ["a", "bb"])
    options = {"task": task, "sampling.max_tokens": 3}
    grouped, whole = sft(**options), sft(**options, sft__completion_only_loss=False)
    assert grouped.new_tokens == whole.new_tokens == 8 * 5 and grouped.tokens == whole.tokens
    prompts = sum(1 + len(TRAIN[i]) for i in scheduled(0)[0])
    assert whole.tokens == 2 * prompts + 8 * 7
    # Of a whole example the prompt but its first token is learned, and the five tokens that are the policy's.
    assert whole.batch.mask.sum() == 2 * (prompts - 4) + 8 * 5


def test_rows_divide_among_devices_and_micro_batches() -> None:
    config = override(
        letters.config,
        {"method": "sft", "group_size": 1, "sft.completion_only_loss": False, "gradient_accumulation_steps": 2},
    )
    generator = Scripted(lambda *_: "", batch_multiple=5)
    batch = algorithm_of(config).make_batch(context_of(config, generator), 0).batch
    assert len(batch.tokens) == 10 and batch.mask.any((1, 2)).sum() == 4


# Preferences ----------------------------------------------------------------------------------------------------------


def test_a_step_of_pairs_says_how_many_there_are_and_what_they_were_paid() -> None:
    answers = ["b", "aaa", "ab", "ac"]  # 0 < 1, and 1/3 = 1/3 is a tie
    train_batch, generator = made({"method": "dpo"}, step=2, answer=lambda prompt, sample: answers[sample])
    indices, ids = scheduled(2)
    [(prompts, noise, _)] = generator.calls
    assert [e["prompt"] for e in prompts.examples] == [TRAIN[i] for i in indices]
    assert (int(noise.step), noise.prompt_ids.tolist(), noise.samples[0].tolist()) == (2, ids, [0, 1, 2, 3])
    metrics = train_batch.metrics
    assert (metrics["preferences/pairs"], metrics["preferences/frac_tied"]) == (4, 1 / 2)
    assert metrics["preferences/frac_flipped"] == 0 and metrics["reward"] == pytest.approx((0 + 1 + 1 / 3 + 1 / 3) / 4)
    read = 4 * sum(1 + len(TRAIN[i]) for i in indices)
    assert (train_batch.tokens, train_batch.new_tokens) == (read + 4 * 11, 4 * 11)
    assert [row["label"] for row in train_batch.rows] == ["chosen", "rejected", "tied", "tied"] * 4
    assert [row["prompt_id"] for row in train_batch.rows] == [i for i in ids for _ in range(4)]


def test_flipped_labels_are_a_share_of_those_that_there_are() -> None:
    answers = ["b", "aaa", "ab", "ac"]
    options = {"method": "dpo", "preferences.noise_level": 0.45, "prompts_per_step": 6}
    train_batch, _ = made(options, answer=lambda prompt, sample: answers[sample])
    chosen = [row["completion"] for row in train_batch.rows if row["label"] == "chosen"]
    assert len(chosen) == 6 and set(chosen) == {"aaa", "b"}  # some of either
    assert train_batch.metrics["preferences/frac_flipped"] == chosen.count("b") / 6
    paid = {"aaa": 1, "b": 0, "ab": 1 / 3, "ac": 1 / 3}
    assert all(row["reward"] == paid[row["completion"]] for row in train_batch.rows)


def test_without_a_label_nothing_is_flipped_and_nothing_is_trained_on() -> None:
    train_batch, _ = made({"method": "dpo"}, answer=lambda prompt, sample: "ab")
    assert train_batch.metrics["preferences/pairs"] == 0 and math.isnan(train_batch.metrics["preferences/frac_flipped"])
    assert not train_batch.batch.sample_mask.any()


def test_labelled_columns_are_the_pairs_chosen_first() -> None:
    train_batch, generator = made({"method": "dpo", "preferences.completions": "columns", "group_size": 2})
    assert not generator.calls
    assert [(row["completion"], row["label"]) for row in train_batch.rows] == [
        ("aaa", "chosen"),
        ("bcd", "rejected"),
    ] * 4
    assert [row["prompt_id"] for row in train_batch.rows] == [i for i in scheduled(0)[1] for _ in range(2)]
    assert train_batch.metrics == {"preferences/pairs": 4, "preferences/frac_tied": 0}
    assert all(math.isnan(row["reward"]) and row["rewards"] == {} for row in train_batch.rows)
    assert train_batch.batch.sample_mask.all() and train_batch.new_tokens == 4 * (4 + 4)


def test_demonstrations_are_paired_by_what_they_are_paid() -> None:
    def longer(*, completions: list[str], **columns: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    def demonstrate(example: Any, rng: Any) -> list[str]:
        return [rng.choice(["a", "bb", "ccc", "dddd"])]

    task = override(letters.config, {}).task
    task = type(task)("shown", task.train, task.held_out, task.success, demonstrate)
    options = {"method": "dpo", "preferences.completions": "demonstrations", "task": task, "rewards": {"l": longer}}
    train_batch, generator = made({**options, "group_size": 8}, step=1)
    assert not generator.calls
    labels = [(row["label"], len(row["completion"]), row["reward"]) for row in train_batch.rows]
    assert all(paid == size for _, size, paid in labels)
    for (label, size, _), (other, size_other, _) in zip(labels[::2], labels[1::2], strict=True):
        assert (label, other) == (("tied", "tied") if size == size_other else ("chosen", "rejected"))
        assert size >= size_other
    again, _ = made({**options, "group_size": 8}, step=2)
    assert [row["completion"] for row in again.rows] != [row["completion"] for row in train_batch.rows]


def test_pairs_are_made_of_the_split_prompts_and_samples_that_are_asked_for() -> None:
    config = override(letters.config, {"method": "dpo"})
    generator = Scripted(lambda prompt, sample: ANSWERS[sample % 4])
    pairs = labelled_pairs(context_of(config, generator), "held_out", [1, 2], [11, 12], 5, range(4, 6))
    [(prompts, noise, _)] = generator.calls
    assert [e["prompt"] for e in prompts.examples] == ["cb", "dc"]
    assert (int(noise.step), noise.prompt_ids.tolist(), noise.samples.tolist()) == (5, [11, 12], [[4, 5]] * 2)
    assert pairs.valid.tolist() == [[True]] * 2 and pairs.order.tolist() == [[0, 1]] * 2


def test_wrong_labels_are_named_by_seed_step_and_the_prompts_name() -> None:
    config = override(letters.config, {"method": "dpo", "seed": 9, "preferences.noise_level": 0.45, "group_size": 32})
    generator = Scripted(lambda prompt, sample: "b" if sample % 2 else "aaa")
    pairs = labelled_pairs(context_of(config, generator), "train", [0, 0, 1], [30, 40, 1], 5, range(32))
    expected = [np.random.default_rng((9, 5, name)).random(16) < 0.45 for name in (30, 40, 1)]
    assert pairs.flipped.tolist() == [flipped.tolist() for flipped in expected]
    assert pairs.order[:, ::2].tolist() == [(np.arange(0, 32, 2) + flipped).tolist() for flipped in expected]


def test_demonstrations_of_pairs_are_named_by_the_step_and_the_prompts_name() -> None:
    task = replace(letters.task, train=letters.task.train[:1], demonstrate=lambda example, rng: [rng.choice("abcd")])
    changes = {"method": "dpo", "preferences.completions": "demonstrations", "task": task, "group_size": 32}
    said = []
    for step in (0, 1):
        rollout = made(changes, step=step)[0].rollout
        assert rollout is not None
        said += [sorted(tuple(episode.turns) for episode in group) for group in rollout.episodes]
    assert len({tuple(group) for group in said}) == 8  # four places in each of two steps


def test_too_many_failures_end_a_step_of_pairs_as_well() -> None:
    def broken(*, completions: list[str], **columns: Any) -> list[float]:
        return [math.nan] * len(completions)

    options = {"rewards": {"broken": broken}, "reward.on_failure": "drop"}
    for method in ("grpo", "rft", "dpo", "reward_model"):
        with pytest.raises(RunError, match="'broken' failed on 16 of the 16 completions of step 7"):
            made({"method": method, **options}, step=7)
