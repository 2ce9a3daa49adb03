"""The loop that ties a step together, for every method: make a lesson, update, log, checkpoint.

A step depends on the experiment, the step's number and the state alone: its prompts and its sampling noise follow from
(seed, step). So a run that is resumed at step 400 does what the uninterrupted run did.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import sharding as devices
from grpo_jax.advantages import group_advantages
from grpo_jax.algorithms import LESSONS, Classroom, Lesson
from grpo_jax.algorithms.lesson import completion_rows, reward_arrays
from grpo_jax.algorithms.objectives import HEAD, Batch, has_head, make_appraise, needs_start, new_head
from grpo_jax.algorithms.pairs import evaluate_pairs
from grpo_jax.errors import RunError, UserError
from grpo_jax.evaluation import NOISE_STEP, Evaluation, evaluate_actor
from grpo_jax.experiment import Experiment, load_run, variant_of
from grpo_jax.policy import Policy, fresh_adapters, merge
from grpo_jax.policy import load as load_policy
from grpo_jax.policy.lora import split as split_params
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import Actor, Prompts, Rollout, encode_prompts, make_actor, model_of, score_rollout
from grpo_jax.runs import checkpoints
from grpo_jax.runs.log import RunLog
from grpo_jax.update import State, make_optimizer, make_rescore, make_update


@dataclass(frozen=True)
class Result:
    """What a run came to: evaluations by split, of the policy it began with, its own, and its control's.

    `group_before` and `group_after` are the completions of one held-out prompt with their rewards and advantages.
    """

    run_dir: Path
    policy: Policy
    before: dict[str, Evaluation]
    after: dict[str, Evaluation]
    control: dict[str, Evaluation]
    group_before: list[dict[str, Any]]
    group_after: list[dict[str, Any]]
    seconds: float


def train(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    source: Path | None = None,
    overrides: Iterable[str] = (),
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Runs an experiment: its warm start, the training itself, and its control, each with a run directory.

    Args:
      run_dir: where everything is written; with `resume`, the run that is gone on with.
      source, overrides: the experiment's file and the assignments that changed it, for the record.

    Raises:
      UserError: for what the config or the task gets wrong. RunError: when the run fails (a reward, a full disk, a
        broken log-probability contract). KeyboardInterrupt: on Ctrl-C, after the step under way has been saved.
    """
    began = time.monotonic()
    run_dir, overrides = Path(run_dir), list(overrides)
    with RunLog(run_dir, experiment, source=source, overrides=overrides, resume=resume, quiet=quiet) as log:
        start = starting_policy(experiment, log, resume=resume)
        run = Run(experiment, start, log)
        before, group_before = run.examine(0), run.show_group()
        after, group_after = run.examine(run.go(resume=resume)), run.show_group()
        control: dict[str, Evaluation] = {}
        if experiment.control is not None:
            variant = variant_of(experiment, experiment.control)
            with RunLog(
                run_dir / "control", variant, resume=_begun(run_dir / "control"), quiet=quiet, title="control"
            ) as sub:
                other = Run(variant, start, sub)
                control = other.examine(other.go(resume=True))
        result = Result(
            run_dir, run.policy(), before, after, control, group_before, group_after, time.monotonic() - began
        )
        log.summary(summarize(result, experiment))
    return result


def starting_policy(experiment: Experiment, log: RunLog, *, resume: bool = False) -> Policy:
    """The policy that the training begins with: the config's source, trained by the warm start where there is one."""
    if experiment.warm_start is None:
        if experiment.policy.source != "scratch":
            log.note(f"loading {experiment.policy.source}")
        return source_policy(experiment)
    variant, warm_dir = variant_of(experiment, experiment.warm_start), log.run_dir / "warm_start"
    resume = resume and _begun(warm_dir)
    with RunLog(warm_dir, variant, resume=resume, quiet=log.display.quiet, title="warm start") as warm_log:
        run = Run(variant, starting_policy(variant, warm_log, resume=resume), warm_log)
        run.go(resume=resume)
    return run.policy()


def restore(run_dir: str | Path) -> tuple[Experiment, Policy]:
    """The experiment of a run, a warm start or a control, and the policy at its newest checkpoint.

    Raises:
      UserError: if the directory holds no run, or a run without a checkpoint.
    """
    experiment, policy, _ = restore_with_head(run_dir)
    return experiment, policy


