"""What objectives make of log-probabilities and values that are given by hand: nothing is compiled."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import letters
import numpy as np
import pytest

from grpo_jax.algorithms import ALGORITHMS, PPO, Batch, Setup, algorithm_of, forward
from grpo_jax.algorithms.forward import HEAD, Forward, head_values, new_head
from grpo_jax.algorithms.grpo import count_totals, loss_inputs, make_recompute_logprobs
from grpo_jax.algorithms.pairs import counted_pairs
from grpo_jax.algorithms.ppo import make_estimate_advantages
from grpo_jax.errors import UserError
from grpo_jax.experiment import Method, override

P, G, T = 2, 2, 3
RNG = np.random.default_rng(3)
MASK = np.array([[[1, 1, 0], [1, 1, 1]], [[0, 0, 0], [1, 0, 0]]], bool)
KEPT = np.array([[True, True], [True, False]])
ACTIVE = MASK & KEPT[..., None]  # 5 tokens of 2 completions of 1 group


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape or (P, G, T)).astype(np.float32)


def batch(**changes: object) -> Batch:
    given = Batch(
        np.ones((P, 4), int), np.ones(P, int), np.ones((P, G, T), int), MASK, MASK, random(), random(P, G), KEPT
    )
    return given._replace(**changes)  # type: ignore[arg-type]


def setup(**changes: object) -> Setup:
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return Setup(None, override(letters.config, {"prompts_per_step": 2, **overrides}), 0, None)  # type: ignore[arg-type]


def given_by(key: str) -> Forward:
    """A forward pass whose arrays are in the parameters, by name; `key` is the log-probabilities'."""

    def of(params: dict, name: str, piece: Batch) -> jax.Array:
        # Of a micro-batch, the prompts whose number stands in their first token.
        return jnp.asarray(params[name])[piece.prompts[:, 0]]

    def both(params: dict, _: dict, piece: Batch) -> tuple[jax.Array, jax.Array]:
        return of(params, key, piece), of(params, "entropy", piece)

    return Forward(
        logprobs=both,
        logprobs_and_values=lambda params, frozen, piece: (*both(params, frozen, piece), of(params, "values", piece)),
        scores=lambda params, frozen, piece: of(params, "scores", piece),
    )


NUMBERED = np.tile(np.arange(P)[:, None], (1, 4))


def test_the_whole_batch_counts_tokens_completions_and_groups() -> None:
    totals = {name: int(value) for name, value in count_totals(setup(), ACTIVE).items()}
    assert totals == {"num_tokens": 5, "num_sequences": 2, "num_groups": 1}
    assert int(count_totals(setup(), MASK)["num_groups"]) == 2


def test_each_array_of_a_batch_goes_to_its_own_place_in_the_loss() -> None:
    names = ("logprobs", "sampler_logprobs", "correction", "high_entropy")
    given = batch(**{name: random() for name in names}, advantages=random(P, G))
    mine = {name: random() for name in ("logprobs", "entropy", "ref_logprobs")}
    totals = {"num_tokens": 1, "num_sequences": 2, "num_groups": 3, "num_high_entropy": 4}
    inputs = loss_inputs(setup()._replace(axis_name="axis"), given, totals, **mine)  # type: ignore[arg-type]
    for name, expected in {
        **mine,
        "old_logprobs": given.logprobs,
        **{name: getattr(given, name) for name in names[1:]},
        "mask": MASK,
        "advantages": np.repeat(given.advantages[..., None], T, -1),  # type: ignore[index]
    }.items():
        np.testing.assert_array_equal(getattr(inputs, name), np.reshape(expected, (P * G, T)), err_msg=name)
    assert (inputs.group_size, inputs.axis_name) == (G, "axis")
    assert {name: getattr(inputs, name) for name in totals} == totals
    by_token = batch(advantages=random())
    bare = loss_inputs(setup(), by_token, {}, logprobs=mine["logprobs"], entropy=mine["entropy"])
    np.testing.assert_array_equal(bare.advantages, by_token.advantages.reshape(P * G, T))  # type: ignore[union-attr]
    np.testing.assert_array_equal(bare.sampler_logprobs, by_token.logprobs.reshape(P * G, T))
    assert bare.ref_logprobs is bare.correction is bare.high_entropy is None


def test_pairs_count_where_both_completions_do() -> None:
    kept = np.array([[True, True, True, False], [False, True, True, True]])
    assert counted_pairs(batch(sample_mask=kept)).tolist() == [True, False, False, True]


