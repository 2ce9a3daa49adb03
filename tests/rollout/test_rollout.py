"""Episodes: what is in the context, what is trained on, and that how rows are batched changes nothing."""

import random
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from grpo_jax import rollout
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import SamplingConfig, ScratchConfig
from grpo_jax.logprobs import Completions, completion_logprobs
from grpo_jax.policy import Policy, load
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rollout import Prompts, Rollout, bucket, demonstrations, encode_prompts, make_actor, name_noise
from grpo_jax.rollout.generator import compaction
from grpo_jax.sharding import Replicas
from grpo_jax.tasks import Task

ALPHABET = "abcd+-"
TOKENIZER = CharacterTokenizer(ALPHABET)
PROMPTS = ["a", "bb", "abc", "d", "dd", "ca", "b", "cc"]


def answer(example: dict[str, Any], turns: list[str]) -> str | None:
    """An environment: the episode is over after a turn with an `a` or a `d`; replies have one to five tokens."""
    return None if set("ad") & set(turns[-1]) else "+" * min(len(turns[-1]), 4) + "-"


def make_task(prompts: list[Any] = PROMPTS, **more: Any) -> Task:
    examples = [{"prompt": prompt, "number": i} for i, prompt in enumerate(prompts)]
    return Task("talk", examples, [], success=lambda *, completions, **_: [False] * len(completions), **more)


TALK = make_task(reply=answer, max_turns=3)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load("scratch", seed=1, scratch=ScratchConfig(ALPHABET, hidden_size=16, num_layers=2, num_heads=2))


def play(policy: Policy, task: Task, n: int = 1, *, num_samples: int = 6, temperature: float = 0.7) -> Rollout:
    sampling = SamplingConfig(max_tokens=4, temperature=temperature)
    prompts = encode_prompts(task, policy.require_tokenizer(), policy.config.max_positions, sampling.max_tokens)
    places = range(len(task.train))
    noise = name_noise(3, 5, places, range(num_samples))
    return rollout.rollout(make_actor(policy, Replicas(n)), task, prompts.batch("train", places), noise, sampling)


@pytest.fixture(scope="module")
def talk(policy: Policy) -> Rollout:
    return play(policy, TALK)


@dataclass
class Run:
    """Neighbouring tokens of a row that were all sampled, or all the environment's."""

    sampled: bool
    ids: list[int]


def runs_of(played: Rollout, p: int, g: int) -> list[Run]:
    runs: list[Run] = []
    for token, valid, sampled in zip(played.tokens[p, g], played.valid[p, g], played.mask[p, g], strict=True):
        if valid and runs and runs[-1].sampled == sampled:
            runs[-1].ids.append(int(token))
        elif valid:
            runs.append(Run(bool(sampled), [int(token)]))
    return runs


def rows(played: Rollout) -> list[tuple[int, int]]:
    return [(p, g) for p in range(played.mask.shape[0]) for g in range(played.mask.shape[1])]


