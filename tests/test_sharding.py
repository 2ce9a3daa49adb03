"""Devices: how many share the prompts, and what goes where and comes back. The machine has 8 simulated ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.sharding import Replicas, describe, replicas_for, run_on, up_to


def test_all_local_devices_are_used_unless_fewer_are_wanted():
    assert replicas_for().count == 8
    assert replicas_for(4).count == 4


def test_more_devices_than_there_are_is_said_in_one_sentence():
    with pytest.raises(UserError, match=r"devices=9 was asked for, but this machine has 8 cpu device"):
        replicas_for(9)


def test_rows_are_interleaved_so_that_each_device_has_its_share_of_every_piece():
    # Two pieces of four rows on two devices: the first device has half of the one, then half of the other.
    order = Replicas(2).interleave(np.array([[7, 0, 3, 1], [2, 6, 5, 4]]))
    np.testing.assert_array_equal(order, [7, 0, 2, 6, 3, 1, 5, 4])
    np.testing.assert_array_equal(Replicas(1).interleave(np.array([[2, 0], [1, 3]])), [2, 0, 1, 3])


def test_split_gives_each_device_whole_neighbouring_prompts_and_gather_undoes_it():
    tree = {"tokens": np.arange(48).reshape(8, 3, 2), "lengths": np.arange(8)}
    sharded = Replicas(4).split(tree)
    assert sharded["tokens"].shape == (4, 2, 3, 2)
    np.testing.assert_array_equal(sharded["lengths"], [[0, 1], [2, 3], [4, 5], [6, 7]])
    for key, value in Replicas(4).gather(sharded).items():
        np.testing.assert_array_equal(value, tree[key])


def test_replicate_puts_a_copy_on_each_device_and_first_takes_one():
    tree = {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "steps": np.int32(7)}
    copies = Replicas(8).replicate(tree)
    assert copies["kernel"].shape == (8, 2, 3) and copies["steps"].shape == (8,)
    assert copies["kernel"].devices() == set(jax.local_devices())
    assert [s.data.shape for s in copies["kernel"].addressable_shards] == [(1, 2, 3)] * 8
    np.testing.assert_array_equal(copies["kernel"], np.broadcast_to(tree["kernel"], (8, 2, 3)))
    one = Replicas(8).first(copies)
    np.testing.assert_array_equal(one["kernel"], tree["kernel"])
    assert one["steps"] == 7 and one["steps"].dtype == np.int32


def test_a_compiled_function_runs_on_the_first_devices_and_reduces_over_the_named_axis():
    replicas = Replicas(4)
    total = replicas.compile(lambda x, y: jax.lax.psum(x * y, replicas.axis_name))
    sums = total(jnp.arange(4.0), replicas.broadcast(np.float32(10.0)))
    np.testing.assert_array_equal(sums, [60.0] * 4)  # 10 * (0 + 1 + 2 + 3) on each
    assert sums.devices() == set(jax.local_devices()[:4])


def test_donated_arguments_are_given_up():
    replicas = Replicas(2)
    add_one = replicas.compile(lambda x: x + 1, donate=(0,))
    x = replicas.replicate(np.zeros(3, np.float32))
    np.testing.assert_array_equal(add_one(x), np.ones((2, 3)))
    assert x.is_deleted()


def test_fetch_takes_one_copy_and_broadcast_makes_them():
    replicas, flags = Replicas(4), {"seed": np.int32(3), "top_p": np.float32(0.5)}
    placed = replicas.broadcast(flags)
    assert placed["seed"].shape == (4,)
    assert replicas.fetch(placed) == flags


def test_evaluations_take_all_devices_but_no_more_than_the_limit():
    assert (up_to(None).count, up_to(3).count, up_to(100).count) == (8, 3, 8)


def test_a_program_runs_on_the_device_of_its_number_and_its_results_come_to_the_host():
    for index in (0, 5):
        where = []
        found = run_on(index, lambda x, where=where: where.append((x + jnp.ones(2)).devices()) or x + jnp.ones(2), 2.0)
        assert where == [{jax.local_devices()[index]}] and isinstance(found, np.ndarray) and found.tolist() == [3, 3]


def test_what_a_program_runs_on_is_said():
    assert describe() == {"platform": "cpu", "kind": "cpu", "count": 8}