@pytest.mark.parametrize("micro", [1, 2])
def test_a_sampler_that_differs_is_measured_over_the_tokens_that_count(micro: int) -> None:
    own = {"own": random(), "entropy": random()}
    given = batch(prompts=NUMBERED)
    mode = {"loss__importance_sampling_mode": "token_truncate", "loss__importance_sampling_clip_max": 1.5}
    parts = setup(gradient_accumulation_steps=micro, **mode)
    found, metrics = make_recompute_logprobs(parts, given_by("own"))(own, {}, None, given)
    np.testing.assert_array_equal(found.logprobs, own["own"])
    np.testing.assert_array_equal(found.sampler_logprobs, given.logprobs)
    weights = np.minimum(np.exp(own["own"] - given.logprobs), 1.5)[ACTIVE]
    np.testing.assert_allclose(np.asarray(found.correction)[ACTIVE], weights, rtol=1e-5)
    gaps = np.abs(own["own"] - given.logprobs)[ACTIVE]
    expected = {
        "sampling/logprob_difference/mean": gaps.mean(),
        "sampling/logprob_difference/max": gaps.max(),
        "sampling/importance_sampling_ratio/mean": weights.mean(),
        "sampling/importance_sampling_ratio/min": weights.min(),
        "sampling/importance_sampling_ratio/max": weights.max(),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert metrics["sampling/importance_sampling_ratio/min"] < 1 < metrics["sampling/importance_sampling_ratio/max"]


@pytest.mark.parametrize("shift", [-0.2, 0.2])
def test_the_least_and_the_largest_ratio_are_those_of_tokens_that_count(shift: float) -> None:
    given = batch(prompts=NUMBERED)
    own = {"own": given.logprobs + np.float32(shift), "entropy": random()}
    parts = setup(loss__importance_sampling_mode="token_truncate")
    _, metrics = make_recompute_logprobs(parts, given_by("own"))(own, {}, None, given)
    for name in ("min", "mean", "max"):
        assert float(metrics[f"sampling/importance_sampling_ratio/{name}"]) == pytest.approx(np.exp(shift), rel=1e-4)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("whiten", [False, True])
def test_a_critics_metrics_are_those_of_the_tokens_that_count(micro: int, whiten: bool) -> None:
    own = {"own": random(), "entropy": random(), "values": random()}
    reference = {"own": random(), "entropy": random(), "values": random()}
    given = batch(prompts=NUMBERED)
    options = dict(method="ppo", ppo__kl_coef=0.3, ppo__gamma=0.9, ppo__lam=0.5, ppo__whiten_advantages=whiten)
    parts = setup(gradient_accumulation_steps=micro, **options)
    found, metrics = make_estimate_advantages(parts, given_by("own"))(own, {}, reference, given)
    values, kl = own["values"], given.logprobs - reference["own"]
    rewards, advantages = np.where(ACTIVE, -0.3 * kl, 0), np.zeros((P, G, T))
    for g, size in ((0, 2), (1, 3)):  # the completions of prompt 0; none of prompt 1 counts
        rewards[0, g, size - 1] += given.rewards[0, g]
        after = value_after = 0.0
        for t in reversed(range(size)):
            after = rewards[0, g, t] + 0.9 * value_after - values[0, g, t] + 0.9 * 0.5 * after
            advantages[0, g, t], value_after = after, values[0, g, t]
    returns = np.where(ACTIVE, advantages + values, 0)
    np.testing.assert_allclose(found.values, values)
    np.testing.assert_allclose(np.asarray(found.returns)[ACTIVE], returns[ACTIVE], rtol=1e-4, atol=1e-5)
    ours = np.asarray(found.advantages)[ACTIVE]
    if whiten:
        assert ours.mean() == pytest.approx(0, abs=1e-5) and ours.std() == pytest.approx(1, abs=0.15)
        assert np.argsort(ours).tolist() == np.argsort(advantages[ACTIVE]).tolist()
    else:
        np.testing.assert_allclose(ours, advantages[ACTIVE], rtol=1e-4, atol=1e-5)
    left = (returns - values)[ACTIVE]
    expected = {
        "kl": kl[ACTIVE].sum() / 5,  # of each token
        "objective/kl": kl[ACTIVE].sum() / 2,  # of each completion
        "objective/rlhf_reward": rewards.sum() / 2,
        "value/explained_variance": 1 - left.var() / returns[ACTIVE].var(),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)


def test_without_a_reference_there_is_no_kl() -> None:
    own, given = {"own": random(), "entropy": random(), "values": random()}, batch(prompts=NUMBERED)
    parts = setup(method="ppo", ppo__kl_coef=0.0)
    _, metrics = make_estimate_advantages(parts, given_by("own"))(own, {}, None, given)
    assert set(metrics) == {"objective/rlhf_reward", "value/explained_variance"}
    assert float(metrics["objective/rlhf_reward"]) == pytest.approx(given.rewards[0].mean())


def test_ppos_loss_is_the_policys_and_the_critics_share_of_the_whole() -> None:
    own = {"logprobs": random(), "entropy": random(), "values": random()}
    old, returns = random(), random()
    given = batch(prompts=NUMBERED, mask=ACTIVE, values=old, returns=returns, advantages=random())
    parts = setup(method="ppo", ppo__vf_coef=0.25, ppo__cliprange_value=0.4, num_iterations=2, loss__loss_type="dapo")
    method = algorithm_of(parts.experiment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setup, "forward", lambda self, temperature: given_by("logprobs"))
        objective = method.make_objective(parts)
    _, totals = objective.prepare(own, {}, given)
    assert {name: int(value) for name, value in totals.items()} == {
        "num_tokens": 5,
        "num_sequences": 2,
        "num_groups": 1,
    }
    totals = {**totals, "num_tokens": 10}  # as if another device had as many
    result, (metrics, logprobs) = objective.loss(own, {}, None, given, totals)
    held = np.clip(own["values"], old - 0.4, old + 0.4)
    critic = 0.5 * np.maximum((own["values"] - returns) ** 2, (held - returns) ** 2)[ACTIVE].sum() / 10
    ratio, advantages = np.exp(own["logprobs"] - given.logprobs), np.asarray(given.advantages)
    policy = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)[ACTIVE].sum() / 10
    assert float(metrics["value_loss"]) == pytest.approx(critic, rel=1e-4)
    assert float(metrics["policy_loss"]) == pytest.approx(policy, rel=1e-4)
    assert float(result) == float(metrics["loss"]) == pytest.approx(policy + 0.25 * critic, rel=1e-4)
    assert logprobs is not None and logprobs.shape == (P, G, T)


