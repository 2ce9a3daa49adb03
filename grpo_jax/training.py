"""The loop that ties a step together, for every method: play, score, update, log, checkpoint.

A step depends on the experiment, the step's number and the state alone: its prompts and its sampling noise follow from
(seed, step). So a run that is resumed at step 400 does what the uninterrupted run did.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import checkpoints, devices, dynamic_sampling
from grpo_jax.advantages import group_advantages
from grpo_jax.errors import RunError, UserError
from grpo_jax.evaluation import NOISE_STEP, Evaluation, evaluate_actor
from grpo_jax.experiment import Experiment, load_run, variant_of
from grpo_jax.logs import RunLog
from grpo_jax.policy import Policy
from grpo_jax.policy import load as load_policy
from grpo_jax.policy.trainable import split as split_params
from grpo_jax.rewards.scoring import Scores
from grpo_jax.rollout import (
    Actor,
    Prompts,
    Rollout,
    completion,
    demonstrations,
    encode_prompts,
    make_actor,
    model_of,
    rollout,
    score_rollout,
)
from grpo_jax.update import Batch, State, make_optimizer, make_rescore, make_update


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
        run.go(resume=resume)
        after, group_after = run.examine(experiment.steps), run.show_group()
        control: dict[str, Evaluation] = {}
        if experiment.control is not None:
            variant = variant_of(experiment, experiment.control)
            with RunLog(
                run_dir / "control", variant, resume=_begun(run_dir / "control"), quiet=quiet, title="control"
            ) as sub:
                other = Run(variant, start, sub)
                other.go(resume=True)
                control = other.examine(variant.steps)
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
    run_dir, experiment = Path(run_dir), load_run(run_dir)
    if checkpoints.latest_step(run_dir / "checkpoints") is None:
        raise UserError(f"the run {str(run_dir)!r} has no checkpoint yet, so there is no tuned policy in it.")
    policy = source_policy(experiment)
    trainable, frozen = split_params(policy.params, policy.lora)
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.steps * experiment.num_iterations)
    reference = trainable if experiment.loss.sync_ref_model else None
    like = _checkpoint(State(trainable, jax.eval_shape(optimizer.init, trainable), jnp.int32(0)), 0, reference)
    _, state = checkpoints.restore(run_dir / "checkpoints", like)
    trained = jax.tree.map(jnp.asarray, state["trainable"])
    return experiment, replace(policy, params=model_of(policy).params(trained, frozen))


def source_policy(experiment: Experiment) -> Policy:
    """The policy that the experiment's source names, untrained."""
    config = experiment.policy
    return load_policy(
        config.source, dtype=config.dtype, seed=experiment.seed, lora=config.lora, scratch=config.scratch
    )


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
        self.actor: Actor = make_actor(start, self.num_devices)
        optimizer, self.schedule = make_optimizer(config.optimizer, config.steps * config.num_iterations)
        self.state = State(
            self.actor.trainable,
            # Not under pmap: every new optimizer would be compiled for a second to make zeros.
            devices.replicate(optimizer.init(devices.unreplicate(self.actor.trainable)), self.num_devices),
            devices.replicate(jnp.int32(0), self.num_devices),
        )
        self.reference = jax.tree.map(jnp.copy, self.actor.trainable) if config.loss.beta else None
        update = make_update(self.actor.model, config, optimizer, common=self.prompts.common, axis_name=devices.AXIS)
        self.update = devices.parallel(update, self.num_devices, in_axes=(0, 0, 0, 0, None), donate=(0,))
        rescore = make_rescore(self.actor.model, config, common=self.prompts.common, axis_name=devices.AXIS)
        self.rescore = devices.parallel(rescore, self.num_devices)
        self.tokens_seen = 0

    def go(self, *, resume: bool) -> None:
        """Trains from the newest checkpoint (or from the start) to the last step."""
        config, directory = self.experiment, self.log.run_dir / "checkpoints"
        first = 0
        if resume and checkpoints.latest_step(directory) is not None:
            first, saved = checkpoints.restore(directory, self._saved())
            self.tokens_seen = saved.pop("tokens_seen")
            saved = devices.replicate(jax.tree.map(jnp.asarray, saved), self.num_devices)
            reference = saved.pop("reference")
            self.reference = self.reference if reference is None else reference
            self.state = State(**saved)
        if first < config.steps:
            rows = f"{config.prompts_per_step} prompts × {config.group_size}"
            self.log.note(f"training: steps {first + 1} to {config.steps}, {rows} completions each; the first compiles")
        with _stop_between_steps() as stop:
            for step in range(first, config.steps):
                self.step(step)
                done = step + 1
                if done < config.steps and config.evaluation.every and done % config.evaluation.every == 0:
                    self.examine(done)
                stopping = stop()  # asked once: what arrives after it waits for the next step
                if done % config.checkpoint_every == 0 or done == config.steps or stopping:
                    self.save(done)
                if stopping:
                    raise KeyboardInterrupt
        if config.steps == 0:
            self.save(0)

    def save(self, step: int) -> None:
        """Saves everything that step `step` depends on."""
        checkpoints.save(self.log.run_dir / "checkpoints", step, self._saved())

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint holds now. A reference that is never synced is where training began, and not kept."""
        reference = self.reference if self.experiment.loss.sync_ref_model else None
        state, reference = devices.unreplicate((self.state, reference))
        return _checkpoint(state, self.tokens_seen, reference)

    def step(self, step: int) -> None:
        """Plays, scores, updates and logs one step."""
        began = time.monotonic()
        config = self.experiment
        rounds = self._play(step)
        chosen = dynamic_sampling.combine(rounds)
        played, rewards, kept = chosen.played, chosen.rewards, chosen.kept
        mask = played.mask
        if config.loss.mask_truncated_completions and config.method != "sft":
            mask = mask & played.ended[..., None]
        batch = devices.shard(
            Batch(played.prompts, played.lengths, played.tokens, played.valid, mask, played.logprobs, rewards, kept),
            self.num_devices,
        )
        rescored: dict[str, Any] = {}
        if config.loss.importance_sampling_mode is not None and config.method != "sft":
            batch, rescored = self.rescore(self.state.trainable, self.actor.frozen, batch)
        metrics: dict[str, Any] = {}
        advantages = np.zeros_like(rewards)
        for iteration in range(config.num_iterations):
            self.state, updated = self.update(
                self.state, self.actor.frozen, self.reference, batch, np.bool_(iteration == 0)
            )
            # The first iteration measures the sampler's gap; the others, how far the policy has moved since.
            metrics = {**jax.device_get(updated), **{k: v for k, v in metrics.items() if k.startswith("sampling/")}}
            if iteration == 0 and config.method != "sft":
                advantages = metrics.pop("advantages").reshape(rewards.shape)
                self.check_contract(metrics, played, step)
            metrics.pop("logprob_gaps"), metrics.pop("advantages", None)
        metrics |= jax.device_get(rescored)  # after an update's own gap, which is nothing once rescored
        metrics = {name: float(value[0]) for name, value in metrics.items() if np.ndim(value) == 1}
        self._sync_reference(step + 1)
        self.record(step, rounds, advantages, metrics, seconds=time.monotonic() - began)

    def record(
        self,
        step: int,
        rounds: list[dynamic_sampling.Round],
        advantages: np.ndarray,
        metrics: dict[str, float],
        *,
        seconds: float,
    ) -> None:
        """Logs a step: its rounds, the advantages [P, G] of the groups chosen, the metrics of its update."""
        config, task = self.experiment, self.experiment.task
        chosen = dynamic_sampling.combine(rounds)
        played, scores, rewards, kept = chosen.played, chosen.scores, chosen.rewards, chosen.kept
        new_tokens = int(played.mask.sum())
        for r in rounds:
            self.tokens_seen += int(r.played.lengths.sum()) * config.group_size + int(r.played.valid.sum())
        metrics = metrics | {
            "learning_rate": float(self.schedule((step + 1) * config.num_iterations - 1)),
            "num_tokens": self.tokens_seen,
            "step_time": seconds,
            "tokens_per_second": new_tokens / seconds,
        }
        if config.method == "sft":
            self.log.step(step, metrics)
            return
        if config.dynamic_sampling_rounds:
            metrics["dynamic_sampling/rounds"] = len(rounds) - 1
            metrics["dynamic_sampling/groups_with_signal"] = int(chosen.has_signal().sum())
        # How good the policy is, the first round says: the groups that are trained on were chosen by their rewards.
        first = rounds[0]
        metrics = {
            **reward_metrics(first.scores, first.rewards, first.kept),
            **completion_metrics(first.played),
            "success": float(np.mean(task.success(**first.played.reward_arguments()))),
            **metrics,
        }
        self.log.step(
            step,
            metrics,
            completion_rows(played, scores, advantages),
            {"rewards": rewards[kept], "advantages": advantages[kept], "completion_lengths": played.mask.sum(-1)},
        )

    def _play(self, step: int) -> list[dynamic_sampling.Round]:
        """Plays and scores a step's prompts, and further rounds while some groups have no signal and rounds are left.

        A further round's prompts are those to which the schedule would come after the last step, so that the first
        round of every step has the same prompts with and without dynamic sampling.
        """
        config, task = self.experiment, self.experiment.task
        size, sft = config.prompts_per_step, config.method == "sft"
        further = [] if sft else [step + r * config.steps for r in range(1, config.dynamic_sampling_rounds + 1)]
        indices, prompt_ids = schedule(config.seed, step, size, len(task.train), further=further)
        samples = range(config.group_size)
        actor = self.actor._replace(trainable=self.state.trainable)
        rounds: list[dynamic_sampling.Round] = []
        for start in range(0, len(indices), size):
            of_round = indices[start : start + size], prompt_ids[start : start + size]
            if sft:
                played = demonstrations(
                    task, self.prompts, "train", *of_round, samples, actor.tokenizer, seed=config.seed, step=step
                )
                scores = Scores([], {}, [], {})
            else:
                played = rollout(
                    actor, task, self.prompts, "train", *of_round, samples, config.sampling, seed=config.seed, step=step
                )
                scores = score_rollout(played, config)
                self.check_failures(scores, step)
            rounds.append(dynamic_sampling.Round(played, scores, *reward_arrays(scores, played.mask.shape[:2])))
            if sum(int(r.has_signal().sum()) for r in rounds) >= size:
                break
        return rounds

    def _sync_reference(self, done: int) -> None:
        """Moves the reference towards the policy after every `ref_model_sync_steps` steps."""
        config = self.experiment.loss
        if config.sync_ref_model and done % config.ref_model_sync_steps == 0:
            alpha = config.ref_model_mixup_alpha
            mix = devices.parallel(
                lambda old, new: jax.tree.map(lambda r, p: (1 - alpha) * r + alpha * p, old, new), self.num_devices
            )
            self.reference = mix(self.reference, self.state.trainable)

    def examine(self, step: int) -> dict[str, Evaluation]:
        """Evaluates the policy as it is now on every split."""
        config = self.experiment
        actor = self.actor._replace(trainable=self.state.trainable)
        evaluations = {}
        for split in config.evaluation.splits:
            num_prompts = min(config.evaluation.num_prompts, len(getattr(config.task, split)))
            self.log.note(f"evaluating {num_prompts} {split.replace('_', '-')} prompts")
            evaluations[split] = evaluate_actor(actor, self.prompts, config, split)
            self.log.evaluation(step, evaluations[split])
        return evaluations

    def show_group(self) -> list[dict[str, Any]]:
        """Plays one group of the first held-out prompt: its completions with their rewards and advantages."""
        config = self.experiment
        if config.method == "sft":
            return []
        actor = self.actor._replace(trainable=self.state.trainable)
        # As many prompts as a training step has, though one is shown, so that nothing is compiled for this alone.
        indices = [i % len(config.task.held_out) for i in range(config.prompts_per_step)]
        played = rollout(
            actor, config.task, self.prompts, "held_out", indices, range(len(indices)),
            range(config.group_size), config.sampling, seed=config.seed, step=NOISE_STEP,
        )  # fmt: skip
        scores = score_rollout(played, config)
        rewards, kept = reward_arrays(scores, played.mask.shape[:2])
        options = config.advantages
        advantages = group_advantages(
            rewards[:1], scale=options.scale, baseline=options.baseline, ddof=options.ddof, mask=kept[:1]
        )
        return completion_rows(played, scores, np.asarray(advantages))

    def policy(self) -> Policy:
        """The policy as it is now, off the devices' copies."""
        params = devices.unreplicate(self.actor.model.params(self.state.trainable, self.actor.frozen))
        return replace(self.start, params=params)

    def check_failures(self, scores: Scores, step: int) -> None:
        total, limit = len(scores.total), self.experiment.reward.max_failure_rate
        for name, failed in scores.failures.items():
            if failed > limit * total:
                raise RunError(
                    f"reward {name!r} failed on {failed} of the {total} completions of step {step}, above "
                    f"reward.max_failure_rate = {limit:g}."
                )

    def check_contract(self, metrics: dict[str, Any], played: Rollout, step: int) -> None:
        """Raises `RunError` naming the first token whose log-probability the update did not find again."""
        gaps = metrics["logprob_gaps"].reshape(played.mask.shape)
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


