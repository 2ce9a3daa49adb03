"""The sampler: the log-probability contract, noise by name, when rows and turns end, the inverse CDF, truncation."""

from functools import cache, partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis.extra import numpy as numpy_st
from scipy.stats import chi2

from grpo_jax.logprobs import Completions, completion_logprobs
from grpo_jax.policy import transformer
from grpo_jax.policy.config import ModelConfig
from grpo_jax.policy.transformer import TokenRows, bind, forward
from grpo_jax.sampler import (
    Noise,
    Observation,
    Settings,
    choose_token,
    continue_generation,
    generate,
    inverse_cdf,
    row_keys,
    truncated,
)

CONFIG = ModelConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    sliding_window=4,
    sliding_layers=(True, False),
    query_scale=8**-0.5,
    tied=True,
)
PAD, STOPS, TURN = 0, (1, 2), 10
LENGTHS = np.array([6, 4, 5])
PROMPTS = np.random.default_rng(0).integers(3, 29, (3, 6))
PROMPTS[:, :3] = PROMPTS[0, :3]  # what they have in common
IDS = np.array([7, 40, 2])


@pytest.fixture(scope="module")
def params():
    params = transformer.initialise(CONFIG, 0)
    return {**params, "embed": 15 * params["embed"]}  # so that distributions are far from uniform


def noise(ids, samples, seed=0, step=3) -> Noise:
    samples = np.broadcast_to(samples, (len(ids), len(samples)))
    return Noise(np.int32(seed), np.int32(step), np.asarray(ids, np.int32), np.asarray(samples, np.int32))


@cache
def compiled(cache_size: int, shared_prefix_length: int, max_tokens: int, stop_ids: tuple[int, ...]):
    chosen = Settings(max_tokens, stop_ids, PAD, cache_size=cache_size, shared_prefix_length=shared_prefix_length)

    def play(params, prompts, lengths, named, temperature):
        return generate(bind(CONFIG, params), prompts, lengths, named, temperature, 1.0, chosen)

    return jax.jit(play)


def sample(
    params, which=(0, 1, 2), samples=range(4), *, width=6, cache_size=TURN - 1, shared_prefix_length=0, max_tokens=TURN,
    temperature=1.0, stop_ids=STOPS, **named,
):  # fmt: skip
    """The generation and the state of some of the prompts, each padded to `width`."""
    which = list(which)
    prompts = np.pad(PROMPTS[which], [(0, 0), (0, width - 6)], constant_values=28)
    play = compiled(cache_size, shared_prefix_length, max_tokens, stop_ids)
    return play(params, prompts, LENGTHS[which], noise(IDS[which], list(samples), **named), temperature)


# Contract


