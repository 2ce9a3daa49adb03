"""What becomes of episodes on their way to an update: arrays, orders, limits, and what the sampler is asked for."""

import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scripted import Scripted, Talker

from grpo_jax import rollout
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import LoRAConfig, RewardConfig, SamplingConfig, ScratchConfig
from grpo_jax.policy import load
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rollout import (
    Episode,
    PromptBatch,
    Rollout,
    completion,
    demonstrations,
    encode_prompts,
    from_completions,
    generator,
    join_groups,
    make_actor,
    model_of,
    name_noise,
    play,
    score_rollout,
    settings_of,
    single_turn,
    take_groups,
    take_rows,
)
from grpo_jax.rollout.episodes import collect, padded_length, shortest_length
from grpo_jax.rollout.generator import ActiveRows, ActorState
from grpo_jax.sampler import Generation, Observation, Settings
from grpo_jax.sharding import Replicas
from grpo_jax.tasks import Task

TOKENIZER = CharacterTokenizer("abcd")
A, B, C, D = TOKENIZER.encode("abcd")
END = 2


def task_of(prompts: list[Any], **more: Any) -> Task:
    examples = [{"prompt": prompt, "place": i} for i, prompt in enumerate(prompts)]
    return Task("letters", examples, [], success=lambda *, completions, **_: [False] * len(completions), **more)


def prompts_of(*texts: str) -> PromptBatch:
    task = task_of(list(texts))
    return encode_prompts(task, TOKENIZER, 512, 4).batch("train", range(len(texts)))


def said(ids: list[int], *, ended: bool = True) -> Episode:
    return Episode(list(ids), [True] * len(ids), [-float(i) for i in ids], [str(ids)], [], ended)


# Arrays ---------------------------------------------------------------------------------------------------------------


def test_episodes_become_arrays_row_by_row() -> None:
    talk = Episode(ended=False)
    talk.add_action([A, B], [-1.0, -2.0], "ab")
    talk.add_observation([C], "c")
    talk.add_action([D], [-3.0], "d")
    found = collect(prompts_of("a", "bb"), [9, 4], [[said([A]), talk], [said([]), said([B, END])]], shortest=6)
    assert found.tokens.tolist() == [[[A, 0, 0, 0, 0, 0], [A, B, C, D, 0, 0]], [[0] * 6, [B, END, 0, 0, 0, 0]]]
    assert found.valid.sum(-1).tolist() == [[1, 4], [0, 2]] and found.valid[0, 1].tolist() == [True] * 4 + [False] * 2
    assert found.mask[0, 1].tolist() == [True, True, False, True, False, False]
    assert found.logprobs[0, 1].tolist() == [-1, -2, 0, -3, 0, 0]
    assert found.ended.tolist() == [[True, False], [True, True]]
    assert found.prompt_ids.tolist() == [9, 4] and found.lengths.tolist() == [2, 3]
    assert (talk.turns, talk.replies) == (["ab", "d"], ["c"])


@pytest.mark.parametrize(
    ("longest", "shortest", "size"), [(3, 16, 16), (16, 16, 16), (17, 16, 24), (2, 3, 3), (4, 3, 4), (5, 5, 5)]
)
def test_short_completions_share_one_shape(longest: int, shortest: int, size: int) -> None:
    assert padded_length(longest, shortest) == size


def test_the_shortest_shape_is_the_limit_of_tokens_or_16() -> None:
    assert [shortest_length(n) for n in (3, 16, 100)] == [3, 16, 16]


