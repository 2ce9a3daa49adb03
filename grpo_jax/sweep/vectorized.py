"""All seeds of a from-scratch arm in one compiled program: sampling, reward and update, mapped over seeds.

A whole step runs on the device and `CHUNK` of them per call (Lu et al. 2022, purejaxrl, is the model). The devices
share the lanes (`grpo-jax sweep` makes a device of each core of a CPU) and train on while this process writes down what
they did. Noise, prompts and initial parameters are named by the seed as in a run of its own, so on a CPU a lane has
that run's numbers to the last digit; an accelerator takes its lanes at once, where the rounding of batched matrix
products can turn a draw. Everything around the steps (evaluations, metrics, checkpoints, files) is that of
`grpo_jax.training`, lane by lane, so `grpo-jax table` and `grpo-jax evaluate` find ordinary runs.

A program under way cannot be resumed: runs that are not finished begin anew.
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

from grpo_jax import sharding as devices
from grpo_jax.algorithms import LESSONS, Lesson, on_policy
from grpo_jax.algorithms.dynamic_sampling import Round
from grpo_jax.algorithms.lesson import reward_arrays, schedule
from grpo_jax.algorithms.objectives import Batch
from grpo_jax.errors import RunError, UserError
from grpo_jax.experiment import Experiment, variant_of
from grpo_jax.policy import Policy
from grpo_jax.rollout import single_turn
from grpo_jax.runs.log import RunLog
from grpo_jax.sampler.decode import Noise, Settings, Turn, first_turn
from grpo_jax.sweep import array_rewards
from grpo_jax.training import Result, Run, source_policy, summarize
from grpo_jax.update import State, make_optimizer, make_update

CHUNK = 20  # steps in one call: between two calls files are written and Ctrl-C is heard


class Inputs(NamedTuple):
    """What a step of one lane is given: prompts [P, S], lengths [P], prompt_ids [P], and either the secrets [P, L] that
    its completions are rewarded by, or (for SFT) the demonstrations that it trains on.
    """

    step: Any
    prompts: Any
    lengths: Any
    prompt_ids: Any
    secrets: Any
    demonstrated: Any


def require_vectorizable(config: Experiment) -> None:
    """Raises `UserError` for an experiment that cannot be trained in one program, and says why."""
    scratch = config.policy.source == "scratch" and config.policy.lora is None
    obstacles = {
        f"its method is {config.method}, neither grpo nor sft": config.method not in ("grpo", "sft"),
        "its demonstrations are packed (sft.packing)": config.method == "sft" and config.sft.packing,
        "its policy is not from scratch (policy.source = 'scratch' without adapters)": not scratch,
        "its task has several turns": config.task.max_turns > 1,
        "it has a control": config.control is not None,
        "reward.combine is not 'sum'": config.reward.combine != "sum",
        "token_budget is set": config.token_budget is not None,
        "dynamic_sampling_rounds is not 0": config.dynamic_sampling_rounds > 0,
        "loss.sync_ref_model is on": config.loss.sync_ref_model,
        "loss.mask_truncated_completions is on": config.loss.mask_truncated_completions,
        "loss.importance_sampling_mode is not None": config.loss.importance_sampling_mode is not None,
    }
    for obstacle, stands in obstacles.items():
        if stands:
            raise UserError(f"this experiment cannot be vectorised: {obstacle}. Run it without --vectorize.")
    if config.method == "grpo":
        array_rewards.require_form(config)
    if config.warm_start is not None:
        require_vectorizable(variant_of(config, config.warm_start))


def train_seeds(runs: Mapping[Path, tuple[Experiment, list[str]]], *, source: Path | None = None) -> None:
    """Trains experiments that differ in their seed alone, each with a run directory as `training.train` leaves one.

    Args:
      runs: for each run directory the experiment, and the overrides of the file that it came from, for the record.

    Raises as `training.train` does; what one seed fails by ends them all.
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
            logs.append(stack.enter_context(RunLog(run_dir, config, source=source, overrides=overrides, quiet=True)))
        lanes = _lanes(configs, logs)
        before = [(lane.examine(0), lane.show_group()) for lane in lanes]
        _go(lanes)
        for lane, (evaluation, group) in zip(lanes, before, strict=True):
            after, run_dir = lane.examine(lane.experiment.steps), lane.log.run_dir
            seconds = time.monotonic() - began
            result = Result(run_dir, lane.policy(), evaluation, after, {}, group, lane.show_group(), seconds)
            lane.log.summary(summarize(result, lane.experiment))


def _lanes(configs: Sequence[Experiment], logs: Sequence[RunLog]) -> list[Run]:
    """A `Run` for each seed, which begins where its warm start, trained in one program too, has ended."""
    starts: list[Policy] = []
    if configs[0].warm_start is None:
        starts = [source_policy(config) for config in configs]
    else:
        variants = [variant_of(config, config.warm_start or {}) for config in configs]
        with ExitStack() as stack:
            warm_logs = [
                stack.enter_context(RunLog(log.run_dir / "warm_start", variant, quiet=True))
                for variant, log in zip(variants, logs, strict=True)
            ]
            warm = _lanes(variants, warm_logs)
            _go(warm)
            starts = [lane.policy() for lane in warm]
    # What its run may take several devices for, a lane does on one.
    configs = [replace(config, devices=1) for config in configs]
    return [Run(*parts) for parts in zip(configs, starts, logs, strict=True)]