def restore_with_head(run_dir: str | Path) -> tuple[Experiment, Policy, Params]:
    """The same, and the parameters of the head that PPO or a reward model trained on the policy's trunk (or none)."""
    run_dir, experiment = Path(run_dir), load_run(run_dir)
    if checkpoints.latest_step(run_dir / "checkpoints") is None:
        raise UserError(f"the run {str(run_dir)!r} has no checkpoint yet, so there is no tuned policy in it.")
    policy = source_policy(experiment)
    trainable, frozen = split_params(policy.params, policy.lora)
    if has_head(experiment):
        trainable |= new_head(policy.config.hidden_size)
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.steps * experiment.num_iterations)
    reference = trainable if experiment.loss.sync_ref_model else None
    like = _checkpoint(State(trainable, jax.eval_shape(optimizer.init, trainable), jnp.int32(0)), reference)
    _, state = checkpoints.restore(run_dir / "checkpoints", like, later=LATER)
    trained = jax.tree.map(jnp.asarray, state["trainable"])
    head = {name: trained.pop(name) for name in HEAD if name in trained}
    return experiment, replace(policy, params=model_of(policy).params(trained, frozen)), head


def source_policy(experiment: Experiment) -> Policy:
    """The policy that `experiment.policy` names: that of another run, or what `grpo_jax.policy.load` knows."""
    config = experiment.policy
    if not (Path(config.source) / "run.json").is_file():
        return load_policy(
            config.source, dtype=config.dtype, seed=experiment.seed, lora=config.lora, scratch=config.scratch
        )
    _, other = restore(config.source)
    params = {path: x.astype(config.dtype) for path, x in merge(other.params, other.lora).items()}
    if config.lora is not None:
        params |= fresh_adapters(other.config, config.lora, experiment.seed)
    return replace(other, params=params, lora=config.lora)


def _begun(run_dir: Path) -> bool:
    """Whether anything of a run is there: one killed at its very start has left no run.json yet."""
    return run_dir.is_dir() and any(run_dir.iterdir())


