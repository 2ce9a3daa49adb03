"""The check of memory: what the compiled sampler and the compiled update need, against what a device has."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithms import Batch
from grpo_jax.doctor.check import Check, not_applicable
from grpo_jax.doctor.subject import PROMPTS, Subject
from grpo_jax.experiment import group_parts
from grpo_jax.policy.lora import Model, split
from grpo_jax.policy.transformer import Params
from grpo_jax.rollout import bucket, model_of, settings_of
from grpo_jax.sampler import DecodeState, Generation, Noise, Settings, generate
from grpo_jax.sharding import Array, Replicas, up_to
from grpo_jax.update import State, make_optimizer, make_update

NEARLY = 0.85  # the share of the memory from which on there is a warning


def memory_is_enough(subject: Subject) -> Check:
    """The sampler and the update of a whole step, compiled as training compiles them, fit into a device's memory.

    `memory_analysis` says what each program needs beside its arguments. What is resident all the time is added: the
    policy as it was loaded, the optimizer's state, and the reference. On a CPU all devices share the machine's memory.
    """
    available, whose = available_bytes()
    if available is None:
        return not_applicable("not checked: neither the device nor the system says how much memory there is.")
    replicas = up_to(subject.experiment.devices)
    if subject.experiment.group_parts(replicas.count) is None:
        return not_applicable("not checked: a step's batch cannot be shared by the devices, which train refuses.")
    is_shared = jax.default_backend() == "cpu"
    state, reference = _state(subject), _abstract(subject.reference)
    beside = sum(map(_size, (subject.policy.params, state.optimizer, reference)))
    update = _update_bytes(subject, replicas, state, reference)
    sampler = 0 if subject.algorithm.is_offline else _sampler_bytes(subject, replicas)
    copies = replicas.count if is_shared else 1
    # While the update runs, the optimizer's state and the reference are among its arguments.
    needed = copies * max(update + _size(subject.policy.params), sampler + beside)
    figures = {
        "update": update, "sampler": sampler, "policy_as_loaded": _size(subject.policy.params),
        "optimizer": _size(state.optimizer), "reference": _size(reference), "devices": replicas.count,
        "needed": needed, "available": available,
    }  # fmt: skip
    measured, bound = f"{needed / 1e9:.2f} GB", f"{available / 1e9:.1f} GB of {whose}"
    remedy = (
        "raise gradient_accumulation_steps, set gradient_checkpointing, lower prompts_per_step or sampling.max_tokens, "
        "or train adapters (policy.lora)."
    )
    if needed > available:
        sentence = f"a step needs {measured}, which is more than the {bound}: {remedy}"
        return Check("refuted", measured, bound, sentence, figures)
    if needed > NEARLY * available:
        sentence = f"a step needs {measured} of the {bound}, which leaves little for anything else: {remedy}"
        return Check("warning", measured, bound, sentence, figures)
    return Check("proved", measured, bound, figures=figures)


def available_bytes() -> tuple[int | None, str]:
    """How much memory a device has, or this process can have on a CPU, and whose it is; None if nobody says."""
    [device] = jnp.zeros(()).devices()
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]), "the device"
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, LookupError, ValueError):
        return None, ""
    limits = [limit for limit in map(_limit, _cgroup_files()) if limit is not None]
    # What this process holds is free again once it has ended.
    return min([free + own, *limits]), "the machine" if not limits or free + own < min(limits) else "the container"


def _cgroup_files() -> list[Path]:
    """Where the system may say how much memory this container may use, in both versions of cgroups."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    root, files = Path("/sys/fs/cgroup"), []
    for _, names, path in (group for group in groups if len(group) == 3):
        own = path.strip("/")
        if names == "":
            files += [root / own / "memory.max", root / "memory.max"]
        elif "memory" in names.split(","):
            files += [root / "memory" / own / "memory.limit_in_bytes", root / "memory" / "memory.limit_in_bytes"]
    return files


def _limit(path: Path) -> int | None:
    try:
        limit = int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None
    return limit if limit < 2**60 else None  # what version 1 says where there is none


def _state(subject: Subject) -> State:
    """The shapes of what an update replaces."""
    experiment = subject.experiment
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.num_steps * experiment.updates_per_step)
    trainable = _abstract(subject.trainable_of(subject.policy))
    return State(trainable, jax.eval_shape(optimizer.init, trainable), _shape((), jnp.int32))


def _update_bytes(subject: Subject, replicas: Replicas, state: State, reference: Params | None) -> int:
    """What the update of a mini-batch needs on one device, its arguments included."""
    experiment = subject.experiment
    optimizer, _ = make_optimizer(experiment.optimizer, experiment.num_steps * experiment.updates_per_step)
    update: Any = replicas.compile(make_update(subject.setup(experiment, replicas), optimizer), donate=(0,))
    frozen, first = _abstract(split(subject.policy.params, subject.policy.lora)[1]), _shape((), jnp.bool_)
    shapes = (state, frozen, reference, _batch(subject, replicas.count), first)
    return _peak(update.lower(*_placed(shapes, replicas)))


