"""The loop that ties a step together, for every method: make a batch, update on it, log, save.

A step depends on the experiment, the step's number and the state alone: its prompts and its sampling noise follow from
(seed, step). So a run that is resumed at step 400 does what the uninterrupted run did.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms import Batch, Setup, StepContext, TrainBatch, algorithm_of
from grpo_jax.algorithms.forward import HEAD, new_head
from grpo_jax.algorithms.grpo import make_reference_kl
from grpo_jax.algorithms.minibatches import lay_out, minibatch, shared_out
from grpo_jax.errors import RunError
from grpo_jax.evaluation import Evaluation
from grpo_jax.experiment import Experiment, variant_of
from grpo_jax.guards import Alarm, Guard
from grpo_jax.memory import Plan, out_of_memory_explained, require_memory, require_memory_for_scratch
from grpo_jax.policy import Policy
from grpo_jax.rollout import Actor, Generator, Rollout, encode_prompts, make_actor
from grpo_jax.runs import checkpoints, rollback
from grpo_jax.runs.log import RunLog, display_of
from grpo_jax.runs.restore import OPTIONAL_LEAVES, checkpoint, source_policy
from grpo_jax.runs.result import Result, summarize
from grpo_jax.runs.signals import interruption, stop_between_steps, terminable
from grpo_jax.sharding import Array
from grpo_jax.update import State, UpdateOutput, UpdateWatch, make_optimizer, make_update, metrics_of, require_logprobs

MakeGenerator = Callable[[Actor], Generator]
OWN_SAMPLER: MakeGenerator = lambda actor: actor  # noqa: E731


def train(
    experiment: Experiment,
    run_dir: str | Path,
    *,
    source: Path | None = None,
    overrides: Iterable[str] = (),
    resume: bool = False,
    quiet: bool = False,
    make_generator: MakeGenerator = OWN_SAMPLER,
) -> Result:
    """Runs an experiment: its warm start, the training itself, and its control, each with a run directory.

    Args:
      run_dir: where everything is written; with `resume`, the run that is continued.
      source, overrides: the experiment's file and the assignments that changed it, for the record.
      make_generator: what samples completions, from the policy as it is: by default the policy itself.

    Raises:
      UserError: for what the config or the task gets wrong. RunError: when the run fails (a reward, a full disk, a
        broken log-probability contract). KeyboardInterrupt: on Ctrl-C, after the step under way has been saved
        (`Terminated`, one of these, on SIGTERM).
    """
    display = display_of(experiment, quiet=quiet)
    log = RunLog(run_dir, experiment, source=source, overrides=overrides, resume=resume, display=display)
    return run(experiment, log, make_generator)


def run(experiment: Experiment, log: RunLog, make_generator: MakeGenerator = OWN_SAMPLER) -> Result:
    """The same with a log of the caller's own, which says where it is written, who is told, and whether it goes on."""
    began = time.monotonic()
    run_dir, resume, quiet = log.run_dir, log.resume, log.display.quiet
    with terminable(), log, out_of_memory_explained() as plans:
        start = starting_policy(experiment, log, resume=resume)
        trainer = Trainer(experiment, start, log, make_generator)
        plans.append(trainer.plan)
        before, group_before = trainer.evaluate(0), trainer.sample_group()
        done = trainer.fit(resume=resume)
        # A callback that stops the run at an evaluation has it evaluated already.
        stopped_at, last = trainer.last_evaluation
        after = last if log.stop is not None and stopped_at == done else trainer.evaluate(done)
        group_after = trainer.sample_group()
        control: dict[str, Evaluation] = {}
        if experiment.control is not None:
            variant, control_dir = variant_of(experiment, experiment.control), run_dir / "control"
            display = display_of(variant, title="control", quiet=quiet)
            with RunLog(control_dir, variant, resume=_has_begun(control_dir), display=display) as control_log:
                other = Trainer(variant, start, control_log, make_generator)
                if log.stop is not None:  # as many steps as the run itself made
                    other.last_step = min(done, variant.num_steps)
                control = other.evaluate(other.fit(resume=True))
        seconds = time.monotonic() - began
        result = Result(run_dir, trainer.policy(), before, after, control, group_before, group_after, seconds, log.stop)
        log.summary(summarize(result, experiment), result)
    return result