def test_a_turn_keeps_its_tokens_and_loses_what_stands_behind_them() -> None:
    tokens = np.array([[[A, END, 9, 9], [B, C, D, A]]])
    mask = np.array([[[True, True, False, False], [True] * 4]])
    logprobs = np.where(mask, -np.arange(1.0, 5), 0).astype(np.float32)
    found = single_turn(prompts_of("a"), [7], Generation(tokens, mask, logprobs, np.array([[True, False]])), TOKENIZER)
    assert found.tokens.tolist() == [[[A, END, 0, 0], [B, C, D, A]]] and found.valid is found.mask
    assert [episode.turns for episode in found.episodes[0]] == [["a"], ["bcda"]]
    assert [episode.ids for episode in found.episodes[0]] == [[A, END], [B, C, D, A]]
    assert [episode.logprobs for episode in found.episodes[0]] == [[-1, -2], [-1, -2, -3, -4]]
    assert [episode.ended for episode in found.episodes[0]] == [True, False] == found.ended[0].tolist()
    assert found.prompt_ids.tolist() == [7]


@pytest.mark.parametrize(("limit", "longest", "size"), [(20, 3, 16), (20, 17, 24), (64, 20, 24), (5, 2, 5)])
def test_a_batch_is_as_wide_as_its_longest_completion_asks_for(limit: int, longest: int, size: int) -> None:
    mask = np.zeros((2, 1, limit), bool)
    mask[0, 0, :1] = mask[1, 0, :longest] = True
    generation = Generation(np.where(mask, A, 0), mask, np.zeros(mask.shape, np.float32), np.ones((2, 1), bool))
    found = single_turn(prompts_of("a", "b"), [0, 1], generation, TOKENIZER)
    assert found.tokens.shape == found.mask.shape == found.logprobs.shape == (2, 1, size)
    assert found.mask.sum(-1).tolist() == [[1], [longest]]


def test_completions_from_elsewhere_are_groups_of_one() -> None:
    found = from_completions([[1, A], [1, B, C, D, A]], [[A, END], [B]])
    assert found.prompts.tolist() == [[1, A, 0, 0, 0, 0], [1, B, C, D, A, 0]] and found.lengths.tolist() == [2, 5]
    assert found.tokens[:, 0, :2].tolist() == [[A, END], [B, 0]] and found.mask.sum(-1).tolist() == [[2], [1]]
    assert found.ended.all() and not found.logprobs.any() and found.prompt_ids.tolist() == [0, 1]


# Orders ---------------------------------------------------------------------------------------------------------------


def groups(first: int, texts: tuple[str, str], size: int = 4) -> Rollout:
    """Two prompts with two completions of one token each, numbered from `first`."""
    episodes = [[said([first + 2 * p + g]) for g in range(2)] for p in range(2)]
    return collect(prompts_of(*texts), [first, first + 1], episodes, shortest=size)


def test_groups_of_several_rollouts_come_with_their_prompts_and_names() -> None:
    one, two = groups(10, ("a", "b")), groups(20, ("c", "dddddd"), size=6)
    found = take_groups([one, two], [(1, 1), (0, 0), (1, 0)])
    assert [example["prompt"] for example in found.examples] == ["dddddd", "a", "c"]
    assert found.prompt_ids.tolist() == [21, 10, 20] and found.lengths.tolist() == [7, 2, 2]
    assert found.prompts.tolist() == [[1, *[D] * 6, 0], [1, A, *[0] * 6], [1, C, *[0] * 6]]  # as wide as the widest
    assert found.tokens[..., 0].tolist() == [[22, 23], [10, 11], [20, 21]] and found.tokens.shape[2] == 4
    assert found.logprobs[..., 0].tolist() == [[-22, -23], [-10, -11], [-20, -21]]


def test_rows_are_taken_with_everything_that_is_theirs() -> None:
    given = groups(10, ("a", "b"))
    given.ended[0] = [True, False]
    found = take_rows(given, np.array([[1, 0], [0, 1]]))
    assert found.tokens[..., 0].tolist() == [[11, 10], [12, 13]] and found.ended[0].tolist() == [False, True]
    assert found.logprobs[..., 0].tolist() == [[-11, -10], [-12, -13]]
    assert [[episode.ids for episode in group] for group in found.episodes] == [[[11], [10]], [[12], [13]]]
    assert found.prompt_ids.tolist() == [10, 11] and found.prompts is given.prompts
    longer = collect(prompts_of("a"), [0], [[said([A]), said([B, C])]], shortest=4)
    assert take_rows(longer, np.array([[1, 0]])).mask.sum(-1).tolist() == [[2, 1]]
    assert take_rows(longer, np.array([[1, 0]])).valid.sum(-1).tolist() == [[2, 1]]


