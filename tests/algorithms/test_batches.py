"""What methods share in making a batch: counts of tokens, metrics and rows, each worked by hand from given episodes."""

import math
from dataclasses import replace
from typing import Any

import letters
import numpy as np
import pytest
from scripted import Scripted, context_of

from grpo_jax.algorithms import Algorithm, Batch, Objective, TrainBatch, algorithm_of, base
from grpo_jax.algorithms.base import Setup
from grpo_jax.algorithms.batch import micro_batches
from grpo_jax.algorithms.batches import (
    batch_of,
    completion_metrics,
    completion_rows,
    reward_arrays,
    score_metrics,
    tokens_of,
)
from grpo_jax.errors import RunError
from grpo_jax.experiment import RewardConfig, override
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import Episode, PromptBatch, Rollout
from grpo_jax.rollout.episodes import collect
from grpo_jax.tasks import Task

EXAMPLES = [{"prompt": "b", "secret": "x"}, {"prompt": "cd", "secret": "y"}]


def episode(*turns: str, replies: tuple[str, ...] = (), ended: bool = True) -> Episode:
    """An episode whose turns have a token per letter (and an end, but for a last one that was cut off)."""
    made = Episode(ended=ended)
    for i, turn in enumerate(turns):
        if i:
            made.add_observation([9] * len(replies[i - 1]), replies[i - 1])
        ids = [3] * len(turn) + [2] * (ended or i < len(turns) - 1)
        made.add_action(ids, [-0.5] * len(ids), turn)
    return made


def played() -> Rollout:
    """Two groups of three; the prompts have 2 and 3 tokens."""
    prompts = PromptBatch(EXAMPLES, np.array([[1, 4, 0, 0], [1, 5, 6, 0]], np.int32), np.array([2, 3], np.int32))
    episodes = [
        [episode("a"), episode("a"), episode("bcd", ended=False)],  # 2, 2 and 3 tokens
        [episode("a", "bb", replies=("ccc",)), episode("dd"), episode("a", "bb", replies=("c",))],  # 2+3+3, 3, 2+1+3
    ]
    return collect(prompts, [40, 7], episodes, shortest=4)


def scores(total: list[float], sample_mask: list[bool] | None = None) -> Scores:
    paid = [100 * t for t in total]  # what advantages are made from may be something else than what is reported
    return Scores(total, {"r": [t + 1 for t in total]}, sample_mask or [True] * len(total), {"r": 0}, paid)


def test_a_prompt_counts_once_for_each_completion_and_so_do_the_environments_tokens() -> None:
    rollout = played()
    assert tokens_of(rollout) == 3 * (2 + 3) + (2 + 2 + 3) + (8 + 3 + 6)
    assert rollout.mask.sum() == (2 + 2 + 3) + (5 + 3 + 5)


def test_advantages_are_made_from_their_own_rewards_and_a_dropped_completion_has_0() -> None:
    mask = [True, False, True, True, True, False]
    rewards, sample_mask = reward_arrays(scores([1.0, math.nan, 3.0, 4.0, 5.0, 6.0], mask), (2, 3))
    assert rewards.tolist() == [[100, 0, 300], [400, 500, 0]] and sample_mask.tolist() == [mask[:3], mask[3:]]


def test_a_batch_without_rewards_counts_everything_and_one_with_rewards_holds_them() -> None:
    rollout, rewards, mask = played(), np.ones((2, 3), np.float32), np.zeros((2, 3), bool)
    bare, full = batch_of(rollout), batch_of(rollout, rewards, mask)
    assert not bare.rewards.any() and bare.sample_mask.all()
    assert full.rewards is rewards and full.sample_mask is mask
    for name in ("prompts", "lengths", "tokens", "valid", "mask", "logprobs"):
        assert getattr(bare, name) is getattr(full, name) is getattr(rollout, name)


def test_lengths_count_sampled_tokens_and_copies_are_the_same_turns_within_a_group() -> None:
    assert completion_metrics(played()) == pytest.approx(
        {
            "completions/mean_length": (2 + 2 + 3 + 5 + 3 + 5) / 6,
            "completions/min_length": 2,
            "completions/max_length": 5,
            "completions/clipped_ratio": 1 / 6,
            # "a", "a", "bcd" and "a bb", "dd", "a bb" are two texts each, of which one is there twice.
            "completions/unique_fraction": 2 / 3,
            "completions/top_share": 2 / 3,
            "completions/most_common_ratio": 2 / 6,
        }
    )
    talks = [episode("a", "b", replies=("c",)), episode("d", "b", replies=("c",)), episode("c")]  # three texts
    same = replace(played(), episodes=[[episode("a")] * 3, talks])
    assert completion_metrics(same)["completions/unique_fraction"] == pytest.approx((1 / 3 + 1) / 2)
    assert completion_metrics(same)["completions/top_share"] == pytest.approx((1 + 1 / 3) / 2)


