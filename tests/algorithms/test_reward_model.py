"""A reward model's evaluation and its use as a reward, with scripted completions and scores that are given by hand."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import letters
import numpy as np
import pytest
from scripted import Scripted

from grpo_jax import reward_model
from grpo_jax.algorithms import Batch, StepContext, algorithm_of
from grpo_jax.algorithms import reward_model as method
from grpo_jax.algorithms.forward import HEAD
from grpo_jax.errors import UserError
from grpo_jax.evaluation import NOISE_STEP, success_interval
from grpo_jax.experiment import Experiment, override
from grpo_jax.policy import load
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rollout import Actor, bucket, encode_prompts, make_actor
from grpo_jax.runs import restore
from grpo_jax.sharding import Replicas

TOKENIZER = CharacterTokenizer("abcd")


class Said(Actor):
    """A policy on its devices that says what a script says."""

    def generate(self, *arguments: Any) -> Any:
        return SCRIPT.generate(*arguments)


ANSWERS = {0: "aaa", 1: "b", 2: "cd", 3: "ca"}  # paid 1, 0, 0 and 1/3; "aaa" is cut off at three tokens
SCRIPT = Scripted(lambda prompt, sample: "bb" if (prompt, sample) == ("b", 1) else ANSWERS[sample % 4])


def text_of(ids: np.ndarray) -> str:
    return TOKENIZER.decode(ids.tolist())


def scored_by(value: Callable[[str, str], float], seen: list[Any] | None = None) -> Callable[..., Any]:
    """What stands in for the compiled scorer: (trainable, frozen, batch of one device) -> scores [1, P, G]."""

    def score(trainable: Any, frozen: Any, batch: Batch) -> np.ndarray:
        batch = Replicas(1).gather(batch)
        pairs = zip(batch.tokens, batch.valid, strict=True)
        texts = [[text_of(ids[valid]) for ids, valid in zip(*group, strict=True)] for group in pairs]
        prompts = [text_of(ids[:size]) for ids, size in zip(batch.prompts, batch.lengths, strict=True)]
        if seen is not None:
            seen.append((trainable, prompts, texts, batch))
        found = [[value(prompt, text) for text in group] for prompt, group in zip(prompts, texts, strict=True)]
        return np.array(found, np.float32)[None]

    return score


def evaluated(
    value: Callable[[str, str], float], monkeypatch: pytest.MonkeyPatch, split: str = "held_out", **changes: Any
) -> Any:
    options = {"evaluation.num_samples": 4, "seed": 6}
    changes = {key.replace("__", "."): v for key, v in changes.items()}
    config: Experiment = override(letters.config, {"method": "reward_model", **options, **changes})
    actor = Said(*make_actor(load("scratch", scratch=config.policy.scratch), Replicas(1)))
    context = StepContext(config, encode_prompts(config.task, TOKENIZER, 64, 3), actor, actor)
    seen: list[Any] = []
    monkeypatch.setattr(method, "scorer", lambda *_: scored_by(value, seen))
    SCRIPT.calls.clear()
    return algorithm_of(config).evaluate(context, split), seen  # type: ignore[arg-type]


def test_it_is_evaluated_on_pairs_of_every_prompt_labelled_by_the_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pairs are "aaa" above "b" (or "bb"), and "ca" above "cd". It is right about the first by 2, and wrong about
    # the second by 1.
    values = {"aaa": 3.0, "b": 1.0, "bb": 1.0, "ca": 0.5, "cd": 1.5}
    found, seen = evaluated(
        lambda prompt, text: values[text], monkeypatch, evaluation__batch_size=12, sampling__temperature=0.7
    )
    assert (found.split, found.num_prompts, found.num_samples, found.num_pairs) == ("held_out", 4, 4, 8)
    assert found.temperature == 0.7 and found.success == 1 / 2  # its completions are sampled as in training
    assert (found.success_low, found.success_high) == success_interval(np.array([[True], [False]] * 4))
    assert found.reward == pytest.approx((3 + 1 + 0.5 + 1.5) / 4)
    assert found.log_loss == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2)
    sure, less = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))  # right with .88, wrong with .73
    assert found.calibration_error == pytest.approx((1 - sure) / 2 + less / 2)
    assert found.mean_length == (3 * (3 + 2 + 3 + 3) + (3 + 3 + 3 + 3)) / 16  # with the ends, but of "aaa"
    assert found.clipped_ratio == 1 / 4
    assert (found.mean_turns, found.pass_at_k) == (1.0, {})
    # 12 completions at once are 3 prompts; the second batch holds the fourth and repetitions of it.
    assert [prompts for _, prompts, _, _ in seen] == [["bd", "cb", "dc"], ["b"] * 3]
    calls = [(int(noise.seed), int(noise.step), noise.prompt_ids.tolist()) for _, noise, _ in SCRIPT.calls]
    assert calls == [(6, NOISE_STEP, [0, 1, 2]), (6, NOISE_STEP, [3, 3, 3])]
    assert len(found.records) == 16
    assert [(r["prompt"], r["completion"], r["label"], r["learned_reward"]) for r in found.records[-4:]] == [
        ("b", "aaa", "chosen", 3.0), ("b", "bb", "rejected", 1.0), ("b", "ca", "chosen", 0.5),
        ("b", "cd", "rejected", 1.5),
    ]  # fmt: skip
    assert found.to_dict()["num_pairs"] == 8 and "records" not in found.to_dict()


def test_pairs_without_a_label_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = {"same": lambda *, completions, **_: [float(c in ("aaa", "cd", "ca")) for c in completions]}
    found, _ = evaluated(lambda prompt, text: float(text == "aaa"), monkeypatch, rewards=rewards)
    assert found.num_pairs == 4 and found.success == 1.0  # "cd" and "ca" are paid the same
    assert found.log_loss == pytest.approx(math.log1p(math.exp(-1)))
    nothing, _ = evaluated(
        lambda prompt, text: 1.0, monkeypatch, rewards={"none": lambda *, completions, **_: [1.0] * len(completions)}
    )
    assert (nothing.num_pairs, nothing.success_low, nothing.success_high) == (0, 0.0, 1.0)
    assert math.isnan(nothing.success) and math.isnan(nothing.log_loss) and math.isnan(nothing.calibration_error)
    assert nothing.reward == 1.0


@pytest.mark.parametrize(("asked", "sampled"), [(1, 2), (2, 2), (3, 2), (5, 4)])
def test_an_even_number_of_completions_is_compared(asked: int, sampled: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = evaluated(
        lambda prompt, text: float(text == "aaa"), monkeypatch, "train", evaluation__num_samples=asked,
        evaluation__num_prompts=5,
    )  # fmt: skip
    assert (found.split, found.num_prompts, found.num_samples) == ("train", 5, sampled)
    assert found.num_pairs == 5 * sampled // 2 and SCRIPT.calls[0][1].samples.shape == (5, sampled)
    assert [record["prompt"] for record in found.records[::sampled]] == ["b", "c", "d", "bc", "cd"]


def test_labelled_columns_are_one_pair_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = dict(preferences__completions="columns", group_size=2)
    found, seen = evaluated(lambda prompt, text: float(text == "aab"), monkeypatch, **changes)
    assert not SCRIPT.calls and seen[0][2] == [["aab", "dd"]] * 4
    assert (found.num_samples, found.num_pairs, found.success) == (2, 4, 1.0)


def test_a_head_that_says_nothing_is_right_about_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = evaluated(lambda prompt, text: 0.0, monkeypatch)
    assert found.success == 0 and found.log_loss == pytest.approx(math.log(2))


# As a reward ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A run in the directory `run`, whose scorer gives the number of a's, and notes what it was given."""
    seen: list[Any] = []
    policy = load("scratch", scratch=letters.config.policy.scratch)
    head = {HEAD[0]: np.ones(16, np.float32), HEAD[1]: np.float32(7)}
    monkeypatch.setattr(restore, "restore_with_head", lambda run_dir: (policy, head))
    monkeypatch.setattr(restore, "method_of_run", lambda run_dir: "grpo" if "grpo" in run_dir else "reward_model")
    monkeypatch.setattr(method, "scorer", lambda model, shared, replicas: scored_by(lambda p, t: t.count("a"), seen))
    reward_model._scorer_of.cache_clear()
    return seen