@jax.jit
def recomputed(params, tokens, valid, temperature):
    """What training makes of the tokens: log-probabilities and entropies."""
    return completion_logprobs(
        bind(CONFIG, params), Completions(PROMPTS, LENGTHS, tokens, valid), temperature=temperature
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_reported_log_probabilities_are_those_that_training_recomputes(params, temperature):
    turn, _ = sample(params, temperature=temperature)
    at_temperature, at_1 = (recomputed(params, turn.tokens, turn.mask, np.float32(t))[0] for t in (temperature, 1.0))
    mask = np.asarray(turn.mask)
    assert mask.sum() >= 30
    np.testing.assert_allclose(turn.logprobs[mask], at_temperature[mask], rtol=0, atol=1e-4)
    off = np.abs(turn.logprobs[mask] - at_1[mask]).max()
    assert off < 1e-4 if temperature == 0 else off > 1e-2  # greedy reports temperature 1; the others do not


def test_the_contract_holds_over_turns_with_replies_of_different_lengths(params):
    # Three turns; rows 0 and 3 of every prompt leave after the second. Cache: 3 places for the first turn's tokens but
    # its last, then for each further turn its reply's 5, the token before it and the 4 - 1 that it feeds back: 5 + 4.
    turns, size = [], 4
    chosen = Settings(size, STOPS, PAD, cache_size=(size - 1) + 2 * (5 + size))
    named = noise(IDS, range(4))
    first = jax.jit(lambda params: generate(bind(CONFIG, params), PROMPTS, LENGTHS, named, 1.3, 1.0, chosen))

    @jax.jit
    def further(params, rows, reply, reply_lengths, active):
        observation = Observation(reply, reply_lengths, active)
        return continue_generation(bind(CONFIG, params), rows, observation, named, 1.3, 1.0, chosen)

    rng = np.random.default_rng(5)
    sequences = [[[] for _ in range(4)] for _ in range(3)]  # (token, log-probability or None) of every row

    def note(turn, active):
        for p, g in np.argwhere(active):
            said = np.asarray(turn.mask[p, g])
            assert said[0]
            sequences[p][g] += zip(turn.tokens[p, g][said].tolist(), turn.logprobs[p, g][said].tolist(), strict=True)

    active = np.ones((3, 4), bool)
    turn, rows = first(params)
    note(turn, active)
    turns.append(turn)
    for round_ in range(2):
        if round_ == 1:
            active[:, [0, 3]] = False
        reply_lengths = np.where(active, rng.integers(1, 6, (3, 4)), 0)
        reply = np.where(np.arange(5) < reply_lengths[..., None], rng.integers(3, 29, (3, 4, 5)), 28)
        for p, g in np.argwhere(active):
            sequences[p][g] += [(token, None) for token in reply[p, g, : reply_lengths[p, g]].tolist()]
        turn, rows = further(params, rows, reply, reply_lengths, active)
        assert not np.asarray(turn.mask)[~active].any() and not np.asarray(turn.stopped)[~active].any()
        note(turn, active)
        turns.append(turn)
    stopped = np.asarray(turns[0].stopped)
    assert stopped.any() and not stopped.all()  # rows that were cut and rows that stopped both go on

    longest = max(len(row) for group in sequences for row in group)
    tokens, valid, mask = (np.zeros((3, 4, longest), kind) for kind in (np.int32, bool, bool))
    reported = np.zeros((3, 4, longest), np.float32)
    for p, g in np.ndindex(3, 4):
        for t, (token, logprob) in enumerate(sequences[p][g]):
            tokens[p, g, t], valid[p, g, t], mask[p, g, t] = token, True, logprob is not None
            reported[p, g, t] = logprob or 0.0
    np.testing.assert_allclose(reported[mask], recomputed(params, tokens, valid, 1.3)[0][mask], rtol=0, atol=1e-4)


# Noise by name


SURROUNDINGS = {
    "the prompt alone": dict(which=[1]),
    "another order": dict(which=[2, 1, 0]),
    "a smaller group": dict(samples=range(2)),
    "a larger group": dict(samples=range(7)),
    "a wider bucket": dict(width=11),
    "a larger cache": dict(cache_size=17),
    "a shared prefix": dict(shared_prefix_length=3),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_completion_is_the_same_whatever_surrounds_it(params, name):
    expected, _ = sample(params)
    options = SURROUNDINGS[name]
    turn, _ = sample(params, **options)
    place = options.get("which", [0, 1, 2]).index(1)
    n = min(4, turn.tokens.shape[1])
    np.testing.assert_array_equal(turn.tokens[place, :n], expected.tokens[1, :n])
    np.testing.assert_array_equal(turn.mask[place, :n], expected.mask[1, :n])
    np.testing.assert_allclose(turn.logprobs[place, :n], expected.logprobs[1, :n], rtol=0, atol=1e-5)


def test_a_row_keeps_its_name_when_its_place_in_the_group_changes(params):
    forwards, backwards = sample(params)[0], sample(params, samples=[3, 2, 1, 0])[0]
    np.testing.assert_array_equal(forwards.tokens, backwards.tokens[:, ::-1])


def test_each_part_of_the_name_changes_the_completion(params):
    endless = partial(sample, params, stop_ids=())  # ten tokens each, so that no two are the same by chance
    expected = np.asarray(endless()[0].tokens)
    for other in (dict(seed=1), dict(step=4), dict(samples=range(4, 8))):
        assert (np.asarray(endless(**other)[0].tokens) != expected).any(-1).all(), other
    assert len({tuple(row) for group in expected.tolist() for row in group}) == 12  # samples differ, prompts differ
    # The same prompt under another id: only the name differs.
    twice = compiled(TURN - 1, 0, TURN, ())(params, PROMPTS[[1, 1]], LENGTHS[[1, 1]], noise([40, 41], range(4)), 1.0)[
        0
    ].tokens
    np.testing.assert_array_equal(twice[0], expected[1])
    assert (twice[0] != twice[1]).any(-1).all()


def test_no_two_rows_share_a_key_and_no_two_positions_a_number():
    named = [noise(range(5), range(6), seed, step) for seed in range(3) for step in range(4)]
    keys = np.concatenate([jax.random.key_data(row_keys(name)).reshape(-1, 2) for name in named])
    assert len(np.unique(keys, axis=0)) == 3 * 4 * 5 * 6
    numbers = [float(jax.random.uniform(jax.random.fold_in(row_keys(named[0])[0, 0], t))) for t in range(50)]
    assert len(set(numbers)) == 50


# Turns


def test_stop_tokens_end_rows_are_included_and_everything_after_is_padding(params):
    turn, _ = sample(params, samples=range(16))
    tokens, mask, stopped = (np.asarray(x) for x in (turn.tokens, turn.mask, turn.stopped))
    assert 0.2 < stopped.mean() < 1  # both kinds occur
    for p, g in np.ndindex(mask.shape[:2]):
        stops = np.flatnonzero(np.isin(tokens[p, g], STOPS) & mask[p, g])
        size = stops[0] + 1 if len(stops) else TURN
        np.testing.assert_array_equal(mask[p, g], np.arange(TURN) < size)
        assert stopped[p, g] == bool(len(stops))
    assert (tokens[~mask] == PAD).all()
    assert (np.asarray(turn.logprobs)[~mask] == 0).all()
    assert (np.asarray(turn.logprobs)[mask] < 0).all()
    assert {1, 2} <= set(tokens[mask].tolist())  # any of the stop tokens stops


def test_a_row_cut_by_max_tokens_has_not_stopped(params):
    short, _ = sample(params, max_tokens=3, cache_size=2)
    longer, _ = sample(params)
    np.testing.assert_array_equal(short.tokens, np.where(short.mask, longer.tokens[..., :3], PAD))
    ended = (np.isin(longer.tokens[..., :3], STOPS) & np.asarray(longer.mask[..., :3])).any(-1)
    np.testing.assert_array_equal(short.stopped, ended)
    assert not ended.all()


def test_turns_of_one_token(params):
    one, rows = sample(params, max_tokens=1, cache_size=0)
    np.testing.assert_array_equal(one.tokens, sample(params)[0].tokens[..., :1])
    assert one.mask.all() and rows.cache_length == 0


def test_a_turn_ends_with_its_last_row(params):
    # The loop feeds one token back per iteration, so the length of the cache counts its iterations.
    turn, rows = sample(params, max_tokens=40, cache_size=39, stop_ids=tuple(range(1, 29, 2)))
    longest = int(turn.mask.sum(-1).max())
    assert turn.stopped.all() and 1 < longest < 20
    assert rows.cache_length == longest - 1
    assert int(rows.cache.valid.sum()) == int(turn.mask.sum()) - 12  # every token but each row's last is cached
    turn, rows = sample(params, stop_ids=())
    assert turn.mask.all() and not turn.stopped.any() and rows.cache_length == TURN - 1


def test_temperature_0_takes_the_likeliest_token_whatever_the_noise(params):
    turn, _ = sample(params, temperature=0.0)
    for seed in (1, 2):
        np.testing.assert_array_equal(sample(params, temperature=0.0, seed=seed)[0].tokens, turn.tokens)
    rows, mask = (np.zeros((3, 1, 16), kind) for kind in (int, bool))
    for p in range(3):
        said = np.asarray(turn.tokens[p, 0])[np.asarray(turn.mask[p, 0])]
        row = np.concatenate([PROMPTS[p, : LENGTHS[p]], said])
        rows[p, 0, : len(row)], mask[p, 0, : len(row)] = row, True
    positions = jnp.broadcast_to(jnp.arange(16), rows.shape)

    @jax.jit
    def likeliest(params):
        model = bind(CONFIG, params)
        return model.logits(forward(model, TokenRows(rows, positions, mask))[0]).argmax(-1)

    following = np.asarray(likeliest(params))[:, 0]
    for p in range(3):
        size = int(turn.mask[p, 0].sum())
        start = LENGTHS[p] - 1
        np.testing.assert_array_equal(turn.tokens[p, :, :size], np.tile(following[p, start : start + size], (4, 1)))


# One token from one uniform number


@partial(jax.jit, static_argnames="block")
def drawn(logits, u, block=256):
    return inverse_cdf(logits, u, block)


def test_tokens_are_as_frequent_as_likely():
    # With u on a grid of n = 100,000 numbers the count of a token of probability p is n p, give or take one for each
    # end of its interval and the rounding of the sums: no chance is involved.
    n = 100_000
    logits = np.random.default_rng(0).normal(size=29).astype(np.float32) * 2
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    grid = ((np.arange(n) + 0.5) / n).astype(np.float32)
    counts = np.bincount(drawn(np.tile(logits, (n, 1)), grid, block=8), minlength=29)
    np.testing.assert_allclose(counts, n * p, rtol=0, atol=3)

    # With the sampler's own numbers, chi-square over the 29 tokens: exceeded once in a million seeds.
    keys = row_keys(noise(range(n // 100), range(100)))
    u = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0))))(keys).reshape(-1)
    counts = np.bincount(drawn(np.tile(logits, (n, 1)), u, block=8), minlength=29)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < chi2.isf(1e-6, df=28)


def test_it_is_the_first_index_whose_cumulative_probability_exceeds_u():
    # Probabilities 1/8, 0, 1/4, 1/2, 0, 1/8 whose sums are exact: cumulatively 1, 1, 3, 7, 7 and 8 eighths.
    logits = np.log(np.array([1, 0, 2, 4, 0, 1], np.float32), where=[1, 0, 1, 1, 0, 1], out=np.full(6, -np.inf, "f4"))
    u = np.array([0, 0.9, 1, 2.9, 3, 6.9, 7, 7.9], np.float32) / 8
    for block in (1, 2, 3, 4, 6, 256):
        tokens = drawn(np.tile(logits, (8, 1)), u, block=block)
        np.testing.assert_array_equal(tokens, [0, 0, 2, 2, 3, 3, 5, 5], err_msg=f"block {block}")


LAST = 1 - 2**-24  # the largest float32 below 1


@settings(max_examples=200, deadline=None)
@given(
    numpy_st.arrays(np.float32, 37, elements=st.floats(-80, 80, width=32) | st.just(-np.inf)),
    st.sampled_from([0.0, 2.0**-24, 0.5, LAST]) | st.floats(0, LAST, width=32),
)
@example(np.array([-np.inf] * 36 + [0.0], np.float32), 0.0)
@example(np.array([0.0] + [-np.inf] * 36, np.float32), LAST)
@example(np.array([-np.inf] * 9 + [3.0] * 8 + [-np.inf] * 20, np.float32), LAST)
def test_a_token_of_probability_0_is_never_chosen(logits, u):
    if np.isneginf(logits).all():
        logits[5] = 0.0
    token = int(drawn(logits[None], np.float32([u]), block=8)[0])  # 37 is no multiple of 8
    assert 0 <= token < 37
    assert np.exp(logits[token] - logits.max()) > 0


def test_a_token_of_probability_0_is_not_chosen_on_the_edges_of_its_neighbours_either():
    # u at (and one rounding error beside) every cumulative probability, where the order of a parallel sum matters.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 61)).astype(np.float32) * 2
    logits[rng.random(logits.shape) < 0.5] = -np.inf
    logits[:, 30] = 0.0
    cumulative = np.cumsum(np.exp(logits - logits.max(-1, keepdims=True)), axis=-1)
    rows = np.arange(len(logits))
    edge = (cumulative / cumulative[:, -1:])[rows, rng.integers(0, 61, len(logits))].astype(np.float32)
    for u in (edge, np.nextafter(edge, np.float32(2)), np.nextafter(edge, np.float32(-1))):
        tokens = np.asarray(drawn(logits, np.clip(u, 0, LAST).astype(np.float32), block=16))
        assert np.isfinite(logits[rows, tokens]).all()


# Truncation


def kept(logits, top_k=0, top_p=1.0) -> list[int]:
    left = np.asarray(truncated(jnp.asarray(logits, jnp.float32), top_k, jnp.float32(top_p)))
    assert (left[np.isfinite(left)] == np.asarray(logits, np.float32)[np.isfinite(left)]).all()  # untouched
    return np.flatnonzero(np.isfinite(left)).tolist()


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2])  # likeliest first: 1, 3, 4, 0, 2; cumulatively .4 .65 .85 .95 1


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (3, 1.0, [1, 3, 4]),
        (5, 1.0, [0, 1, 2, 3, 4]),
        (0, 0.001, [1]),  # the likeliest is always kept
        (0, 0.39, [1]),
        (0, 0.41, [1, 3]),  # .4 falls short of .41
        (0, 0.64, [1, 3]),
        (0, 0.66, [1, 3, 4]),
        (0, 0.96, [0, 1, 2, 3, 4]),
        (2, 0.6, [1]),  # of the two left, .4 / .65 = .615 reaches .6
        (2, 0.62, [1, 3]),
    ],
)
def test_top_k_and_top_p_keep_what_they_should(top_k, top_p, expected):
    assert kept(np.log(PROBABILITIES), top_k, top_p) == expected


