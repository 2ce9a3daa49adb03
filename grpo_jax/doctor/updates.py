"""Checks of the update: what must not change it, what it must find again, and how often it moves the policy.

They run the training's own update (`grpo_jax.update.make_update`) with an optimizer that keeps the gradient, on a batch
whose completions are cut to different lengths. Where all are equally long, a wrong denominator would go unseen.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.algorithms import Batch
from grpo_jax.algorithms.minibatches import lay_out
from grpo_jax.doctor.check import Check, count, not_applicable, verified, within
from grpo_jax.doctor.subject import PROMPTS, Subject
from grpo_jax.experiment import method_of
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import bucket
from grpo_jax.sharding import Array, Replicas, up_to
from grpo_jax.update import State, UpdateOutput, make_optimizer, make_update

# What rounding may change a gradient by, relative to its norm. For SmolLM2-135M with adapters it was up to 1.7e-5 in
# float32 and 4.1e-2 in bfloat16.
ROUNDING = {"float32": 1e-3, "bfloat16": 1e-1}
CUTS = (1.0, 0.5, 0.75, 0.25)  # the shares of neighbouring completions that are kept
MAX_DEVICES = 8
STEP = 1e-3  # of the parameters' norm


class Recorded(NamedTuple):
    """What `keep_gradient` remembers: the gradient, and how often it was given one."""

    gradient: Params
    steps: Array


class Outcome(NamedTuple):
    """What an update has found.

    Attributes:
      gradient: on one device.
      loss: a number.
      gaps: of the log-probabilities, [P, G, T] as in the batch; None where the policy did not sample.
      steps: how many steps the optimizer was asked for.
    """

    gradient: Params
    loss: float
    gaps: np.ndarray | None
    steps: int


def accumulation_changes_nothing(subject: Subject) -> Check:
    """`PROMPTS` micro-batches have the gradient and the loss of the whole batch."""
    return _unchanged(subject, _outcome(subject, micro=PROMPTS), f"{PROMPTS} micro-batches")


def devices_change_nothing(subject: Subject) -> Check:
    """Several devices have the gradient and the loss of one device."""
    visible = up_to(subject.experiment.devices).count
    if visible == 1:
        return not_applicable("not checked: one device is visible, or `devices` is 1.")
    batch, small = _batch(subject), replace(subject.small, gradient_accumulation_steps=1)
    is_packed, rows = batch.segments is not None, len(batch.mask)
    counts = range(2, min(visible, MAX_DEVICES) + 1)
    fitting = [n for n in counts if (rows % n == 0 if is_packed else small.group_parts(n) is not None)]
    if not fitting:
        return not_applicable(f"not checked: the small batch cannot be shared by {visible} devices or fewer.")
    return _unchanged(subject, _outcome(subject, devices=fitting[-1]), f"{fitting[-1]} devices")


def padding_changes_nothing(subject: Subject) -> Check:
    """Longer padding of prompts and completions leaves the gradient and the loss as they are."""
    batch = _batch(subject)
    s, t = batch.prompts.shape[1], batch.mask.shape[2]
    return _unchanged(subject, _outcome(subject, batch=_padded(batch, bucket(s + 1) - s, bucket(t + 1) - t)), "padding")


def order_changes_nothing(subject: Subject) -> Check:
    """Other places for the prompts and for the completions of a group leave the gradient and the loss as they are."""
    smallest = method_of(subject.small.method).smallest_part(subject.small)

    def moved(name: str, x: Array) -> Array:
        rows = x[::-1]
        is_group = name not in ("prompts", "lengths") and rows.shape[1] % smallest == 0
        return np.roll(rows, smallest, axis=1) if is_group else rows

    fields = {name: moved(name, x) for name, x in _batch(subject)._asdict().items() if x is not None}
    return _unchanged(subject, _outcome(subject, batch=Batch(**fields)), "another order")


def sampler_and_trainer_agree(subject: Subject) -> Check:
    """The sampler reports the log-probabilities that the trainer computes, within `sampling.max_logprob_difference`."""
    small = subject.small
    bound = small.sampling.logprob_bound(subject.dtype)
    recomputes = small.loss_config.importance_sampling_mode is not None
    if subject.algorithm.on_policy and not recomputes:
        gaps = _outcome(subject).gaps
        assert gaps is not None, "an update of an on-policy method returns them"
        tokens = int(_batch(subject).mask.sum())
    else:
        gaps, tokens = _gaps(subject)
    worst = float(np.max(gaps))
    sentence = (
        f"the trainer misses a log-probability of the sampler by {worst:.4f} nats: the two compute different policies, "
        "and training stops, or corrects it with loss.importance_sampling_mode."
    )
    found = within(worst, bound, " nats", sentence, tokens=tokens, mean=float(np.sum(gaps)) / max(tokens, 1))
    is_truncated = subject.algorithm.on_policy and (small.sampling.top_k > 0 or small.sampling.top_p < 1)
    if found.verdict == "proved" and is_truncated:
        sentence = (
            "sampling.top_k or top_p narrows what is drawn, and log-probabilities are those of the whole distribution, "
            "so that what is trained is not quite the policy that sampled: leave both at their defaults in training."
        )
        return replace(found, verdict="warning", sentence=sentence)
    return replace(found, verdict="warning") if recomputes and found.verdict == "refuted" else found


def gradient_reaches_the_parameters(subject: Subject) -> Check:
    """The gradient is finite and not 0; of adapters, each has one."""
    outcome = _outcome(subject)
    norms = {path: float(jnp.linalg.norm(x)) for path, x in outcome.gradient.items()}
    total = float(np.sqrt(sum(norm**2 for norm in norms.values())))
    dead = sorted(path for path, norm in norms.items() if norm == 0)
    figures = {"norm": total, "loss": outcome.loss, "tensors": len(norms), "without_gradient": dead}
    measured = f"norm {total:.2g}, {len(norms) - len(dead)} of {len(norms)} tensors"
    if not np.isfinite(total) or not np.isfinite(outcome.loss):
        sentence = f"the loss is {outcome.loss:g} and its gradient has the norm {total:g}: every update is skipped."
        return Check("refuted", measured, "above 0", sentence, figures)
    if total == 0 or any(".lora_" in path for path in dead):
        sentence = (
            f"{count(len(dead), 'trained tensor')}, such as {dead[0]}, have no gradient on a batch whose rewards "
            "differ, so that the loss does not train them."
        )
        return Check("refuted", measured, "above 0", sentence, figures)
    return Check("proved", measured, "above 0", figures=figures)


def better_completions_become_likelier(subject: Subject) -> Check:
    """A small step against the gradient makes likelier what the made-up reward prefers, what is imitated, or chosen.

    The figure is the cosine, over completions, of the change of their log-probability with their advantage: below 0
    where a sign is wrong, about 0 where rewards belong to other completions than theirs.
    """
    if subject.algorithm.has_head and not subject.algorithm.on_policy:
        return not_applicable("a reward model's completions are data, which do not become likelier.")
    batch = _batch(subject)
    weights = preferences_of(subject, batch)
    before, after = (_sequence_logprobs(subject, batch, step) for step in (0.0, STEP))
    change = (after - before) * (weights != 0)
    norm = float(np.linalg.norm(change) * np.linalg.norm(weights))
    cosine = float((change * weights).sum() / norm) if norm else 0.0
    figures = {"cosine": cosine, "completions": int((weights != 0).sum())}
    sentence = (
        f"a step against the gradient changes log-probabilities with a cosine of {cosine:.2f} to the advantages: the "
        "loss or the advantages have the wrong sign, or rewards are those of other completions."
    )
    found = verified(cosine > 0, f"cosine {cosine:.2f}", "above 0", sentence, figures)
    # A critic on the same trunk can outweigh the policy's part on so small a batch.
    is_doubtful = subject.algorithm.has_head and found.verdict == "refuted"
    return replace(found, verdict="warning") if is_doubtful else found


def preferences_of(subject: Subject, batch: Batch) -> np.ndarray:
    """[P, G] how much likelier each completion of the small batch is to become, relative to the others."""
    counts = np.asarray(batch.sample_mask, float)
    if "preferences" in subject.algorithm.reads:  # chosen and rejected, side by side
        return counts * np.resize([1.0, -1.0], counts.shape)
    if not subject.algorithm.on_policy:
        return counts
    [reward] = subject.small.rewards.values()
    rewards = np.reshape(np.array(reward(completions=range(counts.size)), float), counts.shape)
    size = counts.shape[1]
    return counts * (rewards - (rewards.mean(axis=1, keepdims=True) if size > 1 else rewards.mean()))


def learning_rate_follows_the_updates(subject: Subject) -> Check:
    """A batch of several micro-batches is one step of the optimizer, and its schedule ends where training ends."""
    config, experiment = subject.experiment.optimizer, subject.experiment
    total = experiment.num_steps * experiment.updates_per_step
    steps = _outcome(subject, micro=PROMPTS).steps
    _, schedule = make_optimizer(config, total)
    rates = [float(schedule(at)) for at in sorted({0, *np.linspace(0, max(total - 1, 0), 100).astype(int).tolist()})]
    figures = {"optimizer_steps": steps, "updates": total, "first": rates[0], "highest": max(rates), "last": rates[-1]}
    measured = f"{rates[0]:.1e} to {rates[-1]:.1e} in {total:,}"
    bound = f"highest {config.learning_rate:.1e}"
    if steps != 1:
        sentence = (
            f"{PROMPTS} micro-batches are {steps} steps of the optimizer, so that the schedule ends too early: "
            "gradients must be added up before the optimizer sees them."
        )
        return Check("refuted", measured, bound, sentence, figures)
    if total and max(rates) == 0:
        return Check("refuted", measured, bound, "the learning rate is 0: nothing is learned.", figures)
    if config.warmup_steps >= total > 0:
        sentence = (
            f"the warm-up of {count(config.warmup_steps, 'update')} is not shorter than the training of {total:,}, so "
            "that nothing comes of the schedule after it: lower optimizer.warmup_steps."
        )
        return Check("warning", measured, bound, sentence, figures)
    return Check("proved", measured, bound, figures=figures)


def _unchanged(subject: Subject, other: Outcome, what: str) -> Check:
    """Whether an outcome is that of the whole batch on one device, but for rounding."""
    own = _outcome(subject)
    norm = float(optax.global_norm(own.gradient))
    apart = float(optax.global_norm(jax.tree.map(jnp.subtract, own.gradient, other.gradient)))
    gradient = apart / norm if norm else apart
    loss = abs(own.loss - other.loss) / max(abs(own.loss), 1.0)
    worst = max(gradient, loss) if np.isfinite(gradient + loss) else float("nan")
    sentence = (
        f"with {what} the gradient differs by {gradient:.1e} of its norm and the loss by {loss:.1e}: a mean over part "
        "of a batch stands where the loss needs the whole batch's count (`LossInputs.num_tokens` and the like)."
    )
    limit = ROUNDING[subject.dtype]
    return within(worst, limit, "", sentence, gradient=gradient, loss=loss, norm=norm)


def _outcome(subject: Subject, *, batch: Batch | None = None, micro: int = 1, devices: int = 1) -> Outcome:
    """One update of the moved policy, kept where it is of the batch itself."""
    key = ("outcome", micro, devices)
    if batch is not None:
        return _update(subject, batch, micro, devices)
    if key not in subject.found:
        subject.found[key] = _update(subject, _batch(subject), micro, devices)
    found: Outcome = subject.found[key]
    return found


def _update(subject: Subject, batch: Batch, micro: int, devices: int) -> Outcome:
    replicas, experiment = Replicas(devices), replace(subject.small, gradient_accumulation_steps=micro)
    layout = lay_out(experiment, batch, 0, replicas)
    trainable, reference = subject.trainable_of(subject.moved), subject.reference
    state = State(trainable, keep_gradient().init(trainable), jnp.int32(0))
    frozen = subject.start_actor.frozen
    if devices > 1:
        frozen = replicas.replicate(Replicas().first(frozen))
    new, output = _program(subject, micro, devices)(
        replicas.replicate(state),
        frozen,
        None if reference is None else replicas.replicate(reference),
        layout.split(batch),
        replicas.broadcast(np.bool_(False)),  # so that a gap of log-probabilities does not skip the update
    )
    # A copy of one device, since arrays of other devices cannot be compared with those of one.
    kept: Recorded = (replicas.first if devices == 1 else replicas.fetch)(new.optimizer)
    gaps = None if output.logprob_gaps is None else layout.gather(output.logprob_gaps)
    return Outcome(kept.gradient, float(replicas.fetch(output.metrics)["loss"]), gaps, int(kept.steps))


def _program(subject: Subject, micro: int, devices: int) -> Callable[..., Any]:
    """The compiled update: what the method finds before its updates, and the first of them."""
    key = ("program", micro, devices)
    if key not in subject.found:
        replicas, experiment = Replicas(devices), replace(subject.small, gradient_accumulation_steps=micro)
        setup = subject.setup(experiment, replicas)
        update = make_update(setup, keep_gradient())
        before = subject.algorithm.make_objective(setup).before_updates

        def program(
            state: State, frozen: Params, reference: Params | None, batch: Batch, first: Array
        ) -> tuple[State, UpdateOutput]:
            if before is not None:
                batch, _ = before(state.trainable, frozen, reference, batch)
            return update(state, frozen, reference, batch, first)

        subject.found[key] = replicas.compile(program, donate=(0,))
    found: Callable[..., Any] = subject.found[key]
    return found


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that moves nothing, and whose state is the last gradient and how many it was given."""

    def init(params: Any) -> Recorded:
        return Recorded(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Recorded]:
        return jax.tree.map(jnp.zeros_like, gradient), Recorded(gradient, state.steps + 1)

    return optax.GradientTransformation(init, update)