def test_joined_groups_hold_the_first_rollouts_rows_before_the_seconds() -> None:
    found = join_groups([groups(10, ("a", "b")), groups(30, ("a", "b"))])
    assert found.tokens[..., 0].tolist() == [[10, 11, 30, 31], [12, 13, 32, 33]]
    assert found.prompt_ids.tolist() == [10, 11] and [e["prompt"] for e in found.examples] == ["a", "b"]


# Texts ----------------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("prompt", "turns", "replies", "roles"),
    [
        ("a", ["x"], [], None),
        (CHAT, ["x"], [], ["assistant"]),
        ("a", ["x"], ["r"], ["assistant", "user"]),
        ("a", ["x", "y"], ["r"], ["assistant", "user", "assistant"]),
        ("a", [], [], []),
    ],
)
def test_a_completion_is_text_for_one_turn_after_a_text(prompt: Any, turns: Any, replies: Any, roles: Any) -> None:
    found = completion({"prompt": prompt}, Episode(turns=turns, replies=replies))
    assert found == turns[0] if roles is None else [message["role"] for message in found] == roles


def test_rewards_are_asked_for_all_rows_of_a_prompt_side_by_side() -> None:
    talk = said([A, END])
    talk.add_observation([C], "c")
    talk.add_action([B], [-1.0], "b")
    groups_ = [[said([A]), talk], [said([B]), said([END])], [said([C]), said([D])]]
    given = collect(prompts_of("a", "b", "c"), [0, 1, 2], groups_, shortest=4)
    arguments = given.reward_arguments()
    assert list(arguments) == ["prompts", "completions", "completion_ids", "place"]
    assert arguments["prompts"] == ["a", "a", "b", "b", "c", "c"] and arguments["place"] == [0, 0, 1, 1, 2, 2]
    assert arguments["completion_ids"] == [
        [A],
        [A, END, B],
        [B],
        [END],
        [C],
        [D],
    ]  # what the environment said is not its
    seen = []

    def reward(**columns: Any) -> list[float]:
        seen.append(columns)
        return [1.0, 2.0, 5.0, 5.0, 4.0, 0.0]

    config = SimpleNamespace(rewards={"r": reward}, reward=RewardConfig(combine="normalize_then_sum"))
    scores = score_rollout(given, config)  # type: ignore[arg-type]
    assert seen == [arguments] and scores.total == [1, 2, 5, 5, 4, 0]
    assert scores.advantage_rewards == [-1, 1, 0, 0, 1, -1]  # of groups of two


def test_each_part_of_a_name_changes_a_demonstration() -> None:
    task = task_of(["a"] * 2, demonstrate=lambda example, rng: ["".join(rng.choices("abcd", k=20))])
    batch = encode_prompts(task, TOKENIZER, 512, 32).batch("train", [0, 1])

    def shown(seed: int = 0, step: int = 0, ids: tuple[int, int] = (0, 1), first: int = 0) -> list[str]:
        found = demonstrations(task, batch, name_noise(seed, step, ids, range(first, first + 2)), TOKENIZER)
        return [episode.turns[0] for group in found.episodes for episode in group]

    assert len(set(shown())) == 4 and shown() == shown()
    others = [shown(seed=1), shown(step=1), shown(ids=(2, 3)), shown(first=2)]
    assert len({text for texts in [shown(), *others] for text in texts}) == 20
    assert shown(ids=(1, 0)) == shown()[2:] + shown()[:2]  # by the name and not by the place
    expected = random.Random("3 5 8 1").choices("abcd", k=20)
    assert shown(3, 5, (8, 9))[1] == "".join(expected)  # seed, step, prompt and sample, so that runs stay what they are


