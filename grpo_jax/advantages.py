"""Rewards to advantages: how much better each completion did than the others of its group.

    advantage = (reward - baseline) / scale

(GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2.) What the literature has under other names
are choices of the two:

    baseline        scale
    mean            group    GRPO
    mean            none     Dr. GRPO, https://arxiv.org/abs/2503.20783
    mean            batch    Lite PPO, https://arxiv.org/abs/2508.08221 (TRL's scale_rewards="batch")
    leave_one_out   none     RLOO, https://arxiv.org/abs/2402.14740 (TRL's normalize_advantages: with `whiten`)
    none            whiten   REINFORCE++, https://arxiv.org/abs/2501.03262
    mean            whiten   REINFORCE++-baseline; and, of rewards combined by `normalize_then_sum`, GDPO,
                             https://arxiv.org/abs/2601.05242 (TRL's multi_objective_aggregation)

Everything is measured from the smallest
reward upwards. That makes equal rewards exactly equal to their mean, on every device and however XLA orders a sum, and
keeps all digits of small differences between large rewards.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError
from grpo_jax.experiment import AdvantageConfig

Axis = int | None


def group_advantages(
    rewards: chex.Array,
    *,
    scale: Literal["group", "batch", "whiten", "none"] = "group",
    baseline: Literal["mean", "leave_one_out", "none"] = "mean",
    ddof: int = 0,
    mask: chex.Array | None = None,
    axis_name: str | None = None,
) -> chex.Array:
    """Calculates the advantages of P groups of G completions each.

    Where the scale is 0 the advantage is 0: a group of equal rewards says nothing about its members. Rewards count as
    equal when they differ by rounding alone, that is by less than two float32 epsilons (2.4e-7) of the largest.
    Nothing is added to the scale, so advantages do not depend on the rewards' unit; TRL adds 1e-4 to it and always
    takes `ddof=1`. A NaN or infinite reward spreads through its group (with `batch` and `whiten`, through the batch):
    it is an error upstream that must not pass for a 0. To leave a completion out, mask it.

    Args:
      rewards: rewards, shape `[P, G]`; row p holds the G completions of one prompt.
      scale: `group` divides by the standard deviation of the group's rewards; `batch` by that of all rewards of the
        batch; `whiten` subtracts the batch's mean of r - baseline and divides by the batch's standard deviation of it;
        `none` divides by 1.
      baseline: `mean` subtracts the group's mean; `leave_one_out` the mean of the *other* members, which leaves the
        gradient unbiased; `none` subtracts nothing.
      ddof: the standard deviation's divisor is n - ddof: 0 for the population's, 1 for the sample's.
      mask: True for the completions that count, shape `[P, G]`; None for all. A completion that does not count is in
        no mean and no standard deviation, its reward may be anything, and its advantage is 0.
      axis_name: the mapped axis over which `batch` and `whiten` extend, when each device holds P whole groups.

    Returns:
      Advantages, float32, shape `[P, G]`.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    chex.assert_rank(rewards, 2, custom_message="rewards must have shape [prompts, group size]")
    mask = jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask, bool)
    chex.assert_equal_shape([rewards, mask], custom_message="mask must have the shape of rewards")

    rise = rise_above_lowest(rewards, mask, axis=1)
    match baseline:
        case "mean":
            advantages = rise - masked_mean(rise, mask, axis=1)
        case "leave_one_out":  # r - mean of the others = (r - mean) * n / (n - 1)
            n = mask.sum(axis=1, keepdims=True)
            advantages = (rise - masked_mean(rise, mask, axis=1)) * n / jnp.maximum(n - 1, 1)
        case "none":
            advantages = rewards
        case _:
            raise UserError(f"baseline = {baseline!r} is unknown: it must be 'mean', 'leave_one_out' or 'none'.")
    match scale:
        case "group":
            advantages = divide_or_zero(advantages, masked_std(rise, mask, ddof=ddof, axis=1))
        case "batch":
            rise = rise_above_lowest(rewards, mask, axis=None, axis_name=axis_name)
            advantages = divide_or_zero(advantages, masked_std(rise, mask, ddof=ddof, axis=None, axis_name=axis_name))
        case "whiten":
            advantages = whiten(advantages, mask, ddof=ddof, axis_name=axis_name)
        case "none":
            pass
        case _:
            raise UserError(f"scale = {scale!r} is unknown: it must be 'group', 'batch', 'whiten' or 'none'.")
    return jnp.where(mask, advantages, 0.0)


