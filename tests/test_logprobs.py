"""Log-probabilities and entropies: their values, and that no array of tokens times vocabulary is ever held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.logprobs import Completions, completion_logprobs, token_logprobs
from grpo_jax.policy import transformer
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.transformer import TokenRows, bind, forward

CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    sliding_layers=(False, False),
    query_scale=8**-0.5,
    tied=True,
)
LENGTHS = np.array([4, 6])
PROMPTS = np.random.default_rng(0).integers(0, 29, (2, 6))
TOKENS = np.random.default_rng(1).integers(0, 29, (2, 3, 5))
VALID = np.arange(5) < np.array([[5, 3, 1], [2, 5, 4]])[..., None]
HIDDEN = np.random.default_rng(2).normal(size=(2, 3, 5, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    params = transformer.initialise(CONFIG, 0)
    return {**params, "embed": 20 * params["embed"]}  # so that distributions are far from uniform


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_they_are_the_log_softmax_of_the_whole_logits(params, temperature):
    model = bind(CONFIG, params)
    scores = np.asarray(model.logits(jnp.asarray(HIDDEN)), np.float64) / temperature
    whole = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    logprobs, entropy = token_logprobs(model, jnp.asarray(HIDDEN), jnp.asarray(TOKENS), temperature=temperature)
    assert logprobs.shape == entropy.shape == TOKENS.shape
    assert logprobs.dtype == entropy.dtype == jnp.float32
    expected = np.take_along_axis(whole, TOKENS[..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(whole) * whole).sum(-1), rtol=0, atol=2e-5)


def test_temperature_0_counts_as_1(params):
    # Greedy decoding reports the log-probabilities at temperature 1, so recomputed ones must be at temperature 1 too.
    arguments = bind(CONFIG, params), jnp.asarray(HIDDEN), jnp.asarray(TOKENS)
    for greedy, one in zip(token_logprobs(*arguments, temperature=0), token_logprobs(*arguments), strict=True):
        np.testing.assert_array_equal(greedy, one)


def test_entropy_worked_by_hand():
    # The vocabulary has 4 tokens and its embedding is the identity, so logits are the hidden states. The entropy of the
    # probabilities 1/2, 1/4, 1/8, 1/8 is 1/2 ln 2 + 1/4 ln 4 + 2/8 ln 8 = 1.75 ln 2; of equal ones ln 4; of 1, 0.
    config = ModelConfig(4, 4, 4, 1, 1, 1, 4, 16, sliding_layers=(False,), tied=True)
    model = bind(config, {**transformer.initialise(config, 0), "embed": jnp.eye(4)})
    hidden = jnp.array([[np.log(0.5), np.log(0.25), np.log(0.125), np.log(0.125)], [3.0] * 4, [200.0, 0.0, 0.0, 0.0]])
    logprobs, entropy = token_logprobs(model, hidden, jnp.array([1, 2, 0]))
    np.testing.assert_allclose(entropy, [1.75 * np.log(2), np.log(4), 0.0], atol=1e-6)
    np.testing.assert_allclose(logprobs, [np.log(0.25), np.log(0.25), 0.0], atol=1e-6)
    # At temperature 2 the logits halve: weights 2^-1/2, 2^-1, 2^-3/2, 2^-3/2.
    weights = 2.0 ** -np.array([0.5, 1.0, 1.5, 1.5])
    p = weights / weights.sum()
    _, entropy = token_logprobs(model, hidden[:1], jnp.array([1]), temperature=2.0)
    np.testing.assert_allclose(entropy, [-(p * np.log(p)).sum()], atol=1e-6)


def weighted_sum(params, chunk):
    logprobs, entropy = token_logprobs(bind(CONFIG, params), params["hidden"], jnp.asarray(TOKENS), chunk=chunk)
    weights = np.random.default_rng(3).normal(size=(2, *TOKENS.shape)).astype(np.float32)
    return jnp.sum(weights[0] * logprobs + weights[1] * entropy), (logprobs, entropy)


def plain_sum(params, _):
    whole = jax.nn.log_softmax(bind(CONFIG, params).logits(params["hidden"]))
    logprobs = jnp.take_along_axis(whole, TOKENS[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(whole) * whole, axis=-1)
    weights = np.random.default_rng(3).normal(size=(2, *TOKENS.shape)).astype(np.float32)
    return jnp.sum(weights[0] * logprobs + weights[1] * entropy), (logprobs, entropy)


@pytest.mark.parametrize("chunk", [1, 7, 30, 1000])  # 30 tokens: one by one, not a divisor, exactly, more than all
def test_chunks_change_neither_values_nor_gradients(params, chunk):
    params = {**params, "hidden": jnp.asarray(HIDDEN)}
    both = [
        jax.jit(jax.value_and_grad(function, has_aux=True), static_argnums=1)(params, chunk)
        for function in (weighted_sum, plain_sum)
    ]
    ((_, values), gradient), ((_, expected), plain_gradient) = both
    np.testing.assert_allclose(values, expected, rtol=0, atol=2e-5)
    for path in ("embed", "hidden"):
        assert np.abs(plain_gradient[path]).max() > 0.1
        np.testing.assert_allclose(gradient[path], plain_gradient[path], rtol=0, atol=5e-5)


def sizes(jaxpr) -> set[int]:
    """The sizes of all arrays that a jaxpr and its inner jaxprs compute."""
    found = {int(np.prod(var.aval.shape)) for eqn in jaxpr.eqns for var in eqn.outvars}
    for inner in jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns]):
        if hasattr(inner, "eqns"):
            found |= sizes(getattr(inner, "jaxpr", inner))
    return found


def test_no_array_of_tokens_times_vocabulary_is_ever_held():
    # 2 prompts x 8 rows x 16 tokens = 256 tokens, a vocabulary of 1021 (prime, so that no other size is a multiple of
    # it by chance), chunks of 32: nothing may be larger than 32 x 1021, in either pass.
    config = ModelConfig(**{**vars(CONFIG), "vocab_size": 1021})
    tokens = jnp.ones((2, 8, 16), jnp.int32)

    def loss(params, chunk):
        completions = Completions(jnp.ones((2, 4), jnp.int32), jnp.array([4, 3]), tokens, tokens == 1)
        logprobs, entropy = completion_logprobs(bind(config, params), completions, chunk=chunk)
        return logprobs.sum() + entropy.sum()

    params = transformer.abstract(config)
    jaxpr = jax.make_jaxpr(jax.grad(loss), static_argnums=1)
    assert max(sizes(jaxpr(params, 32).jaxpr)) == 32 * 1021
    assert max(sizes(jaxpr(params, 256).jaxpr)) == 256 * 1021  # the measure finds large arrays when there are some

    def temporary(chunk):
        lowered = jax.jit(jax.grad(loss), static_argnums=1).lower(params, chunk)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    saved = temporary(256) - temporary(32)
    assert saved > 0.8 * (256 - 32) * 1021 * 4  # at least one [B, T, V] of float32, less the chunk


@pytest.fixture(scope="module")
def of_completions(params):
    def values(prompts, tokens):
        completions = Completions(prompts, LENGTHS, tokens, VALID)
        return completion_logprobs(bind(CONFIG, params), completions, temperature=0.7)

    return jax.jit(values)


def test_completions_get_what_a_row_without_padding_gets(params, of_completions):
    model = bind(CONFIG, params)
    logprobs, entropy = of_completions(PROMPTS, TOKENS)
    for p, g in [(0, 0), (0, 1), (1, 2), (0, 2)]:
        size = int(VALID[p, g].sum())
        row = np.concatenate([PROMPTS[p, : LENGTHS[p]], TOKENS[p, g, :size]])[None, None]
        hidden, _ = forward(model, TokenRows(row, jnp.arange(row.size)[None, None], jnp.ones(row.shape, bool)))
        whole = jax.nn.log_softmax(model.logits(hidden[0, 0]) / 0.7)[LENGTHS[p] - 1 : -1]
        expected = np.asarray(whole)[np.arange(size), TOKENS[p, g, :size]]
        np.testing.assert_allclose(logprobs[p, g, :size], expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(entropy[p, g, :size], -(np.exp(whole) * whole).sum(-1), rtol=0, atol=2e-5)


def test_places_without_a_token_are_finite_and_affect_no_other(of_completions):
    junk_prompts = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, 28)
    before, after = of_completions(PROMPTS, TOKENS), of_completions(junk_prompts, np.where(VALID, TOKENS, 28))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[VALID], np.asarray(b)[VALID])
        assert np.isfinite(b).all()


def test_completions_of_one_token_need_no_forward_of_their_own(params):
    model = bind(CONFIG, params)
    values = completion_logprobs(model, Completions(PROMPTS, LENGTHS, TOKENS[..., :1], VALID[..., :1]))
    whole = completion_logprobs(model, Completions(PROMPTS, LENGTHS, TOKENS, VALID))
    for one, all_of_them in zip(values, whole, strict=True):
        np.testing.assert_allclose(one, all_of_them[..., :1], rtol=0, atol=1e-6)
