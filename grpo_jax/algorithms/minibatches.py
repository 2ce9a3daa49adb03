"""How a step's batch is cut into mini-batches and shared out: its rows in another order, and groups that are split.

An update treats every completion by itself (advantages are found before, of the whole batch), so a group need not stay
in one place. It is split only where whole groups cannot be shared out equally: one prompt of 128 completions becomes
eight rows of 16 for eight devices, one for each of them.
"""

from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.algorithms.batch import Batch
from grpo_jax.errors import UserError
from grpo_jax.experiment import Experiment, group_parts, method_of
from grpo_jax.sharding import Array, Replicas, replicas_for

SHUFFLE = 1  # tells the order of mini-batches from the order of examples (`batches.schedule`), which has the same seed


class Layout(NamedTuple):
    """Where the rows of a batch [P, G, ...] go.

    Attributes:
      size: P and G.
      parts: into how many parts each group is split: there are R = P * parts rows of G / parts completions.
      order: [R] the rows, so that `Replicas.split` gives every device its equal share of each mini-batch, one after
        another.
      num_minibatches: M.
      replicas: what the batch is shared by.
    """

    size: tuple[int, int]
    parts: int
    order: np.ndarray
    num_minibatches: int
    replicas: Replicas

    def split(self, batch: Batch) -> Batch:
        """A batch on the host [P, G, ...], placed on the devices in rows [R, G / parts, ...]."""
        per_prompt = {"prompts": batch.prompts, "lengths": batch.lengths}
        rows = {name: np.repeat(x, self.parts, axis=0) for name, x in per_prompt.items()}
        for name, x in batch._asdict().items():
            if name not in rows and x is not None:
                rows[name] = x.reshape(-1, x.shape[1] // self.parts, *x.shape[2:])
        return self.replicas.split(jax.tree.map(lambda x: x[self.order], Batch(**rows)))

    def gather(self, placed: Array) -> np.ndarray:
        """What the devices have found for each completion [R, G / parts, ...], on the host as [P, G, ...]."""
        rows = self.replicas.gather(placed)
        whole = np.empty_like(rows)
        whole[self.order] = rows
        return whole.reshape(*self.size, *rows.shape[2:])

    def gather_first(self, placed: Array) -> np.ndarray:
        """The same for the first mini-batch alone [R / M, G / parts, ...]; 0 for all completions of the others."""
        rows = self.replicas.gather(placed)
        own = self.order.reshape(self.replicas.count, self.num_minibatches, -1)[:, 0].reshape(-1)
        whole = np.zeros((len(self.order), *rows.shape[1:]), rows.dtype)
        whole[own] = rows
        return whole.reshape(*self.size, *rows.shape[2:])


def lay_out(experiment: Experiment, batch: Batch, step: int, replicas: Replicas) -> Layout:
    """The layout of a step's batch [P, G, ...].

    Which completions share a mini-batch follows from (seed, step) alone, whatever the devices and micro-batches.
    """
    (num_prompts, group_size, _), num_minibatches = batch.mask.shape, experiment.num_minibatches
    shares = replicas.count * num_minibatches * experiment.gradient_accumulation_steps
    smallest = method_of(experiment.method).smallest_part(experiment)
    parts = group_parts(num_prompts, group_size, shares, smallest=smallest)
    shuffled = group_parts(num_prompts, group_size, num_minibatches, smallest=smallest)
    assert parts is not None and shuffled is not None, "`shared_out` has found that the batches can be shared out"
    rows = np.arange(num_prompts * parts).reshape(num_prompts * shuffled, -1)
    if num_minibatches > 1:
        rows = np.random.default_rng([experiment.seed, step, SHUFFLE]).permutation(rows)
    order = replicas.interleave(rows.reshape(num_minibatches, -1))
    return Layout((num_prompts, group_size), parts, order, num_minibatches, replicas)


def shared_out(experiment: Experiment) -> Replicas:
    """The devices that a run uses.

    Raises:
      UserError: if there are fewer than it asks for, or if a step's batch cannot be shared out over them.
    """
    replicas, config = replicas_for(experiment.devices), experiment
    if config.group_parts(replicas.count) is None:
        pieces = f"{config.num_minibatches} mini-batch(es) of {config.gradient_accumulation_steps} micro-batch(es)"
        raise UserError(
            f"{config.prompts_per_step} groups of {config.group_size} completions cannot be shared equally by "
            f"{replicas.count} devices in {pieces}: prompts_per_step should be a multiple of "
            f"{replicas.count * config.num_minibatches * config.gradient_accumulation_steps}, or `devices` a number "
            "that fits."
        )
    return replicas


def minibatch(batch: Batch, index: Array, num_minibatches: int) -> Batch:
    """One mini-batch of a device's share, whose rows `Layout` has put one mini-batch after another."""
    return jax.tree.map(lambda x: x.reshape(num_minibatches, -1, *x.shape[1:])[index], batch)