def assert_same_episodes(one: Rollout, other: Rollout) -> None:
    for name in ("tokens", "valid", "mask", "ended"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert one.reward_arguments() == other.reward_arguments()


# One episode ---------------------------------------------------------------------------------------------------------


def test_a_single_turn_is_what_was_sampled_and_all_of_it_is_trained_on(policy):
    played = play(policy, make_task())
    assert np.array_equal(played.mask, played.valid)
    lengths = played.mask.sum(-1)
    assert set(lengths.ravel()) == {1, 2, 3, 4}  # one sampled a stop token at once, one was cut off
    last = np.take_along_axis(played.tokens, lengths[..., None] - 1, axis=-1)[..., 0]
    assert np.array_equal(last == TOKENIZER.stop_ids[0], played.ended)
    assert (lengths[~played.ended] == 4).all()
    for p, g in rows(played):
        text = TOKENIZER.decode(played.tokens[p, g, : lengths[p, g]])
        assert played.episodes[p][g].turns == [text]


def test_an_environments_tokens_are_in_the_context_and_never_trained_on(talk):
    assert max(len(runs_of(talk, p, g)) for p, g in rows(talk)) == 5  # three turns and two replies
    for p, g in rows(talk):
        turns, heard = talk.episodes[p][g].turns, 0
        for k, run in enumerate(runs_of(talk, p, g)):
            assert run.sampled == (k % 2 == 0)
            if run.sampled:
                assert TOKENIZER.decode(run.ids) == turns[k // 2]
                cut_off = run.ids[-1] != TOKENIZER.stop_ids[0]
                assert len(run.ids) == 4 or not cut_off
            else:
                # A turn that was cut off gets the stop token that it lacks, which the policy did not say.
                reply = TOKENIZER.encode(answer({}, turns[: k // 2 + 1]))
                assert run.ids == [TOKENIZER.stop_ids[0]] * cut_off + reply
                heard += 1
        assert len(turns) == heard + 1
        assert len(turns) == 3 or answer({}, turns) is None  # each episode went on until it was over
        assert talk.ended[p, g] == (not cut_off)


def test_turns_of_both_kinds_occur_in_these_tests(talk):
    replies = [run.ids for p, g in rows(talk) for run in runs_of(talk, p, g) if not run.sampled]
    assert {ids[0] == TOKENIZER.stop_ids[0] for ids in replies} == {True, False}
    assert {len(talk.episodes[p][g].turns) for p, g in rows(talk)} == {1, 2, 3}


def test_a_token_that_no_text_encodes_to_is_kept_as_it_was_sampled(talk):
    """Text would lose it: were anything tokenised again, these ids would be gone."""
    sampled = talk.tokens[talk.mask]
    assert TOKENIZER.pad_id in sampled and TOKENIZER.bos_id in sampled
    assert not (talk.tokens[~talk.valid]).any() and not talk.logprobs[~talk.mask].any()
    ids = talk.reward_arguments()["completion_ids"]
    assert [i for row in ids for i in row] == sampled.tolist()
    assert any(TOKENIZER.encode(TOKENIZER.decode(row)) != row for row in ids)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_log_probabilities_of_a_whole_episode_are_found_again(policy, temperature):
    played = play(policy, TALK, temperature=temperature)
    actor = make_actor(policy, Replicas(1))
    recompute = jax.jit(lambda trainable, *batch: completion_logprobs(
        actor.model.bind(trainable, {}), Completions(*batch), temperature=temperature
    )[0])  # fmt: skip
    arrays = (played.prompts, played.lengths, played.tokens, played.valid)
    found = recompute(actor.replicas.first(actor.trainable), *arrays)
    assert np.abs(np.where(played.mask, found - played.logprobs, 0)).max() < 1e-4
    assert played.mask.sum() > 100 and (played.logprobs[played.mask] < 0).all()


# Batches -------------------------------------------------------------------------------------------------------------


def test_leaving_finished_rows_behind_changes_no_completion(policy, talk, monkeypatch):
    made = []
    # What stands in for it returns None: nothing leaves.
    monkeypatch.setattr(rollout.generator, "compaction", lambda active, n: made.append(compaction(active, n)))
    assert_same_episodes(talk, play(policy, TALK))
    assert any(chosen is not None for chosen in made)  # there was something to leave behind


def test_one_device_and_eight_play_the_same(policy, talk):
    assert jax.local_device_count() == 8
    assert_same_episodes(talk, play(policy, TALK, n=8))


def test_rows_are_kept_only_where_that_halves_the_batch():
    active = np.zeros((4, 4), bool)
    active[0, 3] = active[3, 1] = active[3, 2] = True
    prompt, row = compaction(active, 1)  # prompts 0 and 3, with two rows each
    assert prompt.tolist() == [0, 3]
    assert row.tolist() == [[3, 0], [1, 2]]
    prompt, row = compaction(active, 2)  # each device keeps its own prompts
    assert prompt.tolist() == [0, 3]
    assert row.tolist() == [[3, 0], [1, 2]]
    active[:3, :3] = True  # 4 prompts with up to 4 rows: nothing is gained
    assert compaction(active, 1) is None


@pytest.mark.parametrize(
    ("n", "size"), [(0, 4), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (17, 24), (25, 32), (33, 48), (49, 64), (65, 96)]
)
def test_sizes_are_padded_to_few_shapes(n, size):
    assert bucket(n) == size


def test_prompts_are_right_padded_to_a_bucket():
    prompts = Prompts(make_task(["a", "b"]), {"train": [[5, 6, 7], [5, 6, 7, 8, 9, 3]]}, shared_prefix_length=2)
    batch = prompts.batch("train", [1, 0])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9, 3], [5, 6, 7, 0, 0, 0]]  # 2 in common, and a bucket of 4
    assert batch.lengths.tolist() == [6, 3]
    assert [example["prompt"] for example in batch.examples] == ["b", "a"]


# Prompts and rewards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        (["a" * 30 + "b", "a" * 30 + "c"], 31),  # the begin token and thirty
        (["a" * 10 + "b", "a" * 10 + "c"], 0),  # too few to be worth a pass of their own
        (["a" * 30, "a" * 30], 30),  # the last token of a prompt is never shared: it predicts the first sampled one
        (["a" * 20, "a" * 30], 20),
        (["b" + "a" * 30, "c" + "a" * 30], 0),
        (["a" * 30], 0),
    ],
)
def test_the_tokens_that_all_prompts_begin_with_are_found(prompts, shared):
    assert encode_prompts(make_task(prompts), TOKENIZER, 64, 4).shared_prefix_length == shared


def test_a_prompt_that_leaves_no_room_is_one_sentence():
    task = make_task(["a", "b" * 55])
    encode_prompts(task, TOKENIZER, 64, 8)
    message = r"prompt 1 of talk \(train\) has 56 tokens, which with up to 9 new ones exceed the policy's context of 64"
    with pytest.raises(UserError, match=message):
        encode_prompts(task, TOKENIZER, 64, 9)
    with pytest.raises(UserError, match="with up to 24 new ones"):  # every turn needs room
        encode_prompts(make_task(["b" * 55], reply=answer, max_turns=3), TOKENIZER, 64, 8)


def test_replies_that_leave_no_room_for_the_next_turn_are_one_sentence(policy):
    # A prompt of up to 3 tokens and three turns of 4 fit in 16, but not with a reply of up to 5 after each turn.
    small = replace(policy, config=replace(policy.config, max_positions=16))
    with pytest.raises(RunError, match=r"an episode of talk has \d+ tokens before its turn [23], .* context is 16"):
        play(small, TALK)


def test_rewards_get_text_for_a_text_and_messages_for_a_chat(policy):
    chat = [{"role": "user", "content": "ab"}]
    played = play(policy, make_task(["ab", chat]), num_samples=2)
    arguments = played.reward_arguments()
    assert arguments["prompts"] == ["ab", "ab", chat, chat]
    assert arguments["number"] == [0, 0, 1, 1]
    texts = [played.episodes[p][g].turns[0] for p, g in rows(played)]
    messages = [[{"role": "assistant", "content": text}] for text in texts[2:]]
    assert arguments["completions"] == [*texts[:2], *messages]


def test_rewards_get_messages_in_turn_for_an_episode_of_several_turns(talk):
    for completion, (p, g) in zip(talk.reward_arguments()["completions"], rows(talk), strict=True):
        turns = talk.episodes[p][g].turns
        if len(turns) == 1:
            assert completion == turns[0] or completion == [{"role": "assistant", "content": turns[0]}]
            continue
        assert [message["role"] for message in completion] == ["assistant", "user"] * (len(turns) - 1) + ["assistant"]
        assert [message["content"] for message in completion[::2]] == turns
        assert [message["content"] for message in completion[1::2]] == [
            answer({}, turns[: k + 1]) for k in range(len(turns) - 1)
        ]


def test_a_column_that_only_some_examples_have_is_none_for_the_others(policy):
    task = make_task(["a", "b"])
    task.train[1]["hint"] = "c"
    assert play(policy, task, num_samples=1).reward_arguments()["hint"] == [None, "c"]


# Demonstrations ------------------------------------------------------------------------------------------------------


def demonstrate(example: dict[str, Any], rng: random.Random) -> list[str]:
    return ["b" * rng.randint(1, 3), "cc", "a"][: 1 + 2 * (example["number"] % 2)]


def show(samples: range, step: int = 0) -> Rollout:
    task = make_task(["a", "bb"], reply=answer, max_turns=3, demonstrate=demonstrate)
    prompts = encode_prompts(task, TOKENIZER, 64, 4)
    return demonstrations(task, prompts.batch("train", [1, 0]), name_noise(0, step, [7, 8], samples), TOKENIZER)


def test_a_demonstration_is_an_episode_whose_turns_all_end():
    played = show(range(8))
    assert played.ended.all() and not played.logprobs.any()
    for p, g in rows(played):
        turns = played.episodes[p][g].turns
        assert len(turns) == (3 if p == 0 else 1)
        expected = []
        for k, turn in enumerate(turns):
            expected.append(Run(True, [*TOKENIZER.encode(turn), TOKENIZER.stop_ids[0]]))
            if k < len(turns) - 1:
                expected.append(Run(False, TOKENIZER.encode(answer({}, turns[: k + 1]))))
        assert runs_of(played, p, g) == expected
    assert len({played.episodes[0][g].turns[0] for g in range(8)}) > 1  # samples differ


def test_demonstrations_are_named_by_step_and_sample():
    assert_same_episodes(show(range(8)), show(range(8)))
    texts = [[episode.turns for episode in played.episodes[0]] for played in (show(range(8)), show(range(8), step=1))]
    assert texts[0] != texts[1]
    assert [episode.turns for episode in show(range(4, 8)).episodes[0]] == texts[0][4:]


def test_a_demonstration_that_goes_on_after_the_end_is_one_sentence():
    task = make_task(["a"], reply=answer, max_turns=3, demonstrate=lambda example, rng: ["b", "a", "c"])
    prompts = encode_prompts(task, TOKENIZER, 64, 4)
    with pytest.raises(UserError, match="of talk has 3 turns, but its episode is over after 2"):
        demonstrations(task, prompts.batch("train", [0]), name_noise(0, 0, [0], [0]), TOKENIZER)


# Talking to a policy -------------------------------------------------------------------------------------------------


def sample(policy: Policy, prompts: list[Any], **options: Any) -> list[list[str]]:
    options = {"temperature": 1.0, "max_tokens": 5, "num_samples": 3, "seed": 0} | options
    sampling = SamplingConfig(temperature=options.pop("temperature"), max_tokens=options.pop("max_tokens"))
    return rollout.sample_text(policy, prompts, sampling, **options)


def test_any_number_of_prompts_is_completed_whatever_the_number_of_devices(policy):
    texts = sample(policy, ["ab", "c", [{"role": "user", "content": "ab"}]] * 3)
    assert len(texts) == 9 and all(len(row) == 3 for row in texts)
    assert all(len(text) <= 5 and set(text) <= set(ALPHABET) for row in texts for text in row)
    assert len({text for row in texts for text in row}) > 9
    assert sample(policy, ["ab"]) == texts[:1]  # the noise is named by the prompt's place
    assert sample(policy, ["ab"], seed=1) != texts[:1]
    assert sample(policy, []) == []


def test_the_games_of_a_policy_are_those_of_a_task_with_its_environment(policy):
    """Three games of each prompt, in which every answer is the environment's."""
    task = make_task(["ab", "c"], reply=answer, max_turns=2)
    sampling = SamplingConfig(max_tokens=4)
    games = rollout.sample_episodes(policy, task, sampling, num_samples=3, seed=0)
    assert [len(group) for group in games] == [3, 3]
    for example, group in zip(task.train, games, strict=True):
        for game in group:
            replies = [answer(example, game.turns[:n]) for n in range(1, len(game.turns))]
            assert game.replies == replies and None not in replies
            assert len(game.turns) == 2 or answer(example, game.turns) is None
    assert {len(game.turns) for group in games for game in group} == {1, 2}


def test_greedy_completions_of_a_prompt_are_one(policy):
    [row] = sample(policy, ["ab"], temperature=0.0, num_samples=4)
    assert len(set(row)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2046}, "has 3 tokens, which with up to 2046 new ones exceed the policy's context of 2048"),
        ({"max_tokens": 0}, "max_tokens = 0 is out of range"),
        ({"temperature": -1.0}, "temperature = -1.0 is out of range"),
        ({"num_samples": 0}, "num_samples = 0 is out of range"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(policy, options, message):
    with pytest.raises(UserError, match=message):
        sample(policy, ["ab"], **options)