# What the sampler is asked for ----------------------------------------------------------------------------------------


def test_noise_is_named_by_whole_numbers() -> None:
    noise = name_noise(3, 8, [5, 2], [0, 4, 1])
    assert (noise.seed, noise.step) == (3, 8) and noise.prompt_ids.tolist() == [5, 2]
    assert noise.samples.tolist() == [[0, 4, 1]] * 2
    assert {x.dtype for x in noise} == {np.dtype("int32")}


@pytest.mark.parametrize(
    ("options", "top_k", "truncate"),
    [({}, 0, False), ({"top_k": 1}, 1, True), ({"top_p": 0.9}, 0, True), ({"top_k": 3, "top_p": 0.5}, 3, True)],
)
def test_what_narrows_the_draw_is_compiled_only_where_it_is_set(options: Any, top_k: int, truncate: bool) -> None:
    tokenizer = SimpleNamespace(stop_ids=(7, 5), pad_id=4)
    found = settings_of(SamplingConfig(max_tokens=9, **options), tokenizer)  # type: ignore[arg-type]
    assert found == Settings(9, (7, 5), 4, top_k, truncate, None, 0)


def test_a_policy_is_asked_with_its_prompts_noise_and_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compiled(model: Any, settings: Settings, replicas: Replicas) -> Any:
        def program(*arguments: Any) -> Any:
            asked.append((settings, arguments))
            shape = (2, 2, 3, 4)  # devices, prompts of each, samples, tokens
            return Generation(*(np.zeros(shape[:n], np.int32) for n in (4, 4, 4, 3))), "state"

        return program

    monkeypatch.setattr(generator, "_generate", compiled)
    actor = make_actor(load("scratch", scratch=ScratchConfig("abcd", 16, 1, 2)), Replicas(2))
    assert (actor.batch_multiple, actor.max_positions) == (2, 2048)
    prompts = encode_prompts(task_of(["a" * 20 + x for x in "abcd"]), TOKENIZER, 64, 4).batch("train", range(4))
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=4)
    found, state = actor.generate(prompts, name_noise(3, 8, [9, 8, 7, 6], range(3)), sampling)
    [(settings, (trainable, frozen, ids, lengths, noise, temperature, top_p))] = asked
    assert trainable is actor.trainable and frozen is actor.frozen
    assert settings == Settings(4, (2,), 0, 0, True, None, 21)  # begin and twenty a's
    assert ids.shape == (2, 2, 25) and lengths.tolist() == [[22, 22]] * 2
    assert noise.seed.tolist() == [3, 3] and noise.step.tolist() == [8, 8]
    assert noise.prompt_ids.tolist() == [[9, 8], [7, 6]] and noise.samples.shape == (2, 2, 3)
    assert temperature.tolist() == pytest.approx([0.7] * 2) and top_p.tolist() == pytest.approx([0.9] * 2)
    assert found.tokens.shape == (4, 3, 4) and found.stopped.shape == (4, 3)
    assert (state.cache_size, state.cache_length, state.size) == (3, 3, (4, 3))
    assert state.rows.prompt.tolist() == [0, 1, 2, 3] and state.rows.sample.tolist() == [[0, 1, 2]] * 4