def _batch(subject: Subject) -> Batch:
    """The small batch of the method, its completions cut to different lengths."""
    batch = subject.train_batch.batch
    if batch.segments is not None:
        return batch
    rows, size, longest = batch.mask.shape
    shares = np.resize(CUTS, rows * size).reshape(rows, size)
    kept = np.ceil(np.asarray(batch.valid).sum(-1) * shares)
    inside = np.arange(longest) < kept[..., None]
    return batch._replace(valid=batch.valid & inside, mask=batch.mask & inside)


def _sequence_logprobs(subject: Subject, batch: Batch, step: float) -> np.ndarray:
    """[P, G] the log-probabilities of whole completions, `step` of the parameters' norm against the gradient."""
    replicas = Replicas()
    gradient, trainable = _outcome(subject).gradient, subject.trainable_of(subject.moved)
    size = step * optax.global_norm(trainable) / jnp.maximum(optax.global_norm(gradient), 1e-30)
    stepped = jax.tree.map(lambda x, g: x - size * g, trainable, gradient)
    found = _logprobs(subject)(replicas.replicate(stepped), subject.start_actor.frozen, replicas.split(batch))
    return np.asarray(np.where(batch.mask, replicas.gather(found), 0.0).sum(-1))


def _logprobs(subject: Subject) -> Callable[..., Any]:
    """The compiled log-probabilities [P, G, T] of a placed batch: (trainable, frozen, batch) -> logprobs."""
    if "logprobs" not in subject.found:
        replicas, small = Replicas(), subject.small
        forward = subject.setup(small, replicas).forward(temperature=small.sampling.temperature)
        subject.found["logprobs"] = replicas.compile(lambda *arguments: forward.logprobs(*arguments)[0])
    found: Callable[..., Any] = subject.found["logprobs"]
    return found