def test_success_is_the_tasks_own_and_is_asked_of_the_prompts_columns() -> None:
    asked = []

    def success(**columns: Any) -> list[bool]:
        asked.append((columns["secret"], columns["prompts"]))
        return [True, False, False, False, True, True]

    task = Task("two", EXAMPLES, [], success=success)
    rewards, mask = np.arange(6.0).reshape(2, 3), np.ones((2, 3), bool)
    metrics = score_metrics(played(), scores([0.0, 1, 2, 3, 4, 5]), rewards, mask, task)
    assert metrics["success"] == 0.5 and asked == [(["x"] * 3 + ["y"] * 3, ["b"] * 3 + ["cd"] * 3)]
    assert (metrics["reward"], metrics["rewards/r/mean"], metrics["completions/max_length"]) == (2.5, 3.5, 5)


def test_a_row_is_that_of_its_prompt_and_sample() -> None:
    rows = completion_rows(played(), scores([0.0, 1, 2, 3, 4, 5]))
    assert [(row["prompt_id"], row["sample"], row["prompt"]) for row in rows] == [
        (40, 0, "b"), (40, 1, "b"), (40, 2, "b"), (7, 0, "cd"), (7, 1, "cd"), (7, 2, "cd"),
    ]  # fmt: skip
    assert [row["reward"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["rewards"] for row in rows] == [{"r": n} for n in (1, 2, 3, 4, 5, 6)]
    assert [row["tokens"] for row in rows] == [2, 2, 3, 5, 3, 5]  # the environment's are not the policy's
    assert rows[2]["completion"] == "bcd" and all(math.isnan(row["advantage"]) for row in rows)
    assert [m["content"] for m in rows[5]["completion"]] == ["a", "c", "bb"]


# A step's batch and its advantages ------------------------------------------------------------------------------------


def trained_on(sample_mask: np.ndarray) -> TrainBatch:
    batch = batch_of(played(), np.zeros((2, 3), np.float32), sample_mask)
    rows = [{"sample": i, "advantage": math.nan} for i in range(6)]
    return TrainBatch(batch, played(), 0, 0, rows=rows, histograms={"rewards": np.ones(2)})


def test_advantages_go_to_their_rows_and_those_that_count_to_the_histogram() -> None:
    mask = np.array([[True, True, False], [True, False, True]])
    found = trained_on(mask).with_advantages(np.array([[1.0, 2, 3], [4, 5, 6]]))
    assert [(row["sample"], row["advantage"]) for row in found.rows] == [(i, i + 1) for i in range(6)]
    assert found.histograms["advantages"].tolist() == [1, 2, 4, 6]
    assert found.histograms["rewards"].tolist() == [1, 1]  # what there was stays


def test_an_advantage_by_token_is_shown_as_the_mean_over_the_tokens_that_are_trained_on() -> None:
    mask = np.array([[True, True, False], [True, True, True]])
    by_token = np.broadcast_to(np.arange(1.0, 1 + played().mask.shape[2]), played().mask.shape)
    shown = [row["advantage"] for row in trained_on(mask).with_advantages(by_token).rows]
    # Of 1, 2, 3, …: two tokens 1.5, a dropped completion 0; a and its end, three of the environment, then bb and its
    # end are 1, 2 and 6, 7, 8; with one of the environment 1, 2 and 4, 5, 6.
    assert shown == pytest.approx([1.5, 1.5, 0, 24 / 5, 2, 18 / 5])


def test_micro_batches_are_neighbouring_prompts() -> None:
    pieces = micro_batches({"x": np.arange(12).reshape(6, 2)}, 3)["x"]
    assert pieces.shape == (3, 2, 2) and pieces[1].tolist() == [[4, 5], [6, 7]]


# What a step is made from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_start", [False, True])
def test_a_step_samples_by_the_names_of_its_seed_step_and_prompts(from_start: bool) -> None:
    config = override(letters.config, {"seed": 5, "group_size": 3, "sampling.temperature": 0.7})
    now, start = (Scripted(lambda prompt, sample: "ab") for _ in range(2))
    context = replace(context_of(config, now), start=start)
    found = context.sample(9, [2, 0], [8, 6], from_start=from_start)
    asked, idle = (start, now) if from_start else (now, start)
    [(prompts, noise, sampling)] = asked.calls
    assert not idle.calls and sampling == config.sampling
    assert [example["prompt"] for example in prompts.examples] == ["d", "b"]
    assert (int(noise.seed), int(noise.step), noise.prompt_ids.tolist()) == (5, 9, [8, 6])
    assert noise.samples.tolist() == [[0, 1, 2]] * 2 and found.prompt_ids.tolist() == [8, 6]
    context.sample(9, [1], [1], split="held_out", samples=[4, 5])
    prompts, noise, _ = now.calls[-1]
    assert prompts.examples[0]["prompt"] == "cb" and noise.samples.tolist() == [[4, 5]]


def test_a_run_ends_only_above_its_failure_rate_and_says_which_reward_it_was() -> None:
    def score(failing: int, limit: float) -> Scores:
        def fails(**columns: Any) -> list[float]:
            return [math.nan] * failing + [1.0] * (8 - failing)

        rewards = {"fine": lambda **columns: [0.0] * 8, "fails": fails}
        options = RewardConfig(on_failure="drop", max_failure_rate=limit)
        config = replace(letters.config, rewards=rewards, reward=options)
        context = context_of(config, Scripted(lambda prompt, sample: "a"))
        return context.score(context.sample(3, [0, 1], [0, 1]), 3)

    assert score(2, 0.25).failures == {"fine": 0, "fails": 2}  # a quarter is not above a quarter
    message = r"reward 'fails' failed on 3 of the 8 completions of step 3, above reward.max_failure_rate = 0\.25"
    with pytest.raises(RunError, match=message):
        score(3, 0.25)


def test_an_evaluation_is_of_the_policy_of_now_on_the_split_that_is_asked_for() -> None:
    config = override(letters.config, {"evaluation.num_prompts": 2})
    now, start = Scripted(lambda prompt, sample: "aa"), Scripted(lambda prompt, sample: "b")
    context = replace(context_of(config, now), start=start)
    for split, prompts in (("train", ["b", "c"]), ("held_out", ["bd", "cb"])):
        found = algorithm_of(config).evaluate(context, split)  # type: ignore[arg-type]
        assert (found.split, found.success) == (split, 1.0)
        assert [record["prompt"] for record in found.records[::2]] == prompts
    assert not start.calls


# What an objective is built from --------------------------------------------------------------------------------------

SAMPLED = ("grpo", "ppo")  # they learn at the sampler's temperature, the others at 1
METHODS = (*SAMPLED, "sft", "rft", "dpo", "reward_model")


@pytest.mark.parametrize("method", METHODS)
def test_the_forward_pass_has_the_methods_temperature_and_the_experiments_memory(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(base, "make_forward", lambda *arguments, **options: asked.append((arguments, options)))
    for remat in (False, True):
        changes = {"method": method, "sampling.temperature": 0.7, "gradient_checkpointing": remat}
        config = override(letters.config, changes)
        objective = algorithm_of(config).make_objective(Setup("model", config, 17, None))  # type: ignore[arg-type]
        temperature = 0.7 if method in SAMPLED else 1.0
        assert asked.pop() == (("model", 17), {"temperature": temperature, "remat": remat})
        assert (objective.before_updates is not None) == (method == "ppo")
    assert not asked


def test_a_method_of_ones_own_has_no_group_to_show_and_needs_no_reference() -> None:
    class Own(Algorithm):
        name = "own"

        def make_batch(self, context: Any, step: int) -> TrainBatch:
            raise NotImplementedError

        def make_objective(self, setup: Setup) -> Objective:
            raise NotImplementedError

    own, context = Own(), context_of(letters.config, Scripted(lambda prompt, sample: "a"))
    assert own.sample_group(context) == [] and own.needs_reference(letters.config) is False
    assert (own.on_policy, own.has_head) == (False, False)


def test_what_a_method_is_for_follows_from_its_name() -> None:
    algorithms = {name: algorithm_of(override(letters.config, {"method": name})) for name in METHODS}
    kinds = {name: (algorithm.on_policy, algorithm.has_head) for name, algorithm in algorithms.items()}
    assert kinds == {
        "grpo": (True, False),
        "ppo": (True, True),
        "sft": (False, False),
        "rft": (False, False),
        "dpo": (False, False),
        "reward_model": (False, True),
    }


def test_totals_are_summed_over_the_axis_alone_where_there_is_one() -> None:
    calls = []
    across = Setup(None, letters.config, 0, "devices").across  # type: ignore[arg-type]
    assert across(lambda x, axis: calls.append(axis) or x + 1, 3) == 4 and calls == ["devices"]
    assert Setup(None, letters.config, 0, None).across(lambda x, axis: x + 1, 3) == 3  # type: ignore[arg-type]


def test_a_batch_gives_the_forward_pass_its_tokens_and_where_they_are() -> None:
    batch: Batch = batch_of(played())
    assert batch.completions == (batch.prompts, batch.lengths, batch.tokens, batch.valid)