def test_a_further_turn_makes_room_for_itself_and_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grown: list[int] = []
    asked: list[Any] = []
    taken: list[Any] = []

    def compiled(model: Any, settings: Settings, replicas: Replicas) -> Any:
        def program(trainable: Any, frozen: Any, decode: str, here: Any, noise: Any, *scales: Any) -> Any:
            asked.append((decode, here, noise, scales))
            shape = (*here.active.shape, settings.max_tokens)
            return Generation(*(np.ones(shape[:n], np.int32) for n in (4, 4, 4, 3))), decode

        return program

    def grow(extra: int, replicas: Replicas) -> Any:
        return lambda decode: grown.append(extra) or f"{decode} + {extra}"

    monkeypatch.setattr(generator, "_continue_generation", compiled)
    monkeypatch.setattr(generator, "_grow_cache", grow)
    monkeypatch.setattr(generator, "_take_rows", lambda replicas: lambda decode, *rows: taken.append(rows) or "fewer")
    actor = make_actor(load("scratch", scratch=ScratchConfig("abcd", 16, 1, 2)), Replicas(1))
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=4)
    noise = name_noise(3, 8, [9, 7], [0, 1, 2, 5])
    rows = ActiveRows(np.arange(2), np.tile(np.arange(4), (2, 1)))
    state = ActorState("first", rows, 3, 3, (2, 4))  # type: ignore[arg-type]

    def further(state: ActorState, active: list[list[int]], width: int, turns_left: int) -> tuple[Any, ActorState]:
        live = np.array(active, bool)
        numbered = np.arange(8, dtype=np.int32).reshape(2, 4)
        observation = Observation(np.repeat(numbered[..., None], width, -1), numbered, live)
        return actor.continue_generation(state, observation, noise, sampling, turns_left)

    # 4 tokens of an answer and 4 of the turn, twice: 3 + 8 + 8 places, of which 3 + 8 are filled after the first.
    _, state = further(state, [[1, 1, 1, 1], [1, 0, 1, 1]], 4, 2)
    assert grown == [16] and (state.cache_size, state.cache_length) == (19, 11) and not taken
    assert asked[-1][0] == "first + 16" and asked[-1][2].samples.tolist() == [[[0, 1, 2, 5]] * 2]
    # Half of the rows are left, so that the others go: samples 2 and 5 of the first prompt, 0 and 1 of the second.
    whole, later = further(state, [[0, 0, 1, 1], [1, 1, 0, 0]], 4, 1)
    assert grown == [16] and (later.cache_size, later.cache_length) == (19, 19)
    decode, here, own, (temperature, top_p) = asked[-1]
    assert decode == "fewer" and here.lengths.tolist() == [[[2, 3], [4, 5]]] and here.active.all()
    assert here.tokens.tolist() == [[[[2] * 4, [3] * 4], [[4] * 4, [5] * 4]]]
    assert own.prompt_ids.tolist() == [[9, 7]] and own.samples.tolist() == [[[2, 5], [0, 1]]]
    assert (own.seed.tolist(), own.step.tolist()) == ([3], [8])
    assert temperature.tolist() == pytest.approx([0.7]) and top_p.tolist() == pytest.approx([0.9])
    assert whole.stopped.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]] and later.size == (2, 4)
    # A longer answer than was foreseen makes the room that it lacks: 11 + 6 + 4 places, 2 more.
    _, last = further(state, [[1, 1, 1, 1], [1, 0, 1, 1]], 6, 1)
    assert grown == [16, 2] and (last.cache_size, last.cache_length) == (21, 21)


def test_a_model_has_its_policys_adapters_and_dtype() -> None:
    scratch, lora = ScratchConfig("abcd", 16, 1, 2), LoRAConfig(rank=1)
    narrow = load("scratch", scratch=scratch, dtype="bfloat16", lora=lora)
    assert (model_of(narrow).dtype, model_of(narrow).lora, model_of(narrow).config) == ("bfloat16", lora, narrow.config)
    assert model_of(load("scratch", scratch=scratch)).dtype == "float32"
    actor = make_actor(narrow, Replicas(1))
    assert set(actor.trainable) == {path for path in narrow.params if ".lora_" in path}
    assert set(actor.frozen) == set(narrow.params) - set(actor.trainable)


def test_rows_that_left_come_back_as_zeros_in_their_places() -> None:
    rows = ActiveRows(np.array([0, 2]), np.array([[1, 3], [2, 0]]))
    whole = np.arange(12).reshape(3, 4)
    assert rows.take(whole).tolist() == [[1, 3], [10, 8]]
    assert rows.put(rows.take(whole), (3, 4)).tolist() == [[0, 1, 0, 3], [0] * 4, [8, 0, 10, 0]]
    fewer = rows.select(np.array([1]), np.array([[1]]))
    assert (fewer.prompt.tolist(), fewer.sample.tolist()) == ([2], [[0]])