def _go(lanes: Sequence[Run]) -> None:
    """Trains all lanes from the first step to the last, as `Run.go` trains one."""
    config, every = lanes[0].experiment, lanes[0].experiment.evaluation.every
    program, size = _program(lanes[0]), _chunk(config)
    places = jax.local_devices()[: len(lanes)]
    shares = [lanes[i :: len(places)] for i in range(len(places))]
    own = [[devices.unreplicate((lane.state, lane.actor.frozen, lane.reference)) for lane in share] for share in shares]
    states, *constant = zip(*[map(_stack, zip(*trees, strict=True)) for trees in own], strict=True)
    seeds = [np.array([lane.experiment.seed for lane in share], np.int32) for share in shares]
    chunks = [range(first, first + size) for first in range(0, config.steps, size)]
    upcoming = [[_inputs(lane, chunks[0]) for lane in share] for share in shares] if chunks else []
    write_last: Callable[[], None] = _nothing
    # Not one program for all devices: partitioned, it is fused in another way, and rounds in another.
    with ThreadPoolExecutor(len(places)) as pool:
        for steps in chunks:
            began, given = time.monotonic(), upcoming
            stacked = [_stack([inputs for inputs, _ in share]) for share in given]
            under_way = pool.map(partial(_on, program), places, states, *constant, seeds, stacked)
            write_last()
            if steps is not chunks[-1]:
                following = range(steps.stop, steps.stop + size)
                upcoming = [[_inputs(lane, following) for lane in share] for share in shares]
            states, outputs = zip(*under_way, strict=True)
            seconds = (time.monotonic() - began) / size
            write_last = partial(_write, shares, steps, given, outputs, seconds=seconds)
            if steps is chunks[-1] or (every and steps.stop % every == 0):
                write_last()
                write_last = _nothing
                for share, ended in zip(shares, states, strict=True):
                    for i, lane in enumerate(share):
                        lane.state = State(*devices.replicate(tuple(_lane(ended, i)), 1))
                        if steps is not chunks[-1]:
                            lane.examine(steps.stop)
    for lane in lanes:
        lane.save(config.steps)


def _on(program: Callable[..., Any], device: jax.Device, *arguments: Any) -> Any:
    """What a program returns when it runs on a device, on the host."""
    with jax.default_device(device):
        return jax.device_get(program(*arguments))


def _nothing() -> None:
    pass


def _chunk(config: Experiment) -> int:
    """The largest number of steps up to `CHUNK` that divides the steps between two evaluations."""
    span = math.gcd(config.steps, config.evaluation.every)
    return max((n for n in range(1, min(span, CHUNK) + 1) if span % n == 0), default=1)


def _program(lane: Run) -> Any:
    """Builds `program(states, frozen, reference, seeds, inputs) -> (states, outputs)`: N lanes' K steps [N, K, …]."""
    config, actor = lane.experiment, lane.actor
    optimizer, _ = make_optimizer(config.optimizer, config.steps * config.num_iterations)
    update = make_update(actor.model, config, optimizer, common=lane.prompts.common, axis_name=None)
    sampling, tokenizer = config.sampling, actor.tokenizer
    truncate = sampling.top_k > 0 or sampling.top_p < 1
    settings = Settings(sampling.max_tokens, tokenizer.stop_ids, tokenizer.pad_id, sampling.top_k, truncate=truncate)
    samples = jnp.tile(jnp.arange(config.group_size, dtype=jnp.int32), (config.prompts_per_step, 1))
    sample = partial(first_turn, settings=settings, slots=sampling.max_tokens - 1, common=lane.prompts.common)

    def play(state: State, frozen: Any, seed: jax.Array, given: Inputs) -> tuple[Turn | None, Batch]:
        if config.method == "sft":
            return None, given.demonstrated
        noise = Noise(seed, given.step, given.prompt_ids, samples)
        policy = actor.model.bind(state.trainable, frozen)
        scales = jnp.float32(sampling.temperature), jnp.float32(sampling.top_p)
        turn, _ = sample(policy, given.prompts, given.lengths, noise, *scales)
        rewards = array_rewards.reward(config, turn.tokens, turn.mask, given.secrets)
        tokens, kept = jnp.where(turn.mask, turn.tokens, 0), jnp.ones(rewards.shape, bool)
        return turn, Batch(given.prompts, given.lengths, tokens, turn.mask, turn.mask, turn.logprobs, rewards, kept)

    def step(state: State, frozen: Any, reference: Any, seed: jax.Array, given: Inputs) -> tuple[State, Any]:
        turn, batch = play(state, frozen, seed, given)
        state, metrics = update(state, frozen, reference, batch, jnp.bool_(True))
        for _ in range(config.num_iterations - 1):
            first = metrics
            state, metrics = update(state, frozen, reference, batch, jnp.bool_(False))
            # As in `Run.step`: the first iteration measures the sampler's gap, the last how far the policy has moved.
            of_first = ("sampling/logprob_difference/mean", "sampling/logprob_difference/max", "logprob_gaps")
            metrics |= {name: first[name] for name in of_first if name in first}
        return state, (turn, batch.rewards, metrics)

    def steps(lane: tuple[State, Any, Any, jax.Array, Inputs]) -> tuple[State, Any]:
        state, frozen, reference, seed, inputs = lane
        return jax.lax.scan(lambda state, given: step(state, frozen, reference, seed, given), state, inputs)

    return jax.jit(lambda *lanes: _over_lanes(steps, lanes))


