"""All seeds of a from-scratch arm in one compiled program: sampling, reward and update, mapped over seeds.

A whole step runs on the device and `CHUNK` of them per call (Lu et al. 2022, purejaxrl, is the model). The seeds are
shared out over the devices (`grpo-jax sweep` makes a device of each core of a CPU), which go on training while this
process writes files. Noise, prompts and initial parameters are named by the seed as in a run of its own, and on a CPU
sampling, advantages and each update are compiled as they are there (`_apart`). So on a CPU a seed has the numbers of a
run of its own on one device (`docs/guides/ablation.md` says where that was measured). An accelerator trains its seeds
at once; there the rounding of batched matrix products can change which token is drawn.
Everything around the steps (evaluations, metrics, checkpoints, files) is that of `grpo_jax.training`, seed by seed, so
`grpo-jax table` and `grpo-jax evaluate` find ordinary runs.

Runs that are not finished cannot be resumed: they start again.
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import sharding
from grpo_jax.advantages import compute_advantages
from grpo_jax.algorithms import GRPO, SFT, Batch, TrainBatch, algorithm_of, grpo
from grpo_jax.algorithms.batches import reward_arrays, schedule
from grpo_jax.algorithms.dynamic_sampling import Round
from grpo_jax.algorithms.on_policy import rewarded_batch
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment, variant_of
from grpo_jax.guards import Alarm
from grpo_jax.policy import Policy
from grpo_jax.policy.tokenizer import CharacterTokenizer
from grpo_jax.rollout import settings_of, single_turn
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.runs.restore import source_policy
from grpo_jax.runs.result import Result, summarize
from grpo_jax.sampler import Generation, Noise, generate
from grpo_jax.sweep import array_rewards
from grpo_jax.training import Trainer
from grpo_jax.update import State, UpdateOutput, make_optimizer, make_update

CHUNK = 20  # steps in one call: between two calls files are written and Ctrl-C is heard


class Inputs(NamedTuple):
    """What a step of one seed is given.

    Attributes:
      step: the step's number.
      prompts, lengths, prompt_ids: [P, S], [P] and [P] int32.
      temperature, top_p: float32 scalars: as constants they would be compiled in another way than in a run of its own.
      secrets: [P, L] int32, from which completions are rewarded; None for SFT.
      demonstrated: the demonstrations that SFT trains on; None for GRPO.
    """

    step: Any
    prompts: Any
    lengths: Any
    prompt_ids: Any
    temperature: Any
    top_p: Any
    secrets: Any
    demonstrated: Any


def require_vectorizable(config: Experiment) -> None:
    """Raises `UserError` for an experiment that cannot be trained in one program, and says why."""
    algorithm = algorithm_of(config)
    scratch = config.policy.source == "scratch" and config.policy.lora is None
    obstacles = {
        f"its method is {config.method_name}, neither grpo nor sft": type(algorithm) not in (GRPO, SFT),
        "its demonstrations are packed (sft.packing)": config.sft.packing,
        "its policy is not from scratch (policy.source = 'scratch' without adapters)": not scratch,
        "its task has several turns": config.task.max_turns > 1,
        "it has a control": config.control is not None,
        "reward.combine is not 'sum'": config.reward.combine != "sum",
        "token_budget is set": config.token_budget is not None,
        "num_minibatches is not 1": config.num_minibatches > 1,
        "its micro-batches are parts of groups (gradient_accumulation_steps)": config.group_parts(1) != 1,
        "advantages.kl_coef is not 0": grpo.kl_coef(config) > 0,
        "dynamic_sampling_rounds is not 0": config.dynamic_sampling_rounds > 0,
        "guards.spike_factor is set": config.guards.spike_factor is not None,
        "guards.on_collapse is 'stop'": config.guards.on_collapse == "stop",
        "loss.sync_ref_model is on": config.loss_config.sync_ref_model,
        "loss.mask_truncated_completions is on": config.loss_config.mask_truncated_completions,
        "loss.importance_sampling_mode is not None": config.loss_config.importance_sampling_mode is not None,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"this experiment cannot be vectorised: {obstacle}. Run it without --vectorize.")
    if algorithm.on_policy:
        array_rewards.require_form(config)
    if config.warm_start is not None:
        require_vectorizable(variant_of(config, config.warm_start))


def train_seeds(runs: Mapping[Path, tuple[Experiment, list[str]]], *, source: Path | None = None) -> None:
    """Trains experiments that differ in their seed alone, each with a run directory as `training.train` leaves one.

    Args:
      runs: for each run directory the experiment, and the overrides of the file that it came from, for the record.

    Raises as `training.train` does. If one seed fails, all end.
    """
    configs = [config for config, _ in runs.values()]
    for config in configs:
        require_vectorizable(config)
    began = time.monotonic()
    with ExitStack() as stack:
        logs = []
        for run_dir, (config, overrides) in runs.items():
            if run_dir.exists():
                shutil.rmtree(run_dir)
            quiet = display_of(config, quiet=True)
            log = RunLog(run_dir, config, source=source, overrides=overrides, display=quiet)
            logs.append(stack.enter_context(log))
        trainers = _trainers(configs, logs)
        before = [(trainer.evaluate(0), trainer.sample_group()) for trainer in trainers]
        _fit(trainers)
        for trainer, (evaluation, group) in zip(trainers, before, strict=True):
            after, run_dir = trainer.evaluate(trainer.experiment.num_steps), trainer.log.run_dir
            seconds = time.monotonic() - began
            result = Result(run_dir, trainer.policy(), evaluation, after, {}, group, trainer.sample_group(), seconds)
            trainer.log.summary(summarize(result, trainer.experiment))


def _trainers(configs: Sequence[Experiment], logs: Sequence[RunLog]) -> list[Trainer]:
    """A `Trainer` for each seed. It begins where the seed's warm start, trained in one program too, has ended."""
    starts: list[Policy] = []
    if configs[0].warm_start is None:
        starts = [source_policy(config) for config in configs]
    else:
        variants = [variant_of(config, config.warm_start or {}) for config in configs]
        with ExitStack() as stack:
            warm_logs = [
                stack.enter_context(RunLog(log.run_dir / "warm_start", v, display=display_of(v, quiet=True)))
                for v, log in zip(variants, logs, strict=True)
            ]
            warm = _trainers(variants, warm_logs)
            _fit(warm)
            starts = [trainer.policy() for trainer in warm]
    # A run of its own may use several devices; a seed of a vectorized sweep uses one.
    configs = [replace(config, devices=1) for config in configs]
    return [Trainer(*parts) for parts in zip(configs, starts, logs, strict=True)]