# Turns ----------------------------------------------------------------------------------------------------------------


def reply(example: Any, turns: list[str]) -> str | None:
    return None if "d" in turns[-1] else "c" * (1 + example["place"])


def talked(answer: Any, max_positions: int = 64, max_turns: int = 3, max_tokens: int = 3) -> tuple[Rollout, Talker]:
    task = task_of(["a", "bb"], reply=reply, max_turns=max_turns)
    talker = Talker(answer, max_positions=max_positions)
    batch = encode_prompts(task, TOKENIZER, 512, max_tokens).batch("train", [0, 1])
    sampling = SamplingConfig(max_tokens=max_tokens)
    return rollout.rollout(talker, task, batch, name_noise(0, 0, [0, 1], range(2)), sampling), talker


def test_rows_talk_until_their_episode_is_over() -> None:
    # Sample 0 is over after "d"; sample 1 says "abc", cut off, then "a" and at last "b".
    found, talker = talked(lambda prompt, sample: {0: "d", 1: "abc", 11: "a", 21: "b"}.get(sample, "ad"))
    assert [[episode.turns for episode in group] for group in found.episodes] == [[["d"], ["abc", "a", "b"]]] * 2
    assert found.episodes[0][1].ids == [A, B, C, END, C, A, END, C, B, END]  # the end that it lacks, then the reply
    assert found.episodes[1][1].ids == [A, B, C, END, C, C, A, END, C, C, B, END]
    assert found.mask[0, 1][:10].tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False] + [True] * 2
    assert found.episodes[0][1].replies == ["c", "c"] and found.ended.all()
    first, second = (observation for observation, _ in talker.told)
    assert [left for _, left in talker.told] == [2, 1]
    assert first.active.tolist() == [[False, True]] * 2 and first.lengths.tolist() == [[0, 2], [0, 3]]
    assert first.tokens[0, 1].tolist() == [END, C, 0, 0] and first.tokens[1, 1].tolist() == [END, C, C, 0]
    assert second.lengths.tolist() == [[0, 1], [0, 2]] and second.tokens[1, 1].tolist() == [C, C, 0, 0]


def test_nobody_is_asked_again_when_all_episodes_are_over() -> None:
    found, talker = talked(lambda prompt, sample: "d")
    assert talker.told == [] and found.mask.sum() == 8
    found, talker = talked(lambda prompt, sample: "a", max_turns=1)
    assert talker.told == [] and [e.turns for e in found.episodes[0]] == [["a"]] * 2
    cut, _ = talked(lambda prompt, sample: "aaaa", max_turns=2)
    assert not cut.ended.any()


def test_a_turn_needs_room_for_all_its_tokens_and_the_limit_is_exact() -> None:
    # Before the second turn the longer episode has 3 + 2 + 2 = 7 tokens, before the third 7 + 2 + 2 = 11. A turn may
    # take 3 more.
    assert talked(lambda prompt, sample: "a", max_positions=14)[0].episodes[1][0].turns == ["a"] * 3
    message = (
        "an episode of letters has 11 tokens before its turn 3, which may take 3 more, but the policy's context is 13"
    )
    with pytest.raises(RunError, match=message):
        talked(lambda prompt, sample: "a", max_positions=13)
    with pytest.raises(RunError, match=r"has 7 tokens before its turn 2, .* context is 9"):
        talked(lambda prompt, sample: "a", max_positions=9)


def test_an_episode_that_is_over_needs_no_room() -> None:
    # "a" and its end and "c" after two tokens make 5; the longer prompt's episode is over with 3 + 3 tokens.
    found, _ = talked(lambda prompt, sample: "aad" if prompt == "bb" else "ad"[sample > 9], max_positions=8)
    assert found.episodes[0][0].turns == ["a", "d"] and found.episodes[1][0].turns == ["aad"]