def test_ties_with_the_last_one_kept_are_kept():
    assert kept([1.0, 0.0, 1.0, 1.0], top_k=2) == [0, 2, 3]
    assert kept(np.log([0.3, 0.1, 0.3, 0.3]), top_p=0.5) == [0, 2, 3]


def test_top_p_of_1_cuts_nothing_though_a_sum_of_the_head_rounds_to_1():
    logits = np.zeros(1000)
    logits[0] = 30.0  # e^-30 = 1e-13 beside 1: in float32 the first token alone has all the mass
    assert kept(logits, top_p=1.0) == list(range(1000))
    assert kept(logits, top_p=0.999) == [0]


def test_truncation_narrows_what_is_drawn_and_not_what_is_reported():
    n = 2000
    logits = jnp.tile(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (n, 1))
    u = (jnp.arange(n) + 0.5) / n
    tokens, logprobs = choose_token(logits, u, jnp.float32(1), jnp.float32(1), Settings(1, (), 0, 2, truncate=True))
    counts = np.bincount(tokens, minlength=5) / n
    np.testing.assert_allclose(counts, np.array([0, 0.4, 0, 0.25, 0]) / 0.65, atol=1e-3)
    np.testing.assert_allclose(logprobs, np.log(PROBABILITIES)[tokens], atol=1e-6)

    # The temperature comes first: at 1/2 probabilities are squared before top-p counts them, .16 of .275 for token 1.
    options = Settings(1, (), 0, truncate=True)
    tokens, logprobs = choose_token(logits, u, jnp.float32(0.5), jnp.float32(0.55), options)
    assert set(np.asarray(tokens).tolist()) == {1}
    np.testing.assert_allclose(logprobs, np.log(0.16 / 0.275), atol=1e-6)