def test_a_trained_reward_model_pays_for_the_tokens_that_were_sampled(trained: list[Any], tmp_path: Path) -> None:
    learned = reward_model.learned_reward(tmp_path / "run")
    a, b = TOKENIZER.encode("ab")
    prompts = ["b", [{"role": "user", "content": "cd"}], "d", "b", "c"]
    texts: list[Any] = ["aa", [{"role": "assistant", "content": "ab"}], "aaa", "b", "a"]
    ids = [[a, a, 0], [a, b], [a, b], [], [a, 2]]
    assert learned(prompts=prompts, completions=texts, completion_ids=ids, other=None) == [2, 1, 3, 0, 1]
    [(trainable, asked, said, batch)] = trained
    assert len(asked) == bucket(5) == 6 and asked == ["b", "cd", "d", "b", "c", "b"] and said[5] == ["aa"]
    rows = [batch.tokens[i, 0][batch.valid[i, 0]].tolist() for i in range(5)]
    # Ids that are not the text's, or that there are none of, are replaced by the text's and its end.
    assert rows == [[a, a, 0], [a, b], [a, a, a, 2], [b, 2], [a, 2]]
    assert trainable[HEAD[1]].tolist() == [7] and "embed" in trainable
    assert learned.__qualname__ == f"learned_reward({str(tmp_path / 'run')!r})"


def test_what_no_reward_model_can_score_is_one_sentence(trained: list[Any]) -> None:
    talk = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    given = {"prompts": ["b"], "completion_ids": [[]]}
    assert reward_model.learned_reward("run")(completions=[talk], **given) == [1.0]  # one turn and what answered it
    with pytest.raises(UserError, match="scores completions of one turn"):
        reward_model.learned_reward("run")(completions=[[*talk, talk[0]]], **given)
    with pytest.raises(UserError, match=r"the run 'grpo' has trained a policy \(method 'grpo'\), no reward model"):
        reward_model.learned_reward("grpo")(completions=["a"], **given)
