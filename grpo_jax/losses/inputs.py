"""What a policy-gradient loss is a function of, and losses of the user's own.

    def loss(inputs: LossInputs) -> tuple[Array, dict[str, Array]]

What a function of one's own returns is either a value for each token [B, T], of which the mean over the whole batch's
active tokens is taken, or a scalar: these sequences' contribution to the whole batch's loss, to be summed. A scalar has
to be divided by what the whole batch counts, such as `inputs.num_tokens`. The same holds for each of its metrics. Then
gradient accumulation and the number of devices change nothing but rounding.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from grpo_jax.errors import UserError, failure_of
from grpo_jax.sharding import Array

Metrics = dict[str, Array]
Loss = Callable[["LossInputs"], tuple[Array, Metrics]]


class LossInputs(NamedTuple):
    """Arrays of B sequences of T tokens, and what the whole batch counts.

    The B sequences are whole groups, `group_size` neighbouring ones each: x.reshape(-1, group_size, T) has the groups.
    They may be a part of the batch: one micro-batch, on one device. Where `mask` is False every array is finite.

    Attributes:
      logprobs: [B, T] log-probabilities of the sampled tokens under the policy that is trained. Gradients flow through
        these and through `entropy` alone.
      old_logprobs: [B, T] the same under the policy that sampled them.
      advantages: [B, T] a completion's advantage, or each token's own.
      mask: [B, T] bool, True for the tokens that are trained on.
      entropy: [B, T] entropy of the policy at each token in nats; None if it is not known.
      ref_logprobs: [B, T] log-probabilities under the reference policy; None if there is none.
      sampler_logprobs: [B, T] what the sampler reported. It differs from `old_logprobs` only where those were
        recomputed.
      correction: [B, T] weights for a sampler that was not the old policy; None for none.
      high_entropy: [B, T] bool, which tokens are in the whole batch's top quantile; None if it is not known.
      num_tokens: how many tokens the whole batch trains on, over devices and micro-batches.
      num_sequences: how many sequences of the whole batch have such a token.
      num_groups: how many groups of the whole batch have one.
      num_high_entropy: how many of the tokens are in the top quantile; None if it is not known.
      group_size: completions of a group.
      axis_name: the mapped axis over which the batch extends; None for none.
    """

    logprobs: Array
    old_logprobs: Array
    advantages: Array
    mask: Array
    entropy: Array | None = None
    ref_logprobs: Array | None = None
    sampler_logprobs: Array | None = None
    correction: Array | None = None
    high_entropy: Array | None = None
    num_tokens: Any = None
    num_sequences: Any = None
    num_groups: Any = None
    num_high_entropy: Any = None
    group_size: int = 1
    axis_name: str | None = None


def own_loss(function: Loss, inputs: LossInputs) -> tuple[Array, Metrics]:
    """Applies a loss of the user's own.

    Returns:
      The loss, a scalar to be *summed* over micro-batches and devices; and metrics, `loss` included, that sum likewise.

    Raises:
      UserError: if the function fails, or returns something else than it should.
    """
    name = getattr(function, "__name__", repr(function))
    inputs = finite_where_masked(inputs)
    try:
        returned = function(inputs)
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # `sys.exit` is a failure too
        raise UserError(f"the loss function {name!r} raised {failure_of(error)}") from error
    shape = inputs.mask.shape
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
        raise UserError(
            f"the loss function {name!r} must return (loss, metrics), a loss of shape {list(shape)} or a scalar and a "
            f"dictionary, but it returned {type(returned).__name__}."
        )

    def total(what: str, x: Any) -> Array:
        x = jnp.asarray(x)
        if x.shape == shape:
            return jnp.where(inputs.mask, x, 0.0).sum() / jnp.maximum(inputs.num_tokens, 1)
        if x.shape == ():
            return x
        raise UserError(
            f"the loss function {name!r} returned {what} of shape {list(x.shape)}: it must have one value for each "
            f"token, {list(shape)}, or be a scalar."
        )

    loss = total("a loss", returned[0])
    metrics = {key: total(f"a metric {key!r}", value) for key, value in returned[1].items()}
    return loss, jax.lax.stop_gradient({**metrics, "loss": loss})


def finite_where_masked(inputs: LossInputs) -> LossInputs:
    """The same inputs, float32, with 0 (1 for the correction) where `mask` is False; only the policy has gradients.

    Masked inputs are replaced before anything is calculated from them, not after: the gradient of where(mask, f(x), 0)
    is still NaN where f is infinite.
    """
    mask = jnp.asarray(inputs.mask, bool)

    def select(x: Array | None) -> Any:  # None for None
        return None if x is None else jnp.where(mask, jnp.asarray(x, jnp.float32), 0.0)

    constants = ("old_logprobs", "advantages", "ref_logprobs", "sampler_logprobs")
    correction = None if inputs.correction is None else jnp.where(mask, inputs.correction, 1.0)
    return inputs._replace(
        mask=mask,
        logprobs=select(inputs.logprobs),
        entropy=select(inputs.entropy),
        correction=jax.lax.stop_gradient(correction),
        **{name: jax.lax.stop_gradient(select(getattr(inputs, name))) for name in constants},
    )


@lru_cache(maxsize=32)
def reads_reference(function: Loss) -> bool:
    """Whether a loss of the user's own reads `ref_logprobs`, found by tracing it: only then is a reference kept.

    Raises:
      UserError: if the function fails, or returns something else than it should.
    """
    per_token = jax.ShapeDtypeStruct((4, 3), jnp.float32)

    def traced(ref_logprobs: Array, others: Array, mask: Array) -> Any:
        inputs = LossInputs(
            others, others, others, mask, others, ref_logprobs, others, others,
            num_tokens=mask.sum(), num_sequences=4, num_groups=2, group_size=2,
        )  # fmt: skip
        return own_loss(function, inputs)

    exported = jax.export.export(jax.jit(traced))(per_token, per_token, jax.ShapeDtypeStruct((4, 3), bool))
    return 0 in exported.module_kept_var_idx  # JAX drops the arguments on which no result depends