def _checkpoint(state: State, tokens_seen: int, reference: Any | None) -> dict[str, Any]:
    """Everything that a step depends on, as the pytree that is saved and restored."""
    return {**state._asdict(), "tokens_seen": tokens_seen, "reference": reference}


def schedule(
    seed: int, step: int, num_prompts: int, num_examples: int, *, further: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Which examples a step trains on, and the ids that name their noise; those of `further` steps are appended.

    Examples come in shuffled epochs, each a permutation named by (seed, epoch). An example that occurs again within
    the step gets another id, so that its completions differ.
    """
    indices = []
    for position in (s * num_prompts + i for s in (step, *further) for i in range(num_prompts)):
        epoch, place = divmod(position, num_examples)
        indices.append(int(_epoch(seed, epoch, num_examples)[place]))
    ids = [index + num_examples * indices[:i].count(index) for i, index in enumerate(indices)]
    return indices, ids


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def reward_metrics(scores: Scores, rewards: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Metrics of rewards [P, G] in TRL's names; what was dropped or does not apply counts nowhere."""
    masked = np.where(kept, rewards, np.nan)
    groups = [row[~np.isnan(row)] for row in masked]
    metrics = {
        "reward": _mean(masked),
        "reward_std": _mean(np.array([row.std() for row in groups if len(row)])),
        "frac_reward_zero_std": _mean(np.array([float(np.ptp(row) == 0) for row in groups if len(row)])),
        "frac_dropped": float(np.mean(~kept)),
    }
    for name, values in scores.by_name.items():
        known = np.array(values, float)
        known = known[~np.isnan(known)]
        metrics[f"rewards/{name}/mean"] = _mean(known)
        metrics[f"rewards/{name}/std"] = float(known.std()) if len(known) else float("nan")
    return metrics


def completion_metrics(played: Rollout) -> dict[str, float]:
    """Lengths of completions, and how alike those of a group are: the common failure is that they become one."""
    lengths = played.mask.sum(-1)
    texts = [["\n".join(e.turns) for e in group] for group in played.episodes]
    size = lengths.shape[1]
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(np.mean(~played.ended)),
        "completions/unique_fraction": float(np.mean([len(set(group)) / size for group in texts])),
        "completions/top_share": float(np.mean([max(map(group.count, group)) / size for group in texts])),
    }


def completion_rows(played: Rollout, scores: Scores, advantages: np.ndarray) -> list[dict[str, Any]]:
    """One JSON-able row per completion of the first len(advantages) prompts, for `completions.jsonl` and tables."""
    rows = []
    for p in range(len(advantages)):
        for g, episode in enumerate(played.episodes[p]):
            at = p * advantages.shape[1] + g
            rows.append(
                {
                    "prompt_id": int(played.prompt_ids[p]),
                    "sample": g,
                    "prompt": played.examples[p]["prompt"],
                    "completion": completion(played.examples[p], episode),
                    "rewards": {name: values[at] for name, values in scores.by_name.items()},
                    "reward": scores.total[at],
                    "advantage": float(advantages[p, g]),
                    "tokens": int(sum(episode.trained)),
                }
            )
    return rows


def reward_arrays(scores: Scores, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The combined rewards [P, G] float32, 0 where dropped, and which of them are kept [P, G] bool."""
    if not scores.total:  # demonstrations have none
        return np.zeros(shape, np.float32), np.ones(shape, bool)
    kept = np.array(scores.kept, bool).reshape(shape)
    return np.where(kept, np.array(scores.total, np.float32).reshape(shape), 0), kept


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


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