def test_a_turn_that_was_cut_off_gets_the_first_of_the_stop_tokens() -> None:
    class Stops(Talker):
        @property
        def tokenizer(self) -> CharacterTokenizer:
            tokenizer = super().tokenizer
            tokenizer.stop_ids = (2, 1)
            return tokenizer

    task = task_of(["a"], reply=reply, max_turns=2, demonstrate=lambda example, rng: ["a", "b"])
    talker, noise = Stops(lambda prompt, sample: "abc"), name_noise(0, 0, [0], [0])
    batch = encode_prompts(task, TOKENIZER, 64, 3).batch("train", [0])
    found = rollout.rollout(talker, task, batch, noise, SamplingConfig(max_tokens=3))
    assert found.episodes[0][0].ids == [A, B, C, END, C, A, B, C]
    shown = demonstrations(task, batch, noise, talker.tokenizer)
    assert shown.episodes[0][0].ids == [A, END, C, B, END] and shown.tokens.shape[2] == 6


def test_short_episodes_of_long_turns_share_one_shape() -> None:
    assert talked(lambda prompt, sample: "ad"[sample > 9], max_tokens=20, max_positions=64)[0].tokens.shape[2] == 16


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("common", "shared"), [(14, 0), (15, 16), (16, 17)])
def test_sixteen_common_tokens_are_worth_a_pass_of_their_own(common: int, shared: int) -> None:
    prompts = encode_prompts(task_of(["a" * common + "b", "a" * common + "c"]), TOKENIZER, 64, 4)
    batch = prompts.batch("train", [1])
    assert prompts.shared_prefix_length == batch.shared_prefix_length == shared  # with the begin token
    assert batch.ids.shape == (1, shared + rollout.bucket(common + 2 - shared))


def test_what_is_shared_is_shared_by_the_held_out_prompts_too() -> None:
    task = Task("t", [{"prompt": "a" * 30}] * 2, [{"prompt": "a" * 20 + "b" * 10}], success=lambda **_: [])
    prompts = encode_prompts(task, TOKENIZER, 64, 4)
    assert prompts.shared_prefix_length == 21 and prompts.batch("held_out", [0]).lengths.tolist() == [31]
    long = Task("t", [{"prompt": "a"}], [{"prompt": "a"}, {"prompt": "b" * 70}], success=lambda **_: [])
    with pytest.raises(UserError, match=r"prompt 1 of t \(held_out\) has 71 tokens"):
        encode_prompts(long, TOKENIZER, 64, 4)


def test_texts_are_sampled_by_the_place_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    talker, made = Scripted(lambda prompt, sample: prompt + "abc"[sample]), []
    monkeypatch.setattr(play, "make_actor", lambda policy, replicas: made.append(replicas.count) or talker)
    policy = load("scratch", scratch=ScratchConfig("abcd", 16, 1, 2))
    sampling = SamplingConfig(max_tokens=6, temperature=0.3)
    prompts = ["a", "b", "c", "d", "aa", "bb", "cc", "dd", "ab"]
    texts = rollout.sample_text(policy, prompts, sampling, num_samples=3, seed=4)
    assert texts == [[prompt + x for x in "abc"] for prompt in prompts]
    [(batch, noise, asked)] = talker.calls
    assert made == [8] and asked == sampling and (noise.seed, noise.step) == (4, 0)
    assert noise.prompt_ids.tolist() == list(range(16)) and noise.samples.tolist() == [[0, 1, 2]] * 16
    assert [e["prompt"] for e in batch.examples] == prompts + prompts[:7]  # filled up for eight devices
    rollout.sample_text(policy, prompts[:3], sampling, num_samples=1, seed=4)
    assert made[1] == 3 and talker.calls[1][1].prompt_ids.tolist() == [0, 1, 2]
    assert math.prod(talker.calls[1][1].samples.shape) == 3