def _padded(batch: Batch, prompt: int, completion: int) -> Batch:
    """The batch with more padding of its prompts and completions."""

    def pad(name: str, x: Array) -> Array:
        if name == "prompts":
            return np.pad(np.asarray(x), ((0, 0), (0, prompt)))
        return np.pad(np.asarray(x), ((0, 0), (0, 0), (0, completion))) if x.ndim == 3 else x

    return Batch(**{name: pad(name, x) for name, x in batch._asdict().items() if x is not None})


def _gaps(subject: Subject) -> tuple[np.ndarray, int]:
    """|trainer - sampler| [P, G, T] of tokens of the moved policy, and how many there are."""
    small, replicas = subject.small, Replicas()
    sampled = subject.sample(0, range(small.group_size), moved=True)
    batch = Batch(
        *(sampled.prompts, sampled.lengths, sampled.tokens, sampled.valid, sampled.mask, sampled.logprobs),
        rewards=np.zeros(sampled.mask.shape[:2], np.float32),
        sample_mask=np.ones(sampled.mask.shape[:2], bool),
    )
    trainable = replicas.replicate(subject.trainable_of(subject.moved))
    found = _logprobs(subject)(trainable, subject.start_actor.frozen, replicas.split(batch))
    gaps = np.where(sampled.mask, np.abs(replicas.gather(found) - sampled.logprobs), 0.0)
    return gaps, int(sampled.mask.sum())
