"""How much memory a run needs, by arithmetic on its config and the shapes of its policy, and how much there is.

Each term has two sizes. `certain` is a lower bound: what the run holds at the same time whatever the compiler does. A
run is refused only if the sum of these exceeds what is free, so that nothing is refused that fits. `likely` adds
activations, copies and logits; above most of what is free it is worth a warning, and it says which setting to lower.

Measured with nine runs of 4 thousand to 135 million parameters (SmolLM2), in float32 on one device of a CPU: the peak
of the process beyond the loaded policy was 0.95 to 1.31 times the `likely` sum, and at least 1.7 times `certain`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from grpo_jax import sharding
from grpo_jax.algorithms import Algorithm, algorithm_of
from grpo_jax.algorithms.minibatches import shared_out
from grpo_jax.errors import RunError, UserError, is_out_of_memory, one_line
from grpo_jax.experiment import Experiment
from grpo_jax.logprobs import MAX_LOGITS
from grpo_jax.policy.config import ModelConfig, from_scratch
from grpo_jax.policy.transformer import abstract

PROGRAM = 4e8  # bytes that the programs of a run and their compiler took on a CPU, whatever the policy
COMPLETION = 1000  # bytes: text, tokens and metrics of one completion as Python objects, at the least
When = Literal["always", "sampling", "training", "host"]
Size = Literal["certain", "likely"]
TIGHT = 0.9  # of the free memory, from where on a run is warned of


class Term(NamedTuple):
    """What memory is for.

    Attributes:
      what: in words.
      certain, likely: bytes, on one device or, for `host`, of the process.
      when: `always`, or while the run samples, or while it trains.
      advice: which settings make it smaller.
    """

    what: str
    certain: float
    likely: float
    when: When
    advice: str


class Plan(NamedTuple):
    """What the memory of a run follows from.

    Attributes:
      experiment: its config.
      model: the shape of its policy.
      num_devices: how many devices share a batch.
      prompt_length: tokens of its longest prompt.
      samples: whether the policy samples on these devices, and not a generator of the user's own.
    """

    experiment: Experiment
    model: ModelConfig
    num_devices: int
    prompt_length: int = 0
    samples: bool = True


def terms(plan: Plan) -> list[Term]:
    """What a run needs memory for."""
    return [*_of_policy(plan), _of_activations(plan), _of_sampling(plan), *_of_host(plan)]


def _of_policy(plan: Plan) -> list[Term]:
    """Adam keeps two numbers for each trained one, and the gradient is one more; all of them are float32."""
    e = plan.experiment
    shapes = abstract(plan.model, dtype=e.policy.dtype, lora=e.policy.lora)
    sizes = {path: math.prod(leaf.shape) for path, leaf in shapes.items()}
    trained = sum(n for path, n in sizes.items() if e.policy.lora is None or ".lora_" in path)
    weights = 12 * trained + (sum(sizes.values()) - trained) * _item(plan)
    reference = 4 * trained if algorithm_of(e).needs_reference(e) else 0
    copies = 8 * trained + (trained * _item(plan) if _item(plan) < 4 else 0)
    smaller = "policy.scratch.hidden_size or num_layers" if e.policy.source == "scratch" else "the size of the policy"
    advice = f"lower {smaller}" + (" (or train adapters alone: policy.lora)" if e.policy.lora is None else "")
    return [
        Term("weights and optimizer", weights, weights, "always", advice),
        Term("the reference policy", reference, reference, "always", advice),
        Term("gradients", 4 * trained, 4 * trained + copies, "training", advice),
    ]


def _of_activations(plan: Plan) -> Term:
    """What the backward pass of a micro-batch keeps: float32 numbers by token and layer, and a chunk of logits."""
    e, c = plan.experiment, plan.model
    pieces = plan.num_devices * e.num_minibatches * e.gradient_accumulation_steps
    length = _longest(plan)
    completions, prompts = -(-e.prompts_per_step * e.group_size // pieces), -(-e.prompts_per_step // pieces)
    tokens = completions * length + prompts * plan.prompt_length
    heads, attended = (c.num_heads + c.num_kv_heads) * c.head_dim, plan.prompt_length + length
    layer = 8 * c.hidden_size + 4 * heads + 5 * c.intermediate_size + 3 * c.num_heads * attended
    layers = c.num_layers * c.hidden_size + layer if e.gradient_checkpointing else c.num_layers * layer
    logits = 4 * min(tokens, max(256, MAX_LOGITS // c.vocab_size)) * c.vocab_size
    advice = "raise gradient_accumulation_steps" + (
        "" if e.gradient_checkpointing else " or set gradient_checkpointing"
    )
    return Term("activations", 0, 4 * (tokens * layers + logits), "training", advice)


def _of_sampling(plan: Plan) -> Term:
    """The keys and values of all rows that are sampled at once, in a step or in an evaluation, and their logits."""
    e, c, algorithm = plan.experiment, plan.model, algorithm_of(plan.experiment)
    v, n = e.evaluation, plan.num_devices
    of_step = -(-e.prompts_per_step * e.group_size // n) if algorithm.on_policy else 0
    prompts = max(1, min(v.batch_size // v.num_samples // n, -(-max(_evaluated(plan)) // n)))
    of_evaluation = prompts * v.num_samples if type(algorithm).evaluate is Algorithm.evaluate else 0
    rows, place = max(of_step, of_evaluation), 2 * c.num_layers * c.num_kv_heads * c.head_dim * _item(plan)
    certain = rows * max(e.sampling.max_tokens - 1, 1) * place if plan.samples else 0
    likely = rows * (_longest(plan) * place + 16 * c.vocab_size) + e.prompts_per_step * plan.prompt_length * place
    lower = "prompts_per_step, group_size or sampling.max_tokens"
    advice = f"lower {lower if of_step >= of_evaluation else 'evaluation.batch_size or num_samples'}"
    return Term("keys and values", certain, likely, "sampling", advice)


def _of_host(plan: Plan) -> list[Term]:
    """The program, and completions as Python objects: those of a step, and the records of evaluations."""
    e = plan.experiment
    of_step, records = e.prompts_per_step * e.group_size, sum(_evaluated(plan)) * e.evaluation.num_samples
    most = of_step * (1 + e.dynamic_sampling_rounds)
    of_steps = "prompts_per_step, group_size or dynamic_sampling_rounds"
    if not e.dynamic_sampling_rounds:
        of_steps = "prompts_per_step or group_size"
    lower = of_steps if most >= records else "evaluation.num_samples"
    certain, likely = (of_step + records) * COMPLETION, (most + 2 * records) * COMPLETION
    return [
        Term("completions", certain, likely, "host", f"lower {lower}"),
        Term("the program", 0, PROGRAM, "host", "free some memory"),
    ]


def _item(plan: Plan) -> int:
    """Bytes of a number that the policy computes with."""
    return 2 if plan.experiment.policy.dtype == "bfloat16" else 4


def _longest(plan: Plan) -> int:
    """The most tokens that an episode samples."""
    return int(plan.experiment.sampling.max_tokens * plan.experiment.task.max_turns)


def _evaluated(plan: Plan) -> list[int]:
    """How many prompts of each split are evaluated."""
    v = plan.experiment.evaluation
    return [min(v.num_prompts, len(getattr(plan.experiment.task, split))) for split in v.splits]


@dataclass(frozen=True)
class Need:
    """What is needed somewhere, and how many bytes are free there; None if that is not known."""

    terms: list[Term]
    free: float | None

    def total(self, size: Size) -> float:
        """The sum of the terms, of which those of sampling and those of training are not held at the same time."""
        by_time = dict.fromkeys(get_args(When), 0.0)
        for term in self.terms:
            by_time[term.when] += getattr(term, size)
        return by_time["always"] + by_time["host"] + max(by_time["sampling"], by_time["training"])

    def largest(self, size: Size) -> Term:
        """The largest term."""
        return max(self.terms, key=lambda term: getattr(term, size))


def needs(plan: Plan) -> list[Need]:
    """What a run needs on a device and on the host; on a CPU, whose devices share its memory, in one sum."""
    found = terms(plan)
    on_device, on_host = [t for t in found if t.when != "host"], [t for t in found if t.when == "host"]
    free = sharding.free_memory(plan.num_devices)
    if free is not None:
        return [Need(on_device, free), Need(on_host, free_memory())]
    n = plan.num_devices
    each = [t._replace(certain=t.certain * n, likely=t.likely * n) for t in on_device]
    return [Need([*each, *on_host], free_memory())]


def require_memory(plan: Plan) -> list[str]:
    """Returns warnings of a run that may run out of memory.

    Raises:
      UserError: if the run certainly needs more than is free.
    """
    warnings = []
    for need in needs(plan):
        if need.free is None:
            continue
        if need.total("certain") > need.free:
            most = need.largest("certain")
            raise UserError(
                f"this run needs at least {_gib(need.total('certain'))} of memory, most of it for {most.what}, and "
                f"{_gib(need.free)} are free: {most.advice}."
            )
        if need.total("likely") > TIGHT * need.free:
            most = need.largest("likely")
            warnings.append(
                f"this run may need {_gib(need.total('likely'))} of memory, most of it for {most.what}, and "
                f"{_gib(need.free)} are free; if it runs out of memory, {most.advice}"
            )
    return warnings


def require_memory_for_scratch(experiment: Experiment) -> None:
    """Raises `UserError` for a policy from scratch that is too large to be made; nothing for another policy."""
    if experiment.policy.source == "scratch":
        shape = from_scratch(experiment.policy.scratch)
        require_memory(Plan(experiment, shape, shared_out(experiment).count, samples=False))


@contextmanager
def out_of_memory_explained() -> Iterator[list[Plan]]:
    """Turns an error of memory that has run out into a `RunError` that says which settings to change.

    The list is for the plan of the run under way, as soon as there is one.
    """
    plans: list[Plan] = []
    try:
        yield plans
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        largest = [need.largest("likely").advice for plan in plans for need in needs(plan)]
        advice = ", or ".join(dict.fromkeys(largest)) or "choose a smaller policy"
        raise RunError(
            f"the run is out of memory ({one_line(error, 200)}): {advice}. Its checkpoints are as they were, and it "
            "can be resumed from them."
        ) from error


def free_memory() -> int | None:
    """Bytes of main memory that this process can still get, swap and its cgroup's limit included; None if unknown."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        machine = {words[0]: int(words[1]) * 1024 for words in lines}
        bounds = [machine["MemAvailable:"] + machine.get("SwapFree:", 0)]
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, ValueError, KeyError, IndexError):
        return None
    for controllers, path in groups:
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache")
        else:
            continue
        own = root / path.lstrip("/")
        bounds += [b for folder in (own, *own.parents) if folder.is_relative_to(root) for b in _left(folder, *names)]
    return max(min(bounds), 0)


def _left(folder: Path, limit: str, usage: str, cached: str) -> list[int]:
    """What a cgroup leaves, files that it caches not counted; nothing where it has no limit."""
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        return [most - used + int(statistics[cached])]
    except (OSError, ValueError, KeyError):  # "max" for no limit, or no such file in a container
        return []


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