def _over_lanes(function: Callable[[Any], Any], lanes: Any) -> Any:
    """`function` of every lane, the leading axis of the tree `lanes`.

    An accelerator takes all lanes at once. A CPU gains little by that, and loses that a lane has the shapes, and so the
    rounding, of a run of its own.
    """
    return jax.lax.map(function, lanes) if jax.default_backend() == "cpu" else jax.vmap(function)(lanes)


def _inputs(lane: Run, steps: range) -> tuple[Inputs, list[Lesson | None]]:
    """What the program is given for K steps of one lane, [K, …], and for SFT the lessons that they are."""
    config, task, tokenizer = lane.experiment, lane.experiment.task, lane.actor.tokenizer
    given: list[Inputs] = []
    lessons: list[Lesson | None] = []
    for step in steps:
        indices, ids = schedule(config.seed, step, config.prompts_per_step, len(task.train))
        named = np.int32(step), *lane.prompts.batch("train", indices), np.asarray(ids, np.int32)
        if config.method == "sft":
            lesson = LESSONS["sft"](lane.classroom(), step)
            lessons.append(lesson)
            given.append(Inputs(*named, None, lesson.batch))
        else:
            secrets = array_rewards.secrets_of([task.train[i] for i in indices], tokenizer)
            lessons.append(None)
            given.append(Inputs(*named, np.asarray(secrets, np.int32), None))
    return _stack(given), lessons


def _write(
    shares: Sequence[Sequence[Run]],
    steps: range,
    given: Sequence[Sequence[tuple[Inputs, list[Lesson | None]]]],
    outputs: Sequence[Any],
    *,
    seconds: float,
) -> None:
    """Logs K steps of all lanes; each device's outputs are [N, K, …]."""
    for share, of_share, returned in zip(shares, given, outputs, strict=True):
        for i, (lane, (inputs, lessons)) in enumerate(zip(share, of_share, strict=True)):
            for k, step in enumerate(steps):
                at = jax.tree.map(lambda x, i=i, k=k: x[i, k], returned)
                _record(lane, step, _lane(inputs, k), lessons[k], *at, seconds=seconds)


def _record(
    lane: Run,
    step: int,
    given: Inputs,
    lesson: Lesson | None,
    turn: Turn | None,
    rewards: np.ndarray,
    metrics: dict[str, np.ndarray],
    *,
    seconds: float,
) -> None:
    """Logs one step of one lane, once its Python rewards have paid what the program was trained on."""
    if lesson is None:
        assert turn is not None
        lesson = _played(lane, step, given, turn, rewards)
        assert lesson.played is not None
        lane.check_contract(metrics["logprob_gaps"], lesson.played, step)
        lesson = lesson.with_advantages(metrics["advantages"])
    scalars = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    lane.record(step, lesson, scalars, seconds=seconds)


def _played(lane: Run, step: int, given: Inputs, turn: Turn, rewards: np.ndarray) -> Lesson:
    """The lesson that a lane's step was, from the arrays that its program returned."""
    config = lane.experiment
    indices, _ = schedule(config.seed, step, config.prompts_per_step, len(config.task.train))
    examples = [config.task.train[i] for i in indices]
    played = single_turn(examples, given.prompt_ids, given.prompts, given.lengths, turn, lane.actor.tokenizer)
    scores = lane.classroom().score(played, step)
    paid, kept = reward_arrays(scores, rewards.shape)
    if not np.allclose(paid, rewards, rtol=0, atol=1e-6):
        p, g = np.argwhere(~np.isclose(paid, rewards, rtol=0, atol=1e-6))[0]
        raise RunError(
            f"step {step}: {played.episodes[p][g].turns[0]!r} was trained on with a reward of {rewards[p, g]:g}, but "
            f"the experiment's rewards pay {paid[p, g]:g}: their JAX form is wrong."
        )
    return on_policy.lesson_of([Round(played, scores, paid, kept)], config)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _lane(tree: Any, index: int) -> Any:
    """The entry `index` of the leading axis, of lanes or of steps."""
    return jax.tree.map(lambda x: x[index], tree)
