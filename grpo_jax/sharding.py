"""What runs where: data-parallel replicas under `jax.pmap`.

Each device owns whole groups. Batches carry their prompts on the leading axis [P, ...]; `shard` turns that into
[N, P / N, ...], one slice for each of N devices. A single device is the case N = 1 of the same code.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError

AXIS = "replicas"  # the name over which losses and gradients meet


def count(num_prompts: int, wanted: int | None = None, micro_batches: int = 1) -> int:
    """The number of local devices to use, `wanted` or all of them.

    Raises:
      UserError: if there are fewer devices than wanted, or they cannot share the prompts in whole micro-batches.
    """
    available = jax.local_device_count()
    n = available if wanted is None else wanted
    if n > available:
        raise UserError(
            f"devices={n} was asked for, but this machine has {available} {jax.default_backend()} device(s)."
        )
    if num_prompts % (n * micro_batches):
        raise UserError(
            f"{num_prompts} prompts per step in {micro_batches} micro-batch(es) cannot be shared by {n} devices: "
            f"prompts_per_step must be a multiple of {n * micro_batches}, or set `devices` to a number that fits."
        )
    return n


def parallel(
    function: Callable[..., Any], n: int, *, in_axes: Any = 0, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`jax.pmap` of `function` over the first n local devices, with the axis named `AXIS`."""
    devices = jax.local_devices()[:n]
    return jax.pmap(function, axis_name=AXIS, in_axes=in_axes, devices=devices, donate_argnums=donate)


def replicate(tree: Any, n: int) -> Any:
    """Copies every leaf to the first n local devices: leaves gain a leading axis of n."""
    return _replicating(n)(jnp.arange(n), tree)


@cache
def _replicating(n: int) -> Callable[..., Any]:
    return parallel(lambda _, x: x, n, in_axes=(0, None))  # kept, since a new function is compiled anew


def unreplicate(tree: Any) -> Any:
    """The first device's copy of a replicated tree."""
    return jax.tree.map(lambda x: x[0], tree)


def shard(tree: Any, n: int) -> Any:
    """Leaves [P, ...] to [n, P / n, ...]."""
    return jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), tree)


def unshard(tree: Any) -> Any:
    """Leaves [n, P / n, ...] to [P, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
