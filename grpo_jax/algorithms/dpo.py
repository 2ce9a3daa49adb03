"""DPO: a policy from preference pairs, without a reward model (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290)."""

from grpo_jax.algorithms.base import Algorithm, Metrics, Objective, Setup, StepContext, Totals, TrainBatch
from grpo_jax.algorithms.batch import Batch, rows
from grpo_jax.algorithms.pairs import counted_pairs, preference_batch
from grpo_jax.experiment import Experiment, requirements
from grpo_jax.losses import preference
from grpo_jax.policy.transformer import Params
from grpo_jax.sharding import Array


class DPO(requirements.DPO, Algorithm):
    """Direct preference optimisation; the reference is the policy that training begins with."""

    def needs_reference(self, experiment: Experiment) -> bool:
        return True

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        return preference_batch(context, step)

    def make_objective(self, setup: Setup) -> Objective:
        forward = setup.forward()

        def prepare(trainable: Params, frozen: Params, batch: Batch) -> tuple[Batch, Totals]:
            return batch, {"num_pairs": setup.total(counted_pairs(batch).sum())}

        def loss(
            trainable: Params, frozen: Params, reference: Params | None, batch: Batch, totals: Totals
        ) -> tuple[Array, tuple[Metrics, Array]]:
            assert reference is not None, "`needs_reference` says that it is kept"
            logprobs, ref_logprobs = (forward.logprobs(p, frozen, batch)[0] for p in (trainable, reference))
            config, pairs = setup.experiment.dpo, counted_pairs(batch)
            result, metrics = preference.dpo_loss(
                rows(logprobs), rows(ref_logprobs), rows(batch.mask), config, pairs=pairs, num_pairs=totals["num_pairs"]
            )
            return result, (metrics, logprobs)

        return Objective(prepare, loss)