def _sampler_bytes(subject: Subject, replicas: Replicas) -> int:
    """What sampling the first turn of a step's batch needs on one device, the parameters included."""
    experiment, policy = subject.experiment, subject.policy
    settings = replace(
        settings_of(experiment.sampling, subject.tokenizer), shared_prefix_length=subject.prompts.shared_prefix_length
    )
    parts = group_parts(experiment.prompts_per_step, experiment.group_size, replicas.count) or 1
    rows, size = experiment.prompts_per_step * parts // replicas.count, experiment.group_size // parts
    noise = Noise(*(_shape(shape, jnp.int32) for shape in ((), (), (rows,), (rows, size))))
    prompts = (_shape((rows, _longest_prompts(subject)), jnp.int32), _shape((rows,), jnp.int32))
    numbers = (_shape((), jnp.float32), _shape((), jnp.float32))  # the temperature and top-p
    shapes = (*map(_abstract, split(policy.params, policy.lora)), *prompts, noise, *numbers)
    program: Any = replicas.compile(_sampler(model_of(policy), settings))
    return _peak(program.lower(*_placed(shapes, replicas)))


def _sampler(model: Model, settings: Settings) -> Callable[..., tuple[Generation, DecodeState]]:
    """The sampler of one device's share, as `grpo_jax.rollout` compiles it."""

    def program(
        trainable: Params, frozen: Params, prompts: Array, lengths: Array, noise: Noise, temperature: Array, p: Array
    ) -> tuple[Generation, DecodeState]:
        return generate(model.bind(trainable, frozen), prompts, lengths, noise, temperature, p, settings)

    return program


def _batch(subject: Subject, devices: int) -> Batch:
    """The shapes of one device's share of a mini-batch, made from those of the small batch."""
    experiment, small = subject.experiment, subject.train_batch.batch
    own, shares = small.mask.shape, devices * experiment.num_minibatches
    parts = experiment.group_parts(devices) or 1
    rows, size = experiment.prompts_per_step * parts // shares, experiment.group_size // parts
    prompt, longest = _longest_prompts(subject), max(own[2], _longest_completion(subject))
    if small.segments is not None:  # rows of whole examples: there are more of them, in proportion
        times = experiment.prompts_per_step * experiment.group_size / (PROMPTS * subject.small.group_size)
        micro = experiment.gradient_accumulation_steps
        rows, size = -(-int(own[0] * times) // (shares * micro)) * micro, 1
        prompt, longest = small.prompts.shape[1], own[2]
    if subject.algorithm.on_policy and small.advantages is None:  # a critic finds these, by token
        by_token = np.zeros(own, np.float32)
        small = small._replace(advantages=by_token, values=by_token, returns=by_token)

    def shape(name: str, x: Array) -> Any:
        dims = ((rows,), (rows, prompt if name == "prompts" else size), (rows, size, longest))[x.ndim - 1]
        return _shape(dims, x.dtype)

    return Batch(**{name: shape(name, x) for name, x in small._asdict().items() if x is not None})


def _longest_prompts(subject: Subject) -> int:
    shared = subject.prompts.shared_prefix_length
    return shared + bucket(max(len(ids) for ids in subject.prompts.ids["train"]) - shared)


def _longest_completion(subject: Subject) -> int:
    """T of a step in which every turn is as long as it may be; 0 for a method that shows the task's own."""
    experiment = subject.experiment
    if subject.algorithm.is_offline:
        return 0
    replies = max(
        (len(e.ids) - sum(e.trained) for r in subject.rollouts for group in r.episodes for e in group), default=0
    )
    new = experiment.task.max_turns * experiment.sampling.max_tokens + replies
    return new if new <= 16 else bucket(new)


def _peak(lowered: Any) -> int:
    """What a program needs while it runs: its arguments, its results where they are not those, and its own arrays."""
    found = lowered.compile().memory_analysis()
    return int(
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    )


def _shape(dims: tuple[int, ...], dtype: Any) -> Any:
    """An array's shape in its place. Any, because the trees that hold it are declared to hold arrays."""
    return jax.ShapeDtypeStruct(dims, dtype)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: _shape(x.shape, x.dtype), tree)


def _placed(tree: Any, replicas: Replicas) -> Any:
    """The shapes of trees that are placed (see `grpo_jax.sharding`)."""
    return jax.tree.map(lambda x: _shape((replicas.count, *x.shape), x.dtype), tree)


def _size(tree: Any) -> int:
    return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
