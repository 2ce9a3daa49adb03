"""Advantages from rewards: how much better each completion is than the others of its group.

    advantage = (reward - baseline) / scale

(GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2.) Other methods of the literature differ in the
choice of baseline and scale:

    baseline        scale
    mean            group    GRPO
    mean            none     Dr. GRPO, https://arxiv.org/abs/2503.20783
    mean            batch    Lite PPO, https://arxiv.org/abs/2508.08221 (TRL's scale_rewards="batch")
    leave_one_out   none     RLOO, https://arxiv.org/abs/2402.14740 (TRL's normalize_advantages: with `whiten`)
    none            whiten   REINFORCE++, https://arxiv.org/abs/2501.03262 (with the KL in the reward)
    mean            whiten   REINFORCE++-baseline; and, of rewards combined by `normalize_then_sum`, GDPO,
                             https://arxiv.org/abs/2601.05242 (TRL's multi_objective_aggregation)

All calculations use the difference to the smallest reward. So equal rewards are exactly equal to their mean, on every
device and for every order in which XLA computes a sum, and small differences between large rewards keep all digits.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from grpo_jax.errors import UserError, failure_of
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

    If the scale is 0, the advantage is 0: equal rewards give no information about the members of a group. Rewards count
    as equal if they differ only by rounding, that is, by less than two float32 epsilons (2.4e-7) of the largest.
    Nothing is added to the scale, so advantages do not depend on the unit of the rewards. TRL adds 1e-4 to the scale
    and always uses `ddof=1`. A NaN or infinite reward makes the advantages of its group NaN or infinite (with `batch`
    and `whiten`, those of the whole batch): it is an error in earlier code and must not become a 0. To exclude a
    completion, mask it.

    Args:
      rewards: rewards, shape `[P, G]`; row p holds the G completions of one prompt.
      scale: `group` divides by the standard deviation of the group's rewards; `batch` by that of all rewards of the
        batch; `whiten` subtracts the batch's mean of r - baseline and divides by the batch's standard deviation of it;
        `none` does not divide.
      baseline: `mean` subtracts the group's mean; `leave_one_out` the mean of the *other* members, so that the
        gradient is unbiased; `none` subtracts nothing.
      ddof: the divisor of the variance is n - ddof: 0 for the population, 1 for the sample.
      mask: True for the completions that count, shape `[P, G]`; None for all. A completion that does not count is not
        part of any mean or standard deviation. Its reward can be any value, and its advantage is 0.
      axis_name: the mapped axis over which the batch is distributed, for `batch` and `whiten`. Each device has P whole
        groups.

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
    kl: chex.Array | None = None,
) -> chex.Array:
    """Advantages of a step's whole batch, as an experiment's field `advantages` says: by a config, or by a function.

    A function of the user's own is called as `function(rewards, sample_mask)`, and also with `token_mask` where it has
    a parameter of this name.

    Args:
      how: the config or the function.
      rewards: rewards, shape `[P, G]`; 0 for completions that do not count.
      sample_mask: True for the completions that count, shape `[P, G]`.
      token_mask: True for the tokens that are trained on, shape `[P, G, T]`.
      kl: each token's KL to the reference policy in nats, shape `[P, G, T]`; needed for the config's `kl_coef`.

    Returns:
      Advantages, float32, shape `[P, G]` or, by token, `[P, G, T]`; 0 where a mask is False.

    Raises:
      UserError: if the function fails, or returns another shape.
    """
    if isinstance(how, AdvantageConfig):
        if how.kl_coef:
            return advantages_with_kl(how, rewards, sample_mask, token_mask=token_mask, kl=kl)
        return group_advantages(rewards, scale=how.scale, baseline=how.baseline, ddof=how.ddof, mask=sample_mask)
    name = getattr(how, "__name__", repr(how))
    optional = {"token_mask": token_mask} if "token_mask" in inspect.signature(how).parameters else {}
    try:
        found = how(rewards, sample_mask, **optional)
        found = jax.lax.stop_gradient(jnp.asarray(found, jnp.float32))
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # `sys.exit` is a failure too
        raise UserError(f"the advantage function {name!r} raised {failure_of(error)}") from error
    if found.shape == rewards.shape:
        return jnp.where(sample_mask, found, 0.0)
    if found.shape == token_mask.shape:
        return jnp.where(token_mask & sample_mask[..., None], found, 0.0)
    raise UserError(
        f"the advantage function {name!r} returned shape {list(found.shape)}: it must be that of the rewards, "
        f"{list(rewards.shape)}, or that of the tokens, {list(token_mask.shape)}."
    )


def advantages_with_kl(
    how: AdvantageConfig,
    rewards: chex.Array,
    sample_mask: chex.Array,
    *,
    token_mask: chex.Array,
    kl: chex.Array | None,
) -> chex.Array:
    """Advantages of rewards that are reduced by the KL to the reference policy.

    With `kl_level="sequence"`, r - kl_coef * sum_t KL_t takes the place of the reward r (RLOO,
    https://arxiv.org/abs/2402.14740). With `token`, a token's advantage is r - baseline - kl_coef * sum over
    itself and the tokens after it of KL_t, and `whiten` scales all tokens of the batch to mean 0 and standard deviation
    1 (REINFORCE++, https://arxiv.org/abs/2501.03262).

    Args: those of `compute_advantages`.

    Returns:
      Shape `[P, G]`, or `[P, G, T]` with `token`; 0 where a mask is False.
    """
    assert kl is not None, "kl_coef needs the tokens' KL"
    chex.assert_equal_shape([kl, token_mask])
    mask = token_mask & sample_mask[..., None]
    kl = jnp.where(mask, kl, 0.0)
    if how.kl_level == "sequence":
        reduced = rewards - how.kl_coef * kl.sum(-1)
        return group_advantages(reduced, scale=how.scale, baseline=how.baseline, ddof=how.ddof, mask=sample_mask)
    of_sequence = group_advantages(rewards, scale="none", baseline=how.baseline, mask=sample_mask)
    to_come = jnp.cumsum(kl[..., ::-1], axis=-1)[..., ::-1]
    advantages = of_sequence[..., None] - how.kl_coef * to_come
    if how.scale == "whiten":
        advantages = whiten(advantages, mask, ddof=how.ddof)
    return jnp.where(mask, advantages, 0.0)


def whiten(x: chex.Array, mask: chex.Array, *, ddof: int = 0, axis_name: str | None = None) -> chex.Array:
    """Scales the unmasked entries to mean 0 and standard deviation 1 over the whole batch, or to 0 if all are equal.

    Masked entries of the result have no meaning, but are finite.
    """
    rise = rise_above_lowest(x, mask, axis=None, axis_name=axis_name)
    centred = rise - masked_mean(rise, mask, axis=None, axis_name=axis_name)
    return divide_or_zero(centred, masked_std(rise, mask, ddof=ddof, axis=None, axis_name=axis_name))


def rise_above_lowest(x: chex.Array, mask: chex.Array, *, axis: Axis, axis_name: str | None = None) -> chex.Array:
    """Subtracts the smallest entry along `axis`. The result is exactly 0 if all entries differ only by rounding.

    Masked entries become 0. NaN and infinity are propagated.
    """
    lowest = _across(jax.lax.pmin, jnp.min(x, axis=axis, keepdims=True, where=mask, initial=jnp.inf), axis_name)
    highest = _across(jax.lax.pmax, jnp.max(x, axis=axis, keepdims=True, where=mask, initial=-jnp.inf), axis_name)
    rounding = 2 * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
    counts = mask & ~(highest - lowest < rounding)  # negated, so that NaN counts
    return jnp.where(counts, x - lowest, 0.0)


def masked_mean(x: chex.Array, mask: chex.Array, *, axis: Axis, axis_name: str | None = None) -> chex.Array:
    """Calculates the mean of the unmasked entries along `axis` (kept with size 1), or 0 if there are none."""
    total = _across(jax.lax.psum, jnp.sum(x, axis=axis, keepdims=True, where=mask), axis_name)
    n = _across(jax.lax.psum, jnp.sum(mask, axis=axis, keepdims=True), axis_name)
    return total / jnp.maximum(n, 1)


def masked_std(
    rise: chex.Array, mask: chex.Array, *, ddof: int, axis: Axis, axis_name: str | None = None
) -> chex.Array:
    """Calculates the standard deviation of the unmasked entries along `axis` (kept with size 1).

    The entries must be 0 or above; the divisor of the variance is n - ddof. The calculation is in units of the largest
    entry, so that no square overflows or underflows.
    """
    largest = _across(jax.lax.pmax, jnp.max(rise, axis=axis, keepdims=True, where=mask, initial=0.0), axis_name)
    unit = divide_or_zero(rise, largest)
    deviation = unit - masked_mean(unit, mask, axis=axis, axis_name=axis_name)
    squares = _across(jax.lax.psum, jnp.sum(deviation**2, axis=axis, keepdims=True, where=mask), axis_name)
    n = _across(jax.lax.psum, jnp.sum(mask, axis=axis, keepdims=True), axis_name)
    return largest * jnp.sqrt(squares / jnp.maximum(n - ddof, 1))


def divide_or_zero(x: chex.Array, y: chex.Array) -> chex.Array:
    """Calculates x / y, with 0 where y is 0."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


def _across(collective: Callable[[chex.Array, str], chex.Array], x: chex.Array, axis_name: str | None) -> chex.Array:
    return x if axis_name is None else collective(x, axis_name)
