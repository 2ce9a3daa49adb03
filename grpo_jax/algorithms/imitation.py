"""The loss of a method that imitates completions: the mean negative log-likelihood of their tokens."""

from grpo_jax.algorithms.base import Metrics, Objective, Setup, Totals
from grpo_jax.algorithms.batch import Batch, rows
from grpo_jax.losses import supervised
from grpo_jax.policy.transformer import Params
from grpo_jax.sharding import Array


def imitation_objective(setup: Setup) -> Objective:
    """The supervised objective, at temperature 1."""
    forward = setup.forward()

    def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
        return batch, {"num_tokens": setup.total(batch.mask.sum())}

    def loss(
        trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
    ) -> tuple[Array, tuple[Metrics, Array]]:
        logprobs, _ = forward.logprobs(trainable, frozen, batch)
        result, metrics = supervised.loss(rows(logprobs), rows(batch.mask), num_tokens=totals["num_tokens"])
        return result, (metrics, logprobs)

    return Objective(prepare, loss)