@pytest.mark.parametrize("remat", [False, True])
def test_every_forward_pass_has_the_shared_prefix_the_temperature_and_the_memory(
    remat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    hidden = np.arange(2 * 2 * 4 * 2, dtype=np.float32).reshape(2, 2, 4, 2)

    def completion_hidden(model: str, completions: Any, *, after_last: bool, **options: Any) -> np.ndarray:
        asked.append(("hidden", model, completions, after_last, options))
        return hidden if after_last else hidden[:, :, :T]

    def logprobs(name: str) -> Any:
        return lambda model, *arrays, **options: asked.append((name, model, arrays, options)) or ("logprobs", "entropy")

    monkeypatch.setattr(forward, "completion_hidden", completion_hidden)
    monkeypatch.setattr(forward, "token_logprobs", logprobs("tokens"))
    monkeypatch.setattr(forward, "packed_logprobs", logprobs("packed"))
    model = SimpleNamespace(bind=lambda trainable, frozen: f"bound to {sorted({**trainable, **frozen})}")
    passed = forward.make_forward(model, 17, temperature=0.7, remat=remat)  # type: ignore[arg-type]
    head, frozen = {HEAD[0]: np.array([1, 10], np.float32), HEAD[1]: np.float32(0.5)}, {"embed": 0}
    given, bound = batch(), "bound to ['embed', 'value_head.bias', 'value_head.kernel']"
    of_hidden = ("hidden", bound, given.completions, False, {"shared_prefix_length": 17, "remat": remat})

    assert passed.logprobs(head, frozen, given) == ("logprobs", "entropy")
    assert asked[0] == of_hidden and asked[1][:2] == ("tokens", bound) and asked[1][3] == {"temperature": 0.7}
    assert asked[1][2][1] is given.tokens
    asked.clear()
    *found, values = passed.logprobs_and_values(head, frozen, given)
    assert found == ["logprobs", "entropy"] and asked[0] == of_hidden and asked[1][3] == {"temperature": 0.7}
    np.testing.assert_allclose(values, hidden[:, :, :T] @ [1, 10] + 0.5)
    asked.clear()
    scores = passed.scores(head, frozen, given)
    assert asked == [(*of_hidden[:3], True, of_hidden[4])]
    # The state after the last of 2, 3, 0 and 1 valid tokens.
    after = np.array([[hidden[0, 0, 2], hidden[0, 1, 3]], [hidden[1, 0, 0], hidden[1, 1, 1]]])
    np.testing.assert_allclose(scores, after @ [1, 10] + 0.5)
    asked.clear()
    packed = given._replace(segments=np.ones((P, 1, T), int))
    assert passed.logprobs(head, frozen, packed) == ("logprobs", "entropy")
    [(name, _, arrays, options)] = asked
    assert (name, options) == ("packed", {"temperature": 0.7, "remat": remat})
    assert arrays[0] is packed.tokens and arrays[1] is packed.segments


def test_a_method_without_an_algorithm_cannot_be_trained() -> None:
    class Needs(Method):
        name = "needs"

    with pytest.raises(UserError, match=r"^Experiment.method = 'needs' says what it needs, but not how it trains"):
        algorithm_of(override(letters.config, {"method": Needs()}))
    own = PPO()
    assert algorithm_of(override(letters.config, {"method": own})) is own
    assert {name: type(algorithm).__name__ for name, algorithm in ALGORITHMS.items()} == {
        "grpo": "GRPO", "ppo": "PPO", "sft": "SFT", "rft": "RFT", "dpo": "DPO", "reward_model": "RewardModel",
    }  # fmt: skip


def test_a_new_head_gives_0_and_a_trained_one_its_weights_and_bias() -> None:
    head = new_head(4)
    assert {name: value.shape for name, value in head.items()} == {HEAD[0]: (4,), HEAD[1]: ()}
    hidden = random(2, 4)
    np.testing.assert_array_equal(head_values(hidden, head), [0, 0])
    weights = random(4)
    trained = head_values(hidden, {HEAD[0]: weights, HEAD[1]: 0.5})
    np.testing.assert_allclose(trained, hidden @ weights + 0.5, rtol=1e-5)