def compute_advantages(
    how: AdvantageConfig | Callable[..., Any],
    rewards: chex.Array,
    sample_mask: chex.Array,
    *,
    token_mask: chex.Array,
    axis_name: str | None = None,
) -> chex.Array:
    """Advantages as an experiment's field `advantages` says: by a config, or by a function of the user's own.

    A function is called as `function(rewards, sample_mask)`, and also with `token_mask` and `axis_name` where it has
    parameters of these names. Each device calls it with its own groups.

    Args:
      how: the config or the function.
      rewards: rewards, shape `[P, G]`; 0 for completions that do not count.
      sample_mask: True for the completions that count, shape `[P, G]`.
      token_mask: True for the tokens that are trained on, shape `[P, G, T]`.
      axis_name: the mapped axis over which the batch extends.

    Returns:
      Advantages, float32, shape `[P, G]` or, by token, `[P, G, T]`; 0 where a mask is False.

    Raises:
      UserError: if the function fails, or returns another shape.
    """
    if isinstance(how, AdvantageConfig):
        return group_advantages(
            rewards, scale=how.scale, baseline=how.baseline, ddof=how.ddof, mask=sample_mask, axis_name=axis_name
        )
    name = getattr(how, "__name__", repr(how))
    optional = {"token_mask": token_mask, "axis_name": axis_name}
    known = inspect.signature(how).parameters
    try:
        found = how(rewards, sample_mask, **{key: value for key, value in optional.items() if key in known})
        found = jax.lax.stop_gradient(jnp.asarray(found, jnp.float32))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the advantage function {name!r} raised {type(error).__name__}: {error}") from error
    if found.shape == rewards.shape:
        return jnp.where(sample_mask, found, 0.0)
    if found.shape == token_mask.shape:
        return jnp.where(token_mask & sample_mask[..., None], found, 0.0)
    raise UserError(
        f"the advantage function {name!r} returned shape {list(found.shape)}: it must be that of the rewards, "
        f"{list(rewards.shape)}, or that of the tokens, {list(token_mask.shape)}."
    )


def whiten(x: chex.Array, mask: chex.Array, *, ddof: int = 0, axis_name: str | None = None) -> chex.Array:
    """The unmasked entries with mean 0 and standard deviation 1 over the whole batch, or 0 if they are all equal.

    Masked entries hold anything finite.
    """
    rise = rise_above_lowest(x, mask, axis=None, axis_name=axis_name)
    centred = rise - masked_mean(rise, mask, axis=None, axis_name=axis_name)
    return divide_or_zero(centred, masked_std(rise, mask, ddof=ddof, axis=None, axis_name=axis_name))


def rise_above_lowest(x: chex.Array, mask: chex.Array, *, axis: Axis, axis_name: str | None = None) -> chex.Array:
    """How far each entry lies above the smallest one along `axis`: exactly 0 for entries that differ by rounding alone.

    Masked entries get 0. NaN and infinity are passed on.
    """
    lowest = _across(jax.lax.pmin, jnp.min(x, axis=axis, keepdims=True, where=mask, initial=jnp.inf), axis_name)
    highest = _across(jax.lax.pmax, jnp.max(x, axis=axis, keepdims=True, where=mask, initial=-jnp.inf), axis_name)
    rounding = 2 * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    counts = mask & ~(highest - lowest < rounding)  # written so that NaN counts
    return jnp.where(counts, x - lowest, 0.0)


def masked_mean(x: chex.Array, mask: chex.Array, *, axis: Axis, axis_name: str | None = None) -> chex.Array:
    """The mean of the unmasked entries along `axis` (kept as 1), or 0 if there are none."""
    total = _across(jax.lax.psum, jnp.sum(x, axis=axis, keepdims=True, where=mask), axis_name)
    n = _across(jax.lax.psum, jnp.sum(mask, axis=axis, keepdims=True), axis_name)
    return total / jnp.maximum(n, 1)


def masked_std(
    rise: chex.Array, mask: chex.Array, *, ddof: int, axis: Axis, axis_name: str | None = None
) -> chex.Array:
    """The standard deviation, with divisor n - ddof, of unmasked entries that are 0 or above (`axis` kept as 1).

    Calculated in units of the largest entry, so that no square overflows or vanishes.
    """
    largest = _across(jax.lax.pmax, jnp.max(rise, axis=axis, keepdims=True, where=mask, initial=0.0), axis_name)
    unit = divide_or_zero(rise, largest)
    deviation = unit - masked_mean(unit, mask, axis=axis, axis_name=axis_name)
    squares = _across(jax.lax.psum, jnp.sum(deviation**2, axis=axis, keepdims=True, where=mask), axis_name)
    n = _across(jax.lax.psum, jnp.sum(mask, axis=axis, keepdims=True), axis_name)
    return largest * jnp.sqrt(squares / jnp.maximum(n - ddof, 1))


def divide_or_zero(x: chex.Array, y: chex.Array) -> chex.Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


def _across(collective: Callable[[chex.Array, str], chex.Array], x: chex.Array, axis_name: str | None) -> chex.Array:
    return x if axis_name is None else collective(x, axis_name)
