"""The loop that ties a step together, for every method: make a batch, update on it, log, save.

A step depends on the experiment, the step's number and the state alone: its prompts and its sampling noise follow from
(seed, step). So a run that is resumed at step 400 does what the uninterrupted run did.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms import Batch, Setup, StepContext, TrainBatch, algorithm_of
from grpo_jax.algorithms.forward import HEAD, new_head
from grpo_jax.algorithms.grpo import make_reference_kl
from grpo_jax.algorithms.minibatches import lay_out, minibatch, shared_out
from grpo_jax.evaluation import Evaluation
from grpo_jax.experiment import Experiment
from grpo_jax.guards import Alarm, Guard
from grpo_jax.memory import Plan, require_memory
from grpo_jax.policy import Policy
from grpo_jax.rollout import Actor, Generator, Rollout, encode_prompts, make_actor
from grpo_jax.runs import checkpoints, retention, rollback
from grpo_jax.runs.files import is_evaluation, read_rows
from grpo_jax.runs.log import RunLog
from grpo_jax.runs.restore import OPTIONAL_LEAVES, checkpoint
from grpo_jax.runs.signals import interruption, stop_between_steps
from grpo_jax.sharding import Array
from grpo_jax.update import State, UpdateOutput, UpdateWatch, make_optimizer, make_update, metrics_of, require_logprobs

MakeGenerator = Callable[[Actor], Generator]
OWN_SAMPLER: MakeGenerator = lambda actor: actor  # noqa: E731


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
        self.experiment, self.log, self.make_generator = experiment, log, make_generator
        self.start = replace(start, params={})  # its parameters are on the devices from here on
        config, tokenizer = experiment, start.require_tokenizer()
        self.algorithm = algorithm_of(config)
        self.replicas = shared_out(config)
        self.prompts = encode_prompts(config.task, tokenizer, start.config.max_positions, config.sampling.max_tokens)
        longest, samples = max(map(len, self.prompts.ids["train"])), make_generator is OWN_SAMPLER
        self.plan = Plan(config, start.config, self.replicas.count, longest, samples)
        for warning in require_memory(self.plan):
            log.note(warning)
        actor = make_actor(start, self.replicas)
        self._actor, trainable = actor._replace(trainable={}), actor.trainable
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
        self._saver = checkpoints.Saver(log.run_dir / "checkpoints")

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
            logged = read_rows(self.log.run_dir / "metrics.jsonl")
            self.guard.replay(row for row in logged if not is_evaluation(row))
        elif rollback.rolls_back(config):
            self.save(0)
        self._scores()  # which finds a wrong `checkpoints.metric` before anything is trained
        if not self.is_over(done):
            rows, rounds = f"{config.prompts_per_step} prompts × {config.group_size}", config.dynamic_sampling_rounds
            end = f"to {config.num_steps}" if config.token_budget is None else f"until {config.token_budget:,} tokens"
            most = (rounds + 1) * config.prompts_per_step * config.group_size
            up_to = f" (up to {most:,} completions with dynamic sampling)" if rounds else ""
            self.log.note(f"training: steps {done + 1} {end}, {rows} completions each{up_to}; the first compiles")
        if self.log.lacks_evaluation and not self.is_over(done):
            self.evaluate(done)
        with self._saver, stop_between_steps() as stop:
            while not self.is_over(done):
                self.step(done)
                done += 1
                over = self.is_over(done)
                if not over and config.evaluation.every and done % config.evaluation.every == 0:
                    self.evaluate(done)
                    over = self.is_over(done)  # a callback may stop the run at an evaluation
                stopping = stop()  # asked once: what arrives after it waits for the next step
                if done % config.checkpoint_every == 0 or over or stopping or self._is_kept(done):
                    self.start_saving(done)
                if stopping:
                    self._saver.wait()  # that the checkpoint cannot be written is the greater news
                    raise interruption(stop.number)
            if done == 0:
                self.start_saving(0)
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
        for piece in chain.from_iterable(repeat(self.minibatches(batch), config.num_iterations)):
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
        self.start_saving(step)
        self._saver.wait()

    def start_saving(self, step: int) -> None:
        """Saves the same as it is now, while training may go on."""
        config, scores, needed = self.experiment.checkpoints, self._scores(), rollback.needed(self.experiment, step)
        state = self._checkpoint(self.replicas.fetch)
        self._saver.save(
            step,
            state,
            keep=lambda steps: retention.remaining(config, steps, scores) | needed,
            files=self.log.seal(),
        )

    def _is_kept(self, done: int) -> bool:
        """Whether the policy after `done` steps is one that `experiment.checkpoints` keeps for long."""
        scores = self._scores() if self.last_evaluation[0] == done else {}
        return retention.is_wanted(self.experiment.checkpoints, done, scores)

    def _scores(self) -> dict[int, float]:
        return retention.scores(self.experiment.checkpoints, self.log.evaluations)

    def roll_back(self, step: int) -> int:
        """Takes policy, optimizer and reference from the checkpoint before a spike in `step`; returns its step."""
        self._saver.wait()
        like, directory = self._checkpoint(self.replicas.shapes), self.log.run_dir / "checkpoints"
        done, saved = rollback.restore(directory, like, self.experiment, step, self.replicas.place)
        self.state = self.state._replace(trainable=saved["trainable"], optimizer=saved["optimizer"])
        self.reference = self.reference if saved["reference"] is None else saved["reference"]
        return done

    def load_checkpoint(self, directory: Path, step: int | None = None) -> int:
        """Continues from the checkpoint of `step`, by default the newest, and returns its step."""
        like = self._checkpoint(self.replicas.shapes)
        del self.state  # before it is replaced, lest there be two
        place = self.replicas.place
        done, saved = checkpoints.restore(directory, like, step=step, optional_leaves=OPTIONAL_LEAVES, place=place)
        self.tokens_seen, self.tokens_sampled = saved.pop("tokens_seen"), saved.pop("tokens_sampled")
        self.watch.in_a_row = saved.pop("skipped_in_a_row")
        reference = saved.pop("reference")
        self.reference = self.reference if reference is None else reference
        self.state = State(**saved)
        self.watch.skipped = int(self.replicas.fetch(self.state.skipped))
        return done

    def _checkpoint(self, one_copy: Callable[[Any], Any]) -> dict[str, Any]:
        """What a checkpoint holds now. A reference that is never synced is where training began, and not kept."""
        reference = self.reference if self.experiment.loss_config.sync_ref_model else None
        return checkpoint(
            one_copy(self.state),
            one_copy(reference),
            tokens_seen=self.tokens_seen,
            tokens_sampled=self.tokens_sampled,
            skipped_in_a_row=self.watch.in_a_row,
        )

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
