"""Packing: bins that hold, rows that say what is where, and examples that do not see each other."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.algorithms.packing import first_fit, pack
from grpo_jax.errors import UserError
from grpo_jax.experiment import ScratchConfig
from grpo_jax.logprobs import Completions, completion_logprobs, packed_logprobs
from grpo_jax.policy import load
from grpo_jax.policy.transformer import bind


@given(st.lists(st.integers(1, 10), max_size=30))
def test_bins_hold_everything_once_and_are_few(sizes):
    bins = first_fit(sizes, 10)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= 10 for members in bins)
    assert len(bins) <= 11 / 9 * max(sum(sizes) / 10, 1) * 2  # never more than twice the volume's bound


def test_a_row_says_which_example_each_token_belongs_to():
    batch = pack([([5, 6], [False, True]), ([7, 8, 9], [False, True, True])], 6, multiple=3)
    assert batch.tokens.shape[0] % 3 == 0
    assert batch.tokens[0, 0].tolist() == [7, 8, 9, 5, 6, 0]
    assert batch.segments[0, 0].tolist() == [1, 1, 1, 2, 2, 0]
    assert batch.mask[0, 0].tolist() == [False, True, True, False, True, False]
    assert not batch.mask[1:].any()
    with pytest.raises(UserError, match="less than an example's 3 tokens"):
        pack([([1, 2, 3], [True] * 3)], 2)


def test_a_row_can_be_filled_to_its_last_token():
    assert first_fit([3, 5, 2, 5], 5) == [[1], [3], [0, 2]]  # the largest first, and 3 + 2 fill a row
    batch = pack([([4] * 5, [True] * 5), ([5] * 2, [True] * 2), ([6] * 3, [True] * 3)], 5)
    assert batch.tokens[:2, 0].tolist() == [[4] * 5, [6, 6, 6, 5, 5]]
    assert batch.sample_mask.all() and not batch.rewards.any() and not batch.logprobs.any()


def test_rows_are_a_bucket_of_them_in_a_multiple_and_as_long_as_they_must_be():
    single = [([4] * n, [True] * n) for n in (3, 5, 4, 2, 1)]
    assert pack(single, None).tokens.shape == (6, 1, 6)  # five rows of up to five tokens
    assert pack(single, None, multiple=4).tokens.shape == (8, 1, 6)
    assert pack(single, 7).tokens.shape == (4, 1, 7)  # 5 + 2, 4 + 3 and 1
    assert [int(row.sum()) for row in pack(single, None).valid] == [3, 5, 4, 2, 1, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_packed_example_has_the_log_probabilities_that_it_has_alone(temperature):
    policy = load("scratch", seed=1, scratch=ScratchConfig("abcdefgh", hidden_size=16, num_layers=2, num_heads=2))
    model = bind(policy.config, {**policy.params, "embed": 10 * policy.params["embed"]})
    rng = np.random.default_rng(0)
    examples = [rng.integers(3, 11, size).tolist() for size in (5, 3, 4)]
    batch = pack([(ids, [True] * len(ids)) for ids in examples], 9)
    arrays = jnp.asarray(batch.tokens), jnp.asarray(batch.segments)
    packed, entropies = packed_logprobs(model, *arrays, temperature=temperature)
    for ids in examples:
        row, start = next(
            (r, t) for r in range(2) for t in range(9) if batch.tokens[r, 0, t : t + len(ids)].tolist() == ids
        )
        rest = jnp.asarray(ids[1:])[None, None]
        given = Completions(jnp.asarray([ids[:1]]), jnp.asarray([1]), rest, jnp.ones_like(rest, bool))
        alone, entropy = completion_logprobs(model, given, temperature=temperature)
        found = packed[row, 0, start : start + len(ids)]
        assert found[0] == 0  # nothing predicts an example's first token
        np.testing.assert_allclose(found[1:], alone[0, 0], atol=2e-5)
        np.testing.assert_allclose(entropies[row, 0, start + 1 : start + len(ids)], entropy[0, 0], atol=2e-5)
