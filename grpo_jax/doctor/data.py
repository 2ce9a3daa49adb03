"""Checks of the task: its splits and prompts, and how seeds and groups choose among them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grpo_jax.doctor.check import Check, count, verified
from grpo_jax.doctor.subject import Subject
from grpo_jax.rewards.protocol import ARGUMENTS
from grpo_jax.sharding import Array
from grpo_jax.tasks import Example
from grpo_jax.tasks.checks import content, shared_examples


def splits_are_disjoint(subject: Subject) -> Check:
    """No held-out example is a training example.

    A task that puts the very same objects into both splits says so (`Task.held_out`), which is a warning; and so is
    an overlap that no evaluation looks at. Examples that are equal and were made twice are a mistake.
    """
    task = subject.experiment.task
    declared = set(map(id, task.train))
    shared = [task.held_out[index] for index, _ in shared_examples(task)]
    figures = {"shared": len(shared), "held_out": len(task.held_out), "train": len(task.train)}
    measured, bound = f"{len(shared):,} of {len(task.held_out):,} shared", "0 shared"
    if not shared:
        return Check("proved", measured, bound, figures=figures)
    many = f"{len(shared):,} of {count(len(task.held_out), 'held-out example')} are in the training split too"
    if all(id(example) in declared for example in shared):
        sentence = (
            f"{many}, as the task declares by using the same objects in both splits: success says how well these "
            "are learned, and nothing about others."
        )
        return Check("warning", measured, bound, sentence, figures)
    sentence = f"{many}, so that success on them may be memory: leave them out of one of the splits."
    is_seen = "held_out" in subject.experiment.evaluation.splits
    return Check("refuted" if is_seen else "warning", measured, bound, sentence, figures)


def prompts_fit(subject: Subject) -> Check:
    """Every prompt of both splits leaves room for the task's turns in the policy's context."""
    experiment, context = subject.experiment, subject.policy.config.max_positions
    new = experiment.task.max_turns * experiment.sampling.max_tokens
    lengths = [len(ids) for rows in subject.prompts.ids.values() for ids in rows]
    longest = max(lengths)
    figures = {"prompts": len(lengths), "longest": longest, "new_tokens": new, "context": context}
    return Check("proved", f"{longest} + {new} new tokens", f"{context:,}", figures=figures)


def seeds_name_the_batch(subject: Subject) -> Check:
    """The same (seed, step) makes the same batch twice, and another seed another batch."""
    small = subject.small
    first, again = subject.train_batch.batch, subject.make_batch(small).batch
    other = subject.make_batch(replace(small, seed=(small.seed + 1) % 2**31)).batch

    def same(name: str, one: object = first, two: object = again) -> bool:
        x, y = getattr(one, name), getattr(two, name)
        return x is y or np.array_equal(x, y)

    differing = [name for name in first._fields if not same(name)]
    is_other = not (same("tokens", two=other) and same("prompts", two=other))
    figures = {"differing": differing, "another_seed_differs": is_other}
    measured = f"{len(differing)} arrays differ"
    if differing:
        sentence = (
            f"two batches of the same seed and step differ in {', '.join(differing)}: look for a task function or a "
            "generator that draws random numbers of its own."
        )
        return Check("refuted", measured, "0", sentence, figures)
    if not is_other:
        sentence = (
            "another seed makes the same batch, so that runs of several seeds are one run: there is no sampling noise, "
            "and no choice of prompts."
        )
        is_noisy = subject.algorithm.on_policy and small.sampling.temperature > 0
        return Check("refuted" if is_noisy else "warning", measured, "0", sentence, figures)
    return Check("proved", measured, "0", figures=figures)


def a_group_is_one_example(subject: Subject) -> Check:
    """All completions of a group have the same prompt and columns, in the rewards' arguments and in the arrays."""
    arguments, rollouts = subject.arguments, subject.rollouts
    size = rollouts[0].mask.shape[1]
    names = [name for name in arguments if name not in ARGUMENTS or name == "prompts"]
    rows = [content([arguments[name][i] for name in names]) for i in range(len(arguments["prompts"]))]
    mixed = sum(len(set(rows[start : start + size])) > 1 for start in range(0, len(rows), size))
    strangers, groups = 0, len(rows) // size
    batches: list[tuple[Array, Array, Sequence[Example]]] = [
        (rollout.prompts, rollout.lengths, rollout.examples) for rollout in rollouts
    ]
    trained = subject.train_batch
    if trained.rollout is not None:
        batches.append((trained.batch.prompts, trained.batch.lengths, trained.rollout.examples))
    for ids, lengths, examples in batches:
        strangers += sum(
            ids[p, : lengths[p]].tolist() != subject.tokenizer.render(example["prompt"])
            for p, example in enumerate(examples)
        )
    figures = {"groups": groups, "mixed_groups": mixed, "prompts_of_another_example": strangers}
    sentence = (
        f"{mixed} of {count(groups, 'group')} hold completions of several examples and {count(strangers, 'prompt')} "
        "of a batch are not those of their examples, so that completions of different questions are compared."
    )
    return verified(not (mixed or strangers), f"{mixed + strangers} mixed", "0", sentence, figures)
