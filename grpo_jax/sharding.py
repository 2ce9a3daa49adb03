"""What lives where. This is the one module that knows how many devices there are and how arrays are laid out on them.

The rest of the package asks a `Replicas`: put parameters on every device, split a batch over the devices, compile a
function for all of them, and bring results back. Today there is one layout: data-parallel replicas under `jax.pmap`.
Every device holds all parameters and a share of the batch; gradients are summed over the axis `axis_name`. One device
is the case of one replica. A layout on a mesh has to offer the same methods and can be added here.

A tree that one of these methods has put on the devices is called *placed*. Its layout (a leading axis of the devices,
under `pmap`) is known here alone: pass it to a compiled function, or bring it back with `first`, `fetch` or `gather`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.errors import UserError, one_line

Array = jax.Array | np.ndarray
"""An array on the devices or on the host. JAX takes both, and most functions of the package do."""


@dataclass(frozen=True)
class Replicas:
    """Data-parallel replicas on the first `count` local devices."""

    count: int = 1
    axis_name = "replicas"  # the mapped axis over which losses and gradients are summed

    def compile(self, function: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """Compiles a function of one device's share. The result takes placed trees and returns placed trees.

        Args:
          function: may use `jax.lax` collectives over `axis_name`.
          donate: which arguments the call may overwrite.
        """
        devices = jax.local_devices()[: self.count]
        return jax.pmap(function, axis_name=self.axis_name, devices=devices, donate_argnums=donate)

    def replicate(self, tree: Any) -> Any:
        """Copies every array to all devices, for parameters and other state that stays there."""
        return _replicating(self)(jnp.arange(self.count), tree)

    def broadcast(self, tree: Any) -> Any:
        """Small host values (a seed, a temperature, a flag) that every device gets with a call."""
        return jax.tree.map(lambda x: np.broadcast_to(x, (self.count, *np.shape(x))), tree)

    def split(self, tree: Any) -> Any:
        """Host arrays [P, ...]: each device gets P / count neighbouring prompts."""
        return jax.tree.map(lambda x: x.reshape(self.count, x.shape[0] // self.count, *x.shape[1:]), tree)

    def interleave(self, pieces: np.ndarray) -> np.ndarray:
        """Indices of rows [M, R / M] in the order [R] of which `split` gives each device an equal share of every piece.

        A device's share holds its rows of the first piece, then those of the second, and so on.
        """
        m, size = pieces.shape
        return pieces.reshape(m, self.count, size // self.count).swapaxes(0, 1).reshape(-1)

    def first(self, placed: Any) -> Any:
        """One device's copy of what is equal on all of them, as `jax.Array`s."""
        return jax.tree.map(lambda x: x[0], placed)

    def fetch(self, placed: Any) -> Any:
        """One copy of what is equal on all devices, on the host (on a CPU: the device's own memory)."""
        of_first = jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, placed)
        return jax.tree.map(lambda x: x[0], jax.device_get(of_first))

    def place(self, array: np.ndarray) -> jax.Array:
        """Copies an array of the host to all devices, as `replicate` does, but without a second copy on a device."""
        return jax.device_put(np.broadcast_to(array, (self.count, *array.shape)), _layout(self))

    def shapes(self, placed: Any) -> Any:
        """The shape and dtype of one copy of what is equal on all devices."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), placed)

    def gather(self, placed: Any) -> Any:
        """The devices' shares [P / count, ...] joined to [P, ...], on the host."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(placed))


@cache
def _replicating(replicas: Replicas) -> Callable[..., Any]:
    # Kept, since a new function would be compiled anew. The axis has the name that compiled functions give it: arrays
    # of another name have another layout, for which the first call of such a function is compiled a second time.
    devices = jax.local_devices()[: replicas.count]
    return jax.pmap(lambda _, x: x, axis_name=replicas.axis_name, in_axes=(0, None), devices=devices)


@cache
def _layout(replicas: Replicas) -> jax.sharding.Sharding:
    """Where the arrays are that `replicate` returns."""
    sharding: jax.sharding.Sharding = replicas.replicate(0.0).sharding
    return sharding


def replicas_for(wanted: int | None = None) -> Replicas:
    """Replicas on `wanted` local devices, or on all of them. Raises `UserError` if there are fewer."""
    available = len(jax.local_devices())
    n = available if wanted is None else wanted
    if n > available:
        raise UserError(
            f"devices={n} was asked for, but this machine has {available} {jax.default_backend()} device(s)."
        )
    return Replicas(n)


def up_to(limit: int | None) -> Replicas:
    """Replicas on all local devices, or on `limit` of them where there are more."""
    available = len(jax.local_devices())
    return Replicas(available if limit is None else min(limit, available))


def run_on(index: int, program: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a jitted program on one local device and returns its results on the host."""
    with jax.default_device(jax.local_devices()[index]):
        return jax.device_get(program(*arguments))


def free_memory(count: int) -> int | None:
    """The free bytes of the fullest of the first `count` local devices; None where they have no memory of their own."""
    known = [device.memory_stats() or {} for device in jax.local_devices()[:count]]
    if not all("bytes_limit" in stats for stats in known):
        return None
    return min(stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in known)


def require_devices() -> None:
    """Raises `UserError` if there is no device, as on a machine without the accelerator that JAX_PLATFORMS names."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = one_line(error, 200) or "this machine has none of that kind, or JAX was installed without support for it"
        raise UserError(f"JAX finds no device with JAX_PLATFORMS={asked!r}: {why.rstrip('.')}.") from None


def describe() -> dict[str, Any]:
    """What the program runs on: the platform, the kind of device, and how many."""
    devices = jax.devices()
    return {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