def starting_policy(experiment: Experiment, log: RunLog, *, resume: bool = False) -> Policy:
    """The policy that the training begins with: the config's source, trained by the warm start where there is one."""
    if experiment.warm_start is None:
        if experiment.policy.source != "scratch":
            log.note(f"loading {experiment.policy.source}")
        require_memory_for_scratch(experiment)
        return source_policy(experiment)
    variant, warm_dir = variant_of(experiment, experiment.warm_start), log.run_dir / "warm_start"
    resume = resume and _has_begun(warm_dir)
    display = display_of(variant, title="warm start", quiet=log.display.quiet)
    with RunLog(warm_dir, variant, resume=resume, display=display) as warm_log:
        trainer = Trainer(variant, starting_policy(variant, warm_log, resume=resume), warm_log)
        trainer.fit(resume=resume)
    if warm_log.stop is not None:
        raise RunError(f"the warm start was stopped: {warm_log.stop.reason}")
    return trainer.policy()


def _has_begun(run_dir: Path) -> bool:
    """Whether anything of a run is there: one that was killed at its very start has no run.json yet."""
    return run_dir.is_dir() and any(run_dir.iterdir())


class Trainer:
    """A run under way: the state on the devices, and the functions that move it.

    Attributes:
      state: the trained parameters, the optimizer's state and the count of skipped updates, placed.
      reference: the trained parameters of the reference policy; None where the method needs none.
      tokens_seen, tokens_sampled: how many tokens the run has read and written, and how many of them it sampled.
      watch: what has been seen of updates that were not made.
      plan: what its memory follows from.
      guard: what has been seen of spikes and of collapses.
      last_step: after how many steps training ends at the latest.
      last_evaluation: after how many steps the policy was evaluated last, and what it scored on each split.
    """

    def __init__(
        self,
        experiment: Experiment,
        start: Policy,
        log: RunLog,
        make_generator: MakeGenerator = OWN_SAMPLER,
    ) -> None:
        self.experiment, self.start, self.log, self.make_generator = experiment, start, log, make_generator
        config, tokenizer = experiment, start.require_tokenizer()
        self.algorithm = algorithm_of(config)
        self.replicas = shared_out(config)
        self.prompts = encode_prompts(config.task, tokenizer, start.config.max_positions, config.sampling.max_tokens)
        longest, samples = max(map(len, self.prompts.ids["train"])), make_generator is OWN_SAMPLER
        self.plan = Plan(config, start.config, self.replicas.count, longest, samples)
        for warning in require_memory(self.plan):
            log.note(warning)
        self._actor = make_actor(start, self.replicas)
        trainable = self._actor.trainable
        if self.algorithm.has_head:
            trainable = {**trainable, **self.replicas.replicate(new_head(start.config.hidden_size))}
        self.optimizer, self.schedule = make_optimizer(config.optimizer, config.num_steps * config.updates_per_step)
        self.state = State(
            trainable,
            # Not compiled: every new optimizer would be compiled for a second to make zeros.
            self.replicas.replicate(self.optimizer.init(self.replicas.first(trainable))),
            self.replicas.replicate(jnp.int32(0)),
        )
        needs_reference = self.algorithm.needs_reference(config)
        # A copy, since updates overwrite the state's own arrays.
        self.reference = jax.tree.map(jnp.copy, trainable) if needs_reference else None
        self.tokens_seen = self.tokens_sampled = 0
        self.watch = UpdateWatch(config.optimizer.max_skipped_updates)
        self.guard = Guard(config)
        self.last_step = config.num_steps
        self.last_evaluation: tuple[int, dict[str, Evaluation]] = (-1, {})

    @property
    def actor(self) -> Actor:
        """The policy as it is now. The next update overwrites its parameters."""
        return self._actor._replace(trainable=self.state.trainable)

    @property
    def setup(self) -> Setup:
        """What the objective and the update are built from."""
        shared = self.prompts.shared_prefix_length
        return Setup(self._actor.model, self.experiment, shared, self.replicas.axis_name)

    @cached_property
    def update(self) -> Callable[..., tuple[State, UpdateOutput]]:
        """The compiled update of a placed batch."""
        return self.replicas.compile(make_update(self.setup, self.optimizer), donate=(0,))

    @cached_property
    def before_updates(self) -> Callable[..., Any] | None:
        """What is found once before a batch's updates, compiled; None for nothing."""
        function = self.algorithm.make_objective(self.setup).before_updates
        return None if function is None else self.replicas.compile(function)

    @cached_property
    def _take_minibatch(self) -> Callable[..., Batch]:
        count = self.experiment.num_minibatches
        return self.replicas.compile(lambda batch, index: minibatch(batch, index, count))

    def minibatches(self, batch: Batch) -> list[Batch]:
        """The mini-batches of a placed batch, cut once for all passes over it."""
        count = self.experiment.num_minibatches
        if count == 1:
            return [batch]
        return [self._take_minibatch(batch, self.replicas.broadcast(np.int32(index))) for index in range(count)]

    @cached_property
    def _reference_kl(self) -> Callable[..., Any]:
        return self.replicas.compile(make_reference_kl(self.setup))

    def reference_kl(self, batch: Batch) -> np.ndarray:
        """log p - log p_reference [P, G, T] of a batch's tokens, p being the policy as it is now."""
        layout = lay_out(self.experiment, batch, 0, self.replicas)
        return layout.gather(
            self._reference_kl(self.state.trainable, self.reference, self._actor.frozen, layout.split(batch))
        )

    @cached_property
    def mix_reference(self) -> Callable[..., Any]:
        """(reference, trainable) -> the reference, moved towards the policy (TR-DPO, 2404.09656)."""
        alpha = self.experiment.loss_config.ref_model_mixup_alpha
        return self.replicas.compile(lambda old, new: jax.tree.map(lambda r, p: (1 - alpha) * r + alpha * p, old, new))

    def fit(self, *, resume: bool) -> int:
        """Trains from the newest checkpoint (or from the start) to the last step; returns how many there were."""
        config, directory = self.experiment, self.log.run_dir / "checkpoints"
        done = 0
        if resume and checkpoints.latest_step(directory) is not None:
            done = self.load_checkpoint(directory)
            self.guard.replay(self.log.require_rows(done))
        elif rollback.rolls_back(config):
            self.save(0)
        if not self.is_over(done):
            rows, rounds = f"{config.prompts_per_step} prompts × {config.group_size}", config.dynamic_sampling_rounds
            end = f"to {config.num_steps}" if config.token_budget is None else f"until {config.token_budget:,} tokens"
            most = (rounds + 1) * config.prompts_per_step * config.group_size
            up_to = f" (up to {most:,} completions with dynamic sampling)" if rounds else ""
            self.log.note(f"training: steps {done + 1} {end}, {rows} completions each{up_to}; the first compiles")
        with stop_between_steps() as stop:
            while not self.is_over(done):
                self.step(done)
                done += 1
                over = self.is_over(done)
                if not over and config.evaluation.every and done % config.evaluation.every == 0:
                    self.evaluate(done)
                    over = self.is_over(done)  # a callback may stop the run at an evaluation
                stopping = stop()  # asked once: what arrives after it waits for the next step
                if done % config.checkpoint_every == 0 or over or stopping:
                    self.save(done)
                if stopping:
                    raise interruption(stop.number)
        if done == 0:
            self.save(0)
        return done

    def is_over(self, done: int) -> bool:
        """Whether training ends after `done` steps."""
        budget = self.experiment.token_budget
        used_up = budget is not None and self.tokens_sampled >= budget
        return done >= self.last_step or used_up or self.log.stop is not None

    def step(self, step: int) -> None:
        """Makes a step's batch, updates on it and logs it."""
        began, config, replicas = time.monotonic(), self.experiment, self.replicas
        train_batch = self.algorithm.make_batch(self.context(), step)
        layout = lay_out(config, train_batch.batch, step, replicas)
        batch, found = layout.split(train_batch.batch), {}
        frozen, reference = self._actor.frozen, self.reference
        spike_limit = self.guard.spike_limit
        limit = () if spike_limit is None else (replicas.broadcast(np.float32(spike_limit)),)
        if self.before_updates is not None:
            batch, found = self.before_updates(self.state.trainable, frozen, reference, batch)
            if batch.advantages is not None and train_batch.batch.advantages is None:
                train_batch = train_batch.with_advantages(layout.gather(batch.advantages))
        outputs: list[UpdateOutput] = []
        for piece in self.minibatches(batch) * config.num_iterations:
            first = replicas.broadcast(np.bool_(not outputs))
            self.state, output = self.update(self.state, frozen, reference, piece, first, *limit)
            if not outputs and output.logprob_gaps is not None:
                gaps = layout.gather_first(output.logprob_gaps)
                self.check_logprobs(gaps, train_batch.rollout, step)
            outputs.append(output)
        of_updates = [replicas.fetch(output.metrics) for output in outputs]
        metrics = metrics_of(of_updates, config.num_minibatches)
        # These come after an update's own gap, which is 0 where log-probabilities were recomputed.
        metrics |= {name: float(value) for name, value in replicas.fetch(found).items()}
        if metrics.get("spiked_updates"):
            metrics["spike_limit"] = float(np.float32(spike_limit))
            if rollback.rolls_back(config):
                metrics["rolled_back"] = step + 1 - self.roll_back(step)
        self.sync_reference(step + 1)
        self.record(step, train_batch, metrics, seconds=time.monotonic() - began)
        for note in self.watch.see(step, of_updates):
            self.log.warn(Alarm(step, "update", note))

    def record(self, step: int, train_batch: TrainBatch, metrics: dict[str, float], *, seconds: float) -> None:
        """Logs a step: its batch, with the advantages that the update found, and its update's metrics."""
        self.tokens_seen += train_batch.tokens
        self.tokens_sampled += train_batch.new_tokens
        metrics = {
            **train_batch.metrics,
            **metrics,
            "learning_rate": float(self.schedule((step + 1) * self.experiment.updates_per_step - 1)),
            "num_tokens": self.tokens_seen,
            "num_sampled_tokens": self.tokens_sampled,
            "step_time": seconds,
            "tokens_per_second": train_batch.new_tokens / seconds,
        }
        self.log.step(step, metrics, train_batch.rows, train_batch.histograms)
        for alarm in self.guard.see(step, metrics):
            self.log.warn(alarm)

    def context(self) -> StepContext:
        """What batches are made from now."""
        if self.reference is None:
            return StepContext(self.experiment, self.prompts, self.make_generator(self.actor))
        start = self.make_generator(self._actor._replace(trainable=self.reference))
        generator = self.make_generator(self.actor)
        return StepContext(self.experiment, self.prompts, generator, start, self.reference_kl)

    def sync_reference(self, done: int) -> None:
        """Moves the reference towards the policy after every `ref_model_sync_steps` steps."""
        config = self.experiment.loss_config
        if config.sync_ref_model and done % config.ref_model_sync_steps == 0:
            self.reference = self.mix_reference(self.reference, self.state.trainable)

    def save(self, step: int) -> None:
        """Saves everything that step `step` depends on."""
        directory = self.log.run_dir / "checkpoints"
        keep = rollback.num_kept(directory, self.experiment, step)
        checkpoints.save(directory, step, self._checkpoint(), keep=keep)

    def roll_back(self, step: int) -> int:
        """Takes policy, optimizer and reference from the checkpoint before a spike in `step`; returns its step."""
        done, saved = rollback.restore(self.log.run_dir / "checkpoints", self._checkpoint(), self.experiment, step)
        saved = self.replicas.replicate(saved)
        self.state = self.state._replace(trainable=saved["trainable"], optimizer=saved["optimizer"])
        self.reference = self.reference if saved["reference"] is None else saved["reference"]
        return done

    def load_checkpoint(self, directory: Path) -> int:
        """Continues from the newest checkpoint, and returns its step."""
        done, saved = checkpoints.restore(directory, self._checkpoint(), optional_leaves=OPTIONAL_LEAVES)
        self.tokens_seen, self.tokens_sampled = saved.pop("tokens_seen"), saved.pop("tokens_sampled")
        saved = self.replicas.replicate(jax.tree.map(jnp.asarray, saved))
        reference = saved.pop("reference")
        self.reference = self.reference if reference is None else reference
        self.state = State(**saved)
        self.watch.skipped = int(self.replicas.fetch(self.state.skipped))
        return done

    def _checkpoint(self) -> dict[str, Any]:
        """What a checkpoint holds now. A reference that is never synced is where training began, and not kept."""
        reference = self.reference if self.experiment.loss_config.sync_ref_model else None
        state, reference = self.replicas.first((self.state, reference))
        return checkpoint(state, reference, self.tokens_seen, self.tokens_sampled)

    def evaluate(self, step: int) -> dict[str, Evaluation]:
        """Evaluates the policy as it is now on every split."""
        config, context = self.experiment, self.context()
        evaluations: dict[str, Evaluation] = {}
        for split in config.evaluation.splits:
            num_prompts = min(config.evaluation.num_prompts, len(getattr(config.task, split)))
            self.log.note(f"evaluating {num_prompts} {split.replace('_', '-')} prompts")
            evaluations[split] = self.algorithm.evaluate(context, split)
            self.log.evaluation(step, evaluations[split])
        self.last_evaluation = step, evaluations
        return evaluations

    def sample_group(self) -> list[dict[str, Any]]:
        """One group of a held-out prompt with its rewards and advantages; none where the method has no groups."""
        return self.algorithm.sample_group(self.context())

    def policy(self) -> Policy:
        """The policy as it is now."""
        trainable = {path: x for path, x in self.state.trainable.items() if path not in HEAD}
        params = self.replicas.first(self._actor.model.params(trainable, self._actor.frozen))
        return replace(self.start, params=params)

    def check_logprobs(self, gaps: Array, rollout: Rollout | None, step: int) -> None:
        """Raises `RunError` naming the first token whose log-probability the update did not find again."""
        assert rollout is not None, "a batch that the policy sampled has its rollout"
        bound = self.experiment.sampling.logprob_bound(self._actor.model.dtype)
        require_logprobs(gaps, rollout, self._actor.tokenizer, bound, step)