def _fit(trainers: Sequence[Trainer]) -> None:
    """Trains all seeds from the first step to the last, as `Trainer.fit` trains one."""
    config, every = trainers[0].experiment, trainers[0].experiment.evaluation.every
    program, size = _program(trainers[0]), _chunk(config)
    num_shares = sharding.up_to(len(trainers)).count
    shares = [trainers[i::num_shares] for i in range(num_shares)]
    own = [[t.replicas.first((t.state, t.actor.frozen, t.reference)) for t in share] for share in shares]
    states, *constant = zip(*[map(_stack, zip(*trees, strict=True)) for trees in own], strict=True)
    seeds = [np.array([t.experiment.seed for t in share], np.int32) for share in shares]
    chunks = [range(first, first + size) for first in range(0, config.num_steps, size)]
    upcoming = [[_inputs(t, chunks[0]) for t in share] for share in shares] if chunks else []
    write_last: Callable[[], None] = _nothing
    # Not one program for all devices: partitioned, it would be fused in another way and round in another.
    with ThreadPoolExecutor(num_shares) as pool:
        for steps in chunks:
            began, given = time.monotonic(), upcoming
            stacked = [_stack([inputs for inputs, _ in share]) for share in given]
            run = partial(_run_on, program)
            under_way = pool.map(run, range(num_shares), states, *constant, seeds, stacked)
            write_last()
            if steps is not chunks[-1]:
                following = range(steps.stop, steps.stop + size)
                upcoming = [[_inputs(t, following) for t in share] for share in shares]
            states, outputs = zip(*under_way, strict=True)
            seconds = (time.monotonic() - began) / size
            write_last = partial(_write, shares, steps, given, outputs, seconds=seconds)
            if steps is chunks[-1] or (every and steps.stop % every == 0):
                write_last()
                write_last = _nothing
                for share, ended in zip(shares, states, strict=True):
                    for i, trainer in enumerate(share):
                        trainer.state = State(*trainer.replicas.replicate(tuple(_at(ended, i))))
                        if steps is not chunks[-1]:
                            trainer.evaluate(steps.stop)
    for trainer in trainers:
        trainer.save(config.num_steps)


