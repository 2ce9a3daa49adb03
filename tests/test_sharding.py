"""Devices: how many share the prompts, and what goes where and comes back. The machine has 8 simulated ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sharding as devices
from grpo_jax.errors import UserError


def test_all_local_devices_are_used_unless_fewer_are_wanted():
    assert devices.count(16) == 8
    assert devices.count(16, 4) == 4
    assert devices.count(3, 1) == 1
    assert devices.count(24, 4, micro_batches=3) == 4


def test_more_devices_than_there_are_is_said_in_one_sentence():
    with pytest.raises(UserError, match=r"devices=9 was asked for, but this machine has 8 cpu device"):
        devices.count(18, 9)


@pytest.mark.parametrize(("num_prompts", "wanted", "micro_batches", "multiple"), [(12, None, 1, 8), (8, 4, 3, 12)])
def test_prompts_that_do_not_divide_are_refused_and_the_multiple_is_named(num_prompts, wanted, micro_batches, multiple):
    with pytest.raises(UserError, match=rf"^{num_prompts} prompts per step .* must be a multiple of {multiple}\b"):
        devices.count(num_prompts, wanted, micro_batches)


def test_shard_gives_each_device_whole_neighbouring_prompts_and_unshard_undoes_it():
    tree = {"tokens": np.arange(48).reshape(8, 3, 2), "lengths": np.arange(8)}
    sharded = devices.shard(tree, 4)
    assert sharded["tokens"].shape == (4, 2, 3, 2)
    np.testing.assert_array_equal(sharded["lengths"], [[0, 1], [2, 3], [4, 5], [6, 7]])
    for key, value in devices.unshard(sharded).items():
        np.testing.assert_array_equal(value, tree[key])


def test_replicate_puts_a_copy_on_each_device_and_unreplicate_takes_one():
    tree = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "steps": np.int32(7)}
    copies = devices.replicate(tree, 8)
    assert copies["kernel"].shape == (8, 2, 3) and copies["steps"].shape == (8,)
    assert copies["kernel"].devices() == set(jax.local_devices())
    assert [s.data.shape for s in copies["kernel"].addressable_shards] == [(1, 2, 3)] * 8
    np.testing.assert_array_equal(copies["kernel"], np.broadcast_to(tree["kernel"], (8, 2, 3)))
    one = devices.unreplicate(copies)
    np.testing.assert_array_equal(one["kernel"], tree["kernel"])
    assert one["steps"] == 7 and one["steps"].dtype == np.int32


def test_parallel_runs_on_the_first_devices_and_reduces_over_the_named_axis():
    total = devices.parallel(lambda x, y: jax.lax.psum(x * y, devices.AXIS), 4, in_axes=(0, None))
    sums = total(jnp.arange(4.0), 10.0)
    np.testing.assert_array_equal(sums, [60.0] * 4)  # 10 * (0 + 1 + 2 + 3) on each
    assert sums.devices() == set(jax.local_devices()[:4])


def test_donated_arguments_are_given_up():
    add_one = devices.parallel(lambda x: x + 1, 2, donate=(0,))
    x = devices.replicate(np.zeros(3, np.float32), 2)
    np.testing.assert_array_equal(add_one(x), np.ones((2, 3)))
    assert x.is_deleted()
