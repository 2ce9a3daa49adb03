"""An update of two numbers, worked by hand: what reaches the objective, what is summed, and when a step is skipped."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import letters
import numpy as np
import optax
import pytest

from grpo_jax.algorithms import Algorithm, Batch, Objective, Setup, StepContext, TrainBatch
from grpo_jax.experiment import override
from grpo_jax.policy.lora import Model
from grpo_jax.update import State, UpdateOutput, make_update

P, G, T = 4, 2, 3
MASK = np.arange(T) < np.array([[1, 2], [3, 0], [2, 2], [1, 3]])[..., None]
KEPT = np.array([[True, True], [True, True], [False, True], [True, True]])
ACTIVE = MASK & KEPT[..., None]
REWARDS = np.arange(8, dtype=np.float32).reshape(P, G) - 2
W, F, R = 0.5, 3.0, 7.0  # the trained number, the frozen one and the reference's


class Product(Algorithm):
    """The loss is w f r_i, summed over the tokens of completions i and divided by how many tokens there are."""

    name = "product"
    on_policy: ClassVar[bool] = True

    def make_batch(self, context: StepContext, step: int) -> TrainBatch:
        raise NotImplementedError

    def make_objective(self, setup: Setup) -> Objective:
        def prepare(trainable: Any, frozen: Any, batch: Batch) -> tuple[Batch, dict[str, jax.Array]]:
            return batch, {"tokens": setup.total(batch.mask.sum())}

        def loss(trainable: Any, frozen: Any, reference: Any, batch: Batch, totals: Any) -> Any:
            per_token = trainable["w"] * frozen["f"] * jnp.where(batch.mask, batch.rewards[..., None], 0.0)
            logprobs = jnp.broadcast_to(trainable["w"], batch.mask.shape)
            metrics = {"pieces": jnp.float32(1), "reference": reference["w"] * batch.mask.sum() / totals["tokens"]}
            return per_token.sum() / totals["tokens"], (metrics, logprobs)

        return Objective(prepare, loss)


class OffPolicy(Product):
    """The same for completions that the policy did not sample."""

    name = "off_policy"
    on_policy: ClassVar[bool] = False


def updated(
    method: Algorithm | None = None, *, gaps: Any = 0.0, first: bool = True, rewards: Any = REWARDS,
    dtype: str = "float32", skipped: int = 3, **changes: Any
) -> tuple[State, UpdateOutput]:  # fmt: skip
    """One step of gradient descent at the rate 1; the sampler's log-probabilities are `gaps` below the policy's."""
    options = {key.replace("__", "."): value for key, value in changes.items()}
    config = override(letters.config, {"method": method or Product(), "gradient_accumulation_steps": 2, **options})
    setup = Setup(Model(None, dtype=dtype), config, 0, None)  # type: ignore[arg-type]
    optimizer = optax.sgd(1.0)
    trainable = {"w": jnp.float32(W)}
    logprobs = np.broadcast_to(np.float32(W) - gaps, MASK.shape).astype(np.float32)
    batch = Batch(np.ones((P, 4), int), np.ones(P, int), np.ones(MASK.shape, int), MASK, MASK, logprobs, rewards, KEPT)
    state = State(trainable, optimizer.init(trainable), jnp.int32(skipped))
    update = jax.jit(make_update(setup, optimizer))
    return update(state, {"f": jnp.float32(F)}, {"w": jnp.float32(R)}, batch, jnp.bool_(first))


def numbers(output: UpdateOutput) -> dict[str, float]:
    return {name: float(value) for name, value in output.metrics.items()}


def test_contributions_are_summed_over_micro_batches_and_dropped_completions_have_none() -> None:
    gradient = F * (REWARDS[..., None] * ACTIVE).sum() / ACTIVE.sum()
    for method in (Product(), OffPolicy()):
        state, output = updated(method)
        assert float(state.trainable["w"]) == pytest.approx(W - gradient) and state.skipped == 3
        found = numbers(output)
        gap = {name: found.pop(name) for name in list(found) if name.startswith("sampling/")}
        assert found == pytest.approx(
            {
                "loss": W * gradient, "pieces": 2, "reference": R, "grad_norm": abs(gradient),
                "num_tokens": ACTIVE.sum(), "skipped_updates": 3, "empty_updates": 0,
            }
        )  # fmt: skip
        assert len(gap) == (2 if method.on_policy else 0)
        assert (output.logprob_gaps is not None) == method.on_policy


def test_the_samplers_gap_is_measured_over_the_tokens_that_count() -> None:
    gaps = np.where(ACTIVE, np.linspace(-0.004, 0.009, P * G * T).reshape(MASK.shape), 5.0)
    state, output = updated(gaps=gaps)
    np.testing.assert_allclose(output.logprob_gaps, np.where(ACTIVE, np.abs(gaps), 0), atol=1e-6)  # type: ignore[arg-type]
    found, wanted = numbers(output), np.abs(gaps[ACTIVE])
    assert found["sampling/logprob_difference/mean"] == pytest.approx(wanted.mean(), rel=1e-3)
    assert found["sampling/logprob_difference/max"] == pytest.approx(wanted.max(), rel=1e-3)
    assert state.skipped == 3


@pytest.mark.parametrize(
    ("gap", "options", "skips"),
    [
        (0.009, {}, False),
        (0.011, {}, True),
        (-0.011, {}, True),
        (0.011, {"first": False}, False),  # the policy has moved since
        (0.011, {"method": OffPolicy()}, False),  # and here it did not sample
        (0.011, {"sampling__max_logprob_difference": 0.02}, False),
        (0.009, {"sampling__max_logprob_difference": 0.008}, True),
        (0.9, {"dtype": "bfloat16"}, False),
        (1.1, {"dtype": "bfloat16"}, True),
    ],
)
def test_a_gap_above_the_bound_skips_the_update(gap: float, options: dict[str, Any], skips: bool) -> None:
    state, output = updated(gaps=gap, **options)
    assert (float(state.trainable["w"]) == W) == skips
    assert int(state.skipped) == numbers(output)["skipped_updates"] == 3 + skips


def test_a_gradient_that_is_no_number_skips_the_update_of_any_method() -> None:
    for method in (Product(), OffPolicy()):
        for value in (np.nan, np.inf):
            rewards = np.where(np.arange(8).reshape(P, G) == 1, value, REWARDS)
            state, output = updated(method, rewards=rewards, first=False)
            assert float(state.trainable["w"]) == W and int(state.skipped) == 4
            assert not np.isfinite(numbers(output)["grad_norm"]) and numbers(output)["skipped_updates"] == 4


def test_a_finite_loss_without_a_finite_gradient_skips_the_update_too() -> None:
    class Edge(OffPolicy):
        def make_objective(self, setup: Setup) -> Objective:
            def loss(trainable: Any, *_: Any) -> Any:
                return jnp.sqrt(trainable["w"] - W), ({}, jnp.zeros((2, G, T)))  # 0, where its slope is infinite

            return super().make_objective(setup)._replace(loss=loss)

    state, output = updated(Edge())
    assert numbers(output)["loss"] == 0 and float(state.trainable["w"]) == W and int(state.skipped) == 4


def test_a_batch_of_which_nothing_counts_has_no_gap() -> None:
    class Nothing(Product):
        def make_objective(self, setup: Setup) -> Objective:
            objective = super().make_objective(setup)

            def prepare(trainable: Any, frozen: Any, batch: Batch) -> Any:
                batch, totals = objective.prepare(trainable, frozen, batch)
                return batch._replace(mask=jnp.zeros_like(batch.mask)), {"tokens": jnp.maximum(totals["tokens"], 1)}

            return objective._replace(prepare=prepare)

    state, output = updated(Nothing(), gaps=5.0)
    found = numbers(output)
    assert (found["sampling/logprob_difference/mean"], found["sampling/logprob_difference/max"]) == (0, 0)
    assert (
        found["num_tokens"] == 0
        and found["empty_updates"] == 1
        and float(state.trainable["w"]) == W
        and int(state.skipped) == 3
    )