def _run_on(program: Callable[..., Any], index: int, *arguments: Any) -> Any:
    return sharding.run_on(index, program, *arguments)


def _nothing() -> None:
    pass


def _chunk(config: Experiment) -> int:
    """The largest number of steps up to `CHUNK` that divides the steps between two evaluations."""
    span = math.gcd(config.num_steps, config.evaluation.every)
    return max((n for n in range(1, min(span, CHUNK) + 1) if span % n == 0), default=1)


def _program(trainer: Trainer) -> Any:
    """Builds `program(states, frozen, reference, seeds, inputs) -> (states, outputs)`: N seeds' K steps [N, K, …]."""
    config, actor = trainer.experiment, trainer.actor
    optimizer, _ = make_optimizer(config.optimizer, config.num_steps * config.num_iterations)
    update = make_update(trainer.setup._replace(axis_name=None), optimizer)
    shared = trainer.prompts.shared_prefix_length
    settings = replace(settings_of(config.sampling, actor.tokenizer), shared_prefix_length=shared)
    samples = jnp.tile(jnp.arange(config.group_size, dtype=jnp.int32), (config.prompts_per_step, 1))

    def sample(state: State, frozen: Any, seed: jax.Array, given: Inputs) -> Generation:
        noise = Noise(seed, given.step, given.prompt_ids, samples)
        policy = actor.model.bind(state.trainable, frozen)
        scales = given.temperature, given.top_p
        return generate(policy, given.prompts, given.lengths, noise, *scales, settings)[0]

    def advantages_of(rewards: jax.Array, sample_mask: jax.Array, mask: jax.Array) -> jax.Array:
        return compute_advantages(config.advantages, rewards, sample_mask, token_mask=mask)

    def play(state: State, frozen: Any, seed: jax.Array, given: Inputs) -> tuple[Generation | None, Batch]:
        if given.demonstrated is not None:
            return None, given.demonstrated
        generation = _apart(given, sample, state, frozen, seed, given)
        mask = generation.mask
        rewards = array_rewards.reward(config, generation.tokens, mask, given.secrets)
        tokens, sample_mask = jnp.where(mask, generation.tokens, 0), jnp.broadcast_to(_always(given), rewards.shape)
        advantages = _apart(given, advantages_of, rewards, sample_mask, mask)
        arrays = (given.prompts, given.lengths, tokens, mask, mask, generation.logprobs, rewards, sample_mask)
        return generation, Batch(*arrays, advantages=advantages)

    def step(state: State, frozen: Any, reference: Any, seed: jax.Array, given: Inputs) -> tuple[State, Any]:
        generation, batch = _apart(given, play, state, frozen, seed, given)
        state, output = _apart(given, update, state, frozen, reference, batch, _always(given))
        first = output
        for _ in range(config.num_iterations - 1):
            state, output = _apart(given, update, state, frozen, reference, batch, ~_always(given))
        # As in `Trainer.step`: the first iteration measures the sampler's gap, the last how far the policy has moved.
        of_first = {k: v for k, v in first.metrics.items() if k.startswith("sampling/")}
        output = output._replace(metrics={**output.metrics, **of_first}, logprob_gaps=first.logprob_gaps)
        return state, (generation, batch.rewards, output)

    def steps(one: tuple[State, Any, Any, jax.Array, Inputs]) -> tuple[State, Any]:
        state, frozen, reference, seed, inputs = one
        return jax.lax.scan(lambda state, given: step(state, frozen, reference, seed, given), state, inputs)

    return jax.jit(lambda *seeds: _over_seeds(steps, seeds))