class Run:
    """One training run under way: the state on the devices, and the functions that move it."""

    def __init__(self, experiment: Experiment, start: Policy, log: RunLog) -> None:
        self.experiment, self.start, self.log = experiment, start, log
        config, task = experiment, experiment.task
        self.num_devices = devices.count(config.prompts_per_step, config.devices, config.gradient_accumulation_steps)
        tokenizer, max_tokens = start.require_tokenizer(), config.sampling.max_tokens
        self.prompts: Prompts = encode_prompts(task, tokenizer, start.config.max_positions, max_tokens)
        actor = make_actor(start, self.num_devices)
        if has_head(config):
            head = devices.replicate(new_head(start.config.hidden_size), self.num_devices)
            actor = actor._replace(trainable={**actor.trainable, **head})
        self.actor: Actor = actor
        optimizer, self.schedule = make_optimizer(config.optimizer, config.steps * config.num_iterations)
        self.state = State(
            actor.trainable,
            # Not under pmap: every new optimizer would be compiled for a second to make zeros.
            devices.replicate(optimizer.init(devices.unreplicate(actor.trainable)), self.num_devices),
            devices.replicate(jnp.int32(0), self.num_devices),
        )
        self.reference = jax.tree.map(jnp.copy, actor.trainable) if needs_start(config) else None
        options = dict(common=self.prompts.common, axis_name=devices.AXIS)
        update = make_update(actor.model, config, optimizer, **options)
        self.update = devices.parallel(update, self.num_devices, in_axes=(0, 0, 0, 0, None), donate=(0,))
        self.rescore = devices.parallel(make_rescore(actor.model, config, **options), self.num_devices)
        self.appraise = devices.parallel(make_appraise(actor.model, config, **options), self.num_devices)
        self.tokens_seen = self.tokens_sampled = 0

    def go(self, *, resume: bool) -> int:
        """Trains from the newest checkpoint (or from the start) to the last step; returns how many there were."""
        config, directory = self.experiment, self.log.run_dir / "checkpoints"
        done = 0
        if resume and checkpoints.latest_step(directory) is not None:
            done, saved = checkpoints.restore(directory, self._saved(), later=LATER)
            self.tokens_seen, self.tokens_sampled = saved.pop("tokens_seen"), saved.pop("tokens_sampled")
            saved = devices.replicate(jax.tree.map(jnp.asarray, saved), self.num_devices)
            reference = saved.pop("reference")
            self.reference = self.reference if reference is None else reference
            self.state = State(**saved)
        if not self.is_over(done):
            rows = f"{config.prompts_per_step} prompts × {config.group_size}"
            end = f"to {config.steps}" if config.token_budget is None else f"until {config.token_budget:,} tokens"
            self.log.note(f"training: steps {done + 1} {end}, {rows} completions each; the first compiles")
        with _stop_between_steps() as stop:
            while not self.is_over(done):
                self.step(done)
                done += 1
                over = self.is_over(done)
                if not over and config.evaluation.every and done % config.evaluation.every == 0:
                    self.examine(done)
                stopping = stop()  # asked once: what arrives after it waits for the next step
                if done % config.checkpoint_every == 0 or over or stopping:
                    self.save(done)
                if stopping:
                    raise KeyboardInterrupt
        if config.steps == 0:
            self.save(0)
        return done

    def is_over(self, done: int) -> bool:
        """Whether training ends after `done` steps."""
        budget = self.experiment.token_budget
        return done >= self.experiment.steps or (budget is not None and self.tokens_sampled >= budget)

    def step(self, step: int) -> None:
        """Makes a step's lesson, updates on it and logs it."""
        began = time.monotonic()
        config = self.experiment
        lesson = LESSONS[config.method](self.classroom(), step)
        batch, prepared = self._prepare(devices.shard(lesson.batch, self.num_devices))
        metrics: dict[str, Any] = {}
        for iteration in range(config.num_iterations):
            self.state, updated = self.update(
                self.state, self.actor.frozen, self.reference, batch, np.bool_(iteration == 0)
            )
            updated = jax.device_get(updated)
            gaps, advantages = updated.pop("logprob_gaps", None), updated.pop("advantages", None)
            if iteration == 0 and gaps is not None:
                self.check_contract(gaps, lesson.played, step)
                lesson = lesson.with_advantages(advantages)
            # The first iteration measures the sampler's gap; the others, how far the policy has moved since.
            metrics = {**updated, **{k: v for k, v in metrics.items() if k.startswith("sampling/")}}
        metrics |= jax.device_get(prepared)  # after an update's own gap, which is nothing once rescored
        self._sync_reference(step + 1)
        metrics = {name: float(value[0]) for name, value in metrics.items()}
        self.record(step, lesson, metrics, seconds=time.monotonic() - began)

    def record(self, step: int, lesson: Lesson, metrics: dict[str, float], *, seconds: float) -> None:
        """Logs a step: its lesson, with the advantages that the update found, and its update's metrics."""
        self.tokens_seen += lesson.tokens
        self.tokens_sampled += lesson.new_tokens
        metrics = {
            **lesson.metrics,
            **metrics,
            "learning_rate": float(self.schedule((step + 1) * self.experiment.num_iterations - 1)),
            "num_tokens": self.tokens_seen,
            "num_sampled_tokens": self.tokens_sampled,
            "step_time": seconds,
            "tokens_per_second": lesson.new_tokens / seconds,
        }
        self.log.step(step, metrics, lesson.rows, lesson.histograms)

    def _prepare(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """What is found once before a batch's updates: weights for another sampler, or the critic's advantages."""
        trainable, frozen = self.state.trainable, self.actor.frozen
        if self.experiment.loss.importance_sampling_mode is not None:
            return self.rescore(trainable, frozen, batch)
        if self.experiment.method == "ppo":
            return self.appraise(trainable, frozen, self.reference, batch)
        return batch, {}

    def classroom(self) -> Classroom:
        """What lessons are made from now."""
        actor = self.actor._replace(trainable=self.state.trainable)
        return Classroom(self.experiment, self.prompts, actor, self.reference)

    def _sync_reference(self, done: int) -> None:
        """Moves the reference towards the policy after every `ref_model_sync_steps` steps."""
        config = self.experiment.loss
        if config.sync_ref_model and done % config.ref_model_sync_steps == 0:
            alpha = config.ref_model_mixup_alpha
            mix = devices.parallel(
                lambda old, new: jax.tree.map(lambda r, p: (1 - alpha) * r + alpha * p, old, new), self.num_devices
            )
            self.reference = mix(self.reference, self.state.trainable)

    def save(self, step: int) -> None:
        """Saves everything that step `step` depends on."""
        checkpoints.save(self.log.run_dir / "checkpoints", step, self._saved())

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint holds now. A reference that is never synced is where training began, and not kept."""
        reference = self.reference if self.experiment.loss.sync_ref_model else None
        state, reference = devices.unreplicate((self.state, reference))
        return _checkpoint(state, reference, self.tokens_seen, self.tokens_sampled)

    def examine(self, step: int) -> dict[str, Evaluation]:
        """Evaluates the policy as it is now on every split."""
        config, room = self.experiment, self.classroom()
        evaluations = {}
        for split in config.evaluation.splits:
            num_prompts = min(config.evaluation.num_prompts, len(getattr(config.task, split)))
            self.log.note(f"evaluating {num_prompts} {split.replace('_', '-')} prompts")
            evaluations[split] = (
                evaluate_pairs(room, split)
                if config.method == "reward_model"
                else evaluate_actor(room.actor, self.prompts, config, split)
            )
            self.log.evaluation(step, evaluations[split])
        return evaluations

    def show_group(self) -> list[dict[str, Any]]:
        """Plays one group of the first held-out prompt: its completions with their rewards and advantages."""
        config = self.experiment
        if config.method != "grpo":  # nothing else scores groups
            return []
        # As many prompts as a training step has, though one is shown, so that nothing is compiled for this alone.
        indices = [i % len(config.task.held_out) for i in range(config.prompts_per_step)]
        played = self.classroom().sample(NOISE_STEP, indices, range(len(indices)), from_start=False, split="held_out")
        scores = score_rollout(played, config)
        rewards, kept = reward_arrays(scores, played.mask.shape[:2])
        options = config.advantages
        advantages = group_advantages(
            rewards[:1], scale=options.scale, baseline=options.baseline, ddof=options.ddof, mask=kept[:1]
        )
        rows = completion_rows(played, scores)[: config.group_size]
        return [{**row, "advantage": float(a)} for row, a in zip(rows, np.asarray(advantages)[0], strict=True)]

    def policy(self) -> Policy:
        """The policy as it is now, off the devices' copies."""
        trainable = {path: x for path, x in self.state.trainable.items() if path not in HEAD}
        params = devices.unreplicate(self.actor.model.params(trainable, self.actor.frozen))
        return replace(self.start, params=params)

    def check_contract(self, gaps: np.ndarray, played: Rollout, step: int) -> None:
        """Raises `RunError` naming the first token whose log-probability the update did not find again."""
        gaps = gaps.reshape(played.mask.shape)
        bound = self.experiment.sampling.logprob_bound(self.actor.model.dtype)
        broken = np.argwhere(~(gaps <= bound))
        if len(broken):
            p, g, t = broken[0]
            token = self.actor.tokenizer.decode([int(played.tokens[p, g, t])])
            raise RunError(
                f"step {step}: token {t} ({token!r}) of sample {g} of prompt {played.prompt_ids[p]} was sampled with "
                f"log-probability {played.logprobs[p, g, t]:.4f}, which the update missed by {gaps[p, g, t]:.4f}, more "
                f"than sampling.max_logprob_difference = {bound:g}: the sampler and the trainer disagree about the "
                "policy, and the update was not made."
            )


LATER = ("tokens_sampled",)  # not in the checkpoints of the first versions


def _checkpoint(state: State, reference: Any | None, tokens_seen: int = 0, tokens_sampled: int = 0) -> dict[str, Any]:
    """Everything that a step depends on, as the pytree that is saved and restored."""
    tokens = {"tokens_seen": tokens_seen, "tokens_sampled": tokens_sampled}
    return {**state._asdict(), "reference": reference, **tokens}


def summarize(result: Result, experiment: Experiment) -> dict[str, Any]:
    """What summary.json says of a run."""

    def rows(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
        return {split: evaluation.to_dict() for split, evaluation in evaluations.items()}

    return {
        "before": rows(result.before),
        "after": rows(result.after),
        "control": rows(result.control),
        "references": dict(experiment.task.references),
        "seconds": result.seconds,
    }


@contextmanager
def _stop_between_steps() -> Iterator[Any]:
    """Turns the first Ctrl-C or SIGTERM into a request that is granted between two steps; the next one acts at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