def _apart(given: Inputs, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, on a CPU compiled as in a run of its own, where it is a program of its own.

    There it is a branch that is always taken, which the compiler cannot know: it fuses nothing over the edges of a
    branch, so that the function rounds as it does alone. (`jax.lax.optimization_barrier` has no such effect on a CPU.)
    """
    if jax.default_backend() != "cpu":
        return function(*arguments)

    def never(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))

    return jax.lax.cond(_always(given), function, never, *arguments)


def _always(given: Inputs) -> jax.Array:
    """True, of which the compiler cannot know that it always is: with a constant it would fold what reads it."""
    return given.step >= 0


def _over_seeds(function: Callable[[Any], Any], seeds: Any) -> Any:
    """`function` of every seed, the leading axis of the tree `seeds`.

    An accelerator takes all seeds at once. A CPU gains little by that, and one after another each seed has the shapes,
    and so the rounding, of a run of its own.
    """
    return jax.lax.map(function, seeds) if jax.default_backend() == "cpu" else jax.vmap(function)(seeds)


def _inputs(trainer: Trainer, steps: range) -> tuple[Inputs, list[TrainBatch | None]]:
    """What the program is given for K steps of one seed, [K, …], and for SFT the batches that they are."""
    config, task, tokenizer = trainer.experiment, trainer.experiment.task, trainer.actor.tokenizer
    given: list[Inputs] = []
    batches: list[TrainBatch | None] = []
    for step in steps:
        indices, ids = schedule(config.seed, step, config.prompts_per_step, len(task.train))
        prompts = trainer.prompts.batch("train", indices)
        scales = np.float32(config.sampling.temperature), np.float32(config.sampling.top_p)
        named = np.int32(step), prompts.ids, prompts.lengths, np.asarray(ids, np.int32), *scales
        if trainer.algorithm.on_policy:
            assert isinstance(tokenizer, CharacterTokenizer), "as a policy from scratch has"
            secrets = array_rewards.secrets_of(prompts.examples, tokenizer)
            batches.append(None)
            given.append(Inputs(*named, np.asarray(secrets, np.int32), None))
        else:
            train_batch = trainer.algorithm.make_batch(trainer.context(), step)
            batches.append(train_batch)
            given.append(Inputs(*named, None, train_batch.batch))
    return _stack(given), batches


def _write(
    shares: Sequence[Sequence[Trainer]],
    steps: range,
    given: Sequence[Sequence[tuple[Inputs, list[TrainBatch | None]]]],
    outputs: Sequence[Any],
    *,
    seconds: float,
) -> None:
    """Logs K steps of all seeds; each device's outputs are [N, K, …]."""
    for share, of_share, returned in zip(shares, given, outputs, strict=True):
        for i, (trainer, (inputs, batches)) in enumerate(zip(share, of_share, strict=True)):
            for k, step in enumerate(steps):
                generation, rewards, output = jax.tree.map(lambda x, i=i, k=k: x[i, k], returned)
                train_batch = batches[k]
                if train_batch is None:
                    train_batch = _sampled_batch(trainer, step, _at(inputs, k), generation, rewards)
                _record(trainer, step, train_batch, output, seconds=seconds)


def _record(trainer: Trainer, step: int, train_batch: TrainBatch, output: UpdateOutput, *, seconds: float) -> None:
    """Logs one step of one seed."""
    if output.logprob_gaps is not None:
        trainer.check_logprobs(output.logprob_gaps, train_batch.rollout, step)
    trainer.record(step, train_batch, {k: float(v) for k, v in output.metrics.items()}, seconds=seconds)
    for note in trainer.watch.see(step, [output.metrics]):
        trainer.log.warn(Alarm(step, "update", note))


def _sampled_batch(
    trainer: Trainer, step: int, given: Inputs, generation: Generation, rewards: np.ndarray
) -> TrainBatch:
    """The batch that a seed's step was, from the arrays that its program returned.

    Raises:
      RunError: if the experiment's Python rewards pay something else than the program was trained on.
    """
    config = trainer.experiment
    indices, _ = schedule(config.seed, step, config.prompts_per_step, len(config.task.train))
    prompts = trainer.prompts.batch("train", indices)
    rollout = single_turn(prompts, given.prompt_ids, generation, trainer.actor.tokenizer)
    scores = trainer.context().score(rollout, step)
    paid, sample_mask = reward_arrays(scores, rewards.shape)
    if not np.allclose(paid, rewards, rtol=0, atol=1e-6):
        p, g = np.argwhere(~np.isclose(paid, rewards, rtol=0, atol=1e-6))[0]
        raise RunError(
            f"step {step}: {rollout.episodes[p][g].turns[0]!r} was trained on with a reward of {rewards[p, g]:g}, but "
            f"the experiment's rewards pay {paid[p, g]:g}: their JAX form is wrong."
        )
    return grpo.with_advantages(rewarded_batch([Round(rollout, scores, paid, sample_mask)], config), config)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _at(tree: Any, index: int) -> Any:
    """The entry `index` of the leading axis, of seeds or of steps."""
    return jax.tree.map(lambda x: x[index], tree)
